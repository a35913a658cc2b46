"""The bare functions equal what a recipe's objective computes, value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import potstill.losses
from potstill.losses.functional import distillation_loss, feature_distillation_loss, temperature_scaled_softmax
from potstill.losses.objective import Objective, Term


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_gradient(total: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return [total.detach(), *torch.autograd.grad(total, leaves)]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_they_are_exported_where_people_look():
    assert potstill.losses.distillation_loss is distillation_loss
    assert potstill.losses.feature_distillation_loss is feature_distillation_loss
    assert potstill.losses.temperature_scaled_softmax is temperature_scaled_softmax


def test_softmax_by_hand():
    logits = torch.tensor([4 * math.log(3), 0.0], dtype=torch.float64)
    assert temperature_scaled_softmax(logits, 4.0).tolist() == pytest.approx([0.75, 0.25], abs=1e-12)
    assert temperature_scaled_softmax(logits.bfloat16(), 4.0).dtype == torch.float32


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, 0], [0, -100, 2, -100, 4, 0], [-100] * 6])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.7, 4.0), (0.25, 1.0), (1.0, 8.0)])
def test_distillation_loss_is_the_recipe(labels, alpha, temperature):
    student, teacher = randn(6, 5, seed=1).requires_grad_(), randn(6, 5, seed=2)
    objective = Objective(
        {
            "soft": Term("kl", weight=alpha, temperature=temperature),
            "hard": Term("cross_entropy", weight=1 - alpha),
        }
    )
    batch = {"sample_id": torch.arange(6), "labels": torch.tensor(labels)}
    recipe = objective({"logits": student}, {"logits": teacher}, batch).total
    bare = distillation_loss(student, teacher, batch["labels"], alpha, temperature)
    assert_same(value_and_gradient(bare, student), value_and_gradient(recipe, student))


@pytest.mark.parametrize("labels", [[[0, 1, 2], [3, 4, 0]], [[0, -100, 2], [-100, -100, 0]], [[-100] * 3] * 2])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.7, 4.0), (1.0, 1.0)])
def test_distillation_loss_of_tokens_is_the_recipe(labels, alpha, temperature):
    """Padding and prompt have the label −100: the recipe learns nothing there, from the teacher neither."""
    student, teacher = randn(2, 3, 5, seed=1).requires_grad_(), randn(2, 3, 5, seed=2)
    objective = Objective(
        {
            "soft": Term("kl", weight=alpha, temperature=temperature),
            "hard": Term("cross_entropy", weight=1 - alpha),
        }
    )
    batch = {"sample_id": torch.arange(2), "labels": torch.tensor(labels)}
    recipe = objective({"logits": student}, {"logits": teacher}, batch).total
    bare = distillation_loss(student, teacher, batch["labels"], alpha, temperature)
    found = value_and_gradient(bare, student)
    assert_same(found, value_and_gradient(recipe, student))
    assert (found[1][batch["labels"] == -100] == 0).all()


def test_what_stands_at_ignored_tokens_has_no_effect():
    student, teacher = randn(2, 3, 5, seed=1), randn(2, 3, 5, seed=2)
    labels = torch.tensor([[0, -100, 2], [-100, 3, 0]])
    plain = distillation_loss(student, teacher, labels)
    student[labels == -100] = math.nan
    torch.testing.assert_close(distillation_loss(student, teacher, labels), plain)


def test_alpha_weighs_the_soft_loss():
    """Other tools call the weight of the hard loss alpha; swapped, a 0.9 would all but ignore the teacher."""
    student, teacher, labels = randn(4, 3, seed=3), randn(4, 3, seed=4), torch.tensor([0, 1, 2, 0])
    hard = nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(distillation_loss(student, teacher, labels, alpha=0.0), hard)
    assert distillation_loss(student, student, labels, alpha=1.0).item() == pytest.approx(0, abs=1e-12)


def test_the_divergence_is_averaged_over_the_batch_not_over_the_classes():
    """PyTorch's default `reduction="mean"` also divides by the classes, which makes the soft loss C times too small."""
    student, teacher, labels = randn(4, 10, seed=5), randn(4, 10, seed=6), torch.zeros(4, dtype=torch.long)
    log_q, log_p = (nn.functional.log_softmax(each / 3, -1) for each in (student, teacher))
    batchmean = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * 9
    torch.testing.assert_close(distillation_loss(student, teacher, labels, alpha=1.0, temperature=3.0), batchmean)


def test_no_gradient_reaches_the_teacher():
    student, teacher = randn(4, 3, seed=7).requires_grad_(), randn(4, 3, seed=8).requires_grad_()
    distillation_loss(student, teacher, torch.tensor([0, 1, 2, 0])).backward()
    feature_distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5)])
def test_feature_loss_is_the_recipe(shape):
    student, teacher = randn(*shape, seed=9).requires_grad_(), randn(*shape, seed=10)
    objective = Objective({"hint": Term("mse", "body", "body")})
    recipe = objective({"body": student}, {"body": teacher}, {"sample_id": torch.arange(6)}).total
    bare = feature_distillation_loss(student, teacher)
    torch.testing.assert_close(bare, nn.functional.mse_loss(student, teacher))
    assert_same(value_and_gradient(bare, student), value_and_gradient(recipe, student))


def test_feature_loss_with_a_projection_is_the_recipe():
    student, teacher = randn(6, 3, seed=11).requires_grad_(), randn(6, 5, seed=12)
    projection = nn.Linear(3, 5).double()
    objective = Objective({"hint": Term("mse", "body", "body", project=projection)})
    recipe = objective({"body": student}, {"body": teacher}, {"sample_id": torch.arange(6)}).total
    bare = feature_distillation_loss(student, teacher, projection)
    leaves = [student, *projection.parameters()]
    assert_same(value_and_gradient(bare, *leaves), value_and_gradient(recipe, *leaves))


def test_features_of_other_shapes_are_refused():
    """Broadcasting [6, 1] against [6, 5] would give a number too."""
    with pytest.raises(ValueError, match=r"same shape, got \[6, 1\] and \[6, 5\].*projection_layer"):
        feature_distillation_loss(torch.zeros(6, 1), torch.zeros(6, 5))


@pytest.mark.parametrize("temperature", [0.0, -2.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="temperature greater than 0"):
        temperature_scaled_softmax(logits, temperature)
    with pytest.raises(ValueError, match="temperature greater than 0"):
        distillation_loss(logits, logits, torch.zeros(2, dtype=torch.long), temperature=temperature)
