"""Losses between the self-attentions of two transformers: their maps, and relations of queries, keys and values.

Shapes: ``attention.n`` [B, heads, T, S], ``query.n``, ``key.n``, ``value.n`` [B, heads, T, D] in, ``[B]`` out: the mean
over the positions that the mask names, all without one. Padding keys have probability 0 on both sides and add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from potstill.errors import ObjectiveError
from potstill.losses.divergence import relative_entropy
from potstill.losses.feature import cosine
from potstill.losses.numerics import at_least_fp32, log_softmax, without_autocast
from potstill.registry import losses

Heads = Literal["each", "mean"]
"""Whether the maps are compared head by head, or averaged over the heads of each side first."""

_TINYBERT = "Jiao et al. 2020, https://arxiv.org/abs/1909.10351"
_MINILM = "Wang et al. 2020, https://arxiv.org/abs/2002.10957"
_MINILMV2 = "Wang et al. 2021, https://arxiv.org/abs/2012.15828"
_MOST_RELATION_HEADS = 48
_FLOOR = 1e-30


@losses.register(
    "attention_mse",
    per="sample",
    reference=_TINYBERT,
    formula="mean(({student} − {teacher})²)",
    zero_at_equality=True,
    any_shape=True,
    example_shape=(4, 2, 3, 5),
)
def attention_mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, heads: Heads = "each") -> Tensor:
    """Squared difference of attention probabilities, averaged over the keys, the heads and the queries.

    TinyBERT compares the scores before the softmax, which are not bounded, so that its values are far larger than
    these; the probabilities have the same minimum and do not see what a constant added to a row of scores would do. A
    key that neither side attends to (padding, the future) does not count in the mean.

    Args:
        student: probabilities ``[B, heads, T, S]``.
        teacher: probabilities ``[B, heads, T, S]``; the number of heads may differ under ``heads: mean``.
        mask: the queries that count, ``[B, T]``.
        heads: ``each`` compares head with head, ``mean`` the averages over the heads.

    Returns:
        ``[B]``.

    Raises:
        ObjectiveError: the maps differ in shape, or the mask does not fit.

    Reference: Jiao et al., *TinyBERT*, 2020, https://arxiv.org/abs/1909.10351.
    """
    student, teacher = _maps("attention_mse", student, teacher, heads)
    seen = ((student != 0) | (teacher != 0)).sum(-1).clamp_min(1)
    return _mean("attention_mse", (student - teacher).square().sum(-1) / seen, mask)


@losses.register(
    "attention_kl",
    per="sample",
    reference=_MINILM,
    formula="KL({teacher} ‖ {student})",
    zero_at_equality=True,
    any_shape=True,
    example_shape=(4, 2, 3, 5),
)
def attention_kl(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, heads: Heads = "each") -> Tensor:
    """Kullback-Leibler divergence from the teacher's attention to the student's, averaged over heads and queries.

    It is the first of the two parts of MiniLM. Both sides are divided by their sums over the keys, which rounding to
    bf16 moves away from 1.

    Args:
        student: probabilities ``[B, heads, T, S]``; what is 0 gets no gradient.
        teacher: probabilities ``[B, heads, T, S]``; the number of heads may differ under ``heads: mean``.
        mask: the queries that count, ``[B, T]``.
        heads: ``each`` compares head with head, ``mean`` the averages over the heads.

    Returns:
        ``[B]``, in nats.

    Raises:
        ObjectiveError: the maps differ in shape, or the mask does not fit.

    Reference: Wang et al., *MiniLM*, 2020, https://arxiv.org/abs/2002.10957.
    """
    floor = max(torch.finfo(student.dtype).tiny, _FLOOR)
    student, teacher = _maps("attention_kl", student, teacher, heads)
    return _mean("attention_kl", _map_divergence(student, teacher, floor), mask)


@losses.register(
    "attention_cosine",
    per="sample",
    reference=_TINYBERT,
    formula="1 − cos({student}, {teacher})",
    zero_at_equality=True,
    any_shape=True,
    example_shape=(4, 2, 3, 5),
)
def attention_cosine(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, heads: Heads = "each") -> Tensor:
    """One minus the cosine between the attention of student and teacher over the keys, by head and query.

    Unlike the squared difference it does not shrink as sentences get longer and probabilities smaller.

    Args:
        student: probabilities ``[B, heads, T, S]``.
        teacher: probabilities ``[B, heads, T, S]``; the number of heads may differ under ``heads: mean``.
        mask: the queries that count, ``[B, T]``.
        heads: ``each`` compares head with head, ``mean`` the averages over the heads.

    Returns:
        ``[B]`` in [0, 1] for probabilities.

    Raises:
        ObjectiveError: the maps differ in shape, or the mask does not fit.

    Reference: what it compares is that of https://arxiv.org/abs/1909.10351.
    """
    student, teacher = _maps("attention_cosine", student, teacher, heads)
    return _mean("attention_cosine", cosine(student, teacher), mask)


@losses.register(
    "minilm",
    per="sample",
    reference=_MINILM,
    formula="KL of the attention maps + KL of softmax(V·Vᵀ/√d), from ({teacher}) to ({student})",
    zero_at_equality=True,
    example_shape=((4, 2, 5, 5), (4, 2, 5, 3)),
    example_teacher_shape=((4, 2, 5, 5), (4, 2, 5, 4)),
)
@without_autocast
def minilm(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], *, mask: Tensor | None = None) -> Tensor:
    """Deep self-attention distillation: the attention maps and the relations between the values, head by head.

    The paper takes the last block of each side, 1 and 1 as weights, and as many heads in the student as in the
    teacher; the widths of the heads may differ. See :func:`minilmv2` for another number of heads.

    Args:
        student: ``(attention.n, value.n)``: probabilities ``[B, heads, T, T]`` and values ``[B, heads, T, D]``; in a
            grouped-query model the values have fewer heads than the attention.
        teacher: the same, with its own ``D``.
        mask: the positions that count, as queries and as keys of the relations, ``[B, T]``.

    Returns:
        ``[B]``, in nats: the sum of both parts, each averaged over heads and positions.

    Raises:
        ObjectiveError: other signals, other numbers of heads, or a mask that does not fit.

    Reference: Wang et al., *MiniLM*, 2020, https://arxiv.org/abs/2002.10957.
    """
    ours, theirs = (_signals("minilm", side, ("attention.n", "value.n")) for side in (student, teacher))
    if [each.shape[:3] for each in ours] != [each.shape[:3] for each in theirs]:
        raise ObjectiveError(
            f"minilm expected as many samples, heads and positions on both sides, got student {_shapes(ours)} and "
            f"teacher {_shapes(theirs)}; minilmv2 compares any numbers of heads"
        )
    maps = attention_kl(ours[0], theirs[0], mask=mask)
    return maps + _relation_divergence("minilm", ours[1], theirs[1], mask)


@losses.register(
    "minilmv2",
    per="sample",
    reference=_MINILMV2,
    formula="KL of softmax(Q·Qᵀ/√d), softmax(K·Kᵀ/√d) and softmax(V·Vᵀ/√d), from ({teacher}) to ({student})",
    zero_at_equality=True,
    example_shape=((4, 2, 5, 6), (4, 1, 5, 6), (4, 1, 5, 6)),
    example_teacher_shape=((4, 3, 5, 4), (4, 3, 5, 4), (4, 3, 5, 4)),
)
@without_autocast
def minilmv2(
    student: tuple[Tensor, Tensor, Tensor],
    teacher: tuple[Tensor, Tensor, Tensor],
    *,
    mask: Tensor | None = None,
    relation_heads: Annotated[int, Field(ge=1)] | None = None,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Multi-head self-attention relations: query with query, key with key, value with value.

    The heads of each signal are put side by side and cut again into relation heads, so that both sides may have any
    number of attention heads of any width. The paper cuts 48 relation heads for base-size teachers and 64 for
    large-size ones, and takes an upper middle block of a large teacher.

    Args:
        student: ``(query.n, key.n, value.n)``, each ``[B, heads, T, D]``; grouped-query models have fewer heads of key
            and value, which are cut from their own width.
        teacher: the same, with its own heads and widths.
        mask: the positions that count, as queries and as keys, ``[B, T]``.
        relation_heads: how many; must divide ``heads · D`` of all six signals. By default the largest such number up
            to 48.
        weights: of the relations of queries, keys and values.

    Returns:
        ``[B]``, in nats: the weighted sum of the three, each averaged over relation heads and positions.

    Raises:
        ObjectiveError: other signals, a number of relation heads that does not divide, or a mask that does not fit.

    Reference: Wang et al., *MiniLMv2*, 2021, https://arxiv.org/abs/2012.15828.
    """
    names = ("query.n", "key.n", "value.n")
    ours, theirs = (_signals("minilmv2", side, names) for side in (student, teacher))
    if [(each.shape[0], each.shape[2]) for each in ours] != [(each.shape[0], each.shape[2]) for each in theirs]:
        raise ObjectiveError(
            f"minilmv2 expected as many samples and positions on both sides, got student {_shapes(ours)} and teacher "
            f"{_shapes(theirs)}"
        )
    count = _relation_heads([each.shape[1] * each.shape[3] for each in (*ours, *theirs)], relation_heads)
    parts = [
        weight * _relation_divergence("minilmv2", _cut(ours[place], count), _cut(theirs[place], count), mask)
        for place, weight in enumerate(weights)
    ]
    return torch.stack(parts).sum(0)


def _maps(name: str, student: Tensor, teacher: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Return the two maps in at least fp32, of one shape."""
    pair = [at_least_fp32(side) for side in (student, teacher)]
    if heads == "mean":
        pair = [side.mean(1, keepdim=True) for side in pair]
    if pair[0].shape != pair[1].shape:
        several = student.ndim == 4 and student.shape[1] != teacher.shape[1]
        hint = "; say `heads: mean` to compare the averages over the heads" if several else ""
        raise ObjectiveError(
            f"{name} expected maps [B, heads, T, S] of one shape, got student {list(student.shape)} and teacher "
            f"{list(teacher.shape)}{hint}"
        )
    return pair[0], pair[1]


def _map_divergence(student: Tensor, teacher: Tensor, floor: float) -> Tensor:
    """Return the divergence of probabilities over the last axis; below ``floor`` the student's have no gradient."""
    ours, theirs = _shares(student), _shares(teacher)
    return (theirs * (theirs.clamp_min(floor).log() - ours.clamp_min(floor).log())).sum(-1)


def _shares(weights: Tensor) -> Tensor:
    positive = torch.relu(weights)
    return positive / positive.sum(-1, keepdim=True).clamp_min(_FLOOR)


def _mean(name: str, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean ``[B]`` of values ``[B, heads, T]`` over the heads and the positions that count."""
    values = values.mean(1)
    if mask is None:
        return values.mean(-1)
    counts = _fitting(name, values, mask)
    return values.masked_fill(~counts, 0).sum(-1) / counts.sum(-1).clamp_min(1)


def _fitting(name: str, positions: Tensor, mask: Tensor) -> Tensor:
    """Return the mask as truth values, if it is one of these positions ``[B, T]``."""
    if mask.shape != positions.shape:
        raise ObjectiveError(
            f"{name} expected a mask {list(positions.shape)} of the positions, got {list(mask.shape)}; name the entry "
            "of the batch that masks them, such as `mask: attention_mask`, or say `mask: none`"
        )
    return mask != 0


def _relation_divergence(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean divergence ``[B]`` of the relations of ``[B, heads, T, D]`` with themselves."""
    return _mean(name, relative_entropy(_relations(name, teacher, mask), _relations(name, student, mask)), mask)


def _relations(name: str, vectors: Tensor, mask: Tensor | None) -> Tensor:
    """Return the log-probabilities ``[B, heads, T, T]`` of softmax(X·Xᵀ/√d) over the positions that count."""
    wide = at_least_fp32(vectors)
    scores = wide @ wide.transpose(-1, -2) / math.sqrt(wide.shape[-1])
    if mask is not None:
        hidden = ~_fitting(name, wide[:, 0, :, 0], mask)
        scores = scores.masked_fill(hidden[:, None, None], torch.finfo(scores.dtype).min)
    return log_softmax(scores)


def _signals(name: str, side: Any, names: Sequence[str]) -> tuple[Tensor, ...]:
    """Return the signals of one side, whose number and axes are checked."""
    given = side if isinstance(side, tuple | list) else (side,)
    if len(given) != len(names) or any(each.ndim != 4 for each in given):
        raise ObjectiveError(
            f"{name} takes the signals {', '.join(names)} of each side, with 4 axes each, got shapes {_shapes(given)}; "
            f"say `student: [{', '.join(names)}]` with the number of a block for n, and likewise `teacher:`"
        )
    return tuple(given)


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(list(each.shape)) for each in tensors)


def _relation_heads(widths: Sequence[int], wanted: int | None) -> int:
    """Return how many relation heads the widths are cut into."""
    common = math.gcd(*widths)
    if wanted is None:
        return max(count for count in range(1, _MOST_RELATION_HEADS + 1) if common % count == 0)
    if common % wanted:
        raise ObjectiveError(
            f"minilmv2 cannot cut widths of {', '.join(str(width) for width in sorted(set(widths)))} into {wanted} "
            f"relation heads; choose a divisor of {common}"
        )
    return wanted


def _cut(vectors: Tensor, count: int) -> Tensor:
    """Put the heads of ``[B, heads, T, D]`` side by side and cut them into ``count`` relation heads."""
    batch, heads, positions, width = vectors.shape
    joined = vectors.transpose(1, 2).reshape(batch, positions, count, heads * width // count)
    return joined.transpose(1, 2)
