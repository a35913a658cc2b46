"""What a model costs: parameters, bytes, time; every model measured in turn, so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from potstill.interfaces import Task

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".onnx", ".xml")
BATCH_SIZES = (1, 32)
"""Samples in a forward whose latency is reported."""
MANY = 128
"""Samples in a forward that is measured for the throughput alone."""
_FEWEST = 3


def parameters(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def bytes_on_disk(folder: Path) -> int:
    """Return the size of the weight files in a folder, in bytes."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)


@dataclass(frozen=True)
class Speed:
    """How fast a model answers.

    Attributes:
        latency_ms: median time of a forward in milliseconds, by batch size (``"1"``, ``"32"``).
        throughput: samples a second at the batch size, of 1, 32 and 128, where they are most.
    """

    latency_ms: dict[str, float]
    throughput: float


@torch.no_grad()
def speeds(
    models: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    *,
    rounds: int = 30,
    budget_s: float = 15.0,
    device: torch.device | str = "cpu",
) -> dict[str, Speed]:
    """Return how fast each model answers, from the median time of a forward at the batch sizes 1, 32 and 128.

    The models take turns, so a machine that slows down slows all of them.

    Args:
        models: name to model; put in eval mode.
        tasks: name to the task that makes the inputs of that model and calls it.
        rounds: forwards of each model and batch size, after two that do not count.
        budget_s: seconds after which no further round begins, a third for each batch size; three are always done.
        device: where to measure.
    """
    times: dict[str, dict[int, float]] = {name: {} for name in models}
    sizes = (*BATCH_SIZES, MANY)
    for size in sizes:
        if size == MANY and any(each[32] * 4 > budget_s / len(sizes) for each in times.values()):
            continue  # five forwards of each would take too long
        made = {name: tasks[name].example_inputs(size) for name in models}
        inputs = {name: {key: value.to(device) for key, value in batch.items()} for name, batch in made.items()}
        taken: dict[str, list[float]] = {name: [] for name in models}
        end = time.perf_counter() + budget_s / len(sizes)
        for turn in range(rounds + 2):
            for name, model in models.items():
                seconds = _timed(model.eval().to(device), tasks[name], inputs[name])
                if turn >= 2:
                    taken[name].append(seconds)
            if turn > _FEWEST and time.perf_counter() > end:
                break
        for name, each in taken.items():
            times[name][size] = statistics.median(each)
    return {name: _speed(each) for name, each in times.items()}


def _speed(seconds: Mapping[int, float]) -> Speed:
    latency = {str(size): 1000 * seconds[size] for size in BATCH_SIZES}
    return Speed(latency, max(size / each for size, each in seconds.items()))


def _timed(model: nn.Module, task: Task, batch: dict[str, torch.Tensor]) -> float:
    cuda = next(iter(batch.values())).is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    task.forward(model, batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
