"""The engine contract, line by line: each test fails when its line is broken."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainerCallback

from potstill.data.augment import make_views
from potstill.data.batching import InMemory
from potstill.errors import ModelError, RecipeError, SignalError, TrainingError
from potstill.interfaces import Batch, Signals
from potstill.knowledge.capture import capture
from potstill.losses.objective import Objective, Term
from potstill.models.plain import ConvNet
from potstill.recipe.load import load_recipe, recipe_from
from potstill.runs.steps import Run
from potstill.teachers.live import Live
from potstill.training.checkpoints import latest_checkpoint
from potstill.training.module import DistillationModule
from potstill.training.trainer import DistillationTrainer, ready_batch
from tests.training.tiny import arguments, flat, pairs, relative, student, teacher


def terms(**changes: Any) -> Objective:
    """Response, hard and feature terms with a projector, sized by hand."""
    return Objective(
        {
            "soft": Term("kl", weight=0.7, temperature=4.0),
            "hard": Term("cross_entropy", weight=0.3),
            "hint": Term("mse", "hidden.1", "hidden.2", project=projector(), weight=0.5),
            **changes,
        }
    )


def projector() -> nn.Linear:
    torch.manual_seed(4)
    return nn.Linear(32, 48)


def trained(folder: Path, objective: Objective | None = None, **changes: Any) -> DistillationTrainer:
    """One trainer after training on the pairs."""
    table = changes.pop("table", None) or pairs(unlabelled=5)
    trainer = DistillationTrainer(
        teacher=changes.pop("teacher", None) or teacher(),
        model=changes.pop("model", None) or student(),
        objective=objective or terms(),
        train_dataset=table,
        **{name: changes.pop(name) for name in ("callbacks", "eval_dataset") if name in changes},
        args=arguments(folder, **changes),
    )
    trainer.train()
    return trainer


class TestLine1Delegation:
    """A bare bundle of student and objective fails in nine ways, several of them silent."""

    def test_attributes_are_the_students(self) -> None:
        inner = student()
        module = DistillationModule(inner, terms())
        assert module.config is inner.config
        assert module.get_input_embeddings() is inner.get_input_embeddings()
        assert module.device == inner.device
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = module.no_such_thing

    def test_trainer_features_that_reach_into_the_model_work(self, tmp_path: Path) -> None:
        changes = {"gradient_checkpointing": True, "neftune_noise_alpha": 5.0, "include_num_input_tokens_seen": True}
        trainer = trained(tmp_path, **changes)
        assert trainer.distillation_module.student.is_gradient_checkpointing
        assert trainer.state.num_input_tokens_seen > 0
        assert trainer.state.total_flos > 0

    def test_gradient_checkpointing_changes_no_gradient(self, tmp_path: Path) -> None:
        plain = trained(tmp_path / "a", max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0)
        saved = trained(
            tmp_path / "b", max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, gradient_checkpointing=True
        )
        assert relative(flat(saved.distillation_module), flat(plain.distillation_module)) < 1e-6


def one_step(folder: Path, size: int, accumulation: int, **changes: Any) -> torch.Tensor:
    """The gradient of one optimizer step over the whole table, read from a step of plain SGD."""
    objective = terms()
    before = torch.cat([flat(student()), flat(objective)])
    settings = {
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }
    trainer = trained(
        folder,
        objective,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        **{**settings, **changes},
    )
    module = trainer.distillation_module
    return before - torch.cat([flat(module.student), flat(module.objective)])


class TestLine2Counts:
    def test_ragged_micro_batches_equal_one_batch(self, tmp_path: Path) -> None:
        """Mean of means weighs the samples of a small micro-batch, or one with few labels, too much (22 % measured)."""
        whole = one_step(tmp_path / "whole", 24, 1)
        ragged = one_step(tmp_path / "ragged", 5, 5)
        assert relative(ragged, whole) < 1e-6

    def test_the_mean_of_means_would_be_seen(self, tmp_path: Path) -> None:
        whole = one_step(tmp_path / "whole", 24, 1)

        class Forgetful(DistillationTrainer):
            def get_batch_samples(self, iterator: Any, count: int, device: Any) -> Any:
                batches, _ = super().get_batch_samples(iterator, count, device)
                return batches, None

        trainer = Forgetful(
            teacher=teacher(),
            model=student(),
            objective=terms(),
            train_dataset=pairs(unlabelled=5),
            args=arguments(
                tmp_path,
                per_device_train_batch_size=5,
                gradient_accumulation_steps=5,
                max_steps=1,
                optim="sgd",
                learning_rate=1.0,
                max_grad_norm=0.0,
            ),
        )
        before = flat(student())
        trainer.train()
        assert relative(before - flat(trainer.distillation_module.student), whole[: len(before)]) > 1e-2


class TestLine3OwnLoss:
    def test_a_subclass_that_computes_its_own_mean_is_divided_by_the_accumulation(self, tmp_path: Path) -> None:
        """Trainer must divide a loss that is a mean of one micro-batch, and must not divide ours."""

        class Own(DistillationTrainer):
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
                output = model(**{k: v for k, v in inputs.items() if k != "sample_id"})
                return (output.loss, output) if return_outputs else output.loss

        table = pairs(24)
        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
        deltas = []
        for size, steps in ((24, 1), (6, 4)):
            args = arguments(
                tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=steps, **settings
            )
            trainer = Own(teacher=teacher(), model=student(), train_dataset=table, args=args)
            assert not trainer.loss_is_scaled_for_ga
            trainer.train()
            deltas.append(flat(student()) - flat(trainer.distillation_module.student))
        assert relative(deltas[1], deltas[0]) < 1e-6

    def test_ours_is_scaled_already(self, tmp_path: Path) -> None:
        trainer = DistillationTrainer(teacher=teacher(), model=student(), args=arguments(tmp_path))
        assert trainer.loss_is_scaled_for_ga


class TestLine4Columns:
    def test_a_bert_teacher_keeps_its_token_types_beside_a_distilbert_student(self, tmp_path: Path) -> None:
        """Trainer's default drops the column that the student does not know; the teacher is then silently wrong."""
        table, model = pairs(16), teacher()
        heard: dict[int, torch.Tensor] = {}
        alone = model(**{name: torch.tensor(table[name]) for name in ("input_ids", "attention_mask", "token_type_ids")})

        class Spy(Live):
            def __call__(self, batch: Batch) -> Signals:
                signals = super().__call__(batch)
                heard.update(dict(zip(batch["sample_id"].tolist(), signals["logits"], strict=True)))
                return signals

        trained(tmp_path, Objective({"soft": Term("kl")}), table=table, teacher=Spy(model), max_steps=2)
        found = torch.stack([heard[i] for i in range(16)])
        assert float((found - alone.logits.detach()).abs().max()) < 1e-6

    def test_the_teachers_own_view_wins(self) -> None:
        model = teacher().eval()
        own = torch.randint(1, 60, (2, 6))
        batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "teacher/input_ids": own}
        assert torch.equal(Live(model)(batch)["logits"], model(own).logits.detach())

    def test_columns_of_the_teacher_and_sample_ids_reach_the_batch(self, tmp_path: Path) -> None:
        table = pairs(8)
        table = table.add_column("teacher/input_ids", table["input_ids"]).add_column("junk", list(range(8)))
        trainer = DistillationTrainer(teacher=teacher(), model=student(), train_dataset=table, args=arguments(tmp_path))
        batch = next(iter(trainer.get_train_dataloader()))
        assert {"teacher/input_ids", "token_type_ids", "sample_id", "labels"} <= set(batch)
        assert "junk" not in batch


class TestLine5Prediction:
    def test_the_student_predicts_alone(self, tmp_path: Path) -> None:
        calls = []

        class Counting(Live):
            def __call__(self, batch: Batch) -> Signals:
                calls.append(1)
                return super().__call__(batch)

        inner = student()
        trainer = DistillationTrainer(
            teacher=Counting(teacher()), model=inner, eval_dataset=pairs(12, unlabelled=2), args=arguments(tmp_path)
        )
        result = trainer.predict(trainer.eval_dataset)
        assert not calls
        table = pairs(12)
        inner.eval()
        alone = inner(torch.tensor(table["input_ids"]), torch.tensor(table["attention_mask"])).logits
        assert torch.allclose(torch.tensor(result.predictions), alone, atol=1e-6)
        assert result.metrics["test_loss"] > 0


class TestLine6Saving:
    def test_save_model_writes_the_bare_student_without_pickles(self, tmp_path: Path) -> None:
        trainer = trained(tmp_path / "run")
        trainer.save_model(str(tmp_path / "student"))
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
        assert torch.equal(flat(again), flat(trainer.distillation_module.student))
        assert {p.suffix for p in (tmp_path / "student").iterdir()} == {".json", ".safetensors"}

    def test_a_checkpoint_holds_objective_and_stateful_sources(self, tmp_path: Path) -> None:
        class Moving(Live):
            def __init__(self, model: nn.Module) -> None:
                super().__init__(model)
                self.seen = torch.zeros(1)

            def __call__(self, batch: Batch) -> Signals:
                self.seen += 1
                return super().__call__(batch)

            def state_dict(self) -> dict[str, torch.Tensor]:
                return {"seen": self.seen}

            def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
                self.seen = state["seen"]

        objective = Objective({"soft": Term("kl"), "hint": Term("mse", project=nn.Linear(3, 3))})
        trained(tmp_path, objective, teacher=Moving(teacher()), save_strategy="steps", save_steps=2)
        checkpoint = tmp_path / "checkpoint-2"
        assert (checkpoint / "objective.safetensors").exists()
        fresh = Moving(teacher())
        objective = Objective({"soft": Term("kl"), "hint": Term("mse", project=nn.Linear(3, 3))})
        trainer = DistillationTrainer(
            teacher=fresh, model=student(), objective=objective, train_dataset=pairs(), args=arguments(tmp_path)
        )
        trainer._load_from_checkpoint(str(checkpoint))
        assert float(fresh.seen) == 2

    def test_loading_is_strict(self, tmp_path: Path) -> None:
        """Trainer's own loading leaves a missing projector at its random start and only logs a warning."""
        trained(tmp_path, save_strategy="steps", save_steps=2)
        other = Objective({"soft": Term("kl"), "hint": Term("mse", "hidden.1", "hidden.2", project=nn.Linear(32, 47))})
        trainer = DistillationTrainer(teacher=teacher(), model=student(), objective=other, args=arguments(tmp_path))
        with pytest.raises(ModelError, match=r"hint\.projector\.weight.*expected \[47, 32\], got \[48, 32\]"):
            trainer._load_from_checkpoint(str(tmp_path / "checkpoint-2"))


def images(count: int = 40, **columns: Any) -> InMemory:
    draw = torch.Generator().manual_seed(5)
    views = make_views(
        [{"shift": {"pixels": 2}}, "flip"], key="pixel_values", seed=7, num_classes=3, finish=lambda x: x - 0.5
    )
    stored = {
        "pixel_values": torch.rand(count, 1, 8, 8, generator=draw),
        "labels": torch.randint(0, 3, (count,), generator=draw),
        "sample_id": torch.arange(100, 100 + count),
    }
    return InMemory({**stored, **columns}, views)


class Stop(TrainerCallback):
    """End the training early, in the middle of an epoch, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


class TestLine7Augmentation:
    def image_trainer(self, folder: Path, *callbacks: TrainerCallback, **changes: Any) -> DistillationTrainer:
        torch.manual_seed(6)
        models = ConvNet(1, 3, [8]), ConvNet(1, 3, [4], dropout=0.3)
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 12, "remove_unused_columns": False}
        return DistillationTrainer(
            teacher=models[0],
            model=models[1],
            train_dataset=images(),
            data_collator=ready_batch,
            callbacks=list(callbacks),
            args=arguments(folder, **{**settings, **changes}),
        )

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_resumed_run_is_the_same_to_the_bit(self, tmp_path: Path, workers: int) -> None:
        """Views drawn from the global generator differ after a resume: the loader had drawn ahead."""
        whole = self.image_trainer(tmp_path / "whole", dataloader_num_workers=workers)
        whole.train()
        for step in (3, 5, 8):
            folder = tmp_path / f"cut-{step}"
            self.image_trainer(folder, Stop(step), dataloader_num_workers=workers).train()
            resumed = self.image_trainer(folder, dataloader_num_workers=workers)
            resumed.train(resume_from_checkpoint=str(latest_checkpoint(folder)))
            assert torch.equal(flat(resumed.distillation_module), flat(whole.distillation_module))
            assert resumed.state.global_step == 12

    def test_views_differ_between_epochs_and_not_between_batches(self) -> None:
        data = images()
        first = data.__getitems__([3, 9, 4])
        torch.manual_seed(99)
        assert torch.equal(data.__getitems__([4, 3])["pixel_values"][0], first["pixel_values"][2])
        data.set_epoch(1)
        assert not torch.equal(data.__getitems__([3, 9, 4])["pixel_values"], first["pixel_values"])

    def test_the_epoch_reaches_the_data_and_every_batch_has_ids(self, tmp_path: Path) -> None:
        seen: list[int] = []
        data = images()
        original = data.__getitems__

        class Watched(InMemory):
            def __getitems__(self, indices: Any) -> Batch:
                seen.append(int(self._epoch))
                return original(indices)

        trainer = self.image_trainer(tmp_path)
        watched = Watched(data.columns, data.view)
        trainer.train_dataset = watched
        trainer._set_up_callbacks()
        ids: list[int] = []
        real = trainer.teacher

        def listen(batch: Batch) -> Signals:
            ids.extend(batch["sample_id"].tolist())
            return real(batch)

        trainer.teacher = listen
        trainer.train()
        assert sorted(set(seen)) == [0, 1, 2]
        assert len(ids) == 12 * 8 - 0
        assert set(ids) <= set(range(100, 140))


class TestLine8Refusals:
    def test_label_smoothing_in_the_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=r"objective\.hard\.label_smoothing"):
            trained(tmp_path, label_smoothing_factor=0.1)

    def test_reentrant_checkpointing(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="use_reentrant"):
            trained(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})

    def test_reentrant_checkpointing_switched_on_at_the_student(self, tmp_path: Path) -> None:
        model = student()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(TrainingError, match="use_reentrant"):
            trained(tmp_path, model=model)

    def test_several_gpus_in_one_process(self, tmp_path: Path) -> None:
        args = arguments(tmp_path)
        args._n_gpu = 2
        with pytest.raises(TrainingError, match="accelerate launch"):
            DistillationTrainer(teacher=teacher(), model=student(), args=args)

    def test_a_missing_teacher_and_the_same_object(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="none was given"):
            DistillationTrainer(model=student(), args=arguments(tmp_path))
        model = student()
        with pytest.raises(TrainingError, match="same object"):
            DistillationTrainer(model=model, teacher=model, args=arguments(tmp_path))


class TestLine9Capture:
    def test_no_graph_break_under_compile(self) -> None:
        """Captured inside forward, taps fire in the compiled graph; entered outside, they would be silent."""
        torch.manual_seed(0)
        inner = ConvNet(1, 3, [4, 8])
        objective = Objective({"soft": Term("kl"), "hint": Term("mse", "stages.0", "stages.0", mask="none")})
        module = DistillationModule(inner, objective)
        batch = {"pixel_values": torch.randn(4, 1, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
        said = {"logits": torch.randn(4, 3), "stages.0": torch.randn(4, 4, 8, 8)}
        eager = module.eval()(said, **batch).loss
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        loss = compiled(said, **batch).loss
        loss.backward()
        assert torch.allclose(loss, eager, atol=1e-6)
        assert all(p.grad is not None for p in inner.parameters())

    def test_teacher_signals_can_enter_a_graph(self) -> None:
        """Inference tensors cannot be saved for backward; `no_grad` ones can."""
        signals = Live(teacher(), ["hidden.1"])({"input_ids": torch.ones(2, 4, dtype=torch.long)})
        for value in signals.values():
            assert not value.requires_grad
            assert not value.is_inference()
        weight = torch.ones(48, requires_grad=True)
        (signals["hidden.1"] * weight).sum().backward()
        assert weight.grad is not None

    def test_hooks_do_not_outlive_a_step(self, tmp_path: Path) -> None:
        trainer = trained(tmp_path)
        for module in (trainer.distillation_module.student, trainer.teacher.model.model):
            known = [k for m in module.modules() for k in m._forward_hooks.values() if "potstill" in k.__module__]
            assert not known


class TestLine10HiddenStates:
    def test_hidden_n_is_output_hidden_states_n(self) -> None:
        model = teacher().eval()
        batch = {"input_ids": torch.randint(1, 60, (2, 5))}
        with torch.no_grad():
            wanted = model(**batch, output_hidden_states=True).hidden_states
            with capture(model, [f"hidden.{n}" for n in range(3)]) as signals:
                model(**batch)
        assert all(torch.equal(signals[f"hidden.{n}"], wanted[n]) for n in range(3))
        with pytest.raises(SignalError, match=r"hidden\.7"), capture(model, ["hidden.7"]):
            pass


class TestLine11Attention:
    def test_probabilities_without_dropout_while_sdpa_runs(self) -> None:
        """SDPA returns no probabilities, and eager returns them after dropout."""
        model = teacher()
        batch = {"input_ids": torch.randint(1, 60, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
        eager = copy.deepcopy(model).eval()
        eager.set_attn_implementation("eager")
        wanted = eager(**batch, output_attentions=True).attentions[1]
        assert model.config._attn_implementation == "sdpa"
        with capture(model.eval(), ["attention.2"]) as signals:
            model(**batch)
        assert torch.allclose(signals["attention.2"], wanted, atol=1e-5)
        assert model.config._attn_implementation == "sdpa"


TREE: dict[str, Any] = {
    "name": "arms",
    "task": {"name": "tabular-classification"},
    "data": {"source": "sklearn", "path": "load_iris"},
    "teacher": {"model": "potstill:mlp", "kwargs": {"hidden": [16]}, "train": {"epochs": 5}},
    "student": {"model": "potstill:mlp", "kwargs": {"hidden": [4], "dropout": 0.1}},
    "objective": {"soft": {"loss": "kl"}, "hard": {"loss": "cross_entropy"}},
    "train": {"epochs": 3, "batch_size": 16},
    "evaluate": {"resamples": 100, "latency": False},
}


class TestLine12Arms:
    def test_both_arms_share_initialisation_data_order_and_steps(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        starts: list[torch.Tensor] = []
        budgets: list[tuple[int, list[int]]] = []
        original = DistillationTrainer.train

        def watched(self: DistillationTrainer, *args: Any, **kwargs: Any) -> Any:
            starts.append(flat(self.distillation_module.student))
            order: list[int] = []
            fetch = self.train_dataset.__getitems__
            self.train_dataset.view = lambda batch, *_: (order.extend(batch["sample_id"].tolist()), batch)[1]
            result = original(self, *args, **kwargs)
            budgets.append((self.state.max_steps, order))
            assert fetch
            return result

        monkeypatch.setattr(DistillationTrainer, "train", watched)
        Run(recipe_from(TREE), tmp_path, bars=False).execute()
        _, baseline, distilled = starts
        assert torch.equal(baseline, distilled)
        assert budgets[1] == budgets[2]
        assert len(budgets[1][1]) > 100


class TestLine13Recipes:
    def test_yaml_1_2_places_and_all_mistakes_at_once(self, tmp_path: Path) -> None:
        base = tmp_path / "base.yaml"
        base.write_text(
            "name: no\n"
            "task: {name: tabular-classification}\n"
            "data: {source: sklearn, path: load_iris}\n"
            "teacher: {model: 'potstill:mlp'}\n"
            "student: {model: 'potstill:mlp'}\n"
            "objective: {soft: {loss: kl}}\n"
            "train: {learning_rate: 1e-3}\n"
        )
        assert load_recipe(base).name == "no"
        assert load_recipe(base).train.learning_rate == 0.001
        child = tmp_path / "child.yaml"
        child.write_text("extends: base.yaml\ntrain: {epochs: -1}\nobjective:\n  soft: {temperture: 4.0}\n")
        with pytest.raises(RecipeError) as caught:
            load_recipe(child, ["train.batch_size=many"])
        lines = str(caught.value).splitlines()
        assert len(lines) == 3
        assert "child.yaml:2: train.epochs" in lines[0]
        assert "child.yaml:4: objective.soft.temperture" in lines[1]
        assert "did you mean 'temperature'?" in lines[1]
        assert "command line:1: train.batch_size" in lines[2]

    def test_duplicate_keys_are_mistakes(self, tmp_path: Path) -> None:
        path = tmp_path / "twice.yaml"
        path.write_text("name: a\nname: b\n")
        with pytest.raises(RecipeError, match=r"twice\.yaml:2: name"):
            load_recipe(path)


def modules_after(code: str) -> set[str]:
    program = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


class TestLine14LightImports:
    def test_help_imports_only_typer(self) -> None:
        code = "from typer.testing import CliRunner\nfrom potstill.cli import app\n"
        loaded = modules_after(code + "assert 'distill' in CliRunner().invoke(app, ['--help']).output")
        heavy = {"torch", "transformers", "numpy", "pydantic", "yaml", "datasets", "sklearn"}
        assert not heavy & loaded

    def test_check_does_not_import_trainer(self) -> None:
        code = "from potstill.cli.check import check\ncheck('digits', [])\n"
        assert "transformers.trainer" not in modules_after(code)


def test_tables_get_sample_ids_and_other_data_is_left_alone(tmp_path: Path) -> None:
    table = pairs(6).remove_columns("token_type_ids")
    trainer = DistillationTrainer(teacher=student(), model=student(), train_dataset=table, args=arguments(tmp_path))
    assert isinstance(trainer.train_dataset, Dataset)
    assert list(trainer.train_dataset["sample_id"]) == list(range(6))
