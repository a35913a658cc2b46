"""How a teacher answers in a run, and layers of the student that are not trained."""

from __future__ import annotations

import copy
import gc
import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn

from potstill.errors import ComponentError, ModelError, RecipeError, TrainingError
from potstill.models.load import load_model
from potstill.recipe.load import recipe_from
from potstill.runs import teachers
from potstill.runs.cache import Cache
from potstill.runs.steps import Run
from potstill.runs.teachers import choose_forms, form_of, live_teacher
from potstill.runs.teaching import teacher_key
from potstill.teachers import forms, precision
from potstill.teachers.live import Live
from potstill.teachers.shared import SharedLayers, Sharing
from tests import local_models
from tests.local_models import SENTENCES
from tests.runs.tried import dry_run

TREE: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "task": {"name": "tabular-classification"},
    "data": {"source": "sklearn", "path": "load_iris"},
    "teacher": {"model": "potstill:mlp", "kwargs": {"hidden": [8]}, "train": {"epochs": 2, "batch_size": 32}},
    "student": {"model": "potstill:mlp", "kwargs": {"hidden": [4]}},
    "objective": {"soft": {"loss": "kl", "temperature": 4.0}, "hard": {"loss": "cross_entropy"}},
    "train": {"epochs": 2, "batch_size": 32, "learning_rate": 0.01},
    "evaluate": {"resamples": 100, "latency": False},
}


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()


def asked(folder: Path, tree: dict[str, Any] = TREE, cache: Path | None = None, **changes: Any) -> Run:
    """A run; ``teacher`` among the changes is merged into that of the tree."""
    whole = copy.deepcopy(tree)
    whole["teacher"] |= changes.pop("teacher", {})
    return Run(recipe_from({**whole, **changes}), folder, bars=False, cache=Cache(cache or folder.parent / "cache"))


def events(run: Run, name: str) -> list[dict[str, Any]]:
    return [event for event in run.folder.events() if event["event"] == name]


@pytest.fixture
def asked_in(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The precision of each answer that a teacher gives in a training."""
    seen: list[str | None] = []
    real = Live.__call__

    def call(live: Live, batch: Any) -> Any:
        seen.append(live.precision)
        return real(live, batch)

    monkeypatch.setattr(Live, "__call__", call)
    return seen


@pytest.fixture
def bf16_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "has_native_bf16", lambda device: True)
    monkeypatch.setattr(forms, "_seconds", lambda live, batches, device: 1.0 + (live.precision == "fp32"))


# ---- precision -----------------------------------------------------------------------------------------------------


def test_the_teacher_of_a_run_answers_as_the_recipe_has_it(tmp_path: Path, asked_in: list[str | None]) -> None:
    asked(tmp_path / "run", teacher={"precision": "bf16", "cache": False}).execute()
    assert set(asked_in) == {"bf16"}, "in the preflight, too"
    live = live_teacher(asked(tmp_path / "run", teacher={"precision": "bf16", "cache": False}), "teacher")
    assert (live.precision, live.compile) == ("bf16", False)


def test_how_it_answers_does_not_change_how_it_is_trained(tmp_path: Path) -> None:
    plain = asked(tmp_path / "a")
    other = asked(tmp_path / "b", teacher={"precision": "bf16", "compile": True})
    assert teacher_key(other, "teacher") == teacher_key(plain, "teacher")
    assert other.recipe.all_teachers["teacher"].compile
    assert form_of(other, "teacher") == ("bf16", True)
    assert form_of(plain, "teacher") == (None, False)
    trained = asked(tmp_path / "c", teacher={"train": {"epochs": 3}})
    assert teacher_key(trained, "teacher") != teacher_key(plain, "teacher")


@pytest.mark.usefixtures("bf16_is_faster")
def test_auto_takes_the_fastest_form_that_is_faithful(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, asked_in: list[str | None]
) -> None:
    run = asked(tmp_path / "run", teacher={"precision": "auto", "cache": False}, evaluate=TREE["evaluate"])
    with caplog.at_level(logging.INFO, "potstill"):
        run.execute()
    assert asked_in[-1] == "bf16"
    (chosen,) = events(run, "teacher form")
    assert (chosen["teacher"], chosen["precision"], chosen["compile"]) == ("teacher", "bf16", False)
    assert [form["seconds"] for form in chosen["forms"]] == [2.0, 1.0]
    assert chosen["forms"][1]["faithfulness"]["samples"] >= 84
    assert "teacher: bf16: 2.00 times as fast as fp32" in caplog.text
    assert "teacher: answers in bf16" in caplog.text
    assert json.loads((run.folder / teachers.FILE).read_text())["teacher"]["precision"] == "bf16"


@pytest.mark.usefixtures("bf16_is_faster")
def test_what_was_chosen_stays_when_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another choice on a machine that is busy now would come to other bits."""
    changes: dict[str, Any] = {"teacher": {"precision": "auto"}, "train": {**TREE["train"], "epochs": 1}}
    asked(tmp_path / "run", **changes).prepare_teachers()
    monkeypatch.setattr(forms, "has_native_bf16", lambda device: False)
    run = asked(tmp_path / "run", **changes)
    run.execute()
    assert len(events(run, "teacher form")) == 1
    assert form_of(run, "teacher") == ("bf16", False)
    choose_forms(run)
    assert len(events(run, "teacher form")) == 1


@pytest.mark.parametrize(
    ("asked_for", "error", "message"),
    [("fp16", TrainingError, "slower than in fp32 on a CPU"), ("int8", ComponentError, r"potstill\[int8\]")],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_for: str, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    run = asked(tmp_path / "run", teacher={"precision": asked_for})
    with pytest.raises(error, match=message):
        run.execute()
    assert events(run, "training") == []
    with pytest.raises(error, match=message):
        list(dry_run(run.recipe))


def test_a_precision_that_there_is_not_is_a_mistake_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"teacher\.precision.*'bf16'.*'auto'"):
        asked(tmp_path / "run", teacher={"precision": "half"})


# ---- frozen layers -------------------------------------------------------------------------------------------------

FROZEN = ["bert.embeddings", "bert.encoder.layer.0"]
NAMES = ["negative", "positive"]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Any]:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    for split, times in (("train", 4), ("test", 1)):
        rows = SENTENCES * times
        columns = {"text": [text for text, _ in rows], "label": [grade for _, grade in rows]}
        datasets.Dataset.from_dict(columns, features).to_parquet(str(tmp_path / f"data/{split}.parquet"))
    train = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-2}
    return {
        **TREE,
        "task": {"name": "text-classification", "max_length": 16},
        "data": {"source": "files", "path": str(tmp_path / "data")},
        "teacher": {"model": str(local_models.bert(tmp_path / "bert", layers=3)), "train": train, "cache": False},
        "student": {"from_teacher": {"keep_blocks": [0, 2], "weights": "finetuned"}, "freeze": FROZEN},
        "train": train,
    }


def parts(model: nn.Module) -> dict[bool, dict[str, torch.Tensor]]:
    """The weights that are frozen, and the others."""
    state = model.state_dict()
    frozen = {name for name in state if any(name.startswith(f"{path}.") for path in FROZEN)}
    return {kept: {name: v for name, v in state.items() if (name in frozen) is kept} for kept in (True, False)}


def test_baseline_and_student_keep_what_is_frozen(
    texts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    real = SharedLayers._copy
    monkeypatch.setattr(SharedLayers, "_copy", lambda layers, output: (used.append(1), real(layers, output))[1])
    run = asked(tmp_path / "shared", texts)
    run.execute()
    assert len(used) == 2 * 4, "embeddings and first block, in each step: the teacher computed them already"
    begun = parts(run.student())
    for name in ("baseline", "distilled"):
        model, _ = load_model(run.model_folder(name))
        ended = parts(model)
        assert all(torch.equal(value, begun[True][key]) for key, value in ended[True].items())
        assert not all(torch.equal(value, begun[False][key]) for key, value in ended[False].items())
        assert all(parameter.requires_grad for parameter in model.parameters()), "a normal model is saved"
    monkeypatch.setattr(Sharing, "__call__", lambda sharing, *_: nullcontext())
    alone = asked(tmp_path / "alone", texts)
    alone.execute()
    assert len(used) == 2 * 4
    assert all(
        torch.equal(value, load_model(alone.model_folder("distilled"))[0].state_dict()[key])
        for key, value in load_model(run.model_folder("distilled"))[0].state_dict().items()
    )


def test_a_layer_that_there_is_not_is_said_before_anything_is_trained(texts: dict[str, Any], tmp_path: Path) -> None:
    texts["student"]["freeze"] = ["bert.encoder.layer.2"]
    run = asked(tmp_path / "run", texts)
    with pytest.raises(ModelError, match=r"no module 'bert\.encoder\.layer\.2' to freeze; did you mean 'bert\.enc"):
        run.execute()
    assert events(run, "training") == []
    with pytest.raises(ModelError, match="to freeze"):
        list(dry_run(run.recipe))


def test_frozen_layers_are_a_list_of_texts(tmp_path: Path) -> None:
    assert asked(tmp_path / "run").recipe.student.freeze == []
    with pytest.raises(RecipeError, match=r"student\.freeze"):
        asked(tmp_path / "run", student={**TREE["student"], "freeze": "net.0"})
