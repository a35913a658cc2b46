"""Small pictures for people, as addresses that a page holds in itself."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image
from torch import Tensor

LONGEST = 160
"""Pixels of the longer edge, at most."""


def thumbnail(image: Image.Image | Tensor) -> str:
    """Return a picture as a ``data:`` address of a PNG file.

    Args:
        image: a picture, or an array ``[C, H, W]``: bytes as they are, other numbers spread from the least to the
            largest; of other channels than 1 or 3 the first is shown.
    """
    picture = _picture(image) if isinstance(image, Tensor) else image.convert("L" if image.mode == "1" else "RGB")
    picture.thumbnail((LONGEST, LONGEST))
    written = io.BytesIO()
    picture.save(written, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode("ascii")


def _picture(array: Tensor) -> Image.Image:
    shown = array if array.shape[0] in (1, 3) else array[:1]
    if shown.dtype != torch.uint8:
        wide = shown.double()
        low, high = wide.amin(), wide.amax()
        shown = ((wide - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)
    pixels = shown.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
