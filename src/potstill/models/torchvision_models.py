"""Image classifiers of torchvision."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from potstill.errors import ComponentError, ModelError, PotstillError, Problem, did_you_mean
from potstill.models.origins import Built, ImageProcessor, TextProcessor
from potstill.models.weights import WEIGHTS, save_modules

_AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}
"""Models with further heads for training, which no loss of potstill reaches: they are left out."""

_UNKNOWN_OPTION = re.compile(r"unexpected keyword argument '(\w+)'")
_OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))")


class Torchvision:
    """Classifiers by the name of their builder, such as ``resnet18``.

    See :class:`potstill.models.origins.Origin`. Options are ``weights`` (such as ``IMAGENET1K_V1``; the best ones
    unless said) and those of the model.
    """

    def build(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any], *, pretrained: bool) -> Built:
        """Return the model with a head of ``num_labels`` classes; it is fresh where the trained one has another number.

        GoogLeNet and Inception come without auxiliary heads and, as their trained weights need it, with
        ``transform_input``.

        Raises:
            ModelError: no such model or weights, unknown options, images without three channels, or no network.
            ComponentError: torchvision is not installed.
        """
        models = _torchvision()
        weights = _weights(name, kwargs)
        if facts.get("in_channels", 3) != 3:
            raise ModelError(
                f"models of torchvision take images of 3 channels and the data has {facts['in_channels']}; "
                f"take timm:{name} or another of timm, which adapts its first layer"
            )
        options = _options(name, kwargs, facts, weights)
        options.pop("weights", None)
        if not pretrained:
            if name in _AUXILIARY:
                options.setdefault("init_weights", True)
            with _as_model_error(name):
                return Built(models.get_model(name, **options))
        labels = [str(label) for label in weights.meta["categories"]]
        classes = options.pop("num_classes", len(labels))
        options.pop("init_weights", None)
        if name in _AUXILIARY:
            options.update(aux_logits=True, init_weights=False)
        with _as_model_error(name, weights):
            model: nn.Module = models.get_model(name, num_classes=len(labels), **options)
            # the builders of torchvision unpickle whatever the file holds
            state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
            model.load_state_dict({_renamed(key): value for key, value in state.items()})
        _drop_auxiliary(model, name)
        if classes == len(labels):
            return Built(model, labels=labels)
        return Built(model, _new_head(model, len(labels), classes))

    def complete(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with the number of classes and what the trained weights ask of the architecture."""
        _torchvision()
        return _options(name, kwargs, facts, _weights(name, kwargs))

    def processor(
        self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> ImageProcessor | TextProcessor | None:
        """Return how the weights were trained to see images."""
        _torchvision()
        seen = _weights(name, kwargs).transforms()
        size, shorter = int(seen.crop_size[0]), int(seen.resize_size[0])
        asked = kwargs.get("image_size")
        if asked is not None and asked != size:
            size, shorter = int(asked), int(asked * shorter / size)
        return ImageProcessor(
            size=(size, size),
            shorter=shorter,
            interpolation=seen.interpolation.value,
            mean=tuple(seen.mean),
            std=tuple(seen.std),
        )

    def check(self, name: str, kwargs: Mapping[str, Any], path: tuple[str | int, ...]) -> list[Problem]:
        """Return names, weights and options that torchvision does not know, and auxiliary heads."""
        try:
            models = _torchvision()
            weights = _weights(name, {})
        except PotstillError as error:
            return [Problem((*path, "model"), str(error))]
        problems = []
        try:
            weights = _weights(name, kwargs)
        except ModelError as error:
            problems.append(Problem((*path, "kwargs", "weights"), str(error)))
        options = {key: value for key, value in kwargs.items() if key != "weights"}
        if name in _AUXILIARY and options.get("aux_logits"):
            message = f"the auxiliary heads of '{name}' get no loss in potstill; leave out aux_logits"
            problems.append(Problem((*path, "kwargs", "aux_logits"), message))
        if not options:
            return problems
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                models.get_model(name, **_options(name, options, {}, weights))
        except TypeError as error:
            key = _UNKNOWN_OPTION.search(str(error))
            if key is not None:
                message = f"model 'torchvision:{name}' has no option '{key[1]}'"
                problems.append(Problem((*path, "kwargs", key[1]), message, str(error)))
        except (RuntimeError, NotImplementedError, ValueError):
            pass  # some models cannot be made without memory; what is wrong shows when it is built
        return problems

    def save(self, model: nn.Module, folder: Path, *, name: str, labels: list[str], processor: Any) -> None:
        """Write ``model.safetensors``, which fits ``torchvision.models.get_model(name, num_classes=N)`` strictly.

        GoogLeNet and Inception need ``aux_logits=False, transform_input=True`` besides.
        """
        folder.mkdir(parents=True, exist_ok=True)
        save_modules(model, folder / WEIGHTS)


def _torchvision() -> Any:
    try:
        from torchvision import models
    except ImportError as error:
        raise ComponentError(
            f"a model of torchvision needs torchvision: pip install 'potstill[vision]' ({error})"
        ) from error
    return models


def _weights(name: str, kwargs: Mapping[str, Any]) -> Any:
    """Return the trained weights that are asked for, whether or not they are to be loaded.

    Raises:
        ModelError: no such classifier or weights.
    """
    models = _torchvision()
    known = models.list_models(module=models)
    if name not in known:
        raise ModelError(f"torchvision has no classifier '{name}'; {did_you_mean(name, known)}")
    every = models.get_model_weights(name)
    asked = kwargs.get("weights")
    if asked is None or asked == "DEFAULT":
        return every.DEFAULT
    usable = {each.name: each for each in every if each.meta.get("categories")}
    asked = str(asked).rpartition(".")[2]
    if asked not in usable:
        raise ModelError(
            f"'torchvision:{name}' has no weights '{asked}' of a classifier; {did_you_mean(asked, usable)}"
        )
    return usable[asked]


def _options(name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any], weights: Any) -> dict[str, Any]:
    """Return the options that make the same architecture with and without trained weights."""
    options: dict[str, Any] = {}
    if facts.get("num_labels") is not None:
        options["num_classes"] = facts["num_labels"]
    if name in _AUXILIARY:
        options.update(aux_logits=False, transform_input=True)
    if name.startswith("vit_"):
        options["image_size"] = int(weights.meta["min_size"][0])
    return {**options, **kwargs}


def _renamed(key: str) -> str:
    """Return the name that a weight of an old DenseNet file has today."""
    old = _OLD_DENSENET.fullmatch(key)
    return old[1] + old[2] if old else key


def _drop_auxiliary(model: Any, name: str) -> None:
    for attribute in _AUXILIARY.get(name, ()):
        setattr(model, attribute, None)
        model.aux_logits = False


def _new_head(model: Any, old: int, new: int) -> list[str]:
    """Replace the last layer of ``old`` outputs by a fresh one of ``new``; return the names of its parameters."""
    heads = [
        (path, layer)
        for path, layer in model.named_modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == old)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == old and layer.kernel_size == (1, 1))
    ]
    if not heads:
        raise ModelError(f"{type(model).__name__} has no last layer of {old} outputs that could be replaced")
    path, layer = heads[-1]
    biased = layer.bias is not None
    fresh: nn.Module
    if isinstance(layer, nn.Linear):
        fresh = nn.Linear(layer.in_features, new, bias=biased)
    else:
        fresh = nn.Conv2d(layer.in_channels, new, 1, bias=biased)
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, fresh)
    if hasattr(model, "num_classes"):
        model.num_classes = new
    return [f"{path}.{key}" for key, _ in fresh.named_parameters()]


@contextmanager
def _as_model_error(name: str, weights: Any = None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a file in the cache may hold anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines[:2]) or type(error).__name__
        if weights is None or not isinstance(error, OSError):
            raise ModelError(f"'torchvision:{name}' cannot be built: {said}") from error
        raise ModelError(
            f"the weights {weights} cannot be had, tried {weights.url} and the local cache ({said}); "
            "give `pretrained: false`, or a file as `weights:`"
        ) from error
