"""A term of an objective: a loss, the two signals that it compares, its weight, mask and projector."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from potstill.errors import ObjectiveError, did_you_mean
from potstill.interfaces import IGNORED, Batch, Progress, Signals
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
        arguments: list[Any] = [self.pick(student, self.student, "student")]
        if not self.hard:
            if self.projector is not None:
                arguments[0] = self.projector(arguments[0])
            arguments.append(self.pick(teacher, self.teacher, "teacher"))
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

    def pick(self, signals: Signals, names: Sequence[str], side: str) -> Any:
        """Return the signal of that name, or the tuple of several.

        Raises:
            ObjectiveError: a signal is missing.
        """
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
