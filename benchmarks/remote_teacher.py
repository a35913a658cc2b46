"""How many samples a second a teacher on a server answers: a batch in few requests against a request a sample.

python benchmarks/remote_teacher.py [--rounds 7] [--write]

Two servers on this machine, each in a process of its own: one that takes 5 ms a request and 0.05 ms a sample, and one
with a multilayer perceptron of scikit-learn on digits. Ways of asking take turns within a round; each figure is the
median over the rounds. ``--write`` puts them into ``benchmarks/results/remote_teacher.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sklearn.datasets import load_digits

from potstill.registry import teacher_sources
from potstill.teachers.context import SourceContext

SAMPLES = 512
WAYS = {
    "one a request": {"batch_size": 1},
    "one a request, 8 at once": {"batch_size": 1, "concurrency": 8},
    "64 a request": {"batch_size": 64},
    "64 a request, 4 at once": {"batch_size": 64, "concurrency": 4},
    "256 a request": {"batch_size": 256},
}
RESULT = Path(__file__).parent / "results" / "remote_teacher.json"


def serve(kind: str, ready: Any) -> None:
    """Answer rows of digits until the process is ended."""
    images, labels = load_digits(return_X_y=True)
    if kind == "model":
        from sklearn.neural_network import MLPClassifier

        model = MLPClassifier((256,), random_state=0).fit(images, labels)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = 1 << 16

        def do_POST(self) -> None:
            rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
            if kind == "model":
                answer = {"probabilities": model.predict_proba(rows).tolist()}
            else:
                time.sleep(5e-3 + 5e-5 * len(rows))
                answer = {"logits": [row[:10] for row in rows]}
            raw = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ready.put(server.server_port)
    server.serve_forever()


def measured(port: int, rounds: int) -> dict[str, Any]:
    """Samples a second of each way of asking, and how many times as many as one a request."""
    images, labels = load_digits(return_X_y=True)
    table = Dataset.from_dict({"pixels": images.tolist(), "label": labels.tolist()})
    context = SourceContext("far", table=table, label_names=[str(digit) for digit in range(10)])
    make = teacher_sources.get("http")
    sources = {name: make(context, url=f"http://127.0.0.1:{port}/", **way) for name, way in WAYS.items()}
    batch = {"sample_id": torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:SAMPLES]}
    said = [source(batch)["logits"] for source in sources.values()]
    if not all(torch.allclose(each, said[0], atol=1e-4) for each in said):
        raise SystemExit("the ways of asking do not give the same answers")
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, source in sources.items():
            begin = time.perf_counter()
            source(batch)
            speeds[name].append(SAMPLES / (time.perf_counter() - begin))
    first = speeds["one a request"]
    return {
        name: {
            "samples_per_second": round(statistics.median(values), 1),
            "times_one_a_request": round(statistics.median(v / f for v, f in zip(values, first, strict=True)), 2),
            "least_and_most_times": [
                round(edge(v / f for v, f in zip(values, first, strict=True)), 2) for edge in (min, max)
            ],
        }
        for name, values in speeds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write the results file")
    options = parser.parse_args()
    found: dict[str, Any] = {"samples": SAMPLES, "rounds": options.rounds}
    for kind in ("fixed cost", "model"):
        ready: Any = multiprocessing.get_context("spawn").Queue()
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(kind, ready), daemon=True)
        process.start()
        found[kind] = measured(ready.get(timeout=120), options.rounds)
        process.terminate()
    text = json.dumps(found, indent=1)
    print(text)
    if options.write:
        RESULT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
