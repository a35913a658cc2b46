"""Losses between attentions, against loops over the formulas of the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from potstill.errors import ObjectiveError
from potstill.knowledge.capture import capture
from potstill.losses.attention_maps import attention_cosine, attention_kl, attention_mse, minilm, minilmv2
from potstill.losses.objective import Objective, Term
from potstill.registry import losses

B, HEADS, T = 3, 4, 5
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
MAP_LOSSES = [attention_mse, attention_kl, attention_cosine]


def vectors(heads: int, width: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (B, heads, T, width)))


def maps(seed: int, mask: Tensor | None = None, heads: int = HEADS) -> Tensor:
    """Attention probabilities, 0 at the keys that are padding."""
    scores = torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (B, heads, T, T)))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    return scores.softmax(-1)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return sum(float(a * math.log(a / b)) for a, b in zip(p, q, strict=True) if a > 0)


def by_hand(name: str, student: np.ndarray, teacher: np.ndarray) -> float:
    """One query's value."""
    if name == "attention_mse":
        seen = sum(1 for s, t in zip(student, teacher, strict=True) if s > 0 or t > 0)
        return float(((student - teacher) ** 2).sum() / seen)
    if name == "attention_kl":
        return divergence(teacher, student)
    return float(1 - student @ teacher / math.sqrt((student @ student) * (teacher @ teacher)))


def relation(x: np.ndarray, valid: list[int]) -> np.ndarray:
    """softmax(X·Xᵀ/√d) over the valid positions alone, [valid, valid]."""
    kept = x[valid].astype(np.longdouble)
    scores = kept @ kept.T / np.sqrt(np.longdouble(x.shape[-1]))
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def relation_loss(student: np.ndarray, teacher: np.ndarray, mask: Tensor) -> np.ndarray:
    """Mean over heads and valid positions of KL(teacher ‖ student); [B, heads, T, D] in, [B] out."""
    found = []
    for sample in range(B):
        valid = [t for t in range(T) if mask[sample, t]]
        values = []
        for s, t in zip(student[sample], teacher[sample], strict=True):
            values += [divergence(p, q) for p, q in zip(relation(t, valid), relation(s, valid), strict=True)]
        found.append(np.mean(values))
    return np.array(found)


@pytest.mark.parametrize("loss", MAP_LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
def test_maps_in_a_loop(loss, mask):
    student, teacher = maps(1, mask), maps(2, mask)
    expected = []
    for sample in range(B):
        valid = [t for t in range(T) if mask is None or mask[sample, t]]
        pairs = [(student[sample, h, t].numpy(), teacher[sample, h, t].numpy()) for h in range(HEADS) for t in valid]
        expected.append(np.mean([by_hand(loss.__name__, s, t) for s, t in pairs]))
    np.testing.assert_allclose(loss(student, teacher, mask=mask).numpy(), expected, rtol=1e-12)


def test_kl_goes_from_the_teacher_to_the_student():
    teacher, student = torch.tensor([[[[0.75, 0.25]]]]), torch.tensor([[[[0.5, 0.5]]]])
    assert attention_kl(student, teacher).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert attention_kl(teacher, student).item() == pytest.approx(0.5 * math.log(4 / 3))


@pytest.mark.parametrize("loss", MAP_LOSSES, ids=lambda loss: loss.__name__)
def test_longer_padding_changes_no_value(loss):
    """The same sentences, in a batch with a longer one: neither more keys nor more queries may count."""
    student, teacher = maps(1, MASK), maps(2, MASK)
    longer = [torch.nn.functional.pad(each, (0, 3, 0, 3)) for each in (student, teacher)]
    longer[0][:, :, T:, 0] = 1.0  # what a padded query attends to is of no interest
    value = loss(*longer, mask=torch.nn.functional.pad(MASK, (0, 3)))
    torch.testing.assert_close(value, loss(student, teacher, mask=MASK))


@pytest.mark.parametrize("loss", MAP_LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_padding_has_a_gradient_of_zero(loss, dtype):
    """0·log 0, and 0/0 where a row attends to nothing at all."""
    student, teacher = maps(1, MASK).to(dtype), maps(2, MASK).to(dtype)
    student[0, 0, 0] = teacher[0, 0, 0] = 0
    student.requires_grad_()
    loss(student, teacher, mask=MASK).sum().backward()
    assert torch.isfinite(student.grad).all()
    hidden = ~MASK[:, None, None, :].expand_as(student)
    assert (student.grad[hidden] == 0).all()
    assert (student.grad[~hidden] != 0).any()
    assert (student.grad[1, :, 3:] == 0).all()


def test_kl_is_finite_where_the_student_sees_nothing_of_what_the_teacher_sees():
    """A probability that underflowed must cost much, and its gradient must fit into the type it came in."""
    for dtype in (torch.float32, torch.float16):
        student = torch.tensor([[[[0.0, 1.0]]]], dtype=dtype, requires_grad=True)
        value = attention_kl(student, torch.tensor([[[[1.0, 0.0]]]], dtype=dtype))
        assert 9 < value.item() < 100
        value.backward()
        assert torch.isfinite(student.grad).all()
    tiny = torch.tensor([[[[1e-7, 1.0]]]], dtype=torch.float16, requires_grad=True)
    attention_kl(tiny, torch.tensor([[[[0.5, 0.5]]]], dtype=torch.float16)).backward()
    assert torch.isfinite(tiny.grad).all()


def test_kl_of_rounded_probabilities_is_zero_at_equality_and_else_not_below():
    """Rows of bf16 probabilities do not sum to 1, and a divergence of such can be negative."""
    student, teacher = maps(1, heads=64).bfloat16(), (maps(1, heads=64) + 0.003).bfloat16()
    assert (student.float().sum(-1) - 1).abs().max() > 1e-3
    assert (attention_kl(student, teacher) > 0).all()


def test_kl_gradient_with_respect_to_the_scores_is_that_of_a_softmax():
    scores = torch.from_numpy(np.random.default_rng(3).normal(0, 2, (B, HEADS, T, T))).requires_grad_()
    teacher = maps(2)
    attention_kl(scores.softmax(-1), teacher).sum().backward()
    torch.testing.assert_close(scores.grad, (scores.detach().softmax(-1) - teacher) / (HEADS * T))


@pytest.mark.parametrize("loss", MAP_LOSSES, ids=lambda loss: loss.__name__)
def test_other_numbers_of_heads(loss):
    student, teacher = maps(1, heads=2), maps(2, heads=6)
    with pytest.raises(ObjectiveError, match="heads: mean"):
        loss(student, teacher)
    averaged = loss(student.mean(1, keepdim=True), teacher.mean(1, keepdim=True))
    torch.testing.assert_close(loss(student, teacher, heads="mean"), averaged)
    same = loss(maps(3), maps(4), heads="mean")
    assert (same - loss(maps(3), maps(4))).abs().min() > 1e-4
    problems = losses.check(loss.__name__, {"heads": "some"})
    assert [problem.path for problem in problems] == [("heads",)]


def test_lengths_that_differ_are_an_error_that_heads_do_not_mend():
    with pytest.raises(ObjectiveError, match=r"got student \[3, 4, 5, 5\] and teacher \[3, 4, 5, 4\]$"):
        attention_mse(maps(1), maps(2)[..., :4])


def test_attention_to_another_sequence_needs_the_mask_of_the_queries():
    student, teacher = maps(1)[:, :, :2], maps(2)[:, :, :2]
    value = attention_kl(student, teacher, mask=torch.tensor([[1, 0], [1, 1], [1, 0]]))
    torch.testing.assert_close(value[0], attention_kl(student[:1, :, :1], teacher[:1, :, :1])[0])
    for loss in MAP_LOSSES:
        with pytest.raises(ObjectiveError, match=r"a mask \[3, 2\] of the positions, got \[3, 5\].*mask: none"):
            loss(student, teacher, mask=MASK)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
def test_minilm_in_a_loop(mask):
    ours, theirs = (maps(1, mask), vectors(HEADS, 3, 2)), (maps(3, mask), vectors(HEADS, 7, 4))
    counts = torch.ones_like(MASK) if mask is None else mask
    first = []
    for sample in range(B):
        rows = [(h, t) for h in range(HEADS) for t in range(T) if counts[sample, t]]
        first.append(
            np.mean([divergence(theirs[0][sample][row].numpy(), ours[0][sample][row].numpy()) for row in rows])
        )
    expected = np.array(first) + relation_loss(ours[1].numpy(), theirs[1].numpy(), counts)
    np.testing.assert_allclose(minilm(ours, theirs, mask=mask).numpy(), expected, rtol=1e-12)


def side_by_side(x: Tensor, count: int) -> np.ndarray:
    """[B, heads, T, D] -> [B, count, T, D'], one vector at a time."""
    cut = np.empty((B, count, T, x.shape[1] * x.shape[3] // count))
    for sample in range(B):
        for t in range(T):
            whole = np.concatenate([head[t].numpy() for head in x[sample]])
            for piece, part in enumerate(np.split(whole, count)):
                cut[sample, piece, t] = part
    return cut


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
@pytest.mark.parametrize("count", [1, 2, 6, 12])
def test_minilmv2_in_a_loop(mask, count):
    """A student of 3 heads of 8 and a grouped-query teacher of 6 heads, 2 for keys and values."""
    ours = [vectors(3, 8, 1), vectors(3, 8, 2), vectors(3, 8, 3)]
    theirs = [vectors(6, 12, 4), vectors(2, 12, 5), vectors(2, 12, 6)]
    weights = (1.0, 0.5, 2.0)
    counts = torch.ones_like(MASK) if mask is None else mask
    expected = sum(
        weight * relation_loss(side_by_side(s, count), side_by_side(t, count), counts)
        for weight, s, t in zip(weights, ours, theirs, strict=True)
    )
    value = minilmv2(tuple(ours), tuple(theirs), mask=mask, relation_heads=count, weights=weights)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((12, 64), (12, 64), 48),  # BERT-base, as in the paper
        ((12, 32), (12, 64), 48),  # MiniLM-L12-H384
        ((12, 26), (12, 64), 24),  # TinyBERT's 312
        ((4, 5), (7, 3), 1),
    ],
)
def test_the_usual_number_of_relation_heads(student, teacher, expected):
    ours = tuple(vectors(*student, seed) for seed in range(3))
    theirs = tuple(vectors(*teacher, seed) for seed in range(3, 6))
    torch.testing.assert_close(minilmv2(ours, theirs), minilmv2(ours, theirs, relation_heads=expected))
    if expected > 1:
        assert (minilmv2(ours, theirs) - minilmv2(ours, theirs, relation_heads=1)).abs().min() > 1e-4


@pytest.mark.parametrize("loss", [minilm, minilmv2], ids=lambda loss: loss.__name__)
def test_what_is_behind_the_mask_is_not_seen(loss):
    ours = (maps(1, MASK), vectors(HEADS, 6, 2), vectors(HEADS, 6, 3))
    theirs = (maps(4, MASK), vectors(HEADS, 6, 5), vectors(HEADS, 6, 6))
    if loss is minilm:
        ours, theirs = ours[:2], theirs[:2]
    else:
        ours, theirs = (vectors(HEADS, 6, 7), *ours[1:]), (vectors(HEADS, 6, 8), *theirs[1:])
    other = tuple(torch.where(MASK[:, None, :, None], each, 77.0) for each in ours)
    for each in other:
        each.requires_grad_()
    value = loss(other, theirs, mask=MASK.long())
    torch.testing.assert_close(value, loss(ours, theirs, mask=MASK))
    value.sum().backward()
    hidden = ~MASK[:, None, :, None]
    for each in other:
        assert (each.grad.masked_fill(~hidden, 0) == 0).all()


@pytest.mark.parametrize("loss", [*MAP_LOSSES, minilm, minilmv2], ids=lambda loss: loss.__name__)
def test_a_sample_without_any_position_costs_nothing(loss):
    empty = MASK.clone()
    empty[1] = False
    sides = [maps(1), maps(2)]
    if loss in (minilm, minilmv2):
        sides = [(maps(1), *(vectors(HEADS, 5, s) for s in seeds)) for seeds in ((1, 2), (3, 4))]
        sides = [side[:2] if loss is minilm else side for side in sides]
    value = loss(*sides, mask=empty)
    assert value[1] == 0
    assert (value[[0]] > 0).all()
    assert torch.isfinite(value).all()


def test_relations_do_not_change_with_a_rotation_within_a_head():
    """Only what vectors are to each other counts: the student may have its own axes."""
    ours, theirs = vectors(2, 6, 1), vectors(2, 6, 2)
    rotation = torch.from_numpy(np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))[0])
    value = minilmv2((ours,) * 3, (theirs,) * 3, relation_heads=2)
    turned = minilmv2((ours @ rotation,) * 3, (theirs,) * 3, relation_heads=2)
    torch.testing.assert_close(turned, value)
    assert (minilmv2((ours @ rotation,) * 3, (theirs,) * 3, relation_heads=4) - value).abs().min() > 1e-4


def test_minilm_errors():
    good = (maps(1), vectors(HEADS, 3, 2))
    with pytest.raises(ObjectiveError, match=r"attention.n, value.n of each side.*got shapes \[3, 4, 5, 5\]"):
        minilm(good[0], good)
    with pytest.raises(ObjectiveError, match="minilmv2 compares any numbers of heads"):
        minilm((maps(1, heads=2), vectors(2, 3, 2)), good)
    with pytest.raises(ObjectiveError, match="minilmv2 compares any numbers of heads"):
        minilm((maps(1), vectors(2, 3, 2)), good)
    with pytest.raises(ObjectiveError, match="as many samples and positions"):
        minilmv2((vectors(2, 6, 1)[:, :, :4],) * 3, (vectors(2, 6, 2),) * 3)
    with pytest.raises(ObjectiveError, match="widths of 12, 24 into 5 relation heads; choose a divisor of 12"):
        minilmv2((vectors(2, 6, 1),) * 3, (vectors(4, 6, 2),) * 3, relation_heads=5)
    with pytest.raises(ObjectiveError, match=r"query\.n, key\.n, value\.n"):
        minilmv2(good, good)


def test_options():
    assert losses.check("minilmv2", {"relation_heads": 64, "weights": [1, 0, 1.5]}) == []
    for options in ({"relation_heads": 0}, {"weights": [1, 1]}, {"weights": "none"}):
        assert [problem.path[0] for problem in losses.check("minilmv2", options)] == list(options)


def test_the_weight_of_a_part_that_is_off():
    ours, theirs = tuple(vectors(2, 6, s) for s in (1, 2, 3)), tuple(vectors(2, 6, s) for s in (4, 5, 6))
    parts = [minilmv2(ours, theirs, weights=weights) for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    torch.testing.assert_close(sum(parts), minilmv2(ours, theirs))
    assert (parts[0] - parts[1]).abs().min() > 1e-4


def bert(width: int, heads: int) -> BertModel:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"vocab_size": 30, "num_hidden_layers": 1, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(width)
        return BertModel(BertConfig(hidden_size=width, num_attention_heads=heads, **sizes, **rates))


@pytest.mark.parametrize(
    ("name", "kinds", "heads"),
    [
        ("attention_mse", ["attention"], 2),
        ("attention_kl", ["attention"], 2),
        ("attention_cosine", ["attention"], 2),
        ("minilm", ["attention", "value"], 2),
        ("minilmv2", ["query", "key", "value"], 4),
    ],
)
def test_real_attention_in_batches_padded_to_other_lengths(name, kinds, heads):
    """The signals as they are captured, in an objective: neither the length of the padding nor the batch counts."""
    student, teacher = bert(16, heads), bert(24, 2)
    taps = [f"{kind}.1" for kind in kinds]
    objective = Objective({"t": Term(name, taps, taps, mask="attention_mask")})
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, 30, (3, T)))

    def value(rows: slice, extra: int) -> Tensor:
        batch = {"input_ids": ids[rows], "attention_mask": MASK[rows].long()}
        batch = {key: torch.nn.functional.pad(each, (0, extra)) for key, each in batch.items()}
        with capture(student, taps) as said, capture(teacher, taps, detach=True) as taught:
            for model in (student, teacher):
                model(**batch)
        return objective(said, taught, batch).total

    whole = value(slice(None), 0)
    assert whole > 1e-6
    torch.testing.assert_close(value(slice(None), 4), whole)
    torch.testing.assert_close(sum(value(slice(row, row + 1), row) for row in range(3)) / 3, whole)
    whole.backward()
    gradients = [each.grad for each in student.parameters() if each.grad is not None]
    assert all(torch.isfinite(each).all() for each in gradients)
    assert max(each.abs().max() for each in gradients) > 1e-8
