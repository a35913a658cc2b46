"""Losses between several feature maps at once, from the shallow to the deep."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.errors import ObjectiveError
from potstill.losses.numerics import applied, at_least_fp32, without_autocast
from potstill.losses.sized import SizedLoss
from potstill.losses.spatial import BatchNorm, pooled
from potstill.registry import losses

_LEVELS = (4, 2, 1)


@losses.register(
    "review",
    per="batch",
    reference="Chen, Liu, Zhao, Jia 2021, https://arxiv.org/abs/2104.09044",
    formula="Σ over the maps of HCL(review({student}), {teacher})",
    any_shape=True,
    example_shape=((4, 2, 6, 6), (4, 3, 3, 3), (4, 4, 1, 1)),
    example_teacher_shape=((4, 3, 6, 6), (4, 4, 4, 4), (4, 2, 1, 1)),
)
class Review(SizedLoss):
    """Each feature map of the teacher taught to all the student's from that depth on (ReviewKD).

    The student's maps are fused from the deepest to the shallowest: a 1×1 convolution, attention between it and what
    comes from below, enlarged to its size, then a 3×3 convolution to the teacher's channels. Each result is compared
    with the teacher's map as it is and averaged to 4×4, 2×2 and 1×1, with shares of 1, ½, ¼ and ⅛ (hierarchical context
    loss; levels that are not smaller than the map are left out).

    The weight is 1 for ResNet-34 to ResNet-18 on ImageNet and 8 for MobileNet there, on CIFAR-100 5 for ResNet-32x4 and
    0.6 for ResNet-56 to ResNet-20. On CIFAR-100 the authors let it rise over the first 20 of 240 epochs:
    ``weight: {from: 0, to: 5, end: 0.083}``.

    Args:
        width: channels of the fused maps, at most those of the student's deepest; 256 for MobileNet.

    Reference: Chen, Liu, Zhao, Jia 2021, https://arxiv.org/abs/2104.09044.
    """

    def __init__(self, *, width: Annotated[int, Field(gt=0)] = 512) -> None:
        super().__init__()
        self.width = width

    def build(self, student: Any, teacher: Any) -> None:
        """Make one fusion a map."""
        said, taught = _maps(student, teacher)
        width, last = min(self.width, said[-1].shape[1]), len(said) - 1
        self.fusions = nn.ModuleList(
            _Fusion(own.shape[1], width, other.shape[1], fuse=index < last)
            for index, (own, other) in enumerate(zip(said, taught, strict=True))
        ).to(said[0].device)

    @without_autocast
    def forward(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        """Return the sum over the maps, each averaged over the batch.

        Args:
            student: maps ``[B, C, H, W]`` from the shallowest to the deepest; a pooled vector ``[B, C]`` counts as 1×1.
            teacher: as many.

        Returns:
            A number that is not negative.

        Raises:
            ObjectiveError: not as many maps a side, or a signal is no feature map.
        """
        said, taught = _maps(student, teacher)
        deeper: Tensor | None = None
        parts: list[Tensor] = []
        for fusion, own, other in reversed(list(zip(self.fusions, said, taught, strict=True))):
            reviewed, deeper = fusion(own, deeper, other.shape[2:])
            parts.append(_hierarchical(reviewed, other))
        return torch.stack(parts).sum()


class _Fusion(nn.Module):
    """A map and what comes from the deeper ones, weighed by attention, brought to the teacher's size and channels."""

    def __init__(self, channels: int, width: int, target: int, *, fuse: bool) -> None:
        super().__init__()
        kind = torch.float32
        inward = nn.Conv2d(channels, width, 1, bias=False, dtype=kind)
        outward = nn.Conv2d(width, target, 3, padding=1, bias=False, dtype=kind)
        for convolution in (inward, outward):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.inward = nn.Sequential(inward, BatchNorm(width, dtype=kind))
        self.outward = nn.Sequential(outward, BatchNorm(target, dtype=kind))
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1, dtype=kind), nn.Sigmoid()) if fuse else None

    def forward(self, own: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the map for the teacher's and the one for the next, shallower fusion."""
        fused = applied(self.inward, own)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            shares = applied(self.attention, torch.cat([fused, deeper], 1))
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        if fused.shape[2:] != size:
            fused = F.interpolate(fused, size, mode="nearest")
        return applied(self.outward, fused), fused


def _maps(student: Any, teacher: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the maps of both sides in at least fp32, vectors as maps of 1×1."""
    sides = []
    for name, signals in (("student", student), ("teacher", teacher)):
        several = [signals] if isinstance(signals, Tensor) else list(signals)
        maps = [at_least_fp32(each[..., None, None] if each.ndim == 2 else each) for each in several]
        wrong = [list(each.shape) for each in maps if each.ndim != 4]
        if wrong:
            raise ObjectiveError(f"review expected feature maps [B, C, H, W] of the {name}, got {wrong[0]}")
        sides.append(maps)
    said, taught = sides
    if len(said) != len(taught):
        raise ObjectiveError(f"review expected as many maps a side, got {len(said)} and {len(taught)} of the teacher")
    return said, taught


def _hierarchical(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference at the map's own size and averaged to smaller ones, weighed."""
    total, share, shares = F.mse_loss(student, teacher), 1.0, 1.0
    for level in _LEVELS:
        if level < min(student.shape[2:]):
            share /= 2
            shares += share
            size = (level, level)
            total = total + share * F.mse_loss(pooled(student, size), pooled(teacher, size))
    return total / shares
