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
    """Validate a recipe, read its data, build its models and look for silent faults; nothing is trained."""
    set_up_logging(verbose=verbose)
    from potstill.checks.findings import Finding, refuse
    from potstill.recipe.load import load_recipe
    from potstill.runs.plan import Plan
    from potstill.runs.preflight import examine

    loaded = load_recipe(recipe, overrides or [], allow_code=allow_code)
    findings: list[Finding] = []
    for found in examine(Plan(loaded, allow_code=allow_code)):
        if isinstance(found, Finding):
            findings.append(found)
        if isinstance(found, str) or found.level != "error":
            typer.echo(str(found))
    refuse(findings)
    typer.echo("everything fits")
