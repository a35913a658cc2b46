"""What every registered loss must hold to; a new one is tested without an edit here.

The inputs are random tensors ``[6, 5]`` and ``[4, 3, 5]``. A loss that needs others says so where it registers:
``example_shape`` (samples first; several shapes for a loss that takes tuples), ``example_teacher_shape`` where the
teacher's differ, ``example_options`` (for what a module needs to be made).
"""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.interfaces import Progress
from potstill.knowledge.alignment import make_projector
from potstill.losses.objective import Objective, Term
from potstill.registry import losses

NAMES = losses.names()
SHAPES = ((6, 5), (4, 3, 5))
DIVERGENCES = [name for name in NAMES if losses.get(name).__module__ == "potstill.losses.divergence"]


def per(name: str) -> str:
    return str(losses.facts(name).get("per", "position"))


def shapes(name: str) -> tuple[tuple[int, ...], ...]:
    if "example_shape" in losses.facts(name):
        return (sides(name, ())[0][0],)
    return SHAPES if per(name) == "position" else SHAPES[:1]


def sides(name: str, shape: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The shapes of the student's and of the teacher's signals."""
    facts = losses.facts(name)
    student = facts.get("example_shape", shape)
    teacher = facts.get("example_teacher_shape", student)
    several = [side if isinstance(side[0], tuple) else (side,) for side in (student, teacher)]
    return [tuple(each) for each in several[0]], [tuple(each) for each in several[1]]


def made(name: str, shape: tuple[int, ...] | None = None) -> Any:
    """The loss itself: a function, or a module with its default options and parameters that are always the same."""
    target = losses.get(name)
    if not inspect.isclass(target):
        return target
    loss = target(**losses.facts(name).get("example_options", {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if getattr(loss, "pending", False):
            inputs = Inputs(name, shape or shapes(name)[0], torch.float32)
            loss.materialize(*inputs.signals())
        for parameter in loss.parameters():  # what begins at 0 would hide the student
            torch.nn.init.normal_(parameter, std=0.5)
    return loss


def accepts(loss: Any) -> set[str]:
    return set(inspect.signature(getattr(loss, "forward", loss)).parameters)


def cases(names: list[str]) -> list[Any]:
    return [
        pytest.param(name, shape, id=f"{name}-{'x'.join(map(str, shape))}") for name in names for shape in shapes(name)
    ]


CASES = cases(NAMES)
SOFT_CASES = cases([name for name in NAMES if "teacher" in accepts(losses.get(name))])
MODULES = [name for name in NAMES if inspect.isclass(losses.get(name))]
ZERO_CASES = cases([name for name in NAMES if losses.facts(name).get("zero_at_equality")])


class Inputs:
    """Random arguments of a loss."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        student, teacher = sides(name, shape)
        self.student = [torch.randn(each, generator=generator, dtype=torch.float64).to(dtype) for each in student]
        self.teacher = [torch.randn(each, generator=generator, dtype=torch.float64).to(dtype) for each in teacher]
        self.labels = torch.randint(shape[-1], shape[:-1], generator=generator)
        self.index = torch.arange(shape[0])

    def saturated(self, size: float = 1e4) -> Inputs:
        """The same signs, all of one huge size."""
        self.student, self.teacher = ([each.sign() * size for each in side] for side in (self.student, self.teacher))
        return self

    def requires_grad(self) -> Inputs:
        self.student = [each.requires_grad_() for each in self.student]
        return self

    def __getitem__(self, rows: Any) -> Inputs:
        part = Inputs.__new__(Inputs)
        part.student, part.teacher = [each[rows] for each in self.student], [each[rows] for each in self.teacher]
        part.labels, part.index = self.labels[rows], self.index[rows]
        return part

    def into(self, loss: Any) -> Tensor:
        """The value of the loss."""
        names = accepts(loss)
        offered = {"labels": self.labels, "mask": None, "index": self.index, "progress": Progress()}
        signals = self.signals() if "teacher" in names else self.signals()[:1]
        if isinstance(loss, nn.Module) and self.student[0].dtype == torch.float64:
            loss = loss.double()
        value: Tensor = loss(*signals, **{key: value for key, value in offered.items() if key in names})
        return value

    def signals(self) -> list[Any]:
        """What a loss is called with: a tensor a side, or a tuple."""
        return [side[0] if len(side) == 1 else tuple(side) for side in (self.student, self.teacher)]


def test_there_are_losses_to_test():
    assert {"kl", "cross_entropy", "mse"} <= set(NAMES)
    assert {"kl", "soft_cross_entropy"} <= set(DIVERGENCES)


@pytest.mark.parametrize("name", NAMES)
def test_facts(name):
    assert per(name) in ("sample", "position", "batch")
    assert "formula" not in losses.facts(name) or "{student}" in losses.facts(name)["formula"]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_values_are_unreduced(name, shape):
    value = Inputs(name, shape).into(made(name))
    assert value.shape == {"position": shape[:-1], "sample": shape[:1], "batch": ()}[per(name)]


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_value_and_gradient_are_finite(name, shape, dtype, size):
    """A confident model has logits of 10⁴; a loss that takes log(softmax) is −inf there, and the run is lost."""
    inputs = Inputs(name, shape, dtype)
    inputs = (inputs.saturated(size) if size > 1 else inputs).requires_grad()
    value = inputs.into(made(name))
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all()
    value.sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in inputs.student)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_divergences_ignore_classes_that_are_impossible_for_both(name, dtype):
    inputs = Inputs(name, (6, 5), dtype)
    hidden = torch.tensor([False, True, False, True, False])
    padded = inputs[:]
    padded.student = [each.masked_fill(hidden, -math.inf).requires_grad_() for each in inputs.student]
    padded.teacher = [each.masked_fill(hidden, -math.inf) for each in inputs.teacher]
    visible = inputs[:]
    visible.student = [each[:, ~hidden] for each in inputs.student]
    visible.teacher = [each[:, ~hidden] for each in inputs.teacher]
    for labels in (padded, visible):
        labels.labels = torch.zeros(6, dtype=torch.long)  # class 0 is in both
    value = padded.into(made(name))
    torch.testing.assert_close(value, visible.into(made(name)))
    value.sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in padded.student)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_student_gets_the_right_gradient(name, shape):
    inputs, loss = Inputs(name, shape), made(name)
    if isinstance(loss, nn.Module):
        loss.eval()  # what has a memory adds to it in training, so that the same call gives another value

    def value(*student: Tensor) -> Tensor:
        varied = inputs[:]
        varied.student = list(student)
        return varied.into(loss)

    leaves = tuple(each.clone().requires_grad_() for each in inputs.student)
    if not losses.facts(name).get("stops_gradient"):  # a paper that holds part of the student fixed; see its own tests
        assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-6)
    gradient = torch.autograd.grad(value(*leaves).sum(), leaves[0])[0]
    assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize(("name", "shape"), SOFT_CASES)
def test_the_teacher_gets_no_gradient_through_the_objective(name, shape):
    """A teacher's signal comes with a graph from peers and moving averages; the student must not train its teacher."""
    inputs = Inputs(name, shape, torch.float32).requires_grad()
    options = losses.facts(name).get("example_options", {})
    names = signal_names(inputs)
    objective = Objective({"t": Term(name, *names, mask="none", **options)})
    batch = {"sample_id": inputs.index, "labels": inputs.labels}
    teacher = [each.clone().requires_grad_() for each in inputs.teacher]
    signals = dict(zip(names[0], inputs.student, strict=True)), dict(zip(names[1], teacher, strict=True))
    objective.materialize(*signals, make=make_projector)
    objective(*signals, batch).total.backward()
    assert all(each.grad is None for each in teacher)
    assert all(each.grad is not None for each in inputs.student[:1])


@pytest.mark.parametrize("name", MODULES)
def test_its_state_is_whole(name):
    """What a module learns and remembers is in its state: another one that loads it goes on to the same bits."""
    shape = shapes(name)[0]
    first, second = made(name), made(name)
    for seed in (1, 2):
        Inputs(name, shape, torch.float32, seed=seed).into(first)
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter)
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()}, strict=True)
    states = []
    for loss in (first, second):
        values = [Inputs(name, shape, torch.float32, seed=seed).into(loss) for seed in (3, 4)]
        states.append([*values, *loss.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_it_changes_neither_its_arguments_nor_the_random_numbers(name, shape):
    inputs, loss = Inputs(name, shape), made(name)
    before = [each.clone() for each in [*inputs.student, *inputs.teacher, inputs.labels, inputs.index]]
    state = torch.get_rng_state()
    inputs.into(loss)
    assert torch.equal(torch.get_rng_state(), state)
    after = [*inputs.student, *inputs.teacher, inputs.labels, inputs.index]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_it_computes_in_fp32_under_autocast(name, shape):
    """Autocast runs matrix products in bf16; three digits of a divergence are gone before anyone looks."""
    inputs = Inputs(name, shape, torch.bfloat16)
    plain = inputs.into(made(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = inputs.into(made(name))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=1e-7)
    wide = inputs[:]
    wide.student, wide.teacher = [each.double() for each in inputs.student], [each.double() for each in inputs.teacher]
    torch.testing.assert_close(value.double(), wide.into(made(name)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "shape"), ZERO_CASES)
def test_it_is_zero_where_both_agree_and_above_it_where_not(name, shape):
    inputs, loss = Inputs(name, shape), made(name)
    assert (inputs.into(loss) > 1e-4).all()
    same = inputs[:]
    same.student = [each.clone().requires_grad_() for each in inputs.teacher]
    value = same.into(loss)
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
    value.sum().backward()
    assert all(each.grad.abs().max() < 1e-7 for each in same.student)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_sample_does_not_see_the_others(name, shape):
    """Unless it is registered as `batch`, a loss that looks at other samples depends on how they were batched."""
    inputs = Inputs(name, shape)
    value = inputs.into(made(name))
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))
    if per(name) == "batch":
        torch.testing.assert_close(inputs[order].into(made(name)), value)
        return
    torch.testing.assert_close(torch.cat([inputs[:1].into(made(name)), inputs[1:].into(made(name))]), value)
    torch.testing.assert_close(inputs[order].into(made(name)), value[order])


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if per(str(case.values[0])) != "batch"])
def test_ragged_parts_of_a_batch_give_its_value_and_gradient(name, shape):
    """Micro-batches of other sizes, each divided by the count of the whole: as accumulation and processes have it."""
    inputs = Inputs(name, shape).requires_grad()
    soft = "teacher" in accepts(made(name))
    loss = made(name).double() if name in MODULES else name
    term = Term(loss, *signal_names(inputs), mask="none" if soft else None)
    objective = Objective({"t": term})
    rows = [slice(0, 1), slice(1, 3), slice(3, shape[0])]
    counts = objective.counts({"sample_id": inputs.index, "labels": inputs.labels})
    values, gradients = [], []
    for parts in ([slice(None)], rows):
        total = sum(loss_of(objective, inputs[part], counts) for part in parts)
        values.append(total)
        gradients.append(torch.cat([each.flatten() for each in torch.autograd.grad(total, inputs.student)]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-12)
    assert (gradients[0] - gradients[1]).norm() <= 1e-10 * gradients[0].norm()


def signal_names(inputs: Inputs) -> list[list[str]]:
    return [[f"s{place}" for place in range(len(side))] for side in (inputs.student, inputs.teacher)]


def loss_of(objective: Objective, inputs: Inputs, counts: dict[str, Tensor]) -> Tensor:
    names = signal_names(inputs)
    said, taught = (dict(zip(*pair, strict=True)) for pair in zip(names, (inputs.student, inputs.teacher), strict=True))
    return objective(said, taught, {"sample_id": inputs.index, "labels": inputs.labels}, None, counts).total


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_default(name):
    """A recipe that names nothing but the loss must work."""
    example = losses.facts(name).get("example_options", {})
    missing = [option.name for option in losses.options(losses.get(name)).values() if option.required]
    assert [option for option in missing if option not in example] == []
    defaults = {
        option.name: option.default for option in losses.options(losses.get(name)).values() if not option.required
    }
    given = {key: value for key, value in defaults.items() if value is not None}
    assert losses.check(name, {**example, **given}) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_documentation(name):
    text = inspect.getdoc(losses.get(name)) or ""
    assert text.split("\n")[0].endswith(".")
    for url in re.findall(r"https?://[^\s;,)]+", str(losses.facts(name).get("reference", ""))):
        assert url in text
    for option in losses.options(losses.get(name)):
        assert f"{option}:" in text, f"{name} does not document its option {option}"


@pytest.mark.parametrize("name", NAMES)
def test_the_formula_can_be_shown(name):
    term = Term(name, **losses.facts(name).get("example_options", {}))
    shown = term.describe()
    assert shown.startswith(f"{term.weight} · ")
    assert "student.logits" in shown
    assert "{" not in shown


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_no_graph_break_under_compile(name, backend):
    shape = shapes(name)[0]
    eager, compiled = (
        Inputs(name, shape, torch.float32).requires_grad(),
        Inputs(name, shape, torch.float32).requires_grad(),
    )
    expected = eager.into(made(name))
    torch._dynamo.reset()
    loss = made(name)
    inner = torch.compile(loss, backend=backend, fullgraph=True)

    def call(*args: Any, **kwargs: Any) -> Tensor:
        return inner(*args, **kwargs)

    call.__signature__ = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    value = compiled.into(call)
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(compiled.student, eager.student, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
