"""Teachers that are no models of the run, and those that learn from others: opened again, judged, told apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from potstill.recipe.load import recipe_from
from potstill.runs.cache import Cache
from potstill.runs.steps import Run, open_run
from potstill.runs.teaching import teacher_key

MODEL: dict[str, Any] = {"model": "potstill:mlp", "kwargs": {"hidden": [4]}}
TRAINED = {**MODEL, "train": {"epochs": 1, "batch_size": 32}, "seed": 3}
SOFT = {"loss": "kl", "weight": 0.7, "temperature": 2.0}
HARD = {"loss": "cross_entropy", "weight": 0.3}


def tree(teachers: dict[str, Any], reads: str, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": "tiny",
        "task": {"name": "tabular-classification"},
        "data": {"source": "sklearn", "path": "load_iris"},
        "teachers": copy.deepcopy(teachers),
        "student": copy.deepcopy(MODEL),
        "objective": {"soft": {**SOFT, "teacher": reads}, "hard": HARD},
        "train": {"epochs": 1, "batch_size": 32, "max_steps": 2},
        "baseline": {"enabled": False},
        "evaluate": {"resamples": 100, "latency": False},
    }
    return made | changes


def made(folder: Path, asked: dict[str, Any]) -> Run:
    return Run(recipe_from(asked), folder / "run", bars=False, cache=Cache(folder / "cache"))


ENSEMBLE = {"a": TRAINED, "b": {**TRAINED, "seed": 4}, "both": {"source": {"ensemble": {"of": ["a", "b"]}}}}


def test_a_run_with_a_source_is_judged_and_opened_again(tmp_path: Path) -> None:
    run = made(tmp_path, tree(ENSEMBLE, "both/logits"))
    metrics = run.execute()
    assert list(metrics.models) == ["a", "b", "both", "distilled"]
    assert metrics.models["both"].parameters == metrics.models["both"].bytes == 0
    assert run.model_folder("a").is_dir()
    assert not run.model_folder("both").exists()
    again = open_run(run.folder.path, bars=False).evaluate("test")
    assert again.models["both"].metrics == metrics.models["both"].metrics


def test_one_that_cannot_be_asked_hides_no_other(tmp_path: Path) -> None:
    """A column that the test split lacks is noted; the ensemble beside it is judged."""
    run = made(tmp_path, tree(ENSEMBLE, "both/logits"))
    run.prepare_teachers()
    column = {**ENSEMBLE, "people": {"source": {"column": {"column": "votes"}}}}
    run.recipe = recipe_from(tree(column, "both/logits"))
    from potstill.runs.judging import Judgement

    (run.folder / "models/distilled").mkdir()
    judged = Judgement(run, run.splits.test, "test")
    assert list(judged._asked) == ["both"]
    assert any(note.startswith("the teacher 'people' could not be judged") for note in run.notes)


KEYS: dict[str, dict[str, Any]] = {
    "another term": {"objective": {"soft": {**SOFT, "teacher": "a/logits", "temperature": 3.0}}},
    "another teacher's settings": {"a": {**TRAINED, "train": {"epochs": 2, "batch_size": 32}}},
    "another precision of the teacher": {"a": {**TRAINED, "precision": "bf16"}},
    "fewer classes kept": {"a": {**TRAINED, "cache": {"top_k": 1}}},
}


@pytest.mark.parametrize("why", KEYS)
def test_an_assistant_is_not_taken_for_another(tmp_path: Path, why: str) -> None:
    own = {"soft": {**SOFT, "teacher": "a/logits"}}
    teachers = {"a": TRAINED, "m": {**TRAINED, "objective": KEYS[why].get("objective", own)}}
    usual = made(tmp_path, tree({"a": TRAINED, "m": {**TRAINED, "objective": own}}, "m/logits"))
    other = made(tmp_path, tree({**teachers, **{k: v for k, v in KEYS[why].items() if k == "a"}}, "m/logits"))
    assert teacher_key(usual, "m") != teacher_key(other, "m")


def test_an_assistant_depends_on_what_it_is_taught_on(tmp_path: Path) -> None:
    own = {"soft": {**SOFT, "teacher": "a/logits"}}
    teachers = {"a": TRAINED, "m": {**TRAINED, "objective": own}}
    usual = made(tmp_path, tree(teachers, "m/logits"))
    data = {"source": "sklearn", "path": "load_iris", "synthesize": {"munge": {"size": 2}}}
    objective = {"soft": {**SOFT, "teacher": "m/logits"}}
    other = made(tmp_path, tree(teachers, "m/logits", data=data, objective=objective))
    assert teacher_key(usual, "a") == teacher_key(other, "a")
    assert teacher_key(usual, "m") != teacher_key(other, "m")


def test_a_teacher_is_kept_by_what_each_training_sees(tmp_path: Path) -> None:
    """A stage with random views of its own would else find the answers to other inputs, and stop for ever."""
    teachers = {"a": {**TRAINED, "cache": True}}
    stages = [
        {"name": "plain", "train": {"epochs": 2, "max_steps": -1}},
        {"name": "noisy", "train": {"epochs": 2, "max_steps": -1, "augment": [{"noise": {"std": 0.1}}], "views": 2}},
    ]
    asked = tree(teachers, "logits", stages=stages)
    asked["teacher"] = asked.pop("teachers")["a"]
    metrics = made(tmp_path, asked).execute()
    assert set(metrics.models) == {"teacher", "distilled"}
