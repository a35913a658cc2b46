"""The user's cache: trained teachers and more, by content hash, shared by all runs.

It lies in ``POTSTILL_CACHE``, else in the platform's cache folder, and keeps to ``POTSTILL_CACHE_LIMIT`` bytes (10 GiB)
by deleting what was used longest ago.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from potstill.errors import RunError

DEFAULT_LIMIT = 10 * 2**30
_USED = ".used"


@dataclass(frozen=True)
class Entry:
    """One thing in the cache: its kind (``teachers``), key, size in bytes and when it was last used (epoch seconds)."""

    kind: str
    key: str
    bytes: int
    used: float
    path: Path


class Cache:
    """Folders by content hash.

    Args:
        root: where; ``POTSTILL_CACHE`` or the platform's folder if omitted.
        limit: bytes to keep to; ``POTSTILL_CACHE_LIMIT`` or 10 GiB if omitted.
    """

    def __init__(self, root: Path | None = None, limit: int | None = None) -> None:
        chosen = os.environ.get("POTSTILL_CACHE") or platformdirs.user_cache_dir("potstill", appauthor=False)
        self.root = Path(chosen if root is None else root).expanduser()
        self.limit = limit if limit is not None else _limit()

    def find(self, kind: str, key: str) -> Path | None:
        """Return the folder of an entry, or ``None``; it counts as used now."""
        path = self.root / kind / key
        if not path.is_dir():
            return None
        (path / _USED).touch()
        return path

    def used(self, path: Path) -> None:
        """Note that an entry that was written in place is used now, and make room for it."""
        with self._locked():
            if path.is_dir():
                (path / _USED).touch()
                self._trim(keep=path)

    def fetch(self, kind: str, key: str, target: Path) -> bool:
        """Copy an entry to ``target``, whole or not at all, and return whether there is one."""
        with self._locked():
            found = self.find(kind, key)
            if found is None:
                return False
            staged = target.with_name(target.name + f".{os.getpid()}.tmp")
            shutil.rmtree(staged, ignore_errors=True)
            shutil.copytree(found, staged, ignore=shutil.ignore_patterns(_USED))
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)
        return True

    def store(self, kind: str, key: str, source: Path) -> None:
        """Copy a folder into the cache, unless it is there already, and make room for it."""
        with self._locked():
            target = self.root / kind / key
            if target.exists():
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            for left in target.parent.glob(".staged-*"):  # by a process that was killed, for the lock is ours
                shutil.rmtree(left)
            staged = Path(tempfile.mkdtemp(prefix=".staged-", dir=target.parent))
            shutil.copytree(source, staged, dirs_exist_ok=True)
            (staged / _USED).touch()
            staged.rename(target)
            self._trim(keep=target)

    def entries(self) -> list[Entry]:
        """Return everything in the cache, the most recently used first."""
        found = []
        for path in self.root.glob("*/*"):
            if path.is_dir() and not path.name.startswith("."):
                try:  # others may write to it, or delete it
                    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                    used = (path / _USED).stat().st_mtime if (path / _USED).exists() else path.stat().st_mtime
                except FileNotFoundError:
                    continue
                found.append(Entry(path.parent.name, path.name, size, used, path))
        return sorted(found, key=lambda entry: -entry.used)

    def clear(self, kind: str | None = None, older_than_s: float = 0.0) -> int:
        """Delete entries, of one kind or all, unused for that many seconds; return the bytes freed."""
        with self._locked():
            now = time.time()
            doomed = [e for e in self.entries() if kind in (None, e.kind) and now - e.used >= older_than_s]
            for entry in doomed:
                shutil.rmtree(entry.path, ignore_errors=True)
        return sum(entry.bytes for entry in doomed)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self.root / ".lock")):
            yield

    def _trim(self, keep: Path) -> None:
        total = 0
        for entry in self.entries():
            total += entry.bytes
            if total > self.limit and entry.path != keep:
                shutil.rmtree(entry.path, ignore_errors=True)


def _limit() -> int:
    wanted = os.environ.get("POTSTILL_CACHE_LIMIT") or str(DEFAULT_LIMIT)
    if not wanted.isdecimal():
        raise RunError(f"expected POTSTILL_CACHE_LIMIT to be a number of bytes, got '{wanted}'")
    return int(wanted)


def content_hash(value: Any) -> str:
    """Return a hash of plain data, independent of the order of keys: 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def table_hash(table: Any) -> str:
    """Return a hash of every value in a ``datasets.Dataset``, in order, whatever files it came from."""
    digest = hashlib.blake2b(repr(table.features).encode(), digest_size=16)
    for chunk in table.with_format("arrow").iter(batch_size=4096):
        for column in chunk.column_names:
            digest.update(column.encode())
            digest.update(_bytes(chunk.column(column).combine_chunks()))
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return a hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _bytes(piece: Any) -> bytes:
    import pyarrow as pa

    batch = pa.record_batch([pa.concat_arrays([piece])], names=["x"])
    return bytes(batch.serialize())
