"""Terms whose gradients are of a size: weights then say how much of the gradient is whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import ObjectiveError, did_you_mean
from potstill.interfaces import Progress

_FIRST = 3
"""Steps of a term that are all measured: its first gradient may be next to nothing, as of a student that is a copy."""


class GradientBalance(nn.Module):
    """Factors that bring the gradients of an objective's terms to one length, measured while training goes on.

    Every so many optimizer steps, and in the first three steps of each term, the gradient of each term with respect to
    the student's parameters is computed, which costs a backward a term. Its length divides the term from that step on;
    a longer one counts at once, a shorter one is smoothed. A term of weight 2 then pulls twice as much as one of weight
    1, whatever the size of their values. Of several micro-batches of a step the first is measured.

    Args:
        terms: names of the terms.
        every: optimizer steps from one measurement to the next.
        decay: share of the old in the smoothed length, in [0, 1).
        reference: the term whose length the others are brought to, which itself stays as it is; their mean if omitted.

    Raises:
        ObjectiveError: the reference is no term, or a number is out of its range.

    Reference: Chen et al. 2018 (GradNorm), https://arxiv.org/abs/1711.02257, of which this is the plain form without
    training rates.
    """

    lengths: Tensor
    times: Tensor
    step: Tensor

    def __init__(
        self, terms: Sequence[str], *, every: int = 20, decay: float = 0.9, reference: str | None = None
    ) -> None:
        super().__init__()
        self.terms = list(terms)
        reference = None if reference is None else reference.replace(".", "_")
        if reference is not None and reference not in self.terms:
            raise ObjectiveError(f"balance: there is no term '{reference}'; {did_you_mean(reference, self.terms)}")
        if every < 1 or not 0 <= decay < 1:
            raise ObjectiveError(f"balance expected every ≥ 1 and 0 ≤ decay < 1, got {every} and {decay}")
        self.every, self.decay, self.reference = every, decay, reference
        self.register_buffer("lengths", torch.zeros(len(self.terms)))
        self.register_buffer("times", torch.zeros(len(self.terms), dtype=torch.long))
        self.register_buffer("step", torch.tensor(-1))

    @property
    def settings(self) -> dict[str, Any]:
        """What another one over other terms is made with."""
        return {"every": self.every, "decay": self.decay, "reference": self.reference}

    def factors(self, values: Mapping[str, Tensor], progress: Progress, shared: Sequence[Tensor]) -> dict[str, float]:
        """Return the factor of each term at this step, measured where it is time.

        Args:
            values: each active term's value with its graph, 0-d.
            progress: where the training stands.
            shared: the parameters with respect to which gradients are compared.
        """
        if self.training and torch.is_grad_enabled() and int(self.step) != progress.step:
            self.step.fill_(progress.step)
            times = dict(zip(self.terms, self.times.tolist(), strict=True))
            if progress.step % self.every == 0 or any(times[name] < _FIRST for name in values):
                self._measure(values, shared)
        lengths = dict(zip(self.terms, self.lengths.tolist(), strict=True))
        seen = [lengths[name] for name in values if lengths[name] > 0]
        own = lengths[self.reference] if self.reference is not None else 0.0
        target = own or (sum(seen) / len(seen) if seen else 1.0)
        return {name: target / lengths[name] if lengths[name] > 0 else 1.0 for name in values}

    def _measure(self, values: Mapping[str, Tensor], shared: Sequence[Tensor]) -> None:
        new = torch.zeros_like(self.lengths)
        for place, name in enumerate(self.terms):
            if name not in values or not values[name].requires_grad:
                continue
            gradients = torch.autograd.grad(values[name], shared, retain_graph=True, allow_unused=True)
            norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
            if norms:
                new[place] = torch.stack(norms).norm()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(new)  # the sum: only the ratios of lengths count
        usable = torch.isfinite(new) & (new > 0)
        smoothed = torch.maximum(self.decay * self.lengths + (1 - self.decay) * new, new)
        self.lengths.copy_(torch.where(usable, smoothed, self.lengths))
        active = torch.tensor([name in values for name in self.terms], device=self.times.device)
        self.times.add_(active.long())
