"""What a finished run prints: the result table, in a terminal with colours, else plain."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from potstill.experiments.seeds import SeedSummary
from potstill.runs.metrics import Estimate, RunMetrics


def print_run(metrics: RunMetrics, folder: Path) -> None:
    """Print teacher, baseline and distilled student side by side, the verdict, and where the run is."""
    console = Console()
    table = _table(f"{metrics.recipe}: {metrics.split} split, {metrics.samples} samples, seed {metrics.seed}")
    names = list(next(iter(metrics.models.values())).metrics)
    for column in ("model", *names, "parameters", "KiB", "ms (1)", "ms (32)", "as teacher"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name, model in metrics.models.items():
        agreement = "" if model.agreement is None else f"{100 * model.agreement:.1f} %"
        latency = [f"{model.latency_ms[size]:.2f}" if size in model.latency_ms else "" for size in ("1", "32")]
        cells = [_estimate(model.metrics[metric]) for metric in names]
        table.add_row(name, *cells, f"{model.parameters:,}", f"{model.bytes / 1024:,.1f}", *latency, agreement)
    console.print(table)
    for line in _verdict(metrics):
        console.print(line, highlight=False)
    console.print(f"run: {folder}", highlight=False, soft_wrap=True)


def print_seeds(summary: SeedSummary, folder: Path) -> None:
    """Print the mean over seeds of every model, and the gain with its interval."""
    console = Console()
    table = _table(f"{summary.recipe}: {summary.primary} over {len(summary.seeds)} seeds (mean, 95 % t-interval)")
    for column in ("model", summary.primary, "each seed"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name, estimate in summary.models.items():
        each = "  ".join(f"{value:.4f}" for value in summary.values[name])
        table.add_row(name, _estimate(estimate), each)
    console.print(table)
    if summary.gain is not None:
        low, high = summary.gain.low, summary.gain.high
        verdict = "better than" if low > 0 else "worse than" if high < 0 else "not clearly different from"
        console.print(
            f"distilled − baseline: {100 * summary.gain.value:+.2f} points "
            f"[{100 * low:+.2f}, {100 * high:+.2f}] over seeds: {verdict} its baseline",
            highlight=False,
        )
    console.print(f"runs: {folder}", highlight=False, soft_wrap=True)


def _verdict(metrics: RunMetrics) -> list[str]:
    lines = []
    if metrics.retention is not None:
        above = metrics.retention_above_chance
        share = "" if above is None else f" ({100 * above:.1f} % of what it has above chance)"
        lines.append(f"the student keeps {100 * metrics.retention:.1f} % of the teacher's {metrics.primary}{share}")
    if metrics.gain is not None:
        gain = metrics.gain
        lines.append(
            f"distilled − baseline: {100 * gain.value:+.2f} points [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}], "
            f"p = {gain.p:.3f} (paired, over this test set; run --seeds 5 for the spread over seeds)"
        )
    return lines + [f"note: {note}" for note in metrics.notes]


def _estimate(estimate: Estimate) -> str:
    if estimate.low != estimate.low:  # NaN: no interval
        return f"{estimate.value:.4f}"
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
