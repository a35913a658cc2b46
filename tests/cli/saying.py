"""What the tests of the command line share: what a command said, and a recipe that takes a second."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

IRIS = """\
name: flowers
task: {name: tabular-classification}
data: {source: sklearn, path: load_iris}
teacher: {model: "potstill:mlp", kwargs: {hidden: [8]}, train: {epochs: 10, learning_rate: 0.02}}
student: {model: "potstill:mlp"}
objective: {soft: {loss: kl, weight: 0.7}, hard: {loss: cross_entropy, weight: 0.3}}
train: {epochs: 1}
evaluate: {resamples: 100, latency: false}
"""


@dataclass
class Said:
    """What a command said and how it ended."""

    status: int
    out: str
    err: str


Command = Callable[..., Said]


def process(*arguments: str, cwd: Path, cache: Path) -> Said:
    """The command line as a process of its own."""
    environment = {**os.environ, "POTSTILL_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "potstill", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    return Said(done.returncode, done.stdout, done.stderr)


def refused(said: Said, *parts: str) -> None:
    """A user's mistake: status 2, nothing on stdout, the message on stderr, no traceback."""
    assert said.status == 2, said
    assert said.out == ""
    assert "Traceback" not in said.err
    for part in parts:
        assert part in said.err, said.err
