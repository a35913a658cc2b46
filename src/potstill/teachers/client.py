"""JSON over HTTP with connections that are kept, retries, and one clear error where nothing helps.

A request is repeated where a repeat can help: no connection, no whole answer in time, one that is cut short or no JSON,
and the status 408, 429 and 5xx. Every other status, and an answer of the wrong shape, is an error at once. The first
wait is ``backoff`` seconds, each further one twice as long (at most a minute); a ``Retry-After`` in seconds is obeyed
instead. A connection on which anything went wrong is closed, so no late answer is taken for another's. No proxy is used
and no redirection followed.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from potstill._version import __version__
from potstill.errors import ComponentError, TrainingError

T = TypeVar("T")

LONGEST_WAIT = 300.0
"""Seconds beyond which a ``Retry-After`` is an error and is not waited for."""

_LONGEST_BACKOFF = 60.0
_LARGEST = 2**28
_SHOWN = 200
_SECRET = frozenset({"authorization", "proxy-authorization", "cookie", "api-key", "x-api-key"})
_NOT_IN_HEADERS = re.compile(r"[^\t\x20-\x7e\x80-\xff]")
_VARIABLE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")


class AnswerError(Exception):
    """A server answered, and not to what it was asked; the message says what came."""


class _RequestError(Exception):
    """A request came to nothing. ``again``: whether a repeat can help; ``wait``: seconds that the server asks for."""

    def __init__(self, got: str, *, again: bool = True, wait: float | None = None) -> None:
        super().__init__(got)
        self.again, self.wait = again, wait


class Client:
    """Asks one address, from any number of threads. It can be pickled; connections and secrets stay behind.

    Args:
        url: ``http://…`` or ``https://…``, without user and password.
        headers: sent with each request. ``env:NAME`` in a value stands for the environment variable ``NAME``, read when
            a request is sent; headers that carry secrets, such as ``Authorization``, must be given so.
        timeout: seconds for a whole answer, from the request on.
        retries: repeats after the first try.
        backoff: seconds before the first repeat.

    Raises:
        ComponentError: no such address, a secret written out, or a number out of its range.
    """

    _idle: list[http.client.HTTPConnection]
    _lock: threading.Lock

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        backoff: float = 0.5,
    ) -> None:
        self.url, self.headers = url, dict(headers or {})
        self.timeout, self.retries, self.backoff = float(timeout), retries, float(backoff)
        self._address = _address(url)
        self._shown_url = urlsplit(url)._replace(query="", fragment="").geturl()
        _check_headers(self.headers)
        if not 0 < self.timeout < math.inf or retries < 0 or not 0 <= self.backoff < math.inf:
            raise ComponentError(
                f"expected timeout > 0, retries >= 0 and backoff >= 0, got {timeout}, {retries}, {backoff}"
            )
        self._start()

    def ask(
        self,
        body: Any,
        read: Callable[[Any], T],
        *,
        about: str,
        expected: str,
        halt: threading.Event | None = None,
    ) -> T:
        """Post a body and return what ``read`` makes of the answer; both are plain JSON.

        Args:
            body: the question.
            read: raises :class:`AnswerError` for an answer to something else.
            about: the samples, as the error names them.
            expected: the answer, as the error names it.
            halt: once it is set, nothing is repeated.

        Raises:
            TrainingError: there is no right answer, and why.
        """
        data, begun, tries = _encoded(body), time.monotonic(), 0
        halt = halt or threading.Event()
        while True:
            tries += 1
            try:
                answer, text = self._answer(data)
                try:
                    return read(answer)
                except AnswerError as error:
                    raise _RequestError(f"{error}: {_shown(text)}", again=False) from error
            except _RequestError as failure:
                wait = self._wait(failure, tries)
                if wait is None or halt.wait(wait):
                    cause = failure.__cause__
                    raise TrainingError(
                        f"the teacher at {self._shown_url}, asked about {about}: expected {expected}, got "
                        f"{self._without_secrets(str(failure))} ({_effort(failure, tries, time.monotonic() - begun)})"
                    ) from (cause if self._without_secrets(repr(cause)) == repr(cause) else None)

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def plain(self) -> dict[str, Any]:
        """Return the address and the headers that are no secrets, as plain JSON."""
        return {"url": self.url, "headers": {k: v for k, v in self.headers.items() if not _VARIABLE.search(v)}}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_idle", "_lock")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._idle = []
        self._lock = threading.Lock()

    def _wait(self, failure: _RequestError, tries: int) -> float | None:
        """Return the seconds before the next try; ``None`` where there is none."""
        if not failure.again or tries > self.retries or (failure.wait or 0.0) > LONGEST_WAIT:
            return None
        usual = min(_LONGEST_BACKOFF, self.backoff * 2.0 ** min(tries - 1, 60))
        return usual if failure.wait is None else failure.wait

    def _answer(self, data: bytes) -> tuple[Any, str]:
        """Return one answer as JSON, and as text without the secrets that a server may repeat."""
        status, wait, raw = self._exchange(data)
        text = raw.decode("utf-8", errors="replace")
        shown = self._without_secrets(text)
        if not 200 <= status < 300:
            raise _RequestError(
                f"status {status}: {_shown(shown)}", again=status in (408, 429) or 500 <= status < 600, wait=wait
            )
        try:
            return json.loads(text), shown
        except (ValueError, RecursionError):
            raise _RequestError(f"what is no JSON: {_shown(shown)}") from None

    def _exchange(self, data: bytes) -> tuple[int, float | None, bytes]:
        """Send one request, a second time where a kept connection turns out to be closed by the server."""
        headers = self._resolved()
        while True:
            connection, is_kept = self._connection()
            try:
                response, sock, deadline = self._send(connection, data, headers)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if is_kept and isinstance(error, ConnectionError):
                    continue
                raise self._failure(error) from error
            try:
                raw = _body(response, sock, deadline)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                raise self._failure(error) from error
            finally:
                response.close()
            if connection.sock is not None:
                with self._lock:
                    self._idle.append(connection)
            return response.status, _seconds(response.headers.get("Retry-After")), raw

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        scheme, host, port, _ = self._address
        make = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        return make(host, port, timeout=self.timeout), False

    def _send(
        self, connection: http.client.HTTPConnection, data: bytes, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPResponse, socket.socket, float]:
        deadline = time.monotonic() + self.timeout
        if connection.sock is not None:
            connection.sock.settimeout(self.timeout)
        connection.request("POST", self._address[3], body=data, headers=headers)
        sock: socket.socket = connection.sock
        sock.settimeout(max(1e-3, deadline - time.monotonic()))
        with _until(deadline, sock):
            return connection.getresponse(), sock, deadline

    def _failure(self, error: Exception) -> _RequestError:
        if isinstance(error, TimeoutError):
            return _RequestError(f"no whole answer within {self.timeout:g} s")
        if isinstance(error, http.client.IncompleteRead):
            partial = self._without_secrets(error.partial.decode("utf-8", errors="replace"))
            return _RequestError(f"an answer that is cut short: {_shown(partial)}")
        if isinstance(error, ConnectionRefusedError):
            return _RequestError("a refused connection; is the server running?")
        if isinstance(error, ssl.SSLCertVerificationError):
            return _RequestError(f"a certificate that is not trusted: {error.verify_message}", again=False)
        if isinstance(error, socket.gaierror):
            return _RequestError(f"no address for the host '{self._address[1]}': {error.strerror}")
        return _RequestError(f"no answer: {type(error).__name__}: {_shown(self._without_secrets(str(error)))}")

    def _without_secrets(self, text: str) -> str:
        """Return a text with ``env:NAME`` in place of what those variables hold that the headers name."""
        names = {name for value in self.headers.values() for name in _VARIABLE.findall(value)}
        held = {name: os.environ.get(name, "").strip() for name in names}
        for name, secret in sorted(held.items(), key=lambda each: (-len(each[1]), each[0])):
            for form in dict.fromkeys((secret, json.dumps(secret)[1:-1], repr(secret)[1:-1])) if secret else ():
                text = text.replace(form, f"env:{name}")
        return text

    def _resolved(self) -> dict[str, str]:
        """Return the headers with the values of environment variables."""
        found = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": f"potstill/{__version__}",
        }
        for name, value in self.headers.items():
            for variable in _VARIABLE.findall(value):
                if variable not in os.environ:
                    raise TrainingError(
                        f"the header '{name}' for {self._shown_url} needs the environment variable {variable}; it is "
                        "not set"
                    )
            found[name] = _VARIABLE.sub(lambda match: os.environ[match[1]].strip(), value)
            if _NOT_IN_HEADERS.search(found[name]):
                raise TrainingError(f"the environment variables in the header '{name}' hold what HTTP does not allow")
        return found


def _address(url: str) -> tuple[str, str, int, str]:
    """Return scheme, host, port and path of an address."""
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise ComponentError(f"'{url}' is no address: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\x00-\x20\x7f-\U0010ffff]", url):
        raise ComponentError(f"expected an address such as http://localhost:8000/predict, got '{url}'")
    if "@" in parts.netloc:
        raise ComponentError(
            f"the address of {parts.hostname} holds a user or a password; give them as a header "
            "`Authorization: env:NAME` with the name of an environment variable"
        )
    port = port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, parts.hostname, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _check_headers(headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or _NOT_IN_HEADERS.search(value):
            raise ComponentError(f"the header '{name}' is none that HTTP allows")
        if name.lower() in _SECRET and not _VARIABLE.search(value):
            raise ComponentError(
                f"the header '{name}' is a secret, which no recipe holds: write `env:NAME` for what the environment "
                "variable NAME holds, such as `Bearer env:HF_TOKEN`"
            )


def _encoded(body: Any) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ComponentError(f"a request to a teacher has what JSON cannot hold: {error}") from error


@contextmanager
def _until(deadline: float, sock: socket.socket) -> Iterator[None]:
    """Shut a connection down at the deadline, and raise ``TimeoutError`` then, however slowly headers come."""
    is_over = threading.Event()

    def end() -> None:
        is_over.set()
        with suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not that of TLS, which is not for two threads

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        if is_over.is_set():
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()
    if is_over.is_set():
        raise TimeoutError


def _body(response: http.client.HTTPResponse, sock: socket.socket, deadline: float) -> bytes:
    """Return the whole body, or raise ``TimeoutError`` at the deadline, however slowly it comes."""
    parts: list[bytes] = []
    size = 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        part = response.read1(1 << 16)
        if not part:
            break
        parts.append(part)
        size += len(part)
        if size > _LARGEST:
            raise http.client.HTTPException(f"more than {_LARGEST >> 20} MiB")
    raw = b"".join(parts)
    if response.length:
        raise http.client.IncompleteRead(raw, response.length)
    return raw


def _seconds(value: str | None) -> float | None:
    """Return a ``Retry-After`` in seconds; ``None`` for a date or nothing."""
    try:
        seconds = float(value or "nan")
    except ValueError:
        return None
    return None if math.isnan(seconds) else max(0.0, seconds)


def _shown(text: str) -> str:
    return repr(text[:_SHOWN]) + (f" … ({len(text):,} characters)" if len(text) > _SHOWN else "")


def _effort(failure: _RequestError, tries: int, seconds: float) -> str:
    if not failure.again:
        return "tried once: a repeat would not help" if tries == 1 else f"try {tries}: a repeat would not help"
    if (failure.wait or 0.0) > LONGEST_WAIT:
        return f"it asks to be left alone for {failure.wait:g} s, more than {LONGEST_WAIT:g}"
    return f"tried {tries} times in {seconds:.1f} s" if tries > 1 else "tried once"
