"""Who teaches, as a recipe says it: mistakes that would show only after hours are found when it is read."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from potstill.errors import RecipeError
from potstill.recipe.generations import spread_out
from potstill.recipe.load import recipe_from
from potstill.runs.plan import Plan

MODEL: dict[str, Any] = {"model": "potstill:mlp"}
TRAINED = {**MODEL, "train": {"epochs": 1}}
JOINT = {**MODEL, "train": "jointly"}


def soft(teacher: str = "logits", **more: Any) -> dict[str, Any]:
    return {"soft": {"loss": "kl", "teacher": teacher, **more}, "hard": {"loss": "cross_entropy"}}


def tree(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": "tiny",
        "task": {"name": "tabular-classification"},
        "data": {"source": "sklearn", "path": "load_iris"},
        "student": copy.deepcopy(MODEL),
        "objective": soft(),
    }
    return made | changes


ENSEMBLE = {"ensemble": {"of": ["a", "b"]}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"teacher": {"train": {"epochs": 1}}}, "expected one of `model`, `from_teacher` and `source`, got none of them"),
    ({"teacher": {**MODEL, "source": "column"}}, "got `model` and `source`"),
    ({"teacher": {"source": "colum"}}, "did you mean 'column'"),
    ({"teacher": {"source": {"column": {"colum": "x"}}}}, "did you mean 'column'"),
    ({"teacher": {**MODEL, "train": "jointli"}}, "did you mean 'jointly'"),
    ({"teacher": {**TRAINED, "joint": {}}}, "got both"),
    ({"teacher": {**JOINT, "compile": True}}, "takes no `compile`"),
    ({"teacher": {"model": "sklearn:GaussianNB", "joint": {}}}, "takes no `joint`"),
    (
        {"teachers": {"a": JOINT, "b": TRAINED, "e": {"source": ENSEMBLE}}, "objective": soft("e/logits")},
        "no source can",
    ),
    (
        {"teachers": {"e": {"source": ENSEMBLE}, "a": TRAINED, "b": TRAINED}, "objective": soft("e/logits")},
        "before this",
    ),
    (
        {"teachers": {"a": TRAINED, "m": {**TRAINED, "objective": soft("aa/logits")}}, "objective": soft("m/logits")},
        "'aa'",
    ),
    (
        {"teachers": {"a": TRAINED, "m": {**MODEL, "objective": soft()}}, "objective": soft("m/logits")},
        "is not trained",
    ),
    ({"teacher": {**TRAINED, "objective": soft()}}, "has no teacher before it to learn from"),
    ({"teacher": {**JOINT, "objective": soft("studnt/logits")}}, "did you mean 'student'"),
    ({"objective": soft("self/logits")}, "compared with itself it teaches nothing"),
    ({"scheme": {"name": "born_again"}, "teacher": JOINT}, "are trained before the student"),
    ({"scheme": {"name": "born_again"}, "stages": [{"name": "one"}]}, "leave out `stages`"),
    ({"scheme": {"name": "born_again"}, "student": {**MODEL, "freeze": ["head"]}}, "cannot have this"),
    ({"scheme": {"name": "progressive", "shares": "os.path:join"}, "teacher": TRAINED}, "--allow-code"),
    (
        {"teacher": JOINT, "student": {"from_teacher": {"keep_blocks": [0], "weights": "finetuned"}}},
        "has no finetuned weights before",
    ),
    (
        {
            "teacher": {"source": {"column": {"column": "soft"}}},
            "train": {"augment": [{"mixup": {"alpha": 0.2}}]},
        },
        "mixes rows, and the teacher 'teacher' answers for each row as it is",
    ),
    ({"teacher": TRAINED, "stages": [{"name": "one", "train": {"augment": ["os.path:join"]}}]}, "augmentation"),
    ({"teacher": TRAINED, "stages": [{"name": "one"}, {"name": "one"}]}, "two stages are called 'one'"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_mistake_is_told_when_the_recipe_is_read(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from(tree(**copy.deepcopy(changes)), allow_code=False)
    assert said in str(caught.value)


RIGHT: list[dict[str, Any]] = [
    {"teacher": {**JOINT, "cache": False}},
    {"teacher": {"source": {"column": {"column": "soft"}}}},
    {"teacher": JOINT, "scheme": {"name": "mutual"}},
    {"teachers": {"a": TRAINED, "b": TRAINED, "e": {"source": ENSEMBLE}}, "objective": soft("e/logits")},
    {"teacher": JOINT, "stages": [{"name": "one", "scheme": {"name": "mutual"}, "objective": soft()}]},
    {"objective": {"hard": {"loss": "cross_entropy"}, "own": {"loss": "infonce", "teacher": "self/logits"}}},
    {"scheme": {"name": "born_again", "generations": 3}},
]


@pytest.mark.parametrize("changes", RIGHT)
def test_what_is_right_reads_the_same_from_its_own_dump(changes: dict[str, Any]) -> None:
    """A run's folder keeps the dump: one that cannot be read again can be opened by nobody."""
    made = recipe_from(tree(**copy.deepcopy(changes)), allow_code=False)
    assert recipe_from(made.model_dump(mode="json"), allow_code=False) == made


def test_twins_never_begin_alike() -> None:
    """A peer with the student's weights would agree with it for ever; so would two teachers of one kind."""
    teachers = {"peer": JOINT, "big": TRAINED, "other": JOINT, "same": TRAINED}
    plan = Plan(recipe_from(tree(teachers=teachers, objective=soft("big/logits"))))
    assert len({plan.seed_of(name) for name in ("student", *teachers)}) == 5


def test_generations_hand_their_terms_on() -> None:
    terms = {**soft(), "hint": {"loss": "mse", "student": "body.1", "teacher": "body.3", "project": "linear"}}
    made = spread_out(
        recipe_from(tree(teacher=TRAINED, objective=terms, scheme={"name": "born_again", "generations": 3}))
    )
    assert list(made.all_teachers) == ["teacher", "generation-1", "generation-2"]
    first, second = (made.all_teachers[f"generation-{number}"].objective for number in (1, 2))
    assert first is not None
    assert second is not None
    assert first["hint"].teacher == "body.3"
    assert second["hint"].teacher == "generation-1/body.1"
    assert made.objective["soft"].teacher == "generation-2/logits"
    assert made.scheme.name == "offline"


def test_weights_of_terms_that_become_one_are_added() -> None:
    terms = {
        "one": {"loss": "kl", "teacher": "a/logits", "weight": 0.3},
        "other": {"loss": "kl", "teacher": "b/logits", "weight": 0.4},
        "ramp": {"loss": "kl", "teacher": "b/logits", "weight": {"from": 1.0, "to": 0.0}},
    }
    made = spread_out(
        recipe_from(tree(teachers={"a": TRAINED, "b": TRAINED}, objective=terms, scheme={"name": "born_again"}))
    )
    assert made.objective["one"].weight == pytest.approx(0.7)
    assert sorted(made.objective) == ["one", "ramp"]
