"""Losses that treat the labelled class apart from the others, or weigh what the teacher says by it.

Shapes: logits ``[..., C]`` and class ids ``[...]`` in, ``[...]`` out; 0 where the label is −100.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from potstill.errors import ObjectiveError
from potstill.interfaces import IGNORED
from potstill.losses.divergence import Temperature, relative_entropy, soft_cross_entropy
from potstill.losses.numerics import log_softmax
from potstill.registry import losses

Part = Annotated[float, Field(ge=0)]
"""Weight of one part of a loss beside the other. No unit."""


def class_ids(loss: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Return class ids ``[..., 1]`` that can be looked up, 0 where the label is −100.

    Args:
        loss: the registered name, for the message.
        logits: ``[..., C]``.
        labels: class ids ``[...]``.

    Raises:
        ObjectiveError: the labels are no class ids, do not fit the logits, or there is no second class.
    """
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ObjectiveError(
            f"{loss} expected class ids {list(logits.shape[:-1])}, got labels {list(labels.shape)} of type "
            f"{labels.dtype}; with mixed labels use a loss that needs none, such as kl"
        )
    if logits.shape[-1] < 2:
        raise ObjectiveError(f"{loss} expected logits of at least 2 classes, got {list(logits.shape)}; use binary_kl")
    return labels.long().masked_fill(labels == IGNORED, 0).unsqueeze(-1)


@losses.register(
    "dkd",
    per="position",
    reference="Zhao et al. 2022, https://arxiv.org/abs/2203.08679",
    formula="{temperature}²·[{alpha}·KL(label or not: {teacher} ‖ {student}) + "
    "{beta}·KL(among the other classes: {teacher} ‖ {student})] at temperature {temperature}",
    zero_at_equality=True,
)
def dkd(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    alpha: Part = 1.0,
    beta: Part = 8.0,
    temperature: Temperature = 4.0,
) -> Tensor:
    """Decoupled distillation: α·T²·KL of the label against the rest + β·T²·KL among the other classes.

    In :func:`~potstill.losses.divergence.kl` the second part is weighed by the probability that the teacher gives to
    the other classes, which is nearly 0 where it is confident; here it is not. Both parts stay finite at any size of
    the logits, where the released code takes the logarithm of a sum that underflows.

    Args:
        student: logits ``[..., C]``, at least 2 classes.
        teacher: logits ``[..., C]``.
        labels: class ids ``[...]``, −100 where there is none.
        alpha: weight of the label against the rest.
        beta: weight of the other classes. By pair the released code takes 8, 6 or 2 on CIFAR-100, and 0.5 or 2 at
            temperature 1 on ImageNet. Its linear warm-up over the first 20 of 240 epochs, or the first of 100, is left
            to the term's weight.
        temperature: T, positive.

    Returns:
        ``[...]``, in nats times T²; 0 where both agree or the label is −100.

    Raises:
        ObjectiveError: the labels are no class ids ``[...]``, or there is no second class.

    Reference: Zhao et al. 2022, https://arxiv.org/abs/2203.08679.
    """
    ids = class_ids("dkd", student, labels)
    (log_p, log_p_others), (log_q, log_q_others) = (_decoupled(each, ids, temperature) for each in (teacher, student))
    value = alpha * relative_entropy(log_p, log_q) + beta * relative_entropy(log_p_others, log_q_others)
    return temperature**2 * value.masked_fill(labels == IGNORED, 0)


@losses.register(
    "nkd",
    per="position",
    reference="Yang et al. 2023, https://arxiv.org/abs/2303.13005",
    formula="−p(label)·log q(label) + {gamma}·{temperature}²·CE(among the other classes, at temperature {temperature}),"
    " p = softmax({teacher}), q = softmax({student})",
)
def nkd(
    student: Tensor, teacher: Tensor, *, labels: Tensor, gamma: Part = 1.5, temperature: Temperature = 1.0
) -> Tensor:
    """Normalised distillation: the teacher's probability of the label, and the others renormalised to sum to 1.

    −p(label)·log q(label) + γ·T²·CE of the student's distribution among the other classes under the teacher's. Only
    the second part is softened. It is a cross-entropy, so it is not 0 at equality.

    Args:
        student: logits ``[..., C]``, at least 2 classes.
        teacher: logits ``[..., C]``.
        labels: class ids ``[...]``, −100 where there is none.
        gamma: weight of the other classes.
        temperature: T of the other classes, positive; 1 on ImageNet.

    Returns:
        ``[...]``, in nats; 0 where the label is −100.

    Raises:
        ObjectiveError: the labels are no class ids ``[...]``, or there is no second class.

    Reference: Yang et al. 2023, https://arxiv.org/abs/2303.13005.
    """
    ids = class_ids("nkd", student, labels)
    of_label = log_softmax(teacher).gather(-1, ids).exp() * log_softmax(student).gather(-1, ids)
    log_p_others, log_q_others = (_decoupled(each, ids, temperature)[1] for each in (teacher, student))
    others = temperature**2 * (log_p_others.exp() * log_q_others).sum(-1)
    return -(of_label.squeeze(-1) + gamma * others).masked_fill(labels == IGNORED, 0)


@losses.register(
    "wsld",
    per="position",
    reference="Zhou et al. 2021, https://arxiv.org/abs/2102.00650",
    formula="(1 − exp(−CE(labels, {student})/CE(labels, {teacher})))·"
    "{temperature}²·CE(softmax({teacher}/{temperature}), softmax({student}/{temperature})), the first factor constant",
    weight=2.5,
    stops_gradient=True,
)
def wsld(student: Tensor, teacher: Tensor, *, labels: Tensor, temperature: Temperature = 2.0) -> Tensor:
    """Soft cross-entropy times T², less where the student knows the label better than the teacher does.

    Its factor 1 − exp(−CE of the student / CE of the teacher), both with the label and at temperature 1, gets no
    gradient. The paper weighs the term by 2.5 at T = 2 (ImageNet); another code of the field by 2.25 at T = 4
    (CIFAR-100).

    Args:
        student: logits ``[..., C]``, at least 2 classes.
        teacher: logits ``[..., C]``.
        labels: class ids ``[...]``, −100 where there is none.
        temperature: T, positive.

    Returns:
        ``[...]``, in nats times T²; 0 where the label is −100.

    Raises:
        ObjectiveError: the labels are no class ids ``[...]``, or there is no second class.

    Reference: Zhou et al. 2021, https://arxiv.org/abs/2102.00650.
    """
    ids = class_ids("wsld", student, labels)
    of_student, of_teacher = (-log_softmax(each.detach()).gather(-1, ids).squeeze(-1) for each in (student, teacher))
    factor = -torch.expm1(-of_student / (of_teacher + 1e-7))
    return factor.masked_fill(labels == IGNORED, 0) * soft_cross_entropy(student, teacher, temperature=temperature)


def _decoupled(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Finite log-probabilities: of the label and of all others together ``[..., 2]``, and among those ``[..., C]``."""
    log_all = log_softmax(logits, temperature)
    labelled = torch.zeros_like(log_all, dtype=torch.bool).scatter(-1, ids, True)
    others = log_all.masked_fill(labelled, -math.inf)
    return torch.cat([log_all.gather(-1, ids), others.logsumexp(-1, keepdim=True)], -1), log_softmax(others)
