"""Finished runs made by hand, with what a report has to cope with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from potstill.evaluation.significance import mean_interval
from potstill.runs.metrics import Calibration, Estimate, Gain, ModelMetrics, RunMetrics

ROLES = {"teacher": "teacher", "baseline": "baseline", "distilled": "student"}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)


def model(role: str, value: float = 0.9, **changes: Any) -> ModelMetrics:
    scale = 10 if role == "teacher" else 1
    ece = Estimate(value=0.05, low=0.03, high=0.08)
    fields: dict[str, Any] = {
        "role": role,
        "metrics": {"accuracy": Estimate(value=value, low=value - 0.02, high=value + 0.02)},
        "parameters": 6_600 * scale,
        "bytes": 26_000 * scale,
        "latency_ms": {"1": 0.3 * scale, "32": 2.0 * scale},
        "throughput": 16_000 / scale,
        "agreement": None if role == "teacher" else 0.95,
        "divergence": None if role == "teacher" else 0.08,
        "calibration": Calibration(ece=ece, nll=0.3, temperature=1.4),
    }
    return ModelMetrics(**{**fields, **changes})


def metrics(**changes: Any) -> RunMetrics:
    values = {"teacher": 0.93, "baseline": 0.87, "distilled": 0.9}
    fields: dict[str, Any] = {
        "recipe": "flowers",
        "seed": 0,
        "primary": "accuracy",
        "samples": 400,
        "chance": 0.3,
        "models": {name: model(ROLES[name], value) for name, value in values.items()},
        "retention": 0.968,
        "retention_above_chance": 0.95,
        "gain": Gain(value=0.03, low=0.01, high=0.05, p=0.004, only_first=20, only_second=8, mcnemar=0.036),
        "to_teacher": Gain(value=-0.03, low=-0.05, high=-0.01, p=0.01, only_first=5, only_second=17, mcnemar=0.017),
        "label_names": ["setosa", "versicolor", "virginica"],
        "notes": ["test: a fifth of the rows"],
    }
    return RunMetrics(**{**fields, **changes})


def without_labels() -> RunMetrics:
    bare = {name: model(role, metrics={}, calibration=None) for name, role in ROLES.items()}
    return metrics(models=bare, gain=None, to_teacher=None, retention=None, retention_above_chance=None, chance=None)


def example(text: str = "to be or not to be", **changes: Any) -> dict[str, Any]:
    answers = {name: {"answer": place, "confidence": 0.9} for place, name in enumerate(ROLES)}
    shown = [
        {"name": "sentence", "kind": "text", "value": text},
        {"name": "image", "kind": "image", "value": PIXEL},
        {"name": "age", "kind": "number", "value": "39"},
    ]
    return {"sample_id": 12, "label": 1, "divergence": 1.93, "answers": answers, "shown": shown, **changes}


def run(
    folder: Path,
    found: RunMetrics | None = None,
    *,
    recipe: str = "name: flowers\ndescription: Irises.\ntask: {name: tabular-classification}\n",
    examples: list[dict[str, Any]] | None = None,
    classes: int = 3,
    labels: bool = True,
    histories: bool = True,
    logits: bool = True,
) -> Path:
    """Write the folder of a finished run and return it."""
    names = {} if classes == 3 else {"label_names": [f"class {place}" for place in range(classes)]}
    found = metrics(**names) if found is None else found
    for name in ("history", "predictions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "recipe.resolved.yaml").write_text(recipe, encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(found.model_dump(mode="json")), encoding="utf-8")
    about = {
        "potstill": "0.1.0",
        "packages": {"torch": "2.15"},
        "accelerators": [],
        "command": "/bin/potstill distill x",
    }
    (folder / "environment.json").write_text(json.dumps(about))
    if examples is not None:
        (folder / "examples.json").write_text(json.dumps({"split": "test", "examples": examples}), encoding="utf-8")
    rng = np.random.default_rng(0)
    truth = rng.integers(0, classes, found.samples)
    for name in found.models:
        if histories and name != "teacher":
            (folder / f"history/{name}.json").write_text(json.dumps(history()))
        if logits:
            arrays = {"logits": rng.standard_normal((found.samples, classes)).astype(np.float32)}
            arrays["logits"][np.arange(found.samples), truth] += 2
            arrays["sample_id"] = np.arange(found.samples)
            if labels:
                arrays["labels"] = truth
            safetensors.numpy.save_file(arrays, str(folder / f"predictions/{name}.test.safetensors"))
    return folder


def history() -> list[dict[str, float]]:
    lines = [{"loss": 1 / n, "loss/soft": 2 / n, "loss/hard": 1 / n, "epoch": n / 4, "step": n} for n in range(1, 13)]
    return lines + [
        {"eval_accuracy": 0.9 - 0.3 / n, "eval_loss": 1 / n, "epoch": n / 4, "step": n} for n in range(1, 13)
    ]


def seeds(folder: Path, gains: tuple[float, ...] = (0.02, 0.03, 0.04), *, baseline: bool = True) -> Path:
    """Write the folder of finished runs of several seeds and return it."""
    values: dict[str, list[float]] = {name: [] for name in ROLES if baseline or name != "baseline"}
    for seed, gain in enumerate(gains):
        levels = {"teacher": 0.93, "baseline": 0.87, "distilled": 0.87 + gain}
        models = {name: model(ROLES[name], levels[name]) for name in values}
        one = Gain(value=gain, low=gain - 0.01, high=gain + 0.01, p=0.01) if baseline else None
        run(folder / f"seed-{seed}", metrics(seed=seed, models=models, gain=one))
        for name, found in values.items():
            found.append(levels[name])
    estimate = {name: _estimate(found) for name, found in values.items()}
    summary = {"recipe": "flowers", "primary": "accuracy", "seeds": list(range(len(gains))), "values": values}
    summary |= {"models": estimate, "gain": _estimate(list(gains)) if baseline else None}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _estimate(values: list[float]) -> dict[str, float | None]:
    found = mean_interval(values)
    return {key: None if found[key] != found[key] else found[key] for key in ("value", "low", "high")}
