"""Arguments that several verbs share, and the set-up of logging."""

from __future__ import annotations

import logging
import os
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


def is_first_process() -> bool:
    """Return whether this process, of those that a launcher started, is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def set_up_logging(*, quiet: bool = False, verbose: bool = False) -> None:
    """Send log lines to standard error: potstill's at the chosen level, other libraries' warnings only if verbose."""
    import warnings

    quiet = quiet or not is_first_process()
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, handlers=[handler], force=True)
    logging.getLogger("potstill").setLevel(level)
    if not verbose:
        warnings.filterwarnings("ignore")
