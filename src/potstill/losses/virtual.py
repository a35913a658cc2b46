"""Distillation without a teacher: the labels make one up."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from potstill.interfaces import IGNORED
from potstill.losses.decoupled import class_ids
from potstill.losses.divergence import Temperature, relative_entropy
from potstill.losses.numerics import at_least_fp32, log_softmax
from potstill.registry import losses


@losses.register(
    "virtual_teacher",
    per="position",
    reference="Yuan et al. 2019, https://arxiv.org/abs/1909.11723",
    formula="KL(u ‖ {student}) at temperature {temperature}, u = {correct} at the label and even elsewhere, "
    "in the form of the {form}",
    weight=0.1,
    virtual=True,
)
def virtual_teacher(
    student: Tensor,
    *,
    labels: Tensor,
    correct: Annotated[float, Field(gt=0, lt=1)] = 0.99,
    temperature: Temperature = 20.0,
    form: Literal["code", "paper"] = "code",
) -> Tensor:
    """Divergence from a made-up teacher u that is nearly sure of the label and finds all other classes alike (Tf-KD).

    The published figures come from the form of the released code: KL(softmax(u/T) ‖ softmax(student)). Its target,
    with probabilities in place of logits, is almost even at T = 20; the student is not softened, and there is no T².
    The code takes the mean over the classes, times 100, 50 or 1 by model; here it is the sum, which the factor 100
    makes of the mean on CIFAR-100. The paper softens both sides: its form here is
    :func:`~potstill.losses.divergence.kl` with ln u as the teacher's logits, T² included.

    Args:
        student: finite logits ``[..., C]``, at least 2 classes.
        labels: class ids ``[...]``, −100 where there is none.
        correct: probability of the label in u, in (0, 1); the rest is spread evenly.
        temperature: T, positive; 10 to 40 in the released settings, which weigh the term by 0.1 to 0.95 by model, and
            the cross-entropy by the rest to 1.
        form: ``code`` or ``paper``.

    Returns:
        ``[...]``, in nats, times T² for the paper's form; 0 where the label is −100.

    Raises:
        ObjectiveError: the labels are no class ids ``[...]``, or there is no second class.

    Reference: Yuan et al. 2019, https://arxiv.org/abs/1909.11723.
    """
    ids = class_ids("virtual_teacher", student, labels)
    logits = at_least_fp32(student)
    rest = math.log1p(-correct) - math.log(logits.shape[-1] - 1)
    log_u = torch.full_like(logits, rest).scatter(-1, ids, math.log(correct))
    if form == "code":
        value = relative_entropy(log_softmax(log_u.exp(), temperature), log_softmax(logits))
    else:
        value = temperature**2 * relative_entropy(log_softmax(log_u, temperature), log_softmax(logits, temperature))
    return value.masked_fill(labels == IGNORED, 0)
