"""The components that a recipe names: their names and options against the registry, all mistakes at once.

It works on the raw tree of a recipe, so that one wrong key elsewhere hides nothing here, and imports neither models
nor trainers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch.nn import ModuleDict

from potstill.data.augment import check_augmentations, split_step
from potstill.errors import ComponentError, DataError, ObjectiveError, PotstillError, Problem, did_you_mean
from potstill.losses.ramps import as_number, ends, is_ramp
from potstill.losses.scale import as_scale
from potstill.models.load import Blueprint
from potstill.recipe.schema import SchemeSpec, TaskSpec, TermSpec, TrainSpec
from potstill.registry import Registry, callbacks, check_options, losses, schemes, sources, synthesizers, tasks

Path_ = tuple[str | int, ...]

_CONTEXT = frozenset({"path", "name", "revision", "base", "splits", "seed"})
"""What a data source is given beside its ``kwargs``."""

RESERVED = ("student", "preflight", "teachers", "baseline", "distilled", "evaluate", "report")
"""Names of the student and of the steps of a run, which no teacher can have."""

MANAGED = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "lr_scheduler_type": "scheduler",
    "lr_scheduler_kwargs": "scheduler: {name: …, option: …}",
    "optim": "optimizer",
    "optim_args": "optimizer: {name: …, option: …}",
    "label_smoothing_factor": "objective.hard.label_smoothing",
    "output_dir": "--output",
    "seed": "seed (at the top of the recipe)",
    "data_seed": "seed (at the top of the recipe)",
    "remove_unused_columns": "nothing: columns are chosen by the task",
    "resume_from_checkpoint": "nothing: the same command goes on",
}
"""Training arguments that a recipe says in another way, and how."""


def check_components(tree: Mapping[str, Any], *, allow_code: bool, folder: Path | None = None) -> list[Problem]:
    """Return every mistake in the components of a recipe.

    Args:
        tree: the recipe as plain data, after ``extends`` and overrides.
        allow_code: whether dotted paths outside potstill may be imported.
        folder: where the recipe lies; files that it names may lie beside it.
    """
    problems = _task_and_data(tree, allow_code)
    problems += _models(tree, allow_code, folder)
    problems += _objective(tree, allow_code)
    problems += _named(tree.get("scheme"), schemes, ("scheme",), SchemeSpec, allow_code)
    for path in (("train",), ("baseline", "train")):
        problems += check_train(_section(tree, *path), path, allow_code=allow_code)
    problems += _baseline_precision(_section(tree, "train"), _section(tree, "baseline", "train"))
    return problems + _ignored(_list(_section(tree, "preflight").get("ignore")))


def rooted(text: str, folder: Path | None) -> str:
    """Return the absolute path of what lies in ``folder`` or in the working directory; anything else as it is."""
    path = Path(text).expanduser()
    if path.is_absolute():
        return text
    bases = [Path.cwd()] if folder is None else [folder, Path.cwd()]
    return next((str((base / path).resolve()) for base in bases if (base / path).exists()), text)


def check_train(train: Mapping[str, Any], path: Path_, *, allow_code: bool) -> list[Problem]:
    """Return every mistake in a ``train:`` section: arguments, optimizer, scheduler, callbacks."""
    problems = _training_arguments(train, path) + _precision(train, path)
    if not train:
        return problems
    from potstill.training.optimizers import check_choice

    for kind in ("optimizer", "scheduler"):
        if kind in train:
            problems += check_choice(kind, train[kind], (*path, kind), allow_code=allow_code)
    for place, component in enumerate(_list(train.get("callbacks"))):
        where = (*path, "callbacks", place)
        try:
            name, options = split_step(component)
        except DataError:
            if isinstance(component, Mapping):  # anything else is a mistake that the schema reports
                problems.append(Problem(where, "expected a callback as a name or as `name: {option: value}`"))
        else:
            problems += callbacks.check(name, options, path=(*where, name), allow_code=allow_code)
    return problems


def _precision(train: Mapping[str, Any], path: Path_) -> list[Problem]:
    """A precision is said once: as ``precision`` or as Trainer's ``bf16`` or ``fp16``."""
    beside = next((name for name in ("bf16", "fp16") if train.get(name)), None)
    if beside is None or train.get("precision") is None:
        return []
    message = f"expected one precision, got {train['precision']} and `{beside}: true`"
    return [Problem((*path, "precision"), message, "leave out one of them")]


def _baseline_precision(train: Mapping[str, Any], own: Mapping[str, Any]) -> list[Problem]:
    """The baseline has the settings of ``train`` too, so that two precisions may come together only there."""
    if not own or _precision(train, ()) or _precision(own, ()):
        return []
    key = next((key for key in ("precision", "bf16", "fp16") if own.get(key)), "precision")
    return [replace(each, path=("baseline", "train", key)) for each in _precision({**train, **own}, ())]


def _ignored(names: Sequence[Any]) -> list[Problem]:
    """Every name under ``preflight.ignore`` that is no check."""
    if not names:
        return []
    from potstill.checks.findings import checks

    return [
        Problem(("preflight", "ignore", place), f"there is no check '{name}'", did_you_mean(name, checks.names()))
        for place, name in enumerate(names)
        if isinstance(name, str) and name not in checks.names()
    ]


def _task_and_data(tree: Mapping[str, Any], allow_code: bool) -> list[Problem]:
    problems = _named(tree.get("task"), tasks, ("task",), TaskSpec, allow_code)
    data = _section(tree, "data")
    source = data.get("source")
    if isinstance(source, str):
        problems += _source(source, data, allow_code)
    name = _section(tree, "task").get("name")
    kind = tasks.facts(name).get("input") if isinstance(name, str) else None
    problems += _synthesizer(data.get("synthesize"), kind, allow_code)
    if kind:
        trained: list[Path_] = [("train",), ("baseline", "train"), ("teacher", "train")]
        trained += [("teachers", owner, "train") for owner in _section(tree, "teachers")]
        for path in (("data",), *trained):
            problems += check_augmentations(_list(_section(tree, *path).get("augment")), kind, (*path, "augment"))
            if kind != "text" and _section(tree, *path).get("batch_tokens") is not None:
                what = f"batch_tokens counts the tokens of texts, and this is data of the kind '{kind}'"
                problems.append(Problem((*path, "batch_tokens"), what, "use batch_size"))
    return problems


def _synthesizer(step: Any, kind: str | None, allow_code: bool) -> list[Problem]:
    where: Path_ = ("data", "synthesize")
    try:
        name, options = split_step(step)
    except DataError:  # anything but a mapping is a mistake that the schema reports
        message = "expected what makes rows as a name or as `name: {option: value}`"
        return [Problem(where, message)] if isinstance(step, Mapping) else []
    unknown = _unknown(name, synthesizers, where, allow_code)
    if unknown:
        return unknown
    wanted = synthesizers.facts(name).get("kind", kind)
    if kind is not None and wanted != kind:
        return [Problem(where, f"'{name}' makes rows of the kind '{wanted}', and this is data of the kind '{kind}'")]
    return synthesizers.check(name, options, path=(*where, name), allow_code=allow_code)


def _source(source: str, data: Mapping[str, Any], allow_code: bool) -> list[Problem]:
    try:
        function = sources.get(source, allow_code=allow_code)
    except ComponentError as error:
        return [Problem(("data", "source"), str(error))]
    given = _CONTEXT if source in sources.names() else {key for key in _CONTEXT if data.get(key) is not None}
    label = f"data source '{source}'"
    return check_options(function, _section(data, "kwargs"), label=label, path=("data", "kwargs"), reserved=given)


def _models(tree: Mapping[str, Any], allow_code: bool, folder: Path | None) -> list[Problem]:
    places: list[Path_] = [("student",), ("teacher",), *(("teachers", name) for name in _section(tree, "teachers"))]
    problems: list[Problem] = []
    for path in places:
        section = _section(tree, *path)
        for key in ("model", "processor"):
            if isinstance(section.get(key), str):
                model = Blueprint(rooted(section[key], folder), _section(section, "kwargs") if key == "model" else {})
                problems += [_renamed(problem, path, key) for problem in model.check(path, allow_code=allow_code)]
        if path[0] != "student":
            problems += check_train(_section(section, "train"), (*path, "train"), allow_code=allow_code)
        problems += _fitted(section, path)
        problems += _weights(section, path, folder)
    return problems + _student(tree) + _teachers(tree)


def _renamed(problem: Problem, path: Path_, key: str) -> Problem:
    return replace(problem, path=(*path, key)) if problem.path == (*path, "model") else problem


def _fitted(section: Mapping[str, Any], path: Path_) -> list[Problem]:
    """A classifier of scikit-learn teaches, and is fitted to the training split by its own rule."""
    if not str(section.get("model")).startswith("sklearn:"):
        return []
    if path[0] == "student":
        message = "a classifier of scikit-learn can teach, and cannot be a student: it has no gradient"
        return [Problem((*path, "model"), message)]
    usual = {"train": None, "weights": None, "pretrained": True, "processor": None, "precision": None, "compile": False}
    given = [key for key, value in usual.items() if section.get(key, value) != value]
    message = "a classifier of scikit-learn takes no `{}`: it is fitted to the training split, and answers as it is"
    return [Problem((*path, key), message.format(key), "leave it out") for key in given]


def _student(tree: Mapping[str, Any]) -> list[Problem]:
    """A student is named or cut from a teacher, and that teacher is there."""
    student = tree.get("student")
    if not isinstance(student, Mapping):
        return []
    cut = student.get("from_teacher")
    if cut is None:
        message = "expected `model`, or `from_teacher: {keep_blocks: [0, 2, 4]}`, got neither"
        return [] if student.get("model") is not None else [Problem(("student",), message)]
    beside = [
        key
        for key in ("model", "kwargs", "weights", "pretrained", "processor")
        if student.get(key) not in (None, {}, True)
    ]
    if beside:
        message = f"a student cut from its teacher takes no `{beside[0]}`: all comes from the teacher"
        return [Problem(("student", beside[0]), message)]
    names = list(_section(tree, "teachers")) or (["teacher"] if tree.get("teacher") else [])
    where: Path_ = ("student", "from_teacher")
    if not names:
        return [Problem(where, "the recipe has no teacher to cut the student from", "add `teacher:`")]
    owner = cut.get("teacher") if isinstance(cut, Mapping) else None
    if owner is None and len(names) > 1:
        return [Problem(where, "there are several teachers", f"say which, as in `teacher: {names[0]}`")]
    if owner is not None and owner not in names:
        return [Problem((*where, "teacher"), f"there is no teacher '{owner}'", did_you_mean(str(owner), names))]
    kept = cut.get("keep_blocks") if isinstance(cut, Mapping) else None
    if isinstance(kept, list) and all(isinstance(place, int) for place in kept) and sorted(set(kept)) != kept:
        message = f"expected block numbers in ascending order, each once, got {kept}"
        return [Problem((*where, "keep_blocks"), message, f"did you mean {sorted(set(kept))}?")]
    return []


def _weights(section: Mapping[str, Any], path: Path_, folder: Path | None) -> list[Problem]:
    weights = section.get("weights")
    if isinstance(weights, str) and "://" not in weights and not Path(rooted(weights, folder)).expanduser().is_file():
        return [Problem((*path, "weights"), f"expected a file of weights, and there is none at '{weights}'")]
    return []


def _teachers(tree: Mapping[str, Any]) -> list[Problem]:
    """One teacher or several, not both; and every teacher that a term names is there."""
    names = list(_section(tree, "teachers"))
    if tree.get("teacher") and names:
        return [Problem(("teachers",), "expected either `teacher` or `teachers`, got both")]
    taken = [Problem(("teachers", name), f"a teacher cannot be called '{name}'") for name in names if name in RESERVED]
    if taken:
        return taken
    problems = []
    for path, spec in _soft_terms(tree):
        if not tree.get("teacher") and not names:
            return [Problem(path, "this term compares with a teacher and the recipe has none", "add `teacher:`")]
        wanted = spec.get("teacher", "logits")
        for signal in [wanted] if isinstance(wanted, str) else _list(wanted):
            owner, _, own = str(signal).partition("/")
            if len(names) > 1 and owner not in names:
                hint = did_you_mean(owner, names)
                problems.append(Problem((*path, "teacher"), f"expected TEACHER/SIGNAL, got '{signal}'", hint))
            elif len(names) < 2 and own and owner in (names or ["teacher"]):
                problems.append(Problem((*path, "teacher"), f"there is one teacher, got '{signal}'", f"say '{own}'"))
    return problems


def _objective(tree: Mapping[str, Any], allow_code: bool) -> list[Problem]:
    problems: list[Problem] = []
    objective = tree.get("objective")
    if isinstance(objective, Mapping) and not objective:
        return [Problem(("objective",), "expected at least one term, got none")]
    for name, spec in _section(tree, "objective").items():
        if hasattr(ModuleDict, str(name)):
            problems.append(Problem(("objective", name), f"a term cannot be called '{name}'", "choose another name"))
        if isinstance(spec, Mapping) and isinstance(spec.get("loss"), str):
            problems += _term(spec, ("objective", name), allow_code)
    return problems + _reference(tree)


def _reference(tree: Mapping[str, Any]) -> list[Problem]:
    """The term to whose length others are brought is there; among found layers that shows later."""
    wanted = _section(tree, "balance").get("reference")
    terms = _section(tree, "objective")
    layered = any(isinstance(spec, Mapping) and spec.get("layers") is not None for spec in terms.values())
    if wanted is None or layered or wanted in terms:
        return []
    return [Problem(("balance", "reference"), f"there is no term '{wanted}'", did_you_mean(str(wanted), terms))]


def _term(spec: Mapping[str, Any], path: Path_, allow_code: bool) -> list[Problem]:
    problems: list[Problem] = []
    ends: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for key, value in spec.items():
        try:
            if key == "scale":
                as_scale(value)
            ramp = as_number(value, allow_code=allow_code)
            both = _ends(ramp)
        except PotstillError as error:
            problems.append(Problem((*path, key), str(error)))
            continue
        if key not in TermSpec.model_fields:
            ends[0][key], ends[1][key] = both
        elif key == "weight" and isinstance(value, Mapping) and not is_ramp(value):
            message = f"expected a number or a ramp `{{from: …, to: …}}`, got {dict(value)}"
            problems.append(Problem((*path, key), message))
    unknown = _unknown(spec["loss"], losses, (*path, "loss"), allow_code)
    if unknown:
        return problems + unknown
    found = dict.fromkeys(p for end in ends for p in losses.check(spec["loss"], end, path=path, allow_code=allow_code))
    return problems + [_with_fields(p, TermSpec) for p in found]


def _ends(number: Any) -> tuple[Any, Any]:
    """Return the first and the last value of a number.

    Raises:
        ObjectiveError: a schedule of one's own fails.
    """
    try:
        return ends(number)
    except PotstillError:
        raise
    except Exception as error:  # code of one's own may raise anything
        raise ObjectiveError(f"{number} failed: {type(error).__name__}: {error}") from error


def _named(
    section: Any, registry: Registry, path: Path_, spec: type[TaskSpec] | type[SchemeSpec], allow_code: bool
) -> list[Problem]:
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        return []
    name = section["name"]
    unknown = _unknown(name, registry, (*path, "name"), allow_code)
    if unknown:
        return unknown
    options = {key: value for key, value in section.items() if key not in spec.model_fields}
    return registry.check(name, options, path=path, allow_code=allow_code)


def _unknown(name: str, registry: Registry, path: Path_, allow_code: bool) -> list[Problem]:
    """What is wrong with the name of a component, if anything."""
    if name not in registry.names() and ":" not in name:
        return [Problem(path, f"there is no {registry.kind} '{name}'", did_you_mean(name, registry.names()))]
    try:
        registry.get(name, allow_code=allow_code)
    except ComponentError as error:
        return [Problem(path, str(error))]
    return []


def _training_arguments(train: Mapping[str, Any], path: Path_) -> list[Problem]:
    extra = [key for key in train if key not in TrainSpec.model_fields]
    if not extra:
        return []
    from transformers.training_args import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)} - set(MANAGED)
    problems = []
    for key in extra:
        if key in MANAGED:
            problems.append(Problem((*path, key), f"expected another way to say '{key}'", f"use {MANAGED[key]}"))
        elif key not in known:
            hint = did_you_mean(str(key), [*TrainSpec.model_fields, *known])
            problems.append(Problem((*path, key), f"unknown key '{key}'", hint))
    return problems


def _with_fields(problem: Problem, spec: type[TermSpec]) -> Problem:
    """Let the nearest name of an unknown option be a key of the section too (``wieght`` is ``weight``)."""
    key = str(problem.path[-1])
    if "has no option" not in problem.message:
        return problem
    known = [*spec.model_fields]
    close = did_you_mean(key, known)
    return Problem(problem.path, problem.message, close) if close.startswith("did") else problem


def _soft_terms(tree: Mapping[str, Any]) -> list[tuple[Path_, Mapping[str, Any]]]:
    found: list[tuple[Path_, Mapping[str, Any]]] = []
    for name, spec in _section(tree, "objective").items():
        if isinstance(spec, Mapping) and spec.get("loss") in losses.names():
            target = losses.get(spec["loss"])
            if "teacher" in _parameters(target):
                found.append((("objective", name), spec))
    return found


def _parameters(target: Any) -> set[str]:
    function = getattr(target, "forward", target)
    return set(inspect.signature(function).parameters)


def _section(tree: Any, *keys: str | int) -> dict[Any, Any]:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return dict(tree) if isinstance(tree, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []
