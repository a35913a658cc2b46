"""The engine: ``transformers.Trainer`` that trains a distillation module beside a teacher.

Mixed precision, accumulation, checkpoints, trackers, DDP, FSDP and DeepSpeed come from Trainer and Accelerate. What is
overridden here is what distillation needs: counts per term, kept columns, student-only prediction and saving.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import seed_worker
from transformers.utils.generic import find_labels

from potstill.data.batching import InMemory, LengthSampler, length_order
from potstill.data.budgets import TokenBudget
from potstill.data.tables import in_memory
from potstill.errors import TrainingError, did_you_mean
from potstill.interfaces import Batch, Progress, Scheme, Signals, TeacherSource
from potstill.losses.objective import Objective, clamp_counts, default_objective
from potstill.models.inputs import TEACHER_PREFIX, accepted_inputs
from potstill.models.weights import load_student, save_student
from potstill.schemes.lesson import STUDENT, Extension, Learner, Lesson
from potstill.teachers.cached import uncached, unmask
from potstill.teachers.live import ask, leaves
from potstill.teachers.shared import Sharing
from potstill.training.arguments import check_arguments, check_balance, check_budget, check_sharding, check_student
from potstill.training.callbacks import AfterStep, Epochs
from potstill.training.checkpoints import mark_complete, rotate
from potstill.training.learners import JointModule, as_sources, joined, plain_hard, split_groups
from potstill.training.module import DistillationModule, hard_loss
from potstill.training.overhead import packages_looked_up_once
from potstill.training.state import load_learning, save_learning


class DistillationTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Trains a student to match a teacher; a drop-in for a Trainer whose ``compute_loss`` was overridden.

    Args:
        teacher: a trained module, any :class:`potstill.interfaces.TeacherSource`, several of them by name, or ``None``
            for an objective of hard terms alone (a baseline).
        objective: what to minimise; 0.7·T²·KL at T = 4 plus 0.3·cross-entropy if omitted. A dictionary of terms works
            too.
        model: the student.
        learners: models that learn at the same time, by name, such as a teacher that is trained jointly or a peer; each
            with its own objective, parameter group and clipping, saved in checkpoints. See
            :class:`potstill.schemes.lesson.Learner`.
        scheme: arranges who learns what from whom; see :class:`potstill.interfaces.Scheme`.
        extension: what the student has only while it learns.
        forward: ``(model, batch) -> responses``, e.g. a task's; used for the student and for a module given as teacher.
        save_student: ``(student, folder) -> None`` in place of ``save_pretrained`` or safetensors.
        projector_learning_rate: learning rate of the objective's own parameters; the student's if omitted.
        group_by_length: whether to put samples of like length into one batch, where ``train_dataset.lengths`` has them,
            or a table has token ids that ``processing_class`` pads.
        batch_tokens: samples of a batch times tokens of the longest of them, at most; ``args`` then say how many
            samples a batch may have. Needs ``group_by_length`` and lengths.
        share_layers: whether frozen layers that a live teacher has too, with the same weights, are computed once in a
            step; see :class:`potstill.teachers.shared.SharedLayers`.
        scheduler: ``(optimizer, number of steps) -> scheduler`` in place of ``args.lr_scheduler_type``.
        trainer_arguments: everything else that ``transformers.Trainer`` takes: ``args``, ``train_dataset``,
            ``eval_dataset``, ``processing_class``, ``data_collator``, ``compute_metrics``, ``callbacks``, ….

    Raises:
        TrainingError: settings that would silently give wrong results (label smoothing in the arguments, re-entrant
            gradient checkpointing, several GPUs without a launcher), or a missing teacher.

    A table of numbers without a format, and without a ``data_collator``, is read into memory once (up to 2 GiB): its
    batches are those that Trainer would collate, with ``sample_id``.

    A subclass may override ``compute_loss``; it then returns a mean over the micro-batch, as with ``Trainer``.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        teacher: nn.Module | TeacherSource | Mapping[str, nn.Module | TeacherSource] | None = None,
        objective: Objective | Mapping[str, Any] | None = None,
        learners: Mapping[str, Learner] | None = None,
        scheme: Scheme | None = None,
        extension: Extension | None = None,
        forward: Callable[[nn.Module, Batch], Signals] | None = None,
        save_student: Callable[[nn.Module, Path], None] | None = None,
        projector_learning_rate: float | None = None,
        group_by_length: bool = False,
        batch_tokens: int | None = None,
        share_layers: bool = True,
        scheduler: Callable[[torch.optim.Optimizer, int], Any] | None = None,
        **trainer_arguments: Any,
    ) -> None:
        terms = Objective(objective) if isinstance(objective, Mapping) else objective or default_objective()
        args = trainer_arguments.setdefault("args", None) or TrainingArguments(output_dir="distilled")
        trainer_arguments["args"] = check_arguments(args)
        check_budget(args, batch_tokens, group_by_length)
        others = {name: replace(learner) for name, learner in (learners or {}).items()}
        lesson = Lesson(Learner(model, terms, forward, extension=extension), others, seed=args.seed)
        lesson.sources = as_sources(teacher, lesson)
        usual = {name: copy.deepcopy(term) for name, term in terms.named_terms()}
        lesson = lesson if scheme is None else scheme.arrange(lesson)
        self._hard = plain_hard(usual, lesson, terms)
        for learner in lesson.others.values():
            learner.objective = learner.objective or copy.deepcopy(self._hard)
        check_sharding(args, lesson)
        module, self.teacher = joined(lesson)
        terms = module.objective
        for each in module.learners.values():
            unmask(self.teacher, each.objective.unmasked())
            check_balance(args, each.objective)
            check_student(each.student)
        if self.teacher is None and not lesson.others and module.taught():
            raise TrainingError("the objective compares with a teacher and none was given; pass teacher=…")
        self._signature_columns: list[str] | None = None
        self.lr_scheduler: Any = None
        self.data_collator: Any = None
        self._save_student = save_student or save_student_default
        self._projector_learning_rate = projector_learning_rate
        self._make_scheduler = scheduler
        self._group_by_length = group_by_length
        self._batch_tokens = batch_tokens
        self._sharing = Sharing(share_layers)
        self._tables: WeakKeyDictionary[datasets.Dataset, tuple[Any, InMemory | None]] = WeakKeyDictionary()
        self._parts: dict[str, Tensor] = {}
        self._parts_seen = 0
        self._parts_since = 0
        trainer_arguments["train_dataset"] = _with_sample_ids(trainer_arguments.get("train_dataset"))
        super().__init__(module, **trainer_arguments)
        self._usual_collator = self.data_collator if trainer_arguments.get("data_collator") is None else None
        if self.args.label_names is None:
            self.label_names = find_labels(type(model)) or ["labels"]
        self.loss_is_scaled_for_ga = self._counts_are_used
        self.model_accepts_loss_kwargs = self._counts_are_used
        self._hard.to(self.args.device)
        move: Any = getattr(self.teacher, "to", None)
        if move is not None:
            move(self.args.device)
        self._set_up_callbacks()

    # ---- what a step is -------------------------------------------------------------------------------------------

    @property
    def _counts_are_used(self) -> bool:
        """Whether losses are divided by the counts of the whole window: not where a subclass computes its own."""
        return type(self).compute_loss is DistillationTrainer.compute_loss

    @property
    def progress(self) -> Progress:
        """Where the training stands."""
        return Progress(self.state.global_step, max(1, self.state.max_steps), float(self.state.epoch or 0.0))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """Return the micro-batches of one optimizer step and each term's count over them and over all processes."""
        if not self._counts_are_used:
            return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[no-any-return]
        batches = list(itertools.islice(epoch_iterator, num_batches))
        return batches, self._window_counts(batches, device) if batches else None

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the objective's total for one micro-batch; see :class:`transformers.Trainer`."""
        batch = dict(inputs)
        joint = isinstance(self.distillation_module, JointModule)  # whose learners have entries of their own
        own = {name: value for name, value in batch.items() if joint or not name.startswith(TEACHER_PREFIX)}
        counts = num_items_in_batch if isinstance(num_items_in_batch, Mapping) else None
        with self._sharing(self.teacher, self.distillation_module.student, model):
            with self.accelerator.autocast():  # in the student's precision; losses go on in float32
                signals = self._taught(batch)
            output = model(teacher=signals, counts=counts, progress=self.progress, **own)
        if model.training:
            self._record(output.parts)
        return (output.loss, output) if return_outputs else output.loss

    def _taught(self, batch: Batch) -> Signals:
        return ask(self.teacher, batch, self.distillation_module.taught(self.progress))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradients of each learner by themselves, and return the norm of the student's."""
        module = self.distillation_module
        if not isinstance(module, JointModule):
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return module.clip(self.args.max_grad_norm)[STUDENT]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm that clipping found; without clipping it is not computed, for it costs a pass over all."""
        return None if grad_norm is None else super()._get_grad_norm(model, grad_norm)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Run the student alone; the loss is that of the hard terms."""
        batch = self._prepare_inputs(inputs)
        module = self.distillation_module
        with torch.no_grad(), self.compute_loss_context_manager():
            said = module._respond(module.student, batch)
        labels = batch.get(self.label_names[0]) if self.label_names else None
        known = {**batch, "labels": labels}
        loss = hard_loss(self._hard, said, known, self.progress) if labels is not None else None
        if prediction_loss_only:
            return loss, None, None
        return loss, said[module.responses[0]].detach(), labels

    # ---- data -----------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        """Keep what student, teacher, masks and labels need; Trainer's own rule drops a BERT teacher's inputs."""
        if self._signature_columns is None:
            module = self.distillation_module
            models = [getattr(leaf, "model", None) for leaf in leaves(uncached(self.teacher)).values()]
            wanted = set(module.accepts) | set(self.label_names) | {"label", "label_ids", "sample_id", "attention_mask"}
            for model in models:
                if isinstance(model, nn.Module):
                    wanted |= accepted_inputs(getattr(model, "model", model)) or set()
            for learner in module.learners.values():
                wanted |= accepted_inputs(learner.student) or set()
            terms = [term for each in module.learners.values() for _, term in each.objective.named_terms()]
            wanted |= {term.mask for term in terms if isinstance(term.mask, str)}
            wanted |= {name for name in _columns(self.train_dataset, self.eval_dataset) if "/" in name}
            self._signature_columns = sorted(wanted)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """Leave ready batches alone: their data set has no columns to remove."""
        if data_collator is ready_batch:
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    def get_train_dataloader(self) -> Any:
        """Return the training batches: as Trainer makes them, or as many samples as fit into ``batch_tokens``."""
        if self._batch_tokens is None or self.train_dataset is None:
            return super().get_train_dataloader()
        made = self._in_memory(self.train_dataset)
        if made is not None:
            collator: Any = ready_batch
        else:
            collator = self._get_collator_with_removed_columns(self.data_collator, "Training")
        args, dataset = self.args, self.train_dataset if made is None else made
        processes, workers = self.accelerator.num_processes, args.dataloader_num_workers
        batches = TokenBudget(dataset, self._batch_tokens, self._train_batch_size, seed=self._seed, processes=processes)
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
        )
        return self.accelerator.prepare(loader)

    def _get_dataloader(self, dataset: Any, *args: Any, sampler_fn: Any = None, **kwargs: Any) -> Any:
        """Return a loader as Trainer makes it, of ready batches where a plain table is in memory."""
        made = self._in_memory(dataset)
        if made is None:
            return super()._get_dataloader(dataset, *args, sampler_fn=sampler_fn, **kwargs)
        grouped = self._group_by_length and kwargs.get("is_training", False)
        ordered = made if grouped else self._remove_unused_columns(dataset)  # what a sampler of one's own expects
        given, self.data_collator = self.data_collator, ready_batch
        try:
            sampler = None if sampler_fn is None else lambda _: sampler_fn(ordered)
            return super()._get_dataloader(made, *args, sampler_fn=sampler, **kwargs)
        finally:
            self.data_collator = given

    def _in_memory(self, dataset: Any) -> InMemory | None:
        """Return a plain table as ready batches, read once; ``None`` for what is left to Trainer and its collator."""
        if not isinstance(dataset, datasets.Dataset) or self.data_collator is not self._usual_collator:
            return None
        known = self._tables.get(dataset)
        if known is None or known[0] != dataset.format:
            table = self._remove_unused_columns(dataset)
            known = dataset.format, in_memory(table, getattr(self.data_collator, "tokenizer", None))
            self._tables[dataset] = known
        return known[1]

    @property
    def _seed(self) -> int:
        """That of the order of the samples."""
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the order of the samples: those of like length together where that is asked for and can be."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self._group_by_length or getattr(dataset, "lengths", None) is None:
            return super()._get_train_sampler(train_dataset)
        return LengthSampler(dataset, self.args.train_batch_size, seed=self._seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        order = length_order(eval_dataset) if self._group_by_length else None
        return super()._get_eval_sampler(eval_dataset) if order is None else order.tolist()

    # ---- optimizer ------------------------------------------------------------------------------------------------

    def create_optimizer(self, *model: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer, with a group of their own for the projectors if they have a learning rate."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*model)
        module = self.distillation_module
        if fresh and isinstance(module, JointModule):
            decayed = set(self.get_decay_parameter_names(module))
            module.split(optimizer, {id(p) for name, p in module.named_parameters() if name in decayed})
        if fresh and self._projector_learning_rate is not None:
            own = [p for each in module.learners.values() for p in each.objective.parameters()]
            split_groups(optimizer, own, learning_rate=self._projector_learning_rate)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Make the learning-rate schedule: the one given as ``scheduler``, else Trainer's."""
        if self._make_scheduler is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = self._make_scheduler(optimizer or self.optimizer, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; projectors that wait for their sizes are made first, by a dry run on one batch."""
        self.materialize()
        self._parts, self._parts_seen = {}, 0
        with packages_looked_up_once():
            return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch; nothing where the checkpoint gone on from was the last: Trainer would do one more step."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Return whether this evaluation is the best so far."""
        wanted = self.args.metric_for_best_model
        known = [name.removeprefix("eval_") for name in metrics]
        if wanted is not None and wanted.removeprefix("eval_") not in known:
            raise TrainingError(f"no evaluation gives the metric '{wanted}'; {did_you_mean(wanted, known)}")
        return bool(super()._determine_best_metric(metrics, trial))

    def materialize(self) -> None:
        """Size the objective's projectors by one dry run of teacher and student; nothing if there are none."""
        module = self.distillation_module
        if module.pending:
            state = torch.random.get_rng_state()
            batch = self._prepare_inputs(next(iter(self.get_train_dataloader())))
            with self.accelerator.autocast():  # as in a step: a cache holds no answers in another precision
                taught = ask(self.teacher, dict(batch), module.taught())
                module.materialize(taught, batch)
            module.to(self.args.device)
            torch.random.set_rng_state(state)

    # ---- saving and loading ---------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the bare student; into checkpoints also the objective and the stateful teachers."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        module = self.distillation_module
        if state_dict is None:
            self._save_student(module.student, folder)
        else:
            own = {k.removeprefix("student."): v for k, v in state_dict.items() if k.startswith("student.")}
            save_student_default(module.student, folder, own)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if folder.name.startswith("checkpoint-"):
            save_learning(module, self.teacher, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write a checkpoint, mark it as whole, and only then delete older ones."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial))
            mark_complete(folder / f"checkpoint-{self.state.global_step}")
            rotate(folder, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load student, objective and stateful teachers; a missing or extra weight is an error."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.materialize()
        folder, module = Path(resume_from_checkpoint), self.distillation_module
        load_student(module.student, folder)
        load_learning(module, self.teacher, folder)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ---- logging --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each term since the last line, over all processes, and what ramps stand at."""
        if "loss" in logs and self._parts_seen:
            steps = self.state.global_step - self._parts_since
            divisor = max(1, steps if self._counts_are_used else self._parts_seen)
            for name, value in self._parts.items():
                logs[f"loss/{name}"] = float(self.accelerator.reduce(value / divisor, "mean"))
            for name, term in self.distillation_module.objective.named_terms():
                logs |= {f"{key}/{name}": value for key, value in term.ramps(self.progress).items()}
            self._parts, self._parts_seen = {}, 0
        super().log(logs, *args, **kwargs)

    def _record(self, parts: Mapping[str, Tensor]) -> None:
        if not self._parts_seen:
            self._parts_since = self.state.global_step  # that of the checkpoint after a resume
        self._parts_seen += 1
        for name, value in parts.items():
            known = self._parts.get(name)
            self._parts[name] = value if known is None else known + value

    # ---- inside ---------------------------------------------------------------------------------------------------

    @property
    def distillation_module(self) -> DistillationModule:
        """The module that is trained, without the wrappers of distribution and compilation."""
        if isinstance(self.model, DistillationModule):  # unwrapping is not free, and this is asked at every step
            return self.model
        module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(module, DistillationModule):
            raise TrainingError(f"expected a DistillationModule, got {type(module).__name__}")
        return module

    def _set_up_callbacks(self) -> None:
        self.add_callback(AfterStep(self))
        if hasattr(self.train_dataset, "set_epoch") and not isinstance(self.train_dataset, datasets.Dataset):
            self.add_callback(Epochs(self.train_dataset))
        for callback in self.callback_handler.callbacks:
            bind: Any = getattr(callback, "bind", None)
            if bind is not None:
                bind(self)

    def _window_counts(self, batches: list[Batch], device: torch.device) -> dict[str, Tensor]:
        module, processes = self.distillation_module, self.accelerator.num_processes
        each = [module.counts(batch) for batch in batches]
        if len(each) == processes == 1:
            return {name: count.to(device) for name, count in clamp_counts(each[0]).items()}
        names = list(each[0])
        summed = torch.stack([torch.stack([counts[name].cpu() for counts in each]).sum() for name in names])
        if processes > 1:
            summed = self.accelerator.reduce(summed.to(device), "sum")
        clamped = clamp_counts(dict(zip(names, summed.to(device).unbind(), strict=True)))
        return {name: count / processes for name, count in clamped.items()}  # DDP averages what we want summed


def ready_batch(batch: Batch) -> Batch:
    """Collate nothing: the data set's ``__getitems__`` already returned a batch."""
    return batch


def save_student_default(student: nn.Module, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write a student by its own ``save_pretrained``, or as safetensors where it has none."""
    save_student(student, folder, state_dict)


def _with_sample_ids(dataset: Any) -> Any:
    """Give a table the column ``sample_id``, on which views, caches and memories depend."""
    if isinstance(dataset, datasets.Dataset) and "sample_id" not in dataset.column_names:
        return dataset.add_column("sample_id", list(range(len(dataset))))
    return dataset


def _columns(*tables: Any) -> list[str]:
    names: list[str] = []
    for table in tables:
        for each in table.values() if isinstance(table, Mapping) else [table]:
            names += list(getattr(each, "column_names", None) or [])
    return names
