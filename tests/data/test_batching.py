"""Data sets that hand out ready batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from potstill.data.batching import InMemory, Lazy, LengthSampler, batches, length_order


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


# like lengths together


class Lengthy(InMemory):
    """Samples with lengths: many short ones, a few long ones."""

    def __init__(self, size: int) -> None:
        super().__init__({"sample_id": torch.arange(size)})
        self.lengths = np.random.default_rng(0).geometric(0.05, size).clip(2, 128)


def padded(lengths: np.ndarray, order: list[int], batch_size: int) -> int:
    """Places of all batches of this order, each as long as its longest sample."""
    parts = [lengths[order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    return sum(len(part) * int(part.max()) for part in parts)


@pytest.mark.parametrize("size", [1, 3, 8, 9, 64, 65, 1003])
def test_every_sample_comes_once(size):
    sampler = LengthSampler(Lengthy(size), 8, seed=0, pool=4)
    assert len(sampler) == size
    assert sorted(sampler) == list(range(size))
    assert all(type(place) is int for place in sampler)


def test_the_order_is_a_function_of_seed_and_epoch():
    """A training that was stopped in epoch 2 must go on with the batches that it would have seen."""
    data = Lengthy(300)
    np.random.seed(1)
    sampler = LengthSampler(data, 8, seed=3)
    orders = []
    for epoch in range(3):
        data.set_epoch(epoch)
        orders.append(list(sampler))
        np.random.random(5)
        torch.randn(5)
        assert list(sampler) == orders[-1]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    resumed = Lengthy(300)
    resumed.set_epoch(2)
    assert list(LengthSampler(resumed, 8, seed=3)) == orders[2]
    assert list(LengthSampler(resumed, 8, seed=4)) != orders[2]


def test_a_loader_goes_on_after_the_batches_that_were_seen():
    data = Lengthy(83)
    data.set_epoch(1)

    def loader() -> DataLoader:
        return DataLoader(data, 8, sampler=LengthSampler(data, 8, seed=3), collate_fn=lambda batch: batch)

    whole = [batch["sample_id"].tolist() for batch in loader()]
    rest = [batch["sample_id"].tolist() for batch in skip_first_batches(loader(), 4)]
    assert [len(each) for each in whole] == [8] * 10 + [3]
    assert rest == whole[4:]


def test_the_order_leaves_the_global_generators_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(LengthSampler(Lengthy(100), 8, seed=3))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()


def test_little_is_padded():
    data = Lengthy(4000)
    random = np.random.default_rng(1).permutation(4000).tolist()
    grouped = list(LengthSampler(data, 16, seed=0))
    total = int(data.lengths.sum())
    assert padded(data.lengths, random, 16) > 2 * total
    assert padded(data.lengths, grouped, 16) < 1.1 * total


def test_batches_mix_samples_and_lengths():
    """The longest must not come first or last in every epoch, nor the same samples always meet."""
    data = Lengthy(1600)
    met, means = [], []
    for epoch in range(2):
        data.set_epoch(epoch)
        order = list(LengthSampler(data, 16, seed=0, pool=10))
        blocks = [order[start : start + 16] for start in range(0, 1600, 16)]
        met.append({tuple(sorted(block)) for block in blocks})
        means.append([data.lengths[block].mean() for block in blocks])
    assert not met[0] & met[1]
    assert abs(np.corrcoef(means[0], range(100))[0, 1]) < 0.3
    assert abs(np.corrcoef(means[0], means[1])[0, 1]) < 0.3


def test_an_incomplete_batch_is_the_last_one():
    """Anywhere else it would shift all that follow, which then pad for two lengths."""
    data = Lengthy(8 * 20 + 3)
    order = np.array(list(LengthSampler(data, 8, seed=0)))
    ranked = np.sort(data.lengths)
    blocks = np.sort(data.lengths[order[:160]].reshape(20, 8)).tolist()
    assert sorted(blocks) == ranked[:160].reshape(20, 8).tolist()
    assert data.lengths[order[160:]].tolist() == ranked[160:].tolist()


def test_the_longest_come_first():
    """What needs most memory is then known at once; ties keep their order."""
    data = InMemory(columns(5))
    assert length_order(data) is None
    data.lengths = [3, 9, 3, 1, 9]
    assert length_order(data).tolist() == [1, 4, 0, 2, 3]


def test_batches_in_another_order():
    data = InMemory(columns())
    order = np.array([6, 0, 3, 3, 1])
    found = list(batches(data, 2, order))
    assert [batch["sample_id"].tolist() for batch in found] == [[66, 0], [33, 33], [11]]
    assert list(batches(data, 2, np.array([], dtype=np.int64))) == []


def test_views_come_again_after_the_last():
    def view(batch, epoch, lookup):
        return {**batch, "epoch": torch.full((len(batch["x"]),), epoch)}

    view.is_random = True
    data = InMemory(columns(6), view=view)
    data.views = 3
    seen = []
    for epoch in range(7):
        data.set_epoch(epoch)
        batch = data.__getitems__([4, 1])
        assert batch["view"].tolist() == batch["epoch"].tolist() == [epoch % 3] * 2
        assert data.epoch == epoch  # on which the order of the samples goes on to depend
        seen.append(int(batch["view"][0]))
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_samples_that_look_alike_in_every_epoch_have_no_view():
    assert "view" not in InMemory(columns(6)).__getitems__([0])
    assert not InMemory(columns(6)).is_random
