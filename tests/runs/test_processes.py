"""A run in two processes: each step done once, by both together, and written by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from potstill.runs.metrics import RunMetrics


def test_two_launched_processes_do_one_run(tmp_path: Path) -> None:
    """If each took itself for the only one, both would train alone and write over each other."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    changes = ["train.epochs=2", "teacher.train.epochs=2", "evaluate.latency=false", "evaluate.resamples=100"]
    changes += ["teacher.precision=auto"]
    command = [*launcher, "-m", "potstill", "distill", "digits", *changes, "-o", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POTSTILL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run: ") == 1
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    finished = [event["step"] for event in events if event["event"] == "done"]
    assert finished == ["preflight", "teacher", "teachers", "baseline", "distilled", "evaluate", "report"]
    assert [event["teacher"] for event in events if event["event"] == "teacher form"] == ["teacher"]
    RunMetrics.model_validate_json((tmp_path / "run/metrics.json").read_text())
    history = json.loads((tmp_path / "run/history/distilled.json").read_text())
    assert history[-1]["step"] == 2 * 4  # 400 rows, 64 a process, 2 processes: 4 steps an epoch, not 7
