"""Offline distillation: trained teachers, one student. The scheme of Hinton et al. (2015)."""

from __future__ import annotations

from potstill.registry import schemes
from potstill.schemes.lesson import Lesson


@schemes.register("offline", reference="https://arxiv.org/abs/1503.02531")
class Offline:
    """Every learner minimises the objective that it was given. See :class:`potstill.interfaces.Scheme`."""

    def __init__(self) -> None:
        """Take no options."""

    def arrange(self, lesson: Lesson) -> Lesson:
        """Return the lesson as it is."""
        return lesson
