"""Arguments that several verbs share, and the set-up of logging."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Annotated

import typer

_LOOK_S = 0.1
_SHARED = 0.2
"""Share of the processors that others use, from which on they are shared."""

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


def share_cores() -> None:
    """Let waiting threads sleep where other processes want the processors, before torch is loaded and has its threads.

    Threads of OpenMP spin while they wait. On processors of one's own that is faster, nearly twice for small models; on
    shared ones it is as much slower, for everybody.
    """
    if "torch" in sys.modules or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    before = _worked()
    if before is None:
        return
    time.sleep(_LOOK_S)
    after, processors = _worked(), os.cpu_count() or 1
    used = ((after or before) - before) / (_LOOK_S * processors)
    if used > _SHARED:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        logging.getLogger("potstill").info(
            "cpu: other processes use %.0f %% of it, so waiting threads sleep", 100 * used
        )


def _worked() -> float | None:
    """Return the seconds that all processors together have worked, where the system tells."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            fields = [int(number) for number in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


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
    share_cores()
