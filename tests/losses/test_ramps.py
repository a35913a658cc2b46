"""Numbers that change while training goes on."""

from __future__ import annotations

import math

import pytest

from potstill.errors import CodeNotAllowedError, ComponentError, ObjectiveError
from potstill.interfaces import Progress
from potstill.losses.objective import Term
from potstill.losses.ramps import Ramp, as_number, at, is_ramp


def progress(fraction: float) -> Progress:
    return Progress(step=round(fraction * 1000), total_steps=1000)


@pytest.mark.parametrize(
    ("shape", "fraction", "expected"),
    [
        ("linear", 0.0, 1.0),
        ("linear", 0.25, 4.75),
        ("linear", 1.0, 16.0),
        ("cosine", 0.0, 1.0),
        ("cosine", 0.25, 1 + 15 * (1 - math.sqrt(0.5)) / 2),
        ("cosine", 0.5, 8.5),
        ("cosine", 1.0, 16.0),
        ("exponential", 0.0, 1.0),
        ("exponential", 0.25, 2.0),
        ("exponential", 0.5, 4.0),
        ("exponential", 1.0, 16.0),
    ],
)
def test_shapes(shape, fraction, expected):
    assert Ramp(1.0, 16.0, shape)(progress(fraction)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential"])
def test_a_ramp_holds_its_ends_outside_its_span(shape):
    ramp = Ramp(8.0, 2.0, shape, begin=0.2, end=0.6)
    assert [ramp(progress(f)) for f in (0, 0.1, 0.2)] == pytest.approx([8, 8, 8])
    assert [ramp(progress(f)) for f in (0.6, 0.9, 1.0)] == pytest.approx([2, 2, 2])
    middle = 4.0 if shape == "exponential" else 5.0
    assert ramp(progress(0.4)) == pytest.approx(middle)


def test_training_beyond_its_plan_stays_at_the_end():
    """Trainer may do a step more than planned; a weight of −0.01 would turn the term round."""
    assert Ramp(1.0, 0.0)(Progress(step=101, total_steps=100)) == 0.0
    assert Ramp(1.0, 0.0)(Progress(step=3, total_steps=0)) == 0.0


def test_progress_before_the_first_step():
    assert Progress().fraction == 0.0
    assert Progress(step=5, total_steps=20).fraction == 0.25


@pytest.mark.parametrize(("begin", "end"), [(0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.5)])
def test_points_out_of_order_are_refused(begin, end):
    with pytest.raises(ObjectiveError, match="begin < end"):
        Ramp(1.0, 0.0, begin=begin, end=end)


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_an_exponential_ramp_through_zero_is_refused(start, stop):
    with pytest.raises(ObjectiveError, match="above 0"):
        Ramp(start, stop, "exponential")


def test_an_unknown_shape_names_the_nearest():
    with pytest.raises(ObjectiveError, match="did you mean 'cosine'"):
        Ramp(1.0, 0.0, "cosin")


def test_from_a_recipe():
    made = as_number({"from": 1.0, "to": 0.5, "shape": "cosine", "begin": 0.1, "end": 0.9})
    assert made == Ramp(1.0, 0.5, "cosine", 0.1, 0.9)
    assert as_number({"from": 2, "to": 1}) == Ramp(2, 1)
    for other in (0.3, "linear", None, [1, 2], {"size": 3}):
        assert as_number(other) is other


def test_an_unknown_key_of_a_ramp_names_the_nearest():
    with pytest.raises(ObjectiveError, match=r"no key 'shap'; did you mean 'shape'\?"):
        as_number({"from": 1.0, "to": 0.0, "shap": "cosine"})


def test_what_a_ramp_is():
    assert is_ramp({"from": 1, "to": 2})
    assert is_ramp({"from": 1})
    assert not is_ramp(1.0)


def test_at_resolves_ramps_and_callables_and_leaves_the_rest():
    half = progress(0.5)
    assert at(Ramp(1.0, 0.0), half) == 0.5
    assert at(lambda p: p.fraction * 10, half) == 5.0
    assert at(0.3, half) == 0.3
    assert at("linear", half) == "linear"


def test_how_a_ramp_is_shown():
    assert str(Ramp(1.0, 0.0)) == "(1→0 linear)"
    assert str(Ramp(4, 1, "cosine", 0.25, 0.75)) == "(4→1 cosine over 0.25–0.75 of the training)"


@pytest.mark.parametrize(
    ("value", "said"), [({"from": 8, "too": 1}, "did you mean 'to'"), ({"from": 8}, "needs `from`")]
)
def test_a_half_written_ramp_is_named_as_one(value, said):
    """Told that a number is expected, a person would think that ramps are not allowed here."""
    with pytest.raises(ObjectiveError, match=said):
        as_number(value)


# sudden, in steps, of one's own


def test_a_step_is_sudden():
    ramp = Ramp(0.7, 0.0, "step", end=0.5)
    assert [ramp(progress(share)) for share in (0, 0.49, 0.5, 1)] == [0.7, 0.7, 0.0, 0.0]
    assert str(ramp) == "(0.7→0 step at 0.5 of the training)"


def test_a_ramp_in_optimizer_steps_depends_on_no_plan():
    """Warm-up over 500 steps is the same however long the training is."""
    ramp = as_number({"from": 0.0, "to": 1.0, "end": 500})
    for total in (600, 60_000):
        assert [ramp(Progress(step, total)) for step in (0, 125, 500, 550)] == [0, 0.25, 1, 1]
    later = Ramp(1.0, 0.0, begin=100, end=200)
    assert [later(Progress(step, 300)) for step in (100, 150, 200)] == [1, 0.5, 0]
    assert "100–200 steps" in str(later)


@pytest.mark.parametrize(("begin", "end"), [(0.5, 20), (0, 20.5), (1.5, 20)])
def test_shares_and_steps_are_not_mixed(begin, end):
    with pytest.raises(ObjectiveError, match="shares"):
        Ramp(0.0, 1.0, begin=begin, end=end)


def sawtooth(progress: Progress, *, height: float = 1.0) -> float:
    return height * (progress.step % 4)


def test_a_schedule_of_ones_own():
    number = as_number({"schedule": "tests.losses.test_ramps:sawtooth", "height": 2})
    assert [at(number, Progress(step, 100)) for step in range(5)] == [0, 2, 4, 6, 0]
    assert str(number) == "tests.losses.test_ramps:sawtooth(progress, height=2)"


def test_a_schedule_needs_leave_and_must_be_there():
    with pytest.raises(CodeNotAllowedError, match="--allow-code"):
        as_number({"schedule": "tests.losses.test_ramps:sawtooth"}, allow_code=False)
    with pytest.raises(ComponentError, match="did you mean 'sawtooth'"):
        as_number({"schedule": "tests.losses.test_ramps:sawtoth"})


def test_a_schedule_that_gives_no_number():
    with pytest.raises(ObjectiveError, match="a number, got 'str'"):
        at(as_number({"schedule": "tests.losses.test_ramps:wrong"}), Progress())


def wrong(progress: Progress) -> str:
    return "str"


@pytest.mark.parametrize(("end", "stop"), [(1.0, -1.0), (3, -1.0), (3, 0.0)])
def test_both_ends_of_a_ramp_are_checked_wherever_it_ends(end, stop):
    """A temperature that ends at −1 after 3 steps trains away from the teacher."""
    with pytest.raises(ObjectiveError, match="temperature"):
        Term("kl", temperature={"from": 4.0, "to": stop, "end": end})
