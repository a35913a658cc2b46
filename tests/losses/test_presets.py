"""Objectives by name."""

from __future__ import annotations

import math

import pytest
import torch

from potstill.errors import ComponentError, ObjectiveError, RecipeError
from potstill.interfaces import Progress
from potstill.losses.objective import Objective
from potstill.losses.presets import preset
from potstill.recipe.build import make_term
from potstill.recipe.load import load_recipe, recipe_from
from potstill.registry import presets

TEMPERATURE, WEIGHT = 20.0, 0.7


def test_hinton_is_the_formula_of_the_paper():
    """w·T²·CE(softmax(v/T), softmax(z/T)) + CE(z, y), computed term by term without our code."""
    student, teacher, labels = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], [[4.0, 0.0, -1.0], [2.0, 2.0, 2.5]], [0, 2]
    total = 0.0
    for z, v, y in zip(student, teacher, labels, strict=True):
        soft = [math.exp(a / TEMPERATURE) / sum(math.exp(b / TEMPERATURE) for b in v) for a in v]
        log = [a / TEMPERATURE - math.log(sum(math.exp(b / TEMPERATURE) for b in z)) for a in z]
        hard = -(z[y] - math.log(sum(math.exp(b) for b in z)))
        total += WEIGHT * TEMPERATURE**2 * -sum(p * q for p, q in zip(soft, log, strict=True)) + hard
    batch = {"labels": torch.tensor(labels), "sample_id": torch.arange(2)}
    objective = preset("hinton", temperature=TEMPERATURE, weight=WEIGHT)
    found = objective({"logits": torch.tensor(student, dtype=torch.float64)}, {"logits": torch.tensor(teacher)}, batch)
    assert float(found.total) == pytest.approx(total / 2, rel=1e-6)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ComponentError, match="did you mean 'hinton'"):
        preset("hintn")


def objective_of(text: str):
    return {name: spec.model_dump() for name, spec in load_recipe("digits", [f"objective={text}"]).objective.items()}


def test_a_recipe_names_a_preset_and_its_options():
    found = objective_of("{preset: hinton, temperature: 3.0}")
    assert list(found) == ["soft", "hard"]
    assert (found["soft"]["loss"], found["soft"]["temperature"], found["soft"]["weight"]) == (
        "soft_cross_entropy",
        3.0,
        1.0,
    )
    assert (found["hard"]["loss"], found["hard"]["weight"]) == ("cross_entropy", 1.0)


def test_terms_beside_a_preset_are_added_changed_or_replaced():
    found = objective_of("{preset: hinton, hard: {weight: 0.5}, soft: {loss: kl}, more: {loss: mse, weight: 0.1}}")
    assert found["hard"]["weight"] == 0.5
    assert found["hard"]["loss"] == "cross_entropy"
    assert found["soft"]["loss"] == "kl"
    assert "temperature" not in found["soft"]
    assert found["more"]["weight"] == 0.1


def test_an_option_may_be_a_ramp():
    found = objective_of("{preset: hinton, weight: {from: 1.0, to: 0.5}, temperature: {from: 8, to: 2}}")
    assert found["soft"]["weight"] == {"from": 1.0, "to": 0.5}
    assert found["soft"]["temperature"] == {"from": 8, "to": 2}


@pytest.mark.parametrize("name", presets.names())
def test_a_resolved_recipe_holds_the_terms_and_is_the_same_recipe(name):
    recipe = load_recipe("digits", [f"objective={{preset: {name}}}"])
    assert recipe_from(recipe.model_dump(mode="json")) == recipe
    made = Objective({term: make_term(spec) for term, spec in recipe.objective.items()})
    assert made.describe() == preset(name).describe()


@pytest.mark.parametrize("name", presets.names())
def test_options_and_changes_beside_any_preset(name):
    found = objective_of(f"{{preset: {name}, temperature: 3.0, soft: {{weight: 0.25}}}}")
    assert (found["soft"]["temperature"], found["soft"]["weight"]) == (3.0, 0.25)


@pytest.mark.parametrize("name", presets.names())
def test_the_baseline_learns_from_the_labels_alone(name):
    """TextBrewer gives the labels weight 0, TRL has no term for them: a baseline of that learns nothing."""
    hard = preset(name).hard_only()
    assert [(term.loss_name, term.weight_at(Progress())) for _, term in hard.named_terms()] == [("cross_entropy", 1.0)]


def test_alpha_of_torchdistill_is_the_weight_of_the_labels():
    found = objective_of("{preset: torchdistill, alpha: 0.7}")
    assert (found["hard"]["weight"], found["soft"]["weight"]) == (0.7, 0.3)
    ramp = "{from: 0.9, to: 0.2, shape: cosine, begin: 0.1, end: 0.6}"
    found = objective_of(f"{{preset: torchdistill, alpha: {ramp}}}")
    assert found["hard"]["weight"] == {"from": 0.9, "to": 0.2, "shape": "cosine", "begin": 0.1, "end": 0.6}
    assert found["soft"]["weight"] == {"from": 0.1, "to": 0.8, "shape": "cosine", "begin": 0.1, "end": 0.6}


@pytest.mark.parametrize(
    "alpha",
    [{"from": 0.9, "to": 0.1, "shape": "exponential"}, {"schedule": "os:getcwd"}, lambda progress: 0.5],
    ids=["exponential", "schedule", "function"],
)
def test_an_alpha_without_a_ramp_for_the_rest_needs_beta(alpha):
    with pytest.raises(ObjectiveError, match="say `beta` too"):
        presets.get("torchdistill")(alpha=alpha)
    assert presets.get("torchdistill")(alpha=alpha, beta=0.5)["soft"]["weight"] == 0.5


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("{preset: hintn}", ["objective.preset: there is no preset 'hintn'; did you mean 'hinton'?"]),
        ("{preset: 3}", ["objective.preset: expected the name of a preset, got 3"]),
        ("{preset: hinton, temprature: 2}", ["objective.temprature: preset 'hinton' has no option 'temprature'"]),
        ("{preset: hinton, temperature: -1}", ["objective.temperature: preset 'hinton': input should be greater than"]),
        ("{preset: hinton, sfot: {weight: 2}}", ["objective.sfot: preset 'hinton' has no term 'sfot'", "'soft'"]),
        ("{preset: trl_gkd}", ["objective.preset: there is no preset 'trl_gkd'; did you mean 'trl-gkd'?"]),
        ("{preset: trl-gkd, beta: 2.0}", ["objective.beta: preset 'trl-gkd': input should be less than or equal to 1"]),
        ("{preset: repdistiller, beta: 1}", ["objective.beta: preset 'repdistiller' has no option 'beta'"]),
        (
            "{preset: neural-compressor, loss_type: MSE}",
            ["objective.loss_type: preset 'neural-compressor': input should be", "got 'MSE'"],
        ),
        (
            "{preset: torchdistill, alpha: {from: a, to: 0.5}}",
            ["objective.soft.weight: a ramp expected a number for 'from'", "objective.hard.weight: a ramp expected"],
        ),
        ("{preset: hinton, heat: {from: 1, to: 2}}", ["objective.heat: preset 'hinton' has no option 'heat'"]),
        ("{preset: hinton, weight: {from: a, to: 2}}", ["objective.soft.weight: a ramp expected a number for 'from'"]),
        (
            "{preset: hinton, weigth: 1, soft: {loss: kll}}",
            ["objective.weigth: preset 'hinton' has no option", "objective.soft.loss: there is no loss 'kll'"],
        ),
    ],
)
def test_mistakes_come_with_their_place(text, messages):
    with pytest.raises(RecipeError) as found:
        load_recipe("digits", [f"objective={text}"])
    lines = str(found.value).splitlines()
    assert len(lines) <= len(messages)
    for message in messages:
        assert any(message in line and line.startswith("command line") for line in lines), lines
