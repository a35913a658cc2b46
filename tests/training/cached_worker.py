"""Two epochs with a teacher that answers from a folder; started by a launcher, each rank writes what came of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from potstill.interfaces import Batch, Signals
from potstill.losses.objective import Objective, Term
from potstill.teachers.cached import Cached
from potstill.teachers.live import Live
from potstill.training.trainer import DistillationTrainer
from tests.training.tiny import arguments, flat, pairs, student, teacher


class Asked(Live):
    """A teacher that notes which samples it is asked about."""

    def __init__(self) -> None:
        super().__init__(teacher(), ["hidden.2"])
        self.samples: list[int] = []

    def __call__(self, batch: Batch) -> Signals:
        self.samples += batch["sample_id"].tolist()
        return super().__call__(batch)


def trainer(folder: Path, source: Any, **changes: Any) -> DistillationTrainer:
    """A trainer on a plain table, with a projector and terms that count other positions each."""
    objective = Objective(
        {
            "soft": Term("kl", weight=0.7, temperature=4.0),
            "hard": Term("cross_entropy", weight=0.3),
            "hint": Term("mse", "hidden.1", "hidden.2", project=_projector(), weight=0.5),
        }
    )
    defaults: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 0.1, "max_grad_norm": 0.0}
    args = arguments(folder, **{**defaults, "lr_scheduler_type": "constant", "optim": "sgd", **changes})
    table = pairs(unlabelled=5)
    return DistillationTrainer(model=student(), teacher=source, objective=objective, train_dataset=table, args=args)


def _projector() -> nn.Module:
    torch.manual_seed(4)
    return nn.Linear(32, 48)


def main(folder: Path, batch_size: int, accumulation: int) -> None:
    live = Asked()
    changes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    made = trainer(folder, Cached(live, folder / "cache"), **changes)
    made.train()
    counts = made.teacher.counts
    found = {
        "student": flat(made.distillation_module.student),
        "objective": flat(made.distillation_module.objective),
        "asked": torch.tensor(live.samples),
        "counts": torch.tensor([counts.made, counts.found, counts.kept_nothing, counts.damaged]),
    }
    save_file(found, str(folder / f"rank{made.args.process_index}.safetensors"))
    if torch.distributed.is_initialized():  # gloo aborts a process that ends with its threads running
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
