"""``potstill report``: what a person reads of a finished run, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[str, typer.Argument(help="The folder of a run, or of several seeds.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The file; report.html in the folder if omitted.")
    ] = None,
) -> None:
    """Write the report of a finished run as one HTML file that needs no network, and print its path."""
    from potstill.report.html import write_report

    typer.echo(str(write_report(Path(run), output)))
