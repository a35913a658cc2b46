"""The objective: what counts, what is divided by what, and every mistake with its name."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.errors import ComponentError, ObjectiveError
from potstill.interfaces import IGNORED, Batch, Progress
from potstill.knowledge.alignment import make_projector
from potstill.knowledge.vocabulary import VocabularyMap
from potstill.losses.divergence import kl
from potstill.losses.objective import Objective, Term, clamp_counts, default_objective
from potstill.losses.ramps import Ramp
from potstill.registry import losses


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(size: int, **entries: Tensor) -> Batch:
    return {"sample_id": torch.arange(size), **entries}


def half(student: Tensor, teacher: Tensor) -> Tensor:
    """A loss that is registered nowhere."""
    return (student - teacher).abs().sum(-1) / 2


class Gram:
    """A loss that couples the samples of a batch."""

    per = "batch"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student @ student.mT - teacher @ teacher.mT).square().mean()


# what counts


def test_soft_terms_count_every_sample_and_hard_terms_the_labelled_ones():
    """A mean over all samples would let every unlabelled one weaken the hard loss; and the soft loss needs no label."""
    student, teacher = randn(5, 4, seed=1), randn(5, 4, seed=2)
    labels = torch.tensor([0, -100, 2, -100, 3])
    objective = Objective({"soft": Term("kl", weight=0.5, temperature=2.0), "hard": Term("cross_entropy", weight=2.0)})
    batch = batch_of(5, labels=labels)
    found = objective({"logits": student}, {"logits": teacher}, batch)
    soft = 4 * F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
    hard = F.cross_entropy(student, labels)  # the mean over the three labelled samples
    torch.testing.assert_close(found.parts["soft"], soft)
    torch.testing.assert_close(found.parts["hard"], hard)
    torch.testing.assert_close(found.total, 0.5 * soft + 2.0 * hard)
    assert {name: int(count) for name, count in objective.counts(batch).items()} == {"soft": 5, "hard": 3}


def test_parts_are_detached_and_before_their_weight():
    student = randn(3, 4, seed=3).requires_grad_()
    objective = Objective({"soft": Term("kl", weight=0.25)})
    found = objective({"logits": student}, {"logits": randn(3, 4, seed=4)}, batch_of(3))
    assert not found.parts["soft"].requires_grad
    torch.testing.assert_close(found.total.detach(), 0.25 * found.parts["soft"])


def test_a_batch_without_a_label_gives_zero_and_a_zero_gradient():
    """0 / 0 would be NaN, and one NaN ends the training."""
    student = randn(3, 4, seed=5).requires_grad_()
    batch = batch_of(3, labels=torch.full((3,), -100))
    objective = Objective({"hard": Term("cross_entropy", label_smoothing=0.1)})
    assert int(objective.counts(batch)["hard"]) == 0
    total = objective({"logits": student}, {}, batch).total
    total.backward()
    assert total.item() == 0
    assert (student.grad == 0).all()


def test_clamped_counts_are_at_least_one():
    clamped = clamp_counts({"a": torch.tensor(0.0), "b": torch.tensor(3.0)})
    assert {name: float(value) for name, value in clamped.items()} == {"a": 1.0, "b": 3.0}


def test_token_values_are_averaged_over_valid_tokens_not_over_samples():
    student, teacher = randn(2, 3, 4, seed=6), randn(2, 3, 4, seed=7)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    objective = Objective({"hint": Term("mse", "body.1", "body.1", mask="attention_mask")})
    batch = batch_of(2, attention_mask=mask)
    found = objective({"body.1": student}, {"body.1": teacher}, batch).total
    torch.testing.assert_close(found, (student - teacher).square().mean(-1)[mask.bool()].mean())
    assert int(objective.counts(batch)["hint"]) == 4


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_what_stands_at_padding_changes_nothing(junk):
    student, teacher = randn(2, 3, 4, seed=6), randn(2, 3, 4, seed=7)
    objective = Objective({"hint": Term("mse", "body.1", "body.1", mask="attention_mask")})
    batch = batch_of(2, attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]))
    clean = objective({"body.1": student}, {"body.1": teacher}, batch).total
    teacher[1, 1:] = junk
    assert torch.equal(objective({"body.1": student}, {"body.1": teacher}, batch).total, clean)


@pytest.mark.parametrize("name", ["hidden.2", "encoder.hidden.0", "large/hidden.1"])
def test_hidden_states_take_the_attention_mask_by_themselves(name):
    """Without it the student learns to copy the teacher's padding."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    values = torch.zeros(2, 3, 1, dtype=torch.float64)
    values[mask == 0] = 100.0
    values[mask == 1] = 2.0
    objective = Objective({"hint": Term("mse", name.split("/")[-1], name)})
    batch = batch_of(2, attention_mask=mask)
    found = objective({name.split("/")[-1]: values}, {name: torch.zeros_like(values)}, batch)
    assert found.total.item() == 4.0


def test_token_responses_take_the_task_mask_else_the_labels():
    student, teacher = randn(2, 3, 4, seed=8), randn(2, 3, 4, seed=9)
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
    batch = batch_of(2, labels=labels, special=torch.tensor([[1, 0, 0], [0, 0, 0]]))
    values = kl(student, teacher)
    by_labels = Objective({"soft": Term("kl")})({"logits": student}, {"logits": teacher}, batch).total
    torch.testing.assert_close(by_labels, values[labels != -100].mean())
    task = Objective({"soft": Term("kl")}, response_mask=lambda b: b["special"])
    torch.testing.assert_close(task({"logits": student}, {"logits": teacher}, batch).total, values[0, 0])


def test_a_mask_by_name_or_function_wins_over_the_choice():
    student, teacher = randn(3, 4, seed=10), randn(3, 4, seed=11)
    batch = batch_of(3, chosen=torch.tensor([0, 1, 0]), labels=torch.tensor([0, -100, 1]))
    signals = {"logits": student}, {"logits": teacher}
    expected = kl(student, teacher)
    by_name = Objective({"soft": Term("kl", mask="chosen")})
    by_function = Objective({"soft": Term("kl", mask=lambda b: b["labels"] == -100)})
    torch.testing.assert_close(by_name(*signals, batch).total, expected[1])
    torch.testing.assert_close(by_function(*signals, batch).total, expected[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_probabilities_count_where_there_are_any(smoothing):
    """Mixup writes a row of zeros for an unlabelled pair; smoothed, it would pull the student to uniform answers."""
    student = randn(4, 4, seed=12).requires_grad_()
    labels = torch.tensor([[0.3, 0.7, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0.25] * 4], dtype=torch.float64)
    known = [0, 2, 3]
    objective = Objective({"hard": Term("cross_entropy", label_smoothing=smoothing)})
    batch = batch_of(4, labels=labels)
    assert int(objective.counts(batch)["hard"]) == 3
    found = objective({"logits": student}, {}, batch).total
    torch.testing.assert_close(found, F.cross_entropy(student[known], labels[known], label_smoothing=smoothing))
    found.backward()
    assert (student.grad[1] == 0).all()


@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_numbers_as_labels_all_count(shape):
    """Targets of a regression are negative or 0 as well; taken for empty rows their samples would be left out."""

    def squared(student: Tensor, *, labels: Tensor) -> Tensor:
        return (student - labels).square().flatten(1).mean(1) if labels.ndim > 1 else (student - labels).square()

    student, labels = randn(*shape, seed=13), -randn(*shape, seed=14).abs()
    labels[0] = 0
    batch = batch_of(4, labels=labels)
    objective = Objective({"hard": Term(squared)})
    assert int(objective.counts(batch)["hard"]) == 4
    torch.testing.assert_close(objective({"logits": student}, {}, batch).total, F.mse_loss(student, labels))


def test_values_beyond_the_mask_are_averaged():
    """Attention maps have one value a head and position, features one a pixel: the count is that of the samples."""
    student, teacher = randn(3, 2, 5, 4, seed=13), randn(3, 2, 5, 4, seed=14)
    values = (student - teacher).square().mean(-1)
    signals = {"maps": student}, {"maps": teacher}
    unmasked = Objective({"hint": Term("mse", "maps", "maps")})
    torch.testing.assert_close(unmasked(*signals, batch_of(3)).total, values.mean())
    masked = Objective({"hint": Term("mse", "maps", "maps", mask="chosen")})
    batch = batch_of(3, chosen=torch.tensor([1, 0, 1]))
    torch.testing.assert_close(masked(*signals, batch).total, values[[0, 2]].mean())


def test_token_values_without_a_mask_are_refused():
    """The sum would run over padding, and the longer the batch is padded the less the real tokens count."""
    objective = Objective({"hint": Term("mse", "body.1", "body.1")})
    signals = {"body.1": randn(2, 3, 4, seed=15)}, {"body.1": randn(2, 3, 4, seed=16)}
    batch = batch_of(2, attention_mask=torch.ones(2, 3))
    with pytest.raises(ObjectiveError, match="term 'hint' has one value per token and no mask"):
        objective(*signals, batch)


def test_mask_none_counts_the_padding_as_the_message_says():
    student, teacher = randn(2, 3, 4, seed=15), randn(2, 3, 4, seed=16)
    objective = Objective({"hint": Term("mse", "body.1", "body.1", mask="none")})
    batch = batch_of(2, attention_mask=torch.tensor([[1, 1, 0], [1, 0, 0]]))
    found = objective({"body.1": student}, {"body.1": teacher}, batch).total
    torch.testing.assert_close(found, (student - teacher).square().mean())


# splitting a batch


def everything(projector: nn.Module) -> Objective:
    return Objective(
        {
            "soft": Term("kl", weight=0.6, temperature=3.0),
            "hard": Term("cross_entropy", weight=0.3, label_smoothing=0.1),
            "hint": Term("mse", "hidden.1", "hidden.1", weight=0.2, project=projector),
            "angle": Term("cosine", "pooled", "pooled", weight=0.1),
        }
    )


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (5, 4, 3), (1, 11), (3, 3, 3, 2, 1)])
def test_splitting_a_batch_with_window_counts_changes_no_gradient(sizes):
    """Means of means weigh a sample by the size of its micro-batch: with ragged ends the run silently differs."""
    torch.manual_seed(0)
    projector = nn.Linear(3, 5).double()
    objective = everything(projector)
    logits, hidden, pooled = (
        each.requires_grad_() for each in (randn(12, 4, seed=1), randn(12, 6, 3, seed=2), randn(12, 7, seed=3))
    )
    teacher = {"logits": randn(12, 4, seed=4), "hidden.1": randn(12, 6, 5, seed=5), "pooled": randn(12, 7, seed=6)}
    labels = torch.tensor([0, -100, 1, 2, -100, -100, 3, 0, 1, -100, 2, 3])
    lengths = torch.tensor([6, 1, 2, 3, 6, 5, 1, 1, 4, 2, 6, 3])
    batch = batch_of(12, labels=labels, attention_mask=(torch.arange(6) < lengths[:, None]).long())
    leaves = [logits, hidden, pooled, *projector.parameters()]

    def piece(start: int, stop: int, counts: dict[str, Tensor] | None) -> Tensor:
        student = {"logits": logits[start:stop], "hidden.1": hidden[start:stop], "pooled": pooled[start:stop]}
        part = {name: value[start:stop] for name, value in batch.items()}
        return objective(student, {k: v[start:stop] for k, v in teacher.items()}, part, counts=counts).total

    whole = torch.autograd.grad(piece(0, 12, None), leaves)
    edges = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    spans = list(itertools.pairwise(edges))
    each = [objective.counts({name: v[a:b] for name, v in batch.items()}) for a, b in spans]
    window = {name: sum(counts[name] for counts in each) for name in each[0]}
    total = sum(piece(a, b, window) for a, b in spans)
    for ours, expected in zip(torch.autograd.grad(total, leaves), whole, strict=True):
        assert (ours - expected).norm() <= 1e-6 * expected.norm()
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-13)


def test_a_loss_that_couples_the_batch_is_weighted_by_its_samples():
    student, teacher = randn(5, 4, seed=17), randn(5, 4, seed=18)
    objective = Objective({"relations": Term(Gram(), weight=2.0)})
    loss = Gram()
    whole = objective({"logits": student}, {"logits": teacher}, batch_of(5))
    torch.testing.assert_close(whole.total, 2 * loss(student, teacher))
    window = {"relations": torch.tensor(5.0)}
    parts = [
        objective({"logits": student[a:b]}, {"logits": teacher[a:b]}, batch_of(b - a), counts=window).parts["relations"]
        for a, b in ((0, 3), (3, 5))
    ]
    expected = (3 * loss(student[:3], teacher[:3]) + 2 * loss(student[3:], teacher[3:])) / 5
    torch.testing.assert_close(sum(parts), expected)


@pytest.mark.parametrize(
    "entries",
    [
        {"attention_mask": torch.tensor([[1, 1, 1, 1]] * 3)},
        {"labels": torch.tensor([[1, -100], [2, -100], [-100, -100]])},
    ],
    ids=["hidden states with an attention mask", "token labels"],
)
def test_a_coupled_loss_is_not_divided_by_the_number_of_tokens(entries):
    """Its value is already a mean; divided by the tokens instead of the samples it would all but vanish."""
    student, teacher = randn(3, 4, seed=19), randn(3, 4, seed=20)
    objective = Objective({"relations": Term(Gram(), "hidden.2", "hidden.2"), "all": Term(Gram())})
    signals = [{"hidden.2": each, "logits": each} for each in (student, teacher)]
    found = objective(*signals, batch_of(3, **entries)).parts
    torch.testing.assert_close(found["relations"], Gram()(student, teacher))
    torch.testing.assert_close(found["all"], Gram()(student, teacher))


@pytest.mark.parametrize("entries", [{}, {"chosen": torch.tensor([1, 0, 1, 1])}], ids=["no mask", "a mask"])
def test_a_loss_that_is_already_reduced_is_refused(entries):
    """A mean (PyTorch's default) divided by the count again is B times too small, and nothing looks wrong."""

    def mean(student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(student, teacher)

    objective = Objective({"hint": Term(mean, mask="chosen" if entries else None)})
    signals = {"logits": randn(4, 3, seed=21)}, {"logits": randn(4, 3, seed=22)}
    with pytest.raises(ObjectiveError, match="term 'hint'"):
        objective(*signals, batch_of(4, **entries))


# signals, projectors, modules


def test_terms_read_the_signals_that_they_name():
    student, teacher = randn(3, 4, seed=23), randn(3, 4, seed=24)
    objective = Objective({"a": Term(half, "blocks.0", "large/blocks.3")})
    found = objective({"blocks.0": student, "logits": teacher}, {"large/blocks.3": teacher}, batch_of(3))
    torch.testing.assert_close(found.total, (student - teacher).abs().sum(-1).mean() / 2)
    assert objective.taps("student") == ["blocks.0"]
    assert objective.taps("teacher") == ["large/blocks.3"]


def test_several_signals_arrive_as_tuples():
    def paired(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        assert isinstance(student, tuple)
        return student[0].sum(-1) - 2 * student[1].sum(-1) + teacher[2].sum(-1)

    signals = {name: randn(3, 4, seed=seed) for seed, name in enumerate("abcde")}
    objective = Objective({"pair": Term(paired, ["a", "b"], ["c", "d", "e"])})
    expected = (signals["a"] - 2 * signals["b"] + signals["e"]).sum(-1).mean()
    torch.testing.assert_close(objective(signals, signals, batch_of(3)).total, expected)
    assert objective.taps("student") == ["a", "b"]
    assert objective.taps("teacher") == ["c", "d", "e"]


def test_taps_are_listed_once_and_hard_terms_need_no_teacher():
    objective = Objective({"a": Term("kl"), "b": Term("mse"), "c": Term("cross_entropy")})
    assert objective.taps("student") == ["logits"]
    assert objective.taps("teacher") == ["logits"]
    assert objective.needs_teacher()
    assert objective.needs_labels() == ["c"]
    hard = Objective({"c": Term("cross_entropy")})
    assert hard.taps("teacher") == []
    assert not hard.needs_teacher()


def test_a_projector_is_trained_and_saved_with_the_objective():
    """A projector outside the optimizer keeps its random weights; one that is not saved is random after a resume."""
    projector = nn.Linear(3, 5).double()
    objective = Objective({"hint": Term("mse", "body", "body", project=projector)})
    assert {id(p) for p in objective.parameters()} == {id(p) for p in projector.parameters()}
    state = objective.state_dict()
    assert {tuple(value.shape) for value in state.values()} == {(5, 3), (5,)}
    student, teacher = randn(4, 3, seed=25), randn(4, 5, seed=26)
    total = objective({"body": student}, {"body": teacher}, batch_of(4)).total
    torch.testing.assert_close(total, F.mse_loss(projector(student), teacher))
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters())
    other = Objective({"hint": Term("mse", "body", "body", project=nn.Linear(3, 5).double())})
    other.load_state_dict(state)
    torch.testing.assert_close(other({"body": student}, {"body": teacher}, batch_of(4)).total, total.detach())


def test_a_projector_by_name_is_made_from_the_signals():
    objective = Objective({"hint": Term("mse", "body", "body", project="linear"), "soft": Term("kl")})
    assert objective.pending_projectors() == ["hint"]
    assert not list(objective.parameters())
    student = {"body": torch.zeros(4, 3), "logits": torch.zeros(4, 2)}
    teacher = {"body": torch.zeros(4, 5), "logits": torch.ones(4, 2)}
    objective.materialize(student, teacher, make_projector)
    assert objective.pending_projectors() == []
    assert {tuple(p.shape) for p in objective.parameters()} == {(5, 3), (5,)}
    first = objective(student, teacher, batch_of(4)).total
    objective.materialize(student, teacher, make_projector)  # a second time must not forget what was trained
    assert torch.equal(objective(student, teacher, batch_of(4)).total, first)


class Memory(nn.Module):
    """A loss with a memory: a vector for each sample."""

    def __init__(self, size: float = 1.0) -> None:
        super().__init__()
        self.size = size
        self.bank: Tensor
        self.register_buffer("bank", torch.arange(10.0).double())

    def forward(self, student: Tensor, teacher: Tensor, *, index: Tensor) -> Tensor:
        return self.size * (student - teacher).sum(-1) + self.bank[index]


@pytest.mark.parametrize("loss", [Memory(3.0), Memory])
def test_a_loss_with_a_memory_is_a_module(loss):
    student, teacher = randn(2, 4, seed=27), randn(2, 4, seed=28)
    options = {"size": 3.0} if loss is Memory else {}
    objective = Objective({"m": Term(loss, **options)})
    assert [tuple(value.shape) for value in objective.state_dict().values()] == [(10,)]
    batch = {"sample_id": torch.tensor([7, 2])}
    expected = (3 * (student - teacher).sum(-1) + torch.tensor([7.0, 2.0])).mean()
    torch.testing.assert_close(objective({"logits": student}, {"logits": teacher}, batch).total, expected)


@pytest.mark.parametrize("as_instance", [False, True])
def test_a_registered_module_keeps_its_facts(monkeypatch, as_instance):
    """Without them a loss that couples the batch is taken for one value a sample, and its formula is lost."""
    monkeypatch.setitem(losses._entries, "memory", Memory)
    monkeypatch.setitem(losses._facts, "memory", {"per": "batch", "formula": "M({student}, {size})"})
    term = Term(Memory(1.0) if as_instance else "memory")
    assert term.per == "batch"
    assert term.any_shape
    if not as_instance:
        assert term.describe() == "1.0 · M(student.logits, 1)"


def test_the_fixed_options_of_a_module_cannot_be_ramps():
    """They are given once, when it is made; the ramp would stand at its first value for ever."""
    with pytest.raises(ObjectiveError, match="size"):
        Term(Memory, size={"from": 1.0, "to": 0.0})


def test_a_loss_gets_the_keywords_that_it_names():
    seen = {}

    def curious(student, teacher, *, labels, mask, index, progress):
        seen.update(labels=labels, mask=mask, index=index, progress=progress)
        return student.sum(-1)

    batch = {"sample_id": torch.tensor([4, 5]), "labels": torch.tensor([0, 1]), "chosen": torch.tensor([0, 1])}
    objective = Objective({"c": Term(curious, mask="chosen")})
    objective({"logits": randn(2, 3, seed=1)}, {"logits": randn(2, 3, seed=2)}, batch, Progress(3, 10))
    assert torch.equal(seen["labels"], batch["labels"])
    assert seen["mask"].tolist() == [False, True]
    assert torch.equal(seen["index"], batch["sample_id"])
    assert seen["progress"] == Progress(3, 10)


def test_a_loss_gets_the_mask_by_which_it_is_counted():
    """A loss that normalises over valid tokens must not see another mask than the one it is divided by."""
    seen = []

    def curious(student, teacher, *, mask):
        seen.append(mask)
        return (student - teacher).square().mean(-1)

    objective = Objective({"c": Term(curious)}, response_mask=lambda b: b["special"])
    batch = batch_of(2, special=torch.tensor([[1, 0, 1], [0, 0, 1]]), labels=torch.zeros(2, 3, dtype=torch.long))
    objective({"logits": randn(2, 3, 4, seed=1)}, {"logits": randn(2, 3, 4, seed=2)}, batch)
    assert torch.equal(seen[0], batch["special"].bool())


# weights and ramps


def test_a_weight_of_zero_costs_nothing_and_hides_a_nan():
    """0 · NaN is NaN: a hint that is switched off must not be computed at all."""
    student = randn(3, 4, seed=29).requires_grad_()
    teacher = {"logits": randn(3, 4, seed=30), "broken": torch.full((3, 4), float("nan"))}
    objective = Objective({"soft": Term("kl"), "off": Term("mse", "logits", "broken", weight=0.0)})
    found = objective({"logits": student}, teacher, batch_of(3))
    found.total.backward()
    torch.testing.assert_close(found.total.detach(), kl(student.detach(), teacher["logits"]).mean())
    assert torch.isfinite(student.grad).all()
    assert list(found.parts) == ["soft"]


def test_the_projector_of_a_term_that_is_off_has_a_gradient_of_zero():
    """A distributed wrapper waits for ever for a parameter that gets no gradient."""
    projector = nn.Linear(3, 5).double()
    objective = Objective({"soft": Term("kl"), "off": Term("mse", "body", "body", weight=0.0, project=projector)})
    objective({"logits": randn(3, 4, seed=1)}, {"logits": randn(3, 4, seed=2)}, batch_of(3)).total.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in projector.parameters())


def test_an_objective_that_is_off_altogether_is_refused():
    objective = Objective({"soft": Term("kl", weight=Ramp(0.0, 1.0, begin=0.5))})
    signals = {"logits": randn(3, 4, seed=1)}, {"logits": randn(3, 4, seed=2)}
    with pytest.raises(ObjectiveError, match="every term has weight 0"):
        objective(*signals, batch_of(3), Progress(0, 100))
    assert objective(*signals, batch_of(3), Progress(75, 100)).total > 0


def test_weights_and_options_follow_their_ramps():
    student, teacher = randn(3, 4, seed=31), randn(3, 4, seed=32)
    term = Term("kl", weight={"from": 1.0, "to": 0.0}, temperature={"from": 8.0, "to": 2.0, "shape": "exponential"})
    objective = Objective({"soft": term, "rest": Term("mse", weight=lambda p: 2 * p.fraction)})
    found = objective({"logits": student}, {"logits": teacher}, batch_of(3), Progress(50, 100))
    torch.testing.assert_close(found.parts["soft"], kl(student, teacher, temperature=4.0).mean())
    torch.testing.assert_close(found.total, 0.5 * found.parts["soft"] + 1.0 * found.parts["rest"])
    assert term.ramps(Progress(50, 100)) == {"weight": 0.5, "temperature": pytest.approx(4.0)}


@pytest.mark.parametrize("stop", [0.0, -1.0])
def test_both_ends_of_a_ramp_are_checked(stop):
    """A temperature that falls to 0 divides by it in the last step: NaN after a whole training."""
    with pytest.raises(ObjectiveError, match="temperature"):
        Term("kl", temperature={"from": 4.0, "to": stop})


@pytest.mark.parametrize("weight", [{"start": 1.0}, {"from": 1.0}, "much", [1.0]])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(ObjectiveError, match=r"weight|a ramp needs"):
        Term("kl", weight=weight)


# the baseline


def test_hard_only_keeps_the_hard_term_at_full_weight():
    """The baseline must not train with a weight of 0.1 because the teacher had the other 0.9."""
    objective = Objective(
        {"soft": Term("kl", weight=0.9), "labels": Term("cross_entropy", weight=0.1, label_smoothing=0.2)},
        response_mask=lambda b: None,
    )
    baseline = objective.hard_only()
    student, labels = randn(4, 3, seed=33), torch.tensor([0, 1, 2, -100])
    found = baseline({"logits": student}, {}, batch_of(4, labels=labels))
    torch.testing.assert_close(found.total, F.cross_entropy(student, labels, label_smoothing=0.2))
    assert list(found.parts) == ["labels"]
    assert baseline.response_mask is objective.response_mask
    assert not baseline.needs_teacher()


def test_hard_only_leaves_the_objective_as_it_was():
    objective = Objective({"soft": Term("kl", weight=0.9), "hard": Term("cross_entropy", weight=0.1)})
    objective.hard_only()
    assert {name: term.weight for name, term in objective.named_terms()} == {"soft": 0.9, "hard": 0.1}


def test_hard_only_of_several_hard_terms_keeps_their_proportions():
    objective = Objective(
        {"a": Term("cross_entropy", weight=0.2), "b": Term("cross_entropy", weight=0.6), "s": Term("kl")}
    )
    assert {name: term.weight for name, term in objective.hard_only().named_terms()} == {"a": 0.2, "b": 0.6}


def test_hard_only_without_a_hard_term_is_cross_entropy():
    baseline = Objective({"soft": Term("kl")}).hard_only()
    student, labels = randn(4, 3, seed=34), torch.tensor([0, 1, 2, 1])
    torch.testing.assert_close(
        baseline({"logits": student}, {}, batch_of(4, labels=labels)).total, F.cross_entropy(student, labels)
    )


def test_the_default_objective():
    student, teacher, labels = randn(4, 3, seed=35), randn(4, 3, seed=36), torch.tensor([0, 1, 2, 1])
    found = default_objective()({"logits": student}, {"logits": teacher}, batch_of(4, labels=labels)).total
    soft = 16 * F.kl_div((student / 4).log_softmax(-1), (teacher / 4).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(found, 0.7 * soft + 0.3 * F.cross_entropy(student, labels))


# the formula


def test_describe_gives_the_formula_with_its_numbers():
    objective = Objective(
        {
            "soft": Term("kl", weight=0.7, temperature=4.0),
            "hard": Term("cross_entropy", weight=0.3, label_smoothing=0.1),
            "hint": Term("mse", "hidden.3", "hidden.6", weight=Ramp(1.0, 0.0), project="linear"),
            "mine": Term(half, "a", "b"),
        }
    )
    lines = objective.describe().splitlines()
    assert "divided by their number" in lines[0]
    assert lines[1:4] == [
        "  soft: 0.7 · 4²·KL(softmax(teacher.logits/4) ‖ softmax(student.logits/4))",
        "  hard: 0.3 · CE(labels, softmax(student.logits)) with label smoothing 0.1",
        "  hint: (1→0 linear) · mean((linear(student.hidden.3) − teacher.hidden.6)²)",
    ]
    assert lines[4].startswith("  mine: 1.0 · ")
    assert lines[4].endswith("half(student.a, teacher.b)")


def test_describe_shows_ramps_and_defaults():
    term = Term("kl", temperature={"from": 8, "to": 2})
    assert term.describe().startswith("1.0 · (8→2 linear)²·KL(softmax(teacher.logits/(8→2 linear))")
    assert Term("soft_cross_entropy").describe().startswith("1.0 · 1²·CE(")
    assert "smoothing" not in Term("cross_entropy").describe()


def test_describe_shows_the_options_of_a_module():
    assert "size=3" in Term(Memory, size=3.0).describe()


# mistakes


def test_an_objective_without_terms():
    with pytest.raises(ObjectiveError, match="at least one term"):
        Objective({})


@pytest.mark.parametrize("name", ["type", "train", "keys", "forward", "values", ""])
def test_a_name_that_a_module_cannot_have(name):
    """torch would raise a KeyError about attributes: a traceback for the name of a term."""
    with pytest.raises(ObjectiveError, match=re.escape(f"'{name}'")):
        Objective({name: Term("kl")})


def test_names_that_differ_only_in_a_dot():
    with pytest.raises(ObjectiveError, match="'a_b'"):
        Objective({"a.b": Term("kl"), "a_b": Term("mse")})
    objective = Objective({"layer.1": Term("kl")})
    assert [name for name, _ in objective.named_terms()] == ["layer_1"]


def test_an_unknown_loss_names_the_nearest():
    with pytest.raises(ComponentError, match="there is no loss 'klx'; did you mean 'kl'"):
        Term("klx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 4.0}, "has no option 'temprature'; did you mean 'temperature'"),
        ({"temperature": -1.0}, "greater than 0, got -1.0"),
        ({"temperature": "warm"}, "valid number"),
    ],
)
def test_wrong_options_of_a_loss(options, message):
    with pytest.raises(ObjectiveError, match=message):
        Term("kl", **options)


def test_a_missing_signal_names_side_and_nearest():
    objective = Objective({"hint": Term("mse", "hidden.3", "hidden.6")})
    with pytest.raises(ObjectiveError, match=r"the student gave no signal 'hidden.3'; did you mean 'hidden.2'"):
        objective({"hidden.2": randn(2, 3, seed=1)}, {}, batch_of(2))
    with pytest.raises(ObjectiveError, match=r"the teacher gave no signal 'hidden.6'; there are none"):
        objective({"hidden.3": randn(2, 3, seed=1)}, {}, batch_of(2))


def test_signals_of_other_shapes_name_both_and_the_way_out():
    """[3, 1] against [3, 5] would broadcast and train towards nonsense."""
    objective = Objective({"hint": Term("mse", "a", "b")})
    with pytest.raises(ObjectiveError, match=r"student\.a \[3, 1\] and teacher\.b \[3, 5\]; `project: linear`"):
        objective({"a": randn(3, 1, seed=1)}, {"b": randn(3, 5, seed=2)}, batch_of(3))
    projected = Objective({"hint": Term("mse", "a", "b", project=nn.Linear(1, 4).double())})
    with pytest.raises(ObjectiveError, match=r"student\.a \[3, 4\] and teacher\.b \[3, 5\]$"):
        projected({"a": randn(3, 1, seed=1)}, {"b": randn(3, 5, seed=2)}, batch_of(3))


def test_a_batch_without_labels_names_the_loss():
    with pytest.raises(ObjectiveError, match="cross_entropy compares with labels and the batch has none"):
        Objective({"hard": Term("cross_entropy")})({"logits": randn(2, 3, seed=1)}, {}, batch_of(2))


def test_an_unknown_mask_names_the_nearest():
    objective = Objective({"soft": Term("kl", mask="atention_mask")})
    batch = batch_of(2, attention_mask=torch.ones(2, 3))
    with pytest.raises(ObjectiveError, match="mask 'atention_mask' is not in the batch; did you mean 'attention_mask'"):
        objective.counts(batch)


def test_a_mask_that_does_not_fit_names_both_shapes():
    objective = Objective({"soft": Term("kl", mask="attention_mask")})
    signals = {"logits": randn(2, 5, seed=1)}, {"logits": randn(2, 5, seed=2)}
    with pytest.raises(ObjectiveError, match=r"term 'soft': a mask \[2, 3\] does not fit values \[2\]"):
        objective(*signals, batch_of(2, attention_mask=torch.ones(2, 3)))


def test_a_batch_without_tensors_has_no_samples():
    with pytest.raises(ObjectiveError, match="no tensor"):
        Objective({"soft": Term("kl")}).counts({})


# what has weight 0 costs nothing


def late(progress: Progress) -> float:
    return 0.0 if progress.step < 5 else 1.0


def test_only_signals_of_active_terms_are_read():
    objective = Objective(
        {
            "soft": Term("kl", weight={"from": 1.0, "to": 0.0, "shape": "step", "end": 0.5}),
            "hint": Term("mse", "hidden.1", "hidden.2", weight=late),
            "never": Term("mse", "hidden.3", "hidden.6", weight=0.0, project="linear"),
            "hard": Term("cross_entropy"),
        }
    )
    begin, middle, end = (Progress(step, 10) for step in (0, 5, 9))
    assert objective.taps("student") == ["logits", "hidden.1"]
    assert objective.taps("student", begin) == ["logits"]
    assert objective.taps("teacher", begin) == ["logits"]
    assert objective.taps("teacher", middle) == ["hidden.2"]
    assert objective.taps("student", end) == ["hidden.1", "logits"]
    assert objective.pending_projectors() == []
    objective.terms["hint"].weight = 0.0
    assert objective.needs_teacher()
    assert not objective.needs_teacher(end)


def test_an_inactive_term_needs_no_signal():
    objective = Objective({"hint": Term("mse", "hidden.1", "hidden.2", weight=late), "hard": Term("cross_entropy")})
    batch = batch_of(2, labels=torch.tensor([0, 1]))
    objective({"logits": randn(2, 3, seed=1)}, {}, batch, Progress(0, 10))
    with pytest.raises(ObjectiveError, match=r"hidden\.1"):
        objective({"logits": randn(2, 3, seed=1)}, {}, batch, Progress(5, 10))


def test_a_term_has_the_weight_that_was_published_with_its_loss(monkeypatch):
    monkeypatch.setitem(losses._facts, "mse", {**losses.facts("mse"), "weight": 100.0})
    assert Term("mse").weight == 100.0
    assert Term("mse", weight=2.0).weight == 2.0
    assert Term("kl").weight == 1.0


def test_a_virtual_teacher_is_not_in_the_baseline(monkeypatch):
    monkeypatch.setitem(losses._facts, "cross_entropy", {**losses.facts("cross_entropy"), "virtual": True})
    objective = Objective({"virtual": Term("cross_entropy", label_smoothing=0.3)})
    assert objective.hard_only().describe().endswith("CE(labels, softmax(student.logits))")


class Covering(nn.Module):
    """A loss per sample that sees to its mask itself."""

    per = "sample"

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None) -> Tensor:
        values = (student - teacher).square().mean(-1)
        return values.mean(1) if mask is None else (values * mask).sum(1) / mask.sum(1)


def test_a_loss_that_masks_itself_counts_samples():
    student, teacher = randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    objective = Objective({"c": Term(Covering(), "hidden.1", "hidden.1")})
    batch = batch_of(2, attention_mask=mask)
    assert objective.counts(batch)["c"] == 2
    found = objective({"hidden.1": student}, {"hidden.1": teacher}, batch).total
    each = (student - teacher).square().mean(-1)
    torch.testing.assert_close(found, (each[0, :2].mean() + each[1, 0]) / 2)
    assert objective.unmasked() == set()


def test_a_projector_that_asks_for_the_teacher():
    class Stretch(nn.Module):
        takes_teacher = True

        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return student.expand_as(teacher)

    objective = Objective({"m": Term("mse", project=Stretch())})
    said, taught = torch.ones(2, 1, 4), torch.zeros(2, 3, 4)
    assert objective({"logits": said}, {"logits": taught}, batch_of(2)).total == 1


def test_a_loss_that_masks_itself_gets_the_mask_of_the_tokens_for_attention_too():
    term = Term("minilmv2", ["query.3", "key.3", "value.3"], ["query.6", "key.6", "value.6"])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = batch_of(2, attention_mask=mask, labels=torch.tensor([0, 1]))
    assert torch.equal(term.mask_of(batch), mask != 0)
    assert term.counted(batch) is None
    assert term.masks_tokens
    plain = Term("mse", "attention.1", "attention.1")  # [B, heads, T, T] fits no mask of tokens
    assert plain.mask_of(batch) is None
    assert not plain.masks_tokens


def test_labels_that_a_loss_can_do_without():
    def choosy(student: Tensor, teacher: Tensor, *, labels: Tensor | None = None) -> Tensor:
        return (student - teacher).abs().sum(-1) * (1 if labels is None else 2)

    objective = Objective({"c": Term(choosy, mask="none")})
    said, taught = {"logits": torch.ones(2, 3)}, {"logits": torch.zeros(2, 3)}
    assert objective.needs_labels() == []
    assert objective(said, taught, batch_of(2)).total == 3
    assert objective(said, taught, batch_of(2, labels=torch.tensor([0, 1]))).total == 6


def test_vocabularies_are_aligned_before_anything_is_compared():
    """A head that is padded to a rounder size has classes that nobody has; 0 for their logits would take mass."""
    student, teacher = randn(2, 500, seed=1), randn(2, 504, seed=2)
    term = Term("kl", align=VocabularyMap.of_sizes(500, 504).align_logits)
    found = Objective({"soft": term})({"logits": student}, {"logits": teacher}, batch_of(2)).total
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher[:, :500], -1)
    torch.testing.assert_close(found, (log_p.exp() * (log_p - log_q)).sum(-1).mean())


# what must not pass in silence


def test_padding_of_a_module_path_counts_in_no_loss_without_a_word():
    """Only `hidden.n` is known to be tokens by its name; of a block's own path the shape tells."""
    said = {"encoder.block": randn(3, 4, 5, seed=1)}
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    batch = batch_of(3, attention_mask=mask)
    for loss in ("similarity", "rkd_distance", "pkt", "cka", "pearson", "infonce"):
        with pytest.raises(ObjectiveError, match="padding would count; say `mask: attention_mask`"):
            Objective({"t": Term(loss, "encoder.block", "encoder.block")})(said, said, batch)
        padded = {"encoder.block": said["encoder.block"].masked_fill(mask[..., None] == 0, 7.0)}
        objective = Objective({"t": Term(loss, "encoder.block", "encoder.block", mask="attention_mask")})
        taught = {"encoder.block": randn(3, 4, 5, seed=2)}
        torch.testing.assert_close(objective(padded, taught, batch).total, objective(said, taught, batch).total)
        Objective({"t": Term(loss, "encoder.block", "encoder.block", mask="none")})(said, taught, batch)


def test_attention_maps_in_a_loss_for_vectors():
    said = {"attention.1": torch.rand(2, 3, 4, 4)}
    batch = batch_of(2, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    with pytest.raises(ObjectiveError, match="attention_mse"):
        Objective({"t": Term("mse", "attention.1", "attention.1")})(said, said, batch)


@pytest.mark.parametrize("loss", ["rkd_distance", "similarity", "cka", "dist", "pearson"])
def test_a_mask_of_samples_leaves_samples_out_of_a_loss_of_the_batch(loss):
    said, taught = randn(6, 5, seed=1), randn(6, 5, seed=2)
    keep = torch.tensor([1, 0, 1, 1, 0, 1])
    objective = Objective({"t": Term(loss, mask="keep")})
    whole = objective({"logits": said}, {"logits": taught}, batch_of(6, keep=keep)).total
    alone = Objective({"t": Term(loss)})({"logits": said[keep == 1]}, {"logits": taught[keep == 1]}, batch_of(4)).total
    torch.testing.assert_close(whole, alone)
    none = objective({"logits": said}, {"logits": taught}, batch_of(6, keep=torch.zeros(6)))
    assert torch.isfinite(none.total)


def test_a_mask_that_a_loss_of_the_batch_cannot_take_is_refused():
    with pytest.raises(ObjectiveError, match="takes no mask, got 'keep'"):
        Term("ab", mask="keep")
    Term("ab", mask="none")


def test_layers_that_were_never_made():
    said = {"logits": randn(2, 3, seed=1).float()}
    for term in (Term("mse", project="linear"), Term("vid")):
        with pytest.raises(ObjectiveError, match="call `materialize`"):
            Objective({"t": term})(said, said, batch_of(2))


@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        ("hidden.2", "attention_mask"),
        ("encoder.hidden.2", "attention_mask"),
        ("model.encoder.hidden.2", "attention_mask"),
        ("bert.hidden.2", "attention_mask"),
        ("decoder.hidden.2", "decoder_attention_mask"),
        ("vision_model.hidden.2", None),
        ("attention.2", None),
    ],
)
def test_each_tower_has_its_own_mask(signal, expected):
    masks = {"attention_mask": torch.ones(2, 3), "decoder_attention_mask": torch.ones(2, 4)}
    found = Term("cosine", signal, signal).mask_of(batch_of(2, **masks))
    assert (found is None) if expected is None else (found.shape == masks[expected].shape)


def test_samples_without_a_label_do_not_thin_out_a_term_that_needs_labels():
    said, taught = randn(4, 3, seed=1), randn(4, 3, seed=2)
    labels = torch.tensor([0, IGNORED, 2, IGNORED])
    found = Objective({"t": Term("dkd")})({"logits": said}, {"logits": taught}, batch_of(4, labels=labels)).total
    rows = labels != IGNORED
    alone = Objective({"t": Term("dkd")})(
        {"logits": said[rows]}, {"logits": taught[rows]}, batch_of(2, labels=labels[rows])
    )
    torch.testing.assert_close(found, alone.total)


def test_the_baseline_has_the_plain_hard_loss():
    objective = Objective({"soft": Term("kl"), "hard": Term("cross_entropy", weight=0.1, scale="1/C")})
    assert "1.0 · CE" in objective.hard_only().describe()


def test_the_names_of_a_loss_of_ones_own_do_not_matter():
    soft = Term(lambda s, t: (s - t).abs().sum(-1))
    assert not soft.hard
    assert not Term(nn.MSELoss(reduction="none")).hard
    assert Term(lambda logits, *, labels: logits.sum(-1)).hard


def test_what_a_scale_lacks_is_named():
    said = {"logits": torch.ones(2, 3)}
    with pytest.raises(ObjectiveError, match="has no temperature"):
        Objective({"t": Term("mse", scale="1/T^2")})(said, said, batch_of(2))
