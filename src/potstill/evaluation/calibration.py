"""How far probabilities can be believed: reliability, calibration error, likelihood, temperature. NumPy only.

Logits are ``[N, C]`` and labels ``[N]``; samples whose label is −100 are left out. All is computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

BINS = 15
_IGNORED = -100  # as `potstill.interfaces.IGNORED`, which comes with torch
_WIDEST = 5.0  # of |log T|: temperatures from 1/148 to 148


@dataclass(frozen=True)
class Reliability:
    """Bins of equal width over the confidence in the answer, which is the largest probability.

    Attributes:
        confidence: mean confidence in each bin ``[bins]``; NaN in an empty one.
        accuracy: share of right answers in each bin ``[bins]``; NaN in an empty one.
        count: samples in each bin ``[bins]``, int64.
    """

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    count: NDArray[np.int64]


def reliability(logits: NDArray[Any], labels: NDArray[Any], bins: int = BINS) -> Reliability:
    """Return confidence and accuracy in ``bins`` bins ``((i − 1) / bins, i / bins]``.

    Args:
        logits: ``[N, C]``.
        labels: ``[N]`` class ids, −100 where unknown.
        bins: how many.

    Reference: Guo et al. 2017, https://arxiv.org/abs/1706.04599.
    """
    logits, labels = _known(logits, labels)
    probabilities = special.softmax(logits, axis=-1)
    confidence = probabilities.max(-1, initial=0.0)
    right = logits.argmax(-1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins).astype(np.int64)
    divisor = np.where(count, count, np.nan)
    sums = (np.bincount(place, weights=weights, minlength=bins) for weights in (confidence, right))
    mean_confidence, accuracy = (each / divisor for each in sums)
    return Reliability(mean_confidence, accuracy, count)


def expected_calibration_error(logits: NDArray[Any], labels: NDArray[Any], bins: int = BINS) -> float:
    """Return the mean over samples of |accuracy − confidence| of their bin, in [0, 1]; NaN without labels.

    Args:
        logits: ``[N, C]``.
        labels: ``[N]`` class ids, −100 where unknown.
        bins: of equal width.

    Reference: Naeini et al. 2015; Guo et al. 2017, https://arxiv.org/abs/1706.04599.
    """
    found = reliability(logits, labels, bins)
    total = int(found.count.sum())
    if not total:
        return float("nan")
    return float(np.nansum(np.abs(found.accuracy - found.confidence) * found.count) / total)


def negative_log_likelihood(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean of −log p(label) in nats; NaN without labels.

    Args:
        logits: ``[N, C]``.
        labels: ``[N]`` class ids, −100 where unknown.
    """
    logits, labels = _known(logits, labels)
    return _likelihood(logits, labels) if len(labels) else float("nan")


def fitted_temperature(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the temperature T that makes the likelihood of ``logits / T`` largest; NaN without labels.

    Above 1 the model is too sure, below 1 not sure enough. T stays within [1/148, 148]: where all answers are right
    the best would be 0.

    Args:
        logits: ``[N, C]``.
        labels: ``[N]`` class ids, −100 where unknown.

    Reference: Guo et al. 2017, https://arxiv.org/abs/1706.04599.
    """
    logits, labels = _known(logits, labels)
    if not len(labels):
        return float("nan")
    found = optimize.minimize_scalar(
        lambda log_t: _likelihood(logits / np.exp(log_t), labels), bounds=(-_WIDEST, _WIDEST), method="bounded"
    )
    return float(np.exp(found.x))


def _known(logits: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    known = np.asarray(labels) != _IGNORED
    return np.asarray(logits, dtype=np.float64)[known], np.asarray(labels, dtype=np.int64)[known]


def _likelihood(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    chosen = logits[np.arange(len(labels)), labels]
    return float(np.mean(special.logsumexp(logits, axis=-1) - chosen))
