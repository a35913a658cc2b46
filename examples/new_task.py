"""A new task in one file: ordinal classification of a table, with its own hard loss, mask and metrics.

    python examples/new_task.py [--output FOLDER]

Grades have an order: to take "low" for "very high" is a worse mistake than to take it for "moderate". So the loss on
the labels is the squared distance between the cumulative distributions, the answer is the median grade, and models
are compared by the quadratically weighted kappa. Rows that a column marks as not trusted teach nothing, neither by
their label nor by what the teacher says about them, and nothing is judged on them.

The data are real: scikit-learn's 442 diabetes patients, the progression of the disease after a year in four grades;
rows with an outlier among their measurements are not trusted.

Promises: "better than any constant answer: yes", "same answers after reload: yes"
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes
from torch import Tensor

from potstill import Run
from potstill.data.batching import InMemory
from potstill.evaluation.predict import predict
from potstill.interfaces import IGNORED, Batch
from potstill.models.load import load_model
from potstill.recipe.load import recipe_from
from potstill.registry import losses, tasks
from potstill.tasks.tabular_classification import TabularClassification

GRADES = ["low", "moderate", "high", "very high"]


@losses.register("emd", per="position", reference="https://arxiv.org/abs/1611.05916", formula="EMD²(labels, {student})")
def emd(student: Tensor, *, labels: Tensor) -> Tensor:
    """Squared earth mover's distance between the predicted distribution and the label's, for ordered classes.

    Args:
        student: logits ``[..., C]``, the classes in their order.
        labels: class ids ``[...]``, −100 where there is none.

    Returns:
        ``[...]`` in [0, C − 1]; what stands where the label is −100 does not count.

    Reference: Hou, Yu, Samaras 2016, https://arxiv.org/abs/1611.05916.
    """
    cumulated = student.float().softmax(-1).cumsum(-1)
    classes = torch.arange(student.shape[-1], device=student.device)
    wanted = (labels.unsqueeze(-1) <= classes).float()
    return (cumulated - wanted).square().sum(-1)


@tasks.register("ordinal-classification", input="tabular")
class OrdinalClassification(TabularClassification):
    """One of several ordered classes for a row of a table. See :class:`potstill.interfaces.Task`.

    Columns, their standardisation and the forward are those of :class:`TabularClassification`; the order of the
    classes is that of ``data.labels``.

    Args:
        label: the column of the class.
        features: the columns to use; all others if omitted.
        trusted: a column of true and false; rows where it is false count nowhere.
        augment: entries of ``data.augment``.
    """

    name = "ordinal-classification"
    primary = "kappa"
    hard_loss = "emd"

    def __init__(
        self,
        *,
        label: str = "label",
        features: list[str] | None = None,
        trusted: str | None = None,
        augment: Sequence[Any] = (),
    ) -> None:
        super().__init__(label=label, features=features, augment=augment)
        self.trusted = trusted

    def fit(self, train: Dataset) -> None:
        """Learn the classes and, for each column, its mean and standard deviation or its categories."""
        others = (self.label, self.trusted, "sample_id")
        self.features = self.features or [name for name in train.column_names if name not in others]
        super().fit(train)

    def dataset(self, table: Dataset, *, training: bool, seed: int) -> InMemory:
        """Return batches with ``features`` ``[B, F]`` and ``trusted`` bool ``[B]``; untrusted rows have no label."""
        dataset = super().dataset(table, training=training, seed=seed)
        if self.trusted is not None:
            trusted = torch.as_tensor(np.asarray(table[self.trusted], dtype=bool))
            dataset.columns["trusted"] = trusted
            dataset.columns["labels"] = dataset.columns["labels"].where(trusted, IGNORED)
        return dataset

    def mask(self, batch: Batch) -> Tensor | None:
        """Return the rows on which student and teacher are compared: the trusted ones, ``[B]``."""
        return batch.get("trusted")

    def answers(self, logits: NDArray[Any]) -> NDArray[Any]:
        """Return the median grade ``[N]`` of logits ``[N, C]``."""
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        cumulated = probabilities.cumsum(-1) / probabilities.sum(-1, keepdims=True)
        return np.asarray((cumulated >= 0.5).argmax(-1))

    def metrics(self, answers: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
        """Return ``kappa`` (quadratic weights, 0 for a constant answer, 1 at best), ``within_one`` and ``error``.

        Args:
            answers: grades ``[N]``.
            labels: ``[N]``; −100 is left out.
        """
        known = labels != IGNORED
        answers, labels = answers[known], labels[known]
        if not len(labels):
            return {}
        distance = np.abs(answers - labels)
        by_chance = answers.var() + labels.var() + (answers.mean() - labels.mean()) ** 2
        return {
            "kappa": float(1 - np.mean(distance**2) / by_chance) if by_chance else 0.0,
            "within_one": float(np.mean(distance <= 1)),
            "error": float(np.mean(distance)),
        }

    def chance(self, labels: NDArray[Any]) -> float:
        """Return 0: the kappa of any constant answer."""
        return 0.0

    def settings(self) -> dict[str, Any]:
        """Return what inference needs, as plain JSON."""
        return {**super().settings(), "trusted": self.trusted}

    def restore(self, settings: Mapping[str, Any]) -> None:
        """Take back what :meth:`settings` returned."""
        super().restore(settings)
        self.trusted = settings["trusted"]


def graded_diabetes() -> Dataset:
    """A data source: ten measurements of each patient, the grade, and whether no measurement is an outlier."""
    patients = load_diabetes(scaled=False)
    measured = patients["data"]
    deviation = np.abs(measured - measured.mean(0)) / measured.std(0)
    grade = np.digitize(patients["target"], np.quantile(patients["target"], [0.25, 0.5, 0.75]))
    columns: dict[str, Any] = {name: measured[:, i] for i, name in enumerate(patients["feature_names"])}
    columns["trusted"] = deviation.max(1) < 3
    columns["label"] = [GRADES[i] for i in grade]
    return Dataset.from_dict(columns)


def recipe() -> dict[str, Any]:
    """The recipe as plain data: what a YAML file would hold."""
    return {
        "name": "ordinal",
        "task": {"name": "ordinal-classification", "trusted": "trusted"},
        "data": {"source": f"{__name__}:graded_diabetes", "labels": GRADES, "test": 0.4, "validation": 0.1},
        "teacher": {
            "model": "potstill:mlp",
            "kwargs": {"hidden": [64, 64], "dropout": 0.3},
            "train": {"epochs": 40, "batch_size": 32, "learning_rate": 3e-3, "weight_decay": 0.1},
        },
        "student": {"model": "potstill:mlp", "kwargs": {"hidden": [16]}},
        "objective": {
            "soft": {"loss": "kl", "weight": 0.9, "temperature": 2.0},
            "hard": {"loss": "emd", "weight": 0.1},
        },
        "train": {"epochs": 60, "batch_size": 32, "learning_rate": 1e-2},
        "evaluate": {"latency": False},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the run's folder; a temporary one if omitted")
    output = parser.parse_args().output or Path(tempfile.mkdtemp(prefix="new-task-"))

    run = Run(recipe_from(recipe()), output)
    found = run.execute()
    for name, model in found.models.items():
        figures = ", ".join(f"{metric} {each.value:.3f}" for metric, each in model.metrics.items())
        print(f"{name}: {figures}, {model.parameters:,} parameters")

    model, card = load_model(run.model_folder("distilled"))
    task = tasks.get(card["task"])()
    task.restore(card["settings"])
    again = predict(model, task, task.dataset(run.splits.test, training=False, seed=0))
    kappa = task.metrics(task.answers(again.logits), again.labels)["kappa"]
    student = found.models["distilled"].metrics["kappa"]
    print(f"better than any constant answer: {'yes' if student.low > (found.chance or 0.0) else 'no'}")
    print(f"same answers after reload: {'yes' if kappa == student.value else 'no'}")
    print(f"run: {output}")


if __name__ == "__main__":
    main()
