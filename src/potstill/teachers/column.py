"""Answers that are in the data already: soft labels, votes or classes in columns of the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.errors import ComponentError, DataError, did_you_mean
from potstill.interfaces import Batch, Signals
from potstill.registry import teacher_sources
from potstill.teachers.context import SourceContext

Kind: TypeAlias = Literal["auto", "logits", "probabilities", "votes", "labels"]

_APART = 1e-3
"""By how much the probabilities of a row may sum to more or less than 1; they are divided by their sum."""

_Values: TypeAlias = NDArray[np.float32]


class Column:
    """Answers read from a table, once. See :func:`column`.

    Args:
        logits: float32 ``[N, C]``, one row for each of the table.
        sample_id: int64 ``[N]``: which samples the rows are; 0, 1, … if omitted.
        name: what it is called in messages.
    """

    reads_rows = True
    """It finds its answers by the number of a row of its table, and knows no others."""

    def __init__(self, logits: Tensor, sample_id: Tensor | None = None, name: str = "teacher") -> None:
        self.logits, self.name = logits, name
        ids = torch.arange(len(logits)) if sample_id is None else sample_id
        self._ids, self._order = ids.sort(stable=True)

    def __call__(self, batch: Batch) -> Signals:
        """Return ``logits``, float32 ``[B, C]``, on the device of ``sample_id``.

        Raises:
            DataError: the batch holds samples that the table has not.
        """
        if "sample_id" not in batch:
            raise DataError(f"'{self.name}' finds its answers by `sample_id`, and the batch has none")
        asked = batch["sample_id"]
        ids = asked.cpu()
        places = torch.searchsorted(self._ids, ids).clamp_max(len(self._ids) - 1)
        unknown = ids[self._ids[places] != ids]
        if len(unknown):
            raise DataError(f"'{self.name}' has no answer for the sample {int(unknown[0])}, which is not in its table")
        return {"logits": self.logits[self._order[places]].to(asked.device)}


@teacher_sources.register("column", reference="https://arxiv.org/abs/1908.07086", reads_rows=True)
def column(
    context: SourceContext,
    *,
    column: str | list[str],
    kind: Kind = "auto",
    floor: float = 1e-6,
    smoothing: float = 0.0,
) -> Column:
    """Return a teacher whose answers are in the table: soft labels that people or another model gave.

    It gives ``logits``, the logarithms of probabilities of at least ``floor``, or the table's own.

    A column holds, in every row, a list of C numbers in the order of the classes; a mapping of labels to numbers, of
    which those that are missing are 0; a list of votes, each a label's number or name; or one label. Several columns
    hold a number for each class, in the order in which they are named.

    Args:
        context: with the table and the names of the classes.
        column: the column, or one for each class.
        kind: what the numbers are. ``probabilities`` are not negative and sum to 1 (within 0.001; then they are divided
            by their sum); ``votes`` are counted (in a mapping or in several columns they are counts already);
            ``labels`` are one class in every row. ``auto`` takes names for labels, lists of names for votes, and
            numbers for probabilities or, where some are negative, for logits; it guesses nothing else.
        floor: the least probability.
        smoothing: added to each class's count of votes (Laplace's rule is 1).

    Returns:
        The source.

    Raises:
        DataError: the column is not there, or a row's answer is missing, too long, too short, negative, not a number,
            an unknown label, or does not sum to 1; names the rows, counted from 0.
        ComponentError: wrong options.

    Reference:
        Peterson et al. (2019), "Human uncertainty makes classification more robust", https://arxiv.org/abs/1908.07086.
    """
    if not 0 < floor < 1 or smoothing < 0:
        raise ComponentError(
            f"'{context.name}' needs a floor between 0 and 1 and no negative smoothing, got {floor} and {smoothing}"
        )
    if context.table is None:
        raise DataError(f"'{context.name}' reads a column of the data, and there is no table here")
    names = [column] if isinstance(column, str) else column
    if not names or not len(context.table):
        raise DataError(f"'{context.name}' needs at least one column, and a table with rows")
    for each in names:
        if each not in context.table.column_names:
            hint = did_you_mean(each, context.table.column_names)
            raise DataError(f"'{context.name}' reads the column '{each}', and there is no such column; {hint}")
    reader = _Reader(context, names, isinstance(column, list), kind, smoothing)
    found = reader.probabilities_or_logits()
    values = torch.from_numpy(found if reader.kind == "logits" else np.log(found.clip(floor)))
    ids = None
    if "sample_id" in context.table.column_names:
        ids = torch.as_tensor(np.asarray(context.table["sample_id"][:], dtype=np.int64))
    return Column(values.float(), ids, context.name)


class _Reader:
    """Reads columns of a table as numbers ``[N, C]``; ``kind`` is then what they are."""

    def __init__(
        self, context: SourceContext, names: Sequence[str], several: bool, kind: Kind, smoothing: float
    ) -> None:
        self.context, self.names, self.several, self.smoothing = context, list(names), several, smoothing
        self.kind: Kind = kind
        self.partial = False
        self.classes = list(context.label_names)
        self.called = f"'{context.name}', column '{', '.join(names)}'"
        arrow = context.table.select_columns(self.names).with_format("arrow")[:]
        self.columns: list[Any] = [arrow[name].combine_chunks() for name in self.names]

    def probabilities_or_logits(self) -> _Values:
        """Return float32 ``[N, C]``."""
        missing = np.logical_or.reduce(
            [_numpy(pc.is_null(each, nan_is_null=True)).astype(bool) for each in self.columns]
        )
        self._refuse(missing, "there is no answer")
        numbers = self._numbers()
        self._refuse(~np.isfinite(numbers).all(1), "there is a number that is none")
        negative = (numbers < 0).any(1)
        if self.kind == "auto":
            self.kind = "logits" if negative.any() else "probabilities"
        if self.kind == "logits":
            if self.partial:
                raise DataError(f"{self.called}: logits need a number for every class in every row")
            return numbers
        self._refuse(negative, "there is a negative number")
        if self.kind == "votes":
            numbers = numbers + np.float32(self.smoothing)
            self._refuse(numbers.sum(1) <= 0, "there is no vote")
        total = numbers.sum(1, keepdims=True, dtype=np.float64)
        if self.kind == "probabilities":
            off = np.abs(total[:, 0] - 1) > _APART
            self._refuse(off, "the probabilities do not sum to 1 (say `kind` if they are votes or logits)", total)
        shares: _Values = (numbers / total).astype(np.float32)
        return shares

    def _numbers(self) -> _Values:
        """Return a number for each class and row: counts for votes and labels."""
        first = self.columns[0]
        if self.several:
            self._check_width(len(self.names))
            return np.stack([self._flat(each) for each in self.columns], axis=1)
        if pa.types.is_struct(first.type):
            return self._mapping(first)
        if _is_list(first.type):
            return self._votes(first) if self._holds_votes(first) else self._lists(first)
        if self.kind not in ("auto", "labels"):
            raise DataError(
                f"{self.called}: expected a list or a mapping in every row for {self.kind}, got {first.type}"
            )
        self.kind = "labels"
        labels = self._labels(first, self.context.table.features[self.names[0]])
        return self._counts(np.arange(len(labels)), labels, len(labels))

    def _holds_votes(self, lists: Any) -> bool:
        """Return whether lists are of labels, and not a number for each class."""
        if self.kind == "labels":
            raise DataError(f"{self.called}: expected one label in every row, got lists; are they votes?")
        whole = lists.type.value_type
        if self.kind == "auto":
            if pa.types.is_integer(whole) and not _class_names(self._feature_of_lists()):
                raise DataError(
                    f"{self.called} holds lists of whole numbers; say `kind`: votes, probabilities or logits"
                )
            self.kind = "auto" if pa.types.is_floating(whole) else "votes"
        return self.kind == "votes"

    def _lists(self, lists: Any) -> _Values:
        lengths = _numpy(pc.list_value_length(lists))
        width = len(self.classes) or int(lengths[0])
        self._refuse(lengths != width, f"expected {width} numbers, one for each class", lengths[:, None])
        return self._flat(pc.list_flatten(lists)).reshape(len(lists), width)

    def _votes(self, lists: Any) -> _Values:
        lengths = _numpy(pc.list_value_length(lists))
        rows = np.repeat(np.arange(len(lists)), lengths)
        return self._counts(rows, self._labels(pc.list_flatten(lists), self._feature_of_lists(), rows), len(lists))

    def _mapping(self, rows: Any) -> _Values:
        if self.kind == "labels":
            raise DataError(f"{self.called}: expected one label in every row, got mappings")
        keys = [rows.type.field(place).name for place in range(rows.type.num_fields)]
        unknown = [key for key in keys if self.classes and key not in self.classes]
        if unknown:
            raise DataError(
                f"{self.called}: there is no class '{unknown[0]}'; {did_you_mean(unknown[0], self.classes)}"
            )
        self.classes = self.classes or keys
        numbers = np.zeros((len(rows), len(self.classes)), np.float32)
        fields = {key: pc.struct_field(rows, key) for key in keys}
        self.partial = len(keys) < len(self.classes) or any(field.null_count for field in fields.values())
        for key, field in fields.items():
            numbers[:, self.classes.index(key)] = self._flat(field.fill_null(0))
        return numbers

    def _labels(self, values: Any, feature: Any, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return label ids of numbers or names; ``rows`` says in which row each stands."""
        if not self.classes:
            raise DataError(f"{self.called} holds labels, and the task knows no classes")
        own = _class_names(feature)
        if pa.types.is_integer(values.type):
            ids = _numpy(values).astype(np.int64)
            wrong = (ids < 0) | (ids >= len(own or self.classes))
            self._refuse(wrong, f"expected labels from 0 to {len(own or self.classes) - 1}", ids[:, None], rows)
            if not own:
                return ids
            named = [own[place] for place in ids]
        elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            named = values.to_pylist()
        else:
            raise DataError(f"{self.called}: expected labels as names or whole numbers, got {values.type}")
        places = {name: place for place, name in enumerate(self.classes)}
        unknown = next((name for name in named if name not in places), None)
        if unknown is not None:
            raise DataError(f"{self.called}: there is no class '{unknown}'; {did_you_mean(str(unknown), self.classes)}")
        return np.asarray([places[name] for name in named], dtype=np.int64)

    def _counts(self, rows: NDArray[np.int64], labels: NDArray[np.int64], size: int) -> _Values:
        counts = np.zeros((size, len(self.classes)), np.float32)
        np.add.at(counts, (rows, labels), 1)
        return counts

    def _flat(self, values: Any) -> _Values:
        """Return numbers as float32, NaN where there is none.

        Raises:
            DataError: they are no numbers.
        """
        if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
            raise DataError(f"{self.called}: expected numbers, got {values.type}")
        return _numpy(values).astype(np.float32)

    def _feature_of_lists(self) -> Any:
        feature = self.context.table.features[self.names[0]]
        return getattr(feature, "feature", None)

    def _check_width(self, width: int) -> None:
        if self.kind == "labels":
            raise DataError(f"{self.called}: labels are one column, with one label in every row")
        if self.classes and width != len(self.classes):
            raise DataError(f"{self.called}: expected {len(self.classes)} columns, one for each class, got {width}")

    def _refuse(
        self,
        wrong: Any,
        message: str,
        got: NDArray[Any] | None = None,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        """Raise if anything is wrong, naming the rows and what the first of them has."""
        places = np.flatnonzero(wrong)
        if not len(places):
            return
        named = np.unique(places if rows is None else rows[places])
        shown = ", ".join(str(row) for row in named[:5]) + (f", … ({len(named)} rows)" if len(named) > 5 else "")
        value = "" if got is None else f", got {got[places[0], 0]:.4g}"
        raise DataError(f"{self.called}: {message}{value} in row{'s' if len(named) > 1 else ''} {shown}")


def _numpy(values: Any) -> NDArray[Any]:
    found: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return found


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _class_names(feature: Any) -> list[str]:
    """Return the names that a column of classes has for its numbers; none for any other column."""
    return list(getattr(feature, "names", None) or [])
