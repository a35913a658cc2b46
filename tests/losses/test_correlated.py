"""Correlations and standardised logits against numbers from SciPy and from the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from scipy.special import softmax as wide_softmax
from scipy.stats import pearsonr, zscore

from potstill.errors import ObjectiveError
from potstill.losses.correlated import dist, kl_standardized
from potstill.registry import losses


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape))


def dist_of(student, teacher, beta, gamma, temperature):
    """The paper's formula by loops."""
    q, p = (wide_softmax(each.numpy() / temperature, axis=-1) for each in (student, teacher))
    inter = np.mean([1 - pearsonr(a, b).statistic for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - pearsonr(a, b).statistic for a, b in zip(q.T, p.T, strict=True)])
    return temperature**2 * (beta * inter + gamma * intra)


@pytest.mark.parametrize(
    ("beta", "gamma", "temperature"), [(1.0, 1.0, 1.0), (2.0, 0.0, 1.0), (0.0, 2.0, 1.0), (0.5, 1.5, 4.0)]
)
def test_dist_against_scipy(beta, gamma, temperature):
    student, teacher = logits(7, 5, seed=1), logits(7, 5, seed=2)
    value = dist(student, teacher, beta=beta, gamma=gamma, temperature=temperature)
    assert value.shape == ()
    assert value.item() == pytest.approx(dist_of(student, teacher, beta, gamma, temperature), rel=1e-10)


def test_dist_as_published():
    """β = γ = 2 in the paper is the weight 2 of the term."""
    student, teacher = logits(7, 5, seed=3), logits(7, 5, seed=4)
    weight = losses.facts("dist")["weight"]
    assert weight * dist(student, teacher).item() == pytest.approx(dist_of(student, teacher, 2, 2, 1), rel=1e-10)


def test_gradient_of_dist():
    student, teacher = logits(7, 5, seed=5).requires_grad_(), logits(7, 5, seed=6)
    q, p = student.softmax(-1), teacher.softmax(-1)
    inter = 1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(q, p, strict=True)]).mean()
    intra = 1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(q.T, p.T, strict=True)]).mean()
    (plain,) = torch.autograd.grad(inter + 3 * intra, student)
    (ours,) = torch.autograd.grad(dist(student, teacher, gamma=3.0), student)
    torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-12)


def test_positions_that_do_not_count_are_as_if_absent():
    student, teacher = logits(3, 4, 5, seed=7).requires_grad_(), logits(3, 4, 5, seed=8)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    value = dist(student, teacher, mask=mask)
    torch.testing.assert_close(value, dist(student[mask], teacher[mask]))
    value.backward()
    assert torch.equal((student.grad != 0).any(-1), mask)
    torch.testing.assert_close(dist(student, teacher), dist(student.flatten(0, 1), teacher.flatten(0, 1)))
    torch.testing.assert_close(dist(student, teacher, mask=torch.ones(3, 4)), dist(student, teacher))
    assert torch.isfinite(dist(student, teacher, mask=torch.zeros(3, 4)))


def test_a_mask_that_does_not_fit_is_refused():
    with pytest.raises(ObjectiveError, match=r"expected a mask \[3, 4\] for logits \[3, 4, 5\], got \[3\]"):
        dist(logits(3, 4, 5), logits(3, 4, 5), mask=torch.ones(3))


def test_a_student_that_knows_nothing_gets_a_gradient_of_some_size():
    """Equal logits have no direction. Where only the product of both lengths is bounded the gradient is 10⁸."""
    student, teacher = torch.zeros(6, 5, requires_grad=True), logits(6, 5, seed=9).float()
    value = dist(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(2.0)
    assert 0 < student.grad.abs().max() < 2e3


def test_a_batch_of_one_has_no_relation_between_samples():
    student, teacher = logits(1, 5, seed=10), logits(1, 5, seed=11)
    assert dist(student, teacher, beta=0.0).item() == pytest.approx(1.0)
    assert torch.isfinite(dist(student, teacher))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_kl_standardized_against_scipy(temperature):
    student, teacher = logits(6, 7, seed=12), logits(6, 7, seed=13)
    p, q = (wide_softmax(zscore(each.numpy(), axis=-1, ddof=1) / temperature, axis=-1) for each in (teacher, student))
    ours = kl_standardized(student, teacher, temperature=temperature).numpy()
    np.testing.assert_allclose(ours, temperature**2 * rel_entr(p, q).sum(-1), rtol=1e-6)


def test_kl_standardized_sees_neither_shift_nor_scale():
    student, teacher = logits(4, 6, seed=14).requires_grad_(), logits(4, 6, seed=15)
    value = kl_standardized(student, teacher)
    torch.testing.assert_close(kl_standardized(student * 7 + 3, teacher / 5 - 2), value, rtol=1e-5, atol=0)
    np.testing.assert_allclose(kl_standardized(3 * teacher + 1, teacher).numpy(), 0, atol=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    centred = student.detach() - student.detach().mean(-1, keepdim=True)
    assert gradient.norm() > 1e-2
    assert gradient.sum(-1).abs().max() < 1e-12
    assert (gradient * centred).sum(-1).abs().max() < 1e-6


def test_gradient_of_kl_standardized():
    student, teacher = logits(4, 6, seed=16).requires_grad_(), logits(4, 6, seed=17)
    scores = [(each - each.mean(-1, keepdim=True)) / (each.std(-1, keepdim=True) + 1e-7) for each in (teacher, student)]
    p, q = ((each / 2).softmax(-1) for each in scores)
    (plain,) = torch.autograd.grad(4 * (p * (p / q).log()).sum(), student)
    (ours,) = torch.autograd.grad(kl_standardized(student, teacher).sum(), student)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (3, 1)])
def test_equal_logits_are_finite(shape):
    """The deviation is 0, and its square root has no gradient."""
    student = torch.zeros(shape, requires_grad=True)
    value = kl_standardized(student, logits(*shape, seed=18).float())
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()
    assert losses.facts("kl_standardized")["weight"] == 9


@pytest.mark.parametrize(("name", "option", "wrong"), [("dist", "beta", -1), ("kl_standardized", "temperature", 0)])
def test_options_out_of_range_are_problems(name, option, wrong):
    assert [problem.path for problem in losses.check(name, {option: wrong})] == [(option,)]


def test_dist_is_bounded():
    student = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    assert dist(student, -student, temperature=3.0).item() == pytest.approx(9 * 4, rel=1e-5)
    assert math.isclose(dist(student, student).item(), 0.0, abs_tol=1e-6)
