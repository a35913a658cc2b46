"""Whole runs of every scheme that are killed in each of their phases: they go on to the same bits."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from potstill.recipe.load import recipe_from
from potstill.report import html
from potstill.runs import steps
from potstill.runs.cache import Cache
from potstill.runs.folder import RunFolder
from potstill.runs.steps import Run
from potstill.training.checkpoints import MARKER
from potstill.training.trainer import DistillationTrainer
from tests.runs.combinations import HARD, HINT, JOINT, LONGER, MODEL, SOFT_TERM, STUDENT, TRAIN, Tree
from tests.runs.test_combinations import kill_in
from tests.runs.test_steps import Killed, assert_equal, at, results

ROOT = Path(__file__).parent.parent.parent
Kill = Callable[[pytest.MonkeyPatch], None]

SIX: Tree = {**TRAIN, "epochs": 2, "max_steps": 6}
TEACHER: Tree = {**MODEL, "train": {**SIX, "save_strategy": "no"}, "cache": False}
EMA: Tree = {"source": {"moving_average": {"decay": 0.9}}}
BASE: Tree = {
    "name": "killed",
    "seed": 3,
    "task": {"name": "tabular-classification"},
    "data": {"source": "sklearn", "path": "load_iris", "augment": [{"noise": {"std": 0.1}}]},
    "student": STUDENT,
    "baseline": {"enabled": False},
    "train": SIX,
    "evaluate": {"resamples": 100, "latency": False},
}


def _objective(*owners: str) -> Tree:
    return {"hard": HARD} | {f"soft_{n}": {**SOFT_TERM, "teacher": name} for n, name in enumerate(owners)}


RECIPES: dict[str, Tree] = {
    "moving_average": {"teacher": EMA, "objective": _objective("logits")},
    "joint": {"teacher": JOINT, "objective": _objective("logits")},
    "mutual": {
        "teachers": {"a": JOINT, "b": {**JOINT, "seed": 9}},
        "scheme": {"name": "mutual"},
        "objective": _objective("logits"),
    },
    "progressive": {
        "teacher": {**TEACHER, "kwargs": {"hidden": [6, 6, 6], "dropout": 0.1}},
        "student": {**STUDENT, "kwargs": {"hidden": [4, 4, 4], "dropout": 0.2}},
        "scheme": {"name": "progressive"},
        "objective": {
            **_objective("logits"),
            **{f"hint_{n}": {**HINT, "student": f"body.{n}", "teacher": f"body.{n}"} for n in (1, 4, 7)},
        },
    },
    "stages": {
        "teachers": {"joint": {**JOINT, "objective": {"hard": HARD}}, "average": EMA},
        "baseline": {"enabled": True},
        "objective": _objective("joint/logits", "average/logits"),
        "stages": [
            {"name": "first", "scheme": {"name": "exits", "at": ["body.1"]}, "objective": _objective("average/logits")},
            {"name": "second", "train": {"learning_rate": 0.02}},
        ],
    },
    "born_again": {
        "teacher": TEACHER,
        "scheme": {"name": "born_again", "generations": 2},
        "objective": _objective("logits"),
    },
    "assistant": {
        "teachers": {"large": TEACHER, "mid": {**MODEL, "train": SIX, "objective": _objective("logits")}},
        "objective": _objective("mid/logits"),
    },
    "random ensemble": {
        "teachers": {
            "large": TEACHER,
            "other": TEACHER,
            "both": {"source": {"ensemble": {"of": ["large", "other"], "by": "random"}}},
        },
        "objective": _objective("both/logits"),
    },
    "exits": {"scheme": {"name": "exits", "at": ["body.1"]}, "objective": {"hard": HARD}},
    "module_replacing": {
        "teacher": {**STUDENT, "train": LONGER},
        "scheme": {"name": "module_replacing", "container": "body", "end": 0.9},
        "objective": _objective("logits"),
    },
}


def done(name: str, *, after: bool = False) -> Kill:
    """End the process just before a step is marked as done, or just after."""

    def install(patch: pytest.MonkeyPatch) -> None:
        original = RunFolder.mark_done

        def watched(self: RunFolder, step: str) -> None:
            if step == name and not after:
                raise Killed
            original(self, step)
            if step == name:
                raise Killed

        patch.setattr(RunFolder, "mark_done", watched)

    return install


def within(training: str, step: int = 3) -> Kill:
    return partial(kill_in, training=training, step=step)


POINTS: dict[str, tuple[str, Kill]] = {
    "moving average, within the training": ("moving_average", within("distilled")),
    "moving average, between the saves of student and average": ("moving_average", at(Run, "save", turn=2)),
    "joint, within the training": ("joint", within("distilled")),
    "joint, between the saves of student and teacher": ("joint", at(Run, "save", turn=2)),
    "joint, while the teacher's folder is written": ("joint", at(steps, "save_model", turn=2, after=True)),
    "joint, between the models and the marker": ("joint", done("distilled")),
    "mutual, within the training": ("mutual", within("distilled")),
    "mutual, between the saves of two peers": ("mutual", at(Run, "save", turn=3)),
    "progressive, within the second phase of three": ("progressive", within("distilled")),
    "progressive, at the border of two phases": ("progressive", within("distilled", 4)),
    "stages, within the first": ("stages", within("distilled/first")),
    "stages, between the weights of the first and their marker": ("stages", done("distilled.first")),
    "stages, between the first and the second": ("stages", done("distilled.first", after=True)),
    "stages, within the second": ("stages", within("distilled/second")),
    "stages, after the last and before the models": ("stages", done("distilled.second", after=True)),
    "stages, between the saves of student and teacher": ("stages", at(Run, "save", turn=3)),
    "stages, within the second of the baseline": ("stages", within("baseline/second")),
    "born again, within the first generation": ("born_again", within("generation-1")),
    "born again, between the generations": ("born_again", done("generation-1", after=True)),
    "born again, between a generation's model and its marker": ("born_again", done("generation-1")),
    "born again, within the last generation": ("born_again", within("distilled")),
    "assistant, within its training": ("assistant", within("mid")),
    "assistant, between it and the student": ("assistant", done("mid", after=True)),
    "random ensemble, between two draws": ("random ensemble", within("distilled")),
    "exits, within the training": ("exits", within("distilled")),
    "module replacing, while blocks are replaced": ("module_replacing", within("distilled")),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No report is drawn, and full garbage collections need not look through all that was before."""
    monkeypatch.setattr(html, "write_report", lambda folder: folder / "report.html")
    gc.freeze()
    yield
    gc.unfreeze()


def execute(name: str, folder: Path) -> Run:
    run = Run(recipe_from({**BASE, **RECIPES[name]}), folder, bars=False, cache=Cache(folder.parent / "cache"))
    run.execute()
    return run


ALONE: dict[str, Run] = {}


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A run of each recipe that was left alone, made once."""

    def made(name: str) -> Run:
        if name not in ALONE:
            ALONE[name] = execute(name, tmp_path_factory.mktemp("alone") / "run")
        return ALONE[name]

    return made


def test_every_scheme_is_killed() -> None:
    assert {name for name, _ in POINTS.values()} == set(RECIPES)


@pytest.mark.parametrize("point", POINTS)
def test_it_goes_on_to_the_same_bits(tmp_path: Path, alone: Callable[[str], Run], point: str) -> None:
    name, kill = POINTS[point]
    wanted = alone(name)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch)
        with pytest.raises(Killed):
            execute(name, tmp_path / "run")
    run = execute(name, tmp_path / "run")
    assert_equal(results(run), results(wanted))
    if "within" in point:
        resumed = [event["resumed_from"] for event in run.folder.events() if event["event"] == "training"]
        assert set(resumed) == {None, "checkpoint-2"}
    assert not list((run.folder / "checkpoints").glob("*"))
    assert not list((run.folder / "stages").glob("*"))
    assert not list(run.folder.path.rglob("*.tmp"))


def _phases(patch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """Which terms count at each step of a training with a teacher."""
    found: dict[int, list[str]] = {}
    original = DistillationTrainer._record

    def watched(self: DistillationTrainer, parts: Any) -> None:
        if self.args.output_dir.endswith("distilled"):
            found[self.state.global_step] = sorted(parts)
        original(self, parts)

    patch.setattr(DistillationTrainer, "_record", watched)
    return found


def test_the_phases_of_progressive_stay_where_they_were(tmp_path: Path) -> None:
    """Three phases in six steps: a resume that counts from its checkpoint would begin with the first again."""
    one, two = ["hint_1"], ["hint_1", "hint_4"]
    every = ["hard", *two, "hint_7", "soft_0"]
    with pytest.MonkeyPatch.context() as patch:
        before = _phases(patch)
        kill_in(patch, "distilled", 3)
        with pytest.raises(Killed):
            execute("progressive", tmp_path / "run")
    assert before == {0: one, 1: one, 2: two}
    with pytest.MonkeyPatch.context() as patch:
        after = _phases(patch)
        execute("progressive", tmp_path / "run")
    assert after == {2: two, 3: two, 4: every, 5: every}


LONG: Tree = {"max_steps": 400, "epochs": 100, "save_steps": 20, "save_total_limit": 2}
SCRIPT = """
import json, sys
from pathlib import Path
from potstill.recipe.load import recipe_from
from potstill.runs.cache import Cache
from potstill.runs.steps import Run
folder = Path(sys.argv[1])
Run(recipe_from(json.loads(sys.argv[2])), folder, bars=False, cache=Cache(folder.parent / "cache")).execute()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "training"), [("stages", "distilled/second"), ("born_again", "generation-1"), ("joint", "distilled")]
)
def test_a_real_kill(tmp_path: Path, name: str, training: str) -> None:
    """SIGKILL while a training that is not the first is well on its way."""
    tree = {**BASE, **RECIPES[name], "train": {**SIX, **LONG}}

    def begun(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SCRIPT, str(folder), json.dumps(tree)]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)

    assert begun(tmp_path / "alone/run").wait(timeout=300) == 0
    process = begun(tmp_path / "killed/run")
    marker = tmp_path / f"killed/run/checkpoints/{training}/checkpoint-40/{MARKER}"
    while process.poll() is None and not marker.exists():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL, "it had ended by itself"
    assert begun(tmp_path / "killed/run").wait(timeout=300) == 0
    found, wanted = (Run(recipe_from(tree), tmp_path / where / "run", bars=False) for where in ("killed", "alone"))
    assert_equal(results(found), results(wanted))
    resumed = [event["resumed_from"] for event in found.folder.events() if event["event"] == "training"]
    assert any(resumed)
