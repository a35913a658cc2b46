"""The same recipe with several seeds: the spread that one run cannot show. Reads and writes files only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from potstill.errors import RunError
from potstill.evaluation.significance import mean_interval
from potstill.runs.cache import content_hash
from potstill.runs.folder import write_json
from potstill.runs.metrics import Estimate, RunMetrics


class SeedSummary(BaseModel):
    """The primary metric over seeds, as in ``summary.json``.

    Attributes:
        recipe: the recipe's name.
        primary: the metric.
        seeds: the seeds.
        values: by model, the metric for each seed.
        models: by model, mean and 95 % t-interval over the seeds.
        gain: distilled − baseline, paired by seed; none without a baseline.
    """

    recipe: str
    primary: str
    seeds: list[int]
    values: dict[str, list[float]]
    models: dict[str, Estimate]
    gain: Estimate | None = None


def seed_overrides(seed: int) -> list[str]:
    """Return the override that gives a run its seed; the data split stays the same for all."""
    return [f"seed={seed}"]


def run_seeds(
    name: str, first: int, count: int, output: str | None, run: Callable[[int, str], Any], tree: dict[str, Any]
) -> tuple[SeedSummary, Path]:
    """Do ``count`` runs in ``OUTPUT/seed-N`` and summarise them in ``OUTPUT/summary.json``.

    Args:
        name: the recipe's name.
        first: the first seed.
        count: how many.
        output: the folder; ``runs/NAME-HASH-seeds`` if omitted.
        run: does one run, given its seed and folder; a finished one is not done again.
        tree: the recipe as plain data, for the folder's name.

    Raises:
        RunError: the folder holds a single run.
    """
    folder = Path(output) if output else Path("runs") / f"{name}-{content_hash(tree)[:8]}-seeds"
    if (folder / "recipe.resolved.yaml").exists():
        raise RunError(f"{folder} holds a single run; choose another --output for several seeds")
    seeds = list(range(first, first + count))
    for seed in seeds:
        run(seed, str(folder / f"seed-{seed}"))
    summary = summarise([folder / f"seed-{seed}" for seed in seeds])
    write_json(folder / "summary.json", summary.model_dump(mode="json"))
    return summary, folder


def summarise(folders: list[Path]) -> SeedSummary:
    """Return the spread of the primary metric over finished runs of one recipe.

    Raises:
        RunError: the runs have no such metric, for their test split has no labels.
    """
    found = [RunMetrics.model_validate(json.loads((f / "metrics.json").read_text(encoding="utf-8"))) for f in folders]
    primary = found[0].primary
    if any(primary not in model.metrics for run in found for model in run.models.values()):
        raise RunError(f"the test split has no labels, so there is no {primary} to compare over seeds")
    names = [name for name in found[0].models if all(name in run.models for run in found)]
    values = {name: [run.models[name].metrics[primary].value for run in found] for name in names}
    gain = None
    if "baseline" in values:
        gain = _estimate([d - b for d, b in zip(values["distilled"], values["baseline"], strict=True)])
    return SeedSummary(
        recipe=found[0].recipe,
        primary=primary,
        seeds=[run.seed for run in found],
        values=values,
        models={name: _estimate(each) for name, each in values.items()},
        gain=gain,
    )


def _estimate(values: list[float]) -> Estimate:
    interval = mean_interval(values)
    return Estimate(value=interval["value"], low=interval["low"], high=interval["high"])
