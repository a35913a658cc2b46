"""The modules that map a student's signal to the teacher's shape; :func:`make_projector` chooses and sizes them.

All parameters are fp32 and a signal of another type is cast to theirs; under autocast the linear maps and convolutions
run as those of the student do. A module with ``takes_teacher`` is called with the teacher's signal as its second
argument, of which only the size is read: lengths and image sizes differ from batch to batch. Without it the size is
that of the dry run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.knowledge.layouts import Layout, resized


def width_map(kind: str, student: int, teacher: int, *, channels_first: bool) -> nn.Module:
    """Return what maps one width to the other and leaves the places as they are.

    Args:
        kind: ``linear``; ``mlp``: two layers with GELU between them, the hidden one as wide as the teacher's signal;
            ``conv``: a 1×1 convolution without bias and BatchNorm.
        student: the width that comes.
        teacher: the width that is wanted.
        channels_first: whether it is on axis 1 of ``[B, C, H, W]``; else on the last axis.

    Reference: a linear map as regressor is that of FitNets, https://arxiv.org/abs/1412.6550; convolution and BatchNorm
    are the connector of ReviewKD, https://arxiv.org/abs/2104.09044.
    """
    if kind == "conv":
        convolution = _Convolution(student, teacher, 1, bias=False, dtype=torch.float32)
        return nn.Sequential(convolution, nn.BatchNorm2d(teacher, dtype=torch.float32))
    first = _layer(student, teacher, channels_first)
    if kind == "linear":
        return first
    return nn.Sequential(first, nn.GELU(), _layer(teacher, teacher, channels_first))


class Projector(nn.Module):
    """Brings a signal to the places of the teacher's, then to its width.

    Places are averaged where there are fewer of them at the teacher and interpolated where there are more. Patches of
    an image are a map; the tokens before them (class token, registers) are handed on, and where the student lacks one
    the mean of its places stands for it.

    Args:
        student: layout of the student's signal.
        teacher: layout of the teacher's, with as many axes of places or none.
        kind: see :func:`width_map`.
    """

    takes_teacher = True

    def __init__(self, student: Layout, teacher: Layout, kind: str = "linear") -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.map = width_map(kind, student.width, teacher.width, channels_first=teacher.kind == "map")

    def forward(self, student: Tensor, teacher: Tensor | None = None) -> Tensor:
        """Return the student's signal in the teacher's shape.

        Raises:
            ObjectiveError: a signal has other axes than in the dry run, or tokens that were a grid are none.
        """
        there = self.teacher if teacher is None else self.teacher.at(teacher)
        body, prefix = self.student.at(student).split(_as(student, self))
        placed = resized(body, there.space)
        if there.kind == "map":  # the width stays on axis 1 until it is mapped
            mapped: Tensor = self.map(placed)
            return there.join(mapped, prefix)
        mapped = self.map(there.join(placed, prefix))
        return mapped


class AttentionPool(nn.Module):
    """Learned queries, one for each place of the teacher, that gather the places of the student.

    One attention of one head, as wide as the teacher's signal: keys and values are linear maps of the student's
    places, the keys with a learned position, which begins at 0. For other numbers of places than in the dry run
    queries and positions are interpolated.

    Args:
        student: layout of the student's signal, tokens or a map.
        teacher: layout of the teacher's, anything.
    """

    takes_teacher = True

    def __init__(self, student: Layout, teacher: Layout) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        width = teacher.width
        self.key = _layer(student.width, width, False)
        self.value = _layer(student.width, width, False)
        self.positions = nn.Parameter(torch.zeros(math.prod(student.space), width, dtype=torch.float32))
        self.queries = nn.Parameter(torch.randn(math.prod(teacher.space), width, dtype=torch.float32))

    def forward(self, student: Tensor, teacher: Tensor | None = None) -> Tensor:
        """Return the student's signal in the teacher's shape.

        Raises:
            ObjectiveError: a signal has other axes than in the dry run.
        """
        here = self.student.at(student)
        there = self.teacher if teacher is None else self.teacher.at(teacher)
        places = here.split(_as(student, self))[0].flatten(2).transpose(1, 2)
        keys = self.key(places) + _table(self.positions, self.student.space, here.space)
        queries = _table(self.queries, self.teacher.space, there.space).to(keys.dtype).expand(len(places), -1, -1)
        pooled = F.scaled_dot_product_attention(queries, keys, self.value(places))
        body = pooled.transpose(1, 2).reshape(*places.shape[:1], self.teacher.width, *there.space)
        return there.join(body, pooled[:, :0])


class HeadMix(nn.Module):
    """Mixes attention maps: each of the teacher's heads is a weighted mean of the student's, so rows still sum to 1.

    The weights are a softmax over the student's heads and begin equal. Computed in fp32, also under autocast.

    Args:
        student: number of the student's heads.
        teacher: number of the teacher's.
    """

    takes_teacher = False

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(teacher, student, dtype=torch.float32))

    def forward(self, student: Tensor) -> Tensor:
        """Return ``[B, teacher's heads, T, S]`` of ``[B, student's heads, T, S]``."""
        with torch.autocast(student.device.type, enabled=False):
            return torch.einsum("ts,bsij->btij", self.weight.softmax(-1), _as(student, self))


class HeadWidths(nn.Module):
    """Maps queries, keys or values of other heads that are also of another width: one linear map of all heads at once.

    Args:
        student: heads and width of the student's ``[B, heads, T, width]``.
        teacher: those of the teacher's.
    """

    takes_teacher = False

    def __init__(self, student: tuple[int, int], teacher: tuple[int, int]) -> None:
        super().__init__()
        self.heads = teacher
        self.map = _layer(math.prod(student), math.prod(teacher), False)

    def forward(self, student: Tensor) -> Tensor:
        """Return ``[B, teacher's heads, T, width]``."""
        mapped: Tensor = self.map(student.transpose(1, 2).flatten(2))
        return mapped.reshape(*mapped.shape[:2], *self.heads).transpose(1, 2)


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


class _Convolution(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


def _layer(student: int, teacher: int, channels_first: bool) -> nn.Module:
    if channels_first:
        return _Convolution(student, teacher, 1, dtype=torch.float32)
    return _Linear(student, teacher, dtype=torch.float32)


def _as(signal: Tensor, module: nn.Module) -> Tensor:
    """Return the signal in the type of the module's parameters."""
    return signal.to(next(module.parameters()).dtype)


def _table(table: Tensor, here: Sequence[int], there: Sequence[int]) -> Tensor:
    """Return a table with a row for each place, interpolated for another number of places."""
    if tuple(here) == tuple(there):
        return table
    return resized(table.T.reshape(1, -1, *here), there)[0].flatten(1).T
