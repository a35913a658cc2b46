"""What a teacher source is made from, beside the options that a recipe gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from potstill.interfaces import Batch, Signals, TeacherSource
from potstill.models.inputs import TEACHER_PREFIX, respond


@dataclass(frozen=True)
class SourceContext:
    """What a teacher source may need. Each registered source is a function of it and of options of its own.

    Attributes:
        name: the teacher's, in the recipe.
        teachers: those that the recipe names before it, by name.
        student: the model that learns; ``None`` where nothing is trained.
        table: the samples that are asked about, a ``datasets.Dataset`` whose column ``sample_id``, or else the place of
            a row from 0, is the ``sample_id`` of a batch; ``None`` where a source is asked about others.
        label: the column of the label, which no teacher is shown.
        label_names: the classes in the order of the label ids.
        taps: signals that are read beside the responses.
        forward: ``(model, batch) -> responses``: a task's.
        prefix: what the names of its own entries in a batch begin with.
        seed: of what a source draws.
    """

    name: str
    teachers: Mapping[str, TeacherSource] = field(default_factory=dict)
    student: nn.Module | None = None
    table: Any = None
    label: str = "label"
    label_names: Sequence[str] = ()
    taps: Sequence[str] = ()
    forward: Callable[[nn.Module, Batch], Signals] = respond
    prefix: str = TEACHER_PREFIX
    seed: int = 0
