"""Arguments that several verbs share, and the set-up of logging."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or a name of `potstill list recipes`.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, e.g. train.epochs=3.")
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Allow the recipe to import the Python modules that it names.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and the result.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Everything, the libraries' messages included.")]


def set_up_logging(*, quiet: bool = False, verbose: bool = False) -> None:
    """Send log lines to standard error: potstill's at the chosen level, other libraries' warnings only if verbose."""
    import warnings

    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, handlers=[handler], force=True)
    logging.getLogger("potstill").setLevel(level)
    if not verbose:
        warnings.filterwarnings("ignore")
