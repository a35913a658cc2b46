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


def gradient(total: Tensor, own: nn.Module) -> Tensor:
    return torch.cat([each.flatten() for each in torch.autograd.grad(total, list(own.parameters()))])


def test_weights_are_shares_of_the_gradient_from_the_first_step_on():
    terms, own = objective(), model()
    total, alone = step(terms, own, 0)
    mean = (alone["big"].norm() + alone["small"].norm()) / 2
    wanted = mean * (alone["big"] / alone["big"].norm() + 2 * alone["small"] / alone["small"].norm())
    torch.testing.assert_close(gradient(total, own), wanted, rtol=1e-6, atol=1e-8)
    assert alone["big"].norm() > 100 * alone["small"].norm()


def test_the_reference_stays_as_it_is():
    terms, own = objective(reference="small"), model()
    total, alone = step(terms, own, 0)
    wanted = alone["small"].norm() * alone["big"] / alone["big"].norm() + 2 * alone["small"]
    torch.testing.assert_close(gradient(total, own), wanted, rtol=1e-6, atol=1e-8)


def scaled(own: nn.Linear, factor: float) -> None:
    with torch.no_grad():
        own.weight.mul_(factor)
        own.bias.mul_(factor)


def test_lengths_rise_at_once_and_fall_smoothly_every_so_many_steps():
    terms, own = objective(every=5, decay=0.75), model()
    balance = terms.balance
    assert balance is not None
    found = {}
    for number in range(11):
        if number in (2, 4, 10):
            scaled(own, 3.0 if number == 2 else 0.25)
        _, alone = step(terms, own, number)
        found[number] = (balance.lengths[0].item(), alone["big"].norm().item())
    assert found[2][0] == pytest.approx(found[2][1])  # one of the first three, and longer than before
    assert found[4][0] == found[3][0] == found[2][0]  # not measured
    assert found[5][0] == pytest.approx(0.75 * found[4][0] + 0.25 * found[5][1])
    assert found[10][0] == pytest.approx(0.75 * found[5][0] + 0.25 * found[10][1])


def test_micro_batches_of_a_step_have_the_same_factors():
    terms, own = objective(), model()
    first, _ = step(terms, own, 0)
    assert terms.balance is not None
    before = terms.balance.lengths.clone()
    scaled(own, 5.0)
    step(terms, own, 0)
    assert torch.equal(terms.balance.lengths, before)
    step(terms, own, 1)
    assert not torch.equal(terms.balance.lengths, before)
    assert torch.isfinite(first)


def test_a_term_that_begins_between_two_measurements_is_measured_at_once():
    """Else it would run without its factor, a thousand times too strong, until the next one."""
    terms, own = objective(every=20), model()
    terms.terms["big"].weight = lambda progress: 0.0 if progress.step < 7 else 1.0
    for number in range(7):
        step(terms, own, number)
    assert terms.balance is not None
    assert terms.balance.lengths[0] == 0
    total, alone = step(terms, own, 7)
    assert terms.balance.lengths[0].item() == pytest.approx(alone["big"].norm().item())
    assert gradient(total, own).norm() < 10 * alone["big"].norm()


def test_a_first_gradient_of_next_to_nothing_does_not_blow_up_the_second_step():
    """A student that is a copy of its teacher begins at its target: the factor would be a million a step later."""
    terms, own = Objective({"a": Term("mse"), "b": Term("kl")}, balance={"every": 20}), model()
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = {"sample_id": torch.arange(6)}
    for number, away in enumerate((1e-6, 1.0)):
        said = own(inputs)
        shift = torch.linspace(-1, 1, 3, dtype=torch.float64)
        taught = {"logits": said.detach() + shift * (away if number == 0 else 1.0)}
        total = terms({"logits": said}, taught, batch, Progress(number, 100), None, list(own.parameters())).total
        alone = gradient(terms.terms["a"].values({"logits": own(inputs)}, taught, batch, Progress()).mean(), own)
    assert gradient(total, own).norm() < 10 * alone.norm()


def test_a_term_that_is_not_active_has_no_length_and_keeps_what_it_had():
    terms, own = objective(), model()
    terms.terms["small"].weight = lambda progress: 1.0 if progress.step == 1 else 0.0
    step(terms, own, 0)
    assert terms.balance is not None
    assert terms.balance.lengths[0] > 0
    assert terms.balance.lengths[1] == 0
    step(terms, own, 1)
    kept = terms.balance.lengths[1].item()
    assert kept > 0
    step(terms, own, 2)
    assert terms.balance.lengths[1].item() == kept


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
