"""A teacher on disk in a bare trainer: each sample is asked about once, and the student is that of a live teacher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from potstill import Cached, preflight
from potstill.teachers.live import Deferred, Live
from tests.training.cached_worker import Asked, trainer
from tests.training.tiny import flat, relative, student, teacher

ROOT = Path(__file__).parent.parent.parent


def weights(made: Any) -> tuple[torch.Tensor, torch.Tensor]:
    made.train()
    return flat(made.distillation_module.student), flat(made.distillation_module.objective)


def gone() -> Live:
    raise AssertionError("the teacher was loaded")


def once(samples: list[int]) -> bool:
    """Whether each of 24 samples was asked about once, but for the one that shows which axes are tokens."""
    counts = Counter(samples)
    return set(counts) == set(range(24)) and sorted(counts.values()) == [1] * 23 + [2]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 5},
        {"bf16": True},
        {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0},
    ],
    ids=["plain", "accumulated", "bf16", "adam"],
)
def test_the_student_is_that_of_a_live_teacher(changes: dict[str, Any], tmp_path: Path) -> None:
    live = weights(trainer(tmp_path / "live", Live(teacher(), ["hidden.2"]), **changes))
    source = Asked()
    cached = Cached(source, tmp_path / "cache")
    found = weights(trainer(tmp_path / "cached", cached, **changes))
    assert once(source.samples)
    assert (cached.counts.made, cached.counts.found) == (24, 24)
    again = Cached(Deferred(gone), tmp_path / "cache", identity=cached.identity)
    third = weights(trainer(tmp_path / "again", again, remove_unused_columns=False, **changes))
    assert again.counts.found == 48
    for one, two, three in zip(live, found, third, strict=True):
        assert relative(two, one) < 1e-6
        assert relative(three, one) < 1e-6


def test_a_module_as_the_teacher(tmp_path: Path) -> None:
    """Its token types are asked for although the student has none."""
    made = trainer(tmp_path, Cached(teacher(), tmp_path / "cache"))
    made.distillation_module.objective.terms.pop("hint")
    made.train()
    assert made.teacher.counts.found == 24
    (folder,) = made.teacher.folders
    assert '"token_type_ids"' in (folder / "store.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("filled", [False, True])
def test_the_preflight_asks_the_live_teacher(filled: bool, tmp_path: Path) -> None:
    source = Asked()
    cached = Cached(source, tmp_path / "cache")
    if filled:
        trainer(tmp_path, cached).train()
    before, asked = vars(cached.counts).copy(), len(source.samples)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert not [finding for finding in preflight(trainer(tmp_path, cached)) if finding.level == "error"]
    assert len(source.samples) > asked
    assert vars(cached.counts) == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == files


def test_a_training_after_a_preflight_is_the_same(tmp_path: Path) -> None:
    plain = weights(trainer(tmp_path, Cached(Asked(), tmp_path / "one")))
    made = trainer(tmp_path, Cached(Asked(), tmp_path / "two"))
    preflight(made)
    assert all(torch.equal(*both) for both in zip(weights(made), plain, strict=True))


@pytest.mark.slow
def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    """Each keeps what it was asked, finds in the second epoch what the other kept, and comes to the same weights."""
    live = weights(trainer(tmp_path, Live(teacher(), ["hidden.2"]), per_device_train_batch_size=24))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "-m", "tests.training.cached_worker", str(tmp_path), "4", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    start = flat(student())
    for rank in ranks:
        assert rank["counts"].tolist() == [12, 12, 0, 0]
        assert relative(rank["student"] - start, live[0] - start) < 1e-6
        assert relative(rank["objective"], live[1]) < 1e-6
    assert torch.equal(ranks[0]["student"], ranks[1]["student"])
    asked = Counter(torch.cat([rank["asked"] for rank in ranks]).tolist())
    assert set(asked) == set(range(24))
    assert sum(asked.values()) == 24 + 2  # each process sees by one sample which axes are tokens
    found = Cached(Deferred(gone), tmp_path / "cache", identity=Cached(Asked(), tmp_path).identity)
    trainer(tmp_path / "after", found, remove_unused_columns=False).train()
    assert vars(found.counts) == {"found": 48, "made": 0, "kept_nothing": 0, "damaged": 0}
