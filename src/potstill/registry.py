"""From a name to a component: found in its folder on first look-up, its options checked against its signature.

``losses.get("kl")`` returns the function; ``losses.get("my_package.my_module:my_loss")`` imports it without any
registration. A new component is one new file in the folder of its kind.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from potstill.errors import CodeNotAllowedError, ComponentError, Problem, did_you_mean

T = TypeVar("T")

_NUMBERS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Option:
    """One option of a component, as its signature declares it."""

    name: str
    default: Any
    annotation: Any

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is inspect.Parameter.empty


@dataclass
class Registry:
    """The components of one kind.

    Args:
        kind: what one of them is called in messages, such as ``"loss"``.
        package: the folder (or single module) that is imported on first look-up.
        reserved: parameters that potstill passes itself, so they are no options.
    """

    kind: str
    package: str
    reserved: frozenset[str] = frozenset()
    _entries: dict[str, Any] = field(default_factory=dict)
    _facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    _walked: bool = False

    def register(self, name: str, **facts: Any) -> Callable[[T], T]:
        """Register a function or class under ``name``; ``facts`` (``per``, ``reference``, …) are kept with it.

        Raises:
            ComponentError: when the name is taken by something else.
        """

        def decorate(target: T) -> T:
            known = self._entries.get(name)
            if known is not None and known is not target and _origin(known) != _origin(target):
                raise ComponentError(f"the {self.kind} '{name}' is already defined by {_origin(known)}")
            self._entries[name] = target
            self._facts[name] = facts
            return target

        return decorate

    def names(self) -> list[str]:
        """Return every registered name, sorted."""
        self._walk()
        return sorted(self._entries)

    def facts(self, name: str) -> dict[str, Any]:
        """Return the facts that were registered with ``name``; none for a dotted path."""
        self._walk()
        return dict(self._facts.get(name, {}))

    def name_of(self, target: Any) -> str:
        """Return the name under which ``target`` is registered, else its dotted path."""
        self._walk()
        for name, entry in self._entries.items():
            if entry is target:
                return name
        return _origin(target)

    def get(self, name: str, *, allow_code: bool = True) -> Any:
        """Return the component called ``name``, or import ``package.module:attribute``.

        Raises:
            ComponentError: unknown name, module or attribute, with the nearest known name.
            CodeNotAllowedError: a dotted path outside potstill while ``allow_code`` is false.
        """
        self._walk()
        if name in self._entries:
            return self._entries[name]
        if ":" in name:
            return import_dotted(name, allow_code=allow_code)
        raise ComponentError(f"there is no {self.kind} '{name}'; {did_you_mean(name, self._entries)}")

    def options(self, target: Any) -> dict[str, Option]:
        """Return the keyword options of a component by name."""
        return signature_options(target, self.reserved)

    def check(
        self, name: str, options: Mapping[str, Any], *, path: tuple[str | int, ...] = (), allow_code: bool = True
    ) -> list[Problem]:
        """Return every mistake in a component's name and options, each with its path below ``path``."""
        try:
            target = self.get(name, allow_code=allow_code)
        except ComponentError as error:
            return [Problem(path, str(error))]
        return check_options(target, options, label=f"{self.kind} '{name}'", path=path, reserved=self.reserved)

    def _walk(self) -> None:
        if self._walked:
            return
        self._walked = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(getattr(package, "__path__", []), prefix=self.package + "."):
            importlib.import_module(module.name)


def import_dotted(path: str, *, allow_code: bool = True) -> Any:
    """Return what ``package.module:attribute`` names.

    Raises:
        CodeNotAllowedError: it is no registered component of potstill and ``allow_code`` is false; says what would run.
        ComponentError: the module or the attribute does not exist.
    """
    module_name, _, attribute = path.partition(":")
    refusal = CodeNotAllowedError(
        f"'{path}' would import and run the Python module {module_name}; allow it with --allow-code"
    )
    if not allow_code and module_name.split(".")[0] != "potstill":
        raise refusal
    try:
        value: Any = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:  # the latter two for names such as '.a' and ''
        raise ComponentError(f"'{path}': the module {module_name} cannot be imported: {error}") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            hint = did_you_mean(part, [name for name in dir(value) if not name.startswith("_")])
            raise ComponentError(f"'{path}': {module_name} has no attribute '{part}'; {hint}")
        value = getattr(value, part)
    if not allow_code and not any(value is entry for registry in _ALL for entry in registry._entries.values()):
        raise refusal  # potstill's modules also reach what a recipe must not, such as `potstill.runs.folder:os.system`
    return value


def signature_options(target: Any, reserved: Iterable[str] = ()) -> dict[str, Option]:
    """Return the parameters of a function or class that can be given by keyword, less the reserved ones."""
    function = target.__init__ if inspect.isclass(target) else target
    if not inspect.isroutine(function):
        function = type(target).__call__
    hints = _hints(function)
    skipped = {"self", *reserved}
    return {
        name: Option(name, parameter.default, hints.get(name, Any))
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in skipped and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }


def takes_any_keyword(target: Any) -> bool:
    """Return whether a function or class accepts ``**kwargs``, so that unknown options cannot be told."""
    function = target.__init__ if inspect.isclass(target) else target
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def check_options(
    target: Any,
    options: Mapping[str, Any],
    *,
    label: str,
    path: tuple[str | int, ...] = (),
    reserved: Iterable[str] = (),
) -> list[Problem]:
    """Return every unknown, missing or ill-typed option of ``target``, with the nearest right name."""
    known = signature_options(target, reserved)
    problems: list[Problem] = []
    for name in options:
        if name not in known and not takes_any_keyword(target):
            hint = did_you_mean(name, known) if known else "it takes no options"
            problems.append(Problem((*path, name), f"{label} has no option '{name}'", hint))
    for option in known.values():
        if option.required and option.name not in options:
            problems.append(Problem(path, f"{label} needs the option '{option.name}'"))
    given = {name: value for name, value in options.items() if name in known}
    return problems + _type_problems(given, known, label, path)


def _type_problems(
    given: Mapping[str, Any], known: Mapping[str, Option], label: str, path: tuple[str | int, ...]
) -> list[Problem]:
    problems: list[Problem] = []
    for name, value in given.items():
        try:
            parsed = _parsed(name, value, known[name].annotation)
        except ValidationError as error:
            said: dict[tuple[str | int, ...], dict[str, Any]] = {}
            for entry in error.errors():
                said.setdefault(_within(value, entry["loc"][1:]), {})[_lowered(entry["msg"])] = entry["input"]
            for where, inputs in said.items():
                got = next(iter(inputs.values()))
                problems.append(Problem((*path, name, *where), f"{label}: {' or '.join(inputs)}, got {got!r}"))
        else:
            if _is_cast(value, parsed):
                wanted = _NUMBERS.get(type(parsed), "plain numbers")
                problems.append(Problem((*path, name), f"{label}: expected {wanted}, got {value!r}"))
    return problems


def _parsed(name: str, value: Any, annotation: Any) -> Any:
    settings = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())
    field: dict[str, Any] = {name: (annotation, ...)}
    return getattr(create_model("Options", __config__=settings, **field).model_validate({name: value}), name)


def _within(value: Any, loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Return the keys and numbers of entries in a path of pydantic, without its names for branches of unions."""
    where: list[str | int] = []
    for part in loc:
        entry = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if entry or (isinstance(value, Mapping) and part in value):
            where.append(part)
            value = value[part]
    return tuple(where)


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]


def _is_cast(given: Any, parsed: Any) -> bool:
    """Return whether pydantic made another number of a value; the component gets it as it was written."""
    if isinstance(given, list | tuple) and isinstance(parsed, list | tuple):
        return any(_is_cast(*pair) for pair in zip(given, parsed, strict=False))
    return type(parsed) in _NUMBERS and type(given) is not type(parsed) and (type(given), type(parsed)) != (int, float)


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # names imported for type checking only: such options are left unchecked
        return {}


def _origin(target: Any) -> str:
    return f"{getattr(target, '__module__', '?')}:{getattr(target, '__qualname__', target)}"


losses = Registry("loss", "potstill.losses", frozenset({"student", "teacher", "labels", "mask", "index", "progress"}))
tasks = Registry("task", "potstill.tasks", frozenset({"augment"}))
schemes = Registry("scheme", "potstill.schemes")
compressors = Registry("compressor", "potstill.compression", frozenset({"model", "calibration"}))
sources = Registry("data source", "potstill.data")
augmentations = Registry(
    "augmentation",
    "potstill.data",
    frozenset({"batch", "images", "texts", "features", "draws", "lookup", "num_classes", "scale"}),
)
synthesizers = Registry("synthesizer", "potstill.data", frozenset({"table", "seed"}))
models = Registry("model", "potstill.models")
callbacks = Registry("callback", "potstill.training.callbacks")
presets = Registry("preset", "potstill.losses.presets")
teacher_sources = Registry("teacher source", "potstill.teachers", frozenset({"context"}))
_ALL = (
    losses,
    tasks,
    schemes,
    compressors,
    sources,
    augmentations,
    synthesizers,
    models,
    callbacks,
    presets,
    teacher_sources,
)
