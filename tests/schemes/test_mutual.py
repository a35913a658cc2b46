"""Deep mutual learning: objectives made of the student's, against a loop in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from potstill.errors import TrainingError
from potstill.interfaces import Progress
from potstill.losses.objective import Objective, Term
from potstill.losses.ramps import Ramp
from potstill.registry import schemes
from potstill.schemes.lesson import Learner, Lesson


def net(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))


def nets(*widths: int) -> dict[str, nn.Module]:
    return {name: net(width, width) for name, width in zip(("student", "ann", "bob"), widths, strict=False)}


def arranged(models, terms, *, sources=(), given=None, **settings) -> Lesson:
    given = given or {}
    others = {
        name: Learner(model, given=name in given, objective=given.get(name))
        for name, model in models.items()
        if name != "student"
    }
    silent = {name: lambda batch: {} for name in sources}
    lesson = Lesson(Learner(models["student"], Objective(terms, **settings)), others, silent)
    return schemes.get("mutual")().arrange(lesson)


def paper() -> dict[str, Term]:
    return {"hard": Term("cross_entropy"), "soft": Term("kl")}


def batches(count: int):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        labels = torch.randint(0, 3, (8,), generator=generator)
        yield {
            "x": torch.randn(8, 5, generator=generator),
            "labels": labels,
            "sample_id": torch.arange(8),
        }


def losses(lesson: Lesson, batch, progress=None) -> dict[str, torch.Tensor]:
    said = {name: learner.model(batch["x"]) for name, learner in lesson.learners.items()}
    totals = {}
    for name, learner in lesson.learners.items():
        heard = {f"{other}/logits": logits for other, logits in said.items() if other != name}
        totals[name] = learner.objective({"logits": said[name]}, heard, batch, progress).total
    return totals


@pytest.mark.parametrize("widths", [(4, 7), (4, 7, 6)])
def test_the_loss_of_the_paper(widths):
    """CE + 1/(K−1) · Σ KL(p_l ‖ p_k), no gradient through the others' answers; for some steps of SGD."""
    models, plain = nets(*widths), nets(*widths)
    lesson = arranged(models, paper())
    ours = [torch.optim.SGD(model.parameters(), 0.5) for model in models.values()]
    theirs = [torch.optim.SGD(model.parameters(), 0.5) for model in plain.values()]
    for batch in batches(4):
        answers = {name: model(batch["x"]) for name, model in plain.items()}
        expected = {}
        for name, own in answers.items():
            log_q = F.log_softmax(own, 1)
            peers = [F.softmax(logits, 1).detach() for other, logits in answers.items() if other != name]
            divergence = sum((p * (p.log() - log_q)).sum(1).mean() for p in peers)
            expected[name] = F.cross_entropy(own, batch["labels"]) + divergence / len(peers)
        totals = losses(lesson, batch)
        for name in models:
            assert totals[name].item() == pytest.approx(expected[name].item(), rel=1e-6)
        for total, optimizers in ((totals, ours), (expected, theirs)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            sum(total.values()).backward()
            for optimizer in optimizers:
                optimizer.step()
        for name, model in models.items():
            for one, other in zip(model.parameters(), plain[name].parameters(), strict=True):
                torch.testing.assert_close(one.grad, other.grad)
    assert not torch.equal(models["student"][0].weight, nets(*widths)["student"][0].weight)


def test_names_and_formulas():
    lesson = arranged(nets(4, 7), paper())
    assert lesson.student.objective.terms["soft"].teacher == ("ann/logits",)
    assert lesson.others["ann"].objective.terms["soft"].teacher == ("student/logits",)
    three = arranged(nets(4, 7, 6), paper())
    assert list(three.student.objective.terms) == ["hard", "soft_ann", "soft_bob"]
    assert list(three.others["ann"].objective.terms) == ["hard", "soft_student", "soft_bob"]
    assert three.others["bob"].objective.terms["soft_ann"].teacher == ("ann/logits",)
    assert three.student.objective.terms["soft_ann"].weight == 0.5


def test_weights_that_change_are_divided_too():
    half = Progress(5, 10)
    terms = {"soft": Term("kl", weight=Ramp(4.0, 0.0)), "hard": Term("cross_entropy", weight=lambda progress: 3.0)}
    made = arranged(nets(4, 7, 6), terms).others["bob"].objective.terms
    assert made["soft_ann"].weight_at(half) == 1.0
    assert made["hard"].weight_at(half) == 3.0
    called = {"soft": Term("kl", weight=lambda progress: 4.0 * progress.fraction)}
    soft = arranged(nets(4, 7, 6), called).student.objective.terms["soft_ann"]
    assert soft.weight_at(half) == 1.0
    assert str(soft.weight).endswith("/2")


def test_a_term_that_names_a_peer_is_between_the_two():
    terms = {"hard": Term("cross_entropy"), "ann": Term("kl", teacher="ann/logits", weight=0.2, temperature=2.0)}
    lesson = arranged(nets(4, 7, 6), terms)
    assert list(lesson.student.objective.terms) == ["hard", "ann"]
    swapped = lesson.others["ann"].objective.terms["ann"]
    assert (swapped.student, swapped.teacher, swapped.weight) == (("logits",), ("student/logits",), 0.2)
    assert swapped.options == {"temperature": 2.0}
    assert list(lesson.others["bob"].objective.terms) == ["hard"]


def test_layers_are_swapped_with_projectors_of_their_own():
    term = Term("mse", student="0", teacher="ann/0", project="linear", mask="none")
    lesson = arranged(nets(4, 7), {"soft": Term("kl"), "hint": term})
    swapped = lesson.others["ann"].objective.terms["hint"]
    assert (swapped.student, swapped.teacher, swapped.mask) == (("0",), ("student/0",), "none")
    objective = lesson.others["ann"].objective
    inputs = torch.randn(2, 7), torch.randn(2, 4)
    objective.materialize(
        {"0": inputs[0], "logits": torch.zeros(2, 3)},
        {"student/0": inputs[1], "student/logits": torch.zeros(2, 3)},
        lambda kind, student, teacher: nn.Linear(student.shape[1], teacher.shape[1]),
    )
    assert swapped.projector.weight.shape == (4, 7)
    assert lesson.student.objective.pending_projectors() == ["hint"]


def test_the_mask_of_a_swapped_term_is_that_of_the_peer_s_signal():
    """A copy whose names are edited would mask the encoder's tokens by the decoder's."""
    term = Term("mse", student="hidden.1", teacher="ann/decoder.hidden.2")
    lesson = arranged(nets(4, 7), {"soft": Term("kl"), "hint": term})
    batch = {"attention_mask": torch.ones(2, 3), "decoder_attention_mask": torch.tensor([[1, 0], [1, 1]])}
    assert lesson.student.objective.terms["hint"].mask_of(batch).shape == (2, 3)
    assert lesson.others["ann"].objective.terms["hint"].mask_of(batch).sum() == 3


def test_layers_without_a_counterpart_are_left_out():
    """Between two peers nobody said which layers correspond, nor between a peer and the student's teacher."""
    terms = {
        "soft": Term("kl"),
        "hint": Term("mse", student="0", teacher="0"),
        "large": Term("kl", teacher="large/logits"),
        "deep": Term("mse", student="0", teacher="large/0"),
        "own": Term("mse", student="logits", teacher="self/logits"),
    }
    lesson = arranged(nets(4, 4, 4), terms, sources=["large"])
    assert set(lesson.others["ann"].objective.terms) == {"soft_student", "soft_bob", "hint_student", "large", "own"}
    assert set(lesson.student.objective.terms) == {
        *("soft_ann", "soft_bob", "hint_ann", "hint_bob"),
        *("large", "deep", "own"),
    }
    assert lesson.others["bob"].objective.terms["large"].teacher == ("large/logits",)


def test_an_objective_that_was_given_stays():
    own = Objective({"hard": Term("cross_entropy", weight=9.0)})
    lesson = arranged(nets(4, 7, 6), paper(), given={"ann": own})
    assert lesson.others["ann"].objective is own
    assert list(lesson.others["bob"].objective.terms) == ["hard", "soft_student", "soft_ann"]
    assert list(lesson.student.objective.terms) == ["hard", "soft_ann", "soft_bob"]


class Learned(nn.Module):
    """A loss with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student, teacher):
        return self.scale * (student - teacher).square().mean(-1)


@pytest.mark.parametrize("loss", ["ctkd", Learned()])
def test_losses_with_a_memory_are_not_shared(loss):
    terms = {"hard": Term("cross_entropy"), "memory": Term(loss, teacher="ann/logits")}
    lesson = arranged(nets(4, 7), terms)
    one, other = (each.objective.terms["memory"].loss for each in lesson.learners.values())
    assert one is not other
    assert {id(p) for p in one.parameters()}.isdisjoint(id(p) for p in other.parameters())


def test_an_alignment_is_turned():
    """The peer's classes come as the student's did: without turning, those of the wrong side would be chosen."""
    terms = {"soft": Term("mse", teacher="ann/logits", align=lambda student, teacher: (student, teacher[:, :3]))}
    lesson = arranged(nets(4, 7), terms)
    student, peer = torch.randn(2, 3), torch.randn(2, 5)
    batch = {"sample_id": torch.arange(2)}
    value = lesson.others["ann"].objective({"logits": peer}, {"student/logits": student}, batch).total
    assert value.item() == pytest.approx((peer[:, :3] - student).square().mean().item())


def test_balance_and_masks():
    lesson = arranged(nets(4, 7), paper(), balance={"every": 5}, response_mask=sum)
    assert lesson.student.objective.balance.every == 5
    assert lesson.others["ann"].objective.balance is None
    assert lesson.others["ann"].objective.response_mask is sum


def test_it_takes_no_options():
    assert "no option 'weight'" in str(schemes.check("mutual", {"weight": 1})[0])


def test_what_cannot_be_arranged():
    with pytest.raises(TrainingError, match=r"add for example `teachers: \{peer: \{model: MODEL, train: jointly\}\}`"):
        arranged(nets(4), paper())
    with pytest.raises(TrainingError, match="compares the student with ann, and the objective has none; add"):
        arranged(nets(4, 7), {"hard": Term("cross_entropy")})
    with pytest.raises(TrainingError, match="the term 'soft' has a projector of its own"):
        arranged(nets(4, 7), {"soft": Term("mse", project=nn.Linear(3, 3))})
    several = Term("mse", student=["logits", "logits"], teacher=["ann/logits", "bob/logits"])
    with pytest.raises(TrainingError, match="compares with several models at once"):
        arranged(nets(4, 7, 6), {"both": several})
