"""``potstill evaluate``: the figures of a finished run, measured again from its saved models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from potstill.cli.options import AllowCode, Quiet, Verbose, set_up_logging


def evaluate(
    run: Annotated[str, typer.Argument(help="The folder of a run.")],
    split: Annotated[str, typer.Option(help="The split to judge on: test, validation or train.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Judge the saved models of a run again; what the run measured stays as it is."""
    set_up_logging(quiet=quiet, verbose=verbose)
    from potstill.cli.output import print_run
    from potstill.runs.steps import open_run

    opened = open_run(Path(run), allow_code=allow_code, bars=False if quiet else None)
    metrics = opened.evaluate(split)
    if as_json:
        typer.echo(metrics.model_dump_json(indent=2))
    else:
        print_run(metrics, Path(run))
