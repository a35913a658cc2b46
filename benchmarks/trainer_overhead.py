"""What the trainer costs over a hand-written loop that does the same arithmetic.

    python benchmarks/trainer_overhead.py --steps 300 --rounds 5

MNIST-shaped MLPs (teacher 784-1200-1200-10, student 784-800-800-10), batch 128, in-memory batches, Adam,
0.7·T²·KL + 0.3·CE at T = 4. Loop and trainer take turns in one process; the first 50 steps of each turn do not count.
Prints the median time of a step of each and their ratio, and what starting the trainer costs apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from potstill.data.augment import make_views
from potstill.data.batching import InMemory
from potstill.data.pictures import Normalise
from potstill.losses import distillation_loss
from potstill.models.plain import Mlp
from potstill.recipe.arguments import DEFAULTS
from potstill.tasks.image_classification import ImageClassification
from potstill.training.trainer import DistillationTrainer, ready_batch

WARM_UP = 50
BATCH = 128


def models() -> tuple[Mlp, Mlp]:
    torch.manual_seed(0)
    return Mlp(784, 10, [1200, 1200]), Mlp(784, 10, [800, 800])


def data(samples: int = 20_000) -> InMemory:
    views = make_views([], key="pixel_values", seed=0, num_classes=10, finish=Normalise((0.1307,), (0.3081,)))
    draw = torch.Generator().manual_seed(0)
    columns = {
        "pixel_values": torch.randint(0, 256, (samples, 1, 28, 28), dtype=torch.uint8, generator=draw),
        "labels": torch.randint(0, 10, (samples,), generator=draw),
        "sample_id": torch.arange(samples),
    }
    return InMemory(columns, views)


def hand_written(columns: dict[str, torch.Tensor], steps: int) -> list[float]:
    """Seconds of each step of a plain loop."""
    teacher, student = models()
    teacher.eval()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    pixels, labels = columns["pixel_values"], columns["labels"]
    times = []
    order = torch.randperm(len(labels))
    for step in range(steps):
        begin = time.perf_counter()
        place = (step * BATCH) % (len(labels) - BATCH)
        chosen = order[place : place + BATCH]
        images = (pixels[chosen].float() / 255 - 0.1307) / 0.3081
        with torch.no_grad():
            taught = teacher(images)
        loss = distillation_loss(student(images), taught, labels[chosen], alpha=0.7, temperature=4.0)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    return times


class Clock(TrainerCallback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def times(self) -> list[float]:
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


def with_trainer(dataset: InMemory, steps: int, folder: str) -> tuple[list[float], float]:
    """Seconds of each step of the trainer, and of its start."""
    begin = time.perf_counter()
    teacher, student = models()
    clock = Clock()
    settings = {**DEFAULTS, "eval_strategy": "no", "save_strategy": "no", "max_grad_norm": 0.0}
    trainer = DistillationTrainer(
        teacher=teacher,
        model=student,
        forward=ImageClassification().forward,
        train_dataset=dataset,
        data_collator=ready_batch,
        callbacks=[clock],
        optimizer_cls_and_kwargs=(torch.optim.Adam, {"lr": 1e-3}),
        args=TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            disable_tqdm=True,
            **settings,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.times, clock.ends[0] - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dataset = data()
    ratios, loops, trainers, starts = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            loop = statistics.median(hand_written(dataset.columns, options.steps)[WARM_UP:])
            found, start = with_trainer(dataset, options.steps, folder)
            trainer = statistics.median(found[WARM_UP:])
            loops.append(loop)
            trainers.append(trainer)
            starts.append(start)
            ratios.append(trainer / loop)
            print(f"turn {turn + 1}: loop {1000 * loop:.2f} ms, trainer {1000 * trainer:.2f} ms, {ratios[-1]:.3f}")
    result = {
        "loop_ms": round(1000 * statistics.median(loops), 3),
        "trainer_ms": round(1000 * statistics.median(trainers), 3),
        "trainer_over_loop": round(statistics.median(ratios), 4),
        "start_s": round(statistics.median(starts), 3),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
