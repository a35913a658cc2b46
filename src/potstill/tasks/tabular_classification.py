"""Tabular classification: columns of numbers and categories, one class a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.augment import make_views
from potstill.data.batching import InMemory
from potstill.errors import TaskError
from potstill.interfaces import Batch
from potstill.registry import tasks
from potstill.tasks.classification import Classification


@tasks.register("tabular-classification", input="tabular")
class TabularClassification(Classification):
    """One class for a row of a table.

    Numbers are standardised by mean and standard deviation of the training split (missing and infinite ones become
    the mean); categories become one-hot columns, with all zeros for a value that the training split has not.

    Args:
        label: the column of the class.
        features: the columns to use; all others if omitted.
        augment: entries of ``data.augment``, applied to the standardised columns.
    """

    name = "tabular-classification"
    input_key = "features"

    def __init__(self, *, label: str = "label", features: list[str] | None = None, augment: Sequence[Any] = ()) -> None:
        super().__init__(label=label)
        self.features = features
        self.augment = list(augment)
        self.columns: dict[str, dict[str, Any]] = {}

    def fit(self, train: Dataset) -> None:
        """Learn classes, and for each column its mean and standard deviation or its categories.

        Raises:
            TaskError: a column is missing, is the label, or holds neither numbers nor categories.
        """
        super().fit(train)
        names = self.features or [name for name in train.column_names if name not in (self.label, "sample_id")]
        if not names or self.label in names:
            raise TaskError(f"expected feature columns beside the label '{self.label}', got {names}")
        for name in names:
            self.require_column(train, name)
        self.columns = {name: _describe(name, train) for name in names}

    def dataset(self, table: Dataset, *, training: bool, seed: int) -> InMemory:
        """Return batches with ``features`` float32 ``[B, F]``."""
        for name in self.columns:
            self.require_column(table, name)
        encoded = [_encode(table, name, about) for name, about in self.columns.items()]
        features = torch.as_tensor(np.concatenate(encoded, axis=1), dtype=torch.float32)
        steps = self.augment if training else ()
        views = make_views(steps, key="features", seed=seed, num_classes=len(self.label_names), finish=None)
        return InMemory({**self.base_columns(table), "features": features}, views if steps else None)

    def facts(self) -> dict[str, Any]:
        """Return ``num_labels`` and ``in_features``."""
        return {**super().facts(), "in_features": sum(_width(about) for about in self.columns.values())}

    def settings(self) -> dict[str, Any]:
        """Return labels and columns as plain JSON."""
        return {**super().settings(), "columns": self.columns}

    def restore(self, settings: Mapping[str, Any]) -> None:
        """Take back what :meth:`settings` returned."""
        super().restore(settings)
        self.columns = dict(settings["columns"])

    def show(self, table: Dataset, rows: list[int]) -> list[list[dict[str, str]]]:
        """Return the columns of each row; of classes their names."""
        chosen = {name: (table.features[name], table.select(rows)[name][:]) for name in self.columns}
        found: list[list[dict[str, str]]] = []
        for place in range(len(rows)):
            values = {name: _shown(feature, cells[place]) for name, (feature, cells) in chosen.items()}
            found.append([{"name": name, "kind": "number", "value": value} for name, value in values.items()])
        return found

    def example_inputs(self, batch_size: int) -> Batch:
        """Return standard-normal rows."""
        generator = torch.Generator().manual_seed(0)
        rows: Tensor = torch.randn(batch_size, self.facts()["in_features"], generator=generator)
        return {"features": rows}


def _describe(name: str, train: Dataset) -> dict[str, Any]:
    feature = train.features[name]
    if isinstance(feature, ClassLabel):
        return {"categories": list(feature.names)}
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string", "bool"):
        return {"categories": sorted({str(value) for value in train[name] if value is not None})}
    if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float", "double")):
        values = _numbers(train, name)
        return {"mean": float(np.nanmean(values)), "std": float(np.nanstd(values)) or 1.0}
    raise TaskError(f"expected the column '{name}' to hold numbers or categories, got {feature}")


def _width(about: Mapping[str, Any]) -> int:
    return len(about["categories"]) if "categories" in about else 1


def _encode(table: Dataset, name: str, about: Mapping[str, Any]) -> NDArray[np.float32]:
    if "categories" not in about:
        values = (_numbers(table, name) - about["mean"]) / about["std"]
        return np.asarray(np.nan_to_num(values)[:, None], dtype=np.float32)
    feature = table.features[name]
    stored = table[name][:]
    if isinstance(feature, ClassLabel):
        stored = [None if value is None or value < 0 else feature.names[value] for value in stored]
    place = {category: i for i, category in enumerate(about["categories"])}
    found = np.array([-1 if value is None else place.get(str(value), -1) for value in stored])
    return np.asarray(found[:, None] == np.arange(len(place))[None, :], dtype=np.float32)


def _shown(feature: Any, value: Any) -> str:
    if isinstance(feature, ClassLabel) and value is not None and value >= 0:
        return str(feature.names[value])
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _numbers(table: Dataset, name: str) -> NDArray[np.float64]:
    values = np.array([np.nan if value is None else value for value in table[name][:]], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)
