"""Losses between two distributions over different vocabularies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.errors import ObjectiveError
from potstill.losses.divergence import Temperature
from potstill.losses.numerics import at_least_fp32
from potstill.registry import losses


@losses.register(
    "uld",
    per="position",
    reference="Boizard et al. 2024 (ULD), https://arxiv.org/abs/2402.12030",
    formula="Σᵢ |sort(softmax({student}/{temperature}))ᵢ − sort(softmax({teacher}/{temperature}))ᵢ|",
    zero_at_equality=True,
    any_shape=True,
    weight=1.5,
    example_shape=(4, 3, 5),
    example_teacher_shape=(4, 3, 7),
)
def uld(student: Tensor, teacher: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """Wasserstein-1 distance between the probabilities in descending order, whatever tokens they belong to.

    It needs no common vocabulary: the smaller distribution is padded with zeros. The positions must correspond; where
    the tokenizers differ, gather the ends of spans that both have
    (:func:`potstill.knowledge.vocabulary.align_spans`). The paper and its code, which compare the k-th token of the
    one answer with the k-th of the other, have no factor T² and weigh the term 1.5.

    Args:
        student: logits ``[..., V]``.
        teacher: logits ``[..., V']`` at the same positions.
        temperature: T, positive; of both.

    Returns:
        ``[...]`` in [0, 2]; 0 where the sorted probabilities are the same.

    Raises:
        ObjectiveError: the signals differ in more than the vocabulary.

    Reference: Boizard et al. 2024 (ULD), https://arxiv.org/abs/2402.12030.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ObjectiveError(
            f"uld expected logits at the same positions, got student {list(student.shape)} and teacher "
            f"{list(teacher.shape)}; gather the spans that both tokenizers have first"
        )
    size = max(student.shape[-1], teacher.shape[-1])
    return (_sorted(student, temperature, size) - _sorted(teacher, temperature, size)).abs().sum(-1)


def _sorted(logits: Tensor, temperature: float, size: int) -> Tensor:
    """Return the probabilities in descending order, zeros up to ``size``."""
    probabilities = torch.softmax(at_least_fp32(logits) / temperature, dim=-1)
    return F.pad(probabilities.sort(dim=-1, descending=True).values, (0, size - logits.shape[-1]))
