"""Several teachers as one: means, weights by confidence, one of them at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from potstill.errors import ComponentError, SignalError
from potstill.interfaces import IGNORED
from potstill.registry import teacher_sources
from potstill.teachers.context import SourceContext
from potstill.teachers.ensemble import Ensemble, confidence, ensemble

RNG = np.random.default_rng(0)
LOGITS = {name: RNG.normal(size=(5, 4)).astype(np.float32) * 3 for name in ("a", "b", "c")}
HIDDEN = {name: RNG.normal(size=(5, 2, 6)).astype(np.float32) for name in ("a", "b", "c")}
BATCH = {"sample_id": torch.arange(5), "labels": torch.tensor([0, 3, IGNORED, 2, 1])}


class Teacher:
    """Says what it is told to, and remembers what it was asked for."""

    def __init__(self, name: str, **changes: object) -> None:
        self.said = {"logits": torch.tensor(LOGITS[name]), "hidden.6": torch.tensor(HIDDEN[name]), **changes}
        self.calls = 0
        self.wanted: list[object] = []

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, object]:
        self.calls += 1
        return self.said

    def narrow(self, names: object) -> None:
        self.wanted.append(names)


def made(**options: object) -> Ensemble:
    teachers = {name: Teacher(name) for name in LOGITS}
    return ensemble(SourceContext("all", teachers), of=["a", "b", "c"], **options)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class TestMeans:
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_its_probabilities_are_the_weighted_mean_of_theirs(self, temperature):
        source = made(weights=[1, 2, 5], temperature=temperature)
        said = source(BATCH)
        expected = sum(w * softmax(LOGITS[n] / temperature) for w, n in zip([1, 2, 5], "abc", strict=True)) / 8
        np.testing.assert_allclose(softmax(said["logits"].numpy() / temperature), expected, rtol=1e-5)
        hidden = sum(w * HIDDEN[n] for w, n in zip([1, 2, 5], "abc", strict=True)) / 8
        np.testing.assert_allclose(said["hidden.6"].numpy(), hidden, atol=1e-6)

    def test_its_logits_are_the_mean_of_theirs(self):
        expected = (LOGITS["a"] + LOGITS["b"] + LOGITS["c"]) / 3
        np.testing.assert_allclose(made(by="logits")(BATCH)["logits"].numpy(), expected, atol=1e-6)
        assert not np.allclose(softmax(expected), softmax(made()(BATCH)["logits"].numpy()), atol=1e-2)

    def test_logits_of_minus_infinity_and_of_texts(self):
        masked = torch.tensor(LOGITS["a"]).reshape(5, 1, 4).clone()
        masked[0, 0, 1] = -torch.inf
        other = masked.clone() + 1
        source = Ensemble({"a": lambda batch: {"logits": masked}, "b": lambda batch: {"logits": other}})
        said = source(BATCH)["logits"]
        assert said.shape == (5, 1, 4)
        torch.testing.assert_close(said.softmax(-1), masked.softmax(-1))

    def test_they_are_float32_and_cut_from_the_graph(self):
        logits = torch.tensor(LOGITS["a"], requires_grad=True)
        source = Ensemble({"a": lambda batch: {"logits": logits.bfloat16()}, "b": lambda batch: {"logits": logits}})
        with torch.autocast("cpu", torch.bfloat16):
            said = source(BATCH)["logits"]
        assert said.dtype == torch.float32
        assert not said.requires_grad


class TestConfidence:
    def test_the_weights_are_those_of_the_paper(self):
        labels = [0, 3, 2, 1]
        rows = [0, 1, 3, 4]
        losses = np.array(
            [[-np.log(softmax(LOGITS[n])[r, y]) for r, y in zip(rows, labels, strict=True)] for n in "abc"]
        )
        expected = (1 - np.exp(losses) / np.exp(losses).sum(0)) / 2
        found = confidence([torch.tensor(LOGITS[n]) for n in "abc"], BATCH["labels"]).numpy()
        np.testing.assert_allclose(found[:, rows], expected, rtol=1e-4)
        np.testing.assert_allclose(found.sum(0), 1, rtol=1e-6)
        np.testing.assert_allclose(found[:, 2], 1 / 3, rtol=1e-6)  # without a label
        mean = sum(w[:, None] * softmax(LOGITS[n]) for w, n in zip(found, "abc", strict=True))
        said = made(by="confidence")(BATCH)
        np.testing.assert_allclose(softmax(said["logits"].numpy()), mean, rtol=1e-4)
        hidden = sum(w[:, None, None] * HIDDEN[n] for w, n in zip(found, "abc", strict=True))
        np.testing.assert_allclose(said["hidden.6"].numpy(), hidden, atol=1e-5)

    def test_soft_labels_and_positions(self):
        logits = [torch.tensor(LOGITS[n]) for n in "abc"]
        labels = torch.tensor([0, 3, 1, 2, 1])
        hard = confidence(logits, labels)
        torch.testing.assert_close(confidence(logits, torch.nn.functional.one_hot(labels, 4).float()), hard)
        texts = confidence([each.reshape(1, 5, 4) for each in logits], labels.reshape(1, 5))
        torch.testing.assert_close(texts, hard.reshape(3, 1, 5))

    def test_one_teacher_counts_whole(self):
        source = ensemble(SourceContext("all", {"a": Teacher("a")}), of=["a"], by="confidence")
        np.testing.assert_allclose(softmax(source(BATCH)["logits"].numpy()), softmax(LOGITS["a"]), rtol=1e-5)

    def test_logits_are_asked_for_where_only_a_feature_is_wanted(self):
        source = made(by="confidence")
        whole = source(BATCH)
        source.narrow(["hidden.6"])
        said = source(BATCH)
        assert torch.equal(said["hidden.6"], whole["hidden.6"])
        assert "logits" in source.teachers["a"].wanted[0]

    def test_without_labels_it_cannot_weigh(self):
        with pytest.raises(SignalError, match="lacks labels in the batch"):
            made(by="confidence")({"sample_id": torch.arange(5)})
        with pytest.raises(SignalError, match=r"expected labels \[5\] for logits \[5, 4\], got \[4\]"):
            made(by="confidence")({"labels": torch.zeros(4, dtype=torch.long)})


class TestRandom:
    def drawn(self, source: Ensemble, *ids: int, **entries: Tensor) -> str:
        before = {name: teacher.calls for name, teacher in source.teachers.items()}
        said = source({"sample_id": torch.tensor(ids), **entries})
        (asked,) = [name for name, teacher in source.teachers.items() if teacher.calls > before[name]]
        assert torch.equal(said["logits"], source.teachers[asked].said["logits"])
        assert torch.equal(said["hidden.6"], source.teachers[asked].said["hidden.6"])
        return asked

    def test_one_is_asked_and_the_samples_decide_which(self):
        """A draw from a global generator would be another one after a restart."""
        source = made(by="random")
        found = [self.drawn(source, i, i + 1) for i in range(200)]
        torch.manual_seed(7)
        again = [self.drawn(made(by="random"), i, i + 1) for i in range(200)]
        assert found == again
        assert found != [self.drawn(made(by="random", seed=1), i, i + 1) for i in range(200)]
        assert found != [self.drawn(source, i, i + 1, view=torch.ones(2, dtype=torch.long)) for i in range(200)]
        assert all(45 < found.count(name) < 90 for name in "abc")

    def test_the_seed_is_the_runs_where_none_is_given(self):
        teachers = {name: Teacher(name) for name in LOGITS}
        run = ensemble(SourceContext("all", teachers, seed=1), of=["a", "b", "c"], by="random")
        own = made(by="random", seed=1)
        assert [self.drawn(run, i) for i in range(50)] == [self.drawn(own, i) for i in range(50)]

    def test_weights_are_how_often(self):
        source = made(by="random", weights=[8, 1, 1])
        found = [self.drawn(source, i) for i in range(300)]
        assert 210 < found.count("a") < 270

    def test_without_sample_ids(self):
        with pytest.raises(SignalError, match="lacks `sample_id`"):
            made(by="random")({"labels": BATCH["labels"]})


class TestSignals:
    def test_what_is_wanted_is_asked_for_and_no_more_afterwards(self):
        source = made()
        source.narrow(["logits"])
        assert set(source(BATCH)) == {"logits"}
        assert source.teachers["b"].wanted == [["logits"], None]
        source.narrow(None)
        assert set(source(BATCH)) == {"logits", "hidden.6"}

    def test_a_signal_that_one_lacks(self):
        teachers = {"a": Teacher("a", extra=torch.ones(5)), "b": Teacher("b")}
        source = Ensemble(teachers, name="all")
        assert set(source(BATCH)) == {"logits", "hidden.6"}
        source.narrow(["extra"])
        with pytest.raises(SignalError, match="'all' was asked for 'extra', which its teacher 'b' does not give"):
            source(BATCH)

    def test_shapes_that_differ(self):
        teachers = {"a": Teacher("a"), "b": Teacher("b", logits=torch.zeros(5, 7))}
        with pytest.raises(SignalError, match=r"different numbers of classes: a \[5, 4\], b \[5, 7\]"):
            Ensemble(teachers)(BATCH)
        teachers = {"a": Teacher("a"), "b": Teacher("b", **{"hidden.6": torch.zeros(5, 2, 7)})}
        with pytest.raises(SignalError, match=r"'hidden.6' of different shapes: a \[5, 2, 6\], b \[5, 2, 7\]"):
            Ensemble(teachers)(BATCH)
        narrowed = Ensemble(teachers)
        narrowed.narrow(["logits"])
        assert set(narrowed(BATCH)) == {"logits"}


class TestOptions:
    def test_it_is_registered(self):
        assert teacher_sources.get("ensemble") is ensemble
        assert teacher_sources.check("ensemble", {"of": ["a"], "by": "logits"}) == []
        (problem,) = teacher_sources.check("ensemble", {"of": ["a"], "by": "logit"})
        assert problem.path == ("by",)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weights": [1, 2]}, r"3 positive weights, one for each teacher, got \[1, 2\]"),
            ({"weights": [1, 2, 0]}, "positive weights"),
            ({"weights": [1, 1, 1], "by": "confidence"}, "weighs each sample by its label"),
            ({"temperature": 2.0, "by": "logits"}, "averages no probabilities"),
            ({"temperature": 0.0}, "positive temperature"),
        ],
    )
    def test_mistakes(self, options, message):
        with pytest.raises(ComponentError, match=message):
            made(**options)

    def test_teachers_that_are_not_there(self):
        context = SourceContext("all", {"large": Teacher("a"), "small": Teacher("b")})
        with pytest.raises(ComponentError, match=r"names the teacher 'larg'.*did you mean 'large'"):
            ensemble(context, of=["larg"])
        with pytest.raises(ComponentError, match="names a teacher twice"):
            ensemble(context, of=["large", "large"])
        with pytest.raises(ComponentError, match="at least one teacher"):
            ensemble(context, of=[])
