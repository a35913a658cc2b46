"""Cross-entropy with the labels, against numbers from its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from potstill.errors import ObjectiveError
from potstill.losses.supervised import cross_entropy
from potstill.registry import losses

LN2, LN3 = math.log(2), math.log(3)


def log_probabilities(logits: torch.Tensor) -> np.ndarray:
    wide = logits.numpy().astype(np.longdouble)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, shape))


def test_by_hand():
    logits = torch.tensor([[LN3, 0.0], [LN3, 0.0]], dtype=torch.float64)  # probabilities 3/4, 1/4
    value = cross_entropy(logits, labels=torch.tensor([0, 1]))
    assert value.tolist() == pytest.approx([math.log(4 / 3), math.log(4)], abs=1e-12)


def test_smoothing_by_hand():
    """ε of the target is spread over all classes, the right one included; over the others only it would be larger."""
    logits = torch.tensor([[LN3, 0.0]], dtype=torch.float64)
    value = cross_entropy(logits, labels=torch.tensor([0]), label_smoothing=0.2)
    assert value.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4), abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_in_extended_precision(smoothing):
    logits, labels = random_logits(7, 5), torch.tensor([0, 1, 2, 3, 4, 0, 2])
    logp = log_probabilities(logits)
    expected = -(1 - smoothing) * logp[np.arange(7), labels.numpy()] - smoothing * logp.mean(-1)
    value = cross_entropy(logits, labels=labels, label_smoothing=smoothing)
    np.testing.assert_allclose(value.numpy(), expected.astype(float), rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_unlabelled_position_gives_neither_value_nor_gradient(smoothing):
    """Smoothing gives every class some weight; an unlabelled sample must not be pushed to the uniform distribution."""
    logits = random_logits(3, 4).requires_grad_()
    value = cross_entropy(logits, labels=torch.tensor([1, -100, 2]), label_smoothing=smoothing)
    assert value[1] == 0
    assert (value[[0, 2]] > 0).all()
    value.sum().backward()
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[0] != 0).all()


def test_class_probabilities():
    logits = random_logits(3, 4)
    targets = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 1.0], [0, 0, 0, 0]])
    expected = -(targets.numpy() * log_probabilities(logits)).sum(-1)
    value = cross_entropy(logits, labels=targets)
    np.testing.assert_allclose(value.numpy(), expected.astype(float), rtol=1e-12)
    assert value[2] == 0  # mixup's row for an unlabelled sample


def test_positions_keep_their_axes():
    logits, labels = random_logits(2, 3, 5), torch.tensor([[0, 1, -100], [4, 3, 2]])
    value = cross_entropy(logits, labels=labels)
    assert value.shape == (2, 3)
    torch.testing.assert_close(value[1], cross_entropy(logits[1], labels=labels[1]))
    assert value[0, 2] == 0


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(4, dtype=torch.long), torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 5)],
    ids=["too many", "one-hot integers", "probabilities of other classes"],
)
def test_labels_that_do_not_fit_are_named(labels):
    with pytest.raises(ObjectiveError, match=r"expected class ids \[3\] or probabilities \[3, 4\], got labels"):
        cross_entropy(torch.zeros(3, 4), labels=labels)


def test_fractional_class_ids_are_refused():
    """Targets of a regression would silently be cut to whole numbers and learnt as classes."""
    with pytest.raises(ObjectiveError, match="labels"):
        cross_entropy(torch.zeros(3, 4), labels=torch.tensor([0.2, 0.9, 2.5]))


def test_narrow_logits_are_widened():
    logits = random_logits(4, 6).bfloat16()
    value = cross_entropy(logits, labels=torch.tensor([0, 1, 2, 3]))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, cross_entropy(logits.float(), labels=torch.tensor([0, 1, 2, 3])))


def test_small_integer_types_are_labels_too():
    logits = random_logits(4, 6)
    expected = cross_entropy(logits, labels=torch.tensor([0, 1, 2, 3]))
    assert torch.equal(cross_entropy(logits, labels=torch.tensor([0, 1, 2, 3], dtype=torch.uint8)), expected)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, "some"])
def test_wrong_smoothing_is_a_problem(smoothing):
    problems = losses.check("cross_entropy", {"label_smoothing": smoothing})
    assert [problem.path for problem in problems] == [("label_smoothing",)]
