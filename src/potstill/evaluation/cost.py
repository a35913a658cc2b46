"""What a model costs: parameters, bytes, latency; every model measured in turn, so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from potstill.interfaces import Task

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".onnx", ".xml")
BATCH_SIZES = (1, 32)


def parameters(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def bytes_on_disk(folder: Path) -> int:
    """Return the size of the weight files in a folder, in bytes."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)


@torch.no_grad()
def latencies(
    models: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    *,
    rounds: int = 30,
    budget_s: float = 10.0,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, float]]:
    """Return the median time of a forward in milliseconds, for each model and batch sizes 1 and 32.

    The models take turns, so a machine that slows down slows all of them.

    Args:
        models: name to model; put in eval mode.
        tasks: name to the task that makes the inputs of that model and calls it.
        rounds: forwards of each model and batch size, after two that do not count.
        budget_s: seconds after which no further round begins.
        device: where to measure.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for size in BATCH_SIZES:
        made = {name: tasks[name].example_inputs(size) for name in models}
        inputs = {name: {key: value.to(device) for key, value in batch.items()} for name, batch in made.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        end = time.perf_counter() + budget_s / len(BATCH_SIZES)
        for turn in range(rounds + 2):
            for name, model in models.items():
                seconds = _timed(model.eval().to(device), tasks[name], inputs[name])
                if turn >= 2:
                    times[name].append(seconds)
            if turn >= 4 and time.perf_counter() > end:
                break
        for name, seconds_list in times.items():
            found[name][str(size)] = 1000 * statistics.median(seconds_list)
    return found


def _timed(model: nn.Module, task: Task, batch: dict[str, torch.Tensor]) -> float:
    cuda = next(iter(batch.values())).is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    task.forward(model, batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
