"""A term over several layers is a term for each pair."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from potstill.errors import ObjectiveError
from potstill.recipe.layers import as_written, found_layers, spread
from potstill.recipe.schema import TermSpec


def spec(**keys: object) -> TermSpec:
    return TermSpec.model_validate({"loss": "mse", **keys})


def ends(term: TermSpec) -> tuple[object, object]:
    return term.student, term.teacher


def test_without_layers_it_is_itself():
    term = spec()
    assert spread("soft", term) == {"soft": term}


def test_hidden_states_by_number():
    found = spread("hint", spec(layers={1: 2, 3: 6}, weight=0.5))
    assert {name: ends(term) for name, term in found.items()} == {
        "hint_1_2": ("hidden.1", "hidden.2"),
        "hint_3_6": ("hidden.3", "hidden.6"),
    }
    assert all(term.weight == 0.5 and term.layers is None for term in found.values())


def test_other_signals_several_and_other_teachers():
    names = ["query", "key", "value"]
    found = spread("r", spec(student=names, teacher=[f"large/{name}" for name in names], layers={"3": 6}))
    assert ends(found["r_3_6"]) == (["query.3", "key.3", "value.3"], ["large/query.6", "large/key.6", "large/value.6"])


def test_module_paths():
    found = spread("a", spec(layers={"layer1": "stages.0"}, teacher="large/logits"))
    assert {name: ends(term) for name, term in found.items()} == {"a_layer1_stages-0": ("layer1", "large/stages.0")}


def test_numbers_that_became_texts_on_their_way_through_a_file():
    again = TermSpec.model_validate(spec(layers={1: 2}).model_dump(mode="json"))
    assert spread("hint", again).keys() == {"hint_1_2"}


def test_rules_need_the_models():
    term = spec(layers="ratio")
    assert found_layers(term)
    assert not found_layers(spec(layers={1: 2}))
    with pytest.raises(ObjectiveError, match=r"objective.hint: `layers: ratio`"):
        spread("hint", term)
    assert ends(spread("hint", term, [(1, 2)])["hint_1_2"]) == ("hidden.1", "hidden.2")
    shown = as_written("hint", term)
    assert [ends(each) for each in shown.values()] == [("hidden.i", "hidden.j")]
    assert "ratio" in next(iter(shown))


def test_a_pair_that_is_there_twice():
    with pytest.raises(ObjectiveError, match="twice"):
        spread("hint", spec(layers="auto"), [(1, 2), (1, 2)])


def test_logits_of_a_teacher_among_several_stand_for_its_hidden_states():
    found = spread("hint", spec(layers={1: 2}, teacher="large/logits"))
    assert ends(found["hint_1_2"]) == ("hidden.1", "large/hidden.2")


def test_a_path_that_is_a_number_stays_a_path_where_it_was_found():
    assert ends(spread("hint", spec(layers="first"), [("2", "5")])["hint_2_5"]) == ("2", "5")


def test_no_layers_at_all():
    with pytest.raises(ValidationError):
        spec(layers={})
