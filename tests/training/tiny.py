"""Tiny random transformers models and sentence pairs for the tests of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    TrainingArguments,
)

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def teacher(labels: int = 3) -> BertForSequenceClassification:
    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=60, max_position_embeddings=32, num_labels=labels, **sizes, **NO_DROPOUT)
    model = BertForSequenceClassification(config)
    with torch.no_grad():  # random heads answer almost evenly; spread them so that the soft loss matters
        model.classifier.weight.mul_(20)
    return model


def student(labels: int = 3, dropout: float = 0.0) -> DistilBertForSequenceClassification:
    torch.manual_seed(2)
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "vocab_size": 60, "max_position_embeddings": 32}
    off = {"dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": dropout}
    return DistilBertForSequenceClassification(DistilBertConfig(num_labels=labels, **sizes, **off))


def pairs(count: int = 24, *, unlabelled: int = 0, length: int = 10) -> Dataset:
    """Padded pairs of sentences as a table: the columns that a BERT tokenizer makes, with some rows unlabelled."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 60, (count, length), generator=draw)
    lengths = torch.randint(4, length + 1, (count, 1), generator=draw)
    mask = (torch.arange(length)[None] < lengths).long()
    labels = torch.randint(0, 3, (count,), generator=draw)
    labels[:unlabelled] = -100
    return Dataset.from_dict(
        {
            "input_ids": (ids * mask).tolist(),
            "attention_mask": mask.tolist(),
            "token_type_ids": ((torch.arange(length)[None] >= lengths // 2).long() * mask).tolist(),
            "labels": labels.tolist(),
        }
    )


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**defaults, **changes})


def flat(module: nn.Module) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten().double() for p in module.parameters()])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Length of the difference over the length of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())
