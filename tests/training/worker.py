"""One optimizer step of plain SGD in as many processes as the launcher started; rank 0 writes the weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from potstill.losses.objective import Objective, Term
from potstill.training.trainer import DistillationTrainer
from tests.training.tiny import arguments, flat, pairs, student, teacher


def main(folder: Path, batch_size: int, accumulation: int) -> None:
    torch.manual_seed(4)
    objective = Objective(
        {
            "soft": Term("kl", weight=0.7, temperature=4.0),
            "hard": Term("cross_entropy", weight=0.3),
            "hint": Term("mse", "hidden.1", "hidden.2", project=nn.Linear(32, 48), weight=0.5),
            "decoupled": Term("dkd", weight=0.1),
            "relations": Term("minilmv2", ["query.1", "key.1", "value.1"], ["query.2", "key.2", "value.2"]),
        }
    )
    args = arguments(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    trainer = DistillationTrainer(
        teacher=teacher(), model=student(), objective=objective, train_dataset=pairs(unlabelled=5), args=args
    )
    trainer.train()
    module = trainer.distillation_module
    logged = torch.tensor([trainer.state.log_history[0][name] for name in ("loss", "loss/soft", "loss/hint")])
    weights = {"student": flat(module.student), "objective": flat(module.objective), "logged": logged}
    save_file(weights, str(folder / f"rank{trainer.args.process_index}.safetensors"))
    if torch.distributed.is_initialized():  # gloo aborts a process that ends with its threads running
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
