"""Texts as batches: tokenised once, or anew for each random view; padded to the longest text of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.augment import Step, split_step
from potstill.data.batching import InMemory
from potstill.data.draws import Draws
from potstill.errors import DataError
from potstill.interfaces import Batch
from potstill.registry import augmentations

PLACEHOLDER = "[MASK]"
"""The mask token of augmented texts; each tokenizer sees its own in its place."""


class Tokens:
    """Texts as token ids, without padding, all in one array a column.

    Args:
        columns: name (``input_ids``, ``attention_mask``, …) to one list of numbers a text.
        padding: name to the number that fills up.
        left: whether texts are filled up on the left.

    Raises:
        DataError: two columns have rows of different lengths.
    """

    def __init__(
        self, columns: Mapping[str, Sequence[Sequence[int]]], *, padding: Mapping[str, int], left: bool = False
    ) -> None:
        lengths = {name: np.fromiter((len(row) for row in rows), np.int64, len(rows)) for name, rows in columns.items()}
        first = next(iter(lengths))
        self.lengths: NDArray[np.int64] = lengths[first]
        for name, others in lengths.items():
            if not np.array_equal(others, self.lengths):
                raise DataError(f"expected '{name}' to have as many numbers a text as '{first}'")
        total = int(self.lengths.sum())
        flat = {
            name: torch.from_numpy(np.fromiter((number for row in rows for number in row), np.int32, total))
            for name, rows in columns.items()
        }
        self._hold(flat, padding, left)

    @classmethod
    def joined(
        cls, flat: Mapping[str, Tensor], lengths: NDArray[np.int64], *, padding: Mapping[str, int], left: bool = False
    ) -> Tokens:
        """Return texts whose numbers are joined already: int32 ``[sum of lengths]`` a column, text after text."""
        made = cls.__new__(cls)
        made.lengths = lengths
        made._hold(flat, padding, left)
        return made

    def _hold(self, flat: Mapping[str, Tensor], padding: Mapping[str, int], left: bool) -> None:
        self._starts = torch.from_numpy(np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64))
        self._flat, self.padding, self.left = dict(flat), dict(padding), left

    def batch(self, indices: Tensor) -> Batch:
        """Return these texts, int64 ``[B, T]`` with T the longest of them, and at least 1: no model takes nothing."""
        lengths = torch.from_numpy(self.lengths)[indices]
        longest = max(1, int(lengths.max()))
        place = torch.arange(longest)[None, :] - ((longest - lengths)[:, None] if self.left else 0)
        inside = (place >= 0) & (place < lengths[:, None])
        where = (self._starts[indices][:, None] + place)[inside]
        batch = {}
        for name, flat in self._flat.items():
            batch[name] = torch.full(inside.shape, self.padding.get(name, 0), dtype=torch.int64)
            batch[name][inside] = flat[where].long()
        return batch


class Tokenizer:
    """A tokenizer of transformers with its settings: texts in, :class:`Tokens` out.

    Args:
        tokenizer: with a padding token.
        max_length: tokens at which a text is cut.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, texts: list[str], pairs: list[str] | None = None) -> Tokens:
        """Return the tokens of texts, or of pairs of texts."""
        mask = self.tokenizer.mask_token or self.tokenizer.unk_token or ""
        if mask != PLACEHOLDER:
            texts = [text.replace(PLACEHOLDER, mask) for text in texts]
            pairs = None if pairs is None else [text.replace(PLACEHOLDER, mask) for text in pairs]
        if texts:
            found = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length, padding=False)
        else:  # which a tokenizer of transformers does not take
            found = {name: [] for name in self.tokenizer.model_input_names}
        return Tokens(dict(found), padding=self.padding(), left=self.tokenizer.padding_side == "left")

    def padding(self) -> dict[str, int]:
        """Return what fills up each input."""
        return {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}


class Texts(InMemory):
    """Texts, tokenised for one or several models, as ready batches.

    Args:
        columns: the other columns, samples first, ``sample_id`` among them.
        texts: one column of texts, or two for pairs; none where ``tokens`` are given.
        tokenizers: prefix of the batch entries (``""`` for the student, ``teacher/``) to tokenizer.
        tokens: in place of texts: what is tokenised already, by prefix.
        steps: entries of ``data.augment``; a text is then tokenised anew each time.
        seed: of the views.

    Attributes:
        lengths: tokens of each sample as the first model sees it; training groups texts of like length.
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        texts: Sequence[list[str]] = (),
        tokenizers: Mapping[str, Tokenizer] | None = None,
        *,
        tokens: Mapping[str, Tokens] | None = None,
        steps: Sequence[Step] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(columns)
        self.texts = [np.asarray(column, dtype=object) for column in texts]
        self.tokenizers = dict(tokenizers or {})
        self.tokens = dict(tokens or {prefix: each(*texts) for prefix, each in self.tokenizers.items()})
        self.lengths = next(iter(self.tokens.values())).lengths
        self.steps = [_function(step) for step in steps]
        self.seed = seed
        if self.steps and not self.texts:
            raise DataError("data.augment changes texts, and the data hold only token ids; give the texts as well")

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return these samples as one batch."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        batch = {name: column[chosen] for name, column in self.columns.items()}
        if not self.steps:
            return {**batch, **_prefixed({prefix: each.batch(chosen) for prefix, each in self.tokens.items()})}
        seen = self._seen(chosen, batch["sample_id"])
        every = torch.arange(len(chosen))
        tokens = _prefixed({prefix: each(*seen).batch(every) for prefix, each in self.tokenizers.items()})
        return self._numbered({**batch, **tokens})

    @property
    def is_random(self) -> bool:
        """Whether a text reads different in each view."""
        return bool(self.steps)

    def _seen(self, chosen: Tensor, sample_id: Tensor) -> list[list[str]]:
        """Return the augmented texts of these samples, each of a pair by itself."""
        draws = Draws(self.seed, self.view_number, sample_id)
        columns = []
        for place, column in enumerate(self.texts):
            texts = column[chosen.numpy()].tolist()
            for step, (function, options) in enumerate(self.steps):
                texts = function(texts, draws=draws.scope(f"text {place} step {step}"), **options)
            columns.append(texts)
        return columns


def _function(step: Step) -> tuple[Callable[..., list[str]], Mapping[str, Any]]:
    name, options = split_step(step)
    problems = augmentations.check(name, options, allow_code=False)  # of registered ones alone
    if problems:
        raise DataError("; ".join(str(problem) for problem in problems))
    if augmentations.facts(name).get("kind") != "text":
        raise DataError(f"'{name}' does not change texts")
    return augmentations.get(name, allow_code=False), options


def _prefixed(views: Mapping[str, Batch]) -> Batch:
    return {prefix + name: value for prefix, view in views.items() for name, value in view.items()}
