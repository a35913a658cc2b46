"""What a scheme arranges: who learns, from what objective, and who is there to teach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from potstill.interfaces import Batch, Progress, Signals, TeacherSource
from potstill.losses.objective import Objective

STUDENT = "student"
"""What the student is called by those who learn from it, as in ``student/logits``."""

SELF = "self"
"""What a model is called by itself: ``self/logits`` are its own answers, cut from their graph."""


class Extension(nn.Module):
    """Layers and habits that a learner has while it learns, and not afterwards: exits, replaced blocks.

    Its parameters are trained with the learner's and saved in checkpoints. A subclass overrides what it needs.
    """

    def taps(self) -> list[str]:
        """Return the signals of the learner that it reads."""
        return []

    def makes(self, signal: str) -> bool:
        """Return whether a signal is one that it makes."""
        return False

    @property
    def pending(self) -> bool:
        """Whether its layers wait for :meth:`materialize`."""
        return False

    def materialize(self, signals: Signals) -> None:
        """Make the layers whose sizes depend on the signals of a dry run."""

    @contextmanager
    def around(self, model: nn.Module, batch: Batch, progress: Progress) -> Iterator[None]:
        """Hold while the learner answers a batch that it is trained on; its model may be changed for so long."""
        yield

    def forward(self, signals: Signals, batch: Batch) -> Signals:
        """Return the signals that it makes of the learner's, all of them in one mapping."""
        return {}


@dataclass
class Learner:
    """A model that is trained, and how.

    Attributes:
        model: the model.
        objective: what it minimises; ``None`` for the hard terms of the student's. Teachers are called ``NAME/SIGNAL``;
            where there is but one, its signals have their bare names too.
        forward: ``(model, batch) -> responses``, e.g. a task's.
        prefix: what its own entries in a batch begin with; empty for the student, whose entries have plain names.
        learning_rate: the student's if omitted.
        weight_decay: the student's if omitted.
        extension: what it has only while it learns.
        given: whether the objective was asked for as it is, so that no scheme may make it.
    """

    model: nn.Module
    objective: Objective | None = None
    forward: Callable[[nn.Module, Batch], Signals] | None = None
    prefix: str = ""
    learning_rate: float | None = None
    weight_decay: float | None = None
    extension: Extension | None = None
    given: bool = False


@dataclass
class Lesson:
    """Everything of a training that a scheme may arrange.

    Attributes:
        student: who learns, with its objective.
        others: models that learn at the same time, by name: jointly trained teachers and peers. What they say is a
            teacher's answer to all other learners.
        sources: teachers that do not learn, by name.
        seed: of what a scheme draws.
    """

    student: Learner
    others: dict[str, Learner] = field(default_factory=dict)
    sources: dict[str, TeacherSource] = field(default_factory=dict)
    seed: int = 0

    @property
    def learners(self) -> Mapping[str, Learner]:
        """Every learner by name; the student is :data:`STUDENT`."""
        return {STUDENT: self.student, **self.others}

    @property
    def names(self) -> list[str]:
        """Everybody whom the student can learn from, in the order of the recipe as far as one can tell."""
        return [*self.sources, *self.others]
