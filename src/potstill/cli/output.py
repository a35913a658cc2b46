"""What a finished run prints: the result table, in a terminal with colours, else plain."""

from __future__ import annotations

import math
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from potstill.experiments.seeds import SeedSummary
from potstill.report.words import is_share
from potstill.runs.metrics import Estimate, RunMetrics


def print_run(metrics: RunMetrics, folder: Path) -> None:
    """Print teacher, baseline and distilled student side by side, the verdict, and where the run is."""
    console = Console(markup=False, emoji=False, highlight=False)
    title = f"{metrics.recipe}: {metrics.split} split, {metrics.samples:,} samples, seed {metrics.seed}"
    table = _table(title, list(metrics.models))
    models = metrics.models.values()
    for metric in next(iter(models)).metrics:
        _estimate_rows(table, metric, [model.metrics[metric] for model in models])
    if any(model.agreement is not None for model in models):
        table.add_row("answers as teacher", *("" if m.agreement is None else f"{m.agreement:.4f}" for m in models))
    if any(model.divergence is not None for model in models):
        apart = ("" if m.divergence is None else f"{m.divergence:.4f}" for m in models)
        table.add_row("KL from the teacher, nats", *apart)
    if any(model.calibration is not None for model in models):
        errors = ("" if m.calibration is None else f"{m.calibration.ece.value:.4f}" for m in models)
        table.add_row("calibration error (ECE)", *errors)
    table.add_row("parameters", *(f"{model.parameters:,}" for model in models))
    table.add_row("size on disk, KiB", *(f"{model.bytes / 1024:,.1f}" for model in models))
    for size in next(iter(models)).latency_ms:
        table.add_row(f"latency, batch {size}, ms", *(f"{model.latency_ms[size]:.2f}" for model in models))
    if any(model.throughput is not None for model in models):
        rates = ("" if m.throughput is None else f"{m.throughput:,.0f}" for m in models)
        table.add_row("throughput, samples/s", *rates)
    console.print(table)
    for line in [*_verdict(metrics), *_places("run", folder)]:
        console.print(line, soft_wrap=True)


def print_seeds(summary: SeedSummary, folder: Path) -> None:
    """Print the mean over seeds of every model, and the gain with its interval."""
    console = Console(markup=False, emoji=False, highlight=False)
    table = _table(f"{summary.recipe}: {summary.primary} over {len(summary.seeds)} seeds", list(summary.models))
    _estimate_rows(table, "mean", list(summary.models.values()))
    for place, seed in enumerate(summary.seeds):
        table.add_row(f"seed {seed}", *(f"{values[place]:.4f}" for values in summary.values.values()))
    console.print(table)
    if summary.gain is not None:
        low, high = summary.gain.low, summary.gain.high
        verdict = "better than" if low > 0 else "worse than" if high < 0 else "not clearly different from"
        console.print(
            f"distilled − baseline: {100 * summary.gain.value:+.2f} points "
            f"[{100 * low:+.2f}, {100 * high:+.2f}] over seeds: the distilled student is {verdict} its baseline",
            soft_wrap=True,
        )
    for line in _places("runs", folder):
        console.print(line, soft_wrap=True)


def _places(what: str, folder: Path) -> list[str]:
    report = folder / "report.html"
    return [*([f"report: {report}"] if report.is_file() else []), f"{what}: {folder}"]


def _verdict(metrics: RunMetrics) -> list[str]:
    lines = []
    if metrics.retention is not None:
        above = metrics.retention_above_chance
        share = "" if above is None else f" ({100 * above:.1f} % of what it has above chance)"
        teachers = [name for name, model in metrics.models.items() if model.role == "teacher"]
        whose = "the teacher's" if len(teachers) == 1 else f"the first teacher's ('{teachers[0]}')"
        lines.append(f"the student keeps {100 * metrics.retention:.1f} % of {whose} {metrics.primary}{share}")
    if metrics.gain is not None:
        lines.append(
            f"distilled − baseline: {_difference(metrics.gain, metrics)}, p = {metrics.gain.p:.3f} "
            "(paired; it covers the sampling of the test set, --seeds 5 shows the spread over seeds)"
        )
    return lines + [f"note: {note}" for note in metrics.notes]


def _difference(gain: Estimate, metrics: RunMetrics) -> str:
    """Say a gain with its interval: in points where the metric is a share, else in its own unit."""
    if is_share(metrics, metrics.primary):
        return f"{100 * gain.value:+.2f} points [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]"
    return f"{gain.value:+.3g} [{gain.low:+.3g}, {gain.high:+.3g}]"


def _estimate_rows(table: Table, name: str, estimates: list[Estimate]) -> None:
    table.add_row(name, *(f"{estimate.value:.4f}" for estimate in estimates))
    if not any(math.isnan(estimate.low) for estimate in estimates):
        table.add_row("  95 % interval", *(f"{estimate.low:.4f} – {estimate.high:.4f}" for estimate in estimates))


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table
