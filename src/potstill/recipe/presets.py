"""``objective: {preset: NAME}``: the terms of a preset in place of its name, before anything else is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from potstill.errors import ObjectiveError, Problem, did_you_mean
from potstill.losses.ramps import is_ramp
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
    terms = {key: value for key, value in objective.items() if isinstance(value, Mapping) and not is_ramp(value)}
    options = {key: value for key, value in objective.items() if key != "preset" and key not in terms}
    if not isinstance(name, str):
        return _without(tree), [Problem((*path, "preset"), f"expected the name of a preset, got {name!r}")]
    plain = {key: value for key, value in options.items() if not is_ramp(value)}  # ramps are checked in their terms
    problems = presets.check(name, plain, path=path, allow_code=False) or _unknown(name, options, terms)
    if problems:
        where = (*path, "preset") if name not in presets.names() else None
        return _without(tree), [Problem(where or p.path, p.message, p.hint) for p in problems]
    made = _terms(name, options)
    if isinstance(made, Problem):
        return _without(tree), [made]
    for key, value in terms.items():
        made[key] = {**({} if "loss" in value else made.get(key, {})), **value}
    return {**tree, "objective": made}, []


def _terms(name: str, options: Mapping[str, Any]) -> dict[str, Any] | Problem:
    try:
        made: dict[str, Any] = presets.get(name)(**options)
    except ObjectiveError as error:
        return Problem(("objective",), str(error))
    return made


def _unknown(name: str, options: Mapping[str, Any], terms: Mapping[str, Any]) -> list[Problem]:
    """Ramps that are no option of a preset, and changes to terms that it has not."""
    known = presets.options(presets.get(name))
    strange = [key for key in options if key not in known]
    if strange:
        return [
            Problem(("objective", key), f"preset '{name}' has no option '{key}'", did_you_mean(key, known))
            for key in strange
        ]
    made = _terms(name, options)
    if isinstance(made, Problem):
        return [made]
    strange = [key for key, value in terms.items() if "loss" not in value and key not in made]
    return [
        Problem(
            ("objective", key),
            f"preset '{name}' has no term '{key}', and no `loss` makes it one",
            did_you_mean(key, made),
        )
        for key in strange
    ]


def _without(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the terms that are certain; a stand-in where there are none, so that only the preset is wrong."""
    objective = {
        key: value for key, value in tree["objective"].items() if isinstance(value, Mapping) and "loss" in value
    }
    return {**tree, "objective": objective or {"hard": {"loss": "cross_entropy"}}}
