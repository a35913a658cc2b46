"""Texts of unequal lengths under a budget of tokens; started by a launcher, each rank writes what it met."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from potstill.data.texts import Texts, Tokens
from potstill.interfaces import Batch, Signals
from potstill.losses.objective import Objective, Term
from potstill.models.inputs import respond
from potstill.teachers.live import Live
from potstill.training.trainer import DistillationTrainer, ready_batch
from tests.training.tiny import arguments, flat, student, teacher


def texts(count: int = 60, *, unlabelled: int = 0) -> Texts:
    """Random texts of 2 to 24 tokens."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 25, (count,), generator=draw).tolist()
    ids = [torch.randint(1, 60, (length,), generator=draw).tolist() for length in lengths]
    labels = torch.randint(0, 3, (count,), generator=draw)
    labels[:unlabelled] = -100
    columns = {"input_ids": ids, "attention_mask": [[1] * length for length in lengths]}
    return Texts({"sample_id": torch.arange(count), "labels": labels}, tokens={"": Tokens(columns, padding={})})


class Meeting(Live):
    """A teacher that notes the batches which it is asked about."""

    def __init__(self) -> None:
        super().__init__(teacher(), [], forward=respond)
        self.met: list[Tensor] = []
        self.tokens: list[int] = []

    def __call__(self, batch: Batch) -> Signals:
        self.met.append(batch["sample_id"].clone())
        self.tokens.append(batch["input_ids"].numel())
        return super().__call__(batch)


class Epochs(TrainerCallback):
    """Notes where the training stands after each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(state.epoch)


def trainer(folder: Path, **changes: Any) -> DistillationTrainer:
    """A trainer on the texts; what is no argument of the trainer is a training argument."""
    names = ("train_dataset", "eval_dataset", "group_by_length", "batch_tokens", "callbacks", "data_collator", "model")
    own = {name: changes.pop(name) for name in names if name in changes}
    terms = {"soft": Term("kl", weight=0.7, temperature=4.0), "hard": Term("cross_entropy", weight=0.3)}
    defaults = {"model": student(), "train_dataset": texts(unlabelled=7), "data_collator": ready_batch}
    return DistillationTrainer(
        teacher=Meeting(),
        objective=Objective(terms),
        args=arguments(folder, **{"per_device_train_batch_size": 12, "remove_unused_columns": False, **changes}),
        **{**defaults, "group_by_length": True, "batch_tokens": 96, **own},
    )


SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def main(folder: Path, accumulation: int) -> None:
    made = trainer(folder, gradient_accumulation_steps=accumulation, max_steps=-1, num_train_epochs=2, **SGD)
    made.train()
    met: Any = made.teacher
    sizes = torch.tensor([len(batch) for batch in met.met])
    found = {"student": flat(made.distillation_module.student), "met": torch.cat(met.met), "sizes": sizes}
    save_file({**found, "steps": torch.tensor(made.state.max_steps)}, str(folder / f"rank{made.args.process_index}.st"))
    if torch.distributed.is_initialized():  # gloo aborts a process that ends with its threads running
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
