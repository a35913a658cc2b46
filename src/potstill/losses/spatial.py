"""What losses between convolutional feature maps ``[B, C, H, W]`` share: checks, sizes, and layers that connect."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from potstill.errors import ObjectiveError
from potstill.losses.numerics import at_least_fp32


def check_maps(loss: str, student: Any, teacher: Any, sides: tuple[str, str] = ("student", "teacher")) -> None:
    """Say so where the signals are no two feature maps of one batch.

    Raises:
        ObjectiveError: one has not four axes, or they differ in the batch.
    """
    for side, signal in zip(sides, (student, teacher), strict=True):
        if not isinstance(signal, Tensor) or signal.ndim != 4:
            got = list(signal.shape) if isinstance(signal, Tensor) else f"{len(signal)} signals"
            raise ObjectiveError(
                f"{loss} expected a feature map [B, C, H, W] of the {side}, got {got}; tap a convolutional layer"
            )
    if len(student) != len(teacher):
        raise ObjectiveError(
            f"{loss} expected one batch, got {len(student)} samples of the {sides[0]} "
            f"and {len(teacher)} of the {sides[1]}"
        )


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return two feature maps in at least fp32, averaged to the smaller height and the smaller width of both."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return pooled(at_least_fp32(student), size), pooled(at_least_fp32(teacher), size)


def pooled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return feature maps averaged to a height and width, as they are where they have it already."""
    return maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size)


def channels_last(signal: Tensor) -> Tensor:
    """Return a signal with its channels last: ``[B, H, W, C]`` of ``[B, C, H, W]``, any other as it is."""
    return signal.movedim(1, -1) if signal.ndim == 4 else signal


class BatchNorm(_BatchNorm):
    """Batch normalisation of ``[B, C, ...]`` that a batch with one value a channel does not stop.

    Such a batch (the last of an epoch, with one sample) has no variance; the running statistics stand in for it. It
    computes in at least fp32, whatever the types of its input, its parameters and its statistics are.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input, of its shape and type."""
        learns = self.training and input.numel() > input.shape[1]
        wide = at_least_fp32(input)
        mean, variance, weight, bias = (
            None if each is None else each.to(wide.dtype)
            for each in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        value = F.batch_norm(wide, mean, variance, weight, bias, learns, self.momentum or 0.0, self.eps)
        if learns:
            self._remember(mean, variance)
        return value.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor | None, variance: Tensor | None) -> None:
        """Count the batch, and store statistics that were widened."""
        for own, new in ((self.running_mean, mean), (self.running_var, variance)):
            if own is not None and new is not None and own.dtype != new.dtype:
                own.copy_(new)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of axes."""


def connector(student: Tensor, teacher: Tensor) -> nn.Sequential:
    """Return a 1×1 convolution to the teacher's channels and a batch normalisation, on the student's device.

    Reference: Heo et al. 2019, https://arxiv.org/abs/1811.03233 and https://arxiv.org/abs/1904.01866, whose
    initialisation it has.
    """
    width = teacher.shape[1]
    convolution = nn.Conv2d(student.shape[1], width, kernel_size=1, bias=False, dtype=torch.float32)
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / width))
    return nn.Sequential(convolution, BatchNorm(width, dtype=torch.float32)).to(student.device)
