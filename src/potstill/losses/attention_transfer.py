"""Losses between what feature maps ``[B, C, H, W]`` have beside their channels: where they look, what goes together.

None has parameters; where heights or widths differ, the larger map is averaged to the smaller.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from potstill.errors import ObjectiveError
from potstill.losses.numerics import safe_norm, unit, without_autocast
from potstill.losses.spatial import check_maps, same_size
from potstill.registry import losses

Form = Literal["code", "paper"]
"""Which of two published formulas: that of the authors' code, to which the usual weight belongs, or of the paper."""

Power = Annotated[float, Field(ge=1)]

_FSP = "https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html"


@losses.register(
    "attention_transfer",
    per="sample",
    reference="Zagoruyko, Komodakis 2017, https://arxiv.org/abs/1612.03928",
    formula="distance(Q({student}), Q({teacher})), Q = mean over channels |F|^{p}, of length 1 ({form})",
    zero_at_equality=True,
    any_shape=True,
    weight=1000.0,
    example_shape=(4, 3, 4, 4),
    example_teacher_shape=(4, 2, 3, 3),
)
def attention_transfer(student: Tensor, teacher: Tensor, *, p: Power = 2.0, form: Form = "code") -> Tensor:
    """Distance between two attention maps: where in the picture the activations are large (AT).

    The map of a sample is the mean over the channels of |F|^p, flattened and brought to length 1.

    Args:
        student: ``[B, C, H, W]``.
        teacher: ``[B, C', H', W']``.
        p: the power; 1, 2 and 4 in the paper.
        form: ``code`` is the mean of the squared differences, as the authors' code has it and RepDistiller after it;
            the weight of 1000 is for this one. ``paper`` is the length of the difference (equation 2), of a weight
            near 0.1.

    Returns:
        ``[B]``, in [0, 2 / HW] for ``code``, in [0, √2] for ``paper``.

    Raises:
        ObjectiveError: a signal is no feature map.

    Reference: Zagoruyko, Komodakis 2017, https://arxiv.org/abs/1612.03928.
    """
    check_maps("attention_transfer", student, teacher)
    difference = torch.sub(*(_attention(each, p) for each in same_size(student, teacher)))
    return difference.square().mean(-1) if form == "code" else safe_norm(difference)


def _attention(maps: Tensor, p: float) -> Tensor:
    """Return attention maps of length 1, ``[B, HW]``; the size of the features is taken out before the power."""
    size = maps.detach().abs().amax((1, 2, 3), keepdim=True)
    scaled = maps / torch.where(size > 0, size, torch.ones_like(size))
    return unit(scaled.abs().pow(p).mean(1).flatten(1))


@losses.register(
    "nst",
    per="sample",
    reference="Huang, Wang 2017, https://arxiv.org/abs/1707.01219",
    formula="MMD²({student}, {teacher}) between channels, kernel (x·y + {constant})^{degree}",
    zero_at_equality=True,
    any_shape=True,
    weight=50.0,
    example_shape=(4, 3, 4, 4),
    example_teacher_shape=(4, 2, 3, 3),
)
@without_autocast
def nst(
    student: Tensor,
    teacher: Tensor,
    *,
    degree: Annotated[int, Field(ge=1)] = 2,
    constant: Annotated[float, Field(ge=0)] = 0.0,
) -> Tensor:
    """Squared maximum mean discrepancy between the channels of two feature maps (neuron selectivity transfer).

    Each channel, flattened and brought to length 1, is one sample of a distribution over selectivity patterns; the
    numbers of channels may differ. The part that only the teacher enters is kept, so that 0 means agreement.

    Args:
        student: ``[B, C, H, W]``.
        teacher: ``[B, C', H', W']``.
        degree: d of the polynomial kernel (x·y + c)^d; 1 is the linear kernel.
        constant: c of the kernel.

    Returns:
        ``[B]``, not negative but for rounding.

    Raises:
        ObjectiveError: a signal is no feature map.

    Reference: Huang, Wang 2017, https://arxiv.org/abs/1707.01219, for the polynomial kernel with weight 50.
    """
    check_maps("nst", student, teacher)
    said, taught = (unit(each.flatten(2)) for each in same_size(student, teacher))

    def kernel(left: Tensor, right: Tensor) -> Tensor:
        return (left @ right.mT + constant).pow(degree).mean((1, 2))

    return kernel(said, said) + kernel(taught, taught) - 2 * kernel(said, taught)


@losses.register(
    "fsp",
    per="sample",
    reference=f"Yim, Joo, Bae, Kim 2017, {_FSP}",
    formula="mean((FSP({student}) − FSP({teacher}))²)",
    zero_at_equality=True,
    any_shape=True,
    weight=50.0,
    example_shape=((4, 3, 4, 4), (4, 2, 2, 2)),
)
@without_autocast
def fsp(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Squared difference of two matrices of the flow between an earlier and a later layer (FSP).

    The matrix of a sample is the mean over the positions of the product of every channel of the earlier map with every
    one of the later. The weight of 50 and the average pooling are RepDistiller's; the paper pools by the maximum, sums
    over the matrix where this takes the mean, and uses it to initialise the student.

    Args:
        student: the earlier map ``[B, C, H, W]`` and the later ``[B, D, H', W']``.
        teacher: the same of the teacher, with the same C and D; the heights and widths may differ.

    Returns:
        ``[B]``.

    Raises:
        ObjectiveError: a side is no pair of feature maps, or the channels differ.

    Reference: Yim, Joo, Bae, Kim 2017,
    https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html.
    """
    said, taught = _flow(student, "student"), _flow(teacher, "teacher")
    if said.shape != taught.shape:
        raise ObjectiveError(
            f"fsp expected maps with the same channels, got {list(said.shape[1:])} of the student and "
            f"{list(taught.shape[1:])} of the teacher; pick layers of the same width"
        )
    return (said - taught).square().mean((1, 2))


def _flow(maps: Any, side: str) -> Tensor:
    if not isinstance(maps, tuple | list) or len(maps) != 2:
        raise ObjectiveError(f"fsp expected two signals of the {side}, an earlier and a later feature map")
    check_maps("fsp", maps[0], maps[1], (f"{side}'s earlier layer", f"{side}'s later layer"))
    earlier, later = same_size(maps[0], maps[1])
    return earlier.flatten(2) @ later.flatten(2).mT / earlier[0, 0].numel()


@losses.register(
    "icc",
    per="sample",
    reference="Liu et al. 2021, https://arxiv.org/abs/2202.03680",
    formula="‖ICC({student}) − ICC({teacher})‖², ICC the products of channels ({form})",
    zero_at_equality=True,
    any_shape=True,
    weight=2.5,
    example_shape=(4, 3, 4, 4),
    example_teacher_shape=(4, 3, 3, 3),
)
@without_autocast
def icc(student: Tensor, teacher: Tensor, *, form: Form = "code") -> Tensor:
    """Squared difference of two matrices of the correlations between channels (ICKD-C).

    The entries are the products of two flattened channels of one sample, so that a large one says that both see the
    same. Where the numbers of channels differ, ``project: linear`` brings the student's to the teacher's; the authors
    do so in any case, with a batch normalisation behind it.

    Args:
        student: ``[B, C, H, W]``.
        teacher: ``[B, C, H', W']``.
        form: ``code`` brings each row to length 1 and divides the sum of the squares by C, as the authors' code for
            CIFAR-100, to which the weight of 2.5 belongs; their code for ImageNet divides by the size of the batch once
            more (weight 500). ``paper`` divides the sum of the squares by C², of rows as they are.

    Returns:
        ``[B]``.

    Raises:
        ObjectiveError: a signal is no feature map, or the channels differ.

    Reference: Liu et al. 2021, https://arxiv.org/abs/2202.03680.
    """
    check_maps("icc", student, teacher)
    if student.shape[1] != teacher.shape[1]:
        raise ObjectiveError(
            f"icc expected as many channels, got {student.shape[1]} of the student and {teacher.shape[1]} of the "
            "teacher; `project: linear` maps one to the other"
        )
    grams = (each.flatten(2) @ each.flatten(2).mT for each in same_size(student, teacher))
    if form == "paper":
        return torch.sub(*grams).square().mean((1, 2))
    return torch.sub(*(unit(each) for each in grams)).square().sum(-1).mean(-1)
