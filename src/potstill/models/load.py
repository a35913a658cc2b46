"""From a reference in a recipe to a model, and from a saved folder back to it.

A reference is a hub id or a folder of transformers, ``timm:NAME``, ``torchvision:NAME``,
``torchhub:REPO_OR_DIR/ENTRY``, ``sklearn:CLASS``, ``onnx:FILE``, ``potstill:NAME``, ``package.module:factory``, or a
folder that potstill saved.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from potstill.errors import CodeNotAllowedError, ComponentError, ModelError, PotstillError, Problem, did_you_mean
from potstill.models.origins import Built, ImageProcessor, Origin, TextProcessor
from potstill.models.student import cut
from potstill.models.weights import load_modules, load_weights, save_student
from potstill.registry import check_options, import_dotted, models, signature_options, takes_any_keyword

logger = logging.getLogger(__name__)

CARD = "potstill.json"
ORIGINS = {
    "timm": "potstill.models.timm_models:Timm",
    "torchvision": "potstill.models.torchvision_models:Torchvision",
    "torchhub": "potstill.models.torch_hub:TorchHub",
    "sklearn": "potstill.models.sklearn_models:Sklearn",
    "onnx": "potstill.models.onnx_models:Onnx",
}
"""Prefix of a reference to the ecosystem that it belongs to; without a prefix it is transformers'."""

_OWN = "potstill:"


@dataclass(frozen=True)
class Blueprint:
    """How to build a model: enough to build the same one again.

    Attributes:
        model: the reference.
        kwargs: options of its factory or ecosystem.
        weights: a file of weights to load into it, or its address (``https://…``).
        pretrained: whether a named model comes with its trained weights, or new.
        keep_blocks: the blocks that stay, counted from 0; ``None`` for all.
        container: path of the list of blocks, where it is not the only one.
    """

    model: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | str | None = None
    pretrained: bool = True
    keep_blocks: tuple[int, ...] | None = None
    container: str | None = None

    @property
    def folder(self) -> Path | None:
        """The folder that potstill saved, where the reference is one."""
        folder = Path(self.model).expanduser()
        return folder if (folder / CARD).is_file() else None

    @property
    def origin(self) -> tuple[Origin, str] | None:
        """The ecosystem and the model's name in it; ``None`` for models that a factory makes."""
        return _find_origin(self.model)

    def build(self, facts: Mapping[str, Any], *, seed: int, allow_code: bool = True) -> nn.Module:
        """Return the model; see :meth:`make`."""
        return self.make(facts, seed=seed, allow_code=allow_code).model

    def make(self, facts: Mapping[str, Any], *, seed: int, allow_code: bool = True) -> Built:
        """Return a model and what is known of it, initialised from ``seed`` without touching the global generator.

        Args:
            facts: what the task knows (``num_labels``, ``in_features``, …), for the factory's parameters of that name.
            seed: seed of the initialisation; the same seed gives the same weights.
            allow_code: whether code outside potstill may be imported.

        Raises:
            ModelError: unknown reference, wrong options, or weights that do not fit.
            CodeNotAllowedError: code that was not allowed.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators as well
            built = self._whole(facts, seed, allow_code)
        if self.weights is not None:
            note = load_weights(built.model, _downloaded(self.weights))
            if note:
                logger.info("%s: %s", self.weights, note)
            built = replace(built, fresh=[])
        if self.keep_blocks is None:
            return built
        return replace(built, model=cut(built.model, self.keep_blocks, container=self.container))

    def _whole(self, facts: Mapping[str, Any], seed: int, allow_code: bool) -> Built:
        """Return the model with all its blocks, without the file of weights."""
        if self.folder is not None:
            if self.pretrained:
                model, card = load_model(self.folder, allow_code=allow_code)
                return Built(model, labels=list(card.get("settings", {}).get("label_names", [])))
            if "auto_model" not in _read(self.folder):
                return _saved_blueprint(self.folder).make(facts, seed=seed, allow_code=allow_code)
        found = self.origin
        if found is not None:
            _refuse_code(self.model, self.kwargs, allow_code=allow_code)
            origin, name = found
            return origin.build(name, self.kwargs, facts, pretrained=self.pretrained and self.weights is None)
        return Built(self._made(facts, allow_code))

    def _made(self, facts: Mapping[str, Any], allow_code: bool) -> nn.Module:
        factory = find_factory(self.model, allow_code=allow_code)
        kwargs = self.complete(factory, facts)
        problems = check_options(factory, kwargs, label=f"model '{self.model}'")
        if problems:
            raise ModelError("; ".join(str(problem) for problem in problems))
        model = factory(**kwargs)
        if not isinstance(model, nn.Module):
            raise ModelError(f"expected '{self.model}' to return an nn.Module, got {type(model).__name__}")
        return model

    def complete(self, factory: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with the task's facts that the factory takes and the recipe does not give."""
        known = signature_options(factory)
        return {**{name: value for name, value in facts.items() if name in known}, **self.kwargs}

    def processor(self, facts: Mapping[str, Any], *, allow_code: bool = True) -> ImageProcessor | TextProcessor | None:
        """Return how the model wants its inputs; ``None`` where that is the task's to say.

        Raises:
            CodeNotAllowedError: code that was not allowed.
            ModelError: a model of transformers without tokenizer or image processor.
        """
        if self.folder is not None and "auto_model" not in _read(self.folder):
            return _saved_blueprint(self.folder).processor(facts, allow_code=allow_code)
        if self.origin is None:
            return None
        _refuse_code(self.model, self.kwargs, allow_code=allow_code)
        origin, name = self.origin
        return origin.processor(name, self.kwargs, facts)

    def card(self, facts: Mapping[str, Any], *, allow_code: bool = True) -> dict[str, Any]:
        """Return what a saved model's card says of how to build it again, without any facts."""
        if self.folder is not None:
            about = {key: value for key, value in _read(self.folder).items() if key in _BUILDS}
            kept = about.get("keep_blocks")
        else:
            about, kept = {"model": self.model, "kwargs": self._completed(facts, allow_code)}, None
            if self.origin is not None and not any(self.model.startswith(f"{prefix}:") for prefix in ORIGINS):
                return {**about, "auto_model": facts.get("auto_model")}
        if self.keep_blocks is not None:
            kept = [kept[place] for place in self.keep_blocks] if kept else list(self.keep_blocks)
            about |= {"keep_blocks": kept, "container": self.container}
        return about

    def _completed(self, facts: Mapping[str, Any], allow_code: bool) -> dict[str, Any]:
        if self.origin is None:
            return self.complete(find_factory(self.model, allow_code=allow_code), facts)
        origin, name = self.origin
        return origin.complete(name, self.kwargs, facts)

    def check(self, path: tuple[str | int, ...], *, allow_code: bool) -> list[Problem]:
        """Return every mistake in the reference and its options that shows without data and network."""
        if self.folder is not None:
            return []
        try:
            _refuse_code(self.model, self.kwargs, allow_code=allow_code)
            found = self.origin
            if found is not None:
                return found[0].check(found[1], self.kwargs, path)
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
        options = check_options(factory, given, label=f"model '{self.model}'", path=(*path, "kwargs"))
        return problems + [p for p in options if p.path != (*path, "kwargs")]  # missing ones come from the data


_BUILDS = ("model", "kwargs", "auto_model", "keep_blocks", "container")


def _downloaded(weights: Path | str) -> Path:
    """Return a file of weights, fetched once into torch's cache where an address is given.

    A name such as ``resnet56-4bfd9763.th`` holds the beginning of the file's SHA-256, which is then checked.

    Raises:
        ModelError: the file cannot be had, or is not what its name says.
    """
    if "://" not in str(weights):
        return Path(weights)
    name = urlsplit(str(weights)).path.rpartition("/")[2]
    digest = torch.hub.HASH_REGEX.search(name)
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(str(weights), str(file), digest and digest[1], progress=False)
        except (OSError, RuntimeError) as error:
            raise ModelError(f"the weights {weights} cannot be fetched: {error}") from error
    return file


def _find_origin(reference: str) -> tuple[Origin, str] | None:
    """Return the ecosystem of a reference and the name in it; ``None`` for a factory, potstill's own or dotted."""
    prefix, colon, name = reference.partition(":")
    if colon and prefix in ORIGINS:
        module, _, attribute = ORIGINS[prefix].partition(":")
        return getattr(import_module(module), attribute)(), name
    if colon and not Path(reference).expanduser().is_dir():
        return None
    from potstill.models.hugging_face import HuggingFace

    return HuggingFace(), str(Path(reference).expanduser()) if reference.startswith("~") else reference


def _refuse_code(reference: str, kwargs: Mapping[str, Any], *, allow_code: bool) -> None:
    """Raise if building a model would run code from outside and nobody allowed it.

    Raises:
        CodeNotAllowedError: says what would run.
    """
    if allow_code:
        return
    if reference.startswith("torchhub:"):
        from potstill.models.torch_hub import what_runs

        raise CodeNotAllowedError(
            f"'{reference}' would run {what_runs(reference.partition(':')[2])}; allow it with --allow-code"
        )
    if reference.startswith("sklearn:") and "." in reference:
        module = reference.partition(":")[2].rpartition(".")[0]
        raise CodeNotAllowedError(
            f"'{reference}' would import and run the Python module {module}; allow it with --allow-code"
        )
    if kwargs.get("trust_remote_code"):
        raise CodeNotAllowedError(
            f"'{reference}' would run the Python code in that repository; allow it with --allow-code"
        )


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


def save_model(
    model: nn.Module, folder: Path, card: Mapping[str, Any], processor: ImageProcessor | TextProcessor | None = None
) -> None:
    """Write a model in the layout of its ecosystem, and a card: ``potstill.json``.

    Args:
        model: the model.
        folder: where to; made if missing.
        card: ``model``, ``kwargs``, … (see :meth:`Blueprint.card`) to build it again, ``task`` and ``settings`` for
            its preprocessing.
        processor: what is saved beside a model of transformers, for its ``pipeline``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = _find_origin(str(card["model"])) if "auto_model" in card or "keep_blocks" not in card else None
    if found is None:
        save_student(model, folder)
    else:
        labels = list(card.get("settings", {}).get("label_names", []))
        found[0].save(model, folder, name=found[1], labels=labels, processor=processor)
    staged = folder / (CARD + ".tmp")
    staged.write_text(json.dumps(card, indent=2, ensure_ascii=False), encoding="utf-8")
    staged.replace(folder / CARD)


def read_card(folder: Path) -> dict[str, Any] | None:
    """Return the card of a folder that potstill saved, or ``None`` for anything else."""
    path = folder / CARD
    return _read(folder) if path.is_file() else None


def load_model(folder: Path, *, allow_code: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model in a folder and its card.

    Raises:
        ModelError: the folder holds no card or a damaged one, or weights that do not fit.
    """
    folder = Path(folder)
    if not (folder / CARD).is_file():
        raise ModelError(f"expected a folder with {CARD}, and {folder} has none")
    card = _read(folder)
    if card.get("auto_model"):
        from potstill.models.hugging_face import load_pretrained

        _refuse_code(str(folder), card["kwargs"], allow_code=allow_code)
        trusted = bool(card["kwargs"].get("trust_remote_code"))
        return load_pretrained(folder, str(card["auto_model"]), trust_remote_code=trusted), card
    model = _saved_blueprint(folder).build({}, seed=0, allow_code=allow_code)
    load_modules(model, folder / "model.safetensors")
    return model, card


def _saved_blueprint(folder: Path) -> Blueprint:
    """Return how the model in a folder that potstill saved is built, without its weights.

    Raises:
        ModelError: the card is damaged.
    """
    card = _read(folder)
    kept = card.get("keep_blocks")
    blocks = None if kept is None else tuple(int(place) for place in kept)
    return Blueprint(card["model"], card["kwargs"], None, False, blocks, card.get("container"))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {**card, "model": str(card["model"]), "kwargs": dict(card["kwargs"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged: expected `model` and `kwargs` in it ({error!r})") from error
