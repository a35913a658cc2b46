"""Module replacing: blocks of a student learn in the place of the teacher's, until they stand alone.

    python examples/module_replacing.py

From Python, with networks of one's own. The teacher has six blocks, the student three; in the first 60 % of the
training each of these stands in for two of the teacher's, with a probability that grows to 1. There is no loss but that
of the task. A recipe says ``scheme: {name: module_replacing, probability: 0.3, end: 0.6}``.

Promises: "the student learned: yes", "the teacher is as it was: yes"
"""

import copy
import tempfile

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import TrainingArguments

from potstill import DistillationTrainer, Term
from potstill.schemes.module_replacing import ModuleReplacing

HOW = {"learning_rate": 5e-3, "per_device_train_batch_size": 40, "save_strategy": "no", "use_cpu": True}


class Block(nn.Module):
    """A residual block; the teacher's and the student's are of this kind and of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    def forward(self, hidden: Tensor) -> Tensor:
        """Add to what came in."""
        return hidden + self.body(hidden)


def trained(depth: int, **how: object) -> nn.Module:
    blocks = nn.Sequential(*(Block() for _ in range(depth)))
    model = nn.Sequential(nn.Linear(64, 32), blocks, nn.Linear(32, 10))
    args = TrainingArguments(tempfile.mkdtemp(), num_train_epochs=10, **HOW)
    objective = {"hard": Term("cross_entropy")}
    DistillationTrainer(model=model, args=args, train_dataset=table, objective=objective, **how).train()
    return model.eval()


pixels, digits = load_digits(return_X_y=True)
table = Dataset.from_dict({"input": pixels[:800] / 16, "labels": digits[:800]})
inputs, targets = torch.tensor(pixels[800:] / 16).float(), torch.tensor(digits[800:])
torch.manual_seed(0)
teacher = trained(depth=6)
before = copy.deepcopy(teacher.state_dict())
student = trained(depth=3, teacher=teacher, scheme=ModuleReplacing(probability=0.3, schedule="linear", end=0.6))

accuracy = float((student(inputs).argmax(-1) == targets).float().mean())
print(f"accuracy of the student: {accuracy:.3f}")
print(f"the student learned: {'yes' if accuracy > 0.7 else 'no'}")
same = all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
print(f"the teacher is as it was: {'yes' if same else 'no'}")
