"""A recipe tried out, as `check` does it: the lines alone, or what was found; tasks and models of one's own for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.checks.findings import Finding
from potstill.data.batching import InMemory
from potstill.recipe.schema import Recipe
from potstill.runs.plan import Plan
from potstill.runs.preflight import examine
from potstill.tasks.classification import Classification
from potstill.tasks.tabular_classification import TabularClassification


def dry_run(recipe: Recipe, *, allow_code: bool = True) -> Iterator[str]:
    """What the recipe means, a line a thing."""
    return (line for line in examine(Plan(recipe, allow_code=allow_code)) if isinstance(line, str))


def found(recipe: Recipe) -> list[Finding]:
    """What the preflight finds."""
    return [line for line in examine(Plan(recipe)) if isinstance(line, Finding)]


def zero_head(in_features: int = 4, num_labels: int = 3) -> nn.Module:
    """A model that says the same of every sample until it is trained."""
    model = nn.Sequential(nn.Linear(in_features, 8), nn.ReLU(), nn.Linear(8, num_labels))
    nn.init.zeros_(model[2].weight)
    return model


class Ordered(TabularClassification):
    """Classes in an order, with a logit for the border between any two."""

    hard_loss = "tests.runs.tried:thresholds"

    def answers(self, logits: NDArray[Any]) -> NDArray[Any]:
        """Return how many borders a sample is above."""
        return np.asarray((logits > 0).sum(-1))

    def facts(self) -> dict[str, Any]:
        """Return the number of borders as that of outputs."""
        return {**super().facts(), "num_labels": len(self.label_names) - 1}


def thresholds(student: Tensor, *, labels: Tensor) -> Tensor:
    """Return how well each border is known."""
    above = labels[:, None] > torch.arange(student.shape[-1], device=student.device)
    return F.binary_cross_entropy_with_logits(student, above.float(), reduction="none").mean(-1)


class Bare(Classification):
    """Rows of four numbers; which columns they are is known to nobody."""

    def __init__(self, *, label: str = "label", augment: Sequence[Any] = ()) -> None:
        super().__init__(label=label)

    def dataset(self, table: Dataset, *, training: bool, seed: int) -> InMemory:
        """Return batches with ``features`` of all numbers."""
        names = [name for name in table.column_names if name not in (self.label, "sample_id")]
        features = torch.tensor([table[name][:] for name in names]).T
        return InMemory({**self.base_columns(table), "features": features})

    def facts(self) -> dict[str, Any]:
        """Return the sizes of the models."""
        return {**super().facts(), "in_features": 4}
