"""``potstill cache``: trained teachers and more that runs share."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="List or clear what runs share: trained teachers, by content.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """List what is in the cache, the most recently used first."""
    import time

    from potstill.runs.cache import Cache

    cache = Cache()
    entries = cache.entries()
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        typer.echo(f"{entry.kind:<12} {entry.key}  {entry.bytes / 2**20:10.2f} MiB  used {used}")
    total = sum(entry.bytes for entry in entries)
    typer.echo(f"{len(entries)} entries, {total / 2**20:.2f} of {cache.limit / 2**20:.0f} MiB, in {cache.root}")


@app.command()
def clear(
    kind: Annotated[str | None, typer.Argument(help="Only this kind, such as teachers; all if omitted.")] = None,
    days: Annotated[float, typer.Option(min=0, help="Only what was not used for this many days.")] = 0.0,
) -> None:
    """Delete what is in the cache; what a run still needs is made again."""
    from potstill.errors import RunError, did_you_mean
    from potstill.runs.cache import Cache

    cache = Cache()
    kinds = {"teachers", *(entry.kind for entry in cache.entries())}
    if kind is not None and kind not in kinds:
        raise RunError(f"the cache holds no '{kind}'; {did_you_mean(kind, kinds)}")
    freed = cache.clear(kind, older_than_s=days * 86400)
    typer.echo(f"freed {freed / 2**20:.2f} MiB")
