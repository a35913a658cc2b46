"""``potstill distill``: the main job."""

from __future__ import annotations

from typing import Annotated

import typer

from potstill.cli.options import (
    AllowCode,
    OverridesArgument,
    Quiet,
    RecipeArgument,
    Verbose,
    is_first_process,
    set_up_logging,
)


def distill(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The run's folder; runs/NAME-HASH if omitted.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Repeat the run with this many seeds and show the spread over them.")
    ] = 1,
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train teacher, baseline and distilled student, and judge them. The same command goes on after a stop."""
    set_up_logging(quiet=quiet, verbose=verbose)
    from potstill.cli.output import print_run, print_seeds
    from potstill.experiments.seeds import run_seeds, seed_overrides
    from potstill.recipe.load import load_recipe
    from potstill.report.html import write_report
    from potstill.runs.steps import Run

    changes = list(overrides or [])
    loaded = load_recipe(recipe, changes, allow_code=allow_code)
    bars = False if quiet or not is_first_process() else None

    def one(seed: int, folder: str) -> None:
        varied = load_recipe(recipe, [*changes, *seed_overrides(seed)], allow_code=allow_code)
        Run(varied, folder, allow_code=allow_code, bars=bars, strict=True).execute()

    try:
        if seeds == 1:
            run = Run(loaded, output, allow_code=allow_code, bars=bars, strict=True)
            metrics = run.execute()
            if is_first_process():
                print_run(metrics, run.folder.path)
        else:
            tree = loaded.model_dump(mode="json", exclude={"preflight"})
            summary, folder = run_seeds(loaded.name, loaded.seed, seeds, output, one, tree)
            if is_first_process():
                write_report(folder)
                print_seeds(summary, folder)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on where it was", err=True)
        raise typer.Exit(130) from None
