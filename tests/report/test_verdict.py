"""The verdict claims what was measured, no more: one test a branch."""

from __future__ import annotations

from pathlib import Path

import pytest

from potstill.report import words
from potstill.report.run import load_seeds
from potstill.report.verdict import headlines, standing, verdict, verdict_of_seeds
from potstill.runs.metrics import Estimate, Gain, RunMetrics
from tests.report import made


def said(found: RunMetrics) -> str:
    return verdict(found).replace("\u00a0", " ")


class TestStanding:
    @pytest.mark.parametrize(
        ("gain", "expected"),
        [
            (Gain(value=0.02, low=0.01, high=0.03, p=0.01), "better"),
            (Gain(value=-0.02, low=-0.03, high=-0.01, p=0.01), "worse"),
            (Gain(value=0.02, low=-0.01, high=0.05, p=0.2), "unclear"),
            (Gain(value=0.02, low=0.001, high=0.04, p=0.06), "unclear"),
            (Gain(value=0.02, low=0.0, high=0.04, p=0.04), "unclear"),
            (Gain(value=0.02), "unknown"),
            (Estimate(value=0.02, low=0.01, high=0.03), "better"),
            (Estimate(value=0.02), "unknown"),
        ],
    )
    def test_interval_and_test_must_agree(self, gain: Estimate, expected: str) -> None:
        assert standing(gain) == expected


class TestOneRun:
    def test_better(self) -> None:
        assert said(made.metrics()) == (
            "The distilled student is better than the same student trained without a teacher on these 400 test samples "
            "(+3.00 points of accuracy, 95 % interval +1.00 to +5.00, p = 0.004); it keeps 96.8 % of the teacher's "
            "accuracy, is 10.0× smaller and is 10.0× faster; this is a single seed, and another may differ."
        )

    def test_worse(self) -> None:
        found = said(made.metrics(gain=Gain(value=-0.03, low=-0.05, high=-0.01, p=0.0005)))
        assert found.startswith("The distilled student is worse than the same student trained without a teacher")
        assert "(−3.00 points of accuracy, 95 % interval −5.00 to −1.00, p < 0.001)" in found

    def test_not_clearly_different(self) -> None:
        found = said(made.metrics(gain=Gain(value=0.01, low=-0.01, high=0.03, p=0.3)))
        assert found.startswith("The distilled student is not clearly different from the same student")

    def test_no_interval(self) -> None:
        found = said(made.metrics(gain=Gain(value=0.01)))
        assert found.startswith("Whether the distilled student beats")
        assert "nan" not in found.lower()

    def test_no_baseline(self) -> None:
        found = said(made.metrics(gain=None))
        assert found.startswith("No gain can be claimed, for no baseline was trained; it keeps 96.8 %")
        assert "seed" not in found

    def test_no_labels(self) -> None:
        found = said(made.without_labels())
        assert found.startswith("The test split has no labels, so nothing can be said of how good the student is")
        assert "it answers as the teacher on 95.0 % of the samples" in found

    def test_another_split(self) -> None:
        assert "on the validation split" in said(made.metrics(split="validation"))

    def test_a_teacher_worse_than_chance(self) -> None:
        assert "not clearly better than the best constant guess" in said(made.metrics(chance=0.95))

    def test_a_teacher_worse_than_the_baseline(self) -> None:
        models = {**made.metrics().models, "teacher": made.model("teacher", 0.8)}
        assert "but the teacher itself scores no higher than the baseline" in said(made.metrics(models=models))

    def test_several_teachers_and_no_saving(self) -> None:
        models = {"large": made.model("teacher"), "small": made.model("teacher")}
        models["distilled"] = made.model("student", bytes=260_000, latency_ms={"1": 6.0})
        found = said(made.metrics(models=models))
        assert "the first teacher's (large) accuracy, is as large and is 2.0× slower" in found

    def test_no_teacher_and_no_latency(self) -> None:
        models = {"baseline": made.model("baseline"), "distilled": made.model("student", latency_ms={})}
        assert "faster" not in said(made.metrics(models=models, retention=None))

    def test_a_metric_that_is_no_share(self) -> None:
        models = {
            name: made.model(role, metrics={"bleu": Estimate(value=31.2, low=30.0, high=32.4)})
            for name, role in made.ROLES.items()
        }
        gain = Gain(value=1.25, low=0.5, high=2.0, p=0.01)
        found = said(made.metrics(primary="bleu", models=models, gain=gain))
        assert "(+1.25 of bleu, 95 % interval +0.5 to +2, p = 0.010)" in found

    def test_headlines(self) -> None:
        assert [one.figure.replace("\u00a0", " ") for one in headlines(made.metrics())] == [
            "+3.00 points",
            "96.8 %",
            "10.0× smaller",
            "10.0× faster",
        ]
        assert [one.name for one in headlines(made.without_labels())] == ["on disk", "batch of 1"]


class TestSeveralSeeds:
    def test_a_gain(self, tmp_path: Path) -> None:
        found = verdict_of_seeds(load_seeds(made.seeds(tmp_path))).replace("\u00a0", " ")
        assert found.startswith(
            "The distilled student is better than the same student trained without a teacher over 3 seeds "
            "(+3.00 points, 95 % t-interval +0.52 to +5.48; 3 of 3 runs show a gain by themselves)"
        )
        assert "single seed" not in found

    def test_a_single_one(self, tmp_path: Path) -> None:
        found = verdict_of_seeds(load_seeds(made.seeds(tmp_path, (0.02,))))
        assert found.startswith("Whether the distilled student beats")

    def test_no_baseline(self, tmp_path: Path) -> None:
        found = verdict_of_seeds(load_seeds(made.seeds(tmp_path, baseline=False)))
        assert found.startswith("No gain can be claimed over 3 seeds, for there is no baseline")


def test_a_narrow_interval_shows_more_digits():
    """99.3 and 99.3 per cent of 10,000 samples can be ten errors apart."""
    narrow, wide = Estimate(value=0.9927, low=0.991, high=0.9943), Estimate(value=0.9927, low=0.95, high=1.0)
    assert words.level(narrow, share=True) == "99.27\u00a0%"
    assert words.interval(narrow, share=True) == "99.10 to 99.43"
    assert words.level(wide, share=True) == "99.3\u00a0%"
    assert words.level(Estimate(value=0.9927), share=True) == "99.3\u00a0%"
