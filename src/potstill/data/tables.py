"""Plain tables as ready batches: read once into tensors, with no Python object for a value or a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.compute as pc  # type: ignore[import-untyped, unused-ignore]
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.data.batching import InMemory
from potstill.data.texts import Texts, Tokens

LIMIT = 2 * 1024**3
"""Bytes that the tensors of a table may take."""

_LABELS = ("label", "label_ids", "labels")


def in_memory(table: Dataset, tokenizer: Any = None, *, limit: int = LIMIT) -> InMemory | None:
    """Return a table as ready batches, which hold what Trainer's own collators would make of its rows.

    Args:
        table: the columns that are wanted and no others.
        tokenizer: of transformers; batches are then those of ``DataCollatorWithPadding``, where token ids of differing
            lengths are filled up to the longest text of the batch. Without it they are those of
            ``default_data_collator``.
        limit: bytes that the tensors may take.

    Returns:
        A tensor a column (int64, bool or float32), ``label`` under the name ``labels``, and ``sample_id``, the row,
        where the table has none. ``Texts``, which have ``lengths``, where texts differ in length. ``None`` where the
        table is to be left alone: it has a format or a transform, more than ``limit``, a column that holds anything
        else than numbers and rectangular lists of them, missing values, or what the collator would refuse.
    """
    names = list(table.column_names)
    if table.format["type"] is not None or set(table.format["columns"]) != set(names) or len(table) == 0:
        return None
    if not names or sum(name in _LABELS for name in names) > 1 or not all(map(_is_plain, _types(table))):
        return None
    if table.data.nbytes / len(table.data) * len(table) > 2 * limit:
        return None
    whole = table.with_format("arrow")[:]
    columns = {}
    for name in names:
        column = _read(whole[name])
        if column is None:
            return None
        columns[name] = column
    if sum(column.bytes for column in columns.values()) > limit:
        return None
    return _rows(columns, len(table)) if tokenizer is None else _texts(columns, len(table), tokenizer)


@dataclass(frozen=True)
class _Column:
    """The numbers of a column in one array, and how many a row has: its ``shape``, or ``lengths`` where they differ."""

    numbers: NDArray[Any]
    shape: tuple[int, ...] = ()
    lengths: NDArray[np.int64] | None = None

    @property
    def kind(self) -> str:
        """``b`` for truth values, ``i`` for whole numbers, ``f`` for others."""
        return str(self.numbers.dtype.kind).replace("u", "i")

    @property
    def bytes(self) -> int:
        each = {"b": 1, "i": 8 if self.lengths is None else 4, "f": 4}
        return each[self.kind] * self.numbers.size

    def tensor(self, kind: torch.dtype | None = None) -> Tensor:
        """Return ``[N, *shape]`` in the type that ``torch.tensor`` gives to such numbers, or in another one."""
        usual = {"b": torch.bool, "i": torch.int64, "f": torch.get_default_dtype()}[self.kind]
        return torch.from_numpy(np.array(self.numbers)).to(kind or usual).reshape(-1, *self.shape)


def _types(table: Dataset) -> list[Any]:
    return [field.type for field in table.features.arrow_schema]


def _is_plain(kind: Any) -> bool:
    """Return whether values of this type are numbers, or lists of them, that torch makes the same tensor of."""
    if isinstance(kind, pa.ExtensionType):
        return _is_plain(kind.storage_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    whole = pa.types.is_integer(kind) and not pa.types.is_uint64(kind)
    return bool(whole or pa.types.is_boolean(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind))


def _read(column: Any) -> _Column | None:
    """Return the numbers of a column; ``None`` where some are missing, or lists in lists differ in length."""
    levels: list[NDArray[np.int64]] = []
    array = column.combine_chunks()
    while True:
        array = array.storage if isinstance(array, pa.ExtensionArray) else array
        if not isinstance(array, pa.Array) or array.null_count:
            return None
        if not hasattr(array.type, "value_type"):
            break
        levels.append(pc.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64))
        array = array.flatten()
    if any(level.size == 0 or level.min() == 0 for level in levels):
        return None
    found = _Column(array.to_numpy(zero_copy_only=False))
    if all(level.min() == level.max() for level in levels):
        return replace(found, shape=tuple(int(level[0]) for level in levels))
    return replace(found, lengths=levels[0]) if len(levels) == 1 else None


def _rows(columns: Mapping[str, _Column], size: int) -> InMemory | None:
    """Return what ``default_data_collator`` makes of the rows."""
    if any(column.lengths is not None for column in columns.values()):
        return None
    found = {}
    for name, column in columns.items():
        if name == "label_ids" and not column.shape:
            return None
        if name in ("label", "label_ids"):
            whole = column.kind != "f" and len(column.shape) == (name == "label_ids")
            found["labels"] = column.tensor(torch.int64 if whole else torch.float32)
        else:
            found[name] = column.tensor()
    return InMemory(_numbered(found, size))


def _texts(columns: Mapping[str, _Column], size: int, tokenizer: Any) -> InMemory | None:
    """Return what ``DataCollatorWithPadding`` makes of the rows."""
    own = type(tokenizer)
    if any(getattr(own, name, None) is not getattr(PreTrainedTokenizerBase, name) for name in ("pad", "_pad")):
        return None
    main = tokenizer.model_input_names[0]
    first = columns.get(main)
    if first is None or first.kind != "i" or len(first.shape) != (first.lengths is None):
        return None
    columns = dict(columns)
    if "attention_mask" in tokenizer.model_input_names and "attention_mask" not in columns:
        columns["attention_mask"] = replace(first, numbers=np.ones(first.numbers.size, dtype=np.int32))
    if first.lengths is None:
        ragged = {}
    else:
        fills = {main: tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "special_tokens_mask": 1}
        fills |= {"attention_mask": 0} if "attention_mask" in tokenizer.model_input_names else {}
        ragged = {name: fill for name, fill in fills.items() if name in columns}
    if any((column.lengths is not None) != (name in ragged) for name, column in columns.items()):
        return None
    found = {"labels" if name in _LABELS else name: columns[name].tensor() for name in columns if name not in ragged}
    found = _numbered(found, size)
    if first.lengths is None:
        return InMemory(found)
    tokens = _joined({name: columns[name] for name in ragged}, first.lengths, ragged, tokenizer.padding_side)
    return None if tokens is None else Texts(found, tokens={"": tokens})


def _joined(
    columns: Mapping[str, _Column], lengths: NDArray[np.int64], fills: Mapping[str, int | None], side: str
) -> Tokens | None:
    """Return columns of whole numbers as tokens; ``None`` where they are not alike, or a filling is not known."""
    bounds = np.iinfo(np.int32)
    flat = {}
    for name, column in columns.items():
        numbers, own = column.numbers, column.lengths
        if fills[name] is None or column.kind != "i" or own is None or not np.array_equal(own, lengths):
            return None
        if numbers.min() < bounds.min or numbers.max() > bounds.max:
            return None
        flat[name] = torch.from_numpy(numbers.astype(np.int32))
    padding = {name: fill for name, fill in fills.items() if fill is not None}
    return Tokens.joined(flat, lengths, padding=padding, left=side == "left")


def _numbered(columns: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    return columns if "sample_id" in columns else {**columns, "sample_id": torch.arange(size)}
