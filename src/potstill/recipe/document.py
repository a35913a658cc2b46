"""A recipe's text as plain data: ``extends`` and ``key=value`` applied, each value with the place it was written.

Nothing here knows what a recipe may hold; that is the schema's. Nothing here raises for what a person wrote: every
mistake is a :class:`~potstill.errors.Problem` of the document.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from potstill.errors import Problem, did_you_mean, nearest
from potstill.recipe.yaml_core import KeyPath, describe, parse_yaml

COMMAND_LINE = "command line"

_MAX_BYTES = 1 << 20
_MAX_PARENTS = 32
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Place:
    """Where a value was written.

    Attributes:
        file: the file, or ``"command line"`` for a ``key=value``.
        line: its line from 1; on the command line, the number of the ``key=value`` from 1.
    """

    file: str
    line: int


@dataclass
class Document:
    """What a recipe says, where it says it, and what is wrong with its text.

    Attributes:
        tree: mappings, lists, texts, numbers, booleans and ``None``; no ``extends``.
        places: where each value was written; for an entry of a mapping, the line of its key. ``()`` is the top.
        problems: everything wrong with the text, all at once.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: Sequence[str | int]) -> Place | None:
        """Return the place of the longest known prefix of ``path``."""
        key = tuple(path)
        return next((self.places[key[:n]] for n in range(len(key), -1, -1) if key[:n] in self.places), None)


def parse_document(text: str, file: str) -> Document:
    """Return the document of one YAML text; its ``extends`` stays as it is written.

    Args:
        text: the YAML text.
        file: how the text is called in places and problems.
    """
    parsed = parse_yaml(text, file)
    places = {(): Place(file, 1)} | {path: Place(file, line) for path, line in parsed.lines.items()}
    problems = parsed.problems
    if isinstance(parsed.value, dict):
        return Document(parsed.value, places, problems)
    if not problems:
        got = "nothing: the file is empty" if parsed.value is None else describe(parsed.value)
        place = places[()]
        problems.append(Problem((), f"expected a mapping of keys and values, got {got}", None, file, place.line))
    return Document({}, {(): Place(file, 1)}, problems)


def read_document(
    path: Path, overrides: Sequence[str] = (), *, find: Callable[[str], Path | None] | None = None
) -> Document:
    """Return the document of a file with all that it extends and the overrides of the command line.

    ``extends: NAME`` or a list of names: each is looked up beside the file that says it (also with ``.yaml`` or
    ``.yml`` added), then by ``find``. Mappings merge key by key, anything else replaces, ``null`` removes an inherited
    key; later names win over earlier ones and the file itself over all.

    Args:
        path: the YAML file, UTF-8, at most 1 MiB.
        overrides: ``key.sub=value`` with the value as YAML (``[..]`` and ``{..}`` for lists and mappings), entries of
            lists by their number from 0; an empty value or ``null`` removes. The value replaces, later ones win.
        find: from the name of a packaged recipe to its file, or ``None`` where there is none.
    """
    document = _Reader(find).read(Path(path), ())
    for number, text in enumerate(overrides, start=1):
        try:
            _override(document, text, Place(COMMAND_LINE, number))
        except _OverrideError as error:
            document.problems.append(error.problem.at(COMMAND_LINE, number))
    return document


class _Reader:
    """Reads each file once and merges what extends what."""

    def __init__(self, find: Callable[[str], Path | None] | None) -> None:
        self._find = find
        self._known: dict[Path, Document] = {}

    def read(self, path: Path, chain: tuple[Path, ...]) -> Document:
        try:
            identity = path.resolve()
            if identity not in self._known:
                self._known[identity] = self._merged(path, (*chain, identity))
            return self._known[identity]
        except (OSError, RuntimeError, ValueError) as error:  # a path that no system accepts, a loop of links
            return _failed(path, f"cannot be read: {error}")

    def _merged(self, path: Path, chain: tuple[Path, ...]) -> Document:
        text = _read_text(path)
        if isinstance(text, Document):
            return text
        own = parse_document(text, str(path))
        names = own.tree.pop("extends", None)
        result = Document()
        for key, name in _parent_names(names):
            parent = self._parent(name, path, chain)
            if isinstance(parent, Document):
                result = _merge(result, parent)
            else:
                place = own.place(key) or Place(str(path), 1)
                own.problems.append(Problem(key, parent[0], parent[1], place.file, place.line))
        own.places = {key: place for key, place in own.places.items() if key[:1] != ("extends",)}
        return _merge(result, own) if names is not None else own

    def _parent(self, name: Any, path: Path, chain: tuple[Path, ...]) -> Document | tuple[str, str | None]:
        """Return the document that ``name`` means, or what is wrong with it and a hint."""
        if not isinstance(name, str) or not name:
            return f"expected the name of a recipe or a list of at most {_MAX_PARENTS}, got {describe(name)}", None
        found = self._look_up(name, path)
        if found is None:
            return f"there is no recipe '{name}'", _beside(path.parent / name, name)
        if found.resolve() in chain:
            names = " → ".join(link.name for link in (*chain[chain.index(found.resolve()) :], found))
            return f"the recipe extends itself: {names}", None
        if len(chain) >= _MAX_PARENTS:
            return f"more than {_MAX_PARENTS} recipes extend one another", None
        return self.read(found, chain)

    def _look_up(self, name: str, path: Path) -> Path | None:
        exact = path.parent / name
        if _is_file(exact):
            return exact
        for suffix in _SUFFIXES:  # a copy of a packaged recipe may extend the one it is named after
            candidate = Path(f"{exact}{suffix}")
            if _is_file(candidate) and candidate.resolve() != path.resolve():
                return candidate
        return self._find(name) if self._find else None


class _OverrideError(Exception):
    """An override that cannot be applied."""

    def __init__(self, path: KeyPath, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.problem = Problem(path, message, hint)


def _parent_names(names: Any) -> list[tuple[KeyPath, Any]]:
    if names is None:
        return []
    if not isinstance(names, list) or len(names) > _MAX_PARENTS:
        return [(("extends",), names)]
    return [(("extends", index), name) for index, name in enumerate(names)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _read_text(path: Path) -> str | Document:
    """Return the text of a file, or a document that holds only what is wrong with it."""
    if path.is_dir():
        return _failed(path, "expected a file, got a folder")
    if not path.exists():
        return _failed(path, "there is no such file", _nearest_file(path))
    if not path.is_file():
        return _failed(path, "expected a file, got a device or a pipe")
    with path.open("rb") as stream:
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        return _failed(path, "the file is larger than 1 MiB: that is no recipe")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return _failed(path, f"the file is not UTF-8: byte 0x{data[error.start]:02x}", line=line)


def _failed(path: Path, message: str, hint: str | None = None, line: int = 1) -> Document:
    return Document({}, {(): Place(str(path), 1)}, [Problem((), message, hint, str(path), line)])


def _beside(missing: Path, name: str) -> str | None:
    """Return a hint from the recipes that lie where the one called ``name`` was expected."""
    with_suffix = missing.suffix in _SUFFIXES
    given = Path(name).parent
    names = [given / (file.name if with_suffix else file.stem) for file in _recipes_in(missing.parent)]
    return did_you_mean(name, map(str, names)) if names else None


def _nearest_file(missing: Path) -> str | None:
    if not missing.parent.is_dir():
        return f"the folder '{missing.parent}' does not exist"
    files = _recipes_in(missing.parent)
    stems = nearest(missing.stem, [file.stem for file in files], count=1)
    names = [file.name for file in files if file.stem in stems]
    return f"did you mean '{names[0]}'?" if names else None


def _recipes_in(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in islice(folder.iterdir(), 1000) if file.suffix in _SUFFIXES)
    except (OSError, ValueError):
        return []


def _merge(base: Document, over: Document) -> Document:
    """Return ``base`` with ``over`` laid on top; neither is changed."""
    lost: set[KeyPath] = set()
    removed: set[KeyPath] = set()
    tree = _merge_trees(base.tree, over.tree, (), lost, removed)
    places = {path: place for path, place in base.places.items() if not _under(path, lost)}
    places.update((path, place) for path, place in over.places.items() if path not in removed)
    return Document(tree, places, list(dict.fromkeys([*base.problems, *over.problems])))


def _merge_trees(
    base: dict[str, Any],
    over: dict[str, Any],
    path: KeyPath,
    lost: set[KeyPath],
    removed: set[KeyPath],
) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        here = (*path, key)
        if key in base and isinstance(value, dict) and isinstance(base[key], dict):
            result[key] = _merge_trees(base[key], value, here, lost, removed)
            continue
        lost.add(here)
        if value is None and key in base:
            removed.add(here)
            del result[key]
        else:
            result[key] = value
    return result


def _under(path: KeyPath, prefixes: set[KeyPath]) -> bool:
    return any(path[:n] in prefixes for n in range(1, len(path) + 1))


def _override(document: Document, text: str, place: Place) -> None:
    key, equals, written = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or not key.isprintable() or len(parts) > _MAX_PARENTS:
        raise _OverrideError((), f"expected key=value, got {text!r}", "such as train.epochs=3")
    if parts[0] == "extends":
        raise _OverrideError(("extends",), "a recipe cannot be extended here", "name another recipe file")
    parsed = parse_yaml(written, place.file, flow=True)
    if not parsed.problems and parsed.value is None and written.strip().startswith("#"):
        raise _OverrideError(tuple(parts), "the value is only a comment", _quote(key, written))
    if parsed.problems:
        raise _OverrideError(tuple(parts), parsed.problems[0].message, _quote(key, written))
    parent, path = _descend(document, parts, place)
    _forget(document, path)
    if parsed.value is None and _remove(document, parent, path):
        return
    parent[path[-1]] = parsed.value
    for below in ((), *parsed.lines):
        document.places[path + below] = place


def _descend(document: Document, parts: list[str], place: Place) -> tuple[Any, KeyPath]:
    """Return the container of the last key, made where it is missing, and the whole path."""
    node: Any = document.tree
    path: KeyPath = ()
    for part in parts[:-1]:
        key = _key_in(node, part, path)
        path = (*path, key)
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
            document.places[path] = place
        node = node[key]
        if not isinstance(node, dict | list):
            shown = ".".join(map(str, path))
            raise _OverrideError(tuple(parts), f"expected a mapping or a list at '{shown}', got {describe(node)}")
    return node, (*path, _key_in(node, parts[-1], path))


def _key_in(node: dict[str | int, Any] | list[Any], part: str, path: KeyPath) -> str | int:
    number = int(part) if re.fullmatch(r"0|[1-9][0-9]{0,8}", part) else None
    if isinstance(node, dict):
        return part if number is None or part in node else number
    if number is None or number >= len(node):
        have = f"0 to {len(node) - 1}" if node else "nothing: it is empty"
        raise _OverrideError((*path, part), f"expected the number of an entry of the list, got '{part}'; it has {have}")
    return number


def _forget(document: Document, prefix: KeyPath) -> None:
    size = len(prefix)
    document.places = {path: place for path, place in document.places.items() if path[:size] != prefix}


def _remove(document: Document, parent: Any, path: KeyPath) -> bool:
    """Remove an entry and tell whether there was one; the entries of a list behind it move up."""
    *above, last = path
    if isinstance(parent, dict) and last not in parent:
        return False
    del parent[last]
    if isinstance(parent, dict):
        return True
    depth = len(above)
    moved: dict[KeyPath, Place] = {}
    for key, place in document.places.items():
        index = key[depth] if key[:depth] == tuple(above) and len(key) > depth else None
        behind = isinstance(index, int) and isinstance(last, int) and index > last
        moved[(*above, index - 1, *key[depth + 1 :]) if behind and isinstance(index, int) else key] = place
    document.places = moved
    return True


def _quote(key: str, written: str) -> str:
    text = written.strip() if written.isprintable() else "…"
    return f"a text with signs needs quotes inside quotes: '{key}=\"{text}\"'"
