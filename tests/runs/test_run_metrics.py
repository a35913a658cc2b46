"""The schema of metrics.json: what is written is read back, and nothing else gets in."""

from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from potstill.runs.metrics import SCHEMA_VERSION, Estimate, Gain, ModelMetrics, RunMetrics

NAN = math.nan


def model(role: str = "student", **about) -> ModelMetrics:
    metrics = {"accuracy": Estimate(value=0.9, low=0.85, high=0.95), "f1_macro": Estimate(value=0.5)}
    return ModelMetrics(role=role, metrics=metrics, parameters=10, bytes=64, **about)


def run(**about) -> RunMetrics:
    models = {"teacher": model("teacher"), "distilled": model(agreement=0.97, latency_ms={"1": 0.2, "32": 1.5})}
    return RunMetrics(recipe="digits", seed=3, primary="accuracy", samples=899, models=models, **about)


def same(first: object, second: object) -> bool:
    """Equal, where NaN equals NaN."""
    return repr(first) == repr(second)


@pytest.mark.parametrize(
    "metrics",
    [
        run(),
        run(gain=Gain(value=0.01, low=-0.01, high=0.03, p=0.2), chance=0.1, retention=0.99, notes=["carved", "ü"]),
        run(gain=Gain(value=0.01)),
        run(gain=Gain(value=NAN), retention_above_chance=-0.5),
    ],
)
def test_there_and_back_through_strict_json(metrics):
    text = json.dumps(metrics.model_dump(mode="json"), allow_nan=False)  # NaN is no JSON: other readers stop at it
    again = RunMetrics.model_validate_json(text)
    assert same(again, metrics)
    assert same(RunMetrics.model_validate(json.loads(text)), metrics)
    assert again.models["distilled"].metrics["accuracy"].low == 0.85


def test_what_is_unknown_is_null():
    plain = Gain(value=0.1, low=NAN, p=NAN).model_dump(mode="json")
    counts = {"only_first": None, "only_second": None, "mcnemar": None}
    assert plain == {"value": 0.1, "low": None, "high": None, "p": None, **counts}
    assert Estimate(value=1.0).model_dump() == {"value": 1.0, "low": None, "high": None}
    read = Gain.model_validate(plain)
    assert math.isnan(read.low)
    assert math.isnan(read.p)


def test_a_figure_that_is_not_defined_can_be_read_again():
    """A metric of NaN must not make the finished run unreadable."""
    text = Estimate(value=NAN).model_dump_json()
    assert json.loads(text) == {"value": None, "low": None, "high": None}
    assert math.isnan(Estimate.model_validate_json(text).value)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ((), "acuracy"),
        (("models", "teacher"), "flops"),
        (("models", "teacher", "metrics", "accuracy"), "std"),
        (("gain",), "q"),
    ],
)
def test_an_unknown_key_is_refused(path, key):
    """A misspelt key that is dropped silently is a figure that is missing from every report."""
    tree = run(gain=Gain(value=0.1)).model_dump(mode="json")
    node = tree
    for part in path:
        node = node[part]
    node[key] = 1.0
    with pytest.raises(ValidationError, match=key):
        RunMetrics.model_validate(tree)


@pytest.mark.parametrize("change", [{"schema_version": 2}, {"samples": "many"}, {"models": {"a": {"role": "friend"}}}])
def test_other_versions_types_and_roles_are_refused(change):
    tree = {**run().model_dump(mode="json"), **change}
    with pytest.raises(ValidationError):
        RunMetrics.model_validate(tree)


def test_the_version_is_written():
    assert run().model_dump(mode="json")["schema_version"] == SCHEMA_VERSION == 1
