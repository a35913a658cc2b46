"""What a model answers on a whole split, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from potstill.data.batching import batches, length_order
from potstill.interfaces import IGNORED, Batch, BatchDataset, Task, TeacherSource


@dataclass(frozen=True)
class Predictions:
    """A model's answers.

    Attributes:
        logits: ``[N, C]`` float32.
        labels: ``[N]`` int64, −100 where unknown; ``None`` for a split without labels.
        sample_id: ``[N]`` int64.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    sample_id: NDArray[np.int64]

    def save(self, path: Path) -> None:
        """Write them as safetensors."""
        arrays: dict[str, NDArray[Any]] = {"logits": self.logits, "sample_id": self.sample_id}
        if self.labels is not None:
            arrays["labels"] = self.labels
        staged = path.with_suffix(".tmp")
        safetensors.numpy.save_file(arrays, str(staged))
        staged.replace(path)

    @staticmethod
    def load(path: Path) -> Predictions:
        """Read what :meth:`save` wrote."""
        arrays = safetensors.numpy.load_file(str(path))
        return Predictions(arrays["logits"], arrays.get("labels"), arrays["sample_id"])


@torch.no_grad()
def predict(
    model: nn.Module | TeacherSource,
    task: Task,
    dataset: BatchDataset,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    bar: str | None = None,
) -> Predictions:
    """Return a model's logits on every sample of a data set, in order, in eval mode.

    Args:
        model: its mode and device are put back afterwards; or a teacher that is no module, which is shown no labels.
        task: calls the model.
        dataset: without random views.
        batch_size: samples at a time.
        device: where to compute.
        bar: label of a progress bar; none if omitted.
    """
    logits, labels, ids = [], [], []
    with _at_rest(model, device):
        steps = -(-len(dataset) // batch_size)
        order = length_order(dataset)
        every = batches(dataset, batch_size, order)
        for batch in tqdm(every, desc=bar, total=steps, disable=bar is None, leave=False):
            placed = {name: value.to(device) for name, value in batch.items()}
            said = task.forward(model, placed) if isinstance(model, nn.Module) else model(_unlabelled(placed))
            logits.append(said["logits"].float().cpu())
            ids.append(batch["sample_id"])
            if "labels" in batch:
                labels.append(batch["labels"])
    back = slice(None) if order is None else np.argsort(order)
    return Predictions(
        torch.cat(logits).numpy()[back],
        torch.cat(labels).numpy()[back] if labels else None,
        torch.cat(ids).numpy()[back],
    )


@contextmanager
def _at_rest(model: nn.Module | TeacherSource, device: torch.device | str) -> Iterator[None]:
    """Hold a module in eval mode on a device."""
    if not isinstance(model, nn.Module):
        yield
        return
    was_training, home = model.training, next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        model.eval().to(device)
        yield
    finally:
        model.train(was_training).to(home)


def _unlabelled(batch: Batch) -> Batch:
    """Return a batch that tells no label."""
    return {name: torch.full_like(value, IGNORED) if name == "labels" else value for name, value in batch.items()}
