"""The whole extension surface on one page: what a component receives and what it gives back.

Shape letters: ``B`` samples, ``T`` positions (tokens), ``C`` classes, ``V`` vocabulary, ``H`` width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from datasets import Dataset

Batch: TypeAlias = dict[str, Tensor]
"""What a data loader yields: named tensors with the samples on the first axis, ``sample_id`` (int64 [B]) among them."""

Signals: TypeAlias = dict[str, Any]
"""What a model says about a batch: a tensor per tap, e.g. ``logits``, ``hidden.3``, ``attention.5``, a module path."""

Per: TypeAlias = Literal["sample", "position", "batch"]
"""Along what a loss can be split: one value per sample, one per position, or one for the coupled batch."""


IGNORED = -100
"""The label of a position that does not count, as in ``torch.nn.functional.cross_entropy``."""


FOREIGN = -1e4
"""The logit of a class of another task, which is thereby impossible; finite, so that no loss gives NaN."""


VIEW = "view"
"""The batch entry with the number of the random view of each sample, int64 [B]; it is missing where there is one."""


@dataclass(frozen=True)
class Progress:
    """Where the training stands; ramps of weights and temperatures read it.

    Attributes:
        step: optimizer steps done, from 0.
        total_steps: optimizer steps planned, at least 1.
        epoch: epochs done, with its fraction.
    """

    step: int = 0
    total_steps: int = 1
    epoch: float = 0.0

    @property
    def fraction(self) -> float:
        """Share of the training that is done, between 0 and 1."""
        return min(1.0, self.step / max(1, self.total_steps))


@dataclass
class LossOutput:
    """What an objective returns.

    Attributes:
        total: the weighted sum to minimise, a 0-d tensor with a graph.
        parts: the value of each term before its weight, detached, 0-d.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Loss(Protocol):
    """How far the student is from the teacher, as a pure function of tensors.

    ``student`` and ``teacher`` are tensors ``[..., V]`` (tuples where the term lists several signals). The result has
    one value per position, ``[...]``; a loss registered with ``per="batch"`` returns a 0-d mean over the batch. The
    keywords ``labels``, ``mask``, ``index`` (sample ids) and ``progress`` are passed only where the signature names
    them. A loss without the parameter ``teacher`` is a hard loss: it compares the student with the labels. No weight,
    no mask and no reduction inside. A loss with a memory or a projector is an ``nn.Module`` with the same call.
    """

    def __call__(self, student: Any, teacher: Any = ..., /, **options: Any) -> Tensor:
        """Return one value per position."""
        ...


@runtime_checkable
class TeacherSource(Protocol):
    """Who answers: a callable from a batch to detached signals.

    A source with a state (a moving average) also has ``state_dict`` and ``load_state_dict`` of tensors; its state is
    then part of every checkpoint. One that acts after an optimizer step has ``after_step(progress)``, one that can give
    fewer signals ``narrow(names)``, one that can move ``to(device)``.
    """

    def __call__(self, batch: Batch) -> Signals:
        """Return the detached signals for ``batch``."""
        ...


class BatchDataset(Protocol):
    """Samples that come as ready batches: a ``torch`` data set whose ``__getitems__`` returns a :data:`Batch`."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return the samples as one batch; ``sample_id`` is among its keys."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Tell the data set the epoch, on which random views of a sample depend."""
        ...


class Task(Protocol):
    """The kind of problem: all that depends on it, in one file. See ``CONTRIBUTING.md``.

    Attributes:
        name: the registered name, such as ``image-classification``.
        primary: the metric by which models are compared.
        hard_loss: the registered name of the loss on the labels.
        label_names: the data set's own names of the classes, in the order of the label ids.
    """

    name: str
    primary: str
    hard_loss: str
    label_names: list[str]

    def fit(self, train: Dataset) -> None:
        """Learn from the training split what the task needs to know: label names, shapes, normalisation."""
        ...

    def prepare(self, student: Any, teachers: Mapping[str, Any]) -> None:
        """Take how the models want their inputs (tokenizers, image processors, or ``None``), after :meth:`fit`.

        ``teachers`` has them by the prefix of the batch entries, such as ``teacher/``: a teacher that wants what the
        student does not gets entries of its own. A task whose models all take the same inputs does nothing here.
        """
        ...

    def dataset(self, table: Dataset, *, training: bool, seed: int) -> BatchDataset:
        """Turn a table into batches; random views only where ``training``."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Signals:
        """Return the response signals, ``logits`` among them."""
        ...

    def mask(self, batch: Batch) -> Tensor | None:
        """Return the positions of the response that count, or ``None`` where every sample does."""
        ...

    def answers(self, logits: Any) -> Any:
        """Return what the metrics compare with the labels, e.g. the most likely class (NumPy arrays, samples first)."""
        ...

    def metrics(self, answers: Any, labels: Any) -> dict[str, float]:
        """Return every metric of answers against labels (NumPy arrays, samples first); it is called on resamples."""
        ...

    def chance(self, labels: Any) -> float:
        """Return the primary metric of the best constant guess."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what a model built for this task may need: ``num_labels``, ``in_features``, ``in_channels``, …."""
        ...

    def check_labels(self, model_labels: list[str], whose: str) -> None:
        """Raise a ``TaskError`` if a model was trained on other classes, or on these in another order."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return what inference needs to repeat this task's preprocessing, as plain JSON; saved with each model."""
        ...

    def restore(self, settings: Mapping[str, Any]) -> None:
        """Take back what :meth:`settings` returned."""
        ...

    def show(self, table: Dataset, rows: list[int]) -> list[list[dict[str, str]]]:
        """Return what a person sees of some rows, for the report.

        Each row has parts with a ``name``, a ``value``, and as ``kind`` ``text``, ``number`` or ``image``, whose value
        is a ``data:`` address of a PNG file.
        """
        ...

    def example_inputs(self, batch_size: int) -> Batch:
        """Return inputs of the right shapes for timing and export."""
        ...


class Scheme(Protocol):
    """Who teaches whom: a change of a lesson, made before the training begins.

    A registered scheme is a class whose options are those of a recipe's ``scheme:`` section.
    """

    def arrange(self, lesson: Any) -> Any:
        """Return a :class:`potstill.schemes.lesson.Lesson` with other objectives, learners or extensions.

        It may be the one that was given, changed.

        Raises:
            TrainingError: the lesson lacks what the scheme needs; says what to add to the recipe.
        """
        ...


class Compressor(Protocol):
    """Makes a smaller model and never edits its argument."""

    def __call__(self, model: nn.Module, /, *, calibration: Iterable[Batch], **options: Any) -> nn.Module:
        """Return a new, smaller model."""
        ...


def detach(signals: Signals) -> Signals:
    """Return the signals cut from their graphs; tuples of tensors stay tuples."""
    return {name: _detach(value) for name, value in signals.items()}


def _detach(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(_detach(item) for item in value)
    return value
