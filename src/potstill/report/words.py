"""Figures as a person reads them."""

from __future__ import annotations

import math

from potstill.report.amounts import SPACE, number
from potstill.runs.metrics import Estimate, RunMetrics

_SIGNED = ("corr", "pearson", "spearman", "matthews", "mcc", "kappa", "r2")


def is_share(metrics: RunMetrics, metric: str) -> bool:
    """Return whether a metric is a share in [0, 1], to be read in per cent and compared in points."""
    if any(part in metric.lower() for part in _SIGNED):
        return False
    found = [model.metrics[metric] for model in metrics.models.values() if metric in model.metrics]
    ends = [end for each in found for end in (each.value, each.low, each.high) if not math.isnan(end)]
    return all(0 <= end <= 1 for end in ends)


def level(figure: float | Estimate, *, share: bool, digits: int = 1) -> str:
    """Return a figure: ``97.3 %`` for a share, else three significant digits.

    Args:
        figure: the figure; one with an interval has the digits of its interval, if these are more.
        share: whether it is a share in [0, 1].
        digits: of a per cent.
    """
    value = figure if isinstance(figure, float | int) else figure.value
    digits = digits if isinstance(figure, float | int) else max(digits, _decimals(figure))
    if math.isnan(value):
        return "–"
    return f"{100 * value:.{digits}f}{SPACE}%" if share else number(value)


def difference(value: float, *, share: bool) -> str:
    """Return a signed difference: ``+0.9 points`` for shares, else three significant digits."""
    if math.isnan(value):
        return "–"
    if share:
        return f"{_minus(f'{100 * value:+.2f}')}{SPACE}points"
    return _minus(f"{value:+.3g}")


def interval(estimate: Estimate, *, share: bool, signed: bool = False) -> str:
    """Return ``low to high`` without units, or nothing where it is not known."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return ""
    if share:
        form = "{:+.2f}" if signed else f"{{:.{_decimals(estimate)}f}}"
        low, high = (form.format(100 * end) for end in (estimate.low, estimate.high))
    else:
        low, high = (f"{end:+.3g}" if signed else f"{end:.3g}" for end in (estimate.low, estimate.high))
    return f"{_minus(low)} to {_minus(high)}"


def metric_name(name: str) -> str:
    """Return a metric's key as words: ``f1_macro`` is ``F1 macro``."""
    words = name.replace("_", " ")
    return "F1" + words[2:] if words.startswith("f1") else words


def _decimals(estimate: Estimate) -> int:
    """Return how many digits of a per cent mean something: one, or two where the interval is narrower than a point."""
    return 2 if estimate.high - estimate.low < 0.01 else 1


def _minus(text: str) -> str:
    return text.replace("-", "−")
