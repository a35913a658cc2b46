"""Losses between features ``[..., H]``: ``mse`` and ``cosine`` average over the last axis, so widths do not matter."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from potstill.errors import ObjectiveError
from potstill.losses.numerics import at_least_fp32, safe_norm, unit
from potstill.losses.spatial import channels_last
from potstill.registry import losses

Axis = Literal[-1, 1]
"""Along which the features of a position lie: the last one, or 1 for the channels of maps ``[B, C, H, W]``."""

_EPSILON = 1e-6


@losses.register(
    "mse",
    per="position",
    reference="Romero et al. 2015, https://arxiv.org/abs/1412.6550; Ba, Caruana 2014, https://arxiv.org/abs/1312.6184",
    formula="mean(({student} − {teacher})²)",
    zero_at_equality=True,
)
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference, averaged over the last axis.

    With ``project: linear`` of the term it is the hint of FitNets, which came with weights of 10 to 100; on
    ``hidden.n`` it is the hidden-state loss of TinyBERT.

    Args:
        student: ``[..., H]``, features or logits.
        teacher: ``[..., H]``.

    Returns:
        ``[...]``, in squared units of the signal.

    Reference: on features FitNets, https://arxiv.org/abs/1412.6550; on logits https://arxiv.org/abs/1312.6184.
    """
    return (at_least_fp32(student) - at_least_fp32(teacher)).square().mean(-1)


@losses.register(
    "cosine",
    per="position",
    reference="Sanh et al. 2019, https://arxiv.org/abs/1910.01108",
    formula="(1 − cos({student}, {teacher}))",
    zero_at_equality=True,
)
def cosine(student: Tensor, teacher: Tensor, *, axis: Axis = -1) -> Tensor:
    """One minus the cosine of the angle between two feature vectors, as in DistilBERT.

    Args:
        student: ``[..., H]``, or ``[B, C, H, W]`` with ``axis: 1``.
        teacher: of the same shape.
        axis: along which a vector lies: −1 for vectors, tokens and heads, 1 for the channels of a feature map, whose
            last axis is its width.

    Returns:
        ``[...]``, or ``[B, H, W]``, in [0, 2]; a vector of zeros has cosine 0 with everything.

    Reference: Sanh et al. 2019, https://arxiv.org/abs/1910.01108.
    """
    unit_student, unit_teacher = unit(at_least_fp32(student), axis), unit(at_least_fp32(teacher), axis)
    return 1 - torch.sum(unit_student * unit_teacher, dim=axis)


@losses.register(
    "normalized_mse",
    per="position",
    reference="Sun et al. 2019, https://arxiv.org/abs/1908.09355",
    formula="‖{student}/‖{student}‖ − {teacher}/‖{teacher}‖‖²",
    zero_at_equality=True,
)
def normalized_mse(student: Tensor, teacher: Tensor, *, axis: Axis = -1) -> Tensor:
    """Squared distance between two feature vectors of length 1, as in BERT-PKD (patient distillation).

    It is the sum over the axis, as the paper writes it, and so twice ``cosine`` where no vector is 0. The authors'
    code takes the mean, which is H times smaller: their weights of 10 to 1000 are to be divided by H here. They compare
    the vectors of the first token alone.

    Args:
        student: ``[..., H]``, or ``[B, C, H, W]`` with ``axis: 1``.
        teacher: of the same shape.
        axis: along which a vector lies: −1 for vectors, tokens and heads, 1 for the channels of a feature map, whose
            last axis is its width.

    Returns:
        ``[...]``, or ``[B, H, W]``, in [0, 4].

    Reference: Sun et al. 2019, https://arxiv.org/abs/1908.09355.
    """
    unit_student, unit_teacher = unit(at_least_fp32(student), axis), unit(at_least_fp32(teacher), axis)
    return (unit_student - unit_teacher).square().sum(axis)


@losses.register(
    "pearson",
    per="batch",
    reference="Cao et al. 2022, https://arxiv.org/abs/2207.02039",
    formula="mean over channels(1 − Pearson({student}, {teacher}))",
    zero_at_equality=True,
    weight=6.0,
)
def pearson(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """One minus the Pearson correlation of each channel over all positions of the batch, as in PKD for detectors.

    Each channel is standardised over samples and positions; half the mean squared difference of two such channels is
    1 − r. A channel that is constant counts 0 where both are, else ½. The weight is 6 for each level of the pyramid in
    two-stage detectors, 10 in one-stage ones.

    Args:
        student: ``[B, C, H, W]``, or ``[B, T, H]`` or ``[B, H]`` with the channels last.
        teacher: of the same shape.
        mask: positions that count, ``[B]`` or one value a position.

    Returns:
        A number in [0, 2].

    Raises:
        ObjectiveError: the shapes differ, or the mask does not fit.

    Reference: Cao et al. 2022, https://arxiv.org/abs/2207.02039.
    """
    if student.shape != teacher.shape:
        raise ObjectiveError(
            f"pearson expected signals of one shape, got student {list(student.shape)} and teacher "
            f"{list(teacher.shape)}; `project: linear` maps one to the other"
        )
    wide_student, wide_teacher = (channels_last(at_least_fp32(each)) for each in (student, teacher))
    share = _shares(wide_student, mask)
    difference = _standardised(wide_student, share) - _standardised(wide_teacher, share)
    return (share * difference.flatten(0, -2).square()).sum(0).mean() / 2


def _shares(features: Tensor, mask: Tensor | None) -> Tensor:
    """Return the share of each position in a mean over those that count, ``[N, 1]``."""
    positions = features[..., 0]
    if mask is None:
        return torch.full_like(positions, 1 / positions.numel()).reshape(-1, 1)
    if positions.shape[: mask.ndim] != mask.shape:
        raise ObjectiveError(f"pearson: a mask {list(mask.shape)} does not fit positions {list(positions.shape)}")
    counted = mask.to(features.dtype).reshape(mask.shape + (1,) * (positions.ndim - mask.ndim)).expand_as(positions)
    return (counted / counted.sum().clamp_min(1)).reshape(-1, 1)


def _standardised(features: Tensor, share: Tensor) -> Tensor:
    """Return features with mean 0 and variance 1 in each channel, of their shape."""
    flat = features.flatten(0, -2)
    centred = flat - (share * flat).sum(0)
    return (centred / (safe_norm(share.sqrt() * centred, 0) + _EPSILON)).view(features.shape)
