"""Data sets that hand out ready batches: no per-sample Python for what fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from potstill.interfaces import VIEW, Batch

View = Callable[[Batch, int, Callable[[Tensor], Batch]], Batch]
"""``(batch, epoch, lookup) -> batch``: what the model sees of the samples in this epoch; see ``data/augment.py``."""


class InMemory(Dataset[Batch]):
    """Samples as tensors, read by fancy indexing.

    Args:
        columns: name to tensor, samples first, all of one length; ``sample_id`` among them.
        view: what is done to a raw batch: augmentation and normalisation.

    Attributes:
        views: how many different random views of a sample there are, one an epoch, again from the first after the
            last; without end if ``None``.
    """

    def __init__(self, columns: Mapping[str, Tensor], view: View | None = None) -> None:
        self.columns = dict(columns)
        self.view = view
        self.views: int | None = None
        self._epoch = _shared_zero()

    def __len__(self) -> int:
        return len(self.columns["sample_id"])

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return these samples as one batch."""
        batch = self.raw(torch.as_tensor(indices, dtype=torch.int64))
        return batch if self.view is None else self._numbered(self.view(batch, self.view_number, self._any))

    @property
    def epoch(self) -> int:
        """The epoch whose views are handed out."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the views of this epoch."""
        self._epoch.fill_(epoch)

    @property
    def is_random(self) -> bool:
        """Whether a sample looks different in each view."""
        return self.view is not None and bool(getattr(self.view, "is_random", False))

    @property
    def view_number(self) -> int:
        """Which random view is handed out: the epoch, or its place among :attr:`views`."""
        return self.epoch if self.views is None else self.epoch % self.views

    def _numbered(self, batch: Batch) -> Batch:
        """Return the batch with the number of its view, where there are several."""
        if not self.is_random:
            return batch
        return {**batch, VIEW: torch.full_like(batch["sample_id"], self.view_number)}

    def raw(self, indices: Tensor) -> Batch:
        """Return these samples as they are stored."""
        return {name: value[indices] for name, value in self.columns.items()}

    def _any(self, numbers: Tensor) -> Batch:
        """Return a sample for each number, whatever its size: what mixing of samples draws from."""
        return self.raw(numbers % len(self))


class Lazy(InMemory):
    """Samples whose main input is read and decoded when asked for, for data that does not fit into memory.

    Args:
        columns: the small columns, as in :class:`InMemory`.
        read: ``(indices) -> {name: tensor}``, the large ones.
        view: as in :class:`InMemory`.
    """

    def __init__(
        self, columns: Mapping[str, Tensor], read: Callable[[list[int]], Batch], view: View | None = None
    ) -> None:
        super().__init__(columns, view)
        self.read = read

    def raw(self, indices: Tensor) -> Batch:
        """Return these samples, the large columns freshly read."""
        return {**super().raw(indices), **self.read(indices.tolist())}


class LengthSampler(Sampler[int]):
    """Samples in random order, those of like length in one batch, so that little is padded.

    The order is a pure function of (seed, epoch): a training that is stopped goes on with the batch that would have
    come next.

    Args:
        dataset: with ``lengths``, one a sample, and ``epoch``.
        batch_size: samples of a batch, in one process.
        seed: of the order.
        pool: batches that are sorted together; more pad less, and mix less.
    """

    def __init__(self, dataset: Any, batch_size: int, *, seed: int, pool: int = 50) -> None:
        self.dataset, self.batch_size, self.seed, self.pool = dataset, batch_size, seed, pool

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng([self.seed, self.dataset.epoch])
        lengths = np.asarray(self.dataset.lengths)
        order = draw.permutation(len(lengths))
        size = self.batch_size * self.pool
        pools = [order[start : start + size] for start in range(0, len(order), size)]
        ordered = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
        whole = len(ordered) // self.batch_size
        blocks = ordered[: whole * self.batch_size].reshape(whole, self.batch_size)[draw.permutation(whole)]
        yield from blocks.reshape(-1).tolist()
        yield from ordered[whole * self.batch_size :].tolist()


def _shared_zero() -> Tensor:
    """Return a number that the workers of a loader see change."""
    zero = torch.zeros((), dtype=torch.int64)
    share: Any = zero.share_memory_
    share()
    return zero


def length_order(dataset: Any) -> NDArray[np.int64] | None:
    """Return the places of a data set's samples, the longest first; ``None`` where they have no lengths."""
    lengths = getattr(dataset, "lengths", None)
    return None if lengths is None else np.argsort(-np.asarray(lengths), kind="stable")


def batches(dataset: Any, batch_size: int, order: NDArray[np.int64] | None = None) -> Iterator[Batch]:
    """Yield a data set in order, or in another one, ``batch_size`` samples at a time, the last batch smaller."""
    places = range(len(dataset)) if order is None else order.tolist()
    for start in range(0, len(places), batch_size):
        yield dataset.__getitems__(list(places[start : start + batch_size]))
