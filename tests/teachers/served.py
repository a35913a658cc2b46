"""A real server on this machine, in a thread, that can be told to misbehave.

``Served(answer)`` posts the JSON of each request to ``answer(path, body)`` and sends what it returns. ``server.next``
is a queue of misbehaviours, one taken for each request: a name of a method ``do_…`` below, with its arguments.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Served:
    def __init__(self, answer: Callable[[str, Any], Any]) -> None:
        self.answer, self.next = answer, deque()
        self.requests: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.ports: list[int] = []
        self.busy = self.most_busy = 0
        self.lock, self.released = threading.Lock(), threading.Event()
        self.http = Quiet(("127.0.0.1", 0), type("Handler", (Handler,), {"served": self}))
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Die: refuse connections, and close those there are at their next request."""
        self.released.set()
        self.http.shutdown()
        self.http.server_close()
        self.next.extend([("hang_up",)] * 1000)


class Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that went away."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    served: Served

    def log_message(self, *_: object) -> None:
        """Write no log."""

    def do_POST(self) -> None:
        served = self.served
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with served.lock:
            served.busy += 1
            served.most_busy = max(served.most_busy, served.busy)
            served.requests.append(body)
            served.headers.append(dict(self.headers))
            served.ports.append(self.client_address[1])
            what = served.next.popleft() if served.next else ("fine",)
        try:
            getattr(self, f"do_{what[0]}")(body, *what[1:])
        finally:
            with served.lock:
                served.busy -= 1

    def send(self, status: int, raw: bytes, *, promised: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(promised or len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)
        self.wfile.flush()

    def do_fine(self, body: Any) -> None:
        self.send(200, json.dumps(self.served.answer(self.path, body)).encode())

    def do_last(self, body: Any) -> None:
        """Answer, and close the connection without a word, as servers do with idle ones."""
        self.do_fine(body)
        self.close_connection = True

    def do_late(self, body: Any, seconds: float) -> None:
        time.sleep(seconds)
        self.do_fine(body)

    def do_hang(self, body: Any) -> None:
        self.served.released.wait(5)
        self.close_connection = True

    def do_drip(self, body: Any, seconds: float) -> None:
        """Send the answer byte by byte, each soon enough, the whole much too late."""
        raw = json.dumps(self.served.answer(self.path, body)).encode()
        self.send(200, b"", promised=len(raw))
        for byte in raw:
            time.sleep(seconds)
            self.wfile.write(bytes([byte]))
            self.wfile.flush()

    def do_hang_up(self, body: Any) -> None:
        self.close_connection = True

    def do_cut(self, body: Any, chunked: bool = False) -> None:
        raw = json.dumps(self.served.answer(self.path, body)).encode()
        if chunked:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(f"{len(raw):x}\r\n".encode() + raw[: len(raw) // 2])
        else:
            self.send(200, raw[: len(raw) // 2], promised=len(raw))
        self.close_connection = True

    def do_raw(self, body: Any, raw: bytes) -> None:
        self.send(200, raw)

    def do_say(self, body: Any, answer: Any) -> None:
        self.send(200, json.dumps(answer).encode())

    def do_status(self, body: Any, status: int, text: str = "no", **_: Any) -> None:
        self.send(status, text.encode())

    def do_wait(self, body: Any, status: int, after: str) -> None:
        self.send(status, b"slow down", Retry_After=after)
