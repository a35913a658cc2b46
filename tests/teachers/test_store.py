"""Records on disk: random access, several writers, kills, damage, a full disk."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from potstill.errors import CacheError
from potstill.teachers.store import Store, about_store


def records(ids, width=5, seed=0):
    """Words, counts, lengths and tags that depend on the id alone."""
    ids = np.asarray(ids, np.int64)
    words = (ids[:, None].astype(np.uint64) + np.uint64(seed)) * np.uint64(1_000_003) + np.arange(
        width, dtype=np.uint64
    )
    counts = np.full(len(ids), width)
    return words.reshape(-1), counts, np.zeros(len(ids), np.int64), ids.astype(np.uint64) * np.uint64(7) + np.uint64(1)


def write(store, ids, view=0, **options):
    words, counts, lengths, tags = records(ids, **options)
    store.write(view, np.asarray(ids, np.int64), tags, words, counts, lengths)


def read(store, ids, view=0):
    return store.read(view, np.asarray(ids, np.int64), records(ids)[3])


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "s", {"of": "a teacher"})


def test_records_are_found_by_id_in_any_order_and_any_batch(store):
    for start in range(0, 100, 7):
        write(store, range(start, min(100, start + 7)))
    order = np.random.default_rng(0).permutation(100)
    for some in (order, order[:1], order[10:37]):
        found = read(store, some)
        assert found.whole.all()
        assert np.array_equal(found.words, records(some)[0])


def test_what_was_not_written_is_not_found(store):
    write(store, [3, 4])
    found = read(store, [2, 3, 4, 5, 10**6])
    assert found.whole.tolist() == [False, True, True, False, False]
    assert not found.foreign.any()
    assert np.array_equal(found.words, records([3, 4])[0])
    assert not read(store, [3], view=1).whole.any()


@pytest.mark.parametrize("left", [b"", bytes(31)])
def test_an_index_that_a_killed_process_made_and_gave_no_length(store, left):
    """Another process may be seen at the same point, between the two."""
    (store.folder / "view-00000.index").write_bytes(left)
    assert not read(store, [3]).whole.any()
    write(store, [3, 4])
    assert read(store, [3, 4]).whole.all()


def test_records_of_any_length(store):
    counts = np.array([3, 0, 11, 1])
    words = np.arange(15, dtype=np.uint64) + np.uint64(9)
    lengths, tags = np.array([1, 0, 7, 2]), np.arange(1, 5, dtype=np.uint64)
    store.write(0, np.arange(4), tags, words, counts, lengths)
    found = store.read(0, np.array([2, 0, 3, 1]), tags[[2, 0, 3, 1]])
    assert found.whole.all()
    assert found.counts.tolist() == [11, 3, 1, 0]
    assert found.lengths.tolist() == [7, 1, 2, 0]
    assert found.words.tolist() == [*range(12, 23), 9, 10, 11, 23]


def test_another_question_is_foreign_and_gets_no_words(store):
    write(store, [0, 1, 2])
    tags = records([0, 1, 2])[3]
    tags[1] += np.uint64(1)
    found = store.read(0, np.arange(3), tags)
    assert found.whole.tolist() == [True, False, True]
    assert found.foreign.tolist() == [False, True, False]
    assert np.array_equal(found.words, records([0, 2])[0])


def test_a_store_can_be_opened_again_by_another_reader(store, tmp_path):
    write(store, range(50))
    other = Store(tmp_path / "s", {"of": "a teacher"})  # beside the writer, which is not closed
    assert read(other, range(50)).whole.all()
    write(store, range(50, 5000))
    assert read(other, range(5000)).whole.all()
    store.close()
    assert read(other, range(5000)).whole.all()
    assert read(Store(tmp_path / "s", {"of": "a teacher"}), range(5000)).whole.all()
    assert read(store, range(5000)).whole.all()


def test_closing_gives_unused_space_back(store, tmp_path):
    write(store, range(10))
    path = tmp_path / "s/data-00000.bin"
    assert path.stat().st_size == 2**20
    store.close()
    assert path.stat().st_size == 10 * 5 * 8
    write(store, [10])
    assert read(store, range(11)).whole.all()


def test_a_folder_of_something_else_is_refused(store, tmp_path):
    with pytest.raises(CacheError, match=r"another kind \(they differ in of\)"):
        Store(tmp_path / "s", {"of": "another teacher"})


def test_a_damaged_description_is_written_again(store, tmp_path, caplog):
    write(store, range(5))
    store.close()
    (tmp_path / "s/store.json").write_text("", encoding="utf-8")
    assert about_store(tmp_path / "s") is None
    assert read(Store(tmp_path / "s", {"of": "a teacher"}), range(5)).whole.all()
    assert about_store(tmp_path / "s")["of"] == "a teacher"
    assert "damaged" in caplog.text


@pytest.mark.parametrize("ids", [[-1, 2], [2**40]])
def test_ids_that_are_no_rows_are_refused(store, ids):
    with pytest.raises(CacheError, match="row numbers from 0"):
        write(store, ids)


def test_every_changed_byte_of_a_record_is_found_and_costs_only_that_record(store, tmp_path):
    write(store, range(20))
    store.close()
    path = tmp_path / "s/data-00000.bin"
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(changed))
        found = read(Store(tmp_path / "s", {"of": "a teacher"}), range(20))
        assert np.flatnonzero(found.damaged).tolist() == [place // 40]
        assert np.flatnonzero(~found.whole).tolist() == [place // 40]
        assert found.files == ["data-00000.bin"]
        assert np.array_equal(found.words, records([i for i in range(20) if i != place // 40])[0])


def test_every_changed_byte_of_the_index_is_found(store, tmp_path):
    write(store, range(8))
    store.close()
    path = tmp_path / "s/view-00000.index"
    whole = path.read_bytes()
    for place in range(8 * 32):
        changed = bytearray(whole)
        changed[place] ^= 0x81
        path.write_bytes(bytes(changed))
        found = read(Store(tmp_path / "s", {"of": "a teacher"}), range(8))
        assert np.flatnonzero(~found.whole).tolist() == [place // 32], place


@pytest.mark.parametrize("kept", [0, 1, 39, 40, 41, 799])
def test_a_file_cut_off_anywhere_loses_only_what_was_cut(store, tmp_path, kept):
    write(store, range(20))
    store.close()
    path = tmp_path / "s/data-00000.bin"
    path.write_bytes(path.read_bytes()[:kept])
    again = Store(tmp_path / "s", {"of": "a teacher"})
    found = read(again, range(20))
    assert int(found.whole.sum()) == kept // 40
    missing = np.flatnonzero(~found.whole)
    write(again, missing)
    assert read(again, range(20)).whole.all()


def test_a_lost_data_file_is_made_again(store, tmp_path):
    write(store, range(20))
    store.close()
    (tmp_path / "s/data-00000.bin").unlink()
    found = read(Store(tmp_path / "s", {"of": "a teacher"}), range(20))
    assert found.damaged.all()


def _fill(folder: Path, part: int, parts: int) -> None:
    store = Store(folder, {"of": "a teacher"})
    for start in range(0, 4000, 50):
        write(store, range(start + part, start + 50, parts))
    store.close()


def test_several_processes_write_at_once(tmp_path):
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_fill, args=(tmp_path / "s", part, 3)) for part in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    found = read(Store(tmp_path / "s", {"of": "a teacher"}), range(4000))
    assert found.whole.all()
    assert np.array_equal(found.words, records(range(4000))[0])


FULL = """
import resource, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_store import read, write
from pathlib import Path
from potstill.teachers.store import Store
store = Store(Path(sys.argv[1]), {"of": "a teacher"})
write(store, range(100), width=5)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # a file may not be longer than the one that is there
try:
    for start in range(100, 100000, 1000):
        write(store, range(start, start + 1000), width=200)
except OSError as error:
    print("refused", start)
    print(int(read(store, range(100)).whole.sum()))
    write(store, range(100, 110))
"""


def test_without_space_what_was_written_stays_readable(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "s"), str(Path(__file__).parent)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused", "100", "100"]
    found = read(Store(tmp_path / "s", {"of": "a teacher"}), range(111))
    assert found.whole.tolist() == [True] * 110 + [False]


def test_memory_does_not_grow_with_what_was_read(store, monkeypatch):
    monkeypatch.setattr("potstill.teachers.store._KEPT", 1000)
    for start in range(0, 2000, 100):
        write(store, range(start, start + 100))
    for start in range(0, 2000, 100):  # pages are given back in between, and nothing is lost
        assert np.array_equal(read(store, range(start, start + 100)).words, records(range(start, start + 100))[0])
