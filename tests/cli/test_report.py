"""``potstill report``: the file it writes, the path it prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from potstill.cli import app
from potstill.errors import RunError
from tests.report import made


@pytest.mark.parametrize("kind", ["run", "seeds"])
def test_it_writes_a_page_and_prints_its_path(tmp_path: Path, kind: str) -> None:
    folder = getattr(made, kind)(tmp_path / "run")
    said = CliRunner().invoke(app, ["report", str(folder)])
    assert (said.exit_code, said.stdout) == (0, f"{folder / 'report.html'}\n")
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not list(folder.glob("*.tmp"))


def test_another_file(tmp_path: Path) -> None:
    folder = made.run(tmp_path / "run")
    said = CliRunner().invoke(app, ["report", str(folder), "--output", str(tmp_path / "pages/x.html")])
    assert said.exit_code == 0
    assert (tmp_path / "pages/x.html").is_file()
    assert not (folder / "report.html").exists()


def test_no_run(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(said.exception, RunError)
    assert "expected the folder of a run" in str(said.exception)
