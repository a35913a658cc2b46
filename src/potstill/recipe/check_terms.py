"""The terms of an objective in a recipe: losses, options, ramps, scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import ModuleDict

from potstill.errors import ObjectiveError, PotstillError, Problem, did_you_mean
from potstill.losses.ramps import as_number, ends, is_ramp
from potstill.losses.scale import as_scale
from potstill.losses.term import compares
from potstill.recipe.schema import TermSpec
from potstill.recipe.trees import Path_, section, unknown
from potstill.registry import losses


def check_objective(objective: Any, path: Path_, *, allow_code: bool) -> list[Problem]:
    """Return every mistake in the terms of an objective: the recipe's, a stage's or a teacher's own."""
    problems: list[Problem] = []
    if isinstance(objective, Mapping) and not objective:
        return [Problem(path, "expected at least one term, got none")]
    for name, spec in section(objective).items():
        if hasattr(ModuleDict, str(name)):
            problems.append(Problem((*path, name), f"a term cannot be called '{name}'", "choose another name"))
        if isinstance(spec, Mapping) and isinstance(spec.get("loss"), str):
            problems += _term(spec, (*path, name), allow_code)
    return problems


def check_reference(tree: Mapping[str, Any]) -> list[Problem]:
    """The term to whose length others are brought is there; among found layers that shows later."""
    wanted = section(tree, "balance").get("reference")
    terms = section(tree, "objective")
    layered = any(isinstance(spec, Mapping) and spec.get("layers") is not None for spec in terms.values())
    if wanted is None or layered or wanted in terms:
        return []
    return [Problem(("balance", "reference"), f"there is no term '{wanted}'", did_you_mean(str(wanted), terms))]


def _term(spec: Mapping[str, Any], path: Path_, allow_code: bool) -> list[Problem]:
    problems: list[Problem] = []
    both_ends: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for key, value in spec.items():
        try:
            if key == "scale":
                as_scale(value)
            ramp = as_number(value, allow_code=allow_code)
            both = _ends(ramp)
        except PotstillError as error:
            problems.append(Problem((*path, key), str(error)))
            continue
        if key not in TermSpec.model_fields:
            both_ends[0][key], both_ends[1][key] = both
        elif key == "weight" and isinstance(value, Mapping) and not is_ramp(value):
            message = f"expected a number or a ramp `{{from: …, to: …}}`, got {dict(value)}"
            problems.append(Problem((*path, key), message))
    wrong = unknown(spec["loss"], losses, (*path, "loss"), allow_code)
    if wrong:
        return problems + wrong
    found = dict.fromkeys(
        p for end in both_ends for p in losses.check(spec["loss"], end, path=path, allow_code=allow_code)
    )
    return problems + [_with_fields(p, TermSpec) for p in found]


def _ends(number: Any) -> tuple[Any, Any]:
    """Return the first and the last value of a number.

    Raises:
        ObjectiveError: a schedule of one's own fails.
    """
    try:
        return ends(number)
    except PotstillError:
        raise
    except Exception as error:  # code of one's own may raise anything
        raise ObjectiveError(f"{number} failed: {type(error).__name__}: {error}") from error


def _with_fields(problem: Problem, spec: type[TermSpec]) -> Problem:
    """Let the nearest name of an unknown option be a key of the section too (``wieght`` is ``weight``)."""
    key = str(problem.path[-1])
    if "has no option" not in problem.message:
        return problem
    known = [*spec.model_fields]
    close = did_you_mean(key, known)
    return Problem(problem.path, problem.message, close) if close.startswith("did") else problem


def soft_terms(objective: Any, path: Path_) -> list[tuple[Path_, Mapping[str, Any]]]:
    """Return the terms that compare with a teacher, each with its place."""
    found: list[tuple[Path_, Mapping[str, Any]]] = []
    for name, spec in section(objective).items():
        if isinstance(spec, Mapping) and spec.get("loss") in losses.names() and compares(spec["loss"]):
            found.append(((*path, name), spec))
    return found
