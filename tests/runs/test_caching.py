"""Runs whose teachers answer from a cache: the same students, a teacher that is asked once, shared by runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.errors import CacheError, TrainingError
from potstill.recipe.load import recipe_from
from potstill.recipe.schema import Recipe
from potstill.runs.cache import Cache
from potstill.runs.caching import KIND, cache_settings
from potstill.runs.filling import fill, forecast
from potstill.runs.plan import Plan
from potstill.runs.steps import Run
from potstill.teachers.cached import Cached
from potstill.teachers.live import Live
from tests.local_models import bert
from tests.training.tiny import flat


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()


TREE: dict[str, Any] = {
    "name": "cached",
    "seed": 3,
    "task": {"name": "image-classification"},
    "data": {"source": "sklearn", "path": "load_digits", "limit": {"train": 96}, "test": 64},
    "teacher": {
        "model": "potstill:mlp",
        "kwargs": {"hidden": [24]},
        "seed": 0,
        "train": {"epochs": 4, "batch_size": 16, "learning_rate": 0.01},
    },
    "student": {"model": "potstill:mlp", "kwargs": {"hidden": [12], "dropout": 0.1}},
    "objective": {"soft": {"loss": "kl", "weight": 0.7, "temperature": 4.0}, "hard": {"loss": "cross_entropy"}},
    "train": {"epochs": 4, "batch_size": 16, "learning_rate": 0.01},
    "baseline": {"enabled": False},
    "evaluate": {"resamples": 100, "latency": False},
}
HINT = {"loss": "mse", "teacher": "body.1", "student": "body.1", "project": "linear"}
SHIFTED = {"train": {**TREE["train"], "augment": [{"shift": {"pixels": 1}}, "flip"], "views": 2}}


def recipe(cache: Any = "auto", **changes: Any) -> Recipe:
    tree = {**TREE, **changes}
    return recipe_from({**tree, "teacher": {**tree["teacher"], "cache": cache}})


def execute(asked: Recipe, folder: Path, cache: Cache) -> Run:
    run = Run(asked, folder, cache=cache, bars=False)
    run.execute()
    return run


def counts(run: Run) -> list[tuple[int, int]]:
    """Found and made, for each training that was asked from a cache."""
    return [(e["found"], e["made"]) for e in run.folder.events() if e["event"] == "cache"]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that live teachers answered while students learned."""
    sizes: list[int] = []
    answer = Live.__call__

    def watched(self: Live, batch: Any) -> Any:
        sizes.append(len(batch["sample_id"]))
        return answer(self, batch)

    monkeypatch.setattr(Live, "__call__", watched)
    return sizes


@pytest.mark.parametrize("changes", [{}, SHIFTED], ids=["plain", "views"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_student_is_the_same_to_the_bit_as_with_a_live_teacher(
    changes: dict[str, Any], precision: str, tmp_path: Path, cache: Cache
) -> None:
    if precision == "bf16":  # logits in bf16, which a cache keeps as they are
        train = {**changes.get("train", TREE["train"]), "bf16": True}
        changes = {**changes, "train": train}
    live = execute(recipe(False, **changes), tmp_path / "live", cache)
    cached = execute(recipe(True, **changes), tmp_path / "cached", cache)
    views = 2 if changes.get("train", {}).get("views") else 1
    assert counts(live) == []
    assert counts(cached) == [(96 * (4 - views), 96 * views)]
    assert torch.equal(flat(cached.load("distilled")), flat(live.load("distilled")))
    again = execute(recipe(True, **changes), tmp_path / "again", cache)  # another run asks the teacher nothing
    assert counts(again) == [(96 * 4, 0)]
    assert torch.equal(flat(again.load("distilled")), flat(live.load("distilled")))


def test_seeds_share_the_answers_of_a_teacher(tmp_path: Path, cache: Cache) -> None:
    runs = [execute(recipe(True, seed=seed, **SHIFTED), tmp_path / str(seed), cache) for seed in (1, 2)]
    assert [counts(run) for run in runs] == [[(192, 192)], [(384, 0)]]
    assert not torch.equal(flat(runs[0].load("distilled")), flat(runs[1].load("distilled")))
    assert len([entry for entry in cache.entries() if entry.kind == KIND]) == 1


def test_a_run_of_more_views_finds_those_that_there_are(tmp_path: Path, cache: Cache) -> None:
    execute(recipe(True, **SHIFTED), tmp_path / "two", cache)
    three = execute(recipe(True, train={**SHIFTED["train"], "views": 3}), tmp_path / "three", cache)
    assert counts(three) == [(96 * 3, 96)]


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": {**TREE["teacher"], "seed": 1}},
        {"task": {**TREE["task"], "mean": [0.2]}},
        {"data": {**TREE["data"], "seed": 7}},
        {"train": {**SHIFTED["train"], "augment": [{"shift": {"pixels": 2}}, "flip"]}},
        {"objective": {**TREE["objective"], "hint": HINT}},
    ],
    ids=["weights", "preprocessing", "data", "augmentation", "signals"],
)
def test_what_changes_an_answer_is_never_found(changes: dict[str, Any], tmp_path: Path, cache: Cache) -> None:
    execute(recipe(True, **SHIFTED), tmp_path / "one", cache)
    other = execute(recipe(True, **{**SHIFTED, **changes}), tmp_path / "two", cache)
    assert counts(other)[0][1] == 192  # all made anew (a projector is sized by a batch that is then found)
    live = execute(recipe(False, **{**SHIFTED, **changes}), tmp_path / "live", cache)
    assert torch.equal(flat(other.load("distilled")), flat(live.load("distilled")))


def test_endless_views_are_refused_or_live(tmp_path: Path, cache: Cache, asked: list[int]) -> None:
    endless = {"train": {**TREE["train"], "augment": ["flip"]}}
    with pytest.raises(TrainingError, match=r"each epoch shows new random views; say how many .*`train: \{views: 8\}`"):
        execute(recipe(True, **endless), tmp_path / "refused", cache)
    run = execute(recipe("auto", **endless), tmp_path / "live", cache)
    assert counts(run) == []
    assert sum(asked) >= 96 * 4


@pytest.mark.parametrize(
    ("cache_", "changes", "cached"),
    [
        ("auto", {}, True),
        ("auto", {"train": {**TREE["train"], "epochs": 1}}, False),
        ("auto", SHIFTED, True),
        ("auto", {"train": {**SHIFTED["train"], "views": 4}}, False),
        (True, {"train": {**TREE["train"], "epochs": 1}}, True),
        ({"precision": "fp16"}, {}, True),
        (False, {}, False),
    ],
)
def test_a_cache_is_used_where_it_pays_or_is_asked_for(cache_: Any, changes: dict[str, Any], cached: bool) -> None:
    assert (cache_settings(recipe(cache_, **changes), "teacher") is not None) == cached


def test_filled_ahead_the_teacher_is_never_loaded(tmp_path: Path, cache: Cache, monkeypatch: Any) -> None:
    live = execute(recipe(False, **SHIFTED), tmp_path / "live", cache)
    run = Run(recipe(True, **SHIFTED), tmp_path / "run", cache=cache, bars=False)
    run.prepare_teachers()
    assert run.folder.is_done("teachers")
    assert fill(run, "teacher").made == 192
    assert fill(run, "teacher").made == 0
    monkeypatch.setattr(Run, "live_teacher", lambda self, name: pytest.fail("the teacher was loaded"))
    run = execute(recipe(True, **SHIFTED), tmp_path / "run", cache)
    assert counts(run) == [(384, 0)]
    assert torch.equal(flat(run.load("distilled")), flat(live.load("distilled")))


def test_a_plan_says_what_a_filled_cache_takes(tmp_path: Path, cache: Cache, monkeypatch: Any) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(cache.root))
    asked = recipe({"precision": "fp16"}, **SHIFTED)
    plan = forecast(Plan(asked), "teacher")
    assert (plan.samples, plan.views) == (96, 2)
    assert plan.folder == cache.root / KIND
    assert plan.seconds > 0
    run = Run(asked, tmp_path / "run", cache=cache, bars=False)
    run.prepare_teachers()
    fill(run, "teacher")
    entry = next(entry for entry in cache.entries() if entry.kind == KIND)
    records = (entry.path / "data-00000.bin").stat().st_size
    assert plan.bytes == records + 192 * 32
    assert records == 192 * 24  # ten numbers of two bytes, in whole words


def test_a_cache_that_would_be_too_large_leaves_the_teacher_live(tmp_path: Path, caplog: Any) -> None:
    small = Cache(tmp_path / "cache", limit=3000)
    run = execute(recipe("auto"), tmp_path / "run", small)
    assert "POTSTILL_CACHE_LIMIT" in caplog.text
    assert counts(run) == [(0, 0)]
    with pytest.raises(CacheError, match=r"would take 0\.0 GiB"):
        fill(run, "teacher")


def test_a_stopped_run_comes_to_the_same_bits(tmp_path: Path, cache: Cache, monkeypatch: Any) -> None:
    """It is stopped after answers were kept that come after its last checkpoint."""
    asked = recipe({"precision": "fp16"}, **{**SHIFTED, "train": {**SHIFTED["train"], "save_steps": 5}})
    whole = execute(asked, tmp_path / "whole", Cache(tmp_path / "other"))
    call, calls = Cached.__call__, []

    def stops(self: Cached, batch: Any) -> Any:
        calls.append(1)
        if len(calls) in (4, 9, 17):
            raise KeyboardInterrupt
        return call(self, batch)

    monkeypatch.setattr(Cached, "__call__", stops)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            execute(asked, tmp_path / "stopped", cache)
    stopped = execute(asked, tmp_path / "stopped", cache)
    assert len(calls) > 24 + 3
    assert torch.equal(flat(stopped.load("distilled")), flat(whole.load("distilled")))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("texts")
    teacher = bert(folder / "teacher", layers=3)
    lines = ["text,label"]
    for row in range(60):
        words = ["a", "good", "film", "bad", "the", "of"][: 2 + row % 5]
        lines.append(f"{' '.join(words)},{'good' if row % 2 else 'bad'}")
    (folder / "train.csv").write_text("\n".join(lines), encoding="utf-8")
    return {
        "name": "texts",
        "task": {"name": "text-classification", "text": "text", "max_length": 16},
        "data": {"source": "files", "path": str(folder / "train.csv"), "test": 0.3},
        "teacher": {"model": str(teacher), "train": {"epochs": 1, "batch_size": 8}},
        "student": {"from_teacher": {"keep_blocks": [0, 2]}},
        "objective": {
            "soft": {"loss": "kl", "temperature": 2.0},
            "hint": {"loss": "mse", "student": "hidden.1", "teacher": "hidden.2", "mask": "attention_mask"},
        },
        "train": {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3},
        "baseline": {"enabled": False},
        "evaluate": {"resamples": 100, "latency": False},
    }


def test_texts_with_hidden_states(texts: dict[str, Any], tmp_path: Path, cache: Cache) -> None:
    """Texts of several lengths, found again under another padding."""
    live = execute(recipe_from({**texts, "teacher": {**texts["teacher"], "cache": False}}), tmp_path / "live", cache)
    cached = execute(recipe_from({**texts, "teacher": {**texts["teacher"], "cache": True}}), tmp_path / "cached", cache)
    rows = len(cached.splits.train)
    assert counts(cached) == [(2 * rows, rows)]
    wanted, found = flat(live.load("distilled")), flat(cached.load("distilled"))
    assert float((found - wanted).norm() / (wanted.norm())) < 1e-5


def test_a_term_without_a_mask_leaves_the_teacher_live(texts: dict[str, Any], tmp_path: Path, cache: Cache) -> None:
    hint = {**texts["objective"]["hint"], "mask": "none"}
    objective = {**texts["objective"], "hint": hint}
    run = execute(recipe_from({**texts, "objective": objective}), tmp_path / "run", cache)
    assert counts(run) == [(0, 0)]


def test_two_teachers_one_of_them_live(tmp_path: Path, cache: Cache) -> None:
    tree = {key: value for key, value in TREE.items() if key != "teacher"}
    small = {**TREE["teacher"], "kwargs": {"hidden": [8]}, "cache": False}
    terms = {
        "large": {"loss": "kl", "teacher": "large/logits"},
        "small": {"loss": "kl", "teacher": "small/logits"},
        "hard": {"loss": "cross_entropy"},
    }
    both = {**tree, "teachers": {"large": {**TREE["teacher"], "cache": True}, "small": small}, "objective": terms}
    run = execute(recipe_from(both), tmp_path / "run", cache)
    assert counts(run) == [(288, 96)]
    never = {name: {**spec, "cache": False} for name, spec in both["teachers"].items()}
    live = execute(recipe_from({**both, "teachers": never}), tmp_path / "live", cache)
    assert torch.equal(flat(run.load("distilled")), flat(live.load("distilled")))


def test_agreement_on_the_validation_split_asks_no_cache(tmp_path: Path, cache: Cache) -> None:
    asked = recipe(True, train={**TREE["train"], "callbacks": ["agreement"]})
    run = execute(asked, tmp_path / "run", cache)
    assert counts(run) == [(288, 96)]


def test_a_large_table_is_known_by_some_of_its_rows(tmp_path: Path, cache: Cache, monkeypatch: Any) -> None:
    monkeypatch.setattr("potstill.runs.caching._LARGE", 10)
    runs = [execute(recipe(True, seed=seed), tmp_path / str(seed), cache) for seed in (1, 2)]
    other = execute(recipe(True, data={**TREE["data"], "seed": 7}), tmp_path / "other", cache)
    assert [counts(run) for run in (*runs, other)] == [[(288, 96)], [(384, 0)], [(288, 96)]]


def test_a_teacher_of_whom_nothing_is_read_needs_no_cache(tmp_path: Path, cache: Cache) -> None:
    run = execute(recipe("auto", objective={"hard": {"loss": "cross_entropy"}}), tmp_path / "run", cache)
    assert counts(run) == []
