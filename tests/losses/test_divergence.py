"""The divergences against numbers from the formulas, by hand and in extended precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from potstill.losses.divergence import kl, log_softmax, soft_cross_entropy
from potstill.registry import losses

LN2, LN3 = math.log(2), math.log(3)


def wide_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax in extended precision, by its definition."""
    powers = np.exp(logits.astype(np.longdouble) / np.longdouble(temperature))
    return powers / powers.sum(-1, keepdims=True)


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape))


# by hand: teacher (3/4, 1/4), student (1/2, 1/2)
@pytest.mark.parametrize(
    ("temperature", "teacher", "expected"),
    [
        (1.0, [LN3, 0.0], 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        (1.0, [LN3, 0.0], 0.13081204),
        (2.0, [2 * LN3, 0.0], 0.52324814),  # the same distributions at T = 2, so T² = 4 times as much
        (4.0, [4 * LN3, 0.0], 2.09299258),
        (0.5, [LN3 / 2, 0.0], 0.03270301),
    ],
)
def test_kl_by_hand(temperature, teacher, expected):
    value = kl(torch.zeros(1, 2).double(), torch.tensor([teacher], dtype=torch.float64), temperature=temperature)
    assert value.item() == pytest.approx(expected, abs=5e-9)


def test_kl_goes_from_the_teacher_to_the_student():
    """With the arguments of KL swapped (mode-seeking instead of mean-seeking) training still works, only worse."""
    student, teacher = torch.zeros(1, 2).double(), torch.tensor([[LN3, 0.0]], dtype=torch.float64)
    swapped = 0.5 * math.log(4 / 3)  # Σ ½ log(½ / p)
    assert kl(student, teacher).item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * LN2, abs=1e-12)
    assert kl(teacher, student).item() == pytest.approx(swapped, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kl_and_soft_cross_entropy_in_extended_precision(temperature):
    student, teacher = logits(6, 7, seed=1), logits(6, 7, seed=2)
    q, p = wide_softmax(student.numpy(), temperature), wide_softmax(teacher.numpy(), temperature)
    divergence = np.longdouble(temperature) ** 2 * (p * np.log(p / q)).sum(-1)
    entropy = -(np.longdouble(temperature) ** 2) * (p * np.log(q)).sum(-1)
    ours = kl(student, teacher, temperature=temperature).numpy()
    np.testing.assert_allclose(ours, divergence.astype(float), rtol=1e-12, atol=1e-13)
    ours = soft_cross_entropy(student, teacher, temperature=temperature).numpy()
    np.testing.assert_allclose(ours, entropy.astype(float), rtol=1e-12)


def test_soft_cross_entropy_by_hand():
    student, teacher = torch.zeros(1, 2).double(), torch.tensor([[2 * LN3, 0.0]], dtype=torch.float64)
    assert soft_cross_entropy(student, teacher, temperature=2.0).item() == pytest.approx(4 * LN2, abs=1e-12)
    # at equality it is the entropy of (3/4, 1/4) times T², not 0
    entropy = 4 * (0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert soft_cross_entropy(teacher, teacher, temperature=2.0).item() == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize("loss", [kl, soft_cross_entropy])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 10.0])
def test_gradient_is_temperature_times_the_difference_of_probabilities(loss, temperature):
    """Without T² the soft gradient would shrink by T², and the hard loss would silently take over."""
    student, teacher = logits(5, 4, seed=3).requires_grad_(), logits(5, 4, seed=4)
    loss(student, teacher, temperature=temperature).sum().backward()
    difference = wide_softmax(student.detach().numpy(), temperature) - wide_softmax(teacher.numpy(), temperature)
    np.testing.assert_allclose(student.grad.numpy(), (temperature * difference).astype(float), rtol=1e-10, atol=1e-12)


def test_a_high_temperature_gives_half_the_mean_squared_difference_of_centred_logits():
    """T²·KL(T) → (1 / 2V)·Σ(centred difference)²: Hinton et al. 2015, section 2.1. A lost T² gives 10⁻⁶ of it."""
    student, teacher = logits(8, 9, seed=5, scale=1.0), logits(8, 9, seed=6, scale=1.0)
    difference = (teacher - teacher.mean(-1, keepdim=True)) - (student - student.mean(-1, keepdim=True))
    limit = difference.square().sum(-1) / (2 * 9)
    value = kl(student, teacher, temperature=1000.0)
    torch.testing.assert_close(value, limit, rtol=5e-3, atol=0)
    closer = kl(student, teacher, temperature=10_000.0)
    assert ((closer - limit).abs() < (value - limit).abs()).all()


@pytest.mark.parametrize("loss", [kl, soft_cross_entropy])
def test_impossible_classes_count_as_if_they_were_not_there(loss):
    """−inf classes (a padded vocabulary) must neither give NaN nor change the value."""
    student, teacher = logits(3, 5, seed=7), logits(3, 5, seed=8)
    hidden = torch.tensor([False, True, False, False, True])
    masked_student = student.masked_fill(hidden, -math.inf).requires_grad_()
    value = loss(masked_student, teacher.masked_fill(hidden, -math.inf), temperature=2.0)
    torch.testing.assert_close(value, loss(student[:, ~hidden], teacher[:, ~hidden], temperature=2.0))
    value.sum().backward()
    assert torch.isfinite(masked_student.grad).all()
    assert (masked_student.grad[:, hidden] == 0).all()


def test_a_class_that_only_the_student_excludes_costs_much():
    """A −inf of the student where the teacher has mass is a huge loss; 0·inf must not hide it."""
    value = kl(torch.tensor([[0.0, -math.inf]]), torch.zeros(1, 2))
    assert value.item() > 1e30
    value = kl(torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]]))
    assert value.item() == pytest.approx(LN2)


def test_adding_a_constant_to_all_logits_changes_nothing():
    student, teacher = logits(4, 6, seed=9), logits(4, 6, seed=10)
    torch.testing.assert_close(kl(student + 50, teacher - 30), kl(student, teacher))


def test_leading_axes_are_kept():
    student, teacher = logits(2, 3, 4, 5, seed=11), logits(2, 3, 4, 5, seed=12)
    value = kl(student, teacher, temperature=3.0)
    assert value.shape == (2, 3, 4)
    torch.testing.assert_close(value[1, 2, 0], kl(student[1, 2, 0], teacher[1, 2, 0], temperature=3.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_widened_before_the_softmax(dtype):
    """In bf16 a softmax over a large vocabulary loses its tail; only the inputs may be rounded."""
    student, teacher = logits(4, 50, seed=13).to(dtype), logits(4, 50, seed=14).to(dtype)
    value = kl(student, teacher, temperature=4.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value, kl(student.double(), teacher.double(), temperature=4.0).float(), rtol=1e-5, atol=0
    )


def test_log_softmax_keeps_double_and_is_finite():
    value = log_softmax(torch.tensor([0.0, -math.inf], dtype=torch.float64), 2.0)
    assert value.dtype == torch.float64
    assert value.tolist() == [0.0, torch.finfo(torch.float64).min]
    assert log_softmax(torch.tensor([0.0, -math.inf]))[1] == torch.finfo(torch.float32).min


@pytest.mark.parametrize("name", ["kl", "soft_cross_entropy"])
@pytest.mark.parametrize("temperature", [0, -1.0, "warm", "4", True])
def test_a_wrong_temperature_is_a_problem(name, temperature):
    """A text such as '4' that passes the check would be a traceback in the first step of the training."""
    problems = losses.check(name, {"temperature": temperature}, path=("objective", "soft"))
    assert [problem.path for problem in problems] == [("objective", "soft", "temperature")]
    assert losses.check(name, {"temperature": 4}) == []
