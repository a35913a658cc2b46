"""The preflight beside terms with layers of their own, and terms that never count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from potstill import preflight
from potstill.losses.objective import Objective, Term
from potstill.training.trainer import DistillationTrainer
from tests.training.tiny import arguments, flat, pairs, student, teacher


def trainer(folder: Path, **terms: Term) -> DistillationTrainer:
    objective = Objective({"hard": Term("cross_entropy"), "soft": Term("kl"), **terms})
    args = arguments(folder, max_steps=2)
    torch.manual_seed(0)
    return DistillationTrainer(
        model=student(), teacher=teacher(), objective=objective, args=args, train_dataset=pairs()
    )


@pytest.mark.parametrize("loss", ["vid", "crd"])
def test_a_training_after_it_has_the_same_bits(tmp_path: Path, loss: str) -> None:
    states = []
    for looked in (False, True):
        hint = Term(loss, "hidden.1", "hidden.2", weight=0.1)
        made = trainer(tmp_path / str(looked), hint=hint)
        if looked:
            preflight(made)
            assert made.distillation_module.objective.pending_projectors() == ["hint"]
        torch.manual_seed(1)
        made.train()
        states.append(flat(made.distillation_module))
    assert torch.equal(*states)


def test_a_projector_of_ones_own_stays(tmp_path: Path) -> None:
    own = nn.Linear(32, 48)
    made = trainer(tmp_path, hint=Term("vid", "hidden.1", "hidden.2", project=own, weight=0.1))
    preflight(made)
    assert made.distillation_module.objective.terms["hint"].projector is own


def test_a_term_that_never_counts_is_no_dead_tap(tmp_path: Path) -> None:
    """Its signals are not read, so nothing can be behind them."""
    never = Term("mse", "hidden.1", "hidden.2", project="linear", weight=0.0)
    named = {finding.check for finding in preflight(trainer(tmp_path, never=never)) if finding.level == "error"}
    assert "dead-tap" not in named
