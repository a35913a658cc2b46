"""A number for what a teacher is asked: the same inputs, the same number, whatever batch or padding they come in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.interfaces import Batch

TOKEN_INPUTS = ("attention_mask", "input_ids")
"""Entries whose second axis is that of the tokens."""

_FLOAT_TOKENS = frozenset({"input_values"})
"""Inputs of numbers that are padded as tokens are; other numbers only happen to be as many."""

_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FOLD = 41
_BLOCK = 1 << 16


def tags(view: Batch, names: Sequence[str]) -> NDArray[np.uint64]:
    """Return a number above 0 for each sample, uint64 ``[B]``, that depends on every value of these entries.

    Tokens that the attention mask leaves out do not count, on whichever side they are. It is a multilinear hash
    (Carter, Wegman 1979): two different inputs have the same number with a chance below 2^-40.

    Args:
        view: the batch as the teacher sees it, samples first.
        names: the entries that the teacher reads.
    """
    mask = token_mask(view)
    hashed = [_entry(name, view[name], mask).cpu().numpy().view(np.uint64) for name in sorted(names)]
    mixed = hashed[0]
    for each in hashed[1:]:  # scrambled in between, so that what one entry adds another cannot take away
        mixed = _scrambled(mixed) + each
    return np.maximum(_scrambled(mixed), np.uint64(1))


def token_mask(view: Batch) -> Tensor | None:
    """Return which places of a batch hold tokens, bool ``[B, T]``; ``None`` where the inputs are no texts."""
    for name in TOKEN_INPUTS:
        value = view.get(name)
        if value is not None and value.ndim == 2:
            return value != 0 if name == "attention_mask" else torch.ones_like(value, dtype=torch.bool)
    return None


def _scrambled(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for _ in range(2):
        bits = (bits ^ (bits >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return bits ^ (bits >> np.uint64(32))


def _entry(name: str, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return int64 ``[B]``."""
    about = f"{name} {value.dtype} {list(value.shape[1:])}"
    by_token = name in _FLOAT_TOKENS or not value.is_floating_point()
    if mask is None or value.shape != mask.shape or not by_token:
        if value.device.type == "cpu":
            return torch.from_numpy(_hashed(value)) + _seed(about)
        words = _words(value)
        return (words * _multipliers(words.shape[1], words.device)).sum(1) + _seed(about)
    place = (mask.cumsum(1) - 1).clamp_min(0)  # among the sample's own tokens
    factors = _multipliers(value.shape[1], value.device)[place]
    numbers = value.view(_SAME_SIZE[value.element_size()]) if value.is_floating_point() else value
    each = torch.where(mask, (numbers.long() + _seed(name)) * factors, 0)
    return each.sum(1) + _seed(f"{name} {value.dtype}") * (1 + mask.sum(1))


def _hashed(value: Tensor) -> NDArray[np.int64]:
    """Return what :func:`_words` and its sum give, with less to start for a small batch."""
    if value[:1].numel() * value.element_size() % 8 or not value.is_contiguous():
        words = _words(value).numpy()
    else:
        words = value.detach().view(torch.uint8).numpy().reshape(len(value), -1).view(np.int64)
        words = words ^ (words >> _FOLD)
    hashed: NDArray[np.int64] = np.einsum("ij,j->i", words, _multipliers(words.shape[1], value.device).numpy())
    return hashed


def _words(value: Tensor) -> Tensor:
    """Return each sample's bytes as int64 ``[B, N]``, the high bits of a word folded into its low ones."""
    flat = value.detach().contiguous().flatten(1) if value.ndim > 1 else value.detach().reshape(-1, 1).contiguous()
    raw = flat.view(torch.uint8)
    missing = -raw.shape[1] % 8
    if missing:
        raw = torch.nn.functional.pad(raw, (0, missing))
    words = raw.view(torch.int64)
    return words ^ (words >> _FOLD)


@lru_cache(maxsize=64)
def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _multipliers(count: int, device: torch.device) -> Tensor:
    """Return ``count`` odd random numbers; the first ones do not depend on how many."""
    return _table(-(-max(1, count) // _BLOCK), str(device))[:count]


@lru_cache(maxsize=8)
def _table(blocks: int, device: str) -> Tensor:
    drawn = [np.random.default_rng([7, block]).integers(0, 2**64, _BLOCK, dtype=np.uint64) for block in range(blocks)]
    return torch.from_numpy((np.concatenate(drawn) | np.uint64(1)).view(np.int64)).to(device)
