"""Every scheme with every source of teaching, as tiny recipes, and what comes of each: the docs' table is made of it.

A combination is a recipe on iris with multilayer perceptrons. ``REFUSED`` says what cannot be, and why; all else runs.
``test_combinations.py`` finds out both; ``python -m tests.runs.combinations --write`` writes what the docs show.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

Tree = dict[str, Any]

KINDS = ("response", "feature", "relation")
"""What the terms that read a source compare: logits, a layer with a layer, or distances of samples in a layer."""

URL, GRAPH = "URL", "GRAPH"
"""What stands for the address of a server and for the file of an ONNX graph, which the tests have."""

FEATURES = ["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]
SOFT = "soft"
"""The column of probabilities that people gave."""

MODEL: Tree = {"model": "potstill:mlp", "kwargs": {"hidden": [6, 6], "dropout": 0.1}}
STUDENT: Tree = {"model": "potstill:mlp", "kwargs": {"hidden": [4, 4], "dropout": 0.2}}
TRAIN: Tree = {
    "epochs": 1,
    "batch_size": 32,
    "learning_rate": 0.01,
    "max_steps": 4,
    "save_steps": 2,
    "eval_strategy": "no",
}
LONGER: Tree = {"max_steps": 60, "batch_size": 32, "learning_rate": 0.03, "save_strategy": "no", "eval_strategy": "no"}
TRAINED: Tree = {**MODEL, "train": LONGER, "cache": False}
JOINT: Tree = {**MODEL, "train": "jointly"}
HARD: Tree = {"loss": "cross_entropy"}
SOFT_TERM: Tree = {"loss": "kl", "temperature": 2.0}
HINT: Tree = {"loss": "mse", "project": "linear"}

BASE: Tree = {
    "name": "combination",
    "seed": 3,
    "task": {"name": "tabular-classification", "features": FEATURES},
    "data": {"source": "sklearn", "path": "load_iris"},
    "student": STUDENT,
    "baseline": {"enabled": False},
    "train": TRAIN,
    "evaluate": {"resamples": 100, "latency": False},
}
_PARTS: Tree = {name: {"name": "tabular-classification", "features": FEATURES} for name in ("a", "b")}
_ROWS: Tree = {name: {"source": "sklearn", "path": "load_iris"} for name in _PARTS}
MULTI: Tree = {
    "task": {"name": "multi-task", "tasks": _PARTS},
    "data": {"source": "tasks", "kwargs": {"tasks": _ROWS}},
}


def _ensemble(by: str) -> Tree:
    both = {"source": {"ensemble": {"of": ["large", "other"], "by": by}}}
    return {"large": TRAINED, "other": TRAINED, "source": both}


SOURCES: dict[str, Tree] = {
    "none": {},
    "live": {"large": TRAINED},
    "cached": {"large": {**TRAINED, "cache": True}},
    "several": {"large": TRAINED, "other": TRAINED},
    "assistant": {"large": TRAINED, "small": {**MODEL, "train": TRAIN, "objective": {"hard": HARD, "soft": SOFT_TERM}}},
    "ensemble: probabilities": _ensemble("probabilities"),
    "ensemble: logits": _ensemble("logits"),
    "ensemble: confidence": _ensemble("confidence"),
    "ensemble: random": _ensemble("random"),
    "joint": {"joint": JOINT},
    "peer": {"joint": {**JOINT, "objective": {"hard": HARD, "back": {"loss": "kl", "teacher": "student/logits"}}}},
    "moving_average": {"source": {"source": {"moving_average": {"decay": 0.9}}}},
    "self": {},
    "sklearn": {"forest": {"model": "sklearn:LogisticRegression", "cache": False}},
    "onnx": {"graph": {"model": f"onnx:{GRAPH}", "cache": False}},
    "http": {"source": {"source": {"http": {"url": URL}}, "cache": False}},
    "column": {"source": {"source": {"column": {"column": SOFT}}}},
    "per_task": {
        "for-a": {**TRAINED, "task": "a"},
        "for-b": {**TRAINED, "task": "b"},
        "source": {"source": {"per_task": {"teachers": {"a": "for-a", "b": "for-b"}}}},
    },
}
"""The teachers of each source in their order; the last one is read, of ``several`` all."""

SCHEMES: dict[str, str] = {
    "offline": "`offline`",
    "joint": "`offline`, beside a teacher with `train: jointly`",
    "mutual": "`mutual`",
    "exits": "`exits`",
    "separate_heads": "`separate_heads`",
    "progressive": "`progressive`",
    "module_replacing": "`module_replacing`",
    "born_again": "`born_again`",
    "assistant": "an assistant, and the student of it",
    "stages": "two `stages`",
    "multi-task": "task `multi-task`",
}
"""Who learns, and what the docs call it."""

OPTIONS: dict[str, Tree] = {
    "mutual": {"name": "mutual"},
    "exits": {"name": "exits", "at": ["body.1"]},
    "separate_heads": {"name": "separate_heads"},
    "progressive": {"name": "progressive", "response": "throughout", "hard": "throughout"},
    "module_replacing": {"name": "module_replacing", "container": "body", "teacher": "old", "end": 0.75},
    "born_again": {"name": "born_again"},
}

COLUMNS: dict[str, str] = {
    "none": "the labels alone",
    "live": "a trained model",
    "cached": "`cache: true`",
    "several": "two by name",
    "assistant": "an assistant",
    "ensemble": "`ensemble`",
    "joint": "`train: jointly`",
    "peer": "a peer",
    "moving_average": "`moving_average`",
    "self": "`self/…`",
    "sklearn": "`sklearn:…`",
    "onnx": "`onnx:…`",
    "http": "`http`",
    "column": "`column`",
    "per_task": "`per_task`",
}
"""What the docs call a source; that by the name before a colon is one of all that begin so."""


@dataclass(frozen=True)
class Refusal:
    """What cannot be: kinds of terms in a scheme with a source.

    Attributes:
        scheme: patterns of names, separated by spaces.
        source: likewise.
        kinds: of :data:`KINDS`.
        message: what the error says, a regular expression.
        why: for the docs.
    """

    scheme: str
    source: str
    kinds: tuple[str, ...]
    message: str
    why: str

    def holds(self, scheme: str, source: str, kind: str) -> bool:
        """Whether it says something of a combination."""
        return (
            kind in self.kinds
            and any(fnmatchcase(scheme, each) for each in self.scheme.split())
            and any(fnmatchcase(source, each) for each in self.source.split())
        )


LAYERS = KINDS[1:]
REFUSED = [
    Refusal(
        "offline joint mutual exits separate_heads progressive module_replacing born_again assistant stages",
        "per_task",
        KINDS,
        "the teacher 'for-a' is for the task 'a', and tabular-classification is one task",
        "It is made of teachers of single tasks, for the task `multi-task`.",
    ),
    Refusal(
        "born_again",
        "joint peer",
        KINDS,
        "earlier generations are trained before the student, and the teacher 'joint' with it",
        "The first generation learns before the student, and a teacher that is trained jointly with it.",
    ),
    Refusal(
        "assistant",
        "joint peer",
        KINDS,
        "the teacher 'mid' has no teacher before it to learn from",
        "An assistant learns before the student, and a teacher that is trained jointly with it.",
    ),
    Refusal(
        "born_again assistant",
        "moving_average",
        KINDS,
        "the moving average 'source' needs a student that is trained, and has none",
        "It follows the student, which is not there yet when an assistant or a first generation learns.",
    ),
    Refusal(
        "*",
        "sklearn onnx http column",
        LAYERS,
        r"'body\.\d' (names nothing in|of the teacher)|gave no signal '(source/)?body\.\d'|module_replacing: the term",
        "It says `logits` alone: terms on its layers are refused.",
    ),
    Refusal(
        "module_replacing",
        "*",
        LAYERS,
        r"module_replacing: the term '\w+' reads 'body\.\d' of the student, and while blocks of the teacher stand in",
        "While blocks of the teacher stand in the student, terms on the student's layers are refused.",
    ),
    Refusal(
        "offline joint mutual separate_heads progressive module_replacing born_again assistant stages multi-task",
        "self",
        ("response",),
        r"'self/logits' is the student's own '(head\.)?logits': compared with itself it teaches nothing",
        "Logits compared with themselves are refused; layers learn from deeper ones, exits from `self/logits`.",
    ),
]


def refusal(scheme: str, source: str, kind: str) -> Refusal | None:
    """Return what cannot be about a kind of terms in a combination; ``None`` if it runs."""
    return next((each for each in REFUSED if source != "none" and each.holds(scheme, source, kind)), None)


def runs(scheme: str, source: str) -> tuple[str, ...]:
    """Return the kinds of terms that can read a source in a scheme; of none there are none to try."""
    return tuple(kind for kind in KINDS if source != "none" and refusal(scheme, source, kind) is None)


def tried() -> list[tuple[str, str]]:
    """Return every scheme with every source; of ensembles all ways in the first scheme, the one that draws in all."""
    ways = [source for source in SOURCES if source.startswith("ensemble:")][:-1]
    every = [(scheme, source) for scheme in SCHEMES for source in SOURCES]
    return [(scheme, source) for scheme, source in every if source not in ways or scheme == "offline"]


def read_of(source: str) -> list[str]:
    """Return the names of the teachers of a source that terms read."""
    names = list(SOURCES[source])
    return ["self"] if source == "self" else names if source == "several" else names[-1:]


def tree(scheme: str, source: str, kinds: tuple[str, ...]) -> Tree:
    """Return the recipe of a combination, in which terms of these kinds read the source."""
    found = copy.deepcopy({**BASE, **(MULTI if scheme == "multi-task" else {})})
    teachers = copy.deepcopy(SOURCES[source])
    terms = _terms(scheme, source, kinds)
    if scheme in OPTIONS:
        found["scheme"] = copy.deepcopy(OPTIONS[scheme])
    if scheme in ("joint", "mutual"):
        teachers["mate"] = JOINT
        terms["mate"] = {"loss": "kl", "weight": 0.3, "teacher": "mate/logits"}
    elif scheme == "progressive" and not set(kinds) & set(LAYERS):
        teachers["deep"] = TRAINED
        terms |= {f"deep_{n}": {**HINT, "student": f"body.{n}", "teacher": f"deep/body.{n}"} for n in (1, 4)}
    elif scheme == "module_replacing":
        teachers["old"] = {**STUDENT, "train": LONGER}
    elif scheme == "assistant":
        teachers["mid"] = {**MODEL, "train": TRAIN, "objective": _said(terms, teachers)}
        terms = {"hard": HARD, "soft": {**SOFT_TERM, "teacher": "mid/logits"}}
    elif scheme == "stages":
        last = {**terms, "hard": {**HARD, "weight": 0.5}}
        found["stages"] = [{"name": "first"}, {"name": "second", "objective": _said(last, teachers)}]
    found["objective"] = _said(terms, teachers)
    return {**found, "teachers": teachers}


def _terms(scheme: str, source: str, kinds: tuple[str, ...]) -> Tree:
    """Return the terms of the student, or of who learns first: on the labels, and of each kind for each teacher."""
    made: Tree = {"hard": dict(HARD)}
    response = {"exits": "exit.1" if source == "self" else "logits", "separate_heads": "head.logits"}.get(
        scheme, "logits"
    )
    if scheme == "separate_heads" and "response" not in kinds:
        made["heads"] = {**HARD, "student": response}
    for place, owner in enumerate(() if source == "none" else read_of(source)):
        if "response" in kinds:
            made[f"response_{place}"] = {**SOFT_TERM, "student": response, "teacher": f"{owner}/logits"}
        for number, (student, teacher) in enumerate(_layers(scheme, source)):
            pair = {"student": student, "teacher": f"{owner}/{teacher}"}
            if source == "per_task":
                pair["mask"] = f"task/{teacher[0]}"
            if "feature" in kinds:
                made[f"feature_{place}_{number}"] = {**HINT, **pair}
            if "relation" in kinds:
                made[f"relation_{place}_{number}"] = {"loss": "rkd_distance", **pair}
    return made


def _layers(scheme: str, source: str) -> list[tuple[str, str]]:
    """Return the layers of the student that are compared, each with the teacher's."""
    if source == "self":
        return [("body.1", "body.4"), ("body.2", "body.5")]
    if source == "per_task":
        return [("body.4", f"{task}/body.4") for task in _PARTS]
    return [(layer, layer) for layer in (("body.1", "body.4") if scheme == "progressive" else ("body.4",))]


def _said(terms: Tree, teachers: Tree) -> Tree:
    """Return the terms as a recipe has them: the name of an only teacher is left out."""
    names = [f"{name}/" for name in teachers] if len(teachers) == 1 else []
    found = copy.deepcopy(terms)
    for term in found.values():
        if "teacher" in term and names:
            term["teacher"] = term["teacher"].removeprefix(names[0])
    return found


def table() -> Tree:
    """Return what the docs' table is made of: for each scheme and source what runs, and why other things do not."""
    cells: Tree = {}
    for scheme in SCHEMES:
        for column in COLUMNS:
            sources = [name for own, name in tried() if own == scheme and name.partition(":")[0] == column]
            refused = [refusal(scheme, source, kind) for source in sources for kind in KINDS]
            cells.setdefault(scheme, {})[column] = {
                "runs": column == "none" or all(runs(scheme, source) for source in sources),
                "but": list(dict.fromkeys(each.why for each in refused if each is not None)),
            }
    return {"schemes": SCHEMES, "sources": COLUMNS, "cells": cells}


FILE = Path(__file__).parent.parent.parent / "docs/combinations.json"


def written() -> str:
    """Return what the file of the docs holds."""
    return json.dumps(table(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.runs.combinations --write")
    FILE.write_text(written(), encoding="utf-8")
