"""A model's metrics with their intervals, from its stored answers."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from potstill.evaluation.predict import Predictions
from potstill.evaluation.significance import bootstrap, paired_gain
from potstill.interfaces import IGNORED, Task


def estimate(task: Task, predictions: Predictions, *, resamples: int) -> dict[str, tuple[float, float, float]]:
    """Return ``(value, low, high)`` for every metric of the task; nothing where no label is known.

    Args:
        task: computes the metrics.
        predictions: the model's answers.
        resamples: of the bootstrap.
    """
    answers, labels = _known(task, predictions)
    if not len(labels):
        return {}
    values = task.metrics(answers, labels)
    intervals = bootstrap(task.metrics, answers, labels, resamples=resamples)
    return {name: (value, *intervals[name]) for name, value in values.items()}


def compare(task: Task, first: Predictions, second: Predictions, *, resamples: int) -> dict[str, float] | None:
    """Return the paired gain of ``first`` over ``second`` in the primary metric; ``None`` without labels."""
    answers, labels = _known(task, first)
    others, _ = _known(task, second)
    if not len(labels):
        return None
    return paired_gain(lambda p, y: task.metrics(p, y)[task.primary], answers, others, labels, resamples=resamples)


def _known(task: Task, predictions: Predictions) -> tuple[NDArray[Any], NDArray[Any]]:
    """The answers and labels of the samples that have a label."""
    answers = task.answers(predictions.logits)
    if predictions.labels is None:
        return answers[:0], answers[:0]
    labels = predictions.labels
    known = (labels != IGNORED).reshape(len(labels), -1).any(1)
    return answers[known], labels[known]
