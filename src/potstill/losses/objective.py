"""The objective: the weighted sum of named terms, each a loss between two signals.

Every term is summed over the positions that count and divided by their number in the whole accumulation window over
all processes, so that splitting a batch changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import ObjectiveError
from potstill.interfaces import Batch, LossOutput, Progress, Signals, detach
from potstill.losses.balance import GradientBalance
from potstill.losses.scale import Scale
from potstill.losses.term import Term as Term


class Objective(nn.Module):
    """The weighted sum of named terms; owns their projectors and memories.

    Args:
        terms: name to term.
        response_mask: the task's mask, for terms on responses that name none.
        balance: settings of a :class:`potstill.losses.balance.GradientBalance` over the terms, such as
            ``{"every": 20}``; none if omitted.

    Example:
        >>> objective = Objective({"soft": Term("kl", weight=0.7, temperature=4.0),
        ...                        "hard": Term("cross_entropy", weight=0.3)})
        >>> sorted(objective.terms)
        ['hard', 'soft']
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        *,
        response_mask: Callable[[Batch], Tensor | None] | None = None,
        balance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not terms:
            raise ObjectiveError("an objective needs at least one term")
        self.terms = nn.ModuleDict()
        for name, term in terms.items():
            if not isinstance(term, Term):
                raise ObjectiveError(f"expected a Term for '{name}', got {term!r}; say it as in Term('kl', weight=0.7)")
            if not name or hasattr(self.terms, name.replace(".", "_")):
                raise ObjectiveError(f"a term cannot be called '{name}': the name is taken; choose another")
            self.terms[name.replace(".", "_")] = term
        self.response_mask = response_mask
        self.balance = None if balance is None else GradientBalance(list(self.terms), **balance)

    def forward(
        self,
        student: Signals,
        teacher: Signals,
        batch: Batch,
        progress: Progress | None = None,
        counts: Mapping[str, Tensor] | None = None,
        shared: Iterable[Tensor] | None = None,
    ) -> LossOutput:
        """Return the weighted sum and the value of each term.

        Args:
            student: the student's signals.
            teacher: the teacher's signals, which get no gradient; empty where every term is hard.
            batch: masks, labels and sample ids, samples first.
            progress: where the training stands; its start if omitted.
            counts: the number of valid positions for each term in the whole accumulation window over all processes,
                divided by the number of processes where gradients are averaged; this batch's own if omitted.
            shared: the parameters that are trained, with respect to which terms are balanced.

        Raises:
            ObjectiveError: a signal is missing, shapes differ, or a mask does not fit.
        """
        progress = progress or Progress()
        teacher = detach(teacher)
        counts = counts or clamp_counts(self.counts(batch))
        values: dict[str, Tensor] = {}
        idle: Tensor | float = 0.0
        for name, term in self.named_terms():
            if term.weight_at(progress) == 0:
                idle = idle + _touch(term)
            else:
                summed = self._summed(name, term, student, teacher, batch, progress)
                values[name] = summed / counts[name].to(summed)
        if not values:
            raise ObjectiveError("every term has weight 0 at this point of the training")
        factors = self._factors(values, progress, shared)
        total: Tensor | float = idle
        for name, term in self.named_terms():
            if name in values:
                total = total + term.weight_at(progress) * factors.get(name, 1.0) * values[name]
        return LossOutput(torch.as_tensor(total), {name: value.detach() for name, value in values.items()})

    def _factors(
        self, values: Mapping[str, Tensor], progress: Progress, shared: Iterable[Tensor] | None
    ) -> dict[str, float]:
        if self.balance is None:
            return {}
        if shared is None:
            raise ObjectiveError("balanced terms need `shared`: the parameters with respect to which they are compared")
        return self.balance.factors(values, progress, [each for each in shared if each.requires_grad])

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return each term's number of valid positions, from the batch alone: 0-d float64, may be 0."""
        return {name: self._count(term, batch) for name, term in self.named_terms()}

    def named_terms(self) -> Iterable[tuple[str, Term]]:
        """Yield the terms with their names."""
        for name, term in self.terms.items():
            if isinstance(term, Term):
                yield name, term

    def active(self, progress: Progress | None = None) -> list[Term]:
        """Return the terms whose weight is not 0 at this point of the training; at any point if omitted."""
        terms = [term for _, term in self.named_terms()]
        return [term for term in terms if not (term.never if progress is None else term.weight_at(progress) == 0)]

    def taps(self, side: str, progress: Progress | None = None) -> list[str]:
        """Return the names of the signals that the terms read from the ``"student"`` or the ``"teacher"``.

        Args:
            side: whose.
            progress: those of terms whose weight is not 0 at this point of the training; at any point if omitted.
        """
        names = [name for term in self.active(progress) for name in getattr(term, side)]
        return list(dict.fromkeys(names))

    def needs_teacher(self, progress: Progress | None = None) -> bool:
        """Return whether any term compares with a teacher at this point of the training, or at any."""
        return any(not term.hard for term in self.active(progress))

    def needs_labels(self) -> list[str]:
        """Return the names of the terms that cannot do without labels."""
        return [name for name, term in self.named_terms() if term.needs_labels and not term.never]

    def hard_only(self) -> Objective:
        """Return the objective of the baseline: the hard terms alone, cross-entropy where there is none.

        A virtual teacher, which is made of labels, is a teacher: the baseline has none.
        """
        hard = {name: copy.deepcopy(term) for name, term in self.named_terms() if term.hard and not term.virtual}
        if len(hard) == 1:
            only = next(iter(hard.values()))
            only.weight, only.scale = 1.0, Scale()
        return Objective(hard or {"hard": Term("cross_entropy")}, response_mask=self.response_mask)

    def unmasked(self) -> set[str]:
        """Return the teacher's signals that are compared at padded places too: no term masks them by the tokens."""
        free = {s for _, t in self.named_terms() if not t.hard and not t.masks_tokens for s in t.teacher}
        return {signal.rpartition("/")[2] for signal in free} - {"logits"}

    def pending_projectors(self) -> list[str]:
        """Return the names of the terms whose projector waits for :meth:`materialize`."""
        return [
            name
            for name, term in self.named_terms()
            if not term.never
            and ((term.project_kind and term.projector is None) or getattr(term.loss, "pending", False))
        ]

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
                said, taught = term.aligned(
                    term.pick(student, term.student, "student"), term.pick(teacher, term.teacher, "teacher")
                )
                if term.project_kind and term.projector is None:
                    term.projector = make(term.project_kind, said, taught)
                loss: Any = term.loss
                if getattr(loss, "pending", False):
                    loss.materialize(term.projected(said, taught), taught)

    def describe(self) -> str:
        """Return the exact formula with its numbers, a line a term."""
        lines = [f"{name}: {term.describe()}" for name, term in self.named_terms()]
        if self.balance is not None:
            to = f"that of {self.balance.reference}" if self.balance.reference else "their mean"
            lines.append(f"(each term times the factor that brings the length of its gradient to {to})")
        head = "total = Σ over the terms, each summed over its valid positions and divided by their number"
        return "\n  ".join([head, *lines])

    def _count(self, term: Term, batch: Batch) -> Tensor:
        mask = term.counted(batch, self.response_mask)
        if mask is None:
            return torch.tensor(float(_batch_size(batch)), dtype=torch.float64)
        return mask.sum().to(torch.float64 if mask.device.type != "mps" else torch.float32)

    def _summed(
        self, name: str, term: Term, student: Signals, teacher: Signals, batch: Batch, progress: Progress
    ) -> Tensor:
        values = term.values(student, teacher, batch, progress, self.response_mask)
        if term.per == "batch":
            return values.mean() * _batch_size(batch)
        mask = term.counted(batch, self.response_mask)
        if mask is None:
            self._check_unmasked(name, term, values, batch)
            return values.flatten(1).mean(1).sum() if values.ndim > 1 else values.sum()
        if values.shape[: mask.ndim] != mask.shape:
            raise ObjectiveError(
                f"term '{name}': a mask {list(mask.shape)} does not fit values {list(values.shape)}; say "
                "`mask: none` if all count, and give labels of several classes at once as numbers with a point"
            )
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
        by_token = [values.shape[:2], (*values.shape[:1], *values.shape[2:3])]  # [B, T, …], [B, heads, T]
        if term.mask != "none" and tokens is not None and values.ndim >= 2 and tokens.shape[:2] in by_token:
            raise ObjectiveError(
                f"term '{name}' has one value per token and no mask, so padding would count; "
                "say `mask: attention_mask`, or `mask: none` to count it; of attention take `attention_mse` and its kin"
            )


def clamp_counts(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the counts, at least 1 each, so that a window without a valid position gives 0 and not NaN."""
    return {name: count.clamp_min(1) for name, count in counts.items()}


def default_objective() -> Objective:
    """Return 0.7·T²·KL at T = 4 plus 0.3·cross-entropy: what :class:`DistillationTrainer` minimises if told nothing."""
    return Objective({"soft": Term("kl", weight=0.7, temperature=4.0), "hard": Term("cross_entropy", weight=0.3)})


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
