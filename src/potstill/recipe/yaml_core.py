"""YAML text as plain data, with the line of every value and every mistake of the text.

The scalars are those of the YAML 1.2 core schema: ``1e-3`` is a number, ``no`` and ``2026-11-21`` are texts. Nothing
is ever constructed but mappings, lists, texts, numbers, booleans and null, and hostile text is refused early.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from yaml.composer import Composer
from yaml.error import MarkedYAMLError, YAMLError
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from potstill.errors import Problem

KeyPath = tuple[str | int, ...]

_MAX_NODES = 100_000
_MAX_DEPTH = 64
_MAX_DIGITS = 100
_MAX_SHOWN = 60
_CORE = "tag:yaml.org,2002:"
_PLAIN = "?"
_TAGS: dict[type[Node], frozenset[str]] = {
    ScalarNode: frozenset({_PLAIN, *(_CORE + name for name in ("str", "int", "float", "bool", "null"))}),
    SequenceNode: frozenset({_CORE + "seq"}),
    MappingNode: frozenset({_CORE + "map"}),
}
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_INTEGERS = {
    10: re.compile(r"[-+]?([0-9]+)"),
    8: re.compile(r"0o([0-7]+)"),
    16: re.compile(r"0x([0-9a-fA-F]+)"),
}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_EXPLICIT: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "null": ((type(None),), "null"),
}
_SYNTAX = (  # what the parser says, and what a person can mend
    (r"mapping values are not allowed", "a ':' is not expected here; a text that holds ': ' needs quotes"),
    (r"character '\\t'", "a tab cannot indent; use spaces"),
    (r"character ('.+') that cannot start", r"a value cannot begin with \1 without quotes"),
    (r"could not find expected ':'", "expected ':' after the key"),
    (r"expected <block end>", "the indentation does not fit the lines above"),
    (r"unexpected end of stream", "a quote is never closed"),
    (r"expected (',' or '[\]}]')", r"expected \1"),
    (r"expected a single document", "expected one YAML document, got several; remove the second '---'"),
    (r"undefined alias ('.*')", r"the alias \1 has no anchor; a text that begins with '*' needs quotes"),
    (r"expected '<document start>'", "this cannot stand here; a recipe is one mapping of keys and values"),
    (r"expected the node content", "a value is missing"),
)


@dataclass
class Parsed:
    """What one YAML text says.

    Attributes:
        value: mappings, lists, texts, numbers, booleans and ``None``.
        lines: the line of each value, from 1; for an entry of a mapping, the line of its key.
        problems: everything wrong with the text.
    """

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class _RefusedError(MarkedYAMLError):
    """The text is YAML, but larger or deeper than a recipe can be."""


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's parser without its YAML 1.1 scalars and its constructors."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self._depth += 1
        self._nodes += 1
        if self._depth > _MAX_DEPTH:
            raise _RefusedError(problem=f"nested more than {_MAX_DEPTH} deep", problem_mark=self._mark())
        if self._nodes > _MAX_NODES:
            raise _RefusedError(problem=f"more than {_MAX_NODES:,} values", problem_mark=self._mark())
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> str:
        if kind is ScalarNode:
            return _PLAIN if implicit[0] else _CORE + "str"
        return _CORE + ("seq" if kind is SequenceNode else "map")

    def _mark(self) -> Any:
        parser: Any = self
        return parser.peek_event().start_mark


class _Builder:
    """From the node graph to plain Python, aliases and merge keys expanded within bounds."""

    def __init__(self, file: str) -> None:
        self.parsed = Parsed()
        self._file = file
        self._active: set[int] = set()
        self._seen: set[tuple[int, str]] = set()
        self._left = _MAX_NODES

    def build(self, node: Node, path: KeyPath = ()) -> Any:
        self._spend(node)
        self.parsed.lines.setdefault(path, _line(node))
        self._check_tag(node, path)
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        with self._inside(node):
            if isinstance(node, SequenceNode):
                return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
            return self._mapping(node, path)

    def _check_tag(self, node: Node, path: KeyPath) -> None:
        if node.tag not in _TAGS[type(node)]:
            name = node.tag.replace(_CORE, "!!")
            self._report(node, path, f"a recipe is data: tags are not allowed, got {name!r}")

    def _mapping(self, node: Node, path: KeyPath) -> dict[str | int, Any]:
        result: dict[str | int, Any] = {}
        for key, (key_node, value_node) in self._entries(node, path).items():
            self.parsed.lines[(*path, key)] = _line(key_node)
            result[key] = self.build(value_node, (*path, key))
        return result

    def _entries(self, node: Node, path: KeyPath) -> dict[str | int, tuple[Node, Node]]:
        own: dict[str | int, tuple[Node, Node]] = {}
        merged: dict[str | int, tuple[Node, Node]] = {}
        merge: Node | None = None
        for key_node, value_node in node.value:
            self._spend(key_node)
            if key_node.tag == _PLAIN and key_node.value == "<<":
                self._no_second(merge, key_node, path, "<<")
                merge = key_node
                self._merge(value_node, path, merged)
                continue
            key = self._key(key_node, path)
            if key is None:
                continue
            self._no_second(own[key][0] if key in own else None, key_node, (*path, key), key)
            own.setdefault(key, (key_node, value_node))
        return {**merged, **own}

    def _merge(self, node: Node, path: KeyPath, into: dict[str | int, tuple[Node, Node]]) -> None:
        for source in node.value if isinstance(node, SequenceNode) else [node]:
            self._spend(source)
            if not isinstance(source, MappingNode):
                self._report(source, (*path, "<<"), "expected a mapping or a list of mappings to merge")
                continue
            with self._inside(source):
                for key, entry in self._entries(source, path).items():
                    into.setdefault(key, entry)

    def _key(self, node: Node, path: KeyPath) -> str | int | None:
        if not isinstance(node, ScalarNode):
            self._report(node, path, "expected a text or a whole number as key, got a list or a mapping")
            return None
        self._check_tag(node, path)
        key = self._scalar(node, path)
        if isinstance(key, str) and key.isprintable():
            return key
        if isinstance(key, int) and not isinstance(key, bool):
            return key
        hint = f'write it in quotes: "{node.value}"' if not isinstance(key, str) and node.value else None
        got = node.value if node.value and hint else describe(node.value or None)
        self._report(node, path, f"expected a text or a whole number as key, got {got}", hint)
        return None

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        name = node.tag.removeprefix(_CORE)
        try:
            value = node.value if name == "str" else _plain_value(node.value)
        except ValueError as error:
            self._report(node, path, str(error))
            return None
        types, words = _EXPLICIT.get(name, ((object,), ""))
        if not isinstance(value, types) or (isinstance(value, bool) and name in ("int", "float")):
            self._report(node, path, f"expected {words}, got {describe(node.value)}")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            self._report(node, path, "the text holds half a character (a surrogate escape)")
            return ""
        return float(value) if name == "float" and type(value) is int else value

    def _no_second(self, first: Node | None, second: Node, path: KeyPath, key: str | int) -> None:
        if first is not None:
            lines = f"on lines {_line(first)} and {_line(second)}"
            self._report(second, path, f"the key '{key}' is written twice, {lines}")

    @contextmanager
    def _inside(self, node: Node) -> Iterator[None]:
        if id(node) in self._active:
            raise _RefusedError(problem="an alias that holds itself", problem_mark=node.start_mark)
        if len(self._active) >= _MAX_DEPTH:
            raise _RefusedError(problem=f"nested more than {_MAX_DEPTH} deep", problem_mark=node.start_mark)
        self._active.add(id(node))
        yield
        self._active.discard(id(node))

    def _spend(self, node: Node) -> None:
        self._left -= 1
        if self._left < 0:
            words = f"more than {_MAX_NODES:,} values once the aliases are filled in"
            raise _RefusedError(problem=words, problem_mark=node.start_mark)

    def _report(self, node: Node, path: KeyPath, message: str, hint: str | None = None) -> None:
        if (id(node), message) not in self._seen:
            self._seen.add((id(node), message))
            self.parsed.problems.append(Problem(path, message, hint, self._file, _line(node)))


def parse_yaml(text: str, file: str, *, flow: bool = False) -> Parsed:
    """Return the value of a YAML text; never raises for what the text holds.

    Args:
        text: one YAML document.
        file: how the text is called in its problems.
        flow: refuse lists and mappings that are not written as ``[...]`` and ``{...}``.
    """
    builder = _Builder(file)
    try:
        node = _Loader(text).get_single_node()
        if node is not None:
            if flow and isinstance(node, CollectionNode) and not node.flow_style:
                raise _RefusedError(problem="a list or mapping without its brackets", problem_mark=node.start_mark)
            builder.parsed.value = builder.build(node)
    except YAMLError as error:
        return Parsed(problems=[_syntax_problem(error, text, file)])
    except (ValueError, OverflowError):  # the scanner on an escape such as "\UFFFFFFFF"
        return Parsed(problems=[Problem((), "not valid YAML: an escape or a version is out of range", None, file, 1)])
    builder.parsed.problems.sort(key=lambda problem: problem.line or 0)
    return builder.parsed


def describe(value: Any) -> str:
    """Return a value in the words of a recipe: ``the text 'four'``, ``-1``, ``true``, ``a list``, ``nothing``."""
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= _MAX_SHOWN else f"a text of {len(value)} characters"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    names = ((type(None), "nothing"), (Mapping, "a mapping"), (list | tuple | set | frozenset, "a list"))
    return next((words for kind, words in names if isinstance(value, kind)), type(value).__name__)


def _plain_value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    for base, pattern in _INTEGERS.items():
        found = pattern.fullmatch(text)
        if found and len(found[1]) > _MAX_DIGITS:
            raise ValueError(f"expected a number of at most {_MAX_DIGITS} digits, got {len(found[1])}")
        if found:
            return int(found[1], base) * (-1 if text[0] == "-" else 1)
    if not _FLOAT.fullmatch(text):
        return text
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"expected a number that a computer can hold, got {text[:40]}")
    return number


def _syntax_problem(error: YAMLError, text: str, file: str) -> Problem:
    if isinstance(error, _RefusedError):
        return Problem((), f"the text is refused: {error.problem}", None, file, _mark_line(error.problem_mark))
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        words = f"the character U+{int(error.character):04X} is not allowed"
        return Problem((), f"not valid YAML: {words}", None, file, line)
    if not isinstance(error, MarkedYAMLError):
        return Problem((), f"not valid YAML: {error}", None, file, 1)
    raw = f"{error.context or ''} {error.problem or ''}".strip()
    words = next((found.expand(to) for pattern, to in _SYNTAX if (found := re.search(pattern, raw))), raw)
    line, start = _mark_line(error.problem_mark or error.context_mark), _mark_line(error.context_mark)
    where = f" (in what begins on line {start})" if raw.startswith("while") and start != line else ""
    return Problem((), f"not valid YAML: {words}{where}", None, file, line)


def _mark_line(mark: Any) -> int:
    return int(mark.line) + 1 if mark is not None else 1


def _line(node: Node) -> int:
    return _mark_line(node.start_mark)
