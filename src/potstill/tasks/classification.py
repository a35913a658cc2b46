"""What all single-label classification tasks share: labels, hard loss, metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from numpy.typing import NDArray
from torch import Tensor, nn

from potstill.errors import TaskError, did_you_mean
from potstill.interfaces import IGNORED, Batch, Signals
from potstill.models.inputs import respond


class Classification:
    """Base of the tasks that choose one of C classes for a sample. See :class:`potstill.interfaces.Task`.

    Args:
        label: the column of the class; a set without it is a transfer set for soft losses.
    """

    name = "classification"
    primary = "accuracy"
    hard_loss = "cross_entropy"
    input_key = "features"

    def __init__(self, *, label: str = "label") -> None:
        self.label = label
        self.label_names: list[str] = []

    def fit(self, train: Dataset) -> None:
        """Learn the names of the classes from the training split.

        Raises:
            TaskError: the label column holds no classes.
        """
        if self.label not in train.column_names:
            return
        feature = train.features[self.label]
        if not isinstance(feature, ClassLabel):
            raise TaskError(f"expected the column '{self.label}' to hold classes, got {feature}")
        self.label_names = list(feature.names)

    def prepare(self, student: Any, teachers: Mapping[str, Any]) -> None:
        """Do nothing: every model takes the same inputs."""

    def forward(self, model: nn.Module, batch: Batch) -> Signals:
        """Return ``logits`` ``[B, C]``."""
        return respond(model, batch)

    def mask(self, batch: Batch) -> Tensor | None:
        """Return ``None``: every sample counts."""
        return None

    def answers(self, logits: NDArray[Any]) -> NDArray[Any]:
        """Return the most likely class ``[N]`` of logits ``[N, C]``."""
        return np.asarray(logits.argmax(-1))

    def metrics(self, answers: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
        """Return ``accuracy`` and ``f1_macro`` (over the classes that occur), each in [0, 1].

        Args:
            answers: predicted classes ``[N]``.
            labels: ``[N]``; −100 is left out.
        """
        known = labels != IGNORED
        predicted, labels = answers[known], labels[known]
        if not len(labels):
            return {}
        return {"accuracy": float(np.mean(predicted == labels)), "f1_macro": _f1_macro(predicted, labels)}

    def chance(self, labels: NDArray[Any]) -> float:
        """Return the accuracy of always guessing the most frequent class."""
        known = labels[labels != IGNORED]
        return float(np.bincount(known).max() / len(known)) if len(known) else 0.0

    def facts(self) -> dict[str, Any]:
        """Return what a model built for this task may need."""
        return {"num_labels": len(self.label_names)}

    def settings(self) -> dict[str, Any]:
        """Return what inference needs, as plain JSON."""
        return {"label": self.label, "label_names": self.label_names}

    def restore(self, settings: Mapping[str, Any]) -> None:
        """Take back what :meth:`settings` returned."""
        self.label = str(settings["label"])
        self.label_names = [str(name) for name in settings["label_names"]]

    def check_labels(self, model_labels: list[str], whose: str) -> None:
        """Raise if a model was trained with other classes, or with these in another order.

        Raises:
            TaskError: names both lists.
        """
        wanted, found = ([_plain(label) for label in labels] for labels in (self.label_names, model_labels))
        if not wanted or not found or wanted == found:
            return
        if len(wanted) == len(found) and wanted == [str(place) for place in range(len(wanted))]:
            return  # the data have only numbers
        if sorted(wanted) == sorted(found):
            order = [self.label_names[wanted.index(label)] for label in found]
            named = ", ".join(order)
            fix = (
                f"the order differs: where the data name their classes themselves, `data: {{labels: [{named}]}}` "
                "(in Python `label_names`) puts them in this order; where they number them, the names are wrong"
            )
        else:
            fix = "if its outputs mean the same in the same order, say `labels: dataset` beside its `model`"
        raise TaskError(
            f"expected {whose} to have the labels {_shown(self.label_names)}, got {_shown(model_labels)}; "
            f"labels must agree in name and order: {fix}"
        )

    def show(self, table: Dataset, rows: list[int]) -> list[list[dict[str, str]]]:
        """Return nothing of each row; tasks that know their inputs say more."""
        return [[] for _ in rows]

    def base_columns(self, table: Dataset) -> dict[str, Tensor]:
        """Return ``sample_id`` and, where there are any, ``labels`` (−100 for unlabelled rows)."""
        columns = {"sample_id": torch.as_tensor(np.asarray(table["sample_id"][:]), dtype=torch.int64)}
        if self.label in table.column_names:
            ids = np.asarray([-1 if value is None else value for value in table[self.label][:]])
            columns["labels"] = torch.as_tensor(np.where(ids < 0, IGNORED, ids), dtype=torch.int64)
        return columns

    def require_column(self, table: Dataset, column: str) -> None:
        """Raise if the table has no such column.

        Raises:
            TaskError: names the nearest column.
        """
        if column not in table.column_names:
            raise TaskError(f"there is no column '{column}'; {did_you_mean(column, table.column_names)}")


def _plain(label: str) -> str:
    """Return a label as it is compared: ``Mostly_True`` is ``mostly-true``."""
    return re.sub(r"[\s_-]+", "-", label.strip().casefold())


def _shown(labels: list[str]) -> str:
    return f"[{', '.join(labels[:12])}{', …' if len(labels) > 12 else ''}] ({len(labels)})"


def _f1_macro(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    """F1 averaged over the classes that occur in labels or answers; as scikit-learn's, but fast enough to resample."""
    size = int(max(predicted.max(), labels.max())) + 1
    hits = np.bincount(labels[predicted == labels], minlength=size)
    total = np.bincount(labels, minlength=size) + np.bincount(predicted, minlength=size)
    occurs = total > 0
    return float(np.mean(2 * hits[occurs] / total[occurs]))
