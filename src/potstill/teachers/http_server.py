"""The teacher source ``http``: a server of any kind that answers rows with logits or probabilities in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from potstill.errors import ComponentError
from potstill.registry import teacher_sources
from potstill.teachers.client import AnswerError, Client
from potstill.teachers.context import SourceContext
from potstill.teachers.remote import Remote, numbers
from potstill.teachers.rows import Rows

Kind: TypeAlias = Literal["auto", "logits", "probabilities"]

_ABOUT_ONE = 0.01


@teacher_sources.register("http", reads_rows=True)
def http(
    context: SourceContext,
    *,
    url: str,
    columns: list[str] | None = None,
    batch_size: int = 64,
    timeout: float = 30.0,
    retries: int = 3,
    backoff: float = 0.5,
    concurrency: int = 1,
    headers: dict[str, str] | None = None,
    kind: Kind = "auto",
    inputs: str = "inputs",
    extra: dict[str, Any] | None = None,
    send_ids: bool = False,
    floor: float = 1e-8,
) -> Remote:
    """A teacher on a server that takes rows and gives logits or probabilities, both as JSON.

    The request is ``POST {"inputs": [row, …]}``, with a row as in :class:`potstill.teachers.rows.Rows`: a mapping by
    column, or the bare value where there is one column. These answers are understood, a row a sample in the same order:

    - ``{"logits": [[…], …]}`` and ``{"probabilities": [[…], …]}``;
    - ``{"predictions": [[…], …]}`` and a bare list of lists, which do not say what they are: give ``kind``;
    - ``[[{"label": "cat", "score": 0.9}, …], …]``, the text classification of Hugging Face, with every class in any
      order, by its name or as ``LABEL_3``; probabilities unless ``kind`` says otherwise.

    Probabilities become logits by the natural logarithm. The server gets the rows of the table: random augmentation of
    what the student sees does not reach it. No recipe holds a secret: see ``headers``.

    Args:
        context: has the table and the names of the classes.
        url: the address that is posted to.
        columns: what the server is shown; every column but the label if omitted.
        batch_size: rows a request at most.
        timeout: seconds for a whole answer.
        retries: repeats of a request that failed in a way that may pass: no connection, no answer in time, one that is
            cut short or no JSON, the status 408, 429 and 5xx.
        backoff: seconds before the first repeat, twice as long before each further one; ``Retry-After`` is obeyed.
        concurrency: requests at once at most.
        headers: sent with each request; ``env:NAME`` in a value stands for an environment variable.
        kind: what the numbers are; ``auto`` takes the answer's word.
        inputs: the name of the rows in the request, such as ``instances``.
        extra: further entries of the request, such as ``parameters: {top_k: 10}``.
        send_ids: whether the request has ``ids``, the sample ids; the answer must then have them too, in any order.
        floor: the least probability, which keeps the logarithm finite.

    Raises:
        ComponentError: an option out of its range.
        DataError: no such column.
    """
    if not 0 < floor < 1:
        raise ComponentError(f"expected a floor between 0 and 1, got {floor}")
    beside = dict(extra or {})
    taken = {inputs, *(["ids"] if send_ids else [])} & set(beside)
    if taken:
        raise ComponentError(f"`extra` may not have '{min(taken)}', which the request has already")
    names = tuple(context.label_names)
    return Remote(
        Client(url, headers=headers, timeout=timeout, retries=retries, backoff=backoff),
        Rows(context, columns),
        _Rows(names, kind, inputs, beside, send_ids, floor),
        classes=len(names) or None,
        batch_size=batch_size,
        concurrency=concurrency,
        prefix=context.prefix,
    )


@dataclass(frozen=True)
class _Rows:
    """Rows in, numbers out."""

    names: tuple[str, ...]
    kind: Kind
    inputs: str
    extra: Mapping[str, Any]
    send_ids: bool
    floor: float

    def body(self, ids: Sequence[int], rows: Sequence[Any]) -> Any:
        return {self.inputs: list(rows), **self.extra, **({"ids": list(ids)} if self.send_ids else {})}

    def read(self, answer: Any, ids: Sequence[int], classes: int | None) -> NDArray[np.float64]:
        kind, rows = self._found(answer)
        if self.send_ids:
            rows = _ordered(answer, rows, ids)
        if isinstance(rows, list) and rows and all(_is_scored(row) for row in rows):
            kind, rows = kind or "probabilities", [self._by_name(row) for row in rows]
        found = numbers(rows, ids, classes)
        if kind is None:
            raise AnswerError(
                "numbers that do not say whether they are logits or probabilities "
                f"(each row {'sums to 1' if _sums_to_one(found).all() else 'does not sum to 1'}; say which in `kind`)"
            )
        return found if kind == "logits" else self._logarithms(found, ids)

    def expected(self, count: int, classes: int | None) -> str:
        what = "logits or probabilities" if self.kind == "auto" else self.kind
        key = "logits" if self.kind == "auto" else self.kind
        ids = ' and their "ids"' if self.send_ids else ""
        return f'{{"{key}": [[…], …]}} with {what} of {classes or "all"} classes for {count} samples{ids}'

    def plain(self) -> dict[str, Any]:
        return {
            "source": "http",
            "classes": list(self.names),
            "kind": self.kind,
            "inputs": self.inputs,
            "extra": dict(self.extra),
            "floor": self.floor,
        }

    def _found(self, answer: Any) -> tuple[str | None, Any]:
        """Return what the numbers are, and the numbers; the former is ``None`` where nothing says it."""
        stated = None if self.kind == "auto" else self.kind
        if isinstance(answer, list):
            return stated, answer
        if isinstance(answer, dict):
            for name in [stated] if stated else ["logits", "probabilities"]:
                if name in answer:
                    return name, answer[name]
            if "predictions" in answer:
                return stated, answer["predictions"]
            raise AnswerError(f"an object with {', '.join(map(repr, list(answer)[:8])) or 'nothing'} in it")
        raise AnswerError(f"{type(answer).__name__} in place of an object or a list")

    def _by_name(self, row: list[dict[str, Any]]) -> list[Any]:
        """Return the scores in the order of the classes."""
        if not self.names:
            raise AnswerError("classes by name, and the names of the classes are not known here")
        scores: dict[int, Any] = {}
        places = {name: place for place, name in enumerate(self.names)}
        usual = {f"LABEL_{place}": place for place in range(len(self.names))}
        for entry in row:
            place = places.get(entry["label"], usual.get(entry["label"]))
            if place is None:
                raise AnswerError(f"the class '{entry['label']}', which is none of {', '.join(self.names[:8])}")
            if place in scores:
                raise AnswerError(f"the class '{entry['label']}' twice in one row")
            scores[place] = entry["score"]
        if len(scores) < len(self.names):
            lacks = next(name for place, name in enumerate(self.names) if place not in scores)
            raise AnswerError(f"no score for '{lacks}' (ask for all: `extra: {{parameters: {{top_k: …}}}}`)")
        return [scores[place] for place in range(len(self.names))]

    def _logarithms(self, found: NDArray[np.float64], ids: Sequence[int]) -> NDArray[np.float64]:
        wrong = ~(_sums_to_one(found) & (found >= 0).all(axis=1))
        if wrong.any():
            place = int(wrong.argmax())
            raise AnswerError(
                f"probabilities from {found[place].min():g} to {found[place].max():g} that sum to "
                f"{found[place].sum():g} for sample {ids[place]}"
            )
        return np.log(np.maximum(found, self.floor))


def _sums_to_one(found: NDArray[np.float64]) -> NDArray[np.bool_]:
    close: NDArray[np.bool_] = np.abs(found.sum(axis=1) - 1) <= _ABOUT_ONE
    return close


def _is_scored(row: Any) -> bool:
    """Whether a row is a list of classes by name with their scores."""
    return (
        isinstance(row, list)
        and bool(row)
        and all(isinstance(e, dict) and isinstance(e.get("label"), str) and "score" in e for e in row)
    )


def _ordered(answer: Any, rows: Any, ids: Sequence[int]) -> Any:
    """Return the rows in the order of the ids that were asked."""
    given = answer.get("ids") if isinstance(answer, dict) else None
    if not isinstance(given, list) or not isinstance(rows, list) or len(given) != len(rows):
        raise AnswerError("no 'ids', one a row, as `send_ids` wants them")
    if any(type(each) is not int for each in given) or sorted(given) != sorted(ids):
        raise AnswerError("the 'ids' of other samples")
    places = {each: place for place, each in enumerate(given)}
    return [rows[places[each]] for each in ids]
