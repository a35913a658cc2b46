"""What the evaluation of a run finds: every model's answers, figures and costs, and the gain of one over another."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from potstill.errors import PotstillError
from potstill.evaluation.cost import Speed, bytes_on_disk, parameters, speeds
from potstill.evaluation.examples import examples, most_different
from potstill.evaluation.fidelity import agreement, divergence, retention, retention_above_chance
from potstill.evaluation.metrics import calibrate, compare, estimate, has_classes
from potstill.evaluation.predict import Predictions, predict
from potstill.recipe import build
from potstill.runs.lessons import judged_sources
from potstill.runs.metrics import Calibration, Estimate, Gain, ModelMetrics, RunMetrics
from potstill.runs.processes import process_state

if TYPE_CHECKING:
    from datasets import Dataset

    from potstill.interfaces import BatchDataset, Task, TeacherSource
    from potstill.runs.steps import Run

logger = logging.getLogger("potstill")

STUDENT = "distilled"
BASELINE = "baseline"


@dataclass
class Judgement:
    """The models of a run, judged on one split.

    Args:
        run: a run whose models are trained.
        table: the split, with its labels if it has any.
        split: its name.
    """

    run: Run
    table: Dataset
    split: str
    _asked: dict[str, Predictions] = field(init=False)
    _roles: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        recipe = self.run.recipe
        saved = [name for name, spec in recipe.all_teachers.items() if spec.task is None and self._is_saved(name)]
        self._asked = self._ask_elsewhere()
        names = [name for name in recipe.all_teachers if name in saved or name in self._asked]
        roles: dict[str, str] = dict.fromkeys(names, "teacher")
        if self.run.folder.is_done(BASELINE):
            roles[BASELINE] = "baseline"
        self._roles = {**roles, STUDENT: "student"}

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """Every saved model, in eval mode."""
        return {name: self.run.load(name) for name in self._roles if name not in self._asked}

    @cached_property
    def answers(self) -> dict[str, Predictions]:
        """What each model says of every sample."""
        made: dict[int, Any] = {}
        found = {}
        for name in self._roles:
            if name in self._asked:
                found[name] = self._asked[name]
                continue
            task = self.run.task_of(name)
            if id(task) not in made:
                made[id(task)] = task.dataset(self.table, training=False, seed=self.run.recipe.seed)
            found[name] = self._predicted(name, self.models[name], self.run.task, made[id(task)])
        return found

    def _ask_elsewhere(self) -> dict[str, Predictions]:
        """Return what the teachers say that are no models of the run; those that cannot be asked are noted."""
        run, found = self.run, {}
        makers = judged_sources(run, self.table)
        if not makers:
            return {}
        task = build.prepared_for_distillation(run.recipe, run.task, run.processors)
        dataset = task.dataset(self.table, training=False, seed=run.recipe.seed)
        for name, make in makers.items():
            try:
                found[name] = self._predicted(name, make(), task, dataset)
            except PotstillError as error:
                run.note(f"the teacher '{name}' could not be judged on the split '{self.split}': {error}")
        return found

    def _predicted(self, name: str, model: nn.Module | TeacherSource, task: Task, dataset: BatchDataset) -> Predictions:
        logger.info("%s: answering %d samples", name, len(dataset))
        move: Any = getattr(model, "to", None)
        if move is not None and not isinstance(model, nn.Module):
            move(process_state().device)
        return predict(
            model,
            task,
            dataset,
            batch_size=self.run.recipe.evaluate.batch_size,
            device=process_state().device,
            bar=name if self.run.bars else None,
        )

    def _is_saved(self, name: str) -> bool:
        return self.run.model_folder(name).is_dir()

    def metrics(self) -> RunMetrics:
        """Return the figures, as in ``metrics.json``."""
        run, teacher = self.run, self._teacher
        labels, names = self.answers[STUDENT].labels, run.task.label_names
        found = RunMetrics(
            recipe=run.recipe.name,
            seed=run.recipe.seed,
            primary=run.task.primary,
            split=self.split,
            samples=len(self.answers[STUDENT].logits),
            device=process_state().device.type,
            chance=None if labels is None else run.task.chance(labels),
            models=self._models(),
            gain=self._gain(BASELINE) if BASELINE in self._roles else None,
            to_teacher=None if teacher is None else self._gain(teacher),
            label_names=list(names),
            notes=[*run.splits.notes, *run.notes],
        )
        if teacher is not None and found.primary in found.models[STUDENT].metrics:
            own, taught = (found.models[name].metrics[found.primary].value for name in (STUDENT, teacher))
            found.retention = retention(own, taught)
            found.retention_above_chance = retention_above_chance(own, taught, found.chance or 0.0)
        return found

    def examples(self, count: int = 12) -> list[dict[str, Any]]:
        """Return the samples on which student and first teacher differ most, as in ``examples.json``."""
        teacher = self._teacher
        if teacher is None or not self._comparable(teacher):
            return []
        rows = most_different(self.answers[teacher], self.answers[STUDENT], count=count)
        alike = {name: each for name, each in self.answers.items() if has_classes(self.run.task, each)}
        found = examples(rows, alike, teacher, STUDENT)
        show = getattr(self.run.task_of(STUDENT), "show", None)  # which a task of one's own may lack
        shown = [[] for _ in rows] if show is None else show(self.table, rows.tolist())
        return [{**example, "shown": parts} for example, parts in zip(found, shown, strict=True)]

    @property
    def _teacher(self) -> str | None:
        return next((name for name, role in self._roles.items() if role == "teacher"), None)

    def _comparable(self, name: str) -> bool:
        """Whether a model's answers and the student's are probabilities of the same classes."""
        both = [self.answers[name], self.answers[STUDENT]]
        return all(has_classes(self.run.task, each) for each in both)

    def _models(self) -> dict[str, ModelMetrics]:
        timed: dict[str, Speed] = {}
        if self.run.recipe.evaluate.latency:
            tasks = {name: self.run.task_of(name) for name in self.models}
            timed = speeds(self.models, tasks, device=process_state().device)
        return {name: self._model(name, timed.get(name)) for name in self._roles}

    def _model(self, name: str, speed: Speed | None) -> ModelMetrics:
        folder: Path = self.run.model_folder(name)
        model = self.models.get(name)
        found = ModelMetrics.model_validate(
            {
                "role": self._roles[name],
                "metrics": self._estimates(name),
                "parameters": 0 if model is None else parameters(model),
                "bytes": 0 if model is None else getattr(model, "size_in_bytes", None) or bytes_on_disk(folder),
                "latency_ms": {} if speed is None else speed.latency_ms,
                "throughput": None if speed is None else speed.throughput,
                "calibration": self._calibration(name),
            }
        )
        teacher = self._teacher
        if teacher is not None and teacher != name:
            own, taught = (self.run.task.answers(self.answers[each].logits) for each in (name, teacher))
            found.agreement = agreement(own, taught)
            if self._comparable(teacher) and has_classes(self.run.task, self.answers[name]):
                found.divergence = float(divergence(self.answers[teacher].logits, self.answers[name].logits).mean())
        return found

    def _estimates(self, name: str) -> dict[str, Estimate]:
        found = estimate(self.run.task, self.answers[name], resamples=self._resamples)
        return {metric: _estimate(values) for metric, values in found.items()}

    def _calibration(self, name: str) -> Calibration | None:
        found = calibrate(self.run.task, self.answers[name], resamples=self._resamples)
        return None if found is None else Calibration(**{**found, "ece": _estimate(found["ece"])})

    def _gain(self, other: str) -> Gain | None:
        found = compare(self.run.task, self.answers[STUDENT], self.answers[other], resamples=self._resamples)
        return None if found is None else Gain.model_validate(found)

    @property
    def _resamples(self) -> int:
        return self.run.recipe.evaluate.resamples


def _estimate(values: tuple[float, float, float]) -> Estimate:
    return Estimate(value=values[0], low=values[1], high=values[2])
