"""Several seeds of one recipe: what is run where, and what the summary says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from potstill.errors import RunError
from potstill.experiments.seeds import SeedSummary, run_seeds, seed_overrides, summarise
from potstill.runs.metrics import Estimate, ModelMetrics, RunMetrics

FIGURES = {0: (0.95, 0.80, 0.85), 1: (0.96, 0.82, 0.90), 2: (0.94, 0.78, 0.83), 7: (0.95, 0.84, 0.88)}


def finished(seed: int, folder: Path, baseline: bool = True) -> None:
    """Write the metrics of a finished run."""
    teacher, plain, distilled = FIGURES[seed]
    values = {"teacher": teacher, "distilled": distilled} | ({"baseline": plain} if baseline else {})
    roles = {"teacher": "teacher", "distilled": "student", "baseline": "baseline"}
    models = {
        name: ModelMetrics(
            role=roles[name],
            metrics={"accuracy": Estimate(value=value), "f1_macro": Estimate(value=0.0)},
            parameters=1,
            bytes=1,
        )
        for name, value in values.items()
    }
    metrics = RunMetrics(recipe="digits", seed=seed, primary="accuracy", samples=9, models=models)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(metrics.model_dump_json())


class Runner:
    """Stands for the real run and writes down what it was asked."""

    def __init__(self, baseline: bool = True) -> None:
        self.asked: list[tuple[int, str]] = []
        self.baseline = baseline

    def __call__(self, seed: int, folder: str) -> None:
        self.asked.append((seed, folder))
        finished(seed, Path(folder), self.baseline)


def test_each_seed_has_its_folder(tmp_path):
    runner = Runner()
    summary, folder = run_seeds("digits", 0, 3, str(tmp_path / "out"), runner, {})
    assert folder == tmp_path / "out"
    assert runner.asked == [(seed, str(tmp_path / "out" / f"seed-{seed}")) for seed in (0, 1, 2)]
    assert summary.seeds == [0, 1, 2]
    runner = Runner()
    run_seeds("digits", 7, 1, str(tmp_path / "other"), runner, {})
    assert [seed for seed, _ in runner.asked] == [7]


def test_the_summary_is_written(tmp_path):
    summary, folder = run_seeds("digits", 0, 3, str(tmp_path), Runner(), {})
    written = json.loads((folder / "summary.json").read_text())
    assert SeedSummary.model_validate(written) == summary
    assert summary.recipe == "digits"
    assert summary.primary == "accuracy"
    assert summary.values == {
        "teacher": [0.95, 0.96, 0.94],
        "distilled": [0.85, 0.90, 0.83],
        "baseline": [0.80, 0.82, 0.78],
    }


def test_the_default_folder_tells_recipes_apart(tmp_path, monkeypatch):
    """Two variants of a recipe in one folder would be averaged as if they were seeds of one."""
    monkeypatch.chdir(tmp_path)
    first = run_seeds("digits", 0, 1, None, Runner(), {"train": {"epochs": 3}})[1]
    second = run_seeds("digits", 0, 1, None, Runner(), {"train": {"epochs": 4}})[1]
    again = run_seeds("digits", 0, 1, None, Runner(), {"train": {"epochs": 3}})[1]
    assert first == again != second
    assert first.parent == Path("runs")
    assert first.name.startswith("digits-")
    assert first.name.endswith("-seeds")


def test_mean_and_t_interval_by_hand(tmp_path):
    for seed in (0, 1, 2):
        finished(seed, tmp_path / str(seed))
    summary = summarise([tmp_path / str(seed) for seed in (0, 1, 2)])
    half = 4.302653 * 0.02 / math.sqrt(3)  # the baseline: mean 0.80, s = 0.02, t(0.975; 2)
    found = summary.models["baseline"]
    assert [found.value, found.low, found.high] == pytest.approx([0.80, 0.80 - half, 0.80 + half], abs=1e-6)


def test_the_gain_is_paired_by_seed(tmp_path):
    """The seeds' own spread cancels out; unpaired, this gain of three seeds would not show."""
    for seed in (0, 1, 2):
        finished(seed, tmp_path / str(seed))
    gain = summarise([tmp_path / str(seed) for seed in (0, 1, 2)]).gain
    differences = [0.05, 0.08, 0.05]
    mean = sum(differences) / 3
    deviation = math.sqrt(sum((each - mean) ** 2 for each in differences) / 2)
    half = 4.302653 * deviation / math.sqrt(3)
    assert [gain.value, gain.low, gain.high] == pytest.approx([mean, mean - half, mean + half], abs=1e-6)


def test_without_a_baseline_there_is_no_gain(tmp_path):
    summary, _ = run_seeds("digits", 0, 2, str(tmp_path), Runner(baseline=False), {})
    assert summary.gain is None
    assert set(summary.models) == {"teacher", "distilled"}


def test_one_seed_has_no_interval(tmp_path):
    summary, folder = run_seeds("digits", 7, 1, str(tmp_path), Runner(), {})
    assert summary.models["distilled"].value == 0.88
    assert math.isnan(summary.models["distilled"].low)
    assert json.loads((folder / "summary.json").read_text())["gain"] == {
        "value": pytest.approx(0.04),
        "low": None,
        "high": None,
    }


def test_only_the_seed_changes():
    """The split must stay the same: else the spread is that of the split as well."""
    assert seed_overrides(4) == ["seed=4"]


def test_the_folder_of_a_single_run_is_not_filled_with_others(tmp_path: Path) -> None:
    (tmp_path / "recipe.resolved.yaml").write_text("name: one\n")
    with pytest.raises(RunError, match="single run"):
        run_seeds("one", 0, 2, str(tmp_path), lambda *_: pytest.fail("a run began"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.resolved.yaml"]
