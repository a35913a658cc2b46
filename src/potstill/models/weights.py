"""Weights on disk: safetensors, strict when loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.errors import ModelError, nearest

WEIGHTS = "model.safetensors"


def save_student(student: nn.Module, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write a model by its own ``save_pretrained``, or as ``model.safetensors`` where it has none.

    Args:
        student: the model.
        folder: where to; made if missing.
        state_dict: weights gathered elsewhere (FSDP), in place of the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(student, "save_pretrained"):
        save: Any = student.save_pretrained
        save(folder, **({} if state_dict is None else {"state_dict": state_dict}))
    elif state_dict is not None:
        safetensors.torch.save_file(state_dict, str(folder / WEIGHTS))
    else:
        safetensors.torch.save_model(student, str(folder / WEIGHTS))


def load_student(student: nn.Module, folder: Path) -> None:
    """Load weights that :func:`save_student` wrote, strictly.

    Raises:
        ModelError: weights are missing, left over, or of other shapes; names them.
    """
    if isinstance(student, PreTrainedModel):
        student.load_state_dict(_pretrained(student, folder).state_dict(), strict=True)
        return
    load_modules(student, folder / WEIGHTS)


def _pretrained(student: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Read a transformers model, whose own loading makes up what is missing."""
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        fresh, found = type(student).from_pretrained(folder, config=student.config, dtype=student.dtype, **options)
    except OSError as error:
        raise ModelError(f"expected weights in {folder}: {error}") from error
    wrong = [f"'{name}' is missing" for name in sorted(found["missing_keys"])]
    wrong += [f"'{name}' is left over" for name in sorted(found["unexpected_keys"])]
    wrong += [f"'{name}' expected {list(own)}, got {list(read)}" for name, read, own in found["mismatched_keys"]]
    if wrong:
        raise ModelError(f"{folder} does not fit {type(student).__name__}: {'; '.join(wrong[:8])}")
    return fresh


def save_modules(module: Any, path: Path) -> None:
    """Write the state of a module, or of anything with a ``state_dict`` of tensors; nothing if it has none."""
    if isinstance(module, nn.Module):
        safetensors.torch.save_model(module, str(path))
    elif hasattr(module, "state_dict"):
        safetensors.torch.save_file(module.state_dict(), str(path))


def load_modules(module: Any, path: Path) -> None:
    """Load what :func:`save_modules` wrote, strictly; nothing if the object has no state.

    Raises:
        ModelError: the file is missing or does not fit; names the weights and the nearest ones.
    """
    if not hasattr(module, "state_dict"):
        return
    if not path.exists():
        raise ModelError(f"expected weights in {path}, and there is no such file")
    if not isinstance(module, nn.Module):
        module.load_state_dict(safetensors.torch.load_file(str(path)))
        return
    try:
        safetensors.torch.load_model(module, str(path), strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{path} does not fit {type(module).__name__}: {_difference(module, path) or error}"
        ) from error


def _difference(module: nn.Module, path: Path) -> str:
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    try:
        found = {name: tuple(value.shape) for name, value in safetensors.torch.load_file(str(path)).items()}
    except SafetensorError:
        return "the file is damaged"
    lines = [f"'{name}' is missing{_like(name, set(found) - set(wanted))}" for name in sorted(set(wanted) - set(found))]
    lines += [f"'{name}' is left over" for name in sorted(set(found) - set(wanted))]
    lines += [
        f"'{name}' expected {list(wanted[name])}, got {list(found[name])}"
        for name in sorted(set(wanted) & set(found))
        if wanted[name] != found[name]
    ]
    return "; ".join(lines[:8]) + ("; …" if len(lines) > 8 else "")


def _like(name: str, others: set[str]) -> str:
    close = nearest(name, others, count=1)
    return f" (the file has '{close[0]}')" if close else ""
