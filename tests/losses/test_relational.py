"""Losses between relations of samples, against loops over the papers' formulas, SciPy and plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.errors import ObjectiveError
from potstill.losses.objective import Objective, Term
from potstill.losses.relational import (
    cka,
    correlation_congruence,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity,
)
from potstill.registry import losses

LOSSES = [rkd_distance, rkd_angle, similarity, correlation_congruence, cka, pkt]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def features(*shape: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(offset, 1, shape))


def smooth_l1(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def distances_by_hand(x: np.ndarray) -> np.ndarray:
    """Over the mean of all pairs of two samples."""
    size = len(x)
    found = np.array([[math.dist(a, b) for b in x] for a in x])
    return found / (found.sum() / (size * (size - 1)))


def angle_by_hand(x: np.ndarray, i: int, j: int, k: int) -> float:
    """⟨(xᵢ − xⱼ)/‖xᵢ − xⱼ‖, (xₖ − xⱼ)/‖xₖ − xⱼ‖⟩; 0 where a direction does not exist."""
    to_i, to_k = x[i] - x[j], x[k] - x[j]
    lengths = float(np.linalg.norm(to_i) * np.linalg.norm(to_k))
    return float(to_i @ to_k) / lengths if lengths else 0.0


def rkd_distance_by_hand(s: np.ndarray, t: np.ndarray) -> float:
    ours, theirs = distances_by_hand(s), distances_by_hand(t)
    return float(np.mean([smooth_l1(a - b) for a, b in zip(ours.flat, theirs.flat, strict=True)]))


def rkd_angle_by_hand(s: np.ndarray, t: np.ndarray) -> float:
    triples = np.ndindex(len(s), len(s), len(s))
    return float(np.mean([smooth_l1(angle_by_hand(s, *ijk) - angle_by_hand(t, *ijk)) for ijk in triples]))


def similarity_by_hand(s: np.ndarray, t: np.ndarray) -> float:
    total = 0.0
    for i in range(len(s)):
        ours, theirs = ([float(x[i] @ other) for other in x] for x in (s, t))
        total += sum((a / math.hypot(*ours) - b / math.hypot(*theirs)) ** 2 for a, b in zip(ours, theirs, strict=True))
    return total / len(s) ** 2


def cosine_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def congruence_by_hand(s: np.ndarray, t: np.ndarray, gamma: float = 0.4, order: int = 2) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        series = sum((2 * gamma * cosine_by_hand(a, b)) ** p / math.factorial(p) for p in range(order + 1))
        return math.exp(-2 * gamma) * series

    pairs = list(np.ndindex(len(s), len(s)))
    return float(np.mean([(kernel(s[i], s[j]) - kernel(t[i], t[j])) ** 2 for i, j in pairs]))


def cka_by_hand(s: np.ndarray, t: np.ndarray) -> float:
    """1 − ‖TᵀS‖² / (‖SᵀS‖·‖TᵀT‖) of centred features: the form over features, not over samples."""
    ours, theirs = s - s.mean(0), t - t.mean(0)
    across = float((np.abs(theirs.T @ ours) ** 2).sum())
    return 1 - across / float(np.linalg.norm(ours.T @ ours) * np.linalg.norm(theirs.T @ theirs))


def pkt_by_hand(s: np.ndarray, t: np.ndarray) -> float:
    total = 0.0
    for i in range(len(s)):
        p, q = ([(1 + cosine_by_hand(x[i], other)) / 2 for other in x] for x in (t, s))
        total += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return total / len(s) ** 2


BY_HAND: dict[Callable[..., Tensor], Callable[..., float]] = {
    rkd_distance: rkd_distance_by_hand,
    rkd_angle: rkd_angle_by_hand,
    similarity: similarity_by_hand,
    correlation_congruence: congruence_by_hand,
    cka: cka_by_hand,
    pkt: pkt_by_hand,
}


@each_loss
@pytest.mark.parametrize("size", [2, 3, 7])
def test_in_a_loop(loss, size):
    student, teacher = features(size, 4, seed=1), features(size, 6, seed=2)
    value = loss(student, teacher)
    assert value.item() == pytest.approx(BY_HAND[loss](student.numpy(), teacher.numpy()), rel=1e-10, abs=1e-13)


@each_loss
def test_feature_maps_are_flattened(loss):
    student, teacher = features(5, 2, 3, 3, seed=1), features(5, 4, 2, 2, seed=2)
    expected = BY_HAND[loss](student.numpy().reshape(5, -1), teacher.numpy().reshape(5, -1))
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-10)


def test_distances_are_those_of_scipy():
    student, teacher = features(9, 4, seed=3), features(9, 5, seed=4)
    ours, theirs = (pdist(each.numpy()) for each in (student, teacher))
    pairs = [smooth_l1(a / ours.mean() - b / theirs.mean()) for a, b in zip(ours, theirs, strict=True)]
    assert rkd_distance(student, teacher).item() == pytest.approx(2 * sum(pairs) / 81, rel=1e-12)


def naive_distances(x: Tensor) -> Tensor:
    apart = x[:, None] - x[None]
    squares = apart.square().sum(-1) + torch.eye(len(x)).double()  # no square root of 0 on the diagonal
    lengths = squares.sqrt() - torch.eye(len(x)).double()
    return lengths / (lengths.sum() / (len(x) * (len(x) - 1)))


def naive_angles(x: Tensor) -> Tensor:
    apart = torch.nn.functional.normalize(x[None] - x[:, None], dim=-1)
    return apart @ apart.transpose(1, 2)


@pytest.mark.parametrize(
    ("loss", "naive"), [(rkd_distance, naive_distances), (rkd_angle, naive_angles)], ids=["distance", "angle"]
)
def test_gradient_of_plain_differences(loss, naive):
    """Distances by cdist and angles by the law of cosines must train as the differences of the paper would."""
    student, teacher = features(6, 5, seed=1).requires_grad_(), features(6, 3, seed=2)
    expected = torch.autograd.grad(torch.nn.functional.smooth_l1_loss(naive(student), naive(teacher)), student)[0]
    found = torch.autograd.grad(loss(student, teacher), student)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


class Calls(TorchDispatchMode):
    """The operators that were called, and the most numbers that one of them gave."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.most = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        self.most = max(self.most, out.numel() if isinstance(out, Tensor) else 0)
        return out


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle], ids=lambda loss: loss.__name__)
def test_memory_does_not_grow_with_the_pairs_times_the_width(loss):
    """The backward of cdist holds [B, B, D] on a GPU: 26 GB for 128 maps of 512×28×28."""
    student, teacher = features(8, 999, seed=1).requires_grad_(), features(8, 7, seed=2)
    with Calls() as calls:
        loss(student, teacher).backward()
    assert not any("cdist" in name and "backward" in name for name in calls.names)
    assert "mm" in calls.names
    assert calls.most <= 8 * 999


def test_the_gradient_of_distances_is_that_of_cdist():
    """Also beside a sample that is there twice, where the direction is not defined and the gradient 0."""
    student, teacher = features(6, 5, seed=1, offset=3.0), features(6, 3, seed=2)
    student[4] = student[1]
    student.requires_grad_()

    def naive(x: Tensor) -> Tensor:
        lengths = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        return lengths / (lengths.sum() / 30)

    expected = torch.autograd.grad(torch.nn.functional.smooth_l1_loss(naive(student), naive(teacher)), student)[0]
    found = torch.autograd.grad(rkd_distance(student, teacher), student)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 0.0])
def test_samples_that_rounding_alone_tells_apart_do_not_flood_the_gradient(apart):
    """x/d − y/d in fp32 of samples one bit apart is noise, hundreds of times as large as the gradient."""
    student, teacher = features(12, 2048, seed=1).float(), features(12, 8, seed=2)
    student[4] = student[1] + apart * features(2048, seed=3).float()
    student[4, 0] = torch.nextafter(student[4, 0], torch.tensor(9.0))
    leaves = student.requires_grad_(), student.detach().double().requires_grad_()
    narrow, wide = (torch.autograd.grad(rkd_distance(leaf, teacher.to(leaf.dtype)), leaf)[0] for leaf in leaves)
    others = torch.arange(12) != 4
    others[1] = False
    assert (narrow - wide)[others].norm() < 1e-4 * wide[others].norm()
    assert (narrow - wide).norm() < (1e-3 if apart else 0.5) * wide.norm()


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle], ids=lambda loss: loss.__name__)
def test_a_large_common_offset_costs_the_gradient_no_digits(loss):
    """x·wᵢⱼ − y·wᵢⱼ in fp32 has no digit left where features are 1000 ± 1, unless their mean is taken out."""
    student, teacher = features(12, 8, seed=1, offset=1000).float(), features(12, 8, seed=2, offset=-1000).float()
    narrow, wide = (
        torch.autograd.grad(loss(leaf, teacher.to(leaf.dtype)), leaf)[0].double()
        for leaf in (student.requires_grad_(), student.detach().double().requires_grad_())
    )
    assert (narrow - wide).norm() < 1e-5 * wide.norm()


@each_loss
def test_one_sample_has_no_relations(loss):
    """The last batch of an epoch may hold one sample; rivals take the mean of an empty set there, which is NaN."""
    student, teacher = features(1, 4, seed=1).requires_grad_(), features(1, 6, seed=2)
    value = loss(student, teacher)
    assert value.item() == pytest.approx(0, abs=1e-15)
    value.backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-14, rtol=0)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_that_are_equal_or_zero(loss, dtype):
    """Distance 0, no direction, no length; and the student must still be able to move what is equal apart."""
    student, teacher = features(5, 4, seed=1).to(dtype), features(5, 6, seed=2).to(dtype)
    student[1] = student[0]
    student[2] = 0
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value > 1e-4
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 1e3
    assert student.grad.abs().max() > 1e-6


@each_loss
def test_a_student_that_says_the_same_of_all(loss):
    """A collapsed student: constant, and not a number that is exact in binary, so that a mean is not exact."""
    student, teacher = torch.full((7, 3), 0.1, requires_grad=True), features(7, 4, seed=2).float()
    value = loss(student, teacher)
    value.backward()
    assert value > 1e-4
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 1e3
    assert loss(student, torch.full((7, 4), 0.5)).item() == pytest.approx(0, abs=1e-6)


def test_equal_samples_count_as_a_pair_in_the_mean_of_the_distances():
    student = torch.tensor([[0.0], [0.0], [3.0]])  # distances 0, 3, 3: the mean is 2
    teacher = torch.tensor([[0.0], [1.0], [2.0]])  # 1, 1, 2: the mean is 4/3
    expected = 2 / 9 * (smooth_l1(0 - 3 / 4) + smooth_l1(3 / 2 - 3 / 4) + smooth_l1(3 / 2 - 3 / 2))
    assert rkd_distance(student, teacher).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle, cka], ids=lambda loss: loss.__name__)
def test_a_large_common_offset_costs_no_digits(loss):
    """|x|² + |y|² − 2·x·y in fp32 has no digit left where features are 1000 ± 1."""
    student, teacher = features(12, 8, seed=1, offset=1000).float(), features(12, 8, seed=2, offset=-1000).float()
    exact = loss(student.double(), teacher.double())
    torch.testing.assert_close(loss(student, teacher).double(), exact, rtol=2e-4, atol=0)


@each_loss
def test_nothing_changes_with_the_unit_of_the_features(loss):
    student, teacher = features(6, 4, seed=1), features(6, 5, seed=2)
    for factor in (1e-9, 1e9):
        torch.testing.assert_close(loss(student * factor, teacher), loss(student, teacher), rtol=1e-9, atol=0)


@each_loss
def test_nothing_changes_with_a_rotation(loss):
    student, teacher = features(6, 4, seed=1), features(6, 5, seed=2)
    rotation = torch.from_numpy(np.linalg.qr(np.random.default_rng(3).normal(size=(4, 4)))[0])
    torch.testing.assert_close(loss(student @ rotation, teacher), loss(student, teacher), rtol=1e-9, atol=0)
    assert loss(student @ rotation, student).item() == pytest.approx(0, abs=1e-12)


@each_loss
def test_only_the_paper_s_invariance_to_an_offset(loss):
    student, teacher = features(6, 4, seed=1), features(6, 5, seed=2)
    moved = loss(student + 3, teacher)
    if loss in (rkd_distance, rkd_angle, cka):
        torch.testing.assert_close(moved, loss(student, teacher), rtol=1e-9, atol=0)
    else:
        assert (moved - loss(student, teacher)).abs() > 1e-4


@each_loss
def test_the_mean_over_the_positions_that_count(loss):
    student, teacher = features(4, 5, 3, seed=1), features(4, 5, 6, seed=2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 0, 1]])
    student[1, 3] = math.nan
    means = [torch.stack([x[row][mask[row] == 1].mean(0) for row in range(4)]) for x in (student, teacher)]
    torch.testing.assert_close(loss(student, teacher, mask=mask), loss(*means))
    pooled = features(4, 7, seed=3)
    torch.testing.assert_close(loss(pooled, teacher, mask=mask), loss(pooled, means[1]))


@each_loss
def test_errors(loss):
    with pytest.raises(ObjectiveError, match=r"mask \[4, 5\] of the positions.*got \[4, 6\].*mask: none"):
        loss(features(4, 5, 3), features(4, 5, 3), mask=torch.ones(4, 6))
    with pytest.raises(ObjectiveError, match="as many samples on both sides"):
        loss(features(4, 3), features(5, 3))


def test_in_an_objective():
    """The value counts once for each sample of the batch, whatever the mask, with the published weight."""
    hidden = {"hidden.1": features(4, 5, 3, seed=1)}, {"hidden.1": features(4, 5, 6, seed=2)}
    batch = {"sample_id": torch.arange(4), "attention_mask": torch.tensor([[1] * 5, [1] * 2 + [0] * 3] * 2)}
    output = Objective({"r": Term("similarity", "hidden.1", "hidden.1")})(*hidden, batch)
    value = similarity(hidden[0]["hidden.1"], hidden[1]["hidden.1"], mask=batch["attention_mask"])
    torch.testing.assert_close(output.total, 3000 * value)


def test_the_series_of_the_kernel_tends_to_the_gaussian():
    """Σ (2γc)^p / p! · e^(−2γ) → e^(−γ·|x − y|²) for vectors of length 1."""
    student, teacher = features(6, 4, seed=1), features(6, 5, seed=2)
    kernels = [
        torch.exp(-0.7 * torch.cdist(unit, unit).square())
        for unit in (torch.nn.functional.normalize(x, dim=-1) for x in (student, teacher))
    ]
    exact = (kernels[0] - kernels[1]).square().mean()
    torch.testing.assert_close(correlation_congruence(student, teacher, gamma=0.7, order=20), exact)
    first = correlation_congruence(student, teacher, gamma=0.7, order=1)
    assert first.item() == pytest.approx(congruence_by_hand(student.numpy(), teacher.numpy(), 0.7, 1), rel=1e-10)
    assert (first - exact).abs() > 1e-3


def test_cka_is_near_0_for_wide_features_and_near_1_for_narrow_independent_ones():
    assert cka(features(10, 5000, seed=1), features(10, 5000, seed=2)) < 0.01
    assert cka(features(2000, 3, seed=1), features(2000, 3, seed=2)) > 0.99


def test_opposite_samples_have_a_neighbourhood_of_0():
    """(1 + cos)/2 is 0 there, below 0 after rounding."""
    student = torch.tensor([[1.0, 0.3, 0.1], [-1.0, -0.3, -0.1], [0.2, 1.0, 0.0]], requires_grad=True)
    value = pkt(student, features(3, 4, seed=2).float())
    value.backward()
    assert 0 < value < 10
    assert torch.isfinite(student.grad).all()


def test_options():
    assert losses.check("correlation_congruence", {"gamma": 1, "order": 3}) == []
    problems = losses.check("correlation_congruence", {"gamma": 0, "order": 0})
    assert [problem.path for problem in problems] == [("gamma",), ("order",)]
