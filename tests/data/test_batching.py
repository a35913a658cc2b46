"""Data sets that hand out ready batches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from potstill.data.batching import InMemory, Lazy, batches


def columns(size: int = 7) -> dict[str, torch.Tensor]:
    return {"sample_id": torch.arange(size) * 11, "x": torch.arange(size * 2.0).view(size, 2)}


def stamped(batch, epoch, lookup):
    """A view that shows which epoch it was made for."""
    return {**batch, "x": batch["x"] + 1000 * epoch}


class Many(InMemory):
    """Notes how often it was asked, to see that a loader asks once a batch."""

    asked = 0

    def __getitems__(self, indices):
        type(self).asked += 1
        return super().__getitems__(indices)


def test_a_batch_is_the_rows_in_the_order_asked_for():
    data = InMemory(columns())
    assert len(data) == 7
    batch = data.__getitems__([5, 0, 5])
    assert batch["sample_id"].tolist() == [55, 0, 55]
    assert batch["x"].tolist() == [[10, 11], [0, 1], [10, 11]]


def test_one_sample_has_no_batch_axis():
    sample = InMemory(columns())[3]
    assert sample["sample_id"].item() == 33
    assert sample["x"].tolist() == [6, 7]


def test_a_batch_is_a_copy():
    """A view that writes in place must not spoil the data for every later epoch."""
    data = InMemory(columns(), lambda batch, epoch, lookup: {**batch, "x": batch["x"].mul_(0)})
    data.__getitems__([0, 1, 2])
    assert data.columns["x"].tolist() == columns()["x"].tolist()


def test_batches_in_order_the_last_one_smaller():
    found = list(batches(InMemory(columns()), 3))
    assert [len(batch["x"]) for batch in found] == [3, 3, 1]
    assert torch.cat([batch["sample_id"] for batch in found]).tolist() == columns()["sample_id"].tolist()
    assert list(batches(InMemory(columns(0)), 3)) == []


def test_views_get_the_epoch_and_a_look_at_other_samples():
    seen = []

    def view(batch, epoch, lookup):
        seen.append((epoch, lookup(torch.tensor([6, 7, 20]))["sample_id"].tolist()))
        return batch

    data = InMemory(columns(), view)
    data.__getitems__([0])
    data.set_epoch(4)
    data.__getitems__([0])
    assert seen == [(0, [66, 0, 66]), (4, [66, 0, 66])]  # places are taken modulo the number of samples


def test_what_a_view_looks_up_has_no_view_itself():
    def view(batch, epoch, lookup):
        return {**batch, "other": lookup(torch.tensor([1]))["x"], "x": batch["x"] + 1}

    assert InMemory(columns(), view).__getitems__([0])["other"].tolist() == [[2, 3]]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_a_loader_see_the_epoch(workers):
    """Persistent workers hold copies of the data set; with a plain attribute they would show epoch 0 for ever."""
    data = InMemory(columns(), stamped)
    loader = DataLoader(
        data, batch_size=3, collate_fn=lambda batch: batch, num_workers=workers, persistent_workers=workers > 0
    )
    for epoch in range(3):
        data.set_epoch(epoch)
        found = torch.cat([batch["x"] for batch in loader])
        assert torch.equal(found, columns()["x"] + 1000 * epoch)


def test_a_loader_asks_once_a_batch():
    """Sample by sample, a table that fits into memory would be read a hundred times slower."""
    Many.asked = 0
    loader = DataLoader(Many(columns()), batch_size=3, collate_fn=lambda batch: batch)
    assert [len(batch["x"]) for batch in loader] == [3, 3, 1]
    assert Many.asked == 3


def test_lazy_reads_what_is_asked_for_and_nothing_else():
    read = []

    def reader(indices):
        read.append(indices)
        return {"pixels": torch.tensor(indices) * 100}

    data = Lazy(columns(), reader, stamped)
    assert len(data) == 7
    assert read == []
    batch = data.__getitems__([4, 2])
    assert batch["pixels"].tolist() == [400, 200]
    assert batch["sample_id"].tolist() == [44, 22]
    assert batch["x"].tolist() == [[8, 9], [4, 5]]
    assert data[6]["pixels"].item() == 600
    assert read == [[4, 2], [6]]


def test_lazy_lookups_read_too():
    data = Lazy(
        columns(),
        lambda indices: {"pixels": torch.tensor(indices)},
        lambda batch, epoch, lookup: {**batch, "partner": lookup(torch.tensor([8, 3]))["pixels"]},
    )
    assert data.__getitems__([0])["partner"].tolist() == [1, 3]
