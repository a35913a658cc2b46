"""Whether the data give the answer away: test rows in the training split, columns that know the label."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, Value
from numpy.typing import NDArray

from potstill.checks.findings import Finding, Level, checks
from potstill.checks.subject import Subject
from potstill.checks.table_rows import row_codes

_ROWS = 5000
"""Rows on which columns are tried."""

_COLUMNS = 200

_EACH = 5
"""Rows that each of few values has on average: with fewer, the others of its kind say nothing of a row."""


@checks.register("duplicates")
def duplicates(subject: Subject) -> Iterator[Finding]:
    """Tell how many rows of the test and validation splits are in the training split too."""
    train = subject.tables.get("train")
    columns = [name for name in subject.inputs if train is not None and name in train.column_names]
    if train is None or not columns or not len(train):
        return
    others = {split: subject.tables[split] for split in ("test", "validation") if split in subject.tables}
    others = {s: t for s, t in others.items() if t is not train and set(columns) <= set(t.column_names)}
    if not others:
        return
    known = row_codes(train, columns)
    yield from _cut("train", train, known)
    for split, table in others.items():
        asked = row_codes(table, columns)
        yield from _cut(split, table, asked)
        yield from _repeated(subject, split, known, asked)


def _cut(split: str, table: Dataset, codes: NDArray[np.uint64]) -> Iterator[Finding]:
    if len(codes) < len(table):
        message = f"only the first {len(codes)} of {len(table)} rows of the split '{split}' were compared: it is large"
        yield Finding("duplicates", "note", message)


def _repeated(subject: Subject, split: str, known: NDArray[np.uint64], asked: NDArray[np.uint64]) -> Iterator[Finding]:
    """Tell of the rows of a split whose codes are in the training split too."""
    seen = np.isin(asked, known)
    if not seen.any():
        return
    labelled = subject.label is None or subject.label in subject.tables["train"].column_names
    share, own = float(seen.mean()), 1 - len(np.unique(known)) / len(known)
    level: Level = "note" if share < 0.01 else "warning"
    if subject.strict and share > 0.5 and own < 0.1 and labelled:
        level = "error"
    where = np.flatnonzero(seen)[:3]
    first = ", ".join(f"{row} (train {int(np.flatnonzero(known == asked[row])[0])})" for row in where)
    message = (
        f"{int(seen.sum())} of {len(asked)} rows of the split '{split}' ({100 * share:.1f} %) have inputs that are "
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
    classes, counts = np.unique(truth, return_counts=True)
    chance = counts.max() / len(truth)
    train = train.select(known).with_format(None)
    for name in [name for name in train.column_names if name not in (label, "sample_id")][:_COLUMNS]:
        column = _column(train, name, len(classes))
        if column is None:
            continue
        accuracy = _lookup(column.values, truth) if column.few else _tree(column.values, truth)
        about = _class_in_name(name, subject.label_names)
        error = float(np.sqrt(chance * (1 - chance) / len(truth)))
        clear = accuracy > chance + 3 * error
        if accuracy > 0.995 and chance < 0.95:
            level: Level = "error" if subject.strict and column.copy else "warning"
            yield _telling(name, f"predicts the label alone ({100 * accuracy:.1f} % of rows)", level, subject)
        elif about is not None and clear:
            what = f"names the class '{about}' and knows of the label ({100 * accuracy:.0f} %, by chance {chance:.0%})"
            yield _telling(name, what, "warning", subject)


def _telling(name: str, what: str, level: Level, subject: Subject) -> Finding:
    if name not in subject.inputs:
        return Finding("telling-columns", "note", f"the column '{name}' {what}; it is not an input of this recipe")
    message = f"the column '{name}' {what}: it may have been made from the label"
    return Finding("telling-columns", level, message, "leave it out of the inputs")


class _Column(NamedTuple):
    """The values of a column as numbers.

    Attributes:
        values: one a row; where there are few, their places among the sorted ones.
        few: whether there are few, with some rows each, so that they are categories.
        copy: whether it may be the label under another name: a category, or a number with hardly more values than
            the label has. A measurement has more, and may well separate the classes.
    """

    values: NDArray[Any]
    few: bool
    copy: bool


def _column(table: Dataset, name: str, classes: int) -> _Column | None:
    """Return a column of numbers or of few categories; ``None`` for pictures, texts and lists."""
    feature = table.features[name]
    kind = feature.dtype if isinstance(feature, Value | ClassLabel) else ""
    is_number = kind.startswith(("int", "uint", "float", "double", "bool"))
    if not is_number and "string" not in kind:
        return None
    raw = table[name][:]
    if is_number:
        values = np.array([np.nan if value is None else value for value in raw], dtype=np.float64)
        values = np.where(np.isfinite(values), values, -1e30)
        places, known = pd.factorize(values, sort=True)
    else:
        places, known = pd.factorize(np.asarray(raw, dtype=object), sort=True)
        places = places + 1  # no value is -1
    few = len(known) <= max(20, 2 * classes) and len(known) * _EACH <= len(raw)
    if is_number:
        return _Column(places if few else values, few, few and len(known) <= 2 * classes)
    return _Column(places, few, few) if few else None


def _lookup(places: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the accuracy of each category's most frequent label, on rows that it was not counted from."""
    truth = np.unique(labels, return_inverse=True)[1]
    folds = np.random.default_rng(0).permutation(len(truth)) % 3
    right = 0
    for fold in range(3):
        rest, held = folds != fold, folds == fold
        counts = np.zeros((int(places.max()) + 1, int(truth.max()) + 1))
        np.add.at(counts, (places[rest], truth[rest]), 1)
        counts += counts.sum(0) / (len(truth) + 1)  # what is seen nowhere else is most likely the most frequent
        right += int((counts[places[held]].argmax(-1) == truth[held]).sum())
    return right / len(truth)


def _tree(values: NDArray[Any], labels: NDArray[Any]) -> float:
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
