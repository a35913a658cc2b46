"""The ``train:`` sections of a recipe: arguments, precision, optimizer, schedule and callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from potstill.data.augment import split_step
from potstill.errors import DataError, Problem, did_you_mean
from potstill.recipe.schema import TrainSpec
from potstill.recipe.trees import Path_, items
from potstill.registry import callbacks

MANAGED = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "lr_scheduler_type": "scheduler",
    "lr_scheduler_kwargs": "scheduler: {name: …, option: …}",
    "optim": "optimizer",
    "optim_args": "optimizer: {name: …, option: …}",
    "label_smoothing_factor": "objective.hard.label_smoothing",
    "output_dir": "--output",
    "seed": "seed (at the top of the recipe)",
    "data_seed": "seed (at the top of the recipe)",
    "remove_unused_columns": "nothing: columns are chosen by the task",
    "resume_from_checkpoint": "nothing: the same command goes on",
}
"""Training arguments that a recipe says in another way, and how."""


def check_train(train: Mapping[str, Any], path: Path_, *, allow_code: bool) -> list[Problem]:
    """Return every mistake in a ``train:`` section: arguments, optimizer, scheduler, callbacks."""
    problems = _training_arguments(train, path) + _precision(train, path)
    if not train:
        return problems
    from potstill.training.optimizers import check_choice

    for kind in ("optimizer", "scheduler"):
        if kind in train:
            problems += check_choice(kind, train[kind], (*path, kind), allow_code=allow_code)
    for place, component in enumerate(items(train.get("callbacks"))):
        where = (*path, "callbacks", place)
        try:
            name, options = split_step(component)
        except DataError:
            if isinstance(component, Mapping):  # anything else is a mistake that the schema reports
                problems.append(Problem(where, "expected a callback as a name or as `name: {option: value}`"))
        else:
            problems += callbacks.check(name, options, path=(*where, name), allow_code=allow_code)
    return problems


def _precision(train: Mapping[str, Any], path: Path_) -> list[Problem]:
    """A precision is said once: as ``precision`` or as Trainer's ``bf16`` or ``fp16``."""
    beside = next((name for name in ("bf16", "fp16") if train.get(name)), None)
    if beside is None or train.get("precision") is None:
        return []
    message = f"expected one precision, got {train['precision']} and `{beside}: true`"
    return [Problem((*path, "precision"), message, "leave out one of them")]


def check_baseline_precision(train: Mapping[str, Any], own: Mapping[str, Any]) -> list[Problem]:
    """The baseline has the settings of ``train`` too, so that two precisions may come together only there."""
    if not own or _precision(train, ()) or _precision(own, ()):
        return []
    key = next((key for key in ("precision", "bf16", "fp16") if own.get(key)), "precision")
    return [replace(each, path=("baseline", "train", key)) for each in _precision({**train, **own}, ())]


def _training_arguments(train: Mapping[str, Any], path: Path_) -> list[Problem]:
    extra = [key for key in train if key not in TrainSpec.model_fields]
    if not extra:
        return []
    from transformers.training_args import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)} - set(MANAGED)
    problems = []
    for key in extra:
        if key in MANAGED:
            problems.append(Problem((*path, key), f"expected another way to say '{key}'", f"use {MANAGED[key]}"))
        elif key not in known:
            hint = did_you_mean(str(key), [*TrainSpec.model_fields, *known])
            problems.append(Problem((*path, key), f"unknown key '{key}'", hint))
    return problems
