"""Counts, sizes and ratios as a person reads them."""

from __future__ import annotations

import math

SPACE = "\u00a0"  # no line ends between a figure and its unit
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def number(value: float) -> str:
    """Return three significant digits, with thousands separated."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}".replace("-", "−")


def size(count: float) -> str:
    """Return bytes in the unit that suits, by powers of 1000; a dash for none, as of a teacher that is no model."""
    if not count:
        return "–"
    for unit, worth in _UNITS:
        if count >= worth:
            return f"{count / worth:.3g}{SPACE}{unit}"
    return f"{count:.0f} bytes"


def amount(count: float) -> str:
    """Return a count with three significant digits: ``6.47 k``, ``66.4 M``; a dash for none."""
    if not count:
        return "–"
    for unit, worth in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= worth:
            return f"{count / worth:.3g}{SPACE}{unit}"
    return f"{count:.0f}"


def factor(first: float, second: float, more: str, less: str) -> str:
    """Return ``10.2× MORE`` for how many times ``first`` is ``second``, or ``… LESS`` where it is below."""
    if not first or not second or math.isnan(first) or math.isnan(second):
        return ""
    ratio = first / second
    if 0.95 < ratio < 1.05:
        return "about the same"
    times, word = (ratio, more) if ratio > 1 else (1 / ratio, less)
    return f"{times:.{1 if times < 100 else 0}f}×{SPACE}{word}"


def p_value(p: float) -> str:
    """Return ``p = 0.030`` or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
