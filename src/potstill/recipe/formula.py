"""The formulas of a recipe: of the student's objective, of teachers that learn from others, of each stage."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from potstill.errors import PotstillError
from potstill.interfaces import Batch, Signals, TeacherSource
from potstill.losses.objective import Objective
from potstill.recipe.build import make_term
from potstill.recipe.generations import spread_out
from potstill.recipe.layers import as_written, found_layers
from potstill.recipe.schema import BalanceSpec, Recipe, SchemeSpec, TermSpec
from potstill.registry import schemes
from potstill.schemes.lesson import STUDENT, Learner, Lesson


def formulas(recipe: Recipe, *, allow_code: bool = True) -> dict[str, str]:
    """Return what every learner minimises, with its numbers, by whose it is and when.

    A scheme is shown by what it makes of the terms, where that does not depend on the models.

    Args:
        recipe: the recipe; generations are spread out.
        allow_code: whether a scheme of one's own may be imported.
    """
    recipe = spread_out(recipe)
    found: dict[str, str] = {}
    for name, spec in recipe.all_teachers.items():
        if spec.objective is not None and spec.joint is None:
            found[f"the objective of {name}"] = _objective(spec.objective, None).describe()
    if not recipe.stages:
        return found | _arranged(recipe, recipe.objective, recipe.balance, recipe.scheme, "", allow_code)
    for stage in recipe.stages:
        terms = recipe.objective if stage.objective is None else stage.objective
        scheme = stage.scheme or recipe.scheme
        balance = recipe.balance if stage.objective is None and stage.balance is None else stage.balance
        found |= _arranged(recipe, terms, balance, scheme, f", stage {stage.name}", allow_code)
    return found


def _arranged(
    recipe: Recipe,
    terms: Mapping[str, TermSpec],
    balance: BalanceSpec | None,
    scheme: SchemeSpec,
    when: str,
    allow_code: bool,
) -> dict[str, str]:
    plain = _objective(terms, balance)
    others = {
        name: Learner(nn.Identity(), None if spec.objective is None else _objective(spec.objective, None))
        for name, spec in recipe.joint_teachers.items()
    }
    for name, spec in recipe.joint_teachers.items():
        others[name].given = spec.objective is not None
    sources: dict[str, TeacherSource] = {name: _silent for name in recipe.all_teachers if name not in others}
    lesson = Lesson(Learner(nn.Identity(), plain), others, sources, recipe.seed)
    note = ""
    try:
        lesson = schemes.get(scheme.name, allow_code=allow_code)(**scheme.options).arrange(lesson)
    except (PotstillError, AttributeError):  # it needs the models
        note = f" before the scheme {scheme.name}"
    return {
        f"the objective{'' if name == STUDENT else f' of {name}'}{when}{note}": objective.describe()
        for name, learner in lesson.learners.items()
        if (objective := learner.objective or plain.hard_only())
    }


def _silent(batch: Batch) -> Signals:
    return {}


def _objective(specs: Mapping[str, TermSpec], balance: BalanceSpec | None) -> Objective:
    written = [as_written(name, spec) for name, spec in specs.items()]
    terms = {name: make_term(spec) for each in written for name, spec in each.items()}
    settings = None if balance is None else balance.model_dump()
    if settings is not None and any(found_layers(spec) for spec in specs.values()):
        settings["reference"] = None  # the names of the terms are not all known
    return Objective(terms, balance=settings)
