"""Losses between feature maps without parameters, against loops over samples, channels and positions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from potstill.errors import ObjectiveError
from potstill.losses.attention_transfer import attention_transfer, fsp, icc, nst


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, shape))


def halved(each: np.ndarray) -> np.ndarray:
    """The means of blocks of 2×2."""
    b, c, h, w = each.shape
    return each.reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5))


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / math.sqrt((vector**2).sum())


def attention(sample: np.ndarray, p: float) -> np.ndarray:
    return unit(sum(np.abs(channel) ** p for channel in sample).ravel())


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_attention_transfer_from_the_formula(p):
    student, teacher = maps(3, 4, 2, 5, seed=1), maps(3, 6, 2, 5, seed=2)
    pairs = [(attention(s, p), attention(t, p)) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    code = attention_transfer(student, teacher, p=p)
    np.testing.assert_allclose(code.numpy(), [((s - t) ** 2).sum() / 10 for s, t in pairs], rtol=1e-12)
    paper = attention_transfer(student, teacher, p=p, form="paper")
    np.testing.assert_allclose(paper.numpy(), [math.sqrt(((s - t) ** 2).sum()) for s, t in pairs], rtol=1e-12)


def test_attention_transfer_by_hand():
    """One channel, two positions: the squares (9, 16) and (16, 9) of length √337."""
    student, teacher = torch.tensor([[[[3.0, 4.0]]]]).double(), torch.tensor([[[[-4.0, 3.0]]]]).double()
    assert attention_transfer(student, teacher).item() == pytest.approx(49 / 337)
    assert attention_transfer(student, teacher, form="paper").item() == pytest.approx(math.sqrt(98 / 337))
    assert attention_transfer(student, teacher, p=1.0).item() == pytest.approx(1 / 25)


@pytest.mark.parametrize("loss", [attention_transfer, nst, icc])
def test_the_larger_map_is_averaged_whichever_side_it_is_on(loss):
    """RepDistiller looks at the height alone and makes every map square."""
    large, small = maps(2, 3, 4, 6, seed=3), maps(2, 3, 2, 3, seed=4)
    pooled = torch.from_numpy(halved(large.numpy()))
    torch.testing.assert_close(loss(large, small), loss(pooled, small))
    torch.testing.assert_close(loss(small, large), loss(small, pooled))
    wide, tall = maps(2, 3, 2, 6, seed=5), maps(2, 3, 4, 3, seed=6)
    narrower, lower = wide.reshape(2, 3, 2, 3, 2).mean(-1), tall.reshape(2, 3, 2, 2, 3).mean(3)
    torch.testing.assert_close(loss(wide, tall), loss(narrower, lower))


def test_attention_does_not_see_signs_sizes_or_the_order_of_channels():
    student, teacher = maps(2, 3, 4, 4, seed=7), maps(2, 5, 4, 4, seed=8)
    value = attention_transfer(student, teacher)
    torch.testing.assert_close(attention_transfer(-100 * student[:, [2, 0, 1]], teacher), value)
    assert (attention_transfer(torch.cat([student, student], 1), student) < 1e-15).all()


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_a_high_power_of_extreme_features_is_not_lost(size):
    """(10⁹)⁴ squared is infinite in fp32, (10⁻⁹)⁴ is 0; the map does not depend on the size."""
    student, teacher = maps(2, 3, 4, 4, seed=9).float(), maps(2, 3, 4, 4, seed=10).float()
    huge = (size * student).requires_grad_()
    value = attention_transfer(huge, teacher, p=4.0)
    torch.testing.assert_close(value, attention_transfer(student, teacher, p=4.0), rtol=1e-5, atol=0)
    value.sum().backward()
    assert huge.grad.abs().max() > 0
    assert torch.isfinite(huge.grad).all()


def nst_by_loops(student: np.ndarray, teacher: np.ndarray, degree: int, constant: float) -> float:
    said, taught = ([unit(channel.ravel()) for channel in each] for each in (student, teacher))

    def mean(left: list[np.ndarray], right: list[np.ndarray]) -> float:
        return float(np.mean([[(x @ y + constant) ** degree for y in right] for x in left]))

    return mean(taught, taught) + mean(said, said) - 2 * mean(said, taught)


@pytest.mark.parametrize(("degree", "constant"), [(2, 0.0), (1, 0.0), (3, 0.5)])
def test_nst_from_the_formula(degree, constant):
    student, teacher = maps(3, 4, 2, 3, seed=11), maps(3, 5, 2, 3, seed=12)
    expected = [nst_by_loops(s, t, degree, constant) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    value = nst(student, teacher, degree=degree, constant=constant)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-10)
    if (degree, constant) == (2, 0.0):
        torch.testing.assert_close(nst(student, teacher), value)


def test_nst_of_degree_2_compares_the_second_moments_of_the_channels():
    """Section 3 of the paper: the mean of (x·y)² is ‖Σ x xᵀ / C‖², so the discrepancy is a squared distance."""
    student, teacher = maps(2, 4, 2, 3, seed=13), maps(2, 6, 2, 3, seed=14)
    for said, taught, value in zip(student, teacher, nst(student, teacher), strict=True):
        moments = []
        for each in (said, taught):
            rows = each.flatten(1) / each.flatten(1).norm(dim=1, keepdim=True)
            moments.append(rows.T @ rows / len(rows))
        torch.testing.assert_close(value, (moments[0] - moments[1]).square().sum())


def test_nst_and_attention_do_not_see_the_order_of_the_channels_but_icc_and_fsp_do():
    student, teacher = maps(2, 4, 3, 3, seed=15), maps(2, 4, 3, 3, seed=16)
    moved = student[:, [3, 0, 2, 1]]
    for loss in (attention_transfer, nst):
        torch.testing.assert_close(loss(moved, teacher), loss(student, teacher))
    assert not torch.allclose(icc(moved, teacher), icc(student, teacher))
    other = maps(2, 3, 3, 3, seed=17)
    assert not torch.allclose(fsp((moved, other), (teacher, other)), fsp((student, other), (teacher, other)))


def flow(earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
    height, width = earlier.shape[1:]
    entry = [[(first * second).sum() / (height * width) for second in later] for first in earlier]
    return np.array(entry)


def test_fsp_from_the_formula():
    student = maps(3, 2, 4, 6, seed=18), maps(3, 5, 2, 3, seed=19)
    teacher = maps(3, 2, 3, 3, seed=20), maps(3, 5, 3, 3, seed=21)
    small = halved(student[0].numpy())
    expected = []
    for index in range(3):
        said = flow(small[index], student[1][index].numpy())
        taught = flow(*(each[index].numpy() for each in teacher))
        expected.append(((said - taught) ** 2).mean())
    np.testing.assert_allclose(fsp(student, teacher).numpy(), expected, rtol=1e-12)


def test_fsp_by_hand():
    """A flow of one channel into one: the mean of the products, 4 for the student and 1 for the teacher."""
    student = torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), 2.0)
    teacher = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[2.0, 0.0]]]])
    assert fsp(student, teacher).item() == pytest.approx(9.0)


def icc_by_loops(student: np.ndarray, teacher: np.ndarray, form: str) -> float:
    grams = []
    for sample in (student, teacher):
        gram = np.array([[(a * b).sum() for b in sample] for a in sample])
        grams.append(np.array([unit(row) for row in gram]) if form == "code" else gram)
    channels = len(student)
    return float(((grams[0] - grams[1]) ** 2).sum() / (channels if form == "code" else channels**2))


@pytest.mark.parametrize("form", ["code", "paper"])
def test_icc_from_the_formula(form):
    student, teacher = maps(3, 4, 2, 5, seed=22), maps(3, 4, 2, 5, seed=23)
    expected = [icc_by_loops(s, t, form) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    np.testing.assert_allclose(icc(student, teacher, form=form).numpy(), expected, rtol=1e-12)


def test_icc_of_the_code_ignores_the_size_and_a_common_order_of_positions():
    student, teacher = maps(2, 4, 3, 3, seed=24), maps(2, 4, 3, 3, seed=25)
    torch.testing.assert_close(icc(7 * student, teacher), icc(student, teacher))
    turned = student.flip((2, 3))
    torch.testing.assert_close(icc(turned, teacher), icc(student, teacher))
    assert (icc(turned, student) < 1e-20).all()
    assert icc(7 * student, teacher, form="paper").sum() > 100 * icc(student, teacher, form="paper").sum()


@pytest.mark.parametrize(
    "loss",
    [attention_transfer, lambda s, t: attention_transfer(s, t, p=1.0), nst, icc, lambda s, t: fsp((s, s), (t, t))],
)
def test_dead_maps_have_a_small_gradient(loss):
    """After ReLU a whole map can be 0; one NaN there, or a step of 1e12, would wipe out the student."""
    student, teacher = torch.zeros(2, 3, 4, 4, requires_grad=True), maps(2, 3, 4, 4, seed=26).float()
    value = loss(student, teacher)
    assert torch.isfinite(value).all()
    value.sum().backward()
    assert student.grad.abs().max() < 100
    one_dead = maps(2, 3, 4, 4, seed=27).float()
    one_dead[:, 1] = 0
    loss(one_dead.requires_grad_(), teacher).sum().backward()
    assert one_dead.grad.abs().max() < 100
    assert torch.isfinite(loss(student, torch.zeros_like(teacher))).all()


@pytest.mark.parametrize("loss", [attention_transfer, nst, icc])
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 3), (2, 3, 4, 4), r"feature map \[B, C, H, W\] of the student, got \[2, 3\]"),
        ((2, 3, 4, 4), (2, 5, 3), r"of the teacher, got \[2, 5, 3\]"),
        ((2, 3, 4, 4), (3, 3, 4, 4), "one batch, got 2 samples of the student and 3 of the teacher"),
    ],
)
def test_other_shapes_are_errors(loss, student, teacher, message):
    with pytest.raises(ObjectiveError, match=message):
        loss(torch.zeros(student), torch.zeros(teacher))


def test_channels_that_cannot_be_compared_are_errors():
    with pytest.raises(ObjectiveError, match=r"3 of the student and 4 of the teacher; `project: linear`"):
        icc(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, 4))
    pair = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 2, 2)
    with pytest.raises(ObjectiveError, match=r"\[3, 5\] of the student and \[5, 3\] of the teacher"):
        fsp(pair, pair[::-1])
    with pytest.raises(ObjectiveError, match="two signals of the teacher"):
        fsp(pair, pair[0])
    with pytest.raises(ObjectiveError, match=r"the student's later layer, got \[2, 5\]"):
        fsp((pair[0], torch.zeros(2, 5)), pair)
