"""From a reference in a recipe to a model, and from a saved folder back to it.

A reference is ``potstill:NAME``, ``package.module:factory``, or a folder that potstill saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from potstill.errors import ComponentError, ModelError, PotstillError, Problem, did_you_mean
from potstill.models.weights import load_modules, save_student
from potstill.registry import check_options, import_dotted, models, signature_options, takes_any_keyword

CARD = "potstill.json"
_OWN = "potstill:"


@dataclass(frozen=True)
class Blueprint:
    """How to build a model: enough to build the same one again.

    Attributes:
        model: the reference.
        kwargs: options of its factory.
        weights: safetensors to load into it, strictly.
    """

    model: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None

    def build(self, facts: Mapping[str, Any], *, seed: int, allow_code: bool = True) -> nn.Module:
        """Return a fresh model, initialised from ``seed`` without touching the global generator.

        Args:
            facts: what the task knows (``num_labels``, ``in_features``, …), for the factory's parameters of that name.
            seed: seed of the initialisation; the same seed gives the same weights.
            allow_code: whether a dotted path outside potstill may be imported.

        Raises:
            ModelError: unknown reference, wrong options, or weights that do not fit.
            CodeNotAllowedError: a dotted path that was not allowed.
        """
        folder = Path(self.model).expanduser()
        if (folder / CARD).is_file():
            return load_model(folder, allow_code=allow_code)[0]
        factory = find_factory(self.model, allow_code=allow_code)
        kwargs = self.complete(factory, facts)
        problems = check_options(factory, kwargs, label=f"model '{self.model}'")
        if problems:
            raise ModelError("; ".join(str(problem) for problem in problems))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators as well
            model = factory(**kwargs)
        if not isinstance(model, nn.Module):
            raise ModelError(f"expected '{self.model}' to return an nn.Module, got {type(model).__name__}")
        if self.weights is not None:
            load_modules(model, self.weights)
        return model

    def complete(self, factory: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with the task's facts that the factory takes and the recipe does not give."""
        known = signature_options(factory)
        return {**{name: value for name, value in facts.items() if name in known}, **self.kwargs}

    def check(self, path: tuple[str | int, ...], *, allow_code: bool) -> list[Problem]:
        """Return every mistake in the reference and its options that shows without data."""
        folder = Path(self.model).expanduser()
        if (folder / CARD).is_file():
            return []
        try:
            factory = find_factory(self.model, allow_code=allow_code)
        except PotstillError as error:
            return [Problem((*path, "model"), str(error))]
        unknown = [] if takes_any_keyword(factory) else [k for k in self.kwargs if k not in signature_options(factory)]
        known = signature_options(factory)
        problems = [
            Problem((*path, "kwargs", k), f"model '{self.model}' has no option '{k}'", did_you_mean(k, known))
            for k in unknown
        ]
        given = {name: value for name, value in self.kwargs.items() if name not in unknown}
        found = check_options(factory, given, label=f"model '{self.model}'", path=(*path, "kwargs"))
        return problems + [p for p in found if p.path != (*path, "kwargs")]  # missing ones come from the data


def find_factory(reference: str, *, allow_code: bool = True) -> Any:
    """Return the class or function that a reference names.

    Raises:
        ModelError: it names nothing, with what would be right.
        CodeNotAllowedError: a dotted path that was not allowed.
    """
    if reference.startswith(_OWN):
        try:
            return models.get(reference.removeprefix(_OWN))
        except ComponentError as error:
            raise ModelError(str(error)) from error
    if ":" in reference:
        return import_dotted(reference, allow_code=allow_code)
    own = [_OWN + name for name in models.names()]
    raise ModelError(
        f"expected potstill:NAME, package.module:factory or a folder with {CARD}, got '{reference}'; "
        f"{did_you_mean(_OWN + reference, own)}"
    )


def save_model(model: nn.Module, folder: Path, card: Mapping[str, Any]) -> None:
    """Write weights and a card: ``model.safetensors`` (or ``save_pretrained``) and ``potstill.json``.

    Args:
        model: the model.
        folder: where to; made if missing.
        card: ``model`` and ``kwargs`` to build it again, ``task`` and ``settings`` for its preprocessing.
    """
    save_student(model, folder)
    staged = folder / (CARD + ".tmp")
    staged.write_text(json.dumps(card, indent=2, ensure_ascii=False), encoding="utf-8")
    staged.replace(folder / CARD)


def read_card(folder: Path) -> dict[str, Any] | None:
    """Return the card of a folder that potstill saved, or ``None`` for anything else."""
    path = folder / CARD
    if not path.is_file():
        return None
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card


def load_model(folder: Path, *, allow_code: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model in a folder and its card.

    Raises:
        ModelError: the folder holds no card or a damaged one, or weights that do not fit.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        raise ModelError(f"expected a folder with {CARD}, and {folder} has none")
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        blueprint = Blueprint(str(card["model"]), dict(card["kwargs"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged: expected `model` and `kwargs` in it ({error!r})") from error
    model = blueprint.build({}, seed=0, allow_code=allow_code)
    load_modules(model, Path(folder) / "model.safetensors")
    return model, card
