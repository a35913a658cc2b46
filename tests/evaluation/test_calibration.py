"""Calibration figures against numbers worked out by hand and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from potstill.evaluation.calibration import (
    expected_calibration_error,
    fitted_temperature,
    negative_log_likelihood,
    reliability,
)

NONE = np.full(3, -100)


def drawn(n: int = 2000, classes: int = 4, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax at ``temperature`` is the true distribution of the labels."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((n, classes))
    gumbel = rng.gumbel(size=(n, classes))
    return (temperature * logits).astype(np.float32), (logits + gumbel).argmax(-1)


def of_probabilities(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows))


class TestReliability:
    def test_by_hand(self) -> None:
        logits = of_probabilities([0.55, 0.45], [0.45, 0.55], [0.9, 0.1], [0.05, 0.95])
        found = reliability(logits, np.array([0, 0, 0, 1]), bins=4)
        assert found.count.tolist() == [0, 0, 2, 2]
        np.testing.assert_allclose(found.confidence[2:], [0.55, 0.925])
        np.testing.assert_allclose(found.accuracy[2:], [0.5, 1.0])
        assert np.isnan(found.accuracy[:2]).all()
        assert expected_calibration_error(logits, np.array([0, 0, 0, 1]), bins=4) == pytest.approx(
            (0.05 * 2 + 0.075 * 2) / 4
        )

    def test_as_scikit_learn(self) -> None:
        logits, labels = drawn()
        confidence = special.softmax(logits.astype(np.float64), -1).max(-1)
        accuracy, mean = calibration_curve(logits.argmax(-1) == labels, confidence, n_bins=15)
        found = reliability(logits, labels)
        full = found.count > 0
        np.testing.assert_allclose(found.accuracy[full], accuracy)
        np.testing.assert_allclose(found.confidence[full], mean)

    def test_calibrated_and_not(self) -> None:
        assert expected_calibration_error(*drawn(n=20_000)) < 0.015
        assert expected_calibration_error(*drawn(temperature=5.0)) > 0.15

    def test_a_certain_answer_is_in_the_last_bin(self) -> None:
        found = reliability(np.array([[1e4, 0.0], [-1e4, 1e4]]), np.array([0, 0]))
        assert found.count[-1] == found.count.sum() == 2
        assert found.accuracy[-1] == 0.5
        assert found.confidence[-1] == 1.0


class TestLikelihood:
    def test_as_scikit_learn(self) -> None:
        logits, labels = drawn()
        assert negative_log_likelihood(logits, labels) == pytest.approx(
            log_loss(labels, special.softmax(logits.astype(np.float64), -1)), rel=1e-9
        )

    def test_huge_logits_stay_finite(self) -> None:
        logits = np.array([[1e6, 0.0], [0.0, 1e6]], dtype=np.float32)
        assert negative_log_likelihood(logits, np.array([0, 0])) == pytest.approx(5e5)
        assert math.isfinite(fitted_temperature(logits, np.array([0, 0])))

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_the_temperature_is_found(self, temperature: float) -> None:
        assert fitted_temperature(*drawn(n=20_000, temperature=temperature)) == pytest.approx(temperature, rel=0.05)

    def test_all_right_stays_in_bounds(self) -> None:
        assert 0 < fitted_temperature(np.eye(3), np.arange(3)) < 0.1


class TestLabels:
    def test_unknown_ones_are_left_out(self) -> None:
        logits, labels = drawn(100)
        more = np.concatenate([logits, np.ones((7, 4), np.float32)])
        with_unknown = np.concatenate([labels, np.full(7, -100)])
        for figure in (expected_calibration_error, negative_log_likelihood, fitted_temperature):
            assert figure(more, with_unknown) == figure(logits, labels)

    def test_none_at_all(self) -> None:
        for figure in (expected_calibration_error, negative_log_likelihood, fitted_temperature):
            assert math.isnan(figure(np.eye(3), NONE))
        assert reliability(np.eye(3), NONE).count.sum() == 0
