"""Distillation in a training loop of your own: no recipe, no trainer.

    python examples/own_loop.py

A convolutional network that was trained on real handwritten digits teaches one with a fourteenth of its weights, twice:

1. with the bare function ``distillation_loss``, in a loop like any other;
2. with a ``DistillationModule``, which also compares features: ``capture`` reads them out of the teacher, and a
   projector, trained with the student, maps the student's 16 channels to the teacher's 64.

Promises: "both students learned: yes", "nothing of the teacher or the projector is in the student: yes"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from potstill import DistillationModule, Objective, Ramp, Term, capture
from potstill.interfaces import Progress, Signals
from potstill.losses import distillation_loss

EPOCHS, BATCH_SIZE = 30, 64
TEACHER, STUDENT = 64, 16  # channels


class Net(nn.Module):
    """Two convolutions and a linear layer; ``body`` gives the features that the feature term compares."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.head = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, 10]`` of images ``[B, 1, 8, 8]``."""
        return self.head(self.body(images).mean((-2, -1)))


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to learn from, images and labels to be judged on."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    parts = train_test_split(images, labels, train_size=400, stratify=labels, random_state=0)
    return parts[0], parts[2], parts[1], parts[3]


def batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the training set in a new order, ``BATCH_SIZE`` images at a time."""
    for chosen in torch.randperm(len(images)).split(BATCH_SIZE):
        yield images[chosen], labels[chosen]


def train_teacher(images: Tensor, labels: Tensor) -> Net:
    teacher = Net(TEACHER)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for some, their_labels in batches(images, labels):
            optimizer.zero_grad()
            F.cross_entropy(teacher(some), their_labels).backward()
            optimizer.step()
    return teacher.eval()  # left in train mode, its batch statistics would follow the student's data


def with_the_bare_function(teacher: Net, images: Tensor, labels: Tensor) -> Net:
    student = Net(STUDENT)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(EPOCHS):
        for some, their_labels in batches(images, labels):
            with torch.no_grad():
                answers = teacher(some)
            optimizer.zero_grad()
            # alpha weighs the soft loss, 1 − alpha the hard one; the factor T² is inside
            distillation_loss(student(some), answers, their_labels, alpha=0.9, temperature=4.0).backward()
            optimizer.step()
    return student


def ask(teacher: Net, images: Tensor) -> Signals:
    """What the teacher says: its logits, and the features that ``body`` puts out."""
    with torch.no_grad(), capture(teacher, ["body"], detach=True) as signals:
        signals["logits"] = teacher(images)
    return signals


def with_the_module(teacher: Net, images: Tensor, labels: Tensor) -> Net:
    fading = Ramp(start=1.0, stop=0.0, end=0.5)  # full weight at the start, none from the middle on
    objective = Objective(
        {
            "soft": Term("kl", weight=0.9, temperature=4.0),
            "hard": Term("cross_entropy", weight=0.1),
            "hint": Term("mse", student="body", teacher="body", project="linear", weight=fading),
        }
    )
    student = Net(STUDENT)
    module = DistillationModule(student, objective)
    module.materialize(ask(teacher, images[:2]), {"images": images[:2]})  # makes the projector, 16 to 64 channels
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)  # after that: the projector learns too
    print(objective.describe())

    steps = EPOCHS * -(-len(images) // BATCH_SIZE)
    step = 0
    for _ in range(EPOCHS):
        for some, their_labels in batches(images, labels):
            optimizer.zero_grad()
            output = module(ask(teacher, some), progress=Progress(step, steps), images=some, labels=their_labels)
            output.loss.backward()
            optimizer.step()
            step += 1
    return student


@torch.no_grad()
def accuracy(model: Net, images: Tensor, labels: Tensor) -> float:
    return float((model.eval()(images).argmax(-1) == labels).float().mean())


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    images, labels, test_images, test_labels = data()
    teacher = train_teacher(images, labels)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    first = with_the_bare_function(teacher, images, labels)
    second = with_the_module(teacher, images, labels)

    for name, model in {"teacher": teacher, "bare function": first, "module with a hint": second}.items():
        weights = sum(p.numel() for p in model.parameters())
        print(f"{name}: accuracy {accuracy(model, test_images, test_labels):.3f}, {weights:,} parameters")
    learned = min(accuracy(model, test_images, test_labels) for model in (first, second)) > 0.5
    bare = second.state_dict().keys() == Net(STUDENT).state_dict().keys()
    same = all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    print(f"both students learned: {'yes' if learned else 'no'}")
    print(f"nothing of the teacher or the projector is in the student: {'yes' if bare and same else 'no'}")


if __name__ == "__main__":
    main()
