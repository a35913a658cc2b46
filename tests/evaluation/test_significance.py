"""Intervals that cover, tests that are calm under the null and awake under a real difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from potstill.evaluation.significance import bootstrap, mcnemar, mean_interval, paired_gain


def accuracy(predicted, labels):
    return float(np.mean(predicted == labels))


def named(predicted, labels):
    return {"accuracy": accuracy(predicted, labels), "errors": float(np.sum(predicted != labels))}


def answers(rng, labels, share):
    """Predictions that are right with the given probability, sample by sample."""
    return np.where(rng.random(len(labels)) < share, labels, 1 - labels)


def test_bootstrap_intervals_cover_the_truth():
    """A 95 % interval that covers in 80 % of the cases would call every second seed a discovery."""
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(100):
        labels = rng.integers(0, 2, 150)
        low, high = bootstrap(named, answers(rng, labels, 0.8), labels, resamples=200)["accuracy"]
        covered += low <= 0.8 <= high
        widths.append(high - low)
    assert 88 <= covered <= 100
    expected = 2 * 1.96 * math.sqrt(0.8 * 0.2 / 150)
    assert np.mean(widths) == pytest.approx(expected, rel=0.1)


def test_bootstrap_takes_prediction_and_label_of_the_same_sample():
    labels = np.arange(50)
    assert bootstrap(named, labels, labels, resamples=100) == {"accuracy": (1.0, 1.0), "errors": (0.0, 0.0)}


def test_bootstrap_is_the_same_every_time():
    """A report that is made again must show the same figures."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 60)
    predicted = answers(rng, labels, 0.7)
    state = np.random.get_state()[1].copy()
    assert bootstrap(named, predicted, labels, resamples=100) == bootstrap(named, predicted, labels, resamples=100)
    assert (np.random.get_state()[1] == state).all()


def test_percentiles_are_those_of_95_percent():
    """On the mean of many values the percentile interval is the normal one."""
    values = np.random.default_rng(2).normal(3.0, 2.0, 4000)

    def mean(predicted, labels):
        return {"mean": float(predicted.mean())}

    low, high = bootstrap(mean, values, values, resamples=2000)["mean"]
    half = 1.96 * values.std() / math.sqrt(4000)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_p_is_calm_under_the_null():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(100):
        labels = rng.integers(0, 2, 120)
        first, second = answers(rng, labels, 0.75), answers(rng, labels, 0.75)
        found.append(paired_gain(accuracy, first, second, labels, resamples=150)["p"])
    assert sum(p < 0.05 for p in found) <= 11  # 5 expected; more than 11 in one of 200 cases
    assert sum(p < 0.5 for p in found) >= 25


def test_p_is_small_under_a_real_difference():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 300)
    found = paired_gain(accuracy, answers(rng, labels, 0.9), answers(rng, labels, 0.7), labels, resamples=500)
    assert found["p"] == pytest.approx(1 / 501)
    assert found["low"] > 0.05
    assert found["low"] < found["value"] < found["high"]


def test_p_is_that_of_the_exact_test_on_the_pairs_that_differ():
    """For accuracy, swapping answers is McNemar's exact test: a binomial test on the discordant pairs."""
    labels = np.zeros(100, dtype=int)
    first, second = np.zeros(100, dtype=int), np.zeros(100, dtype=int)
    second[:14], first[14:20] = 1, 1  # 14 where only the first is right, 6 where only the second is
    exact = stats.binomtest(14, 20).pvalue
    found = paired_gain(accuracy, first, second, labels, resamples=4000)
    assert found["value"] == pytest.approx(0.08)
    assert found["p"] == pytest.approx(exact, abs=0.03)
    assert exact == pytest.approx(0.1153, abs=1e-4)


def test_a_model_against_itself():
    labels = np.arange(40) % 2
    predicted = np.zeros(40, dtype=int)
    assert paired_gain(accuracy, predicted, predicted, labels, resamples=50) == {
        "value": 0.0,
        "low": 0.0,
        "high": 0.0,
        "p": 1.0,
    }


def test_the_other_way_round_it_is_a_loss_with_the_same_p():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 80)
    first, second = answers(rng, labels, 0.85), answers(rng, labels, 0.7)
    gain = paired_gain(accuracy, first, second, labels, resamples=200)
    loss = paired_gain(accuracy, second, first, labels, resamples=200)
    assert gain["value"] > 0
    assert loss["p"] == gain["p"]
    assert [loss["value"], loss["low"], loss["high"]] == pytest.approx([-gain["value"], -gain["high"], -gain["low"]])


def test_pairing_removes_what_both_find_hard():
    """Two resamples drawn apart would hide a gain that every pair shows."""
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 2, 200)
    second = answers(rng, labels, 0.6)
    first = second.copy()
    first[np.flatnonzero(second != labels)[:10]] = labels[np.flatnonzero(second != labels)[:10]]
    found = paired_gain(accuracy, first, second, labels, resamples=300)
    unpaired = 1.96 * math.sqrt(2 * 0.6 * 0.4 / 200)
    assert found["high"] - found["low"] < unpaired
    assert found["low"] > 0


@pytest.mark.parametrize("shape", [(50, 3), (2, 2), (50, 3, 4)])
def test_answers_may_have_several_numbers_a_sample(shape):
    """Start and end of a span, or a class a token, are swapped together; with [2, 2] a wrong axis goes unnoticed."""
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 5, shape)

    def whole(predicted, labels):
        right = (predicted == labels).reshape(len(labels), -1)
        assert right.all(1).sum() + (~right).all(1).sum() == len(labels), "an answer was torn apart"
        return float(right.all(1).mean())

    wrong = labels + 1
    half = np.where((np.arange(shape[0]) % 2 == 0).reshape(-1, *[1] * (len(shape) - 1)), labels, wrong)
    found = paired_gain(whole, labels, half, labels, resamples=100)
    assert found["value"] == pytest.approx(0.5)


def test_mean_interval_by_hand():
    found = mean_interval([1.0, 2.0, 3.0])  # s = 1, t(0.975; 2) = 4.302653
    half = 4.302653 / math.sqrt(3)
    assert found == pytest.approx({"value": 2.0, "low": 2 - half, "high": 2 + half, "n": 3.0}, abs=1e-5)


def test_mean_interval_of_one_run_has_no_ends():
    """An interval of width 0 would say that one seed is certain."""
    found = mean_interval([0.9])
    assert found["value"] == 0.9
    assert found["n"] == 1
    assert math.isnan(found["low"])
    assert math.isnan(found["high"])


def test_mean_interval_covers():
    rng = np.random.default_rng(8)
    covered = sum(
        found["low"] <= 5 <= found["high"] for found in (mean_interval(list(rng.normal(5, 2, 4))) for _ in range(400))
    )
    assert 365 <= covered <= 395


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (1, 0, 1.0), (8, 0, 2 / 256), (0, 8, 2 / 256), (9, 2, 2 * (1 + 11 + 55) / 2048)],
)
def test_mcnemar_by_hand(first, second, p):
    assert mcnemar(first, second) == pytest.approx(p)


def test_mcnemar_of_hintons_table():
    """146 errors against 74: were the 74 all among the 146, the difference would be beyond doubt."""
    assert mcnemar(72, 0) < 1e-20
    assert mcnemar(100, 28) < 1e-9
