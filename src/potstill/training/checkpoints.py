"""Checkpoints that are whole or not there: a marker is written last, and only marked ones are resumed from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

MARKER = "complete.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def mark_complete(checkpoint: Path) -> None:
    """Write the marker: the name and size of every file. Call it after everything else is written."""
    sizes = {
        str(file.relative_to(checkpoint)): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != MARKER
    }
    staged = checkpoint / (MARKER + ".tmp")
    staged.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    staged.replace(checkpoint / MARKER)


def is_complete(checkpoint: Path) -> bool:
    """Return whether the marker is there and every file has the size it had."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in ``folder``; partial ones are deleted."""
    found = None
    for checkpoint in _by_step(folder):
        if is_complete(checkpoint):
            found = checkpoint
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return found


def rotate(folder: Path, limit: int | None, keep: str | None = None) -> None:
    """Delete all but the newest ``limit`` checkpoints and the one called ``keep``; ``None`` keeps all."""
    if limit is None or limit <= 0:
        return
    for checkpoint in _by_step(folder)[:-limit]:
        if keep is None or Path(keep).name != checkpoint.name:
            (checkpoint / MARKER).unlink(missing_ok=True)  # first, so that a half-deleted one is never resumed from
            shutil.rmtree(checkpoint, ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.match(path.name)) and path.is_dir()]
    return [path for match, path in sorted(named, key=lambda item: int(item[0].group(1)))]
