"""Every script in ``examples`` runs as a person would run it, and prints what its docstring promises."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def docstring(script: Path) -> str:
    return ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""


def promises(script: Path) -> list[str]:
    """What stands in quotes after ``Promises:``, at the end of the docstring."""
    _, _, listed = docstring(script).partition("Promises:")
    return re.findall(r'"([^"]+)"', listed)


def is_small(script: Path) -> bool:
    """Whether it leaves nothing behind in a process: it registers no component of its own."""
    return not script.name.startswith("new_")


SLOW = {"multi_task_distiller.py": pytest.mark.slow}  # two trainings of two teachers


@pytest.mark.parametrize(
    "script",
    [pytest.param(each, id=each.name, marks=SLOW.get(each.name, ())) for each in EXAMPLES if is_small(each)],
)
def test_small_example_keeps_its_promises(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")  # in this process, which has done the imports
    printed = capsys.readouterr().out
    for promise in promises(script):
        assert promise in printed.splitlines(), printed


@pytest.mark.parametrize("script", [each for each in EXAMPLES if not is_small(each)], ids=lambda path: path.name)
def test_example_keeps_its_promises(script: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for promise in promises(script):
        assert promise in done.stdout.splitlines(), done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_example_says_how_it_is_called_and_what_it_promises(script: Path) -> None:
    assert f"    python examples/{script.name}" in docstring(script)
    assert promises(script), 'end the docstring with: Promises: "a line that the script prints when all is well"'


def test_every_example_is_in_the_list() -> None:
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES if f"`{path.name}`" not in listed] == []
