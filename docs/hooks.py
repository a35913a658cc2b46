"""What `mkdocs build --strict` checks beside links: that the pages name what the code has, with its types and defaults.

A table below a comment ``<!-- schema: TrainSpec -->`` has the columns key, type, default, and must agree with that
section of ``potstill.recipe.schema`` or that class of ``potstill.runs.metrics``; one below ``<!-- components: losses
-->`` has the columns name, options, and each row must agree with the signature of that component; of losses also with
what they give their values for and the weight that was published. In place of ``<!-- combinations -->`` comes the table
of ``combinations.json``, which tests keep.
"""

from __future__ import annotations

import json
import logging
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from potstill import registry
from potstill.experiments.seeds import SeedSummary
from potstill.recipe import schema
from potstill.recipe.arguments import DEFAULTS
from potstill.recipe.check_training import MANAGED
from potstill.runs import metrics

log = logging.getLogger("mkdocs.hooks.potstill")  # a warning of it ends a strict build

_TABLE = re.compile(r"<!-- schema: (\w+) -->\n+((?:\|.*\n)+)")
_COMBINATIONS = "<!-- combinations -->"
_COMPONENTS = re.compile(r"<!-- components: (\w+) -->\n+((?:\|.*\n)+)")
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything", type(None): "null"}
_BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}
_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr|exc):(<code>)~?([\w.]+\.)?")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Warn of every fact on a page that is not so."""
    for name, table in _TABLE.findall(markdown):
        for problem in _differences(name, table):
            log.warning("%s: %s: %s", page.file.src_uri, name, problem)
    for kind, table in _COMPONENTS.findall(markdown):
        for problem in _component_differences(kind, table):
            log.warning("%s: %s: %s", page.file.src_uri, kind, problem)
    for what, name in _wanted(page.file.src_uri):
        if f"`{name}`" not in markdown:
            log.warning("%s: the %s `%s` is missing", page.file.src_uri, what, name)
    if _COMBINATIONS not in markdown:
        return markdown
    tree = json.loads(Path(__file__).with_name("combinations.json").read_text(encoding="utf-8"))
    return markdown.replace(_COMBINATIONS, combinations_table(tree))


def combinations_table(tree: Mapping[str, Any]) -> str:
    """Return who can learn how from whom as a table: a row a scheme, a column a source, reasons below by number."""
    schemes, sources, cells = tree["schemes"], tree["sources"], tree["cells"]
    reasons = list(dict.fromkeys(why for row in cells.values() for cell in row.values() for why in cell["but"]))
    lines = [f"| | {' | '.join(sources.values())} |", f"|---|{':-:|' * len(sources)}"]
    for scheme, called in schemes.items():
        row = []
        for source in sources:
            cell = cells[scheme][source]
            notes = ", ".join(str(reasons.index(why) + 1) for why in cell["but"])
            row.append(("✓" if cell["runs"] else "–") + (f"<sup>{notes}</sup>" if notes else ""))
        lines.append(f"| {called} | {' | '.join(row)} |")
    return "\n".join([*lines, "", *(f"{number}. {why}" for number, why in enumerate(reasons, 1))])


def _wanted(page: str) -> list[tuple[str, str]]:
    """What a page must mention, kind and name."""
    if page == "objectives.md":
        return [("loss", name) for name in registry.losses.names()]
    return [("training argument", name) for name in (*DEFAULTS, *MANAGED)] if page == "recipes.md" else []


def on_page_content(html: str, **_: Any) -> str:
    """Turn the roles of docstrings (``:class:`potstill.x.Y```) into plain code."""
    return _ROLE.sub(r"\1", html)


def _component_differences(kind: str, table: str) -> Iterator[str]:
    """Tell which listed component does not exist, or has other options than its row says."""
    found: registry.Registry = getattr(registry, kind)
    for line in table.splitlines()[2:]:
        name, written = (cell.strip(" `–") for cell in line.strip("|\n").split(" | ")[:2])
        short = name.removeprefix("potstill:")
        if short not in found.names():
            yield f"there is no {found.kind} '{name}'"
            continue
        options = found.options(found.get(short)).values()
        expected = ", ".join(
            option.name if option.required else f"{option.name}={_shown(option.default)}"
            for option in options
            if not (kind == "tasks" and option.name == "augment")
        )
        if written != expected:
            yield f"'{name}' has the options '{expected}', not '{written}'"
        if kind == "losses":
            facts = found.facts(short)
            wanted = [str(facts.get("per", "position")), f"{facts.get('weight', 1):g}"]
            if (told := [cell.strip() for cell in line.strip("|\n").split(" | ")[3:5]]) != wanted:
                yield f"'{name}' gives its value per {wanted[0]} and has the weight {wanted[1]}, not {told}"


def _differences(name: str, table: str) -> Iterator[str]:
    model = SeedSummary if name == "SeedSummary" else getattr(schema, name, None) or getattr(metrics, name)
    rows = [[cell.strip().strip("`") for cell in line.strip("|\n").split(" | ")] for line in table.splitlines()[2:]]
    written = {row[0].strip(): row[1:3] for row in rows}
    for key, field in model.model_fields.items():
        expected = [_words(field.annotation, field.metadata), _default(field)]
        if key not in written:
            yield f"the key '{key}' is missing"
        elif written[key] != expected:
            yield f"'{key}' is {written[key]}, expected {expected}"
    yield from (f"there is no key '{key}'" for key in written if key not in model.model_fields)


def _words(annotation: Any, metadata: Any = ()) -> str:
    bounds = [
        phrase.format(_shown(getattr(item, kind)))
        for item in metadata
        for kind, phrase in _BOUNDS.items()
        if getattr(item, kind, None) is not None
    ]
    return " ".join([_kind(annotation), *[" and ".join(bounds)]]).strip()


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        metadata = [item for each in arguments[1:] for item in getattr(each, "metadata", [each])]
        return _words(arguments[0], metadata)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(each) for each in arguments if each is not type(None))
    if origin is Literal:
        return " or ".join(_shown(each) for each in arguments)
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict or annotation is dict:
        inner = "" if arguments[1:] in ((), (Any,)) else f" to {_kind(arguments[1])}"
        return f"mapping{inner}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__
    return _WORDS.get(annotation, str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    return _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{', '.join(_shown(each) for each in value)}]"
    return json.dumps(dict(value) if isinstance(value, Mapping) else value)
