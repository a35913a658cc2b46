"""Terms whose gradients are of a size: weights then say how much of the gradient is whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from potstill.errors import ObjectiveError, did_you_mean
from potstill.interfaces import Progress


class GradientBalance(nn.Module):
    """Factors that bring the gradients of an objective's terms to one length, measured while training goes on.

    Every so many optimizer steps the gradient of each term with respect to the student's parameters is computed, which
    costs a backward a term; its length, smoothed over the measurements, divides the term from the next step on. A term
    of weight 2 then pulls twice as much as one of weight 1, whatever the size of their values.

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

    measured: Tensor
    times: Tensor
    lengths: Tensor
    step: Tensor

    def __init__(
        self, terms: Sequence[str], *, every: int = 20, decay: float = 0.9, reference: str | None = None
    ) -> None:
        super().__init__()
        self.terms = list(terms)
        if reference is not None and reference not in self.terms:
            raise ObjectiveError(f"balance: there is no term '{reference}'; {did_you_mean(reference, self.terms)}")
        if every < 1 or not 0 <= decay < 1:
            raise ObjectiveError(f"balance expected every ≥ 1 and 0 ≤ decay < 1, got {every} and {decay}")
        self.every, self.decay, self.reference = every, decay, reference
        size = len(self.terms)
        for name in ("measured", "times", "lengths"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))
        self.register_buffer("step", torch.tensor(-1))

    def factors(self, values: Mapping[str, Tensor], progress: Progress, shared: Sequence[Tensor]) -> dict[str, float]:
        """Return the factor of each term at this step, and measure where it is time.

        Args:
            values: each active term's value with its graph, 0-d.
            progress: where the training stands.
            shared: the parameters with respect to which gradients are compared.
        """
        if int(self.step) != progress.step:
            self._settle()
            self.step.fill_(progress.step)
        found = self._factors()
        if self.training and progress.step % self.every == 0 and torch.is_grad_enabled():
            self._measure(values, shared)
        return found

    def _factors(self) -> dict[str, float]:
        lengths = {name: float(length) for name, length in zip(self.terms, self.lengths, strict=True)}
        seen = [length for length in lengths.values() if length > 0]
        own = lengths[self.reference] if self.reference is not None else 0.0
        target = own or (sum(seen) / len(seen) if seen else 1.0)
        return {name: target / length if length > 0 else 1.0 for name, length in lengths.items()}

    def _measure(self, values: Mapping[str, Tensor], shared: Sequence[Tensor]) -> None:
        for place, name in enumerate(self.terms):
            if name not in values or not values[name].requires_grad:
                continue
            gradients = torch.autograd.grad(values[name], shared, retain_graph=True, allow_unused=True)
            norms = [gradient.double().norm() for gradient in gradients if gradient is not None]
            if norms:
                self.measured[place] += torch.stack(norms).norm().to(self.measured.device)
                self.times[place] += 1

    def _settle(self) -> None:
        """Let what was measured at the step before count from now on, the same on all processes."""
        measured, times = self.measured.clone(), self.times.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(measured)
            torch.distributed.all_reduce(times)
        new = measured / times.clamp_min(1)
        smoothed = torch.where(self.lengths > 0, self.decay * self.lengths + (1 - self.decay) * new, new)
        usable = (times > 0) & torch.isfinite(new)
        self.lengths.copy_(torch.where(usable, smoothed, self.lengths))
        self.measured.zero_()
        self.times.zero_()
