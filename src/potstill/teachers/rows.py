"""From the ids of a batch to rows of a table as plain JSON: what a teacher outside this process is asked with."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from potstill.errors import DataError, did_you_mean
from potstill.teachers.context import SourceContext

_ID = "sample_id"
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"})


class Rows:
    """Rows of the table of a context by sample id, without the label.

    Rows are found by the table's column ``sample_id`` where it has one, else by their place, from 0. Pictures become
    the base64 text of a PNG file, arrays and tensors nested lists, bytes base64 text, dates ISO 8601 text, and a
    missing number (NaN) ``null``.

    Args:
        context: has the table and the name of its label.
        columns: what is shown; every column but the label and ``sample_id`` if omitted.
        bare: whether a row of a single column is its value alone; a mapping by column otherwise.

    Raises:
        DataError: there is no table, or not that column, or it is the label; when called: an id that is not in the
            table, or a value that JSON cannot hold.
    """

    def __init__(self, context: SourceContext, columns: Sequence[str] | None = None, *, bare: bool = True) -> None:
        table, self.name = context.table, context.name
        if table is None:
            raise DataError(f"the teacher '{self.name}' is asked with rows of a table, and there is none here")
        offered = [each for each in table.column_names if each not in (context.label, _ID)]
        self.columns = offered if columns is None else list(columns)
        for column in self.columns:
            if column == context.label:
                raise DataError(f"the teacher '{self.name}' must not be shown '{column}', which is the label")
            if column not in offered:
                hint = did_you_mean(column, offered)
                raise DataError(f"the teacher '{self.name}' is to be shown '{column}', which is no column; {hint}")
        if not self.columns:
            raise DataError(f"the teacher '{self.name}' is shown no column; name some in `columns`")
        self.bare = bare and len(self.columns) == 1
        self._table = table.select_columns(self.columns).with_format(None)
        self._ids = table.select_columns([_ID]).with_format(None) if _ID in table.column_names else None

    def __call__(self, ids: Sequence[int]) -> list[Any]:
        """Return one row an id, in the order of the ids."""
        found: Mapping[str, list[Any]] = self._table[self._places(ids)]
        values = {name: [_plain(value, name) for value in found[name]] for name in self.columns}
        if self.bare:
            return values[self.columns[0]]
        return [{name: values[name][place] for name in self.columns} for place in range(len(ids))]

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ids of the table, ascending, and the row of each."""
        ids = np.arange(len(self._table)) if self._ids is None else np.asarray(self._ids[_ID][:], dtype=np.int64)
        order = np.argsort(ids, kind="stable")
        if (np.diff(ids[order]) == 0).any():
            raise DataError(f"the table of the teacher '{self.name}' has two rows of one sample_id")
        return ids[order], order

    def _places(self, ids: Sequence[int]) -> list[int]:
        known, rows = self._sorted
        wanted = np.asarray(ids, dtype=np.int64)
        at = np.minimum(np.searchsorted(known, wanted), max(0, len(known) - 1))
        missing = wanted[known[at] != wanted] if len(known) else wanted
        if len(missing):
            raise DataError(
                f"the teacher '{self.name}' was asked about sample {int(missing[0])}, and its table of {len(known):,} "
                "rows has none of that number"
            )
        places: list[int] = rows[at].tolist()
        return places


def _plain(value: Any, column: str) -> Any:
    """Return a value as JSON can hold it."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            raise DataError(f"the column '{column}' has an infinite number, which JSON cannot hold")
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {str(key): _plain(each, column) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return _plain(value.tolist(), column)
    if isinstance(value, list | tuple):
        return value if _is_plain(value) else [_plain(each, column) for each in value]
    return _text(value, column)


def _is_plain(values: Sequence[Any]) -> bool:
    """Whether values are all finite numbers, or all texts, as they are in long lists."""
    kinds = set(map(type, values))
    return kinds == {int} or kinds == {str} or (kinds == {float} and all(map(math.isfinite, values)))


def _text(value: Any, column: str) -> str:
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        (value if value.mode in _PNG_MODES else value.convert("RGB")).save(file, format="PNG")
        return base64.b64encode(file.getvalue()).decode()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    raise DataError(f"the column '{column}' holds {type(value).__name__}, which has no form in JSON; leave it out")
