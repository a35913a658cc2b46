"""What happens beside the training: early stopping, best checkpoint, agreement, weight constraint, what is logged."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from potstill.data.batching import InMemory
from potstill.errors import ComponentError, TrainingError
from potstill.interfaces import IGNORED, Batch, Signals
from potstill.losses.objective import Objective, Term
from potstill.losses.ramps import Ramp
from potstill.models.plain import ConvNet, Mlp
from potstill.recipe.arguments import make_training
from potstill.recipe.schema import TrainSpec
from potstill.registry import callbacks
from potstill.teachers.live import Live, Several
from potstill.training.callbacks import Agreement, EarlyStopping, LogLines, MaxNorm
from potstill.training.checkpoints import latest_checkpoint
from potstill.training.trainer import DistillationTrainer, ready_batch
from tests.training.tiny import arguments, flat, pairs
from tests.training.tiny import student as bert_student
from tests.training.tiny import teacher as bert_teacher


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Every training begins with a full garbage collection, which need not look through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def rows(count: int = 16, *, unlabelled: int = 0) -> InMemory:
    draw = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 3, (count,), generator=draw)
    labels[:unlabelled] = IGNORED
    features = torch.randn(count, 6, generator=draw)
    return InMemory({"features": features, "labels": labels, "sample_id": torch.arange(count)})


def models() -> tuple[Mlp, Mlp]:
    torch.manual_seed(6)
    return Mlp(6, 3, [8]), Mlp(6, 3, [4], dropout=0.2)


class Weights(TrainerCallback):
    """Remembers the student's weights after every step."""

    def __init__(self) -> None:
        self.at: dict[int, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = flat(kwargs["model"].student)


class Die(TrainerCallback):
    """Ends the process, as a kill would, at the end of a step or once the training is over."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def scored(
    folder: Path, scores: Sequence[float], component: Any, *extra: TrainerCallback, **train: Any
) -> tuple[DistillationTrainer, Weights]:
    """A trainer, set up as by a recipe, whose metric ``score`` after step ``n`` is the ``n``-th of ``scores``."""
    options = {"max_steps": len(scores), "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "use_cpu": True}
    spec = TrainSpec(batch_size=8, callbacks=[component], **{**options, **train})
    setup = make_training(spec, folder=folder, seed=3, bars=False, evaluates=True)
    teacher, student = models()
    weights = Weights()
    made = DistillationTrainer(
        model=student,
        teacher=teacher,
        train_dataset=rows(),
        eval_dataset=rows(8),
        data_collator=ready_batch,
        args=setup.arguments,
        callbacks=[*setup.callbacks, weights, *extra],
        compute_metrics=lambda _: {"score": scores[made.state.global_step - 1]},
        **setup.keywords,
    )
    return made, weights


SCORES = [0.5, 0.7, 0.6, 0.7, 0.65, 0.9, 0.9, 0.9]


class TestEarlyStopping:
    def stopping(self, folder: Path, *extra: TrainerCallback, **options: Any) -> tuple[DistillationTrainer, Weights]:
        component = {"early_stopping": {"metric": "score", "patience": 3, **options}}
        return scored(folder, SCORES, component, *extra)

    def test_it_stops_and_keeps_the_best(self, tmp_path: Path) -> None:
        """The best is step 2; an equal score is no gain, so steps 3 to 5 are three without one."""
        trainer, weights = self.stopping(tmp_path)
        trainer.train()
        assert trainer.state.global_step == 5
        assert torch.equal(flat(trainer.distillation_module.student), weights.at[2])

    def test_patience_and_threshold(self, tmp_path: Path) -> None:
        trainer, _ = self.stopping(tmp_path / "patient", patience=4)
        trainer.train()
        assert trainer.state.global_step == len(SCORES)
        trainer, _ = self.stopping(tmp_path / "coarse", patience=2, threshold=0.3)
        trainer.train()
        assert trainer.state.global_step == 3  # 0.7 is no gain over 0.5 by a threshold of 0.3

    def test_a_loss_is_better_when_smaller(self, tmp_path: Path) -> None:
        component = {"early_stopping": {"metric": "score", "patience": 2, "greater_is_better": False}}
        trainer, weights = scored(tmp_path, [0.5, 0.4, 0.6, 0.5, 0.1], component)
        trainer.train()
        assert trainer.state.global_step == 4
        assert torch.equal(flat(trainer.distillation_module.student), weights.at[2])
        assert EarlyStopping("loss").training_arguments["greater_is_better"] is False

    @pytest.mark.parametrize("killed_at", [3, 4])
    def test_the_counter_survives_a_resume(self, tmp_path: Path, killed_at: int) -> None:
        """A counter that starts again would train longer, and give other weights, after every kill."""
        whole, _ = self.stopping(tmp_path / "whole")
        whole.train()
        folder = tmp_path / "cut"
        with pytest.raises(KeyboardInterrupt):
            self.stopping(folder, Die(killed_at))[0].train()
        latest = latest_checkpoint(folder)
        assert latest is not None
        resumed, weights = self.stopping(folder)
        resumed.train(resume_from_checkpoint=str(latest))
        assert sorted(weights.at) == list(range(int(latest.name.split("-")[1]) + 1, 6))
        assert torch.equal(flat(resumed.distillation_module), flat(whole.distillation_module))

    def test_a_run_killed_after_it_stopped_does_not_go_on(self, tmp_path: Path) -> None:
        """Killed before its weights were saved: going on would meet the 0.9 of step 6 and keep other weights."""
        first, _ = self.stopping(tmp_path)
        first.train()
        resumed, weights = self.stopping(tmp_path)
        resumed.train(resume_from_checkpoint=str(latest_checkpoint(tmp_path)))
        assert resumed.state.global_step == 5
        assert not weights.at
        assert torch.equal(flat(resumed.distillation_module), flat(first.distillation_module))

    def test_nothing_to_stop_by(self, tmp_path: Path) -> None:
        spec = TrainSpec(callbacks=["early_stopping"])
        with pytest.raises(TrainingError, match="early_stopping needs a validation split with labels"):
            make_training(spec, folder=tmp_path, seed=0, bars=False, evaluates=False)
        teacher, student = models()
        trainer = DistillationTrainer(
            model=student,
            teacher=teacher,
            train_dataset=rows(),
            data_collator=ready_batch,
            callbacks=[EarlyStopping()],
            args=arguments(tmp_path, remove_unused_columns=False),
        )
        with pytest.raises(TrainingError, match="early_stopping needs a validation split"):
            trainer.train()

    @pytest.mark.parametrize("component", ["early_stopping", "best_checkpoint"])
    def test_a_metric_that_no_evaluation_gives(self, tmp_path: Path, component: str) -> None:
        trainer, _ = scored(tmp_path, SCORES, {component: {"metric": "scores"}})
        with pytest.raises(TrainingError, match=r"no evaluation gives the metric 'scores'; did you mean 'score'\?"):
            trainer.train()

    def test_options_are_checked(self) -> None:
        problems = callbacks.check("early_stopping", {"patience": 0, "patient": 3})
        assert [problem.path for problem in problems] == [("patient",), ("patience",)]
        assert "patience" in str(problems[0].hint)
        with pytest.raises(ComponentError, match="did you mean 'early_stopping'"):
            callbacks.get("earlystopping")


class TestBestCheckpoint:
    def test_all_steps_are_done_and_the_best_weights_stay(self, tmp_path: Path) -> None:
        trainer, weights = scored(tmp_path, [0.5, 0.9, 0.6, 0.9, 0.2], {"best_checkpoint": {"metric": "score"}})
        trainer.train()
        assert trainer.state.global_step == 5
        assert torch.equal(flat(trainer.distillation_module.student), weights.at[2])

    def test_without_a_validation_split_it_is_refused(self, tmp_path: Path) -> None:
        """Left out without a word, the last weights would pass for the best."""
        spec = TrainSpec(callbacks=["best_checkpoint"])
        with pytest.raises(TrainingError, match="best_checkpoint needs a validation split with labels"):
            make_training(spec, folder=tmp_path, seed=0, bars=False, evaluates=False)


class TestAgreement:
    def agreements(self, trainer: DistillationTrainer) -> list[float]:
        trainer.train()
        return [entry["eval_agreement"] for entry in trainer.state.log_history if "eval_agreement" in entry]

    def trainer(self, folder: Path, *extra: Any, **changes: Any) -> DistillationTrainer:
        teacher, student = models()
        settings: dict[str, Any] = {"teacher": teacher, "eval_dataset": rows(30)}
        steps = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "learning_rate": 0.1}
        return DistillationTrainer(
            model=student,
            train_dataset=rows(),
            data_collator=ready_batch,
            callbacks=list(extra),
            args=arguments(folder, **steps, remove_unused_columns=False, per_device_eval_batch_size=7),
            **{**settings, **changes},
        )

    def by_hand(self, weights: torch.Tensor, teacher: nn.Module, inputs: torch.Tensor) -> float:
        student = models()[1].eval()
        nn.utils.vector_to_parameters(weights.float(), student.parameters())
        with torch.no_grad():
            same = student(inputs).argmax(-1) == teacher.eval()(inputs).argmax(-1)
        return float(same.double().mean())

    def test_it_is_the_share_of_equal_answers(self, tmp_path: Path) -> None:
        weights = Weights()
        found = self.agreements(self.trainer(tmp_path, Agreement(), weights))
        inputs = rows(30).columns["features"]
        wanted = [self.by_hand(weights.at[step], models()[0], inputs) for step in (1, 2, 3)]
        assert found == pytest.approx(wanted, abs=1e-12)
        assert len(set(found)) > 1  # else the figure might be a constant

    def test_watching_changes_no_bit(self, tmp_path: Path) -> None:
        """A draw from the global generator, or a student left in eval mode, would change the dropout that follows."""
        watched = self.trainer(tmp_path / "a", Agreement())
        watched.train()
        alone = self.trainer(tmp_path / "b")
        alone.train()
        assert torch.equal(flat(watched.distillation_module), flat(alone.distillation_module))

    def test_of_several_teachers_the_first(self, tmp_path: Path) -> None:
        first, second = models()[0], Mlp(6, 3)
        several = Several({"a": Live(first), "b": Live(second)})
        objective = Objective({"soft": Term("kl", teacher="a/logits"), "other": Term("kl", teacher="b/logits")})
        weights = Weights()
        trainer = self.trainer(tmp_path, Agreement(), weights, teacher=several, objective=objective)
        found = self.agreements(trainer)
        assert found[0] == pytest.approx(self.by_hand(weights.at[1], first, rows(30).columns["features"]), abs=1e-12)

    def test_tables_and_several_validation_sets(self, tmp_path: Path) -> None:
        table = pairs(12)
        args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=1, per_device_eval_batch_size=5)
        trainer = DistillationTrainer(
            model=bert_student(),
            teacher=bert_teacher(),
            train_dataset=table,
            eval_dataset={"a": table.select(range(5)), "b": table.select(range(5, 12))},
            callbacks=[Agreement()],
            args=args,
        )
        found = self.agreements(trainer)
        columns = ("input_ids", "attention_mask", "token_type_ids")
        batch = {name: torch.tensor(table[name]) for name in columns}
        module = trainer.distillation_module
        with torch.no_grad():
            said = module.student.eval()(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1)
            taught = bert_teacher().eval()(**batch).logits.argmax(-1)
        assert found == [pytest.approx(float((said == taught).double().mean()), abs=1e-12)] * 2

    def test_without_a_teacher_there_is_none(self, tmp_path: Path) -> None:
        hard = Objective({"hard": Term("cross_entropy")})
        assert self.agreements(self.trainer(tmp_path, Agreement(), teacher=None, objective=hard)) == []


class TestMaxNorm:
    @pytest.mark.parametrize("kind", ["linear", "convolutional"])
    def test_no_row_is_longer_after_any_step(self, tmp_path: Path, kind: str) -> None:
        torch.manual_seed(6)
        linear = kind == "linear"
        student: nn.Module = Mlp(16, 3, [5]) if linear else ConvNet(1, 3, [4, 5])
        shape = (16, 16) if linear else (16, 1, 4, 4)
        name = "features" if linear else "pixel_values"
        data = InMemory({name: torch.randn(shape), "labels": torch.arange(16) % 3, "sample_id": torch.arange(16)})
        longest: list[float] = []
        raw: list[float] = []

        class Measure(TrainerCallback):
            def lengths(self, model: Any) -> list[torch.Tensor]:
                weights = [m.weight for m in model.student.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
                return [weight.detach().flatten(1).norm(dim=1) for weight in weights]

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                longest.append(max(float(each.max()) for each in self.lengths(kwargs["model"])))

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                raw.append(max(float(each.max()) for each in self.lengths(kwargs["model"])))

        trainer = DistillationTrainer(
            model=student,
            objective=Objective({"hard": Term("cross_entropy")}),
            train_dataset=data,
            data_collator=ready_batch,
            callbacks=[Measure(), MaxNorm(0.4)],  # the first sees the weights before they are shortened
            args=arguments(tmp_path, learning_rate=0.5, max_steps=5, optim="sgd", remove_unused_columns=False),
        )
        trainer.train()
        assert len(longest) == 5
        assert max(longest) <= 0.4 + 1e-5
        assert min(raw) > 0.4 + 1e-3  # every step would have gone beyond

    def test_projectors_are_left_alone(self, tmp_path: Path) -> None:
        teacher, student = models()
        projector = nn.Linear(4, 8)
        with torch.no_grad():
            projector.weight.fill_(3.0)
        objective = Objective({"hint": Term("mse", "body.1", "body.1", project=projector)})
        trainer = DistillationTrainer(
            model=student,
            teacher=teacher,
            objective=objective,
            train_dataset=rows(),
            data_collator=ready_batch,
            callbacks=[MaxNorm(0.3)],
            args=arguments(tmp_path, max_steps=1, remove_unused_columns=False),
        )
        trainer.train()
        assert float(projector.weight.detach().norm(dim=1).min()) > 5
        assert float(student.head.weight.detach().norm(dim=1).max()) <= 0.3 + 1e-5

    def test_a_recipe_asks_for_it_by_train_max_norm(self, tmp_path: Path) -> None:
        setup = make_training(TrainSpec(max_norm=1.5), folder=tmp_path, seed=0, bars=False, evaluates=False)
        assert [callback.bound for callback in setup.callbacks if isinstance(callback, MaxNorm)] == [1.5]


class TestLoggedTerms:
    """With a learning rate of 0 the weights stay, so every logged figure can be computed afterwards."""

    SIZE, ACCUMULATION, EVERY, STEPS = 4, 3, 2, 8

    def trainer(self, folder: Path, heard: list[list[int]], *extra: TrainerCallback) -> DistillationTrainer:
        teacher, _ = models()
        live = Live(teacher)

        def listening(batch: Batch) -> Signals:
            heard.append(batch["sample_id"].tolist())
            return live(batch)

        objective = Objective(
            {
                "soft": Term("kl", weight=Ramp(1.0, 0.0), temperature=Ramp(4.0, 2.0)),
                "hard": Term("cross_entropy", weight=0.3),
            }
        )
        args = arguments(
            folder,
            learning_rate=0.0,
            max_steps=self.STEPS,
            per_device_train_batch_size=self.SIZE,
            gradient_accumulation_steps=self.ACCUMULATION,
            logging_strategy="steps",
            logging_steps=self.EVERY,
            save_strategy="steps",
            save_steps=1,
            remove_unused_columns=False,
        )
        return DistillationTrainer(
            model=self.student(),
            teacher=listening,
            objective=objective,
            train_dataset=rows(22, unlabelled=7),  # 6 micro-batches an epoch, the last of 2 samples
            data_collator=ready_batch,
            callbacks=list(extra),
            args=args,
        )

    def student(self) -> Mlp:
        torch.manual_seed(7)
        return Mlp(6, 3, [4])

    def by_hand(self, heard: list[list[int]]) -> list[dict[str, float]]:
        data, teacher, student = rows(22, unlabelled=7).columns, models()[0], self.student()
        with torch.no_grad():
            said, taught = student(data["features"]).double(), teacher(data["features"]).double()
        values: list[dict[str, float]] = []
        for step in range(self.STEPS):
            batches = heard[step * self.ACCUMULATION : (step + 1) * self.ACCUMULATION]
            ids = torch.tensor([sample for batch in batches for sample in batch])
            done = step / self.STEPS
            temperature, weight = 4 - 2 * done, 1 - done
            log_student = F.log_softmax(said[ids] / temperature, -1)
            log_teacher = F.log_softmax(taught[ids] / temperature, -1)
            soft = temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()
            hard = F.cross_entropy(said[ids], data["labels"][ids])  # the mean over the labelled
            total = weight * soft + 0.3 * hard
            values.append({"loss": float(total), "loss/soft": float(soft), "loss/hard": float(hard)})
        lines = []
        for step in range(self.EVERY, self.STEPS + 1, self.EVERY):
            window = values[step - self.EVERY : step]
            line = {name: sum(value[name] for value in window) / self.EVERY for name in values[0]}
            done = step / self.STEPS
            lines.append({**line, "weight/soft": 1 - done, "temperature/soft": 4 - 2 * done})
        return lines

    def lines(self, trainer: DistillationTrainer) -> list[Mapping[str, float]]:
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    def test_each_figure_is_the_mean_over_its_windows(self, tmp_path: Path) -> None:
        """Means of micro-batch means, or a sum over the micro-batches, are the usual ways to log something else."""
        heard: list[list[int]] = []
        trainer = self.trainer(tmp_path, heard)
        trainer.train()
        assert [len(ids) for ids in heard[:6]] == [4, 4, 4, 4, 4, 2]
        found, wanted = self.lines(trainer), self.by_hand(heard)
        assert len(found) == len(wanted) == 4
        for line, figures in zip(found, wanted, strict=True):
            assert {name: line[name] for name in figures} == pytest.approx(figures, rel=1e-5, abs=1e-6)
        assert not any(name.startswith("weight/hard") for line in found for name in line)  # it does not change

    def test_a_resumed_run_logs_the_same_figures(self, tmp_path: Path) -> None:
        """Divided by the steps since the start and not since the checkpoint, the first line would be far too small."""
        heard: list[list[int]] = []
        whole = self.trainer(tmp_path / "whole", heard)
        whole.train()
        with pytest.raises(KeyboardInterrupt):
            self.trainer(tmp_path / "cut", [], Die(4)).train()
        resumed = self.trainer(tmp_path / "cut", [])
        latest = latest_checkpoint(tmp_path / "cut")
        assert latest is not None
        assert latest.name == "checkpoint-4"
        resumed.train(resume_from_checkpoint=str(latest))
        names = ("step", "loss", "loss/soft", "loss/hard", "weight/soft", "temperature/soft")
        pick = [[line[name] for name in names] for line in self.lines(resumed)]
        assert pick == [pytest.approx([line[name] for name in names]) for line in self.lines(whole)]

    def test_a_term_of_weight_0_is_left_out(self, tmp_path: Path) -> None:
        teacher, student = models()
        objective = Objective({"soft": Term("kl", weight=Ramp(0.0, 1.0, begin=0.5)), "hard": Term("cross_entropy")})
        trainer = DistillationTrainer(
            model=student,
            teacher=teacher,
            objective=objective,
            train_dataset=rows(),
            data_collator=ready_batch,
            args=arguments(tmp_path, logging_strategy="steps", logging_steps=1, remove_unused_columns=False),
        )
        trainer.train()
        assert ["loss/soft" in line for line in self.lines(trainer)] == [False, False, False, True]
        assert all("loss/hard" in line and "weight/soft" in line for line in self.lines(trainer))


def logged(caplog: pytest.LogCaptureFixture, level: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if (r.name, r.levelname) == ("potstill", level)]


class TestLogLines:
    def test_they_say_what_is_trained(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """One line an evaluation at info level, one a loss at debug level, and none of Trainer's bare dictionaries."""
        caplog.set_level(logging.DEBUG, logger="potstill")
        trainer, _ = scored(tmp_path, [0.5, 0.25], {"best_checkpoint": {"metric": "score"}}, LogLines("distilled"))
        trainer.train()
        first, second, kept = logged(caplog, "INFO")
        assert first.startswith("distilled: step 1 of 2: ")
        assert second.startswith("distilled: step 2 of 2: ")
        assert "score 0.5" in first
        assert "runtime" not in first
        assert kept == "distilled: keeps the weights of step 1 (score 0.5)"
        assert {"loss/soft", "loss/hard"} <= set(logged(caplog, "DEBUG")[0].replace(",", "").split())

    def test_a_training_that_stopped_early_says_so(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="potstill")
        component = {"early_stopping": {"metric": "score", "patience": 3}}
        scored(tmp_path, SCORES, component, LogLines("teacher"))[0].train()
        assert logged(caplog, "INFO")[-2:] == [
            "teacher: stopped early, at step 5 of 8",
            "teacher: keeps the weights of step 2 (score 0.7)",
        ]
