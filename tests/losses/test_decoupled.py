"""The losses with a labelled class against numbers from their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from potstill.errors import ObjectiveError
from potstill.losses.decoupled import dkd, nkd, wsld
from potstill.losses.divergence import kl, soft_cross_entropy
from potstill.registry import losses

LABELS = torch.tensor([0, 3, 5, 2])
ALL = [dkd, nkd, wsld]


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape))


def softened(row: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp(row.astype(np.longdouble) / temperature)
    return powers / powers.sum()


def dkd_of(student, teacher, label, alpha, beta, temperature):
    """The paper's equations for one sample, with probabilities."""
    p, q = softened(teacher, temperature), softened(student, temperature)
    others = np.arange(len(p)) != label
    p_rest, q_rest = p[others].sum(), q[others].sum()
    of_label = p[label] * np.log(p[label] / q[label]) + p_rest * np.log(p_rest / q_rest)
    p_others, q_others = p[others] / p_rest, q[others] / q_rest
    return temperature**2 * (alpha * of_label + beta * (p_others * np.log(p_others / q_others)).sum())


def nkd_of(student, teacher, label, gamma, temperature):
    p, q = softened(teacher, 1.0), softened(student, 1.0)
    others = np.arange(len(p)) != label
    p_others, q_others = softened(teacher[others], temperature), softened(student[others], temperature)
    return -p[label] * np.log(q[label]) - gamma * temperature**2 * (p_others * np.log(q_others)).sum()


def wsld_of(student, teacher, label, temperature):
    factor = 1 - np.exp(-np.log(softened(student, 1.0)[label]) / np.log(softened(teacher, 1.0)[label]))
    p, q = softened(teacher, temperature), softened(student, temperature)
    return factor * temperature**2 * -(p * np.log(q)).sum()


@pytest.mark.parametrize(
    ("loss", "formula", "options"),
    [
        (dkd, dkd_of, {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}),
        (dkd, dkd_of, {"alpha": 2.0, "beta": 0.5, "temperature": 1.0}),
        (nkd, nkd_of, {"gamma": 1.5, "temperature": 1.0}),
        (nkd, nkd_of, {"gamma": 0.7, "temperature": 3.0}),
        (wsld, wsld_of, {"temperature": 2.0}),
        (wsld, wsld_of, {"temperature": 4.0}),
    ],
)
def test_values_in_extended_precision(loss, formula, options):
    student, teacher = logits(4, 6, seed=1), logits(4, 6, seed=2)
    rows = zip(student.numpy(), teacher.numpy(), LABELS.tolist(), strict=True)
    expected = np.array([float(formula(*row, **options)) for row in rows])
    value = loss(student, teacher, labels=LABELS, **options).numpy()
    np.testing.assert_allclose(value, expected, rtol=1e-6 if loss is wsld else 1e-11)  # wsld divides by CE + 1e-7


def test_published_numbers_are_the_defaults():
    student, teacher = logits(4, 6, seed=3), logits(4, 6, seed=4)
    for loss, options in (
        (dkd, {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}),
        (nkd, {"gamma": 1.5, "temperature": 1.0}),
        (wsld, {"temperature": 2.0}),
    ):
        published = loss(student, teacher, labels=LABELS, **options)
        assert torch.equal(loss(student, teacher, labels=LABELS), published)
    assert losses.facts("wsld")["weight"] == 2.5


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_takes_kl_apart(temperature):
    """KL = label against the rest + (1 − p of the label)·KL among the rest: the identity that the paper starts from."""
    student, teacher = logits(4, 6, seed=5), logits(4, 6, seed=6)
    first = dkd(student, teacher, labels=LABELS, alpha=1, beta=0, temperature=temperature)
    second = dkd(student, teacher, labels=LABELS, alpha=0, beta=1, temperature=temperature)
    rest = 1 - (teacher / temperature).softmax(-1).gather(1, LABELS[:, None]).squeeze(1)
    torch.testing.assert_close(first + rest * second, kl(student, teacher, temperature=temperature))


def test_nkd_takes_cross_entropy_apart():
    student, teacher = logits(4, 6, seed=7), logits(4, 6, seed=8)
    of_label = nkd(student, teacher, labels=LABELS, gamma=0)
    others = nkd(student, teacher, labels=LABELS, gamma=1) - of_label
    p, q = (each.softmax(-1).gather(1, LABELS[:, None]).squeeze(1) for each in (teacher, student))
    whole = of_label + (1 - p) * (others - (1 - q).log())
    torch.testing.assert_close(whole, soft_cross_entropy(student, teacher))


def test_dkd_does_not_fade_where_the_teacher_is_sure():
    """What :func:`kl` says about the other classes is worth e⁻²⁰ here; dkd says it at full weight."""
    student, teacher = logits(1, 6, seed=9, scale=1.0).requires_grad_(), logits(1, 6, seed=10, scale=1.0)
    sure = teacher + 20 * torch.nn.functional.one_hot(torch.tensor([3]), 6)
    label = torch.tensor([3])
    for loss, strong in ((kl, False), (lambda *pair, temperature: dkd(*pair, labels=label, temperature=1), True)):
        (gradient,) = torch.autograd.grad(loss(student, sure, temperature=1).sum(), student)
        among = gradient[0, [0, 1, 2, 4, 5]]
        assert ((among - among.mean()).norm() > 0.5) == strong


@pytest.mark.parametrize("size", [420.0, 1e4])
@pytest.mark.parametrize("loss", ALL)
def test_saturated_logits_are_finite(loss, size):
    """The logarithm of a sum of probabilities is −inf from about 90 on in fp32, and its gradient NaN."""
    student = (torch.eye(6)[[1, 3, 0, 2]] * size * 2 - size).requires_grad_()
    teacher = torch.eye(6)[[0, 3, 0, 5]] * size * 2 - size
    value = loss(student, teacher, labels=LABELS)
    assert torch.isfinite(value).all()
    value.sum().backward()
    assert torch.isfinite(student.grad).all()
    if loss is not wsld:
        assert value[0] > 100  # sample 0: the student is sure of a wrong class


def test_dkd_on_saturated_logits_is_right():
    """Label at +420, the rest at −420, student the other way round: T²·840/T of the label, 0 among the others."""
    student, teacher = torch.tensor([[-420.0, 420.0, 420.0]]), torch.tensor([[420.0, -420.0, -420.0]])
    value = dkd(student, teacher, labels=torch.tensor([0]), temperature=4.0)
    assert value.item() == pytest.approx(16 * (840 / 4 + math.log(2)), rel=1e-5)


def test_gradients_are_those_of_the_formulas():
    student, teacher = logits(4, 6, seed=11).requires_grad_(), logits(4, 6, seed=12)
    label = torch.nn.functional.one_hot(LABELS, 6).bool()

    def others(each, temperature):
        return (each[~label].view(4, 5) / temperature).softmax(-1)

    def plain_dkd():
        p, q = (teacher / 4).softmax(-1)[label], (student / 4).softmax(-1)[label]
        of_label = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        p, q = others(teacher, 4), others(student, 4)
        return 16 * (of_label + 8 * (p * (p / q).log()).sum(-1))

    def plain_nkd():
        of_label = teacher.softmax(-1)[label] * student.log_softmax(-1)[label]
        return -of_label - 1.5 * (others(teacher, 1) * others(student, 1).log()).sum(-1)

    for loss, plain in ((dkd, plain_dkd), (nkd, plain_nkd)):
        (ours,) = torch.autograd.grad(loss(student, teacher, labels=LABELS).sum(), student)
        (theirs,) = torch.autograd.grad(plain().sum(), student)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_factor_of_wsld_gets_no_gradient():
    """With a gradient through it, the student would also be rewarded for knowing the label less well."""
    student, teacher = logits(4, 6, seed=13).requires_grad_(), logits(4, 6, seed=14)
    value, plain = wsld(student, teacher, labels=LABELS), soft_cross_entropy(student, teacher, temperature=2.0)
    factor = (value / plain).detach()
    (ours,) = torch.autograd.grad(value.sum(), student)
    (theirs,) = torch.autograd.grad((factor * plain).sum(), student)
    torch.testing.assert_close(ours, theirs)


def test_wsld_fades_where_the_student_knows_better():
    label = torch.tensor([0])
    sure, wrong = torch.tensor([[30.0, 0.0, 0.0]]), torch.tensor([[0.0, 30.0, 0.0]])
    soft = soft_cross_entropy(sure, wrong, temperature=2.0)
    assert wsld(sure, wrong, labels=label).item() < 1e-3 * soft.item()
    soft = soft_cross_entropy(wrong, sure, temperature=2.0)
    assert wsld(wrong, sure, labels=label).item() == pytest.approx(soft.item(), rel=1e-6)
    even = torch.zeros(1, 3)  # both know it equally well
    assert wsld(even, even, labels=label).item() == pytest.approx((1 - math.exp(-1)) * 4 * math.log(3), rel=1e-5)


@pytest.mark.parametrize("loss", ALL)
def test_positions_without_a_label_are_0(loss):
    student, teacher = logits(2, 3, 5, seed=15).requires_grad_(), logits(2, 3, 5, seed=16)
    labels = torch.tensor([[1, -100, 4], [-100, 0, 2]])
    value = loss(student, teacher, labels=labels)
    assert value.shape == (2, 3)
    assert torch.equal(value == 0, labels == -100)
    value.sum().backward()
    assert torch.equal((student.grad == 0).all(-1), labels == -100)
    torch.testing.assert_close(value[1, 2], loss(student[1, 2:], teacher[1, 2:], labels=labels[1, 2:])[0])


@pytest.mark.parametrize("loss", ALL)
def test_impossible_classes_count_as_if_they_were_not_there(loss):
    student, teacher = logits(4, 6, seed=17), logits(4, 6, seed=18)
    hidden = torch.tensor([False, True, False, False, True, False])
    labels, kept = torch.tensor([0, 3, 5, 2]), torch.tensor([0, 2, 3, 1])
    masked = student.masked_fill(hidden, -math.inf).requires_grad_()
    value = loss(masked, teacher.masked_fill(hidden, -math.inf), labels=labels)
    torch.testing.assert_close(value, loss(student[:, ~hidden], teacher[:, ~hidden], labels=kept))
    value.sum().backward()
    assert torch.isfinite(masked.grad).all()


@pytest.mark.parametrize("loss", ALL)
def test_labels_that_do_not_fit_are_refused(loss):
    student, teacher = logits(4, 6), logits(4, 6)
    with pytest.raises(ObjectiveError, match=rf"{loss.__name__} expected class ids \[4\], got labels \[4, 6\]"):
        loss(student, teacher, labels=torch.rand(4, 6))
    with pytest.raises(ObjectiveError, match="expected class ids"):
        loss(student, teacher, labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ObjectiveError, match="at least 2 classes"):
        loss(student[:, :1], teacher[:, :1], labels=torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(("name", "option"), [("dkd", "alpha"), ("dkd", "beta"), ("nkd", "gamma")])
def test_weights_of_parts_are_not_negative(name, option):
    assert [problem.path for problem in losses.check(name, {option: -1})] == [(option,)]
    assert losses.check(name, {option: 0}) == []
