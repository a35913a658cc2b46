"""The divergences against numbers from the formulas, by hand and in extended precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr

from potstill.interfaces import Progress
from potstill.losses.divergence import (
    alpha_beta,
    jsd,
    kl,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
    soft_cross_entropy,
    symmetric_kl,
    taid,
    total_variation,
)
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
    assert value.item() > 1e8
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


DIVERGENCES = [name for name in losses.names() if losses.get(name).__module__ == "potstill.losses.divergence"]


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in DIVERGENCES), ("alpha_beta", {"alpha": 0, "beta": 0})]
)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min])
def test_a_class_that_one_side_excludes_gives_finite_numbers(name, options, temperature, low):
    """The lowest number of fp32 times T² is inf, and inf times what is left of a gradient is NaN."""
    whole, partly = torch.tensor([[0.5, -0.5, 0.25, 1.0]]), torch.tensor([[0.5, low, 0.0, low]])
    for student, teacher in ((whole, partly), (partly, whole), (partly, whole.flip(-1))):
        leaf = student.clone().requires_grad_()
        value = losses.get(name)(leaf, teacher, temperature=temperature, **options)
        assert torch.isfinite(value).all()
        assert value.item() > 1e-3
        value.sum().backward()
        assert torch.isfinite(leaf.grad).all()
        assert (leaf.grad[student == low] == 0).all()


@pytest.mark.parametrize("name", ["kl", "soft_cross_entropy"])
@pytest.mark.parametrize("temperature", [0, -1.0, "warm", "4", True])
def test_a_wrong_temperature_is_a_problem(name, temperature):
    """A text such as '4' that passes the check would be a traceback in the first step of the training."""
    problems = losses.check(name, {"temperature": temperature}, path=("objective", "soft"))
    assert [problem.path for problem in problems] == [("objective", "soft", "temperature")]
    assert losses.check(name, {"temperature": 4}) == []


def naive(a, b):
    """KL(a ‖ b) of probabilities, by its definition; works on NumPy arrays and on tensors."""
    log = torch.log if isinstance(a, torch.Tensor) else np.log
    return (a * log(a / b)).sum(-1)


def naive_alpha_beta(p, q, a, b):
    """The formula of ABKD, as the paper prints it."""
    c = a + b
    return -(p**a * q**b - a / c * p**c - b / c * q**c).sum(-1) / (a * b)


# name: (loss with options, the divergence of probabilities by its definition, its size beside KL at a high temperature)
OTHERS = {
    "reverse_kl": (reverse_kl, {}, lambda p, q: naive(q, p), 1),
    "symmetric_kl": (symmetric_kl, {}, lambda p, q: naive(p, q) / 2 + naive(q, p) / 2, 1),
    "jsd": (jsd, {}, lambda p, q: naive(p, (p + q) / 2) / 2 + naive(q, (p + q) / 2) / 2, 1 / 4),
    "jsd_teacher": (
        jsd,
        {"beta": 0.8},
        lambda p, q: 0.8 * naive(p, 0.8 * p + 0.2 * q) + 0.2 * naive(q, 0.8 * p + 0.2 * q),
        0.16,
    ),
    "skewed_kl": (skewed_kl, {}, lambda p, q: naive(p, 0.1 * p + 0.9 * q), 0.81),
    "skewed_reverse_kl": (skewed_reverse_kl, {"alpha": 0.3}, lambda p, q: naive(q, 0.7 * p + 0.3 * q), 0.49),
    "total_variation": (total_variation, {}, lambda p, q: abs(p - q).sum(-1) / 2, None),
    "alpha_beta": (alpha_beta, {}, lambda p, q: naive_alpha_beta(p, q, 0.2, 0.7), None),
    "alpha_beta_large": (alpha_beta, {"alpha": 1.5, "beta": 2}, lambda p, q: naive_alpha_beta(p, q, 1.5, 2.0), None),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergences_in_extended_precision(name, temperature):
    loss, options, formula, _ = OTHERS[name]
    student, teacher = logits(6, 7, seed=15), logits(6, 7, seed=16)
    q, p = wide_softmax(student.numpy(), temperature), wide_softmax(teacher.numpy(), temperature)
    ours = loss(student, teacher, temperature=temperature, **options).numpy()
    np.testing.assert_allclose(ours, (temperature**2 * formula(p, q)).astype(float), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_are_those_of_the_formulas(name):
    """A logarithm that is clamped or detached too much gives right values and a wrong gradient."""
    loss, options, formula, _ = OTHERS[name]
    student, teacher = logits(6, 7, seed=17).requires_grad_(), logits(6, 7, seed=18)
    (ours,) = torch.autograd.grad(loss(student, teacher, temperature=3.0, **options).sum(), student)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    (plain,) = torch.autograd.grad(9 * formula(p, q).sum(), student)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, entry in OTHERS.items() if entry[3]])
def test_size_at_a_high_temperature(name):
    """Of second order every f-divergence is KL times a number: a lost T² or a wrong share of a mixture shows."""
    loss, options, _, size = OTHERS[name]
    student, teacher = logits(8, 9, seed=19, scale=1.0), logits(8, 9, seed=20, scale=1.0)
    value = loss(student, teacher, temperature=1000.0, **options)
    torch.testing.assert_close(value, size * kl(student, teacher, temperature=1000.0), rtol=5e-3, atol=0)


def test_divergences_against_scipy():
    student, teacher = logits(5, 6, seed=21), logits(5, 6, seed=22)
    p, q = teacher.softmax(-1).numpy(), student.softmax(-1).numpy()
    np.testing.assert_allclose(jsd(student, teacher).numpy(), jensenshannon(p, q, axis=-1) ** 2, rtol=1e-10)
    np.testing.assert_allclose(reverse_kl(student, teacher).numpy(), rel_entr(q, p).sum(-1), rtol=1e-10)


def test_directions_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2): which of the two is in front, and whose share is which."""
    student, teacher = torch.zeros(1, 2).double(), torch.tensor([[LN3, 0.0]], dtype=torch.float64)
    assert reverse_kl(student, teacher).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-12)
    first, second = 0.75 * 0.2 + 0.5 * 0.8, 0.25 * 0.2 + 0.5 * 0.8  # 0.2 of the teacher
    forward = 0.75 * math.log(0.75 / first) + 0.25 * math.log(0.25 / second)
    backward = 0.5 * math.log(0.5 / first) + 0.5 * math.log(0.5 / second)
    assert skewed_kl(student, teacher, alpha=0.2).item() == pytest.approx(forward, abs=1e-12)
    assert skewed_reverse_kl(student, teacher, alpha=0.8).item() == pytest.approx(backward, abs=1e-12)
    mixed = 0.2 * forward + 0.8 * backward
    assert jsd(student, teacher, beta=0.2).item() == pytest.approx(mixed, abs=1e-12)
    assert total_variation(student, teacher).item() == pytest.approx(0.25, abs=1e-12)


def test_the_ends_of_jsd_are_the_divergences_and_not_its_limits():
    student, teacher = logits(5, 6, seed=23), logits(5, 6, seed=24)
    torch.testing.assert_close(jsd(student, teacher, beta=0, temperature=2.0), kl(student, teacher, temperature=2.0))
    torch.testing.assert_close(jsd(student, teacher, beta=1), reverse_kl(student, teacher))
    small = 1e-7
    torch.testing.assert_close(jsd(student, teacher, beta=small) / small, kl(student, teacher), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        jsd(student, teacher, beta=1 - small) / small, reverse_kl(student, teacher), rtol=1e-4, atol=0
    )


def test_jsd_is_the_same_with_both_sides_exchanged():
    student, teacher = logits(5, 6, seed=25), logits(5, 6, seed=26)
    torch.testing.assert_close(jsd(student, teacher, beta=0.3), jsd(teacher, student, beta=0.7))
    assert not torch.allclose(jsd(student, teacher, beta=0.3), jsd(teacher, student, beta=0.3))


def test_skew_0_is_no_skew():
    student, teacher = logits(5, 6, seed=27), logits(5, 6, seed=28)
    torch.testing.assert_close(skewed_kl(student, teacher, alpha=0), kl(student, teacher))
    torch.testing.assert_close(skewed_reverse_kl(student, teacher, alpha=0), reverse_kl(student, teacher))


@pytest.mark.parametrize("loss", [reverse_kl, symmetric_kl])
def test_high_temperatures_in_fp32(loss):
    """At T = 20 the sum over the classes is 1/400 of the value: the rounding of log-probabilities must not be seen."""
    student, teacher = logits(64, 5, seed=37), logits(64, 5, seed=38)
    student, teacher = student.float(), teacher.float()
    wide = loss(student.double(), teacher.double(), temperature=20.0)
    torch.testing.assert_close(loss(student, teacher, temperature=20.0).double(), wide, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("loss", "options", "bound"),
    [
        (jsd, {}, LN2),
        (jsd, {"beta": 0.2}, -0.2 * math.log(0.2) - 0.8 * math.log(0.8)),
        (skewed_kl, {}, -math.log(0.1)),
        (skewed_reverse_kl, {"alpha": 0.3}, -math.log(0.3)),
        (total_variation, {}, 1.0),
    ],
)
@pytest.mark.parametrize("apart", [1e4, math.inf])
def test_bounds_where_nothing_is_shared(loss, options, bound, apart):
    """Where one side is surely 0, KL is huge or infinite; these are not."""
    student, teacher = torch.tensor([[0.0, -apart]], requires_grad=True), torch.tensor([[-apart, 0.0]])
    value = loss(student, teacher, **options)
    assert value.item() == pytest.approx(bound, rel=1e-6)
    value.sum().backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", [jsd, skewed_kl, skewed_reverse_kl, symmetric_kl, reverse_kl, alpha_beta, taid])
def test_classes_of_which_both_are_sure_underflow_to_nothing(loss):
    """e⁻³⁰⁰ is 0 in fp32: log(β·0 + (1 − β)·0) times 0 is NaN where the mixture is made of probabilities."""
    tail = torch.tensor([[-300.0, -300.0, -400.0]])
    student, teacher = torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    long = torch.cat([student, tail], -1).requires_grad_()
    value = loss(long, torch.cat([teacher, tail], -1))
    torch.testing.assert_close(value, loss(student, teacher))
    value.sum().backward()
    assert torch.isfinite(long.grad).all()


@pytest.mark.parametrize(
    ("alpha", "beta", "same"),
    [
        (1, 0, lambda p, q: naive(p, q)),
        (0, 1, lambda p, q: naive(q, p)),
        (0.5, 0.5, lambda p, q: 2 * ((p.sqrt() - q.sqrt()) ** 2).sum(-1)),
        (1, 1, lambda p, q: (p - q).square().sum(-1) / 2),
        (0.5, 0, lambda p, q: 4 * (p.sqrt() * (p / q).sqrt().log() - p.sqrt() + q.sqrt()).sum(-1)),
        (0, 0.5, lambda p, q: 4 * (q.sqrt() * (q / p).sqrt().log() - q.sqrt() + p.sqrt()).sum(-1)),
        (0, 0, lambda p, q: (p / q).log().square().sum(-1) / 2),
    ],
)
def test_alpha_beta_and_its_limits(alpha, beta, same):
    student, teacher = logits(5, 6, seed=29), logits(5, 6, seed=30)
    expected = same(teacher.softmax(-1), student.softmax(-1))
    torch.testing.assert_close(alpha_beta(student, teacher, alpha=alpha, beta=beta), expected)
    # the same from close by: a limit with 1/α in place of 1/α² jumps
    near = alpha_beta(student, teacher, alpha=alpha + 1e-8, beta=beta + 1e-8)
    torch.testing.assert_close(near, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("alpha", "beta"), [(1e-6, 0.7), (0.7, 1e-6)])
def test_a_small_order_does_not_cancel(alpha, beta):
    """The formula as printed divides the difference of nearly equal sums by α·β: at 10⁻⁶ nothing is left of fp32."""
    student, teacher = logits(5, 6, seed=31), logits(5, 6, seed=32)
    p, q = wide_softmax(teacher.numpy(), 1.0), wide_softmax(student.numpy(), 1.0)
    expected = naive_alpha_beta(p, q, np.longdouble(alpha), np.longdouble(beta)).astype(float)
    ours = alpha_beta(student.float(), teacher.float(), alpha=alpha, beta=beta)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(("done", "share"), [(0, 0.4), (50, 0.7), (100, 1.0), (150, 1.0)])
def test_taid_goes_from_near_the_student_to_the_teacher(done, share):
    student, teacher = logits(5, 6, seed=33).requires_grad_(), logits(5, 6, seed=34)
    value = taid(student, teacher, progress=Progress(step=done, total_steps=100), temperature=2.0)
    target = wide_softmax((1 - share) * student.detach().numpy() + share * teacher.numpy(), 2.0)
    q = wide_softmax(student.detach().numpy(), 2.0)
    np.testing.assert_allclose(value.detach().numpy(), (4 * naive(target, q)).astype(float), rtol=1e-11)
    (gradient,) = torch.autograd.grad(value.sum(), student)  # no gradient through the target
    np.testing.assert_allclose(gradient.numpy(), (2 * (q - target)).astype(float), rtol=1e-10, atol=1e-12)


def test_taid_at_its_end_is_kl_also_with_impossible_classes():
    """(1 − t) times −inf is NaN at t = 1."""
    student, teacher = logits(4, 5, seed=35), logits(4, 5, seed=36)
    student[:, 2] = teacher[:, 2] = -math.inf
    end = Progress(step=10, total_steps=10)
    torch.testing.assert_close(taid(student, teacher, progress=end), kl(student, teacher))
    assert torch.isfinite(taid(student, teacher, progress=end, t_end=0.5)).all()
    torch.testing.assert_close(taid(student, teacher), taid(student, teacher, progress=Progress(), t_start=0.4))


@pytest.mark.parametrize(
    ("name", "option", "wrong", "right"),
    [
        ("jsd", "beta", (-0.1, 1.1, "half"), (0, 1, 0.5)),
        ("skewed_kl", "alpha", (-0.1, 1, 1.0), (0, 0.1)),
        ("skewed_reverse_kl", "alpha", (-0.1, 1), (0, 0.9)),
        ("alpha_beta", "alpha", (-0.5,), (0, 2)),
        ("alpha_beta", "beta", (-1,), (0, 1.5)),
        ("taid", "t_start", (1, -0.1), (0, 0.4)),
        ("taid", "t_end", (0, 1.2), (0.5, 1)),
    ],
)
def test_options_out_of_range_are_problems(name, option, wrong, right):
    for value in wrong:
        assert [problem.path for problem in losses.check(name, {option: value})] == [(option,)], value
    for value in right:
        assert losses.check(name, {option: value}) == [], value
