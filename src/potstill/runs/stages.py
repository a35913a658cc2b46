"""The stages of a training, one after the other: each the recipe with what differs in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from potstill.recipe.schema import Recipe, StageSpec, changed_train

if TYPE_CHECKING:
    from potstill.runs.plan import Plan


@dataclass(frozen=True)
class Stage:
    """One training of several.

    Attributes:
        name: as the recipe has it; ``None`` where the training is not in stages.
        plan: the recipe with what differs in this stage.
    """

    name: str | None
    plan: Plan

    def step(self, model: str) -> str:
        """Return what the training of a model is called in this stage."""
        return model if self.name is None else f"{model}/{self.name}"


def stages_of(plan: Plan) -> list[Stage]:
    """Return the stages of a training; one without a name where the recipe has none."""
    if not plan.recipe.stages:
        return [Stage(None, plan)]
    return [Stage(spec.name, _staged(plan, spec)) for spec in plan.recipe.stages]


def _staged(plan: Plan, spec: StageSpec) -> Plan:
    recipe: Recipe = plan.recipe
    student = recipe.student if spec.freeze is None else recipe.student.model_copy(update={"freeze": spec.freeze})
    changes: dict[str, Any] = {
        "student": student,
        "train": changed_train(recipe.train, spec.train),
        "objective": recipe.objective if spec.objective is None else spec.objective,
        "balance": recipe.balance if spec.objective is None and spec.balance is None else spec.balance,
        "scheme": recipe.scheme if spec.scheme is None else spec.scheme,
        "stages": [],
    }
    return plan.with_recipe(recipe.model_copy(update=changes))
