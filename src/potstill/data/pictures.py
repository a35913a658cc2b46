"""Pictures and arrays of pixels: resized, cropped and normalised as a model's own pipeline does it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

_MODES = {
    "nearest": "nearest-exact",
    "box": "area",
    "bilinear": "bilinear",
    "hamming": "bilinear",
    "bicubic": "bicubic",
    "lanczos": "bicubic",
}
"""What comes nearest in ``torch`` to each filter of Pillow."""


@dataclass(frozen=True)
class Geometry:
    """From an image of any size to one of a known size: it is resized, then the middle is cropped.

    Sizes are rounded and the middle is found as in torchvision's ``Resize`` and ``CenterCrop``; an image smaller than
    the crop gets a black border.

    Attributes:
        size: height and width of the result.
        resize: a number for the shorter edge (the image keeps its shape), or height and width.
        interpolation: a filter of Pillow: ``nearest``, ``box``, ``bilinear``, ``hamming``, ``bicubic``, ``lanczos``.
        floor: whether half a pixel beside the crop is rounded down, as in transformers, or to even, as in torchvision.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    interpolation: str = "bilinear"
    floor: bool = False

    def picture(self, picture: Image.Image) -> Tensor:
        """Return a picture with bytes as channels, resized by Pillow, as uint8 ``[C, *size]``."""
        height, width = self._resized(picture.height, picture.width)
        if (picture.height, picture.width) != (height, width):
            picture = picture.resize((width, height), Image.Resampling[self.interpolation.upper()])
        if (height, width) != self.size:
            top, left = self._corner(height, width)
            picture = picture.crop((left, top, left + self.size[1], top + self.size[0]))
        return pixels(picture)

    def array(self, images: Tensor) -> Tensor:
        """Return images ``[B, C, H, W]``, resized by ``torch`` with the nearest filter it has, as ``[B, C, *size]``."""
        height, width = self._resized(*images.shape[-2:])
        images = resized(images, (height, width), self.interpolation)
        top, left = self._corner(height, width)
        bottom, right = self.size[0] - height + top, self.size[1] - width + left
        return F.pad(images, (-left, right, -top, bottom)) if (height, width) != self.size else images

    def canvas(self) -> Geometry:
        """Return what random crops are taken from: all that is seen before ``size`` is cropped, as a square."""
        if isinstance(self.resize, tuple):
            return replace(self, size=self.resize, floor=False)
        return replace(self, size=(self.resize, self.resize)) if self.size[0] == self.size[1] else self

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.resize, tuple):
            return self.resize
        longer = int(self.resize * max(height, width) / min(height, width))
        return (self.resize, longer) if height <= width else (longer, self.resize)

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        """Return top and left of the crop; below 0 where the image is smaller."""
        spare = height - self.size[0], width - self.size[1]
        top, left = (-(-n // 2) if n < 0 else n // 2 if self.floor else round(n / 2) for n in spare)
        return top, left


@dataclass(frozen=True)
class Normalise:
    """From stored pixels ``[B, C, H, W]`` to a model's input: scaled to [0, 1] if bytes, resized, normalised.

    Attributes:
        mean: one number, or one per channel; an image of one channel becomes as many channels as there are numbers.
        std: as ``mean``.
        size: height and width of the input; ``None`` for those of the stored pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None

    def __call__(self, stored: Tensor) -> Tensor:
        """Return float32 ``[B, C, H, W]``."""
        images = scaled(stored) if self.size is None else resized(scaled(stored), self.size)
        mean, std = (torch.tensor(each, dtype=torch.float32).view(1, -1, 1, 1) for each in (self.mean, self.std))
        return (images - mean) / std


def pixels(picture: Image.Image) -> Tensor:
    """Return the pixels of a picture as uint8 ``[C, H, W]``."""
    array: Any = np.array(picture)
    return torch.as_tensor(array).reshape(*array.shape[:2], -1).permute(2, 0, 1).contiguous()


def scaled(images: Tensor) -> Tensor:
    """Return float32: bytes scaled to [0, 1], other numbers as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def resized(images: Tensor, size: tuple[int, int], interpolation: str = "bilinear") -> Tensor:
    """Return images ``[B, C, *size]`` of the same type, smoothed where they shrink."""
    if tuple(images.shape[-2:]) == size:
        return images
    mode = _MODES[interpolation]
    smooth: dict[str, Any] = {"antialias": True, "align_corners": False} if mode.startswith("bi") else {}
    found = F.interpolate(images.float(), size, mode=mode, **smooth)
    return found.round().clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else found
