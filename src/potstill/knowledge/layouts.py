"""How signals are laid out: vectors, tokens, maps, and tokens that are the patches of an image.

Every layout is read as a *body* ``[B, width, *space]``, with nothing, one length or two sides as its space, and the
*prefix* tokens ``[B, prefix, width]`` that stand before the patches (class token, distillation token, registers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.errors import ObjectiveError

_PREFIXES = (0, 1, 2, 5)  # none; class; class and distillation (DeiT); class and four registers (DINOv2)


@dataclass(frozen=True)
class Layout:
    """Where the width and the positions of a signal are.

    Attributes:
        kind: ``vector`` ``[B, H]``, ``tokens`` ``[B, T, H]`` or ``map`` ``[B, C, H, W]``.
        width: H, or C of a map.
        space: ``()`` for a vector, ``(T,)`` for tokens in a row, ``(H, W)`` for maps and for tokens that are patches.
        prefix: tokens before the patches.
        channels_last: a map that comes as ``[B, H, W, C]``.
    """

    kind: Literal["vector", "tokens", "map"]
    width: int
    space: tuple[int, ...]
    prefix: int = 0
    channels_last: bool = False

    def at(self, signal: Tensor) -> Layout:
        """Return the same layout with the space that this signal has.

        Raises:
            ObjectiveError: the signal has other axes, or its tokens are no grid and those of the dry run were.
        """
        axes = {"vector": 2, "tokens": 3, "map": 4}[self.kind]
        if signal.ndim != axes:
            raise ObjectiveError(f"a projector made for {self.kind} expected {axes} axes, got {list(signal.shape)}")
        if self.kind == "tokens" and len(self.space) == 2:
            space = grid_of(signal.shape[1], aspect=self.space, prefixes=(self.prefix,))
            if space is None:
                raise ObjectiveError(
                    f"the signal of the dry run was {self.prefix} tokens and a grid of patches, now it is "
                    f"{list(signal.shape)}; say `project: stretch` for tokens of text, `project: attention` for others"
                )
            return replace(self, space=space[0])
        channels_first = self.kind == "map" and not self.channels_last
        return replace(self, space=tuple(signal.shape[2:] if channels_first else signal.shape[1:-1]))

    def folded(self, aspect: Sequence[int] | None = None, prefix: int | None = None) -> Layout:
        """Return tokens in a row as a grid of patches, or the same layout where they are none; see :func:`grid_of`."""
        if self.kind != "tokens":
            return self
        found = grid_of(self.space[0], aspect=aspect, prefixes=_PREFIXES if prefix is None else (prefix,))
        return self if found is None else replace(self, space=found[0], prefix=found[1])

    def split(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        """Return the body ``[B, width, *space]`` and the prefix ``[B, prefix, width]`` of a signal of this layout."""
        if self.kind == "vector":
            return signal, signal[:, None][:, :0]
        if self.kind == "map":
            body = signal.movedim(-1, 1) if self.channels_last else signal
            return body, body.flatten(2).transpose(1, 2)[:, :0]
        body = signal[:, self.prefix :].transpose(1, 2)
        return body.reshape(*body.shape[:2], *self.space), signal[:, : self.prefix]

    def join(self, body: Tensor, prefix: Tensor) -> Tensor:
        """Return the signal of this layout that has this body, of any width, and these prefix tokens.

        Where there are fewer prefix tokens than the layout has, the mean of the body stands for them.
        """
        if self.kind == "vector":
            return body
        if self.kind == "map":
            return body.movedim(1, -1) if self.channels_last else body
        tokens = body.flatten(2).transpose(1, 2)
        missing = max(self.prefix - prefix.shape[1], 0)
        mean = tokens.mean(1, keepdim=True).expand(-1, missing, -1)
        return torch.cat([prefix[:, : self.prefix], mean, tokens], 1)


def layouts_of(
    student: Tensor, teacher: Tensor, prefix: int | None = None, *, patches: bool = True
) -> tuple[Layout, Layout]:
    """Return the layouts of two signals of one batch.

    Tokens count as patches where the other signal is a map, or both are patches of different numbers, at least 4 × 4. A
    map counts as
    ``[B, H, W, C]`` where its second and third axes agree and the last differs.

    Args:
        student: ``[B, H]``, ``[B, T, H]``, ``[B, C, H, W]`` or ``[B, H, W, C]``.
        teacher: one of these, of the same B.
        prefix: tokens before the patches; ``None`` to tell by which number of them leaves a grid.
        patches: whether tokens can be patches; else they are a row.

    Raises:
        ObjectiveError: signals of other axes.
    """
    one, other = layout_of(student), layout_of(teacher)
    if not patches:
        return one, other
    if one.kind == other.kind == "tokens" and one.space != other.space:
        folded = one.folded(None, prefix), other.folded(None, prefix)
        return folded if all(len(each.space) == 2 and min(each.space) > 3 for each in folded) else (one, other)
    if one.kind == "tokens" and other.kind == "map":
        one = one.folded(other.space, prefix)
    if one.kind == "map" and other.kind == "tokens":
        other = other.folded(one.space, prefix)
    return one, other


def grid_of(
    tokens: int, *, aspect: Sequence[int] | None = None, prefixes: Sequence[int] = _PREFIXES
) -> tuple[tuple[int, int], int] | None:
    """Return the sides of the grid that so many tokens are, and how many stand before it; ``None`` where they are none.

    Args:
        tokens: their number.
        aspect: height and width of a picture of the same shape; a square if omitted.
        prefixes: numbers of tokens before the grid that are tried, in this order.
    """
    for prefix in prefixes:
        patches = tokens - prefix
        for high, wide in [tuple(aspect or (1, 1)), (1, 1)]:
            height = math.isqrt(max(patches, 0) * high // wide)
            if height > 1 and patches % height == 0 and height * wide == patches // height * high:
                return (height, patches // height), prefix
    return None


def resized(body: Tensor, space: Sequence[int]) -> Tensor:
    """Return a body ``[B, C, *space]`` with another space: averaged where it shrinks, interpolated where it grows.

    Args:
        body: ``[B, C]``, ``[B, C, T]`` or ``[B, C, H, W]``.
        space: as many numbers, or none for the mean over all places.
    """
    here, there = tuple(body.shape[2:]), tuple(space)
    if here == there:
        return body
    if not there:
        return body.flatten(2).mean(-1)
    if all(target <= source for target, source in zip(there, here, strict=True)):
        if len(there) == 1:
            return F.adaptive_avg_pool1d(body, there[0])
        return F.adaptive_avg_pool2d(body, (there[0], there[1]))
    mode = "linear" if len(there) == 1 else "bilinear"
    return F.interpolate(body, size=there, mode=mode, align_corners=False)


def layout_of(signal: Tensor) -> Layout:
    """Return the layout of one signal, its tokens being a row.

    Raises:
        ObjectiveError: it has neither 2 nor 3 nor 4 axes.
    """
    shape = tuple(signal.shape)
    if len(shape) == 2:
        return Layout("vector", shape[1], ())
    if len(shape) == 3:
        return Layout("tokens", shape[2], shape[1:2])
    if len(shape) != 4:
        raise ObjectiveError(f"expected a signal [B, H], [B, T, H] or [B, C, H, W], got {list(shape)}")
    if shape[1] == shape[2] != shape[3]:
        return Layout("map", shape[3], shape[1:3], channels_last=True)
    return Layout("map", shape[1], shape[2:])
