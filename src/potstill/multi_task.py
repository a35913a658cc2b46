"""The Python door for several tasks: one student with a head for each, taught by a teacher for each or by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from potstill.data.mixing import join_splits
from potstill.data.splits import Splits
from potstill.distillation import DistillationConfig, FeatureDistillation
from potstill.distiller import Distillation
from potstill.distiller_data import splits_of, tables_of, task_section, train_section
from potstill.distiller_models import (
    ALIASES,
    TRAIN,
    StudentModel,
    TeacherModel,
    check_classes,
    known_task,
    layer_terms,
    lesson,
    student_section,
    teacher_section,
)
from potstill.errors import DataError, ObjectiveError, TaskError, TrainingError, did_you_mean
from potstill.models.origins import Built
from potstill.recipe import build
from potstill.recipe.load import recipe_from
from potstill.recipe.schema import Recipe
from potstill.registry import tasks as known_tasks
from potstill.runs.cache import content_hash, table_hash
from potstill.runs.plan import Plan
from potstill.runs.steps import Run
from potstill.schemes.separate_heads import SIGNAL
from potstill.tasks.multi_task import per_task_terms

_JOINED = "per-task"
"""The teacher that is made of one for each task; theirs are called ``TASK-teacher``."""

_QUESTIONS = ("qa", ALIASES["qa"])
_COLUMNS = ("text", "pair", "label", "image", "max_length")


class MultiTaskDistiller:
    """Distils teachers of several tasks, or one of them all, into one student with a head for each task.

    The student has one output for each class of each task, called ``TASK/CLASS``; a sample is answered and judged among
    the classes of its own task. The objective is Σ over the tasks of weight · (α·T²·KL + β·cross-entropy + the terms on
    layers), each the mean over the samples of that task, or over their tokens.

    Args:
        tasks: their names: ``sentiment`` (a text), ``nli`` (two texts, such as ``premise`` and ``hypothesis``), or any
            other for texts or images whose columns are found. ``qa`` joins with its task.
        task_weights: the weight of each in the objective, in their order or by their names; 1 for all, divided by their
            number, if omitted.
        student: who learns; it and the teachers can also be given to :meth:`distill`.
        teachers: the teacher of each task, with the classes of that task; one whose head is new is fine-tuned first on
            the rows of its task.
        teacher: in place of these, one teacher of all tasks.
        shared_distillation: whether what teachers say shapes the encoder that the tasks share. If not, it learns from
            the labels of all tasks alone, and each teacher its task's rows of the output layer: see the scheme
            ``separate_heads``.
        feature_distillation: hidden states to learn too; each task's teacher has terms of its own, on its rows.
        sampling: how often a task is seen: ``proportional``, ``sqrt``, ``uniform``, or an exponent; see the task
            ``multi-task``.
        options: by task, what is not found: ``text``, ``pair``, ``label``, ``label_names``, ``max_length``, ``image``.
        config: the rest, such as temperature, alpha and beta; :class:`potstill.DistillationConfig` with its defaults if
            omitted. Columns and names of classes are in ``options``.

    Raises:
        TaskError: no tasks, or a task twice.
        TrainingError: weights or teachers that do not fit the tasks, or settings that contradict each other.

    Reference: Clark et al. 2019 (BAM!), https://arxiv.org/abs/1907.04829.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        task_weights: Sequence[float] | Mapping[str, float] | None = None,
        *,
        student: StudentModel | None = None,
        teachers: Mapping[str, TeacherModel] | None = None,
        teacher: TeacherModel | None = None,
        shared_distillation: bool = True,
        feature_distillation: FeatureDistillation | None = None,
        sampling: str | float = "proportional",
        options: Mapping[str, Mapping[str, Any]] | None = None,
        config: DistillationConfig | None = None,
    ) -> None:
        _check_tasks(tasks)
        self.tasks = list(tasks)
        self.weights = _weights(self.tasks, task_weights)
        self.student: StudentModel | None = None
        self.teachers: dict[str, TeacherModel] = {}
        self._take(student, teachers, teacher)
        self.shared_distillation, self.sampling = shared_distillation, sampling
        self.options = {name: dict(own) for name, own in (options or {}).items()}
        _check_options(self.tasks, self.options)
        config = config or DistillationConfig()
        if feature_distillation is not None:
            if config.feature_distillation is not None:
                raise TrainingError("expected feature_distillation once, got it here and in `config`; leave one out")
            kind = "feature" if config.distillation_type == "logit" else config.distillation_type
            config = replace(config, distillation_type=kind, feature_distillation=feature_distillation)
        self.config = config
        _check_config(config, shared=shared_distillation)

    @property
    def one_teacher(self) -> bool:
        """Whether one teacher teaches all tasks."""
        return list(self.teachers) == [""]

    def _take(
        self,
        student: StudentModel | None,
        teachers: Mapping[str, TeacherModel] | None,
        teacher: TeacherModel | None,
    ) -> None:
        """Take what is given of student and teachers in place of what there is."""
        self.student = student or self.student
        if teachers is not None or teacher is not None:
            self.teachers = _teachers(self.tasks, teachers, teacher)
        cut = self.student is not None and self.student.config.keep_blocks is not None
        if cut and self.teachers and not self.one_teacher:
            raise TrainingError("a student with keep_blocks is cut from one teacher: give `teacher`, or name its model")

    def distill(
        self,
        train_datasets: Mapping[str, Any],
        eval_datasets: Mapping[str, Any] | None = None,
        *,
        test_datasets: Mapping[str, Any] | None = None,
        args: TrainingArguments | Mapping[str, Any] | None = None,
        output: str | Path | None = None,
        student: StudentModel | None = None,
        teachers: Mapping[str, TeacherModel] | None = None,
        teacher: TeacherModel | None = None,
    ) -> Distillation:
        """Distil and return what came out; the same call goes on with a run that was stopped.

        Args:
            train_datasets: the name of each task to its training rows, as :meth:`potstill.Distiller.distill` takes
                them.
            eval_datasets: likewise what the models are judged on; a fifth of the training rows of a task that is
                missing.
            test_datasets: if given, the models are judged on these, and ``eval_datasets`` are for choosing.
            args: how the models are trained, as :meth:`potstill.Distiller.distill` takes it.
            output: the run's folder; that of ``args``, or one under ``runs/``, if omitted.
            student: for this time in place of the student there is; needed where there is none yet.
            teachers: likewise.
            teacher: likewise.

        Returns:
            The student and what was measured: the metrics of each task are called ``TASK/METRIC``, and ``mean`` is the
            mean over the tasks of the chief one of each.

        Raises:
            PotstillError: data, models and settings do not go together, or a task is one of questions; says what to do.
        """
        _check_questions(self.tasks)
        whole = copy(self)
        whole._take(student or self._learner, teachers, teacher)
        return whole._distilled(train_datasets, eval_datasets, test_datasets, args, output)

    def _distilled(
        self,
        train_datasets: Mapping[str, Any],
        eval_datasets: Mapping[str, Any] | None,
        test_datasets: Mapping[str, Any] | None,
        args: TrainingArguments | Mapping[str, Any] | None,
        output: str | Path | None,
    ) -> Distillation:
        if not self.teachers:
            _teachers(self.tasks, None, None)
        tables = self._tables(train_datasets, eval_datasets or {}, test_datasets)
        sections = {name: self._section(name, own["train"]) for name, own in tables.items()}
        labels = {name: str(section["label"]) for name, section in sections.items()}
        parts = {
            name: splits_of(own, labels[name], self.options.get(name, {}).get("label_names"), self.config.seed)
            for name, own in tables.items()
        }
        splits = join_splits(parts, labels=labels)
        recipe = self._recipe(sections, splits, tables, train_section(args))
        if output is None and isinstance(args, TrainingArguments):
            output = args.output_dir
        run = Run(recipe, output, splits=splits)
        run.execute()
        return Distillation(run)

    @property
    def _learner(self) -> StudentModel:
        if self.student is None:
            raise TrainingError("there is no student yet; say MultiTaskDistiller(student=…) or distill(student=…)")
        return self.student

    # ---- data ------------------------------------------------------------------------------------------------------

    def _tables(
        self, train: Mapping[str, Any], evaluation: Mapping[str, Any], test: Mapping[str, Any] | None
    ) -> dict[str, dict[str, Dataset]]:
        """Return the tables by task and split."""
        for what, given in (("training", train), ("evaluation", evaluation), ("test", test or {})):
            if not isinstance(given, Mapping):
                raise DataError(f"expected the {what} data as {{task: table}}, got {type(given).__name__}")
            _check_names(f"{what} data", given, self.tasks)
        missing = next((name for name in self.tasks if name not in train), None)
        if missing is not None:
            raise DataError(f"there are no training data for the task '{missing}'; got those of {', '.join(train)}")
        last = None if test is None else test.get
        return {
            name: tables_of(train[name], evaluation.get(name), None if last is None else last(name))
            for name in self.tasks
        }

    def _section(self, name: str, train: Dataset) -> dict[str, Any]:
        """Return one task as a recipe writes it."""
        own = self.options.get(name, {})
        text: Any = own.get("text")
        section = task_section(
            ALIASES["qa"] if name in _QUESTIONS else "classification",
            train,
            text=(text, own["pair"]) if "pair" in own else text,
            image=own.get("image"),
            label=own.get("label"),
            max_length=own.get("max_length", self.config.max_length),
            say=f"MultiTaskDistiller(options={{'{name}': {{'text': …}}}})",
        )
        if name == "nli" and "pair" not in section and "input_ids" not in train.column_names:
            raise DataError(
                f"the task 'nli' compares two texts, got the columns {', '.join(train.column_names)}; say which as "
                "MultiTaskDistiller(options={'nli': {'text': …, 'pair': …}})"
            )
        return section

    # ---- the recipe ------------------------------------------------------------------------------------------------

    def _recipe(
        self,
        sections: Mapping[str, Mapping[str, Any]],
        splits: Splits,
        tables: Mapping[str, Mapping[str, Dataset]],
        train: Mapping[str, Any],
    ) -> Recipe:
        """Return the recipe that this distillation is."""
        content = content_hash({f"{task}/{n}": table_hash(t) for task, own in tables.items() for n, t in own.items()})
        tree: dict[str, Any] = {
            "name": "multi-task-distiller",
            "seed": self.config.seed,
            "task": {"name": "multi-task", "tasks": dict(sections), "sampling": self.sampling},
            "data": {"source": "given", "path": content},
            **self._who({}),
            "student": student_section(self._learner.config),
            "objective": self._answers(splits),
            "scheme": self.config.scheme if self.shared_distillation else {"name": "separate_heads"},
            "train": {**TRAIN, **train},
            "baseline": {"enabled": self.config.baseline},
        }
        plan = Plan(recipe_from(tree), splits=splits)
        made = {name: cache(partial(_made, plan, name)) for name in plan.recipe.model_teachers}
        self._check_classes(plan)
        if self.config.parts:
            tree["objective"] |= self._layers(plan, {name: each().model for name, each in made.items()})
        lessons = {}
        for name, config in self._configs().items():
            random = build.is_random(plan.recipe.all_teachers[name])
            lessons[name] = lesson(config, made[name], train, is_random=random)
        return recipe_from({**tree, **self._who(lessons)})

    def _configs(self) -> dict[str, Any]:
        """Return the configurations of the teachers that are models, by their names in the recipe."""
        if self.one_teacher:
            return {"teacher": self.teachers[""].config}
        return {_teacher(task): model.config for task, model in self.teachers.items()}

    def _who(self, lessons: Mapping[str, Any]) -> dict[str, Any]:
        """Return the recipe's ``teacher``, or its ``teachers`` and the one that is made of them."""
        each = {name: teacher_section(config) for name, config in self._configs().items()}
        each = {name: {**own, "train": lessons[name]} if lessons.get(name) else own for name, own in each.items()}
        if self.one_teacher:
            return each
        joined = {"source": {"per_task": {"teachers": {task: _teacher(task) for task in self.tasks}}}}
        return {"teachers": {**{_teacher(t): {**each[_teacher(t)], "task": t} for t in self.tasks}, _JOINED: joined}}

    def _answers(self, splits: Splits) -> dict[str, dict[str, Any]]:
        """Return the terms on the answers, one for each task."""
        terms = self.config.answers(labelled="label" in splits.train.column_names)
        if not self.one_teacher:
            terms["soft"]["teacher"] = f"{_JOINED}/logits"
        spread = per_task_terms(terms, self.weights)
        if self.shared_distillation:
            return spread
        return {
            name: {**term, "student": SIGNAL} if name.startswith("soft_") else term for name, term in spread.items()
        }

    def _layers(self, plan: Plan, models: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the terms on layers, those of each task on its own rows: of its teacher, or of the one of all."""
        student = plan.student()
        if self.one_teacher:
            each = dict.fromkeys(self.tasks, layer_terms(self.config, student, models["teacher"]))
        else:
            self._check_tokens(plan)
            each = {t: layer_terms(self.config, student, models[_teacher(t)], f"teacher of '{t}'") for t in self.tasks}
        found = {}
        for task, own in each.items():
            before = "" if self.one_teacher else f"{_JOINED}/{task}/"
            for name, term in own.items() if self.weights[task] else ():
                signal, weight = f"{before}{term['teacher']}", term["weight"] * self.weights[task]
                found[f"{name}_{task}"] = {**term, "teacher": signal, "weight": weight, "mask": f"task/{task}"}
        return found

    def _check_tokens(self, plan: Plan) -> None:
        """Raise where a teacher sees other tokens than the student, so that their layers cannot be compared."""
        task = build.prepared_for_distillation(plan.recipe, plan.task, plan.processors)
        batch = build.training_set(plan.recipe, task, plan.recipe.train, plan.splits.train, 0).__getitems__([0])
        for name in plan.recipe.model_teachers:
            if f"{build.teacher_prefix(plan.recipe, name)}input_ids" in batch:
                raise ObjectiveError(
                    f"the '{name}' and the student have different tokenizers, so their layers cannot be compared token "
                    "by token; leave feature_distillation out"
                )

    def _check_classes(self, plan: Plan) -> None:
        task: Any = plan.task
        check_classes("student", self._learner.config, task.label_names)
        for name, model in self.teachers.items():
            names = task.part(name).label_names if name else task.label_names
            check_classes(f"teacher of '{name}'" if name else "teacher", model.config, names)


def _teacher(task: str) -> str:
    return f"{task}-teacher"


def _made(plan: Plan, name: str) -> Built:
    """Return a teacher as it is before any training."""
    facts = plan.task_of(name).facts()
    return build.teacher_blueprint(plan.recipe, name).make(facts, seed=plan.recipe.seed)


def _check_tasks(tasks: Sequence[str]) -> None:
    if isinstance(tasks, str):
        raise TaskError(f"expected the names of tasks as a list, got '{tasks}'; did you mean ['{tasks}']?")
    if not tasks or len(set(tasks)) < len(tasks):
        raise TaskError(f"expected the names of tasks, each once, got {list(tasks)}")


def _check_questions(tasks: Sequence[str]) -> None:
    answering = [task for task in tasks if task in _QUESTIONS]
    if answering and ALIASES["qa"] not in known_tasks.names():
        raise TaskError(
            f"the task '{answering[0]}' is question answering, which joins with its task and is not there yet; there "
            "are 'sentiment', 'nli' and, by any other name, the classification of texts or images"
        )


def _weights(tasks: Sequence[str], given: Sequence[float] | Mapping[str, float] | None) -> dict[str, float]:
    if isinstance(given, Mapping):
        _check_names("task_weights", given, tasks)
        given = [given[task] for task in tasks if task in given]
    if isinstance(given, str) or not isinstance(given, Sequence | None):
        raise TrainingError(f"expected task_weights as a list of numbers, or as {{task: weight}}, got {given!r}")
    weights: list[float] = [1 / len(tasks)] * len(tasks) if given is None else list(given)
    if len(weights) != len(tasks):
        raise TrainingError(
            f"expected a weight for each of the {len(tasks)} tasks ({', '.join(tasks)}), got {len(weights)}: {weights}"
        )
    wrong = [w for w in weights if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w)]
    if wrong:
        raise TrainingError(f"expected task_weights to be finite numbers, got {wrong[0]!r}")
    if min(weights) < 0 or not any(weights):
        raise TrainingError(f"expected task_weights of 0 or more, not all 0, got {weights}")
    return dict(zip(tasks, weights, strict=True))


def _teachers(
    tasks: Sequence[str], several: Mapping[str, TeacherModel] | None, one: TeacherModel | None
) -> dict[str, TeacherModel]:
    """Return the teacher of each task; the one of all under the empty name."""
    if (several is None) == (one is None):
        raise TrainingError("expected either `teachers`, one for each task, or `teacher`, one for all")
    found = {"": one} if one is not None else dict(several or {})
    if one is None:
        _check_names("teachers", found, tasks)
        missing = next((task for task in tasks if task not in found), None)
        if missing is not None:
            raise TrainingError(f"there is no teacher for the task '{missing}'; add it to `teachers`")
    for model in found.values():
        if model.config.task_type != "classification" and known_task(model.config.task_type) not in _CLASSIFIES:
            raise TaskError(f"one of several tasks is a classification, got a teacher of '{model.config.task_type}'")
    return found


_CLASSIFIES = ("text-classification", "image-classification")


def _check_names(what: str, given: Iterable[str], tasks: Sequence[str]) -> None:
    unknown = next((name for name in given if name not in tasks), None)
    if unknown is not None:
        raise TrainingError(f"{what}: there is no task '{unknown}'; {did_you_mean(unknown, tasks)}")


def _check_options(tasks: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    _check_names("options", options, tasks)
    for task, own in options.items():
        known = (*_COLUMNS, "label_names")
        wrong = next((key for key in own if key not in known), None)
        if wrong is not None:
            raise TrainingError(f"options of '{task}': there is no option '{wrong}'; {did_you_mean(wrong, known)}")
        if "pair" in own and "text" not in own:
            raise TrainingError(f"options of '{task}': a `pair` goes with the `text` before it")


def _check_config(config: DistillationConfig, *, shared: bool) -> None:
    """Raise where a setting is one of a single task, or says the contrary of another."""
    for name in ("text", "image", "label", "label_names"):
        if getattr(config, name) is not None:
            raise TrainingError(f"each task has its own `{name}`; say MultiTaskDistiller(options={{TASK: {{…}}}})")
    if config.feature_distillation is not None and config.feature_distillation.mask is not None:
        raise TrainingError("with several tasks features are compared on the rows of each task; leave `mask` out")
    if config.features:
        raise TrainingError("with several tasks say feature_distillation=FeatureDistillation(…) in place of features")
    if config.parts and not shared:
        raise TrainingError(
            f"shared_distillation=False keeps teachers from the encoder, and {type(config.parts[0]).__name__} teaches "
            "it; leave one of them out"
        )
