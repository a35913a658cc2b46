"""A model's metrics with their intervals, from its stored answers; and two models' answers compared."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from potstill.evaluation.calibration import BINS, fitted_temperature, negative_log_likelihood
from potstill.evaluation.predict import Predictions
from potstill.evaluation.significance import bootstrap, mcnemar, paired_gain
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


def compare(task: Task, first: Predictions, second: Predictions, *, resamples: int) -> dict[str, Any] | None:
    """Return the paired gain of ``first`` over ``second`` in the primary metric; ``None`` without labels.

    Beside the entries of :func:`paired_gain` it has, where an answer is right or wrong, how many samples either model
    alone has right (``only_first``, ``only_second``) and the p-value ``mcnemar`` of these.
    """
    answers, labels = _known(task, first)
    others, _ = _known(task, second)
    if not len(labels):
        return None
    found: dict[str, Any] = paired_gain(
        lambda p, y: task.metrics(p, y)[task.primary], answers, others, labels, resamples=resamples
    )
    if has_classes(task, first):
        right, also = answers == labels, others == labels
        found |= {"only_first": int(np.sum(right & ~also)), "only_second": int(np.sum(also & ~right))}
        found["mcnemar"] = mcnemar(found["only_first"], found["only_second"])
    return found


def calibrate(task: Task, predictions: Predictions, *, resamples: int) -> dict[str, Any] | None:
    """Return ``ece`` (value, low, high), ``nll`` in nats and the fitted ``temperature``.

    The interval is the reflected bootstrap: noise in the bins makes every resample's error larger than the figure, as
    it makes the figure larger than the truth, so the interval may lie below it.

    ``None`` where the task chooses no classes, or no label is known.
    """
    if not has_classes(task, predictions) or predictions.labels is None:
        return None
    known = predictions.labels != IGNORED
    logits, labels = predictions.logits[known], predictions.labels[known]
    if not len(labels):
        return None
    confidence = softmax(logits.astype(np.float64), axis=-1).max(-1)
    right = logits.argmax(-1) == labels
    low, high = bootstrap(_calibration_error, confidence, right, resamples=resamples)["ece"]
    value = _calibration_error(confidence, right)["ece"]
    return {
        "ece": (value, max(0.0, 2 * value - high), max(0.0, 2 * value - low)),  # each resample adds noise to the bins
        "nll": negative_log_likelihood(logits, labels),
        "temperature": fitted_temperature(logits, labels),
    }


def has_classes(task: Task, predictions: Predictions) -> bool:
    """Return whether the answers are logits ``[N, C]`` over the task's classes, one label a sample."""
    shape, labels = predictions.logits.shape, predictions.labels
    return len(shape) == 2 and shape[1] == len(task.label_names) and (labels is None or labels.ndim == 1)


def _calibration_error(confidence: NDArray[Any], right: NDArray[Any]) -> dict[str, float]:
    """The expected calibration error of these samples: what :func:`bootstrap` can draw again quickly."""
    place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    apart = np.bincount(place, weights=right - confidence, minlength=BINS)
    return {"ece": float(np.abs(apart).sum() / len(right))}


def _known(task: Task, predictions: Predictions) -> tuple[NDArray[Any], NDArray[Any]]:
    """The answers and labels of the samples that have a label."""
    answers = task.answers(predictions.logits)
    if predictions.labels is None:
        return answers[:0], answers[:0]
    labels = predictions.labels
    known = (labels != IGNORED).reshape(len(labels), -1).any(1)
    return answers[known], labels[known]
