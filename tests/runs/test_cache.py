"""The cache that all runs share: whole entries, a limit, and hashes of content alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, concatenate_datasets

from potstill.errors import RunError
from potstill.runs.cache import DEFAULT_LIMIT, Cache, content_hash, table_hash


@pytest.fixture
def source(tmp_path):
    """Makes a folder of a given size to be stored."""

    def make(name: str, size: int = 100, files: int = 2) -> Path:
        folder = tmp_path / "sources" / name
        for number in range(files):
            path = folder / ("sub" if number else ".") / f"{number}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode().ljust(size // files, b"."))
        return folder

    return make


def used(cache: Cache, kind: str, key: str, seconds_ago: float) -> None:
    at = time.time() - seconds_ago
    os.utime(cache.root / kind / key / ".used", (at, at))


def keys(cache: Cache) -> set[str]:
    return {entry.key for entry in cache.entries()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_stored_and_fetched(tmp_path, source):
    cache, folder = Cache(tmp_path / "cache"), source("a")
    target = tmp_path / "run" / "models" / "teacher"
    assert not cache.fetch("teachers", "k1", target)
    assert not target.exists()
    cache.store("teachers", "k1", folder)
    assert cache.fetch("teachers", "k1", target)
    assert contents(target) == contents(folder)  # the whole of it, and nothing of the cache's own
    assert not cache.fetch("students", "k1", target)
    assert [path.name for path in target.parent.iterdir()] == ["teacher"]


def test_fetch_replaces_what_half_a_run_left(tmp_path, source):
    cache, target = Cache(tmp_path / "cache"), tmp_path / "teacher"
    cache.store("teachers", "k", source("a"))
    target.mkdir()
    (target / "old.bin").write_bytes(b"old")
    cache.fetch("teachers", "k", target)
    assert contents(target) == contents(source("a"))


def test_changing_what_was_fetched_does_not_change_the_cache(tmp_path, source):
    cache, target = Cache(tmp_path / "cache"), tmp_path / "teacher"
    cache.store("teachers", "k", source("a"))
    cache.fetch("teachers", "k", target)
    (target / "0.bin").write_bytes(b"changed")
    cache.fetch("teachers", "k", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source("a"))


def test_the_first_one_stored_stays(tmp_path, source):
    """Two runs that train the same teacher at once: the second must not pull it away from a third that reads it."""
    cache = Cache(tmp_path / "cache")
    cache.store("teachers", "k", source("first"))
    cache.store("teachers", "k", source("second"))
    cache.fetch("teachers", "k", tmp_path / "got")
    assert contents(tmp_path / "got") == contents(source("first"))


def test_entries_the_most_recently_used_first(tmp_path, source):
    cache = Cache(tmp_path / "cache")
    assert cache.entries() == []
    for number, key in enumerate(("old", "new", "mid")):
        cache.store("teachers" if number else "answers", key, source(key, 100 + 10 * number))
    for key, seconds, kind in (("old", 300, "answers"), ("new", 10, "teachers"), ("mid", 100, "teachers")):
        used(cache, kind, key, seconds)
    found = cache.entries()
    assert [(entry.kind, entry.key, entry.bytes) for entry in found] == [
        ("teachers", "new", 110),
        ("teachers", "mid", 120),
        ("answers", "old", 100),
    ]
    assert found[0].used == pytest.approx(time.time() - 10, abs=5)
    assert found[0].path.is_dir()


def test_the_limit_deletes_what_was_used_longest_ago(tmp_path, source):
    cache = Cache(tmp_path / "cache", limit=350)
    for number, key in enumerate("abc"):
        cache.store("teachers", key, source(key, 100))
        used(cache, "teachers", key, 100 - number)
    cache.fetch("teachers", "a", tmp_path / "got")  # used now, so b is the oldest
    cache.store("teachers", "d", source("d", 100))
    assert keys(cache) == {"a", "c", "d"}
    cache.store("teachers", "e", source("e", 220))
    assert keys(cache) == {"d", "e"}


def test_what_is_stored_last_stays_even_if_it_is_too_large(tmp_path, source):
    """The run that has just trained a teacher of 20 GiB must still find it there."""
    cache = Cache(tmp_path / "cache", limit=150)
    cache.store("teachers", "a", source("a", 100))
    cache.store("teachers", "huge", source("huge", 1000))
    assert keys(cache) == {"huge"}
    cache.store("teachers", "b", source("b", 100))
    assert keys(cache) == {"b"}


def test_clear(tmp_path, source):
    cache = Cache(tmp_path / "cache")
    for kind, key, seconds in (("teachers", "a", 500), ("teachers", "b", 5), ("answers", "c", 500)):
        cache.store(kind, key, source(key, 100))
        used(cache, kind, key, seconds)
    assert cache.clear("teachers", older_than_s=100) == 100
    assert keys(cache) == {"b", "c"}
    assert cache.clear("nothing") == 0
    assert cache.clear("answers") == 100
    assert cache.clear() == 100
    assert cache.entries() == []


def test_what_a_killed_process_left_goes_with_the_next_store(tmp_path, source):
    """Half an entry is never found, and must not fill the disk for ever either."""
    cache = Cache(tmp_path / "cache")
    left = tmp_path / "cache" / "teachers" / ".staged-abc"
    left.mkdir(parents=True)
    (left / "half.bin").write_bytes(b"x" * 100)
    assert cache.entries() == []
    cache.store("teachers", "k", source("a"))
    assert not left.exists()
    assert keys(cache) == {"k"}


def test_where_and_how_much(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("POTSTILL_CACHE_LIMIT", raising=False)
    assert Cache().root == tmp_path / "elsewhere"
    assert Cache().limit == DEFAULT_LIMIT
    monkeypatch.setenv("POTSTILL_CACHE_LIMIT", "12345")
    assert Cache().limit == 12345
    assert Cache(limit=0).limit == 0
    monkeypatch.setenv("POTSTILL_CACHE_LIMIT", "10GB")
    with pytest.raises(RunError, match="POTSTILL_CACHE_LIMIT to be a number of bytes, got '10GB'"):
        Cache()


WORK = """
import random, sys
from pathlib import Path
from potstill.runs.cache import Cache
root, name = Path(sys.argv[1]), sys.argv[2]
cache, rng = Cache(root / "cache", limit=1500), random.Random(name)
for turn in range(60):
    key = str(rng.randrange(8))
    folder = root / name / str(turn)
    folder.mkdir(parents=True)
    for part in range(3):
        (folder / f"{part}.bin").write_text(f"{key}:{name}:{turn}".ljust(100))
    cache.store("teachers", key, folder)
    target = root / name / f"got-{turn}"
    if cache.fetch("teachers", key, target):
        found = {(target / f"{part}.bin").read_text() for part in range(3)}
        assert len(found) == 1, found
        assert found.pop().startswith(key + ":")
        assert len(list(target.iterdir())) == 3
print("fine")
"""


def test_two_processes_store_fetch_and_trim_at_once(tmp_path):
    """A fetch that meets a trim or another store gives a whole entry or none, never half of one."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(tmp_path), name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=60)
        assert out == "fine\n", err
    cache = Cache(tmp_path / "cache", limit=1500)
    assert sum(entry.bytes for entry in cache.entries()) <= 1500
    assert not list((tmp_path / "cache" / "teachers").glob(".staged-*"))
    writers = {(entry.path / "0.bin").read_text().split(":")[1] for entry in cache.entries()}
    assert writers <= {"one", "two"}


def test_content_hash_does_not_depend_on_the_order_of_keys():
    tree = {"a": [1, 2.5, None, "ü"], "b": {"x": True, "y": "1"}}
    shuffled = {"b": {"y": "1", "x": True}, "a": [1, 2.5, None, "ü"]}
    assert content_hash(tree) == content_hash(shuffled)
    assert len(content_hash(tree)) == 32
    int(content_hash(tree), 16)


@pytest.mark.parametrize(
    "other", [{"a": [2, 1]}, {"a": [1, 2], "b": None}, {"a": ["1", 2]}, {"a": [1, 2.5]}, {"A": [1, 2]}, {"a": (1,)}]
)
def test_content_hash_tells_values_apart(other):
    assert content_hash({"a": [1, 2]}) != content_hash(other)


def test_content_hash_is_the_same_tomorrow():
    """Else every new version of Python would train every teacher again. The number was written down, not computed."""
    assert content_hash({"name": "a", "seed": 0, "x": [1, None, 2.5]}) == "24e2d3aa9c50aaa7d176ecc0c9765001"


def table(size: int = 50) -> Dataset:
    texts = [str(i) if i % 3 else None for i in range(size)]
    made = Dataset.from_dict({"x": list(range(size)), "s": texts, "v": list(np.arange(size * 4.0).reshape(size, 2, 2))})
    return made.add_column("label", [i % 2 for i in range(size)], feature=ClassLabel(names=["no", "yes"]))


def test_table_hash_is_about_the_values_alone(tmp_path):
    """The same rows from one file or ten, in memory or by indices, are the same teacher's data."""
    whole = table()
    expected = table_hash(whole)
    assert table_hash(table()) == expected
    assert table_hash(concatenate_datasets([whole.select(range(17)), whole.select(range(17, 50))])) == expected
    order = list(range(50))
    random.Random(0).shuffle(order)
    back = [order.index(i) for i in range(50)]
    assert table_hash(whole.select(order).select(back)) == expected
    whole.save_to_disk(tmp_path / "saved", num_shards=3)
    assert table_hash(Dataset.load_from_disk(tmp_path / "saved")) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.select(range(49)),
        lambda t: t.select([1, 0, *range(2, 50)]),
        lambda t: t.rename_column("x", "z"),
        lambda t: t.remove_columns("s"),
        lambda t: t.map(lambda row: {"s": "a" if row["x"] == 49 else row["s"]}, load_from_cache_file=False),
        lambda t: t.cast_column("label", ClassLabel(names=["yes", "no"])),
    ],
    ids=["one row less", "another order", "another name", "a column less", "one value", "other class names"],
)
def test_table_hash_tells_tables_apart(change):
    """A teacher of other data taken from the cache would be a wrong result that nobody sees."""
    assert table_hash(change(table())) != table_hash(table())
