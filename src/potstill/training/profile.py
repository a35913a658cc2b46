"""Where the time of a training goes: teacher, student, loss, gradients, optimizer, data and the trainer itself."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from potstill.errors import TrainingError
from potstill.training.trainer import DistillationTrainer

SECTIONS = ("data", "teacher", "student", "loss", "gradients", "optimizer")


@dataclass(frozen=True)
class Profile:
    """The mean time of a step and of its parts.

    Attributes:
        sections: milliseconds of each of ``data`` (the batch and its counts), ``teacher``, ``student`` (forward),
            ``loss``, ``gradients`` (backward), ``optimizer``, and ``trainer``: all that is none of these.
        step_ms: the whole step.
        steps: how many were measured.
        trace: a trace of a few more steps for https://ui.perfetto.dev or ``chrome://tracing``.
    """

    sections: dict[str, float]
    step_ms: float
    steps: int
    trace: Path | None = None


def profile(trainer: DistillationTrainer, *, trace: Path | None = None, warm_up: int = 3, traced: int = 3) -> Profile:
    """Train and measure; the trainer cannot be used afterwards.

    Args:
        trainer: its ``args.max_steps`` says how many steps are done.
        trace: where a trace of the last steps is written, as JSON.
        warm_up: steps at the beginning that are not measured.
        traced: steps at the end that are traced and not measured, where a trace is asked for.

    Raises:
        TrainingError: there are too few steps.
    """
    traced = traced if trace is not None else 0
    measured = trainer.args.max_steps - warm_up - traced
    if measured < 1:
        raise TrainingError(f"expected at least {warm_up + traced + 1} steps to profile, got {trainer.args.max_steps}")
    watch = _Watch(trainer, warm_up, warm_up + measured, trace)
    trainer.add_callback(watch)
    trainer.train()
    total = 1000 * watch.total / measured
    sections = {name: 1000 * watch.seconds[name] / measured for name in SECTIONS}
    return Profile({**sections, "trainer": max(0.0, total - sum(sections.values()))}, total, measured, trace)


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Times each part of the steps from ``first`` to ``last``, then traces."""

    def __init__(self, trainer: Any, first: int, last: int, trace: Path | None) -> None:
        self.first, self.last, self.trace = first, last, trace
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self.total = self.begin = 0.0
        self.is_on = first == 0
        self.device = trainer.args.device
        self._tracer: Any = None
        module = trainer.distillation_module
        trainer.get_batch_samples = self._timed("data", trainer.get_batch_samples)
        if trainer.teacher is not None:
            trainer._taught = self._timed("teacher", trainer._taught)
        module.signals = self._timed("student", module.signals)
        module._loss = self._timed("loss", module._loss)
        trainer.accelerator.backward = self._timed("gradients", trainer.accelerator.backward)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the optimizer, which is made only now."""
        optimizer = kwargs["optimizer"]
        optimizer.step = self._timed("optimizer", optimizer.step)
        self.begin = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to measure after the warm-up, and to trace after that."""
        if state.global_step == self.first:
            self.is_on, self.begin = True, self._now()
        if state.global_step == self.last:
            self.total, self.is_on = self._now() - self.begin, False
            if self.trace is not None:
                alone = [torch.profiler.ProfilerActivity.CPU] if self.device.type == "cpu" else None
                self._tracer = torch.profiler.profile(activities=alone)
                self._tracer.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the trace."""
        if self._tracer is not None and self.trace is not None:
            self._tracer.stop()
            self.trace.parent.mkdir(parents=True, exist_ok=True)
            self._tracer.export_chrome_trace(str(self.trace))

    def _timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.is_on:
                with torch.profiler.record_function(f"potstill: {name}"):
                    return work(*args, **kwargs)
            begin = self._now()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds[name] += self._now() - begin

        return timed

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
