"""Making two signals comparable: projectors chosen and sized by what the models really say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from potstill.errors import ObjectiveError, did_you_mean
from potstill.knowledge.layouts import Layout, layouts_of
from potstill.knowledge.projectors import AttentionPool, HeadMix, HeadWidths, Projector, width_map

_SUM_TOLERANCE = 0.02  # of a row of probabilities that went through bf16


def make_projector(kind: str, student: Tensor, teacher: Tensor, *, prefix: int | None = None) -> nn.Module:
    """Return a module that maps the student's signal to the teacher's shape.

    A module whose ``takes_teacher`` is true is called as ``module(student, teacher)`` and reads the size of the batch
    at hand from the teacher's signal; every other one as ``module(student)``.

    Args:
        kind: how.

            ``linear``: one linear map of the width; of the channels (a 1×1 convolution) for ``[B, C, H, W]``. Only
            the width may differ.

            ``mlp``: two such maps with GELU between them, the hidden width being the teacher's.

            ``conv``: a 1×1 convolution and BatchNorm, for a teacher's map.

            ``attention``: learned queries that gather the student's places, for tokens and maps of any number of
            places. Padding is among them: a learned weight, and no mask, keeps it out.

            ``stretch``: interpolation along T, then a linear map, for tokens ``[B, T, H]`` of any lengths.

            ``heads``: a softmax-weighted mean of attention heads, for probabilities ``[B, heads, T, S]``.

            ``auto``: by the shapes. Nothing where they are equal; ``heads`` for probabilities; ``linear`` where only
            the width or the number of heads differs; one linear map of all heads together where heads and their width
            differ; ``attention`` for tokens to a vector, and between maps and tokens that are no grid; else places
            are averaged or interpolated to the teacher's, then a linear map. Tokens ``[B, T, H]`` are patches where
            they stand against a map or against patches of another number, and T is a square or one with 1, 2 or 5
            tokens before it; others are stretched along T.

            ``mlp`` and ``conv`` bring the places to the teacher's as ``auto`` does. For text of another length say
            ``stretch``, as a length can be a square by chance; but where the tokenizers differ, no stretching makes
            the positions correspond: :func:`potstill.knowledge.vocabulary.align_spans` finds those that do.
        student: the student's signal on some batch.
        teacher: the teacher's on the same batch.
        prefix: tokens before the patches; told by the number of tokens if omitted.

    Raises:
        ObjectiveError: unknown kind, or shapes between which it cannot map; says which kind or which tap can.

    Reference: Romero et al. 2015 (FitNets), https://arxiv.org/abs/1412.6550.
    """
    if kind not in _KINDS:
        raise ObjectiveError(f"there is no projector '{kind}'; {did_you_mean(kind, _KINDS)}")
    for signal in (student, teacher):
        if not isinstance(signal, Tensor):
            raise ObjectiveError(f"project: {kind} expected one signal on each side, got {type(signal).__name__}")
    module = _KINDS[kind](student, teacher, prefix)
    return module.to(student.device)


def _linear(student: Tensor, teacher: Tensor, prefix: int | None) -> nn.Module:
    channels_first = student.ndim == 4
    axis = 1 if channels_first else -1
    if student.ndim != teacher.ndim or student.ndim < 2 or _without(student, axis) != _without(teacher, axis):
        raise ObjectiveError(
            f"project: linear expected signals that differ in the width alone, got {_shapes(student, teacher)}; "
            "pick layers of the same spatial size or length, or say `project: auto`"
        )
    return width_map("linear", student.shape[axis], teacher.shape[axis], channels_first=channels_first)


def _auto(student: Tensor, teacher: Tensor, prefix: int | None) -> nn.Module:
    if student.shape == teacher.shape:
        return nn.Identity()
    if student.ndim == teacher.ndim and student.ndim > 4:
        return _linear(student, teacher, prefix)
    if _are_probabilities(student) and _are_probabilities(teacher):
        return _heads(student, teacher, prefix)
    return _heads_and_widths(student, teacher) or _placed("linear", student, teacher, prefix, otherwise=AttentionPool)


def _stretch(student: Tensor, teacher: Tensor, prefix: int | None) -> nn.Module:
    if student.ndim != 3 or teacher.ndim != 3:
        raise ObjectiveError(
            f"project: stretch expected tokens [B, T, H], got {_shapes(student, teacher)}; say `project: auto`"
        )
    _check_batch("stretch", student, teacher)
    return Projector(*layouts_of(student, teacher, patches=False))


def _heads(student: Tensor, teacher: Tensor, prefix: int | None) -> nn.Module:
    if student.ndim != 4 or teacher.ndim != 4 or _without(student, 1) != _without(teacher, 1):
        raise ObjectiveError(
            "attention maps [B, heads, T, S] can be mixed where they differ in the number of heads alone, got "
            f"{_shapes(student, teacher)}; with other tokens compare hidden states or queries instead"
        )
    return HeadMix(student.shape[1], teacher.shape[1])


def _heads_and_widths(student: Tensor, teacher: Tensor) -> nn.Module | None:
    """Return what maps ``[B, heads, T, width]`` where the width differs, ``None`` where they are something else."""
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[2] != teacher.shape[2]:
        return None
    if student.shape[3] == teacher.shape[3] or student.shape[0] != teacher.shape[0]:
        return None
    if student.shape[1] == teacher.shape[1]:
        return width_map("linear", student.shape[3], teacher.shape[3], channels_first=False)
    layouts = layouts_of(student, teacher)
    if any(each.channels_last for each in layouts):
        return None
    (_, *here), (_, *there) = student.shape, teacher.shape
    return HeadWidths((here[0], here[2]), (there[0], there[2]))


def _placed(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    prefix: int | None,
    otherwise: Callable[[Layout, Layout], nn.Module] | None = None,
) -> nn.Module:
    """Return what brings the student's places to the teacher's; ``otherwise`` is for places that do not correspond."""
    _check_batch(kind, student, teacher)
    here, there = layouts_of(student, teacher, prefix)
    if kind == "conv" and there.kind != "map":
        raise ObjectiveError(
            f"project: conv expected a map [B, C, H, W] at the teacher, got {_shapes(student, teacher)}; "
            "say `project: linear` or `project: mlp`"
        )
    if there.space and not here.space:
        raise ObjectiveError(_lost(student, teacher))
    if (here.kind == "tokens" and not there.space) or (there.space and len(here.space) != len(there.space)):
        if otherwise is not None:
            return otherwise(here, there)
        raise ObjectiveError(
            f"project: {kind} finds no places of the one in the other, got {_shapes(student, teacher)}; "
            "say `project: attention`"
        )
    if replace(here, width=there.width) == there and not there.channels_last:
        return width_map(kind, here.width, there.width, channels_first=there.kind == "map")
    return Projector(here, there, kind)


def _attention(student: Tensor, teacher: Tensor, prefix: int | None) -> nn.Module:
    _check_batch("attention", student, teacher)
    here, there = layouts_of(student, teacher, patches=False)
    if not here.space:
        raise ObjectiveError(_lost(student, teacher))
    return AttentionPool(here, there)


def _check_batch(kind: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape[:1] != teacher.shape[:1]:
        raise ObjectiveError(f"project: {kind} expected signals on one batch, got {_shapes(student, teacher)}")


_KINDS: dict[str, Callable[[Tensor, Tensor, int | None], nn.Module]] = {
    "linear": _linear,
    "mlp": partial(_placed, "mlp"),
    "conv": partial(_placed, "conv"),
    "attention": _attention,
    "stretch": _stretch,
    "heads": _heads,
    "auto": _auto,
}


def _lost(student: Tensor, teacher: Tensor) -> str:
    return (
        f"a vector has lost its places and no projector brings them back, got {_shapes(student, teacher)}; tap a layer "
        "of the student before its pooling, or the teacher's pooled output, for which `project: linear` is right"
    )


def _are_probabilities(signal: Tensor) -> bool:
    """Return whether these are attention maps: four axes, nothing below 0, rows that sum to 1."""
    if signal.ndim != 4 or signal.is_meta or not signal.is_floating_point() or not signal.numel():
        return False
    rows = signal.detach().sum(-1, dtype=torch.float32)
    return bool((signal >= 0).all()) and bool(((rows - 1).abs() < _SUM_TOLERANCE).all())


def _shapes(student: Tensor, teacher: Tensor) -> str:
    return f"student {list(student.shape)} and teacher {list(teacher.shape)}"


def _without(tensor: Tensor, axis: int) -> list[int]:
    shape = list(tensor.shape)
    del shape[axis]
    return shape
