"""A teacher that nothing can change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from potstill.models.frozen import Frozen


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


class Student(nn.Module):
    """A module that holds its teacher, as a person's own module may."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.teacher = Frozen(teacher)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_stays_in_eval_mode_whatever_its_parent_does():
    """In train mode dropout answers at random and BatchNorm drifts: no error, and a bad teacher."""
    teacher = net().train()
    parent = Student(teacher)
    assert not any(module.training for module in teacher.modules())
    for call in (parent.train, parent.teacher.train, lambda: parent.apply(lambda m: m.train())):
        call()
        assert not any(module.training for module in teacher.modules())
        assert not parent.teacher.training
    assert parent.body.training
    parent.eval()
    assert not parent.body.training


def test_statistics_and_answers_do_not_change():
    teacher = net()
    frozen, before = Frozen(teacher), state(teacher)
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)) * 10
    first = frozen(inputs)
    nn.ModuleList([frozen]).train()
    assert torch.equal(frozen(inputs), first)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_model_that_was_switched_behind_its_back_is_put_to_eval():
    teacher = net()
    frozen, before = Frozen(teacher), state(teacher)
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    expected = frozen(inputs)
    teacher.train()
    assert torch.equal(frozen(inputs), expected)
    teacher.train()
    assert not frozen.awake().training
    assert torch.equal(teacher[1].running_mean, before["1.running_mean"])


def test_it_has_no_parameters_and_no_state():
    """A teacher in the optimizer is trained; in the checkpoint it makes each save as large as the teacher."""
    parent = Student(net())
    own = {"body.weight", "body.bias"}
    assert {name for name, _ in parent.named_parameters()} == own
    assert set(parent.state_dict()) == own
    assert not list(parent.teacher.parameters())
    assert not list(parent.teacher.buffers())
    assert not parent.teacher.state_dict()
    parent.load_state_dict(parent.state_dict(), strict=True)


def test_it_answers_without_gradient():
    teacher = net()
    inputs = torch.randn(5, 4, requires_grad=True)
    answer = Frozen(teacher)(inputs)
    assert not answer.requires_grad
    torch.testing.assert_close(answer, teacher(inputs).detach())


def test_attributes_are_the_models_own():
    teacher = net()
    teacher.config = {"id2label": {0: "no"}}
    frozen = Frozen(teacher)
    assert frozen.config is teacher.config
    assert frozen.model is teacher
    with pytest.raises(AttributeError):
        frozen.nothing  # noqa: B018


def test_it_moves_with_its_parent():
    """It is no submodule, so `.to(device)` of the parent would leave it behind."""
    parent = Student(net())
    parent.double()
    assert next(parent.teacher.model.parameters()).dtype == torch.float64
    assert parent.teacher(torch.zeros(2, 4).double()).dtype == torch.float64


def test_a_copy_has_a_teacher_of_its_own():
    parent = Student(net())
    twin = copy.deepcopy(parent)
    assert twin.teacher.model is not parent.teacher.model
    inputs = torch.randn(3, 4)
    assert torch.equal(twin.teacher(inputs), parent.teacher(inputs))
