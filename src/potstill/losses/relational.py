"""Losses between the relations of the samples of a batch: distances, angles and similarities instead of features.

Each sample is one vector: its signal flattened, or with a mask ``[B, T]`` and a signal ``[B, T, H]`` the mean over the
positions that count. Student and teacher may differ in width. A batch of one sample has no relations and costs 0. Only
the samples that one process sees at once are related; a larger batch per step shows more.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from potstill.errors import ObjectiveError
from potstill.losses.numerics import at_least_fp32, unit, without_autocast
from potstill.registry import losses

_RKD = "Park et al. 2019, https://arxiv.org/abs/1904.05068"
_SMALLEST = 1e-7
_ROUNDING = 8


@losses.register(
    "rkd_distance",
    per="batch",
    reference=_RKD,
    formula="smooth_l1(distances({student}), distances({teacher})), each over their mean",
    zero_at_equality=True,
    any_shape=True,
    weight=25.0,
)
@without_autocast
def rkd_distance(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Smooth L1 difference of the distances between samples, each side's divided by their mean (RKD-D).

    The mean is over all pairs of two samples, also where they are equal; the value is averaged over all B² entries, the
    diagonal included, as in the authors' code. The weight of 25 is RepDistiller's; the paper has 1 beside a metric
    learning loss.

    Args:
        student: ``[B, …]``.
        teacher: ``[B, …]``.
        mask: the positions that count in a signal ``[B, T, H]``; other signals do not use it.

    Returns:
        0-d.

    Raises:
        ObjectiveError: the mask does not fit.

    Reference: Park et al., *Relational Knowledge Distillation*, 2019, https://arxiv.org/abs/1904.05068.
    """
    ours, theirs = (_distances(side) for side in _both("rkd_distance", student, teacher, mask))
    return F.smooth_l1_loss(ours, theirs)


@losses.register(
    "rkd_angle",
    per="batch",
    reference=_RKD,
    formula="smooth_l1(angles({student}), angles({teacher})) over all triples",
    zero_at_equality=True,
    any_shape=True,
    weight=50.0,
)
@without_autocast
def rkd_angle(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Smooth L1 difference of the cosines of the angles that three samples form (RKD-A).

    The cosines come from the distances, so that memory grows with B³ and not with the width as well. The value is
    averaged over all B³ entries, those without an angle (0) included, as in the authors' code. The weight of 50 is
    RepDistiller's; the paper has 2 beside a metric learning loss.

    Args:
        student: ``[B, …]``.
        teacher: ``[B, …]``.
        mask: the positions that count in a signal ``[B, T, H]``; other signals do not use it.

    Returns:
        0-d.

    Raises:
        ObjectiveError: the mask does not fit.

    Reference: Park et al., *Relational Knowledge Distillation*, 2019, https://arxiv.org/abs/1904.05068.
    """
    ours, theirs = (_angles(_distances(side)) for side in _both("rkd_angle", student, teacher, mask))
    return F.smooth_l1_loss(ours, theirs)


@losses.register(
    "similarity",
    per="batch",
    reference="Tung, Mori 2019, https://arxiv.org/abs/1907.09682",
    formula="mean((G({student}) − G({teacher}))²), G = X·Xᵀ with rows of length 1",
    zero_at_equality=True,
    any_shape=True,
    weight=3000.0,
)
@without_autocast
def similarity(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Squared difference of the similarities between samples, whose rows have length 1, over B² (SP).

    Args:
        student: ``[B, …]``; features after a rectifier in the paper.
        teacher: ``[B, …]``.
        mask: the positions that count in a signal ``[B, T, H]``; other signals do not use it.

    Returns:
        0-d.

    Raises:
        ObjectiveError: the mask does not fit.

    Reference: Tung, Mori, *Similarity-Preserving Knowledge Distillation*, 2019, https://arxiv.org/abs/1907.09682.
    """
    ours, theirs = (unit(_gram(side)) for side in _both("similarity", student, teacher, mask))
    return (ours - theirs).square().mean()


@losses.register(
    "correlation_congruence",
    per="batch",
    reference="Peng et al. 2019, https://arxiv.org/abs/1904.01802",
    formula="mean((K({student}) − K({teacher}))²), K = e^(−2·{gamma})·Σₚ (2·{gamma}·cos)ᵖ/p!, p ≤ {order}",
    zero_at_equality=True,
    any_shape=True,
)
@without_autocast
def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    gamma: Annotated[float, Field(gt=0)] = 0.4,
    order: Annotated[int, Field(ge=1, le=20)] = 2,
) -> Tensor:
    """Squared difference of the correlations between samples, a Gaussian kernel of vectors of length 1 (CC).

    The kernel is e^(−γ·|x − y|²), its Taylor series cut after the power ``order``. RepDistiller's loss of this name is
    another one, the products of the absolute differences of neighbours in the batch, and its weight of 0.02 is for
    that; Knowledge-Distillation-Zoo has this formula with a weight of 100.

    Args:
        student: ``[B, …]``.
        teacher: ``[B, …]``.
        mask: the positions that count in a signal ``[B, T, H]``; other signals do not use it.
        gamma: γ of the kernel, positive.
        order: the highest power of the series.

    Returns:
        0-d.

    Raises:
        ObjectiveError: the mask does not fit.

    Reference: Peng et al., *Correlation Congruence for Knowledge Distillation*, 2019,
    https://arxiv.org/abs/1904.01802.
    """
    factors = [math.exp(-2 * gamma) * (2 * gamma) ** power / math.factorial(power) for power in range(order + 1)]
    kernels = []
    for side in _both("correlation_congruence", student, teacher, mask):
        cosines = _gram(unit(side))
        kernel = torch.zeros_like(cosines)
        for factor in reversed(factors):
            kernel = kernel * cosines + factor
        kernels.append(kernel)
    return (kernels[0] - kernels[1]).square().mean()


@losses.register(
    "cka",
    per="batch",
    reference="Kornblith et al. 2019, https://arxiv.org/abs/1905.00414",
    formula="1 − CKA({student}, {teacher})",
    zero_at_equality=True,
    any_shape=True,
)
@without_autocast
def cka(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """One minus the linear centred kernel alignment of the features of a batch.

    It ignores rotations and a common scale of either side. With fewer samples than features the alignment is near 1
    for anything, so that it needs large batches or narrow signals.

    Args:
        student: ``[B, …]``.
        teacher: ``[B, …]``.
        mask: the positions that count in a signal ``[B, T, H]``; other signals do not use it.

    Returns:
        0-d in [0, 1]; 0 where both sides are constant, 1 where one is.

    Raises:
        ObjectiveError: the mask does not fit.

    Reference: Kornblith et al., *Similarity of Neural Network Representations Revisited*, 2019,
    https://arxiv.org/abs/1905.00414.
    """
    grams = []
    for side in _both("cka", student, teacher, mask):
        moved = side - side[:1].detach()  # exactly 0 where all samples are equal, which a mean is not
        grams.append(unit(_gram(moved - moved.mean(0)).flatten()))
    constant = (grams[0] == 0).all() & (grams[1] == 0).all()
    return (1 - (grams[0] * grams[1]).sum()).masked_fill(constant, 0)


@losses.register(
    "pkt",
    per="batch",
    reference="Passalis, Tefas 2018, https://arxiv.org/abs/1803.10837",
    formula="mean(P({teacher})·log(P({teacher})/P({student}))), P = (1 + cos)/2 with rows of sum 1",
    zero_at_equality=True,
    any_shape=True,
    weight=30000.0,
)
@without_autocast
def pkt(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Divergence from the teacher's probabilities that samples are neighbours to the student's (PKT).

    They are cosine similarities moved to [0, 1] and divided by their sum for each sample. As in the authors' code a
    sample is its own neighbour too, and the value is averaged over all B² entries, for which the weight of 30000 is
    made; the paper sums over pairs of two.

    Args:
        student: ``[B, …]``.
        teacher: ``[B, …]``.
        mask: the positions that count in a signal ``[B, T, H]``; other signals do not use it.

    Returns:
        0-d, in nats.

    Raises:
        ObjectiveError: the mask does not fit.

    Reference: Passalis, Tefas, *Learning Deep Representations with Probabilistic Knowledge Transfer*, 2018,
    https://arxiv.org/abs/1803.10837.
    """
    ours, theirs = (_neighbours(unit(side)) for side in _both("pkt", student, teacher, mask))
    return (theirs * (theirs.clamp_min(_SMALLEST).log() - ours.clamp_min(_SMALLEST).log())).mean()


def rows(name: str, signal: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return one vector a sample, ``[B, D]`` in at least fp32.

    Args:
        name: of the loss, for messages.
        signal: ``[B, …]``, flattened; ``[B, T, H]`` with a mask gives the mean over the positions that count.
        mask: ``[B, T]``; signals with other than three axes do not use it.

    Raises:
        ObjectiveError: the mask does not fit the positions.
    """
    wide = at_least_fp32(signal)
    if mask is None or wide.ndim != 3:
        return wide.reshape(wide.shape[0], -1)
    if mask.shape != wide.shape[:2]:
        raise ObjectiveError(
            f"{name} expected a mask {list(wide.shape[:2])} of the positions of a signal {list(wide.shape)}, got "
            f"{list(mask.shape)}; name the entry of the batch that masks them, or say `mask: none`"
        )
    counts = mask != 0
    return wide.masked_fill(~counts[..., None], 0).sum(1) / counts.sum(1, keepdim=True).clamp_min(1)


def _both(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if student.shape[0] != teacher.shape[0]:
        raise ObjectiveError(
            f"{name} expected as many samples on both sides, got student {list(student.shape)} and teacher "
            f"{list(teacher.shape)}"
        )
    return rows(name, student, mask), rows(name, teacher, mask)


def _distances(vectors: Tensor) -> Tensor:
    """Return Euclidean distances ``[B, B]`` over their mean; the gradient of a distance of 0 is 0.

    The values come from differences, which an offset costs no digits; the gradient comes from products, since that of
    ``torch.cdist`` stores ``[B, B, D]`` on a GPU. It fades for samples that little more than rounding tells apart.
    """
    with torch.no_grad():
        distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    gram = _gram(vectors - vectors.mean(0).detach())
    lengths = gram.diagonal()[:, None] + gram.diagonal()
    squares = lengths - 2 * gram
    apart = distances > 0
    least = torch.finfo(gram.dtype).eps * _ROUNDING * lengths.detach().sqrt()
    divisor = torch.where(apart, 2 * torch.maximum(distances, least), torch.ones_like(distances))
    distances = torch.where(apart, distances + (squares - squares.detach()) / divisor, distances)
    mean = distances.sum() / max(vectors.shape[0] * (vectors.shape[0] - 1), 1)
    return distances / torch.where(mean > 0, mean, torch.ones_like(mean))


def _angles(distances: Tensor) -> Tensor:
    """Return the cosine ``[B, B, B]`` at sample j between the directions to i and k as [j, i, k]; 0 where i or k is j.

    By the law of cosines; 0 also where another sample is equal to j.
    """
    squares = distances.square()
    sides = 2 * distances[:, :, None] * distances[:, None, :]
    across = squares[:, :, None] + squares[:, None, :] - squares[None]
    there = sides > 0
    return torch.where(there, across / torch.where(there, sides, torch.ones_like(sides)), torch.zeros_like(sides))


def _gram(vectors: Tensor) -> Tensor:
    return vectors @ vectors.T


def _neighbours(units: Tensor) -> Tensor:
    """Return the probabilities ``[B, B]`` that samples are neighbours, by row."""
    closeness = (1 + _gram(units)) / 2
    return closeness / closeness.sum(-1, keepdim=True)
