"""Losses with parameters of their own, whose shapes come from the signals that they compare."""

from __future__ import annotations

from typing import Any

from torch import nn


class SizedLoss(nn.Module):
    """Base of a loss whose parameters are made by a dry run of teacher and student.

    A subclass overrides :meth:`build` and makes its layers there; in a training that happens before the optimizer is
    made. In a loop of one's own, call :meth:`materialize` once, and give the loss's parameters to the optimizer too.

    Attributes:
        pending: whether the parameters are still to be made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pending = True

    def materialize(self, student: Any, teacher: Any) -> None:
        """Make the parameters for signals of these shapes; nothing where they are made already.

        Args:
            student: the student's signal on some batch, a tuple where the term lists several.
            teacher: the teacher's on the same batch.
        """
        if self.pending:
            self.build(student, teacher)
            self.pending = False

    def build(self, student: Any, teacher: Any) -> None:
        """Make the layers, on the device of the student's signal.

        Raises:
            ObjectiveError: the loss cannot compare signals of these shapes.
        """
        raise NotImplementedError
