"""The names of what a model says: from ``hidden.3``, ``attention.5`` or a module path to the place where it is read.

``hidden.n`` and ``attention.n`` count alike: 0 is the embeddings, 1 the first block. A *tower* is the part of a
transformers model that owns one stack of blocks: the whole body of BERT, the encoder and the decoder of T5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from potstill.errors import SignalError, did_you_mean

_TAP = re.compile(r"(?:(?P<mode>input|clone):)?(?P<path>[^:@]+)(?::(?P<element>[^:@]+))?(?:@(?P<call>\d+))?")
_LAYERED = re.compile(
    r"(?:(?P<prefix>.+)\.)?(?P<cross>cross_(?!hidden))?(?P<kind>hidden|attention|query|key|value)\.(?P<layer>-?\d+)"
)
_TOKEN_SIGNAL = re.compile(r"(?:.+\.)?hidden\.\d+(?:@\d+)?")
_CROSS = re.compile(r"(?:^|\.)(?:\w*cross|encoder_(?:decoder_)?att|encdec)", re.IGNORECASE)
_ATTENTION_KINDS = ("attention", "query", "key", "value")
_IMPLEMENTATIONS = ("sdpa", "eager", "potstill_sdpa", None)


@dataclass(frozen=True, eq=False)
class Tap:
    """Where one signal is read.

    Attributes:
        where: the tap as it was written.
        kind: ``module``, ``hidden``, ``attention``, ``query``, ``key`` or ``value``.
        module: the module whose forward is followed: the named one, or the tower for every other kind.
        layer: the ``n`` of ``hidden.n`` and ``attention.n``; 0 for a module path.
        parts: the modules among which the block's attention is; empty for ``module`` and ``hidden``.
        mode: ``input`` for the first input, ``clone`` for a copy of the output, else empty.
        element: which element of a tuple or dict output; ``None`` for the first tensor.
        call: which call in the block is meant, from 0; ``None`` where there may be one only.
    """

    where: str
    kind: str
    module: nn.Module
    layer: int = 0
    parts: tuple[nn.Module, ...] = ()
    mode: str = ""
    element: str | None = None
    call: int | None = None


def resolve(model: nn.Module, tap: str) -> Tap:
    """Return where ``tap`` is read in ``model``.

    Args:
        model: any module; ``hidden.n``, ``attention.n``, ``query.n``, ``key.n``, ``value.n`` and ``cross_attention.n``
            (``cross_query.n``, …) need a transformers model in it. Where that has several towers, a tower comes first:
            ``encoder.hidden.2``, ``decoder.attention.1``, ``vision_model.hidden.3``.
        tap: one of these, or a module path, optionally ``path:i`` (an element of a tuple or a key of a dict),
            ``path@k`` (its k-th call, from 0), ``input:path`` (its first input) or ``clone:path`` (a copy, for an
            output that a later module overwrites in place). A module path wins over other meanings of the same name.

    Raises:
        SignalError: ``tap`` names nothing in the model (the nearest names are given), its number is out of range, the
            tower is ambiguous, or the model's attention implementation cannot be tapped.
    """
    return resolve_all(model, [tap])[0]


def resolve_all(model: nn.Module, taps: Iterable[str]) -> list[Tap]:
    """Return where each tap is read, as :func:`resolve` does, looking over the model once.

    Raises:
        SignalError: the first tap that is wrong.
    """
    towers: dict[str, _Tower] | None = None
    resolved: list[Tap] = []
    for tap in taps:
        match = _TAP.fullmatch(tap)
        if match is None:
            raise SignalError(f"'{tap}' is no tap; write hidden.3, a module path, path:element or path@call")
        module = _submodule(model, match["path"])
        call = None if match["call"] is None else int(match["call"])
        if module is not None:
            resolved.append(Tap(tap, "module", module, 0, (), match["mode"] or "", match["element"], call))
            continue
        towers = _towers(model) if towers is None else towers
        resolved.append(_layered(model, towers, tap, match["path"], call))
        if match["mode"] or match["element"]:
            raise SignalError(f"'{tap}': 'input:', 'clone:' and ':element' are for module paths")
    return resolved


def available(model: nn.Module) -> list[str]:
    """Return the taps of ``model``: ``hidden.*``, ``attention.*``, ``query.*``, …, then every module path."""
    towers = _towers(model)
    names: list[str] = []
    for label, tower in _labelled(towers).items():
        prefix = f"{label}." if label else ""
        depth = len(tower.blocks) if tower.depth is None else tower.depth
        names += [f"{prefix}hidden.{layer}" for layer in range(depth + 1)]
        layers = range(1, len(tower.blocks) + 1) if _can_switch(type(tower.module)) else range(0)
        for mark in ("", "cross_") if tower.has_cross() else ("",):
            names += [f"{prefix}{mark}{kind}.{layer}" for kind in _ATTENTION_KINDS for layer in layers]
    return names + [path for path, _ in model.named_modules() if path]


def is_token_signal(name: str) -> bool:
    """Return whether ``name`` is ``hidden.n`` of some tower, so one vector per token: ``[B, T, H]``."""
    return _TOKEN_SIGNAL.fullmatch(name) is not None


@dataclass(frozen=True, eq=False)
class _Tower:
    """A transformers model, its blocks, and the greatest ``n`` of ``hidden.n`` (``None``: only a forward tells)."""

    module: nn.Module
    blocks: list[nn.Module]
    depth: int | None

    def has_cross(self) -> bool:
        """Return whether the blocks attend to another tower."""
        return any(_CROSS.search(path) for path, _ in self.blocks[0].named_modules())


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def _towers(model: nn.Module) -> dict[str, _Tower]:
    towers: dict[str, _Tower] = {}
    for path, module in model.named_modules():
        blocks = _blocks(module) if _is_pretrained(module) else []
        if blocks:
            towers[path] = _Tower(module, blocks, _depth(module, len(blocks)))
    return towers


def _is_pretrained(module: nn.Module) -> bool:
    return hasattr(type(module), "base_model_prefix")  # transformers' PreTrainedModel, told without importing it


def _blocks(tower: nn.Module) -> list[nn.Module]:
    """Return the blocks of one transformers model, none where they belong to a model inside it."""
    own = list(_own(tower))
    found = [module for path, module in own if any(_matches(spec, path, module) for spec in _specs(tower))]
    if found or any(_is_pretrained(module) for module in tower.modules() if module is not tower):
        return found
    lists: dict[str, list[nn.Module]] = {}
    for path, module in own:
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in lists):
            lists[path] = list(module)
    return max(lists.values(), key=len, default=[])


def _own(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Walk the submodules, leaving out the transformers models among them."""
    for name, child in module.named_children():
        if not _is_pretrained(child):
            yield prefix + name, child
            yield from _own(child, f"{prefix}{name}.")


def _specs(tower: nn.Module) -> list[Any]:
    """Return what transformers itself hooks for this class when it is asked for hidden states."""
    specs = (getattr(tower, "_can_record_outputs", None) or {}).get("hidden_states", [])
    return list(specs) if isinstance(specs, list | tuple) else [specs]


def _matches(spec: Any, path: str, module: nn.Module) -> bool:
    target = spec if isinstance(spec, type) else getattr(spec, "target_class", None)
    if target is None or not isinstance(module, target):
        return False
    within = getattr(spec, "layer_name", None)
    return within is None or f".{within.strip('.')}." in f".{path}."


def _depth(tower: nn.Module, count: int) -> int | None:
    specs = _specs(tower)
    if not specs:
        return None
    if not all(getattr(spec, "capture_initial_hidden_state", True) for spec in specs):
        return count - 1
    declared = getattr(getattr(tower, "config", None), "num_hidden_layers", count)
    return max(count, declared) if count == 1 else count  # ALBERT calls its one block many times


def _labelled(towers: dict[str, _Tower]) -> dict[str, _Tower]:
    """Name each tower as taps do: not at all where there is one, else encoder or decoder, else its path."""
    if len(towers) == 1:
        return dict(zip([""], towers.values(), strict=True))
    roles = {path: next((part for part in path.split(".") if part in ("encoder", "decoder")), path) for path in towers}
    counts = list(roles.values())
    return {role if counts.count(role) == 1 else path: towers[path] for path, role in roles.items()}


def _layered(model: nn.Module, towers: dict[str, _Tower], tap: str, path: str, call: int | None) -> Tap:
    """Resolve ``hidden.n``, ``attention.n`` and the like."""
    match = _LAYERED.fullmatch(path)
    named = _towers_named(towers, match["prefix"]) if match is not None else {}
    if match is None or not named:
        raise SignalError(f"'{tap}' names nothing in {type(model).__name__}; {did_you_mean(path, available(model))}")
    end = f"{match['cross'] or ''}{match['kind']}"
    if match["cross"]:
        named = {label: tower for label, tower in named.items() if tower.has_cross()}
    if not named:
        raise SignalError(f"'{tap}': {type(model).__name__} has no cross-attention")
    layer = int(match["layer"])
    if len(named) > 1:
        choices = " or ".join(f"{label}.{end}.{layer}" for label in named)
        raise SignalError(f"'{tap}' is ambiguous, {type(model).__name__} has several towers; say {choices}")
    tower = next(iter(named.values()))
    _check_range(tower, match["kind"], layer, tap)
    if match["kind"] == "hidden":
        return Tap(tap, "hidden", tower.module, layer, call=call)
    _check_implementation(tower.module, tap)
    parts = _attention_parts(tower.blocks[layer - 1], cross=match["cross"] is not None)
    return Tap(tap, match["kind"], tower.module, layer, parts, call=call)


def _towers_named(towers: dict[str, _Tower], prefix: str | None) -> dict[str, _Tower]:
    labelled = _labelled(towers)
    if prefix is None:
        return labelled
    if prefix in labelled:
        return {prefix: labelled[prefix]}
    return {path: tower for path, tower in towers.items() if f"{path}.".startswith(f"{prefix}.")}


def _check_range(tower: _Tower, kind: str, layer: int, tap: str) -> None:
    name, count = type(tower.module).__name__, len(tower.blocks)
    if kind == "hidden":
        if layer < 0 or (tower.depth is not None and layer > tower.depth):
            last = "…" if tower.depth is None else f"hidden.{tower.depth}"
            raise SignalError(f"there is no '{tap}': {name} has hidden.0 (the embeddings) to {last}")
    elif layer == 0:
        raise SignalError(f"there is no '{tap}': the embeddings have no attention; the first block's is '{kind}.1'")
    elif not 0 < layer <= count:
        shared = (tower.depth or 0) > count
        hint = f"; its block runs {tower.depth} times, '{kind}.1@k' is its k-th run from 0" if shared else ""
        raise SignalError(f"there is no '{tap}': {name} has {kind}.1 to {kind}.{count}{hint}")


def _attention_parts(block: nn.Module, *, cross: bool) -> tuple[nn.Module, ...]:
    """Return the modules of a block that can be its attention: those of the right side that are not leaves."""
    inner = ((path, part) for path, part in block.named_modules() if len(part._modules))
    return tuple(part for path, part in inner if (_CROSS.search(path) is not None) == cross)


def _check_implementation(tower: nn.Module, tap: str) -> None:
    config: Any = tower.config
    chosen = config._attn_implementation
    advice = "call model.set_attn_implementation('sdpa')"
    if not _can_switch(type(tower)):
        raise SignalError(
            f"'{tap}': {type(tower).__name__} does not run its attention through transformers' AttentionInterface "
            "with 'sdpa', so it cannot be read; tap a module path instead"
        )
    if chosen not in _IMPLEMENTATIONS:
        raise SignalError(f"'{tap}': the attention implementation '{chosen}' gives no probabilities; {advice}")
    if (
        chosen == "eager"
        and tower.training
        and any(getattr(m, "gradient_checkpointing", False) for m in tower.modules())
    ):
        raise SignalError(f"'{tap}': with gradient checkpointing, attention can be read under 'sdpa' only; {advice}")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # reads source code: not to be traced
def _can_switch(kind: type) -> bool:
    return _goes_through_interface(kind)


@cache
def _goes_through_interface(kind: Any) -> bool:
    return bool(getattr(kind, "_supports_sdpa", False) and kind._can_set_attn_implementation())
