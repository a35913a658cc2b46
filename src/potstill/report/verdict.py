"""Was it worth it: the verdict in one sentence, and the few figures at the head of a report."""

from __future__ import annotations

import math
from typing import NamedTuple

from potstill.report import amounts, words
from potstill.report.run import SeedsView
from potstill.runs.metrics import Estimate, Gain, ModelMetrics, RunMetrics

ALPHA = 0.05


class Headline(NamedTuple):
    """A figure at the head of a report: its name, the figure, and what it means."""

    name: str
    figure: str
    detail: str


def standing(gain: Estimate) -> str:
    """Return ``better``, ``worse``, ``unclear`` or ``unknown``: where the interval lies, and what the test says.

    Args:
        gain: student − baseline; if it has a p-value, that must be below 0.05 too.
    """
    if math.isnan(gain.low) or math.isnan(gain.high):
        return "unknown"
    sure = not isinstance(gain, Gain) or math.isnan(gain.p) or gain.p < ALPHA
    if sure and gain.low > 0:
        return "better"
    return "worse" if sure and gain.high < 0 else "unclear"


def verdict(metrics: RunMetrics) -> str:
    """Return what a run shows, in one sentence that claims no more than was measured."""
    told = f"on these {metrics.samples:,} test samples" if metrics.split == "test" else f"on the {metrics.split} split"
    parts = [_against_baseline(metrics, told), *_against_teacher(metrics)]
    caveat = "" if metrics.gain is None else "; this is a single seed, and another may differ"
    return f"{_joined(parts)}{_about_teacher(metrics)}{caveat}."


def verdict_of_seeds(view: SeedsView) -> str:
    """Return what several seeds show, in one sentence."""
    first = view.runs[view.summary.seeds[0]].metrics
    share = words.is_share(first, view.summary.primary)
    told = f"over {len(view.summary.seeds)} seeds"
    if view.summary.gain is None:
        opening = f"No gain can be claimed {told}, for there is no baseline"
    else:
        seen = [run.metrics.gain for run in view.runs.values() if run.metrics.gain is not None]
        alone = sum(standing(gain) == "better" for gain in seen)
        gain = view.summary.gain
        range_ = words.interval(gain, share=share, signed=True)
        found = f"{words.difference(gain.value, share=share)}" + (f", 95\u00a0% t-interval {range_}" if range_ else "")
        opening = f"{_compared(standing(gain))} {told} ({found}; {alone} of {len(seen)} runs show a gain by themselves)"
    parts = [opening, *_against_teacher(first, kept=_kept_over_seeds(view))]
    return f"{_joined(parts)}{_about_teacher(first)}."


def headlines(metrics: RunMetrics, over_seeds: SeedsView | None = None) -> list[Headline]:
    """Return gain, what is kept of the teacher, size and speed, as far as they are known.

    Args:
        metrics: of the run, or of the first seed.
        over_seeds: of several seeds.
    """
    share, found = words.is_share(metrics, metrics.primary), []
    gain: Estimate | None = over_seeds.summary.gain if over_seeds else metrics.gain
    if gain is not None:
        range_ = words.interval(gain, share=share, signed=True)
        detail = f"95\u00a0%: {range_}" if range_ else "interval not known"
        found.append(Headline("gain over baseline", words.difference(gain.value, share=share), detail))
    kept = _kept_over_seeds(over_seeds) if over_seeds else metrics.retention
    if kept is not None:
        found.append(Headline("of the teacher kept", f"{100 * kept:.1f}\u00a0%", words.metric_name(metrics.primary)))
    teacher, student = _first(metrics, "teacher"), _first(metrics, "student")
    if teacher is None or student is None:
        return found
    times = amounts.factor(teacher.bytes, student.bytes, "smaller", "larger")
    found.append(Headline("on disk", times, f"{amounts.size(teacher.bytes)} → {amounts.size(student.bytes)}"))
    if "1" in teacher.latency_ms and "1" in student.latency_ms:
        slow, fast = teacher.latency_ms["1"], student.latency_ms["1"]
        times = amounts.factor(slow, fast, "faster", "slower")
        found.append(
            Headline("batch of 1", times, f"{amounts.number(slow)} → {amounts.number(fast)} ms, {metrics.device}")
        )
    return found


def _against_baseline(metrics: RunMetrics, told: str) -> str:
    student = _first(metrics, "student")
    if student is not None and metrics.primary not in student.metrics:
        return "The test split has no labels, so nothing can be said of how good the student is"
    if metrics.gain is None:
        return "No gain can be claimed, for no baseline was trained"
    share, gain = words.is_share(metrics, metrics.primary), metrics.gain
    found = f"{words.difference(gain.value, share=share)} of {words.metric_name(metrics.primary)}"
    range_ = words.interval(gain, share=share, signed=True)
    found += f", 95\u00a0% interval {range_}" if range_ else ""
    found += "" if math.isnan(gain.p) else f", {amounts.p_value(gain.p)}"
    return f"{_compared(standing(gain))} {told} ({found})"


def _compared(found: str) -> str:
    return {
        "better": "The distilled student is better than the same student trained without a teacher",
        "worse": "The distilled student is worse than the same student trained without a teacher",
        "unclear": "The distilled student is not clearly different from the same student trained without a teacher",
        "unknown": "Whether the distilled student beats the same student trained without a teacher cannot be told",
    }[found]


def _against_teacher(metrics: RunMetrics, kept: float | None = None) -> list[str]:
    teacher, student = _first(metrics, "teacher"), _first(metrics, "student")
    if teacher is None or student is None:
        return []
    teachers = [name for name, model in metrics.models.items() if model.role == "teacher"]
    whose = "the teacher's" if len(teachers) == 1 else f"the first teacher's ({teachers[0]})"
    found, kept = [], metrics.retention if kept is None else kept
    if kept is not None:
        found.append(f"it keeps {100 * kept:.1f}\u00a0% of {whose} {words.metric_name(metrics.primary)}")
    elif student.agreement is not None:
        found.append(f"it answers as the teacher on {100 * student.agreement:.1f}\u00a0% of the samples")
    if size := amounts.factor(teacher.bytes, student.bytes, "smaller", "larger"):
        found.append("it is as large" if size.startswith("about") else f"it is {size}")
    slow, fast = (model.latency_ms.get("1", 0.0) for model in (teacher, student))
    if speed := amounts.factor(slow, fast, "faster", "slower"):
        found.append("it is as fast" if speed.startswith("about") else f"it is {speed}")
    return found


def _about_teacher(metrics: RunMetrics) -> str:
    teacher, baseline = _first(metrics, "teacher"), _first(metrics, "baseline")
    if teacher is None or metrics.primary not in teacher.metrics:
        return ""
    known = teacher.metrics[metrics.primary]
    least = known.value if math.isnan(known.low) else known.low
    if metrics.chance is not None and least <= metrics.chance:
        return ", but the teacher is not clearly better than the best constant guess"
    if baseline is not None and known.value < baseline.metrics[metrics.primary].value:
        return ", but the teacher itself scores no higher than the baseline"
    return ""


def _kept_over_seeds(view: SeedsView) -> float | None:
    kept = [run.metrics.retention for run in view.runs.values() if run.metrics.retention is not None]
    return sum(kept) / len(kept) if kept else None


def _first(metrics: RunMetrics, role: str) -> ModelMetrics | None:
    return next((model for model in metrics.models.values() if model.role == role), None)


def _joined(parts: list[str]) -> str:
    if len(parts) < 3:
        return "; ".join(parts)
    facts = [parts[1], *(part.removeprefix("it ") for part in parts[2:])]
    return f"{parts[0]}; {', '.join(facts[:-1])} and {facts[-1]}"
