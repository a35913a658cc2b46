"""Student and objective as ONE module: what a trainer wraps, distributed wrappers included."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from potstill.interfaces import IGNORED, Batch, Progress, Signals
from potstill.knowledge.capture import capture
from potstill.losses.objective import Objective, default_objective
from potstill.models.inputs import accepted_inputs, call, respond
from potstill.schemes.lesson import SELF, STUDENT, Extension

_OWN = f"{SELF}/"


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
        extension: layers that the student has only while it learns, such as exits.

    A term may read ``self/SIGNAL`` as its teacher: what the student itself says, cut from its graph.

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
        extension: Extension | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective or default_objective()
        self.responses = responses
        self.extension = extension
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

    def taught(self, progress: Progress | None = None) -> list[str]:
        """Return the signals that terms read from teachers: not from the student itself."""
        return [name for name in self.objective.taps("teacher", progress) if not name.startswith(_OWN)]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return each term's number of valid positions; see :meth:`Objective.counts`."""
        return self.objective.counts(batch)

    def own_taps(self, progress: Progress | None = None) -> list[str]:
        """Return the signals that the student teaches itself."""
        read = self.objective.taps("teacher", progress)
        return [name.removeprefix(_OWN) for name in read if name.startswith(_OWN)]

    def _taps(self, progress: Progress | None, also: Collection[str] = ()) -> list[str]:
        wanted = [*self.objective.taps("student", progress), *self.own_taps(progress), *also]
        extension = self.extension
        if extension is not None:
            wanted = [*(name for name in wanted if not extension.makes(name)), *extension.taps()]
        return [name for name in dict.fromkeys(wanted) if name not in self.responses]

    def signals(self, batch: Batch, progress: Progress | None = None, also: Collection[str] = ()) -> Signals:
        """Return what the student says about a batch: its responses, the tapped signals, those of its extension.

        Args:
            batch: the inputs.
            progress: the signals of terms whose weight is not 0 at this point of the training; of all if omitted.
            also: signals that others read.
        """
        extension = self.extension if self.student.training else None
        held = nullcontext() if extension is None else extension.around(self.student, batch, progress or Progress())
        taps = self._taps(progress, also)
        with held, capture(self.student, taps) as tapped:
            answered = self._respond(self.student, batch)
        said = {**answered, **tapped}
        if self.extension is None or self._is_pending:
            return said
        return {**said, **self.extension(said, batch)}

    @property
    def _is_pending(self) -> bool:
        return self.extension is not None and self.extension.pending

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
        heard = {**teacher, **self.own_signals(said, progress)}
        output = self.objective(said, heard, batch, progress, counts, shared)
        return output.total, output.parts

    @property
    def learners(self) -> dict[str, DistillationModule]:
        """Every learner by name: the student."""
        return {STUDENT: self}

    @property
    def pending(self) -> bool:
        """Whether projectors, losses or exits wait for :meth:`materialize`."""
        return self.waits

    @property
    def waits(self) -> bool:
        """Whether layers of this learner wait for :meth:`materialize`."""
        return bool(self._is_pending or self.objective.pending_projectors())

    @torch.no_grad()
    def materialize(self, teacher: Signals, batch: Batch) -> None:
        """Make the layers whose sizes depend on signals, by one dry run of the student on ``batch``."""
        if not self.pending:
            return
        self.materialize_extension(batch)
        said = self.dry_run(batch)
        self.fit(said, {**teacher, **self.own_signals(said)})

    def own_signals(self, said: Signals, progress: Progress | None = None) -> Signals:
        """Return what the student teaches itself, as ``self/SIGNAL``."""
        return {f"{_OWN}{name}": said[name] for name in self.own_taps(progress)}

    @torch.no_grad()
    def dry_run(self, batch: Batch, also: Collection[str] = ()) -> Signals:
        """Return what the student says in eval mode."""
        was_training = self.training
        self.eval()
        try:
            return self.signals(batch, also=also) if also else self.signals(batch)
        finally:
            self.train(was_training)

    def materialize_extension(self, batch: Batch) -> None:
        """Make the layers of the extension, by a dry run on ``batch``; nothing if there are none to make."""
        if self.extension is not None and self.extension.pending:
            self.extension.materialize(self.dry_run(batch))

    def fit(self, said: Signals, teacher: Signals) -> None:
        """Make the projectors that the objective asks for by name, for signals of these shapes."""
        from potstill.knowledge.alignment import make_projector

        self.objective.materialize(said, teacher, make_projector)


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
