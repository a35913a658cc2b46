"""``potstill show``: what a recipe means."""

from __future__ import annotations

import typer

from potstill.cli.options import AllowCode, OverridesArgument, RecipeArgument, set_up_logging


def show(recipe: RecipeArgument, overrides: OverridesArgument = None, allow_code: AllowCode = False) -> None:
    """Print the resolved recipe and the exact formula of its objective with its numbers."""
    set_up_logging()
    from potstill.losses.objective import Objective
    from potstill.recipe.build import make_term
    from potstill.recipe.layers import as_written, found_layers
    from potstill.recipe.load import load_recipe
    from potstill.runs.folder import to_yaml

    loaded = load_recipe(recipe, overrides or [], allow_code=allow_code)
    typer.echo(to_yaml(loaded.model_dump(mode="json")).rstrip())
    specs = [as_written(name, spec) for name, spec in loaded.objective.items()]
    balance = None if loaded.balance is None else loaded.balance.model_dump()
    terms = {name: make_term(spec) for each in specs for name, spec in each.items()}
    open_ = any(found_layers(spec) for spec in loaded.objective.values())  # whose names the balance may say
    objective = Objective(terms, balance={**balance, "reference": None} if balance and open_ else balance)
    typer.echo("\n# the objective\n" + "\n".join(f"# {line}" for line in objective.describe().splitlines()))
