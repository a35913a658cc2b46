"""Classifiers of other libraries whose code raises errors of its own: mistakes of the recipe, and no tracebacks."""

from __future__ import annotations

import pytest
from sklearn.linear_model import LogisticRegression

from potstill.models.load import Blueprint


class LibraryError(Exception):
    """As libraries have."""


class Picky(LogisticRegression):
    def __init__(self, depth=3):
        if depth < 1:
            raise LibraryError("'depth' must be positive")
        super().__init__()
        self.depth = depth


def test_a_constructor_with_errors_of_its_own():
    name = f"sklearn:{__name__}.Picky"
    assert Blueprint(name, {"depth": 1}).check(("teacher",), allow_code=True) == []
    (problem,) = Blueprint(name, {"depth": 0}).check(("teacher",), allow_code=True)
    assert problem.path == ("teacher", "kwargs", "depth")
    assert "must be positive" in str(problem)


def test_a_module_with_errors_of_its_own(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "breaks_when_imported.py").write_text("raise RuntimeError('no licence')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = Blueprint("sklearn:breaks_when_imported.Forest").check(("teacher",), allow_code=True)
    assert problem.path == ("teacher", "model")
    assert "cannot be imported: no licence" in str(problem)
