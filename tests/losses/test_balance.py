"""Gradients of one length: measured at a step, used from the next on, kept over a stop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from potstill.errors import ObjectiveError, TrainingError
from potstill.interfaces import Progress
from potstill.losses.objective import Objective, Term
from potstill.training.trainer import DistillationTrainer
from tests.training.tiny import arguments, pairs, student, teacher


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def objective(**balance: object) -> Objective:
    """Two terms whose gradients differ by a factor of about a thousand."""
    terms = {"big": Term("mse", weight=1.0, scale=1000.0), "small": Term("kl", weight=2.0)}
    return Objective(terms, balance={"every": 1, "decay": 0.0, **balance})


def step(terms: Objective, own: nn.Module, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The total at a step and the gradient of each term alone, weight apart."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 4, generator=draw, dtype=torch.float64)
    taught = {"logits": torch.randn(6, 3, generator=draw, dtype=torch.float64)}
    batch = {"sample_id": torch.arange(6)}
    said = {"logits": own(inputs)}
    total = terms(said, taught, batch, Progress(number, 100), None, list(own.parameters())).total
    lengths = {}
    for name, term in terms.named_terms():
        value = term.values({"logits": own(inputs)}, taught, batch, Progress(number, 100)).mean()
        gradients = torch.autograd.grad(value, list(own.parameters()))
        lengths[name] = torch.cat([each.flatten() for each in gradients])
    return total, lengths


def test_from_the_second_step_on_weights_are_shares_of_the_gradient():
    terms, own = objective(), model()
    first, alone = step(terms, own, 0)
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(first, list(own.parameters()))])
    torch.testing.assert_close(plain, alone["big"] + 2 * alone["small"])  # nothing is known yet
    second, _ = step(terms, own, 1)
    found = torch.cat([g.flatten() for g in torch.autograd.grad(second, list(own.parameters()))])
    mean = (alone["big"].norm() + alone["small"].norm()) / 2
    wanted = mean * (alone["big"] / alone["big"].norm() + 2 * alone["small"] / alone["small"].norm())
    torch.testing.assert_close(found, wanted)


def test_the_reference_stays_as_it_is():
    terms, own = objective(reference="small"), model()
    step(terms, own, 0)
    total, alone = step(terms, own, 1)
    found = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(own.parameters()))])
    wanted = alone["small"].norm() * alone["big"] / alone["big"].norm() + 2 * alone["small"]
    torch.testing.assert_close(found, wanted)


def test_the_lengths_are_smoothed_and_measured_every_so_often():
    terms, own = objective(every=2, decay=0.75), model()
    _, alone = step(terms, own, 0)
    first = alone["big"].norm()
    with torch.no_grad():
        own.weight.mul_(3)
    step(terms, own, 1)
    assert terms.balance is not None
    assert terms.balance.lengths[0].item() == pytest.approx(first.item())
    _, alone = step(terms, own, 2)  # measures
    step(terms, own, 3)  # settles
    assert terms.balance.lengths[0].item() == pytest.approx(0.75 * first.item() + 0.25 * alone["big"].norm().item())


def test_a_term_that_is_not_active_has_no_length_and_keeps_what_it_had():
    terms, own = objective(), model()
    terms.terms["small"].weight = lambda progress: 0.0 if progress.step < 2 else 1.0
    for number in range(2):
        step(terms, own, number)
    assert terms.balance is not None
    assert terms.balance.lengths[0] > 0
    assert terms.balance.lengths[1] == 0
    step(terms, own, 2)
    step(terms, own, 3)
    assert terms.balance.lengths[1] > 0


def test_nothing_is_measured_without_gradients_or_in_evaluation():
    terms, own = objective(), model()
    terms.eval()
    step(terms, own, 0)
    terms.train()
    with torch.no_grad():
        terms(
            {"logits": own(torch.ones(2, 4).double())},
            {"logits": torch.ones(2, 3).double()},
            {"sample_id": torch.arange(2)},
            Progress(0, 2),
            None,
            list(own.parameters()),
        )
    assert terms.balance is not None
    assert terms.balance.times.sum() == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"reference": "bigg"}, "did you mean 'big'"), ({"every": 0}, "every"), ({"decay": 1.0}, "decay")],
)
def test_wrong_settings(settings, said):
    with pytest.raises(ObjectiveError, match=said):
        objective(**settings)


def test_without_parameters_it_says_what_it_needs():
    with pytest.raises(ObjectiveError, match="shared"):
        objective()({"logits": torch.ones(2, 3)}, {"logits": torch.ones(2, 3)}, {"sample_id": torch.arange(2)})


def trained(folder, steps: int, resume: bool = False, **changes: object) -> DistillationTrainer:
    terms = {"soft": Term("kl", temperature=4.0), "hint": Term("mse", "hidden.1", "hidden.2", project="linear")}
    trainer = DistillationTrainer(
        model=student(),
        teacher=teacher(),
        objective=Objective(terms, balance={"every": 2, "decay": 0.5, "reference": "soft"}),
        args=arguments(folder, max_steps=8, save_strategy="steps", save_steps=3, **changes),
        train_dataset=pairs(),
    )
    if resume:
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{steps}"))
    else:
        trainer.train()
    return trainer


def test_a_resumed_training_goes_on_to_the_same_bits(tmp_path):
    whole = trained(tmp_path / "a", 8, gradient_accumulation_steps=2)
    again = trained(tmp_path / "a", 3, resume=True, gradient_accumulation_steps=2)
    for (name, ours), theirs in zip(
        whole.distillation_module.state_dict().items(), again.distillation_module.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    balance = whole.distillation_module.objective.balance
    assert balance is not None
    assert (balance.lengths > 0).all()


def test_compiled_models_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="torch_compile"):
        trained(tmp_path, 1, torch_compile=True)
