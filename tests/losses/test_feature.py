"""Losses between features, against numbers from their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from potstill.errors import ObjectiveError
from potstill.losses.feature import cosine, mse, normalized_mse, pearson
from potstill.losses.objective import Objective, Term
from potstill.registry import losses


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


@pytest.mark.parametrize("loss", [cosine, normalized_mse])
def test_a_zero_vector_gives_a_small_gradient(loss):
    """ReLU features of a dead layer, or of a projector that begins at 0; a step of 1e12 would wipe out the student."""
    student = torch.zeros(2, 3, requires_grad=True)
    loss(student, torch.ones(2, 3)).sum().backward()
    assert (student.grad < 0).all()  # towards the teacher
    assert student.grad.abs().max() < 3


@pytest.mark.parametrize("loss", [cosine, normalized_mse])
def test_channels_of_a_map_are_compared_where_the_axis_says_so(loss):
    """Along the last axis a map is compared by rows of pixels."""
    student, teacher = features(2, 4, 3, 5, seed=24), features(2, 4, 3, 5, seed=25)
    value = loss(student, teacher, axis=1)
    assert value.shape == (2, 3, 5)
    for b, h, w in np.ndindex(2, 3, 5):
        s, t = (each[b, :, h, w] / np.linalg.norm(each[b, :, h, w]) for each in (student.numpy(), teacher.numpy()))
        expected = ((s - t) ** 2).sum() if loss is normalized_mse else 1 - s @ t
        assert value[b, h, w].item() == pytest.approx(expected, rel=1e-12)
    assert loss(student, teacher).shape == (2, 4, 3)


@pytest.mark.parametrize("name", ["cosine", "normalized_mse"])
def test_the_axis_is_the_last_or_that_of_the_channels(name):
    """Along the axis of the samples, 0, a sample would see the others."""
    assert losses.check(name, {"axis": 1}) == losses.check(name, {"axis": -1}) == []
    assert [problem.path for problem in losses.check(name, {"axis": 0})] == [("axis",)]
    student, teacher = features(3, 4, 2, 2, seed=26), features(3, 4, 2, 2, seed=27)
    objective = Objective({"t": Term(name, "body", "body", axis=1)})
    total = objective({"body": student}, {"body": teacher}, {"sample_id": torch.arange(3)}).total
    torch.testing.assert_close(total, losses.get(name)(student, teacher, axis=1).mean())


@pytest.mark.parametrize("loss", [mse, cosine, normalized_mse, pearson])
def test_narrow_types_are_widened(loss):
    student, teacher = features(3, 300, seed=9).bfloat16(), features(3, 300, seed=10).bfloat16()
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.double(), teacher.double()).float(), rtol=1e-5, atol=1e-6)


def test_normalized_mse_by_hand():
    student = torch.tensor([[3.0, 4.0], [2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    teacher = torch.tensor([[8.0, 6.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # (0.6, 0.8) and (0.8, 0.6); opposite directions; the same one
    assert normalized_mse(student, teacher).tolist() == pytest.approx([0.08, 4.0, 0.0], abs=1e-15)


def test_normalized_mse_is_the_sum_and_so_twice_the_cosine_loss():
    """The authors' code takes the mean: with it a wider layer would count less."""
    student, teacher = features(2, 5, 6, seed=11), features(2, 5, 6, seed=12)
    s, t = (each.numpy() / np.linalg.norm(each.numpy(), axis=-1, keepdims=True) for each in (student, teacher))
    np.testing.assert_allclose(normalized_mse(student, teacher).numpy(), ((s - t) ** 2).sum(-1), rtol=1e-12)
    torch.testing.assert_close(normalized_mse(student, teacher), 2 * cosine(student, teacher))


def correlations(student: torch.Tensor, teacher: torch.Tensor) -> list[float]:
    """SciPy's coefficient of each channel, over samples and positions; the channels come last."""
    pairs = zip(student.flatten(0, -2).T.numpy(), teacher.flatten(0, -2).T.numpy(), strict=True)
    return [float(pearsonr(s, t).statistic) for s, t in pairs]


def test_pearson_of_feature_maps_is_one_minus_the_correlation_of_each_channel():
    student, teacher = features(3, 4, 2, 5, seed=13), features(3, 4, 2, 5, seed=14)
    teacher = teacher + student  # so that the correlations are not all near 0
    expected = np.mean([1 - r for r in correlations(student.movedim(1, -1), teacher.movedim(1, -1))])
    assert pearson(student, teacher).item() == pytest.approx(expected, rel=1e-5)  # ε = 1e-6 beside the deviation


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5)])
def test_pearson_of_vectors_and_tokens_has_the_channels_last(shape):
    student, teacher = features(*shape, seed=15), features(*shape, seed=16)
    expected = np.mean([1 - r for r in correlations(student, teacher)])
    assert pearson(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_pearson_ignores_the_scale_and_the_shift_of_each_channel():
    student, teacher = features(3, 4, 2, 2, seed=17), features(3, 4, 2, 2, seed=18)
    scale, shift = torch.tensor([1.0, 5.0, 0.5, 90.0]), torch.tensor([0.0, -7.0, 30.0, 2.0])
    moved = student * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(pearson(moved, teacher), pearson(student, teacher), rtol=1e-5, atol=0)
    assert pearson(-teacher, teacher).item() == pytest.approx(2.0, rel=1e-5)


def test_pearson_counts_only_what_the_mask_lets_through():
    student, teacher = features(2, 4, 3, seed=19), features(2, 4, 3, seed=20)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    padded = student.masked_fill(~mask[..., None], 1e6).requires_grad_()
    value = pearson(padded, teacher, mask=mask)
    expected = np.mean([1 - r for r in correlations(student[mask][None], teacher[mask][None])])
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert (padded.grad[~mask] == 0).all()
    maps = features(2, 3, 2, 2, seed=21), features(2, 3, 2, 2, seed=22)
    first = pearson(*(each[:1] for each in maps))
    torch.testing.assert_close(pearson(*maps, mask=torch.tensor([True, False])), first)
    assert pearson(*maps, mask=torch.tensor([False, False])).item() == 0
    with pytest.raises(ObjectiveError, match=r"mask \[2, 3\] does not fit"):
        pearson(*maps, mask=torch.ones(2, 3))


def test_pearson_of_constant_channels_is_finite():
    """A dead channel has no variance; an unguarded division makes the whole gradient NaN."""
    teacher = features(5, 3, seed=23)
    teacher[:, 1] = 0.1
    student = teacher.clone()
    student[:, 0] = 0.1
    student.requires_grad_()
    value = pearson(student, teacher)
    assert value.item() == pytest.approx(0.5 / 3, rel=1e-5)  # ½ for the first; the other two agree
    value.backward()
    assert torch.isfinite(student.grad).all()


def test_pearson_of_other_shapes_is_an_error():
    with pytest.raises(ObjectiveError, match=r"got student \[2, 3\] and teacher \[2, 4\]"):
        pearson(torch.zeros(2, 3), torch.zeros(2, 4))
