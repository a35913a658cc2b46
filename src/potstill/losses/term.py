"""A term of an objective: a loss, the two signals that it compares, its weight, mask and projector."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import ObjectiveError, did_you_mean
from potstill.interfaces import IGNORED, Batch, Progress, Signals
from potstill.losses.ramps import Number, Ramp, as_number, at, ends
from potstill.losses.scale import Scale, as_scale
from potstill.registry import losses

Mask = str | Callable[[Batch], Tensor | None] | None
_LAYERED = re.compile(r"(?:(?P<tower>.+)\.)?(?P<kind>hidden|attention|query|key|value)\.\d+")
_NO_TEXT = re.compile("vis|image|audio|speech")
_GIVEN = frozenset({"labels", "mask", "index", "progress"})


class Term(nn.Module):
    """A loss, the two signals it compares, its weight, mask and projector.

    Args:
        loss: registered name, ``package.module:attribute`` or a callable; see :class:`potstill.interfaces.Loss`.
        student: name of the student's signal, or several for a loss that takes tuples.
        teacher: name of the teacher's signal, ``TEACHER/SIGNAL`` where there are several teachers; unused by hard
            losses.
        weight: factor of the term, a number, a ramp or a callable of the progress; the one that the paper of the loss
            published if omitted, 1 where it has none.
        mask: positions that count: the name of a batch entry, a callable of the batch, ``"none"`` for all. ``None``
            chooses: labels other than −100 for hard losses, ``attention_mask`` for ``hidden.n`` (and ``attention.n``,
            ``query.n``, … where the loss masks by itself), the task's mask for responses.
        project: module that maps the student's signal to the teacher's shape, or the kind of one that is made by a
            dry run, such as ``"linear"`` or ``"auto"`` (see :meth:`Objective.materialize` and
            :func:`potstill.knowledge.alignment.make_projector`).
        align: ``(student, teacher) -> (student, teacher)``, called before the projector; for vocabularies see
            :class:`potstill.knowledge.vocabulary.VocabularyMap`.
        scale: factor by which another tool's convention differs: a number, or a product such as ``1/T^2`` or ``1/C``;
            see :class:`potstill.losses.scale.Scale`.
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
        weight: Number | Mapping[str, Any] | None = None,
        mask: Mask = None,
        project: str | nn.Module | None = None,
        align: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        scale: float | str | Scale = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        target: Any = losses.get(loss) if isinstance(loss, str) else loss
        self.loss_name = loss if isinstance(loss, str) else losses.name_of(loss)
        self.options = {name: as_number(value) for name, value in options.items()}
        both = [{name: ends(value)[end] for name, value in self.options.items()} for end in (0, 1)]
        found = [p for end in both for p in losses.check(self.loss_name, end)] if isinstance(loss, str) else []
        if found:
            raise ObjectiveError("; ".join(dict.fromkeys(str(problem) for problem in found)))
        self.factory: Any = None
        self.made_with: dict[str, Any] = {}
        if inspect.isclass(target):
            self.factory, self.made_with, self.options = target, self.options, {}
            target = _made(target, self.made_with, self.loss_name)
        self.loss = target
        call = target.forward if isinstance(target, nn.Module) else target
        parameters = inspect.signature(call).parameters
        self._accepts = frozenset(parameters)
        self.needs_labels = "labels" in parameters and parameters["labels"].default is inspect.Parameter.empty
        component = type(target) if isinstance(target, nn.Module) else target
        facts = losses.facts(losses.name_of(self.factory or component))
        self.probabilities = bool(facts.get("probabilities", False))
        self.per = getattr(target, "per", facts.get("per", "position"))
        self.any_shape = bool(facts.get("any_shape", False)) or self.per == "batch"
        self.formula: str | None = facts.get("formula")
        self.hard = not _takes_teacher(parameters)
        self.virtual = bool(facts.get("virtual", False))
        self.own_mask = "mask" in self._accepts and self.per != "position"
        self.student = _names(student)
        self.teacher = () if self.hard else _names(teacher)
        self._tokens = _mask_of_tokens(self.student[0], attention=self.own_mask)
        if self.per == "batch" and mask not in (None, "none") and not self.own_mask:
            raise ObjectiveError(f"{self.loss_name} compares whole batches and takes no mask, got {mask!r}")
        self.weight = as_number(facts.get("weight", 1.0) if weight is None else weight)
        self.scale = as_scale(scale)
        if not (callable(self.weight) or isinstance(self.weight, int | float)):
            raise ObjectiveError(f"weight expected a number or a ramp `{{from: …, to: …}}`, got {weight!r}")
        self.mask = mask
        self.align = align
        self.project_kind = project if isinstance(project, str) else None
        self.projector = project if isinstance(project, nn.Module) else None

    def weight_at(self, progress: Progress) -> float:
        """Return the weight at this point of the training, without the scale."""
        return float(at(self.weight, progress))

    @property
    def never(self) -> bool:
        """Whether the term has weight 0 from the first step to the last."""
        weight = self.weight
        if isinstance(weight, Ramp):
            return weight.start == weight.stop == 0
        return isinstance(weight, int | float) and weight == 0

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
        if (self.project_kind and self.projector is None) or getattr(self.loss, "pending", False):
            raise ObjectiveError(
                f"{self.loss_name} has layers that are not made yet: call `materialize` of the objective or the "
                "distillation module with signals of a batch, before the optimizer is made"
            )
        arguments: list[Any] = [self.pick(student, self.student, "student")]
        if not self.hard:
            arguments.append(self.pick(teacher, self.teacher, "teacher"))
            arguments = list(self.aligned(*arguments))
            arguments[0] = self.projected(*arguments)
            self._check_shapes(*arguments)
        extras = {"labels": batch.get("labels"), "index": batch.get("sample_id"), "progress": progress}
        keywords: dict[str, Any] = {name: value for name, value in extras.items() if name in self._accepts}
        if "mask" in self._accepts:
            keywords["mask"] = self.mask_of(batch, response_mask)
        if self.own_mask:
            arguments, keywords = self._rows(arguments, keywords, batch)
            self._check_padding(arguments[0], keywords["mask"], batch)
        if self.needs_labels and keywords["labels"] is None:
            raise ObjectiveError(f"{self.loss_name} compares with labels and the batch has none; drop the term")
        options = {k: at(v, progress) for k, v in self.options.items()}
        value: Tensor = self.loss(*arguments, **keywords, **options)
        return value if self.scale == Scale() else value * self._scale_of(arguments[0], options)

    def _rows(self, arguments: list[Any], keywords: dict[str, Any], batch: Batch) -> tuple[list[Any], dict[str, Any]]:
        """Leave the samples out that a mask ``[B]`` leaves out, and give a loss that masks positions their tokens."""
        mask = keywords["mask"]
        if mask is None or mask.ndim > 1:
            return arguments, keywords
        tokens = None if self._tokens is None else _as_bool(batch.get(self._tokens))
        if self.per == "batch":
            kept = mask if bool(mask.any()) else torch.ones_like(mask)
            arguments = [tuple(s[kept] for s in a) if isinstance(a, tuple) else a[kept] for a in arguments]
            keywords = {k: v[kept] if isinstance(v, Tensor) and k != "mask" else v for k, v in keywords.items()}
            tokens = None if tokens is None else tokens[kept]
        return arguments, {**keywords, "mask": tokens}

    def _check_padding(self, signal: Any, mask: Tensor | None, batch: Batch) -> None:
        """Raise if padding would count in a loss that masks by itself and was given no mask."""
        tokens = batch.get("attention_mask")
        first = signal[0] if isinstance(signal, tuple) else signal
        if mask is not None or self.mask is not None or tokens is None or first.ndim < 3:
            return
        axes = (first.shape[:2], (first.shape[0], first.shape[-2]))
        if tuple(tokens.shape) in [tuple(each) for each in axes]:
            raise ObjectiveError(
                f"{self.loss_name} compares '{self.student[0]}' token by token and has no mask, so padding would "
                "count; say `mask: attention_mask`, or `mask: none` to count it"
            )

    def aligned(self, student: Any, teacher: Any) -> tuple[Any, Any]:
        """Return both signals as they are compared, before the projector."""
        return (student, teacher) if self.align is None else self.align(student, teacher)

    def projected(self, student: Any, teacher: Any) -> Any:
        """Return the student's signal as the loss gets it; the teacher's tells a projector that asks how long it is."""
        if self.projector is None:
            return student
        if getattr(self.projector, "takes_teacher", False):
            return self.projector(student, teacher)
        return self.projector(student)

    def _scale_of(self, student: Any, options: Mapping[str, Any]) -> float:
        classes = student.shape[-1] if isinstance(student, Tensor) else 0
        temperature = options.get("temperature", self._all_options().get("temperature"))
        lacking = [
            *(["temperature"] if self.scale.temperature and temperature is None else []),
            *(["classes"] if self.scale.classes and not classes else []),
        ]
        if lacking:
            raise ObjectiveError(f"{self.loss_name} has no {' and no '.join(lacking)} for `scale: {self.scale}`")
        return float(self.scale(temperature=temperature, classes=classes))

    @property
    def masks_tokens(self) -> bool:
        """Whether what is padding does not count."""
        usual = self.mask is None and self._tokens is not None
        return (self.per == "position" or self.own_mask) and (self.mask == "attention_mask" or usual)

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
            return self._of_tokens(_as_bool(batch[self.mask]), batch)
        labels = batch.get("labels")
        if self.hard:
            return None if labels is None else _labelled(labels, self.probabilities)
        if self._tokens is not None:
            return _as_bool(batch.get(self._tokens))
        ids = labels if labels is not None and not labels.is_floating_point() else None
        mask = None if response_mask is None else _as_bool(response_mask(batch))
        if ids is not None and (self.needs_labels or (response_mask is None and ids.ndim > 1)):
            known = ids != IGNORED
            mask = known if mask is None or mask.shape != known.shape else mask & known
        return mask

    def _of_tokens(self, rows: Tensor | None, batch: Batch) -> Tensor | None:
        """Return a mask of samples, for a signal with a vector per token as one of their tokens without the padding."""
        tokens = None if self._tokens is None or self.own_mask else _as_bool(batch.get(self._tokens))
        if rows is None or rows.ndim > 1 or tokens is None:
            return rows
        return tokens & rows[:, None]

    def counted(self, batch: Batch, response_mask: Callable[[Batch], Tensor | None] | None = None) -> Tensor | None:
        """Return the mask by which values are counted: of samples ``[B]`` where the loss gives one value for each.

        ``None`` where every sample counts once, as for a loss that sees to the mask of its positions itself.
        """
        if self.per == "batch":
            return None
        mask = self.mask_of(batch, response_mask)
        if self.own_mask:
            return mask if mask is not None and mask.ndim == 1 else None
        return mask.flatten(1).any(1) if mask is not None and self.per == "sample" and mask.ndim > 1 else mask

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
        scale = "" if self.scale == Scale() else f"{self.scale} · "
        return f"{weight} · {scale}{body}{smoothing}"

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


def _takes_teacher(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether a loss compares with a teacher: by the name, or as a second argument that it cannot do without."""
    usual = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    placed = [each for each in parameters.values() if each.kind in usual]
    second = len(placed) > 1 and placed[1].default is inspect.Parameter.empty and placed[1].name not in _GIVEN
    return "teacher" in parameters or second


def compares(loss: str) -> bool:
    """Return whether a loss compares with a teacher, and not with the labels."""
    target: Any = losses.get(loss)
    call = getattr(target, "forward", target)
    return _takes_teacher({name: p for name, p in inspect.signature(call).parameters.items() if name != "self"})


def _mask_of_tokens(signal: str, *, attention: bool) -> str | None:
    """Return the batch entry that says which tokens of a signal are no padding, where it has one vector per token."""
    match = _LAYERED.fullmatch(signal)
    if match is None or (match["kind"] != "hidden" and not attention):
        return None
    tower = (match["tower"] or "").rpartition(".")[2]
    if tower == "decoder":
        return "decoder_attention_mask"
    return None if _NO_TEXT.search(tower) else "attention_mask"


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


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
