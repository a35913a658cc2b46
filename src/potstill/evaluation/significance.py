"""How sure a figure is: bootstrap intervals over the test set and a paired test between two models.

Both speak of the sampling of the test set alone; the spread over seeds is a second, separate interval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 1000
_SEED = 20150309

Metric = Callable[[NDArray[Any], NDArray[Any]], dict[str, float]]


def bootstrap(
    metric: Metric, predicted: NDArray[Any], labels: NDArray[Any], *, resamples: int = RESAMPLES
) -> dict[str, tuple[float, float]]:
    """Return a 95 % percentile interval for every metric, over resamples of the samples.

    Args:
        metric: ``(predicted, labels) -> {name: value}``.
        predicted: one prediction a sample, samples first.
        labels: one label a sample.
        resamples: how many times the samples are drawn again.

    Reference: Efron 1979, https://doi.org/10.1214/aos/1176344552.
    """
    rng = np.random.default_rng(_SEED)
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        chosen = rng.integers(0, len(labels), len(labels))
        for name, value in metric(predicted[chosen], labels[chosen]).items():
            drawn.setdefault(name, []).append(value)
    return {name: _interval(np.asarray(values)) for name, values in drawn.items()}


def paired_gain(
    metric: Callable[[NDArray[Any], NDArray[Any]], float],
    first: NDArray[Any],
    second: NDArray[Any],
    labels: NDArray[Any],
    *,
    resamples: int = RESAMPLES,
) -> dict[str, float]:
    """Return how much better ``first`` is than ``second`` on the same samples.

    Args:
        metric: ``(predicted, labels) -> value``, higher is better.
        first: predictions of one model, samples first.
        second: predictions of the other on the same samples.
        labels: one label a sample.
        resamples: resamples of the pairs for the interval, and label swaps for the test.

    Returns:
        ``value``, ``low`` and ``high`` (95 % paired bootstrap), and ``p``: two-sided, from swapping the two models'
        answers sample by sample at random; it is at least ``1 / (resamples + 1)``.

    Reference: Edgington 1969, approximate randomisation; Phipson, Smyth 2010, https://arxiv.org/abs/1603.05766.
    """
    rng = np.random.default_rng(_SEED)
    value = metric(first, labels) - metric(second, labels)
    gains, beyond = [], 0
    for _ in range(resamples):
        chosen = rng.integers(0, len(labels), len(labels))
        gains.append(metric(first[chosen], labels[chosen]) - metric(second[chosen], labels[chosen]))
        swap = (rng.random(len(labels)) < 0.5).reshape(-1, *(1 for _ in first.shape[1:]))
        left, right = np.where(swap, second, first), np.where(swap, first, second)
        beyond += abs(metric(left, labels) - metric(right, labels)) >= abs(value) - 1e-12
    low, high = _interval(np.asarray(gains))
    return {"value": float(value), "low": low, "high": high, "p": (beyond + 1) / (resamples + 1)}


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test that two models are right equally often.

    Args:
        only_first: samples that the first model alone has right.
        only_second: samples that the second alone has right; those on which both are right or wrong do not count.

    Reference: McNemar 1947, https://doi.org/10.1007/BF02295996; Dietterich 1998,
    https://doi.org/10.1162/089976698300017197.
    """
    differing = only_first + only_second
    return float(stats.binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0


def mean_interval(values: list[float]) -> dict[str, float]:
    """Return the mean of independent runs and its 95 % t-interval; of one run, no interval (NaN)."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return {"value": mean, "low": float("nan"), "high": float("nan"), "n": float(len(array))}
    half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return {"value": mean, "low": mean - half, "high": mean + half, "n": float(len(array))}


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
