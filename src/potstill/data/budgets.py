"""Batches under a budget of tokens: as many samples as fit once all are padded to the longest of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from potstill.errors import TrainingError

_Places = NDArray[np.int64]

_TRIED = 4
"""Epochs of which the one with most batches says how many there are in every epoch."""


class TokenBudget(Sampler[list[int]]):
    """Batches of samples of like length, each with at most ``budget`` tokens, its padding included.

    Samples are shuffled, sorted by length within pools and cut into batches, which are shuffled. All epochs have
    equally many batches: where one has fewer, its largest are halved; where one has more, its pools are made larger.
    The batches are a pure function of (seed, epoch): a training that is stopped goes on with the one that would have
    come next.

    Args:
        dataset: with ``lengths``, one a sample, and ``epoch``.
        budget: samples of a batch times tokens of the longest of them, at most.
        batch_size: samples of a batch, at most.
        seed: of the order.
        processes: a multiple of so many batches is made, for each process to have equally many. Where there are too few
            samples for that there is one in each batch.
        pool: batches that are sorted together; more pad less, and mix less.

    Raises:
        TrainingError: the data set has no lengths, or holds a sample above the budget.
    """

    def __init__(
        self, dataset: Any, budget: int, batch_size: int, *, seed: int, processes: int = 1, pool: int = 50
    ) -> None:
        lengths = getattr(dataset, "lengths", None)
        if lengths is None:
            raise TrainingError(
                "batch_tokens needs the length of every sample, and the training data have none; it is for texts: "
                "those of a text task, a table of token ids with processing_class=…, or a data set with `lengths`"
            )
        self.dataset, self.budget, self.most, self.seed = dataset, budget, batch_size, seed
        self._lengths = np.maximum(np.asarray(lengths, dtype=np.int64), 1)  # no text is padded to less
        longest = int(self._lengths.max(initial=0))
        if longest > budget:
            raise TrainingError(
                f"a sample has {longest} tokens, and a batch may have {budget} (batch_tokens): cut the texts "
                f"(max_length) or let batch_tokens be at least {longest}"
            )
        size = len(self._lengths)
        self._pool = pool * max(1, size // max(1, len(self._cut(np.arange(size), size))))
        tried = max(len(self._cut(self._draw(epoch).permutation(size), self._pool)) for epoch in range(_TRIED))
        self._count = min(-(-tried // processes) * processes, size)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        draw = self._draw(self.dataset.epoch)
        order, pool = draw.permutation(len(self._lengths)), self._pool
        found = self._cut(order, pool)
        while len(found) > self._count:  # ends: none has fewer batches than one pool of all samples
            pool *= 2
            found = self._cut(order, pool)
        found = _halved(found, self._count)
        for place in draw.permutation(self._count).tolist():
            yield found[place].tolist()

    def _draw(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch])

    def _cut(self, order: _Places, pool: int) -> list[_Places]:
        """Return full batches, the longest of a pool first; what fills none is left to the next pool."""
        found: list[_Places] = []
        rest = order[:0]
        for start in range(0, len(order), max(1, pool)):
            rest = np.concatenate([rest, order[start : start + pool]])
            rest = rest[np.argsort(-self._lengths[rest], kind="stable")]
            first = 0
            while first < len(rest):
                fit = min(self.most, self.budget // int(self._lengths[rest[first]]))
                if first + fit > len(rest) and start + pool < len(order):
                    break
                found.append(rest[first : first + fit])
                first += fit
            rest = rest[first:]
        return found


def _halved(found: list[_Places], count: int) -> list[_Places]:
    """Return as many batches as ``count``, which no batch is too small for, by halving the largest again and again."""
    heap = [(-len(batch), place) for place, batch in enumerate(found)]
    heapq.heapify(heap)
    while len(found) < count:
        _, place = heap[0]
        batch = found[place]
        half = -(-len(batch) // 2)
        found[place] = batch[:half]
        found.append(batch[half:])
        heapq.heapreplace(heap, (-half, place))
        heapq.heappush(heap, (half - len(batch), len(found) - 1))
    return found
