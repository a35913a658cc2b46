"""What a recipe means, before any of it is done: data, task, processors, objective and student, each made once."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from datasets import Dataset
from torch import nn

from potstill.data.load import Splits
from potstill.errors import TaskError
from potstill.interfaces import Task
from potstill.losses.objective import Objective
from potstill.models.freezing import freeze
from potstill.recipe import build
from potstill.recipe.generations import GENERATION, spread_out
from potstill.recipe.schema import Recipe
from potstill.runs.layers import find_layers


class Plan:
    """A recipe and the objects that it asks for; it has no folder and writes nothing.

    Args:
        recipe: what is asked.
        allow_code: whether dotted paths outside potstill may be imported.
        splits: the data, where they are given and not to be read.
    """

    def __init__(self, recipe: Recipe, *, allow_code: bool = True, splits: Splits | None = None) -> None:
        self.recipe = spread_out(recipe)
        self.allow_code = allow_code
        self.given = splits
        self._tasks: list[tuple[Any, str | None, Task]] = []

    @cached_property
    def splits(self) -> Splits:
        """The data, read when first asked for."""
        return self.given or build.make_splits(self.recipe, allow_code=self.allow_code)

    @cached_property
    def task(self) -> Task:
        """The task, fitted to the training split."""
        return build.fitted_task(self.recipe, self.splits)

    @cached_property
    def processors(self) -> dict[str, Any]:
        """How each model wants its inputs, by the teacher's name or ``student``."""
        return build.find_processors(self.recipe, self.task, allow_code=self.allow_code)

    @cached_property
    def objective(self) -> Objective:
        """The objective of the distilled student; fresh projectors."""
        objective = self.make_objective()
        build.check_labels(objective, self.splits.taught_on, self.label)
        return objective

    def make_objective(self) -> Objective:
        """Return the objective anew, with fresh projectors, whether or not there are labels for it."""
        return build.make_objective(self.recipe, self.task, self.layers)

    @cached_property
    def layers(self) -> dict[str, list[tuple[int | str, int | str]]]:
        """By term, the pairs of layers that the recipe leaves to be found."""
        return find_layers(self)

    def seed_of(self, name: str) -> int:
        """Return the seed of a model: the recipe's, and another for each further teacher, else like ones were equal.

        A peer or an earlier generation of the student never begins as the student does.
        """
        teachers = list(self.recipe.all_teachers)
        if name not in teachers:
            return self.recipe.seed
        spec = self.recipe.all_teachers[name]
        of_the_student = spec.joint is not None or name.startswith(GENERATION)
        seed = self.recipe.seed if spec.seed is None else spec.seed
        return seed + 1_000_003 * teachers.index(name) + 500_009 * of_the_student

    def with_recipe(self, recipe: Recipe) -> Plan:
        """Return another plan for the same data, task and models, such as that of a stage of the training."""
        other = Plan(recipe, allow_code=self.allow_code, splits=self.splits)
        other.task, other.processors, other._tasks = self.task, self.processors, self._tasks
        return other

    @property
    def label(self) -> str:
        """The column of the label."""
        return str(self.recipe.task.options.get("label", "label"))

    def task_of(self, name: str) -> Task:
        """Return the task as one model sees it; the same object for models that want the same inputs."""
        processor = self.processors[name if name in self.processors else "student"]
        part = self.part_of(name)
        known = next((task for own, own_part, task in self._tasks if own is processor and own_part == part), None)
        if known is None:
            whole: Any = self.task
            known = build.prepared(whole if part is None else whole.part(part), processor)
            self._tasks.append((processor, part, known))
        return known

    def part_of(self, name: str) -> str | None:
        """Return the one task of several that a teacher knows; ``None`` for models that know them all.

        Raises:
            TaskError: the recipe's task has no such part.
        """
        spec = self.recipe.all_teachers.get(name)
        part = None if spec is None else spec.task
        if part is not None and not hasattr(self.task, "part"):
            raise TaskError(
                f"the teacher '{name}' is for the task '{part}', and {self.recipe.task.name} is one task; leave it out"
            )
        return part

    def table_for(self, name: str, table: Dataset) -> Dataset:
        """Return the rows of a table that a model is trained on: those of its own task where it knows but one."""
        part = self.part_of(name)
        whole: Any = self.task
        return table if part is None else whole.part_table(table, part)

    def student(self) -> nn.Module:
        """Return a fresh student; one that is cut from a fine-tuned teacher is cut from the teacher as it began."""
        facts = self.task_of("student").facts()
        model = build.student_blueprint(self.recipe).build(facts, seed=self.recipe.seed, allow_code=self.allow_code)
        return freeze(model, self.recipe.student.freeze)
