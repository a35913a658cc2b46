"""Losses with connectors, against their formulas written out with the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.errors import ObjectiveError
from potstill.losses.connectors import ActivationBoundaries, FactorTransfer, Overhaul, SimpleRecipe, Vid
from potstill.losses.objective import Objective, Term
from potstill.losses.sized import SizedLoss
from potstill.losses.spatial import BatchNorm
from potstill.registry import losses


def signal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, shape))


def made(loss: Any, student: Tensor, teacher: Tensor) -> Any:
    """The loss with its layers, in fp64."""
    torch.manual_seed(0)
    loss.materialize(student, teacher)
    return loss.double()


# --- vid


def test_vid_is_the_likelihood_of_a_gaussian():
    student, teacher = signal(3, 4, 2, 5, seed=1), signal(3, 6, 2, 5, seed=2)
    loss = made(Vid(), student, teacher)
    nn.init.normal_(loss.alpha, mean=1.0)
    mean = student
    layers = [each.weight for each in loss.regressor if isinstance(each, nn.Linear)]
    for index, weight in enumerate(layers):
        mean = F.conv2d(mean, weight[:, :, None, None])
        mean = mean if index == 2 else mean.clamp_min(0)
    deviation = np.sqrt(np.log1p(np.exp(loss.alpha.detach().numpy())) + 1e-5)[:, None, None]
    likelihood = norm.logpdf(teacher.numpy(), mean.detach().numpy(), deviation)
    expected = -(likelihood + np.log(2 * np.pi) / 2).mean(1)
    np.testing.assert_allclose(loss(student, teacher).detach().numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("variance", [5.0, 0.01, 1000.0])
def test_vid_begins_with_the_variance_it_is_given(variance):
    """exp(1000) overflows; the parameter before softplus must not be computed through it."""
    student, teacher = signal(2, 3, seed=3), signal(2, 4, seed=4)
    loss = made(Vid(variance=variance), student, teacher)
    torch.testing.assert_close(F.softplus(loss.alpha) + 1e-5, torch.full((4,), variance).double(), rtol=1e-6, atol=0)
    assert [tuple(each.weight.shape) for each in loss.regressor if isinstance(each, nn.Linear)] == [
        (4, 3),
        (4, 4),
        (4, 4),
    ]


def test_vid_learns_the_variance_of_what_cannot_be_predicted():
    """With nothing to go by, the best variance is the mean square of the teacher: the log term holds it there."""
    student, teacher = torch.zeros(500, 3), 3 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    loss = Vid(width=2)
    loss.materialize(student, teacher)
    optimizer = torch.optim.Adam([loss.alpha], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss(student, teacher).mean().backward()
        optimizer.step()
    torch.testing.assert_close(F.softplus(loss.alpha), teacher.square().mean(0), rtol=0.01, atol=0)


def test_vid_has_one_value_a_position_for_maps_tokens_and_vectors():
    for student, teacher, expected in (
        ((2, 3, 4, 6), (2, 5, 2, 3), (2, 2, 3)),
        ((2, 7, 3), (2, 7, 5), (2, 7)),
        ((2, 3), (2, 5), (2,)),
    ):
        said, taught = signal(*student, seed=5), signal(*teacher, seed=6)
        assert made(Vid(), said, taught)(said, taught).shape == expected
    maps = signal(2, 3, 4, 6, seed=7), signal(2, 5, 2, 3, seed=8)
    small = maps[0].reshape(2, 3, 2, 2, 3, 2).mean((3, 5))
    loss = made(Vid(), *maps)
    torch.testing.assert_close(loss(*maps), loss(small, maps[1]))


def test_what_vid_cannot_compare_is_an_error():
    with pytest.raises(ObjectiveError, match=r"got student \[2, 7, 3\] and teacher \[2, 6, 3\]"):
        Vid().materialize(torch.zeros(2, 7, 3), torch.zeros(2, 6, 3))
    with pytest.raises(ObjectiveError, match="must be above epsilon"):
        Vid(variance=1e-6)


# --- factor transfer


def convolved(layers: nn.Sequential, features: Tensor) -> Tensor:
    for layer in layers:
        if isinstance(layer, nn.ConvTranspose2d):
            features = F.conv_transpose2d(features, layer.weight, layer.bias, padding=1)
        elif isinstance(layer, nn.Conv2d):
            features = F.conv2d(features, layer.weight, layer.bias, padding=1)
        else:
            features = torch.where(features > 0, features, 0.1 * features)
    return features


@pytest.mark.parametrize("p", [1, 2])
def test_factor_transfer_from_the_formula(p):
    student, teacher = signal(2, 3, 4, 4, seed=9), signal(2, 6, 4, 4, seed=10)
    loss = made(FactorTransfer(p=p, reconstruction=0.25), student, teacher)
    with torch.no_grad():
        factor, said = convolved(loss.paraphraser, teacher), convolved(loss.translator, student)
        rebuilt = convolved(loss.decoder, factor)
    assert factor.shape == (2, 3, 4, 4)  # rate ½
    expected = []
    for index in range(2):
        own, other = (each[index].flatten() / each[index].flatten().square().sum().sqrt() for each in (said, factor))
        distance = sum(abs(float(a - b)) ** p for a, b in zip(own, other, strict=True)) / len(own)
        expected.append(distance + 0.25 * float((rebuilt[index] - teacher[index]).square().mean()))
    np.testing.assert_allclose(loss(student, teacher).detach().numpy(), expected, rtol=1e-10)


def test_the_paraphraser_learns_from_the_reconstruction_alone():
    """If the distance of the factors trained it, it would make all factors equal: 0 loss, nothing learned."""
    student, teacher = signal(2, 3, 4, 4, seed=11), signal(2, 6, 4, 4, seed=12).requires_grad_()
    loss = made(FactorTransfer(reconstruction=0.0), student, teacher)
    loss(student, teacher).sum().backward()
    for part in (loss.paraphraser, loss.decoder):
        assert all(each.grad is None or not each.grad.any() for each in part.parameters())
    assert all(each.grad.any() for each in loss.translator.parameters())
    assert teacher.grad is None
    loss = made(FactorTransfer(reconstruction=1.0), student, teacher)
    loss(student, teacher).sum().backward()
    assert all(each.grad.any() for each in [*loss.paraphraser.parameters(), *loss.decoder.parameters()])


def test_factor_transfer_averages_the_larger_factor():
    student, teacher = signal(2, 3, 8, 8, seed=13), signal(2, 6, 4, 4, seed=14)
    loss = made(FactorTransfer(rate=0.3), student, teacher)
    factor, said = convolved(loss.paraphraser, teacher), convolved(loss.translator, student)
    assert factor.shape[1] == 2
    small = said.reshape(2, 2, 4, 2, 4, 2).mean((3, 5)).flatten(1)
    distance = (F.normalize(small) - F.normalize(factor.flatten(1))).abs().mean(1)
    rebuilt = (convolved(loss.decoder, factor) - teacher).square().mean((1, 2, 3))
    torch.testing.assert_close(loss(student, teacher), distance + 0.002 * rebuilt)


# --- activation boundaries


def boundary(said: float, taught: float, margin: float) -> float:
    """The authors' piecewise loss of one neuron."""
    if taught > 0:
        return (said - margin) ** 2 if said <= margin else 0.0
    return (said + margin) ** 2 if said > -margin else 0.0


@pytest.mark.parametrize("margin", [1.0, 2.5])
def test_ab_from_the_formula(margin):
    student, teacher = signal(3, 2, 2, 3, seed=15), signal(3, 2, 2, 3, seed=16)
    teacher[0, 0, 0, 0] = 0.0  # a neuron at 0 is off
    loss = made(ActivationBoundaries(margin=margin), student, teacher)
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    expected = sum(boundary(s, t, margin) for s, t in pairs) / 3
    assert loss(student, teacher).item() == pytest.approx(expected)
    assert not list(loss.parameters())


def test_ab_is_0_beyond_the_margins_and_blind_to_how_far():
    teacher = signal(3, 2, 2, 3, seed=17)
    loss = made(ActivationBoundaries(), teacher, teacher)
    beyond = teacher.sign() * (1.001 + torch.rand(teacher.shape, generator=torch.Generator().manual_seed(0)).double())
    assert loss(beyond, teacher).item() == 0
    assert loss(-beyond, teacher).item() > 0
    torch.testing.assert_close(loss(-beyond, 50 * teacher), loss(-beyond, teacher))


def normalised(features: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Each channel with mean 0 and variance 1 over the batch and its positions."""
    rows = features.movedim(1, 0).flatten(1).detach().numpy()
    rows = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + epsilon)
    moved = features.movedim(1, 0)
    return torch.from_numpy(rows).reshape(moved.shape).movedim(0, 1)


def test_ab_connects_other_channels():
    student, teacher = signal(3, 2, 2, 3, seed=18), signal(3, 4, 2, 3, seed=19)
    loss = made(ActivationBoundaries(), student, teacher)
    mixed = torch.einsum("oi,bihw->bohw", loss.connector[0].weight[:, :, 0, 0], student)
    pairs = zip(normalised(mixed).flatten().tolist(), teacher.flatten().tolist(), strict=True)
    assert loss(student, teacher).item() == pytest.approx(sum(boundary(s, t, 1.0) for s, t in pairs) / 3)


# --- overhaul


def test_ofd_from_the_formula():
    student, teacher = signal(3, 2, 2, 3, seed=20), signal(3, 4, 2, 3, seed=21)
    loss = made(Overhaul(), student, teacher)
    mixed = torch.einsum("oi,bihw->bohw", loss.connector[0].weight[:, :, 0, 0], student)
    said = normalised(mixed).numpy()
    taught, total = teacher.numpy(), 0.0
    for channel in range(4):
        below = taught[:, channel][taught[:, channel] < 0]
        margin = below.mean()
        for s, t in zip(said[:, channel].ravel(), taught[:, channel].ravel(), strict=True):
            if t > 0:
                total += (s - t) ** 2
            elif s > max(t, margin):
                total += (s - max(t, margin)) ** 2
    assert loss(student, teacher).item() == pytest.approx(total / 3, rel=1e-10)


def test_ofd_measures_the_margins_in_training_alone():
    teachers = [signal(4, 2, 3, 3, seed=seed) for seed in (22, 23, 24)]
    teachers[1][:, 1] = teachers[1][:, 1].abs()  # a batch where the second channel never is negative
    loss = made(Overhaul(), teachers[0], teachers[0])
    for teacher in teachers:
        loss(teacher, teacher)
    means = [[each[:, c][each[:, c] < 0].mean() for each in teachers] for c in range(2)]
    expected = torch.stack([torch.stack(means[0]).mean(), torch.stack([means[1][0], means[1][2]]).mean()])
    torch.testing.assert_close(loss.margin, expected)
    loss.eval()
    before = copy.deepcopy(loss.state_dict())
    loss(teachers[1], teachers[1])
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def test_ofd_margins_follow_the_last_hundred_batches_or_so():
    """A mean over everything since the beginning would no longer move; one over ten batches would be noise."""
    loss = made(Overhaul(), signal(2, 1, 1, 1), signal(2, 1, 1, 1))
    for value in [-1.0] * 300 + [-2.0] * 100:
        loss(signal(2, 1, 1, 1), torch.full((2, 1, 1, 1), value).double())
    assert loss.margin.item() == pytest.approx(-2 + 0.99**100, rel=1e-6)


def test_ofd_of_a_teacher_after_relu_is_finite():
    student, teacher = signal(3, 2, 2, 2, seed=25), signal(3, 2, 2, 2, seed=26).clamp_min(0)
    loss = made(Overhaul(), student, teacher)
    assert torch.isfinite(loss(student, teacher))
    assert loss.margin.tolist() == [0.0, 0.0]


# --- simple recipe


def test_srd_from_the_formula():
    student, teacher = signal(6, 5, seed=27), signal(6, 4, seed=28)
    loss = made(SimpleRecipe(), student, teacher)
    projected = student @ loss.projector.weight.T + loss.projector.bias
    difference = normalised(projected, 1e-4) - normalised(teacher, 1e-4)
    total = sum(abs(float(each)) ** 4 for each in difference.flatten())  # the paper's sum over the batch too
    assert loss(student, teacher).item() == pytest.approx(np.log(total / 6 + 1e-5), rel=1e-10)
    assert loss(student, teacher).item() + np.log(6) == pytest.approx(np.log(total), rel=1e-4)


def test_srd_averages_feature_maps_and_is_finite_where_both_agree():
    student, teacher = signal(6, 5, 2, 3, seed=29), signal(6, 5, 4, 4, seed=30)
    loss = made(SimpleRecipe(exponent=3.0), student, teacher)
    torch.testing.assert_close(loss(student, teacher), loss(student.mean((2, 3)), teacher.flatten(2).mean(2)))
    nn.init.eye_(loss.projector.weight)
    nn.init.zeros_(loss.projector.bias)
    same = student.clone().requires_grad_()
    value = loss(same, student)
    assert value.item() == pytest.approx(np.log(1e-5))
    value.backward()
    assert (same.grad.abs() < 1e-6).all()
    with pytest.raises(ObjectiveError, match=r"got student \[2, 3, 4\] and teacher \[2, 5\]"):
        loss(torch.zeros(2, 3, 4), torch.zeros(2, 5))


# --- what they share

MAPS = ((5, 3, 4, 4), (5, 6, 4, 4))
CASES = [("vid", *MAPS), ("factor_transfer", *MAPS), ("ab", *MAPS), ("ofd", *MAPS), ("srd", (12, 3), (12, 6))]


@pytest.mark.parametrize(("name", "student", "teacher"), CASES)
def test_it_trains_its_own_layers_and_the_student(name, student, teacher):
    """A connector that no optimizer knows leaves the student to chase a random projection."""
    said, taught = signal(*student, seed=31).float(), signal(*teacher, seed=32).float()
    learned = nn.Parameter(said)
    torch.manual_seed(0)
    objective = Objective({"t": Term(name, "s", "t", mask="none")})
    objective.materialize({"s": learned}, {"t": taught}, make=no_projector)
    parameters = list(objective.parameters())
    assert parameters
    before = [each.detach().clone() for each in [learned, *parameters]]
    optimizer = torch.optim.Adam([learned, *parameters], lr=0.03)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        total = objective({"s": learned}, {"t": taught}, {"sample_id": torch.arange(len(said))}).total
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < values[0] - 0.1 * abs(values[0])
    assert all(not torch.equal(a, b) for a, b in zip(before, [learned, *parameters], strict=True))


def no_projector(kind: str, student: Tensor, teacher: Tensor) -> nn.Module:
    raise AssertionError("these losses size themselves")


@pytest.mark.parametrize(("name", "student", "teacher"), CASES)
def test_zeros_and_a_batch_of_one_are_finite(name, student, teacher):
    """The last batch of an epoch can hold one sample, which batch normalisation has no variance of."""
    loss: Callable[..., Tensor] = losses.get(name)()
    student, teacher = ((each[0], each[1], *([1] * (len(each) - 2))) for each in (student, teacher))
    loss.materialize(torch.zeros(student), torch.zeros(teacher))
    for rows in (slice(None), slice(1)):
        for said, taught in ((torch.zeros(student), torch.zeros(teacher)), (torch.ones(student), torch.zeros(teacher))):
            leaf = said[rows].clone().requires_grad_()
            value = loss(leaf, taught[rows])
            value.sum().backward()
            assert torch.isfinite(value).all()
            assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize(("name", "student", "teacher"), CASES)
def test_its_layers_are_fp32_whatever_the_signals_are(name, student, teacher):
    said, taught = signal(*student, seed=33).bfloat16(), signal(*teacher, seed=34).bfloat16()
    loss = losses.get(name)()
    loss.materialize(said, taught)
    assert {each.dtype for each in loss.parameters()} <= {torch.float32}
    assert loss(said, taught).dtype == torch.float32


@pytest.mark.parametrize("name", ["factor_transfer", "ab", "ofd"])
def test_vectors_are_an_error_of_the_dry_run(name):
    with pytest.raises(ObjectiveError, match=rf"{name} expected a feature map .* of the student, got \[2, 3\]"):
        losses.get(name)().materialize(torch.zeros(2, 3), torch.zeros(2, 3, 4, 4))


def test_batch_norm_is_torchs_but_for_a_batch_of_one():
    features = signal(4, 3, 2, 2, seed=35)
    own, torchs = BatchNorm(3).double(), nn.BatchNorm2d(3).double()
    torch.testing.assert_close(own(features), torchs(features))
    lone = signal(1, 3, seed=36)
    torch.testing.assert_close(own(lone), torchs.eval()(lone[..., None, None])[..., 0, 0])
    assert own.training
    torch.testing.assert_close(own.running_mean, torchs.running_mean)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("layers", "statistics"), [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_batch_norm_computes_in_fp32_whatever_the_types(layers, statistics, training):
    """Sharded training casts the parameters and not the statistics; the caller may cast all of it."""
    features, own = signal(4, 3, 2, 2, seed=37).bfloat16(), BatchNorm(3)
    for parameter in own.parameters():
        parameter.data = torch.randn(3, generator=torch.Generator().manual_seed(0)).to(layers)
    own.running_mean, own.running_var = torch.full((3,), 0.5).to(statistics), torch.full((3,), 2.0).to(statistics)
    torchs = nn.BatchNorm2d(3)
    torchs.load_state_dict(own.state_dict())
    own.train(training)
    torchs.train(training)
    value = own(features)
    assert value.dtype == torch.bfloat16
    assert torch.equal(value, torchs(features.float()).bfloat16())
    for name, expected in torchs.named_buffers():
        assert torch.equal(getattr(own, name), expected.to(getattr(own, name).dtype))
    assert own.running_mean.dtype == statistics


@pytest.mark.parametrize(("name", "student", "teacher"), CASES)
def test_its_layers_are_made_on_the_device_of_the_student(name, student, teacher):
    loss = losses.get(name)()
    loss.materialize(torch.zeros(student, device="meta"), torch.zeros(teacher))
    assert {each.device.type for each in [*loss.parameters(), *loss.buffers()]} == {"meta"}


SIZED = [
    name for name in losses.names() if isinstance(losses.get(name), type) and issubclass(losses.get(name), SizedLoss)
]


def example(name: str, seed: int = 0) -> tuple[Any, Any, Any]:
    """A loss that is not sized yet, and signals in fp32 as its registration describes them."""
    facts, sides = losses.facts(name), []
    student = facts.get("example_shape", (6, 5))
    for place, shape in enumerate((student, facts.get("example_teacher_shape", student))):
        shapes = shape if isinstance(shape[0], tuple) else (shape,)
        each = tuple(signal(*one, seed=seed + 10 * place + index).float() for index, one in enumerate(shapes))
        sides.append(each if len(each) > 1 else each[0])
    torch.manual_seed(0)
    return losses.get(name)(**facts.get("example_options", {})), *sides


def cast(side: Any, dtype: Any) -> Any:
    return side.to(dtype) if isinstance(side, Tensor) else tuple(each.to(dtype) for each in side)


@pytest.mark.parametrize("part", ["parameters", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SIZED)
def test_layers_may_be_bf16(name, dtype, part):
    """Sharded training (FSDP) computes with parameters in bf16 beside buffers in fp32; `.bfloat16()` casts both."""
    loss, student, teacher = example(name)
    loss.materialize(student, teacher)
    exact = copy.deepcopy(loss)
    for parameter in loss.parameters() if part == "parameters" else ():
        parameter.data = parameter.data.bfloat16()
    loss = loss if part == "parameters" else loss.bfloat16()
    for _ in range(2):  # what it remembers of the first batch counts in the second
        value, expected = loss(cast(student, dtype), cast(teacher, dtype)), exact(student, teacher)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=0.1, atol=0.1)
    value.sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in loss.parameters() if each.grad is not None)


@pytest.mark.parametrize("name", SIZED)
def test_layers_are_fp32_where_the_default_type_is_bf16(name):
    """Models are often loaded under it; a connector in bf16 learns nothing from small steps."""
    loss, student, teacher = example(name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        loss.materialize(cast(student, torch.bfloat16), cast(teacher, torch.bfloat16))
        value = loss(cast(student, torch.bfloat16), cast(teacher, torch.bfloat16))
    finally:
        torch.set_default_dtype(before)
    floating = {each.dtype for each in loss.state_dict().values() if each.is_floating_point()}
    assert floating <= {torch.float32}
    assert value.dtype == torch.float32


@pytest.mark.parametrize("name", SIZED)
def test_it_can_be_copied_and_moved_before_and_after_it_is_sized(name):
    loss, student, teacher = example(name)
    early = copy.deepcopy(loss)
    assert early.pending
    torch.manual_seed(0)
    early.to("cpu").materialize(student, teacher)
    torch.manual_seed(0)
    loss.materialize(student, teacher)
    late = copy.deepcopy(loss)
    values = [each(student, teacher) for each in (loss, early, late)]
    assert all(torch.equal(values[0], value) for value in values)
    before = {key: value.clone() for key, value in late.state_dict().items()}
    loss(student, teacher)
    for parameter in loss.parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(value, before[key]) for key, value in late.state_dict().items())
    late.to("meta")
    assert {each.device.type for each in [*late.parameters(), *late.buffers()]} <= {"meta"}
    assert not [value for part in late.modules() for value in vars(part).values() if isinstance(value, Tensor)]
