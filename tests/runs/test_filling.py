"""What filling a cache would take: said before anything is kept, at no cost of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.errors import CacheError, TrainingError
from potstill.recipe.load import recipe_from
from potstill.recipe.schema import Recipe
from potstill.runs.cache import Cache
from potstill.runs.filling import fill, forecast
from potstill.runs.plan import Plan
from potstill.runs.steps import Run
from potstill.teachers import store
from potstill.teachers.live import Live

TREE: dict[str, Any] = {
    "name": "filled",
    "task": {"name": "tabular-classification"},
    "data": {"source": "sklearn", "path": "load_iris"},
    "teacher": {"model": "potstill:mlp", "kwargs": {"hidden": [8]}, "train": {"epochs": 1}},
    "student": {"model": "potstill:mlp"},
    "objective": {"soft": {"loss": "kl"}, "hard": {"loss": "cross_entropy"}},
    "train": {"epochs": 2, "batch_size": 16},
}
NOISY = {**TREE["train"], "augment": ["noise"]}


def recipe(train: dict[str, Any] = TREE["train"], **teacher: Any) -> Recipe:
    return recipe_from({**TREE, "train": train, "teacher": {**TREE["teacher"], **teacher}})


@pytest.mark.parametrize("train", [TREE["train"], {**NOISY, "views": 3}], ids=["plain", "views"])
def test_it_takes_no_room_to_say_how_much_it_takes(train: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are found by the sample's number, so that a number of its own for each try would take gigabytes."""
    taken: list[int] = []
    allocate = store._allocate
    monkeypatch.setattr(store, "_allocate", lambda path, size: (taken.append(size), allocate(path, size)))
    plan = forecast(Plan(recipe(train)), "teacher")
    assert plan.bytes_per_sample == 32 + 16  # three numbers of four bytes, in whole words
    assert plan.bytes == 48 * plan.samples * plan.views
    assert sum(taken) < 2**22


@pytest.mark.parametrize(("precision", "each"), [("bf16", 8), ("fp32", 16), ("auto", 16)])
def test_answers_are_as_large_as_the_teachers_precision_has_them(precision: str, each: int, tmp_path: Path) -> None:
    asked = recipe(precision=precision)
    assert forecast(Plan(asked), "teacher").bytes_per_sample == 32 + each


def test_what_is_there_is_not_made_again_and_what_cannot_be_is_said(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    run = Run(recipe({**NOISY, "views": 2}), tmp_path / "run", cache=cache, bars=False)
    run.prepare_teachers()
    rows = len(run.splits.train)
    assert (fill(run, "teacher").made, fill(run, "teacher").found) == (2 * rows, 2 * rows)
    more = Run(recipe({**NOISY, "views": 3}), tmp_path / "more", cache=cache, bars=False)
    more.prepare_teachers()
    counts = fill(more, "teacher")
    assert (counts.made, counts.found) == (rows, 2 * rows)
    small = Run(recipe(), tmp_path / "small", cache=Cache(tmp_path / "small cache", limit=64), bars=False)
    small.prepare_teachers()
    with pytest.raises(CacheError, match="POTSTILL_CACHE_LIMIT"):
        fill(small, "teacher")


def test_endless_views_cannot_be_filled() -> None:
    with pytest.raises(TrainingError, match="each epoch shows new random views"):
        forecast(Plan(recipe(NOISY)), "teacher")


def test_a_teacher_that_is_not_to_be_cached_can_be_filled_all_the_same(tmp_path: Path) -> None:
    run = Run(recipe(cache=False), tmp_path / "run", cache=Cache(tmp_path / "cache"), bars=False)
    run.prepare_teachers()
    assert fill(run, "teacher").made == len(run.splits.train)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_projector_is_sized_by_answers_that_are_there(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hint = {"loss": "mse", "student": "body.1", "teacher": "body.1", "project": "linear"}
    tree = {**TREE, "student": {**TREE["student"], "kwargs": {"hidden": [4]}}, "train": {**TREE["train"]}}
    tree |= {"objective": {**TREE["objective"], "hint": hint}}
    tree["train"]["precision"] = precision
    run = Run(recipe_from(tree), tmp_path / "run", cache=Cache(tmp_path / "cache"), bars=False)
    run.prepare_teachers()
    fill(run, "teacher")
    monkeypatch.setattr(Run, "live_teacher", lambda self, name: pytest.fail("the teacher was loaded"))
    run.execute()
    assert len(list((tmp_path / "cache/signals").iterdir())) == 1


@pytest.mark.parametrize("train", [{"precision": "bf16"}, {"bf16": True}, {"precision": "medium"}, {}])
def test_it_is_filled_in_the_precision_of_the_training(
    train: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the training would look for other answers and find none."""
    run = Run(recipe({**TREE["train"], **train}), tmp_path / "run", cache=Cache(tmp_path / "cache"), bars=False)
    run.prepare_teachers()
    kinds: set[Any] = set()
    answer = Live.__call__

    def watched(self: Live, batch: Any) -> Any:
        signals = answer(self, batch)
        kinds.add((signals["logits"].dtype, torch.get_float32_matmul_precision()))
        return signals

    monkeypatch.setattr(Live, "__call__", watched)
    fill(run, "teacher")
    is_half = "bf16" in (*train, *train.values())
    assert kinds == {
        (torch.bfloat16 if is_half else torch.float32, "medium" if "medium" in train.values() else "highest")
    }
    run.execute()
    (event,) = [event for event in run.folder.events() if event["event"] == "cache"]
    assert event["made"] == 0
