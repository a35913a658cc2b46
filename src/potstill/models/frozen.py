"""A model that teaches: always in eval mode, never trained, in no checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Frozen(nn.Module):
    """Wraps a trained model so that nothing can change it.

    It stays in eval mode under ``parent.train()``, runs without gradient, and shows neither parameters nor buffers, so
    it lands in no optimizer, no ``state_dict`` and no checkpoint of a module that holds it. Attributes are the
    model's own.

    Args:
        model: the trained model; it is set to eval mode.
    """

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = False
        object.__setattr__(self, "model", model.eval())  # past nn.Module, which would register it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's answer, computed in eval mode and without gradient."""
        with torch.no_grad():
            return self.awake()(*args, **kwargs)

    def awake(self) -> nn.Module:
        """Return the model itself, in eval mode even if someone switched it."""
        return self.model.eval() if self.model.training else self.model

    def train(self, mode: bool = True) -> Frozen:
        """Change nothing: a teacher in train mode would drift (BatchNorm) and answer at random (dropout)."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Frozen:
        inner: Any = self.model._apply
        inner(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not set yet: a copy or an unpickled one in the making
            raise AttributeError(name)
        return getattr(self.model, name)
