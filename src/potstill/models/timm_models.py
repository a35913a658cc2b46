"""Models of timm: a name of its registry, of the Hugging Face Hub, or a folder in timm's layout."""

from __future__ import annotations

import logging
import math
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

_UNKNOWN_OPTION = re.compile(r"unexpected keyword argument '(\w+)'")
_MISSING_KEYS = re.compile(r"Missing keys \((.*?)\) discovered")
_FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


class Timm:
    """Models named ``resnet18``, ``resnet18.a1_in1k``, ``hf-hub:timm/resnet18.a1_in1k`` or ``local-dir:/folder``.

    See :class:`potstill.models.origins.Origin`. Options are those of ``timm.create_model`` and of the model.
    """

    def build(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any], *, pretrained: bool) -> Built:
        """Return the model with a head of ``num_labels`` classes; it is fresh where the trained one has another number.

        Raises:
            ModelError: no such model, unknown options, or weights that cannot be had.
            ComponentError: timm is not installed.
        """
        timm = _timm()
        name = _expanded(name)
        architecture, cfg, _ = _config(name, kwargs)
        options = _options(kwargs, facts, cfg)
        again = not pretrained and "pretrained_cfg" in kwargs
        if again and _source(name)[0]:
            name = architecture
        with _as_model_error(name, cfg, pretrained), _missing_weights() as missing:
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        if not pretrained:
            return Built(model)
        kept = getattr(model, "num_classes", None) == cfg.get("num_classes")
        fresh = {key for key in missing if key in dict(model.named_parameters())}
        if not kept:
            fresh.update(_classifier(model, cfg))
        return Built(model, sorted(fresh), _labels(cfg) if kept else [])

    def complete(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with the task's facts, and what the configuration of a hub's model or a folder says.

        Raises:
            ModelError: the configuration cannot be had.
        """
        _timm()
        name = _expanded(name)
        _, cfg, saved = _config(name, kwargs)
        options = {**saved, **_options(kwargs, facts, cfg)}
        if _source(name)[0]:
            sources = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "state_dict")
            options["pretrained_cfg"] = {key: value for key, value in cfg.items() if key not in sources}
        return options

    def processor(
        self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> ImageProcessor | TextProcessor | None:
        """Return how the weights were trained to see images; another number of channels takes that data's mean.

        Raises:
            ModelError: the model pads its images, which potstill does not do, or its configuration cannot be had.
        """
        _timm()
        from timm.data import resolve_data_config

        name = _expanded(name)
        _, cfg, saved = _config(name, kwargs)
        said = resolve_data_config({}, pretrained_cfg=cfg)
        height, width = _pair({**saved, **kwargs}.get("img_size") or said["input_size"][1:])
        share, mode = said["crop_pct"], said["crop_mode"]
        resized = math.floor(height / share), math.floor(width / share)
        if mode not in ("center", "squash") or (mode == "center" and height != width):
            raise ModelError(
                f"'timm:{name}' wants images of {height}x{width} by crop_mode '{mode}', which potstill does not do; "
                "choose another with the option `pretrained_cfg_overlay: {crop_mode: squash}`"
            )
        channels = _options(kwargs, facts, cfg).get("in_chans", said["input_size"][0])
        own = len(said["mean"]) == channels
        return ImageProcessor(
            size=(height, width),
            shorter=resized[0] if mode == "center" else None,
            interpolation=said["interpolation"] if said["interpolation"] in _FILTERS else "bicubic",
            mean=tuple(said["mean"]) if own else None,
            std=tuple(said["std"]) if own else None,
            squash=resized if mode == "squash" and resized != (height, width) else None,
            floor=False,
        )

    def check(self, name: str, kwargs: Mapping[str, Any], path: tuple[str | int, ...]) -> list[Problem]:
        """Return what shows without a network: a name that timm does not know, a folder without a model, options."""
        try:
            timm = _timm()
            name = _expanded(name)
            source, rest = _source(name)
            if source == "hf-hub":
                if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", rest):
                    return []
                raise ModelError(f"expected timm:hf-hub:OWNER/NAME, got 'timm:{name}'")
            _config(name, kwargs)
        except (PotstillError, TypeError) as error:
            return [Problem((*path, "model"), str(error))]
        if not kwargs:
            return []
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                timm.create_model(name, pretrained=False, **kwargs)
        except TypeError as error:
            key = _UNKNOWN_OPTION.search(str(error))
            if key is None:
                return []  # some models cannot be made without memory
            message = f"model 'timm:{name}' has no option '{key[1]}'"
            return [Problem((*path, "kwargs", key[1]), message, str(error))]
        except Exception:  # the same; what is wrong shows when it is built
            return []
        return []

    def save(self, model: nn.Module, folder: Path, *, name: str, labels: list[str], processor: Any) -> None:
        """Write ``model.safetensors`` and ``config.json``, as ``timm.create_model("local-dir:FOLDER")`` reads them.

        Raises:
            ModelError: the configuration holds what JSON cannot.
        """
        _timm()
        from timm.models._hub import save_config_for_hf

        folder.mkdir(parents=True, exist_ok=True)
        save_modules(model, folder / WEIGHTS)
        about = {"label_names": list(labels)} if labels else {}
        try:
            seen = _seen(model, processor)
            save_config_for_hf(model, str(folder / "config.json"), model_config=about, data_config=seen)
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"timm cannot describe the model 'timm:{name}' in a config.json: {error}") from error


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ComponentError(f"a model of timm needs timm: pip install 'potstill[vision]' ({error})") from error
    return timm


def _source(name: str) -> tuple[str | None, str]:
    """Return ``hf-hub`` or ``local-dir``, and what follows it; ``None`` and the name for a model of timm's registry."""
    source, colon, rest = name.partition(":")
    return (source, rest) if colon else (None, name)


def _expanded(name: str) -> str:
    source, rest = _source(name)
    source = {"hf_hub": "hf-hub"}.get(source or "", source)
    if source not in (None, "hf-hub", "local-dir"):
        raise ModelError(f"expected timm:NAME, timm:hf-hub:OWNER/NAME or timm:local-dir:FOLDER, got 'timm:{name}'")
    if source is None:
        return rest
    return f"{source}:{Path(rest).expanduser()}" if source == "local-dir" else f"{source}:{rest}"


def _config(name: str, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the architecture, what is known of its trained weights, and the options it was saved with.

    Raises:
        ModelError: no such model, tag, folder or repository.
    """
    from timm.models import load_model_config_from_hf, resolve_pretrained_cfg
    from timm.models._hub import load_model_config_from_path

    source, rest = _source(name)
    given, saved = kwargs.get("pretrained_cfg"), {}
    if source is None:
        _refuse_unknown(name)
        architecture, _, tag = name.partition(".")
        given = given or tag or None
    elif isinstance(given, Mapping) and given.get("architecture"):  # what `complete` kept
        architecture, given = str(given["architecture"]), dict(given)
    else:
        read = load_model_config_from_hf if source == "hf-hub" else load_model_config_from_path
        with _as_model_error(name, {}, pretrained=True):
            given, architecture, saved = read(rest)
        _refuse_unknown(architecture)
    with _as_model_error(name, {}, pretrained=False):
        resolved = resolve_pretrained_cfg(architecture, given, kwargs.get("pretrained_cfg_overlay")).to_dict()
    return architecture, resolved, dict(saved)


def _refuse_unknown(name: str) -> None:
    import timm

    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ModelError(f"timm has no model '{architecture}'; {did_you_mean(architecture, timm.list_models())}")
    if not dot:
        return
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag not in tags:
        raise ModelError(f"timm has no weights '{tag}' of {architecture}; {did_you_mean(tag, tags)}")


def _options(kwargs: Mapping[str, Any], facts: Mapping[str, Any], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``create_model``; what the recipe says wins over the task's facts."""
    options = {}
    if facts.get("num_labels") is not None:
        options["num_classes"] = facts["num_labels"]
    if facts.get("in_channels", channels := (cfg.get("input_size") or (3,))[0]) != channels:
        options["in_chans"] = facts["in_channels"]
    return {**options, **kwargs}


def _labels(cfg: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes by output; none unless there is one for each."""
    names = cfg.get("label_names") or []
    if isinstance(names, Mapping):
        by_output = {int(place): str(name) for place, name in names.items()}
        names = [by_output[place] for place in sorted(by_output)] if sorted(by_output) == [*range(len(names))] else []
    return [str(name) for name in names] if len(names) == cfg.get("num_classes") else []


def _classifier(model: nn.Module, cfg: Mapping[str, Any]) -> set[str]:
    """Return the names of the head's parameters."""
    places = cfg.get("classifier") or ()
    places = (places,) if isinstance(places, str) else tuple(places)
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{place}." for place in places))}


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _seen(model: Any, processor: Any) -> dict[str, Any]:
    """Return, in timm's words, how the model was given its images."""
    if not isinstance(processor, ImageProcessor):
        return {}
    said: dict[str, Any] = {"interpolation": processor.interpolation}
    channels = int(getattr(model, "in_chans", 3))
    for key, values in (("mean", processor.mean), ("std", processor.std)):
        if values is not None and len(values) in (1, channels):
            said[key] = values
    if processor.size is None:
        return said
    said["input_size"] = (channels, *processor.size)
    size = processor.size[0]
    resized = processor.squash[0] if processor.squash else processor.shorter or size
    exact = size / resized
    said["crop_pct"] = exact if math.floor(size / exact) == resized else size / (resized + 0.5)  # timm rounds down
    said["crop_mode"] = "squash" if processor.shorter is None else "center"
    return said


@contextmanager
def _missing_weights() -> Iterator[list[str]]:
    """Collect the weights that timm made up because the file has none; it says so in its log alone."""
    found: list[str] = []
    logger = logging.getLogger("timm.models._builder")
    level, shown = logger.level, logger.getEffectiveLevel()

    def collect(record: logging.LogRecord) -> bool:
        said = _MISSING_KEYS.search(record.getMessage())
        if said:
            found.extend(said[1].split(", "))
        return record.levelno >= shown

    logger.addFilter(collect)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.setLevel(level)
        logger.removeFilter(collect)


@contextmanager
def _as_model_error(name: str, cfg: Mapping[str, Any], pretrained: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # timm raises many kinds, some bare assertions
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines[:2]) or type(error).__name__
        wanting = isinstance(error, OSError) or "No pretrained weights" in said
        if not (pretrained and wanting):
            raise ModelError(f"'timm:{name}' cannot be built: {said}") from error
        source, rest = _source(name)
        tried = {
            "local-dir": f"the folder {rest}",
            "hf-hub": f"{rest} on the Hugging Face Hub and in the local cache",
        }.get(source or "", f"{cfg.get('hf_hub_id') or cfg.get('url') or 'timm itself'} and the local cache")
        raise ModelError(
            f"'timm:{name}' cannot be had, tried {tried} ({said}); give `pretrained: false`, "
            "a folder as timm:local-dir:FOLDER, or a file as `weights:`"
        ) from error
