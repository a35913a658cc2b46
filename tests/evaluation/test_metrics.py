"""Metrics with their intervals, from stored answers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from potstill.evaluation.calibration import expected_calibration_error, negative_log_likelihood
from potstill.evaluation.metrics import calibrate, compare, estimate
from potstill.evaluation.predict import Predictions
from potstill.tasks.classification import Classification


def predictions(answers, labels=None, classes=4):
    logits = np.full((len(answers), classes), -1.0, dtype=np.float32)
    logits[np.arange(len(answers)), answers] = 1.0
    ids = np.arange(len(answers), dtype=np.int64)
    return Predictions(logits, None if labels is None else np.asarray(labels, dtype=np.int64), ids)


@pytest.mark.parametrize("seed", range(20))
def test_f1_macro_is_that_of_scikit_learn(seed):
    """Also where classes are missing: from the labels, from the answers, from both, and with one class alone."""
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(1, 9))
    labels = rng.choice(rng.choice(9, classes, replace=False), 40)
    predicted = rng.choice(rng.choice(9, int(rng.integers(1, 9)), replace=False), 40)
    predicted = np.where(rng.random(40) < rng.random(), labels, predicted)
    found = Classification().metrics(predicted, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = f1_score(labels, predicted, average="macro", zero_division=0)
    assert found["f1_macro"] == pytest.approx(expected, abs=1e-12)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-12)


def test_f1_macro_by_hand():
    # class 0: 2 hits, 3 labels, 2 answers: 4/5; class 1: 1 hit, 1 label, 2 answers: 2/3; class 3: 0 of 1: 0
    found = Classification().metrics(np.array([0, 0, 1, 1, 0][:4]), np.array([0, 0, 0, 1]))
    assert found["f1_macro"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    missed = Classification().metrics(np.array([0, 3]), np.array([0, 1]))
    assert missed["f1_macro"] == pytest.approx(1 / 3)


def test_unlabelled_samples_count_in_no_metric():
    """−100 is a class to NumPy; counted as wrong it would lower every model's accuracy alike."""
    task = Classification()
    predicted, labels = np.array([0, 1, 1, 2]), np.array([0, -100, 1, -100])
    assert task.metrics(predicted, labels) == {"accuracy": 1.0, "f1_macro": 1.0}
    assert task.metrics(predicted, np.full(4, -100)) == {}
    assert task.chance(np.array([0, 0, 1, -100, -100, -100])) == pytest.approx(2 / 3)
    assert task.chance(np.full(3, -100)) == 0.0


def test_estimates_are_the_metrics_with_their_intervals():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    answers = np.where(rng.random(200) < 0.7, labels, rng.integers(0, 4, 200))
    found = estimate(Classification(), predictions(answers, labels), resamples=200)
    assert found["accuracy"][0] == pytest.approx(np.mean(answers == labels))
    assert found["f1_macro"][0] == pytest.approx(f1_score(labels, answers, average="macro"))
    for value, low, high in found.values():
        assert low < value < high
        assert high - low == pytest.approx(4 * np.sqrt(0.78 * 0.22 / 200), rel=0.3)


def test_estimates_leave_unlabelled_samples_out():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 100)
    answers = np.where(rng.random(100) < 0.7, labels, rng.integers(0, 4, 100))
    known = np.arange(100) % 3 != 0
    whole = estimate(Classification(), predictions(answers[known], labels[known]), resamples=100)
    partial = estimate(Classification(), predictions(answers, np.where(known, labels, -100)), resamples=100)
    assert partial == whole


def test_without_labels_there_are_no_figures():
    answers = np.array([0, 1, 2])
    task = Classification()
    assert estimate(task, predictions(answers), resamples=100) == {}
    assert estimate(task, predictions(answers, [-100] * 3), resamples=100) == {}
    assert compare(task, predictions(answers), predictions(answers), resamples=100) is None
    assert compare(task, predictions(answers, [-100] * 3), predictions(answers, [-100] * 3), resamples=100) is None


def test_compare_is_first_less_second_in_the_primary_metric():
    """The other way round every gain would be reported as a loss."""
    labels = np.arange(100) % 4
    worse = np.where(np.arange(100) < 30, (labels + 1) % 4, labels)
    better = np.where(np.arange(100) < 10, (labels + 1) % 4, labels)
    found = compare(Classification(), predictions(better, labels), predictions(worse, labels), resamples=200)
    assert found["value"] == pytest.approx(0.2)
    assert found["p"] < 0.01
    assert 0.1 < found["low"] < 0.2 < found["high"] < 0.3


def test_compare_uses_the_primary_metric_of_the_task():
    class F1(Classification):
        primary = "f1_macro"

    labels = np.array([0] * 90 + [1] * 10)
    first, second = np.array([0] * 90 + [1] * 5 + [0] * 5), np.zeros(100, dtype=int)
    expected = f1_score(labels, first, average="macro") - f1_score(labels, second, average="macro", zero_division=0)
    assert compare(F1(), predictions(first, labels), predictions(second, labels), resamples=100)["value"] == (
        pytest.approx(expected)
    )


def named(classes=4):
    task = Classification()
    task.label_names = [str(place) for place in range(classes)]
    return task


def test_a_comparison_counts_who_alone_is_right():
    labels = [0, 1, 2, 3, 0, 1, -100]
    first = predictions([0, 1, 2, 3, 1, 0, 0], labels)
    second = predictions([0, 0, 0, 0, 0, 0, 0], labels)
    found = compare(named(), first, second, resamples=100)
    assert (found["only_first"], found["only_second"]) == (3, 1)
    assert found["mcnemar"] == pytest.approx(0.625)  # 2 · (1 + 4) / 16, by hand
    assert found["value"] == pytest.approx(2 / 6)


def test_without_classes_no_answer_is_right_or_wrong():
    found = compare(named(5), predictions([0, 1], [0, 1]), predictions([0, 0], [0, 1]), resamples=100)
    assert "mcnemar" not in found
    assert calibrate(named(5), predictions([0, 1], [0, 1]), resamples=100) is None


def test_calibration_with_its_interval():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 4)).astype(np.float32) * 3
    labels = np.where(rng.random(400) < 0.7, logits.argmax(-1), rng.integers(0, 4, 400))
    labels[:5] = -100
    found = calibrate(named(), Predictions(logits, labels, np.arange(400)), resamples=200)
    value, low, high = found["ece"]
    assert value == pytest.approx(expected_calibration_error(logits, labels), abs=1e-12)
    assert low < value < high
    assert found["nll"] == pytest.approx(negative_log_likelihood(logits, labels))
    assert found["temperature"] > 1  # too sure


def test_no_calibration_without_labels():
    assert calibrate(named(), predictions([0, 1]), resamples=100) is None
    assert calibrate(named(), predictions([0, 1], [-100, -100]), resamples=100) is None
