"""The Python door: a teacher, a student and a way to distil, on the same engine as the recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from potstill.data.splits import Splits
from potstill.distillation import DistillationConfig as DistillationConfig
from potstill.distiller_data import splits_of, tables_of, task_section, train_section
from potstill.distiller_models import (
    ALIASES,
    TRAIN,
    check_classes,
    known_task,
    layer_terms,
    lesson,
    student_section,
    teacher_section,
)
from potstill.distiller_models import StudentConfig as StudentConfig
from potstill.distiller_models import StudentModel as StudentModel
from potstill.distiller_models import TeacherConfig as TeacherConfig
from potstill.distiller_models import TeacherModel as TeacherModel
from potstill.errors import TaskError
from potstill.models.origins import Built
from potstill.recipe import build
from potstill.recipe.load import recipe_from
from potstill.recipe.schema import Recipe
from potstill.runs.cache import content_hash, table_hash
from potstill.runs.metrics import RunMetrics
from potstill.runs.steps import Run


@dataclass(frozen=True)
class Distillation:
    """What came out.

    Attributes:
        run: the run, whose models can be loaded again with ``run.load("teacher")``.
    """

    run: Run

    @property
    def metrics(self) -> RunMetrics:
        """The figures, as in ``metrics.json``."""
        return self.run.metrics()

    @cached_property
    def student(self) -> nn.Module:
        """The distilled student."""
        return self.run.load("distilled")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.folder.path

    @property
    def student_folder(self) -> Path:
        """The student's folder, as ``from_pretrained`` and ``transformers.pipeline`` read it."""
        return self.run.model_folder("distilled")

    @property
    def report(self) -> Path:
        """What a person reads: one HTML file, see :mod:`potstill.report`."""
        return self.run.folder / "report.html"


class Distiller:
    """Distils a teacher into a student.

    Args:
        teacher: who teaches.
        student: who learns.
        config: how; :class:`DistillationConfig` with its defaults if omitted.

    Raises:
        TaskError: teacher and student are for different tasks, or for one that there is not.
    """

    def __init__(self, teacher: TeacherModel, student: StudentModel, config: DistillationConfig | None = None) -> None:
        self.teacher, self.student = teacher, student
        self.config = config or DistillationConfig()
        types = {teacher.config.task_type, student.config.task_type}
        if len({ALIASES.get(each, each) for each in types}) > 1:
            raise TaskError(f"expected teacher and student to have one task_type, got {' and '.join(sorted(types))}")
        self.task_type = teacher.config.task_type
        if self.task_type != "classification":
            known_task(self.task_type)

    def distill(
        self,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        test_dataset: Any = None,
        args: TrainingArguments | Mapping[str, Any] | None = None,
        output: str | Path | None = None,
    ) -> Distillation:
        """Distil and return what came out; the same call goes on with a run that was stopped.

        Args:
            train_dataset: a ``datasets.Dataset`` (or a data frame, or a dictionary of columns) with texts or images, or
                with ``input_ids`` from the student's tokenizer.
            eval_dataset: what the models are judged on; a fifth of the training rows if omitted.
            test_dataset: if given, the models are judged on it, and ``eval_dataset`` is for choosing.
            args: how student and baseline are trained: ``TrainingArguments``, or keys of a recipe's ``train``; three
                epochs of batches of 32 at a learning rate of 5e-5 if omitted.
            output: the run's folder; that of ``args``, or one under ``runs/``, if omitted.

        Raises:
            PotstillError: data, models and settings do not go together; says what to do.
        """
        tables = tables_of(train_dataset, eval_dataset, test_dataset)
        config = self.config
        task = task_section(
            ALIASES.get(self.task_type, self.task_type),
            tables["train"],
            text=config.text,
            image=config.image,
            label=config.label,
            max_length=config.max_length,
        )
        splits = splits_of(tables, str(task["label"]), config.label_names, config.seed)
        train = train_section(args)
        recipe = self._recipe(task, splits, tables, train)
        if output is None and isinstance(args, TrainingArguments):
            output = args.output_dir
        run = Run(recipe, output, splits=splits)
        run.execute()
        return Distillation(run)

    def _recipe(
        self, task: Mapping[str, Any], splits: Splits, tables: Mapping[str, Dataset], train: Mapping[str, Any]
    ) -> Recipe:
        """Return the recipe that this distillation is."""
        teacher, student, names = self.teacher.config, self.student.config, self.config.label_names
        who = teacher_section(teacher)
        content = content_hash({name: table_hash(table) for name, table in tables.items()})
        tree: dict[str, Any] = {
            "name": "distiller",
            "seed": self.config.seed,
            "task": dict(task),
            "data": {"source": "given", "path": content, "labels": names and list(names)},
            "teacher": who,
            "student": student_section(student),
            "objective": self.config.answers(labelled=str(task["label"]) in splits.train.column_names),
            "scheme": self.config.scheme,
            "train": {**TRAIN, **train},
            "baseline": {"enabled": self.config.baseline},
        }
        draft = recipe_from(tree)
        fitted = build.fitted_task(draft, splits)
        check_classes("teacher", teacher, fitted.label_names)
        check_classes("student", student, fitted.label_names)

        @cache
        def made() -> Built:
            return build.teacher_blueprint(draft, "teacher").make(fitted.facts(), seed=draft.seed)

        if self.config.parts:
            learner = build.student_blueprint(draft).build(fitted.facts(), seed=draft.seed)
            tree["objective"] = {**tree["objective"], **layer_terms(self.config, learner, made().model)}
        first = lesson(teacher, made, train, is_random=build.is_random(draft.all_teachers["teacher"]))
        return recipe_from(tree if first is None else {**tree, "teacher": {**who, "train": first}})
