"""Offline distillation: fixed teachers, one student. The scheme of Hinton et al. (2015)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from potstill.interfaces import Progress, TeacherSource
from potstill.registry import schemes
from potstill.teachers.live import Several


@schemes.register("offline", reference="https://arxiv.org/abs/1503.02531")
class Offline:
    """Trained teachers, unchanged, teach one student. See :class:`potstill.interfaces.Scheme`."""

    def __init__(self) -> None:
        self._student: nn.Module | None = None
        self._teachers: dict[str, TeacherSource] = {}

    def setup(self, student: nn.Module, teachers: Mapping[str, TeacherSource]) -> None:
        """Take the student and its teachers.

        Args:
            student: the model that learns.
            teachers: name to source; with one, its signals keep their names, with several they are ``NAME/SIGNAL``.
        """
        self._student = student
        self._teachers = dict(teachers)

    def learners(self) -> Mapping[str, nn.Module]:
        """Return the student."""
        return {"student": self._student} if self._student is not None else {}

    def sources(self, progress: Progress) -> Mapping[str, TeacherSource]:
        """Return the one source that the student sees, the same throughout."""
        if len(self._teachers) > 1:
            return {"teacher": Several(self._teachers)}
        return dict(zip(["teacher"], self._teachers.values(), strict=False))

    def after_step(self, progress: Progress) -> None:
        """Do nothing: the teachers stay as they are."""
