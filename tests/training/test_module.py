"""Student and objective as one module, without any trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.errors import ModelError, ObjectiveError, SignalError
from potstill.interfaces import Progress, Signals
from potstill.losses.objective import Objective, Term
from potstill.losses.ramps import Ramp
from potstill.models.plain import ConvNet, Mlp
from potstill.training.module import DistillationModule, DistillationOutput
from tests.training.tiny import flat, pairs, student, teacher


def sentences(count: int = 6) -> dict[str, Tensor]:
    table = pairs(count)
    return {name: torch.tensor(table[name]) for name in ("input_ids", "attention_mask", "labels")}


def rows(count: int = 12) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    features = torch.randn(count, 6, generator=draw)
    return {"features": features, "labels": torch.randint(0, 3, (count,), generator=draw)}


def small() -> tuple[Mlp, Mlp]:
    torch.manual_seed(6)
    return Mlp(6, 3, [8]), Mlp(6, 3, [4])


class TestWithoutTeacher:
    def test_it_is_exactly_the_student(self) -> None:
        """Exported, timed or predicted with, the bundle must give what the student gives, its own loss included."""
        inner = student().eval()
        module = DistillationModule(inner, Objective({"hint": Term("mse", "hidden.1", "hidden.2")}))
        batch = sentences()
        found, wanted = module(**batch), inner(**batch)
        assert type(found) is type(wanted)
        assert torch.equal(found.loss, wanted.loss)
        assert torch.equal(found.logits, wanted.logits)
        assert module(**{**batch, "sample_id": torch.arange(6)}).logits.shape == (6, 3)

    def test_a_plain_module_gives_its_tensor(self) -> None:
        _, inner = small()
        assert torch.equal(DistillationModule(inner)(**rows()), inner(rows()["features"]))

    def test_no_tap_is_read(self) -> None:
        """A wrong tap is a mistake of distilling, not of predicting."""
        _, inner = small()
        module = DistillationModule(inner, Objective({"hint": Term("mse", "body.9", "body.9")}))
        assert module(**rows()).shape == (12, 3)
        with pytest.raises(SignalError, match=r"body\.9"):
            module({"body.9": torch.zeros(12, 4)}, **rows())


class TestLoss:
    def test_it_is_the_formula(self) -> None:
        tutor, inner = small()
        objective = Objective(
            {"soft": Term("kl", weight=0.7, temperature=4.0), "hard": Term("cross_entropy", weight=0.3)}
        )
        batch = rows()
        taught = tutor(batch["features"]).detach()
        output = DistillationModule(inner, objective)({"logits": taught}, **batch)
        said = inner(batch["features"])
        log_student, log_teacher = F.log_softmax(said / 4, -1), F.log_softmax(taught / 4, -1)
        soft = 16 * (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()
        hard = F.cross_entropy(said, batch["labels"])
        assert isinstance(output, DistillationOutput)
        assert torch.allclose(output.loss, 0.7 * soft + 0.3 * hard)
        assert torch.allclose(output.parts["soft"], soft)
        assert torch.allclose(output.parts["hard"], hard)
        assert torch.equal(output.logits, said)
        assert not any(part.requires_grad for part in output.parts.values())

    def test_counts_and_progress_are_passed_on(self) -> None:
        tutor, inner = small()
        objective = Objective({"soft": Term("kl", weight=Ramp(1.0, 0.0)), "hard": Term("cross_entropy", weight=0.5)})
        module, batch = DistillationModule(inner, objective), rows()
        taught = {"logits": tutor(batch["features"])}
        alone = module(taught, **batch)
        double = {name: torch.tensor(24.0) for name in ("soft", "hard")}
        assert torch.allclose(module(taught, counts=double, **batch).loss, alone.loss / 2)
        late = module(taught, progress=Progress(3, 4), **batch)
        assert torch.allclose(late.loss, 0.25 * alone.parts["soft"] + 0.5 * alone.parts["hard"])

    def test_hard_terms_alone_need_no_signals(self) -> None:
        _, inner = small()
        module = DistillationModule(inner, Objective({"hard": Term("cross_entropy")}))
        batch = rows()
        assert torch.allclose(module({}, **batch).loss, F.cross_entropy(inner(batch["features"]), batch["labels"]))

    def test_the_teachers_own_view_does_not_reach_the_student(self) -> None:
        """`teacher/input_ids` come from another tokenizer; the student must not read them."""
        inner = student().eval()
        module = DistillationModule(inner, Objective({"soft": Term("kl")}))
        batch = {**sentences(), "teacher/input_ids": torch.ones(6, 3, dtype=torch.long)}
        output = module({"logits": torch.zeros(6, 3)}, **batch)
        own = {name: batch[name] for name in ("input_ids", "attention_mask")}
        assert torch.equal(output.logits, inner(**own).logits)

    def test_what_is_missing_is_named(self) -> None:
        _, inner = small()
        module = DistillationModule(inner, Objective({"soft": Term("kl"), "hard": Term("cross_entropy")}))
        batch = rows()
        with pytest.raises(ObjectiveError, match=r"teacher gave no signal 'logits'; did you mean 'logit'"):
            module({"logit": torch.zeros(12, 3)}, **batch)
        with pytest.raises(ObjectiveError, match="labels"):
            module({"logits": torch.zeros(12, 3)}, features=batch["features"])
        with pytest.raises(ModelError, match="Mlp takes"):
            module({"logits": torch.zeros(12, 3)}, labels=batch["labels"], feature=batch["features"])


class TestBareLoop:
    def test_it_learns_and_the_teacher_stays(self) -> None:
        tutor, inner = small()
        objective = Objective(
            {"soft": Term("kl"), "hint": Term("mse", "body.1", "body.1", project=nn.Linear(4, 8), weight=0.5)}
        )
        module, batch = DistillationModule(inner, objective), rows()
        taught: Signals = {"logits": tutor(batch["features"]), "body.1": tutor.body[1](batch["features"])}
        before = flat(tutor)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
        losses = []
        for _ in range(60):
            loss = module(taught, **batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.3 * losses[0]
        assert torch.equal(flat(tutor), before)
        assert all(parameter.grad is None for parameter in tutor.parameters())  # detached, though it had a graph
        assert all(parameter.grad is not None for parameter in module.parameters())

    def test_the_state_is_that_of_student_and_objective(self) -> None:
        _, inner = small()
        module = DistillationModule(inner, Objective({"hint": Term("mse", project=nn.Linear(3, 3))}))
        names = set(module.state_dict())
        assert {"student.head.weight", "objective.terms.hint.projector.weight"} <= names
        again = copy.deepcopy(module)
        for parameter in again.parameters():
            nn.init.zeros_(parameter)
        again.load_state_dict(module.state_dict(), strict=True)
        assert torch.equal(flat(again), flat(module))


class TestTaps:
    def test_they_are_what_the_terms_read_beyond_the_responses(self) -> None:
        objective = Objective(
            {"soft": Term("kl"), "hint": Term("mse", "hidden.1", "hidden.2", project=nn.Linear(32, 48))}
        )
        module = DistillationModule(student().eval(), objective)
        assert module.taps == ["hidden.1"]
        batch = sentences()
        signals = module.signals(batch)
        assert set(signals) == {"logits", "hidden.1"}
        wanted = module.student(**{k: batch[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)
        assert torch.equal(signals["hidden.1"], wanted.hidden_states[1])
        assert torch.equal(signals["logits"], wanted.logits)

    def test_the_signals_carry_the_gradient(self) -> None:
        """A tap that is detached trains the projector and not the student, without a word."""
        _, inner = small()
        module = DistillationModule(inner, Objective({"hint": Term("mse", "body.1", "x")}))
        module({"x": torch.zeros(12, 4)}, **rows()).loss.backward()
        assert float(inner.body[1].weight.grad.abs().sum()) > 0
        assert inner.head.weight.grad is None

    def test_own_responses_and_forward(self) -> None:
        """A task with other responses: they come from its forward, everything else is tapped."""
        _, inner = small()

        def forward(model: nn.Module, batch: Any) -> Signals:
            logits = model(batch["features"])
            return {"start": logits[:, :1], "end": logits[:, 1:]}

        objective = Objective({"start": Term("mse", "start", "start"), "hint": Term("mse", "body.1", "body.1")})
        module = DistillationModule(inner, objective, forward=forward, responses=("start", "end"))
        assert module.taps == ["body.1"]
        output = module({"start": torch.zeros(12, 1), "body.1": torch.zeros(12, 4)}, **rows())
        assert output.logits.shape == (12, 1)


class TestAttributes:
    def test_unknown_ones_are_the_students_and_own_ones_stay(self) -> None:
        inner = student()
        module = DistillationModule(inner)
        assert module.config is inner.config
        assert module.num_labels == 3
        assert module.student is inner
        assert sorted(module.objective.terms) == ["hard", "soft"]
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = module.no_such_thing

    def test_what_the_forward_accepts(self) -> None:
        assert {"input_ids", "attention_mask"} <= DistillationModule(student()).accepts
        assert "token_type_ids" not in DistillationModule(student()).accepts
        assert "token_type_ids" in DistillationModule(teacher()).accepts

    def test_a_copy_is_whole(self) -> None:
        """A delegating `__getattr__` breaks copies that look attributes up before there is a student."""
        _, inner = small()
        module = DistillationModule(inner)
        again = copy.deepcopy(module)
        assert again.student is not inner
        assert torch.equal(again(**rows()), module(**rows()))


class TestMaterialize:
    def test_it_sizes_the_projector_and_touches_nothing_else(self) -> None:
        """In train mode the dry run would move BatchNorm's statistics and draw dropout."""
        torch.manual_seed(6)
        inner = ConvNet(1, 3, [4, 5], dropout=0.5)
        objective = Objective({"hint": Term("mse", "head", "features", project="linear")})
        module = DistillationModule(inner, objective).train()
        state = {name: value.clone() for name, value in module.state_dict().items()}
        batch = {"pixel_values": torch.randn(4, 1, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
        module.materialize({"features": torch.zeros(4, 7)}, batch)
        projector = objective.terms["hint"].projector
        assert projector is not None
        assert tuple(projector.weight.shape) == (7, 3)
        assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())
        assert inner.training
        assert all(m.training for m in inner.modules())
        assert all(p.grad is None for p in module.parameters())
        module.materialize({"features": torch.zeros(4, 9)}, batch)
        assert objective.terms["hint"].projector is projector
