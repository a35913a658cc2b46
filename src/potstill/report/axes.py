"""What the plots' axes share: ticks, names, and labels that do not cover one another."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator


def spread(values: list[float], axes: Axes, apart: float) -> list[float]:
    """Return how far to move labels beside these values, in points, so that they stand ``apart`` from one another."""
    axes.get_ylim()  # settles the limits
    places = axes.transData.transform([(axes.get_xlim()[0], value) for value in values])[:, 1] * 72 / axes.figure.dpi
    order = np.argsort(places)
    moved = places[order].copy()
    for _ in range(50):
        for at in range(len(moved) - 1):
            short = apart - (moved[at + 1] - moved[at])
            if short > 0:
                moved[at] -= short / 2
                moved[at + 1] += short / 2
    offsets = np.empty(len(values))
    offsets[order] = moved - places[order]
    return [float(offset) for offset in offsets]


def without_start(curves: list[list[float]]) -> float | None:
    """Return where an axis should begin so that the first steps of a training do not flatten the rest."""
    every = np.concatenate(curves)
    usual, best = float(np.quantile(every, 0.15)), float(every.max())
    bottom = usual - 0.6 * (best - usual)
    return bottom if every.min() < bottom else None


def legend(figure: Figure, columns: int = 3, length: float = 3.2) -> None:
    """Name what is drawn above the panels, in fewer columns where names are long."""
    names = [name for axes in figure.axes[:1] for name in axes.get_legend_handles_labels()[1]]
    if sum(max(map(len, names[at::columns]), default=0) for at in range(columns)) > 27:
        columns = min(columns, 2)
    options: dict[str, Any] = {"handlelength": length, "columnspacing": 1.2, "handletextpad": 0.5, "fontsize": 10.5}
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, **options)


def scale(axis: Any, share: bool) -> None:
    """Give an axis about five round ticks; a share is written in per cent."""
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if share:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))


def empty(figure: Figure, axes: Axes, why: str) -> Figure:
    """Say why nothing is drawn."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
    return figure
