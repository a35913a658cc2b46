"""Everything that is examined, and what its models answered, asked once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from potstill.checks.batches import Answers, batch_size, classes_of, is_one_a_class, rows
from potstill.checks.watch import OutsideTableError, Watch, inside_tables, preserved
from potstill.interfaces import IGNORED, Batch, Progress, Signals, TeacherSource
from potstill.losses.objective import Objective, Term
from potstill.models.inputs import TEACHER_PREFIX
from potstill.training.module import DistillationModule

FEW = 8
"""Samples on which the set-up is tried out."""

_CHUNK = 64
_TIMES = (Progress(0, 1000), Progress(500, 1000), Progress(999, 1000))


class UnansweredError(Exception):
    """A model or term cannot answer; the check ``signals``, ``tokenizer``, ``label-range`` or ``shapes`` says why."""


@dataclass(frozen=True)
class Feed:
    """How a model is fed, and how it was when it was trained.

    Attributes:
        fed: the processor that makes its inputs here.
        own: the one that it came with; ``None`` where it came without.
        learns: whether the model is trained here, so that it can get used to other inputs.
    """

    fed: Any
    own: Any
    learns: bool = False


@dataclass
class Subject:
    """What is examined; all that is optional is left out of the checks where it is missing.

    Attributes:
        student: the model that learns.
        objective: what it minimises.
        batch: a batch of the training, as the trainer gets it.
        teachers: the teachers by name.
        forward: ``(model, batch) -> responses``; as in :class:`potstill.training.module.DistillationModule`.
        responses: names that come from the models' outputs and are no taps.
        answers: how the task reads its answers from logits, for the accuracy; the greatest logit if omitted.
        judged: up to 512 samples without random views, of the validation split if there is one.
        trained: names of the teachers that are trained already.
        optimizer: gives what trains the student, once the projectors are made.
        tables: the data by split.
        label: the column of the label in them.
        unlabelled: what stands there for no label.
        inputs: the columns from which the models' inputs are made.
        label_names: names of the classes in the order of their ids.
        feeds: how models are fed, by the teacher's name or ``student``.
        texts: a few texts of the data, for the tokenizers.
        strict: whether what may well be meant is an error: a teacher that is no better than chance, a test split that
            was trained on, a column that predicts the label alone.
        autocast: the precision in which models answer.
    """

    student: nn.Module
    objective: Objective
    batch: Batch
    teachers: Mapping[str, TeacherSource] = field(default_factory=dict)
    forward: Callable[[nn.Module, Batch], Signals] | None = None
    responses: tuple[str, ...] = ("logits",)
    answers: Answers | None = None
    judged: Batch | None = None
    trained: frozenset[str] = frozenset()
    optimizer: Callable[[], torch.optim.Optimizer | None] | None = None
    tables: Mapping[str, Dataset] = field(default_factory=dict)
    label: str | None = None
    unlabelled: int = IGNORED
    inputs: Sequence[str] = ()
    label_names: Sequence[str] = ()
    feeds: Mapping[str, Feed] = field(default_factory=dict)
    texts: Sequence[str] = ()
    strict: bool = False
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let the models answer inside the block; at its end all is as it was, layers made for it included."""
        waiting = self.objective.pending_projectors()
        pending = [(term, term.projector, copy.deepcopy(term.loss)) for name, term in self.terms() if name in waiting]
        states = {name: _state(source) for name, source in self.teachers.items()}
        with preserved([self.student, self.objective]):
            try:
                yield
            finally:
                for watch in self.watches.values():
                    watch.restore()
                for name, state in states.items():
                    if state is not None:
                        restore: Any = self.teachers[name]
                        restore.load_state_dict(state)
                for term, projector, loss in pending:
                    term.projector, term.loss = projector, loss

    # ---- what the models say ---------------------------------------------------------------------------------------

    @cached_property
    def watches(self) -> dict[str, Watch]:
        """What was seen of each teacher."""
        return {name: Watch() for name in self.teachers}

    @cached_property
    def few(self) -> Batch:
        """The first samples of the training batch."""
        return rows(self.batch, 0, FEW)

    def ask(self, name: str, batch: Batch) -> Signals:
        """Return what a teacher says, watched."""
        with self.watches[name], self.autocast():
            return self.teachers[name](dict(batch))

    @cached_property
    def replies(self) -> dict[str, Signals | Exception]:
        """What each teacher says about the few samples, or what stopped it."""
        found: dict[str, Signals | Exception] = {}
        for name in self.teachers:
            try:
                found[name] = self.ask(name, self.few)
            except Exception as error:  # a teacher may be any callable
                found[name] = error
        return found

    def answer(self, name: str) -> Signals:
        """Return what a teacher says about the few samples.

        Raises:
            UnansweredError: it cannot.
        """
        found = self.replies[name]
        if isinstance(found, Exception):
            raise UnansweredError(name) from found
        return found

    @cached_property
    def taught(self) -> Signals:
        """All that the teachers say about the few samples, as the objective names it."""
        each = {name: self.answer(name) for name in self.teachers}
        found = {f"{name}/{key}": value for name, signals in each.items() for key, value in signals.items()}
        return {**found, **(next(iter(each.values())) if len(each) == 1 else {})}

    @cached_property
    def module(self) -> DistillationModule:
        """Student and objective as they are trained."""
        return DistillationModule(self.student, self.objective, forward=self.forward, responses=self.responses)

    @cached_property
    def said_or_error(self) -> Signals | Exception:
        """What the student says about the few samples, in train mode and with a graph, or what stopped it."""
        self.student.train()
        own = {name: value for name, value in self.few.items() if not name.startswith(TEACHER_PREFIX)}
        try:
            with inside_tables(), self.autocast():
                return self.module.signals(own)
        except Exception as error:  # so may a student
            return error

    @property
    def said(self) -> Signals:
        """What the student says about the few samples.

        Raises:
            UnansweredError: it cannot.
        """
        found = self.said_or_error
        if isinstance(found, Exception):
            raise UnansweredError("student") from found
        return found

    @cached_property
    def _judgements(self) -> dict[str, Tensor]:
        return {}

    def judgement(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return a teacher's logits [N, …, C] and the labels [N, …] of the judged samples, where it can be judged.

        It cannot where no term reads its logits: it may well have been trained for other classes.
        """
        if self.judged is None or name not in self.trained or not self.is_read(name) or "labels" not in self.judged:
            return None
        self.answer(name)
        if name not in self._judgements:
            self._judgements[name] = self.logits(name, self.judged)
        logits, labels = self._judgements[name], self.judged["labels"].cpu()
        fits = logits.shape[:-1] == labels.shape and not labels.is_floating_point() and logits.ndim > 1
        return (logits, labels) if fits else None

    def right(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return which of a teacher's answers to judged samples with a label are right, and the labels."""
        judged = self.judgement(name)
        guesses = None if judged is None else classes_of(judged[0], self.answers)
        if judged is None or guesses is None:
            return None
        known = judged[1] != IGNORED
        return (guesses == judged[1])[known], judged[1][known]

    def is_read(self, name: str) -> bool:
        """Return whether a term compares with a teacher's logits."""
        read = {signal for _, term in self.terms() for signal in term.teacher}
        return bool({self.responses[0], f"{name}/{self.responses[0]}"} & read)

    def class_count(self, logits: Tensor) -> int | None:
        """Return the number of classes: one a logit, or as the data name them where the task reads logits otherwise."""
        return logits.shape[-1] if is_one_a_class(logits, self.answers) else len(self.label_names) or None

    @torch.no_grad()
    def logits(self, name: str, batch: Batch) -> Tensor:
        """Return a teacher's logits on many samples, float32 on the CPU."""
        size = batch_size(batch)
        parts = [rows(batch, start, start + _CHUNK) for start in range(0, size, _CHUNK)]
        return torch.cat([self.ask(name, part)[self.responses[0]].detach().float().cpu() for part in parts])

    def outside_table(self, name: str) -> OutsideTableError | None:
        """Return what stopped a teacher, or ``student``, that was given tokens that it does not have."""
        found = self.said_or_error if name == "student" else self.replies[name]
        ids = [value for key, value in self.few.items() if key.rpartition("/")[2] == "input_ids"]
        if not isinstance(found, OutsideTableError):
            return None
        is_token = any(found.asked in (int(value.max()), int(value.min())) for value in ids)
        return found if is_token else None  # else too many positions

    def labels_outside(self) -> tuple[int, int, int] | None:
        """Return least label, greatest label and number of classes where a label of the batch is no class."""
        labels, logits = self.batch.get("labels"), self.said.get(self.responses[0])
        if labels is None or logits is None or labels.is_floating_point() or logits.ndim != labels.ndim + 1:
            return None
        known, count = labels[labels != IGNORED], self.class_count(logits)
        if count is None or not known.numel() or (int(known.min()) >= 0 and int(known.max()) < count):
            return None
        return int(known.min()), int(known.max()), count

    # ---- the terms -------------------------------------------------------------------------------------------------

    def terms(self) -> list[tuple[str, Term]]:
        """Return the terms with their names, without those that have weight 0 from the first step to the last."""
        return [(name, term) for name, term in self.objective.named_terms() if not term.never]

    def materialize(self) -> None:
        """Make the projectors that wait for their sizes.

        Raises:
            ObjectiveError: there is none of that kind.
        """
        if self.objective.pending_projectors():
            said = {name: value.detach() if isinstance(value, Tensor) else value for name, value in self.said.items()}
            from potstill.knowledge.alignment import make_projector

            self.objective.materialize(said, self.taught, make_projector)
            self.objective.to(next(self.student.parameters()).device)

    def value(self, name: str, term: Term, said: Signals, taught: Signals) -> Tensor | None:
        """Return one term on the few samples, before its weight; ``None`` where it never has one.

        Raises:
            ObjectiveError: its signals, labels or masks do not fit.
            UnansweredError: it compares with labels that are no classes.
        """
        if "labels" in term._accepts and self.labels_outside() is not None:
            raise UnansweredError(name)
        alone = Objective({name: term}, response_mask=self.objective.response_mask)
        for progress in _TIMES:
            weight = term.weight_at(progress)
            if weight:
                total: Tensor = alone(said, taught, self.few, progress).total
                return total / weight
        return None


def whose_is(name: str) -> str:
    """Return a model's name as a message has it."""
    return "the student" if name == "student" else f"the teacher '{name}'"


def _state(source: Any) -> Any:
    if isinstance(source, nn.Module) or not (hasattr(source, "state_dict") and hasattr(source, "load_state_dict")):
        return None
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in source.state_dict().items()}
