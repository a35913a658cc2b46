"""Losses between two distributions over classes, from their logits.

Shapes: ``[..., V]`` in, ``[...]`` out; ``V`` classes or tokens. All compute in at least fp32, also under autocast, and
all carry the factor T² that keeps the size of the gradient independent of the temperature (Hinton et al., 2015).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from potstill.losses.numerics import log_softmax
from potstill.registry import losses

Temperature = Annotated[float, Field(gt=0)]
"""Divides the logits before the softmax; above 1 it softens both distributions. No unit."""

_HINTON = "Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531"


@losses.register(
    "kl",
    per="position",
    reference=_HINTON,
    formula="{temperature}²·KL(softmax({teacher}/{temperature}) ‖ softmax({student}/{temperature}))",
    zero_at_equality=True,
)
def kl(student: Tensor, teacher: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the teacher's softened distribution to the student's, times T².

    Args:
        student: logits ``[..., V]``.
        teacher: logits ``[..., V]``; classes at −inf count as impossible and add nothing.
        temperature: T, positive.

    Returns:
        ``[...]``, in nats times T²; 0 where both agree.

    Reference: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015,
    https://arxiv.org/abs/1503.02531.
    """
    log_student = log_softmax(student, temperature)
    log_teacher = log_softmax(teacher, temperature)
    return temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


@losses.register(
    "soft_cross_entropy",
    per="position",
    reference=_HINTON,
    formula="{temperature}²·CE(softmax({teacher}/{temperature}), softmax({student}/{temperature}))",
)
def soft_cross_entropy(student: Tensor, teacher: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """Cross-entropy of the student's softened distribution under the teacher's, times T².

    It has the gradient of :func:`kl` and differs from it by the teacher's entropy, so it is not 0 at equality. This is
    the form of the paper.

    Args:
        student: logits ``[..., V]``.
        teacher: logits ``[..., V]``; classes at −inf count as impossible and add nothing.
        temperature: T, positive.

    Returns:
        ``[...]``, in nats times T².

    Reference: Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531.
    """
    log_student = log_softmax(student, temperature)
    return -(temperature**2) * (log_softmax(teacher, temperature).exp() * log_student).sum(-1)
