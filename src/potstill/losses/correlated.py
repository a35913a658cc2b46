"""Losses that compare the shape of the logits or probabilities and not their scale: correlations and z-scores."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from potstill.errors import ObjectiveError
from potstill.losses.divergence import Temperature, kl
from potstill.losses.numerics import at_least_fp32, log_softmax, safe_norm
from potstill.registry import losses

_SHORTEST = 1e-4  # from this length on deviations from a mean have a direction; its square is the released code's 1e-8
_SMALLEST = 1e-7  # added to a standard deviation, as in the released code


@losses.register(
    "dist",
    per="batch",
    reference="Huang et al. 2022, https://arxiv.org/abs/2205.10536",
    formula="{temperature}²·[{beta}·(1 − mean correlation over the classes) + {gamma}·(1 − mean correlation over the "
    "samples)], softmax({teacher}/{temperature}) with softmax({student}/{temperature})",
    zero_at_equality=True,
    weight=2.0,
)
def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    beta: Annotated[float, Field(ge=0)] = 1.0,
    gamma: Annotated[float, Field(ge=0)] = 1.0,
    temperature: Temperature = 1.0,
) -> Tensor:
    """One minus Pearson's correlation of the probabilities: within each sample, and of each class over the batch.

    β·(1 − mean over the samples of the correlation between the classes) + γ·(1 − mean over the classes of the
    correlation between the samples), times T². The paper's β = γ = 2 is the term's weight 2 of its code, with 1 here.
    The second part needs more than one sample; positions of all samples count as samples.

    A sample or class whose probabilities deviate from their mean by less than 10⁻⁴ in all counts as less correlated,
    about as in the released code, which adds 10⁻⁸ to the product of both deviations. Here each is bounded by itself, so
    that the gradient of a student with equal logits is not 10⁸ times too large.

    Args:
        student: logits ``[B, C]`` or ``[B, ..., C]``.
        teacher: logits of the same shape.
        mask: samples or positions that count, ``[B, ...]``; all if omitted.
        beta: weight of the relation between the classes.
        gamma: weight of the relation between the samples.
        temperature: T, positive; 1 on ImageNet and 4 on CIFAR-100 in the paper.

    Returns:
        0-d, in [0, 2·(β + γ)·T²]; 0 where both agree.

    Raises:
        ObjectiveError: the mask does not have one entry for each sample or position.

    Reference: DIST, Huang et al. 2022, https://arxiv.org/abs/2205.10536.
    """
    q = log_softmax(student, temperature).exp().flatten(0, -2)
    p = log_softmax(teacher, temperature).exp().flatten(0, -2)
    kept = q.new_ones(len(q), 1) if mask is None else _fitting(mask, student).reshape(-1, 1).to(q.dtype)
    count = kept.sum().clamp_min(1)
    inter = (kept.squeeze(1) * (1 - _correlation(q, p, kept.expand_as(q), -1))).sum() / count
    intra = (1 - _correlation(q, p, kept.expand_as(q), 0)).mean()
    return temperature**2 * (beta * inter + gamma * intra)


@losses.register(
    "kl_standardized",
    per="position",
    reference="Sun et al. 2024, https://arxiv.org/abs/2403.01427",
    formula="{temperature}²·KL(softmax(z({teacher})/{temperature}) ‖ softmax(z({student})/{temperature})), "
    "z = (logits − mean)/standard deviation",
    zero_at_equality=True,
    weight=9.0,
)
def kl_standardized(student: Tensor, teacher: Tensor, *, temperature: Temperature = 2.0) -> Tensor:
    """Kullback-Leibler divergence after each sample's logits are brought to mean 0 and deviation 1, times T².

    The student need not match the scale of the teacher's logits, only their relations. The deviation divides by V − 1,
    as in the released code, where the paper has V. The paper weighs the term by 9 beside 0.1 of the cross-entropy.

    Args:
        student: finite logits ``[..., V]``; where all are equal the gradient is finite but large.
        teacher: finite logits ``[..., V]``.
        temperature: T, positive: the deviation of the softened logits is 1/T.

    Returns:
        ``[...]``, in nats times T²; 0 where both are equal up to shift and scale.

    Reference: Sun et al. 2024, https://arxiv.org/abs/2403.01427.
    """
    return kl(_standardized(student), _standardized(teacher), temperature=temperature)


def _standardized(logits: Tensor) -> Tensor:
    wide = at_least_fp32(logits)
    centred = wide - wide.mean(-1, keepdim=True)
    deviation = safe_norm(centred, keepdim=True) / math.sqrt(max(logits.shape[-1] - 1, 1))
    return centred / (deviation + _SMALLEST)


def _fitting(mask: Tensor, logits: Tensor) -> Tensor:
    if mask.shape != logits.shape[:-1]:
        raise ObjectiveError(
            f"dist expected a mask {list(logits.shape[:-1])} for logits {list(logits.shape)}, got {list(mask.shape)}; "
            "name one that fits, or `mask: none`"
        )
    return mask


def _correlation(first: Tensor, second: Tensor, kept: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along an axis of those entries that count."""
    units = []
    for each in (first, second):
        mean = (each * kept).sum(dim, keepdim=True) / kept.sum(dim, keepdim=True).clamp_min(1)
        units.append(F.normalize((each - mean) * kept, dim=dim, eps=_SHORTEST))
    return (units[0] * units[1]).sum(dim)
