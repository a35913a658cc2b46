"""A new loss in one file: write it, register it, name it in a recipe. No file of potstill is touched.

    python examples/new_loss.py [--output FOLDER]

The loss is Huber's, on logits: quadratic for small differences between teacher and student, linear for large ones.
A small network learns 400 real handwritten digits with it, once under its registered name and once under its dotted
path, which needs no registration. On the command line that is ``python -m potstill distill my.yaml --allow-code``,
with ``loss: examples.new_loss:huber`` in the recipe, in the folder that holds ``examples``.

Promises: "huber teaches: yes", "registered name and dotted path give the same student: yes"
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from potstill import Run
from potstill.evaluation.predict import Predictions
from potstill.recipe.load import recipe_from
from potstill.registry import losses
from potstill.runs.metrics import RunMetrics


@losses.register(
    "huber",
    per="position",
    reference="Huber 1964, https://doi.org/10.1214/aoms/1177703732",
    formula="mean(Huber({student} − {teacher}, δ = {delta}))",
    zero_at_equality=True,
)
def huber(student: Tensor, teacher: Tensor, *, delta: Annotated[float, Field(gt=0)] = 1.0) -> Tensor:
    """Huber's loss between two signals, averaged over the last axis.

    Args:
        student: ``[..., H]``, logits or features.
        teacher: ``[..., H]``.
        delta: difference at which it turns from quadratic to linear, in units of the signal.

    Returns:
        ``[...]``, in squared units of the signal.

    Reference: Huber 1964, https://doi.org/10.1214/aoms/1177703732.
    """
    return F.huber_loss(student.float(), teacher.float(), reduction="none", delta=delta).mean(-1)


def recipe(loss: str) -> dict[str, Any]:
    """The recipe as plain data: what a YAML file would hold."""
    return {
        "name": "huber",
        "task": {"name": "image-classification"},
        "data": {"source": "sklearn", "path": "load_digits", "test": 0.5, "limit": {"train": 400}},
        "teacher": {
            "model": "potstill:convnet",
            "kwargs": {"widths": [32, 64], "depth": 2},
            "train": {"epochs": 15, "batch_size": 64, "learning_rate": 3e-3},
        },
        "student": {"model": "potstill:convnet", "kwargs": {"widths": [16, 32]}},
        "objective": {
            "soft": {"loss": loss, "weight": 0.9, "delta": 2.0},
            "hard": {"loss": "cross_entropy", "weight": 0.1},
        },
        "train": {"epochs": 30, "batch_size": 64, "learning_rate": 1e-2, "max_grad_norm": 0.0},
        "evaluate": {"resamples": 200, "latency": False},
    }


def distil(loss: str, output: Path) -> tuple[RunMetrics, Predictions]:
    """Do one run and return its figures and the student's answers on the test split."""
    run = Run(recipe_from(recipe(loss)), output)
    metrics = run.execute()
    return metrics, Predictions.load(output / "predictions" / "distilled.test.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the two runs go; a temporary folder if omitted")
    output = parser.parse_args().output or Path(tempfile.mkdtemp(prefix="new-loss-"))

    metrics, answers = distil("huber", output / "by-name")
    _, again = distil(f"{__name__}:huber", output / "by-path")

    for name, model in metrics.models.items():
        print(f"{name}: accuracy {model.metrics['accuracy'].value:.3f}, {model.parameters:,} parameters")
    student, chance = metrics.models["distilled"].metrics["accuracy"].value, metrics.chance or 0.0
    same = np.array_equal(answers.logits, again.logits)
    print(f"huber teaches: {'yes' if student > chance + 0.5 else 'no'}")
    print(f"registered name and dotted path give the same student: {'yes' if same else 'no'}")
    print(f"runs: {output}")


if __name__ == "__main__":
    main()
