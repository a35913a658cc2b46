"""A teacher for each task of a batch of several tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.errors import ComponentError, SignalError, did_you_mean
from potstill.interfaces import FOREIGN, Batch, Signals, TeacherSource, detach
from potstill.registry import teacher_sources
from potstill.teachers.context import SourceContext
from potstill.teachers.live import ask

_LOGITS, _TASK = "logits", "task"


class PerTask:
    """Teachers of single tasks that answer each for its own rows. See :func:`per_task`.

    Args:
        teachers: task to source, one for each task.
        label_names: ``TASK/label`` of every class; a task's stand together, and the tasks' order is that in which
            they begin.
        name: what it is called in messages.

    Raises:
        ComponentError: the label names are no tasks', a task has no teacher, or a teacher no task.
    """

    def __init__(
        self, teachers: Mapping[str, TeacherSource], label_names: Sequence[str], name: str = "teacher"
    ) -> None:
        self.ranges = task_ranges(label_names)
        self.teachers, self.name, self.width = dict(teachers), name, len(label_names)
        for task in self.teachers:
            if task not in self.ranges:
                hint = did_you_mean(task, self.ranges)
                raise ComponentError(f"'{name}' has a teacher for '{task}', and there is no such task; {hint}")
        without = [task for task in self.ranges if task not in self.teachers]
        if without:
            raise ComponentError(f"'{name}' has no teacher for the task '{without[0]}'; add it to `teachers`")
        self._wanted: frozenset[str] | None = None

    def __call__(self, batch: Batch) -> Signals:
        """Return ``logits`` float32 ``[B, ΣC]``, and a teacher's other signals as ``TASK/SIGNAL`` ``[B, ...]``.

        Raises:
            SignalError: the batch does not say the task of its rows, or a teacher has other classes than its task.
        """
        task = batch.get(_TASK)
        if task is None or task.ndim != 1:
            raise SignalError(f"'{self.name}' needs an entry `{_TASK}` [B] in the batch, which says the task of a row")
        logits = torch.full((len(task), self.width), FOREIGN, device=task.device)
        found: Signals = {_LOGITS: logits} if self._wanted is None or _LOGITS in self._wanted else {}
        for place, name in enumerate(self.ranges):
            rows = (task == place).nonzero().squeeze(1)
            said = self._asked(name, batch, rows, len(task))
            if _LOGITS in found and len(rows):
                self._fill(logits, rows, name, said.get(_LOGITS))
            for key, value in said.items():
                whole = f"{name}/{key}"
                if key != _LOGITS and isinstance(value, Tensor) and (self._wanted is None or whole in self._wanted):
                    spread = value.new_zeros(len(task), *value.shape[1:])
                    found[whole] = spread.index_copy_(0, rows, value[: len(rows)].detach()) if len(rows) else spread
        return detach(found)

    def narrow(self, names: Collection[str] | None) -> None:
        """Give these signals alone from now on, all for ``None``."""
        self._wanted = None if names is None else frozenset(names)

    def to(self, device: torch.device | str) -> PerTask:
        """Move every teacher that can move, and return the source."""
        for teacher in self.teachers.values():
            move: Any = getattr(teacher, "to", None)
            if move is not None:
                move(device)
        return self

    def _asked(self, task: str, batch: Batch, rows: Tensor, size: int) -> Signals:
        """Return what a task's teacher says of its rows, or of one other row where only the shapes matter."""
        if self._wanted is None:
            return self.teachers[task](_part(batch, rows, size)) if len(rows) else {}
        own = [key.removeprefix(f"{task}/") for key in sorted(self._wanted) if key.startswith(f"{task}/")]
        if len(rows) and _LOGITS in self._wanted:
            own.append(_LOGITS)
        asked = rows if len(rows) else torch.zeros_like(rows[:0]).new_zeros(min(1, size))
        return ask(self.teachers[task], _part(batch, asked, size), own)

    def _fill(self, logits: Tensor, rows: Tensor, task: str, said: Any) -> None:
        """Put a teacher's logits into the columns of its task."""
        start, stop = self.ranges[task]
        shape = list(said.shape) if isinstance(said, Tensor) else None
        if shape == [len(rows), self.width]:
            start, stop = 0, self.width
        elif shape != [len(rows), stop - start]:
            raise SignalError(
                f"'{self.name}': expected logits [{len(rows)}, {stop - start}] of the teacher of '{task}' "
                f"(or {self.width} columns, for all tasks), got {shape or 'none'}"
            )
        logits[rows, start:stop] = said.detach().float().to(logits.device)


@teacher_sources.register("per_task", reference="https://arxiv.org/abs/1907.04829")
def per_task(context: SourceContext, *, teachers: dict[str, str]) -> PerTask:
    """Return a teacher of several tasks, made of one for each.

    It gives ``logits`` over the classes of all tasks, of which those of other tasks than a row's own are −10000; a
    teacher that has the classes of all tasks is taken as it is for the rows of its task. Other signals of a task's
    teacher are called ``TASK/SIGNAL`` and are zero in the rows of other tasks; a term that reads one has
    ``mask: task/TASK``. A teacher sees the rows of its own task alone, except where ``TASK/SIGNAL`` is read of a batch
    without such rows: then it gets one other row, for the shapes.

    Args:
        context: holds the teachers that the recipe names before this one, and the classes as ``TASK/label``.
        teachers: task to the name of its teacher; every task has one.

    Returns:
        The source.

    Raises:
        ComponentError: there is no such teacher or task, a task has none, or the recipe's task is a single one.

    Reference:
        Clark et al. (2019), "BAM! Born-again multi-task networks for natural language understanding",
        https://arxiv.org/abs/1907.04829.
    """
    for task, name in teachers.items():
        if name not in context.teachers:
            raise ComponentError(
                f"'{context.name}' names the teacher '{name}' for the task '{task}', which is not defined before it; "
                f"{did_you_mean(name, context.teachers)}"
            )
    sources = {task: context.teachers[name] for task, name in teachers.items()}
    return PerTask(sources, context.label_names, context.name)


def task_ranges(label_names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the first column of each task and the one after its last, of classes called ``TASK/label``.

    Raises:
        ComponentError: a class is not called so, or those of a task do not stand together.
    """
    found: dict[str, tuple[int, int]] = {}
    last = None
    for place, name in enumerate(label_names):
        task, slash, _ = name.partition("/")
        if not slash or (task in found and task != last):
            wrong = "does not stand beside the others of its task" if slash else "has no task"
            raise ComponentError(f"expected classes called TASK/label, those of a task together: '{name}' {wrong}")
        found[task] = (found.get(task, (place, 0))[0], place + 1)
        last = task
    if not found:
        raise ComponentError("expected classes called TASK/label, as a task of several tasks has, and there are none")
    return found


def _part(batch: Batch, rows: Tensor, size: int) -> Batch:
    """Return some rows of a batch of so many."""
    return {
        name: value[rows.to(value.device)] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
        for name, value in batch.items()
    }
