"""What the evaluation of a run finds: every model's answers, figures and costs, and the gain of one over another."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from potstill.evaluation.cost import Speed, bytes_on_disk, parameters, speeds
from potstill.evaluation.examples import examples, most_different
from potstill.evaluation.fidelity import agreement, divergence, retention, retention_above_chance
from potstill.evaluation.metrics import calibrate, compare, estimate, has_classes
from potstill.evaluation.predict import Predictions, predict
from potstill.runs.metrics import Calibration, Estimate, Gain, ModelMetrics, RunMetrics
from potstill.runs.processes import process_state

if TYPE_CHECKING:
    from datasets import Dataset

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
    _roles: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        roles: dict[str, str] = dict.fromkeys(self.run.recipe.all_teachers, "teacher")
        if self.run.folder.is_done(BASELINE):
            roles[BASELINE] = "baseline"
        self._roles = {**roles, STUDENT: "student"}

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """Every saved model, in eval mode."""
        return {name: self.run.load(name) for name in self._roles}

    @cached_property
    def answers(self) -> dict[str, Predictions]:
        """What each model says of every sample."""
        made: dict[int, Any] = {}
        found = {}
        for name, model in self.models.items():
            task = self.run.task_of(name)
            if id(task) not in made:
                made[id(task)] = task.dataset(self.table, training=False, seed=self.run.recipe.seed)
            logger.info("%s: answering %d samples", name, len(made[id(task)]))
            found[name] = predict(
                model,
                self.run.task,
                made[id(task)],
                batch_size=self.run.recipe.evaluate.batch_size,
                device=process_state().device,
                bar=name if self.run.bars else None,
            )
        return found

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
        return next(iter(self.run.recipe.all_teachers), None)

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
        found = ModelMetrics.model_validate(
            {
                "role": self._roles[name],
                "metrics": self._estimates(name),
                "parameters": parameters(self.models[name]),
                "bytes": getattr(self.models[name], "size_in_bytes", None) or bytes_on_disk(folder),
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
