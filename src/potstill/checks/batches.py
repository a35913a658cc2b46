"""Samples of a batch, and what a task reads from the answers to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.interfaces import Batch

Answers = Callable[[NDArray[Any]], Any]
"""``logits [N, …, C] -> answers``: what a task compares with the labels, both as NumPy arrays."""


def batch_size(batch: Batch) -> int:
    """Return the number of samples."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Return the samples of a batch from one to before another."""
    return chosen(batch, slice(start, stop))


def chosen(batch: Batch, places: slice | Tensor) -> Batch:
    """Return some samples of a batch."""
    size = batch_size(batch)
    return {
        name: value[places] if isinstance(value, Tensor) and value.ndim and len(value) == size else value
        for name, value in batch.items()
    }


def classes_of(logits: Tensor, answers: Answers | None) -> Tensor | None:
    """Return the class [N, …] that each answer is, as the task has it; ``None`` where its answers are no classes."""
    if answers is None:
        return logits.argmax(-1)
    found = np.asarray(answers(logits.numpy()))
    whole = found.dtype.kind in "biu" or (found.dtype.kind == "f" and bool((found == np.round(found)).all()))
    return torch.as_tensor(found.astype(np.int64)) if whole and found.shape == logits.shape[:-1] else None


def is_one_a_class(logits: Tensor, answers: Answers | None) -> bool:
    """Return whether a task answers with the place of the greatest logit, tried on random numbers of that shape.

    It does not where there are K − 1 thresholds for K ordered classes, or one logit for two.
    """
    if answers is None:
        return True
    middle = [min(size, 4) for size in logits.shape[1:-1]]
    tried = torch.randn(32, *middle, logits.shape[-1], generator=torch.Generator().manual_seed(0))
    try:
        found = classes_of(tried, answers)
    except Exception:  # a task may be of anyone's making
        return False
    return found is not None and torch.equal(found, tried.argmax(-1))
