"""``potstill check``: is everything right, without training."""

from __future__ import annotations

import typer

from potstill.cli.options import AllowCode, OverridesArgument, RecipeArgument, Verbose, set_up_logging


def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    allow_code: AllowCode = False,
    verbose: Verbose = False,
) -> None:
    """Validate a recipe, read its data, build its models and compute the objective once; nothing is trained."""
    set_up_logging(verbose=verbose)
    from potstill.recipe.dry_run import dry_run
    from potstill.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], allow_code=allow_code)
    for line in dry_run(loaded, allow_code=allow_code):
        typer.echo(line)
    typer.echo("everything fits")
