"""Who teaches in a recipe: sources, assistants, jointly trained teachers and peers, and the names that terms say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import ModuleDict

from potstill.data.augment import split_step
from potstill.errors import DataError, Problem, did_you_mean
from potstill.recipe.check_terms import check_objective, soft_terms
from potstill.recipe.generations import GENERATION
from potstill.recipe.trees import Path_, items, section, unknown
from potstill.registry import losses, teacher_sources

RESERVED = ("student", "self", "preflight", "teachers", "baseline", "distilled", "evaluate", "report")
"""Names of the student and of the steps of a run, which no teacher can have."""

_OF_MODELS = ("kwargs", "weights", "processor", "train", "joint", "objective", "seed", "labels", "precision", "compile")
"""Keys of a teacher that is a model."""


def teachers_of(tree: Mapping[str, Any]) -> dict[str, dict[Any, Any]]:
    """Return the sections of all teachers by name; the one under ``teacher:`` is called ``teacher``."""
    several = section(tree, "teachers")
    if several or not tree.get("teacher"):
        return {str(name): section(own) for name, own in several.items()}
    return {"teacher": section(tree, "teacher")}


def check_teachers(tree: Mapping[str, Any], *, allow_code: bool) -> list[Problem]:
    """Return every mistake in what the teachers are, and in the teachers that terms name."""
    several = section(tree, "teachers")
    if tree.get("teacher") and several:
        return [Problem(("teachers",), "expected either `teacher` or `teachers`, got both")]
    taken = [name for name in several if name in RESERVED or hasattr(ModuleDict, str(name))]
    if taken:
        return [
            Problem(("teachers", name), f"a teacher cannot be called '{name}'", "choose another name") for name in taken
        ]
    problems = []
    before: dict[str, dict[Any, Any]] = {}
    for name, own in teachers_of(tree).items():
        path: Path_ = ("teachers", name) if several else ("teacher",)
        problems += _kind(own, path, before, allow_code)
        problems += _own_objective(own, path, tree, name, allow_code)
        before[name] = own
    if section(tree, "scheme").get("name") == "born_again":
        problems += _found(tree.get("objective"), ("objective",)) + _generations(before)
        for path, wrong in (
            (("student", "freeze"), section(tree, "student").get("freeze")),
            (("balance",), tree.get("balance")),
        ):
            if wrong:
                message = "earlier generations learn as the student does, and cannot have this"
                problems.append(Problem(path, message, "leave it out, or the scheme"))
    return problems + _named_by_terms(tree)


def _generations(teachers: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Earlier generations are trained before the student, and have names of their own."""
    problems = []
    for name, own in teachers.items():
        if _is_joint(own):
            message = f"earlier generations are trained before the student, and the teacher '{name}' with it"
            problems.append(Problem(("scheme", "name"), message, "train it first, as in `train: {epochs: 3}`"))
        if name.startswith(GENERATION):
            message = f"a teacher cannot be called '{name}', which is an earlier generation's name"
            problems.append(Problem(("teachers", name), message, "choose another name"))
    return problems


def check_cut(own: Mapping[str, Any], path: Path_, names: Mapping[str, Mapping[str, Any]], what: str) -> list[Problem]:
    """Return every mistake in ``from_teacher``: how a student, or another teacher, is cut from one.

    Args:
        own: the section of the model.
        path: its place.
        names: the sections of the teachers that it may be cut from, by name.
        what: ``student`` or ``teacher``.
    """
    cut, known = own.get("from_teacher"), list(names)
    joint = [name for name, each in names.items() if _is_joint(each)]
    usual: tuple[Any, ...] = (None, {}, True, "")
    beside = [k for k in ("model", "kwargs", "weights", "pretrained", "processor") if own.get(k) not in usual]
    if beside:
        whose = "its teacher" if what == "student" else "a teacher"
        message = f"a {what} cut from {whose} takes no `{beside[0]}`: all comes from the teacher"
        return [Problem((*path, beside[0]), message)]
    where: Path_ = (*path, "from_teacher")
    if not known:
        before = "" if what == "student" else " before this one"
        return [Problem(where, f"the recipe has no teacher{before} to cut the {what} from", "add `teacher:`")]
    owner = cut.get("teacher") if isinstance(cut, Mapping) else None
    if owner is None and len(known) > 1:
        return [Problem(where, "there are several teachers", f"say which, as in `teacher: {known[0]}`")]
    if owner is not None and owner not in known:
        return [Problem((*where, "teacher"), f"there is no teacher '{owner}'", did_you_mean(str(owner), known))]
    if isinstance(cut, Mapping) and cut.get("weights") == "finetuned" and (owner or known[0]) in joint:
        message = "that teacher is trained with the student, and has no finetuned weights before"
        return [Problem((*where, "weights"), message, "say `weights: pretrained`")]
    kept = cut.get("keep_blocks") if isinstance(cut, Mapping) else None
    if isinstance(kept, list) and all(isinstance(place, int) for place in kept) and sorted(set(kept)) != kept:
        message = f"expected block numbers in ascending order, each once, got {kept}"
        return [Problem((*where, "keep_blocks"), message, f"did you mean {sorted(set(kept))}?")]
    return []


def _kind(
    own: Mapping[str, Any], path: Path_, before: Mapping[str, Mapping[str, Any]], allow_code: bool
) -> list[Problem]:
    """A teacher is a model, cut from another one, or a source."""
    given = [key for key in ("model", "from_teacher", "source") if own.get(key)]
    if len(given) != 1:
        got = " and ".join(f"`{key}`" for key in given) or "none of them"
        return [Problem(path, f"expected one of `model`, `from_teacher` and `source`, got {got}")]
    problems = _training(own, path)
    if given == ["from_teacher"]:
        return problems + check_cut(
            own, path, {name: each for name, each in before.items() if not each.get("source")}, "teacher"
        )
    return problems + (_source(own, path, before, allow_code) if given == ["source"] else [])


def _training(own: Mapping[str, Any], path: Path_) -> list[Problem]:
    """A teacher is trained before the student, or together with it."""
    train = own.get("train")
    if isinstance(train, str) and train != "jointly":
        message = f"expected how the teacher is trained, as `train: {{epochs: 3}}`, or `train: jointly`, got '{train}'"
        return [Problem((*path, "train"), message, did_you_mean(train, ["jointly"]))]
    if isinstance(train, Mapping) and own.get("joint") is not None:
        return [
            Problem((*path, "joint"), "expected `train: {…}` or `train: jointly`, got both", "leave out one of them")
        ]
    if own.get("task") and own.get("objective") is not None:
        message = "a teacher of one task learns from the labels of its rows alone"
        return [Problem((*path, "objective"), message, "leave out the objective")]
    if not _is_joint(own):
        return []
    usual: dict[str, Any] = {"cache": "auto", "precision": None, "compile": False, "task": None}
    given = [key for key, value in usual.items() if own.get(key, value) not in (value, False)]
    message = "a teacher that is trained with the student takes no `{}`"
    return [Problem((*path, key), message.format(key), "leave it out") for key in given]


def _source(
    own: Mapping[str, Any], path: Path_, before: Mapping[str, Mapping[str, Any]], allow_code: bool
) -> list[Problem]:
    usual: tuple[Any, ...] = (None, {}, True, False)
    beside = [key for key in _OF_MODELS if own.get(key) not in usual]
    if beside:
        message = f"a teacher with a `source` is no model of the run and takes no `{beside[0]}`"
        return [Problem((*path, beside[0]), message, "leave it out")]
    where: Path_ = (*path, "source")
    try:
        name, options = split_step(own["source"])
    except DataError:
        return [Problem(where, "expected a source as a name or as `name: {option: value}`")]
    wrong = unknown(name, teacher_sources, where, allow_code)
    if wrong:
        return wrong
    problems = teacher_sources.check(name, options, path=(*where, name), allow_code=allow_code)
    for key in ("of", "teachers"):  # the options by which sources are made of other teachers
        named = options.get(key)
        each = named.values() if isinstance(named, Mapping) else items(named)
        for one in each:
            place = (*where, name, key)
            if isinstance(one, str) and one not in before:
                message = f"there is no teacher '{one}' before this one"
                problems.append(Problem(place, message, did_you_mean(one, before)))
            elif isinstance(one, str) and _is_joint(before[one]):
                message = f"'{one}' is trained with the student, and no source can be made of it"
                problems.append(Problem(place, message, "let terms read each of them"))
    return problems


def _own_objective(
    own: Mapping[str, Any], path: Path_, tree: Mapping[str, Any], name: str, allow_code: bool
) -> list[Problem]:
    """A teacher with an objective learns, from teachers that are there by then."""
    if own.get("objective") is None:
        return []
    where: Path_ = (*path, "objective")
    jointly = _is_joint(own)
    if not own.get("train") and not jointly:
        fix = "add `train: {epochs: 3}`, or `train: jointly` to learn at the same time as the student"
        return [Problem(where, f"the teacher '{name}' has an objective and is not trained", fix)]
    problems = check_objective(own["objective"], where, allow_code=allow_code) + _found(own["objective"], where)
    every = teachers_of(tree)
    known = [each for each in every if each != name]
    if not jointly:
        known = [each for each in list(every)[: list(every).index(name)] if not _is_joint(every[each])]
    else:
        known = [*known, "student"]
    for place, spec in soft_terms(own["objective"], where):
        if not known and not _of_itself(spec):
            problems.append(Problem(place, f"the teacher '{name}' has no teacher before it to learn from"))
        else:
            problems += _same(spec, place) + _signals(spec, place, known, qualified=len(known) > 1)
    return problems


def _found(objective: Any, path: Path_) -> list[Problem]:
    """Layers are found for the student's objective alone."""
    return [
        Problem(
            (*place, "layers"), f"`{spec['layers']}` finds layers for the student alone", "say them, as in `{1: 2}`"
        )
        for place, spec in soft_terms(objective, path)
        if isinstance(spec.get("layers"), str)
    ]


def _is_joint(own: Mapping[str, Any]) -> bool:
    return own.get("train") == "jointly" or own.get("joint") is not None


def _named_by_terms(tree: Mapping[str, Any]) -> list[Problem]:
    """Every teacher that a term names is there; with several each term says whose signal it reads."""
    names = list(teachers_of(tree))
    scheme = section(tree, "scheme").get("name")
    stages = items(tree.get("stages"))
    objectives: list[tuple[Path_, Any, Any]] = [(("objective",), tree.get("objective"), scheme)]
    for place, stage in enumerate(stages):
        own = section(stage)
        named = section(own, "scheme").get("name", scheme)
        objectives.append((("stages", place, "objective"), own.get("objective"), named))
    problems: list[Problem] = []
    for where, objective, scheme in objectives:
        for path, spec in soft_terms(objective, where):
            if not names and scheme != "born_again" and not _of_itself(spec):
                return [Problem(path, "this term compares with a teacher and the recipe has none", "add `teacher:`")]
            problems += _same(spec, path)
            if scheme != "mutual":  # there a bare name is that of each peer
                problems += _signals(spec, path, names, qualified=len(names) > 1)
    return problems


def _signals(spec: Mapping[str, Any], path: Path_, names: list[str], *, qualified: bool) -> list[Problem]:
    problems = []
    wanted = spec.get("teacher", "logits")
    for signal in [wanted] if isinstance(wanted, str) else items(wanted):
        owner, _, own = str(signal).partition("/")
        if owner == "self" and own:
            continue
        if qualified and owner not in names:
            hint = did_you_mean(owner, names)
            problems.append(Problem((*path, "teacher"), f"expected TEACHER/SIGNAL, got '{signal}'", hint))
        elif not qualified and own and path[0] != "objective" and owner not in names:
            hint = did_you_mean(owner, names)
            problems.append(Problem((*path, "teacher"), f"there is no teacher '{owner}' to learn from here", hint))
        elif not qualified and own and owner in (names or ["teacher"]) and path[0] == "objective":
            problems.append(Problem((*path, "teacher"), f"there is one teacher, got '{signal}'", f"say '{own}'"))
    return problems


def _same(spec: Mapping[str, Any], path: Path_) -> list[Problem]:
    """A signal that is compared with itself has no gradient."""
    own, wanted = spec.get("student", "logits"), spec.get("teacher", "logits")
    least = losses.facts(str(spec.get("loss"))).get("zero_at_equality", False)
    if (
        not least
        or spec.get("project") is not None
        or wanted not in (f"self/{own}", f"self/{str(own).removeprefix('head.')}")
    ):
        return []
    message = f"'{wanted}' is the student's own '{own}': compared with itself it teaches nothing"
    return [Problem((*path, "teacher"), message, "name a deeper signal, or another teacher")]


def _of_itself(spec: Mapping[str, Any]) -> bool:
    wanted = spec.get("teacher", "logits")
    return all(str(signal).startswith("self/") for signal in ([wanted] if isinstance(wanted, str) else items(wanted)))
