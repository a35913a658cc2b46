"""What the plots and the tables beside them show, as plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.report.run import RunView

Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class ClassChanges:
    """The share of right answers of each class shown, ordered by the change from the reference to the student.

    Attributes:
        names: of the classes.
        count: samples of each class.
        recall: by model, the share of each class.
        reference: the first teacher, or the baseline.
        student: the student.
        change: the student's share less the reference's.
        split: how many of them lost most, where those between are left out; else 0.
    """

    names: list[str] = field(default_factory=list)
    count: list[int] = field(default_factory=list)
    recall: dict[str, list[float]] = field(default_factory=dict)
    reference: str = ""
    student: str = ""
    change: list[float] = field(default_factory=list)
    split: int = 0


def validation(view: RunView) -> dict[str, Curve]:
    """Return by model the epochs and the primary metric on the validation split."""
    key = f"eval_{view.metrics.primary}"
    found = {name: _curve(history, key) for name, history in view.histories.items()}
    return {name: curve for name, curve in found.items() if curve[0]}


def terms(view: RunView) -> dict[str, Curve]:
    """Return by term of the objective the epochs and its mean before the weight, of the student."""
    student = next(iter(view.named("student")), "")
    history = view.histories.get(student, [])
    keys = dict.fromkeys(key for entry in history for key in entry if key.startswith("loss/"))
    found = {key.removeprefix("loss/"): _curve(history, key) for key in keys}
    return {name: curve for name, curve in found.items() if curve[0]}


def judged(view: RunView) -> dict[str, tuple[NDArray[Any], NDArray[np.int64]]]:
    """Return logits and labels of the first teacher, the baseline and the student, where they have both."""
    names = [*view.named("teacher")[:1], *view.named("baseline")[:1], *view.named("student")[:1]]
    found = {}
    for name in names:
        answers = view.predictions.get(name)
        if answers is None or answers.labels is None or answers.labels.dtype.kind not in "iu":
            continue
        if answers.logits.shape[1:] == (len(view.metrics.label_names) or int(answers.labels.max()) + 1,):
            found[name] = (answers.logits, answers.labels)
    return found


def classes(view: RunView, most: int = 10) -> ClassChanges:
    """Return what the plot of the classes shows; nothing where the models have no classes or no labels.

    Args:
        view: a run.
        most: with more classes than twice this, only as many as this that lost and that gained most.
    """
    answers = judged(view)
    student = next((name for name in view.named("student") if name in answers), None)
    other = next((name for name in answers if name != student), None)
    if student is None or other is None or answers[student][0].shape != answers[other][0].shape:
        return ClassChanges()
    width = answers[student][0].shape[1]
    recall = {name: _recall(logits.argmax(-1), labels, width) for name, (logits, labels) in answers.items()}
    change = recall[student] - recall[other]
    order = np.argsort(change, kind="stable")
    order = order[~np.isnan(change[order])]
    split = most if len(order) > 2 * most else 0
    order = np.concatenate([order[:most], order[-most:]]) if split else order
    names = view.metrics.label_names if len(view.metrics.label_names) == width else [f"class {i}" for i in range(width)]
    counts = np.bincount(answers[student][1][answers[student][1] >= 0], minlength=width)
    return ClassChanges(
        names=[names[i] for i in order],
        count=[int(counts[i]) for i in order],
        recall={name: [float(each[i]) for i in order] for name, each in recall.items()},
        reference=other,
        student=student,
        change=[float(change[i]) for i in order],
        split=split,
    )


def _recall(predicted: NDArray[Any], labels: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    """The share of each class that is answered right ``[num_classes]``; NaN for one without samples."""
    predicted, labels = predicted[labels >= 0], labels[labels >= 0]
    count = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels[predicted == labels], minlength=num_classes)
    return np.asarray(right / np.where(count, count, np.nan), dtype=np.float64)


def _curve(history: list[dict[str, Any]], key: str) -> Curve:
    points = [
        (float(entry["epoch"]), float(entry[key]))
        for entry in history
        if isinstance(entry.get(key), int | float) and "epoch" in entry and math.isfinite(entry[key])
    ]
    return [epoch for epoch, _ in points], [value for _, value in points]
