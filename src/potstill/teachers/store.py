"""Records on disk that are found by (view, sample id) and never used where they are stale, foreign or damaged.

A folder holds one index a view, with a slot of 32 bytes for each sample id, and data files to which each process
appends records of its own. A slot names the record, what it is an answer to (its tag) and a checksum of both, so a
process may be killed at any byte: what it did not finish is not there. Files are mapped into memory and read and
written by whole batches.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from potstill.errors import CacheError

logger = logging.getLogger("potstill")

Words = NDArray[np.uint64]
Ints = NDArray[np.int64]

FORMAT = 1
_ABOUT = "store.json"
_TAG, _CHECK, _PLACE, _SIZE = range(4)
_SLOT = 4
SLOT_BYTES = 8 * _SLOT
"""Bytes that a record takes beside its words."""
_BITS = np.uint64(40)
_LOW = np.uint64((1 << 40) - 1)
_FEWEST_SLOTS = 1024
MOST_IDS = 1 << 28
"""Sample ids are below this: each takes a place in the index."""
_SMALLEST, _LARGEST = 2**20, 2**30
_AROUND = 2**16
"""Bytes around a place that the system maps with it."""
_KEPT = 2**30
"""Bytes that may be read or written through mappings before the pages are given back."""


@dataclass
class Found:
    """What a read found, sample by sample.

    Attributes:
        whole: bool ``[B]``: a record that answers this very question and is undamaged.
        foreign: bool ``[B]``: there is one, and it answers another question.
        damaged: bool ``[B]``: there was one, and its bytes are not those that were written.
        words: the whole records' words, one after another, in the order of the samples.
        counts: int64 ``[B]``: words of each; 0 where there is none.
        lengths: int64 ``[B]``: tokens of each.
        files: names of the data files with damaged records.
    """

    whole: NDArray[np.bool_]
    foreign: NDArray[np.bool_]
    damaged: NDArray[np.bool_]
    words: Words
    counts: Ints
    lengths: Ints
    files: list[str]


class Store:
    """The records of one teacher on one data set.

    Args:
        folder: made if missing.
        about: what the records are, as plain JSON; kept in the folder, and compared with what is there.

    Raises:
        CacheError: the folder holds records of something else.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.about = {"format": FORMAT, **about}
        self._indexes: dict[int, np.memmap[Any, Any]] = {}
        self._files: dict[int, np.memmap[Any, Any]] = {}
        self._own: tuple[int, np.memmap[Any, Any]] | None = None
        self._used = 0
        self._next_size = _SMALLEST
        self._touched = 0
        self._records = self._words = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ".used").touch()  # by which a full cache knows what was used last
        known = about_store(self.folder)
        if known is None:
            staged = self.folder / f"{_ABOUT}.{os.getpid()}.tmp"
            staged.write_text(json.dumps(self.about, indent=1), encoding="utf-8")
            staged.replace(self.folder / _ABOUT)
        elif known != json.loads(json.dumps(self.about)):
            keys = sorted(key for key in {*known, *self.about} if known.get(key) != self.about.get(key))
            raise CacheError(
                f"{self.folder} holds answers of another kind (they differ in {', '.join(keys)}); choose another "
                "folder, or delete it"
            )

    # ---- reading ---------------------------------------------------------------------------------------------------

    def read(self, view: int, ids: Ints, tags: Words) -> Found:
        """Return the records of these samples.

        Args:
            view: which random view of the samples.
            ids: int64 ``[B]``, sample ids.
            tags: uint64 ``[B]``, above 0: what is asked.
        """
        slots = self._slots(view, ids)
        alike = self._read_alike(slots, tags)
        if alike is not None:
            return alike
        same = slots[:, _TAG] == tags
        foreign = (slots[:, _TAG] != 0) & ~same
        counts = np.where(same, slots[:, _SIZE] & _LOW, np.uint64(0)).astype(np.int64)
        lengths = np.where(same, slots[:, _SIZE] >> _BITS, np.uint64(0)).astype(np.int64)
        files, starts = (slots[:, _PLACE] >> _BITS).astype(np.int64), (slots[:, _PLACE] & _LOW).astype(np.int64)
        reachable = self._reachable(files, starts, counts, same)
        counts = np.where(reachable, counts, 0)
        words = self._gathered(files, starts, counts)
        whole = reachable & (_checksum(words, counts, lengths, tags) == slots[:, _CHECK])
        damaged = same & ~whole
        if damaged.any():
            words = words[np.repeat(whole, counts)]
            counts = np.where(whole, counts, 0)
        names = [_file_name(int(number)) for number in np.unique(files[damaged])]
        return Found(whole, foreign, damaged, words, counts, lengths, names)

    def _read_alike(self, slots: Words, tags: Words) -> Found | None:
        """Return records that are all there, of one size and in one file: what most batches find. Else ``None``."""
        size, number = slots[0, _SIZE] if len(slots) else 0, int(slots[0, _PLACE] >> _BITS) if len(slots) else 0
        width = int(size) & int(_LOW)
        if not width or (slots[:, _TAG] != tags).any() or (slots[:, _SIZE] != size).any():
            return None
        starts = (slots[:, _PLACE] & _LOW).astype(np.int64)
        data = self._data(number)
        if data is None or ((slots[:, _PLACE] >> _BITS) != number).any() or int(starts.max()) + width > len(data):
            return None
        counts, lengths = np.full(len(slots), width), np.full(len(slots), int(size) >> int(_BITS))
        words = _take(data, starts, counts, width)
        if (_checksum(words, counts, lengths, tags, width) != slots[:, _CHECK]).any():
            return None
        self._touch(len(slots), words.nbytes)
        none = np.zeros(len(slots), np.bool_)
        return Found(~none, none, none, words, counts, lengths, [])

    def _slots(self, view: int, ids: Ints) -> Words:
        if view not in self._indexes and not (self.folder / _index_name(view)).exists():
            return np.zeros((len(ids), _SLOT), np.uint64)
        index = self._index(view)
        inside = ids < len(index)
        if not inside.all():
            index = self._index(view, fresh=True)  # another process may have made it longer
            inside = ids < len(index)
        if inside.all():
            return np.asarray(index[ids])
        slots = np.zeros((len(ids), _SLOT), np.uint64)
        slots[inside] = index[ids[inside]]
        return slots

    def _reachable(self, files: Ints, starts: Ints, counts: Ints, same: NDArray[np.bool_]) -> NDArray[np.bool_]:
        reachable = same.copy()
        for number in np.unique(files[same]):
            chosen = same & (files == number)
            data = self._data(int(number))
            end = int((starts[chosen] + counts[chosen]).max())
            if data is None or end > len(data):
                data = self._data(int(number), fresh=True)
            reachable[chosen] = False if data is None else (starts[chosen] + counts[chosen]) <= len(data)
        return reachable

    def _gathered(self, files: Ints, starts: Ints, counts: Ints) -> Words:
        """Return the words of all records, one record after another."""
        total = int(counts.sum())
        self._touch(len(counts), 8 * total)
        numbers = np.unique(files[counts > 0])
        if len(numbers) == 1:
            return _take(self._files[int(numbers[0])], starts, counts)
        words = np.empty(total, np.uint64)
        for number in numbers:
            chosen = (files == number) & (counts > 0)
            words[np.repeat(chosen, counts)] = _take(self._files[int(number)], starts[chosen], counts[chosen])
        return words

    # ---- writing ---------------------------------------------------------------------------------------------------

    def write(self, view: int, ids: Ints, tags: Words, words: Words, counts: Ints, lengths: Ints) -> None:
        """Add the records of these samples; one that is there already is replaced.

        Args:
            view: which random view of the samples.
            ids: int64 ``[B]``, sample ids, at least 0.
            tags: uint64 ``[B]``, above 0: what the records answer.
            words: uint64, the records one after another.
            counts: int64 ``[B]``: words of each.
            lengths: int64 ``[B]``: tokens of each, 0 where they have none.

        Raises:
            OSError: no space is left; everything written before stays readable.
            CacheError: an id that is no row number.
        """
        if not len(ids):
            return
        if ids.min() < 0 or ids.max() >= MOST_IDS:
            raise CacheError(f"expected sample_id to be row numbers from 0, got {ids.min()} to {ids.max()}")
        index = self._index(view)
        if ids.max() >= len(index):
            index = self._longer_index(view, int(ids.max()) + 1)
        number, data = self._room(len(words))
        start = self._used
        data[start : start + len(words)] = words
        self._used += len(words)
        starts = start + np.cumsum(counts) - counts
        slots = np.empty((len(ids), _SLOT), np.uint64)
        slots[:, _TAG] = tags
        slots[:, _CHECK] = _checksum(words, counts, lengths, tags)
        slots[:, _PLACE] = (np.uint64(number) << _BITS) | starts.astype(np.uint64)
        slots[:, _SIZE] = (lengths.astype(np.uint64) << _BITS) | counts.astype(np.uint64)
        index[ids] = slots
        self._records, self._words = self._records + len(ids), self._words + len(words)
        self._touch(1, 8 * len(words))

    @property
    def bytes_per_record(self) -> float:
        """Bytes of a record that was written here, its slot included, in the mean; 0 before the first."""
        return 8 * (self._words / self._records + _SLOT) if self._records else 0.0

    def _room(self, words: int) -> tuple[int, np.memmap[Any, Any]]:
        """Return this process's own data file, a new one where the last is full."""
        if self._own is not None and self._used + words <= len(self._own[1]):
            return self._own
        self._seal()
        size = max(self._next_size, 8 * words)
        while True:
            number, path = self._new_file()
            try:
                _allocate(path, size)
                break
            except OSError:
                path.unlink(missing_ok=True)
                if size <= max(8 * words, _SMALLEST):
                    raise
                size = max(size // 4, 8 * words)  # less room may be left than would be convenient
        self._next_size = min(2 * size, _LARGEST)
        self._own = number, np.memmap(path, np.uint64, "r+")
        self._files[number], self._used = self._own[1], 0
        return self._own

    def _new_file(self) -> tuple[int, Path]:
        taken = [int(path.stem.removeprefix("data-")) for path in self.folder.glob("data-*.bin")]
        number = max(taken, default=-1) + 1
        while True:
            path = self.folder / _file_name(number)
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644))
                return number, path
            except FileExistsError:
                number += 1

    def _seal(self) -> None:
        """Give back what is left of this process's data file."""
        if self._own is None:
            return
        number, data = self._own
        data.flush()
        self._own = None
        self._files.pop(number, None)
        path, used = self.folder / _file_name(number), 8 * self._used
        del data
        if path.exists():
            if used:
                os.truncate(path, used)
            else:
                path.unlink()

    def close(self) -> None:
        """Give back unused space and every mapping; the store can be used again."""
        self._seal()
        self._files.clear()
        self._indexes.clear()

    # ---- files -----------------------------------------------------------------------------------------------------

    def _index(self, view: int, *, fresh: bool = False) -> np.memmap[Any, Any]:
        if fresh or view not in self._indexes:
            path = self.folder / _index_name(view)
            if not path.exists() or path.stat().st_size < SLOT_BYTES:  # made, and not yet given its length
                return self._longer_index(view, _FEWEST_SLOTS)
            self._indexes[view] = _mapped_index(path)
        return self._indexes[view]

    def _longer_index(self, view: int, samples: int) -> np.memmap[Any, Any]:
        path = self.folder / _index_name(view)
        with FileLock(str(self.folder / ".lock")):
            known = path.stat().st_size // (8 * _SLOT) if path.exists() else 0
            if samples > known:
                wanted = _FEWEST_SLOTS
                while wanted < samples:
                    wanted *= 2
                path.touch()
                _allocate(path, wanted * 8 * _SLOT)
        self._indexes[view] = _mapped_index(path)
        return self._indexes[view]

    def _data(self, number: int, *, fresh: bool = False) -> np.memmap[Any, Any] | None:
        if self._own is not None and self._own[0] == number:
            return self._own[1]
        path = self.folder / _file_name(number)
        if number in self._files and not fresh:  # its owner may have cut off what it did not use
            fresh = not path.exists() or path.stat().st_size < self._files[number].nbytes
        if fresh or number not in self._files:
            self._files.pop(number, None)
            size = path.stat().st_size // 8 if path.exists() else 0
            if not size:
                return None
            self._files[number] = np.memmap(path, np.uint64, "r", shape=(size,))
        return self._files[number]

    def _touch(self, places: int, size: int) -> None:
        """Give the pages back now and then, so that memory does not grow with what was read in so many places."""
        self._touched += size + _AROUND * places
        if self._touched > _KEPT:
            self._touched = 0
            for each in (*self._files.values(), *self._indexes.values()):
                mapping: Any = getattr(each, "_mmap", None)
                if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
                    mapping.madvise(mmap.MADV_DONTNEED)


def about_store(folder: Path) -> dict[str, Any] | None:
    """Return what the records of a folder are, or ``None`` where nothing says so."""
    path = folder / _ABOUT
    if not path.is_file():
        return None
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        logger.warning("%s is damaged and written again", path)
        return None
    return about


def _index_name(view: int) -> str:
    return f"view-{view:05d}.index"


def _file_name(number: int) -> str:
    return f"data-{number:05d}.bin"


def _mapped_index(path: Path) -> np.memmap[Any, Any]:
    return np.memmap(path, np.uint64, "r+", shape=(path.stat().st_size // SLOT_BYTES, _SLOT))


def _allocate(path: Path, size: int) -> None:
    """Make a file this long, its space set aside now: a full disk is an error here and not a crash later."""
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        file.seek(0, os.SEEK_END)
        while file.tell() < size:
            file.write(bytes(min(2**20, size - file.tell())))


def _take(data: np.memmap[Any, Any], starts: Ints, counts: Ints, width: int = 0) -> Words:
    """Return records of one data file, one after another; ``width`` if it is known that all have so many words."""
    width = width or _width(counts)
    if width and not (starts % width).any():
        rows = data[: len(data) // width * width].view(np.ndarray).reshape(-1, width)
        return rows[starts // width].reshape(-1)
    ends = np.cumsum(counts)
    places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
    return np.asarray(data[places])


def _width(counts: Ints) -> int:
    """Return the words of each record where all have as many, else 0."""
    width = int(counts[0]) if len(counts) else 0
    return width if width and bool((counts == width).all()) else 0


def _checksum(words: Words, counts: Ints, lengths: Ints, tags: Words, width: int = 0) -> Words:
    """Return a multilinear hash of each record, its tag and its length: uint64 ``[B]``."""
    width = width or _width(counts)
    if width:
        sums = np.einsum("ij,j->i", words.reshape(-1, width), _factors(width))
    else:
        ends = np.cumsum(counts)
        place = np.arange(len(words)) - np.repeat(ends - counts, counts)
        products = words * _factors(int(counts.max(initial=1)))[place]
        running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(products, dtype=np.uint64)])
        sums = running[ends] - running[ends - counts]
    about = (lengths.astype(np.uint64) << _BITS) + counts.astype(np.uint64) + np.uint64(1)
    mixed: Words = sums + tags * np.uint64(0x9E3779B97F4A7C15) + about * np.uint64(0xBF58476D1CE4E5B9)
    return mixed


_FACTORS: list[Words] = [np.zeros(0, np.uint64)]


def _factors(count: int) -> Words:
    """Return odd random numbers; the first ones do not depend on how many."""
    block = 1 << 16
    while len(_FACTORS[0]) < count:
        drawn = np.random.default_rng([11, len(_FACTORS[0]) // block]).integers(0, 2**64, block, dtype=np.uint64)
        _FACTORS[0] = np.concatenate([_FACTORS[0], drawn | np.uint64(1)])
    return _FACTORS[0][:count]
