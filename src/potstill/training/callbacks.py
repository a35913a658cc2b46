"""What may happen beside the training: early stopping, the best checkpoint, weight constraints, more logging.

A callback may declare ``training_arguments``, which are set when a recipe names it, and ``bind(trainer)``, which is
called once the trainer exists. Those with a state are ``ExportableState`` and survive a resume.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import datasets
import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_callback import EarlyStoppingCallback, TrainerCallback

from potstill.errors import TrainingError
from potstill.registry import callbacks
from potstill.teachers.cached import uncached
from potstill.teachers.live import leaves

logger = logging.getLogger("potstill")

_CONSTRAINED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@callbacks.register("early_stopping")
class EarlyStopping(EarlyStoppingCallback):  # type: ignore[misc]  # transformers is untyped here
    """Stop when a validation metric has not got better for some evaluations; the best weights are kept.

    Args:
        metric: name of the metric, or ``loss``.
        patience: evaluations without a gain before it stops.
        threshold: what counts as a gain, in units of the metric.
        greater_is_better: whether a higher value is better.
    """

    def __init__(
        self,
        metric: str = "accuracy",
        patience: Annotated[int, Field(gt=0)] = 3,
        threshold: Annotated[float, Field(ge=0)] = 0.0,
        greater_is_better: bool | None = None,
    ) -> None:
        super().__init__(early_stopping_patience=patience, early_stopping_threshold=threshold)
        self.metric = metric
        self.training_arguments = _best(metric, greater_is_better)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that there is something to stop by.

        Raises:
            TrainingError: there is no validation split with labels, so nothing is ever evaluated.
        """
        if args.eval_strategy == "no":
            raise TrainingError("early_stopping needs a validation split with labels, and there is none")
        super().on_train_begin(args, state, control, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True  # the checkpoint gone on from is the one at which it stopped

    def state(self) -> dict[str, Any]:
        """Return what a resume needs."""
        own = {
            "metric": self.metric,
            "patience": self.early_stopping_patience,
            "threshold": self.early_stopping_threshold,
            "greater_is_better": self.training_arguments["greater_is_better"],
        }
        return {"args": own, "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter}}


@callbacks.register("best_checkpoint")
class BestCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Keep the weights that were best on the validation split rather than the last.

    Args:
        metric: name of the metric, or ``loss``.
        greater_is_better: whether a higher value is better; by default for everything but ``loss``.
    """

    def __init__(self, metric: str = "accuracy", greater_is_better: bool | None = None) -> None:
        self.training_arguments = _best(metric, greater_is_better)


@callbacks.register("agreement")
class Agreement(TrainerCallback):  # type: ignore[misc]
    """Log the share of validation samples on which student and teacher answer alike, at every evaluation."""

    def __init__(self) -> None:
        self._trainer: Any = None
        self._answers: Any = None

    def bind(self, trainer: Any) -> None:
        """Take the trainer, which holds the teacher and the validation split."""
        self._trainer = trainer

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare both on the validation split; the teacher answers once."""
        trainer = self._trainer
        if trainer is None or trainer.teacher is None or trainer.eval_dataset is None:
            return
        if self._answers is None:
            if _reads_rows(trainer.teacher):
                raise TrainingError(
                    "agreement asks the teacher about the validation split, and this one knows the rows of the "
                    "training split alone; leave out the callback"
                )
            self._answers = _argmax(trainer, uncached(trainer.teacher))  # a cache is of the training samples
        answers = self._answers
        if any(hasattr(each, "after_step") for each in leaves(trainer.teacher).values()):
            self._answers = None  # those of a teacher that changes are asked for again
        module = trainer.distillation_module
        was_training = module.student.training
        module.student.eval()
        same = float(np.mean(_argmax(trainer, module.signals) == answers))
        module.student.train(was_training)
        trainer.log({"eval_agreement": same})


class MaxNorm(TrainerCallback):  # type: ignore[misc]
    """Bound the length of each unit's incoming weights after every step (Srebro, Shraibman 2005; Hinton et al. 2012).

    Args:
        bound: the longest allowed, in units of the weights.

    Reference: https://arxiv.org/abs/1207.0580.
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shorten the weights of linear and convolutional layers that grew too long."""
        learners = getattr(kwargs["model"], "learners", None)
        models = [each.student for each in learners.values()] if learners else [kwargs["model"]]
        with torch.no_grad():
            for module in (module for model in models for module in model.modules()):
                if isinstance(module, _CONSTRAINED) and module.weight.requires_grad:
                    module.weight.renorm_(2, 0, self.bound)


class AfterStep(TrainerCallback):  # type: ignore[misc]
    """Let a teacher that changes do so after every optimizer step, such as a moving average of the student.

    Args:
        trainer: whose teacher.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the teacher how far the training is."""
        for source in leaves(self._trainer.teacher).values():
            act: Any = getattr(source, "after_step", None)
            if act is not None:
                act(self._trainer.progress)


class LogLines(TrainerCallback):  # type: ignore[misc]
    """Write what is logged as a line of potstill's log, in place of Trainer's bare dictionaries.

    Args:
        name: what is trained.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so where the training ended early, and which weights are kept where they are not the last."""
        if state.global_step < state.max_steps:
            logger.info("%s: stopped early, at step %d of %d", self.name, state.global_step, state.max_steps)
        if args.load_best_model_at_end and state.best_global_step:
            best = (self.name, state.best_global_step, args.metric_for_best_model, state.best_metric)
            logger.info("%s: keeps the weights of step %d (%s %.4g)", *best)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Write one line: losses at debug level, evaluations at info level."""
        figures = {k: v for k, v in (logs or {}).items() if isinstance(v, float) and not k.endswith("per_second")}
        evaluated = any(key.startswith("eval_") for key in figures)
        if evaluated:
            figures = {k: v for k, v in figures.items() if k.startswith("eval_") and k != "eval_runtime"}
        line = ", ".join(f"{key.removeprefix('eval_')} {value:.4g}" for key, value in figures.items() if key != "epoch")
        level = logging.INFO if evaluated else logging.DEBUG
        logger.log(level, "%s: step %d of %d: %s", self.name, state.global_step, state.max_steps, line)


class Epochs(TrainerCallback):  # type: ignore[misc]
    """Tell the training data which epoch it is, with any number of processes and loader workers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch before the loader is asked for its first batch."""
        self.dataset.set_epoch(int(state.epoch or 0))


def _reads_rows(source: Any) -> bool:
    """Return whether a teacher, or one of several, finds its answers by the number of a row."""
    return any(getattr(uncached(each), "reads_rows", False) for each in leaves(source).values())


def _best(metric: str, greater_is_better: bool | None) -> Mapping[str, Any]:
    better = metric != "loss" if greater_is_better is None else greater_is_better
    return {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": better}


@torch.no_grad()
def _argmax(trainer: Any, answer: Any) -> Any:
    """What a model answers on the validation split; with several teachers, the first of them."""
    found = []
    for batch in _validation(trainer):
        signals = answer(trainer._prepare_inputs(batch))
        logits = next(value for name, value in signals.items() if name.split("/")[-1] == "logits")
        found.append(logits.argmax(-1).cpu())
    return torch.cat(found).numpy()


def _validation(trainer: Any) -> Iterator[Any]:
    """Yield the validation split whole, on every process, without a draw from the global generator."""
    held, size = trainer.eval_dataset, trainer.args.per_device_eval_batch_size
    for each in held.values() if isinstance(held, Mapping) else [held]:
        table = trainer._remove_unused_columns(each) if isinstance(each, datasets.Dataset) else each
        yield from DataLoader(table, size, collate_fn=trainer.data_collator, generator=torch.Generator())
