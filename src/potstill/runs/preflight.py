"""A recipe before it is trained: what it means, tried out on a few samples, and the faults found on the way."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from potstill.checks.batches import rows
from potstill.checks.findings import Finding
from potstill.checks.run import run_checks
from potstill.checks.subject import Feed, Subject
from potstill.errors import ModelError, PotstillError, TrainingError, did_you_mean
from potstill.evaluation.cost import parameters
from potstill.interfaces import Batch, Progress, Task, TeacherSource
from potstill.knowledge.taps import resolve_all
from potstill.losses.objective import Objective, Term
from potstill.models.freezing import freeze
from potstill.models.origins import Built, TextProcessor
from potstill.recipe import arguments, build
from potstill.recipe.schema import TeacherSpec
from potstill.registry import schemes
from potstill.runs.caching import cache_settings
from potstill.runs.lessons import make_source
from potstill.runs.plan import Plan
from potstill.runs.stages import stages_of
from potstill.schemes.lesson import Learner, Lesson
from potstill.teachers.live import Live, Several
from potstill.teachers.precision import tried_precision
from potstill.training.arguments import check_balance
from potstill.training.module import DistillationModule

if TYPE_CHECKING:
    from potstill.runs.steps import Run

_LEARNED = ("teacher-above-chance", "dead-tap")
"""Checks of what a teacher has learned here; the order of its classes and its inputs are those it was trained on."""

_BATCH, _TRIED, _JUDGED, _ENOUGH = 32, 4, 512, 64


def examine(run: Plan | Run) -> Iterator[str | Finding]:
    """Yield what a recipe means, a line a thing, and then what the preflight found; nothing is trained or written.

    Teachers that the recipe would train are untrained here: what asks for their knowledge is left out.

    Raises:
        PotstillError: the first thing that does not fit, with what was expected.
    """
    setup = _Setup(run)
    _check_caches(run)
    yield from _data(run)
    yield from _models(setup)
    yield from _tried(setup)
    yield from _found(setup.subject(torch.device("cpu")), run, strict=True)


def before_training(run: Plan | Run, *, strict: bool = False) -> list[Finding]:
    """Return what shows before anything is trained; teachers that are to be trained are not judged.

    Args:
        run: the recipe and its data.
        strict: whether a teacher no better than chance is an error, as on the command line, or a warning.
    """
    setup = _Setup(run)
    _check_caches(run)
    build.check_tokens(run.recipe, run.objective, setup.batch)
    setup.try_stages()
    setup.try_sources()
    return _found(setup.subject(_device()), run, strict=strict)


def after_teachers(run: Run, *, strict: bool = False) -> list[Finding]:
    """Return what shows once the teachers are trained and saved: whether they know what they are to teach.

    Args:
        run: the recipe, its data and its folder, with the teachers in it.
        strict: whether a teacher no better than chance is an error, as on the command line, or a warning.
    """
    taught = [name for name, spec in run.recipe.all_teachers.items() if spec.learns_here]
    if not taught:
        return []
    setup = _Setup(run)
    setup.models |= {name: Built(run.load(name)) for name in taught}
    subject = setup.subject(_device())
    subject.trained = frozenset(taught)  # the others were judged before the training
    return _found(subject, run, strict=strict, only=_LEARNED)


def _found(subject: Subject, run: Plan | Run, *, strict: bool, only: Sequence[str] | None = None) -> list[Finding]:
    subject.strict = strict
    return run_checks(subject, only=only, ignore=run.recipe.preflight.ignore)


def _check_caches(run: Plan | Run) -> None:
    """Raise before any training if a cache is asked for that cannot be, which else shows after the teacher's."""
    for name in run.recipe.model_teachers:
        cache_settings(run.recipe, name)


def _device() -> torch.device:
    from potstill.runs.processes import process_state

    device: torch.device = process_state().device
    return device


@dataclass
class _Setup:
    """The models of a run as they are before the training, and samples for them."""

    run: Plan | Run

    @cached_property
    def models(self) -> dict[str, Built]:
        """The teachers as the recipe has them, by name."""
        return {}

    def teacher(self, name: str) -> Built:
        """Return a teacher: the one that was put here, else a fresh one."""
        if name not in self.models:
            run = self.run
            facts = run.task_of(name).facts()
            made = build.teacher_blueprint(run.recipe, name).make(
                facts, seed=run.seed_of(name), allow_code=run.allow_code
            )
            self.models[name] = made
        return self.models[name]

    @cached_property
    def student(self) -> nn.Module:
        """The student as it begins; one cut from a fine-tuned teacher needs no folder of that, as ``run.student()``."""
        return Plan.student(self.run)

    @cached_property
    def task(self) -> Task:
        """The task that makes the inputs of all models."""
        return build.prepared_for_distillation(self.run.recipe, self.run.task, self.run.processors)

    @cached_property
    def batch(self) -> Batch:
        """Samples of the training, from all over the split."""
        run = self.run
        dataset = build.training_set(run.recipe, self.task, run.recipe.train, run.splits.taught_on, run.recipe.seed)
        return dataset.__getitems__(_spread(len(dataset), _BATCH))

    def source(self, name: str) -> Live:
        """Return a teacher as the training asks it."""
        recipe = self.run.recipe
        taps = build.teacher_taps(recipe, self.run.objective, name)
        prefix = build.teacher_prefix(recipe, name)
        precision = tried_precision(recipe.all_teachers[name].precision)
        return Live(self.teacher(name).model, taps, forward=self.task.forward, prefix=prefix, precision=precision)

    def objective(self) -> Objective:
        """Return the terms that models of the recipe answer, without those of sources and of layers yet to be made."""
        return known_terms(self.run)

    def try_stages(self) -> None:
        """Make the objective of every stage, and let its scheme arrange a lesson of fresh models.

        Raises:
            ObjectiveError: a term cannot be made.
            TrainingError: a term needs labels, and there are none; or the scheme lacks what it needs.
        """
        for stage in stages_of(self.run):
            recipe = stage.plan.recipe
            build.check_labels(stage.plan.make_objective(), self.run.splits.taught_on, self.run.label)
            scheme = schemes.get(recipe.scheme.name, allow_code=self.run.allow_code)(**recipe.scheme.options)
            lesson = scheme.arrange(self._lesson(stage.plan))
            freeze(lesson.student.model, recipe.student.freeze)
            for learner in lesson.learners.values():
                objective = learner.objective or stage.plan.make_objective().hard_only()
                build.check_labels(objective, self.run.splits.taught_on, self.run.label)
                taps, extension = objective.taps("student"), learner.extension
                if extension is not None:
                    taps = [*(tap for tap in taps if not extension.makes(tap)), *extension.taps()]
                resolve_all(learner.model, [tap for tap in taps if tap != "logits"])

    def _lesson(self, plan: Plan) -> Lesson:
        """Return who learns from whom in a stage, with models as they are before any training."""
        recipe, forward = plan.recipe, self.task.forward
        others = {}
        for name, spec in recipe.joint_teachers.items():
            own = None if spec.objective is None else build.make_objective(recipe, plan.task, terms=spec.objective)
            others[name] = Learner(self.teacher(name).model, own, forward, given=own is not None)
        student = Learner(copy.deepcopy(self.student), plan.make_objective(), forward)
        return Lesson(student, others, dict(self.sources), recipe.seed)

    def try_sources(self) -> None:
        """Ask each teacher that is no model of the recipe about a few samples.

        Raises:
            PotstillError: it cannot be made, or does not answer as it should.
        """
        run, few = self.run, rows(self.batch, 0, _TRIED)
        for name, source in self.sources.items():
            if run.recipe.all_teachers[name].source is None:
                continue
            read, said = self._read(name), source(dict(few))
            classes, logits = len(run.task.label_names), said.get("logits")
            if logits is not None and classes and logits.shape[-1] != classes:
                raise TrainingError(
                    f"the teacher '{name}' answers with {logits.shape[-1]} classes, and the task has {classes}"
                )
            missing = next((signal for signal in read if signal not in said), None)
            if missing is not None:
                raise TrainingError(
                    f"the objective reads '{missing}' of the teacher '{name}', which gives {', '.join(said)}; "
                    "compare what it gives, or take a model for a teacher"
                )

    @cached_property
    def sources(self) -> dict[str, TeacherSource]:
        """The teachers that are not trained with the student, as the training asks them, by name."""
        run = self.run
        made: dict[str, TeacherSource] = {}
        for name, spec in run.recipe.all_teachers.items():
            if spec.joint is not None:
                continue
            if spec.source is None:
                made[name] = self.source(name)
            else:
                table, read = run.splits.taught_on, self._read(name)
                made[name] = make_source(run, name, made, read, student=self.student, table=table)
        return made

    def _read(self, name: str) -> list[str]:
        """Return the signals that the objectives of all stages read of a teacher."""
        objectives = [stage.plan.make_objective() for stage in stages_of(self.run)]
        return build.signals_of(self.run.recipe, objectives, name)

    def subject(self, device: torch.device) -> Subject:
        """Return what the checks examine, on a device."""
        run = self.run
        tables = _tables(run)
        inputs = _inputs(run.task, run.splits.train)
        text = getattr(run.task, "text", None)
        return Subject(
            self.student.to(device),
            self.objective().to(device),
            _placed(self.batch, device),
            teachers={name: self.source(name).to(device) for name in self.judged},
            forward=self.task.forward,
            answers=self.task.answers,
            judged=_placed(self._judged(), device),
            trained=frozenset(name for name in self.judged if self._knows(name)),
            tables=tables,
            label=self.run.label,
            unlabelled=-1,
            inputs=inputs,
            label_names=run.task.label_names,
            feeds=self._feeds(),
            texts=[str(value) for value in run.splits.train[:8][text]] if text in inputs else [],
        )

    def _knows(self, name: str) -> bool:
        spec = self.run.recipe.all_teachers[name]
        learns = spec.learns_here or spec.joint is not None
        return not learns and not build.is_random(spec) and not self.teacher(name).fresh

    @property
    def judged(self) -> list[str]:
        """The teachers that are models and know the classes of the task, by name."""
        return [name for name, spec in self.run.recipe.model_teachers.items() if spec.task is None]

    def _judged(self) -> Batch:
        train, validation = self.run.splits.train, self.run.splits.validation
        enough = validation is not None and self.run.label in validation.column_names and len(validation) >= _ENOUGH
        table = validation if validation is not None and enough else train
        part = table.select(_spread(len(table), _JUDGED))
        return self.task.dataset(part, training=False, seed=0).__getitems__(list(range(len(part))))

    def _feeds(self) -> dict[str, Feed]:
        """Return how the models are fed beside how they were: where the recipe has a word in it."""
        run, recipe = self.run, self.run.recipe
        specs = {name: spec.model_copy(update={"processor": None}) for name, spec in recipe.all_teachers.items()}
        plain = recipe.model_copy(
            update={
                "teacher": specs["teacher"] if recipe.teacher is not None else None,
                "teachers": {} if recipe.teacher is not None else specs,
                "student": recipe.student.model_copy(update={"processor": None}),
            }
        )
        try:
            own = build.find_processors(plain, run.task, allow_code=run.allow_code)
        except PotstillError:  # a model without a processor of its own
            return {}
        found = {}
        for name, processor in run.processors.items():
            spec = recipe.student if name == "student" else recipe.all_teachers[name]
            seen = processor if isinstance(processor, TextProcessor) else getattr(run.task_of(name), "own", None)
            if name != "student" and name not in recipe.model_teachers:
                continue
            learns = name == "student" or _is_trained(recipe.all_teachers[name])
            if spec.pretrained:
                found[name] = Feed(seen, own[name], learns=learns)
        return found


def _data(run: Plan | Run) -> Iterator[str]:
    names = run.task.label_names  # what is wrong with columns and classes comes before anything is said
    yield "data: " + ", ".join(f"{name} {len(table)}" for name, table in _tables(run).items())
    for note in run.splits.notes:
        yield f"data: {note}"
    if names:
        yield f"labels: {', '.join(names)}"


def _models(setup: _Setup) -> Iterator[str]:
    run, recipe = setup.run, setup.run.recipe
    _ = run.objective, run.processors  # what is wrong with them comes before any model is built
    yield f"student: {build.student_name(recipe)}, {parameters(setup.student):,} parameters"
    for name, spec in recipe.all_teachers.items():
        if spec.source is not None:
            yield f"{name}: {build.model_name(recipe, spec)}"
            continue
        built = setup.teacher(name)
        if not _is_trained(spec) and spec.labels is None:
            setup.run.task_of(name).check_labels(built.labels, f"the teacher '{name}'")
        weights = ", random weights" if build.is_random(spec) else ""
        if built.fresh:
            weights = f", new weights: {', '.join(built.fresh[:4])}{', …' if len(built.fresh) > 4 else ''}"
        if weights and not _is_trained(spec):
            weights += "; it teaches noise, say `train:`"
        yield f"{name}: {build.model_name(recipe, spec)}, {parameters(built.model):,} parameters{weights}"


def _tried(setup: _Setup) -> Iterator[str]:
    """Compute every term on a few samples, and make the settings of every training."""
    run, task = setup.run, setup.task
    batch = rows(setup.batch, 0, _TRIED)
    objective = setup.objective()
    build.check_tokens(run.recipe, objective, batch)
    setup.try_stages()
    setup.try_sources()
    teachers = {name: setup.source(name) for name in setup.judged}
    alone = len(run.recipe.all_teachers) == 1
    source = Several(teachers) if not alone and teachers else next(iter(teachers.values()), None)
    parts: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        module = DistillationModule(setup.student, objective, forward=task.forward)
        try:
            signals = source(dict(batch)) if source is not None else {}
            said = task.forward(setup.student, batch)
        except (ValueError, RuntimeError, IndexError) as error:
            raise ModelError(f"a model cannot take what the task gives it: {error}") from error
        module.materialize(signals, batch)
        for step in (
            (999, 0) if objective.active() else ()
        ):  # late too, for a ramp may begin at 0, where a term is not computed
            parts |= module(signals, progress=Progress(step, 1000), **batch).parts
    answers = task.answers(said["logits"].detach().numpy())
    metrics = task.metrics(answers, batch["labels"].numpy()) if "labels" in batch else {}
    models = {"student": setup.student, **{name: live.model.model for name, live in teachers.items()}}
    _check_training(setup, models, ["loss", *metrics])
    for name in filter(parts.__contains__, objective.terms):
        yield f"objective.{name}: {float(parts[name]):.4g} on {len(batch['sample_id'])} samples"


def _check_training(setup: _Setup, models: Mapping[str, nn.Module], metrics: Sequence[str]) -> None:
    """Make the settings of every training, so that what cannot be shows now and not after hours."""
    recipe, validation = setup.run.recipe, setup.run.splits.validation
    evaluates = validation is not None and setup.run.label in validation.column_names
    trained = {"student": recipe.train, **{name: spec.train for name, spec in recipe.model_teachers.items()}}
    for stage in stages_of(setup.run) if recipe.stages else []:
        trained[f"stage {stage.name}"] = stage.plan.recipe.train
        models = {**models, f"stage {stage.name}": models["student"]}
    if recipe.baseline.enabled:
        trained["baseline"] = recipe.baseline_train
        models = {**models, "baseline": models["student"]}
    for name, spec in trained.items():
        if spec is not None:
            arguments.apply_dropout(models[name], spec.dropout)
            where = Path(tempfile.gettempdir()) / "potstill"
            made = arguments.make_training(spec, folder=where, seed=0, bars=False, evaluates=evaluates, allow_code=True)
            if name == "student":
                check_balance(made.arguments, setup.run.objective)
            wanted = (made.arguments.metric_for_best_model or "loss").removeprefix("eval_")
            if evaluates and wanted not in metrics:
                raise TrainingError(
                    f"{name}: no evaluation gives the metric '{wanted}'; {did_you_mean(wanted, metrics)}"
                )


def known_terms(run: Plan | Run) -> Objective:
    """Return the terms of a run's objective that its models can answer before the training; a fresh objective.

    Left out are those that read a source, the learner itself, or layers that a scheme has yet to make.
    """
    recipe, objective = run.recipe, run.make_objective()
    names = {stage.plan.recipe.scheme.name for stage in stages_of(run)}
    made = tuple(prefix for name in sorted(names) for prefix in schemes.facts(name).get("makes", ()))
    alone = len(recipe.all_teachers) == 1

    def known(term: Term) -> bool:
        owners = {
            name if alone else signal.partition("/")[0] for signal in term.teacher for name in recipe.all_teachers
        }
        of_models = owners <= {name for name, spec in recipe.model_teachers.items() if spec.task is None}
        own = any(signal.startswith("self/") for signal in term.teacher)
        return (term.hard or (of_models and not own)) and not any(signal.startswith(made) for signal in term.student)

    terms = {name: term for name, term in objective.named_terms() if known(term)}
    left = terms or {"none": Term("cross_entropy", weight=0.0)}
    balance = None if recipe.balance is None or len(left) < 2 else recipe.balance.model_dump()
    return Objective(left, response_mask=objective.response_mask, balance=balance)


def _is_trained(spec: TeacherSpec) -> bool:
    """Whether a teacher learns in the run, before the student or with it."""
    return spec.train is not None or spec.joint is not None


def _tables(run: Plan | Run) -> dict[str, Dataset]:
    splits = run.splits
    tables = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return {name: table for name, table in tables.items() if table is not None}


def _inputs(task: Any, train: Dataset) -> list[str]:
    """Return the columns from which the models' inputs are made."""
    named = [getattr(task, name, None) for name in ("text", "pair", "image")]
    wanted = [name for name in named if isinstance(name, str)] + list(getattr(task, "columns", {}))
    return [name for name in dict.fromkeys([*wanted, "input_ids"]) if name in train.column_names]


def _spread(size: int, count: int) -> list[int]:
    return [int(place) for place in np.unique(np.linspace(0, size - 1, count).astype(int))]


def _placed(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}
