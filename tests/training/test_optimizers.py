"""Optimizers and schedules by name: which is meant, which options it takes, and what the trainer makes of them."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from potstill.data.batching import InMemory
from potstill.errors import CodeNotAllowedError, ComponentError, TrainingError
from potstill.losses.objective import Objective, Term
from potstill.models.plain import Mlp
from potstill.recipe.arguments import make_training
from potstill.recipe.schema import TrainSpec
from potstill.training.optimizers import check_choice, find_optimizer, find_scheduler, make_scheduler
from potstill.training.trainer import DistillationTrainer, ready_batch
from tests.training.tiny import flat


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Every training begins with a full garbage collection, which need not look through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


class TestNames:
    @pytest.mark.parametrize("name", ["AdamW", "adamw", "ADAMW"])
    def test_those_of_torch_in_any_case(self, name: str) -> None:
        assert find_optimizer(name).target is torch.optim.AdamW
        assert find_optimizer({"name": name, "eps": 1e-6}).options == {"eps": 1e-6}

    def test_one_name_means_one_thing(self) -> None:
        """`sgd` is a name of Trainer's too, but Trainer's takes fewer options; `SGD` and `sgd` must not differ."""
        assert find_optimizer("sgd").target is find_optimizer("SGD").target is torch.optim.SGD

    def test_those_of_trainer(self) -> None:
        choice = find_optimizer("adamw_torch_fused")
        assert (choice.trainer, choice.target) == ("adamw_torch_fused", None)
        assert find_scheduler("cosine").trainer == "cosine"
        assert find_scheduler("StepLR").target is torch.optim.lr_scheduler.StepLR
        assert find_scheduler("steplr").target is torch.optim.lr_scheduler.StepLR

    def test_dotted_ones_only_where_code_is_allowed(self) -> None:
        assert find_optimizer("torch.optim:SGD").target is torch.optim.SGD
        with pytest.raises(CodeNotAllowedError, match=r"run the Python module torch\.optim; .*--allow-code"):
            find_optimizer("torch.optim:SGD", allow_code=False)

    @pytest.mark.parametrize(
        ("find", "name", "hint"),
        [
            (find_optimizer, "AdamWW", "did you mean 'AdamW'"),
            (find_optimizer, "Optimizer", "there is no optimizer"),
            (find_scheduler, "cosin", "did you mean 'cosine'"),
            (find_scheduler, "LRScheduler", "there is no scheduler"),
            (find_scheduler, "", "there is no scheduler"),
        ],
    )
    def test_unknown_ones_name_the_nearest(self, find: Any, name: str, hint: str) -> None:
        with pytest.raises(ComponentError, match=hint):
            find(name)


class TestOptions:
    @pytest.mark.parametrize(
        ("kind", "component", "path", "message"),
        [
            ("optimizer", {"name": "SGD", "momentun": 0.9}, ("momentun",), "did you mean 'momentum'"),
            ("optimizer", {"name": "SGD", "momentum": "high"}, ("momentum",), "got 'high'"),
            ("optimizer", {"name": "SGD", "lr": 0.1}, ("lr",), "no option 'lr'"),
            ("optimizer", {"name": "adamw", "weight_decay": 0.1}, ("weight_decay",), "no option 'weight_decay'"),
            ("optimizer", {"name": "adamw_torch", "eps": 1e-6}, ("eps",), "takes no options; use AdamW"),
            ("optimizer", "Adagard", (), "did you mean 'Adagrad'"),
            ("scheduler", {"name": "StepLR", "gama": 0.5, "step_size": 2}, ("gama",), "did you mean 'gamma'"),
            ("scheduler", "StepLR", (), "needs the option 'step_size'"),
            ("scheduler", {"name": "cosine", "num_cycle": 2.0}, ("num_cycle",), "did you mean 'num_cycles'"),
            ("scheduler", {"name": "cosine", "num_warmup_steps": 2}, ("num_warmup_steps",), "no option"),
        ],
    )
    def test_each_mistake_has_its_path(self, kind: str, component: Any, path: tuple[str, ...], message: str) -> None:
        """Trainer leaves an option that it does not know out without a word."""
        (problem,) = check_choice(kind, component, (kind,), allow_code=False)
        assert problem.path == (kind, *path)
        assert message in str(problem)

    @pytest.mark.parametrize(
        ("kind", "component"),
        [
            ("optimizer", {"name": "SGD", "momentum": 0.9, "nesterov": True}),
            ("optimizer", {"name": "AdamW", "betas": [0.9, 0.99]}),
            ("optimizer", "adamw_torch"),
            ("scheduler", {"name": "cosine", "num_cycles": 0.5}),
            ("scheduler", {"name": "MultiStepLR", "milestones": [2, 4]}),
            ("scheduler", "constant"),
        ],
    )
    def test_right_ones_pass(self, kind: str, component: Any) -> None:
        assert check_choice(kind, component, (kind,), allow_code=False) == []

    def test_code_that_is_not_allowed_is_a_mistake_and_does_not_run(self) -> None:
        (problem,) = check_choice("optimizer", "no_such_module:Optimizer", ("optimizer",), allow_code=False)
        assert "--allow-code" in str(problem)


class Rates(TrainerCallback):
    """Remembers the learning rate of every group before each optimizer step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append([group["lr"] for group in kwargs["optimizer"].param_groups])


def trainer(folder: Path, *extra: TrainerCallback, projected: bool = False, **train: Any) -> DistillationTrainer:
    """A trainer as a recipe sets it up: 24 rows in micro-batches of 4."""
    options: dict[str, Any] = {"batch_size": 4, "max_steps": 6, "use_cpu": True, "save_strategy": "no"}
    spec = TrainSpec(**{**options, "max_grad_norm": 0.0, **train})
    setup = make_training(spec, folder=folder, seed=3, bars=False, evaluates=True)
    draw = torch.Generator().manual_seed(5)
    columns = {
        "features": torch.randn(24, 6, generator=draw),
        "labels": torch.randint(0, 3, (24,), generator=draw),
        "sample_id": torch.arange(24),
    }
    torch.manual_seed(6)
    terms = {"soft": Term("kl"), "hard": Term("cross_entropy")}
    if projected:
        terms["hint"] = Term("mse", "body.1", "body.1", project=nn.Linear(4, 8))
    return DistillationTrainer(
        model=Mlp(6, 3, [4]),
        teacher=Mlp(6, 3, [8]),
        objective=Objective(terms),
        train_dataset=InMemory(columns),
        eval_dataset=InMemory(columns),
        data_collator=ready_batch,
        args=setup.arguments,
        callbacks=[*setup.callbacks, *extra],
        **setup.keywords,
    )


def groups(trainer: DistillationTrainer) -> dict[str, Mapping[str, Any]]:
    """The optimizer's group of each parameter by name; every parameter is in exactly one."""
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.distillation_module.named_parameters()}
    found: dict[str, Mapping[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group
    assert len(found) == len(names)
    return found


class TestOptimizer:
    def test_the_options_of_a_recipe_arrive(self, tmp_path: Path) -> None:
        component = {"name": "sgd", "momentum": 0.8, "nesterov": True}
        made = trainer(tmp_path, optimizer=component, learning_rate=0.05, weight_decay=0.01)
        optimizer = made.create_optimizer()
        assert type(optimizer) is torch.optim.SGD
        assert {group["momentum"] for group in optimizer.param_groups} == {0.8}
        assert {group["lr"] for group in optimizer.param_groups} == {0.05}
        assert all(group["nesterov"] for group in optimizer.param_groups)

    def test_weights_decay_and_biases_do_not(self, tmp_path: Path) -> None:
        found = groups(trainer(tmp_path, weight_decay=0.25, projected=True))
        decays = {name: group["weight_decay"] for name, group in found.items()}
        assert decays == {name: 0.0 if name.endswith("bias") else 0.25 for name in decays}
        assert any("projector" in name for name in decays)

    def test_decay_shrinks_the_weights_by_the_formula(self, tmp_path: Path) -> None:
        """Plain SGD on a loss without gradient: after n steps a weight is (1 − rate · decay)ⁿ of itself."""
        made = trainer(
            tmp_path, optimizer="SGD", scheduler="constant", learning_rate=0.5, weight_decay=0.1, max_steps=3
        )
        for _, term in made.distillation_module.objective.named_terms():
            term.weight = 0.0 if not term.hard else 1e-30
        before = made.distillation_module.student.head.weight.detach().clone()
        made.train()
        after = made.distillation_module.student.head.weight.detach()
        assert torch.allclose(after, before * 0.95**3, rtol=1e-6)

    @pytest.mark.parametrize("key", ["adam_beta1", "adam_beta2", "adam_epsilon"])
    def test_settings_without_an_effect_are_refused(self, tmp_path: Path, key: str) -> None:
        """They speak to Trainer's own optimizers alone; beside `AdamW` of torch they would do nothing."""
        with pytest.raises(TrainingError, match=rf"train\.{key} has no effect on the optimizer 'AdamW'.*betas"):
            trainer(tmp_path, **{key: 0.5})
        made = trainer(tmp_path, optimizer="adamw_torch", adam_beta1=0.5)
        assert {group["betas"][0] for group in made.create_optimizer().param_groups} == {0.5}

    def test_a_dotted_optimizer(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, optimizer={"name": "torch.optim:RMSprop", "alpha": 0.5}, learning_rate=0.01)
        optimizer = made.create_optimizer()
        assert type(optimizer) is torch.optim.RMSprop
        assert {(group["alpha"], group["lr"]) for group in optimizer.param_groups} == {(0.5, 0.01)}


class TestProjectorLearningRate:
    def test_it_has_groups_of_its_own(self, tmp_path: Path) -> None:
        found = groups(
            trainer(tmp_path, projected=True, learning_rate=0.01, projector_learning_rate=0.5, weight_decay=0.25)
        )
        rates = {name: group["lr"] for name, group in found.items()}
        assert rates == {name: 0.5 if "projector" in name else 0.01 for name in rates}
        assert found["objective.terms.hint.projector.weight"]["weight_decay"] == 0.25
        assert found["objective.terms.hint.projector.bias"]["weight_decay"] == 0.0

    def test_without_it_projectors_learn_as_the_student(self, tmp_path: Path) -> None:
        assert {group["lr"] for group in groups(trainer(tmp_path, projected=True, learning_rate=0.02)).values()} == {
            0.02
        }

    def test_a_projector_moves_at_its_rate_and_the_schedule_scales_both(self, tmp_path: Path) -> None:
        """Projectors that are in no optimizer keep their random start without a word; other tools forget them."""
        rates = Rates()
        settings = {"optimizer": "SGD", "scheduler": "linear", "learning_rate": 0.01, "max_steps": 4}
        made = trainer(tmp_path, rates, projected=True, projector_learning_rate=0.4, **settings)
        projector = made.distillation_module.objective.terms["hint"].projector
        before = flat(projector)
        made.train()
        assert not torch.equal(flat(projector), before)
        ratio = [max(each) / min(each) for each in rates.seen]
        assert ratio == pytest.approx([40.0] * 4)
        assert [max(each) for each in rates.seen] == pytest.approx([0.4, 0.3, 0.2, 0.1])

    def test_the_step_is_that_of_the_rate(self, tmp_path: Path) -> None:
        moves = []
        for number, rate in enumerate((0.1, 0.2)):
            settings = {"optimizer": "SGD", "scheduler": "constant", "max_steps": 1, "learning_rate": 0.01}
            made = trainer(tmp_path / str(number), projected=True, projector_learning_rate=rate, **settings)
            projector = made.distillation_module.objective.terms["hint"].projector
            before, student = flat(projector), flat(made.distillation_module.student)
            made.train()
            moves.append((flat(projector) - before, flat(made.distillation_module.student) - student))
        assert torch.allclose(moves[1][0], 2 * moves[0][0], rtol=1e-3, atol=1e-7)
        assert torch.equal(moves[1][1], moves[0][1])


class TestScheduler:
    def seen(self, folder: Path, scheduler: Any, **train: Any) -> list[float]:
        rates = Rates()
        settings = {"optimizer": "SGD", "learning_rate": 0.8, "gradient_accumulation_steps": 3, "max_steps": 4}
        trainer(folder, rates, scheduler=scheduler, **{**settings, **train}).train()
        assert all(len(set(each)) == 1 for each in rates.seen)
        return [each[0] for each in rates.seen]

    @pytest.mark.parametrize(
        ("scheduler", "wanted"),
        [
            ("constant", [0.8, 0.8, 0.8, 0.8]),
            ("linear", [0.8, 0.6, 0.4, 0.2]),
            ({"name": "StepLR", "step_size": 1, "gamma": 0.5}, [0.8, 0.4, 0.2, 0.1]),
            ({"name": "multisteplr", "milestones": [2], "gamma": 0.1}, [0.8, 0.8, 0.08, 0.08]),
            ({"name": "torch.optim.lr_scheduler:ExponentialLR", "gamma": 0.5}, [0.8, 0.4, 0.2, 0.1]),
        ],
    )
    def test_its_unit_is_the_optimizer_step(self, tmp_path: Path, scheduler: Any, wanted: list[float]) -> None:
        """Three micro-batches make a step: a schedule that counted them would be through after a third."""
        assert self.seen(tmp_path, scheduler) == pytest.approx(wanted)

    def test_the_options_of_trainers_own_arrive(self, tmp_path: Path) -> None:
        cosine = self.seen(tmp_path / "a", {"name": "cosine", "num_cycles": 1.0})
        assert cosine == pytest.approx([0.8, 0.4, 0.0, 0.4], abs=1e-6)
        warm = self.seen(tmp_path / "b", "constant_with_warmup", warmup_steps=2)
        assert warm == pytest.approx([0.0, 0.4, 0.8, 0.8])

    def test_on_a_plateau(self, tmp_path: Path) -> None:
        """Told no metric, Trainer fails at the first evaluation; without one, the rate would never fall."""
        plateau = {"name": "ReduceLROnPlateau", "patience": 0, "factor": 0.5, "threshold": 1e9}
        seen = self.seen(tmp_path, plateau, eval_steps=1, gradient_accumulation_steps=1)
        assert seen == pytest.approx([0.8, 0.4, 0.2, 0.1])
        with pytest.raises(TrainingError, match="ReduceLROnPlateau needs a validation split"):
            make_training(TrainSpec(scheduler=plateau), folder=tmp_path, seed=0, bars=False, evaluates=False)

    def test_make_scheduler_is_none_for_trainers_own(self) -> None:
        assert make_scheduler(find_scheduler("cosine")) is None
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
        make = make_scheduler(find_scheduler({"name": "StepLR", "step_size": 2}))
        assert make is not None
        assert isinstance(make(optimizer, 10), torch.optim.lr_scheduler.StepLR)


class TestArguments:
    """What a ``train:`` section means to the trainer."""

    def test_other_keys_reach_the_training_arguments(self, tmp_path: Path) -> None:
        spec = TrainSpec(epochs=2.5, batch_size=7, max_grad_norm=0.3, gradient_accumulation_steps=4, seed_worker=None)
        with pytest.raises(TrainingError, match=r"train: .*seed_worker"):
            make_training(spec, folder=tmp_path, seed=5, bars=False, evaluates=True)
        spec = TrainSpec(epochs=2.5, batch_size=7, max_grad_norm=0.3, gradient_accumulation_steps=4)
        made = make_training(spec, folder=tmp_path, seed=5, bars=False, evaluates=True).arguments
        assert (made.num_train_epochs, made.per_device_train_batch_size, made.max_grad_norm) == (2.5, 7, 0.3)
        assert (made.seed, made.data_seed, made.gradient_accumulation_steps) == (5, 5, 4)
        assert not made.remove_unused_columns
        assert made.restore_callback_states_from_checkpoint

    def test_no_evaluation_where_there_is_nothing_to_evaluate_on(self, tmp_path: Path) -> None:
        made = make_training(TrainSpec(), folder=tmp_path, seed=0, bars=False, evaluates=False).arguments
        assert made.eval_strategy == "no"
        with pytest.raises(TrainingError, match="eval_strategy: epoch needs a validation split with labels"):
            make_training(TrainSpec(eval_strategy="epoch"), folder=tmp_path, seed=0, bars=False, evaluates=False)

    def test_what_transformers_refuses_is_a_users_mistake(self, tmp_path: Path) -> None:
        spec = TrainSpec(callbacks=["early_stopping"], save_steps=0.07)
        with pytest.raises(TrainingError, match=r"train: .*multiple"):
            make_training(spec, folder=tmp_path, seed=0, bars=False, evaluates=True)

    def test_a_diverged_training_is_logged_as_one(self, tmp_path: Path) -> None:
        """Trainer's own default logs the mean of the losses before in the place of every NaN."""
        made = trainer(tmp_path, logging_steps=1, max_steps=2)
        with torch.no_grad():
            made.distillation_module.student.head.weight.fill_(float("nan"))
        made.train()
        losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        assert len(losses) == 2
        assert all(math.isnan(loss) for loss in losses)
