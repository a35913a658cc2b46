"""From a recipe's ``data`` to three splits with stable row ids and named classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.compute as pc  # type: ignore[import-untyped, unused-ignore]
from datasets import ClassLabel, Dataset, Value
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from potstill.data.sources import SPLIT_WORDS, Loaded
from potstill.data.splits import Splits as Splits
from potstill.errors import DataError, did_you_mean
from potstill.registry import check_options, signature_options, sources

_SPLITS = ("train", "validation", "test")
_CONTEXT = frozenset({"path", "name", "revision", "base", "splits", "seed"})
_ID = "sample_id"

_Tables: TypeAlias = dict[str, Dataset]
_Found: TypeAlias = tuple[list[str], dict[str, NDArray[np.int64]], list[str]]


def load_splits(
    source: str,
    path: str | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    splits: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    limit: Mapping[str, int] | None = None,
    label: str | None = None,
    label_names: Sequence[str] | None = None,
    validation: float | int = 0.1,
    test: float | int = 0.2,
    seed: int = 42,
    kwargs: Mapping[str, Any] | None = None,
    allow_code: bool = False,
    base: Path | None = None,
) -> Splits:
    """Load a data set and bring it into the form that everything else expects.

    ``sample_id`` is the row's index in the source's own split, before carving and limits; a column of that name is
    kept. Splits that the source lacks are carved from its training split, never from its test split. Limits come
    last, so they change no other split.

    Args:
        source: ``hub``, ``files``, ``sklearn``, or ``package.module:factory``, which is called with ``kwargs``.
        path: what to load from the source: an id, a folder, a file, a function's name.
        name: the configuration, where the source has several.
        revision: the branch, tag or commit, where the source has them.
        splits: our name of a split to the source's, such as ``{"validation": "dev"}``.
        columns: our name of a column to the source's, such as ``{"text": "sentence"}``.
        limit: rows to keep of a split, as a random subset in the old order; a larger limit only adds rows.
        label: the column of classes, under our name; ``None`` for regression or where there is none. Strings, integers
            and booleans become a ``ClassLabel``: strings in the order of ``label_names`` or sorted over all splits,
            integers named by ``label_names`` or by their digits; a ``ClassLabel`` may be put in another order. -1, null
            and ``""`` mean unlabelled and become -1. Floats and lists stay as they are. A data set without this column
            is a transfer set without labels.
        label_names: the names of the classes in the order of their ids, where the data set gives none.
        validation: share (below 1) or number of the training split's rows to carve if there is no validation split;
            0 for none.
        test: the same for the test split.
        seed: for carving, limits and generated data.
        kwargs: options of the source.
        allow_code: whether a dotted ``source`` outside potstill may be imported and run.
        base: the folder that a relative ``path`` starts from, before the working directory.

    Returns:
        The splits, and notes on what happened to them.

    Raises:
        DataError: the data cannot be read, or lack a split, a column or a label.
        ComponentError: there is no such source.
        CodeNotAllowedError: ``source`` is a dotted path and ``allow_code`` is false.
    """
    title = f"'{path or source}'"
    context = {"path": path, "name": name, "revision": revision, "base": base, "splits": splits or {}, "seed": seed}
    loaded = _read(source, context, dict(kwargs or {}), allow_code)
    found = splits_from(
        _choose(loaded.splits, splits or {}, title),
        columns=columns,
        limit=limit,
        label=label,
        label_names=label_names,
        validation=validation,
        test=test,
        seed=seed,
        title=title,
    )
    return replace(found, notes=[*loaded.notes, *found.notes])


def splits_from(
    tables: Mapping[str, Dataset],
    *,
    columns: Mapping[str, str] | None = None,
    limit: Mapping[str, int] | None = None,
    label: str | None = None,
    label_names: Sequence[str] | None = None,
    validation: float | int = 0.1,
    test: float | int = 0.2,
    seed: int = 42,
    title: str = "the data",
) -> Splits:
    """Return tables that are there already as splits: columns renamed, ids added, classes named, missing splits carved.

    Args:
        tables: ``train``, and ``validation`` and ``test`` where there are such splits.
        columns: as in :func:`load_splits`, like all that follow.
        limit: rows to keep of a split.
        label: the column of classes.
        label_names: the names of the classes.
        validation: share or number of rows to carve where there is no validation split.
        test: share or number of rows to carve where there is no test split.
        seed: of what is drawn.
        title: what the data are called in messages.

    Raises:
        DataError: the data lack a column or a label.
    """
    tables = dict(tables)
    notes: list[str] = []
    for split in tables:
        table = _rename(tables[split], columns or {}, split, title, optional={label} if split != "train" else set())
        tables[split] = _with_ids(table, f"the split '{split}' of {title}")
    notes += _name_labels(tables, label, label_names, title)
    notes = _without_hidden_test(tables, label, title) or notes
    notes += _carve(tables, {"test": test, "validation": validation}, label, seed, title)
    notes += _limit(tables, limit or {}, seed, title)
    return Splits(tables["train"], tables.get("validation"), tables.get("test"), notes)


def _read(source: str, context: Mapping[str, Any], kwargs: dict[str, Any], allow_code: bool) -> Loaded:
    function = sources.get(source, allow_code=allow_code)
    known = signature_options(function)
    if ":" in source:  # a person's own factory gets what the recipe says, and nothing else
        context = {key: value for key, value in context.items() if key in ("path", "name", "revision")}
    elif context["path"] is None and "path" in known:
        raise DataError(f"the data source '{source}' needs a `path`")
    for key in ("path", "name", "revision"):
        if context[key] is not None and key not in known:
            raise DataError(f"the data source '{source}' has no `{key}`, got '{context[key]}'")
    given = {key: value for key, value in context.items() if key in known and value is not None}
    reserved = given if ":" in source else _CONTEXT
    problems = check_options(function, kwargs, label=f"the data source '{source}'", reserved=reserved)
    if problems:
        raise DataError("\n".join(str(problem) for problem in problems))
    return _as_loaded(function(**given, **kwargs), source)


def _as_loaded(value: Any, source: str) -> Loaded:
    """Take what a factory may return: our own form, data sets, or dicts of columns, alone or by split."""
    if isinstance(value, Loaded):
        return value
    by_split = isinstance(value, Mapping) and all(isinstance(each, (Dataset, Mapping)) for each in value.values())
    found = dict(value) if by_split else {"train": value}
    try:
        tables = {
            name: Dataset.from_dict(dict(each)) if isinstance(each, Mapping) else each for name, each in found.items()
        }
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"'{source}' gave columns that do not make a table: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, Dataset):
            kind = type(table).__name__
            raise DataError(f"'{source}' must give a Dataset, a DatasetDict or columns, got {kind} for '{name}'")
    return Loaded(tables)


def _choose(found: Mapping[str, Dataset], splits: Mapping[str, str], title: str) -> _Tables:
    """Return our splits: those that ``splits`` names, then those that go by one of the usual names."""
    tables: _Tables = {}
    used: dict[str, str] = {}
    for ours, theirs in splits.items():
        if ours not in _SPLITS:
            raise DataError(f"`splits` names '{ours}'; {did_you_mean(ours, _SPLITS)}")
        split = _usual(theirs, found)
        if split is None:
            raise DataError(f"{title} has no split '{theirs}'; {did_you_mean(theirs, found)}")
        if split in used:
            raise DataError(f"`splits` takes '{theirs}' of {title} for '{used[split]}' and for '{ours}'")
        tables[ours], used[split] = found[split], ours
    rest = {split: table for split, table in found.items() if split not in used}
    for ours in _SPLITS:
        split = _usual(ours, rest)
        if ours not in tables and split is not None:
            tables[ours] = rest[split]
    return _checked(tables, found, title)


def _usual(name: str, found: Iterable[str]) -> str | None:
    """Return the split of this name, else one whose name usually means the same: ``dev`` for ``validation``."""
    if name in found:
        return name
    meant = SPLIT_WORDS.get(name.lower(), name)
    return next((split for split in found if SPLIT_WORDS.get(split.lower()) == meant), None)


def _checked(tables: _Tables, found: Iterable[str], title: str) -> _Tables:
    """Return the splits in our order, none of them empty."""
    if "train" not in tables:
        known = sorted(found)
        raise DataError(
            f"{title} has no split 'train', only: {', '.join(known) or 'none'}; "
            f"say which one it is, as in `splits: {{train: {(known or ['…'])[0]}}}`"
        )
    for ours, table in tables.items():
        if not len(table):
            raise DataError(f"the split '{ours}' of {title} is empty")
    return {split: tables[split] for split in _SPLITS if split in tables}


def _rename(
    table: Dataset, columns: Mapping[str, str], split: str, title: str, optional: Iterable[str | None]
) -> Dataset:
    names = table.column_names
    change = {theirs: ours for ours, theirs in columns.items() if theirs != ours}
    for theirs, ours in list(change.items()):
        if theirs not in names and ours in optional:
            del change[theirs]
        elif theirs not in names:
            raise DataError(f"the split '{split}' of {title} has no column '{theirs}'; {did_you_mean(theirs, names)}")
        elif ours in names and ours not in change:
            raise DataError(
                f"the split '{split}' of {title} already has a column '{ours}', so '{theirs}' cannot take that name; "
                f"rename the old one as well, as in `columns: {{old_{ours}: {ours}}}`"
            )
    return table.rename_columns(change) if change else table


def _with_ids(table: Dataset, title: str) -> Dataset:
    if _ID not in table.column_names:
        return table.add_column(_ID, np.arange(len(table), dtype=np.int64), feature=Value("int64"))
    ids = _column(table, _ID)
    if not pa.types.is_integer(ids.type) or ids.null_count or len(ids.unique()) != len(ids):
        raise DataError(
            f"{title} has a column '{_ID}' that is not one distinct integer per row (type {ids.type}); "
            f"rename it, as in `columns: {{old_id: {_ID}}}`"
        )
    return _replace(table, _ID, ids.to_numpy().astype(np.int64), Value("int64"))


def _column(table: Dataset, name: str) -> pa.ChunkedArray:
    return table.select_columns([name]).with_format("arrow")[:][name]


def _replace(table: Dataset, name: str, values: NDArray[np.int64], kind: Any) -> Dataset:
    return table.remove_columns(name).add_column(name, values, feature=kind)


@dataclass(frozen=True)
class _Labels:
    """The label column of one split: its type in ``datasets``, what its values are, and the values."""

    kind: Any
    group: str
    values: Any


def _name_labels(tables: _Tables, label: str | None, names: Sequence[str] | None, title: str) -> list[str]:
    """Turn the label column of all splits into class ids with names, in place, and return notes."""
    if label is None:
        return []
    where = f"'{label}' of {title}"
    columns: dict[str, _Labels] = {}
    notes = []
    for split, table in tables.items():
        if label in table.column_names:
            kind, values = table.features[label], _column(table, label)
            columns[split] = _Labels(kind, _group(kind, values), values)
        else:
            hint = did_you_mean(label, set(table.column_names) - {_ID})
            notes.append(f"{split}: no column '{label}', so its rows have no labels; {hint}")
    if not _are_classes(columns, where, names):
        return notes
    classes, ids, remarks = _classes(columns, [str(each) for each in names or ()], where)
    for split, numbers in ids.items():
        _check_range(numbers, classes, f"the split '{split}' of {title}", label)
        tables[split] = _replace(tables[split], label, numbers, ClassLabel(names=classes))
        unlabelled = int((numbers == -1).sum())
        if unlabelled:
            remarks.append(f"{split}: {unlabelled:,} of {len(numbers):,} rows have no label")
    return notes + remarks


def _group(kind: Any, values: Any) -> str:
    """Return what the values are, by the column's type; a column of nulls goes by no type, for readers guess it."""
    if isinstance(kind, ClassLabel):
        return "class"
    if values.null_count == len(values):
        return "null"
    name = str(getattr(kind, "dtype", "")) if isinstance(kind, Value) else ""
    if "int" in name:
        return "integer"
    return {"string": "string", "large_string": "string", "bool": "bool"}.get(
        name, "number" if name.startswith("float") else "other"
    )


def _are_classes(columns: Mapping[str, _Labels], where: str, names: Sequence[str] | None) -> bool:
    """Return whether the columns hold classes: class labels, strings, integers or booleans; nulls go with any."""
    found = {column.group for column in columns.values()} - {"null"}
    if found - {"class"} in ({"string"}, {"integer"}, {"bool"}) or found == {"class"} or (columns and not found):
        return True
    if found & {"class", "string", "integer", "bool"}:
        types = ", ".join(f"{column.kind} in '{split}'" for split, column in columns.items())
        raise DataError(f"the label {where} has different types: {types}")
    if names and "number" in found:
        raise DataError(f"the label {where} is a number, not a class, so `label_names` cannot name it")
    return False


def _classes(columns: Mapping[str, _Labels], names: list[str], where: str) -> _Found:
    """Return the names of the classes, the ids of each split, and remarks."""
    if len(set(names)) < len(names):
        raise DataError(f"`label_names` names a class twice: {', '.join(names)}")
    found = {column.group for column in columns.values()}
    if "class" in found:
        return _from_class_labels(columns, names, where)
    if "string" in found:
        return _from_strings(columns, names, where)
    values = {split: _integers(column.values) for split, column in columns.items()}
    if "bool" in found:
        return names or ["False", "True"], values, []
    return _from_integers(values, names, where)


def _from_class_labels(columns: Mapping[str, _Labels], names: list[str], where: str) -> _Found:
    own = {split: list(column.kind.names) for split, column in columns.items() if column.group == "class"}
    first = next(iter(own.values()))
    classes = first + sorted({name for each in own.values() for name in each} - set(first))
    ids, remarks = {}, []
    for split, column in columns.items():
        if column.group == "string":
            ids[split] = _positions(column.values, classes, where)
            continue
        ids[split] = _integers(column.values)
        if own.get(split, first) != first:
            _check_range(ids[split], own[split], f"the split '{split}'", where)
            ids[split] = np.array([*(classes.index(name) for name in own[split]), -1])[ids[split]]
            remarks.append(f"{split} numbers the classes of {where} differently; they were matched by name")
    if names != classes and sorted(names) == sorted(classes):
        order = np.array([*(names.index(name) for name in classes), -1])
        return names, {split: order[each] for split, each in ids.items()}, [*remarks, f"{where}: classes reordered"]
    if names and names != classes and (classes != [str(i) for i in range(len(classes))] or len(names) != len(classes)):
        raise DataError(f"the data name the classes of {where} themselves ({', '.join(classes)}); remove `label_names`")
    return names or classes, ids, remarks


def _from_strings(columns: Mapping[str, _Labels], names: list[str], where: str) -> _Found:
    found = {each for column in columns.values() for each in _strings(column.values).unique().to_pylist()} - {None, ""}
    classes = names or sorted(found)
    if not classes:
        raise DataError(f"no row has a label in {where}; name the classes with `label_names`")
    return classes, {split: _positions(column.values, classes, where) for split, column in columns.items()}, []


def _from_integers(values: dict[str, NDArray[np.int64]], names: list[str], where: str) -> _Found:
    """Name integers by ``names``, or by their digits; ids that leave most numbers unused become ranks."""
    found = np.unique(np.concatenate(list(values.values())))
    classes = [int(each) for each in found if each != -1]
    if names:
        return names, values, []
    if not classes:
        raise DataError(f"no row has a label in {where}; name the classes with `label_names`")
    if classes == [1] and -1 in found:
        remark = f"{where} holds -1 and 1: two classes of these names, not unlabelled rows"
        return ["-1", "1"], {split: (ids + 1) // 2 for split, ids in values.items()}, [remark]
    dense = classes[0] <= 0 and classes[-1] < 2 * len(classes)
    if dense or classes[0] < 0:
        return [str(i) for i in range(classes[-1] + 1)], values, []
    ranks = {split: np.where(ids == -1, -1, np.searchsorted(classes, ids)) for split, ids in values.items()}
    shown = ", ".join(str(each) for each in classes[:6]) + (", …" if len(classes) > 6 else "")
    return [str(each) for each in classes], ranks, [f"the ids of {where} are the ranks of its values ({shown})"]


def _strings(column: Any) -> Any:
    return column.cast(pa.string())


def _integers(column: Any) -> NDArray[np.int64]:
    return np.asarray(pc.fill_null(column.cast(pa.int64()), -1), dtype=np.int64)


def _positions(column: Any, classes: Sequence[str], where: str) -> NDArray[np.int64]:
    strings = _strings(column)
    for name in strings.unique().to_pylist():
        if name and name not in classes:
            raise DataError(
                f"the label {where} has the value '{name}', which is no class; {did_you_mean(name, classes)}"
            )
    return _integers(pc.index_in(strings, value_set=pa.array(list(classes), pa.string())))


def _check_range(ids: NDArray[np.int64], classes: Sequence[str], where: str, label: str) -> None:
    wrong = np.flatnonzero((ids < -1) | (ids >= len(classes)))
    if len(wrong):
        raise DataError(
            f"{where}, row {wrong[0]}: the label '{label}' is {ids[wrong[0]]}, expected 0 to {len(classes) - 1} "
            f"({', '.join(classes[:6])}{', …' if len(classes) > 6 else ''}), or -1 for an unlabelled row"
        )


def _without_hidden_test(tables: _Tables, label: str | None, title: str) -> list[str]:
    """Let the validation split stand for a test split whose labels are kept back, as in GLUE; another is carved."""
    held = [split for split in ("test", "validation") if split in tables and _has_labels(tables[split], label)]
    if "test" not in tables or "validation" not in held or "test" in held or label not in tables["test"].column_names:
        return []
    tables["test"] = tables.pop("validation")
    return [f"the test split of {title} keeps its labels back: models are judged on the validation split"]


def _has_labels(table: Dataset, label: str | None) -> bool:
    if label is None or label not in table.column_names or not isinstance(table.features[label], ClassLabel):
        return False
    return bool((_integers(_column(table, label)) >= 0).any())


def _carve(tables: _Tables, sizes: Mapping[str, float | int], label: str | None, seed: int, title: str) -> list[str]:
    """Take missing splits from the training split, in place, and return notes; sizes refer to the whole of it."""
    notes, total = [], len(tables["train"])
    for split, size in sizes.items():
        if split in tables or size == 0:
            continue
        rows = _rows(size, total, split)
        train = tables["train"]
        if rows >= len(train):
            raise DataError(
                f"`{split}: {size}` asks for {rows} rows, but {title} has {len(train)} rows left to train on"
            )
        rest, part, how = _divide(train, rows, label, seed)
        tables["train"], tables[split] = train.select(rest), train.select(part)
        share = f"{rows:,} rows" if isinstance(size, int) else f"{100 * size:g} %"
        notes.append(f"{split}: {share} of the training split (seed {seed}{how}), because the data set has none")
    return notes


def _rows(size: float | int, total: int, split: str) -> int:
    if isinstance(size, bool) or size < 0 or (isinstance(size, float) and size >= 1):
        raise DataError(f"`{split}` must be a share between 0 and 1 or a number of rows, got {size!r}")
    return size if isinstance(size, int) else max(1, round(size * total))


def _divide(table: Dataset, rows: int, label: str | None, seed: int) -> tuple[list[int], list[int], str]:
    """Return the sorted indices of what stays and what is taken, and how they were chosen."""
    choice = {"test_size": rows, "random_state": seed % 2**32}
    every, how = np.arange(len(table)), ""
    rest = part = None
    if label is not None and label in table.column_names and isinstance(table.features[label], ClassLabel):
        try:
            rest, part = train_test_split(every, stratify=_integers(_column(table, label)), **choice)
            how = ", stratified by class"
        except ValueError:
            how = ", not stratified: a class has too few rows"
    if rest is None or part is None:
        rest, part = train_test_split(every, **choice)
    return sorted(rest.tolist()), sorted(part.tolist()), how


def _limit(tables: _Tables, limit: Mapping[str, int], seed: int, title: str) -> list[str]:
    """Keep a random subset of splits, in place, in the old order, and return notes."""
    notes = []
    for split, rows in limit.items():
        if split not in tables:
            raise DataError(f"`limit` names the split '{split}', which {title} lacks; {did_you_mean(split, tables)}")
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise DataError(f"`limit` must keep at least one row of '{split}', got {rows!r}")
        order = np.random.RandomState(seed % 2**32).permutation(len(tables[split]))
        if rows < len(order):
            tables[split] = tables[split].select(sorted(order[:rows].tolist()))
            notes.append(f"{split}: {rows:,} of {len(order):,} rows, chosen at random (seed {seed})")
    return notes
