"""Random numbers that depend on nothing but (seed, epoch, sample id, name): the same in any batch, order or process.

Every number is a hash of its coordinates, in the manner of SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable
pseudorandom number generators"). There is no state, so a run that is resumed, or a loader that reads ahead, draws the
same numbers again.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_WORD = (1 << 64) - 1


class Draws:
    """Random numbers for the samples of a batch, as a pure function of (seed, epoch, sample id, name).

    Each method takes the ``name`` of what is drawn (two names give independent numbers, the same name the same
    numbers) and a shape per sample. A longer last axis only adds numbers behind: the first ``n`` of a sample do not
    depend on how many are drawn, as long as the shape has one axis.

    Args:
        seed: any integer.
        epoch: any integer; each epoch has its own numbers.
        sample_id: int64 ``[B]``; the results live on its device.

    Raises:
        ValueError: ``sample_id`` is not an int64 tensor with one axis.
    """

    def __init__(self, seed: int, epoch: int, sample_id: Tensor) -> None:
        if sample_id.ndim != 1 or sample_id.dtype != torch.int64:
            raise ValueError(f"sample_id must be int64 [B], got {sample_id.dtype} {list(sample_id.shape)}")
        self.sample_id = sample_id
        self._device = sample_id.device
        start = _absorb(_absorb(np.zeros(1, np.uint64), _word(seed)), _word(epoch))
        self._keys = _absorb(start, sample_id.detach().cpu().numpy().astype(np.uint64))

    def __len__(self) -> int:
        return len(self._keys)

    def scope(self, name: str) -> Draws:
        """Return draws whose names are apart from these, so that one augmentation can be used twice."""
        scoped = Draws.__new__(Draws)
        scoped.sample_id, scoped._device = self.sample_id, self._device
        scoped._keys = _absorb(self._keys, _name_word("scope", name))
        return scoped

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Return float32 ``[B, *shape]``, uniform in [0, 1)."""
        bits = self._bits(name, shape) >> np.uint64(40)
        return self._tensor((bits.astype(np.float64) * 2.0**-24).astype(np.float32))

    def integers(self, name: str, low: int, high: int, *shape: int) -> Tensor:
        """Return int64 ``[B, *shape]``, uniform among ``low``, …, ``high - 1``.

        Raises:
            ValueError: ``high`` is not above ``low``, or further than 2^53 from it.
        """
        if not 0 < high - low <= 1 << 53:
            raise ValueError(f"high must lie above low, by at most 2**53, got low {low} and high {high}")
        steps = np.floor(self._fractions(name, shape) * float(high - low)).astype(np.int64)
        return self._tensor(steps + low)

    def normal(self, name: str, *shape: int) -> Tensor:
        """Return float32 ``[B, *shape]``, standard normal (by the inverse of the distribution function)."""
        return self._tensor(ndtri(self._fractions(name, shape) + 2.0**-54).astype(np.float32))

    def generator(self, i: int, name: str) -> torch.Generator:
        """Return a generator on the CPU, seeded for the ``i``-th sample of the batch, for library transforms."""
        bits = int(_absorb(self._keys[i : i + 1], _name_word("name", name))[0])
        return torch.Generator().manual_seed(bits >> 1)

    def _fractions(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return float64 in [0, 1) with 53 random bits; times a number up to 2^53 it stays below that number."""
        return (self._bits(name, shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _bits(self, name: str, shape: tuple[int, ...]) -> NDArray[np.uint64]:
        keys = _absorb(self._keys, _name_word("name", name))
        counters = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.uint64).reshape(1, *shape)
        return _absorb(keys.reshape(-1, *(1 for _ in shape)), counters)

    def _tensor(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _absorb(key: NDArray[np.uint64], value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a new key from a key and a value; both are scrambled, so that near values give unrelated keys."""
    return _scramble(key ^ _scramble(value + _GOLDEN))


def _scramble(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's output function of each word."""
    bits = bits + _GOLDEN
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))


def _word(value: int) -> NDArray[np.uint64]:
    return np.array([value & _WORD], dtype=np.uint64)


def _name_word(kind: str, name: str) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"{kind}:{name}".encode(), digest_size=8).digest()
    return _word(int.from_bytes(digest, "little"))
