"""Offline distillation: fixed teachers, one student."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from potstill.interfaces import Progress
from potstill.registry import schemes
from potstill.schemes.offline import Offline
from potstill.teachers.live import Live


def source(value: float):
    """A teacher that always says the same."""
    return lambda batch: {"logits": torch.full((len(batch["sample_id"]), 2), value), "hidden.1": torch.ones(1) * value}


BATCH = {"sample_id": torch.arange(3)}


def test_it_is_registered():
    assert schemes.get("offline") is Offline
    assert schemes.check("offline", {}) == []
    assert [str(problem) for problem in schemes.check("offline", {"alpha": 1})] == [
        "alpha: scheme 'offline' has no option 'alpha'; it takes no options"
    ]


def test_one_student_learns():
    student, scheme = nn.Linear(2, 2), Offline()
    assert scheme.learners() == {}
    scheme.setup(student, {"teacher": source(1.0)})
    assert list(scheme.learners()) == ["student"]
    assert scheme.learners()["student"] is student


def test_the_signals_of_one_teacher_keep_their_names():
    for name in ("teacher", "large"):
        scheme = Offline()
        scheme.setup(nn.Linear(2, 2), {name: source(1.0)})
        sources = scheme.sources(Progress())
        assert list(sources) == ["teacher"]
        assert set(sources["teacher"](BATCH)) == {"logits", "hidden.1"}


def test_those_of_several_go_by_their_names():
    """Two teachers' logits under one name would leave only the last teacher, without a word."""
    scheme = Offline()
    scheme.setup(nn.Linear(2, 2), {"large": source(1.0), "small": source(2.0)})
    said = scheme.sources(Progress())["teacher"](BATCH)
    assert set(said) == {"large/logits", "large/hidden.1", "small/logits", "small/hidden.1"}
    assert said["large/logits"].unique().tolist() == [1.0]
    assert said["small/logits"].unique().tolist() == [2.0]


def test_without_a_teacher_nobody_teaches():
    scheme = Offline()
    scheme.setup(nn.Linear(2, 2), {})
    assert scheme.sources(Progress()) == {}


@pytest.mark.parametrize("progress", [Progress(), Progress(50, 100), Progress(100, 100)])
def test_nothing_changes_while_training_goes_on(progress):
    teacher = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = nn.Linear(2, 2)
    weights = student.weight.clone()
    scheme = Offline()
    scheme.setup(student, {"teacher": Live(teacher)})
    batch = {**BATCH, "features": torch.randn(3, 2)}
    first = scheme.sources(Progress())["teacher"](batch)["logits"]
    scheme.after_step(progress)
    again = scheme.sources(progress)["teacher"](batch)["logits"]
    assert torch.equal(again, first)
    assert not again.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert torch.equal(student.weight, weights)


def test_what_is_given_later_does_not_slip_in():
    teachers = {"a": source(1.0)}
    scheme = Offline()
    scheme.setup(nn.Linear(2, 2), teachers)
    teachers["b"] = source(2.0)
    assert set(scheme.sources(Progress())["teacher"](BATCH)) == {"logits", "hidden.1"}
