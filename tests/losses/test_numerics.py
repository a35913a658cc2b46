"""The arithmetic that all losses share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from potstill.losses.numerics import LOWEST, applied, log_softmax, unit


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_log_softmax_of_an_impossible_class(dtype, low, temperature):
    """With the lowest number of the type, a product with T² or a square was infinite."""
    logits = torch.tensor([0.0, low], dtype=dtype, requires_grad=True)
    value = log_softmax(logits, temperature)
    assert value.dtype == dtype
    assert value.tolist() == [0.0, LOWEST]
    assert value.exp().tolist() == [1.0, 0.0]
    (20.0**2 * 150_000 * value.square()).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1] == 0


def test_log_softmax_of_finite_logits_is_torchs_to_the_bit():
    """A bound that confident models reach would give them another value, and no gradient."""
    logits = torch.tensor([[1e4, -1e4, 3.0], [1e6, -1e6, 0.25], [-65504.0, 65504.0, 1.0]], requires_grad=True)
    value, expected = log_softmax(logits, 0.5), torch.log_softmax(logits / 0.5, -1)
    assert torch.equal(value, expected)
    weights = torch.tensor([0.5, 0.25, 0.125])
    ours, theirs = (torch.autograd.grad((each * weights).sum(), logits)[0] for each in (value, expected))
    assert torch.equal(ours, theirs)
    assert (ours != 0).any(0).all()


def test_log_softmax_has_a_gradient_in_the_temperature_beside_an_impossible_class():
    """−inf / T has the derivative inf / T², and 0 times that is NaN."""
    gradients = []
    for logits in (torch.tensor([1.0, -math.inf, 2.0]), torch.tensor([1.0, 2.0])):
        temperature = torch.tensor(0.7, requires_grad=True)
        log_softmax(logits, temperature)[0].backward()
        gradients.append(temperature.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dim", [-1, 1])
def test_unit_is_the_direction(dim):
    x = vectors(3, 4, 2, 5, seed=1)
    expected = x.numpy() / np.linalg.norm(x.numpy(), axis=dim, keepdims=True)
    np.testing.assert_allclose(unit(x, dim).numpy(), expected, rtol=1e-13)
    leaf = torch.cat([vectors(3, 4, seed=2), torch.eye(4).double()]).requires_grad_()
    assert torch.autograd.gradcheck(unit, leaf)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_unit_does_not_depend_on_the_size(size):
    """Squares of 1e-30 are 0 in fp32, and those of 1e30 infinite."""
    x = torch.tensor([[3.0, -4.0], [0.0, 2.0]]) * size
    torch.testing.assert_close(unit(x), torch.tensor([[0.6, -0.8], [0.0, 1.0]]))


def test_unit_of_zeros_has_a_gradient_that_does_not_explode():
    """A divisor of 1e-12 in the place of the length makes it 1e12 times as large as what comes back."""
    x = torch.zeros(2, 3, requires_grad=True)
    value = unit(x)
    assert not value.any()
    value.backward(torch.tensor([[1.0, -2.0, 3.0]] * 2))
    assert x.grad.abs().max() <= 3


def test_layers_get_their_own_type_and_give_at_least_fp32():
    layer, narrow = nn.Linear(3, 2), nn.Linear(3, 2).bfloat16()
    narrow.load_state_dict(layer.state_dict())
    x = vectors(4, 3, seed=3)
    assert applied(layer.double(), x).dtype == torch.float64
    for signal in (x, x.float(), x.bfloat16()):
        value = applied(narrow, signal)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), layer(x), rtol=0.05, atol=0.05)
    assert applied(nn.Identity(), x).dtype == torch.float64
    assert applied(nn.Identity(), x.bfloat16()).dtype == torch.float32
