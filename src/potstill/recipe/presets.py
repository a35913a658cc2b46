"""``objective: {preset: NAME}``: the terms of a preset in place of its name, before anything else is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from potstill.errors import Problem
from potstill.registry import presets


def with_preset(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return a recipe's tree with the terms of its preset, and every mistake in naming it.

    Args:
        tree: the recipe as plain data. In ``objective``, keys beside ``preset`` that hold a mapping with ``loss`` are
            terms, a mapping without it changes the preset's term of that name, and all else are options of the preset.
    """
    objective = tree.get("objective")
    if not isinstance(objective, Mapping) or "preset" not in objective:
        return dict(tree), []
    name, path = objective["preset"], ("objective",)
    terms = {key: value for key, value in objective.items() if isinstance(value, Mapping)}
    options = {key: value for key, value in objective.items() if key != "preset" and key not in terms}
    if not isinstance(name, str):
        return _without(tree), [Problem((*path, "preset"), f"expected the name of a preset, got {name!r}")]
    problems = presets.check(name, options, path=path, allow_code=False)
    if problems:
        where = (*path, "preset") if name not in presets.names() else None
        return _without(tree), [Problem(where or p.path, p.message, p.hint) for p in problems]
    made: dict[str, Any] = presets.get(name)(**options)
    for key, value in terms.items():
        made[key] = {**({} if "loss" in value else made.get(key, {})), **value}
    return {**tree, "objective": made}, []


def _without(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the terms that are certain; a stand-in where there are none, so that only the preset is wrong."""
    objective = {
        key: value for key, value in tree["objective"].items() if isinstance(value, Mapping) and "loss" in value
    }
    return {**tree, "objective": objective or {"hard": {"loss": "cross_entropy"}}}
