"""What a model costs."""

from __future__ import annotations

import time

import torch
from torch import nn

from potstill.evaluation.cost import bytes_on_disk, parameters, speeds
from potstill.tasks.classification import Classification


class Task(Classification):
    """The least that a latency needs."""

    def example_inputs(self, batch_size):
        return {"features": torch.zeros(batch_size, 4)}


class Recorder(nn.Module):
    """A model that takes a given time and writes down when it was called."""

    def __init__(self, name: str, calls: list, seconds: float = 0.0, first: int = 0, slow: float = 0.0) -> None:
        super().__init__()
        self.name, self.calls, self.seconds, self.first, self.slow = name, calls, seconds, first, slow
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        own = sum(call[0] == self.name and call[1] == len(features) for call in self.calls)
        self.calls.append((self.name, len(features), self.training, torch.is_grad_enabled()))
        time.sleep(self.slow if own < self.first else self.seconds)
        return features * self.weight


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    assert parameters(model) == 16 + 16 + 8
    model[1].weight = model[0].weight
    assert parameters(model) == 16 + 8


def test_bytes_are_those_of_the_weights(tmp_path):
    for name, size in {"model.safetensors": 100, "part-2.safetensors": 50, "model.onnx": 7}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "potstill.json").write_text("{}" * 500)
    assert bytes_on_disk(tmp_path) == 157


def test_models_take_turns():
    """One after the other, a machine that slows down in the second half makes the second model look slow."""
    calls: list = []
    models = {name: Recorder(name, calls) for name in ("a", "b")}
    found = speeds(models, dict.fromkeys(models, Task()), rounds=4)
    assert set(found) == {"a", "b"}
    assert all(set(each.latency_ms) == {"1", "32"} for each in found.values())
    turns = [[("a", size), ("b", size)] * 6 for size in (1, 32, 128)]
    assert [(name, size) for name, size, *_ in calls] == [call for turn in turns for call in turn]


def test_eval_mode_without_gradient():
    calls: list = []
    speeds({"a": Recorder("a", calls).train()}, {"a": Task()}, rounds=2)
    assert {(training, grad) for _, _, training, grad in calls} == {(False, False)}


def test_the_median_in_milliseconds_without_the_warm_up():
    """The first forwards allocate and compile; with them a small model looks ten times slower than it is."""
    found = speeds({"a": Recorder("a", [], seconds=0.02, first=2, slow=0.3)}, {"a": Task()}, rounds=1)["a"].latency_ms
    assert 20 <= found["1"] < 290
    assert 20 <= found["32"] < 290


def test_the_budget_ends_the_rounds_but_leaves_enough_to_judge():
    calls: list = []
    found = speeds({"a": Recorder("a", calls, seconds=0.01)}, {"a": Task()}, rounds=1000, budget_s=0.02)
    assert [call[1] for call in calls] == [1] * 5 + [32] * 5  # four times as many would take too long
    assert found["a"].latency_ms["1"] >= 10


def test_the_throughput_is_that_of_the_best_batch_size():
    """A forward that takes as long for many samples as for one gives most with most; it is seconds, not ms."""
    found = speeds({"a": Recorder("a", [], seconds=0.02)}, {"a": Task()}, rounds=3)["a"]
    assert found.throughput <= 128 / 0.02
    assert found.throughput > 32 / (found.latency_ms["32"] / 1000)
