"""Models of PyTorch Hub: an entry of a ``hubconf.py``, in a GitHub repository or a local folder.

Building one runs the code of that repository: whoever calls :class:`TorchHub` has asked the person before.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from potstill.errors import ModelError, PotstillError, Problem, did_you_mean
from potstill.models.origins import Built, ImageProcessor, TextProcessor
from potstill.models.weights import WEIGHTS, save_modules

logger = logging.getLogger(__name__)

_HUBCONF = "hubconf.py"
_GITHUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?")


class TorchHub:
    """Models named ``OWNER/REPO/ENTRY``, ``OWNER/REPO:REF/ENTRY`` or ``/folder/ENTRY``.

    See :class:`potstill.models.origins.Origin`. Options are those of the entry.
    """

    def build(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any], *, pretrained: bool) -> Built:
        """Return what the entry returns; it gets ``pretrained`` and the number of classes if its signature names them.

        An entry without ``pretrained`` that names ``weights``, as those of torchvision, gets ``weights="DEFAULT"``.
        This runs the code of the repository.

        Raises:
            ModelError: no such repository or entry, or the entry fails or returns no module.
        """
        repo, entry, local = _parsed(name)
        taken = _signature(repo, entry, local)
        options = _options(taken, kwargs, facts)
        if "pretrained" in taken:
            options["pretrained"] = kwargs.get("pretrained", True) if pretrained else False
        elif "weights" in taken and taken["weights"].default is None:
            options["weights"] = kwargs.get("weights", "DEFAULT") if pretrained else None
        elif pretrained:
            logger.warning("'torchhub:%s' has no option 'pretrained': it alone knows if its weights are trained", name)
        with _as_model_error(name, local):
            load: Any = torch.hub.load
            model = load(repo, entry, source="local" if local else "github", trust_repo=True, verbose=False, **options)
        if not isinstance(model, nn.Module):
            raise ModelError(f"expected 'torchhub:{name}' to return an nn.Module, got {type(model).__name__}")
        return Built(model)

    def complete(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with the task's facts that the entry names. This runs the code of the repository."""
        return _options(_signature(*_parsed(name)), kwargs, facts)

    def processor(
        self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> ImageProcessor | TextProcessor | None:
        """Return ``None``: PyTorch Hub does not say how a model wants its inputs."""
        return None

    def check(self, name: str, kwargs: Mapping[str, Any], path: tuple[str | int, ...]) -> list[Problem]:
        """Return what shows without running anything: the form of the name, a folder without ``hubconf.py``."""
        try:
            _parsed(name)
        except PotstillError as error:
            return [Problem((*path, "model"), str(error))]
        return []

    def save(self, model: nn.Module, folder: Path, *, name: str, labels: list[str], processor: Any) -> None:
        """Write ``model.safetensors``; the code stays where it is."""
        folder.mkdir(parents=True, exist_ok=True)
        save_modules(model, folder / WEIGHTS)


def what_runs(name: str) -> str:
    """Return which code building the model runs, such as ``the entry 'resnet18' of … on GitHub``.

    Args:
        name: what stands after ``torchhub:``; it need not be right.
    """
    repo, _, entry = name.rpartition("/")
    if _is_folder(repo):
        return f"the entry '{entry}' of {Path(repo).expanduser() / _HUBCONF}"
    return f"the entry '{entry}' of {_HUBCONF} in the repository {repo} on GitHub"


def _is_folder(repo: str) -> bool:
    return bool(repo) and Path(repo).expanduser().is_dir()


def _parsed(name: str) -> tuple[str, str, bool]:
    """Return repository or folder, entry, and whether it is a folder.

    Raises:
        ModelError: the name is none, or the folder holds no ``hubconf.py``.
    """
    repo, _, entry = name.rpartition("/")
    if _is_folder(repo):
        folder = Path(repo).expanduser()
        if not (folder / _HUBCONF).is_file():
            raise ModelError(f"expected a folder with {_HUBCONF}, and {folder} has none")
        if entry:
            return str(folder), entry, True
    elif entry.isidentifier() and _GITHUB.fullmatch(repo):
        return repo, entry, False
    raise ModelError(
        f"expected torchhub:OWNER/REPO/ENTRY, torchhub:OWNER/REPO:REF/ENTRY or torchhub:FOLDER/ENTRY with a folder "
        f"that exists, got 'torchhub:{name}'"
    )


def _signature(repo: str, entry: str, local: bool) -> dict[str, inspect.Parameter]:
    """Return the parameters of an entry, by name.

    Raises:
        ModelError: no such repository or entry.
    """
    folder = Path(repo) if local else _downloaded(repo, entry)
    module = _hubconf(folder, f"{repo}/{entry}", local)
    found = getattr(module, entry, None)
    if not callable(found):
        names = [key for key in dir(module) if not key.startswith("_") and callable(getattr(module, key))]
        raise ModelError(f"{_HUBCONF} of {repo} has no entry '{entry}'; {did_you_mean(entry, names)}")
    try:
        return dict(inspect.signature(found).parameters)
    except ValueError:  # made in C
        return {}


def _downloaded(repo: str, entry: str) -> Path:
    """Return the folder where PyTorch Hub keeps the repository, after seeing to it that it is there."""
    with _as_model_error(f"{repo}/{entry}", local=False):
        entries: Any = torch.hub.list
        entries(repo, trust_repo=True, verbose=False)
    owner, _, rest = repo.partition("/")
    project, _, ref = rest.partition(":")
    folders = [
        Path(torch.hub.get_dir()) / f"{owner}_{project}_{each.replace('/', '_')}"
        for each in ([ref] if ref else ["main", "master"])
    ]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _hubconf(folder: Path, name: str, local: bool) -> Any:
    """Import a ``hubconf.py`` as PyTorch Hub does, with its folder on the path."""
    sys.path.insert(0, str(folder))
    try:
        with _as_model_error(name, local):
            spec: Any = importlib.util.spec_from_file_location("hubconf", folder / _HUBCONF)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    finally:
        sys.path.remove(str(folder))


def _options(
    taken: Mapping[str, inspect.Parameter], kwargs: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options with the facts that the signature names; what the recipe says wins."""
    offered = {**facts, "num_classes": facts.get("num_labels")}
    known = {key: value for key, value in offered.items() if key in taken and value is not None}
    return {**known, **kwargs}


@contextmanager
def _as_model_error(name: str, local: bool) -> Iterator[None]:
    try:
        yield
    except PotstillError:
        raise
    except Exception as error:  # whatever the code of a repository raises
        where = "" if local else ", neither from GitHub nor from the cache of PyTorch Hub"
        raise ModelError(
            f"'torchhub:{name}' could not be loaded{where} ({type(error).__name__}: {error}); "
            "a folder that holds the repository is named as torchhub:FOLDER/ENTRY"
        ) from error
