"""How the plots look: made for a phone's width, told apart without colour, the same bytes for the same run."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from potstill.runs.metrics import RunMetrics

WIDTH = 4.2
INK, FAINT = "#1c2430", "#c3cad4"
_SETTINGS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "axes.edgecolor": "#69727f",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#e3e7ec",
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.9,
    "lines.linewidth": 1.9,
    "lines.markersize": 6.5,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.parse_math": True,
    "text.usetex": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "potstill",
}


class Look(NamedTuple):
    """How one model is drawn everywhere: colour (of Okabe and Ito), marker, line and hatch."""

    color: str
    marker: str
    line: str
    hatch: str


_TEACHERS = (
    Look("#0072B2", "s", "--", "///"),
    Look("#56B4E9", "D", (0, (5, 1, 1, 1)), "\\\\\\"),  # type: ignore[arg-type]
    Look("#CC79A7", "P", (0, (1, 1, 4, 1)), "xxx"),  # type: ignore[arg-type]
    Look("#8a6d00", "X", (0, (8, 2)), "+++"),  # type: ignore[arg-type]
)
_ROLES = {
    "baseline": Look("#D55E00", "^", ":", "..."),
    "student": Look("#009E73", "o", "-", ""),
    "variant": Look("#555555", "v", "-.", "---"),
}


class _Drawing(Figure):
    """A figure that notebooks show although no window system is behind it."""

    def _repr_png_(self) -> bytes:
        target = io.BytesIO()
        with style():
            self.savefig(target, format="png", dpi=144)
        return target.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Set the look of the plots for a block; a person's own settings come back after it."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)  # type: ignore[arg-type]
        yield


def drawing(height: float, panels: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure as wide as a phone with its panels under one another.

    Args:
        height: in inches.
        panels: how many.
        options: of ``Figure.subplots``.
    """
    figure = _Drawing(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(h_pad=0.07, w_pad=0.03))
    axes = figure.subplots(panels, 1, squeeze=False, **options)
    return figure, list(axes[:, 0])


def looks(metrics: RunMetrics) -> dict[str, Look]:
    """Return the look of every model, by its role."""
    found, teachers = {}, 0
    for name, model in metrics.models.items():
        if model.role == "teacher":
            found[name] = _TEACHERS[teachers % len(_TEACHERS)]
            teachers += 1
        else:
            found[name] = _ROLES[model.role]
    return found


def to_svg(figure: Figure, label: str, prefix: str) -> str:
    """Return a figure as an ``<svg>`` element to stand in a page: its width is the page's, its text is text.

    Args:
        figure: of this package.
        label: what a screen reader says, already escaped for an attribute.
        prefix: begins every id, so that several figures can stand in one page.
    """
    target = io.StringIO()
    with style():
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = text.replace("'DejaVu Sans'", "inherit")
    head = re.match(r"<svg[^>]*>", text)
    box = re.search(r'viewBox="[^"]*"', text)
    begin = head.end() if head else 0
    return f'<svg role="img" aria-label="{label}" {box[0] if box else ""}>{text[begin:]}'
