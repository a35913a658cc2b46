"""The made-up teacher against the formulas of the paper and of its code."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch.nn import functional as F

from potstill.errors import ObjectiveError
from potstill.losses.virtual import virtual_teacher
from potstill.registry import losses

LABELS = torch.tensor([0, 3, 5, 2])


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape))


def made_up(correct: float, classes: int = 6) -> np.ndarray:
    u = np.full((len(LABELS), classes), (1 - correct) / (classes - 1))
    u[np.arange(len(LABELS)), LABELS.numpy()] = correct
    return u


@pytest.mark.parametrize(("correct", "temperature"), [(0.99, 20.0), (0.9, 1.0), (0.5, 4.0)])
def test_the_papers_form(correct, temperature):
    student = logits(4, 6, seed=1)
    u = made_up(correct) ** (1 / temperature)  # softened: the logits of u are its logarithms
    q = softmax(student.numpy() / temperature, axis=-1)
    expected = temperature**2 * rel_entr(u / u.sum(-1, keepdims=True), q).sum(-1)
    ours = virtual_teacher(student, labels=LABELS, correct=correct, temperature=temperature, form="paper").numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


@pytest.mark.parametrize(("correct", "temperature"), [(0.99, 20.0), (0.9, 10.0)])
def test_the_form_of_the_code(correct, temperature):
    student = logits(4, 6, seed=2)
    target = torch.from_numpy(softmax(made_up(correct) / temperature, axis=-1))
    expected = F.kl_div(student.log_softmax(-1), target, reduction="none").sum(-1)
    ours = virtual_teacher(student, labels=LABELS, correct=correct, temperature=temperature, form="code")
    torch.testing.assert_close(ours, expected)


def test_published_numbers_are_the_defaults():
    student = logits(4, 6, seed=3)
    expected = virtual_teacher(student, labels=LABELS, correct=0.99, temperature=20.0, form="code")
    assert torch.equal(virtual_teacher(student, labels=LABELS), expected)


def test_at_temperature_1_it_is_label_smoothing():
    student = logits(4, 6, seed=4)
    smoothing = 0.1 * 6 / 5  # torch spreads it over all classes, the label included
    cross = F.cross_entropy(student, LABELS, label_smoothing=smoothing, reduction="none")
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1 / 5))
    value = virtual_teacher(student, labels=LABELS, correct=0.9, temperature=1.0, form="paper")
    torch.testing.assert_close(value, cross - entropy)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_positions_without_a_label_are_0(form):
    student = logits(2, 3, 5, seed=5).requires_grad_()
    labels = torch.tensor([[1, -100, 4], [-100, 0, 2]])
    value = virtual_teacher(student, labels=labels, form=form)
    assert torch.equal(value == 0, labels == -100)
    value.sum().backward()
    assert torch.equal((student.grad == 0).all(-1), labels == -100)


def test_it_is_a_hard_loss_that_says_what_it_is():
    """The baseline, which must learn from the labels alone, leaves it out by this fact."""
    assert "teacher" not in inspect.signature(virtual_teacher).parameters
    assert losses.facts("virtual_teacher")["virtual"] is True


def test_mistakes():
    with pytest.raises(ObjectiveError, match="virtual_teacher expected class ids"):
        virtual_teacher(logits(4, 6), labels=torch.rand(4, 6))
    with pytest.raises(ObjectiveError, match="at least 2 classes"):
        virtual_teacher(logits(4, 1), labels=torch.zeros(4, dtype=torch.long))
    for option, wrong in (("correct", 1.0), ("correct", 0), ("form", "figure"), ("temperature", 0)):
        assert [problem.path for problem in losses.check("virtual_teacher", {option: wrong})] == [(option,)]
