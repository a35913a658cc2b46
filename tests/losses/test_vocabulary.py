"""The loss between different vocabularies, against numbers from its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from potstill.errors import ObjectiveError
from potstill.losses.objective import Term
from potstill.losses.vocabulary import uld
from potstill.registry import losses

LN2, LN3 = math.log(2), math.log(3)


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, shape))


def by_loops(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """One position, as the paper's equation 5 has it."""
    sides = []
    for row in (student, teacher):
        powers = [math.exp(value / temperature) for value in row]
        sides.append(sorted((power / math.fsum(powers) for power in powers), reverse=True))
    size = max(map(len, sides))
    p, q = ([*side, *[0.0] * (size - len(side))] for side in sides)
    return math.fsum(abs(a - b) for a, b in zip(p, q, strict=True))


def test_uld_by_hand():
    """Student (1/4, 3/4), teacher (1/2, 0, 1/4, 1/4): sorted |3/4 − 1/2| + |1/4 − 1/4| + 1/4."""
    student = torch.tensor([[0.0, LN3]], dtype=torch.float64)
    teacher = torch.tensor([[LN2, -math.inf, 0.0, 0.0]], dtype=torch.float64)
    assert uld(student, teacher).item() == pytest.approx(0.5, abs=1e-12)
    assert uld(teacher, student).item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("ours", "theirs"), [(5, 5), (5, 9), (9, 5)])
def test_uld_by_loops(temperature, ours, theirs):
    student, teacher = logits(2, 3, ours, seed=1), logits(2, 3, theirs, seed=2)
    value = uld(student, teacher, temperature=temperature)
    assert value.shape == (2, 3)
    for place in np.ndindex(2, 3):
        expected = by_loops(student[place].numpy(), teacher[place].numpy(), temperature)
        assert value[place].item() == pytest.approx(expected, abs=1e-12)


def test_it_is_the_cheapest_matching_of_the_tokens():
    """Sorting is the closed form of an optimal transport: no other matching of tokens to tokens may be cheaper."""
    student, teacher = logits(6, seed=3), logits(6, seed=4)
    p, q = student.softmax(-1).numpy(), teacher.softmax(-1).numpy()
    cost = np.abs(p[:, None] - q[None])
    rows, columns = linear_sum_assignment(cost)
    assert uld(student, teacher).item() == pytest.approx(cost[rows, columns].sum(), abs=1e-12)


def test_it_does_not_know_which_token_is_which():
    student, teacher = logits(4, 7, seed=5), logits(4, 9, seed=6)
    torch.testing.assert_close(uld(student[:, torch.randperm(7)], teacher[:, torch.randperm(9)]), uld(student, teacher))
    torch.testing.assert_close(uld(student, student.flip(-1)), torch.zeros(4).double())


def test_padding_is_a_token_of_no_probability():
    """Logits padded with 0 before the softmax, as some tools do, would give the padding most of the probability."""
    student, teacher = logits(4, 5, seed=7) - 5, logits(4, 8, seed=8) - 5
    padded = torch.nn.functional.pad(student, (0, 3), value=-math.inf)
    torch.testing.assert_close(uld(student, teacher), uld(padded, teacher))


def test_gradient_is_that_of_the_sorted_differences():
    student, teacher = logits(5, 4, seed=9).requires_grad_(), logits(5, 6, seed=10)
    uld(student, teacher).sum().backward()
    for row in range(5):
        p, q = student[row].detach().softmax(-1).numpy(), np.sort(teacher[row].softmax(-1).numpy())[::-1]
        signs = np.empty(4)
        signs[np.argsort(-p)] = np.sign(np.sort(p)[::-1] - q[:4])
        np.testing.assert_allclose(student.grad[row].numpy(), p * (signs - (signs * p).sum()), atol=1e-12)


def test_positions_must_correspond():
    with pytest.raises(ObjectiveError, match=r"same positions, got student \[2, 3, 5\] and teacher \[2, 4, 7\]"):
        uld(torch.zeros(2, 3, 5), torch.zeros(2, 4, 7))


def test_a_term_compares_other_vocabularies_with_the_published_weight():
    assert losses.facts("uld")["weight"] == 1.5
    term = Term("uld", mask="none", temperature=2.0)
    signals = {"logits": logits(2, 3, 5, seed=11)}, {"logits": logits(2, 3, 7, seed=12)}
    value = term.values(*signals, {}, None)
    torch.testing.assert_close(value, uld(signals[0]["logits"], signals[1]["logits"], temperature=2.0))
