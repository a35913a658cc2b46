"""The data of the Python door: tables, the columns that a task reads, training arguments."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Image
from transformers import TrainingArguments

from potstill.data.load import Splits, splits_from
from potstill.errors import DataError
from potstill.recipe.check_training import MANAGED

logger = logging.getLogger(__name__)

_PAIRS = [
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_A", "sentence_B"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
    ("text1", "text2"),
]
_TEXTS = ("text", "sentence", "statement", "content", "review", "tweet")


def tables_of(train: Any, evaluation: Any, test: Any) -> dict[str, Dataset]:
    """Return the tables by split: what is judged on is ``test``."""
    chosen, judged = (None, evaluation) if test is None else (evaluation, test)
    given = {"train": train, "validation": chosen, "test": judged}
    return {name: _table(each, name) for name, each in given.items() if each is not None}


def _table(data: Any, name: str) -> Dataset:
    if isinstance(data, Dataset):
        return data.with_format(None)
    if hasattr(data, "columns") and hasattr(data, "to_dict"):  # a data frame of pandas
        return Dataset.from_pandas(data, preserve_index=False)
    if isinstance(data, Mapping) and all(isinstance(column, Sequence) for column in data.values()):
        return Dataset.from_dict(dict(data))
    if isinstance(data, Sequence) and data and all(isinstance(row, Mapping) for row in data):
        return Dataset.from_list([dict(row) for row in data])
    raise DataError(
        f"expected the {name} data as datasets.Dataset, a data frame, a dictionary of columns or a list of rows, "
        f"got {type(data).__name__}"
    )


def task_section(
    task_type: str,
    train: Dataset,
    *,
    text: str | Sequence[str] | None = None,
    image: str | None = None,
    label: str | None = None,
    max_length: int | None = None,
    say: str = "DistillationConfig(text=…)",
) -> dict[str, Any]:
    """Return a recipe's ``task``: its name and the columns of the data.

    Args:
        task_type: a registered name, or ``classification`` of texts or images, as the data hold them.
        train: the training rows.
        text: the column of the texts, or two; found if omitted.
        image: the column of the images; found if omitted.
        label: the column of the classes; ``label`` or ``labels`` if omitted.
        max_length: tokens at which texts are cut.
        say: how a person says which columns are meant.

    Raises:
        DataError: the columns are in doubt.
    """
    image = image or next((name for name, each in train.features.items() if isinstance(each, Image)), None)
    name = task_type
    if task_type == "classification":
        name = "text-classification" if image is None else "image-classification"
    label = label or next((column for column in ("label", "labels") if column in train.column_names), "label")
    if name == "image-classification":
        return {"name": name, "label": label, **({} if image is None else {"image": image})}
    if name != "text-classification":
        return {"name": name, "label": label}
    return {"name": name, "label": label, "max_length": max_length, **_texts(text, train, label, say)}


def _texts(wanted: str | Sequence[str] | None, train: Dataset, label: str, say: str) -> dict[str, str]:
    """Return the columns of the texts as options of the task."""
    if isinstance(wanted, str):
        return {"text": wanted}
    if wanted is not None:
        return {"text": wanted[0], "pair": wanted[1]}
    texts = [n for n, each in train.features.items() if "string" in str(getattr(each, "dtype", "")) and n != label]
    pair = next((pair for pair in _PAIRS if set(pair) <= set(texts)), None)
    if pair is not None:
        return {"text": pair[0], "pair": pair[1]}
    if "input_ids" in train.column_names:
        return {}
    known = texts if len(texts) == 1 else [name for name in _TEXTS if name in texts]
    if len(known) == 1:
        return {"text": known[0]}
    raise DataError(
        f"expected one column of texts, got the columns {', '.join(train.column_names)}; "
        f"say which as {say}, or two of them for pairs"
    )


def splits_of(tables: Mapping[str, Dataset], label: str, names: Sequence[str] | None, seed: int) -> Splits:
    """Return the splits of tables; what is not given to judge on is carved from the training rows.

    Raises:
        DataError: labels that are no classes.
    """
    validation = 0 if "test" in tables else 0.1
    return splits_from(tables, label=label, label_names=names, validation=validation, seed=seed)


def train_section(args: TrainingArguments | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the keys of a recipe's ``train`` that training arguments mean."""
    if not isinstance(args, TrainingArguments):
        return dict(args or {})
    if args.seed != TrainingArguments(output_dir=args.output_dir).seed:
        logger.warning("args.seed is not used: say DistillationConfig(seed=%d)", args.seed)
    section: dict[str, Any] = {
        "epochs": args.num_train_epochs,
        "batch_size": args.per_device_train_batch_size,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
    }
    usual = TrainingArguments(output_dir=args.output_dir).to_dict()
    skip = {*MANAGED, "learning_rate", "weight_decay", "logging_dir", "run_name", "label_names", "local_rank"}
    changed = {key: value for key, value in args.to_dict().items() if key not in skip and value != usual.get(key)}
    if args.label_smoothing_factor:
        changed["label_smoothing_factor"] = args.label_smoothing_factor  # refused, with what to say in its place
    return {**section, **changed}
