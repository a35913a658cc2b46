"""Where data come from: the Hugging Face Hub, files on disk, scikit-learn."""

from __future__ import annotations

import csv
import dataclasses
import glob
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd  # type: ignore[import-untyped, unused-ignore]
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
from datasets.exceptions import DatasetsError

from potstill.errors import DataError, did_you_mean, nearest
from potstill.registry import check_options, signature_options, sources

_READERS = {".parquet": "parquet", ".csv": ",", ".tsv": "\t", ".json": "json", ".jsonl": "json"}
_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_METADATA = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})
SPLIT_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""What the splits are called in file and folder names, lower case, and what we call them."""

_MISSING = ("NA", "N/A", "NaN", "nan", "NULL", "null", "None")
_PARQUET_BRANCH = "refs/convert/parquet"
_SCRIPTS = "scripts are no longer supported"
_BUNDLED = ("load_breast_cancer", "load_diabetes", "load_digits", "load_iris", "load_wine")
_SKLEARN_RESERVED = frozenset({"return_X_y", "as_frame", "return_distributions", "return_centers", "coef"})


@dataclass
class Loaded:
    """What a source returns.

    Attributes:
        splits: every split under the name that the source gives it.
        notes: what a person should know about how they were read.
    """

    splits: Mapping[str, datasets.Dataset]
    notes: list[str] = dataclasses.field(default_factory=list)


@sources.register("hub")
def from_hub(
    path: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    base: Path | None = None,
    data_dir: str | None = None,
    data_files: str | list[str] | dict[str, Any] | None = None,
) -> Loaded:
    """Load a data set of the Hugging Face Hub, or a local folder in the hub's layout, with ``datasets.load_dataset``.

    Args:
        path: the id, such as ``nyu-mll/glue``, or a folder, relative to ``base`` or the working directory.
        name: the configuration, such as ``sst2``.
        revision: branch, tag or commit.
        base: the recipe's folder.
        data_dir: a folder within the repository.
        data_files: files within the repository, also by split.

    Returns:
        The splits. For a repository that holds a loading script, which ``datasets`` no longer runs, they come from
        the hub's own conversion to Parquet, and a note says so.

    Raises:
        DataError: the hub cannot be reached, or there is no such data set, configuration or revision.
    """
    local = _existing(path, base)
    options = {"name": name, "revision": revision, "data_dir": data_dir, "data_files": data_files}
    try:
        if local is None or not local.is_dir():
            return _from_repository(path, options)
        logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # of READMEs
        found = datasets.load_dataset(str(local), **options)
        return Loaded(_by_name(found), [f"{path}: read from the folder {local}, not from the hub"])
    except Exception as error:  # what the libraries below raise differs from version to version
        raise DataError(f"cannot load '{path}' from the hub: {_hub_problem(error, name)}") from error


@sources.register("files")
def from_files(
    path: str,
    *,
    base: Path | None = None,
    splits: Mapping[str, str] | None = None,
    column_names: list[str] | None = None,
    delimiter: str | None = None,
    encoding: str = "utf-8",
    field: str | None = None,
) -> Loaded:
    """Load a file, a folder of files named after their splits, or a folder of images.

    A folder holds ``train.parquet``, ``dev.csv``, ``test-00000-of-00002.parquet`` and the like, or folders ``train``,
    ``test``, … of such files, or images in class folders (``cat/1.png``, also below ``train``, ``test``, …). Files
    without a split in their name are the training split where no other file has one.

    Args:
        path: relative to ``base`` or to the working directory; ``~`` is the home folder.
        base: the recipe's folder.
        splits: ours to theirs; theirs may also be the name of a file in the folder.
        column_names: names of the columns of CSV and TSV files that have no header line.
        delimiter: what separates the columns of CSV and TSV files, instead of a comma or a tab.
        encoding: of CSV and TSV files.
        field: the key that holds the rows in JSON files.

    Returns:
        The splits. In CSV and TSV files, empty cells are missing, and words such as ``NA`` and ``null`` only in columns
        of numbers. A TSV file with unbalanced quotes is read without quoting.

    Raises:
        DataError: no such file, a kind of file that is not read, or one that is damaged.
    """
    place = _existing(path, base)
    if place is None:
        raise DataError(_no_such_path(path, base))
    reader = _Reader(column_names, delimiter, encoding, field)
    if place.is_dir() and not _tables(place) and _has_images(place):
        return _images(place)
    groups = _groups(place, splits or {}, reader.notes)
    return Loaded({split: reader.read(files) for split, files in groups.items()}, reader.notes)


@sources.register("given")
def given(path: str) -> Loaded:
    """Stand for tables that were given in Python, where they are no longer there.

    Args:
        path: what the tables hold, as a hash.

    Raises:
        DataError: always.
    """
    raise DataError(
        f"the data of this run (content {path}) were given in Python and are not on disk; "
        "call `Distiller.distill` with them again, or say `data: {source: files, path: …}`"
    )


@sources.register("sklearn")
def from_sklearn(path: str, *, seed: int = 42, **kwargs: Any) -> Loaded:
    """Load a data set that comes with scikit-learn, or generate one.

    Args:
        path: ``load_digits``, ``load_iris``, ``load_wine``, ``load_breast_cancer``, ``load_diabetes``, or a generator
            of features and labels such as ``make_classification``.
        seed: ``random_state`` of a generator where ``kwargs`` has none.
        **kwargs: options of that function.

    Returns:
        One split ``train``. Digits have the column ``image`` (float32 [8, 8], 0 to 16), all others one float32 column
        per feature, with scikit-learn's names or ``x0``, ``x1``, …. ``label`` is a class, or a float for regression.

    Raises:
        DataError: no such data set, or wrong options.
    """
    from sklearn import datasets as library

    generators = [each for each in dir(library) if each.startswith("make_")]
    if path not in (*_BUNDLED, *generators):
        known = (*_BUNDLED, *generators)
        raise DataError(f"scikit-learn has no bundled data set or generator '{path}'; {did_you_mean(path, known)}")
    function = getattr(library, path)
    problems = check_options(function, kwargs, label=f"scikit-learn's {path}", reserved=_SKLEARN_RESERVED)
    if problems:
        raise DataError("\n".join(str(problem) for problem in problems))
    notes = []
    if "random_state" in signature_options(function) and "random_state" not in kwargs:
        kwargs["random_state"] = seed % 2**32
        notes.append(f"{path}: generated with random_state {kwargs['random_state']}")
    try:
        result = function(**kwargs)
    except (TypeError, ValueError) as error:
        raise DataError(f"scikit-learn's {path}: {error}") from error
    return Loaded({"train": _from_arrays(path, result)}, notes)


def _from_repository(path: str, options: Mapping[str, Any]) -> Loaded:
    try:
        return Loaded(_by_name(datasets.load_dataset(path, **options)))
    except RuntimeError as error:
        if _SCRIPTS not in str(error):
            raise
    found = datasets.load_dataset(path, **{**options, "revision": _PARQUET_BRANCH})
    asked = f", not from the revision '{options['revision']}'" if options["revision"] else ""
    what = f"the hub's Parquet conversion ({_PARQUET_BRANCH}){asked}"
    return Loaded(_by_name(found), [f"{path}: read from {what}, because the repository holds a loading script"])


def _by_name(found: Mapping[Any, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    return {str(split): table for split, table in found.items()}


def _hub_problem(error: Exception, name: str | None) -> str:
    text = str(error)
    available = re.search(r"(?:Available|available configs): \[(.*?)\]", text)
    if available:
        known = re.findall(r"'([^']*)'", available[1])
        if name:
            return f"it has no configuration '{name}'; {did_you_mean(name, known)}"
        return f"it has several configurations, so `name` must say which; known: {', '.join(known)}"
    hint = "to read a folder on this machine, say `source: files` and give the folder as `path`"
    return f"{text} ({type(error).__name__}); {hint}"


def _places(path: str, base: Path | None) -> list[Path]:
    """Return where a path may lead: from the base, then from the working directory."""
    try:
        wanted = Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"'{path}': {error}") from error
    return list(dict.fromkeys(place.resolve() for place in ((base or Path()) / wanted, wanted)))


def _existing(path: str, base: Path | None) -> Path | None:
    return next((place for place in _places(path, base) if place.exists()), None)


def _no_such_path(path: str, base: Path | None) -> str:
    places = _places(path, base)
    hints = []
    for place in places:
        parent = next(folder for folder in place.parents if folder.is_dir())
        missing = place.relative_to(parent).parts[0]
        hints += [str(parent / near) for near in nearest(missing, (entry.name for entry in parent.iterdir()), count=1)]
    hint = f"; did you mean '{hints[0]}'?" if hints else ""
    return f"there is no file or folder '{path}': looked for {' and '.join(map(str, places))}{hint}"


def _tables(folder: Path) -> list[Path]:
    """Return the files of a folder that hold rows, sorted by name."""
    files = (entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith((".", "_")))
    return sorted(file for file in files if file.suffix.lower() in _READERS and file.name not in _METADATA)


def _has_images(folder: Path) -> bool:
    return any(file.suffix.lower() in _IMAGES for file in folder.rglob("*"))  # stops at the first


def _images(folder: Path) -> Loaded:
    places: dict[str, Path] = {}
    others = []
    for entry in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        split = SPLIT_WORDS.get(entry.name.lower())
        if split and split not in places:
            places[split] = entry
        else:
            others.append(entry.name)
    notes = [f"folders that are no split were left out: {', '.join(others)}"] if places and others else []
    places = places or {"train": folder}
    options = {"drop_labels": not _in_classes(places.values())}
    files = {split: f"{glob.escape(str(place))}/**" for split, place in places.items()}
    try:
        return Loaded(_by_name(datasets.load_dataset("imagefolder", data_files=files, **options)), notes)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"cannot read the images of {folder}: {error}") from error


def _in_classes(folders: Iterable[Path]) -> bool:
    """Return whether images lie in class folders: several folders, all equally deep, none the split's own.

    ``datasets`` can tell by itself, but looks split by split: a first split of one class would lose its labels.
    """
    depths, names = set(), set()
    for folder in folders:
        for file in folder.rglob("*"):
            if file.suffix.lower() in _IMAGES:
                depths.add(len(file.relative_to(folder).parts))
                names.add(file.parent.name)
    return len(depths) == 1 and 1 not in depths and len(names) > 1


def _groups(place: Path, wanted: Mapping[str, str], notes: list[str]) -> dict[str, list[Path]]:
    """Return the files of each split: one file, files named after splits, or folders named after splits."""
    if place.is_file():
        return {"train": [place]}
    asked = {theirs: [place / theirs] for theirs in wanted.values() if (place / theirs).is_file()}
    files = [file for file in _tables(place) if [file] not in asked.values()]
    groups = _by_split(files, notes, others=not asked) if files else {}
    for entry in sorted(place.iterdir()):
        split = SPLIT_WORDS.get(entry.name.lower())
        if split and split not in groups and entry.is_dir() and _tables(entry):
            groups[split] = _tables(entry)
    if groups or asked:
        return {**groups, **asked}
    if (place / "data").is_dir():
        return _groups(place / "data", wanted, notes)
    found = ", ".join(sorted(entry.name for entry in place.iterdir())[:8]) or "nothing"
    kinds = ", ".join(kind[1:] for kind in _READERS)
    raise DataError(f"{place} holds no data: expected files ({kinds}) named after splits, or images; found {found}")


def _by_split(files: Sequence[Path], notes: list[str], *, others: bool) -> dict[str, list[Path]]:
    """Group files by the words of their names; ``validation_matched`` beside ``validation_other`` keep their names.

    Files without such a word are the training split where there are no others and ``others`` allows it.
    """
    stems: dict[str, list[Path]] = {}
    for file in files:
        stem = file.name[: -len(file.suffix)].lower()
        stem = re.sub(r"-\d{5}-of-\d{5}.*$", "", stem)
        stems.setdefault("_".join(re.findall(r"[^\W\d_]+", stem)), []).append(file)
    splits: dict[str, list[str]] = {}
    for stem in stems:
        split = next((SPLIT_WORDS[word] for word in stem.split("_") if word in SPLIT_WORDS), None)
        splits.setdefault(split or "", []).append(stem)
    unnamed = splits.pop("", [])
    if not splits and others:
        return {"train": list(files)}
    if unnamed:
        ignored = ", ".join(file.name for stem in unnamed for file in stems[stem])
        notes.append(f"files without a split in their name were left out: {ignored}")
    groups: dict[str, list[Path]] = {}
    for split, names in splits.items():
        exact = [stem for stem in names if stem in SPLIT_WORDS]
        chosen = names[0] if len(names) == 1 else exact[0] if len(exact) == 1 else None
        groups |= {split if stem == chosen else stem: stems[stem] for stem in names}
    return groups


@dataclass
class _Reader:
    """Reads the files of one split."""

    column_names: list[str] | None
    delimiter: str | None
    encoding: str
    field: str | None
    notes: list[str] = dataclasses.field(default_factory=list)

    def read(self, files: Sequence[Path]) -> datasets.Dataset:
        """Return the rows of all files, in the order of their names; they must be of one kind."""
        kinds = sorted({file.suffix.lower() for file in files})
        if kinds[0] not in _READERS:
            raise DataError(f"{files[0]} is no data file: expected one of {', '.join(_READERS)}")
        if len(kinds) > 1:
            names = ", ".join(file.name for file in files)
            raise DataError(f"{files[0].parent} holds one split in several kinds of files ({names}); keep one of them")
        how = _READERS[kinds[0]]
        try:
            if how not in ("parquet", "json"):
                return _from_frames(files, [self._frame(file, self.delimiter or how) for file in files])
            options = {"field": self.field} if how == "json" and self.field else {}
            return datasets.load_dataset(
                how, data_files=[glob.escape(str(file)) for file in files], split="train", **options
            )
        except (OSError, ValueError, TypeError, LookupError, NotImplementedError, DatasetsError) as error:
            reason = error.__cause__ or error
            raise DataError(f"cannot read {', '.join(map(str, files))}: {reason}") from error

    def _frame(self, file: Path, delimiter: str) -> pd.DataFrame:
        unquoted = delimiter == "\t" and _unbalanced(file, self.encoding)
        if unquoted:
            self.notes.append(f"{file.name}: read without quoting, because its quotes are unbalanced")
        header: dict[str, Any] = {"names": self.column_names, "header": None} if self.column_names else {}
        frame = pd.read_csv(
            file,
            sep=delimiter,
            quoting=csv.QUOTE_NONE if unquoted else csv.QUOTE_MINIMAL,
            encoding=self.encoding,
            keep_default_na=False,
            na_values=[""],
            dtype_backend="numpy_nullable",
            **header,
        )
        if not isinstance(frame.index, pd.RangeIndex):  # pandas takes the surplus for an index and shifts the columns
            raise DataError(f"{file}: the rows have more fields than there are column names ({len(frame.columns)})")
        return pd.DataFrame({name: _numbers(frame[name]) for name in frame.columns})


def _from_frames(files: Sequence[Path], frames: Sequence[pd.DataFrame]) -> datasets.Dataset:
    for file, frame in zip(files, frames, strict=True):
        if list(frame.columns) != list(frames[0].columns):
            raise DataError(
                f"{file} has the columns {list(frame.columns)}, but {files[0]} has {list(frames[0].columns)}"
            )
    table = pa.Table.from_pandas(pd.concat(frames, ignore_index=True), preserve_index=False).replace_schema_metadata()
    kinds = [(each.name, pa.string() if pa.types.is_large_string(each.type) else each.type) for each in table.schema]
    return datasets.Dataset(table.cast(pa.schema(kinds)))


def _unbalanced(file: Path, encoding: str) -> bool:
    """Return whether quoting would join lines: a field opens a quote that its line does not close.

    Where the lines have unequal numbers of tabs, quotes do span lines, and the file is taken to be well quoted.
    """
    tabs, unclosed = set(), False
    with file.open(encoding=encoding, newline="\n") as lines:
        for line in lines:
            fields = line.rstrip("\r\n").split("\t")
            tabs |= {len(fields)} if line.strip() else set()
            unclosed |= any(cell[:1] == '"' and not re.fullmatch(r'"(?:[^"]|"")*"', cell) for cell in fields)
    return unclosed and len(tabs) == 1


def _numbers(column: pd.Series[Any]) -> pd.Series[Any]:
    """Return a text column as numbers where all of it is numbers but for words such as NA."""
    if not pd.api.types.is_string_dtype(column) or not column.isin(_MISSING).any():
        return column
    known = column.mask(column.isin(_MISSING))
    numbers = pd.to_numeric(known, errors="coerce")
    whole = known.notna().any() and bool((numbers.notna() == known.notna()).all())
    return numbers if whole else column


def _from_arrays(path: str, result: Any) -> datasets.Dataset:
    if isinstance(result, tuple):
        values, target = result[:2]
        columns, classes = [f"x{i}" for i in range(values.shape[-1])], None
    elif isinstance(result, Mapping):
        values, target, columns = result["data"], result["target"], list(result["feature_names"])
        classes = result.get("target_names")
    else:
        values, target, columns, classes = None, None, [], None
    if not isinstance(values, np.ndarray) or np.shape(target) != (len(values),):
        raise DataError(f"scikit-learn's {path} does not give features and one label per row")
    rows: dict[str, Any] = {name: values[:, i].astype(np.float32) for i, name in enumerate(columns)}
    features: dict[str, Any] = dict.fromkeys(columns, datasets.Value("float32"))
    if path == "load_digits":
        rows = {"image": result["images"].astype(np.float32)}
        features = {"image": datasets.Array2D((8, 8), "float32")}
    rows["label"], features["label"] = _target(target, classes)
    return datasets.Dataset.from_dict(rows, datasets.Features(features))


def _target(target: Any, classes: Iterable[Any] | None) -> tuple[Any, Any]:
    if not np.issubdtype(target.dtype, np.integer):
        return target.astype(np.float32), datasets.Value("float32")
    count = int(target.max()) + 1
    names = [str(name) for name in classes] if classes is not None else [str(i) for i in range(count)]
    return target.astype(np.int64), datasets.ClassLabel(names=names[:count])
