"""Layers that a student shares with its teacher: computed once in a step, by the teacher."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from potstill.interfaces import TeacherSource
from potstill.knowledge.capture import _readers
from potstill.models.frozen import Frozen
from potstill.teachers.live import Live

try:
    from transformers.utils import output_capturing as _collecting
except ImportError:  # early 5.x
    _collecting: Any = None  # type: ignore[no-redef]

_PASSING = re.compile(r"^_|^train(ing)?$|^gradient_checkpointing$|drop")  # says nothing of what a frozen layer computes
_NOT_OF_A_LAYER = re.compile(
    r"drop|label|version|dtype|^_|^architectures$|^problem_type$|^n(um)?(_hidden)?_layers?$|^layer_types$|^use_cache$"
    r"|^output_|^return_"
)  # settings of a model that no layer reads, or that are compared otherwise
_STACKS = (nn.ModuleList, nn.ModuleDict)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (int, float, str, type(None), torch.dtype)
_SMALL = 4096
_PATIENCE = 3
"""After so many steps without use in a row a pair is given up: comparing its inputs costs time."""


class SharedLayers:
    """A context in which frozen layers of a student answer with what the teacher's equal layers said before.

    A frozen layer is one of which no parameter requires a gradient, in eval mode; see
    :func:`potstill.models.freezing.freeze`. A pair has one class, the same settings, and parameters and buffers that
    are equal bit by bit, which is looked at again when they change. Inside the context, the teacher runs first; a
    layer of the student is then not computed where its inputs are those of the teacher's, bit by bit, in the same
    autocast, and nothing inside it is tapped. Everything else is computed as usual, so all values are as without.
    Nothing is kept after the context.

    Args:
        student: with some layers frozen.
        teacher: a model, or :class:`potstill.models.frozen.Frozen`, from which the student was cut.

    Attributes:
        pairs: paths of the layers, in the student and in the teacher.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        whole = teacher.awake() if isinstance(teacher, Frozen) else teacher
        self._pairs = list(_find(student, whole))
        self._same: list[tuple[Tensor, int, Tensor]] = []
        self._undo: list[Callable[[], None]] = []

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Paths of the layers that are shared, in the student and in the teacher."""
        return [pair.paths for pair in self._pairs]

    def __enter__(self) -> SharedLayers:
        self._pairs = [pair for pair in self._pairs if pair.unused < _PATIENCE]
        for pair in self._pairs:
            pair.unused += 1
            if _is_frozen(pair.student) and pair.is_equal():
                self._undo.append(_replaced(pair.teacher, self._recording(pair, pair.teacher.forward)))
                self._undo.append(_replaced(pair.student, self._reusing(pair, pair.student.forward)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()
        for pair in self._pairs:
            pair.calls.clear()
        self._same.clear()

    def _recording(self, pair: _Pair, forward: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            inputs = _Seen.of((args, kwargs))
            output = forward(*args, **kwargs)
            given = _Seen.of(output)
            if inputs is not None and given is not None and given.is_plain():
                pair.calls.append((inputs, given, pair.ambient(pair.teacher_configs, inputs)))
            return output

        return record

    def _reusing(self, pair: _Pair, forward: Callable[..., Any]) -> Callable[..., Any]:
        def reuse(*args: Any, **kwargs: Any) -> Any:
            output = None if _is_watched(pair.student) else self._known(pair, (args, kwargs))
            if output is None:
                return forward(*args, **kwargs)
            pair.unused = 0
            return self._copy(output)

        return reuse

    def _known(self, pair: _Pair, inputs: Any) -> _Seen | None:
        """Return what the teacher's layer gave for these inputs, if it is still as it was."""
        leaves, structure = pytree.tree_flatten(inputs)
        for seen, output, ambient in pair.calls:
            if structure != seen.structure or not output.is_intact():
                continue
            alike = all(self._equal(own, each, seen) for own, each in zip(leaves, seen.leaves, strict=True))
            if alike and ambient == pair.ambient(pair.student_configs, seen):
                return output
        return None

    def _equal(self, own: Any, other: Any, seen: _Seen) -> bool:
        """Return whether an input of the student is the teacher's."""
        if not isinstance(own, Tensor) or not isinstance(other, Tensor):
            return own is other or (isinstance(own, _PLAIN) and type(own) is type(other) and bool(own == other))
        if own.requires_grad or own.is_inference() or not seen.is_intact(other):
            return False
        if own is other or any(own is a and own._version == v and other is b for a, v, b in self._same):
            return True
        if own.stride() != other.stride() or not _same_bits(own, other):
            return False
        self._same.append((own, own._version, other))
        return True

    def _copy(self, output: _Seen) -> Any:
        """Return an output that the student may write to."""
        copies = []
        for leaf in output.leaves:
            copy = leaf.clone() if isinstance(leaf, Tensor) else leaf
            copies.append(copy)
            if isinstance(leaf, Tensor):
                self._same.append((copy, copy._version, leaf))
        return pytree.tree_unflatten(copies, output.structure)


class Sharing:
    """Gives the context of each step: that of the layers which student and teacher of that step share.

    Args:
        wanted: whether anything is shared at all.
    """

    def __init__(self, wanted: bool = True) -> None:
        self.wanted = wanted
        self._for: tuple[Any, nn.Module] | None = None
        self._layers: SharedLayers | None = None

    def __call__(
        self, teacher: TeacherSource | None, student: nn.Module, within: nn.Module
    ) -> AbstractContextManager[Any]:
        """Return the context; it does nothing where the teacher is no :class:`Live` one, or one of both is compiled.

        Args:
            teacher: who is asked in this step.
            student: the model that learns.
            within: all that wraps it.
        """
        if self._for is None or self._for[0] is not teacher or self._for[1] is not within:
            self._for, self._layers = (teacher, within), None
            if self.wanted and isinstance(teacher, Live) and not teacher.compile and not _is_compiled(within):
                self._layers = SharedLayers(student, teacher.model)
        return nullcontext() if self._layers is None or not self._layers.pairs else self._layers


@dataclass(frozen=True, eq=False)
class _Seen:
    """Inputs or output of a layer, with the versions that their tensors had."""

    leaves: list[Any]
    structure: pytree.TreeSpec
    versions: list[int]

    @classmethod
    def of(cls, value: Any) -> _Seen | None:
        """Return what was seen; ``None`` for what cannot be compared later."""
        leaves, structure = pytree.tree_flatten(value)
        if any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in leaves):
            return None
        return cls(leaves, structure, [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in leaves])

    def is_plain(self) -> bool:
        """Return whether there is nothing but tensors and plain values, so that a copy can be made."""
        return all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in self.leaves)

    def is_intact(self, only: Tensor | None = None) -> bool:
        """Return whether nobody has written to the tensors, or to the one that is meant."""
        of = zip(self.leaves, self.versions, strict=True)
        return all(
            leaf._version == version
            for leaf, version in of
            if isinstance(leaf, Tensor) and (only is None or leaf is only)
        )


@dataclass(eq=False)
class _Pair:
    """A layer of the student and its equal in the teacher."""

    student: nn.Module
    teacher: nn.Module
    paths: tuple[str, str]
    calls: list[tuple[_Seen, _Seen, Any]] = field(default_factory=list)
    known: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unused: int = 0

    def __post_init__(self) -> None:
        self.student_configs, self.teacher_configs = _configs(self.student), _configs(self.teacher)

    def is_equal(self) -> bool:
        """Return whether all weights are equal; those that did not change since the last time are not read."""
        own, others = _tensors(self.student), _tensors(self.teacher)
        if own.keys() != others.keys():
            return False
        for name, tensor in own.items():
            state = (*_state(tensor), *_state(others[name]))
            if self.known.get(name) != state:
                if not _same_bits(tensor, others[name]):
                    return False
                self.known[name] = state
        return True

    def ambient(self, configs: list[Any], inputs: _Seen) -> Any:
        """Return what the answer of a layer depends on beside weights and inputs."""
        kinds = {leaf.device.type for leaf in inputs.leaves if isinstance(leaf, Tensor)}
        autocast = {kind: torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in kinds}
        attention = [str(config._attn_implementation).removeprefix("potstill_") for config in configs]
        return autocast, torch.get_float32_matmul_precision(), attention


def _find(student: nn.Module, teacher: nn.Module) -> Iterator[_Pair]:
    """Yield the outermost pairs; a stack of blocks is shared block by block."""
    known = dict(teacher.named_modules())
    done = ""
    for path, module in student.named_modules():
        within = done and path.startswith(f"{done}.")
        if within or not _is_frozen(module) or any(isinstance(each, _STACKS) for each in module.modules()):
            continue
        for where, other in {path: known.get(path), **known}.items():
            if other is not None and _same_settings(module, other):
                pair = _Pair(module, other, (path, where))
                if pair.is_equal():
                    done = path
                    yield pair
                    break


def _is_frozen(module: nn.Module) -> bool:
    """Return whether a layer has weights, cannot learn and is in eval mode."""
    parameters = list(module.parameters())
    frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
    return frozen and not any(each.training for each in module.modules())


def _same_settings(first: nn.Module, second: nn.Module) -> bool:
    if type(first) is not type(second):
        return False
    one, other = dict(first.named_modules()), dict(second.named_modules())
    return one.keys() == other.keys() and all(
        type(module) is type(other[name]) and _settings(module) == _settings(other[name])
        for name, module in one.items()
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return what a module computes with, apart from its weights."""
    if isinstance(module, _DropoutNd):
        return {}
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if _PASSING.search(name):
            continue
        if name == "config" and hasattr(value, "to_dict"):
            found |= {f"config.{key}": v for key, v in value.to_dict().items() if not _NOT_OF_A_LAYER.search(key)}
        elif isinstance(value, Tensor):
            found[name] = value.tolist() if value.numel() <= _SMALL else id(value)
        elif isinstance(value, _PLAIN) or (
            isinstance(value, tuple | list) and all(isinstance(each, _PLAIN) for each in value)
        ):
            found[name] = value
        else:
            found[name] = getattr(value, "__qualname__", type(value))  # of a function: which one
    return found


def _configs(module: nn.Module) -> list[Any]:
    found: list[Any] = []
    for each in module.modules():
        config: Any = getattr(each, "config", None)
        if hasattr(config, "_attn_implementation") and not any(config is known for known in found):
            found.append(config)
    return found


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _state(tensor: Tensor) -> tuple[int, ...]:
    """Return what changes when a tensor is replaced, moved or written to."""
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two plain tensors are equal bit by bit, −0 and NaN included."""
    plain = all(type(each) in (Tensor, nn.Parameter) and each.layout == torch.strided for each in (first, second))
    if not plain or (first.dtype, first.shape, first.device) != (second.dtype, second.shape, second.device):
        return False
    kind = _INTEGERS.get(first.element_size())
    return kind is not None and torch.equal(first.detach().view(kind), second.detach().view(kind))


def _is_watched(module: nn.Module) -> bool:
    """Return whether someone wants to see what happens inside a layer."""
    inner = (each for each in module.modules() if each is not module)
    return any(
        each in _readers or each._forward_pre_hooks or not all(map(_is_idle, each._forward_hooks.values()))
        for each in inner
    )


def _is_idle(hook: Any) -> bool:
    """Return whether a hook is one with which transformers collects outputs, and it collects nothing of that kind."""
    if _collecting is None or getattr(hook, "__module__", None) != _collecting.__name__:
        return False
    cells = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=False))
    wanted = _collecting._active_collector.get()
    return wanted is None or ("key" in cells and cells["key"].cell_contents not in wanted)


def _is_compiled(model: nn.Module) -> bool:
    return any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in model.modules())


def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let a module run another forward, hooks as usual, and return what undoes that."""
    before = module.__dict__.get("forward")
    object.__setattr__(module, "forward", forward)

    def undo() -> None:
        if before is None:
            del module.__dict__["forward"]
        else:
            object.__setattr__(module, "forward", before)

    return undo
