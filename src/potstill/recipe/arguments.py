"""What a ``train:`` section means to the trainer: arguments, optimizer, schedule, callbacks, precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from potstill.data.augment import split_step
from potstill.errors import TrainingError
from potstill.recipe.schema import TrainSpec
from potstill.registry import callbacks
from potstill.training.callbacks import MaxNorm
from potstill.training.optimizers import Choice, find_optimizer, find_scheduler, make_scheduler
from potstill.training.precision import HALVES, chosen_precision

DEFAULTS: dict[str, Any] = {
    "logging_strategy": "steps",
    "logging_steps": 0.02,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "report_to": [],
    "remove_unused_columns": False,
    "restore_callback_states_from_checkpoint": True,
    "per_device_eval_batch_size": 256,
    "log_level": "error",
    "logging_nan_inf_filter": False,  # which would log a diverged training as if it went on
    "dataloader_pin_memory": torch.cuda.is_available(),
    "use_cpu": not torch.accelerator.is_available(),
}
"""Training arguments where a recipe says nothing; fractions are shares of the training."""


@dataclass(frozen=True)
class TrainerSetup:
    """What a ``train:`` section means to :class:`DistillationTrainer`."""

    arguments: TrainingArguments
    callbacks: list[TrainerCallback]
    keywords: dict[str, Any] = field(default_factory=dict)


def make_training(
    spec: TrainSpec, *, folder: Path, seed: int, bars: bool, evaluates: bool, allow_code: bool = True
) -> TrainerSetup:
    """Return arguments, callbacks and the rest of a trainer's settings.

    Args:
        spec: the ``train:`` section.
        folder: where checkpoints go.
        seed: of shuffling, dropout and views.
        bars: whether to show progress bars.
        evaluates: whether there is a validation split.
        allow_code: whether dotted paths outside potstill may be imported.

    Raises:
        TrainingError: an argument that Trainer refuses.
        ComponentError: an unknown optimizer, scheduler or callback.
    """
    made = [_callback(component, allow_code) for component in spec.callbacks]
    optimizer = find_optimizer(spec.optimizer, allow_code=allow_code)
    scheduler = find_scheduler(spec.scheduler, allow_code=allow_code)
    _check_settings(spec, made, evaluates, optimizer, scheduler)
    wanted = {**DEFAULTS, **_trainer_names(optimizer.trainer, optimizer.options, scheduler.trainer, scheduler.options)}
    for callback in made:
        wanted |= getattr(callback, "training_arguments", {})
    if not evaluates:
        wanted |= {"eval_strategy": "no", "load_best_model_at_end": False}
    if scheduler.target is torch.optim.lr_scheduler.ReduceLROnPlateau:
        wanted.setdefault("metric_for_best_model", "loss")
    wanted |= spec.options
    precision = precision_of(spec)
    if precision in HALVES:
        wanted[precision] = True
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=spec.epochs,
            per_device_train_batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            weight_decay=spec.weight_decay,
            seed=seed,
            data_seed=seed,
            disable_tqdm=not bars,
            **wanted,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise TrainingError(f"train: {error}") from error
    keywords: dict[str, Any] = {
        "projector_learning_rate": spec.projector_learning_rate,
        "group_by_length": spec.group_by_length,
        "batch_tokens": spec.batch_tokens,
    }
    if optimizer.target is not None:
        keywords["optimizer_cls_and_kwargs"] = optimizer.target, {"lr": spec.learning_rate, **optimizer.options}
    keywords["scheduler"] = make_scheduler(scheduler)
    if spec.max_norm is not None:
        made.append(MaxNorm(spec.max_norm))
    return TrainerSetup(arguments, made, keywords)


def precision_of(spec: TrainSpec) -> str:
    """Return in which precision a model is trained here: ``fp32``, ``medium``, ``bf16`` or ``fp16``.

    Raises:
        TrainingError: a precision that the processor has not, or two of them.
    """
    device = "cpu" if spec.options.get("use_cpu") else torch.accelerator.current_accelerator() or "cpu"
    return chosen_precision(spec.precision, spec.options, device)


def apply_dropout(model: torch.nn.Module, share: float | None) -> None:
    """Set every dropout layer of a model to ``share``; nothing for ``None``.

    Raises:
        TrainingError: the model has no dropout layer.
    """
    if share is None:
        return
    layers = [m for m in model.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)]
    if not layers and share:
        raise TrainingError(f"train.dropout is {share} and {type(model).__name__} has no dropout layer")
    for layer in layers:
        layer.p = share


def _check_settings(
    spec: TrainSpec, made: list[TrainerCallback], evaluates: bool, optimizer: Choice, scheduler: Choice
) -> None:
    """Refuse what would have no effect, or fail only once the training is under way."""
    unused = sorted({"adam_beta1", "adam_beta2", "adam_epsilon"} & set(spec.options))
    if unused and optimizer.target is not None:
        raise TrainingError(
            f"train.{unused[0]} has no effect on the optimizer '{optimizer.name}'; "
            f"say it as in `optimizer: {{name: {optimizer.name}, betas: [0.9, 0.999], eps: 1.0e-8}}`"
        )
    strategy = str(spec.options.get("eval_strategy", "no"))
    needing = [] if strategy == "no" else [f"eval_strategy: {strategy}"]
    needing += [c.name for c in [scheduler] if c.target is torch.optim.lr_scheduler.ReduceLROnPlateau]
    needing += [
        split_step(component)[0]
        for component, callback in zip(spec.callbacks, made, strict=True)
        if "load_best_model_at_end" in getattr(callback, "training_arguments", {})
    ]
    if needing and not evaluates:
        raise TrainingError(f"train: {needing[0]} needs a validation split with labels, and there is none")


def _callback(component: str | Mapping[str, Any], allow_code: bool) -> TrainerCallback:
    name, options = split_step(component)
    factory: Callable[..., TrainerCallback] = callbacks.get(name, allow_code=allow_code)
    return factory(**options)


def _trainer_names(
    optimizer: str | None, optimizer_options: Mapping[str, Any], scheduler: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    names: dict[str, Any] = {}
    if optimizer is not None:
        names["optim"] = optimizer
        if optimizer_options:
            names["optim_args"] = ",".join(f"{key}={value}" for key, value in optimizer_options.items())
    if scheduler is not None:
        names["lr_scheduler_type"] = scheduler
        if options:
            names["lr_scheduler_kwargs"] = dict(options)
    return names
