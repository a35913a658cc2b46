"""The learned temperature: what it is, and which way it is pushed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from potstill.errors import ObjectiveError
from potstill.interfaces import Progress
from potstill.losses.curriculum import CurriculumTemperature
from potstill.losses.divergence import kl
from potstill.registry import losses


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape))


def at(share: float) -> Progress:
    return Progress(step=round(share * 24_000), total_steps=24_000)


STUDENT, TEACHER = logits(5, 6, seed=1), logits(5, 6, seed=2)


def slope(theta: float) -> float:
    """The derivative of the mean of T²·KL in θ, by differences of another loss."""
    step = 1e-5
    ends = [
        kl(STUDENT, TEACHER, temperature=1 + 20 / (1 + math.exp(-end))).mean().item()
        for end in (theta - step, theta + step)
    ]
    return (ends[1] - ends[0]) / (2 * step)


def test_the_first_temperature_is_the_papers():
    loss = CurriculumTemperature()
    assert loss.temperature().item() == pytest.approx(1 + 20 / (1 + math.exp(-1)))
    expected = kl(STUDENT, TEACHER, temperature=1 + 20 / (1 + math.exp(-1)))
    torch.testing.assert_close(loss.double()(STUDENT, TEACHER), expected)


@pytest.mark.parametrize(("theta", "expected"), [(-100.0, 2.0), (0.0, 5.0), (100.0, 8.0)])
def test_the_temperature_keeps_its_bounds(theta, expected):
    loss = CurriculumTemperature(lowest=2.0, highest=8.0)
    torch.nn.init.constant_(loss.theta, theta)
    assert loss.temperature(at(1.0)).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("share", "strength"), [(0.0, 0.0), (1 / 96, 0.5 - 0.5**1.5), (1 / 48, 0.5), (1 / 24, 1.0), (0.7, 1.0)]
)
@pytest.mark.parametrize("theta", [1.0, -2.0])
def test_the_gradient_of_the_temperature_is_reversed_and_ramped(share, strength, theta):
    """With its sign unturned the temperature runs to where the loss is smallest, and nothing gets harder."""
    loss = CurriculumTemperature().double()
    torch.nn.init.constant_(loss.theta, theta)
    loss(STUDENT, TEACHER, progress=at(share)).mean().backward()
    assert abs(slope(theta)) > 1e-2
    assert loss.theta.grad.item() == pytest.approx(-strength * slope(theta), rel=1e-5, abs=1e-9)


def test_a_step_of_the_optimizer_makes_the_loss_larger():
    loss = CurriculumTemperature().double()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    before = loss(STUDENT, TEACHER, progress=at(1.0)).mean()
    before.backward()
    optimizer.step()
    assert loss(STUDENT, TEACHER).mean() > before


def test_the_student_still_descends():
    student = STUDENT.clone().requires_grad_()
    loss = CurriculumTemperature().double()
    (ours,) = torch.autograd.grad(loss(student, TEACHER, progress=at(1.0)).sum(), student)
    (plain,) = torch.autograd.grad(kl(student, TEACHER, temperature=loss.temperature().item()).sum(), student)
    torch.testing.assert_close(ours, plain)


def test_options():
    with pytest.raises(ObjectiveError, match=r"expected lowest < highest, got 5\.0 and 2\.0"):
        CurriculumTemperature(lowest=5.0, highest=2.0)
    for option, wrong in (("lowest", 0), ("ramp", 0), ("ramp", 1.5)):
        assert [problem.path for problem in losses.check("ctkd", {option: wrong})] == [(option,)]
    loss = CurriculumTemperature(ramp=1.0).double()
    loss(STUDENT, TEACHER, progress=at(0.5)).mean().backward()
    assert loss.theta.grad.item() == pytest.approx(-0.5 * slope(1.0), rel=1e-5)


def test_impossible_classes_change_neither_the_loss_nor_the_temperature():
    """−inf / T has no derivative in T: the temperature would be NaN from the first step on."""
    hidden = torch.tensor([False, True, False, False, True, False])
    ends = []
    for student, teacher in (
        (STUDENT.masked_fill(hidden, -math.inf), TEACHER.masked_fill(hidden, -math.inf)),
        (STUDENT[:, ~hidden], TEACHER[:, ~hidden]),
    ):
        loss = CurriculumTemperature().double()
        value = loss(student, teacher, progress=at(1.0)).mean()
        value.backward()
        ends.append(torch.stack([value.detach(), loss.theta.grad.squeeze()]))
    torch.testing.assert_close(*ends)


def test_a_class_that_the_student_alone_excludes_costs_much_and_not_infinitely_much():
    loss = CurriculumTemperature()
    student = STUDENT.float()
    student[:, 2] = -math.inf
    student.requires_grad_()
    value = loss(student, TEACHER.float(), progress=at(1.0))
    value.sum().backward()
    assert (value > 1e8).all()
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(loss.theta.grad).all()
