"""Bare functions for a hand-written loop: reduced to one number, the same arithmetic as a recipe's objective."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from potstill.interfaces import IGNORED
from potstill.losses.divergence import kl
from potstill.losses.feature import mse
from potstill.losses.numerics import log_softmax
from potstill.losses.supervised import cross_entropy


def temperature_scaled_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return ``softmax(logits / temperature)`` over the last axis, in at least fp32.

    Args:
        logits: ``[..., V]``.
        temperature: positive; above 1 it softens.

    Raises:
        ValueError: the temperature is not positive.
    """
    _check_temperature(temperature)
    return log_softmax(logits, temperature).exp()


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, true_labels: Tensor, alpha: float = 0.7, temperature: float = 4.0
) -> Tensor:
    """Return ``alpha·T²·KL(teacher ‖ student) + (1 − alpha)·CE(labels, student)``.

    The divergence is summed over the classes and averaged over the batch ("batchmean"), of token labels ``[B, T]`` over
    the positions whose label is not −100; the cross-entropy is averaged over the labels that are not −100. ``alpha``
    weighs the soft loss. The same as the recipe
    ``{soft: {loss: kl, weight: alpha, temperature: T}, hard: {loss: cross_entropy, weight: 1 − alpha}}``.

    Args:
        student_logits: ``[..., C]``, with gradient.
        teacher_logits: ``[..., C]``; no gradient flows into it.
        true_labels: class ids ``[...]``.
        alpha: weight of the soft loss.
        temperature: T, positive.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: the temperature is not positive.

    Reference: Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531.
    """
    _check_temperature(temperature)
    soft = kl(student_logits, teacher_logits.detach(), temperature=temperature)
    labelled = true_labels != IGNORED
    count = labelled.sum().clamp_min(1)
    mean = soft.masked_fill(~labelled, 0).sum() / count if true_labels.ndim > 1 else soft.mean()
    hard = cross_entropy(student_logits, labels=true_labels).sum() / count
    return alpha * mean + (1 - alpha) * hard


def feature_distillation_loss(
    student_features: Tensor, teacher_features: Tensor, projection_layer: nn.Module | None = None
) -> Tensor:
    """Return the mean squared difference of two feature tensors, the student's projected first if asked.

    Args:
        student_features: ``[..., H_s]``, with gradient.
        teacher_features: ``[..., H_t]``; no gradient flows into it.
        projection_layer: maps ``H_s`` to ``H_t``; give its parameters to the optimizer too.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError: the shapes differ after the projection.

    Reference: Romero et al. 2015 (FitNets), https://arxiv.org/abs/1412.6550.
    """
    projected = student_features if projection_layer is None else projection_layer(student_features)
    if projected.shape != teacher_features.shape:
        raise ValueError(
            f"feature_distillation_loss expected features of the same shape, got {list(projected.shape)} and "
            f"{list(teacher_features.shape)}; give a projection_layer that maps the student's to the teacher's"
        )
    return torch.mean(mse(projected, teacher_features.detach()))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"expected a temperature greater than 0, got {temperature}")
