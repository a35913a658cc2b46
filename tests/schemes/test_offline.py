"""Offline distillation: every learner minimises what it was given."""

from __future__ import annotations

from torch import nn

from potstill.registry import schemes
from potstill.schemes.lesson import Learner, Lesson
from potstill.schemes.offline import Offline


def test_it_is_registered():
    assert schemes.get("offline") is Offline
    assert schemes.check("offline", {}) == []
    assert [str(problem) for problem in schemes.check("offline", {"alpha": 1})] == [
        "alpha: scheme 'offline' has no option 'alpha'; it takes no options"
    ]


def test_nothing_is_arranged():
    student, peer = Learner(nn.Linear(2, 2)), Learner(nn.Linear(2, 2))
    lesson = Lesson(student, {"peer": peer}, {"large": lambda batch: {}}, seed=3)
    arranged = Offline().arrange(lesson)
    assert arranged.learners == {"student": student, "peer": peer}
    assert arranged.student.objective is None
    assert arranged.names == ["large", "peer"]
