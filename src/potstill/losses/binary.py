"""Losses for classes that do not exclude each other: one sigmoid a class."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from potstill.losses.divergence import Temperature
from potstill.losses.numerics import LOWEST, at_least_fp32
from potstill.registry import losses


@losses.register(
    "binary_kl",
    per="position",
    reference="Yang et al. 2023, https://arxiv.org/abs/2308.06453",
    formula="{temperature}²·mean over the classes of KL(sigmoid({teacher}/{temperature}) ‖ "
    "sigmoid({student}/{temperature}))",
    zero_at_equality=True,
)
def binary_kl(student: Tensor, teacher: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """Kullback-Leibler divergence between two Bernoulli distributions, averaged over the classes, times T².

    For several labels at once: each class is a yes or no of its own, with probability sigmoid(logit/T). The paper sums
    over the classes; the mean keeps the weight of the term independent of their number, as the binary cross-entropy
    beside it does.

    Args:
        student: logits ``[..., C]``, one class is enough.
        teacher: logits ``[..., C]``; a class at −inf in both adds nothing, and counts in the mean.
        temperature: T, positive.

    Returns:
        ``[...]``, in nats times T²; 0 where both agree.

    Reference: multi-label logits distillation, Yang et al. 2023, https://arxiv.org/abs/2308.06453.
    """
    log_p, log_not_p = _log_bernoulli(teacher, temperature)
    log_q, log_not_q = _log_bernoulli(student, temperature)
    divergence = log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)
    return temperature**2 * divergence.mean(-1)


def _log_bernoulli(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Finite logarithms of the probabilities of yes and of no."""
    scaled = at_least_fp32(logits) / temperature
    return F.logsigmoid(scaled).clamp_min(LOWEST), F.logsigmoid(-scaled).clamp_min(LOWEST)
