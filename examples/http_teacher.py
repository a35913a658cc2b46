"""A teacher on a server: a classifier of scikit-learn answers over HTTP, and a small network learns from it.

    python examples/http_teacher.py

The server can be anything that takes ``{"inputs": [row, …]}`` and answers ``{"probabilities": [[…], …]}``.

Promises: "the student learned: yes", "each row was asked about once: yes"
"""

import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from potstill.losses import distillation_loss
from potstill.registry import teacher_sources
from potstill.teachers.cached import Cached
from potstill.teachers.context import SourceContext

images, labels = load_digits(return_X_y=True)
teacher, asked = MLPClassifier(random_state=0).fit(images[:1000], labels[:1000]), []


class Handler(BaseHTTPRequestHandler):
    """The server."""

    def do_POST(self) -> None:
        """Answer rows of pixels with probabilities."""
        rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        asked.extend(rows)
        answer = json.dumps({"probabilities": teacher.predict_proba(rows).tolist()}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
context = SourceContext("far", table=Dataset.from_dict({"pixels": images[:1000]}), label_names=list("0123456789"))
source = teacher_sources.get("http")(context, url=f"http://127.0.0.1:{server.server_port}/")
cached = Cached(source, tempfile.mkdtemp(), identity=source.identity)

torch.manual_seed(0)
inputs, targets = torch.tensor(images / 16).float(), torch.tensor(labels)
student = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
for ids in [ids for _ in range(20) for ids in torch.randperm(1000).split(100)]:
    answers = cached({"features": inputs[ids], "sample_id": ids})["logits"]
    optimizer.zero_grad()
    distillation_loss(student(inputs[ids]), answers, targets[ids], alpha=0.9, temperature=2.0).backward()
    optimizer.step()

accuracy = float((student(inputs[1000:]).argmax(-1) == targets[1000:]).float().mean())
print(f"the student learned: {'yes' if accuracy > 0.8 else 'no'}")
print(f"each row was asked about once: {'yes' if len(asked) == 1000 else 'no'}")
