"""Runs with models of transformers: cut students, teachers with other tokens, shared teachers, exact resume."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import TrainerCallback

from potstill.errors import ModelError, ObjectiveError, TaskError
from potstill.models.load import load_model
from potstill.models.student import cut
from potstill.recipe.load import recipe_from
from potstill.recipe.schema import Recipe
from potstill.runs.cache import Cache
from potstill.runs.steps import Run
from tests import local_models
from tests.local_models import SENTENCES
from tests.runs.tried import dry_run
from tests.training.tiny import flat

NAMES = ["negative", "positive"]
HINT = {"loss": "mse", "student": "hidden.2", "teacher": "hidden.4", "weight": 0.5}


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    features = datasets.Features(
        {"text": datasets.Value("string"), "other": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)}
    )
    for split, times in (("train", 6), ("validation", 1), ("test", 2)):
        rows = SENTENCES * times
        columns = {"text": [text for text, _ in rows], "other": [text for text, _ in reversed(rows)]}
        table = datasets.Dataset.from_dict({**columns, "label": [grade for _, grade in rows]}, features)
        table.to_parquet(str(folder / f"{split}.parquet"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models: BERT without and with a head, DistilBERT, RoBERTa."""
    made = tmp_path_factory.mktemp("models")
    local_models.bert(made / "bert")
    local_models.bert(made / "judge", head=NAMES)
    local_models.distilbert(made / "distilbert")
    local_models.roberta(made / "roberta", head=NAMES)
    return made


@pytest.fixture
def tree(data: Path, folder: Path) -> dict[str, Any]:
    return {
        "name": "texts",
        "seed": 1,
        "task": {"name": "text-classification", "max_length": 16},
        "data": {"source": "files", "path": str(data)},
        "teacher": {"model": str(folder / "bert"), "train": {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3}},
        "student": {"from_teacher": {"keep_blocks": [0, 2]}},
        "objective": {"soft": {"loss": "kl", "temperature": 2.0}, "hard": {"loss": "cross_entropy"}},
        "train": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3},
        "evaluate": {"resamples": 100, "latency": False},
    }


def execute(tree: dict[str, Any], folder: Path, cache: Cache | None = None, **changes: Any) -> Run:
    run = Run(asked(tree, **changes), folder, bars=False, cache=cache or Cache(folder / "cache"))
    run.execute()
    return run


def asked(tree: dict[str, Any], **changes: Any) -> Recipe:
    return recipe_from({**copy.deepcopy(tree), **changes})


def test_a_cut_student_begins_with_its_teachers_pretrained_blocks(tree: dict[str, Any], tmp_path: Path) -> None:
    run = Run(asked(tree), tmp_path / "run", bars=False, cache=Cache(tmp_path / "cache"))
    begun, before = run.student(), load_pretrained_encoder(tree["teacher"]["model"])
    kept = begun.bert.encoder.layer
    assert len(kept) == 2
    for own, old in zip(kept, (before.encoder.layer[0], before.encoder.layer[2]), strict=True):
        assert torch.equal(flat(own), flat(old))
    assert torch.equal(flat(run.student()), flat(begun))  # baseline and distilled begin alike, the new head included


def load_pretrained_encoder(folder: str) -> Any:
    import transformers

    return transformers.BertModel.from_pretrained(folder)


def test_or_with_its_finetuned_ones(tree: dict[str, Any], tmp_path: Path) -> None:
    student = {"from_teacher": {"keep_blocks": [0, 2], "weights": "finetuned"}}
    run = execute(tree, tmp_path / "run", student=student)
    assert torch.equal(flat(run.student()), flat(cut(run.load("teacher"), [0, 2])))
    saved, card = load_model(run.model_folder("distilled"))
    assert saved.config.num_hidden_layers == 2
    assert saved.config.id2label == dict(enumerate(NAMES))
    assert card["settings"]["label_names"] == NAMES


def test_a_finetuned_cut_shows_in_a_dry_run(tree: dict[str, Any]) -> None:
    student = {"from_teacher": {"keep_blocks": [0, 2], "weights": "finetuned"}}
    lines = list(dry_run(asked(tree, student=student)))
    assert any("new weights: classifier.bias" in line for line in lines)
    assert any(line.startswith("student: blocks 0, 2 of ") for line in lines)


def test_blocks_that_there_are_not(tree: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="from 0 to 3"):
        list(dry_run(asked(tree, student={"from_teacher": {"keep_blocks": [0, 4]}})))


def test_terms_that_compare_tokens_need_the_same_tokens(tree: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    teacher = {"model": str(folder / "roberta")}
    student = {"model": str(folder / "distilbert")}
    objective = {**tree["objective"], "hint": {**HINT, "teacher": "hidden.2"}}
    with pytest.raises(ObjectiveError, match=r"objective\.hint compares 'hidden\.2' token by token.*`processor:`"):
        list(dry_run(asked(tree, teacher=teacher, student=student, objective=objective)))
    with pytest.raises(ObjectiveError, match="token by token"):
        execute(tree, tmp_path / "run", teacher=teacher, student=student, objective=objective)


def test_logits_of_a_teacher_with_other_tokens(tree: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    teacher, student = {"model": str(folder / "roberta")}, {"model": str(folder / "distilbert")}
    task = {**tree["task"], "pair": "other"}
    run = execute(tree, tmp_path / "run", teacher=teacher, student=student, task=task)
    assert run.metrics().models["distilled"].metrics["accuracy"].value >= 0
    (tmp_path / "run/models/distilled/tokenizer.json").read_text()
    own = run.task_of("teacher").dataset(run.splits.test, training=False, seed=0)[0]
    assert "token_type_ids" not in own


def test_several_teachers_each_read_their_own_tokens(tree: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """The answers of each, in one batch, are those that it gives alone."""
    teachers = {"one": {"model": str(folder / "judge")}, "two": {"model": str(folder / "roberta")}}
    objective = {
        "first": {"loss": "kl", "teacher": "one/logits"},
        "second": {"loss": "kl", "teacher": "two/logits"},
        "hint": {**HINT, "teacher": "one/hidden.4", "project": "linear"},
    }
    changes = {"teachers": teachers, "objective": objective, "student": {"model": str(folder / "distilbert")}}
    run = execute({k: v for k, v in tree.items() if k != "teacher"}, tmp_path / "run", **changes)
    from potstill.recipe import build

    task = build.prepared_for_distillation(run.recipe, run.task, run.processors)
    places = list(range(8))
    together = task.dataset(run.splits.test, training=False, seed=0).__getitems__(places)
    assert "teacher/two/input_ids" in together
    assert "teacher/one/input_ids" not in together  # BERT's tokens are DistilBERT's
    for name in teachers:
        source, alone = run.live_teacher(name), run.task_of(name)
        batch = alone.dataset(run.splits.test, training=False, seed=0).__getitems__(places)
        expected = alone.forward(run.load(name), batch)["logits"]
        torch.testing.assert_close(source(together)["logits"], expected.detach(), atol=1e-6, rtol=0)


def test_a_processor_may_be_anothers(tree: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """A model that comes without a tokenizer."""
    bare = tmp_path / "bare"
    local_models.distilbert(bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises((ModelError, TaskError), match="tokenizer"):
        list(dry_run(asked(tree, student={"model": str(bare)})))
    lines = list(dry_run(asked(tree, student={"model": str(bare), "processor": str(folder / "bert")})))
    assert lines


def test_a_teacher_with_a_seed_of_its_own_is_trained_once(tree: dict[str, Any], tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    teacher = {**tree["teacher"], "seed": 0}
    runs = [execute(tree, tmp_path / f"run{s}", cache, teacher=teacher, seed=s) for s in (0, 1)]
    assert [event["step"] for event in runs[1].folder.events() if event["event"] == "reused"] == ["teacher"]
    assert torch.equal(*(flat(run.load("teacher")) for run in runs))
    assert not torch.equal(*(flat(run.load("baseline")) for run in runs))


def test_the_teacher_is_known_by_its_content_not_its_place(tree: dict[str, Any], tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    execute(tree, tmp_path / "first", cache)
    moved = local_models.bert(tmp_path / "moved")
    run = execute(tree, tmp_path / "second", cache, teacher={**tree["teacher"], "model": str(moved)})
    assert [event["step"] for event in run.folder.events() if event["event"] == "reused"] == ["teacher"]
    other = local_models.bert(tmp_path / "other", seed=9)
    run = execute(tree, tmp_path / "third", cache, teacher={**tree["teacher"], "model": str(other)})
    assert not [event for event in run.folder.events() if event["event"] == "reused"]


class Stop(TrainerCallback):
    """Ends the process's training as a kill would, after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [4, 9])
def test_a_stopped_run_comes_to_the_same_bits(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Grouped by length, with words masked, deleted and swapped at random, in the first or the second epoch."""
    from potstill.training import trainer as engine

    data = {**tree["data"], "augment": [{"mask_words": {"p": 0.3}}, "delete_words", "swap_words"]}
    cache = Cache(tmp_path / "cache")
    whole = execute(tree, tmp_path / "whole", cache, data=data)
    usual = engine.AfterStep
    stops = lambda trainer: Stop(step) if trainer.teacher is not None else usual(trainer)  # noqa: E731
    monkeypatch.setattr(engine, "AfterStep", stops)
    with pytest.raises(KeyboardInterrupt):
        execute(tree, tmp_path / "stopped", cache, data=data)
    monkeypatch.setattr(engine, "AfterStep", usual)
    gone_on = execute(tree, tmp_path / "stopped", cache, data=data)
    resumed = [e["resumed_from"] for e in gone_on.folder.events() if e["event"] == "training" and e["resumed_from"]]
    assert len(resumed) == 1
    assert torch.equal(flat(whole.load("distilled")), flat(gone_on.load("distilled")))
    assert whole.metrics() == gone_on.metrics()
