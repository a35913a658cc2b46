"""A student cut from its teacher: some of the blocks of a trained model, and everything around them."""

from __future__ import annotations

import copy
import inspect
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.errors import ModelError, did_you_mean

_INDEX = ("layer_idx", "layer_index", "block_idx")  # where a block of a plain model notes its own number
_NUMBER = re.compile(r"idx|index|layer|block|number|_id$|^seed$")  # … and where one of transformers does
_PASSING = re.compile(r"^_|^training$|^gradient_checkpointing$|^p$|drop")  # says nothing of what a block computes
_NOT_PER_BLOCK = re.compile(r"token|^architectures$|image|patch|mean$|std$|conv|tdnn|^out_")  # lists that count else


def cut(model: nn.Module, keep_blocks: Sequence[int], *, container: str | None = None) -> nn.Module:
    """Return a new, smaller model that has only these blocks of ``model`` and copies of all its other weights.

    Students are often initialised like this: DistilBERT has every other block of BERT (Sanh et al. 2019,
    https://arxiv.org/abs/1910.01108). A transformers model is built anew from a configuration that says how many
    blocks there are, and of which type each is, so that ``save_pretrained`` and ``from_pretrained`` work on it. Any
    other model is copied without the other blocks.

    Args:
        model: the trained model; it is not changed, and the new one shares no memory with it. Devices, dtypes, tied
            weights, ``requires_grad`` and train or eval mode are kept.
        keep_blocks: numbers of the blocks that stay, counted from 0, increasing.
        container: path of the ``nn.ModuleList`` or ``nn.Sequential`` that holds the blocks; ``None`` to find it.

    Returns:
        A model of the same class. With every block kept it answers like ``model`` to the bit.

    Raises:
        ModelError: numbers that are out of range, repeated or not increasing; a model whose blocks are not found, are
            several stacks (encoder-decoders) or one shared block (ALBERT); or a block that its new place does not fit.
    """
    path = _find(model, container)
    kept = _checked(keep_blocks, len(_children(model, path)))
    where, owner = _owner(model, path)
    if not isinstance(owner, PreTrainedModel):
        return _shrunk(model, path, kept)
    small = _rebuilt(owner, path.removeprefix(f"{where}."), kept)
    return small if owner is model else copy.deepcopy(model, {id(owner): small})


def find_blocks(model: nn.Module) -> str:
    """Return the path of the container that holds the blocks of ``model``, such as ``bert.encoder.layer``.

    For a transformers model that is the ``nn.ModuleList`` with ``config.num_hidden_layers`` children, for any other
    the ``nn.ModuleList`` or ``nn.Sequential`` with the most children that are all of one class; the empty path is the
    model itself.

    Raises:
        ModelError: there is none, or there are several, with their paths and lengths.
    """
    return _find(model, None)


def block_count(model: nn.Module, container: str | None = None) -> int:
    """Return the number of blocks of ``model``, or of those in ``container``.

    Raises:
        ModelError: the blocks are not found, as for :func:`cut`.
    """
    return len(_children(model, _find(model, container)))


def _checked(numbers: Sequence[int], count: int) -> list[int]:
    """Return the numbers as a list of ints, once they are known to be right."""
    wrong = [number for number in numbers if isinstance(number, bool) or not hasattr(number, "__index__")]
    if wrong:
        raise ModelError(f"expected block numbers from 0 to {count - 1}, got {', '.join(map(repr, wrong))}")
    kept = [operator.index(number) for number in numbers]  # NumPy's too
    if not kept:
        raise ModelError(f"expected at least one block to keep, got none; every other one is {[*range(0, count, 2)]}")
    outside = [number for number in kept if not 0 <= number < count]
    if outside:
        raise ModelError(f"expected block numbers from 0 to {count - 1}, got {', '.join(map(str, outside))}")
    ordered = sorted(set(kept))
    if len(ordered) < len(kept):
        raise ModelError(f"expected each block once, got {kept}; did you mean {ordered}?")
    if ordered != kept:
        raise ModelError(f"expected block numbers that increase, got {kept}; did you mean {ordered}?")
    return kept


def _children(model: nn.Module, path: str) -> list[nn.Module]:
    return list(model.get_submodule(path).children())


def _owner(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """Return the outermost transformers model around a path and where it is; the model itself where there is none."""
    return next(((where, owner) for where, owner in _outermost(model) if _within(path, where)), ("", model))


def _outermost(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    seen: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(_within(path, outer) for outer in seen):
            seen.append(path)
            yield path, module


def _within(path: str, outer: str) -> bool:
    return not outer or f"{path}.".startswith(f"{outer}.")


def _find(model: nn.Module, container: str | None) -> str:
    """Return the path of the blocks: the one that was asked for, or the only one there is."""
    owners = dict(_outermost(model))
    stacks = _plain_stacks(model) if not owners else {}
    for where, owner in owners.items():
        stacks |= {f"{where}.{path}" if where else path: found for path, found in _own_stacks(owner).items()}
    name = type(model).__name__
    if container is not None:
        return _named(model, container, stacks)
    if not stacks:
        for owner in owners.values():
            raise ModelError(f"no blocks found in {name}: {_why_none(owner)}")
        raise ModelError(
            f"no blocks found in {name}: expected an nn.ModuleList or nn.Sequential whose children are all of one class"
        )
    best = max(stacks, key=lambda path: len(stacks[path]))
    alike = [path for path, found in stacks.items() if owners or _rivals(found, stacks[best])]
    if len(alike) > 1:
        shown = ", ".join(f"'{path}' ({len(stacks[path])})" for path in alike[:8]) + (", …" if len(alike) > 8 else "")
        raise ModelError(f"{name} has several stacks of blocks: {shown}; say which with `container`")
    return best


def _rivals(one: list[nn.Module], other: list[nn.Module]) -> bool:
    return len(one) == len(other) or type(one[0]) is type(other[0])


def _named(model: nn.Module, container: str, stacks: dict[str, list[nn.Module]]) -> str:
    """Check a container that a person named."""
    name = type(model).__name__
    if isinstance(_owner(model, container)[1], PreTrainedModel) and container not in stacks:
        raise ModelError(
            f"expected `container` to hold all blocks that the configuration of {name} counts, got '{container}'; "
            f"{did_you_mean(container, stacks)}"
        )
    try:
        module = model.get_submodule(container)
    except AttributeError as error:
        raise ModelError(f"{name} has no '{container}'; {did_you_mean(container, stacks)}") from error
    if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
        raise ModelError(
            f"expected `container` to be an nn.ModuleList or nn.Sequential with blocks, got {type(module).__name__} "
            f"at '{container}'; {did_you_mean(container, stacks)}"
        )
    return container


def _plain_stacks(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the containers that may hold the blocks: two children or more, of one class, with weights."""
    found: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and next(module.parameters(), None) is not None:
            kinds = {type(child) for child in module.children()}
            if len(module) > 1 and len(kinds) == 1 and not kinds & {nn.ModuleList, nn.Sequential}:
                found[path] = list(module.children())
    return found


def _own_stacks(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """Return the lists that are as long as the configuration of the model around them says.

    Raises:
        ModelError: a model that is no stack of blocks.
    """
    problem = _no_stack(model)
    if problem:
        raise ModelError(f"blocks cannot be cut from {type(model).__name__}: {problem}")
    found: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(_within(path, outer) for outer in found):
            count = getattr(_tower(model, path).config, "num_hidden_layers", None)
            if len(module) == count:
                found[path] = list(module)
    return found


def _no_stack(model: PreTrainedModel) -> str | None:
    """Say why a model has no single stack of blocks, as far as its configuration tells."""
    config, one = model.config, "expected a model with one stack of blocks"
    if getattr(config, "is_encoder_decoder", False):
        return f"{one}, got an encoder-decoder; start from a smaller one"
    if hasattr(config, "num_hidden_groups"):
        return (
            f"{one}, got one block that is run {config.num_hidden_layers} times; build it with fewer num_hidden_layers"
        )
    stages = getattr(config, "depths", None) or getattr(config, "block_sizes", None)
    return f"{one}, got one with {len(stages)} stages of {list(stages)} blocks" if stages else None


def _why_none(model: PreTrainedModel) -> str:
    count = getattr(model.config, "num_hidden_layers", None)
    if count is None:
        return f"its {type(model.config).__name__} has no num_hidden_layers"
    return f"expected an nn.ModuleList of num_hidden_layers={count} children"


def _tower(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Return the innermost transformers model around a path."""
    around = [module for where, module in model.named_modules() if _within(path, where)]
    return [module for module in around if isinstance(module, PreTrainedModel)][-1]


def _shrunk(model: nn.Module, path: str, kept: list[int]) -> nn.Module:
    """Copy a plain model without the other blocks."""
    if getattr(model, "rope_mixed", False):  # timm: a parameter outside the blocks has a row for each of them
        raise ModelError(f"{type(model).__name__} cannot be cut: its positions (rope_mixed) are learned for each block")
    small = copy.deepcopy(model)
    box = small.get_submodule(path)
    names, blocks = list(box._modules), list(box._modules.values())
    box._modules.clear()
    for place, number in enumerate(kept):
        block = blocks[number]
        box._modules[names[place]] = block
        for module in block.modules() if block is not None else ():
            for name in _INDEX:
                value = vars(module).get(name)
                if isinstance(value, int):
                    setattr(module, name, value - number + place)
    return small


def _rebuilt(model: PreTrainedModel, path: str, kept: list[int]) -> PreTrainedModel:
    """Build a transformers model anew with fewer blocks and copy what it holds."""
    name = type(model).__name__
    try:
        config = _smaller(model, path, kept)
        with torch.device("meta"):  # no weights are made that would be thrown away, and no random numbers drawn
            small = type(model)(config, **_options(model))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{name} cannot be built with {len(kept)} blocks: {error}") from error
    problems = list(_copy(model, small, path, kept))
    if problems:
        more = "; …" if len(problems) > 4 else ""
        raise ModelError(
            f"{name} cannot be cut to the blocks {kept}, as each must be like the one whose place it takes: "
            f"{'; '.join(problems[:4])}{more}"
        )
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = copy.deepcopy(model.generation_config)
    return small


def _smaller(model: PreTrainedModel, path: str, kept: list[int]) -> Any:
    """Return a copy of the configuration for fewer blocks.

    Raises:
        ModelError: the configuration cannot say what is left, or would be read back as another.
    """
    memo: dict[int, Any] = {}
    config = copy.deepcopy(model.config, memo)
    own = memo.get(id(_tower(model, path).config))
    if own is None:
        raise ModelError(f"blocks cannot be cut from '{path}': the configuration it uses is not that of the model")
    count = own.num_hidden_layers
    for name, value in list(vars(own).items()):
        if isinstance(value, list | tuple) and len(value) == count and not _NOT_PER_BLOCK.search(name):
            setattr(own, name, type(value)(value[number] for number in kept))
    own.num_hidden_layers = len(kept)
    _rename_stages(own, count, kept)
    changed = [] if _changed(model.config) else _changed(config)
    if changed:
        raise ModelError(
            f"{type(config).__name__} cannot say that the blocks {kept} are left: it would be read back with another "
            f"{', '.join(changed[:4])}"
        )
    return config


def _rename_stages(config: Any, count: int, kept: list[int]) -> None:
    """Bring a backbone's names in line: the stem, one stage for each block, and those that it gives out."""
    names = list(getattr(config, "stage_names", None) or [])
    if len(names) != count + 1:
        return
    places = {0: 0, count: len(kept), **{number + 1: place + 1 for place, number in enumerate(kept)}}
    given = [stage % len(names) for stage in config.out_indices]
    gone = [stage - 1 for stage in given if stage not in places]
    if gone:
        raise ModelError(f"the model gives out what the blocks {gone} say; keep them, or set out_indices first")
    config.stage_names = names[: len(kept) + 1]
    config.set_output_features_output_indices(None, sorted({places[stage] for stage in given}))


def _changed(config: Any) -> list[str]:
    """Return the names of the settings that change when a configuration is written and read."""
    written = config.to_dict()
    try:
        read = type(config).from_dict(copy.deepcopy(written)).to_dict()
    except Exception as error:
        return [f"meaning ({error})"]
    return sorted(name for name in written.keys() | read.keys() if written.get(name) != read.get(name))


def _options(model: PreTrainedModel) -> dict[str, bool]:
    """Return the options of a model's class that its configuration does not hold."""
    parts = {
        "add_pooling_layer": getattr(model, "pooler", None),
        "use_mask_token": getattr(getattr(model, "embeddings", None), "mask_token", None),
    }
    known = inspect.signature(type(model).__init__).parameters
    return {option: part is not None for option, part in parts.items() if option in known}


def _copy(model: nn.Module, small: nn.Module, path: str, kept: list[int]) -> Iterator[str]:
    """Copy every parameter, buffer and mode from where it was to where it is now; yield what does not fit."""
    sources = {_moved(name, path, kept): (name, old) for name, old in model.named_modules(remove_duplicate=False)}
    sources.pop(None, None)
    targets = dict(small.named_modules(remove_duplicate=False))
    over = {was for name, (was, _) in sources.items() if name not in targets}
    missing = targets.keys() - sources.keys()
    yield from (f"'{was}' is left over" for was in sorted(over) if was.rpartition(".")[0] not in over)
    yield from (f"'{name}' is missing" for name in sorted(missing) if name.rpartition(".")[0] not in missing)
    copies: dict[int, Tensor] = {}  # tied weights are copied once
    for name, new in targets.items():
        if name in sources:
            was, old = sources[name]
            problem = _differ(old, new)
            if not problem and name.startswith(f"{path}."):
                problem = _settings_differ(old, new, was, name, path)
            if problem:
                yield f"'{was}' does not fit '{name}': {problem}"
            else:
                _fill(old, new, copies)


def _moved(name: str, path: str, kept: list[int]) -> str | None:
    """Return the new name of a module; ``None`` for one of a block that goes."""
    if not name.startswith(f"{path}."):
        return name
    number, _, rest = name.removeprefix(f"{path}.").partition(".")
    if int(number) not in kept:
        return None
    return f"{path}.{kept.index(int(number))}" + (f".{rest}" if rest else "")


def _differ(old: nn.Module, new: nn.Module) -> str | None:
    """Say how two modules differ in class, parameters or buffers."""
    kinds = type(old).__qualname__, type(new).__qualname__
    if kinds[0] != kinds[1]:
        return f"it is {kinds[0]}, and the configuration makes {kinds[1]}"
    shapes = [{n: None if p is None else tuple(p.shape) for n, p in m._parameters.items()} for m in (old, new)]
    names = [{n for n, b in m._buffers.items() if b is not None} for m in (old, new)]
    names[0] -= old._non_persistent_buffers_set - names[1]  # Gemma's table of a type of attention that is not kept
    if shapes[0] != shapes[1]:
        return f"it has {shapes[0]}, and the configuration makes {shapes[1]}"
    return None if names[0] == names[1] else f"it has the buffers {sorted(names[0])}, expected {sorted(names[1])}"


def _settings_differ(old: nn.Module, new: nn.Module, was: str, name: str, path: str) -> str | None:
    """Say how the plain attributes of a module in a moved block differ, apart from those that count blocks."""
    step = int(name.removeprefix(f"{path}.").split(".")[0]) - int(was.removeprefix(f"{path}.").split(".")[0])
    before, after = _settings(old), _settings(new)
    for key in sorted(before.keys() | after.keys()):
        one, other = before.get(key), after.get(key)
        follows = type(one) is int and bool(_NUMBER.search(key)) and one + step == other
        if one != other and not follows:
            return f"{key} is {one!r}, and the configuration makes {other!r}"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    own = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | tuple | list)}
    return {name: value for name, value in own.items() if not _PASSING.search(name)}


def _fill(old: nn.Module, new: nn.Module, copies: dict[int, Tensor]) -> None:
    """Give a module its own copies of the tensors of another."""
    for name, parameter in old._parameters.items():
        if parameter is not None:
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            new._parameters[name] = copies[id(parameter)]  # type: ignore[assignment]
    for name in new._buffers:
        buffer = old._buffers.get(name)
        new._buffers[name] = None if buffer is None else copies.setdefault(id(buffer), buffer.detach().clone())
    for name, value in vars(old).items():
        if isinstance(value, Tensor):  # neither parameter nor buffer; the new one was made without memory
            setattr(new, name, value.detach().clone())
    new.training = old.training
