"""ReviewKD against its formula written out with the same parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from potstill.errors import ObjectiveError
from potstill.losses.feature_maps import Review

STUDENT = ((3, 2, 6, 6), (3, 3, 4, 4), (3, 4, 2, 2))
TEACHER = ((3, 3, 12, 12), (3, 5, 4, 4), (3, 2, 1, 1))


def maps(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    random = np.random.default_rng(seed)
    return tuple(torch.from_numpy(random.normal(0, 2, shape)) for shape in shapes)


def made(student: Any, teacher: Any, **options: Any) -> Review:
    loss = Review(**options)
    torch.manual_seed(0)
    loss.materialize(student, teacher)
    for parameter in loss.parameters():
        nn.init.normal_(parameter, std=0.5)
    return loss.double()


def normalised(features: np.ndarray, layer: Any) -> np.ndarray:
    mean, variance = features.mean((0, 2, 3), keepdims=True), features.var((0, 2, 3), keepdims=True)
    weight, bias = (each.detach().numpy()[:, None, None] for each in (layer.weight, layer.bias))
    return (features - mean) / np.sqrt(variance + 1e-5) * weight + bias


def convolved(features: np.ndarray, layer: Any) -> np.ndarray:
    """A convolution with zeros around the map, by its definition."""
    kernel, width = layer.weight.detach().numpy(), layer.weight.shape[-1]
    edge = width // 2
    padded = np.pad(features, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    height, breadth = features.shape[2:]
    total = np.zeros((len(features), len(kernel), height, breadth))
    for row in range(width):
        for column in range(width):
            window = padded[:, :, row : row + height, column : column + breadth]
            total += np.einsum("oi,bihw->bohw", kernel[:, :, row, column], window)
    return total if layer.bias is None else total + layer.bias.detach().numpy()[:, None, None]


def nearest(features: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (np.arange(to) * have // to for to, have in zip(size, features.shape[2:], strict=True))
    return features[:, :, rows][:, :, :, columns]


def averaged(features: np.ndarray, size: int) -> np.ndarray:
    """The adaptive average: cell i of n covers the entries from ⌊i·h/n⌋ to ⌈(i + 1)·h/n⌉."""
    b, c, height, width = features.shape
    out = np.zeros((b, c, size, size))
    for i in range(size):
        for j in range(size):
            top, bottom = i * height // size, -((i + 1) * height // -size)
            left, right = j * width // size, -((j + 1) * width // -size)
            out[:, :, i, j] = features[:, :, top:bottom, left:right].mean((2, 3))
    return out


def hierarchical(student: np.ndarray, teacher: np.ndarray) -> float:
    shares, terms = [1.0], [((student - teacher) ** 2).mean()]
    for size in (4, 2, 1):
        if size < student.shape[2]:
            shares.append(shares[-1] / 2)
            terms.append(((averaged(student, size) - averaged(teacher, size)) ** 2).mean())
    return float(np.dot(shares, terms) / sum(shares))


def reviewed(loss: Review, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> float:
    total, deeper = 0.0, None
    for fusion, own, other in reversed(list(zip(loss.fusions, student, teacher, strict=True))):
        fused = normalised(convolved(own.detach().numpy(), fusion.inward[0]), fusion.inward[1])
        if deeper is not None:
            deeper = nearest(deeper, fused.shape[2:])
            shares = 1 / (1 + np.exp(-convolved(np.concatenate([fused, deeper], 1), fusion.attention[0])))
            fused = fused * shares[:, [0]] + deeper * shares[:, [1]]
        deeper = nearest(fused, other.shape[2:])
        result = normalised(convolved(deeper, fusion.outward[0]), fusion.outward[1])
        total += hierarchical(result, other.numpy())
    return total


@pytest.mark.parametrize("shapes", [(STUDENT, TEACHER), (STUDENT[:2], STUDENT[:2]), (STUDENT[1:], TEACHER[1:])])
def test_review_from_the_formula(shapes):
    student, teacher = maps(*shapes[0], seed=1), maps(*shapes[1], seed=2)
    loss = made(student, teacher)
    assert loss(student, teacher).item() == pytest.approx(reviewed(loss, student, teacher), rel=1e-9)


def test_one_map_a_side_may_be_no_tuple():
    student, teacher = maps((3, 2, 6, 6), seed=3), maps((3, 4, 3, 3), seed=4)
    loss = made(student[0], teacher[0])
    assert loss(student[0], teacher[0]).item() == pytest.approx(reviewed(loss, student, teacher), rel=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_the_hierarchical_loss_leaves_out_levels_that_are_not_smaller(size):
    """A student one too large everywhere: every level sees 1, so the shares must sum to 1 whatever is left out."""
    student, teacher = maps((2, 3, size, size), (2, 3, size, size), seed=5)
    loss = made(student, teacher)
    outward = loss.fusions[0].outward[1]
    nn.init.zeros_(outward.weight)  # so that the student's map is its bias
    nn.init.constant_(outward.bias, 4.0)
    assert loss(student, torch.full_like(teacher, 3.0)).item() == pytest.approx(1.0)


def test_shallow_maps_of_the_teacher_reach_the_deep_ones_of_the_student_and_not_the_other_way():
    """That is the paper's finding: the teacher's shallow layers teach the student's deeper ones."""
    student = tuple(each.requires_grad_() for each in maps(*STUDENT, seed=6))
    teacher = maps(*TEACHER, seed=7)
    loss = made(student, teacher).eval()

    def reach(level: int) -> list[bool]:
        changed = tuple(each + 1 if index == level else each for index, each in enumerate(teacher))
        change = loss(student, changed) - loss(student, teacher)
        grads = torch.autograd.grad(change, student, allow_unused=True)
        return [grad is not None and bool(grad.abs().max() > 1e-9) for grad in grads]

    assert reach(0) == [True, True, True]
    assert reach(2) == [False, False, True]


def test_the_pooled_vector_counts_as_a_map_of_one_position():
    student, teacher = maps((3, 2, 4, 4), (3, 4), seed=8), maps((3, 3, 4, 4), (3, 5), seed=9)
    loss = made(student, teacher)
    as_maps = [(each[0], each[1][..., None, None]) for each in (student, teacher)]
    torch.testing.assert_close(loss(student, teacher), loss(*as_maps))
    one = [tuple(each[:1] for each in side) for side in (student, teacher)]
    assert torch.isfinite(loss(*one))


def test_the_width_is_at_most_that_of_the_deepest_map():
    student, teacher = maps(*STUDENT, seed=10), maps(*TEACHER, seed=11)
    assert made(student, teacher).fusions[0].inward[0].out_channels == 4
    narrow = made(student, teacher, width=3)
    assert [each.inward[0].out_channels for each in narrow.fusions] == [3, 3, 3]
    assert [each.outward[0].out_channels for each in narrow.fusions] == [3, 5, 2]
    assert [each.attention is None for each in narrow.fusions] == [False, False, True]


def test_zeros_are_finite():
    student = tuple(torch.zeros(shape, requires_grad=True) for shape in STUDENT)
    loss = Review()
    loss.materialize(student, student)
    loss(student, student).backward()
    assert all(torch.isfinite(each.grad).all() for each in student)


def test_what_cannot_be_compared_is_an_error_of_the_dry_run():
    student, teacher = maps(*STUDENT, seed=12), maps(*TEACHER, seed=13)
    with pytest.raises(ObjectiveError, match="as many maps a side, got 3 and 2 of the teacher"):
        Review().materialize(student, teacher[:2])
    with pytest.raises(ObjectiveError, match=r"of the teacher, got \[2, 3, 4\]"):
        Review().materialize(student, (*teacher[:2], torch.zeros(2, 3, 4)))
