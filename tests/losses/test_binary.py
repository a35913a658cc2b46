"""Multi-label distillation against SciPy, torch's binary cross-entropy and the two-class softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr
from torch.nn import functional as F

from potstill.losses.binary import binary_kl
from potstill.losses.divergence import kl


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_against_scipy(temperature):
    student, teacher = logits(4, 3, 6, seed=1), logits(4, 3, 6, seed=2)
    p, q = (expit(each.numpy() / temperature) for each in (teacher, student))
    expected = temperature**2 * (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean(-1)
    np.testing.assert_allclose(binary_kl(student, teacher, temperature=temperature).numpy(), expected, rtol=1e-9)


def test_it_is_binary_cross_entropy_less_the_entropy():
    student, teacher = logits(4, 6, seed=3), logits(4, 6, seed=4)
    p = teacher.sigmoid()
    cross, entropy = (F.binary_cross_entropy_with_logits(each, p, reduction="none") for each in (student, teacher))
    torch.testing.assert_close(binary_kl(student, teacher), (cross - entropy).mean(-1))


def test_one_class_is_a_softmax_with_a_second_logit_of_0():
    student, teacher = logits(5, 1, seed=5), logits(5, 1, seed=6)
    expected = kl(F.pad(student, (0, 1)), F.pad(teacher, (0, 1)), temperature=2.0)
    torch.testing.assert_close(binary_kl(student, teacher, temperature=2.0), expected)


def test_gradient():
    """T·(σ of the student − σ of the teacher) / C: of one size at every temperature, and smaller by the mean."""
    student, teacher = logits(4, 6, seed=7).requires_grad_(), logits(4, 6, seed=8)
    binary_kl(student, teacher, temperature=3.0).sum().backward()
    expected = 3 / 6 * ((student.detach() / 3).sigmoid() - (teacher / 3).sigmoid())
    torch.testing.assert_close(student.grad, expected)


def test_classes_do_not_compete():
    """A softmax would change with the other classes."""
    student, teacher = logits(4, 2, seed=9), logits(4, 2, seed=10)
    both = binary_kl(student, teacher)
    torch.testing.assert_close(
        both, (binary_kl(student[:, :1], teacher[:, :1]) + binary_kl(student[:, 1:], teacher[:, 1:])) / 2
    )


def test_impossible_classes_add_nothing():
    student, teacher = logits(4, 3, seed=11), logits(4, 3, seed=12)
    hidden = torch.tensor([False, False, True])
    masked = student.masked_fill(hidden, -math.inf).requires_grad_()
    value = binary_kl(masked, teacher.masked_fill(hidden, -math.inf))
    torch.testing.assert_close(value, 2 / 3 * binary_kl(student[:, :2], teacher[:, :2]))
    value.sum().backward()
    assert torch.isfinite(masked.grad).all()
    assert (masked.grad[:, 2] == 0).all()
