"""Deep mutual learning: models that learn together, each from the labels and from the answers of the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from potstill.errors import TrainingError
from potstill.interfaces import Progress
from potstill.losses.objective import Objective, Term, default_objective
from potstill.losses.ramps import Number, Ramp
from potstill.registry import schemes
from potstill.schemes.lesson import SELF, STUDENT, Lesson
from potstill.schemes.progressive import is_layer


@schemes.register("mutual", reference="https://arxiv.org/abs/1706.00384")
class Mutual:
    """Let every learner learn from all others as the student does: of K models, each from the K − 1 others.

    With the objective ``{hard: {loss: cross_entropy}, soft: {loss: kl}}`` the loss of learner k is that of the paper,
    CE(k) + 1/(K − 1) · Σ KL(p_l ‖ p_k) over the others l, whose answers get no gradient. All learners take their step
    at once, with answers of before it; the paper lets them take turns, each with the others' new answers.

    The objective of a learner that has none of its own is made of the student's:

    * A term on the labels is copied.
    * A term whose teacher has no name (``teacher: logits``) means all others, averaged: it becomes a term for each
      of them, ``NAME_PEER``, with the weight divided by K − 1. Between two others it is there where both sides read
      the same response, as ``logits`` and ``logits``.
    * A term that names one peer is between the two: the peer's has the roles swapped, and the same weight.
    * A term that names a teacher that does not learn, or ``self``, is copied if it reads responses. On layers it is
      the student's alone, as nobody said which layers of the peer correspond.

    Projectors are the student's; a swapped term that asks for one by its kind gets its own. The balance of gradients is
    the student's alone.

    Reference: Zhang et al. 2018, https://arxiv.org/abs/1706.00384.
    """

    def __init__(self) -> None:
        """Take no options."""

    def arrange(self, lesson: Lesson) -> Lesson:
        """Return a lesson in which all learn from all.

        Raises:
            TrainingError: nobody else learns, no term compares with one who does, or a term cannot be swapped.
        """
        if not lesson.others:
            raise TrainingError(
                "mutual expected another model that learns, and there is none; add for example "
                "`teachers: {peer: {model: MODEL, train: jointly}}`"
            )
        made = _Made(lesson)
        objective = lesson.student.objective or default_objective()
        for name, term in objective.named_terms():
            made.add(name, term)
        if not made.compares:
            raise TrainingError(
                f"mutual expected a term that compares the student with {' or '.join(lesson.others)}, and the "
                "objective has none; add for example `objective: {soft: {loss: kl}}`"
            )
        others = dict(lesson.others)
        for name, learner in lesson.others.items():
            if made.terms.get(name):
                terms = Objective(made.terms[name], response_mask=objective.response_mask)
                others[name] = replace(learner, objective=terms)
        settings = None if objective.balance is None else objective.balance.settings
        own = Objective(made.terms[STUDENT], response_mask=objective.response_mask, balance=settings)
        return replace(lesson, student=replace(lesson.student, objective=own), others=others)


@dataclass(frozen=True, eq=False)
class _Part:
    """A weight of one's own, divided."""

    weight: Callable[[Progress], float]
    by: int

    def __call__(self, progress: Progress) -> float:
        return float(self.weight(progress)) / self.by

    def __str__(self) -> str:
        return f"{self.weight}/{self.by}"


class _Turned(nn.Module):
    """An alignment of two signals, with their sides exchanged."""

    def __init__(self, align: Callable[[Any, Any], tuple[Any, Any]]) -> None:
        super().__init__()
        self.align = align

    def forward(self, student: Any, teacher: Any) -> tuple[Any, Any]:
        one, other = self.align(teacher, student)
        return other, one


class _Made:
    """The terms of each learner whose objective is made, the student's among them."""

    def __init__(self, lesson: Lesson) -> None:
        self.lesson = lesson
        self.peers = list(lesson.others)
        self.made = [name for name, learner in lesson.others.items() if not learner.given]
        self.terms: dict[str, dict[str, Term]] = {name: {} for name in [STUDENT, *self.made]}
        self.compares = False

    def add(self, name: str, term: Term) -> None:
        """Add a term of the student's, and what it is for the others."""
        owners = {self._owner(signal) for signal in term.teacher}
        if owners == {""}:
            self._spread(name, term)
            return
        self.terms[STUDENT][name] = copy.deepcopy(term)
        named = owners & set(self.peers)
        self.compares |= bool(named)
        if not named:
            for peer in self.made if not self._reads_layers(term) else []:
                self.terms[peer][name] = copy.deepcopy(term)
        elif len(owners) == 1:
            for peer in named & set(self.made):
                own = [signal.removeprefix(f"{peer}/") for signal in term.teacher]
                self.terms[peer][name] = self._swapped(name, term, peer, own)
        elif named & set(self.made):
            raise TrainingError(
                f"mutual: the term '{name}' compares with several models at once, so it cannot be swapped for "
                f"{' and '.join(sorted(named))}; give each an objective of its own"
            )

    def _spread(self, name: str, term: Term) -> None:
        """Add a term that means all others."""
        self.compares = True
        count = len(self.peers)
        for learner in self.terms:
            for other in [each for each in [STUDENT, *self.peers] if each != learner]:
                if learner == STUDENT:
                    part = _towards(term, other)
                elif other == STUDENT:
                    part = self._swapped(name, term, learner, term.teacher)
                elif term.student == term.teacher and not self._reads_layers(term):
                    part = _towards(term, other)
                else:
                    continue
                part.weight = _divided(term.weight, count)
                self.terms[learner][name if count == 1 else f"{name}_{other}"] = part

    def _swapped(self, name: str, term: Term, peer: str, own: Sequence[str]) -> Term:
        """Return a term of a peer's that compares it with the student, as the student's does with the peer."""
        if term.projector is not None and term.project_kind is None:
            raise TrainingError(
                f"mutual: the term '{name}' has a projector of its own, which maps the student to '{peer}' and not "
                f"back; name a kind, such as `project: linear`, or give '{peer}' an objective of its own"
            )
        loss = copy.deepcopy(term.loss) if isinstance(term.loss, nn.Module) else term.loss
        return Term(
            term.factory or loss,
            list(own),
            [f"{STUDENT}/{signal}" for signal in term.student],
            weight=term.weight,
            mask=term.mask,
            project=term.project_kind,
            align=None if term.align is None else _Turned(term.align),
            scale=term.scale,
            **{**term.made_with, **term.options},
        )

    def _owner(self, signal: str) -> str:
        """Return whose a teacher's signal is; empty where no name is said."""
        owner, slash, _ = signal.partition("/")
        return owner if slash and owner in {SELF, *self.lesson.names} else ""

    def _reads_layers(self, term: Term) -> bool:
        own: Iterable[str] = [*term.student, *(signal.rpartition("/")[2] for signal in term.teacher)]
        return any(is_layer(self.lesson.student.model, signal) for signal in own)


def _towards(term: Term, peer: str) -> Term:
    """Return a copy of a term that means one peer."""
    part = copy.deepcopy(term)
    part.teacher = tuple(f"{peer}/{signal}" for signal in term.teacher)
    return part


def _divided(weight: Number, by: int) -> Number:
    if by == 1:
        return weight
    if isinstance(weight, Ramp):
        return replace(weight, start=weight.start / by, stop=weight.stop / by)
    return _Part(weight, by) if callable(weight) else weight / by
