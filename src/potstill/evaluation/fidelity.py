"""How much of the teacher the student has: retention and agreement."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def retention(student: float, teacher: float) -> float | None:
    """Return ``student / teacher``, or ``None`` where the teacher's figure is 0."""
    return student / teacher if teacher else None


def retention_above_chance(student: float, teacher: float, chance: float) -> float | None:
    """Return ``(student − chance) / (teacher − chance)``, or ``None`` where the teacher is no better than chance.

    Args:
        student: the student's metric.
        teacher: the teacher's.
        chance: the metric of the best constant guess.
    """
    return (student - chance) / (teacher - chance) if teacher > chance else None


def agreement(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Return the share of answers that two models give alike.

    Args:
        first: one model's answers ``[N, ...]``, e.g. a class a sample or a token; see ``Task.answers``.
        second: the other's on the same samples.
    """
    return float(np.mean(first == second))
