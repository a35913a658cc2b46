"""Two real processes (gloo) do what one does: gradients, projector included, logs and checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from potstill.training.checkpoints import is_complete
from tests.training import worker
from tests.training.tiny import flat, relative, student, teacher

ROOT = Path(__file__).parent.parent.parent


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """DDP averages gradients; with unlabelled rows spread unevenly a mean of the ranks' means would be wrong."""
    worker.main(tmp_path, 24, 1)
    one = load_file(tmp_path / "rank0.safetensors")
    together = tmp_path / "two"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "-m", "tests.training.worker", str(together), "4", "3"]
    together.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(together / f"rank{rank}.safetensors") for rank in (0, 1)]
    start = flat(student())
    assert relative(ranks[0]["student"] - start, one["student"] - start) < 1e-6
    assert relative(ranks[0]["objective"], one["objective"]) < 1e-6
    assert float((one["objective"] - ranks[0]["objective"]).abs().max()) < 1e-6
    starts = {"learner": start, "peer": flat(teacher()), "mean": start}
    for name, begin in starts.items():  # each clipped by itself: another norm would show
        assert relative(ranks[0][name] - begin, one[name] - begin) < 1e-6
    for name in ("student", "objective", "logged", *starts):
        assert torch.equal(ranks[0][name], ranks[1][name])
    assert torch.allclose(ranks[0]["logged"], one["logged"], rtol=1e-5)
    assert is_complete(together / "checkpoint-1")
