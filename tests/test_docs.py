"""The Python on a page of the documentation runs as it stands, and the recipes on it are such."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from potstill import registry
from potstill.recipe.load import recipe_from
from potstill.recipe.yaml_core import parse_yaml

DOCS = Path(__file__).parent.parent / "docs"
REGISTRIES = [each for each in vars(registry).values() if isinstance(each, registry.Registry)]
PARTS = {
    "name": "page",
    "task": {"name": "tabular-classification"},
    "data": {"source": "sklearn", "path": "load_wine"},
    "teacher": {"model": "potstill:mlp", "train": {"epochs": 1}},
    "student": {"model": "potstill:mlp"},
    "objective": {"soft": {"loss": "kl"}, "hard": {"loss": "cross_entropy"}},
}
"""A recipe, of which the snippets of a page are parts."""


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["speed.md", "schemes.md", "extending.md"])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    for each in REGISTRIES:  # what a page registers is gone afterwards
        each.names()
        monkeypatch.setattr(each, "_entries", dict(each._entries))
        monkeypatch.setattr(each, "_facts", copy.deepcopy(each._facts))
    found = blocks(page, "python")
    assert len(found) > 1
    names: dict[str, object] = {"__name__": page}
    for block in found:
        exec(compile(block, page, "exec", dont_inherit=True), names)


SNIPPETS = [pytest.param(text, id=f"{place}") for place, text in enumerate(blocks("schemes.md", "yaml"))]


@pytest.mark.parametrize("text", SNIPPETS)
def test_the_recipes_of_the_schemes_are_recipes(text: str) -> None:
    parsed = parse_yaml(text, "schemes.md")
    assert not parsed.problems
    whole: dict[str, Any] = {**PARTS, **parsed.value}
    if "teachers" in whole:
        del whole["teacher"]
    recipe_from(whole, allow_code=False)
