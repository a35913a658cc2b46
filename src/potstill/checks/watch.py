"""Which modules answer, in what mode, and how they are put back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class OutsideTableError(IndexError):
    """An embedding is asked for an entry that it does not have.

    Attributes:
        asked: the number that it was given and does not have.
        size: the number of its entries.
    """

    def __init__(self, asked: int, size: int) -> None:
        self.asked, self.size = asked, size
        super().__init__(f"a table of {size} entries is asked for entry {asked}")


class Kept:
    """A module as it was: mode, buffers by value, parameters by version and gradient; without its children."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training = module, module.training
        self.buffers = {n: (b, b.detach().clone()) for n, b in module._buffers.items() if b is not None}
        self.parameters = {n: (p, _version(p), p.grad) for n, p in module._parameters.items() if p is not None}

    def changed(self) -> list[str]:
        """Return the names of the parameters and buffers that are no longer what they were."""
        module = self.module
        found = [n for n, (p, version, _) in self.parameters.items() if _changed(module._parameters.get(n), p, version)]
        return found + [n for n, (_, value) in self.buffers.items() if not _same(module._buffers.get(n), value)]

    def restore(self) -> None:
        """Put back mode, buffers and gradients."""
        self.module.training = self.training
        for name, (buffer, value) in self.buffers.items():
            if not _same(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
            self.module._buffers[name] = buffer
        for parameter, _, gradient in self.parameters.values():
            if parameter.grad is not gradient:
                parameter.grad = gradient


class Watch:
    """Sees every module that runs inside its ``with`` block, wherever a callable hides it.

    A hook on all modules finds what a search through attributes and closures would miss, and knows the mode in which
    a module answered: one that a callable sets to eval mode for its answer is as right as one that always is.

    Attributes:
        kept: the modules with their children, as they were before they first ran.
        training: those that ran in train mode.
    """

    def __init__(self) -> None:
        self.kept: dict[nn.Module, Kept] = {}
        self.training: dict[nn.Module, None] = {}
        self._hook: Any = None

    def __enter__(self) -> Watch:
        self._hook = register_module_forward_pre_hook(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _see(self, module: nn.Module, args: Any) -> None:
        _check_table(module, args)
        if module.training:
            self.training[module] = None
        if module not in self.kept:
            for each in module.modules():
                self.kept.setdefault(each, Kept(each))

    def changed(self) -> list[str]:
        """Return what changed since, as ``BatchNorm2d.running_mean``."""
        return [f"{type(kept.module).__name__}.{name}" for kept in self.kept.values() for name in kept.changed()]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all modules that ran."""
        return [parameter for module in self.kept for parameter in module._parameters.values() if parameter is not None]

    def restore(self) -> None:
        """Put everything back."""
        for kept in self.kept.values():
            kept.restore()


@contextmanager
def inside_tables() -> Iterator[None]:
    """Raise an :class:`OutsideTableError` in the block before an embedding is asked for what it does not have."""
    hook = register_module_forward_pre_hook(_check_table)
    try:
        yield
    finally:
        hook.remove()


def _check_table(module: nn.Module, args: Any) -> None:
    if isinstance(module, nn.Embedding) and args and isinstance(args[0], Tensor) and args[0].numel():
        for asked in (int(args[0].max()), int(args[0].min())):
            if not 0 <= asked < module.num_embeddings:  # on a GPU the look-up would end the process
                raise OutsideTableError(asked, module.num_embeddings)


@contextmanager
def preserved(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modes, buffers, gradients and the state of every random generator back at the end of the block."""
    kept = [Kept(module) for root in modules for module in root.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for each in kept:
                each.restore()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)


def _changed(now: Tensor | None, before: Tensor, version: int) -> bool:
    return now is not before or _version(before) != version


def _same(now: Tensor | None, before: Tensor) -> bool:
    if now is None or now.shape != before.shape or now.dtype != before.dtype:
        return False
    return torch.equal(now, before) or bool(torch.allclose(now, before, 0, 0, equal_nan=True))
