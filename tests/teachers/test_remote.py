"""Teachers on servers: real servers on this machine, which behave and misbehave."""

from __future__ import annotations

import base64
import io
import json
import math
import pickle
import re
import socket
import threading
import time
import traceback

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from potstill.errors import ComponentError, DataError, TrainingError
from potstill.registry import teacher_sources
from potstill.teachers import client as client_module
from potstill.teachers.cached import Cached
from potstill.teachers.client import Client
from potstill.teachers.context import SourceContext
from tests.teachers.served import Served

NAMES = ["cat", "dog", "owl"]
ROWS = 24
TABLE = Dataset.from_dict(
    {
        "x": [float(i) for i in range(ROWS)],
        "text": [f"text {i}" for i in range(ROWS)],
        "label": [i % 3 for i in range(ROWS)],
    }
)


def logits_of(x: float) -> list[float]:
    """What the teacher says of a row; no two rows alike."""
    return [x, -x / 2, 1.0]


def expected(ids) -> torch.Tensor:
    return torch.tensor([[i, -i / 2, 1.0] for i in ids], dtype=torch.float32)


def fine(path, body):
    return {"logits": [logits_of(row["x"] if isinstance(row, dict) else row) for row in body["inputs"]]}


def context(table=TABLE, names=NAMES, **others) -> SourceContext:
    return SourceContext("far", table=table, label_names=names, **others)


def http(server: Served, *, table=TABLE, names=NAMES, **options):
    options = {"columns": ["x"], "timeout": 10, "backoff": 0.01, **options}
    return teacher_sources.get("http")(context(table, names), url=f"{server.url}/ask", **options)


def batch(ids) -> dict[str, torch.Tensor]:
    ids = torch.tensor(ids, dtype=torch.int64)
    return {"features": ids[:, None].float(), "sample_id": ids}


def inputs(server: Served) -> list[list]:
    return [body["inputs"] for body in server.requests]


# ---- what is asked, what comes back --------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_batch_whatever_the_requests() -> None:
    ids = [5, 3, 17, 3, 0, 9, 11]
    with Served(fine) as server:
        said = http(server, batch_size=4)(batch(ids))
        assert set(said) == {"logits"}
        assert said["logits"].dtype == torch.float32
        assert torch.equal(said["logits"], expected(ids))
        assert inputs(server) == [[5, 3, 17, 0], [9, 11]]  # what is twice in a batch is asked once


def test_rows_of_several_columns_are_mappings_without_the_label() -> None:
    with Served(fine) as server:
        http(server, columns=None, extra={"parameters": {"top_k": 3}})(batch([2, 1]))
        assert server.requests == [
            {"inputs": [{"x": 2.0, "text": "text 2"}, {"x": 1.0, "text": "text 1"}], "parameters": {"top_k": 3}}
        ]


def test_rows_are_found_by_the_sample_ids_of_the_table() -> None:
    table = TABLE.add_column("sample_id", [1000 - i for i in range(ROWS)]).select(range(4, ROWS))
    with Served(fine) as server:
        said = http(server, table=table, columns=["x"])(batch([990, 996]))
        assert torch.equal(said["logits"], expected([10, 4]))
        with pytest.raises(DataError, match=r"asked about sample 999.*none of that number"):
            http(server, table=table)(batch([999]))
        assert len(server.requests) == 1


def test_the_label_and_unknown_columns_are_refused() -> None:
    with Served(fine) as server:
        with pytest.raises(DataError, match="must not be shown 'label'"):
            http(server, columns=["label"])
        with pytest.raises(DataError, match="did you mean 'text'"):
            http(server, columns=["texts"])
        with pytest.raises(DataError, match="there is none here"):
            http(server, table=None)


def test_pictures_arrays_and_gaps_become_json() -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    table = Dataset.from_dict({"picture": [picture], "array": [[[1.0, 2.0]]], "gap": [float("nan")], "raw": [b"\x00a"]})
    with Served(lambda path, body: {"logits": [[0, 1, 2]] * len(body["inputs"])}) as server:
        http(server, table=table, columns=None)(batch([0]))
        row = inputs(server)[0][0]
    assert (row["array"], row["gap"], base64.b64decode(row["raw"])) == ([[1.0, 2.0]], None, b"\x00a")
    sent = Image.open(io.BytesIO(base64.b64decode(row["picture"])))
    assert sent.format == "PNG"
    assert np.array_equal(np.array(sent), np.array(picture))


def test_probabilities_become_logarithms_with_a_floor() -> None:
    rows = [[0.7, 0.3, 0.0], [0.2, 0.3, 0.5]]
    with Served(lambda path, body: {"probabilities": rows}) as server:
        said = http(server, floor=1e-4)(batch([0, 1]))["logits"]
    wanted = [[math.log(max(p, 1e-4)) for p in row] for row in rows]
    np.testing.assert_allclose(said, wanted, rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"predictions": rows}], ids=["bare", "predictions"])
def test_numbers_that_do_not_say_what_they_are(wrap) -> None:
    with Served(lambda path, body: wrap([[0.5, 0.25, 0.25]])) as server:
        with pytest.raises(TrainingError, match=r"sums to 1; say which in `kind`"):
            http(server)(batch([0]))
        assert http(server, kind="logits")(batch([0]))["logits"].tolist() == [[0.5, 0.25, 0.25]]
        np.testing.assert_allclose(
            http(server, kind="probabilities")(batch([0]))["logits"], np.log([[0.5, 0.25, 0.25]]), rtol=1e-6
        )


@pytest.mark.parametrize("spelt", [NAMES, ["LABEL_0", "LABEL_1", "LABEL_2"]], ids=["names", "numbers"])
def test_hugging_face_labels_in_any_order(spelt) -> None:
    rows = [[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]
    answers = [
        sorted(({"label": n, "score": p} for n, p in zip(spelt, row, strict=True)), key=lambda e: -e["score"])
        for row in rows
    ]
    with Served(lambda path, body: answers) as server:
        np.testing.assert_allclose(http(server)(batch([0, 1]))["logits"], np.log(rows), rtol=1e-6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([("cat", 0.5), ("dog", 0.5)], "no score for 'owl'"),
        ([("cat", 0.5), ("cat", 0.2), ("owl", 0.3)], "'cat' twice"),
        ([("cat", 0.5), ("dog", 0.2), ("cow", 0.3)], "'cow', which is none of cat, dog, owl"),
    ],
)
def test_hugging_face_labels_that_are_not_the_classes(row, message) -> None:
    with Served(lambda path, body: [[{"label": n, "score": p} for n, p in row]]) as server:
        with pytest.raises(TrainingError, match=message):
            http(server)(batch([0]))
        assert len(server.requests) == 1


def test_ids_that_are_sent_come_back_in_any_order() -> None:
    def shuffled(path, body):
        ids = body["ids"][::-1]
        return {"ids": ids, "logits": [logits_of(i) for i in ids]}

    with Served(shuffled) as server:
        assert torch.equal(http(server, send_ids=True)(batch([4, 2, 9]))["logits"], expected([4, 2, 9]))
        server.next.append(("say", {"ids": [4, 2, 8], "logits": [[0, 0, 0]] * 3}))
        with pytest.raises(TrainingError, match="the 'ids' of other samples"):
            http(server, send_ids=True)(batch([4, 2, 9]))


# ---- answers that are none: an error at once -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"logits": [[1, 2, 3]]}, "1 rows for 2 samples"),
        ({"logits": [[1, 2, 3]] * 3}, "3 rows for 2 samples"),
        ({"logits": [[1, 2, 3], [1, 2]]}, "2 numbers for sample 7, where there are 3 classes"),
        ({"logits": [[1, 2], [1, 2]]}, "2 numbers for sample 4, where there are 3 classes"),
        ({"logits": [[1, 2, 3], [1, float("nan"), 3]]}, "not finite, for sample 7"),
        ({"logits": [[1, 2, 3], [1, 1e39, 3]]}, "not finite, for sample 7"),
        ({"logits": [[1, 2, 3], [1, None, 3]]}, "no number"),
        ({"logits": [[1, 2, 3], ["1", "2", "3"]]}, "no number"),
        ({"logits": [[1, 2, 3], [True, 2, 3]]}, "no number"),
        ({"logits": [1, 2]}, "int for sample 4"),
        ({"probabilities": [[0.5, 0.5, 0.5], [0.2, 0.3, 0.5]]}, r"sum to 1.5 for sample 4"),
        ({"probabilities": [[0.2, 0.3, 0.5], [1.5, -0.5, 0.0]]}, r"from -0.5 to 1.5.*for sample 7"),
        ({"error": "out of memory"}, "an object with 'error' in it.*out of memory"),
        ("fine", "str in place of"),
    ],
)
def test_a_wrong_answer_is_an_error_at_once(answer, message) -> None:
    with Served(lambda path, body: answer) as server:
        with pytest.raises(TrainingError, match=message) as caught:
            http(server)(batch([4, 7]))
        assert len(server.requests) == 1
    said = str(caught.value)
    assert f"{server.url}/ask, asked about samples 4, 7: expected " in said
    assert said.endswith("(tried once: a repeat would not help)")
    assert json.dumps(answer)[:200] in said.replace('\\"', '"')


def test_the_first_answer_says_how_many_classes_there_are() -> None:
    with Served(fine) as server:
        source = http(server, names=[])
        assert source(batch([0]))["logits"].shape == (1, 3)
        server.next.append(("say", {"logits": [[1, 2]]}))
        with pytest.raises(TrainingError, match="2 numbers for sample 1, where there are 3"):
            source(batch([1]))


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413])
def test_a_status_that_says_no_is_an_error_at_once(status) -> None:
    with Served(fine) as server:
        server.next.append(("status", status, "x" * 1000))
        source = http(server)
        with pytest.raises(TrainingError, match=f"status {status}: '{'x' * 200}' … .1,000 characters.*tried once"):
            source(batch([0]))
        assert torch.equal(source(batch([0]))["logits"], expected([0]))  # it can be called again


# ---- troubles that may pass ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        ("status", 500),
        ("status", 503),
        ("status", 429),
        ("status", 408),
        ("raw", b"<html>gateway</html>"),
        ("raw", b'{"logits": [[1.0,'),
        ("raw", b"\xff\xfe"),
        ("cut",),
        ("cut", True),
        ("hang_up",),
    ],
    ids=lambda trouble: "-".join(map(str, trouble)),
)
def test_a_trouble_that_passes_is_not_seen(trouble) -> None:
    with Served(fine) as server:
        server.next.extend([trouble, trouble])
        assert torch.equal(http(server)(batch([3, 1]))["logits"], expected([3, 1]))
        assert inputs(server) == [[3.0, 1.0]] * 3


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (("status", 500, "boom"), "status 500: 'boom'"),
        (("raw", b"<html>"), "no JSON: '<html>'"),
        (("cut",), "cut short: '{\"logits"),
        (("hang",), "no whole answer within 0.2 s"),
        (("drip", 0.03), "no whole answer within 0.2 s"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_trouble_that_stays_is_one_error(trouble, message) -> None:
    with Served(fine) as server:
        server.next.extend([trouble] * 2)
        source = http(server, retries=1, timeout=0.2)
        with pytest.raises(TrainingError, match=message) as caught:
            source(batch([3, 1]))
        assert re.search(
            r"samples 3, 1: expected .* 3 classes for 2 samples, got .*\(tried 2 times in", str(caught.value)
        )
        assert len(server.requests) == 2
        source.client.timeout = 10
        assert torch.equal(source(batch([3, 1]))["logits"], expected([3, 1]))


def test_a_server_that_is_not_there() -> None:
    with Served(fine) as server:
        pass
    with pytest.raises(TrainingError, match=r"a refused connection; is the server running\? \(tried 3 times"):
        http(server, retries=2)(batch([0]))


def test_a_late_answer_is_not_taken_for_anothers() -> None:
    with Served(fine) as server:
        server.next.append(("late", 0.3))
        source = http(server, retries=0, timeout=0.2)
        with pytest.raises(TrainingError, match="no whole answer within"):
            source(batch([1]))
        source.client.timeout = 10
        for number in range(2, 6):
            assert torch.equal(source(batch([number]))["logits"], expected([number]))
            time.sleep(0.05)


def waits(monkeypatch) -> list[float]:
    """Let no time pass between the tries, and note how much should."""
    asked: list[float] = []
    usual = Client._wait

    def wait(self, failure, tries):
        seconds = usual(self, failure, tries)
        if seconds is None:
            return None
        asked.append(seconds)
        return 0.0

    monkeypatch.setattr(Client, "_wait", wait)
    return asked


def test_waits_grow_and_are_those_that_the_server_asks_for(monkeypatch) -> None:
    with Served(fine) as server:
        source = http(server, retries=5, backoff=0.5)
        server.next.extend(
            [("status", 503), ("wait", 429, "7"), ("status", 500), ("wait", 503, "Wed, 21 Oct 2026 07:28:00 GMT")]
        )
        asked = waits(monkeypatch)
        source(batch([0]))
    assert asked == [0.5, 7.0, 2.0, 4.0]


def test_a_server_that_wants_to_be_left_alone_for_long_is_left_alone(monkeypatch) -> None:
    with Served(fine) as server:
        source = http(server)
        server.next.append(("wait", 429, "86400"))
        asked = waits(monkeypatch)
        with pytest.raises(TrainingError, match="left alone for 86400 s, more than 300"):
            source(batch([0]))
    assert asked == []


# ---- connections, threads, what is kept ----------------------------------------------------------------------------


def test_a_connection_is_kept_and_a_closed_one_is_no_failure() -> None:
    with Served(fine) as server:
        source = http(server, retries=0)
        for number in range(4):
            source(batch([number]))
        assert len(set(server.ports)) == 1
        server.next.append(("last",))
        source(batch([5]))
        time.sleep(0.02)
        assert torch.equal(source(batch([6]))["logits"], expected([6]))
        assert len(set(server.ports)) == 2
        source.close()
        source(batch([7]))
        assert len(set(server.ports)) == 3


def test_requests_at_once_come_back_in_order() -> None:
    def slow_first(path, body):
        time.sleep(0.04 if body["inputs"][0] == 20 else 0.01)
        return fine(path, body)

    ids = [20, *range(15)]
    with Served(slow_first) as server:
        source = http(server, batch_size=2, concurrency=4)
        assert torch.equal(source(batch(ids))["logits"], expected(ids))
        assert (server.most_busy, len(server.requests)) == (4, 8)


def test_it_can_be_called_from_several_threads() -> None:
    with Served(fine) as server:
        source = http(server, batch_size=2)
        said: dict[int, torch.Tensor] = {}

        def call(number: int) -> None:
            said[number] = source(batch([number, number + 1, number + 2]))["logits"]

        threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert all(torch.equal(said[n], expected([n, n + 1, n + 2])) for n in range(8))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_what_came_before_an_error_is_not_asked_again(concurrency) -> None:
    def third_fails(path, body):
        return fine(path, body) if 4 not in body["inputs"] or fails.is_set() else {"nothing": 0}

    fails = threading.Event()
    with Served(third_fails) as server:
        source = http(server, batch_size=2, concurrency=concurrency)
        with pytest.raises(TrainingError, match="samples 4, 5"):
            source(batch(range(6)))
        assert sorted(inputs(server)) == [[0, 1], [2, 3], [4, 5]]
        fails.set()
        assert torch.equal(source(batch(range(6)))["logits"], expected(range(6)))
        assert inputs(server)[3:] == [[4, 5]]
        source(batch([0]))  # once a batch is complete nothing of it is remembered
        assert inputs(server)[4:] == [[0]]


def test_after_a_failure_no_other_request_is_begun() -> None:
    with Served(fine) as server:
        server.next.append(("status", 404))
        with pytest.raises(TrainingError, match="status 404"):
            http(server, batch_size=1)(batch(range(10)))
        assert len(server.requests) == 1


def test_after_a_failure_nothing_is_repeated_elsewhere() -> None:
    def answer(path, body):
        together.wait(5)
        return {} if 0 in body["inputs"] else fine(path, body)

    together = threading.Barrier(2)
    with Served(answer) as server:
        source = http(server, batch_size=1, concurrency=2, backoff=0.3)
        source.client._answer = lambda data, usual=source.client._answer: interrupted(usual(data), data)
        with pytest.raises(TrainingError, match="sample 0"):
            source(batch([0, 1]))
        assert len(server.requests) == 2


def interrupted(answered, data):
    """Let what was asked about sample 1 come to nothing, as if the connection had been lost."""
    if json.loads(data)["inputs"] == [1.0]:
        raise client_module._RequestError("nothing")
    return answered


@pytest.mark.parametrize("line", [b"HTTP/1.1 100 Continue\r\n\r\n", b"a"])
def test_headers_that_never_end_are_an_error_in_time(line) -> None:
    over = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            try:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: " if line == b"a" else line)
                for _ in range(100):
                    connection.sendall(line)
                    if over.wait(0.05):
                        return
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,), daemon=True)
        thread.start()
        client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=0.3, retries=0)
        with pytest.raises(TrainingError, match=r"no whole answer within 0\.3 s"):
            client.ask({}, lambda answer: answer, about="sample 0", expected="an answer")
        over.set()
        thread.join()


@pytest.mark.parametrize("what", [("status", 401, "{}"), ("raw", b"{}"), ("raw", b'{"logits": "{}"}')])
def test_secrets_that_a_server_repeats_are_not_shown(what, monkeypatch) -> None:
    secret = 'hunter"2' + "x" * 300
    monkeypatch.setenv("FAR_KEY", secret)
    spelt = json.dumps(secret)[1:-1]
    filled = [part.replace("{}", spelt) if isinstance(part, str) else part for part in what]
    filled = [part.replace(b"{}", spelt.encode()) if isinstance(part, bytes) else part for part in filled]
    with Served(fine) as server:
        server.next.append(tuple(filled))
        source = http(server, headers={"Authorization": "Bearer env:FAR_KEY"}, retries=0)
        with pytest.raises(TrainingError, match="env:FAR_KEY") as caught:
            source(batch([0]))
    assert "hunter" not in "".join(traceback.format_exception(caught.value))


def test_the_query_of_an_address_is_not_shown() -> None:
    with Served(fine) as server:
        server.next.append(("status", 401, "no"))
        client = Client(f"{server.url}/ask?key=hunter2", retries=0)
        with pytest.raises(TrainingError, match=rf"the teacher at {server.url}/ask, asked") as caught:
            client.ask({}, lambda answer: answer, about="sample 0", expected="an answer")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("http://[::1]/predict", ("::1", 80)),
        ("https://[fe80::ab]/", ("fe80::ab", 443)),
        ("http://[::1]:8000/", ("::1", 8000)),
    ],
)
def test_addresses_in_brackets(url, place) -> None:
    connection, _ = Client(url)._connection()
    assert (connection.host, connection.port) == place


def test_a_pickled_source_works_and_holds_no_secret(monkeypatch) -> None:
    monkeypatch.setenv("FAR_KEY", "hunter2")
    with Served(fine) as server:
        source = http(server, headers={"Authorization": "Bearer env:FAR_KEY", "X-Model": "small"})
        source(batch([1]))
        packed = pickle.dumps(source)
        assert b"hunter2" not in packed
        assert "hunter2" not in json.dumps(source.identity)
        assert torch.equal(pickle.loads(packed)(batch([2]))["logits"], expected([2]))
        assert [sent["Authorization"] for sent in server.headers] == ["Bearer hunter2"] * 2
        assert source.identity["headers"] == {"X-Model": "small"}
        monkeypatch.delenv("FAR_KEY")
        with pytest.raises(TrainingError, match="needs the environment variable FAR_KEY"):
            source(batch([3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headers": {"Authorization": "Bearer abc"}}, "is a secret"),
        ({"headers": {"x-api-key": "abc"}}, "is a secret"),
        ({"headers": {"A b": "c"}}, "none that HTTP allows"),
        ({"headers": {"A": "b\r\nC: d"}}, "none that HTTP allows"),
        ({"url": "http://me:word@localhost"}, "holds a user or a password"),
        ({"url": "localhost:8000"}, "expected an address such as"),
        ({"url": "http://localhost:port"}, "is no address"),
        ({"batch_size": 0}, "at least 1"),
        ({"timeout": 0}, "expected timeout > 0"),
        ({"retries": -1}, "retries >= 0"),
        ({"extra": {"inputs": 1}}, "may not have 'inputs'"),
    ],
)
def test_options_that_cannot_be(options, message) -> None:
    with pytest.raises(ComponentError, match=message) as caught:
        teacher_sources.get("http")(context(), **{"url": "http://localhost", **options})
    assert "word" not in str(caught.value).replace("password", "")


# ---- the cache on disk ---------------------------------------------------------------------------------------------


def test_a_cache_keeps_what_was_answered_and_asks_for_nothing_twice(tmp_path) -> None:
    epoch = [list(range(begin, begin + 6)) for begin in range(0, ROWS, 6)]
    with Served(fine) as server:
        first = http(server, retries=0)
        kept = Cached(first, tmp_path, identity=first.identity)
        for ids in epoch[:2]:
            kept(batch(ids))
    with pytest.raises(TrainingError, match="samples 12, 13"):
        kept(batch(epoch[2]))  # the server is dead
    kept.close()
    asked = len(server.requests)

    dead = http(server, retries=0)
    again = Cached(dead, tmp_path, identity=dead.identity)
    for ids in epoch[:2]:
        assert torch.equal(again(batch(ids[::-1]))["logits"], expected(ids[::-1]))
    with pytest.raises(TrainingError, match="refused connection"):
        again(batch(epoch[2]))
    again.close()
    assert len(server.requests) == asked
    assert again.counts.found == 12


def test_another_question_has_other_answers(tmp_path) -> None:
    with Served(fine) as server:
        identities = [
            http(server).identity,
            http(server, columns=["x", "text"]).identity,
            http(server, kind="logits").identity,
            http(server, extra={"temperature": 2}).identity,
            openai(server).identity,
            openai(server, prompt="Rate {text}:").identity,
            openai(server, model="large").identity,
            openai(server, api="chat").identity,
        ]
    assert len({json.dumps(each, sort_keys=True) for each in identities}) == len(identities)
    assert http(server, batch_size=3, timeout=9, retries=7, concurrency=2).identity == identities[0]


# ---- language models -----------------------------------------------------------------------------------------------


def openai(server: Served, **options):
    options = {"model": "tiny", "prompt": "{text}\nAnimal:", "timeout": 10, "backoff": 0.01, **options}
    return teacher_sources.get("openai")(context(), url=f"{server.url}/v1/", **options)


def completions(lists):
    """An answer as vLLM and OpenAI give it, the choices in another order than the prompts."""
    choices = [
        {
            "index": place,
            "text": max(listed, key=listed.get),
            "finish_reason": "length",
            "logprobs": {"tokens": ["a"], "token_logprobs": [-1.0], "text_offset": [9], "top_logprobs": [listed]},
        }
        for place, listed in enumerate(lists)
    ]
    return {"object": "text_completion", "model": "tiny", "choices": choices[::-1], "usage": {"total_tokens": 3}}


def chat(listed):
    tokens = [{"token": token, "logprob": value, "bytes": None} for token, value in listed.items()]
    content = [{**tokens[0], "top_logprobs": tokens}]
    message = {"role": "assistant", "content": tokens[0]["token"]}
    return {"choices": [{"index": 0, "message": message, "logprobs": {"content": content}, "finish_reason": "length"}]}


def test_completions_are_asked_in_one_request_and_put_in_order() -> None:
    lists = [{" cat": -0.5, " dog": -1.5, " owl": -2.5}, {" cat": -3.0, " dog": -0.2, " owl": -4.0}]
    with Served(lambda path, body: completions(lists)) as server:
        said = openai(server)(batch([4, 2]))["logits"]
        assert server.requests == [
            {
                "model": "tiny",
                "prompt": ["text 4\nAnimal:", "text 2\nAnimal:"],
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": 20,
            }
        ]
    np.testing.assert_allclose(said, [[-0.5, -1.5, -2.5], [-3.0, -0.2, -4.0]], rtol=1e-6)


def test_spellings_of_an_answer_are_added_and_other_tokens_are_not() -> None:
    listed = {" cat": -1.0, "Cat": -2.0, "Ġca": -3.0, " dog": -1.5, " cats": -2.2, "\n": -3.5, " ow": -4.0, "": -5.0}
    with Served(lambda path, body: completions([listed])) as server:
        said = openai(server)(batch([0]))["logits"]
    cat = math.log(math.exp(-1) + math.exp(-2) + math.exp(-3))
    np.testing.assert_allclose(said, [[cat, -1.5, -4.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("listed", "missing"),
    [
        ({" cat": -0.5, " dog": -1.5, " hen": -3.0}, -3.0),  # the list leaves 0.12: more than the least listed
        ({" cat": math.log(0.6), " dog": math.log(0.39)}, math.log(0.01)),  # no more than 0.01 is left
        ({" cat": math.log(0.9), " dog": math.log(0.05), " owl": -9999.0}, math.log(0.05)),  # -9999 means: not known
    ],
)
def test_a_class_that_is_not_listed_gets_what_it_can_have_at_most(listed, missing) -> None:
    with Served(lambda path, body: completions([listed])) as server:
        said = openai(server)(batch([0]))["logits"]
    np.testing.assert_allclose(said, [[listed[" cat"], listed[" dog"], missing]], rtol=1e-5)


def test_a_sample_without_an_answer() -> None:
    with Served(lambda path, body: completions([{"<think>": -0.1, "The": -3.0}])) as server:
        with pytest.raises(TrainingError, match="none of the answers for sample 0 but '<think>', 'The'"):
            openai(server)(batch([0]))
        said = openai(server, unanswered="uniform")(batch([0]))["logits"]
    assert said[0, 0] == said[0, 1] == said[0, 2]


def test_chats_are_asked_one_by_one_and_at_once() -> None:
    def answer(path, body):
        assert path == "/v1/chat/completions"
        number = int(re.search(r"\d+", body["messages"][-1]["content"])[0])
        time.sleep(0.02)
        return chat({"Cat": -0.1 - number, "dog": -0.2, "owl": -0.3 - 2 * number})

    ids = [7, 0, 3, 5, 1, 2]
    with Served(answer) as server:
        options = {"api": "chat", "system": "Be brief.", "concurrency": 3, "top_logprobs": 5}
        said = openai(server, extra={"max_tokens": None, "max_completion_tokens": 1}, **options)(batch(ids))["logits"]
        assert (server.most_busy, len(server.requests)) == (3, 6)
        body = next(body for body in server.requests if "text 3" in body["messages"][1]["content"])
    np.testing.assert_allclose(said, [[-0.1 - n, -0.2, -0.3 - 2 * n] for n in ids], rtol=1e-6)
    assert body == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "text 3\nAnimal:"}],
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 5,
        "max_completion_tokens": 1,
    }


def test_llama_cpp_answers_completions_as_chats_in_a_list() -> None:
    def answer(path, body):
        found = []
        for place in range(len(body["prompt"])):
            one = chat({" cat": -1.0 - place, " dog": -2.0, " owl": -3.0})
            one["choices"][0]["index"] = place
            found.append(one)
        return found

    with Served(answer) as server:
        said = openai(server)(batch([1, 2]))["logits"]
    np.testing.assert_allclose(said, [[-1, -2, -3], [-2, -2, -3]], rtol=1e-6)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (completions([{" cat": -1.0}]), "1 choices for 2 prompts"),
        ({"choices": [{"index": 0}, {"index": 0}]}, r"choices of the index \[0, 0\]"),
        ({"choices": [{"index": 0, "logprobs": None}, {"index": 1}]}, "does the server give log-probabilities"),
        ({"object": "error", "message": "no such model"}, "without `choices`.*no such model"),
        (completions([{" cat": 0.7}] * 2), "log-probability 0.7"),
        (completions([{" c": -0.1, " cat": -3.0}] * 2), "none"),
    ],
)
def test_completions_that_are_no_answer(answer, message) -> None:
    answers = ["cow", "calf", "owl"] if message == "none" else None
    message = "token ' c' for sample 0, with which several of the answers begin" if message == "none" else message
    with Served(lambda path, body: answer) as server:
        with pytest.raises(TrainingError, match=message):
            openai(server, answers=answers)(batch([0, 1]))
        assert len(server.requests) == 1


def test_the_key_comes_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("SOME_KEY", "hunter2")
    with Served(lambda path, body: completions([{" cat": -1.0}])) as server:
        source = openai(server, api_key_variable="SOME_KEY")
        source(batch([0]))
        assert server.headers[0]["Authorization"] == "Bearer hunter2"
        server.next.append(("status", 401, "who are you?"))
        with pytest.raises(TrainingError, match="who are you") as caught:
            source(batch([0]))
    assert "hunter2" not in str(caught.value)
    assert "Authorization" not in source.identity["headers"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": ["yes", "no", "not sure"]}, "'no' and 'not sure' begin alike"),
        ({"answers": ["very good", "very bad", "fair"]}, "'very good' and 'very bad' begin alike"),
        ({"answers": ["Yes", " yes", "no"]}, "begin alike"),
        ({"answers": ["yes", "no"]}, "an answer for each of the classes"),
        ({"top_logprobs": 2}, "3 classes cannot be told by 2"),
        ({"prompt": "which animal?"}, "names no column"),
        ({"prompt": "{text.__class__}"}, "expected the name of a column"),
        ({"prompt": "{text"}, "no template"),
        ({"system": "Be brief."}, "is for `api: chat`"),
    ],
)
def test_settings_of_a_language_model_that_cannot_be(options, message) -> None:
    with Served(fine) as server, pytest.raises(ComponentError, match=message):
        openai(server, **options)


def test_a_prompt_with_a_column_that_is_not_there() -> None:
    with Served(fine) as server, pytest.raises(DataError, match="'txt', which is no column; did you mean 'text'"):
        openai(server, prompt="{txt}")
