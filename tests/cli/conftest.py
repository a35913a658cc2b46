"""The command line in the process of the tests."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from potstill.cli import main
from tests.cli.saying import IRIS, Command, Said


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Every training begins with a full garbage collection, which need not look through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def potstill(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """The command line in this process, with the streams as a shell's pipe would get them."""
    root, own = logging.getLogger(), logging.getLogger("potstill")
    before = root.handlers[:], root.level, own.level
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> Said:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["potstill", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return Said(int(ended.value.code or 0), out, err)

    yield run
    root.handlers[:], root.level = before[:2]
    own.setLevel(before[2])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "flowers.yaml"
    path.write_text(IRIS)
    return path
