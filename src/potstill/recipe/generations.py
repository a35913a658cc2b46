"""Schemes that are several trainings one after the other, spread out into the teachers that they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from potstill.losses.term import compares
from potstill.recipe.schema import Recipe, SchemeSpec, TeacherSpec, TermSpec, WhoSpec

GENERATION = "generation-"


def spread_out(recipe: Recipe) -> Recipe:
    """Return a recipe with the earlier generations of a ``born_again`` scheme among its teachers; any other as it is.

    Generation k learns by the recipe's own objective, in which generation k − 1 stands for the teachers; a layer is
    compared with the same layer, for both have the same architecture. Without a teacher generation 0 learns from the
    labels alone.
    """
    if recipe.scheme.name != "born_again":
        return recipe
    count = int(recipe.scheme.options.get("generations", 2))
    teachers = dict(recipe.all_teachers)
    before = None
    if not teachers:
        teachers[f"{GENERATION}0"] = _student_as_teacher(recipe, None)
        before = f"{GENERATION}0"
    for number in range(1, count):
        terms = recipe.objective if before is None else _handed_on(recipe.objective, before, len(teachers) > 1)
        before = f"{GENERATION}{number}"
        teachers[before] = _student_as_teacher(recipe, terms)
    changes: dict[str, Any] = {"teacher": None, "teachers": teachers, "scheme": SchemeSpec()}
    if before is not None:
        changes["objective"] = _handed_on(recipe.objective, before, len(teachers) > 1)
    return recipe.model_copy(update=changes)


def _student_as_teacher(recipe: Recipe, terms: Mapping[str, TermSpec] | None) -> TeacherSpec:
    student = recipe.student
    who = {key: getattr(student, key) for key in WhoSpec.model_fields}
    return TeacherSpec(
        **who,
        model=student.model or "",
        from_teacher=student.from_teacher,
        train=recipe.train,
        objective=None if terms is None else dict(terms),
    )


def _handed_on(terms: Mapping[str, TermSpec], owner: str, several: bool) -> dict[str, TermSpec]:
    """Return the terms with one teacher in place of all; where terms are alike, weights that are numbers are added."""
    found: dict[str, TermSpec] = {}
    for name, spec in terms.items():
        made = _from(spec, owner, several) if compares(spec.loss) and not _of_itself(spec) else spec
        twin = next((key for key, each in found.items() if _but_weight(each) == _but_weight(made)), None)
        weight = None if twin is None else _sum(found[twin].weight, made.weight)
        if twin is None or weight is None:
            found[name] = made
        else:
            found[twin] = found[twin].model_copy(update={"weight": weight})
    return found


def _from(spec: TermSpec, owner: str, several: bool) -> TermSpec:
    prefix = f"{owner}/" if several else ""
    one = isinstance(spec.student, str)
    signals = [f"{prefix}{name}" for name in ([spec.student] if isinstance(spec.student, str) else spec.student)]
    layers = {place: place for place in spec.layers} if isinstance(spec.layers, Mapping) else spec.layers
    return spec.model_copy(update={"teacher": signals[0] if one else signals, "layers": layers})


def _of_itself(spec: TermSpec) -> bool:
    names = [spec.teacher] if isinstance(spec.teacher, str) else spec.teacher
    return all(name.startswith("self/") for name in names)


def _but_weight(spec: TermSpec) -> dict[str, Any]:
    return spec.model_dump(exclude={"weight"})


def _sum(one: Any, other: Any) -> float | None:
    """Return the sum of two weights; ``None`` where one is a ramp or the one that its loss was published with."""
    return one + other if isinstance(one, int | float) and isinstance(other, int | float) else None
