"""The trainer beside the engine contract: Trainer's own features around a distillation module."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from potstill.data.augment import make_views
from potstill.data.batching import InMemory
from potstill.errors import ModelError, TrainingError
from potstill.interfaces import IGNORED, Batch, Signals
from potstill.losses.objective import Objective, Term
from potstill.models.plain import Mlp
from potstill.teachers.live import Live, Several, ask
from potstill.training.checkpoints import latest_checkpoint
from potstill.training.trainer import DistillationTrainer, ready_batch
from tests.training.tiny import arguments, flat, pairs, relative, student, teacher


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Every training begins with a full garbage collection, which need not look through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def rows(count: int = 24, *, labels: bool = True, unlabelled: int = 0) -> InMemory:
    draw = torch.Generator().manual_seed(5)
    columns = {"features": torch.randn(count, 6, generator=draw), "sample_id": torch.arange(count)}
    if labels:
        columns["labels"] = torch.randint(0, 3, (count,), generator=draw)
        columns["labels"][:unlabelled] = IGNORED
    return InMemory(columns)


def small() -> tuple[Mlp, Mlp]:
    torch.manual_seed(6)
    return Mlp(6, 3, [8]), Mlp(6, 3, [4])


def trainer(folder: Path, *, kind: type[DistillationTrainer] = DistillationTrainer, **changes: Any) -> Any:
    """A trainer on rows; what is no argument of the trainer is a training argument."""
    tutor, learner = small()
    own = ("model", "teacher", "objective", "train_dataset", "eval_dataset", "callbacks", "compute_metrics")
    own += ("processing_class", "save_student", "data_collator", "forward", "projector_learning_rate")
    given = {name: changes.pop(name) for name in own if name in changes}
    defaults = {"model": learner, "teacher": tutor, "train_dataset": rows(), "data_collator": ready_batch}
    args = arguments(folder, **{"remove_unused_columns": False, **changes})
    return kind(args=args, **{**defaults, **given})


def score(prediction: Any) -> dict[str, float]:
    known = prediction.label_ids != IGNORED
    right = prediction.predictions.argmax(-1)[known] == prediction.label_ids[known]
    return {"accuracy": float(right.mean()), "known": float(known.sum())}


class TestEvaluation:
    @pytest.mark.parametrize("unlabelled", [0, 3])
    def test_metrics_and_the_loss_are_those_of_the_student(self, tmp_path: Path, unlabelled: int) -> None:
        data = rows(20, unlabelled=unlabelled)
        made = trainer(tmp_path, eval_dataset=data, compute_metrics=score, per_device_eval_batch_size=20)
        found = made.evaluate()
        labels = data.columns["labels"]
        with torch.no_grad():
            said = made.distillation_module.student.eval()(data.columns["features"])
        right = (said.argmax(-1) == labels)[labels != IGNORED].double().mean()
        assert found["eval_known"] == 20 - unlabelled
        assert found["eval_accuracy"] == pytest.approx(float(right))
        assert found["eval_loss"] == pytest.approx(float(F.cross_entropy(said, labels)), rel=1e-5)

    def test_several_validation_sets_have_their_own_figures(self, tmp_path: Path) -> None:
        sets = {"a": rows(6), "b": rows(20, unlabelled=3)}
        found = trainer(tmp_path / "both", eval_dataset=sets, compute_metrics=score).evaluate()
        for name, data in sets.items():
            alone = trainer(tmp_path / name, eval_dataset=data, compute_metrics=score).evaluate()
            assert found[f"eval_{name}_accuracy"] == alone["eval_accuracy"]
            assert found[f"eval_{name}_loss"] == pytest.approx(alone["eval_loss"])

    def test_dropout_is_off(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, model=Mlp(6, 3, [64], dropout=0.9), eval_dataset=rows())
        made.distillation_module.train()
        assert made.evaluate()["eval_loss"] == made.evaluate()["eval_loss"]

    def test_rows_without_any_label_give_logits_and_no_loss(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, objective=Objective({"soft": Term("kl")}), eval_dataset=rows(5, labels=False))
        found = made.predict(made.eval_dataset)
        assert found.predictions.shape == (5, 3)
        assert "test_loss" not in found.metrics
        made = trainer(tmp_path, eval_dataset=rows(5, unlabelled=5))
        assert "eval_loss" not in made.evaluate()


class TestTeachers:
    def test_a_plain_callable_is_a_teacher(self, tmp_path: Path) -> None:
        tutor, _ = small()

        def source(batch: Batch) -> Signals:
            with torch.no_grad():
                return {"logits": tutor(batch["features"])}

        by_module, by_function = (trainer(tmp_path / str(i), teacher=t) for i, t in enumerate((tutor, source)))
        for made in (by_module, by_function):
            made.train()
        assert torch.equal(flat(by_function.distillation_module), flat(by_module.distillation_module))

    def test_what_is_neither_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=r"expected a teacher that is a module or a callable .* got str"):
            trainer(tmp_path, teacher="bert-base-uncased")

    def test_signals_of_a_callable_get_no_gradient(self, tmp_path: Path) -> None:
        """A teacher that forgot `no_grad` must not be trained, nor pull on the loss from its side."""
        tutor, _ = small()
        before = flat(tutor)
        made = trainer(tmp_path, teacher=lambda batch: {"logits": tutor(batch["features"])})
        made.train()
        assert all(parameter.grad is None for parameter in tutor.parameters())
        assert torch.equal(flat(tutor), before)

    def test_the_default_objective_and_a_dictionary_of_terms(self, tmp_path: Path) -> None:
        default = trainer(tmp_path / "a")
        terms = {"soft": Term("kl", weight=0.7, temperature=4.0), "hard": Term("cross_entropy", weight=0.3)}
        given = trainer(tmp_path / "b", objective=terms)
        for made in (default, given):
            made.train()
        assert torch.equal(flat(given.distillation_module), flat(default.distillation_module))


class TestWhatIsNotRead:
    """A term of weight 0 costs nothing: no tap on its account, and no forward of a teacher of whom nothing is read."""

    def terms(self) -> dict[str, Term]:
        early = {"from": 1.0, "to": 0.0, "shape": "step", "end": 2}
        late = {"from": 0.0, "to": 1.0, "shape": "step", "end": 4}
        return {
            "soft": Term("kl", weight=early),
            "hint": Term("mse", "hidden.1", "hidden.2", project="linear", weight=late),
            "hard": Term("cross_entropy"),
        }

    def test_the_teacher_is_asked_for_what_is_read_and_then_not_at_all(self, tmp_path: Path, monkeypatch: Any) -> None:
        calls: list[int] = []
        taught, learner = teacher(), student()
        forward = type(taught).forward

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(taught), "forward", counted)
        seen: list[list[str]] = []
        made = DistillationTrainer(
            model=learner,
            teacher=taught,
            objective=self.terms(),
            args=arguments(tmp_path, max_steps=6),
            train_dataset=pairs(),
        )
        module, signals = made.distillation_module, made.distillation_module.signals
        monkeypatch.setattr(
            module,
            "signals",
            lambda batch, progress=None: seen.append(module._taps(progress)) or signals(batch, progress),
        )
        made.train()
        assert len(calls) == 1 + 2 + 2  # the dry run, then steps 0 and 1 for the answers, 4 and 5 for the hidden states
        assert seen[-6:] == [[], [], [], [], ["hidden.1"], ["hidden.1"]]

    def test_it_trains_as_with_a_teacher_who_is_always_asked(self, tmp_path: Path) -> None:
        states = []
        for always in (False, True):
            made = DistillationTrainer(
                model=student(),
                teacher=teacher(),
                objective=self.terms(),
                args=arguments(tmp_path / str(always), max_steps=6),
                train_dataset=pairs(),
            )
            if always:
                made._taught = partial(ask, made.teacher, wanted=["logits", "hidden.2"])  # type: ignore[method-assign]
            made.train()
            states.append(flat(made.distillation_module))
        assert torch.equal(*states)

    def test_a_teacher_of_several_who_is_not_read_is_not_asked(self, tmp_path: Path) -> None:
        asked: list[str] = []

        def source(name: str) -> Any:
            def answer(batch: Batch) -> Signals:
                asked.append(name)
                return {"logits": torch.zeros(len(batch["sample_id"]), 3)}

            return answer

        terms = {
            "first": Term("kl", teacher="first/logits", weight={"from": 1.0, "to": 0.0, "shape": "step", "end": 3}),
            "second": Term("kl", teacher="second/logits", weight=0.5),
        }
        several = Several({name: source(name) for name in ("first", "second")})
        trainer(tmp_path, teacher=several, objective=terms, max_steps=4).train()
        assert asked.count("first") == 3
        assert asked.count("second") == 4

    def test_a_source_of_ones_own_is_as_before(self, tmp_path: Path) -> None:
        """A teacher that stayed narrowed after a training would lack signals in the next one."""
        source = Live(teacher(), ["hidden.2"])
        terms = {"soft": Term("kl"), "hint": Term("mse", "hidden.1", "hidden.2", project="linear", weight=0.0)}
        made = DistillationTrainer(
            model=student(),
            teacher=source,
            objective=terms,
            args=arguments(tmp_path, max_steps=1),
            train_dataset=pairs(),
        )
        made.train()
        batch = {key: torch.tensor(values) for key, values in pairs(2).to_dict().items()}
        assert set(source(batch)) == {"logits", "hidden.2"}


class TestWithoutLabels:
    def test_soft_terms_need_none(self, tmp_path: Path) -> None:
        soft = {"soft": Term("kl")}
        without = trainer(tmp_path / "a", objective=soft, train_dataset=rows(labels=False))
        with_them = trainer(tmp_path / "b", objective={"soft": Term("kl")})
        for made in (without, with_them):
            made.train()
        assert torch.equal(flat(without.distillation_module), flat(with_them.distillation_module))

    def test_tables_without_labels(self, tmp_path: Path) -> None:
        table = pairs(8).remove_columns("labels")
        made = DistillationTrainer(
            model=student(),
            teacher=teacher(),
            objective={"soft": Term("kl")},
            train_dataset=table,
            args=arguments(tmp_path, max_steps=1),
        )
        before = flat(made.distillation_module.student)
        made.train()
        assert not torch.equal(flat(made.distillation_module.student), before)

    def test_hard_terms_say_what_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(Exception, match="cross_entropy compares with labels and the batch has none"):
            trainer(tmp_path, train_dataset=rows(labels=False)).train()


class TestSubclass:
    def test_one_that_adds_to_the_loss(self, tmp_path: Path) -> None:
        """The usual subclass; its loss is a mean over the micro-batch, and accumulation must average, not add up."""

        class Penalised(DistillationTrainer):
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
                loss, output = super().compute_loss(model, inputs, return_outputs=True)
                loss = loss + 0.1 * sum(p.square().sum() for p in model.parameters())
                return (loss, output) if return_outputs else loss

        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
        moves = []
        for size, accumulation in ((24, 1), (6, 4)):
            sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
            made = trainer(tmp_path / str(size), kind=Penalised, **sizes, **settings)
            made.train()
            moves.append(flat(made.distillation_module) - flat(small()[1]))
        assert relative(moves[1], moves[0]) < 1e-6

    def test_one_that_brings_its_own_optimizer(self, tmp_path: Path) -> None:
        class Own(DistillationTrainer):
            def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.25)
                return self.optimizer

        made = trainer(tmp_path, kind=Own, max_steps=1)
        made.train()
        assert made.optimizer.param_groups[0]["initial_lr"] == 0.25


class Tokenizer:
    """Saves itself as a tokenizer would."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


class TestSaving:
    def test_the_processing_class_is_saved_with_the_student(self, tmp_path: Path) -> None:
        """A student without its tokenizer is answered with another one's tokens."""
        made = trainer(tmp_path / "run", processing_class=Tokenizer(), save_strategy="steps", save_steps=4)
        made.train()
        made.save_model(str(tmp_path / "student"))
        assert {path.name for path in (tmp_path / "student").iterdir()} == {"model.safetensors", "tokenizer.json"}
        assert (tmp_path / "run/checkpoint-4/tokenizer.json").exists()

    def test_own_ways_to_save(self, tmp_path: Path) -> None:
        saved: list[tuple[nn.Module, Path]] = []
        made = trainer(tmp_path, save_student=lambda model, folder: saved.append((model, folder)))
        made.save_model(str(tmp_path / "x"))
        assert saved == [(made.distillation_module.student, tmp_path / "x")]

    def test_a_projector_goes_on_where_it_was(self, tmp_path: Path) -> None:
        """Left at a random start after a resume, a projector makes the hint nonsense, and nothing shows it."""
        hint = {"hint": Term("mse", "body.1", "body.1", project="linear")}
        made = trainer(tmp_path, objective=hint, save_strategy="steps", save_steps=2, max_steps=4)
        made.train()
        again = trainer(
            tmp_path,
            objective={"hint": Term("mse", "body.1", "body.1", project="linear")},
            save_strategy="steps",
            save_steps=2,
            max_steps=4,
        )
        again._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
        assert torch.equal(flat(again.distillation_module), flat(made.distillation_module))
        (tmp_path / "checkpoint-4/objective.safetensors").unlink()
        with pytest.raises(ModelError, match=r"objective\.safetensors, and there is no such file"):
            again._load_from_checkpoint(str(tmp_path / "checkpoint-4"))


class TestResume:
    @pytest.mark.parametrize(("epochs", "size"), [(2.5, 8), (2.0, 8), (0.5, 4)])
    def test_a_finished_training_does_no_further_step(self, tmp_path: Path, epochs: float, size: int) -> None:
        """Killed after the last checkpoint: Trainer does one more step if the training ends within an epoch."""
        settings = {"max_steps": -1, "num_train_epochs": epochs, "save_strategy": "steps", "save_steps": 2}
        settings |= {"per_device_train_batch_size": size}
        whole = trainer(tmp_path, **settings)
        whole.train()
        again = trainer(tmp_path, **settings)
        again.train(resume_from_checkpoint=str(latest_checkpoint(tmp_path)))
        assert again.state.global_step == whole.state.global_step == again.state.max_steps
        assert torch.equal(flat(again.distillation_module), flat(whole.distillation_module))


class TestNumbers:
    @pytest.mark.parametrize("bound", [0.01, 0.1])
    def test_clipping_bounds_the_whole_gradient(self, tmp_path: Path, bound: float) -> None:
        """Student and projector together, once a step and not once a micro-batch."""
        hint = Term("mse", "body.1", "body.1", project=nn.Linear(4, 8), weight=50.0)
        objective = {"soft": Term("kl"), "hint": hint}
        settings = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "lr_scheduler_type": "constant"}
        settings |= {"gradient_accumulation_steps": 3}
        made = trainer(tmp_path, objective=objective, max_grad_norm=bound, **settings)
        before = flat(made.distillation_module)
        made.train()
        assert float((flat(made.distillation_module) - before).norm()) == pytest.approx(bound, rel=1e-3)

    def test_losses_stay_in_fp32_under_bf16_autocast(self, tmp_path: Path) -> None:
        """At 8 bits of mantissa, T²·KL of near answers is mostly rounding."""
        seen: dict[str, set[torch.dtype]] = {"student": set(), "parts": set(), "loss": set()}

        class Watched(DistillationTrainer):
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
                loss, output = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
                seen["loss"].add(loss.dtype)
                seen["parts"] |= {part.dtype for part in output.parts.values()}
                return (loss, output) if return_outputs else loss

        def spy(student: Tensor, teacher: Tensor) -> Tensor:
            seen["student"].add(student.dtype)
            return (student.float() - teacher.float()).square().mean(-1)

        objective = {
            "soft": Term("kl", temperature=4.0),
            "logits": Term("mse"),
            "hard": Term("cross_entropy"),
            "spy": Term(spy),
        }
        made = trainer(tmp_path, kind=Watched, objective=objective, bf16=True, eval_dataset=rows())
        made.train()
        assert seen["student"] == {torch.bfloat16}
        assert seen["parts"] == seen["loss"] == {torch.float32}
        assert {parameter.dtype for parameter in made.distillation_module.parameters()} == {torch.float32}
        assert made.evaluate()["eval_loss"] > 0

    def test_loader_workers_change_nothing(self, tmp_path: Path) -> None:
        found = []
        for workers in (0, 2):
            views = make_views([{"noise": {"std": 0.5}}], key="features", seed=7, num_classes=3, finish=None)
            data = InMemory(rows().columns, views)
            made = trainer(tmp_path / str(workers), train_dataset=data, dataloader_num_workers=workers, max_steps=7)
            made.train()
            found.append(flat(made.distillation_module))
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], flat(small()[1]))

    def test_a_batch_of_unlabelled_rows_gives_no_nan(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, train_dataset=rows(unlabelled=24), logging_strategy="steps", logging_steps=1)
        made.train()
        lines = [entry for entry in made.state.log_history if "loss" in entry]
        assert {line["loss/hard"] for line in lines} == {0.0}
        assert all(np.isfinite(line["loss"]) and line["loss/soft"] > 0 for line in lines)
        assert bool(flat(made.distillation_module).isfinite().all())


class TestMaterialize:
    def made(self, folder: Path, **changes: Any) -> Any:
        return trainer(folder, objective={"hint": Term("mse", "body.1", "body.1", project="linear")}, **changes)

    def test_it_leaves_every_random_generator_as_it_was(self, tmp_path: Path) -> None:
        """Else dropout and order differ between a run with a projector and its resumption, which needs no dry run."""
        made = self.made(tmp_path)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(11)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        made.materialize()
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])

    def test_the_projector_has_the_sizes_of_the_signals_and_is_made_once(self, tmp_path: Path) -> None:
        made = self.made(tmp_path)
        term = made.distillation_module.objective.terms["hint"]
        assert term.projector is None
        made.materialize()
        first = term.projector
        assert tuple(first.weight.shape) == (8, 4)
        made.train()
        assert term.projector is first
        assert made.optimizer is not None
        assert any(p is first.weight for group in made.optimizer.param_groups for p in group["params"])

    def test_the_same_seed_gives_the_same_projector(self, tmp_path: Path) -> None:
        weights = []
        for number in range(2):
            made = self.made(tmp_path / str(number), seed=3)
            made.materialize()
            weights.append(flat(made.distillation_module.objective))
        assert torch.equal(*weights)


class TestOrder:
    def test_every_sample_once_an_epoch_and_another_order_each(self, tmp_path: Path) -> None:
        tutor, _ = small()
        heard: list[int] = []

        def source(batch: Batch) -> Mapping[str, Tensor]:
            heard.extend(batch["sample_id"].tolist())
            with torch.no_grad():
                return {"logits": tutor(batch["features"])}

        trainer(tmp_path, teacher=source, max_steps=6).train()
        assert sorted(heard[:24]) == sorted(heard[24:]) == list(range(24))
        assert heard[:24] != heard[24:]
        assert heard[:24] != list(range(24))

    def test_the_teacher_is_asked_once_a_batch(self, tmp_path: Path) -> None:
        tutor, _ = small()
        calls: list[int] = []

        def source(batch: Batch) -> Signals:
            calls.append(len(batch["sample_id"]))
            with torch.no_grad():
                return {"logits": tutor(batch["features"])}

        settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 6, "max_steps": 2}
        trainer(tmp_path, teacher=source, **settings).train()
        assert calls == [6, 6, 6, 6]


class TestHub:
    """What people bring from Trainer: tables, collators, callbacks, trackers."""

    def test_a_table_and_a_collator_of_ones_own(self, tmp_path: Path) -> None:
        def collate(samples: list[dict[str, Any]]) -> Batch:
            return {name: torch.tensor([sample[name] for sample in samples]) for name in samples[0]}

        table = pairs(16)
        own, default = (
            DistillationTrainer(
                model=student(),
                teacher=teacher(),
                train_dataset=table,
                args=arguments(tmp_path / str(number), max_steps=2),
                **({"data_collator": collate} if number else {}),
            )
            for number in range(2)
        )
        for made in (own, default):
            made.train()
        assert torch.equal(flat(own.distillation_module), flat(default.distillation_module))

    def test_callbacks_see_the_module_and_the_log_is_plain_json(self, tmp_path: Path) -> None:
        seen: list[str] = []

        class Look(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                seen.append(type(kwargs["model"]).__name__)

        made = trainer(tmp_path, callbacks=[Look()], logging_strategy="steps", logging_steps=2)
        made.train()
        assert seen == ["DistillationModule"] * 4
        assert json.loads(json.dumps(made.state.log_history)) == made.state.log_history

    def test_the_given_table_is_not_changed(self, tmp_path: Path) -> None:
        table = pairs(8)
        names = list(table.column_names)
        made = DistillationTrainer(model=student(), teacher=teacher(), train_dataset=table, args=arguments(tmp_path))
        assert table.column_names == names
        assert isinstance(made.train_dataset, Dataset)
