"""The tables of a report: models side by side, and the numbers behind each plot."""

from __future__ import annotations

from typing import NamedTuple

from potstill.evaluation.calibration import reliability
from potstill.report import amounts, series, words
from potstill.report.run import RunView, SeedsView
from potstill.runs.metrics import Estimate, ModelMetrics


class Cell(NamedTuple):
    """A figure, and what stands small below it."""

    figure: str
    detail: str = ""


class Table(NamedTuple):
    """A table: the head without its first column, and the rows, each a name and its cells."""

    head: list[str]
    rows: list[tuple[str, list[Cell]]]


def comparison(view: RunView) -> Table:
    """Return what was measured, models side by side; a row that no model has is left out."""
    models = view.metrics.models
    rows: list[tuple[str, list[Cell]]] = []
    for metric in dict.fromkeys(metric for model in models.values() for metric in model.metrics):
        share = words.is_share(view.metrics, metric)
        cells = [_estimate(model.metrics.get(metric), share) for model in models.values()]
        rows.append((words.metric_name(metric), cells))
    rows += [("answers as the teacher", [_agreement(model) for model in models.values()])]
    rows += [("divergence from the teacher, nats", [_divergence(model) for model in models.values()])]
    rows += [("calibration error (ECE)", [_calibration(model, "ece") for model in models.values()])]
    rows += [("log-likelihood, negative (NLL), nats", [_calibration(model, "nll") for model in models.values()])]
    rows += _costs(view)
    return Table(list(models), [(name, cells) for name, cells in rows if any(cell.figure != "–" for cell in cells)])


def plot_tables(view: RunView) -> dict[str, Table]:
    """Return the numbers behind each plot, by the plot's name."""
    share, every = words.is_share(view.metrics, view.metrics.primary), comparison(view)
    primary, costs = words.metric_name(view.metrics.primary), ("size on disk", "latency, batch of 1, ms")
    bars = [row for row in every.rows if row[0] == primary]
    found = {"bars": Table(every.head, bars)}
    found["cost"] = Table(every.head, [*bars, *(row for row in every.rows if row[0] in costs)])
    for name, curves in (("curves", series.validation(view)), ("terms", series.terms(view))):
        percent = share and name == "curves"
        rows = [(each, _ends(curve, percent)) for each, curve in curves.items()]
        found[name] = Table(["first", "best" if name == "curves" else "least", "last"], rows)
    changes = series.classes(view)
    head = ["samples", *(f"{name}, %" for name in changes.recall), "change, points"]
    rows = []
    for place, name in enumerate(changes.names):
        shares = [Cell(f"{100 * recall[place]:.1f}") for recall in changes.recall.values()]
        rows.append((name, [Cell(str(changes.count[place])), *shares, Cell(_points(changes.change[place]))]))
    found["classes"] = Table(head, rows)
    found["reliability"] = _reliability(view)
    return found


def seeds_table(view: SeedsView) -> Table:
    """Return a row a seed: every model's primary metric, and the gain with its test over the samples."""
    first = view.runs[view.summary.seeds[0]].metrics
    share, rows = words.is_share(first, view.summary.primary), []
    for place, seed in enumerate(view.summary.seeds):
        cells = [Cell(words.level(values[place], share=share, digits=2)) for values in view.summary.values.values()]
        gain = view.runs[seed].metrics.gain
        if gain is not None:
            detail = f"{words.interval(gain, share=share, signed=True)}, {amounts.p_value(gain.p)}"
            cells.append(Cell(words.difference(gain.value, share=share), detail))
        rows.append((f"seed {seed}", cells))
    cells = [_estimate(estimate, share, 2) for estimate in view.summary.models.values()]
    if view.summary.gain is not None:
        gain_ = view.summary.gain
        range_ = words.interval(gain_, share=share, signed=True)
        cells.append(Cell(words.difference(gain_.value, share=share), range_ and f"{range_} over seeds"))
    head = [*view.summary.values, *(["gain"] if view.summary.gain is not None else [])]
    return Table(head, [*rows, ("mean", cells)])


def _estimate(estimate: Estimate | None, share: bool, digits: int = 1) -> Cell:
    if estimate is None:
        return Cell("–")
    return Cell(words.level(estimate, share=share, digits=digits), words.interval(estimate, share=share))


def _agreement(model: ModelMetrics) -> Cell:
    return Cell("–") if model.agreement is None else Cell(words.level(model.agreement, share=True))


def _divergence(model: ModelMetrics) -> Cell:
    return Cell("–") if model.divergence is None else Cell(amounts.number(model.divergence))


def _calibration(model: ModelMetrics, which: str) -> Cell:
    if model.calibration is None:
        return Cell("–")
    if which == "ece":
        return _estimate(model.calibration.ece, share=True)
    best = model.calibration.temperature
    sure = "too sure" if best > 1.05 else "not sure enough" if best < 0.95 else "well scaled"
    return Cell(amounts.number(model.calibration.nll), f"best at T = {amounts.number(best)}: {sure}")


def _costs(view: RunView) -> list[tuple[str, list[Cell]]]:
    models = list(view.metrics.models.values())
    teacher = next((model for model in models if model.role == "teacher"), None)

    def times(mine: float, theirs: float, less: str, more: str, model: ModelMetrics) -> str:
        return "" if model is teacher else amounts.factor(theirs, mine, less, more)

    one = teacher or models[0]
    rows = [
        (
            "parameters",
            [
                Cell(amounts.amount(m.parameters), times(m.parameters, one.parameters, "fewer", "more", m))
                for m in models
            ],
        ),
        (
            "size on disk",
            [Cell(amounts.size(m.bytes), times(m.bytes, one.bytes, "smaller", "larger", m)) for m in models],
        ),
    ]
    for size in dict.fromkeys(size for model in models for size in model.latency_ms):
        found = [(model, model.latency_ms.get(size, float("nan"))) for model in models]
        theirs = one.latency_ms.get(size, 0.0)
        cells = [Cell(amounts.number(mine), times(mine, theirs, "faster", "slower", model)) for model, mine in found]
        rows.append((f"latency, batch of {size}, ms", cells))
    cells = []
    for model in models:
        mine, theirs = model.throughput, one.throughput or 0.0
        cells.append(
            Cell("–") if mine is None else Cell(amounts.number(mine), times(theirs, mine, "more", "fewer", model))
        )
    return [*rows, ("samples a second, at most", cells)]


def _ends(curve: series.Curve, percent: bool) -> list[Cell]:
    epochs, values = curve
    best = (max if percent else min)(range(len(values)), key=values.__getitem__)
    return [
        Cell(words.level(values[at], share=percent), f"epoch {epochs[at]:.3g}") for at in (0, best, len(values) - 1)
    ]


def _points(change: float) -> str:
    return f"{100 * change:+.1f}".replace("-", "−")


def _reliability(view: RunView) -> Table:
    found = {name: reliability(*answers, 10) for name, answers in series.judged(view).items()}
    rows = []
    for place in range(10):
        cells = []
        for one in found.values():
            count = int(one.count[place])
            figure = f"{100 * one.accuracy[place]:.1f} %" if count else "–"
            detail = f"sure {100 * one.confidence[place]:.1f} %, n = {count}" if count else ""
            cells.append(Cell(figure, detail))
        rows.append((f"confidence {10 * place}–{10 * place + 10} %", cells))
    return Table(list(found), rows if found else [])
