"""Teachers that answer by running: one model, or several addressed by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from potstill.interfaces import Batch, Signals, TeacherSource, detach
from potstill.knowledge.capture import capture
from potstill.models.frozen import Frozen
from potstill.models.inputs import TEACHER_PREFIX, respond, teacher_view


class Live:
    """A trained model that answers each batch by a forward without gradient.

    Args:
        model: the teacher; wrapped in :class:`Frozen`.
        taps: signals to capture beside the responses, such as ``hidden.6`` or a module path.
        forward: ``(model, batch) -> responses``, e.g. a task's; by default the model gets the entries that its
            forward accepts.
        prefix: what the names of its own entries in a batch begin with.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[str] = (),
        *,
        forward: Callable[[nn.Module, Batch], Signals] | None = None,
        prefix: str = TEACHER_PREFIX,
    ) -> None:
        self.prefix = prefix
        self.model = model if isinstance(model, Frozen) else Frozen(model)
        self.taps = list(taps)
        self.respond = forward or respond

    def __call__(self, batch: Batch) -> Signals:
        """Return the responses and taps for the teacher's view of ``batch``, detached."""
        model = self.model.awake()
        with torch.no_grad(), capture(model, self.taps, detach=True) as signals:
            answered = self.respond(model, teacher_view(batch, self.prefix))
        return detach({**answered, **signals})

    def to(self, device: torch.device | str) -> Live:
        """Move the teacher to a device and return it."""
        self.model.to(device)
        return self


class Deferred:
    """A live teacher that is loaded when it is first asked: one whose answers are all in a cache never is.

    Args:
        make: returns the teacher.
        prefix: what the names of its own entries in a batch begin with.
    """

    def __init__(self, make: Callable[[], Live], prefix: str = TEACHER_PREFIX) -> None:
        self.make, self.prefix = make, prefix
        self._device: torch.device | str | None = None

    def __call__(self, batch: Batch) -> Signals:
        """Return what the teacher answers."""
        return self.live(batch)

    @cached_property
    def live(self) -> Live:
        """The teacher, loaded."""
        live = self.make()
        return live if self._device is None else live.to(self._device)

    @property
    def model(self) -> Frozen:
        """The teacher's model, loaded."""
        return self.live.model

    def to(self, device: torch.device | str) -> Deferred:
        """Let the teacher be on a device, once it is loaded."""
        self._device = device
        if "live" in self.__dict__:
            self.live.to(device)
        return self


class Several:
    """Several teachers in one: the signal ``hidden.6`` of the teacher ``large`` is called ``large/hidden.6``.

    Args:
        teachers: name to source.
    """

    def __init__(self, teachers: Mapping[str, TeacherSource]) -> None:
        self.teachers = dict(teachers)

    def __call__(self, batch: Batch) -> Signals:
        """Return every teacher's signals under its name."""
        return {f"{name}/{key}": value for name, t in self.teachers.items() for key, value in t(batch).items()}

    def to(self, device: torch.device | str) -> Several:
        """Move every teacher that can move and return them."""
        for teacher in self.teachers.values():
            move: Any = getattr(teacher, "to", None)
            if move is not None:
                move(device)
        return self
