"""Batches under a budget of tokens: what fits, equally many in every epoch, the same ones after a stop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader

from potstill.data.batching import InMemory
from potstill.data.budgets import TokenBudget
from potstill.errors import TrainingError


class Lengthy(InMemory):
    """Samples with lengths of a long tail, 1 to 64."""

    def __init__(self, size: int, seed: int = 0):
        super().__init__({"sample_id": torch.arange(size)})
        self.lengths = np.clip(np.random.default_rng(seed).lognormal(2.3, 0.7, size).astype(int), 1, 64)


def made(data, budget: int = 256, most: int = 40, **options) -> TokenBudget:
    return TokenBudget(data, budget, most, **{"seed": 0, **options})


def epoch(data, number: int, sampler: TokenBudget) -> list[list[int]]:
    data.set_epoch(number)
    return list(sampler)


@pytest.mark.parametrize("pool", [2, 50])
@pytest.mark.parametrize("processes", [1, 3])
def test_every_epoch_has_all_samples_in_equally_many_batches_within_the_budget(pool, processes):
    """The natural number changes from epoch to epoch, above and below; Trainer counts once and resumes by counting."""
    data = Lengthy(1500)
    sampler = made(data, pool=pool, processes=processes)
    assert len(sampler) % processes == 0
    for number in range(30):
        found = epoch(data, number, sampler)
        assert len(found) == len(sampler)
        assert sorted(itertools.chain(*found)) == list(range(1500))
        assert max(len(batch) * data.lengths[batch].max() for batch in found) <= 256
        assert 1 <= min(map(len, found)) <= max(map(len, found)) <= 40


def test_epochs_differ_in_how_many_batches_they_would_have():
    """Else the test above shows nothing."""
    data = Lengthy(1500)
    sampler = made(data, pool=2)
    natural = [len(sampler._cut(sampler._draw(number).permutation(1500), sampler._pool)) for number in range(30)]
    assert min(natural) < len(sampler) < max(natural)


def test_batches_are_full_and_little_is_padded():
    data = Lengthy(4000)
    sampler = made(data, 256, 4000)
    found = epoch(data, 0, sampler)
    padded = sum(len(batch) * int(data.lengths[batch].max()) for batch in found)
    assert padded < 1.1 * data.lengths.sum()
    assert padded > 0.9 * 256 * len(found)


def test_no_batch_could_take_one_sample_more():
    """With one pool, samples in order of their length: a batch ends only where the next one would break a limit."""
    data = Lengthy(300)
    found = sorted(epoch(data, 0, made(data)), key=lambda batch: -data.lengths[batch].max())
    for one, two in itertools.pairwise(found):
        assert (len(one) + 1) * data.lengths[one].max() > 256 or len(one) == 40
        assert data.lengths[one].min() >= data.lengths[two].max()


def test_what_fills_no_batch_waits_for_the_next_pool():
    """Else each small pool ends in a batch of a few samples, which weighs as much in a step as a full one."""
    data = Lengthy(2000)
    sampler = made(data, pool=3)
    found = epoch(data, 0, sampler)
    full = [(len(batch) + 1) * data.lengths[batch].max() > 256 or len(batch) == 40 for batch in found]
    assert np.mean(full) > 0.9


def test_a_batch_has_at_most_so_many_samples():
    data = Lengthy(400)
    data.lengths = np.ones(400, dtype=int)
    assert {len(batch) for batch in epoch(data, 0, made(data, 256, 25))} == {25}


def test_batches_depend_on_seed_and_epoch_alone():
    data, other = Lengthy(500), Lengthy(500)
    first = {number: epoch(data, number, made(data)) for number in (0, 1, 2)}
    again = {number: epoch(other, number, made(other)) for number in (2, 0, 1)}
    assert first == again
    assert first[0] != first[1] != first[2]
    assert epoch(data, 1, made(data, seed=7)) != first[1]


def test_batches_mix_samples_and_lengths():
    data = Lengthy(3000)
    sampler = made(data, pool=10)
    found = [epoch(data, number, sampler) for number in (0, 1)]
    sets = [{tuple(sorted(batch)) for batch in batches} for batches in found]
    assert len(sets[0] & sets[1]) < 0.05 * len(sampler)
    means = [[data.lengths[batch].mean() for batch in batches] for batches in found]
    assert abs(np.corrcoef(means[0], range(len(sampler)))[0, 1]) < 0.3
    assert abs(np.corrcoef(*means)[0, 1]) < 0.3


def test_the_largest_batches_are_halved():
    data = Lengthy(32)
    data.lengths = np.full(32, 8)
    assert sorted(map(len, epoch(data, 0, made(data, 128)))) == [16, 16]
    assert sorted(map(len, epoch(data, 0, made(data, 128, processes=3)))) == [8, 8, 16]
    assert sorted(map(len, epoch(data, 0, made(data, 128, processes=5)))) == [4, 4, 8, 8, 8]


@pytest.mark.parametrize("size", [400, 3])
def test_processes_get_equally_many_batches_and_no_sample_twice(size):
    """As accelerate deals them out; only where there are fewer samples than batches must one be repeated."""
    data = Lengthy(size)
    sampler = made(data, processes=2)
    shards = [BatchSamplerShard(sampler, 2, rank) for rank in range(2)]
    data.set_epoch(3)
    found = [list(shard) for shard in shards]
    assert len(found[0]) == len(found[1]) == len(shards[0]) == len(shards[1])
    heard = sorted(itertools.chain(*found[0], *found[1]))
    assert heard == list(range(size)) if size > 3 else set(heard) <= set(range(size))


def test_more_processes_than_samples():
    data = Lengthy(3)
    sampler = made(data, processes=4)
    assert sorted(epoch(data, 0, sampler)) == [[0], [1], [2]]
    found = [list(BatchSamplerShard(sampler, 4, rank)) for rank in range(4)]
    assert [len(batches) for batches in found] == [1, 1, 1, 1]


def test_a_loader_goes_on_where_it_stopped():
    data = Lengthy(300)
    loader = DataLoader(data, batch_sampler=made(data), collate_fn=lambda batch: batch)
    data.set_epoch(5)
    whole = [batch["sample_id"].tolist() for batch in loader]
    assert len(whole) == len(loader)
    assert [batch["sample_id"].tolist() for batch in skip_first_batches(loader, 7)] == whole[7:]


def test_texts_without_tokens_count_as_one():
    """They are padded to one token."""
    data = Lengthy(10)
    data.lengths = [0] * 10
    assert sorted(map(len, epoch(data, 0, made(data, 5)))) == [5, 5]


def test_no_samples():
    data = Lengthy(0)
    assert len(made(data)) == 0
    assert epoch(data, 0, made(data)) == []


def test_a_sample_above_the_budget_is_refused():
    data = Lengthy(50)
    data.lengths[17] = 90
    with pytest.raises(TrainingError, match=r"a sample has 90 tokens, and a batch may have 89 .* be at least 90"):
        made(data, 89)
    assert len(made(data, 90)) > 0


def test_data_without_lengths_are_refused():
    with pytest.raises(
        TrainingError, match="batch_tokens needs the length of every sample, and the training data have"
    ):
        made(InMemory({"sample_id": torch.arange(5)}))
