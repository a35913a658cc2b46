"""Weights on disk: safetensors, strict when loaded; other people's files as far as they fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.errors import ModelError, nearest

WEIGHTS = "model.safetensors"

_TORCH_FILES = (".pt", ".pth", ".th", ".bin", ".ckpt", ".tar")
_NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "state_dict_ema", "model_ema", "ema")


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


def load_weights(module: nn.Module, path: Path) -> str | None:
    """Load a local file of weights from anywhere into a module; nothing but tensors is ever unpickled.

    The file is a ``.safetensors``, or a state dict that torch saved: as it is, or one level below ``state_dict``,
    ``model_state_dict``, ``model``, ``net``, ``network``, ``state_dict_ema``, ``model_ema`` or ``ema``, the first of
    these that holds tensors alone. Where the names do not fit, a prefix that all of them share is dropped, or the
    one that the module's names share is put before them. Every weight must then be there and none left over, but
    for ``num_batches_tracked``, which files of before PyTorch 0.4.1 lack and which keeps its value.

    Args:
        module: what the weights are for; unchanged if they do not fit.
        path: the file.

    Returns:
        What was taken from the file and renamed, in words; ``None`` if the names fit as they were.

    Raises:
        ModelError: no such file, a file of something else, or weights that do not fit; names them.
    """
    found, taken = _read_weights(path)
    wanted = module.state_dict()
    optional = _optional(wanted, found)
    drop, add = _renaming(set(wanted), set(found), optional)
    renamed = {add + name.removeprefix(drop): value for name, value in found.items()}
    shapes, read = ({name: tuple(value.shape) for name, value in state.items()} for state in (wanted, renamed))
    wrong = _wrong({name: shape for name, shape in shapes.items() if name in read or not optional(name, read)}, read)
    if wrong:
        hints = [f"with '{drop}' dropped from the file's names"] if drop else []
        hints += [f"with '{add}' put before the file's names"] if add else []
        hints += [hint for hint in (_under(wanted, found, optional), _other_head(shapes, read)) if hint]
        raise ModelError(f"{path} does not fit {type(module).__name__}: {'; '.join([wrong, *hints])}")
    module.load_state_dict(renamed, strict=False)
    notes = [f"the weights were found below '{taken}'"] if taken else []
    notes += [f"the prefix '{drop}' was dropped from {len(found)} names"] if drop else []
    notes += [f"the prefix '{add}' was put before {len(found)} names"] if add else []
    return "; ".join(notes) or None


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of a file by name, and below which key they were."""
    if not path.is_file():
        raise ModelError(f"expected weights in {path}, and there is no such file")
    if path.suffix not in (".safetensors", *_TORCH_FILES):
        raise ModelError(f"expected a file of weights (.safetensors, {', '.join(_TORCH_FILES)}), got {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(str(path)), None
        held = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ModelError(f"{path} holds no weights: the file is damaged ({error})") from error
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, …: the file may hold anything
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{path} is damaged or holds more than weights, and nothing else is unpickled ({said[0]}); "
            "save the model's state_dict() alone, best as .safetensors"
        ) from error
    if _is_state(held):
        return dict(held), None
    below = next((key for key in _NESTED if isinstance(held, Mapping) and _is_state(held.get(key))), None)
    if below is None:
        keys = f"a dict of {sorted(map(str, held))[:8]}" if isinstance(held, Mapping) else type(held).__name__
        raise ModelError(f"expected the state dict of a model in {path}, or one below '{_NESTED[0]}', got {keys}")
    return dict(held[below]), below


def _is_state(value: Any) -> bool:
    """Return whether this is a mapping of names to tensors, and not empty."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(key, str) and isinstance(each, Tensor) for key, each in value.items())


def _optional(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Callable[[str, Collection[str]], bool]:
    """Return whether a weight may be missing where others were read: batch counts, and one that is shared."""
    places: dict[tuple[Any, ...], list[str]] = {}
    for name, value in wanted.items():
        if value.numel() and value.device.type != "meta":
            key = (value.device, value.data_ptr(), tuple(value.shape), value.stride())
            places.setdefault(key, []).append(name)
    shared = {name: set(names) - {name} for names in places.values() if len(names) > 1 for name in names}

    def may_miss(name: str, read: Collection[str]) -> bool:
        return name.endswith("num_batches_tracked") or any(other in read for other in shared.get(name, ()))

    return may_miss


def _renaming(wanted: set[str], found: set[str], optional: Callable[[str, Collection[str]], bool]) -> tuple[str, str]:
    """Return the prefixes to drop and to add so that the names fit, else those that leave the fewest over."""

    def misfit(renaming: tuple[str, str]) -> int:
        drop, add = renaming
        read = {add + name.removeprefix(drop) for name in found}
        return len(read - wanted) + sum(not optional(name, read) for name in wanted - read)

    return min(((drop, add) for drop in _prefixes(found) for add in _prefixes(wanted)), key=misfit)


def _prefixes(names: Collection[str]) -> list[str]:
    """Return the dotted prefixes that all names share, shortest first, beginning with none."""
    first = next(iter(names), "")
    ends = [0] + [place + 1 for place, sign in enumerate(first) if sign == "."]
    return [first[:end] for end in ends if all(name.startswith(first[:end]) for name in names)]


def _under(
    wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], optional: Callable[[str, Collection[str]], bool]
) -> str | None:
    """Return a hint where a part of the file would fit, such as the student in a file of student and teacher."""
    for prefix in sorted({name[: place + 1] for name in found for place, sign in enumerate(name) if sign == "."}):
        part = {name.removeprefix(prefix) for name in found if name.startswith(prefix)}
        if len(part) < len(found) and part <= set(wanted) and all(optional(n, part) for n in set(wanted) - part):
            return f"the {len(part)} of {len(found)} names that begin with '{prefix}' would fit; save these alone"
    return None


def _other_head(wanted: Mapping[str, tuple[int, ...]], read: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return a hint where weight and bias of one layer alone differ, in the number of outputs."""
    wrong = [name for name in wanted if name in read and wanted[name] != read[name]]
    ends = {(name.rpartition(".")[0], wanted[name][:1], read[name][:1]) for name in wrong}
    if len(ends) != 1 or any(wanted[name][1:] != read[name][1:] for name in wrong):
        return None
    layer, own, other = ends.pop()
    if not own or not other:
        return None
    return (
        f"'{layer}' has {other[0]} outputs in the file and {own[0]} in the model, as a head for other classes has: "
        f"give the model {other[0]} classes, or the file without that layer is no use here"
    )


def _difference(module: nn.Module, path: Path) -> str:
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    try:
        found = {name: tuple(value.shape) for name, value in safetensors.torch.load_file(str(path)).items()}
    except SafetensorError:
        return "the file is damaged"
    return _wrong(wanted, found)


def _wrong(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Return what is missing, left over or of another shape, at most eight of them; an empty text if nothing is."""
    missing, left = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    other = [name for name in sorted(set(wanted) & set(found)) if wanted[name] != found[name]]
    shown = _shares(8, [len(missing), len(left), len(other)])
    lines = [f"'{name}' is missing{_like(name, set(left))}" for name in missing[: shown[0]]]
    lines += [f"'{name}' is left over" for name in left[: shown[1]]]
    lines += [f"'{name}' expected {list(wanted[name])}, got {list(found[name])}" for name in other[: shown[2]]]
    hidden = len(missing) + len(left) + len(other) - len(lines)
    if hidden:
        lines.append(f"… ({len(missing)} missing, {len(left)} left over, {len(other)} of another shape)")
    return "; ".join(lines)


def _shares(places: int, counts: list[int]) -> list[int]:
    """Return how many of each kind are shown in so many places, a few of every kind."""
    shares = [0] * len(counts)
    while sum(shares) < min(places, sum(counts)):
        for kind, count in enumerate(counts):
            shares[kind] += int(shares[kind] < count and sum(shares) < places)
    return shares


def _like(name: str, others: set[str]) -> str:
    close = nearest(name, others, count=1)
    return f" (the file has '{close[0]}')" if close else ""
