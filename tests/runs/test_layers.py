"""Layers that a recipe leaves to be found: by depth, by what they say; kept by the run."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from torch import nn

from potstill.errors import ObjectiveError, PotstillError
from potstill.recipe.load import recipe_from
from potstill.runs.cache import Cache
from potstill.runs.layers import FILE
from potstill.runs.plan import Plan
from potstill.runs.steps import Run
from tests import local_models
from tests.local_models import SENTENCES

NAMES = ["negative", "positive"]


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("layers")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    for split, times in (("train", 4), ("test", 1)):
        rows = SENTENCES * times
        columns = {"text": [text for text, _ in rows], "label": [grade for _, grade in rows]}
        datasets.Dataset.from_dict(columns, features).to_parquet(str(folder / f"{split}.parquet"))
    local_models.bert(folder / "bert", head=NAMES)
    return {
        "name": "layers",
        "task": {"name": "text-classification", "max_length": 16},
        "data": {"source": "files", "path": str(folder), "validation": 0},
        "teacher": {"model": str(folder / "bert")},
        "student": {"from_teacher": {"keep_blocks": [0, 2]}},
        "train": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3},
        "evaluate": {"resamples": 100, "latency": False},
        "baseline": {"enabled": False},
    }


IMAGES: dict[str, Any] = {
    "name": "stages",
    "task": {"name": "image-classification"},
    "data": {"source": "sklearn", "path": "load_digits", "limit": {"train": 100, "test": 50}},
    "teacher": {"model": "potstill:cifar_resnet", "kwargs": {"depth": 14}},
    "student": {"model": "potstill:cifar_resnet", "kwargs": {"depth": 8}},
}


def plan(tree: dict[str, Any], **terms: Any) -> Plan:
    return Plan(recipe_from({**tree, "objective": {"hard": {"loss": "cross_entropy"}, **terms}}))


def test_by_the_depths(texts):
    found = plan(texts, all={"loss": "mse", "layers": "ratio"}, end={"loss": "mse", "layers": "last"}).layers
    assert found == {"all": [(0, 0), (1, 2), (2, 4)], "end": [(2, 4)]}


def test_what_has_no_embeddings_begins_with_the_first_block(texts):
    attention = {"loss": "mse", "student": "attention", "teacher": "attention", "layers": "ratio"}
    assert plan(texts, maps=attention).layers == {"maps": [(1, 2), (2, 4)]}


def test_a_cut_student_is_matched_to_the_blocks_it_was_cut_from(texts):
    """Block 0 of the teacher is the student's first, and what leaves it is the same in both."""
    found = plan(texts, all={"loss": "mse", "layers": "auto"})
    assert found.layers["all"][0] == (1, 1)
    assert [int(other) for _, other in found.layers["all"]] == sorted(int(other) for _, other in found.layers["all"])
    taps = found.objective.taps("teacher")
    assert taps == [f"hidden.{other}" for _, other in found.layers["all"]]


@pytest.mark.parametrize("rule", ["first", "auto"])
def test_stages_of_a_network_of_convolutions(rule):
    found = plan(IMAGES, all={"loss": "attention_transfer", "layers": rule}).layers
    assert [one for one, _ in found["all"]] == ["layer1", "layer2", "layer3"]
    if rule == "first":
        assert [other for _, other in found["all"]] == ["layer1", "layer2", "layer3"]


def test_a_rule_that_does_not_fit(texts):
    deep = {**texts, "student": {"from_teacher": {"keep_blocks": [0, 1, 2, 3]}}}
    with pytest.raises(ObjectiveError, match="skip"):
        _ = plan(
            {**deep, "student": {"from_teacher": {"keep_blocks": [0]}}}, all={"loss": "mse", "layers": "skip"}
        ).layers


def test_a_run_keeps_what_it_found(texts, tmp_path):
    """Another version of a library may find other pairs; a run that goes on must not."""
    objective = {"hard": {"loss": "cross_entropy"}, "all": {"loss": "mse", "layers": "auto", "weight": 0.1}}
    recipe = recipe_from({**texts, "objective": objective})
    run = Run(recipe, tmp_path / "run", bars=False, cache=Cache(tmp_path / "cache"))
    run.execute()
    kept = json.loads((tmp_path / "run" / FILE).read_text())
    assert [tuple(pair) for pair in kept["all"]] == run.layers["all"]
    logged = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert any(event["event"] == "done" and event["step"] == "distilled" for event in logged)
    (tmp_path / "run" / FILE).write_text(json.dumps({"all": [[1, 4]]}))
    again = Run(recipe, tmp_path / "run", bars=False, cache=Cache(tmp_path / "cache"))
    assert again.objective.taps("teacher") == ["hidden.4"]


def test_a_refused_preflight_leaves_no_layers_behind(texts, tmp_path):
    """Else the corrected recipe, in the same folder, would train on the layers of the wrong one."""

    def made(rule: str, weight: float) -> Run:
        objective = {"hard": {"loss": "cross_entropy"}, "all": {"loss": "mse", "layers": rule, "weight": weight}}
        recipe = recipe_from({**texts, "objective": objective})
        return Run(recipe, tmp_path / "run", bars=False, cache=Cache(tmp_path / "cache"))

    with pytest.raises(PotstillError):
        made("ratio", float("nan")).execute()
    run = made("last", 0.1)
    run.execute()
    assert run.layers == {"all": [(2, 4)]}


def test_stages_whose_paths_are_numbers(monkeypatch):
    """In an `nn.Sequential` the path of a stage is "2", which is no `hidden.2`."""

    def row(num_labels: int, in_channels: int, width: int) -> nn.Module:
        layers = [nn.Conv2d(in_channels, width, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, width, 3), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_labels))

    monkeypatch.setattr("tests.runs.test_layers.row", row, raising=False)
    models = {
        who: {"model": "tests.runs.test_layers:row", "kwargs": {"width": width}}
        for who, width in (("teacher", 8), ("student", 4))
    }
    found = plan({**IMAGES, **models}, all={"loss": "attention_transfer", "layers": "first"})
    assert all(isinstance(layer, str) for pair in found.layers["all"] for layer in pair)
    assert found.objective.taps("student")[1:] == [one for one, _ in found.layers["all"]]
