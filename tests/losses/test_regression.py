"""The teacher's error as a bound, by hand."""

from __future__ import annotations

import pytest
import torch

from potstill.errors import ObjectiveError
from potstill.losses.regression import regression_kd
from potstill.registry import losses

STUDENT = torch.tensor([[3.0, 1.0], [0.5, 0.0], [2.0, 2.0], [1.0, 1.0]])
TEACHER = torch.tensor([[1.0, 1.0], [2.0, 0.0], [2.0, 2.0], [0.0, 1.0]])
TRUTH = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
# mean squared errors: student 4.5, 0.125, 4, 0; teacher 0.5, 2, 4, 0.5


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (0.0, [4.5, 0.0, 0.0, 0.0]),  # worse than the teacher, better, alike, perfect
        (1.0, [4.5, 0.0, 4.0, 0.0]),  # alike is not better by the margin
        (1.875, [4.5, 0.0, 4.0, 0.0]),  # better by exactly the margin is enough
        (1.9, [4.5, 0.125, 4.0, 0.0]),
    ],
)
def test_by_hand(margin, expected):
    assert regression_kd(STUDENT, TEACHER, labels=TRUTH, margin=margin).tolist() == pytest.approx(expected)


def test_the_gradient_is_that_of_the_squared_error_or_0():
    student = STUDENT.clone().requires_grad_()
    regression_kd(student, TEACHER, labels=TRUTH).sum().backward()
    expected = 2 / 2 * (STUDENT - TRUTH)
    expected[1:] = 0
    torch.testing.assert_close(student.grad, expected)


def test_the_teacher_bounds_and_does_not_pull():
    """The distance to the teacher does not matter: with its error on the other side of the truth all is the same."""
    other_side = 2 * TRUTH - TEACHER
    value = regression_kd(STUDENT, TEACHER, labels=TRUTH)
    torch.testing.assert_close(regression_kd(STUDENT, other_side, labels=TRUTH), value)


def test_labels_in_every_form():
    student, teacher, truth = STUDENT[:, :1], TEACHER[:, :1], TRUTH[:, :1]
    expected = regression_kd(student, teacher, labels=truth)
    assert expected.tolist() == [9.0, 0.0, 0.0, 0.0]
    assert torch.equal(regression_kd(student, teacher, labels=truth[:, 0]), expected)
    assert torch.equal(regression_kd(student[:, 0], teacher[:, 0], labels=truth[:, 0]), expected)
    assert torch.equal(regression_kd(student, teacher, labels=truth[:, 0].long()), expected)
    tokens = regression_kd(student.view(2, 2, 1), teacher.view(2, 2, 1), labels=truth.view(2, 2))
    assert torch.equal(tokens, expected.view(2, 2))


def test_labels_that_do_not_fit_are_refused():
    """[4] beside [4, 2] broadcasts silently to nonsense where both have 4 rows and 4 columns."""
    square = torch.zeros(4, 4)
    with pytest.raises(ObjectiveError, match=r"expected labels \[4, 4\] for predictions of that shape, got \[4\]"):
        regression_kd(square, square, labels=torch.zeros(4))


def test_facts():
    assert losses.facts("regression_kd")["weight"] == 0.5
    assert [problem.path for problem in losses.check("regression_kd", {"margin": -1})] == [("margin",)]
