"""Teachers that answer by running: one model, or several addressed by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import nn

from potstill.interfaces import Batch, Signals, TeacherSource, detach
from potstill.knowledge.capture import capture
from potstill.models.frozen import Frozen
from potstill.models.inputs import TEACHER_PREFIX, respond, teacher_view
from potstill.teachers.compiled import Compiled, weights_state
from potstill.teachers.precision import Precision, check_precision, computing_in, quantized


class Live:
    """A trained model that answers each batch by a forward without gradient.

    Args:
        model: the teacher; wrapped in :class:`Frozen`.
        taps: signals to capture beside the responses, such as ``hidden.6`` or a module path.
        forward: ``(model, batch) -> responses``, e.g. a task's; by default the model gets the entries that its
            forward accepts.
        prefix: what the names of its own entries in a batch begin with.
        precision: in which it computes, whatever that of the caller is; the caller's if omitted. ``int8`` multiplies
            in int8 in a copy of the model, needs ``potstill[int8]`` and is compiled, without which it gains nothing.
        compile: whether its forward is compiled, for batches of any size; the first ones then take a while.

    Raises:
        TrainingError: fp16 on a CPU, where it is slow; also when it is moved there or asked there.
        ComponentError: int8 without torchao.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[str] = (),
        *,
        forward: Callable[[nn.Module, Batch], Signals] | None = None,
        prefix: str = TEACHER_PREFIX,
        precision: Precision | None = None,
        compile: bool = False,
    ) -> None:
        check_precision(precision)
        self.prefix = prefix
        self.model = model if isinstance(model, Frozen) else Frozen(model)
        self.taps = list(taps)
        self.respond = forward or respond
        self.precision, self.compile = precision, compile or precision == "int8"
        self._made: tuple[Any, nn.Module, Compiled] | None = None
        self._wanted: frozenset[str] | None = None

    def __call__(self, batch: Batch) -> Signals:
        """Return the responses and taps for the teacher's view of ``batch``, detached."""
        model, view = self.model.awake(), teacher_view(batch, self.prefix)
        with torch.no_grad(), self._context(model):
            if self.compile:
                fast, compiled = self._fast(model)
                return detach(compiled(fast, view))
            taps = self.taps if self._wanted is None else [tap for tap in self.taps if tap in self._wanted]
            with capture(model, taps, detach=True) as signals:
                answered = self.respond(model, view)
        return detach({**answered, **signals})

    def narrow(self, names: Collection[str] | None) -> None:
        """Read these taps alone, until it is called with ``None``; compiled code reads all in any case."""
        self._wanted = None if names is None else frozenset(names)

    def to(self, device: torch.device | str) -> Live:
        """Move the teacher to a device and return it."""
        check_precision(self.precision, device)
        self._made = None
        self.model.to(device)
        return self

    @property
    def is_compiled(self) -> bool:
        """Whether it answered by compiled code, and not eagerly as where there is no compiler."""
        return self._made is not None and not self._made[2].is_eager

    def _context(self, model: nn.Module) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        place = next(iter(model.parameters()), None)
        device = torch.device("cpu") if place is None else place.device
        check_precision(self.precision, device)
        return computing_in(self.precision, device)

    def _fast(self, model: nn.Module) -> tuple[nn.Module, Compiled]:
        """Return the model that is compiled and its code, made anew where the weights have changed."""
        state = weights_state(model)
        if self._made is None or self._made[0] != state:
            fast = quantized(model) if self.precision == "int8" else model
            self._made = state, fast, Compiled(self.taps, self.respond)
        return self._made[1], self._made[2]


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

    def narrow(self, names: Collection[str] | None) -> None:
        """Read these taps alone from now on, all for ``None``, which loads nothing."""
        if names is not None or "live" in self.__dict__:
            self.live.narrow(names)

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
        self._asked = dict(teachers)

    def __call__(self, batch: Batch) -> Signals:
        """Return every teacher's signals under its name."""
        return {f"{name}/{key}": value for name, t in self._asked.items() for key, value in t(batch).items()}

    def narrow(self, names: Collection[str] | None) -> None:
        """Ask for these signals alone from now on, all for ``None``; a teacher of whom nothing is read is not asked."""
        self._asked = {}
        for name, teacher in self.teachers.items():
            own = None if names is None else [key.partition("/")[2] for key in names if key.startswith(f"{name}/")]
            if own is None or own:
                self._asked[name] = teacher
                _narrow(teacher, own)

    def to(self, device: torch.device | str) -> Several:
        """Move every teacher that can move and return them."""
        for teacher in self.teachers.values():
            move: Any = getattr(teacher, "to", None)
            if move is not None:
                move(device)
        return self


def leaves(source: Any, path: str = "") -> dict[str, Any]:
    """Return the sources that a source is made of in the end, each once, by where it stands; itself alone under ``""``.

    Args:
        source: one that has others in ``teachers``, such as :class:`Several` or an ensemble, or any other.
        path: what the names begin with.
    """
    members = getattr(source, "teachers", None)
    if not isinstance(members, Mapping):
        return {path: source}
    found: dict[str, Any] = {}
    for name, member in members.items():
        for place, leaf in leaves(member, f"{path}{name}/").items():
            if not any(leaf is known for known in found.values()):
                found[place] = leaf
    return found


def ask(teacher: TeacherSource | None, batch: Batch, wanted: Sequence[str]) -> Signals:
    """Return at least the wanted signals of a teacher for a batch; it is not asked where nothing is wanted."""
    if teacher is None or not wanted:
        return {}
    _narrow(teacher, wanted)
    try:
        return teacher(batch)
    finally:
        _narrow(teacher, None)


def _narrow(source: TeacherSource, names: Collection[str] | None) -> None:
    """Let a source give these signals alone from now on, all for ``None``; one that cannot choose gives all."""
    choose: Any = getattr(source, "narrow", None)
    if choose is not None:
        choose(names)
