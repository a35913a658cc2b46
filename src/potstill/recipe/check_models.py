"""The student and the teachers of a recipe as models: references, options, files of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from potstill.errors import Problem
from potstill.models.load import Blueprint
from potstill.recipe.check_teachers import check_cut, check_teachers, teachers_of
from potstill.recipe.check_training import check_train
from potstill.recipe.trees import Path_, section

_AS_THEY_ARE = {"sklearn:": "a classifier of scikit-learn", "onnx:": "a graph of ONNX"}


def check_models(tree: Mapping[str, Any], folder: Path | None, *, allow_code: bool) -> list[Problem]:
    """Return every mistake in student and teachers: references, files, sources, what they are trained on.

    Args:
        tree: the recipe as plain data.
        folder: where the recipe lies; files that it names may lie beside it.
        allow_code: whether dotted paths outside potstill may be imported.
    """
    places: list[Path_] = [("student",), ("teacher",), *(("teachers", name) for name in section(tree, "teachers"))]
    problems: list[Problem] = []
    for path in places:
        own = section(tree, *path)
        for key in ("model", "processor"):
            if isinstance(own.get(key), str) and own[key]:
                model = Blueprint(rooted(own[key], folder), section(own, "kwargs") if key == "model" else {})
                problems += [_renamed(problem, path, key) for problem in model.check(path, allow_code=allow_code)]
        if path[0] != "student":
            problems += check_train(section(own, "train"), (*path, "train"), allow_code=allow_code)
        problems += _fitted(own, path)
        problems += _weights(own, path, folder)
    return problems + _student(tree) + check_teachers(tree, allow_code=allow_code)


def _renamed(problem: Problem, path: Path_, key: str) -> Problem:
    return replace(problem, path=(*path, key)) if problem.path == (*path, "model") else problem


def _fitted(own: Mapping[str, Any], path: Path_) -> list[Problem]:
    """What answers as it is, a classifier of scikit-learn or a graph of ONNX, is not trained by gradients."""
    kind = next((kind for prefix, kind in _AS_THEY_ARE.items() if str(own.get("model")).startswith(prefix)), None)
    if kind is None:
        return []
    if path[0] == "student":
        return [Problem((*path, "model"), f"{kind} can teach, and cannot be a student: it has no gradient")]
    usual = {"train": None, "joint": None, "objective": None, "weights": None, "pretrained": True}
    usual |= {"processor": None, "precision": None, "compile": False}
    if str(own.get("model")).startswith("onnx:"):
        usual.pop("processor")
        message = f"{kind} takes no `{{}}`: it answers as it is"
    else:
        message = f"{kind} takes no `{{}}`: it is fitted to the training split, and answers as it is"
    given = [key for key, value in usual.items() if own.get(key, value) != value]
    return [Problem((*path, key), message.format(key), "leave it out") for key in given]


def _student(tree: Mapping[str, Any]) -> list[Problem]:
    """A student is named or cut from a teacher, and that teacher is there."""
    student = tree.get("student")
    if not isinstance(student, Mapping):
        return []
    if student.get("from_teacher") is None:
        message = "expected `model`, or `from_teacher: {keep_blocks: [0, 2, 4]}`, got neither"
        return [] if student.get("model") is not None else [Problem(("student",), message)]
    names = {name: own for name, own in teachers_of(tree).items() if own.get("source") is None}
    return check_cut(student, ("student",), names, "student")


def _weights(own: Mapping[str, Any], path: Path_, folder: Path | None) -> list[Problem]:
    weights = own.get("weights")
    if isinstance(weights, str) and "://" not in weights and not Path(rooted(weights, folder)).expanduser().is_file():
        return [Problem((*path, "weights"), f"expected a file of weights, and there is none at '{weights}'")]
    return []


def rooted(text: str, folder: Path | None) -> str:
    """Return the absolute path of what lies in ``folder`` or in the working directory; anything else as it is."""
    path = Path(text).expanduser()
    if path.is_absolute():
        return text
    bases = [Path.cwd()] if folder is None else [folder, Path.cwd()]
    return next((str((base / path).resolve()) for base in bases if (base / path).exists()), text)
