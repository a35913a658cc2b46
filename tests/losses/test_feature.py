"""Losses between features, against numbers from their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from potstill.losses.feature import cosine, mse


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, shape))


def test_mse_by_hand():
    student, teacher = (
        torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 0.0, 6.0], [1.0, 1.0, 1.0]]),
    )
    assert mse(student, teacher).tolist() == pytest.approx([13 / 3, 1.0])


def test_mse_is_the_mean_over_the_last_axis_alone():
    """A sum over the width would make the weight of a hint depend on the width of the layer."""
    student, teacher = features(2, 3, 4, seed=1), features(2, 3, 4, seed=2)
    wide = (student.numpy().astype(np.longdouble) - teacher.numpy()) ** 2
    np.testing.assert_allclose(mse(student, teacher).numpy(), wide.mean(-1).astype(float), rtol=1e-13)
    doubled = mse(torch.cat([student, student], -1), torch.cat([teacher, teacher], -1))
    torch.testing.assert_close(doubled, mse(student, teacher))


def test_mse_gradient():
    student, teacher = features(3, 4, seed=3).requires_grad_(), features(3, 4, seed=4)
    mse(student, teacher).sum().backward()
    torch.testing.assert_close(student.grad, 2 / 4 * (student.detach() - teacher))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([1.0, 0.0], [0.0, 2.0], 1.0),
        ([1.0, 0.0], [3.0, 3.0], 1 - math.sqrt(0.5)),
        ([3.0, 4.0], [4.0, 3.0], 1 - 24 / 25),
        ([1.0, -2.0], [-2.0, 4.0], 2.0),
        ([1.0, 2.0], [10.0, 20.0], 0.0),
        ([0.0, 0.0], [1.0, 2.0], 1.0),
    ],
)
def test_cosine_by_hand(student, teacher, expected):
    value = cosine(torch.tensor([student], dtype=torch.float64), torch.tensor([teacher], dtype=torch.float64))
    assert value.item() == pytest.approx(expected, abs=1e-12)


def test_cosine_in_extended_precision():
    student, teacher = features(2, 5, 6, seed=5), features(2, 5, 6, seed=6)
    s, t = (each.numpy().astype(np.longdouble) for each in (student, teacher))
    expected = 1 - (s * t).sum(-1) / np.sqrt((s**2).sum(-1) * (t**2).sum(-1))
    np.testing.assert_allclose(cosine(student, teacher).numpy(), expected.astype(float), rtol=1e-12, atol=1e-14)


def test_cosine_ignores_length_and_its_gradient_is_orthogonal_to_the_student():
    student, teacher = features(4, 6, seed=7).requires_grad_(), features(4, 6, seed=8)
    torch.testing.assert_close(cosine(student * 100, teacher), cosine(student, teacher))
    cosine(student, teacher).sum().backward()
    torch.testing.assert_close((student.grad * student.detach()).sum(-1), torch.zeros(4).double(), atol=1e-12, rtol=0)
    assert (student.grad.norm(dim=-1) > 1e-3).all()


def test_a_zero_vector_gives_a_finite_gradient():
    """ReLU features of a dead layer are all zero; one NaN there would wipe out the student."""
    student = torch.zeros(2, 3, requires_grad=True)
    cosine(student, torch.ones(2, 3)).sum().backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", [mse, cosine])
def test_narrow_types_are_widened(loss):
    student, teacher = features(3, 300, seed=9).bfloat16(), features(3, 300, seed=10).bfloat16()
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.double(), teacher.double()).float(), rtol=1e-5, atol=1e-6)
