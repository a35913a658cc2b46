"""What the checks of a recipe share: reading its raw tree, and the names of components in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from potstill.errors import ComponentError, Problem, did_you_mean
from potstill.recipe.schema import SchemeSpec, TaskSpec
from potstill.registry import Registry

Path_ = tuple[str | int, ...]


def section(tree: Any, *keys: str | int) -> dict[Any, Any]:
    """Return the mapping at a place of the tree; an empty one where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return dict(tree) if isinstance(tree, Mapping) else {}


def items(value: Any) -> Sequence[Any]:
    """Return a list as it is, and an empty one for anything else."""
    return value if isinstance(value, list) else []


def unknown(name: str, registry: Registry, path: Path_, allow_code: bool) -> list[Problem]:
    """What is wrong with the name of a component, if anything."""
    if name not in registry.names() and ":" not in name:
        return [Problem(path, f"there is no {registry.kind} '{name}'", did_you_mean(name, registry.names()))]
    try:
        registry.get(name, allow_code=allow_code)
    except ComponentError as error:
        return [Problem(path, str(error))]
    return []


def named(
    given: Any, registry: Registry, path: Path_, spec: type[TaskSpec] | type[SchemeSpec], allow_code: bool
) -> list[Problem]:
    """Return what is wrong with a component whose name and options are keys of one section."""
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        return []
    name = given["name"]
    wrong = unknown(name, registry, (*path, "name"), allow_code)
    if wrong:
        return wrong
    options = {key: value for key, value in given.items() if key not in spec.model_fields}
    return registry.check(name, options, path=path, allow_code=allow_code)
