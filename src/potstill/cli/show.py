"""``potstill show``: what a recipe means."""

from __future__ import annotations

import typer

from potstill.cli.options import AllowCode, OverridesArgument, RecipeArgument, set_up_logging


def show(recipe: RecipeArgument, overrides: OverridesArgument = None, allow_code: AllowCode = False) -> None:
    """Print the resolved recipe and the exact formula of its objective with its numbers."""
    set_up_logging()
    from potstill.recipe.formula import formulas
    from potstill.recipe.load import load_recipe
    from potstill.runs.folder import to_yaml

    loaded = load_recipe(recipe, overrides or [], allow_code=allow_code)
    typer.echo(to_yaml(loaded.model_dump(mode="json")).rstrip())
    for whose, formula in formulas(loaded, allow_code=allow_code).items():
        typer.echo("\n" + "\n".join(f"# {line}" for line in [whose, *formula.splitlines()]))
