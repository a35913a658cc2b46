"""The stages of a model that is not one of transformers', found by how its modules stand together."""

from __future__ import annotations

import re

from torch import nn

_ENDS = re.compile(
    r"^(stem|final_conv|classifier|heads?|fc|pre_logits|global_pool|avgpool)$|^(aux|head)", re.IGNORECASE
)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d)
_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.ReLU6)


def stages(model: nn.Module) -> list[str]:
    """Return the module paths of the model's stages, in the order in which they are registered.

    From the model downwards it is the first level with several modules of one class, each with layers of its own
    (``layer1`` to ``layer4``, ``s1`` to ``s4``), or with a container of several (``blocks.0``, ``features.3``), stem
    and head apart. In a row of single layers the poolings are the ends of its stages, or else the activations.

    Returns:
        Paths; none where nothing of the kind is found.
    """
    node, path = model, ""
    while True:
        children = _inner(node)
        found = _alike(node, children)
        if found:
            return [inner for name in found for inner in _called(f"{path}{name}", children[name])]
        if not children:
            return [f"{path}{name}" for name in _layers(node)]
        largest = max(children, key=lambda name: sum(weight.numel() for weight in children[name].parameters()))
        node, path = children[largest], f"{path}{largest}."


def _inner(node: nn.Module) -> dict[str, nn.Module]:
    """Return the children that have modules and matrices of their own, without stem and head."""
    return {
        name: child
        for name, child in node.named_children()
        if not _ENDS.search(name)
        and next(child.children(), None) is not None
        and any(weight.ndim > 1 for weight in child.parameters())
    }


def _alike(node: nn.Module, children: dict[str, nn.Module]) -> list[str]:
    """Return the children that are stages: all of a container of several, else those of which there are several."""
    if len(children) < 2:
        return []
    if isinstance(node, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return list(children)
    kinds = [type(child) for child in children.values()]
    return [name for name, child in children.items() if kinds.count(type(child)) > 1]


def _called(path: str, module: nn.Module) -> list[str]:
    """Return the path of a module that has a forward, else those of its children."""
    if type(module).forward is not nn.Module.forward:
        return [path]
    return [inner for name, child in module.named_children() for inner in _called(f"{path}.{name}", child)]


def _layers(node: nn.Module) -> list[str]:
    """Return the ends of the stages of a row of single layers."""
    row = dict(node.named_children()) if isinstance(node, nn.Sequential | nn.ModuleList) else {}
    for kinds in (_POOLS, _ACTIVATIONS, (nn.Module,)):
        found = [name for name, layer in row.items() if isinstance(layer, kinds)]
        if found:
            return found
    return []
