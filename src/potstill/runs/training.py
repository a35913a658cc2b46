"""How one of a recipe's models learns, the same way for a run, a forecast and a profile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, PrinterCallback, TrainerCallback

from potstill.data.batching import batches
from potstill.errors import ModelError, TrainingError
from potstill.interfaces import Scheme, Task, TeacherSource
from potstill.losses.objective import Objective
from potstill.models.inputs import MAIN_INPUTS
from potstill.models.sklearn_models import SklearnModel
from potstill.recipe import arguments, build
from potstill.recipe.schema import TrainSpec
from potstill.runs.plan import Plan
from potstill.schemes.lesson import Learner
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
    teacher: TeacherSource | Mapping[str, TeacherSource] | None = None,
    learners: Mapping[str, Learner] | None = None,
    scheme: Scheme | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    bars: bool = False,
) -> DistillationTrainer:
    """Return what trains a model on the training split, or beside a teacher on the rows that are for that.

    Args:
        plan: what the recipe means.
        name: ``baseline``, ``distilled`` or a teacher's name, with that of a stage after a slash.
        model: what is trained.
        spec: how.
        objective: what it minimises.
        folder: where checkpoints go.
        seed: of shuffling, dropout and views.
        teacher: who teaches, several by name; ``None`` for an objective of hard terms alone.
        learners: who learns at the same time, by name.
        scheme: who teaches whom.
        callbacks: beside those of ``spec``.
        bars: whether to show progress bars.

    Raises:
        TrainingError: settings that cannot be.
        ObjectiveError: terms compare tokens of different tokenizers.
    """
    for each in (model, *(learner.model for learner in (learners or {}).values())):
        arguments.apply_dropout(each, spec.dropout)
    validation = plan.splits.validation
    setup = arguments.make_training(
        spec,
        folder=folder.absolute(),  # Trainer notes where the best checkpoint is
        seed=seed,
        bars=bars,
        evaluates=validation is not None and plan.label in validation.column_names,
        allow_code=plan.allow_code,
    )
    task, table = plan.task_of(name), plan.table_for(name, plan.splits.train)
    validation = None if validation is None else plan.table_for(name, validation)
    if teacher is not None:
        learner = name if name in plan.recipe.all_teachers else "student"
        task = build.prepared_for_distillation(plan.recipe, plan.task, plan.processors, learner)
        table = plan.splits.taught_on
    train = build.training_set(plan.recipe, task, spec, table, seed)
    build.check_tokens(plan.recipe, objective, train.__getitems__([0]))
    trainer = DistillationTrainer(
        model=model,
        teacher=teacher,
        objective=objective,
        learners=learners,
        scheme=scheme,
        forward=task.forward,
        args=setup.arguments,
        train_dataset=train,
        eval_dataset=None if validation is None else task.dataset(validation, training=False, seed=0),
        data_collator=ready_batch,
        compute_metrics=_Metrics(plan.task if plan.part_of(name) is None else task),
        callbacks=[*setup.callbacks, *callbacks],
        **setup.keywords,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogLines(name))
    return trainer


def fit_teacher(plan: Plan, name: str, model: nn.Module) -> int:
    """Fit a classifier of scikit-learn to the labelled training split, without random views, and return its rows.

    Args:
        plan: what the recipe means.
        name: the teacher's.
        model: nothing is done to any other model, and to one that is fitted already: 0 rows.

    Raises:
        TrainingError: the training split has no labels.
        ModelError: the task gives no numbers, or scikit-learn refuses them.
    """
    if not isinstance(model, SklearnModel) or model.is_fitted:
        return 0
    if plan.label not in plan.splits.train.column_names:
        raise TrainingError(f"the training split has no labels to fit the teacher '{name}' to")
    rows = plan.table_for(name, plan.splits.train)
    parts = list(batches(plan.task_of(name).dataset(rows, training=False, seed=0), 1024))
    key = next((key for key in MAIN_INPUTS if key in parts[0] and parts[0][key].is_floating_point()), None)
    if key is None:
        raise ModelError(f"the teacher '{name}' takes numbers, and the task gives {', '.join(sorted(parts[0]))}")
    model.fit(torch.cat([part[key] for part in parts]), torch.cat([part["labels"] for part in parts]))
    return int(model.about()["rows"])


def baseline_settings(plan: Plan, processes: int = 1) -> TrainSpec:
    """Return how the baseline is trained: by as many steps as a student that learns from a transfer set.

    That set has more rows than the training split, so that the same epochs would be fewer steps. What the recipe says
    of the baseline's own ``epochs`` or ``max_steps`` holds.
    """
    spec, own = plan.recipe.baseline_train, plan.recipe.baseline.train
    told = own is not None and ("epochs" in own.model_fields_set or "max_steps" in own.options)
    if plan.splits.transfer is None or told or spec.options.get("max_steps", -1) > 0:
        return spec
    usual = plan.recipe.train
    rows = len(plan.splits.transfer) / usual.batch_size
    each = math.ceil((math.floor(rows) if usual.options.get("dataloader_drop_last") else math.ceil(rows)) / processes)
    steps = max(1, math.ceil(each / usual.options.get("gradient_accumulation_steps", 1)))
    return TrainSpec(**{**dict(spec), "max_steps": math.ceil(steps * usual.epochs)})


class _Metrics:
    """A task's metrics as Trainer asks for them."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return every metric of what was predicted."""
        logits: Any = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return self.task.metrics(self.task.answers(logits), np.asarray(prediction.label_ids))
