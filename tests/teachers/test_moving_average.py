"""The mean teacher: how it follows the student, what it keeps, and that it comes back to the bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from potstill.errors import ComponentError, ModelError
from potstill.interfaces import Progress
from potstill.registry import teacher_sources
from potstill.teachers.context import SourceContext
from potstill.teachers.moving_average import MovingAverage, moving_average


class Tied(nn.Module):
    """BatchNorm, dropout, and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.norm(self.first(features))))


def student(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def step(model: nn.Module, number: int) -> None:
    """One step of plain SGD, BatchNorm's statistics with it."""
    generator = torch.Generator().manual_seed(number)
    torch.manual_seed(number)
    inputs = torch.randn(8, 6, generator=generator).to(next(model.parameters()).dtype)
    model.train()
    model.zero_grad()
    model(inputs).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.002 * parameter.grad


def source(model: nn.Module, **options: object) -> MovingAverage:
    return moving_average(SourceContext("mean", student=model), **options)


BATCH = {"features": torch.randn(4, 6, generator=torch.Generator().manual_seed(9)), "sample_id": torch.arange(4)}


class TestAveraging:
    @pytest.mark.parametrize("warm_up", [True, False])
    @pytest.mark.parametrize("buffers", ["average", "copy"])
    def test_it_is_the_recursion(self, warm_up, buffers):
        model = student()
        mean = source(model, decay=0.4, warm_up=warm_up, buffers=buffers)
        expected = {name: value.double().numpy().copy() for name, value in model.state_dict().items()}
        for number in range(1, 8):
            step(model, number)
            mean.after_step(Progress(number, 8))
            decay = min(0.4, (1 + number) / (10 + number)) if warm_up else 0.4
            for name, value in model.state_dict().items():
                new = value.double().numpy()
                keep = 0.0 if "num_batches" in name or (buffers == "copy" and "running" in name) else decay
                expected[name] = keep * expected[name] + (1 - keep) * new
        for name, value in mean.model.state_dict().items():
            np.testing.assert_allclose(value.double().numpy(), expected[name], rtol=1e-5, atol=1e-6)
        assert int(mean.model.norm.num_batches_tracked) == 7
        assert mean.updates == 7
        assert np.isfinite(expected["first.weight"]).all()

    def test_it_starts_as_the_student_and_is_apart_from_it(self):
        model = student()
        mean = source(model)
        before = mean(BATCH)["logits"]
        torch.testing.assert_close(before, model.eval()(BATCH["features"]).detach())
        step(model, 1)
        assert torch.equal(mean(BATCH)["logits"], before)
        mean.after_step(Progress(1, 2))
        assert not torch.equal(mean(BATCH)["logits"], before)
        assert mean.model.first.weight is mean.model.last.weight

    def test_a_student_in_bfloat16_has_an_average_in_float32(self):
        """In bfloat16 a change of a thousandth is rounded away, and the average would never move."""
        model = student().bfloat16()
        mean = source(model, decay=0.999, warm_up=False)
        assert {value.dtype for value in mean.model.parameters()} == {torch.float32}
        before = mean.model.first.bias.clone()
        with torch.no_grad():
            model.first.bias += 1
        mean.after_step(Progress(1, 2))
        torch.testing.assert_close(mean.model.first.bias - before, torch.full((6,), 0.001), rtol=2e-2, atol=0)
        assert mean({"features": BATCH["features"].bfloat16()})["logits"].dtype == torch.float32

    def test_frozen_weights_stay_to_the_bit(self):
        model = student()
        mean = source(model)
        start = model.first.weight.detach().clone()
        for number in range(5):
            mean.after_step(Progress(number, 5))
        assert torch.equal(mean.model.first.weight, start)


class TestAnswers:
    def test_it_is_in_eval_mode_without_gradient_and_in_float32(self):
        model = student()
        mean = source(model)
        with torch.autocast("cpu", torch.bfloat16):
            said = mean(BATCH)["logits"]
        assert said.dtype == torch.float32
        assert not said.requires_grad
        torch.testing.assert_close(said, model.eval()(BATCH["features"]).detach(), rtol=1e-6, atol=1e-6)
        assert not any(parameter.requires_grad for parameter in mean.model.parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_taps_and_narrowing(self):
        mean = moving_average(SourceContext("mean", student=student(), taps=["norm", "first"]))
        assert set(mean(BATCH)) == {"logits", "norm", "first"}
        mean.narrow(["norm"])
        assert set(mean(BATCH)) == {"logits", "norm"}

    def test_the_forward_is_the_tasks(self):
        def forward(model, batch):
            return {"logits": model(batch["features"]) * 2}

        model = student()
        mean = moving_average(SourceContext("mean", student=model, forward=forward))
        torch.testing.assert_close(mean(BATCH)["logits"], 2 * model.eval()(BATCH["features"]).detach())


class TestState:
    def test_a_stop_in_between_changes_no_bit(self, tmp_path):
        """Tied weights would not be written by safetensors, and a lost count would change the warm-up."""
        whole, model = source(student()), student()
        whole.student = model
        for number in range(1, 7):
            step(model, number)
            whole.after_step(Progress(number, 6))
            if number == 3:
                kept = copy.deepcopy(model)
                safetensors.torch.save_file(whole.state_dict(), tmp_path / "sources.safetensors")
        resumed = source(kept)
        resumed.load_state_dict(safetensors.torch.load_file(tmp_path / "sources.safetensors"))
        for number in range(4, 7):
            step(kept, number)
            resumed.after_step(Progress(number, 6))
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name
        assert torch.equal(resumed(BATCH)["logits"], whole(BATCH)["logits"])

    def test_a_state_that_does_not_fit(self):
        mean = source(student())
        state = mean.state_dict()
        wrong = {**state, "model.first.bias": torch.zeros(7), "model.extra": torch.zeros(1)}
        del wrong["updates"]
        before = mean.model.first.weight.clone()
        with pytest.raises(
            ModelError, match=r"'mean' does not fit its student: 'updates' is missing; 'model.extra' is"
        ):
            mean.load_state_dict(wrong)
        assert torch.equal(mean.model.first.weight, before)


class TestOptions:
    def test_it_is_registered(self):
        assert teacher_sources.get("moving_average") is moving_average
        assert teacher_sources.check("moving_average", {"decay": 0.9, "warm_up": False, "buffers": "copy"}) == []

    def test_mistakes(self):
        with pytest.raises(ComponentError, match="needs a student that is trained"):
            moving_average(SourceContext("mean"))
        for decay in (1.0, -0.1):
            with pytest.raises(ComponentError, match="decay in"):
                source(student(), decay=decay)
