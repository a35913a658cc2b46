"""One optimizer step of plain SGD in as many processes as the launcher started; rank 0 writes the weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from potstill.losses.objective import Objective, Term
from potstill.schemes.lesson import Learner
from potstill.teachers.context import SourceContext
from potstill.teachers.moving_average import moving_average
from potstill.training.trainer import DistillationTrainer
from tests.training.tiny import arguments, flat, pairs, student, teacher


def together(folder: Path, batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
    """A student, a peer that learns from it, and an average of the student that teaches it, with clipping."""
    torch.manual_seed(4)
    learner, peer = student(), teacher()
    mean = moving_average(SourceContext("mean", student=learner), decay=0.5, warm_up=False)
    hint = Term("mse", "hidden.1", "peer/hidden.2", project=nn.Linear(32, 48), weight=0.5)
    own = {"soft": Term("kl", teacher="peer/logits"), "calm": Term("kl", teacher="mean/logits"), "hint": hint}
    theirs = {"soft": Term("kl", teacher="student/logits"), "hard": Term("cross_entropy")}
    args = arguments(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.5,
    )
    trainer = DistillationTrainer(
        model=learner,
        teacher={"mean": mean},
        learners={"peer": Learner(peer, Objective(theirs))},
        objective=Objective({**own, "hard": Term("cross_entropy")}),
        train_dataset=pairs(unlabelled=5),
        args=args,
    )
    trainer.train()
    module = trainer.distillation_module
    return {"learner": flat(module.student), "peer": flat(peer), "mean": flat(mean.model)}


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
    weights |= together(folder / "joint", batch_size, accumulation)
    save_file(weights, str(folder / f"rank{trainer.args.process_index}.safetensors"))
    if torch.distributed.is_initialized():  # gloo aborts a process that ends with its threads running
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
