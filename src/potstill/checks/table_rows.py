"""A number for each row of a table, equal where rows are equal, made slice by slice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
from datasets import Dataset
from numpy.typing import NDArray

SLICE = 1000
"""Rows that are in memory at once."""

MOST_ROWS, MOST_BYTES = 1_000_000, 2**30
"""Where the reading of a split ends, whichever comes first."""

_MIX = np.uint64(0x9E3779B97F4A7C15)


def row_codes(table: Dataset, columns: Sequence[str]) -> NDArray[np.uint64]:
    """Return a hash of 64 bits for each row, equal where the rows are equal in these columns.

    Pictures are compared by their encoded bytes, lists by their numbers. Of a very large table only the first rows are
    read, so there may be fewer codes than rows.
    """
    found = [np.zeros(0, np.uint64), *_slices(table.select_columns(list(columns)).with_format("arrow"), columns)]
    return np.concatenate(found)


def _slices(table: Dataset, columns: Sequence[str]) -> Iterator[NDArray[np.uint64]]:
    last, read = min(len(table), MOST_ROWS), 0
    for start in range(0, last, SLICE):
        part: Any = table[start : min(start + SLICE, last)]
        codes = np.zeros(len(part), dtype=np.uint64)
        for name in columns:
            own = [_hashes(chunk) for chunk in part[name].chunks]
            codes = (codes ^ (codes >> np.uint64(29))) * _MIX + np.concatenate([codes[:0], *own])
        yield codes
        read += part.nbytes
        if read >= MOST_BYTES:
            return


def _hashes(values: Any) -> NDArray[np.uint64]:
    """Return a hash of 64 bits for each value of an array, whatever else is in the array."""
    kind = values.type
    if isinstance(values, pa.ExtensionArray):
        return _hashes(values.storage)
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        parts = values.field("bytes"), values.field("path")
        return _hashes(parts[1] if parts[0].null_count == len(values) else parts[0])
    if _is_list(kind):
        return _list_hashes(values)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return _digests(values.to_pylist())
    if pa.types.is_primitive(kind):
        return np.asarray(pd.util.hash_array(values.to_numpy(zero_copy_only=False).astype(np.float64)), dtype=np.uint64)
    return _digests([repr(value) for value in values.to_pylist()])


def _list_hashes(values: Any) -> NDArray[np.uint64]:
    """Hash the numbers of each row together with the lengths of its lists, level by level."""
    inner, bounds = values, np.arange(len(values) + 1)
    pieces: list[tuple[NDArray[Any], NDArray[np.int64]]] = []
    while _is_list(inner.type):
        lengths = np.asarray(inner.value_lengths().fill_null(-1), dtype=np.int64)
        pieces.append((lengths, bounds))
        bounds = np.concatenate([[0], np.cumsum(lengths.clip(0))])[bounds]
        inner = inner.flatten()
    if pa.types.is_primitive(inner.type):
        leaves = inner.to_numpy(zero_copy_only=False)
        if inner.null_count:
            leaves = np.nan_to_num(leaves).astype(inner.type.to_pandas_dtype())
    else:
        leaves = _hashes(inner)
    pieces.append((np.ascontiguousarray(leaves), bounds))
    rows = range(len(values))
    return _digests([b"".join(each[ends[row] : ends[row + 1]].tobytes() for each, ends in pieces) for row in rows])


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _digests(values: Sequence[str | bytes | None]) -> NDArray[np.uint64]:
    blobs = (b"" if v is None else v.encode() if isinstance(v, str) else v for v in values)
    joined = b"".join(hashlib.blake2b(blob, digest_size=8).digest() for blob in blobs)
    return np.frombuffer(joined, dtype=np.uint64)
