"""Layers of a student that are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType

from torch import nn

from potstill.errors import ModelError, did_you_mean


def freeze(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Keep modules of a model as they are: no gradient, no dropout, and BatchNorm with the statistics that it has.

    Their parameters get ``requires_grad=False``, and they stay in eval mode under ``model.train()``. What is saved of
    the model shows nothing of it.

    Args:
        model: changed in place.
        paths: of modules, such as ``bert.embeddings`` or ``bert.encoder.layer.0``.

    Returns:
        The model.

    Raises:
        ModelError: a path that names no module of the model, or nothing is left to train.
    """
    known = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    for path in paths:
        if path not in known:
            raise ModelError(f"{type(model).__name__} has no module '{path}' to freeze; {did_you_mean(path, known)}")
    for path in paths:
        known[path].eval().requires_grad_(False)
        object.__setattr__(known[path], "train", MethodType(train, known[path]))
    if paths and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"nothing is left to train of {type(model).__name__}: freeze less than {', '.join(paths)}")
    return model


def train(module: nn.Module, mode: bool = True) -> nn.Module:
    """Change nothing: what a frozen module has in place of its own ``train``, in copies of it too."""
    return module
