"""``potstill copy``: a packaged recipe, to change as you like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def copy(
    name: Annotated[str, typer.Argument(help="A name of `potstill list recipes`.")],
    target: Annotated[str | None, typer.Argument(help="The file to write; NAME.yaml if omitted.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
) -> None:
    """Copy a packaged recipe into a file of your own."""
    from potstill.errors import PotstillError, did_you_mean
    from potstill.recipe.load import packaged_recipes

    known = packaged_recipes()
    if name not in known:
        raise PotstillError(f"there is no packaged recipe '{name}'; {did_you_mean(name, known)}")
    write_new(Path(target or f"{name}.yaml"), known[name].read_text(encoding="utf-8"), force=force)


def write_new(path: Path, text: str, *, force: bool) -> None:
    """Write a file that is not there yet, and say so.

    Raises:
        PotstillError: the file is there and ``force`` is false, or its folder cannot be written.
    """
    from potstill.errors import PotstillError

    if path.exists() and not force:
        raise PotstillError(f"{path} is there already; choose another name or say --force")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PotstillError(f"{path} cannot be written: {error}") from error
    typer.echo(f"wrote {path}")
