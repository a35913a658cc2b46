"""How much of the teacher the student has: retention, agreement and the distance of their probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax


def retention(student: float, teacher: float) -> float | None:
    """Return ``student / teacher``, or ``None`` where a share says nothing: of figures at or below 0."""
    return student / teacher if teacher > 0 and student >= 0 else None


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


def divergence(teacher: NDArray[Any], student: NDArray[Any]) -> NDArray[np.float64]:
    """Return KL(teacher ‖ student) of each sample in nats, at temperature 1.

    Args:
        teacher: logits ``[N, C]``; classes at −inf are impossible and add nothing.
        student: logits ``[N, C]`` on the same samples.

    Returns:
        float64 ``[N]``, at least 0.
    """
    floor = np.finfo(np.float64).min
    mine, theirs = (
        np.maximum(log_softmax(np.asarray(logits, dtype=np.float64), axis=-1), floor) for logits in (student, teacher)
    )
    found = np.maximum((np.exp(theirs) * (theirs - mine)).sum(-1), 0.0)
    return np.asarray(found, dtype=np.float64)
