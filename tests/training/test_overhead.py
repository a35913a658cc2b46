"""Accelerate looks for each optional package once in a training, and afterwards as it always did."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import accelerate.utils.imports as looked_up
import pytest
import torch

from potstill.training.overhead import packages_looked_up_once
from potstill.training.trainer import DistillationTrainer
from tests.training.tiny import arguments, flat, pairs, student, teacher

LOOK = "_is_package_available"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each package was looked for on the disk."""
    found: Counter[str] = Counter()
    real = getattr(looked_up, LOOK)

    def counted(name: str, *args: Any, **kwargs: Any) -> bool:
        found[name] += 1
        return bool(real(name, *args, **kwargs))

    monkeypatch.setattr(looked_up, LOOK, counted)
    return found


def test_a_package_is_looked_for_once(looks: Counter[str]) -> None:
    own = getattr(looked_up, LOOK)
    with packages_looked_up_once():
        said = {looked_up.is_comet_ml_available() for _ in range(5)}
        assert looks == {"comet_ml": 1}
    assert len(said) == 1
    assert getattr(looked_up, LOOK) is own
    looked_up.is_comet_ml_available()
    assert looks == {"comet_ml": 2}
    with packages_looked_up_once():  # what is installed between two trainings is seen by the second
        looked_up.is_comet_ml_available()
    assert looks == {"comet_ml": 3}


def test_a_block_inside_a_block(looks: Counter[str]) -> None:
    own = getattr(looked_up, LOOK)
    with packages_looked_up_once():
        looked_up.is_comet_ml_available()
        with packages_looked_up_once():
            looked_up.is_comet_ml_available()
        looked_up.is_comet_ml_available()
        assert getattr(looked_up, LOOK) is not own
    assert looks == {"comet_ml": 1}
    assert getattr(looked_up, LOOK) is own


def test_an_exception_leaves_nothing(looks: Counter[str]) -> None:
    own = getattr(looked_up, LOOK)

    def fails() -> None:
        with packages_looked_up_once():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert getattr(looked_up, LOOK) is own


def test_another_accelerate_without_that_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(looked_up, LOOK)
    with packages_looked_up_once():
        pass
    assert not hasattr(looked_up, LOOK)


def train(folder: Path, steps: int) -> torch.Tensor:
    args = arguments(folder, max_steps=steps)
    trainer = DistillationTrainer(model=student(), teacher=teacher(), train_dataset=pairs(), args=args)
    trainer.train()
    return flat(trainer.distillation_module.student)


def test_a_training_looks_no_more_often_for_more_steps(looks: Counter[str], tmp_path: Path) -> None:
    own, found = getattr(looked_up, LOOK), []
    for steps in (2, 9):
        looks.clear()
        train(tmp_path / str(steps), steps)
        found.append(dict(looks))
        assert getattr(looked_up, LOOK) is own
    assert found[0] == found[1]
    assert found[0]  # else accelerate looks for them elsewhere, and this is about nothing


def test_a_training_that_fails_leaves_nothing(looks: Counter[str], tmp_path: Path, monkeypatch: Any) -> None:
    own, inside = getattr(looked_up, LOOK), []

    def fails(*_: Any, **__: Any) -> None:
        inside.append(getattr(looked_up, LOOK) is own)
        raise ZeroDivisionError

    monkeypatch.setattr(DistillationTrainer, "compute_loss", fails)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, 2)
    assert inside == [False]
    assert getattr(looked_up, LOOK) is own
