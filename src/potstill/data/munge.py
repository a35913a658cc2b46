"""MUNGE: rows without labels that are like those of a table, for a teacher to answer."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from numpy.typing import NDArray
from pydantic import Field
from sklearn.neighbors import NearestNeighbors

from potstill.errors import DataError
from potstill.registry import synthesizers


@synthesizers.register("munge", kind="tabular", reference="https://doi.org/10.1145/1150402.1150464")
def munge(
    table: Dataset,
    *,
    seed: int,
    size: Annotated[int, Field(ge=1)] = 10,
    swap: Annotated[float, Field(ge=0, le=1)] = 0.5,
    local_variance: Annotated[float, Field(gt=0)] = 1.0,
    keep: bool = True,
) -> Dataset:
    """Return rows like those of a table, each mixed with its nearest neighbour.

    It is Algorithm 1 of the paper: each of ``size`` passes begins with the table and visits every row; with
    probability ``swap`` the row and its nearest neighbour exchange an attribute, and where that is a number, both new
    values are drawn from normals around the exchanged ones with standard deviation ``|a − b| / local_variance``. The
    neighbours are looked up once, in the table as it was given, and not again in each pass as its rows change.

    Strings, truth values, classes and numbers of two values are nominal, all other numbers continuous; whole numbers
    stay whole. A missing number is exchanged as it is.

    Args:
        table: the features alone; nothing else is read, so no label can be.
        seed: of what is drawn; the same table and seed give the same rows.
        size: the paper's k: how many times the table the new rows are.
        swap: the paper's p. The paper publishes neither p nor s; 0.5 and 1 are AutoGluon's, others take 0.8 and 1, 0.5
            and 2.
        local_variance: the paper's s; the larger, the nearer a number stays to its neighbour's.
        keep: whether the rows of the table come before the new ones, as in the paper's experiments.

    Returns:
        A table of the same columns.

    Raises:
        DataError: a column holds neither numbers nor categories, or there is but one row.

    Reference:
        Buciluǎ, Caruana and Niculescu-Mizil 2006, *Model compression*, KDD, https://doi.org/10.1145/1150402.1150464.
    """
    if len(table) < 2:
        raise DataError(f"munge needs two rows to mix, got {len(table)}")
    columns = {name: _column(table, name) for name in table.column_names}
    rows = np.stack([column.values for column in columns.values()], axis=1)
    is_number = np.array([column.categories is None for column in columns.values()])
    near = _neighbours(list(columns.values()))
    parts = [rows] if keep else []
    for number in range(size):
        parts.append(_changed(rows, near, is_number / local_variance, swap, np.random.default_rng([seed, number])))
    whole = np.concatenate(parts)
    kinds = Features({name: table.features[name] for name in columns})
    made = {name: column.decoded(whole[:, place]) for place, (name, column) in enumerate(columns.items())}
    return Dataset.from_dict(made, features=kinds)


class _Column(NamedTuple):
    """A column as numbers.

    Attributes:
        values: the numbers, NaN where there is none, or the places of the categories.
        categories: of a nominal column, the value at each place.
        whole: the type of whole numbers, such as ``int64``.
    """

    values: NDArray[np.float64]
    categories: list[Any] | None = None
    whole: str | None = None

    def decoded(self, values: NDArray[np.float64]) -> Any:
        """Return new values as the table holds them."""
        if self.categories is not None:
            return [self.categories[place] for place in values.astype(np.int64)]
        if self.whole is None:
            return values
        bounds = np.iinfo(self.whole)
        return [None if np.isnan(each) else min(max(round(each), bounds.min), bounds.max) for each in values]

    def scaled(self) -> NDArray[np.float64]:
        """Return ``[N, K]`` whose squared distances are those of numbers in [0, 1], and 1 between two categories."""
        if self.categories is not None:
            return np.asarray(np.eye(len(self.categories))[self.values.astype(np.int64)] / np.sqrt(2))
        known = self.values[~np.isnan(self.values)]
        width = np.ptp(known) if len(known) else 0.0
        places = (self.values - known.min()) / width if width else np.zeros_like(self.values)
        return np.asarray(np.nan_to_num(places, nan=0.5)[:, None])


def _column(table: Dataset, name: str) -> _Column:
    feature = table.features[name]
    kind = str(feature.dtype) if isinstance(feature, Value | ClassLabel) else ""
    is_number = kind.startswith(("int", "uint", "float", "double")) and not isinstance(feature, ClassLabel)
    if not is_number and kind not in ("string", "large_string", "bool", "int64"):
        raise DataError(f"munge needs columns of numbers or categories, and '{name}' holds {feature}")
    stored = table[name][:]
    if is_number:
        values = np.array([np.nan if value is None else value for value in stored], dtype=np.float64)
        values = np.where(np.isfinite(values), values, np.nan)
        if np.isnan(values).any() or len(np.unique(values)) > 2:
            return _Column(values, whole=kind if "int" in kind else None)
    known = list(dict.fromkeys(stored))
    place = {value: number for number, value in enumerate(known)}
    return _Column(np.array([place[value] for value in stored], dtype=np.float64), known)


def _neighbours(columns: list[_Column]) -> NDArray[np.int64]:
    """Return the nearest other row of each row: Euclidean over the numbers, Hamming over the categories."""
    points = np.concatenate([column.scaled() for column in columns], axis=1)
    found: NDArray[np.int64] = NearestNeighbors(n_neighbors=1).fit(points).kneighbors(return_distance=False)[:, 0]
    return found


def _changed(
    rows: NDArray[np.float64],
    near: NDArray[np.int64],
    spread: NDArray[np.float64],
    swap: float,
    draw: np.random.Generator,
) -> NDArray[np.float64]:
    """Return one pass over the rows; ``spread`` is by what their distance is multiplied, 0 for categories."""
    found = rows.copy()
    chosen = draw.random(rows.shape) < swap
    noise = draw.standard_normal((2, *rows.shape)) * spread
    for place, other in enumerate(near):
        own, its, pick = found[place].copy(), found[other].copy(), chosen[place]
        apart = np.nan_to_num(np.abs(own - its))
        found[place] = np.where(pick, its + apart * noise[0, place], own)
        found[other] = np.where(pick, own + apart * noise[1, place], its)
    return found
