"""Contrastive losses, against loops over the formulas with a queue that is a Python list."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import deque
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from scipy.special import hyp0f1
from torch import Tensor, nn

from potstill.errors import ObjectiveError
from potstill.knowledge.alignment import make_projector
from potstill.losses.contrastive import CRD, infonce, log_mean_exp
from potstill.losses.objective import Objective, Term
from potstill.registry import losses

ROOT = Path(__file__).parent.parent.parent


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 1, shape))


def made(size: int = 8, *, form: str = "infonce", temperature: float = 0.5, dim: int = 4, seed: int = 0) -> CRD:
    """A loss for students of width 3 and teachers of width 5, in fp64."""
    loss = CRD(dim=dim, size=size, form=form, temperature=temperature)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss.materialize(features(2, 3), features(2, 5))
    return loss.double()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def embedded(loss: CRD, student: Tensor, teacher: Tensor) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        pair = [
            (x @ layer.weight.T + layer.bias).numpy() for x, layer in ((student, loss.student), (teacher, loss.teacher))
        ]
    return unit(pair[0]), unit(pair[1])


class Loops:
    """The loss in loops, its memory a list of (student, teacher, sample id, class)."""

    def __init__(self, loss: CRD) -> None:
        self.loss = loss
        self.queue: deque[tuple[np.ndarray, np.ndarray, int | None, int | None]] = deque(maxlen=loss.size)

    def __call__(self, student: Tensor, teacher: Tensor, ids: list[int | None], classes: list[int | None]) -> float:
        rows = list(zip(*embedded(self.loss, student, teacher), ids, classes, strict=True))
        total = 0.0
        for place, anchor in enumerate(rows):
            others = [row for other, row in enumerate(rows) if other != place] + list(self.queue)
            negatives = [row for row in others if not self.akin(anchor, row)]
            for mine, yours in ((0, 1), (1, 0)):
                score = float(anchor[mine] @ anchor[yours]) / self.loss.temperature
                total += self.one(score, [float(anchor[mine] @ n[yours]) / self.loss.temperature for n in negatives])
        self.queue.extend(rows)
        return total / len(rows)

    @staticmethod
    def akin(a: tuple, b: tuple) -> bool:
        return any(a[field] is not None and a[field] == b[field] for field in (2, 3))

    def one(self, positive: float, negatives: list[float]) -> float:
        if self.loss.form == "infonce":
            return math.log(sum(math.exp(each) for each in [positive, *negatives])) - positive
        mean = hyp0f1(self.loss.dim / 2, 1 / (4 * self.loss.temperature**2))  # of e^(u·v/τ) over directions
        noise = max(len(negatives), 1) * mean
        wrong = sum(math.log(noise / (math.exp(each) + noise)) for each in negatives)
        return -math.log(math.exp(positive) / (math.exp(positive) + noise)) - wrong


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_infonce_in_a_loop(temperature):
    student, teacher = features(5, 4, seed=1), features(5, 4, seed=2)
    cosines = unit(student.numpy()) @ unit(teacher.numpy()).T / temperature
    expected = np.mean([math.log(sum(math.exp(each) for each in row)) - row[i] for i, row in enumerate(cosines)])
    assert infonce(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


def test_infonce_limits():
    student, teacher = features(6, 4, seed=1), features(6, 4, seed=2)
    assert infonce(student[:1], teacher[:1]).item() == 0
    assert infonce(torch.ones(6, 4), torch.ones(6, 4)).item() == pytest.approx(math.log(6), rel=1e-6)
    assert infonce(student, student * 7).item() < 0.1  # length is of no importance
    assert infonce(student, student, temperature=1.0) > infonce(student, student, temperature=0.07)
    assert infonce(student, student) != infonce(student, teacher)


def test_infonce_searches_for_the_student_among_the_teachers():
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    e = math.e
    assert infonce(student, teacher, temperature=1.0).item() == pytest.approx(math.log((e + 1) / e) + 0.5, rel=1e-6)
    assert infonce(teacher, student, temperature=1.0).item() == pytest.approx(math.log(2), rel=1e-6)


def test_a_sample_that_is_twice_in_the_batch_is_no_negative_of_itself():
    student, teacher = features(4, 3, seed=1), features(4, 3, seed=2)
    value = infonce(student, teacher, index=torch.tensor([7, 8, 7, 9]), temperature=0.5)
    cosines = unit(student.numpy()) @ unit(teacher.numpy()).T / 0.5
    allowed = {0: [0, 1, 3], 1: [0, 1, 2, 3], 2: [1, 2, 3], 3: [0, 1, 2, 3]}
    expected = [math.log(sum(math.exp(cosines[i, j]) for j in js)) - cosines[i, i] for i, js in allowed.items()]
    assert value.item() == pytest.approx(np.mean(expected), rel=1e-12)
    assert infonce(student[:2], teacher[:2], index=torch.tensor([1, 1])).item() == pytest.approx(0, abs=1e-12)


def test_infonce_of_positions_and_errors():
    student, teacher = features(4, 5, 3, seed=1), features(4, 2, 3, seed=2)
    torch.testing.assert_close(infonce(student, teacher), infonce(student.mean(1), teacher.mean(1)))
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 4)
    torch.testing.assert_close(
        infonce(student, teacher[:, 0], mask=mask), infonce(student[:, :2].mean(1), teacher[:, 0])
    )
    with pytest.raises(ObjectiveError, match="project: linear"):
        infonce(features(4, 3), features(4, 5))
    with pytest.raises(ObjectiveError, match=r"mask \[4, 2\] of the positions"):
        infonce(student, teacher, mask=mask)


@pytest.mark.parametrize(("dim", "temperature"), [(128, 0.07), (128, 0.1), (2, 0.5), (1, 1.0), (4, 0.05), (512, 0.02)])
def test_the_mean_over_random_directions(dim, temperature):
    expected = math.log(hyp0f1(dim / 2, 1 / (4 * temperature**2)))
    assert log_mean_exp(dim, temperature) == pytest.approx(expected, rel=1e-9)


def test_the_mean_over_random_directions_by_drawing_them():
    draws = unit(np.random.default_rng(0).normal(size=(400_000, 16)))[:, 0]
    assert log_mean_exp(16, 0.3) == pytest.approx(math.log(np.exp(draws / 0.3).mean()), abs=0.01)
    assert math.isfinite(log_mean_exp(8, 1e-3))
    # what InstDisc, from which the authors' code comes, measured for 1281167 random vectors: Z = 2876934.2
    assert log_mean_exp(128, 0.07) == pytest.approx(math.log(2876934.2 / 1281167), abs=0.02)


@pytest.mark.parametrize("form", ["infonce", "nce"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("size", [1, 4, 10, 64])
def test_crd_in_loops(form, labelled, size):
    """Batches that do not divide the queue, fill it, wrap around and are larger than it."""
    loss = made(size, form=form)
    loops = Loops(loss)
    random = np.random.default_rng(5)
    for step, count in enumerate([3, 1, 6, 2, 7, 2, 3]):
        student, teacher = features(count, 3, seed=step), features(count, 5, seed=100 + step)
        ids = random.integers(0, 9, count).tolist()
        classes = [int(c) if c < 3 else None for c in random.integers(0, 4, count)] if labelled else [None] * count
        labels = torch.tensor([-100 if c is None else c for c in classes]) if labelled else None
        value = loss(student, teacher, labels=labels, index=torch.tensor(ids))
        assert value.item() == pytest.approx(loops(student, teacher, ids, classes), rel=1e-10)
    assert loss.seen == 24
    assert {tuple(buffer.shape) for buffer in loss.buffers()} == {(size, 4), (size,), ()}


@pytest.mark.parametrize("form", ["infonce", "nce"])
def test_the_empty_queue_adds_nothing(form):
    """Slots that were never filled are vectors of zeros, which would be negatives with a cosine of 0."""
    student, teacher, index = features(5, 3, seed=1), features(5, 5, seed=2), torch.arange(5)
    torch.testing.assert_close(
        made(1, form=form)(student, teacher, index=index), made(1000, form=form)(student, teacher, index=index)
    )
    alone = made(8, form=form)(student[:1], teacher[:1], index=index[:1])
    assert torch.isfinite(alone)
    if form == "infonce":
        assert alone.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("labels", [None, torch.rand(5), torch.zeros(5, 3, dtype=torch.long), torch.full((5,), -100)])
def test_labels_that_tell_nothing(labels):
    loss, other = made(), made()
    for seed in (1, 2):
        args = features(5, 3, seed=seed), features(5, 5, seed=seed + 10)
        torch.testing.assert_close(loss(*args, labels=labels), other(*args))


def test_without_ids_every_entry_is_a_negative():
    loss, other = made(), made()
    for step in range(3):
        args = features(4, 3, seed=step), features(4, 5, seed=10 + step)
        torch.testing.assert_close(loss(*args), other(*args, index=torch.arange(4) + 100 * step))


def test_the_memory_changes_in_training_alone():
    loss = made()
    student, teacher = features(5, 3, seed=1), features(5, 5, seed=2)
    loss(student, teacher)
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    loss.eval()
    first = loss(student, teacher)
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())
    assert loss(student, teacher) == first
    loss.train()
    loss(student, teacher)
    assert loss.seen == 10
    assert not torch.equal(loss.students, before["students"])


@pytest.mark.parametrize("form", ["infonce", "nce"])
def test_the_gradient_is_that_before_the_batch_is_remembered(form):
    """The memory is overwritten in place after the loss is computed and before its backward."""
    student, teacher = features(6, 3, seed=1).requires_grad_(), features(6, 5, seed=2)
    gradients = []
    for training in (True, False):
        loss = made(4, form=form)
        loss(features(3, 3, seed=3), features(3, 5, seed=4))
        loss.train(training)
        parameters = [student, *loss.parameters()]
        gradients.append(torch.autograd.grad(loss(student, teacher), parameters))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert first.abs().max() > 1e-6


def test_both_directions_count():
    """A batch of one sample and a queue: the first direction knows old teachers, the second old students."""
    loss = made()
    loss(features(4, 3, seed=1), features(4, 5, seed=2))
    student, teacher = features(1, 3, seed=3), features(1, 5, seed=4)
    whole = loss.eval()(student, teacher)
    (s, t), old_s, old_t = embedded(loss, student, teacher), loss.students[:4].numpy(), loss.teachers[:4].numpy()
    parts = []
    for anchor, own, old in ((s[0], t[0], old_t), (t[0], s[0], old_s)):
        scores = [float(anchor @ each) / 0.5 for each in (own, *old)]
        parts.append(math.log(sum(math.exp(each) for each in scores)) - scores[0])
    assert whole.item() == pytest.approx(sum(parts), rel=1e-12)
    assert abs(parts[0] - parts[1]) > 1e-3


@pytest.mark.parametrize("form", ["infonce", "nce"])
def test_a_student_learns_to_be_told_apart(form):
    """A little training: each student's embedding becomes the nearest to its own teacher's."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(96, 10, generator=random)
    teacher = torch.relu(inputs @ torch.randn(10, 20, generator=random))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, loss = nn.Linear(10, 12), CRD(dim=16, size=64, form=form)
        loss.materialize(student(inputs), teacher)
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr=0.005)
    for _ in range(150):
        rows = torch.randperm(96, generator=random)[:32]
        optimizer.zero_grad()
        loss(student(inputs[rows]), teacher[rows], index=rows).backward()
        optimizer.step()
    ours, theirs = embedded(loss, student(inputs).detach(), teacher)
    assert ((ours @ theirs.T).argmax(1) == np.arange(96)).mean() > 0.9


def test_a_high_learning_rate_makes_embeddings_equal_under_nce_and_not_under_infonce():
    """Why infonce is the default: the queue starts from what the networks say, not from a random memory."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 64, generator=random)
    teacher = torch.relu(inputs[:, :32] @ torch.randn(32, 64, generator=random) / 5)
    spread = {}
    for form in ("infonce", "nce"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            student = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
            loss = CRD(dim=64, size=512, form=form)
            loss.materialize(student(inputs), teacher)
        optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.05, momentum=0.9)
        for step in range(60):
            rows = torch.arange(64) + 64 * (step % 4)
            optimizer.zero_grad()
            loss(student(inputs[rows]), teacher[rows], index=rows).backward()
            optimizer.step()
        spread[form] = embedded(loss, student(inputs).detach(), teacher)[0].std(0)
    assert np.linalg.norm(spread["infonce"]) > 0.5
    assert np.linalg.norm(spread["nce"]) < 0.2


def test_signals_of_other_kinds():
    loss = CRD(dim=4, size=8)
    student, teacher = features(3, 6, 5, seed=1).bfloat16(), features(3, 2, 2, 2, seed=2).float()
    loss.materialize(student, teacher)
    assert loss.student.in_features == 5
    assert loss.teacher.in_features == 8
    assert all(parameter.dtype == torch.float32 for parameter in loss.parameters())
    mask = torch.tensor([[1, 1, 0, 0, 0, 0]] * 3)
    value = loss.eval()(student, teacher, mask=mask)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student[:, :2].float().mean(1), teacher))
    torch.testing.assert_close(loss(student, teacher), loss(student.float().mean(1), teacher))


def test_errors():
    with pytest.raises(ObjectiveError, match="materialize"):
        CRD()(features(2, 3), features(2, 5))
    with pytest.raises(ObjectiveError, match=r"a student's signal of width 3, got 4 of \[2, 4\]"):
        made()(features(2, 4), features(2, 5))
    with pytest.raises(ObjectiveError, match="a teacher's signal of width 5"):
        made()(features(2, 3), features(2, 5, 2, 2))
    problems = losses.check("crd", {"size": 0, "dim": 1.5, "temperature": -1, "form": "softmax"})
    assert {problem.path for problem in problems} == {("size",), ("dim",), ("temperature",), ("form",)}


def test_in_an_objective():
    """The published weight, ids from the batch, and the queue in the objective's state."""
    signals = {"f": features(4, 3, seed=1).float()}, {"f": features(4, 5, seed=2).float()}
    objective = Objective({"c": Term("crd", "f", "f", size=8, dim=4)})
    objective.materialize(*signals, make=make_projector)
    loss = objective.terms["c"].loss
    batch = {"sample_id": torch.arange(4), "labels": torch.tensor([0, 1, 2, 3])}
    output = objective(*signals, batch)
    loss.seen.zero_()
    torch.testing.assert_close(output.total, 0.8 * loss(signals[0]["f"], signals[1]["f"], index=batch["sample_id"]))
    assert loss.ids.tolist()[:4] == [0, 1, 2, 3]
    assert any(key.endswith("students") for key in objective.state_dict())


SIZES = ((3, 5), (2, 1), (9, 4))


def batch_of(rank: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, seed = SIZES[step][rank], 10 * step + rank
    return (
        features(count, 3, seed=seed),
        features(count, 5, seed=50 + seed),
        torch.arange(count) % 3,
        torch.arange(count),
    )


def run_rank(rank: int, folder: str) -> None:
    """One of two processes, each with batches of its own size."""
    wait = timedelta(seconds=90)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=wait)
    try:
        loss = made(10)
        for step in range(len(SIZES)):
            student, teacher, labels, index = batch_of(rank, step)
            loss(student, teacher, labels=labels, index=index + 100 * rank)
    finally:
        dist.destroy_process_group()
    save_file(loss.state_dict(), f"{folder}/{rank}.safetensors")


def test_all_processes_hold_the_same_queue(tmp_path):
    """What one process would have seen, in the order of the ranks, with batches of other sizes in each."""
    code = "import sys; from tests.losses.test_contrastive import run_rank; run_rank(1, sys.argv[1])"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    try:
        run_rank(0, str(tmp_path))
        assert other.wait(timeout=60) == 0
    finally:
        other.kill()
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    alone = made(10)
    for step in range(len(SIZES)):
        student, teacher, labels, index = (
            torch.cat(pair) for pair in zip(*(batch_of(r, step) for r in range(2)), strict=True)
        )
        index[SIZES[step][0] :] += 100
        alone(student, teacher, labels=labels, index=index)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(first[key], value)
    assert first["seen"] == sum(map(sum, SIZES))
