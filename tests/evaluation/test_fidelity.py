"""How much of the teacher the student has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from potstill.evaluation.fidelity import agreement, divergence, retention, retention_above_chance


def test_retention():
    assert retention(0.9, 0.95) == pytest.approx(0.9473684)
    assert retention(0.96, 0.95) > 1
    assert retention(0.5, 0.0) is None


def test_retention_above_chance():
    """0.9 of 0.95 looks like much where always guessing the frequent class gives 0.85."""
    assert retention_above_chance(0.9, 0.95, 0.85) == pytest.approx(0.5)
    assert retention_above_chance(0.85, 0.95, 0.85) == pytest.approx(0.0)
    assert retention_above_chance(0.8, 0.95, 0.85) == pytest.approx(-0.5)
    assert retention_above_chance(0.9, 0.85, 0.85) is None
    assert retention_above_chance(0.9, 0.8, 0.85) is None


def test_agreement_is_the_share_of_equal_answers():
    first, second = np.array([0, 1, 2, 0]), np.array([0, 0, 2, 0])
    assert agreement(first, second) == 0.75
    assert agreement(first, first) == 1.0


def test_agreement_of_answers_for_each_token():
    first, second = np.ones((2, 3), dtype=int), np.ones((2, 3), dtype=int)
    second[0, 0] = 2
    assert agreement(first, second) == pytest.approx(5 / 6)


def test_divergence_is_that_of_torch_from_the_teacher_to_the_student():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 7, 5)) * 3
    expected = F.kl_div(
        torch.log_softmax(torch.tensor(student), -1), torch.softmax(torch.tensor(teacher), -1), reduction="none"
    ).sum(-1)
    np.testing.assert_allclose(divergence(teacher, student), expected.numpy(), rtol=1e-12)
    assert not np.allclose(divergence(teacher, student), divergence(student, teacher))


def test_divergence_of_impossible_classes_and_of_large_logits_is_finite():
    teacher = np.array([[0.0, 1.0, -np.inf], [1e4, 0.0, 0.0]], dtype=np.float32)
    student = np.array([[0.0, 1.0, 2.0], [0.0, 1e4, 0.0]], dtype=np.float32)
    found = divergence(teacher, student)
    assert np.isfinite(found).all()
    assert found[1] == pytest.approx(1e4)
    np.testing.assert_allclose(divergence(teacher, teacher), 0.0, atol=1e-12)
