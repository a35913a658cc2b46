"""The mistakes that a person can make, and the words for them."""

from __future__ import annotations

import inspect

import pytest

from potstill import errors
from potstill.errors import (
    CodeNotAllowedError,
    ComponentError,
    PotstillError,
    Problem,
    RecipeError,
    did_you_mean,
    nearest,
)

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]


def test_everything_a_person_can_cause_is_one_kind():
    """The command line turns these into a message; anything else is a traceback."""
    assert len(CLASSES) >= 10
    assert all(issubclass(each, PotstillError) for each in CLASSES)
    assert all(inspect.getdoc(each) for each in CLASSES)
    assert issubclass(CodeNotAllowedError, ComponentError)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem(("train", "epochs"), "expected a number"), "train.epochs: expected a number"),
        (Problem(("a", 0, "b"), "wrong", "right"), "a.0.b: wrong; right"),
        (Problem((), "no such file"), "no such file"),
        (Problem(("a",), "wrong", "right", "r.yaml", 3), "r.yaml:3: a: wrong; right"),
        (Problem((), "wrong", None, "r.yaml", 1), "r.yaml:1: wrong"),
        (Problem(("a",), "wrong", None, "r.yaml"), "r.yaml: a: wrong"),
        (Problem(("a",), "wrong", None, None, 7), "a: wrong"),
    ],
)
def test_a_problem_in_words(problem, text):
    assert str(problem) == text


def test_a_problem_gets_its_place_without_being_changed():
    problem = Problem(("a",), "wrong", "right")
    placed = problem.at("r.yaml", 4)
    assert (placed.path, placed.message, placed.hint, placed.file, placed.line) == (
        ("a",),
        "wrong",
        "right",
        "r.yaml",
        4,
    )
    assert problem.file is None
    with pytest.raises(AttributeError):
        problem.line = 3


def test_a_recipe_error_lists_all_problems_in_order():
    problems = [Problem(("b",), "first", None, "r.yaml", 2), Problem(("a",), "second", None, "r.yaml", 5)]
    error = RecipeError(problems)
    assert str(error) == "r.yaml:2: b: first\nr.yaml:5: a: second"
    assert error.problems == tuple(problems)


@pytest.mark.parametrize(
    ("name", "candidates", "expected"),
    [
        ("temprature", ["temperature", "weight"], ["temperature"]),
        ("KL", ["mse", "kl"], ["kl"]),
        ("adam", ["AdamW", "Adam", "SGD"], ["Adam", "AdamW"]),
        ("xyz", ["kl", "mse"], []),
        ("kl", [], []),
    ],
)
def test_nearest(name, candidates, expected):
    assert nearest(name, candidates) == expected


def test_nearest_best_first_and_no_more_than_asked_for():
    names = ["hidden.1", "hidden.2", "hidden.3", "hidden.12", "logits"]
    assert nearest("hidden.2", names, count=2)[0] == "hidden.2"
    assert len(nearest("hidden.2", names, count=2)) == 2
    assert nearest("hidden.2", iter(names), count=1) == ["hidden.2"]


def test_did_you_mean():
    assert did_you_mean("temprature", ["temperature", "weight"]) == "did you mean 'temperature'?"
    assert did_you_mean("zzz", ["mse", "kl", "kl"]) == "known: kl, mse"
    assert did_you_mean("zzz", []) == "there are none"
    assert did_you_mean("zzz", (f"name{i:02}" for i in range(20))).endswith("name11, …")
