"""``potstill cache``: answers ahead of the training, what they take, and the list of what is kept."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from potstill.runs.steps import Run
from tests.cli.saying import Command, refused

ROWS = 105
NOISY = ("train.epochs=4", "train.augment=[noise]")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def kinds(cache: Path) -> list[str]:
    return sorted(path.parent.name for path in cache.glob("*/*") if path.is_dir())


@pytest.mark.parametrize("verb", [("cache",), ("cache", "fill")])
def test_a_recipe_is_filled_and_distilled_without_its_teacher(
    potstill: Command, recipe: Path, cache: Path, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (*NOISY, "train.views=2", "--output", "run", "--quiet")
    said = potstill(*verb, str(recipe), *changes)
    assert (said.status, said.out, said.err) == (0, f"teacher: {2 * ROWS} answers made, 0 were there\n", "")
    assert kinds(cache) == ["signals", "teachers"]
    again = potstill(*verb, str(recipe), *changes)
    assert again.out == f"teacher: 0 answers made, {2 * ROWS} were there\n"
    monkeypatch.setattr(Run, "live_teacher", lambda self, name: pytest.fail("the teacher was loaded"))
    assert potstill("distill", str(recipe), *changes).status == 0
    events = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "cache"]
    assert (event["found"], event["made"], event["teacher"]) == (4 * ROWS, 0, "teacher")
    assert len([event for event in events if event["event"] == "begin" and event["step"] == "teacher"]) == 1


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_plan_keeps_nothing(potstill: Command, recipe: Path, cache: Path, place: str) -> None:
    arguments = ["--plan", str(recipe)] if place == "before" else [str(recipe), "--plan"]
    said = potstill("cache", *arguments, *NOISY, "train.views=8")
    assert (said.status, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0].startswith(f"cache of teacher: {ROWS} samples × 8 views × 48 bytes = 0.0 MiB, about ")
    assert re.fullmatch(
        rf"  in {re.escape(str(cache))}/signals: [\d,]+ MiB free, the cache's limit is .* MiB", lines[1]
    )
    assert [path.name for path in recipe.parent.iterdir()] == ["flowers.yaml"]


@pytest.mark.parametrize("options", [(), ("--plan",)])
def test_endless_views_are_refused_before_a_teacher_is_trained(
    potstill: Command, recipe: Path, cache: Path, options: tuple[str, ...]
) -> None:
    said = potstill("cache", str(recipe), *NOISY, *options)
    refused(said, "each epoch shows new random views; say how many there are, as in `train: {views: 8}`")
    assert [path.name for path in recipe.parent.iterdir()] == ["flowers.yaml"]


@pytest.mark.parametrize("verb", ["distill", "check"])
def test_a_run_of_endless_views_is_refused_before_a_teacher_is_trained(
    potstill: Command, recipe: Path, cache: Path, verb: str
) -> None:
    changes = [*NOISY, "teacher.cache={precision: fp16}", *(["--output", "run"] if verb == "distill" else [])]
    refused(potstill(verb, str(recipe), *changes, *(["--quiet"] if verb == "distill" else [])), "`train: {views: 8}`")
    assert kinds(cache) == []
    assert not list(recipe.parent.glob("run/models/*"))


def test_without_a_teacher(potstill: Command, recipe: Path) -> None:
    for options in ((), ("--plan",)):
        said = potstill("cache", str(recipe), "teacher=", "objective.soft=", *options)
        refused(said, "the recipe has no teacher, so there is nothing to cache")


def test_no_such_recipe(potstill: Command) -> None:
    refused(potstill("cache", "digit"), "there is no recipe 'digit'", "did you mean 'digits'?")
    assert "fill" in potstill("cache", "--help").out


def test_too_little_room(potstill: Command, recipe: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_CACHE_LIMIT", "2000")
    refused(potstill("cache", str(recipe), "--quiet"), "POTSTILL_CACHE_LIMIT", "`precision: fp16` and `top_k`")
    smaller = potstill("cache", str(recipe), "teacher.cache={precision: fp16}", "--quiet")
    assert smaller.status == 2  # a slot of 32 bytes for each of 105 samples is too much alone


def test_what_is_kept_is_listed_and_cleared(potstill: Command, recipe: Path, cache: Path) -> None:
    assert potstill("cache", str(recipe), "--quiet").status == 0
    listed = potstill("cache", "list").out.splitlines()
    assert sorted(line.split()[0] for line in listed[:-1]) == ["signals", "teachers"]
    assert listed[-1].startswith("2 entries, ")
    (line,) = [line for line in listed if line.startswith("signals")]
    assert re.fullmatch(r"signals +[0-9a-f]{32} +0\.\d\d MiB  used \d{4}-\d\d-\d\d \d\d:\d\d", line)
    freed = potstill("cache", "clear", "signals")
    assert re.fullmatch(r"freed 0\.\d\d MiB\n", freed.out)
    assert kinds(cache) == ["teachers"]
    refused(potstill("cache", "clear", "signal"), "the cache holds no 'signal'; did you mean 'signals'?")


@pytest.mark.slow
def test_two_processes_share_the_work(potstill: Command, recipe: Path, cache: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "potstill", "cache", str(recipe), "--output", "run", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    said = f"teacher: {ROWS} answers made, 0 were there\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr[-3000:]
    assert len(list(cache.glob("signals/*/data-*.bin"))) == 2  # each process has written
    again = potstill("cache", str(recipe), "--output", "run", "--quiet")
    assert again.out == f"teacher: 0 answers made, {ROWS} were there\n"


def test_ctrl_c_says_how_to_go_on(potstill: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("potstill.runs.filling.fill", stops)
    said = potstill("cache", str(recipe), "--quiet")
    assert (said.status, said.out, said.err) == (130, "", "stopped; the same command goes on where it was\n")
