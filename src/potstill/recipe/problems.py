"""From pydantic's errors to mistakes that a person can mend: file, line, the key as written, expected, got, nearest.

pydantic puts the branches of a union into the path of an error and reports all of them. Here each error is walked
along the annotations of the model, the names of branches are taken out, and of the branches the one is reported that
the person most likely meant.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel, RootModel, Tag, ValidationError
from pydantic.fields import FieldInfo

from potstill.errors import Problem, did_you_mean, nearest
from potstill.recipe.document import Document
from potstill.recipe.yaml_core import KeyPath, describe

_MAX_OPTIONS = 12
_KINDS = {
    **dict.fromkeys(("model", "model_attributes", "dict", "mapping", "dataclass", "frozen_dict"), "a mapping"),
    **dict.fromkeys(("list", "tuple", "set", "frozen_set", "iterable", "deque"), "a list"),
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "none": "nothing",
}
_LIMITS = {
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length} characters",
    "string_pattern_mismatch": "a text that matches {pattern}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "invalid_key": "a text as key",
}
_COSTS = {"choice": 2, "missing": 2, "unknown": 2, "near": 1, "type": 1, "value": 1}
_WRONG_TAG = 100  # the value of a key that fits another branch
_JOINED = ("type", "choice")
_YES_NO = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


class ProblemsError(ValueError):
    """Raised in a pydantic validator to report several mistakes below the value that it checks.

    Args:
        problems: the mistakes, their paths counted from the validated value; ``problems_of`` puts them in place.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(str(problem) for problem in self.problems))


def problems_of(error: ValidationError, document: Document, model: type[BaseModel]) -> list[Problem]:
    """Return what pydantic found wrong with a document, in the words of a recipe.

    Args:
        error: what ``model.model_validate(document.tree)`` raised.
        document: the document that was validated; it gives file and line.
        model: the model that it was validated against.
    """
    faults = [fault for entry in error.errors(include_url=False) for fault in _faults(dict(entry), model, document)]
    return tidy(located((fault.problem() for fault in _settle(faults)), document))


def located(problems: Iterable[Problem], document: Document) -> list[Problem]:
    """Return the problems with file and line of their paths; those that have a file already keep it."""
    result = []
    for problem in problems:
        place = document.place(problem.path) if problem.file is None else None
        result.append(problem.at(place.file, place.line) if place else problem)
    return result


def tidy(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems without duplicates, sorted by file and line."""
    return sorted(dict.fromkeys(problems), key=lambda problem: (problem.file or "", problem.line or 0))


@dataclass(frozen=True)
class _Trail:
    """Where an error is: keys as written, the unions passed on the way, the models that own the last key."""

    path: KeyPath = ()
    choices: tuple[tuple[KeyPath, str], ...] = ()
    owners: tuple[type[BaseModel], ...] = ()
    is_key: bool = False


@dataclass(frozen=True)
class _Fault:
    """One error of pydantic; those of several branches of a union can be joined."""

    trail: _Trail
    kind: str
    given: Any = None
    expected: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    text: str | None = None
    hint: str | None = None

    @property
    def path(self) -> KeyPath:
        return self.trail.path

    def joined(self, others: list[_Fault]) -> _Fault:
        """Return the fault with what the others at its path expect as well, in their order."""
        if self.kind not in _JOINED:
            return self
        alike = [other for other in others if other.path == self.path and other.kind in _JOINED]
        expected = dict.fromkeys(word for other in alike for word in other.expected)
        options = dict.fromkeys(option for other in alike for option in other.options)
        return replace(self, expected=tuple(expected), options=tuple(options))

    def problem(self) -> Problem:
        """Return it as a mistake without a place."""
        if self.text is not None:
            return Problem(self.path, self.text, self.hint)
        words = ([_one_of(self.options)] if self.options else []) + [
            word for word in self.expected if word != _KINDS["int"] or _KINDS["float"] not in self.expected
        ]
        wanted = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
        only_options = isinstance(self.given, str) and not self.expected
        got = describe(self.given).removeprefix("the text " if only_options else "")
        return Problem(self.path, f"expected {wanted}{' as key' if self.trail.is_key else ''}, got {got}", self._hint())

    def _hint(self) -> str | None:
        if not isinstance(self.given, str):
            return self.hint
        close = nearest(self.given, [option.strip("'\"") for option in self.options], count=1)
        yes_no = _YES_NO.get(self.given.lower()) if "true or false" in self.expected else None
        return f"did you mean '{close[0]}'?" if close else f"did you mean {yes_no}?" if yes_no else self.hint


def _faults(entry: dict[str, Any], model: type[BaseModel], document: Document) -> Iterator[_Fault]:
    """Yield what one error of pydantic says; several where a validator raised several problems."""
    trail = _walk(entry["loc"], model, document)
    name, context, given = entry["type"], entry.get("ctx", {}), entry["input"]
    raised = context.get("error")
    for problem in getattr(raised, "problems", ()):
        inner = replace(trail, path=trail.path + tuple(problem.path))
        yield _Fault(inner, "value", text=problem.message, hint=problem.hint)
    if getattr(raised, "problems", ()):
        return
    if name == "missing":
        yield _Fault(trail, "missing", text="missing", hint=_meant(trail, given) or _description(trail))
    elif name == "extra_forbidden":
        hint = did_you_mean(str(trail.path[-1]), [known for owner in trail.owners for known in _written(owner)])
        kind = "near" if hint.startswith("did") else "unknown"
        yield _Fault(trail, kind, text="unknown key", hint=hint if trail.owners else None)
    elif name.startswith("union_tag"):
        yield _tag_fault(trail, name, context)
    elif name in ("literal_error", "enum"):
        yield _Fault(trail, "choice", given, options=_options(context["expected"]))
    else:
        yield _value_fault(trail, entry)


def _value_fault(trail: _Trail, entry: dict[str, Any]) -> _Fault:
    name, given, message = entry["type"], entry["input"], entry["msg"]
    context = {key: _number(value) for key, value in entry.get("ctx", {}).items()}
    kind = _KINDS.get(re.sub(r"_(type|parsing|parsing_size|from_float|required)$", "", name))
    if kind is not None and name not in _KINDS:
        return _Fault(trail, "type", given, (kind,))
    if name in _LIMITS:
        count = context.get("actual_length") if name in ("too_short", "too_long") else None
        return _Fault(trail, "value", given if count is None else count, (_limit(name, context),))
    if "error" in context:
        return _Fault(trail, "value", text=str(context["error"]) or message)
    if message.startswith("Input should be "):
        return _Fault(trail, "value", given, (message.removeprefix("Input should be "),))
    return _Fault(trail, "value", text=message)


def _limit(name: str, context: Mapping[str, Any]) -> str:
    words = _LIMITS[name].format(**context)
    return words.replace(" 1 entries", " 1 entry").replace(" 1 characters", " 1 character")


def _tag_fault(trail: _Trail, name: str, context: Mapping[str, Any]) -> _Fault:
    key = re.match(r"'([^']+)'", context["discriminator"])
    at_key = replace(trail, path=(*trail.path, key[1])) if key else trail
    if name == "union_tag_not_found":
        return _Fault(at_key, "missing", text="missing")
    return _Fault(at_key, "choice", context["tag"], options=_options(context["expected_tags"]))


def _settle(faults: list[_Fault], level: int = 0) -> list[_Fault]:
    """Return the faults with one branch left of every union, the innermost unions first."""
    settled = [fault for fault in faults if len(fault.trail.choices) <= level]
    unions: dict[KeyPath, dict[str, list[_Fault]]] = {}
    for fault in faults:
        if len(fault.trail.choices) > level:
            where, label = fault.trail.choices[level]
            unions.setdefault(where, {}).setdefault(label, []).append(fault)
    for where, branches in unions.items():
        settled += _likeliest(where, [_settle(branch, level + 1) for branch in branches.values()])
    return settled


def _likeliest(where: KeyPath, branches: list[list[_Fault]]) -> list[_Fault]:
    """Return the faults of the branch that was meant: its kind of value fits and the least is wrong inside."""
    scores = [_score(where, branch, branches) for branch in branches]
    best = [branch for branch, score in zip(branches, scores, strict=True) if score == min(scores)]
    if len(best) > 1 and all([fault.kind for fault in branch] == ["missing"] for branch in best):
        return [_one_missing(where, [branch[0] for branch in best])]
    alike = [
        fault
        for branch, score in zip(branches, scores, strict=True)
        for fault in branch
        if score == min(scores) or (fault.kind == "choice" and len(fault.path) > len(where))
    ]
    return [fault.joined(alike) for fault in best[0]]


def _one_missing(where: KeyPath, faults: list[_Fault]) -> _Fault:
    keys = tuple(dict.fromkeys(repr(fault.path[-1]) for fault in faults))
    if len(keys) == 1:
        return faults[0]
    text = f"expected the key {' or '.join(keys)}, got none of them"
    return _Fault(replace(faults[0].trail, path=where), "missing", text=text)


def _score(where: KeyPath, branch: list[_Fault], branches: list[list[_Fault]]) -> tuple[bool, int, int]:
    """Return how unlikely a branch is: another kind of value, then how wrong it is inside."""
    if _wrong_kind(where, branch):
        return True, 0, 0
    fitting = [{fault.path for fault in other} for other in branches if not _wrong_kind(where, other)]
    tags = [fault for fault in branch if fault.kind == "choice" and any(fault.path not in paths for paths in fitting)]
    return False, sum(_COSTS[fault.kind] for fault in branch) + _WRONG_TAG * len(tags), len(branch)


def _wrong_kind(where: KeyPath, branch: list[_Fault]) -> bool:
    return all(fault.path == where and fault.kind in _JOINED for fault in branch)


def _walk(loc: tuple[str | int, ...], model: type[BaseModel], document: Document) -> _Trail:
    """Follow pydantic's path through the annotations, dropping what is no key."""
    trail = _Trail()
    here: list[Any] = [model]
    for position, part in enumerate(loc):
        if part == "[key]" and position == len(loc) - 1:
            return replace(trail, is_key=True)
        levels = [_branches(annotation) for annotation in here]
        branches = [branch for level in levels for branch in level]
        union = any(len(level) > 1 for level in levels) or not _known(branches)
        if union and _is_label(part, branches, trail.path, document):
            trail = replace(trail, choices=(*trail.choices, (trail.path, str(part))))
            here = [branch for branch in branches if _named(str(part), branch)] or branches
            continue
        owners = tuple(branch for branch in branches if _is_model(branch))
        trail = replace(trail, path=(*trail.path, part), owners=owners)
        here = [child for branch in branches for child in _children(branch, part)]
    return trail


def _branches(annotation: Any) -> list[Any]:
    """Return the branches of a union without ``None``, or the one type that an annotation stands for."""
    if get_origin(annotation) is Annotated:
        return _branches(get_args(annotation)[0])
    if hasattr(annotation, "__value__"):  # a type alias
        return _branches(annotation.__value__)
    if _is_model(annotation) and issubclass(annotation, RootModel):
        return _branches(annotation.model_fields["root"].annotation)
    if get_origin(annotation) not in (Union, types.UnionType):
        return [annotation]
    some = [branch for branch in get_args(annotation) if branch is not type(None)]
    return _branches(some[0]) if len(some) == 1 else some


def _known(branches: list[Any]) -> bool:
    return any(_is_model(branch) or get_origin(branch) is not None for branch in branches)


def _is_label(part: str | int, branches: list[Any], path: KeyPath, document: Document) -> bool:
    """Tell whether a part of pydantic's path names a branch of a union, not a key."""
    if not isinstance(part, str):
        return False
    if len(branches) > 1 and any(_named(part, branch) for branch in branches):
        return True
    if (*path, part) in document.places:
        return False
    return len(branches) > 1 or re.fullmatch(r"[\w-]+[\[(].*[\])]", part) is not None


def _named(label: str, annotation: Any) -> bool:
    """Tell whether pydantic's name of a branch can mean this annotation."""
    names = set(_names(annotation))
    head = re.split(r"[\[(]", label)[0].removeprefix("constrained-")
    wrapper = head.startswith(("function-", "tagged-union", "union", "nullable", "lax-or-strict", "json-or-python"))
    return label in names or (bool(names & set(re.findall(r"\w+", label))) if wrapper else head in names)


def _names(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Annotated:
        yield from (item.tag for item in annotation.__metadata__ if isinstance(item, Tag))
    for branch in _branches(annotation):
        kind = get_origin(branch) or branch
        if kind is Annotated:
            yield from _names(branch)
        yield "literal" if kind is Literal else str(getattr(kind, "__name__", kind))
        for field in branch.model_fields.values() if _is_model(branch) else ():
            if get_origin(field.annotation) is Literal:
                yield from map(str, get_args(field.annotation))


def _children(annotation: Any, part: str | int) -> list[Any]:
    """Return the annotation of an entry of a model, mapping or list; none where it is not known."""
    if _is_model(annotation):
        field = _field(annotation, part)
        return [field.annotation] if field else []
    items = [item for item in get_args(annotation) if item is not Ellipsis]
    origin = get_origin(annotation)
    if not isinstance(origin, type) or not items:
        return []
    if issubclass(origin, Mapping):
        return items[1:2]
    return items[part : part + 1] if isinstance(part, int) and len(items) > 1 else items[:1]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _written(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a model by the name that a recipe uses."""
    result = {}
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
        result[next((choice for choice in choices if isinstance(choice, str)), name)] = field
    return result


def _field(model: type[BaseModel], part: str | int) -> FieldInfo | None:
    known = _written(model)
    return known.get(str(part)) or model.model_fields.get(str(part))


def _description(trail: _Trail) -> str | None:
    fields = [_field(owner, trail.path[-1]) for owner in trail.owners]
    return next((field.description for field in fields if field and field.description), None)


def _meant(trail: _Trail, given: Any) -> str | None:
    """Return a hint where a section that takes any key holds one much like the missing one."""
    fields = {name for owner in trail.owners for name in (*_written(owner), *owner.model_fields)}
    takes_any = any(owner.model_config.get("extra") == "allow" for owner in trail.owners)
    others = [str(key) for key in given if key not in fields] if takes_any and isinstance(given, Mapping) else []
    close = nearest(str(trail.path[-1]), others, count=1)
    return f"should '{close[0]}' be '{trail.path[-1]}'?" if close else None


def _options(text: str) -> tuple[str, ...]:
    """Return the values in pydantic's ``'a', 'b' or 'c'``."""
    found = re.findall(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^\s,]+", text)
    return tuple(_PYTHON_WORDS.get(option, option) for option in found if option != "or")


def _one_of(options: tuple[str, ...]) -> str:
    if len(options) == 1:
        return options[0]
    return f"one of {', '.join(options[:_MAX_OPTIONS])}{', …' if len(options) > _MAX_OPTIONS else ''}"


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
