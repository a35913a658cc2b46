"""The plots of a report, each a function for notebooks: what :func:`potstill.report.load_run` gives in, a figure out.

All are as wide as a phone and can be read without colour: models differ in marker, line and hatch too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from potstill.evaluation.calibration import expected_calibration_error, reliability
from potstill.report import series, words
from potstill.report.axes import empty, legend, scale, spread, without_start
from potstill.report.labels import plain, told_apart, wrapped
from potstill.report.run import RunView, SeedsView
from potstill.report.style import FAINT, INK, Look, drawing, looks, style
from potstill.runs.metrics import Estimate

_NARROW = 0.7  # bars whose shortest is longer than this share of the longest say little: dots on a cut axis do


def metric_bars(view: RunView | SeedsView, metric: str | None = None) -> Figure:
    """Draw a metric of every model with its 95 % interval; for several seeds, their mean and every seed.

    Bars from 0 where they differ visibly, else dots on an axis that begins later, and says so.

    Args:
        view: a run (intervals over test samples) or several seeds (t-intervals over seeds).
        metric: its name; the primary one if omitted, and always for several seeds.
    """
    over_seeds = isinstance(view, SeedsView)
    metrics = view.runs[view.summary.seeds[0]].metrics if isinstance(view, SeedsView) else view.metrics
    metric = metrics.primary if over_seeds or metric is None else metric
    if isinstance(view, SeedsView):
        estimates, dots = view.summary.models, view.summary.values
    else:
        dots = {}
        estimates = {name: model.metrics[metric] for name, model in metrics.models.items() if metric in model.metrics}
    look, share = looks(metrics), words.is_share(metrics, metric)
    with style():
        figure, (axes,) = drawing(1.25 + 0.55 * len(estimates))
        if not estimates:
            return empty(figure, axes, "no labels, so no metric")
        low, high = _range(estimates, dots)
        cut = high > low > _NARROW * high
        for place, (name, estimate) in enumerate(estimates.items()):
            _row(axes, place, estimate, look[name], dots.get(name, []), cut=cut, share=share)
        margin = 0.12 * (high - low)
        axes.set_xlim(low - margin if cut else min(0.0, low), high + margin if cut else 1.05 * max(high, 1e-9))
        axes.set_yticks(range(len(estimates)), [plain(name, 14) for name in estimates])
        axes.set_ylim(len(estimates) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        unit = ", %" if share else ""
        axes.set_xlabel(f"{words.metric_name(metric)}{unit}" + (" (axis does not begin at 0)" if cut else ""))
        scale(axes.xaxis, share)
    return figure


def learning_curves(view: RunView) -> Figure:
    """Draw the validation metric of every model over the epochs, and the terms of the student's loss below it.

    Args:
        view: a run; a teacher from the cache has no history.
    """
    curves, terms = series.validation(view), series.terms(view)
    look, share = looks(view.metrics), words.is_share(view.metrics, view.metrics.primary)
    with style():
        panels = max(1, bool(curves) + bool(terms))
        figure, axes = drawing(0.5 + 2.5 * panels, panels, sharex=True)
        if not curves and not terms:
            return empty(figure, axes[0], "nothing was logged")
        if curves:
            for name, (epochs, values) in curves.items():
                one = look[name]
                every = max(1, len(epochs) // 6)
                line = axes[0].plot(epochs, values, color=one.color, ls=one.line, label=plain(name, 14))[0]
                line.set(marker=one.marker, markevery=every)
            axes[0].set_title(f"{words.metric_name(view.metrics.primary)} on validation{', %' if share else ''}")
            axes[0].set_ylim(bottom=without_start([values for _, values in curves.values()]))
            legend(figure)
            scale(axes[0].yaxis, share)
        if terms:
            _terms(axes[-1], terms)
        for one_axes in axes:
            one_axes.grid(axis="y")
        axes[-1].set_xlabel("epochs")
    return figure


def cost_scatter(view: RunView) -> Figure:
    """Draw the primary metric against the size on disk and, where it was measured, the latency of a batch of 1.

    Args:
        view: a run.
    """
    metrics = view.metrics
    models = {name: model for name, model in metrics.models.items() if model.bytes}  # not a teacher that is none
    shown = {name: model for name, model in models.items() if metrics.primary in model.metrics}
    share, timed = words.is_share(metrics, metrics.primary), all("1" in m.latency_ms for m in shown.values())
    with style():
        panels = 2 if shown and timed else 1
        figure, axes = drawing(0.3 + 2.5 * panels, panels)
        if not shown:
            return empty(figure, axes[0], "no labels, so no metric")
        values = {name: model.metrics[metrics.primary] for name, model in shown.items()}
        unit, worth = ("MB", 1e6) if max(model.bytes for model in shown.values()) >= 1e6 else ("kB", 1e3)
        _cost_panel(axes[0], view, {name: model.bytes / worth for name, model in shown.items()}, values)
        axes[0].set_xlabel(f"size on disk, {unit}")
        if timed:
            _cost_panel(axes[1], view, {name: model.latency_ms["1"] for name, model in shown.items()}, values)
            axes[1].set_xlabel(f"latency of a batch of 1, ms ({metrics.device})")
        for one_axes in axes:
            one_axes.set_title(f"{words.metric_name(metrics.primary)}{', %' if share else ''}")
            one_axes.grid()
            scale(one_axes.yaxis, share)
    return figure


def reliability_diagram(view: RunView, bins: int = 10) -> Figure:
    """Draw how often each model is right at each confidence, and how its answers spread over the confidences.

    Bins with fewer than 10 samples are left out of the upper panel: they are noise.

    Args:
        view: a run with predictions and labels.
        bins: of equal width.

    Reference: Guo et al. 2017, https://arxiv.org/abs/1706.04599.
    """
    answers, look = series.judged(view), looks(view.metrics)
    with style():
        if not answers:
            figure, axes = drawing(1.5)
            return empty(figure, axes[0], "no labels, or no classes")
        figure, axes = drawing(5.2, 2, sharex=True, height_ratios=[2.6, 1])
        axes[0].plot([0, 1], [0, 1], color=FAINT, lw=1.4, zorder=0)
        axes[0].text(0.06, 0.0, "too sure lies below the line", fontsize=10, style="italic", color="#4a5362")
        edges = np.linspace(0, 1, bins + 1)
        for name, (logits, labels) in answers.items():
            found, one = reliability(logits, labels, bins), look[name]
            full = found.count >= 10
            ece = expected_calibration_error(logits, labels)
            line = axes[0].plot(found.confidence[full], found.accuracy[full], color=one.color, ls=one.line)[0]
            line.set(marker=one.marker, label=f"{plain(name, 14)}: ECE {100 * ece:.1f} %")
            axes[1].stairs(found.count / found.count.sum(), edges, color=one.color, ls=one.line, lw=1.8)
        legend(figure, columns=1)
        axes[0].set_title("how often it is right, %")
        axes[0].set_ylim(-0.03, 1.05)
        axes[1].set_ylim(0, 1.1 * axes[1].get_ylim()[1])
        axes[1].set_title("share of the answers, %")
        axes[1].set_xlim(0, 1.02)
        axes[1].set_xlabel("confidence in the answer, %")
        for one_axis in (axes[0].yaxis, axes[1].yaxis, axes[1].xaxis):
            scale(one_axis, True)
        for one_axis in (axes[0].yaxis, axes[1].xaxis):
            one_axis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    return figure


def class_changes(view: RunView, most: int = 10) -> Figure:
    """Draw for each class the share that teacher, baseline and student get right, ordered by the change.

    The change is the student's share less the first teacher's (the baseline's where there is no teacher), in points.

    Args:
        view: a run with predictions and labels.
        most: with more classes than twice this, only as many as this that lost and that gained most.
    """
    found, look = series.classes(view, most), looks(view.metrics)
    with style():
        figure, (axes,) = drawing(1.3 + 0.36 * max(1, len(found.names)))
        if not found.names:
            return empty(figure, axes, "no labels, or no classes")
        axes.hlines(
            range(len(found.names)), found.recall[found.reference], found.recall[found.student], color=INK, lw=1.1
        )
        for name, recall in found.recall.items():
            one, hollow = look[name], name != found.student
            fill = "white" if hollow else one.color
            dots = axes.plot(recall, range(len(recall)), one.marker, ls="none", label=plain(name, 14))[0]
            dots.set(mfc=fill, mec=one.color, mew=1.7, zorder=2.5 + (not hollow))
        for place, change in enumerate(found.change):
            words_ = ("0.0" if abs(change) < 5e-4 else f"{100 * change:+.1f}").replace("-", "−")
            axes.annotate(words_, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=10.5)
        if 0 < found.split < len(found.names):
            axes.axhline(found.split - 0.5, color=FAINT, ls=":", lw=1.4)
        axes.set_yticks(range(len(found.names)), [wrapped(name) for name in found.names], linespacing=0.95)
        axes.set_ylim(len(found.names) - 0.4, -0.6)
        axes.grid()
        axes.set_axisbelow(True)
        axes.annotate("points", (1.02, -0.5), xycoords=("axes fraction", "data"), fontsize=9.5, va="bottom")
        axes.set_xlabel("answered right, %")
        legend(figure, length=1.2)
        scale(axes.xaxis, True)
    return figure


def _row(axes: Axes, place: int, estimate: Estimate, look: Look, dots: list[float], *, cut: bool, share: bool) -> None:
    """One model: bar or dot, interval, its figure above the line."""
    known = not math.isnan(estimate.low) and not math.isnan(estimate.high)
    if not cut:
        fill = "white" if look.hatch else look.color
        axes.barh(place, estimate.value, height=0.42, facecolor=fill, edgecolor=look.color, hatch=look.hatch)
    if known:
        ends = ([estimate.value - estimate.low], [estimate.high - estimate.value])
        axes.errorbar(estimate.value, place, xerr=np.abs(ends), color=INK, capsize=4, lw=1.6, zorder=3)
    if cut:
        axes.plot(estimate.value, place, look.marker, color=look.color, ms=9, mec=INK, mew=0.8, zorder=4)
    for dot in dots:
        axes.plot(dot, place + 0.24, look.marker, mfc="white", mec=look.color, ms=5, mew=1.3, zorder=4)
    text = words.level(estimate, share=share)
    axes.annotate(
        text, (estimate.value, place), (0, 9), textcoords="offset points", ha="center", va="bottom", fontsize=10.5
    )


def _terms(axes: Axes, terms: dict[str, tuple[list[float], list[float]]]) -> None:
    """The student's terms, each with its own line."""
    lines = ("-", "--", ":", "-.", (0, (1, 1)), (0, (6, 2, 1, 2, 1, 2)))
    positive = all(value > 0 for _, values in terms.values() for value in values)
    axes.set_yscale("log" if positive else "linear")
    labels = told_apart(list(terms), 14)
    for place, (label, (epochs, values)) in enumerate(zip(labels, terms.values(), strict=True)):
        color = ("#333b47", "#0072B2", "#8a4b00")[place % 3]
        axes.plot(epochs, values, color=color, ls=lines[place % 6], lw=1.7, label=label)
    under: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.05, -0.3), "ncols": 3}
    axes.legend(frameon=False, handlelength=3.2, fontsize=10.5, columnspacing=1.2, **under)
    axes.set_title("terms of the loss, before weights")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _cost_panel(axes: Axes, view: RunView, costs: dict[str, float], values: dict[str, Estimate]) -> None:
    """Points with intervals and names; a logarithmic axis where costs differ by more than four times."""
    look = looks(view.metrics)
    low, high = min(costs.values()), max(costs.values())
    if low > 0 and high > 4 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.25, high * (high / low) ** 0.3)
    else:
        axes.set_xlim(0, high * 1.3)
    for name, estimate in values.items():
        one = look[name]
        if not math.isnan(estimate.low) and not math.isnan(estimate.high):
            axes.vlines(costs[name], estimate.low, estimate.high, color=one.color, lw=1.3, ls=one.line, alpha=0.75)
        axes.plot(costs[name], estimate.value, one.marker, color=one.color, ms=9, mec=INK, mew=0.8)
    axes.margins(y=0.15)
    offsets = spread([values[name].value for name in values], axes, 14)
    for name, offset in zip(values, offsets, strict=True):
        at = (costs[name], values[name].value)
        left = axes.get_xscale() == "linear" and 0.45 * high < costs[name] < 0.95 * high
        side: dict[str, Any] = {"ha": "right" if left else "left", "va": "center", "fontsize": 10.5}
        axes.annotate(plain(name, 12), at, (-9 if left else 9, offset), textcoords="offset points", **side)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _range(estimates: dict[str, Estimate], dots: dict[str, list[float]]) -> tuple[float, float]:
    ends = [end for each in estimates.values() for end in (each.value, each.low, each.high) if not math.isnan(end)]
    ends += [value for values in dots.values() for value in values]
    return (min(ends), max(ends)) if ends else (0.0, 1.0)
