"""Whether the data give the answer away: test rows in the training split, columns that know the label."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
from datasets import ClassLabel, Dataset, Value
from numpy.typing import NDArray

from potstill.checks.findings import Finding, Level, checks
from potstill.checks.subject import Subject

_ROWS = 5000
"""Rows on which columns are tried."""

_COLUMNS = 200
_CATEGORIES = 200


@checks.register("duplicates")
def duplicates(subject: Subject) -> Iterator[Finding]:
    """Tell how many rows of the test and validation splits are in the training split too."""
    train = subject.tables.get("train")
    columns = [name for name in subject.inputs if train is not None and name in train.column_names]
    if train is None or not columns:
        return
    labelled = subject.label is None or subject.label in train.column_names
    for split in ("test", "validation"):
        table = subject.tables.get(split)
        if table is None or not set(columns) <= set(table.column_names) or table is train:
            continue
        codes = row_codes([train, table], columns)
        known, asked = codes[: len(train)], codes[len(train) :]
        seen = np.isin(asked, known)
        if not seen.any():
            continue
        share, own = float(seen.mean()), 1 - len(np.unique(known)) / len(known)
        level: Level = "note" if share < 0.01 else "warning"
        if subject.strict and share > 0.5 and own < 0.1 and labelled:
            level = "error"
        where = np.flatnonzero(seen)[:3]
        first = ", ".join(f"{row} (train {int(np.flatnonzero(known == asked[row])[0])})" for row in where)
        message = (
            f"{int(seen.sum())} of {len(table)} rows of the split '{split}' ({100 * share:.1f} %) have inputs that are "
            f"in the training split too; the first are rows {first}"
        )
        yield Finding("duplicates", level, message, "drop them from the training split")


@checks.register("telling-columns")
def telling_columns(subject: Subject) -> Iterator[Finding]:
    """Tell which columns give the label away: alone they predict it without error, or they count a class."""
    train, label = subject.tables.get("train"), subject.label
    if train is None or label is None or label not in train.column_names:
        return
    if len(train) > _ROWS:
        train = train.select(np.random.default_rng(0).choice(len(train), _ROWS, replace=False))
    labels = np.asarray([-1 if value is None else value for value in train[label][:]])
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        return
    known = np.flatnonzero(labels >= 0)
    truth = labels[known]
    if len(truth) < 30 or len(np.unique(truth)) < 2:
        return
    chance = np.unique(truth, return_counts=True)[1].max() / len(truth)
    for name in [name for name in train.column_names if name not in (label, "sample_id")][:_COLUMNS]:
        values = _numbers(train, name)
        if values is None:
            continue
        accuracy = _alone(values[known], truth)
        about = _class_in_name(name, subject.label_names)
        error = float(np.sqrt(chance * (1 - chance) / len(truth)))
        clear = accuracy > chance + 3 * error
        if accuracy > 0.995 and chance < 0.95:
            found = _telling(name, f"predicts the label alone ({100 * accuracy:.1f} % of rows)", "error", subject)
        elif about is not None and clear:
            what = f"names the class '{about}' and knows of the label ({100 * accuracy:.0f} %, by chance {chance:.0%})"
            found = _telling(name, what, "warning", subject)
        else:
            continue
        yield found


def _telling(name: str, what: str, level: Level, subject: Subject) -> Finding:
    if name not in subject.inputs:
        return Finding("telling-columns", "note", f"the column '{name}' {what}; it is not an input of this recipe")
    message = f"the column '{name}' {what}: it may have been made from the label"
    return Finding("telling-columns", level, message, "leave it out of the inputs")


def row_codes(tables: Sequence[Dataset], columns: Sequence[str]) -> NDArray[np.int64]:
    """Return a number for each row of all tables, equal where the rows are equal in these columns.

    Pictures are compared by their encoded bytes, lists by their numbers.
    """
    codes = np.zeros(sum(len(table) for table in tables), dtype=np.int64)
    for name in columns:
        chunks = [
            chunk for table in tables for chunk in table.select_columns([name]).with_format("arrow")[:][name].chunks
        ]
        own = np.concatenate([np.zeros(0, np.uint64), *(_hashes(chunk) for chunk in chunks)])
        places = np.unique(own, return_inverse=True)[1].astype(np.int64)
        codes = np.unique(codes * (int(places.max(initial=0)) + 1) + places, return_inverse=True)[1].astype(np.int64)
    return codes


def _hashes(values: Any) -> NDArray[np.uint64]:
    """Return a hash of 64 bits for each value of an array."""
    kind = values.type
    if isinstance(values, pa.ExtensionArray):
        return _hashes(values.storage)
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        parts = values.field("bytes"), values.field("path")
        return _hashes(parts[1] if parts[0].null_count == len(values) else parts[0])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _list_hashes(values)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return _digests(values.to_pylist())
    if pa.types.is_primitive(kind):
        return np.asarray(pd.util.hash_array(values.to_numpy(zero_copy_only=False).astype(np.float64)), dtype=np.uint64)
    return _digests([repr(value) for value in values.to_pylist()])


def _list_hashes(values: Any) -> NDArray[np.uint64]:
    inner, count = values, len(values)
    while hasattr(inner, "flatten") and not pa.types.is_primitive(inner.type):
        if inner.null_count or not hasattr(inner.type, "value_type"):
            break
        inner = inner.flatten()
    if count == 0 or not pa.types.is_primitive(inner.type) or _is_ragged(values):
        return _digests([repr(value) for value in values.to_pylist()])
    numbers = np.ascontiguousarray(inner.to_numpy(zero_copy_only=False)).reshape(count, -1)
    return _digests([row.tobytes() for row in numbers])


def _is_ragged(values: Any) -> bool:
    if values.null_count or not hasattr(values.type, "value_type") or pa.types.is_primitive(values.type):
        return False
    lengths = np.asarray(values.value_lengths())
    return len(np.unique(lengths)) > 1 or _is_ragged(values.flatten())


def _digests(values: Sequence[str | bytes | None]) -> NDArray[np.uint64]:
    blobs = (b"" if v is None else v.encode() if isinstance(v, str) else v for v in values)
    joined = b"".join(hashlib.blake2b(blob, digest_size=8).digest() for blob in blobs)
    return np.frombuffer(joined, dtype=np.uint64)


def _numbers(table: Dataset, name: str) -> NDArray[np.float64] | None:
    """Return a column of numbers or of few categories as numbers; ``None`` for pictures, texts and lists."""
    feature = table.features[name]
    kind = feature.dtype if isinstance(feature, Value | ClassLabel) else ""
    if kind.startswith(("int", "uint", "float", "double", "bool")):
        values = np.array([np.nan if value is None else value for value in table[name][:]], dtype=np.float64)
        return np.where(np.isfinite(values), values, -1e30)
    if "string" in kind:
        codes = pd.factorize(np.asarray(table[name][:], dtype=object))[0]
        return codes.astype(np.float64) if len(np.unique(codes)) <= _CATEGORIES else None
    return None


def _alone(values: NDArray[np.float64], labels: NDArray[Any]) -> float:
    """Return the accuracy of a small tree on one column, on rows that it was not made from."""
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_leaf_nodes=64, min_samples_leaf=5, random_state=0)
    folds = KFold(3, shuffle=True, random_state=0)
    return float(np.mean(cross_val_score(tree, values[:, None], labels, cv=folds)))


def _class_in_name(column: str, classes: Sequence[str]) -> str | None:
    """Return the class, of most words, whose words are all in the name of a column."""
    words = set(_words(column))
    found = [name for name in classes if _words(name) and set(_words(name)) <= words and len(name) > 2]
    return max(found, key=lambda name: len(_words(name)), default=None)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]{2,}", name.lower())
