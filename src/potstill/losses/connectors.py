"""Losses that learn how to bring the student's features to the teacher's while it trains.

Each is made of layers that a dry run sizes (see :class:`potstill.losses.sized.SizedLoss`) and that the optimizer trains
with the student. Where heights or widths of feature maps differ, the larger map is averaged to the smaller.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.errors import ObjectiveError
from potstill.losses.numerics import applied, at_least_fp32, unit, without_autocast
from potstill.losses.sized import SizedLoss
from potstill.losses.spatial import BatchNorm, channels_last, check_maps, connector, same_size
from potstill.registry import losses

Positive = Annotated[float, Field(gt=0)]
Width = Annotated[int, Field(gt=0)]

_STEPS = 100


@losses.register(
    "vid",
    per="position",
    reference="Ahn et al. 2019, https://arxiv.org/abs/1904.05835",
    formula="mean(({teacher} − μ({student}))² / σ² + log σ²) / 2",
    any_shape=True,
)
class Vid(SizedLoss):
    """Negative log-likelihood of the teacher's features under a Gaussian that the student's predict (VID).

    Three linear maps with ReLU between them (1×1 convolutions, without bias) give the mean μ; each channel of the
    teacher has one learned variance σ² = softplus(α) + ε. The constant log √2π is left out, so that the value can be
    below 0.

    Args:
        width: channels between the linear maps; those of the teacher if omitted, as in RepDistiller.
        variance: σ² at the start, above ``epsilon``.
        epsilon: ε, the least variance.

    Reference: Ahn et al. 2019, https://arxiv.org/abs/1904.05835.
    """

    def __init__(self, *, width: Width | None = None, variance: Positive = 5.0, epsilon: Positive = 1e-5) -> None:
        super().__init__()
        if variance <= epsilon:
            raise ObjectiveError(f"vid: the variance at the start, {variance:g}, must be above epsilon, {epsilon:g}")
        self.width, self.variance, self.epsilon = width, variance, epsilon

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Make the regressor and the variances."""
        said, taught = _alike("vid", student, teacher)
        width = self.width or taught.shape[-1]
        layers: list[nn.Module] = []
        for before, after in pairwise((said.shape[-1], width, width, taught.shape[-1])):
            layers += [nn.Linear(before, after, bias=False, dtype=torch.float32), nn.ReLU()]
        self.regressor = nn.Sequential(*layers[:-1]).to(said.device)
        start = self.variance - self.epsilon  # softplus of what follows gives it back, without overflow
        start += math.log(-math.expm1(-start))
        self.alpha = nn.Parameter(torch.full((taught.shape[-1],), start, dtype=torch.float32, device=said.device))

    @without_autocast
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return one value a position, the mean over the teacher's channels.

        Args:
            student: ``[B, C, H, W]``, or ``[..., H]``.
            teacher: ``[B, C', H', W']``, or ``[..., H']`` with the same positions.

        Returns:
            ``[B, H, W]`` of the smaller map, or ``[...]``.

        Raises:
            ObjectiveError: the signals differ in more than the channels and the size of the map.
        """
        said, taught = _alike("vid", student, teacher)
        variance = F.softplus(at_least_fp32(self.alpha)) + self.epsilon
        error = applied(self.regressor, said) - taught
        return (error.square() / variance + variance.log()).mean(-1) / 2


def _alike(loss: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return two signals with their channels last, in at least fp32, at the same positions."""
    if student.ndim == 4 and teacher.ndim == 4:
        student, teacher = same_size(student, teacher)
    said, taught = (channels_last(at_least_fp32(each)) for each in (student, teacher))
    if said.shape[:-1] != taught.shape[:-1]:
        raise ObjectiveError(
            f"{loss} expected signals that differ in the channels alone, got student {list(student.shape)} and "
            f"teacher {list(teacher.shape)}; pick layers of the same kind and length"
        )
    return said, taught


@losses.register(
    "factor_transfer",
    per="sample",
    reference="Kim, Park, Kwak 2018, https://arxiv.org/abs/1802.04977",
    formula="mean(|translator({student}) − paraphraser({teacher})|^{p}) of length 1 + {reconstruction}·reconstruction",
    any_shape=True,
    weight=500.0,
    example_shape=(4, 3, 4, 4),
    example_teacher_shape=(4, 4, 3, 3),
)
class FactorTransfer(SizedLoss):
    """Distance between a compressed form of the teacher's feature map, its factor, and the student's version of it.

    A paraphraser (three 3×3 convolutions, and three that undo them) compresses the teacher's map; a translator (three
    3×3 convolutions) makes the student's. In the paper the paraphraser is trained beforehand to reconstruct the
    teacher's map and then fixed. Here it is trained in the same run: its reconstruction error is added, and the
    distance of the factors does not reach it, so it cannot make itself easy to follow. A weight that rises from 0 comes
    nearest to the paper.

    The factors have length 1, and neither part has batch normalisation, both as in the authors' code, whose weight is
    500. RepDistiller takes the mean of the squared factors over the channels first and normalises batches in the
    translator, with a weight of 200.

    Args:
        rate: channels of the factor, as a share of the teacher's.
        p: power of the difference, 1 in the authors' code.
        reconstruction: weight within the term of the mean squared error of the reconstruction; with the term's weight
            of 500 the default counts it once.

    Reference: Kim, Park, Kwak 2018, https://arxiv.org/abs/1802.04977.
    """

    def __init__(
        self,
        *,
        rate: Annotated[float, Field(gt=0, le=1)] = 0.5,
        p: Literal[1, 2] = 1,
        reconstruction: Annotated[float, Field(ge=0)] = 0.002,
    ) -> None:
        super().__init__()
        self.rate, self.p, self.reconstruction = rate, p, reconstruction

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Make the paraphraser and the translator."""
        check_maps("factor_transfer", student, teacher)
        narrow, wide = student.shape[1], teacher.shape[1]
        factor = max(1, round(wide * self.rate))
        self.translator = _convolutions(nn.Conv2d, narrow, narrow, factor, factor).to(student.device)
        self.paraphraser = _convolutions(nn.Conv2d, wide, wide, factor, factor).to(student.device)
        self.decoder = _convolutions(nn.ConvTranspose2d, factor, factor, wide, wide).to(student.device)

    @without_autocast
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return one value a sample: the mean over the factor, and over the map for the reconstruction.

        Args:
            student: ``[B, C, H, W]``.
            teacher: ``[B, C', H', W']``.

        Returns:
            ``[B]``.

        Raises:
            ObjectiveError: a signal is no feature map.
        """
        check_maps("factor_transfer", student, teacher)
        source = at_least_fp32(teacher).detach()
        factor = applied(self.paraphraser, source)
        rebuilt = (applied(self.decoder, factor) - source).square().mean((1, 2, 3))
        said, taught = same_size(applied(self.translator, student), factor.detach())
        difference = unit(said.flatten(1)) - unit(taught.flatten(1))
        return difference.abs().pow(self.p).mean(1) + self.reconstruction * rebuilt


def _convolutions(kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], *widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [kind(before, after, 3, padding=1, dtype=torch.float32), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


@losses.register(
    "ab",
    per="batch",
    reference="Heo et al. 2019, https://arxiv.org/abs/1811.03233",
    formula="Σ (connected({student}) ∓ {margin})² where it is not beyond ±{margin} with the sign of {teacher}",
    any_shape=True,
    weight=0.003,
    example_shape=(4, 3, 3, 3),
    example_teacher_shape=(4, 4, 2, 2),
)
class ActivationBoundaries(SizedLoss):
    """Squared hinge that puts each neuron of the student on the teacher's side of 0 by a margin (AB).

    Tap both sides before the activation. A 1×1 convolution with batch normalisation connects the student where the
    channels differ. The authors use it alone, to initialise the student, with weight 0.003 for the last layer and half
    as much for each layer before it; RepDistiller counts those 3/1000 into the loss.

    Args:
        margin: how far beyond 0 the student should be.

    Reference: Heo, Lee, Yun, Choi 2019, https://arxiv.org/abs/1811.03233.
    """

    def __init__(self, *, margin: Positive = 1.0) -> None:
        super().__init__()
        self.margin = margin

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Make the connector."""
        check_maps("ab", student, teacher)
        same = student.shape[1] == teacher.shape[1]
        self.connector: nn.Module = nn.Identity() if same else connector(student, teacher)

    @without_autocast
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the sum over channels and positions, averaged over the batch.

        Args:
            student: ``[B, C, H, W]`` before the activation.
            teacher: ``[B, C', H', W']`` before the activation; a neuron is on above 0.

        Returns:
            A number that is not negative.

        Raises:
            ObjectiveError: a signal is no feature map.
        """
        check_maps("ab", student, teacher)
        said, taught = same_size(student, teacher)
        said = applied(self.connector, said)
        wanted = torch.where(taught > 0, said, -said)
        return F.relu(self.margin - wanted).square().sum((1, 2, 3)).mean()


@losses.register(
    "ofd",
    per="batch",
    reference="Heo et al. 2019, https://arxiv.org/abs/1904.01866",
    formula="Σ (connected({student}) − max({teacher}, m))² where it is above max({teacher}, m) or that above 0",
    any_shape=True,
    weight=0.001,
    example_shape=(4, 3, 3, 3),
    example_teacher_shape=(4, 4, 2, 2),
)
class Overhaul(SizedLoss):
    """Partial squared distance to the teacher's features before the activation (overhaul of feature distillation).

    The target is max(teacher, m), a ReLU with a negative margin m for each channel; where it is not above 0, the
    student may be anywhere below it. A 1×1 convolution with batch normalisation connects the student. Tap both sides
    before the activation.

    m is the mean of the channel's negative responses. The paper derives it from the batch normalisation that comes
    before; here it is measured: the mean over the batches seen in training, of the last hundred or so at the end.

    The weight of 0.001 is the authors' for CIFAR-100, for the last layer; each layer before it has half as much. On
    ImageNet they use 0.0001.

    Reference: Heo et al. 2019, https://arxiv.org/abs/1904.01866.
    """

    margin: Tensor
    batches: Tensor

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Make the connector and the margins, which are 0 until a batch is seen."""
        check_maps("ofd", student, teacher)
        self.connector = connector(student, teacher)
        for name in ("margin", "batches"):
            self.register_buffer(name, torch.zeros(teacher.shape[1], dtype=torch.float32, device=student.device))

    @without_autocast
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the sum over channels and positions, averaged over the batch.

        Args:
            student: ``[B, C, H, W]`` before the activation.
            teacher: ``[B, C', H', W']`` before the activation.

        Returns:
            A number that is not negative.

        Raises:
            ObjectiveError: a signal is no feature map.
        """
        check_maps("ofd", student, teacher)
        said, taught = same_size(student, teacher)
        if self.training:
            self._measure(at_least_fp32(teacher).detach())
        target = torch.maximum(taught, at_least_fp32(self.margin)[:, None, None])
        difference = applied(self.connector, said) - target
        counts = (difference > 0) | (target > 0)
        return (difference.square() * counts).sum((1, 2, 3)).mean()

    @torch.no_grad()
    def _measure(self, teacher: Tensor) -> None:
        below = teacher < 0
        number = below.sum((0, 2, 3))
        mean = (teacher * below).sum((0, 2, 3)) / number.clamp_min(1)
        self.batches.add_(number > 0)
        change = (mean - self.margin) / self.batches.clamp(1, _STEPS)
        self.margin.add_(torch.where(number > 0, change, torch.zeros_like(change)))


@losses.register(
    "srd",
    per="batch",
    reference="Miles, Mikolajczyk 2024, https://arxiv.org/abs/2303.11098",
    formula="log Σ |norm(linear({student})) − norm({teacher})|^{exponent}",
    any_shape=True,
    weight=2.0,
    example_shape=(6, 5),
    example_teacher_shape=(6, 4),
)
class SimpleRecipe(SizedLoss):
    """Logarithm of the sum of a high power of the differences of normalised features (simple recipe distillation).

    A linear projector brings the student's features to the teacher's width; both are normalised over the batch, without
    scale and shift. The sum is over the channels and the mean over the batch is taken before the logarithm: the paper's
    sum over the batch is larger by its logarithm and has the same gradient. The weight of 2 is that of the authors'
    code for ImageNet, beside cross-entropy and KL at temperature 1 with weight 1 each.

    Args:
        exponent: power of the differences, 4 in the authors' code.
        epsilon: added before the logarithm, so that it is finite where both agree.

    Reference: Miles, Mikolajczyk 2024, https://arxiv.org/abs/2303.11098.
    """

    def __init__(self, *, exponent: Annotated[float, Field(ge=1)] = 4.0, epsilon: Positive = 1e-5) -> None:
        super().__init__()
        self.exponent, self.epsilon = exponent, epsilon

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Make the projector and the statistics of both sides."""
        said, taught = _vectors(student, teacher)
        width, kind = taught.shape[1], torch.float32
        self.projector = nn.Linear(said.shape[1], width, dtype=kind).to(said.device)
        self.student_norm = BatchNorm(width, eps=1e-4, affine=False, dtype=kind).to(said.device)
        self.teacher_norm = BatchNorm(width, eps=1e-4, affine=False, dtype=kind).to(said.device)

    @without_autocast
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return one number for the batch.

        Args:
            student: ``[B, H]``, or ``[B, C, H, W]`` to be averaged over its positions.
            teacher: ``[B, H']``, or ``[B, C', H', W']``.

        Raises:
            ObjectiveError: a signal is neither, or they differ in the batch.
        """
        said, taught = _vectors(student, teacher)
        difference: Tensor = self.student_norm(applied(self.projector, said)) - self.teacher_norm(taught)
        return (difference.abs().pow(self.exponent).sum(1).mean() + self.epsilon).log()


def _vectors(student: Tensor, teacher: Tensor) -> list[Tensor]:
    """Return one vector a sample of each side, in at least fp32."""
    wide = [at_least_fp32(each) for each in (student, teacher)]
    vectors = [each.mean((2, 3)) if each.ndim == 4 else each for each in wide]
    if [each.ndim for each in vectors] != [2, 2] or len(student) != len(teacher):
        raise ObjectiveError(
            f"srd expected [B, H] or [B, C, H, W] of each side, got student {list(student.shape)} and teacher "
            f"{list(teacher.shape)}; tap the pooled features"
        )
    return vectors
