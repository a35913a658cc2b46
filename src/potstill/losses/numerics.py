"""Arithmetic that every family of losses shares: wide enough types, no autocast, finite logarithms."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32 where its type is narrower, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def log_softmax(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Return finite log-probabilities ``[..., V]`` of ``logits / temperature`` in at least fp32.

    Logits of −inf give the lowest finite number instead of −inf, so that 0 · log 0 is 0 and no gradient is NaN.
    """
    wide = at_least_fp32(logits)
    return torch.log_softmax(wide / temperature, dim=-1).clamp_min(torch.finfo(wide.dtype).min)


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


def _device_type(args: tuple[Any, ...]) -> str:
    for value in args:
        first = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(first, Tensor):
            return first.device.type
    return "cpu"
