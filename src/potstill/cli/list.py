"""``potstill list``: what there is."""

from __future__ import annotations

from typing import Annotated

import typer

_KINDS = (
    "recipes, losses, tasks, schemes, teacher_sources, sources, augmentations, synthesizers, models, callbacks, "
    "presets, compressors"
)


def list_(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help=f"One of {_KINDS}; all if omitted.")] = None,
) -> None:
    """List recipes, losses, tasks and other components, a line each."""
    from potstill import registry
    from potstill.errors import ComponentError, did_you_mean

    kinds = _KINDS.split(", ")
    if kind is not None and kind not in kinds:
        raise ComponentError(f"there is no kind '{kind}' to list; {did_you_mean(kind, kinds)}")
    for each in [kind] if kind else kinds:
        lines = _recipes() if each == "recipes" else _components(getattr(registry, each))
        if kind is None:
            typer.echo(f"{each}:")
        for name, about in lines:
            typer.echo(f"{'  ' if kind is None else ''}{name:<24} {about}".rstrip())


def _recipes() -> list[tuple[str, str]]:
    from potstill.recipe.document import read_document
    from potstill.recipe.load import packaged_recipes

    return [(name, str(read_document(p).tree.get("description", ""))) for name, p in packaged_recipes().items()]


def _components(registry: object) -> list[tuple[str, str]]:
    from potstill.registry import Registry

    if not isinstance(registry, Registry):
        return []
    return [(name, _first_line(registry.get(name))) for name in registry.names()]


def _first_line(target: object) -> str:
    import inspect

    return (inspect.getdoc(target) or "").split("\n")[0]
