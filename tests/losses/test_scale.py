"""The factor by which another tool's convention differs."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from potstill.errors import ObjectiveError
from potstill.interfaces import Progress
from potstill.losses.objective import Objective, Term
from potstill.losses.scale import Scale, as_scale

T, C = 3.0, 7


def value_of(text) -> float:
    return float(as_scale(text)(temperature=T, classes=C))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1, 1.0),
        (0.25, 0.25),
        ("1", 1.0),
        ("0.5", 0.5),
        ("T", 3.0),
        ("T^2", 9.0),
        ("T²", 9.0),
        ("C", 7.0),
        ("C^2", 49.0),
        ("2*T", 6.0),
        ("2·T·C", 42.0),
        ("1/T", 1 / 3),
        ("1/T^2", 1 / 9),
        ("1/T²", 1 / 9),
        (" 1 / T^2 ", 1 / 9),
        ("1/C", 1 / 7),
        ("1/(T^2*C)", 1 / 63),
        ("1/(T²·C)", 1 / 63),
        ("1/(C*T^2)", 1 / 63),
        ("2/C", 2 / 7),
        ("1/2", 0.5),
        ("3/(2*C)", 3 / 14),
        ("T^2/C", 9 / 7),
        ("T*T", 9.0),
        ("T^3/T", 9.0),
        ("C/(T^2)", 7 / 9),
    ],
)
def test_products_of_numbers_temperature_and_classes(text, expected):
    assert value_of(text) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (1, "1"),
        (0.5, "0.5"),
        ("T²", "T^2"),
        ("2*T^2", "2·T^2"),
        ("1/T", "1/T"),
        ("1/T²", "1/T^2"),
        ("1/C", "1/C"),
        ("2/(C*T^2)", "2/(T^2·C)"),
        ("T^2/C", "T^2/C"),
        ("T/T", "1"),
    ],
)
def test_it_is_shown_as_it_is_written_and_what_is_shown_can_be_written(text, shown):
    assert str(as_scale(text)) == shown
    assert as_scale(shown) == as_scale(text)


def test_a_scale_stays_as_it_is():
    scale = Scale(2.0, -2, 1)
    assert as_scale(scale) is scale
    assert scale(temperature=T, classes=C) == pytest.approx(2 * 7 / 9)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "x",
        "1/x",
        "T^",
        "T^-2",
        "1/T/C",
        "T+C",
        "2T",
        "t^2",
        "1/0",
        "0",
        "(T",
        "1//T",
        "1/",
        "1/()",
        "1/(T^2",
        "1/T^2)",
        "1/T^2*C",
    ],
)
def test_what_is_no_product_is_an_error_that_says_what_is(wrong):
    with pytest.raises(ObjectiveError, match=r"a product such as 1/T\^2, 1/C .*; got '" + re.escape(wrong) + "'$"):
        as_scale(wrong)


@pytest.mark.parametrize("wrong", [True, None, float("nan"), float("inf"), ["1/T^2"], {"from": 1, "to": 2}])
def test_other_types_are_errors(wrong):
    with pytest.raises(ObjectiveError, match="got "):
        as_scale(wrong)


# In a term


def signals(seed: int = 0, classes: int = 5) -> tuple[dict[str, torch.Tensor], ...]:
    random = np.random.default_rng(seed)
    z, v = (torch.from_numpy(random.normal(0, 2, (4, classes))) for _ in range(2))
    return {"logits": z.requires_grad_()}, {"logits": v}, {"labels": torch.tensor([0, 1, 2, 3])}


def kl(z: torch.Tensor, v: torch.Tensor, temperature: float) -> float:
    """The mean over the batch of KL without T², in NumPy."""
    first, second = (x.detach().numpy() / temperature for x in (v, z))
    first, second = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (first, second))
    return float((np.exp(first) * (first - second)).sum(-1).mean())


@pytest.mark.parametrize(
    ("scale", "factor"),
    [("1/T^2", 1.0), ("1/C", 16 / 5), ("1/(T^2*C)", 1 / 5), ("C", 80.0), (0.5, 8.0), ("T/T^3", 1.0), ("1", 16.0)],
)
def test_it_multiplies_value_and_gradient_but_is_no_part_of_the_weight(scale, factor):
    student, teacher, batch = signals()
    term = Term("kl", temperature=4.0, weight=0.5, scale=scale)
    found = Objective({"soft": term})(student, teacher, batch)
    assert term.weight_at(Progress()) == 0.5
    assert float(found.parts["soft"]) == pytest.approx(factor * kl(student["logits"], teacher["logits"], 4.0), rel=1e-9)
    assert found.total.item() == pytest.approx(0.5 * float(found.parts["soft"]), rel=1e-12)
    found.total.backward()
    z, v = (side["logits"].detach() / 4 for side in (student, teacher))
    expected = 0.5 * factor * (z.softmax(-1) - v.softmax(-1)) / 4 / len(z)
    torch.testing.assert_close(student["logits"].grad, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("step", [0, 2, 5, 10])
def test_a_temperature_that_changes_is_that_of_the_step(step):
    student, teacher, batch = signals(1)
    progress = Progress(step=step, total_steps=10)
    term = Term("kl", temperature={"from": 8.0, "to": 2.0}, scale="1/T^2")
    found = Objective({"soft": term})(student, teacher, batch, progress).total
    temperature = 8.0 - 6.0 * step / 10
    assert found.item() == pytest.approx(kl(student["logits"], teacher["logits"], temperature), rel=1e-9)
    by_function = Term("kl", temperature=lambda at: 8.0 - 6.0 * at.fraction, scale="1/T^2")
    torch.testing.assert_close(Objective({"soft": by_function})(student, teacher, batch, progress).total, found)


def soft(student: torch.Tensor, teacher: torch.Tensor, *, temperature: float = 2.0) -> torch.Tensor:
    return temperature**2 * (student - teacher).square().sum(-1)


class Soft(torch.nn.Module):
    def __init__(self, *, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return soft(student, teacher, temperature=self.temperature)


@pytest.mark.parametrize("loss", [soft, f"{__name__}:Soft"], ids=["function", "class"])
@pytest.mark.parametrize(("said", "temperature"), [({}, 2.0), ({"temperature": 5.0}, 5.0)], ids=["default", "said"])
def test_the_temperature_is_that_of_the_loss_whether_said_or_not(loss, said, temperature):
    student, teacher, batch = signals(2)
    plain, scaled = (
        Objective({"soft": Term(loss, scale=scale, **said)})(student, teacher, batch).total for scale in (1, "1/T^2")
    )
    assert (plain / scaled).item() == pytest.approx(temperature**2, rel=1e-12)


def test_the_classes_are_the_last_axis_of_what_the_loss_gets():
    """With a projector those are the teacher's."""
    student, teacher, batch = signals(3)
    narrow = {"logits": student["logits"].detach()[:, :3].clone().requires_grad_()}
    project = torch.nn.Linear(3, 5).double()
    values = [
        Objective({"soft": Term("mse", project=project, scale=scale)})(narrow, teacher, batch).total.item()
        for scale in (1.0, "1/C")
    ]
    assert values[0] / values[1] == pytest.approx(5.0, rel=1e-12)


def test_a_loss_without_a_temperature_cannot_be_scaled_by_it():
    student, teacher, batch = signals(4)
    with pytest.raises(ObjectiveError, match=r"mse has no temperature for `scale: 1/T\^2`"):
        Objective({"soft": Term("mse", scale="1/T^2")})(student, teacher, batch)


def test_the_description_has_it():
    assert Term("kl", temperature=4.0, weight=0.5, scale="1/(T^2*C)").describe().startswith("0.5 · 1/(T^2·C) · 4²·KL(")
    assert Term("kl", temperature=4.0, scale=1).describe().startswith("1.0 · 4²·KL(")
