"""Arithmetic that every family of losses shares: wide enough types, no autocast, finite logarithms."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])

LOWEST = -1e9
"""Logarithm of an impossible probability: its power of e is 0, and its square times T² is finite in fp32."""

_FARTHEST = -1e30


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32 where its type is narrower, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def log_softmax(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Return finite log-probabilities ``[..., V]`` of ``logits / temperature`` in at least fp32.

    Logits of −inf, or of the lowest number of a type, give :data:`LOWEST` instead of −inf, so that 0 · log 0 is 0, the
    products and squares of a divergence are finite and no gradient is NaN.
    """
    wide = at_least_fp32(logits)
    if isinstance(temperature, Tensor):
        wide = wide.clamp_min(_FARTHEST)  # −inf / T has no derivative in T
    return torch.log_softmax(wide / temperature, dim=-1).clamp_min(LOWEST)


def without_autocast(function: F) -> F:
    """Let a function whose first argument is a tensor (``self`` apart), or a tuple of them, compute as it is written.

    Under autocast matrix products, convolutions and distances would come in bf16, of which three digits are right.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(_device_type(args), enabled=False):
            return function(*args, **kwargs)

    return cast(F, wrapped)


def safe_norm(tensor: Tensor, dim: int | tuple[int, ...] = -1, *, keepdim: bool = False) -> Tensor:
    """Return the Euclidean norm, whose gradient at 0 is 0 and not NaN, without overflow of the squares."""
    size = tensor.detach().abs().amax(dim, keepdim=True)
    size = torch.where(size > 0, size, torch.ones_like(size))
    squares = (tensor / size).square().sum(dim, keepdim=True)
    zero = squares == 0
    norm = torch.where(zero, torch.zeros_like(squares), torch.where(zero, torch.ones_like(squares), squares).sqrt())
    norm = norm * size
    return norm if keepdim else norm.squeeze(dim)


def unit(vectors: Tensor, dim: int = -1) -> Tensor:
    """Return the vectors along an axis with length 1; one of zeros stays as it is, with a gradient of its size."""
    size = vectors.detach().abs().amax(dim, keepdim=True)
    zero, one = size == 0, torch.ones_like(size)
    scaled = vectors / torch.where(zero, one, size)
    return scaled / torch.where(zero, one, scaled.square().sum(dim, keepdim=True)).sqrt()


def applied(layers: nn.Module, signal: Tensor) -> Tensor:
    """Return what layers make of a signal, in at least fp32.

    The signal goes in with the type of their parameters, which is bf16 where a sharded training (FSDP) or the caller
    makes them so; layers without parameters take it as it is.
    """
    first = next(layers.parameters(), None)
    output: Tensor = layers(signal if first is None else signal.to(first.dtype))
    return at_least_fp32(output)


def _device_type(args: tuple[Any, ...]) -> str:
    for value in args:
        first = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(first, Tensor):
            return first.device.type
    return "cpu"
