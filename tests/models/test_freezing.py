"""Layers that are not trained stay as they are, whatever is called, and nobody sees it in what is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from potstill.errors import ModelError
from potstill.losses.objective import Objective, Term
from potstill.models.freezing import freeze
from potstill.training.callbacks import MaxNorm
from potstill.training.trainer import DistillationTrainer
from tests.training import tiny

FROZEN = ["distilbert.embeddings", "distilbert.transformer.layer.0.attention"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_they_stay_in_eval_mode_and_need_no_gradient():
    model = nn.Sequential(net(), nn.Linear(3, 3))
    assert freeze(model, ["0"]) is model
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)) * 10
    before, wanted = state(model), model.eval()[0](inputs)
    for call in (model.train, model[0].train, lambda: nn.ModuleList([model]).train()):
        call()
        assert not any(module.training for module in model[0].modules())
        assert model[1].training
        assert model.training
        assert torch.equal(model[0](inputs), wanted), "no dropout, and the statistics of before"
    model(inputs).sum().backward()
    assert all(parameter.grad is None for parameter in model[0].parameters())
    assert all(parameter.grad is not None for parameter in model[1].parameters())
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_a_copy_is_frozen_by_itself():
    model = freeze(nn.Sequential(net(), nn.Linear(3, 3)), ["0"])
    own = copy.deepcopy(model).train()
    assert not any(module.training for module in own[0].modules())
    own[0].train()
    assert vars(own[0])["train"].__self__ is own[0]
    assert not any(parameter.requires_grad for parameter in own[0].parameters())


def test_a_path_that_there_is_not():
    with pytest.raises(ModelError, match=r"no module 'distilbert\.embedings' to freeze; did you mean 'dist"):
        freeze(tiny.student(), ["distilbert.embedings"])
    model = tiny.student()
    with pytest.raises(ModelError, match="no module 'head'"):
        freeze(model, ["distilbert.embeddings", "head"])
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing is half done"
    with pytest.raises(ModelError, match="no module ''"):
        freeze(model, [""])


def test_something_must_be_left_to_train():
    with pytest.raises(ModelError, match="nothing is left to train of Sequential: freeze less than 0, 1, 3"):
        freeze(net(), ["0", "1", "3"])


def test_nothing_is_frozen_by_default():
    model = freeze(tiny.student(), [])
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("optimizer", [{}, {"optim": "sgd"}, {"weight_decay": 0.1, "max_grad_norm": 0.0}])
def test_a_training_leaves_them_alone(tmp_path: Path, optimizer: dict[str, Any]):
    model = freeze(tiny.student(dropout=0.1), FROZEN)
    before = state(model)
    trainer = DistillationTrainer(
        teacher=tiny.teacher(),
        model=model,
        objective=Objective(
            {"soft": Term("kl"), "hint": Term("mse", "hidden.1", "hidden.2", project=nn.Linear(32, 48))}
        ),
        train_dataset=tiny.pairs(),
        args=tiny.arguments(tmp_path, **optimizer),
        callbacks=[MaxNorm(0.01)],
    )
    trainer.train()
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    after = state(model)
    for name, parameter in model.named_parameters():
        frozen = any(name.startswith(f"{path}.") for path in FROZEN)
        assert (id(parameter) in held) is not frozen, name
        if frozen or not name.endswith(".bias"):  # that of a key gets no gradient
            assert torch.equal(after[name], before[name]) is frozen, name
    assert model.classifier.weight.norm(dim=1).max() <= 0.01 + 1e-6, "the others are bounded"


def test_what_is_saved_is_a_normal_model(tmp_path: Path):
    model = freeze(tiny.student(), FROZEN)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert all(module.training for module in again.train().modules())
    assert all(torch.equal(value, state(model)[name]) for name, value in state(again).items())
