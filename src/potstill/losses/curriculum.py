"""Distillation whose difficulty is learned: a temperature that is trained against the student."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from potstill.errors import ObjectiveError
from potstill.interfaces import Progress
from potstill.losses.divergence import Temperature, relative_entropy
from potstill.losses.numerics import at_least_fp32, log_softmax
from potstill.registry import losses


@losses.register(
    "ctkd",
    per="position",
    reference="Li et al. 2022, https://arxiv.org/abs/2211.16231",
    formula="T²·KL(softmax({teacher}/T) ‖ softmax({student}/T)), T in [{lowest}, {highest}] learned to make it larger",
    zero_at_equality=True,
)
class CurriculumTemperature(nn.Module):
    """Kullback-Leibler divergence times T² at a temperature that is learned to make the divergence larger.

    T = lowest + (highest − lowest)·sigmoid(θ), with one parameter θ for all samples, 1 at the start (T = 15.6). Its
    gradient is reversed, times λ, which grows from 0 to 1 as half a cosine wave: the task gets harder step by step.
    The paper weighs the term by 0.9 beside 0.1 of the cross-entropy on CIFAR-100, and both by 1 on ImageNet.

    Args:
        lowest: bound of T below, positive.
        highest: bound of T above.
        ramp: share of the training after which λ is 1, in (0, 1]. The paper's 10 of 240 epochs and 5 of 120 are 1/24.

    Raises:
        ObjectiveError: the bounds are out of order.

    Reference: CTKD, Li et al. 2022, https://arxiv.org/abs/2211.16231.
    """

    def __init__(
        self,
        *,
        lowest: Temperature = 1.0,
        highest: Temperature = 21.0,
        ramp: Annotated[float, Field(gt=0, le=1)] = 1 / 24,
    ) -> None:
        super().__init__()
        if not lowest < highest:
            raise ObjectiveError(f"ctkd expected lowest < highest, got {lowest} and {highest}")
        self.lowest, self.highest, self.ramp = lowest, highest, ramp
        self.theta = nn.Parameter(torch.ones(1, dtype=torch.float32))

    def temperature(self, progress: Progress | None = None) -> Tensor:
        """Return T, 0-d, whose gradient is reversed and ramped."""
        share = min(1.0, (progress or Progress()).fraction / self.ramp)
        strength = (1 - math.cos(math.pi * share)) / 2
        theta = at_least_fp32(self.theta).squeeze()
        reversed_theta = theta.detach() - strength * (theta - theta.detach())
        return self.lowest + (self.highest - self.lowest) * reversed_theta.sigmoid()

    def forward(self, student: Tensor, teacher: Tensor, *, progress: Progress | None = None) -> Tensor:
        """Return the loss.

        Args:
            student: logits ``[..., V]``.
            teacher: logits ``[..., V]``.
            progress: where the training stands; its start if omitted.

        Returns:
            ``[...]``, in nats times T²; 0 where both agree.
        """
        temperature = self.temperature(progress)
        log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
        return temperature**2 * relative_entropy(log_p, log_q)
