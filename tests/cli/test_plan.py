"""``potstill plan``: what it says of every kind of recipe, and that it keeps nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.saying import Command, refused

FLIPPED = "train.augment=[noise]"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def steps(out: str) -> dict[str, float]:
    """The times of a step, in milliseconds."""
    return {name.strip(): float(time) for name, time in re.findall(r"^step, (.+?) +([\d.]+) ms", out, re.MULTILINE)}


def test_a_recipe(potstill: Command, recipe: Path, cache: Path) -> None:
    said = potstill("plan", "flowers.yaml", "train.epochs=3")
    assert (said.status, said.err) == (0, "")
    lines = said.out.splitlines()
    assert re.fullmatch(r"on \w+, \d+ threads?, in fp32", lines[0])
    assert list(steps(said.out)) == ["student alone", "with its teacher", "with cached answers"]
    assert re.search(r"^step, student alone .* 1\.00 times the student alone$", said.out, re.MULTILINE)
    assert re.search(r"^training of the student \(teacher cached\): 12 steps, about \d+ s$", said.out, re.MULTILINE)
    assert re.search(
        r"^memory at the largest batch: .*\(student .*optimizer .*teachers .*data ", said.out, re.MULTILINE
    )
    for name in ("train.precision=medium", "train.precision=bf16", "train.optimizer=adamw_torch_fused"):
        assert re.search(rf"^(no )?faster: {name} ", said.out, re.MULTILINE), name
    assert "cache of teacher: 105 samples × 48 bytes = 0.0 MiB, about " in said.out
    assert f"in {cache / 'signals'}: " in said.out
    assert [path.name for path in recipe.parent.iterdir()] == ["flowers.yaml"]


def test_one_epoch_is_not_worth_a_cache(potstill: Command, recipe: Path) -> None:
    said = potstill("plan", str(recipe))
    assert "training of the student (teacher live): 4 steps" in said.out
    assert "cache of teacher: " in said.out
    assert "teacher.cache=true" not in said.out


def test_views(potstill: Command, recipe: Path) -> None:
    views = potstill("plan", str(recipe), "train.epochs=9", FLIPPED, "train.views=3").out
    assert "cache of teacher: 105 samples × 3 views × 48 bytes" in views
    endless = potstill("plan", str(recipe), "train.epochs=9", FLIPPED).out
    assert "cache of" not in endless
    assert "(teacher live)" in endless
    refused(
        potstill("plan", str(recipe), FLIPPED, "teacher.cache=true"),
        "the teacher 'teacher' cannot be cached: each epoch shows new random views",
        "train: {views: 8}",
    )


def test_a_cache_over_the_limit(potstill: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_CACHE_LIMIT", "1000")
    out = potstill("plan", str(recipe), "train.epochs=3").out
    assert "that is over the limit: set POTSTILL_CACHE_LIMIT" in out


def test_without_a_teacher(potstill: Command, recipe: Path) -> None:
    said = potstill("plan", str(recipe), "teacher=", "objective.soft=")
    assert (said.status, said.err) == (0, "")
    assert list(steps(said.out)) == ["student alone"]
    assert "training of the student: 4 steps" in said.out
    assert "cache" not in said.out


def test_where_the_time_goes(potstill: Command, recipe: Path, tmp_path: Path) -> None:
    trace = tmp_path / "traces/trace.json"
    said = potstill("plan", str(recipe), "train.epochs=3", "--profile", str(trace), "--steps", "12")
    assert said.status == 0
    _, _, profile = said.out.partition("profile: ")
    assert re.match(r"6 steps of [\d.]+ ms\n", profile)
    names = re.findall(r"^  (\w+) +[\d.]+ ms +[\d.]+ %$", profile, re.MULTILINE)
    assert sorted(names) == sorted(["data", "teacher", "student", "loss", "gradients", "optimizer", "trainer"])
    shares = [float(share) for share in re.findall(r"([\d.]+) %$", profile, re.MULTILINE)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert shares == sorted(shares, reverse=True)
    assert f"trace: {trace} " in profile
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    refused(potstill("plan", str(recipe), "--profile", str(trace), "--steps", "5"), "--steps")


def test_mistakes(potstill: Command, recipe: Path) -> None:
    refused(potstill("plan", str(recipe), "train.precison=bf16"), "did you mean 'precision'?")
    both = ("train.precision=bf16", "train.bf16=true")
    for verb in ("plan", "check", "distill"):
        refused(potstill(verb, str(recipe), *both), "train.precision: expected one precision, got bf16")
