"""``potstill cache``: a teacher's answers ahead of the training, and what runs share."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from potstill.cli.options import (
    AllowCode,
    OverridesArgument,
    Quiet,
    RecipeArgument,
    Verbose,
    is_first_process,
    set_up_logging,
)
from potstill.cli.plan import print_cache


class _RecipeFirst(TyperGroup):
    """``potstill cache RECIPE`` is ``potstill cache fill RECIPE``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the verb in where there is none."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["fill", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RecipeFirst,
    help="Ask a recipe's teachers for all their answers ahead of the training; list or clear what runs share.",
    no_args_is_help=True,
)


@app.command()
def fill(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say how many bytes and how much time it takes; nothing is kept.")
    ] = False,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The run's folder; runs/NAME-HASH if omitted.")
    ] = None,
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train the teachers if need be and keep their answers, so that students train without them.

    The verb may be left out: `potstill cache RECIPE`.

    The same command goes on after a stop. With `torchrun --nproc_per_node 4 -m potstill cache RECIPE` several
    processes share the work. `potstill distill RECIPE` goes on in the same folder; other runs with the same teacher
    and data find the answers too.
    """
    set_up_logging(quiet=quiet, verbose=verbose)
    from potstill.recipe.load import load_recipe
    from potstill.runs.caching import cache_settings, cached_teachers
    from potstill.runs.filling import fill, forecast
    from potstill.runs.plan import Plan
    from potstill.runs.steps import Run

    loaded = load_recipe(recipe, overrides or [], allow_code=allow_code)
    made = Plan(loaded, allow_code=allow_code)
    names = cached_teachers(made)
    if not names:
        from potstill.errors import RunError

        if not made.recipe.all_teachers:
            raise RunError("the recipe has no teacher, so there is nothing to cache")
        raise RunError("the recipe has no teacher whose answers could be kept: a model that is trained by then")
    for name in names:
        cache_settings(made.recipe, name, strict=True)  # what cannot be cached is said before a teacher is trained
    if plan:
        for name in names:
            print_cache(forecast(made, name))
        return
    bars = False if quiet or not is_first_process() else None
    run = Run(loaded, output, allow_code=allow_code, bars=bars, strict=True)
    try:
        run.prepare_teachers()
        for name in names:
            counts = fill(run, name)
            if is_first_process():
                typer.echo(f"{name}: {counts.made} answers made, {counts.found} were there")
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on where it was", err=True)
        raise typer.Exit(130) from None


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
    kind: Annotated[
        str | None, typer.Argument(help="Only this kind, `teachers` or `signals` (their answers); all if omitted.")
    ] = None,
    days: Annotated[float, typer.Option(min=0, help="Only what was not used for this many days.")] = 0.0,
) -> None:
    """Delete what is in the cache; what a run still needs is made again."""
    from potstill.errors import RunError, did_you_mean
    from potstill.runs.cache import Cache

    cache = Cache()
    kinds = {"teachers", "signals", *(entry.kind for entry in cache.entries())}
    if kind is not None and kind not in kinds:
        raise RunError(f"the cache holds no '{kind}'; {did_you_mean(kind, kinds)}")
    freed = cache.clear(kind, older_than_s=days * 86400)
    typer.echo(f"freed {freed / 2**20:.2f} MiB")
