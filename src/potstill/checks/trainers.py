"""From a trainer to what is examined, and nothing of it changed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from potstill.checks.batches import batch_size
from potstill.checks.subject import Feed, Subject
from potstill.checks.watch import preserved
from potstill.interfaces import Batch, TeacherSource
from potstill.losses.objective import Objective, Term
from potstill.models.origins import TextProcessor
from potstill.teachers.cached import uncached
from potstill.teachers.live import Several
from potstill.training.module import DistillationModule

_JUDGED = 512


def subject_of(trainer: Any, *, strict: bool = False) -> Subject:
    """Return what a :class:`potstill.training.trainer.DistillationTrainer` would train, and with what."""
    module, source = trainer.distillation_module, uncached(trainer.teacher)
    teachers = dict(source.teachers) if isinstance(source, Several) else {} if source is None else {"teacher": source}
    with preserved([module]):
        batch = trainer._prepare_inputs(_first(trainer.get_train_dataloader()))
        judged = _judged(trainer) or batch
    tables = {"train": trainer.train_dataset, "test": trainer.eval_dataset}
    subject = Subject(
        module.student,
        _answered(module, teachers),
        batch,
        teachers=teachers,
        forward=module._respond,
        responses=module.responses,
        judged=judged,
        trained=frozenset(teachers),
        tables={name: table for name, table in tables.items() if isinstance(table, Dataset)},
        label=next(iter(trainer.label_names), None),
        strict=strict,
        autocast=trainer.accelerator.autocast,
    )
    columns = subject.tables["train"].column_names if "train" in subject.tables else []
    known = module.accepts or {"features", "pixel_values", "input_values", "input_features"}
    subject.inputs = [name for name in columns if name in known and name not in trainer.label_names]
    subject.feeds, subject.texts = _feeds(trainer, subject)
    subject.optimizer = partial(_optimizer, trainer)
    return subject


def _answered(module: DistillationModule, teachers: Mapping[str, TeacherSource]) -> Objective:
    """Return the terms that the student and these teachers answer: not those of other learners and of itself."""
    if len(module.learners) == 1 and module.extension is None and not module.own_taps():
        return module.objective
    alone = len(teachers) + len(module.learners) == 2

    def known(term: Term) -> bool:
        others = {signal for signal in term.teacher if signal.partition("/")[0] not in teachers}
        made = module.extension is not None and any(module.extension.makes(signal) for signal in term.student)
        return not made and (
            not others or (alone and bool(teachers) and not any(s.startswith("self/") for s in others))
        )

    terms = {name: term for name, term in module.objective.named_terms() if term.hard or known(term)}
    return Objective(terms, response_mask=module.objective.response_mask) if terms else module.objective.hard_only()


def _first(loader: Any) -> Batch:
    """Return the first batch of a loader, and let go of it."""
    found: Batch = next(iter(loader))
    end: Any = getattr(loader, "end", None)  # else accelerate takes it for the one that is being read
    if callable(end):
        with contextlib.suppress(ValueError):
            end()
    return found


def _judged(trainer: Any) -> Batch | None:
    """Return up to 512 samples of the evaluation data that go into one batch."""
    data = trainer.eval_dataset
    if data is None or isinstance(data, dict):
        return None
    parts: list[Batch] = []
    for batch in trainer.get_eval_dataloader():
        parts.append(trainer._prepare_inputs(batch))
        if sum(batch_size(part) for part in parts) >= _JUDGED:
            break
    alike = [part for part in parts if _shapes(part) == _shapes(parts[0])]
    names = [name for name, value in alike[0].items() if isinstance(value, Tensor) and value.ndim]
    return {name: torch.cat([part[name] for part in alike]) for name in names}


def _shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    return {name: tuple(v.shape[1:]) for name, v in batch.items() if isinstance(v, Tensor) and v.ndim}


def _feeds(trainer: Any, subject: Subject) -> tuple[dict[str, Feed], list[str]]:
    """Return the tokenizers of models that lie in a folder with their own, beside the one that makes the inputs."""
    fed, ids = trainer.processing_class, subject.batch.get("input_ids")
    if ids is None or not hasattr(fed, "batch_decode") or any("/" in name for name in subject.batch):
        return {}, []
    texts = [str(text) for text in fed.batch_decode(ids[:8], skip_special_tokens=True)]
    models: dict[str, Any] = {name: getattr(source, "model", None) for name, source in subject.teachers.items()}
    models["student"] = subject.student
    found = {}
    for name, model in models.items():
        own = _own_tokenizer(getattr(getattr(model, "config", None), "_name_or_path", ""))
        if own is not None:
            found[name] = Feed(TextProcessor(fed), TextProcessor(own), learns=name == "student")
    return found, texts


def _own_tokenizer(path: str) -> Any:
    if not path or not (Path(path) / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _optimizer(trainer: Any) -> torch.optim.Optimizer | None:
    """Return the trainer's optimizer, or one as it would make it, without keeping it."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return None
    before = trainer.optimizer
    try:
        made: torch.optim.Optimizer = trainer.create_optimizer()
        return made
    finally:
        trainer.optimizer = before
