"""Optimizers and learning-rate schedules by name: Trainer's, those of ``torch.optim``, or dotted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from potstill.errors import ComponentError, Problem, did_you_mean
from potstill.registry import check_options, import_dotted

_RESERVED = frozenset({"params", "optimizer", "lr", "weight_decay"})  # what train.learning_rate and weight_decay say
_FROM_TRAINER = frozenset({"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"})


@dataclass(frozen=True)
class Choice:
    """What a name stands for: a name of Trainer's own (``trainer``) or a class or function (``target``)."""

    name: str
    options: Mapping[str, Any]
    trainer: str | None = None
    target: Callable[..., Any] | None = None


def find_optimizer(component: str | Mapping[str, Any], *, allow_code: bool = True) -> Choice:
    """Return the optimizer that a recipe names.

    Raises:
        ComponentError: there is none of that name; proposes the nearest.
        CodeNotAllowedError: a dotted path that was not allowed.
    """
    base = torch.optim.Optimizer
    found = vars(torch.optim).items()
    classes = {n: c for n, c in found if inspect.isclass(c) and issubclass(c, base) and c is not base}
    return _find(component, "optimizer", classes, {str(o.value) for o in OptimizerNames}, allow_code)


def find_scheduler(component: str | Mapping[str, Any], *, allow_code: bool = True) -> Choice:
    """Return the learning-rate schedule that a recipe names; its unit is the optimizer step.

    Raises:
        ComponentError: there is none of that name; proposes the nearest.
        CodeNotAllowedError: a dotted path that was not allowed.
    """
    base = torch.optim.lr_scheduler.LRScheduler
    found = vars(torch.optim.lr_scheduler).items()
    classes = {n: c for n, c in found if inspect.isclass(c) and issubclass(c, base) and c is not base}
    return _find(component, "scheduler", classes, {str(s.value) for s in SchedulerType}, allow_code)


def check_choice(
    kind: str, component: str | Mapping[str, Any], path: tuple[str | int, ...], *, allow_code: bool
) -> list[Problem]:
    """Return every mistake in an ``optimizer`` or ``scheduler`` of a recipe."""
    try:
        find = find_optimizer if kind == "optimizer" else find_scheduler
        choice = find(component, allow_code=allow_code)
    except ComponentError as error:
        return [Problem(path, str(error))]
    label = f"{kind} '{choice.name}'"
    if choice.target is not None:
        return check_options(choice.target, choice.options, label=label, path=path, reserved=_RESERVED)
    if kind == "scheduler":
        target = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(choice.name)]
        return check_options(target, choice.options, label=label, path=path, reserved=_FROM_TRAINER)
    if choice.options and choice.name.startswith("adamw_torch"):  # Trainer would leave them out without a word
        return [Problem((*path, name), f"{label} takes no options", "use AdamW") for name in choice.options]
    return []


def make_scheduler(choice: Choice) -> Callable[[torch.optim.Optimizer, int], Any] | None:
    """Return ``(optimizer, steps) -> schedule`` for a schedule that is not Trainer's, else ``None``."""
    if choice.target is None:
        return None
    make = partial(choice.target, **choice.options)
    return lambda optimizer, steps: make(optimizer)


def _find(
    component: str | Mapping[str, Any], kind: str, classes: Mapping[str, Any], own: set[str], allow_code: bool
) -> Choice:
    options = dict(component) if isinstance(component, Mapping) else {"name": component}
    name = str(options.pop("name", ""))
    lowered = {known.lower(): known for known in classes}
    if name in own and name.lower() not in lowered:
        return Choice(name, options, trainer=name)
    if name.lower() in lowered:
        return Choice(name, options, target=classes[lowered[name.lower()]])
    if ":" in name:
        return Choice(name, options, target=import_dotted(name, allow_code=allow_code))
    raise ComponentError(f"there is no {kind} '{name}'; {did_you_mean(name, [*classes, *own])}")
