"""Progressive distillation: the blocks of a student begin to learn one after another, from the first to the last."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal

from torch import nn

from potstill.errors import ModelError, TrainingError, did_you_mean
from potstill.interfaces import Progress
from potstill.losses.objective import Objective, Term
from potstill.losses.ramps import Number, at
from potstill.models.student import find_blocks
from potstill.registry import import_dotted, schemes
from potstill.schemes.lesson import STUDENT, Learner, Lesson

When = Literal["last", "throughout"]
"""From when on a term counts that reads no block: with the last block, or from the first step."""

_NUMBERED = re.compile(r"(?:.+\.)?(?:cross_)?(?:hidden|attention|query|key|value)\.(\d+)(?:@\d+)?")
_PATH = re.compile(r"(?:(?:input|clone):)?(?P<path>[^:@]+).*")
_IN_PATH = re.compile(r"(?P<before>.+?)\.(?P<number>\d+)(?:\..+)?")
_TOLERANCE = 1e-6  # of the sum of shares


@dataclass(frozen=True, eq=False)
class Phase:
    """A weight that is 0 before its phase begins, and from then on what it was.

    Attributes:
        weight: a number, a ramp over the whole training (not over the phase) or a callable of the progress.
        begin: share of the training that is done when the phase begins.
    """

    weight: Number
    begin: Fraction

    def __call__(self, progress: Progress) -> float:
        """Return the weight at this point: of N steps the first one that has it is ceil(N · begin), to the step."""
        if progress.step * self.begin.denominator < max(1, progress.total_steps) * self.begin.numerator:
            return 0.0
        return float(at(self.weight, progress))

    def __str__(self) -> str:
        return f"({self.weight} from {self.begin} of the training on)"


@schemes.register("progressive", reference="https://arxiv.org/abs/2004.02984")
class Progressive:
    """Teach the first block at first, then the second one too, and so on; the responses come with the last.

    With S blocks that terms read there are S phases. Phase k adds the terms that read block k (``hidden.k``,
    ``attention.k``, …; a term that reads several blocks waits for the deepest, one on the embeddings ``hidden.0`` is
    there from the start), and those of the phases before stay. The formulas that ``potstill show`` prints say when each
    term begins. Every learner whose objective reads two blocks or more is taught so.

    Blocks are never frozen. MobileBERT trains them likewise from the bottom up, and freezes those below or lets them
    learn at a lower rate; Wang et al. replace the blocks of the teacher one by one.

    Args:
        schedule: how long the phases last: ``linear``, all as long; ``exponential``, each ``ratio`` times as long as
            the one before it; ``custom``, as ``shares`` says.
        ratio: of an exponential schedule, above 0; below 1 the first phase is the longest.
        shares: of a custom schedule: the share of the training that each phase lasts, which sum to 1; or a function,
            or its dotted path ``package.module:function``, that is given the number of phases and returns the shares.
        response: when terms on responses such as ``logits`` begin.
        hard: when terms on the labels begin.
        order: the student's signals from the first layer to the last, such as ``[layer1, layer2, layer3]``. Without
            it, blocks count by their numbers, also by the one in a path such as ``bert.encoder.layer.3``; paths
            without numbers, or whose numbers count different things, come in the order of the terms.

    Raises:
        TrainingError: shares that do not fit.

    Reference: Sun et al. 2020 (MobileBERT), https://arxiv.org/abs/2004.02984; Wang et al. 2018, Progressive Blockwise
    Knowledge Distillation, https://www.ijcai.org/proceedings/2018/0384.pdf.
    """

    def __init__(
        self,
        *,
        schedule: Literal["linear", "exponential", "custom"] = "linear",
        ratio: float = 2.0,
        shares: list[float] | str | Callable[[int], Sequence[float]] | None = None,
        response: When = "last",
        hard: When = "last",
        order: list[str] | None = None,
    ) -> None:
        if ratio <= 0:
            raise TrainingError(f"progressive expected a ratio above 0, got {ratio}")
        if (schedule == "custom") != (shares is not None):
            raise TrainingError("progressive takes `shares` with `schedule: custom`, and with no other schedule")
        self.schedule, self.ratio, self.shares = schedule, ratio, shares
        self.response, self.hard, self.order = response, hard, order

    def arrange(self, lesson: Lesson) -> Lesson:
        """Return a lesson whose terms begin one after another.

        Raises:
            TrainingError: the student's objective reads fewer than two blocks, or their order is not known.
        """
        others = {name: self._taught(name, learner, lesson) for name, learner in lesson.others.items()}
        return replace(lesson, student=self._taught(STUDENT, lesson.student, lesson), others=others)

    def _taught(self, name: str, learner: Learner, lesson: Lesson) -> Learner:
        objective = learner.objective
        if objective is None:  # the student's hard terms, as they were before
            own = lesson.student.objective
            return learner if own is None else replace(learner, objective=own.hard_only())
        terms = {key: term for key, term in objective.named_terms() if not term.never}
        blocks = self._blocks(learner.model, terms)
        places = sorted({place for place in blocks.values() if place > 0})
        if len(places) < 2:
            if name == STUDENT:
                raise TrainingError(
                    "progressive expected an objective that reads two blocks of the student or more, got "
                    f"{len(places)}; add for example `objective: {{hint: {{loss: mse, student: hidden, teacher: "
                    "hidden, layers: {1: 2, 2: 4}, project: auto}}`"
                )
            return learner
        begins = self._begins(len(places))
        starts = {key: begins[places.index(place)] if place else begins[0] for key, place in blocks.items()}
        late = {key: self.hard if term.hard else self.response for key, term in terms.items() if key not in blocks}
        starts |= {key: begins[-1] if when == "last" else begins[0] for key, when in late.items()}
        _check_first(terms, starts)
        return replace(learner, objective=_phased(objective, starts))

    def _blocks(self, model: nn.Module, terms: Mapping[str, Term]) -> dict[str, int]:
        """Return the deepest block that each term reads, where it reads blocks alone."""
        layered = {key: t.student for key, t in terms.items() if all(is_layer(model, signal) for signal in t.student)}
        signals = list(dict.fromkeys(signal for read in layered.values() for signal in read))
        places = self._places(model, signals)
        return {key: max(places[signal] for signal in read) for key, read in layered.items()}

    def _places(self, model: nn.Module, signals: Sequence[str]) -> dict[str, int]:
        """Return a number of each signal that grows with its depth; 0 for the embeddings."""
        if self.order is not None:
            for signal in signals:
                if signal not in self.order:
                    raise TrainingError(
                        f"progressive: a term reads '{signal}', which `order` lacks; {did_you_mean(signal, self.order)}"
                    )
            return {signal: self.order.index(signal) + 1 for signal in signals}
        numbers = {signal: int(match[1]) for signal in signals if (match := _NUMBERED.fullmatch(signal))}
        paths = {signal: _path(signal) for signal in signals if signal not in numbers}
        if not paths:
            return numbers
        found = {signal: _IN_PATH.fullmatch(path) for signal, path in paths.items()}
        counted = {signal: int(match["number"]) + 1 for signal, match in found.items() if match}
        stacks = {match["before"] for match in found.values() if match}
        if len(counted) == len(paths) and len(stacks) == 1 and (not numbers or stacks == {_stack(model)}):
            return numbers | counted
        if numbers:
            mixed = ", ".join(signals)
            raise TrainingError(f"progressive cannot tell the order of {mixed}; say `scheme: {{order: [{mixed}]}}`")
        return {signal: place for place, signal in enumerate(paths, 1)}

    def _begins(self, count: int) -> list[Fraction]:
        """Return the share of the training that is done when each phase begins, exactly."""
        if self.schedule == "custom":
            lengths = self._custom(count)
        else:
            ratio = Fraction(str(self.ratio)) if self.schedule == "exponential" else Fraction(1)
            lengths = [ratio**place for place in range(count)]
        ends = list(accumulate(lengths))
        return [Fraction(0), *(end / ends[-1] for end in ends[:-1])]

    def _custom(self, count: int) -> list[Fraction]:
        function: Any = import_dotted(self.shares) if isinstance(self.shares, str) else self.shares
        given = list(function(count) if callable(function) else function)
        total = sum(given)
        if len(given) != count or min(given, default=0) <= 0 or abs(total - 1) > _TOLERANCE:
            raise TrainingError(
                f"progressive expected {count} shares above 0 that sum to 1, one a block that terms read, got "
                f"{given}, which sum to {total:g}"
            )
        return [Fraction(str(float(share))) for share in given]


def is_layer(model: nn.Module, signal: str) -> bool:
    """Return whether a signal is read inside a model: ``hidden.n`` and its kin, or at a module's path."""
    if signal == "logits":
        return False
    if _NUMBERED.fullmatch(signal):
        return True
    try:
        return model.get_submodule(_path(signal)) is not model
    except AttributeError:
        return False


def _path(signal: str) -> str:
    match = _PATH.fullmatch(signal)
    return signal if match is None else match["path"]


def _stack(model: nn.Module) -> str | None:
    try:
        return find_blocks(model)
    except ModelError:
        return None


def _phased(objective: Objective, starts: Mapping[str, Fraction]) -> Objective:
    """Return an objective of copies of the terms, each with its phase."""
    terms: dict[str, Term] = {}
    for key, term in objective.named_terms():
        terms[key] = copy.deepcopy(term)
        if starts.get(key):
            terms[key].weight = Phase(term.weight, starts[key])
    made = Objective(terms, response_mask=objective.response_mask)
    made.balance = copy.deepcopy(objective.balance)
    return made


def _check_first(terms: Mapping[str, Term], starts: Mapping[str, Fraction]) -> None:
    first = [key for key, begin in starts.items() if begin == 0]
    if not any(terms[key].weight_at(Progress()) for key in first):
        raise TrainingError(
            f"progressive begins with {', '.join(first)} alone, whose weight begins at 0; let it begin above 0, or "
            "say `scheme: {hard: throughout}`"
        )
