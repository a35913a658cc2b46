"""In which precision a model is trained: what is chosen, said twice, or cannot be; and that nothing of it stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.errors import RecipeError, TrainingError
from potstill.recipe.load import recipe_from
from potstill.runs.cache import Cache
from potstill.runs.steps import Run
from potstill.training import precision
from potstill.training.precision import chosen_precision, matrix_products
from potstill.training.trainer import DistillationTrainer
from tests.training.tiny import flat

TREE: dict[str, Any] = {
    "name": "precise",
    "task": {"name": "tabular-classification"},
    "data": {"source": "sklearn", "path": "load_iris"},
    "teacher": {"model": "potstill:mlp", "kwargs": {"hidden": [8]}, "train": {"epochs": 1, "batch_size": 32}},
    "student": {"model": "potstill:mlp", "kwargs": {"hidden": [4]}},
    "objective": {"soft": {"loss": "kl"}, "hard": {"loss": "cross_entropy"}},
    "train": {"epochs": 2, "batch_size": 32},
    "baseline": {"enabled": False},
    "evaluate": {"resamples": 100, "latency": False},
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("wanted", "options", "device", "expected"),
    [
        (None, {}, "cpu", "fp32"),
        (None, {"bf16": False, "fp16": False}, "cpu", "fp32"),
        (None, {"bf16": True}, "cpu", "bf16"),
        (None, {"fp16": True}, "cuda", "fp16"),
        ("fp32", {}, "cpu", "fp32"),
        ("fp32", {"bf16": False}, "cpu", "fp32"),
        ("medium", {}, "cpu", "medium"),
        ("bf16", {}, "cpu", "bf16"),
        ("bf16", {}, torch.device("cuda", 0), "bf16"),
        ("fp16", {}, "cuda", "fp16"),
        ("auto", {}, "cpu", {True: "bf16", False: "fp32"}),
        ("auto", {}, "cuda", {True: "bf16", False: "fp32"}),
    ],
)
def test_what_is_chosen(
    wanted: str | None, options: dict[str, Any], device: Any, expected: Any, native: bool, monkeypatch: Any
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(precision, "has_native_bf16", lambda place: asked.append(place) or native)
    found = chosen_precision(wanted, options, device)
    assert found == (expected[native] if isinstance(expected, dict) else expected)
    assert asked == ([device] if wanted == "auto" else [])


@pytest.mark.parametrize(
    ("wanted", "options", "message"),
    [
        ("bf16", {"bf16": True}, r"train\.precision is bf16 and train\.bf16 is true; leave out one of them"),
        ("fp32", {"fp16": True}, r"train\.precision is fp32 and train\.fp16 is true"),
        ("auto", {"bf16": True}, r"train\.precision is auto and train\.bf16 is true"),
        ("fp16", {}, "a CPU has no fp16 arithmetic"),
        (None, {"fp16": True}, "a CPU has no fp16 arithmetic"),
    ],
)
def test_what_cannot_be(wanted: str | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        chosen_precision(wanted, options, "cpu")


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"train": {"precision": "bf16", "bf16": True}}, "train.precision"),
        ({"train": {"precision": "fp32", "fp16": True}}, "train.precision"),
        ({"teacher": {**TREE["teacher"], "train": {"precision": "auto", "bf16": True}}}, "teacher.train.precision"),
        ({"baseline": {"train": {"precision": "fp32", "bf16": True}}}, "baseline.train.precision"),
        ({"train": {"bf16": True}, "baseline": {"train": {"precision": "fp32"}}}, "baseline.train.precision"),
        ({"train": {"precision": "fp32"}, "baseline": {"train": {"bf16": True}}}, "baseline.train.bf16"),
    ],
)
def test_two_precisions_are_one_mistake_of_the_recipe(changes: dict[str, Any], path: str) -> None:
    with pytest.raises(RecipeError) as found:
        recipe_from({**TREE, **changes})
    (line,) = str(found.value).splitlines()
    assert line.startswith(f"{path}: expected one precision, got ")
    assert line.endswith("leave out one of them")


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"precision": "bf16", "bf16": False}},
        {"train": {"bf16": True}},
        {"train": {"bf16": True}, "baseline": {"train": {"precision": "fp32", "bf16": False}}},
        {"train": {"precision": "bf16"}, "baseline": {"train": {"precision": "fp32"}}},
    ],
)
def test_one_precision_is_none(changes: dict[str, Any]) -> None:
    recipe_from({**TREE, **changes})


@pytest.mark.parametrize("wanted", ["fp32", "medium", "bf16", "fp16"])
def test_matrix_products_are_put_back(wanted: str) -> None:
    before = torch.get_float32_matmul_precision()
    inside = "medium" if wanted == "medium" else before
    with matrix_products(wanted):
        assert torch.get_float32_matmul_precision() == inside

    def fails() -> None:
        with matrix_products(wanted):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert torch.get_float32_matmul_precision() == before


def test_what_was_set_before_is_what_is_put_back() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with matrix_products("medium"):
            assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_float32_matmul_precision() == "high"
        with matrix_products("fp32"):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def execute(folder: Path, cache: Path, **train: Any) -> Run:
    run = Run(recipe_from({**TREE, "train": {**TREE["train"], **train}}), folder, cache=Cache(cache), bars=False)
    run.execute()
    return run


def test_bf16_under_both_names_comes_to_the_same_bits(tmp_path: Path) -> None:
    own = execute(tmp_path / "own", tmp_path / "cache", precision="bf16")
    trainers = execute(tmp_path / "trainers", tmp_path / "cache", bf16=True)
    exact = execute(tmp_path / "exact", tmp_path / "cache")
    weights = [flat(run.load("distilled")) for run in (own, trainers, exact)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    said = [[e["precision"] for e in run.folder.events() if e["event"] == "training"] for run in (own, trainers, exact)]
    assert said == [["fp32", "bf16"], ["bf16"], ["fp32"]]  # the teacher comes from the cache the second time


@pytest.mark.parametrize("stops", [False, True])
def test_medium_holds_for_the_training_and_no_longer(
    stops: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    step = DistillationTrainer.compute_loss

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        if stops and seen[-1] == "medium":
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", watched)
    before = torch.get_float32_matmul_precision()
    if stops:
        with pytest.raises(KeyboardInterrupt):
            execute(tmp_path / "run", tmp_path / "cache", precision="medium")
    else:
        execute(tmp_path / "run", tmp_path / "cache", precision="medium")
    assert set(seen) == {before, "medium"}  # the teacher is trained by settings of its own
    assert torch.get_float32_matmul_precision() == before
