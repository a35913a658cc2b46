"""The samples on which student and teacher differ most."""

from __future__ import annotations

import numpy as np
import pytest

from potstill.evaluation.examples import examples, most_different
from potstill.evaluation.fidelity import divergence
from potstill.evaluation.predict import Predictions


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 50)
    labels[7] = -100
    ids = np.arange(50, dtype=np.int64) + 100
    return {n: Predictions(rng.normal(size=(50, 3)).astype(np.float32), labels, ids) for n in ("big", "small", "alone")}


def test_the_most_different_come_first(answers):
    rows = most_different(answers["big"], answers["small"], count=5)
    apart = divergence(answers["big"].logits, answers["small"].logits)
    assert rows.tolist() == np.argsort(-apart)[:5].tolist()
    assert len(most_different(answers["big"], answers["small"], count=99)) == 50


def test_equal_divergence_keeps_the_order(answers):
    assert most_different(answers["big"], answers["big"], count=3).tolist() == [0, 1, 2]


def test_what_every_model_answered(answers):
    found = examples(np.array([7, 3]), answers, "big", "small")
    assert [each["sample_id"] for each in found] == [107, 103]
    assert found[0]["label"] is None
    assert found[1]["label"] == int(answers["big"].labels[3])
    assert list(found[0]["answers"]) == ["big", "small", "alone"]
    for name, given in found[1]["answers"].items():
        logits = answers[name].logits[3].astype(float)
        shares = np.exp(logits) / np.exp(logits).sum()
        assert given["answer"] == shares.argmax()
        assert given["confidence"] == pytest.approx(shares.max())
    assert found[1]["divergence"] == pytest.approx(divergence(answers["big"].logits, answers["small"].logits)[3])
