"""A teacher's signals as records of one sample each: dense, or the most likely classes and the mass of the others.

What is padding is not in a record, so an answer does not depend on the texts that happened to be beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.errors import CacheError
from potstill.interfaces import Signals

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Words = NDArray[np.uint64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """One tensor of a record.

    Attributes:
        signal: the signal that it belongs to.
        role: ``dense``; of a signal of which only the most likely classes are kept, ``values``, ``classes`` or
            ``tail``: the logit of each other class.
        shape: of one sample; −1 stands for its tokens.
        stored: the dtype in which it is stored, as in ``torch``.
        answered: the dtype in which the teacher gave the signal.
        classes: the length of the last axis where only some of it is kept.
    """

    signal: str
    role: str
    shape: tuple[int, ...]
    stored: str
    answered: str
    classes: int = 0

    @property
    def token_axes(self) -> int:
        """How many axes are those of the tokens."""
        return self.shape.count(-1)

    @property
    def by_token(self) -> bool:
        """Whether the first axis, and no other, is that of the tokens."""
        return self.token_axes == 1 and self.shape[0] == -1

    def numbers(self, lengths: Ints) -> Ints:
        """Return how many numbers each sample has; for one :attr:`by_token`, each token."""
        fixed = math.prod(size for size in self.shape if size > 0)
        return fixed * (np.ones_like(lengths) if self.by_token else np.power(lengths, self.token_axes))

    def words(self, lengths: Ints) -> Ints:
        """Return how many words of 8 bytes each sample takes."""
        each: Ints = -(-self.numbers(lengths) * getattr(torch, self.stored).itemsize // 8)
        return each * lengths if self.by_token else each


class Encoding:
    """How signals become records of words and back.

    Args:
        parts: what a record holds, in its order.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self._is_fixed = not any(part.token_axes for part in parts)
        one = np.ones(1, np.int64)
        self._widths = [int(part.words(one)[0]) for part in parts]

    @classmethod
    def of(
        cls,
        signals: Signals,
        token_axes: Mapping[str, tuple[int, ...]],
        *,
        precision: str | None = None,
        top_k: int | None = None,
    ) -> Encoding:
        """Return the encoding for signals like these.

        Args:
            signals: what the teacher said about some batch, ``[B, …]`` each.
            token_axes: for each signal the axes, counted from 0 for the samples, that are as long as the text.
            precision: in which floating-point signals are stored (``fp32``, ``fp16``, ``bf16``); the teacher's if
                omitted.
            top_k: of ``logits``, how many classes are kept, and of the others their total probability; all if omitted.

        Raises:
            CacheError: a signal is no tensor, or has fewer classes than are to be kept.
        """
        parts = []
        for name, value in signals.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                raise CacheError(
                    f"the teacher's signal '{name}' cannot be cached: expected a tensor [B, …], got {_kind(value)}; "
                    "name an element of it, as in `module.path:0`"
                )
            axes = token_axes.get(name, ())
            shape = tuple(-1 if axis in axes else int(size) for axis, size in enumerate(value.shape))[1:]
            answered = str(value.dtype).removeprefix("torch.")
            wide = precision is None or not value.is_floating_point()
            stored = answered if wide else str(PRECISIONS[str(precision)]).removeprefix("torch.")
            if top_k is None or name.rpartition("/")[2] != "logits":
                parts.append(Part(name, "dense", shape, stored, answered))
                continue
            classes = shape[-1] if shape else 0
            if not 0 < top_k < classes:
                raise CacheError(f"expected top_k below the {classes} classes of '{name}', got {top_k}")
            kept = (*shape[:-1], top_k)
            parts += [
                Part(name, "values", kept, stored, answered, classes),
                Part(name, "classes", kept, "int16" if classes <= 32768 else "int32", answered, classes),
                Part(name, "tail", (*shape[:-1], 1), "float32", answered, classes),
            ]
        return cls(parts)

    @classmethod
    def from_plain(cls, plain: list[dict[str, Any]]) -> Encoding:
        """Return what :meth:`plain` described."""
        return cls([Part(**{**part, "shape": tuple(part["shape"])}) for part in plain])

    def plain(self) -> list[dict[str, Any]]:
        """Return the encoding as plain JSON."""
        return [{**asdict(part), "shape": list(part.shape)} for part in self.parts]

    @property
    def is_exact(self) -> bool:
        """Whether what comes back is what went in, padding included."""
        return all(p.role == "dense" and p.stored == p.answered and not p.token_axes for p in self.parts)

    def counts(self, lengths: Ints) -> Ints:
        """Return the words of each sample's record."""
        if self._is_fixed:
            return np.full(len(lengths), sum(self._widths))
        total = np.zeros_like(lengths)
        for part in self.parts:
            total = total + part.words(lengths)
        return total

    def encode(self, signals: Signals, inside: Tensor | None) -> tuple[Words, Ints, Ints]:
        """Return the records one after another, the words of each, and the tokens of each.

        Args:
            signals: what the teacher said, ``[B, …]`` each.
            inside: bool ``[B, T]``: which places are tokens; ``None`` where there are none.

        Raises:
            CacheError: signals of another shape than the first, or numbers that the stored precision cannot hold.
        """
        size = len(next(iter(signals.values())))
        inside = None if inside is None else inside.cpu()
        lengths = np.zeros(size, np.int64) if inside is None else inside.sum(1).numpy()
        counts = self.counts(lengths)
        if self._is_fixed:
            rows = [_fixed(tensor, part) for part, tensor in self._split(signals)]
            return np.concatenate(rows, axis=1).reshape(-1), counts, lengths
        words = np.empty(int(counts.sum()), np.uint64)
        starts = np.cumsum(counts) - counts
        for part, tensor in self._split(signals):
            each = part.words(lengths)
            words[_places(starts, each)] = _ragged(tensor, part, inside, lengths)
            starts = starts + each
        return words, counts, lengths

    def decode(self, words: Words, lengths: Ints, inside: Tensor | None) -> Signals:
        """Return the signals of records, on the CPU; 0 where a batch is padded."""
        found: list[Tensor] = []
        if self._is_fixed:
            rows, ends = words.reshape(len(lengths), -1), np.cumsum(self._widths).tolist()
            for part, width, end in zip(self.parts, self._widths, ends, strict=True):
                found.append(_unfixed(rows[:, end - width : end], part))
            return self._joined(found)
        inside = None if inside is None else inside.cpu()
        counts = self.counts(lengths)
        starts = np.cumsum(counts) - counts
        for part in self.parts:
            each = part.words(lengths)
            found.append(_unragged(words[_places(starts, each)], part, inside, lengths))
            starts = starts + each
        return self._joined(found)

    def _split(self, signals: Signals) -> list[tuple[Part, Tensor]]:
        """Return each part with its tensor, in the stored dtype and on the CPU."""
        split: list[tuple[Part, Tensor]] = []
        for part in self.parts:
            value = signals.get(part.signal)
            if value is None:
                raise CacheError(f"the teacher gave no '{part.signal}'; it gave {sorted(signals)}")
            whole = (*part.shape[:-1], part.classes) if part.classes else part.shape
            if value.ndim != 1 + len(whole) or any(
                w not in (-1, v) for v, w in zip(value.shape[1:], whole, strict=True)
            ):
                raise CacheError(
                    f"expected the teacher's '{part.signal}' to be {list(whole)} for every sample, -1 its tokens, "
                    f"got {list(value.shape[1:])}"
                )
            stored = getattr(torch, part.stored)
            if part.role == "dense":
                split.append((part, _narrowed(value, stored, part)))
            elif part.role == "values":
                top = value.topk(part.shape[-1], dim=-1)
                rest = value.float().scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
                tail = rest - float(np.log(part.classes - part.shape[-1]))
                parts = [p for p in self.parts if p.signal == part.signal]
                indices = top.indices.to(getattr(torch, parts[1].stored))
                split += [(parts[0], _narrowed(top.values, stored, part)), (parts[1], indices), (parts[2], tail)]
        return [(part, tensor.detach().cpu()) for part, tensor in split]

    def _joined(self, found: list[Tensor]) -> Signals:
        signals: Signals = {}
        by_role: dict[tuple[str, str], Tensor] = {}
        for part, tensor in zip(self.parts, found, strict=True):
            by_role[part.signal, part.role] = tensor
            if part.role == "dense":
                signals[part.signal] = tensor.to(getattr(torch, part.answered))
            elif part.role == "tail":
                values, classes = by_role[part.signal, "values"], by_role[part.signal, "classes"]
                dense = tensor.expand(*tensor.shape[:-1], part.classes).clone()
                dense.scatter_(-1, classes.long(), values.float())
                signals[part.signal] = dense.to(getattr(torch, part.answered))
        return signals


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if not isinstance(value, Tensor) else "a single number"


def _narrowed(value: Tensor, stored: torch.dtype, part: Part) -> Tensor:
    narrow = value.to(stored)
    if narrow.dtype != value.dtype and not torch.equal(narrow.isfinite(), value.isfinite()):
        raise CacheError(
            f"the teacher's '{part.signal}' reaches {float(value[value.isfinite()].abs().max()):.3g}, which "
            f"{part.stored} cannot hold; store it in bf16 or fp32"
        )
    return narrow


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor, uint8 ``[rows, n]``, each row padded to whole words."""
    rows = len(tensor)
    raw = tensor.contiguous().reshape(rows, -1).view(torch.uint8).numpy()
    missing = -raw.shape[1] % 8
    return np.pad(raw, ((0, 0), (0, missing))) if missing else raw


def _fixed(tensor: Tensor, part: Part) -> Words:
    words: Words = np.ascontiguousarray(_bytes(tensor)).view(np.uint64)
    return words


def _unfixed(words: Words, part: Part) -> Tensor:
    """Return ``[rows, …]`` of words ``[rows, w]``."""
    dtype: torch.dtype = getattr(torch, part.stored)
    shape = part.shape[1:] if part.by_token else part.shape
    count = math.prod(shape) * dtype.itemsize
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)[:, :count]
    return torch.from_numpy(np.ascontiguousarray(raw)).view(dtype).reshape(len(words), *shape)


def _ragged(tensor: Tensor, part: Part, inside: Tensor | None, lengths: Ints) -> Words:
    """Return the words of all samples, one after another."""
    if not part.token_axes:
        return _fixed(tensor, part).reshape(-1)
    if part.by_token:
        return _fixed(tensor[_needed(inside)], part).reshape(-1)
    kept = tensor[_everywhere(part, _needed(inside), tensor)]
    size, numbers = tensor.element_size(), part.numbers(lengths)
    raw = np.zeros(int(part.words(lengths).sum()) * 8, np.uint8)
    words = part.words(lengths)
    places = _places((np.cumsum(words) - words) * 8, numbers * size)
    raw[places] = kept.contiguous().view(torch.uint8).numpy()
    filled: Words = raw.view(np.uint64)
    return filled


def _unragged(words: Words, part: Part, inside: Tensor | None, lengths: Ints) -> Tensor:
    """Return ``[B, …]`` with 0 where a batch is padded."""
    if not part.token_axes:
        return _unfixed(words.reshape(len(lengths), -1), part)
    mask = _needed(inside)
    shape = [mask.shape[1] if size == -1 else size for size in part.shape]
    dtype: torch.dtype = getattr(torch, part.stored)
    whole = torch.zeros(len(lengths), *shape, dtype=dtype)
    if part.by_token:
        whole[mask] = _unfixed(words.reshape(int(lengths.sum()), -1), part)
        return whole
    counts = part.words(lengths)
    places = _places((np.cumsum(counts) - counts) * 8, part.numbers(lengths) * dtype.itemsize)
    whole[_everywhere(part, mask, whole)] = torch.from_numpy(words.view(np.uint8)[places]).view(dtype)
    return whole


def _everywhere(part: Part, inside: Tensor, like: Tensor) -> Tensor:
    """Return the mask of the tokens over all axes of a signal."""
    mask = torch.ones(like.shape, dtype=torch.bool)
    for axis, size in enumerate(part.shape, start=1):
        if size == -1:
            sizes = [len(inside), *(1 for _ in part.shape)]
            sizes[axis] = inside.shape[1]
            mask &= inside.reshape(sizes)
    return mask


def _needed(inside: Tensor | None) -> Tensor:
    if inside is None:
        raise CacheError(
            "the teacher's signals have an axis of tokens, and the batch has no attention_mask or input_ids"
        )
    return inside


def _places(starts: Ints, counts: Ints) -> Ints:
    """Return ``start, start + 1, …`` of each sample, one sample after another."""
    ends = np.cumsum(counts)
    places: Ints = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
    return places
