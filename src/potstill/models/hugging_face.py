"""Models of transformers: a hub id, or a local folder of the same layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from potstill.errors import ModelError, Problem, did_you_mean, nearest
from potstill.models.origins import Built, ImageProcessor, TextProcessor

_HUB = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "trust_remote_code")
_LOADING = ("dtype", "attn_implementation", "device_map", "variant", "use_safetensors")
_DEFAULT_LABEL = re.compile(r"LABEL_\d+")
_AFTER_PADDING = ("roberta", "camembert", "mpnet", "longformer")
"""Families whose first position is the one after the padding token's number."""


class HuggingFace:
    """Models by hub id or local folder. See :class:`potstill.models.origins.Origin`.

    Options are those of the configuration (``num_hidden_layers``, ``hidden_dropout_prob``, …), of the hub
    (``revision``, ``subfolder``, …) and of loading (``dtype``, ``attn_implementation``).
    """

    def build(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any], *, pretrained: bool) -> Built:
        """Return the model with a head for the task; weights that the checkpoint lacks are fresh.

        Raises:
            ModelError: no such model, a task that none of transformers does, or unknown options.
        """
        auto = _auto_model(facts)
        config, loading = _config(name, kwargs)
        held = _labels(config)
        wanted = list(facts.get("label_names") or ())
        loading.setdefault("dtype", "float32")  # transformers takes the checkpoint's, which may be too coarse to train
        if wanted and len(held) != len(wanted):
            _set_labels(config, wanted)
        _complete_padding(config, name, kwargs)
        with _quiet(), _as_model_error(name):
            if not pretrained:
                made = _only(loading, ("dtype", "attn_implementation", "trust_remote_code"))
                if made["dtype"] == "auto":
                    del made["dtype"]
                fresh_model: nn.Module = auto.from_config(config, **made)
                name_labels(fresh_model, wanted)
                return Built(fresh_model)
            options = {"ignore_mismatched_sizes": True, "output_loading_info": True, **loading}
            model, found = auto.from_pretrained(name, config=config, **options)
        fresh = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
        named = not fresh and not all(_DEFAULT_LABEL.fullmatch(label) for label in held)
        if not named:
            name_labels(model, wanted)
        return Built(model, fresh, held if named else [])

    def complete(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options as they are: the saved configuration says the rest."""
        return dict(kwargs)

    def processor(
        self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> ImageProcessor | TextProcessor | None:
        """Return the tokenizer or image processor that comes with the model, as the task needs it.

        Raises:
            ModelError: the model comes without one.
        """
        hub = _hub(kwargs)
        if "Image" in str(facts.get("auto_model")):
            from potstill.models.image_processors import image_processor

            with _quiet(), _as_model_error(name, "image processor"):
                return image_processor(transformers.AutoImageProcessor.from_pretrained(name, **hub))
        with _quiet(), _as_model_error(name, "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **hub)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes up without files
            raise ModelError(f"'{name}' comes without a tokenizer; name a model that has one with `processor:`")
        if _padding(tokenizer) is None:
            raise ModelError(f"the tokenizer of '{name}' has neither a padding token nor one that ends a text")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        limit = _most_tokens(name, kwargs)
        if limit is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        return TextProcessor(tokenizer)

    def check(self, name: str, kwargs: Mapping[str, Any], path: tuple[str | int, ...]) -> list[Problem]:
        """Return what shows without a network: a folder that holds no model."""
        folder = Path(name).expanduser()
        if folder.is_dir() and not (folder / "config.json").is_file():
            message = f"expected a model's folder with config.json, and {name} has none"
            return [Problem((*path, "model"), message)]
        if not folder.is_dir() and f"potstill:{name}" in _own_names():
            message = f"expected a hub id, a folder, or a name with its prefix, got '{name}'"
            return [Problem((*path, "model"), message, f"did you mean 'potstill:{name}'?")]
        if not folder.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            message = f"expected a folder or a hub id such as bert-base-uncased or owner/name, got '{name}'"
            return [Problem((*path, "model"), message)]
        return _unknown_options(name, kwargs, path) if folder.is_dir() and kwargs else []

    def save(self, model: nn.Module, folder: Path, *, name: str, labels: list[str], processor: Any) -> None:
        """Write the model and its tokenizer or image processor, as ``from_pretrained`` and ``pipeline`` read them."""
        name_labels(model, labels)
        save: Any = model.save_pretrained
        with _quiet():
            save(folder)
        native = getattr(processor, "tokenizer", getattr(processor, "native", None))
        if native is not None:
            native.save_pretrained(folder)


def load_pretrained(folder: Path, auto_model: str, *, trust_remote_code: bool = False) -> nn.Module:
    """Return the model that :meth:`HuggingFace.save` wrote; weights that are missing or left over are an error.

    Args:
        folder: the model's.
        auto_model: name of the auto class, such as ``AutoModelForSequenceClassification``.
        trust_remote_code: whether Python code that the folder names may run.

    Raises:
        ModelError: the folder holds no such model, or its weights do not fit; names them.
    """
    with _quiet(), _as_model_error(str(folder)):
        auto = _auto_model({"auto_model": auto_model})
        options = {"use_safetensors": True, "output_loading_info": True, "trust_remote_code": trust_remote_code}
        model, found = auto.from_pretrained(folder, **options)
    for what, wrong in (("lacks weights", "missing_keys"), ("has weights left over", "unexpected_keys")):
        if found[wrong]:
            raise ModelError(f"the model in {folder} {what}: {', '.join(sorted(found[wrong])[:8])}")
    loaded: nn.Module = model
    return loaded


def name_labels(model: Any, names: list[str]) -> None:
    """Give the classes of a transformers model the names of the data set; nothing for other models or no names."""
    if names and hasattr(model, "config") and hasattr(model.config, "id2label"):
        _set_labels(model.config, names)


def hub_commit(name: str, kwargs: Mapping[str, Any]) -> str:
    """Return the commit of a model of the hub that is in the local cache, else the name itself."""
    from transformers.utils.hub import cached_file

    with _quiet(), _as_model_error(name):
        found = cached_file(name, "config.json", **_hub(kwargs))
    commit = re.search(r"snapshots/([0-9a-f]{40})/", str(found))
    return f"{name}@{commit[1]}" if commit else name


def _auto_model(facts: Mapping[str, Any]) -> Any:
    if not facts.get("auto_model"):
        raise ModelError(
            "this task takes no model of transformers; name one as potstill:NAME or package.module:factory"
        )
    return getattr(transformers, str(facts["auto_model"]))


def _config(name: str, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the configuration, changed as the options say, and the options of loading."""
    loading = {**_hub(kwargs), **_only(kwargs, _LOADING)}
    dtype = loading.get("dtype", "auto")
    if dtype != "auto" and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        hint = did_you_mean(str(dtype), ("float32", "float16", "bfloat16", "float64", "auto"))
        raise ModelError(f"model '{name}' has no dtype '{dtype}'; {hint}")
    with _quiet(), _as_model_error(name):
        config = transformers.AutoConfig.from_pretrained(name, **_hub(kwargs))
    known = {*config.to_dict(), *getattr(config, "attribute_map", {})}
    for key, value in kwargs.items():
        if key in loading:
            continue
        if key not in known:
            raise ModelError(f"model '{name}' has no option '{key}'; {did_you_mean(key, [*known, *_HUB, *_LOADING])}")
        with _as_model_error(name):
            setattr(config, key, value)
    with _as_model_error(name):
        return _with_layers(config), loading


def _unknown_options(name: str, kwargs: Mapping[str, Any], path: tuple[str | int, ...]) -> list[Problem]:
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(name, **_hub(kwargs))
    except (OSError, ValueError, KeyError):
        return []  # said when the model is built
    known = [*config.to_dict(), *getattr(config, "attribute_map", {}), *_HUB, *_LOADING]
    return [
        Problem((*path, "kwargs", key), f"model '{name}' has no option '{key}'", did_you_mean(key, known))
        for key in kwargs
        if key not in known
    ]


def _with_layers(config: Any) -> Any:
    """Return a configuration whose list of kinds of layers is as long as it has layers, after a change of these."""
    kinds, layers = getattr(config, "layer_types", None), getattr(config, "num_hidden_layers", None)
    if kinds is None or layers is None or len(kinds) == layers:
        return config
    kept = kinds[:layers] if layers < len(kinds) else None  # none: the family's own rule
    return type(config).from_dict({**config.to_dict(), "layer_types": kept})


def _hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the hub; without a word about code, transformers would ask whether to run it."""
    return {"trust_remote_code": False, **_only(kwargs, _HUB)}


def _complete_padding(config: Any, name: str, kwargs: Mapping[str, Any]) -> None:
    """Give a decoder the padding token with which its tokenizer pads; it reads the last token that is no padding."""
    text = config.get_text_config()
    if getattr(text, "pad_token_id", 0) is not None or not hasattr(text, "vocab_size"):
        return
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **_hub(kwargs))
    except (OSError, ValueError, KeyError):
        return
    text.pad_token_id = config.pad_token_id = _padding(tokenizer)


def _padding(tokenizer: Any) -> int | None:
    """Return the token that fills up; a decoder without one fills up with the token that ends a text."""
    own: int | None = tokenizer.pad_token_id
    end: int | None = tokenizer.eos_token_id
    return end if own is None else own


def _most_tokens(name: str, kwargs: Mapping[str, Any]) -> int | None:
    """Return how many positions the model has, which many tokenizers do not say; ``None`` where any number will do."""
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(name, **_hub(kwargs)).get_text_config()
    except (OSError, ValueError, KeyError):  # a tokenizer alone
        return None
    positions = kwargs.get("max_position_embeddings", getattr(config, "max_position_embeddings", None))
    if not isinstance(positions, int) or positions < 1 or not getattr(config, "position_biased_input", True):
        return None
    shifted = any(family in config.model_type for family in _AFTER_PADDING)
    return positions - (config.pad_token_id or 0) - 1 if shifted else positions


def _labels(config: Any) -> list[str]:
    return [str(label) for _, label in sorted((int(key), label) for key, label in (config.id2label or {}).items())]


def _set_labels(config: Any, names: list[str]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: place for place, name in enumerate(names)}


def _only(kwargs: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key in keys}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' report and bars of loading from the screen: what they say is said by potstill."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _as_model_error(name: str, what: str = "model") -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, StrictDataclassError) as error:
        folder = Path(name).expanduser().is_dir()
        close = [] if folder or "/" in name else nearest(f"potstill:{name}", _own_names(), count=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        where = f"the folder {name}" if folder else f"'{name}', neither from a folder nor from the Hugging Face Hub"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines[:2]) if lines else type(error).__name__
        raise ModelError(f"no {what} could be loaded from {where}{hint} ({said})") from error


def _own_names() -> list[str]:
    from potstill.registry import models

    return [f"potstill:{name}" for name in models.names()]
