"""Objectives by name."""

from __future__ import annotations

import math

import pytest
import torch

from potstill.errors import ComponentError, RecipeError
from potstill.losses.presets import preset
from potstill.recipe.load import load_recipe, recipe_from

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


def test_a_resolved_recipe_holds_the_terms_and_is_the_same_recipe():
    recipe = load_recipe("digits", ["objective={preset: hinton}"])
    assert recipe_from(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("{preset: hintn}", ["objective.preset: there is no preset 'hintn'; did you mean 'hinton'?"]),
        ("{preset: 3}", ["objective.preset: expected the name of a preset, got 3"]),
        ("{preset: hinton, temprature: 2}", ["objective.temprature: preset 'hinton' has no option 'temprature'"]),
        ("{preset: hinton, temperature: -1}", ["objective.temperature: preset 'hinton': input should be greater than"]),
        ("{preset: hinton, sfot: {weight: 2}}", ["objective.sfot: preset 'hinton' has no term 'sfot'", "'soft'"]),
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
