"""Losses between features: ``[..., H]`` in, the mean over the last axis out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.losses.numerics import at_least_fp32
from potstill.registry import losses


@losses.register(
    "mse",
    per="position",
    reference="Romero et al. 2015, https://arxiv.org/abs/1412.6550; Ba, Caruana 2014, https://arxiv.org/abs/1312.6184",
    formula="mean(({student} − {teacher})²)",
    zero_at_equality=True,
)
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference, averaged over the last axis.

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
    formula="1 − cos({student}, {teacher})",
    zero_at_equality=True,
)
def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of the angle between two feature vectors, as in DistilBERT.

    Args:
        student: ``[..., H]``.
        teacher: ``[..., H]``.

    Returns:
        ``[...]`` in [0, 2]; a vector of zeros has cosine 0 with everything.

    Reference: Sanh et al. 2019, https://arxiv.org/abs/1910.01108.
    """
    unit_student = F.normalize(at_least_fp32(student), dim=-1)
    unit_teacher = F.normalize(at_least_fp32(teacher), dim=-1)
    return 1 - torch.sum(unit_student * unit_teacher, dim=-1)
