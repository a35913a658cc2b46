"""Read signals out of a model while it runs, and leave nothing behind.

A tap is a forward hook that lives as long as the ``with`` block. Attention goes through one function registered in
transformers' ``AttentionInterface``: it runs the same fused attention as ``sdpa`` and remembers what entered that of
the tapped blocks alone. Their probabilities are computed when the tower has returned, so outside any block whose
forward is run again for gradient checkpointing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import SignalError
from potstill.interfaces import Signals
from potstill.knowledge.taps import Tap, resolve_all

_IMPLEMENTATION = "potstill_sdpa"
_HIDDEN_FIELDS = ("hidden_states", "reshaped_hidden_states")
_Undo = list[Callable[[], None]]


@contextmanager
def capture(model: nn.Module, taps: Iterable[str] | Mapping[str, str], *, detach: bool = False) -> Iterator[Signals]:
    """Fill a dict with signals of ``model`` while it runs inside the block.

    It can be entered inside the forward of a module that is compiled with ``fullgraph=True``. Run the backward after
    the block, so that recomputation for gradient checkpointing meets no hook.

    Args:
        model: the module that is called inside the block.
        taps: names, each read where it says, or a mapping from the name of a signal to its tap; see
            :func:`potstill.knowledge.taps.resolve` for what a tap can be.
        detach: give tensors that are cut from the graph.

    Yields:
        The signals, filled as the model runs. ``hidden.n`` is ``output_hidden_states[n]`` [B, T, H]; ``attention.n``
        the probabilities before dropout [B, heads, T, T]; ``query.n``, ``key.n`` and ``value.n`` what enters the
        attention, after rotary positions [B, heads, T, head width], with fewer heads of key and value in grouped-query
        models; a module path that module's output.

    Raises:
        SignalError: at entry where a tap names nothing; while the model runs where a module is called twice and no
            ``@k`` says which call is meant, or where an output has no such tensor; at the end of the block (unless
            another exception is on its way) where a tap saw no forward, or its tensor was overwritten in place.
    """
    if isinstance(taps, str):
        taps = [taps]
    named = dict(taps) if isinstance(taps, Mapping) else {tap: tap for tap in taps}
    signals: Signals = {}
    resolved = resolve_all(model, named.values())
    slots = [_Slot(name, tap, signals, detach) for name, tap in zip(named, resolved, strict=True)]
    undo: _Undo = []
    try:
        _install(slots, undo)
        yield signals
        _check(slots)
    finally:
        for action in reversed(undo):
            action()


class _Slot:
    """One signal: which call of its tap is wanted, and what was seen."""

    def __init__(self, name: str, tap: Tap, signals: Signals, detach: bool) -> None:
        self.name, self.tap, self.signals, self.detach = name, tap, signals, detach
        self.calls = 0
        self.filled = False
        self.seen: tuple[Tensor, int] | None = None

    def offer(self, read: Callable[[], Tensor]) -> None:
        """Take what ``read`` returns if this call is the wanted one."""
        call, where = self.calls, self.tap.where
        self.calls += 1
        if self.tap.call is None and call > 0:
            raise SignalError(f"'{where}' was called more than once inside the block; say which call: '{where}@0', …")
        if self.tap.call is None or self.tap.call == call:
            value = read()
            self.signals[self.name] = value.detach() if self.detach else value
            self.filled = True

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: read the first input."""
        self.offer(lambda: self._keep([*args, *kwargs.values()]))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: read the output."""
        self.offer(lambda: self._keep(output))

    def _keep(self, output: Any) -> Tensor:
        value = _pick(output, self.tap)
        if self.tap.mode == "clone" or torch.compiler.is_compiling():  # a compiled graph has no versions to compare
            return value.clone()
        self.seen = None if value.is_inference() else (value, value._version)
        return value


def _pick(output: Any, tap: Tap) -> Tensor:
    """Return the tensor of a module's output that a tap means."""
    items: dict[str, Any] = {}
    if isinstance(output, dict):
        items = dict(output)
    elif isinstance(output, tuple | list):
        items = {str(index): item for index, item in enumerate(output)}
    value = output
    if tap.element is not None:
        index = int(tap.element) if tap.element.isdigit() else len(items)
        if tap.element not in items and index >= len(items):
            raise SignalError(f"'{tap.where}': no element '{tap.element}'; there are: {', '.join(items) or 'none'}")
        value = items[tap.element] if tap.element in items else list(items.values())[index]
    elif isinstance(output, dict):
        value = next((item for item in items.values() if isinstance(item, Tensor)), None)
    elif items:
        value = items["0"]
    if not isinstance(value, Tensor):
        hint = f"; say which element: {', '.join(items)}" if items else ""
        raise SignalError(f"'{tap.where}' gave {type(value).__name__}, not a tensor{hint}")
    return value


def _check(slots: list[_Slot]) -> None:
    missing = [f"'{slot.tap.where}'" for slot in slots if not slot.filled]
    if missing:
        raise SignalError(f"no forward reached {', '.join(missing)} before the end of the with block")
    for slot in slots:
        if slot.seen is not None and slot.seen[0]._version != slot.seen[1]:
            where = slot.tap.where
            hint = "" if slot.tap.mode else f"; tap 'clone:{where}' to keep a copy"
            raise SignalError(f"'{where}' was overwritten in place by what ran after it{hint}")


def _install(slots: list[_Slot], undo: _Undo) -> None:
    towers: list[nn.Module] = []
    for slot in slots:
        tap = slot.tap
        if tap.kind != "module":
            towers += [] if any(tap.module is tower for tower in towers) else [tap.module]
        elif tap.mode == "input":
            undo.append(_pre_hook(tap.module, slot.before))
        else:
            undo.append(_hook(tap.module, slot.after))
    for tower in towers:
        own = [slot for slot in slots if slot.tap.module is tower]
        hidden = [slot for slot in own if slot.tap.kind == "hidden"]
        attention = [slot for slot in own if slot.tap.parts]
        if hidden:
            _follow_hidden(tower, hidden, undo)
        if attention:
            _follow_attention(tower, attention, undo)


def _hook(module: nn.Module, hook: Callable[..., Any], *, first: bool = False) -> Callable[[], None]:
    """Add a forward hook and return what removes it."""
    if not torch.compiler.is_compiling():
        return module.register_forward_hook(hook, prepend=first).remove
    # The tracer follows no RemovableHandle, but it does follow the replacement of a table of hooks.
    old: Any = module._forward_hooks
    own: dict[Any, Any] = {f"potstill.{len(old)}": hook}
    module._forward_hooks = {**own, **old} if first else {**old, **own}

    def remove() -> None:
        module._forward_hooks = old

    return remove


def _pre_hook(module: nn.Module, hook: Callable[..., Any]) -> Callable[[], None]:
    """Add a forward pre-hook that is given the keywords and return what removes it."""
    if not torch.compiler.is_compiling():
        return module.register_forward_pre_hook(hook, with_kwargs=True).remove
    old: Any = module._forward_pre_hooks
    flags: Any = module._forward_pre_hooks_with_kwargs
    key: Any = f"potstill.{len(old)}"
    module._forward_pre_hooks = {**old, key: hook}
    module._forward_pre_hooks_with_kwargs = {**flags, key: True}

    def remove() -> None:
        module._forward_pre_hooks = old
        module._forward_pre_hooks_with_kwargs = flags

    return remove


class _HiddenReader:
    """Asks a tower for all hidden states, and hides them from a caller who did not."""

    def __init__(self, slots: list[_Slot]) -> None:
        self.slots = slots
        self.wanted: list[tuple[bool, bool]] = []

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: switch the hidden states on."""
        states = _setting(module, kwargs, "output_hidden_states")
        as_tuple = _setting(module, kwargs, "return_dict") is False
        self.wanted.append((bool(states), as_tuple))
        asked: dict[str, Any] = {**kwargs, "output_hidden_states": True}
        return args, {**asked, "return_dict": True} if as_tuple else asked

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: read the hidden states, and give the output that was asked for."""
        wanted, as_tuple = self.wanted.pop()
        states = getattr(output, "hidden_states", None)
        for slot in self.slots:
            if states is None or slot.tap.layer >= len(states):
                raise SignalError(
                    f"there is no '{slot.tap.where}': {type(module).__name__} gave {len(states or ())} hidden states"
                )
            slot.offer(partial(_item, states, slot.tap.layer))
        if not wanted:
            output = type(output)(**{key: value for key, value in output.items() if key not in _HIDDEN_FIELDS})
        return output.to_tuple() if as_tuple else output


def _item(states: tuple[Tensor, ...], index: int) -> Tensor:
    return states[index]


def _setting(module: Any, kwargs: dict[str, Any], name: str) -> Any:
    given = kwargs.get(name)
    return getattr(module.config, name, None) if given is None else given


def _follow_hidden(tower: nn.Module, slots: list[_Slot], undo: _Undo) -> None:
    if torch.compiler.is_compiling():
        _install_transformers_hooks(id(tower))
    reader = _HiddenReader(slots)
    undo.append(_pre_hook(tower, reader.before))
    undo.append(_hook(tower, reader.after, first=True))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # takes a lock, which cannot be traced
def _install_transformers_hooks(identity: int) -> bool:
    """Run while torch.compile traces: install what transformers would install, once, in the forward to come.

    The tracer of older torch passes constants only, so the tower comes as its ``id``.
    """
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # early 5.x has no such hooks
        return False
    maybe_install_capturing_hooks(next(tower for tower in gc.get_objects() if id(tower) == identity))
    return True


@dataclass(frozen=True, eq=False)
class _Call:
    """What entered the attention of one block: query [B, heads, T, D], key and value [B, kv heads, S, D]."""

    slot: _Slot
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    scale: float
    causal: bool

    def read(self) -> Tensor:
        """Return the query, key or value, or compute the probabilities [B, heads, T, S]."""
        kind = self.slot.tap.kind
        if kind != "attention":
            return self.query if kind == "query" else self.key if kind == "key" else self.value
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.slot.detach):
            return self._probabilities()

    def _probabilities(self) -> Tensor:
        groups = self.query.shape[1] // self.key.shape[1]
        key = self.key.repeat_interleave(groups, dim=1) if groups > 1 else self.key
        scores = (self.query @ key.transpose(-1, -2)) * self.scale
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        lowest = torch.finfo(scores.dtype).min  # finite: a row that sees nothing is uniform, as in eager, and never NaN
        mask = self.mask
        if self.bias is not None:
            scores = scores + self.bias
        if mask is None and self.causal and scores.shape[-2] > 1:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, lowest)
        elif mask is not None:
            scores = scores + mask.to(scores.dtype).clamp(min=lowest)
        return scores.softmax(dim=-1).to(self.query.dtype)


class _AttentionReader:
    """Collects what entered the tapped attentions of a tower, and fills their signals when the tower has returned."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the tower."""
        calls, self.calls = self.calls, []
        for call in calls:
            call.slot.offer(call.read)


_readers: dict[nn.Module, tuple[tuple[_AttentionReader, _Slot], ...]] = {}  # who listens to which attention now


def _follow_attention(tower: nn.Module, slots: list[_Slot], undo: _Undo) -> None:
    _register()
    _switch(tower, undo)
    reader = _AttentionReader()
    for slot in slots:
        for part in slot.tap.parts:
            undo.append(_mark(part, (reader, slot)))
    undo.append(_hook(tower, reader.after))


def _mark(module: nn.Module, entry: tuple[_AttentionReader, _Slot]) -> Callable[[], None]:
    old = _readers.get(module, ())
    _readers[module] = (*old, entry)

    def remove() -> None:
        _readers[module] = old
        if not old:
            del _readers[module]

    return remove


def _switch(tower: nn.Module, undo: _Undo) -> None:
    """Let the configurations that the tower's modules read name our attention until the end of the block."""
    configs: list[Any] = []
    for module in tower.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal") and not any(config is known for known in configs):
            configs.append(config)
    for config in configs:
        undo.append(_set_implementation(config, _IMPLEMENTATION))


def _set_implementation(config: Any, name: str) -> Callable[[], None]:
    # The public setter changes sub-configurations too, but the tracer of older torch sees no change of the inner name.
    field = "_attn_implementation" if torch.compiler.is_compiling() else "_attn_implementation_internal"
    old = getattr(config, field)
    setattr(config, field, name)
    return lambda: setattr(config, field, old)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # fills two global tables, once
def _register() -> bool:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    if _IMPLEMENTATION not in AttentionInterface():
        AttentionInterface.register(_IMPLEMENTATION, _attention)
        AttentionMaskInterface.register(_IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return True


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Run fused attention as ``sdpa`` does; in a tapped block, remember what entered it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if options.get("softcap") is not None:
        raise SignalError(f"the attention of {type(module).__name__} has a softcap, so it cannot be tapped")
    scale, causal = options.get("scaling"), options.get("is_causal")
    for reader, slot in _readers.get(module, ()):
        reader.calls.append(
            _Call(
                slot,
                query,
                key,
                value,
                attention_mask,
                options.get("position_bias"),
                query.shape[-1] ** -0.5 if scale is None else scale,
                bool(getattr(module, "is_causal", True) if causal is None else causal),
            )
        )
    output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output
