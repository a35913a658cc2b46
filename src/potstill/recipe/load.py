"""From a file, a packaged name or a dictionary to a :class:`Recipe`, with every mistake at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from potstill.errors import Problem, RecipeError, did_you_mean
from potstill.recipe.check import check_components
from potstill.recipe.check_models import rooted
from potstill.recipe.document import Document, read_document
from potstill.recipe.presets import with_preset
from potstill.recipe.problems import located, problems_of, tidy
from potstill.recipe.schema import Recipe


def packaged_recipes() -> dict[str, Path]:
    """Return the recipes that come with potstill, by name."""
    folder = Path(str(resources.files("potstill.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(reference: str) -> Path | None:
    """Return the file of a recipe: a path, or the name of a packaged one."""
    path = Path(reference).expanduser()
    packaged = packaged_recipes().get(reference.removesuffix(".yaml"))
    return path if path.is_file() or (path.exists() and packaged is None) else packaged


def load_recipe(reference: str | Path, overrides: Sequence[str] = (), *, allow_code: bool = False) -> Recipe:
    """Return the recipe in a file or of a packaged name, with ``key=value`` overrides.

    Args:
        reference: a path, or a name of ``potstill list recipes``.
        overrides: such as ``train.epochs=3``; later ones win.
        allow_code: whether dotted paths outside potstill may be imported.

    Raises:
        RecipeError: lists every mistake with file, line, key path and the nearest right thing.
    """
    path = find_recipe(str(reference))
    return _rooted(_read(reference, path, overrides, allow_code), None if path is None else path.parent)


def recipe_from(tree: Mapping[str, Any], *, allow_code: bool = True) -> Recipe:
    """Return the recipe that a dictionary describes.

    Raises:
        RecipeError: lists every mistake with its key path.
    """
    return _rooted(_validated(Document(tree=dict(tree), places={}, problems=[]), allow_code, None), None)


def _read(reference: str | Path, path: Path | None, overrides: Sequence[str], allow_code: bool) -> Recipe:
    if path is None:
        looks_like_name = "/" not in str(reference) and not str(reference).endswith((".yaml", ".yml"))
        hint = did_you_mean(str(reference), packaged_recipes()) if looks_like_name else None
        if hint is None:
            return _validated(read_document(Path(reference), overrides, find=packaged_recipes().get), allow_code, None)
        raise RecipeError([Problem((), f"there is no recipe '{reference}', as a file or packaged", hint)])
    return _validated(read_document(path, overrides, find=packaged_recipes().get), allow_code, path.parent)


def _rooted(recipe: Recipe, folder: Path | None) -> Recipe:
    """Return the recipe with absolute paths of what lies beside it or in the working directory."""

    def root(text: str | None) -> str | None:
        return rooted(text, folder) if text else text

    def model(spec: Any) -> Any:
        return spec.model_copy(update={key: root(getattr(spec, key)) for key in ("model", "weights", "processor")})

    def data(section: Mapping[str, Any]) -> dict[str, Any]:
        on_disk = section.get("source") in ("files", "hub") and isinstance(section.get("path"), str)
        return {**section, "path": root(section["path"])} if on_disk else dict(section)

    changes: dict[str, Any] = {"path": data(dict(recipe.data))["path"]}
    parts = recipe.data.kwargs.get("tasks")
    if recipe.data.source == "tasks" and isinstance(parts, Mapping):
        own = {name: data(each) if isinstance(each, Mapping) else each for name, each in parts.items()}
        changes["kwargs"] = {**recipe.data.kwargs, "tasks": own}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=changes),
            "student": model(recipe.student),
            "teacher": None if recipe.teacher is None else model(recipe.teacher),
            "teachers": {name: model(spec) for name, spec in recipe.teachers.items()},
        }
    )


def _validated(document: Document, allow_code: bool, folder: Path | None) -> Recipe:
    tree, found = with_preset(document.tree)
    document, recipe = replace(document, tree=tree), None
    problems = [*document.problems, *located(found, document)]
    if document.tree or not problems:
        try:
            recipe = Recipe.model_validate(document.tree)
        except ValidationError as error:
            problems += problems_of(error, document, Recipe)
        problems += located(check_components(document.tree, allow_code=allow_code, folder=folder), document)
    if problems or recipe is None:
        raise RecipeError(tidy(problems))
    return recipe
