"""A teacher on a server: a batch is asked in few requests, several at once if wanted, and every answer is checked."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.errors import ComponentError, DataError
from potstill.interfaces import Batch, Signals
from potstill.models.inputs import TEACHER_PREFIX
from potstill.teachers.client import AnswerError, Client
from potstill.teachers.rows import Rows

_KEPT = 8192


class Questions(Protocol):
    """How a kind of server is asked, and what its answers mean."""

    def body(self, ids: Sequence[int], rows: Sequence[Any]) -> Any:
        """Return the request for some rows, as plain JSON."""
        ...

    def read(self, answer: Any, ids: Sequence[int], classes: int | None) -> NDArray[np.float64]:
        """Return logits ``[B, C]`` in the order of the ids; ``classes`` is C where it is known.

        Raises:
            AnswerError: the answer is none to this request.
        """
        ...

    def expected(self, count: int, classes: int | None) -> str:
        """Return what the answer about ``count`` samples should be, for an error."""
        ...

    def plain(self) -> dict[str, Any]:
        """Return what decides the answers, as plain JSON."""
        ...


class Remote:
    """A teacher that answers over HTTP. See :class:`potstill.interfaces.TeacherSource`.

    The server gets the rows as they are in the table: random augmentation of what the student sees does not reach it.
    After an error the answers that came are kept in memory, and the same batch asks only for the rest. Beyond that
    nothing is remembered: ``Cached(source, folder, identity=source.identity)`` keeps answers on disk.

    Args:
        client: the connection to the server.
        rows: from sample ids to rows.
        questions: the server's way of being asked.
        classes: how many there are; as many as the first answer has if omitted.
        batch_size: rows a request at most.
        concurrency: requests at once at most.
        prefix: what the names of its own entries in a batch begin with.

    Raises:
        ComponentError: a size below 1.
        DataError: when called: a batch without ``sample_id``, or with one that is not in the table.
        TrainingError: when called: there is no right answer; names the address, the samples, what was expected, what
            came and how often it was tried.
    """

    reads_rows = True
    """It finds its answers by the number of a row of its table, and knows no others."""

    def __init__(
        self,
        client: Client,
        rows: Rows,
        questions: Questions,
        *,
        classes: int | None = None,
        batch_size: int = 64,
        concurrency: int = 1,
        prefix: str = TEACHER_PREFIX,
    ) -> None:
        if min(batch_size, concurrency) < 1:
            raise ComponentError(f"expected batch_size and concurrency of at least 1, got {batch_size}, {concurrency}")
        self.client, self.rows, self.questions = client, rows, questions
        self.classes, self.batch_size, self.concurrency, self.prefix = classes, batch_size, concurrency, prefix
        self._kept: dict[int, NDArray[np.float32]] = {}
        self._lock = threading.Lock()

    def __call__(self, batch: Batch) -> Signals:
        """Return ``logits``, float32 ``[B, C]``, on the device of the batch."""
        ids: Tensor | None = batch.get("sample_id")
        if ids is None:
            raise DataError("a teacher on a server is asked by `sample_id`, and the batch has none")
        wanted: list[int] = ids.tolist()
        with self._lock:
            found = {each: self._kept[each] for each in wanted if each in self._kept}
        missing = [each for each in dict.fromkeys(wanted) if each not in found]
        try:
            self._ask(missing, found)
        except BaseException:
            self._keep(found)
            raise
        with self._lock:
            for each in found:
                self._kept.pop(each, None)
        logits = np.stack([found[each] for each in wanted]) if wanted else np.zeros((0, self.classes or 0), np.float32)
        return {"logits": torch.from_numpy(logits).to(ids.device)}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the answers beside the rows, as plain JSON; it holds no secret."""
        return {**self.client.plain(), **self.questions.plain(), "columns": self.rows.columns}

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        self.client.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_kept", "_lock")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._kept, self._lock = {}, threading.Lock()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _keep(self, found: Mapping[int, NDArray[np.float32]]) -> None:
        with self._lock:
            self._kept.update(found)
            for oldest in list(self._kept)[: max(0, len(self._kept) - _KEPT)]:
                del self._kept[oldest]

    def _ask(self, ids: Sequence[int], found: dict[int, NDArray[np.float32]]) -> None:
        """Put the answers for ``ids`` into ``found``; after a failure those that came, and the first error is raised.

        Once a request has failed no other is begun or repeated; those that are under way end.
        """
        parts = [ids[begin : begin + self.batch_size] for begin in range(0, len(ids), self.batch_size)]
        halt = threading.Event()
        errors: dict[int, Exception] = {}

        def ask(number: int) -> None:
            if halt.is_set():
                return
            try:
                found.update(self._request(parts[number], halt))
            except Exception as error:
                halt.set()
                errors[number] = error

        if min(self.concurrency, len(parts)) <= 1:
            for number in range(len(parts)):
                ask(number)
        else:
            with ThreadPoolExecutor(min(self.concurrency, len(parts)), thread_name_prefix="potstill-teacher") as pool:
                try:
                    list(pool.map(ask, range(len(parts))))
                except BaseException:
                    halt.set()
                    raise
        if errors:
            raise errors[min(errors)]

    def _request(self, ids: Sequence[int], halt: threading.Event) -> dict[int, NDArray[np.float32]]:
        rows = self.rows(ids)
        logits = self.client.ask(
            self.questions.body(ids, rows),
            lambda answer: self._checked(answer, ids),
            about=named(ids),
            expected=self.questions.expected(len(ids), self.classes),
            halt=halt,
        )
        return dict(zip(ids, logits, strict=True))

    def _checked(self, answer: Any, ids: Sequence[int]) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):
            logits = self.questions.read(answer, ids, self.classes).astype(np.float32)
        bad = ~np.isfinite(logits).all(axis=1)
        if bad.any():
            raise AnswerError(f"a number that is not finite, for sample {ids[int(bad.argmax())]}")
        with self._lock:
            self.classes = self.classes or logits.shape[1]
        if logits.shape[1] != self.classes:
            raise AnswerError(f"{logits.shape[1]} classes and {self.classes} before")
        return logits


def named(ids: Sequence[int]) -> str:
    """Return sample ids as an error names them: all of a few, else the first ones and how many there are."""
    if len(ids) == 1:
        return f"sample {ids[0]}"
    if len(ids) <= 8:
        return f"samples {', '.join(map(str, ids))}"
    return f"{len(ids)} samples ({', '.join(map(str, ids[:8]))}, …)"


def numbers(rows: Any, ids: Sequence[int], classes: int | None) -> NDArray[np.float64]:
    """Return one list of numbers a sample as ``[B, C]``.

    Raises:
        AnswerError: not as many rows as ids or numbers as classes, or what is no number.
    """
    if not isinstance(rows, list):
        raise AnswerError(f"{type(rows).__name__} in place of a list")
    if len(rows) != len(ids):
        raise AnswerError(f"{len(rows)} rows for {len(ids)} samples")
    for place, row in enumerate(rows):
        if not isinstance(row, list) or not row or (classes or len(rows[0])) != len(row):
            what = f"{len(row)} numbers" if isinstance(row, list) else type(row).__name__
            raise AnswerError(f"{what} for sample {ids[place]}, where there are {classes or len(rows[0])} classes")
    found: NDArray[Any] = np.asarray(rows) if _is_flat(rows) else np.asarray(None)
    if found.dtype.kind not in "iuf":
        raise AnswerError("something that is no number")
    return found.astype(np.float64)


def _is_flat(rows: list[list[Any]]) -> bool:
    return all({type(value) for value in row} <= {int, float} for row in rows)
