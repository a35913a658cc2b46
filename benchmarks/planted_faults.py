"""Ten faults that a distillation set-up can have without a word, each planted, and what the preflight says of it.

    python benchmarks/planted_faults.py

The tests use the same set-ups: ``tests/preflight/test_planted_faults.py``.
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn

from potstill import DistillationTrainer, Objective, Term
from potstill.checks.findings import Finding
from potstill.checks.run import preflight

CLASSES, WIDTH, VOCABULARY = 4, 8, 23
Setup = dict[str, Any]


class Net(nn.Module):
    """A small network with BatchNorm and dropout; ``unused`` runs and is read by nobody, ``idle`` says always 0."""

    def __init__(self, width: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout))
        self.idle = nn.ReLU()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.body(features)
        self.idle(torch.zeros_like(hidden.detach()))
        out: Tensor = self.head(hidden)
        return out


class Conv(nn.Module):
    """A small network for images of 8 × 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, CLASSES))

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = self.body(pixel_values)
        return out


def points(count: int, seed: int) -> Dataset:
    """Rows whose class is the greatest of their first four numbers."""
    features = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    labels = features[:, :CLASSES].argmax(-1)
    return Dataset.from_dict({"features": features.tolist(), "labels": labels.tolist()}).with_format("torch")


def pictures(count: int, seed: int, mean: float = 0.5, std: float = 0.5) -> Dataset:
    """Images whose class is the brightest quarter, in a range of brightness of its own."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    images = 0.25 * torch.rand(count, 3, 8, 8, generator=draw)
    images += (0.18 * labels).view(-1, 1, 1, 1)
    columns = {"pixel_values": ((images.clamp(0, 1) - mean) / std).tolist(), "labels": labels.tolist()}
    return Dataset.from_dict(columns).with_format("torch")


def counting(first: int, last: int, by: int = 1, length: int = 12) -> Dataset:
    """Sequences that count up, with the label of a position ``by`` tokens later."""
    chosen = torch.randperm(VOCABULARY * 6, generator=torch.Generator().manual_seed(3))[first:last, None]
    starts, steps = chosen % VOCABULARY, 1 + chosen // VOCABULARY
    tokens = (starts + steps * torch.arange(length + 3)) % VOCABULARY
    columns = {"input_ids": tokens[:, :length].tolist(), "labels": tokens[:, by : by + length].tolist()}
    return Dataset.from_dict(columns).with_format("torch")


def fitted(model: nn.Module, table: Dataset, steps: int = 150) -> nn.Module:
    """Train a model on a table, and return it at rest."""
    batch: dict[str, Any] = table[:]
    labels = batch.pop("labels")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    model.train()
    for _ in range(steps):
        said = model(**batch)
        logits = said if isinstance(said, Tensor) else said.logits
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def gpt2(width: int = 16) -> Any:
    """A tiny decoder."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_layer=2, n_embd=width, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bert(vocabulary: int, width: int) -> Any:
    """A tiny encoder with a head."""
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=width,
        num_labels=CLASSES,
    )
    return transformers.BertForSequenceClassification(config)


def naive_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL as it is written too often: NaN as soon as a softmax is 0."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def sound() -> Setup:
    """Points, a trained network as teacher, and a hint through a projector."""
    torch.manual_seed(0)
    train, test = points(256, 1), points(256, 2)
    hint = Term("mse", "body.2", "body.2", weight=0.1, project="linear")
    return {
        "model": Net(6),
        "teacher": fitted(Net(), train),
        "objective": Objective({"soft": Term("kl"), "hard": Term("cross_entropy"), "hint": hint}),
        "train_dataset": train,
        "eval_dataset": test,
    }


def sound_images() -> Setup:
    """Images and their teacher."""
    torch.manual_seed(0)
    train, test = pictures(256, 1), pictures(256, 2)
    return {"model": Conv(), "teacher": fitted(Conv(), train), "train_dataset": train, "eval_dataset": test}


def sound_sequences() -> Setup:
    """Sequences with each label shifted once, and their teacher."""
    torch.manual_seed(0)
    train, test = counting(0, 96), counting(96, 136)
    return {"model": gpt2(8), "teacher": fitted(gpt2(), train), "train_dataset": train, "eval_dataset": test}


def _raw(model: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A teacher as people write it: a closure over a model, without a thought to its mode."""

    def answer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": model(batch["features"])}

    return answer


def _soft() -> Objective:
    return Objective({"soft": Term("kl"), "hard": Term("cross_entropy")})


def teacher_in_train_mode() -> Setup:
    """Dropout and BatchNorm at work while it teaches."""
    setup = sound()
    return {**setup, "teacher": _raw(setup["teacher"].train()), "objective": _soft()}


def drifting_batchnorm() -> Setup:
    """Dropout is off, and the statistics still follow the batches."""
    setup = sound()
    setup["teacher"].body[1].train()
    return {**setup, "teacher": _raw(setup["teacher"]), "objective": _soft()}


def projector_outside_the_optimizer() -> Setup:
    """An optimizer of one's own that knows the student alone."""
    setup = sound()
    return {**setup, "optimizers": (torch.optim.SGD(setup["model"].parameters(), 0.1), None)}


def swapped_label_map() -> Setup:
    """Two of the teacher's classes have changed places."""
    setup = sound()
    head = setup["teacher"].head
    with torch.no_grad():
        for values in (head.weight, head.bias):
            values[[0, 2]] = values[[2, 0]].clone()
    return setup


def other_normalisation() -> Setup:
    """Images in [0, 1] for a teacher that was trained on images in [−1, 1]."""
    plain = {"train_dataset": pictures(256, 1, 0.0, 1.0), "eval_dataset": pictures(256, 2, 0.0, 1.0)}
    return {**sound_images(), **plain}


def other_tokenizer() -> Setup:
    """Tokens of a larger vocabulary than the teacher's."""
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (64, 9), generator=torch.Generator().manual_seed(1))
    table = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % CLASSES).tolist()})
    return {"model": bert(50, 8), "teacher": bert(30, 16), "train_dataset": table.with_format("torch")}


def dead_tap() -> Setup:
    """A hint on a module that says nothing."""
    hint = Term("mse", "idle", "body.2", project="linear")
    return {**sound(), "objective": Objective({"soft": Term("kl"), "hint": hint})}


def double_shift() -> Setup:
    """Labels that the data shift, and a loss that shifts them again."""
    return {**sound_sequences(), "train_dataset": counting(0, 96, 2), "eval_dataset": counting(96, 136, 2)}


def nan_on_saturated_logits() -> Setup:
    """A loss that is right until a model is sure."""
    return {**sound(), "objective": Objective({"soft": Term(naive_kl), "hard": Term("cross_entropy")})}


def labels_out_of_range() -> Setup:
    """Classes counted from 1."""
    setup = sound()
    moved = [label + 1 for label in setup["train_dataset"].with_format(None)["labels"]]
    columns = {"features": setup["train_dataset"]["features"][:].tolist(), "labels": moved}
    return {**setup, "train_dataset": Dataset.from_dict(columns).with_format("torch")}


FAULTS: dict[str, tuple[Callable[[], Setup], str]] = {
    "teacher in train mode": (teacher_in_train_mode, "teacher-mode"),
    "drifting BatchNorm": (drifting_batchnorm, "teacher-drift"),
    "projector outside the optimizer": (projector_outside_the_optimizer, "projectors"),
    "swapped label map": (swapped_label_map, "label-map"),
    "other normalisation": (other_normalisation, "normalisation"),
    "other tokenizer": (other_tokenizer, "tokenizer"),
    "dead tap": (dead_tap, "dead-tap"),
    "double shift": (double_shift, "shift"),
    "NaN on saturated logits": (nan_on_saturated_logits, "saturation"),
    "labels out of range": (labels_out_of_range, "label-range"),
}
"""Each fault: how it is planted, and the name of the check that is to find it."""

SOUND: dict[str, Callable[[], Setup]] = {
    "points": sound,
    "images": sound_images,
    "sequences": sound_sequences,
}
"""Set-ups in which nothing is to be found."""


def trainer_of(setup: Setup, folder: Path | str) -> DistillationTrainer:
    """Return the trainer of a set-up, on the CPU."""
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        max_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    return DistillationTrainer(args=arguments, **copy.copy(setup))


def findings(setup: Setup) -> list[Finding]:
    """Return what the preflight finds in a set-up, notes left out."""
    with tempfile.TemporaryDirectory() as folder:
        return [finding for finding in preflight(trainer_of(setup, folder)) if finding.level != "note"]


def main() -> None:
    torch.set_num_threads(1)  # more cost more than they bring on networks this small
    logging.getLogger("potstill").setLevel(logging.ERROR + 1)
    found = 0
    print(f"{'fault':34} found by")
    for fault, (make, check) in FAULTS.items():
        names = sorted({finding.check for finding in findings(make())})
        found += check in names
        others = ", ".join(name for name in names if name != check)
        print(
            f"{fault:34} {check if check in names else 'NOT FOUND'}{f' (also {others})' if others else ''}", flush=True
        )
    alarms = {name: findings(make()) for name, make in SOUND.items()}
    print(f"{found} of {len(FAULTS)} faults found by name")
    for name, false in alarms.items():
        print(f"sound set-up, {name}: {'; '.join(map(str, false)) or 'nothing found'}")
    sys.exit(len(FAULTS) - found + sum(map(len, alarms.values())))


if __name__ == "__main__":
    main()
