"""The rows of a data set by what they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset, Value

from potstill.data.augment import Step, split_step
from potstill.errors import DataError, did_you_mean
from potstill.registry import synthesizers


@dataclass
class Splits:
    """Three splits, each with an int64 column ``sample_id``.

    Attributes:
        train: rows to learn from.
        validation: rows to choose by, or ``None``.
        test: rows to report on, or ``None``.
        notes: what happened on the way that a person should know.
        transfer: rows on which the student learns from its teachers, in place of ``train``; ``None`` for these.
    """

    train: Dataset
    validation: Dataset | None = None
    test: Dataset | None = None
    notes: list[str] = field(default_factory=list)
    transfer: Dataset | None = None

    @property
    def taught_on(self) -> Dataset:
        """The rows on which the teachers are asked."""
        return self.train if self.transfer is None else self.transfer


def with_transfer(
    splits: Splits,
    step: Step,
    *,
    label: str,
    features: Sequence[str] | None = None,
    seed: int = 42,
    allow_code: bool = False,
) -> Splits:
    """Return the splits with a transfer set made from the features of the training split; no label enters it.

    Args:
        splits: as they were loaded; train, validation and test stay as they are.
        step: ``data.synthesize`` of a recipe: the name of a synthesizer, or ``{name: {option: value}}``.
        label: the column that is left out.
        features: the columns from which rows are made; all but the label if omitted.
        seed: of what is drawn.
        allow_code: whether a dotted synthesizer outside potstill may be imported and run.

    Raises:
        DataError: no such synthesizer, option or column, or columns from which nothing can be made.
    """
    name, options = _checked(step, allow_code)
    wanted = [each for each in features or splits.train.column_names if each not in (label, "sample_id")]
    missing = [each for each in wanted if each not in splits.train.column_names]
    if missing:
        hint = did_you_mean(missing[0], splits.train.column_names)
        raise DataError(f"{name}: the training split has no column '{missing[0]}'; {hint}")
    made: Dataset = synthesizers.get(name, allow_code=allow_code)(
        splits.train.select_columns(wanted), seed=seed, **options
    )
    numbered = made.add_column("sample_id", np.arange(len(made), dtype=np.int64), feature=Value("int64"))
    note = f"transfer: {len(made):,} rows without labels by {name} (seed {seed}), from which the student learns"
    return replace(splits, transfer=numbered, notes=[*splits.notes, note])


def _checked(step: Step, allow_code: bool) -> tuple[str, Mapping[str, Any]]:
    name, options = split_step(step)
    problems = synthesizers.check(name, options, allow_code=allow_code)
    if problems:
        raise DataError("; ".join(str(problem) for problem in problems))
    return name, options
