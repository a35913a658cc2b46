"""Ten silent faults, each found by the name of its check; a sound set-up gives nothing, and stays as it is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.planted_faults import FAULTS, SOUND, findings, sound, trainer_of
from potstill import preflight
from potstill.errors import ComponentError, PreflightError
from tests.training.tiny import flat


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """More cost more than they bring on networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_name(fault: str) -> None:
    make, check = FAULTS[fault]
    assert check in {finding.check for finding in findings(make())}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_setup_gives_nothing(name: str) -> None:
    assert findings(SOUND[name]()) == []


def trained(folder: Path, *, examined: bool) -> Any:
    """The weights and BatchNorm statistics after three steps, with dropout, and a projector made by a dry run."""
    trainer = trainer_of(sound(), folder)
    if examined:
        preflight(trainer)
    trainer.train()
    return trainer.distillation_module


def test_a_training_after_it_gives_the_same_bits(tmp_path: Path) -> None:
    without, examined = (trained(tmp_path / str(place), examined=bool(place)) for place in (0, 1))
    assert torch.equal(flat(without), flat(examined))
    for first, second in zip(without.buffers(), examined.buffers(), strict=True):
        assert torch.equal(first, second)


def test_it_leaves_modes_gradients_statistics_and_generators_alone(tmp_path: Path) -> None:
    setup = FAULTS["drifting BatchNorm"][0]()
    trainer = trainer_of({**setup, "objective": sound()["objective"], "teacher": sound()["teacher"]}, tmp_path)
    norm = setup["teacher"].__closure__[0].cell_contents.body[1]
    trainer.teacher = setup["teacher"]  # which has no hidden signal: the hint cannot be computed
    module = trainer.distillation_module
    module.student.head.eval()
    before = (norm.running_mean.clone(), torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    preflight(trainer)
    assert torch.equal(before[0], norm.running_mean)
    assert torch.equal(before[1], torch.get_rng_state())
    assert before[2:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert module.student.body.training
    assert not module.student.head.training
    assert norm.training
    assert all(parameter.grad is None for parameter in module.parameters())
    assert module.objective.pending_projectors() == ["hint"]
    assert trainer.optimizer is None


def test_strict_raises_every_error_by_name(tmp_path: Path) -> None:
    setup = {**FAULTS["labels out of range"][0](), "optimizers": FAULTS["projector outside the optimizer"][0]()}
    setup["optimizers"] = (torch.optim.SGD(setup["model"].parameters(), 0.1), None)
    with pytest.raises(PreflightError) as caught:
        preflight(trainer_of(setup, tmp_path), strict=True)
    assert "[label-range]" in str(caught.value)
    assert "[projectors]" in str(caught.value)


def test_an_ignored_check_is_a_note(tmp_path: Path) -> None:
    setup = FAULTS["labels out of range"][0]()
    found = preflight(trainer_of(setup, tmp_path), strict=True, ignore=["label-range"])
    assert [(each.check, each.level) for each in found] == [("label-range", "note")]
    with pytest.raises(ComponentError, match="there is no check 'label-rnge'; did you mean 'label-range'"):
        preflight(trainer_of(setup, tmp_path), ignore=["label-rnge"])


def test_warnings_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    preflight(trainer_of(FAULTS["dead tap"][0](), tmp_path))
    assert "preflight: error [dead-tap]" in caplog.text
