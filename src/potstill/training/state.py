"""What a checkpoint holds beside the student: objectives, extensions, other learners, teachers with a state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch

from potstill.errors import ModelError
from potstill.models.weights import load_modules, load_student, save_modules, save_student
from potstill.teachers.live import leaves
from potstill.training.module import DistillationModule

OBJECTIVE_FILE = "objective.safetensors"
EXTENSION_FILE = "extension.safetensors"
SOURCES_FILE = "sources.safetensors"
LEARNERS = "learners"


def save_learning(module: DistillationModule, source: Any, folder: Path) -> None:
    """Write what a training has beside the student: objectives, extensions, other learners, stateful teachers.

    Args:
        module: what is trained.
        source: the teachers that are not.
        folder: the checkpoint.
    """
    for name, each in module.learners.items():
        own = _own_folder(folder, name, each is module)
        if each is not module:
            save_student(each.student, own)
        save_modules(each.objective, own / OBJECTIVE_FILE)
        if each.extension is not None:
            save_modules(each.extension, own / EXTENSION_FILE)
    state = _state(source)
    if state:
        safetensors.torch.save_file(
            {key: each.detach().clone().contiguous() for key, each in state.items()}, folder / SOURCES_FILE
        )


def load_learning(module: DistillationModule, source: Any, folder: Path) -> None:
    """Load what :func:`save_learning` wrote, strictly.

    Raises:
        ModelError: a file is missing or does not fit.
    """
    for name, each in module.learners.items():
        own = _own_folder(folder, name, each is module)
        if each is not module:
            load_student(each.student, own)
        load_modules(each.objective, own / OBJECTIVE_FILE)
        if each.extension is not None:
            load_modules(each.extension, own / EXTENSION_FILE)
    stateful = _stateful(source)
    if not stateful:
        return
    path = folder / SOURCES_FILE
    if not path.is_file():
        raise ModelError(f"expected the state of the teachers in {path}, and there is no such file")
    found = safetensors.torch.load_file(path)
    for where, leaf in stateful.items():
        leaf.load_state_dict({key.removeprefix(where): v for key, v in found.items() if key.startswith(where)})


def _own_folder(folder: Path, name: str, is_student: bool) -> Path:
    return folder if is_student else folder / LEARNERS / name


def _state(source: Any) -> dict[str, Any]:
    """Return the tensors of all sources that have a state, each once, by where they stand."""
    states = {place: leaf.state_dict() for place, leaf in _stateful(source).items()}
    return {f"{place}{key}": value for place, state in states.items() for key, value in state.items()}


def _stateful(source: Any) -> dict[str, Any]:
    return {place: leaf for place, leaf in leaves(source).items() if hasattr(leaf, "state_dict")}
