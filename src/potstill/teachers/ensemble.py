"""Several teachers that speak with one voice: the mean of what they say, or one of them drawn for a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.errors import ComponentError, SignalError, did_you_mean
from potstill.interfaces import IGNORED, VIEW, Batch, Signals, TeacherSource, detach
from potstill.registry import teacher_sources
from potstill.teachers.context import SourceContext
from potstill.teachers.live import ask

By: TypeAlias = Literal["probabilities", "logits", "confidence", "random"]

_LOGITS = "logits"


class Ensemble:
    """Teachers asked together; their signals come as one set. See :func:`ensemble` for the options.

    A signal that all of them have, as floating-point tensors, is combined; one that some of them lack is left out.

    Args:
        teachers: name to source, at least one.
        by: how they are combined.
        weights: one positive number for each teacher, in their order; equal ones if omitted.
        temperature: at which probabilities are averaged.
        seed: of what is drawn.
        name: what it is called in messages.

    Raises:
        ComponentError: no teacher, weights that are not one positive number each, or an option without a meaning here.
    """

    def __init__(
        self,
        teachers: Mapping[str, TeacherSource],
        by: By = "probabilities",
        *,
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        name: str = "ensemble",
    ) -> None:
        self.teachers, self.by, self.temperature, self.seed, self.name = dict(teachers), by, temperature, seed, name
        problem = self._problem(weights)
        if problem is not None:
            raise ComponentError(f"the ensemble '{name}' {problem}")
        given = torch.ones(len(self.teachers)) if weights is None else torch.tensor(list(weights), dtype=torch.float32)
        self.weights = given / given.sum()
        self._wanted: frozenset[str] | None = None

    def __call__(self, batch: Batch) -> Signals:
        """Return the combined signals, detached: ``logits`` float32 ``[..., C]``, the others float32 too.

        Raises:
            SignalError: a signal that is wanted is not there, has several shapes, or lacks labels to weigh it by.
        """
        if self.by == "random":
            name = self._drawn(batch)
            said = {name: self._asked(self.teachers[name], batch)}
        else:
            said = {name: self._asked(teacher, batch) for name, teacher in self.teachers.items()}
        shared = self._shared(said)
        if not shared:
            return {}
        weights = self._weights(shared, batch)
        return detach({name: self._combined(name, values, weights) for name, values in shared.items()})

    def narrow(self, names: Collection[str] | None) -> None:
        """Give these signals alone from now on, all for ``None``."""
        self._wanted = None if names is None else frozenset(names)

    def to(self, device: torch.device | str) -> Ensemble:
        """Move every teacher that can move, and return the ensemble."""
        for teacher in self.teachers.values():
            move: Any = getattr(teacher, "to", None)
            if move is not None:
                move(device)
        return self

    def _problem(self, weights: Sequence[float] | None) -> str | None:
        """Return what is wrong with the options; ``None`` where nothing is."""
        if not self.teachers:
            return "needs at least one teacher in `of`"
        if not self.temperature > 0:
            return f"needs a positive temperature, got {self.temperature}"
        if self.temperature != 1 and self.by in ("logits", "random"):
            return f"takes no temperature with `by: {self.by}`, which averages no probabilities"
        if weights is None:
            return None
        if self.by == "confidence":
            return "takes no weights with `by: confidence`, which weighs each sample by its label"
        if len(weights) != len(self.teachers) or not all(weight > 0 for weight in weights):
            return f"needs {len(self.teachers)} positive weights, one for each teacher, got {list(weights)}"
        return None

    def _asked(self, teacher: TeacherSource, batch: Batch) -> Signals:
        if self._wanted is None:
            return teacher(batch)
        return ask(teacher, batch, sorted(self._wanted | {_LOGITS} if self.by == "confidence" else self._wanted))

    def _shared(self, said: Mapping[str, Signals]) -> dict[str, list[Tensor]]:
        """Return the signals that every teacher who was asked has, in the order of the teachers."""
        usable = {
            member: {key: value for key, value in signals.items() if _is_float(value)}
            for member, signals in said.items()
        }
        first = next(iter(usable.values()))
        for name in sorted(self._wanted or ()):
            lacking = next((member for member, signals in usable.items() if name not in signals), None)
            if lacking is not None:
                raise SignalError(
                    f"the ensemble '{self.name}' was asked for '{name}', which its teacher '{lacking}' does not give; "
                    f"{did_you_mean(name, usable[lacking])}"
                )
        names = [name for name in first if all(name in signals for signals in usable.values())]
        if self._wanted is not None:
            names = [name for name in names if name in self._wanted or (self.by == "confidence" and name == _LOGITS)]
        for name in names:
            shapes = {member: list(signals[name].shape) for member, signals in usable.items()}
            if len({tuple(shape) for shape in shapes.values()}) > 1:
                what = "numbers of classes" if name == _LOGITS else "shapes"
                raise SignalError(
                    f"the teachers of the ensemble '{self.name}' have '{name}' of different {what}: "
                    f"{', '.join(f'{member} {shape}' for member, shape in shapes.items())}"
                )
        return {name: [signals[name].float() for signals in usable.values()] for name in names}

    def _weights(self, shared: Mapping[str, list[Tensor]], batch: Batch) -> Tensor | None:
        """Return what each teacher counts, ``[K]`` or ``[K, ...]`` a position; ``None`` for the one that was drawn."""
        if self.by == "random":
            return None
        if self.by != "confidence":
            return self.weights.to(next(iter(shared.values()))[0].device)
        if _LOGITS not in shared or "labels" not in batch:
            lacking = "labels in the batch" if _LOGITS in shared else "`logits` of its teachers"
            raise SignalError(f"the ensemble '{self.name}' weighs teachers by confidence, and lacks {lacking}")
        logits, labels = shared[_LOGITS], batch["labels"]
        if labels.shape not in (logits[0].shape[:-1], logits[0].shape):
            raise SignalError(
                f"the ensemble '{self.name}' weighs teachers by confidence: expected labels "
                f"{list(logits[0].shape[:-1])} for logits {list(logits[0].shape)}, got {list(labels.shape)}"
            )
        return confidence(logits, labels)

    def _combined(self, name: str, values: list[Tensor], weights: Tensor | None) -> Tensor:
        if weights is None:
            return values[0]
        stacked = torch.stack(values)
        if name != _LOGITS:  # [B, ...]: one weight a sample, even where there is one a position
            flat = weights.flatten(2).mean(-1) if weights.ndim > 2 else weights
            return (flat.reshape(*flat.shape, *[1] * (stacked.ndim - flat.ndim)) * stacked).sum(0)
        each = weights.reshape(*weights.shape, *[1] * (stacked.ndim - weights.ndim))
        if self.by == "logits":
            return (each * stacked).sum(0)
        chances = torch.log_softmax(stacked / self.temperature, dim=-1)
        return self.temperature * torch.logsumexp(chances + each.log(), dim=0)

    def _drawn(self, batch: Batch) -> str:
        """Return the teacher of a batch, which its samples, their view and the seed decide."""
        if "sample_id" not in batch:
            raise SignalError(f"the ensemble '{self.name}' draws a teacher by the samples, and lacks `sample_id`")
        digest = hashlib.blake2b(f"{self.seed}".encode(), digest_size=8)
        for name in ("sample_id", VIEW):
            if name in batch:
                digest.update(batch[name].detach().cpu().long().numpy().tobytes())
        drawn = int.from_bytes(digest.digest(), "little") / 2**64
        place = int((self.weights.double().cumsum(0) <= drawn).sum())
        return list(self.teachers)[min(place, len(self.teachers) - 1)]


def confidence(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return how much each teacher counts for each position: more, the likelier it finds the label.

    The weight of the k-th of K teachers is ``(1 − exp(CE_k) / Σ_j exp(CE_j)) / (K − 1)``; they sum to 1.

    Args:
        logits: those of each teacher, ``[..., C]``.
        labels: int64 ``[...]``, or probabilities ``[..., C]``. Positions of −100 have equal weights.

    Returns:
        Weights, float32 ``[K, ...]``.

    Reference:
        Zhang, Chen and Wang (2022), "Confidence-aware multi-teacher knowledge distillation",
        https://arxiv.org/abs/2201.00007.
    """
    count, classes = len(logits), logits[0].shape[-1]
    if count == 1:
        return torch.ones(1, *logits[0].shape[:-1], device=logits[0].device)
    soft = labels.is_floating_point()
    targets = labels.float().reshape(-1, classes) if soft else labels.reshape(-1)
    losses = [F.cross_entropy(each.float().reshape(-1, classes), targets, reduction="none") for each in logits]
    weights = (1 - torch.softmax(torch.stack(losses), dim=0)) / (count - 1)
    if not soft:
        weights = torch.where(targets == IGNORED, torch.full_like(weights, 1 / count), weights)
    return weights.reshape(count, *logits[0].shape[:-1])


@teacher_sources.register("ensemble", reference="https://arxiv.org/abs/1503.02531")
def ensemble(
    context: SourceContext,
    *,
    of: list[str],
    by: By = "probabilities",
    weights: list[float] | None = None,
    temperature: float = 1.0,
    seed: int | None = None,
) -> Ensemble:
    """Return teachers of the recipe combined into one.

    It gives ``logits``, and every other signal that all of them have in one shape, such as ``hidden.6``: averaged with
    the same weights.

    Args:
        context: holds the teachers that the recipe names before this one.
        of: their names.
        by: ``probabilities``: the softmax of its logits is the mean of theirs. ``logits``: the mean of theirs.
            ``confidence``: as ``probabilities``, with weights for each sample from the cross-entropy of each teacher on
            the label (CA-MKD); samples without a label have equal weights. The published code gives features weights of
            their own, made of what each teacher's last layer says to the student's features, and divides by the number
            of teachers once more; here one set of weights that sum to 1 goes for all. ``random``: what one of
            them says, and only that one is asked; it depends on the seed and on the samples of the batch in their
            order, so a batch that comes again in another epoch with the same samples and view has the same teacher.
        weights: a positive number for each, whatever their sum: how much each counts, or with ``random`` how often it
            is drawn.
        temperature: at which ``probabilities`` and ``confidence`` average: the softmax of its logits at this
            temperature is the mean of theirs. That of the term that reads them makes the term's gradient the mean of
            its gradients for each teacher.
        seed: of ``random``; the run's if omitted.

    Returns:
        The source.

    Raises:
        ComponentError: there is no such teacher, or wrong options.

    Reference:
        Hinton, Vinyals and Dean (2015), "Distilling the knowledge in a neural network",
        https://arxiv.org/abs/1503.02531; Zhang, Chen and Wang (2022), https://arxiv.org/abs/2201.00007
        (``confidence``); Fukuda et al. (2017), "Efficient knowledge distillation from an ensemble of teachers",
        https://doi.org/10.21437/Interspeech.2017-614 (``random``).
    """
    for name in of:
        if name not in context.teachers:
            raise ComponentError(
                f"the ensemble '{context.name}' names the teacher '{name}', which is not defined before it; "
                f"{did_you_mean(name, context.teachers)}"
            )
    if len(set(of)) < len(of):
        raise ComponentError(f"the ensemble '{context.name}' names a teacher twice; say its share with `weights`")
    chosen = {name: context.teachers[name] for name in of}
    drawn = context.seed if seed is None else seed
    return Ensemble(chosen, by, weights=weights, temperature=temperature, seed=drawn, name=context.name)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
