"""Progressive distillation: which terms count when, to the optimizer step."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from potstill.errors import TrainingError
from potstill.interfaces import Progress
from potstill.losses.objective import Objective, Term
from potstill.losses.ramps import Ramp
from potstill.registry import schemes
from potstill.schemes.lesson import Learner, Lesson
from potstill.schemes.progressive import Progressive


def hint(student, weight=1.0):
    return Term("mse", student=student, teacher="hidden.1", weight=weight)


def three() -> dict[str, Term]:
    return {
        "soft": Term("kl", weight=0.7),
        "hard": Term("cross_entropy", weight=0.3),
        "third": hint("hidden.3"),
        "first": hint("hidden.1", 2.0),
        "second": hint("hidden.2"),
    }


def arranged(terms, model=None, **options) -> Objective:
    lesson = Lesson(Learner(model or nn.Linear(2, 2), Objective(terms)))
    return schemes.get("progressive")(**options).arrange(lesson).student.objective


def active(objective, step, total):
    now = Progress(step, total)
    return {name for name, term in objective.named_terms() if term.weight_at(now) != 0}


def first_step(objective, name, total):
    return next(step for step in range(total + 1) if name in active(objective, step, total))


@pytest.mark.parametrize("total", [3, 7, 10, 99, 100, 1000])
def test_phases_begin_on_the_very_step(total):
    """Phase k of three begins at ceil(N·k/3), neither a step early nor a step late."""
    objective = arranged(three())
    begins = [0, -(-total // 3), -(-2 * total // 3)]
    assert [first_step(objective, name, total) for name in ("first", "second", "third")] == begins
    assert first_step(objective, "soft", total) == first_step(objective, "hard", total) == begins[2]
    assert active(objective, total, total) == {"first", "second", "third", "soft", "hard"}


def test_earlier_blocks_stay():
    objective = arranged(three())
    assert active(objective, 0, 90) == {"first"}
    assert active(objective, 45, 90) == {"first", "second"}
    assert objective.terms["first"].weight_at(Progress(80, 90)) == 2.0


@pytest.mark.parametrize(("ratio", "begins"), [(2.0, [0, 100, 300]), (1.0, [0, 234, 467]), (0.5, [0, 400, 600])])
def test_an_exponential_schedule(ratio, begins):
    """Of 700 steps: 100 + 200 + 400 at ratio 2, and the other way round at 1/2."""
    objective = arranged(three(), schedule="exponential", ratio=ratio)
    assert [first_step(objective, name, 700) for name in ("first", "second", "third")] == begins


@pytest.mark.parametrize("shares", [[0.1, 0.2, 0.7], lambda count: [0.1, 0.2, 0.7][:count], f"{__name__}:tenths"])
def test_shares_of_ones_own(shares):
    """0.1 + 0.2 is above 0.3 in floats: the last phase would begin at step 31 of 100."""
    objective = arranged(three(), schedule="custom", shares=shares)
    assert [first_step(objective, name, 100) for name in ("first", "second", "third")] == [0, 10, 30]


def tenths(count):
    return [0.1, 0.2, 0.7][:count]


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.2, 0.2, 0.2], [0.5, 0.0, 0.5]])
def test_shares_that_do_not_fit(shares):
    with pytest.raises(TrainingError, match="3 shares above 0 that sum to 1"):
        arranged(three(), schedule="custom", shares=shares)


def test_responses_and_labels_throughout():
    objective = arranged(three(), response="throughout")
    assert active(objective, 0, 9) == {"first", "soft"}
    objective = arranged(three(), hard="throughout")
    assert active(objective, 0, 9) == {"first", "hard"}


def test_what_belongs_to_which_block():
    """The deepest block of a term decides; embeddings are there from the start; queries and towers count alike."""
    terms = {
        "both": Term("mse", student=["hidden.1", "hidden.4"], teacher=["hidden.1", "hidden.4"]),
        "embeddings": hint("hidden.0"),
        "query": hint("query.2"),
        "tower": hint("encoder.attention.4"),
    }
    objective = arranged(terms)
    assert active(objective, 0, 10) == {"embeddings", "query"}
    assert active(objective, 5, 10) == {"embeddings", "query", "both", "tower"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer2 = nn.Linear(2, 2)
        self.layer1 = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))


def test_module_paths():
    terms = {"b": hint("layer2"), "a": hint("clone:layer1"), "soft": Term("kl")}
    assert active(arranged(terms, Net()), 0, 10) == {"b"}
    assert active(arranged(terms, Net(), order=["clone:layer1", "layer2"]), 0, 10) == {"a"}
    with pytest.raises(TrainingError, match="reads 'layer2', which `order` lacks"):
        arranged(terms, Net(), order=["clone:layer1", "layer3"])


def test_numbers_in_paths_count():
    """The order of the terms would begin with the last block."""
    terms = {"late": hint("blocks.3"), "early": hint("input:blocks.1"), "soft": Term("kl")}
    assert active(arranged(terms, Net()), 0, 10) == {"early"}


def test_paths_beside_numbers():
    config = transformers.BertConfig(
        num_hidden_layers=3, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=20
    )
    model = transformers.BertForSequenceClassification(config)
    terms = {"path": hint("bert.encoder.layer.0.output"), "hidden": hint("hidden.2")}
    assert active(arranged(terms, model), 0, 10) == {"path"}
    terms = {"path": hint("bert.pooler"), "hidden": hint("hidden.2")}
    with pytest.raises(TrainingError, match=r"cannot tell the order of bert.pooler, hidden.2"):
        arranged(terms, model)
    assert active(arranged(terms, model, order=["hidden.2", "bert.pooler"]), 0, 10) == {"hidden"}


def test_a_ramp_goes_over_the_whole_training():
    objective = arranged({"a": hint("hidden.1"), "b": hint("hidden.2", Ramp(1.0, 0.0))})
    b = objective.terms["b"]
    assert [b.weight_at(Progress(step, 10)) for step in (4, 5, 9)] == [0.0, 0.5, pytest.approx(0.1)]
    assert b.describe().startswith("((1→0 linear) from 1/2 of the training on) · ")


def test_terms_that_never_count_make_no_phase():
    objective = arranged({"a": hint("hidden.1"), "b": hint("hidden.2"), "c": hint("hidden.3", 0.0)})
    assert first_step(objective, "b", 10) == 5


def test_the_objective_that_was_given_is_left_as_it_is():
    """A second training with it would have phases of phases."""
    terms = three()
    given = Objective(terms, balance={"every": 3})
    lesson = Lesson(Learner(nn.Linear(2, 2), given))
    made = Progressive().arrange(lesson).student.objective
    assert [term.weight for term in terms.values()] == [0.7, 0.3, 1.0, 2.0, 1.0]
    assert made.balance is not given.balance
    assert made.balance.every == 3
    assert list(made.terms) == list(given.terms)


def test_every_learner_is_taught_so():
    other = Learner(nn.Linear(2, 2), Objective({"a": hint("hidden.2"), "b": hint("hidden.5")}), given=True)
    flat = Learner(nn.Linear(2, 2), Objective({"soft": Term("kl")}))
    plain = Learner(nn.Linear(2, 2))
    lesson = Lesson(Learner(nn.Linear(2, 2), Objective(three())), {"other": other, "flat": flat, "plain": plain})
    made = Progressive().arrange(lesson)
    assert active(made.others["other"].objective, 0, 10) == {"a"}
    assert active(made.others["flat"].objective, 0, 10) == {"soft"}
    assert active(made.others["plain"].objective, 0, 10) == {"hard"}, "labels of a learner without blocks wait for none"


def test_what_cannot_be_arranged():
    with pytest.raises(TrainingError, match=r"two blocks of the student or more, got 0; add .*layers: \{1: 2, 2: 4\}"):
        arranged({"soft": Term("kl")})
    with pytest.raises(TrainingError, match=r"begins with a alone, whose weight begins at 0"):
        arranged({"a": hint("hidden.1", Ramp(0.0, 1.0)), "b": hint("hidden.2")})
    with pytest.raises(TrainingError, match="takes `shares` with `schedule: custom`"):
        Progressive(schedule="custom")


def test_a_training_step_in_each_phase():
    """The total is that of the terms that count, and no gradient comes of the others."""
    objective = arranged({"a": hint("hidden.1"), "b": hint("hidden.2"), "hard": Term("cross_entropy")})
    said = {name: torch.randn(4, 3, requires_grad=True) for name in ("hidden.1", "hidden.2", "logits")}
    batch = {"labels": torch.tensor([0, 1, 2, 0]), "sample_id": torch.arange(4)}
    taught = {"hidden.1": torch.zeros(4, 3)}
    total = objective(said, taught, batch, Progress(4, 10)).total
    total.backward()
    assert total.item() == pytest.approx(said["hidden.1"].square().mean().item())
    assert said["hidden.2"].grad is None
    assert said["logits"].grad is None
    total = objective(said, taught, batch, Progress(5, 10)).total
    expected = sum(said[name].square().mean() for name in ("hidden.1", "hidden.2"))
    expected = expected + nn.functional.cross_entropy(said["logits"], batch["labels"])
    assert total.item() == pytest.approx(expected.item())
