"""The objective: the weighted sum of named terms, each a loss between two signals.

Every term is summed over the positions that count and divided by their number in the whole accumulation window over
all processes, so that splitting a batch changes nothing.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import ObjectiveError, did_you_mean
from potstill.interfaces import IGNORED, Batch, LossOutput, Progress, Signals, detach
from potstill.losses.ramps import Number, Ramp, as_number, at
from potstill.registry import losses

Mask = str | Callable[[Batch], Tensor | None] | None
_TOKEN_SIGNAL = re.compile(r"(^|[./])hidden\.\d+$")


class Term(nn.Module):
    """A loss, the two signals it compares, its weight, mask and projector.

    Args:
        loss: registered name, ``package.module:attribute`` or a callable; see :class:`potstill.interfaces.Loss`.
        student: name of the student's signal, or several for a loss that takes tuples.
        teacher: name of the teacher's signal, ``TEACHER/SIGNAL`` where there are several teachers; unused by hard
            losses.
        weight: factor of the term, a number, a ramp or a callable of the progress.
        mask: positions that count: the name of a batch entry, a callable of the batch, ``"none"`` for all. ``None``
            chooses: labels other than −100 for hard losses, ``attention_mask`` for ``hidden.n``, the task's mask for
            responses.
        project: module that maps the student's signal to the teacher's shape, or ``"linear"`` to make one by a dry
            run (see :meth:`Objective.materialize`).
        options: options of the loss; numbers may be ramps.

    Raises:
        ComponentError: there is no such loss.
        ObjectiveError: the loss has no such option.
    """

    def __init__(
        self,
        loss: str | Callable[..., Tensor],
        student: str | Sequence[str] = "logits",
        teacher: str | Sequence[str] = "logits",
        *,
        weight: Number | Mapping[str, Any] = 1.0,
        mask: Mask = None,
        project: str | nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        target: Any = losses.get(loss) if isinstance(loss, str) else loss
        self.loss_name = loss if isinstance(loss, str) else losses.name_of(loss)
        self.options = {name: as_number(value) for name, value in options.items()}
        ends = (Progress(), Progress(step=1)) if isinstance(loss, str) else ()
        found = [problem for end in ends for problem in losses.check(self.loss_name, _constants(self.options, end))]
        if found:
            raise ObjectiveError("; ".join(dict.fromkeys(str(problem) for problem in found)))
        self.factory: Any = None
        self.made_with: dict[str, Any] = {}
        if inspect.isclass(target):
            self.factory, self.made_with, self.options = target, self.options, {}
            target = _made(target, self.made_with, self.loss_name)
        self.loss = target
        call = target.forward if isinstance(target, nn.Module) else target
        self._accepts = frozenset(inspect.signature(call).parameters)
        component = type(target) if isinstance(target, nn.Module) else target
        facts = losses.facts(losses.name_of(self.factory or component))
        self.probabilities = bool(facts.get("probabilities", False))
        self.per = getattr(target, "per", facts.get("per", "position"))
        self.any_shape = bool(facts.get("any_shape", False)) or self.per == "batch"
        self.formula: str | None = facts.get("formula")
        self.hard = "teacher" not in self._accepts
        self.student = _names(student)
        self.teacher = () if self.hard else _names(teacher)
        self.weight = as_number(weight)
        if not (callable(self.weight) or isinstance(self.weight, int | float)):
            raise ObjectiveError(f"weight expected a number or a ramp `{{from: …, to: …}}`, got {weight!r}")
        self.mask = mask
        self.project_kind = project if isinstance(project, str) else None
        self.projector = project if isinstance(project, nn.Module) else None

    def weight_at(self, progress: Progress) -> float:
        """Return the weight at this point of the training."""
        return float(at(self.weight, progress))

    def ramps(self, progress: Progress) -> dict[str, float]:
        """Return the present value of the weight and of every option that changes while training goes on."""
        numbers = {"weight": self.weight, **self.options}
        return {name: float(at(value, progress)) for name, value in numbers.items() if callable(value)}

    def values(
        self,
        student: Signals,
        teacher: Signals,
        batch: Batch,
        progress: Progress,
        response_mask: Callable[[Batch], Tensor | None] | None = None,
    ) -> Tensor:
        """Return the unreduced loss, one value per position.

        Raises:
            ObjectiveError: a signal or the labels are missing, or the shapes differ.
        """
        arguments: list[Any] = [self._pick(student, self.student, "student")]
        if not self.hard:
            if self.projector is not None:
                arguments[0] = self.projector(arguments[0])
            arguments.append(self._pick(teacher, self.teacher, "teacher"))
            self._check_shapes(*arguments)
        extras = {"labels": batch.get("labels"), "index": batch.get("sample_id"), "progress": progress}
        keywords = {name: value for name, value in extras.items() if name in self._accepts}
        if "mask" in self._accepts:
            keywords["mask"] = self.mask_of(batch, response_mask)
        if "labels" in keywords and keywords["labels"] is None:
            raise ObjectiveError(f"{self.loss_name} compares with labels and the batch has none; drop the term")
        value: Tensor = self.loss(*arguments, **keywords, **{k: at(v, progress) for k, v in self.options.items()})
        return value

    @property
    def masks_tokens(self) -> bool:
        """Whether what is padding does not count."""
        usual = self.mask is None and _TOKEN_SIGNAL.search(self.student[0]) is not None
        return self.per != "batch" and (self.mask == "attention_mask" or usual)

    def mask_of(self, batch: Batch, response_mask: Callable[[Batch], Tensor | None] | None = None) -> Tensor | None:
        """Return the positions that count as a bool tensor, or ``None`` where every sample counts once.

        Raises:
            ObjectiveError: the batch has no entry of that name.
        """
        if callable(self.mask):
            return _as_bool(self.mask(batch))
        if self.mask == "none":
            return None
        if self.mask is not None:
            if self.mask not in batch:
                raise ObjectiveError(f"mask '{self.mask}' is not in the batch; {did_you_mean(self.mask, batch)}")
            return _as_bool(batch[self.mask])
        labels = batch.get("labels")
        if self.hard:
            return None if labels is None else _labelled(labels, self.probabilities)
        if _TOKEN_SIGNAL.search(self.student[0]):
            return _as_bool(batch.get("attention_mask"))
        if response_mask is not None:
            return _as_bool(response_mask(batch))
        tokens = labels is not None and labels.ndim > 1 and not labels.is_floating_point()
        return labels != IGNORED if tokens and labels is not None else None

    def describe(self, progress: Progress | None = None) -> str:
        """Return the term's formula with its numbers, for people."""
        student = ", ".join(f"student.{name}" for name in self.student)
        teacher = ", ".join(f"teacher.{name}" for name in self.teacher)
        if self.projector is not None or self.project_kind:
            student = f"{self.project_kind or type(self.projector).__name__}({student})"
        shown = {k: str(v) if isinstance(v, str) or callable(v) else f"{v:g}" for k, v in self._all_options().items()}
        weight = self.weight if isinstance(self.weight, int | float) else str(self.weight)
        smoothing = f" with label smoothing {shown['label_smoothing']}" if self.options.get("label_smoothing") else ""
        if self.formula:
            body = self.formula.format(student=student, teacher=teacher, **shown)
        else:
            rest = "".join(f", {name}={value}" for name, value in shown.items())
            body = f"{self.loss_name}({', '.join(part for part in (student, teacher) if part)}{rest})"
        return f"{weight} · {body}{smoothing}"

    def _all_options(self) -> dict[str, Any]:
        made = self.factory or self.loss
        declared = losses.options(made) if not isinstance(made, nn.Module) else {}
        values = {name: option.default for name, option in declared.items() if not option.required}
        values |= {**self.made_with, **self.options}
        return {k: v for k, v in values.items() if isinstance(v, int | float | str) or callable(v)}

    def _pick(self, signals: Signals, names: Sequence[str], side: str) -> Any:
        for name in names:
            if name not in signals:
                raise ObjectiveError(f"the {side} gave no signal '{name}'; {did_you_mean(name, signals)}")
        picked = tuple(signals[name] for name in names)
        return picked[0] if len(picked) == 1 else picked

    def _check_shapes(self, student: Any, teacher: Any) -> None:
        if self.any_shape or not (isinstance(student, Tensor) and isinstance(teacher, Tensor)):
            return
        if student.shape != teacher.shape:
            fix = "" if self.projector is not None else "; `project: linear` maps one to the other"
            raise ObjectiveError(
                f"{self.loss_name} expected signals of one shape, got student.{self.student[0]} {list(student.shape)} "
                f"and teacher.{self.teacher[0]} {list(teacher.shape)}{fix}"
            )


class Objective(nn.Module):
    """The weighted sum of named terms; owns their projectors and memories.

    Args:
        terms: name to term.
        response_mask: the task's mask, for terms on responses that name none.

    Example:
        >>> objective = Objective({"soft": Term("kl", weight=0.7, temperature=4.0),
        ...                        "hard": Term("cross_entropy", weight=0.3)})
        >>> sorted(objective.terms)
        ['hard', 'soft']
    """

    def __init__(
        self, terms: Mapping[str, Term], *, response_mask: Callable[[Batch], Tensor | None] | None = None
    ) -> None:
        super().__init__()
        if not terms:
            raise ObjectiveError("an objective needs at least one term")
        self.terms = nn.ModuleDict()
        for name, term in terms.items():
            if not name or hasattr(self.terms, name.replace(".", "_")):
                raise ObjectiveError(f"a term cannot be called '{name}': the name is taken; choose another")
            self.terms[name.replace(".", "_")] = term
        self.response_mask = response_mask

    def forward(
        self,
        student: Signals,
        teacher: Signals,
        batch: Batch,
        progress: Progress | None = None,
        counts: Mapping[str, Tensor] | None = None,
    ) -> LossOutput:
        """Return the weighted sum and the value of each term.

        Args:
            student: the student's signals.
            teacher: the teacher's signals, which get no gradient; empty where every term is hard.
            batch: masks, labels and sample ids, samples first.
            progress: where the training stands; its start if omitted.
            counts: the number of valid positions for each term in the whole accumulation window over all processes,
                divided by the number of processes where gradients are averaged; this batch's own if omitted.

        Raises:
            ObjectiveError: a signal is missing, shapes differ, or a mask does not fit.
        """
        progress = progress or Progress()
        teacher = detach(teacher)
        counts = counts or clamp_counts(self.counts(batch))
        parts: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        for name, term in self.named_terms():
            weight = term.weight_at(progress)
            if weight == 0:
                total = total + _touch(term)
                continue
            summed = self._summed(name, term, student, teacher, batch, progress)
            value = summed / counts[name].to(summed)
            parts[name] = value.detach()
            total = total + weight * value
        if not isinstance(total, Tensor):
            raise ObjectiveError("every term has weight 0 at this point of the training")
        return LossOutput(total, parts)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return each term's number of valid positions, from the batch alone: 0-d float64, may be 0."""
        return {name: self._count(term, batch) for name, term in self.named_terms()}

    def named_terms(self) -> Iterable[tuple[str, Term]]:
        """Yield the terms with their names."""
        for name, term in self.terms.items():
            if isinstance(term, Term):
                yield name, term

    def taps(self, side: str) -> list[str]:
        """Return the names of the signals that the terms read from the ``"student"`` or the ``"teacher"``."""
        names = [name for _, term in self.named_terms() for name in getattr(term, side)]
        return list(dict.fromkeys(names))

    def needs_teacher(self) -> bool:
        """Return whether any term compares with a teacher."""
        return any(not term.hard for _, term in self.named_terms())

    def needs_labels(self) -> list[str]:
        """Return the names of the terms that cannot do without labels."""
        return [name for name, term in self.named_terms() if "labels" in term._accepts]

    def hard_only(self) -> Objective:
        """Return the objective of the baseline: the hard terms alone, cross-entropy where there is none."""
        hard = {name: copy.deepcopy(term) for name, term in self.named_terms() if term.hard}
        if len(hard) == 1:
            next(iter(hard.values())).weight = 1.0
        return Objective(hard or {"hard": Term("cross_entropy")}, response_mask=self.response_mask)

    def unmasked(self) -> set[str]:
        """Return the teacher's signals that are compared at padded places too: no term masks them by the tokens."""
        free = {s for _, t in self.named_terms() if not t.hard and not t.masks_tokens for s in t.teacher}
        return {signal.rpartition("/")[2] for signal in free} - {"logits"}

    def pending_projectors(self) -> list[str]:
        """Return the names of the terms whose projector waits for :meth:`materialize`."""
        return [name for name, term in self.named_terms() if term.project_kind and term.projector is None]

    def materialize(self, student: Signals, teacher: Signals, make: Callable[[str, Tensor, Tensor], nn.Module]) -> None:
        """Make the projectors that are asked for by name, sized by the signals of a dry run.

        Args:
            student: the student's signals on some batch.
            teacher: the teacher's signals on the same batch.
            make: ``(kind, student signal, teacher signal) -> module``.
        """
        for name in self.pending_projectors():
            term = self.terms[name]
            if isinstance(term, Term):
                pair = term._pick(student, term.student, "student"), term._pick(teacher, term.teacher, "teacher")
                term.projector = make(term.project_kind or "", *pair)

    def describe(self) -> str:
        """Return the exact formula with its numbers, a line a term."""
        lines = [f"{name}: {term.describe()}" for name, term in self.named_terms()]
        return "total = Σ over the terms, each summed over its valid positions and divided by their number\n  " + (
            "\n  ".join(lines)
        )

    def _count(self, term: Term, batch: Batch) -> Tensor:
        mask = None if term.per == "batch" else term.mask_of(batch, self.response_mask)
        if mask is None:
            return torch.tensor(float(_batch_size(batch)), dtype=torch.float64)
        return mask.sum().to(torch.float64 if mask.device.type != "mps" else torch.float32)

    def _summed(
        self, name: str, term: Term, student: Signals, teacher: Signals, batch: Batch, progress: Progress
    ) -> Tensor:
        values = term.values(student, teacher, batch, progress, self.response_mask)
        if term.per == "batch":
            return values.mean() * _batch_size(batch)
        mask = term.mask_of(batch, self.response_mask)
        if mask is None:
            self._check_unmasked(name, term, values, batch)
            return values.flatten(1).mean(1).sum() if values.ndim > 1 else values.sum()
        if values.shape[: mask.ndim] != mask.shape:
            raise ObjectiveError(f"term '{name}': a mask {list(mask.shape)} does not fit values {list(values.shape)}")
        averaged = values.flatten(mask.ndim).mean(-1) if values.ndim > mask.ndim else values
        return averaged.masked_fill(~mask, 0.0).sum()

    @staticmethod
    def _check_unmasked(name: str, term: Term, values: Tensor, batch: Batch) -> None:
        if values.shape[:1] != (_batch_size(batch),):
            raise ObjectiveError(
                f"term '{name}': expected a value for each of the {_batch_size(batch)} samples, got "
                f"{list(values.shape)}; a loss is not reduced, or declares per='batch'"
            )
        tokens = batch.get("attention_mask")
        if term.mask != "none" and tokens is not None and values.ndim >= 2 and values.shape[:2] == tokens.shape[:2]:
            raise ObjectiveError(
                f"term '{name}' has one value per token and no mask, so padding would count; "
                "say `mask: attention_mask`, or `mask: none` to count it"
            )


def clamp_counts(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the counts, at least 1 each, so that a window without a valid position gives 0 and not NaN."""
    return {name: count.clamp_min(1) for name, count in counts.items()}


def default_objective() -> Objective:
    """Return 0.7·T²·KL at T = 4 plus 0.3·cross-entropy: what :class:`DistillationTrainer` minimises if told nothing."""
    return Objective({"soft": Term("kl", weight=0.7, temperature=4.0), "hard": Term("cross_entropy", weight=0.3)})


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _constants(options: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Options with each ramp replaced by its value at a point of the training, as the type check wants them."""
    return {name: at(value, progress) for name, value in options.items()}


def _made(factory: Callable[..., Any], options: Mapping[str, Any], name: str) -> Any:
    """Return the loss that a class makes of its options, which are given once."""
    for option, value in options.items():
        if isinstance(value, Ramp):
            raise ObjectiveError(f"{name} takes '{option}' once, when it is made, so it cannot be a ramp")
    return factory(**options)


def _as_bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask != 0


def _labelled(labels: Tensor, probabilities: bool) -> Tensor | None:
    """The positions that have a label: an id other than −100, class probabilities that are not all 0, any number."""
    if not labels.is_floating_point():
        return labels != IGNORED
    return labels.sum(-1) > 0 if probabilities else None


def _batch_size(batch: Batch) -> int:
    for value in batch.values():
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise ObjectiveError("the batch holds no tensor, so it has no samples")


def _touch(term: Term) -> Tensor | float:
    """Return 0 with every parameter of the term in its graph, so that distributed wrappers see a gradient."""
    zero: Tensor | float = 0.0
    for parameter in term.parameters():
        zero = zero + 0.0 * parameter.sum()
    return zero
