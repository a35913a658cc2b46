"""Student and objective as ONE module: what a trainer wraps, distributed wrappers included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from potstill.interfaces import IGNORED, Batch, Progress, Signals
from potstill.knowledge.capture import capture
from potstill.losses.objective import Objective, default_objective
from potstill.models.inputs import accepted_inputs, call, respond


@dataclass
class DistillationOutput(ModelOutput):  # type: ignore[misc]  # transformers is untyped here
    """What a :class:`DistillationModule` returns while it distils.

    Attributes:
        loss: the objective's total, 0-d, with a graph.
        logits: the student's main response.
        parts: each term's value before its weight, detached.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    parts: dict[str, Tensor] | None = None


class DistillationModule(nn.Module):
    """The student and the objective, with projectors and memories, as one module.

    Unknown attributes are the student's (``config``, ``gradient_checkpointing_enable``, …), so it can stand where the
    student could. Usable in a bare loop, in :class:`DistillationTrainer` and in Lightning.

    Args:
        student: the model that learns.
        objective: what it minimises; :func:`default_objective` if omitted.
        forward: ``(model, batch) -> responses``, e.g. a task's; by default the student gets the entries of the batch
            that its forward accepts.
        responses: names that come from the student's output; every other signal of the objective is tapped.

    Example:
        >>> student = nn.Linear(4, 3)
        >>> module = DistillationModule(student, responses=("logits",))
        >>> batch = {"features": torch.randn(2, 4), "labels": torch.tensor([0, 2])}
        >>> module({"logits": torch.randn(2, 3)}, **batch).loss.ndim
        0
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective | None = None,
        *,
        forward: Callable[[nn.Module, Batch], Signals] | None = None,
        responses: tuple[str, ...] = ("logits",),
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective or default_objective()
        self.responses = responses
        self._respond = forward or respond
        accepted_inputs(student)  # looked up once, before a compiler traces the forward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("student"), name)

    @property
    def accepts(self) -> frozenset[str]:
        """Names that the student's forward accepts; empty for a plain module that takes its input by position."""
        return accepted_inputs(self.student) or frozenset()

    @property
    def taps(self) -> list[str]:
        """Every signal of the student that is read beside its responses."""
        return self._taps(None)

    def _taps(self, progress: Progress | None) -> list[str]:
        return [name for name in self.objective.taps("student", progress) if name not in self.responses]

    def signals(self, batch: Batch, progress: Progress | None = None) -> Signals:
        """Return what the student says about a batch: its responses and the tapped signals.

        Args:
            batch: the inputs.
            progress: the signals of terms whose weight is not 0 at this point of the training; of all if omitted.
        """
        with capture(self.student, self._taps(progress)) as tapped:
            answered = self._respond(self.student, batch)
        return {**answered, **tapped}

    def forward(
        self,
        teacher: Signals | None = None,
        counts: Mapping[str, Tensor] | None = None,
        progress: Progress | None = None,
        **batch: Tensor,
    ) -> Any:
        """Return the loss; with ``teacher=None`` exactly what the student returns.

        Args:
            teacher: the teacher's signals; an empty mapping for an objective without a teacher.
            counts: see :meth:`Objective.forward`.
            progress: where the training stands.
            batch: the inputs, labels, masks and ``sample_id``.

        Returns:
            :class:`DistillationOutput`, or the student's own output.

        Raises:
            ObjectiveError: signals, labels or masks do not fit.
            SignalError: a tap is wrong.
        """
        if teacher is None:
            return call(self.student, batch, labels=True)
        said = self.signals(batch, progress or Progress())
        loss, parts = self._loss(said, teacher, batch, progress, counts)
        return DistillationOutput(loss=loss, logits=said.get(self.responses[0]), parts=parts)

    def _loss(
        self,
        said: Signals,
        teacher: Signals,
        batch: Batch,
        progress: Progress | None,
        counts: Mapping[str, Tensor] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        shared = self.student.parameters() if self.objective.balance is not None else None
        output = self.objective(said, teacher, batch, progress, counts, shared)
        return output.total, output.parts

    @torch.no_grad()
    def materialize(self, teacher: Signals, batch: Batch) -> None:
        """Make the projectors that the objective asks for by name, by one dry run of the student on ``batch``."""
        from potstill.knowledge.alignment import make_projector

        if not self.objective.pending_projectors():
            return
        was_training = self.student.training
        self.student.eval()
        try:
            self.objective.materialize(self.signals(batch), teacher, make_projector)
        finally:
            self.student.train(was_training)


def hard_loss(objective: Objective, said: Signals, batch: Batch, progress: Progress) -> Tensor | None:
    """Return the hard terms that count now, of what the student says without taps; ``None`` where there are none."""
    labels = batch["labels"]
    logits = next(iter(said.values()))
    if labels.shape != logits.shape[: labels.ndim]:
        return None
    if not bool((labels != IGNORED).any()):
        return None
    terms = {name: term for name, term in objective.named_terms() if set(term.student) <= set(said)}
    terms = {name: term for name, term in terms.items() if term.weight_at(progress) != 0}
    if not terms:
        return None
    total: Tensor = Objective(terms, response_mask=objective.response_mask)(said, {}, batch, progress).total
    return total.detach()
