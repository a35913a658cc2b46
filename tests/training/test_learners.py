"""Several learners in one module: each is trained as it would be alone, and hears what it is told to hear."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from potstill.data.batching import InMemory
from potstill.errors import TrainingError
from potstill.interfaces import Progress
from potstill.losses.objective import Objective, Term
from potstill.models.plain import Mlp
from potstill.schemes.lesson import Learner, Lesson
from potstill.teachers.context import SourceContext
from potstill.teachers.ensemble import Ensemble
from potstill.teachers.live import Deferred, Live
from potstill.teachers.moving_average import moving_average
from potstill.training.learners import JointModule, split_groups
from potstill.training.trainer import DistillationTrainer, ready_batch
from tests.training.tiny import arguments, flat, pairs, student, teacher

SOFT = {"soft": Term("kl", weight=0.7, temperature=2.0), "hard": Term("cross_entropy", weight=0.3)}


def rows(count: int = 24) -> InMemory:
    draw = torch.Generator().manual_seed(5)
    columns = {"features": torch.randn(count, 6, generator=draw), "sample_id": torch.arange(count)}
    columns["labels"] = torch.randint(0, 3, (count,), generator=draw)
    return InMemory(columns)


def mlp(width: int, seed: int) -> Mlp:
    torch.manual_seed(seed)
    return Mlp(6, 3, [width])


def objective(**terms: Any) -> Objective:
    return Objective(copy.deepcopy(terms or SOFT))


def trained(folder: Path, model: nn.Module, terms: Objective, *, resume: Path | None = None, **changes: Any) -> Any:
    own = ("teacher", "learners", "scheme", "extension", "projector_learning_rate")
    given = {name: changes.pop(name) for name in own if name in changes}
    made = DistillationTrainer(
        model=model,
        objective=terms,
        train_dataset=rows(),
        data_collator=ready_batch,
        args=arguments(folder, **changes),
        **given,
    )
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return made


class TestEachAsIfAlone:
    """What a learner teaches reaches nobody's gradient: both end where they would end by themselves."""

    @pytest.mark.parametrize("clip", [0.0, 0.05])
    def test_a_joint_teacher_ends_where_it_ends_alone(self, tmp_path: Path, clip: float) -> None:
        """Also with clipping: the norm over both would shorten the teacher's gradient by the student's."""
        coach = mlp(8, 1)
        alone = trained(tmp_path, copy.deepcopy(coach), objective(hard=Term("cross_entropy")), max_grad_norm=clip)
        trained(tmp_path, mlp(4, 2), objective(), learners={"coach": Learner(coach)}, max_grad_norm=clip)
        assert torch.allclose(flat(coach), flat(alone.distillation_module.student), rtol=0, atol=1e-7)
        assert not torch.allclose(flat(coach), flat(mlp(8, 1)), rtol=0, atol=1e-3)

    def test_the_student_learns_from_what_the_teacher_says_at_that_step(self, tmp_path: Path) -> None:
        """Against a loop of plain PyTorch with two optimizers."""
        data, coach, learner = rows(), mlp(8, 1), mlp(4, 2)
        made = trained(
            tmp_path, copy.deepcopy(learner), objective(), learners={"coach": Learner(copy.deepcopy(coach))},
            max_grad_norm=0.1, lr_scheduler_type="constant", weight_decay=0.0, max_steps=3,
        )  # fmt: skip
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0) for model in (learner, coach)]
        order = [batch["sample_id"].tolist() for batch in made.get_train_dataloader()]
        for ids in order[:3]:
            batch = data.__getitems__(ids)
            said, taught = learner(batch["features"]), coach(batch["features"])
            soft = F.kl_div((said / 2).log_softmax(-1), (taught.detach() / 2).softmax(-1), reduction="batchmean") * 4
            (0.7 * soft + 0.3 * F.cross_entropy(said, batch["labels"])).backward()
            F.cross_entropy(taught, batch["labels"]).backward()
            for model, optimizer in zip((learner, coach), optimizers, strict=True):
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        module = made.distillation_module
        assert torch.allclose(flat(module.student), flat(learner), rtol=0, atol=1e-6)
        assert torch.allclose(flat(module.others["coach"].student), flat(coach), rtol=0, atol=1e-6)

    def test_ragged_micro_batches_are_one_batch(self, tmp_path: Path) -> None:
        """Counts are those of each learner's own terms over the whole window."""
        found = []
        for size, steps in ((24, 1), (8, 3)):
            coach, learner = mlp(8, 1), mlp(4, 2)
            settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
            trained(tmp_path, learner, objective(), learners={"coach": Learner(coach)}, max_grad_norm=0.0, **settings)
            found.append(torch.cat([flat(learner), flat(coach)]))
        assert torch.allclose(found[0], found[1], rtol=0, atol=1e-5)


class TestSettings:
    def test_a_group_of_its_own(self, tmp_path: Path) -> None:
        coach = mlp(8, 1)
        made = trained(
            tmp_path, mlp(4, 2), objective(), learners={"coach": Learner(coach, learning_rate=1e-4, weight_decay=0.5)},
            weight_decay=0.0, lr_scheduler_type="constant",
        )  # fmt: skip
        groups = {id(p): group for group in made.optimizer.param_groups for p in group["params"]}
        assert {groups[id(p)]["lr"] for p in coach.parameters()} == {1e-4}
        assert {groups[id(p)]["weight_decay"] for n, p in coach.named_parameters() if "weight" in n} == {0.5}
        assert {groups[id(p)]["weight_decay"] for n, p in coach.named_parameters() if "bias" in n} == {0.0}
        assert {groups[id(p)]["lr"] for p in made.distillation_module.student.parameters()} == {1e-2}

    def test_every_parameter_is_in_one_group(self) -> None:
        model = mlp(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        split_groups(optimizer, list(model.parameters()), learning_rate=0.01)  # the group before is left empty
        assert [group["lr"] for group in optimizer.param_groups] == [0.01]
        assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))

    def test_clipping_counts_projectors_to_their_learner(self) -> None:
        hint = Term("mse", "body.1", "coach/body.1", project=nn.Linear(4, 8))
        module = JointModule(Lesson(Learner(mlp(4, 2), objective(hint=hint)), {"coach": Learner(mlp(8, 1))}))
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        sizes = {name: sum(p.numel() for p in own.student.parameters()) for name, own in module.learners.items()}
        found = module.clip(1.0)
        assert float(found["coach"]) == pytest.approx(sizes["coach"] ** 0.5)
        assert float(found["student"]) == pytest.approx((sizes["student"] + 4 * 8 + 8) ** 0.5)

    def test_checkpoints_hold_every_learner(self, tmp_path: Path) -> None:
        whole = trained(tmp_path / "a", mlp(4, 2), objective(), learners={"coach": Learner(mlp(8, 1))})
        trained(tmp_path / "b", mlp(4, 2), objective(), learners={"coach": Learner(mlp(8, 1))}, save_strategy="steps",
                save_steps=2)  # fmt: skip
        checkpoint = tmp_path / "b" / "checkpoint-2"
        assert (checkpoint / "learners/coach/model.safetensors").is_file()
        resumed = trained(tmp_path / "b", mlp(4, 9), objective(), learners={"coach": Learner(mlp(8, 9))},
                          resume=checkpoint)  # fmt: skip
        assert torch.equal(flat(resumed.distillation_module), flat(whole.distillation_module))


class TestWhoHearsWhom:
    def test_peers_of_other_architectures_and_inputs(self, tmp_path: Path) -> None:
        """A BERT and a DistilBERT learn from each other: only one of them takes token types."""
        peer, learner = teacher(), student()
        terms = {"peer": Term("kl", teacher="student/logits"), "hard": Term("cross_entropy")}
        made = DistillationTrainer(
            model=learner,
            objective=Objective({"soft": Term("kl", teacher="peer/logits"), "hint": Term("mse", "hidden.1",
                                 "peer/hidden.2", project="linear"), "hard": Term("cross_entropy")}),
            learners={"peer": Learner(peer, Objective(terms))},
            train_dataset=pairs(),
            args=arguments(tmp_path, max_steps=2),
        )  # fmt: skip
        made.train()
        assert set(made._parts) == {"soft", "hint", "hard", "peer.peer", "peer.hard"}
        batch = next(iter(made.get_train_dataloader()))
        assert "token_type_ids" in batch

    def test_a_name_that_is_nobodys(self) -> None:
        lesson = Lesson(Learner(mlp(4, 2), objective(soft=Term("kl", teacher="caoch/logits"))))
        lesson.others = {"coach": Learner(mlp(8, 1)), "other": Learner(mlp(8, 3))}
        with pytest.raises(TrainingError, match=r"'student' reads 'caoch/logits'.*did you mean 'coach'\?"):
            JointModule(lesson)

    def test_only_what_is_read_is_tapped(self) -> None:
        ramp = {"from": 0.0, "to": 1.0, "shape": "step", "end": 0.5}
        hint = Term("mse", "body.1", "coach/body.1", weight=ramp, project=nn.Linear(4, 8))
        soft = Term("kl", teacher="coach/logits")
        module = JointModule(Lesson(Learner(mlp(4, 2), objective(hint=hint, soft=soft)), {"coach": Learner(mlp(8, 1))}))
        assert module._asked("coach", Progress(0, 10)) == ["logits"]
        assert module._asked("coach", Progress(5, 10)) == ["body.1", "logits"]
        assert module.taught() == []

    def test_itself(self, tmp_path: Path) -> None:
        """`self/…` is cut from the graph: one's own answers at another temperature give no gradient through them."""
        model = mlp(4, 2)
        batch = rows().__getitems__(list(range(8)))
        made = trained(tmp_path, model, objective(soft=Term("mse", "body.1", "self/body.2")), max_steps=1)
        module = made.distillation_module
        module.zero_grad()
        module({}, **batch).loss.backward()
        own = copy.deepcopy(model)
        own.zero_grad()
        hidden = own.body[1](own.body[0](batch["features"]))
        ((hidden - own.body[2](hidden).detach()) ** 2).mean().backward()
        wanted = own.body[1].weight.grad
        assert wanted is not None
        assert torch.allclose(model.body[1].weight.grad, wanted, rtol=0, atol=1e-7)


class TestSourcesWithin:
    """What changes or is kept on disk may stand inside an ensemble."""

    @staticmethod
    def parts() -> tuple[Any, Any, nn.Module]:
        learner = mlp(4, 2)
        mean = moving_average(SourceContext("mean", student=learner), decay=0.5, warm_up=False)
        return mean, Ensemble({"mean": mean, "fixed": Live(mlp(8, 1))}), learner

    def test_an_average_in_an_ensemble_moves_once_a_step_and_is_saved(self, tmp_path: Path) -> None:
        """Named twice, by itself and in the ensemble, it would move twice a step."""
        mean, both, learner = self.parts()
        terms = objective(soft=Term("kl", teacher="both/logits"), calm=Term("kl", teacher="mean/logits"))
        made = trained(tmp_path, learner, terms, teacher={"mean": mean, "both": both}, save_strategy="steps",
                       save_steps=2, max_steps=3)  # fmt: skip
        assert [float(v) for k, v in mean.state_dict().items() if k == "updates"] == [3.0]
        mean2, both2, other = self.parts()
        again = trained(tmp_path, other, objective(**dict(terms.named_terms())), teacher={"mean": mean2, "both": both2},
                        resume=tmp_path / "checkpoint-2", max_steps=3)  # fmt: skip
        assert torch.equal(flat(mean.model), flat(mean2.model))
        assert torch.equal(flat(again.distillation_module.student), flat(made.distillation_module.student))

    def test_every_teacher_within_gets_its_columns(self, tmp_path: Path) -> None:
        """A BERT in an ensemble without its token types would be silently wrong."""
        both = Ensemble({"one": Live(teacher()), "other": Live(teacher())})
        made = DistillationTrainer(model=student(), teacher=both, train_dataset=pairs(), args=arguments(tmp_path))
        assert "token_type_ids" in next(iter(made.get_train_dataloader()))

    def test_one_that_nobody_reads_is_not_loaded(self, tmp_path: Path) -> None:
        def load() -> Live:
            raise AssertionError

        sources = {"large": Deferred(load), "small": Live(mlp(8, 1))}
        trained(tmp_path, mlp(4, 2), objective(soft=Term("kl", teacher="small/logits")), teacher=sources, max_steps=2)

    @pytest.mark.parametrize("name", ["student", "self"])
    def test_names_that_are_taken(self, name: str) -> None:
        with pytest.raises(TrainingError, match=f"cannot be called '{name}'"):
            JointModule(
                Lesson(Learner(mlp(4, 2), objective()), {name: Learner(mlp(8, 1)), "other": Learner(mlp(8, 3))})
            )
