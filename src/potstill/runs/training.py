"""The trainer of one of a recipe's models, made the same way for a run, a forecast and a profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import EvalPrediction, PrinterCallback, TrainerCallback

from potstill.interfaces import Task, TeacherSource
from potstill.losses.objective import Objective
from potstill.recipe import build
from potstill.recipe.schema import TrainSpec
from potstill.runs.plan import Plan
from potstill.training.callbacks import LogLines
from potstill.training.trainer import DistillationTrainer, ready_batch


def make_trainer(
    plan: Plan,
    name: str,
    model: nn.Module,
    spec: TrainSpec,
    objective: Objective,
    *,
    folder: Path,
    seed: int,
    teacher: TeacherSource | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    bars: bool = False,
) -> DistillationTrainer:
    """Return what trains a model on the training split.

    Args:
        plan: what the recipe means.
        name: ``baseline``, ``distilled`` or a teacher's name.
        model: what is trained.
        spec: how.
        objective: what it minimises.
        folder: where checkpoints go.
        seed: of shuffling, dropout and views.
        teacher: who teaches; ``None`` for an objective of hard terms alone.
        callbacks: beside those of ``spec``.
        bars: whether to show progress bars.

    Raises:
        TrainingError: settings that cannot be.
        ObjectiveError: terms compare tokens of different tokenizers.
    """
    build.apply_dropout(model, spec.dropout)
    validation = plan.splits.validation
    setup = build.make_training(
        spec,
        folder=folder.absolute(),  # Trainer notes where the best checkpoint is
        seed=seed,
        bars=bars,
        evaluates=validation is not None and plan.label in validation.column_names,
        allow_code=plan.allow_code,
    )
    task = plan.task_of(name)
    if teacher is not None:
        task = build.prepared_for_distillation(plan.recipe, plan.task, plan.processors)
    train = build.training_set(plan.recipe, task, spec, plan.splits.train, seed)
    build.check_tokens(plan.recipe, objective, train.__getitems__([0]))
    trainer = DistillationTrainer(
        model=model,
        teacher=teacher,
        objective=objective,
        forward=task.forward,
        args=setup.arguments,
        train_dataset=train,
        eval_dataset=None if validation is None else task.dataset(validation, training=False, seed=0),
        data_collator=ready_batch,
        compute_metrics=_Metrics(plan.task),
        callbacks=[*setup.callbacks, *callbacks],
        **setup.keywords,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogLines(name))
    return trainer


class _Metrics:
    """A task's metrics as Trainer asks for them."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return every metric of what was predicted."""
        logits: Any = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return self.task.metrics(self.task.answers(logits), np.asarray(prediction.label_ids))
