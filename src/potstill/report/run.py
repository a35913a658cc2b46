"""A finished run as plain data: what its folder holds, read without any model code."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import ValidationError

from potstill.errors import RunError
from potstill.experiments.seeds import SeedSummary
from potstill.runs.metrics import RunMetrics

_Schema = TypeVar("_Schema", RunMetrics, SeedSummary)


@dataclass(frozen=True)
class Answers:
    """What a model answered on the split of the figures.

    Attributes:
        logits: ``[N, C]`` float32.
        labels: ``[N]`` int64, −100 where unknown; ``None`` where no label is known.
        sample_id: ``[N]`` int64.
    """

    logits: NDArray[Any]
    labels: NDArray[np.int64] | None
    sample_id: NDArray[np.int64]


@dataclass(frozen=True)
class RunView:
    """What a finished run left.

    Attributes:
        folder: where it is.
        metrics: what was measured.
        histories: by model, what was logged while it was trained; a model from the cache has none.
        predictions: by model, its answers; those that are not one row of logits a sample are left out.
        examples: the samples on which student and first teacher disagree most, as in ``examples.json``.
        recipe: the resolved recipe, as YAML.
        environment: what the figures may depend on, as in ``environment.json``.
    """

    folder: Path
    metrics: RunMetrics
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    predictions: dict[str, Answers] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    recipe: str = ""
    environment: dict[str, Any] = field(default_factory=dict)

    def named(self, role: str) -> list[str]:
        """Return the models of a role (``teacher``, ``baseline``, ``student``, ``variant``), in order."""
        return [name for name, model in self.metrics.models.items() if model.role == role]


@dataclass(frozen=True)
class SeedsView:
    """What several runs of one recipe left.

    Attributes:
        folder: where they are.
        summary: the primary metric over the seeds.
        runs: by seed, the run.
    """

    folder: Path
    summary: SeedSummary
    runs: dict[int, RunView]


def load_run(folder: str | Path) -> RunView:
    """Read a finished run.

    Args:
        folder: of ``potstill distill``.

    Raises:
        RunError: it is no run, or not finished; says what is missing.
    """
    folder = Path(folder)
    if not (folder / "recipe.resolved.yaml").is_file():
        raise RunError(f"{folder} holds no recipe.resolved.yaml: expected the folder of a run")
    if not (folder / "metrics.json").is_file():
        raise RunError(f"{folder} holds no metrics.json: the run is not finished; `potstill distill` goes on with it")
    metrics = _validated(RunMetrics, folder / "metrics.json")
    return RunView(
        folder=folder,
        metrics=metrics,
        histories=_histories(folder, list(metrics.models)),
        predictions=_predictions(folder, list(metrics.models), metrics.split),
        examples=_examples(folder / "examples.json"),
        recipe=(folder / "recipe.resolved.yaml").read_text(encoding="utf-8"),
        environment=_json(folder / "environment.json", {}),
    )


def load_seeds(folder: str | Path) -> SeedsView:
    """Read finished runs of several seeds.

    Args:
        folder: of ``potstill distill --seeds``.

    Raises:
        RunError: it holds no such runs, or one is not finished; says what is missing.
    """
    folder = Path(folder)
    if not (folder / "summary.json").is_file():
        state = "the seeds are not finished" if list(folder.glob("seed-*")) else "expected the folder of a run"
        raise RunError(f"{folder} holds neither metrics.json nor summary.json: {state}")
    summary = _validated(SeedSummary, folder / "summary.json")
    return SeedsView(folder, summary, {seed: load_run(folder / f"seed-{seed}") for seed in summary.seeds})


def _validated(schema: type[_Schema], path: Path) -> _Schema:
    try:
        return schema.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _json(path: Path, otherwise: Any) -> Any:
    if not path.is_file():
        return otherwise
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _histories(folder: Path, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    found = {name: _json(folder / f"history/{name}.json", []) for name in names}
    return {name: history for name, history in found.items() if history}


def _examples(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _json(path, {}).get("examples", [])
    return found


def _predictions(folder: Path, names: list[str], split: str) -> dict[str, Answers]:
    found = {}
    for name in names:
        path = folder / f"predictions/{name}.{split}.safetensors"
        if not path.is_file():
            continue
        try:
            arrays = safetensors.numpy.load_file(str(path))
        except safetensors.SafetensorError as error:
            raise RunError(f"{path} cannot be read: {error}") from error
        labels = arrays.get("labels")
        if arrays["logits"].ndim == 2 and (labels is None or labels.ndim == 1):
            known = labels is not None and bool((labels >= 0).any())
            found[name] = Answers(arrays["logits"], labels if known else None, arrays["sample_id"])
    return found
