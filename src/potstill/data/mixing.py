"""Several tasks in one: their tables as one table, and their batches as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value, concatenate_datasets
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.batching import InMemory
from potstill.data.load import load_splits
from potstill.data.sources import Loaded
from potstill.data.splits import Splits
from potstill.errors import DataError
from potstill.interfaces import IGNORED, Batch
from potstill.registry import check_options, sources

TASK = "task"
"""The column, and the batch entry, with the number of the task of each row."""

_NAMES = ("train", "validation", "test")
_LABEL = "label"
_GIVEN = frozenset({"allow_code", "base", "label", "label_names"})


class Padding(NamedTuple):
    """What fills up an entry of a batch ``[B, T]``.

    Attributes:
        value: the number.
        left: whether it is put on the left.
    """

    value: int = 0
    left: bool = False


@sources.register("tasks")
def from_tasks(*, tasks: dict[str, dict[str, Any]], base: Path | None = None, seed: int = 42) -> Loaded:
    """Load the data of several tasks as one table.

    Args:
        tasks: the name of each task to what a recipe's ``data:`` says of its rows: ``source``, ``path``, ``columns``,
            ``limit``, ``labels``, ``validation``, …; beside these ``label``, the column of the class, if it is not
            ``label``.
        base: the folder that relative paths start from.
        seed: for what is drawn, where an entry has no ``seed`` of its own.

    Returns:
        The splits of :func:`join_splits`: a task without a validation or test split gives some of its training rows.

    Raises:
        DataError: the data of a task cannot be read or split as asked; says whose.
    """
    if not tasks:
        raise DataError("the data source 'tasks' needs the data of at least one task, as in `tasks: {NAME: {…}}`")
    found, labels, classes = {}, {}, {}
    for name, about in tasks.items():
        entry = dict(about)
        labels[name] = str(entry.pop("label", _LABEL))
        classes[name] = [str(each) for each in entry.pop("labels", None) or ()]
        found[name] = _load(name, {"seed": seed, **entry}, labels[name], classes[name], base)
    joined = join_splits(found, labels=labels, classes=classes)
    tables = {"train": joined.train, "validation": joined.validation, "test": joined.test}
    return Loaded({split: table for split, table in tables.items() if table is not None}, joined.notes)


def join_splits(
    parts: Mapping[str, Splits],
    *,
    labels: Mapping[str, str] | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> Splits:
    """Return the splits of several tasks as one; in each split the rows of a task are spread evenly over all.

    A column ``x`` of the task ``nli`` becomes ``nli.x``, null in the rows of others. ``task`` says whose a row is, and
    ``label`` is its class among those of all tasks one after another, called ``nli/neutral``. ``sample_id`` is the
    place of the row in its split.

    Args:
        parts: the name of each task to its splits.
        labels: the name of a task to its column of classes; ``label`` if omitted.
        classes: the name of a task to the names of its classes, where its tables do not say them.

    Raises:
        DataError: a label holds no classes, or some tasks have classes and others not.
    """
    given, told = labels or {}, classes or {}
    known: dict[str, list[str]] = {}
    found: dict[str, dict[str, Dataset]] = {}
    for name, splits in parts.items():
        found[name] = {split: getattr(splits, split) for split in _NAMES if getattr(splits, split) is not None}
        own = _classes(name, list(found[name].values()), given.get(name, _LABEL))
        known[name] = own or [str(each) for each in told.get(name, ())]
    without = [name for name, each in known.items() if not each]
    if without and len(without) < len(known):
        raise DataError(
            f"the task '{without[0]}' has no classes, and others have; name them with `labels: [...]` in its data"
        )
    joined = {
        split: _join({n: tables[split] for n, tables in found.items() if split in tables}, given, known)
        for split in _NAMES
        if any(split in tables for tables in found.values())
    }
    notes = [f"{name}: {note}" for name, splits in parts.items() for note in splits.notes]
    return Splits(joined["train"], joined.get("validation"), joined.get("test"), notes)


def drawn_rows(owner: NDArray[np.int64], exponent: float, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the rows of one epoch, as many as there are, those of a task spread evenly; a function of (seed, epoch).

    Of ``N`` rows, ``n_t`` of them of task ``t``, ``N · n_t^a / Σ n^a`` are of task ``t`` in every epoch. A task is gone
    through in random order from its first row to its last, then in another order, from epoch to epoch: no row is seen
    again before all others of its task were.

    Args:
        owner: the number of the task of each row ``[N]``.
        exponent: ``a``: 1 for each row once, 0 for equally many of each task.
        seed: of the orders.
        epoch: from 0.

    Reference for the exponent: Conneau et al. 2020, https://arxiv.org/abs/1911.02116 (0.3); 1 / T of the temperature
    T in Raffel et al. 2020, https://arxiv.org/abs/1910.10683.
    """
    found = []
    for task, count in _shares(np.bincount(owner), exponent).items():
        rows = np.flatnonzero(owner == task)
        first, last = epoch * count, (epoch + 1) * count
        orders = range(first // len(rows), -(-last // len(rows)))
        walk = np.concatenate([np.random.default_rng([seed, task, k]).permutation(rows) for k in orders])
        begin = first - orders.start * len(rows)
        found.append(walk[begin : begin + count])
    return np.concatenate(found)[_spread([len(rows) for rows in found])] if found else owner[:0]


class Mixed(InMemory):
    """The batches of several tasks as one, each row where it was asked for.

    Beside what the tasks give, a batch has ``task`` int64 ``[B]``, ``task/NAME`` bool ``[B]`` for every task and, where
    there are labels, ``task/NAME/labelled``: whether the row is of that task and has one. Labels are those among the
    classes of all tasks.

    Args:
        ids: ``sample_id`` of every row, int64 ``[N]``.
        owner: the number of its task, int64 ``[N]``.
        parts: the name of each task, in the order of the numbers, to the batches of its rows in their order; ``None``
            for a task without rows.
        starts: the name of each task to the number of its first class.
        classes: of all tasks together.
        padding: what fills up the entries of shorter pieces; 0 on the right if omitted.
        exponent: how often tasks are seen in an epoch, see :func:`drawn_rows`; every row once if omitted.
        seed: of what is drawn.

    Attributes:
        lengths: tokens of each row, where all tasks have them and every row is seen once.
    """

    lengths: NDArray[np.int64]

    def __init__(
        self,
        ids: Tensor,
        owner: Tensor,
        parts: Mapping[str, Any],
        *,
        starts: Mapping[str, int],
        classes: int,
        padding: Mapping[str, Padding] | None = None,
        exponent: float | None = None,
        seed: int = 0,
    ) -> None:
        self.parts = dict(parts)
        super().__init__({"sample_id": ids, TASK: owner})
        self.starts, self.classes, self.padding = dict(starts), classes, dict(padding or {})
        self.exponent, self.seed = exponent, seed
        self._local = torch.zeros_like(owner)
        for number in range(len(self.parts)):
            rows = owner == number
            self._local[rows] = torch.arange(int(rows.sum()))
        self._drawn: tuple[int, Tensor] | None = None
        lengths = self._lengths()
        if lengths is not None and exponent is None:
            self.lengths = lengths

    @property
    def views(self) -> int | None:
        """How many different random views of a sample there are; without end if ``None``."""
        return self._views

    @views.setter
    def views(self, count: int | None) -> None:
        self._views = count
        for part in self._filled:
            part.views = count

    @property
    def is_random(self) -> bool:
        """Whether a sample looks different in each view."""
        return any(getattr(part, "is_random", False) for part in self._filled)

    def set_epoch(self, epoch: int) -> None:
        """Choose the views of this epoch, and its rows."""
        super().set_epoch(epoch)
        for part in self._filled:
            part.set_epoch(epoch)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return these samples as one batch.

        Raises:
            DataError: the tasks give tensors that do not stack.
        """
        places = torch.as_tensor(indices, dtype=torch.int64)
        rows = places if self.exponent is None else self._rows()[places]
        owner = self.columns[TASK][rows]
        pieces, where = [], []
        for number, name in enumerate(self.parts):
            own = (owner == number).nonzero()[:, 0]
            if len(own):
                piece = self.parts[name].__getitems__(self._local[rows[own]].tolist())
                pieces.append(self._shifted(piece, self.starts[name]))
                where.append(own)
        batch = _merged(pieces, self.padding)
        back = torch.cat(where).argsort()
        return self._marked({name: value[back] for name, value in batch.items()}, owner)

    def _marked(self, batch: Batch, owner: Tensor) -> Batch:
        labels = batch.get("labels")
        known = None
        if labels is not None:
            known = labels.sum(-1) > 0 if labels.is_floating_point() else labels != IGNORED
        batch[TASK] = owner
        for number, name in enumerate(self.parts):
            batch[f"{TASK}/{name}"] = owner == number
            if known is not None:
                batch[f"{TASK}/{name}/labelled"] = (owner == number) & known
        return batch

    def _shifted(self, piece: Batch, start: int) -> Batch:
        """Return a task's piece with its labels among those of all tasks; of mixed samples, probabilities of all."""
        labels = piece.get("labels")
        if labels is None:
            return dict(piece)
        if labels.is_floating_point():
            wide = labels.new_zeros(len(labels), self.classes)
            wide[:, start : start + labels.shape[1]] = labels
            return {**piece, "labels": wide}
        return {**piece, "labels": torch.where(labels == IGNORED, labels, labels + start)}

    def _rows(self) -> Tensor:
        """Return the rows of this epoch by their places."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            owner = self.columns[TASK].numpy()
            rows = drawn_rows(owner, float(self.exponent or 0), seed=self.seed, epoch=self.epoch)
            self._drawn = self.epoch, torch.from_numpy(rows)
        return self._drawn[1]

    def _lengths(self) -> NDArray[np.int64] | None:
        found = np.zeros(len(self), np.int64)
        for number, part in enumerate(self.parts.values()):
            own = getattr(part, "lengths", None)
            if part is None:
                continue
            if own is None:
                return None
            found[self.columns[TASK].numpy() == number] = own
        return found

    @property
    def _filled(self) -> list[Any]:
        return [part for part in self.parts.values() if part is not None]


def _load(name: str, entry: dict[str, Any], label: str, classes: list[str], base: Path | None) -> Splits:
    what = f"the data of the task '{name}'"
    if ":" in str(entry.get("source")):
        raise DataError(
            f"{what} come from code of one's own ('{entry['source']}'), which one of several tasks cannot; "
            f"expected one of: {', '.join(sources.names())}"
        )
    problems = check_options(load_splits, entry, label=what, reserved=_GIVEN)
    if problems:
        raise DataError("\n".join(str(problem) for problem in problems))
    try:
        return load_splits(**entry, label=label, label_names=classes or None, base=base)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def _classes(name: str, tables: Sequence[Dataset], label: str) -> list[str]:
    """Return the names of a task's classes; none where no split has labels."""
    kinds = [table.features[label] for table in tables if label in table.column_names]
    for kind in kinds:
        if not isinstance(kind, ClassLabel):
            raise DataError(f"expected the label '{label}' of the task '{name}' to hold classes, got {kind}")
    return list(kinds[0].names) if kinds else []


def _join(tables: Mapping[str, Dataset], labels: Mapping[str, str], classes: Mapping[str, Sequence[str]]) -> Dataset:
    """Return the rows of one split of all tasks; ``classes`` names all tasks, ``tables`` those that have the split."""
    tasks = list(classes)
    names = [f"{task}/{label}" for task in tasks for label in classes[task]]
    made = []
    for task, table in tables.items():
        own, start = labels.get(task, _LABEL), sum(len(classes[each]) for each in tasks[: tasks.index(task)])
        kept = [column for column in table.column_names if column not in (own, "sample_id")]
        part = table.select_columns(kept).rename_columns({column: f"{task}.{column}" for column in kept})
        part = part.add_column(TASK, np.full(len(table), tasks.index(task)), feature=ClassLabel(names=tasks))
        if names:
            ids = np.full(len(table), -1, np.int64)
            if own in table.column_names:
                ids = np.asarray([-1 if value is None else value for value in table[own][:]], np.int64)
            part = part.add_column(_LABEL, np.where(ids < 0, -1, ids + start), feature=ClassLabel(names=names))
        made.append(part)
    joined = concatenate_datasets(made).select(_spread([len(part) for part in made]))
    return joined.add_column("sample_id", np.arange(len(joined), dtype=np.int64), feature=Value("int64"))


def _spread(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Return an order of rows, group after group, in which the rows of every group are spread evenly."""
    return np.argsort(np.concatenate([(np.arange(size) + 0.5) / size for size in sizes]), kind="stable")


def _shares(sizes: NDArray[np.int64], exponent: float) -> dict[int, int]:
    """Return how many rows of each task an epoch has, as many together as there are rows; of equal rests the first."""
    weights = np.where(sizes > 0, np.maximum(sizes, 1).astype(np.float64) ** exponent, 0.0)
    exact = sizes.sum() * weights / max(weights.sum(), 1e-12)
    counts = np.floor(exact).astype(np.int64)
    rest = np.argsort(counts - exact, kind="stable")[: int(sizes.sum() - counts.sum())]
    counts[rest] += 1
    return {task: int(count) for task, count in enumerate(counts) if count}


def _merged(pieces: Sequence[Batch], padding: Mapping[str, Padding]) -> Batch:
    """Return pieces one below the other; what one of them lacks is padding there."""
    sizes = [len(piece["sample_id"]) for piece in pieces]
    labels = [piece["labels"] for piece in pieces if "labels" in piece]
    if any(each.is_floating_point() for each in labels) and not all(each.is_floating_point() for each in labels):
        raise DataError("a batch has labels of one kind, and some of these tasks mix their samples and others do not")
    found = {}
    for name in dict.fromkeys(name for piece in pieces for name in piece):
        fill = padding.get(name, Padding(IGNORED if name == "labels" and not labels[0].is_floating_point() else 0))
        values = [piece.get(name) for piece in pieces]
        model = next(value for value in values if value is not None)
        every = [
            model.new_full((size, *model.shape[1:]), fill.value) if value is None else value
            for value, size in zip(values, sizes, strict=True)
        ]
        found[name] = torch.cat(_even(name, every, fill))
    return found


def _even(name: str, values: list[Tensor], fill: Padding) -> list[Tensor]:
    """Return tensors of one width, whole numbers ``[B, T]`` filled up.

    Raises:
        DataError: others differ in shape.
    """
    shapes = {tuple(value.shape[1:]) for value in values}
    if len(shapes) == 1:
        return values
    if any(value.ndim != 2 or value.is_floating_point() for value in values):
        shown = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise DataError(
            f"the tasks give '{name}' of different shapes, {shown}, which cannot be one batch; images are brought to "
            "one shape by `size:` in each task"
        )
    width = max(value.shape[1] for value in values)
    ends = [(width - value.shape[1], 0) if fill.left else (0, width - value.shape[1]) for value in values]
    return [torch.nn.functional.pad(value, end, value=fill.value) for value, end in zip(values, ends, strict=True)]
