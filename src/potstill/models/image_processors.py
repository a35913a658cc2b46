"""From an image processor of transformers to what potstill needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from potstill.errors import ModelError
from potstill.models.origins import ImageProcessor

_KNOWN = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_reduce_labels"}
_UNKNOWN = {"rescale_offset", "size_divisor", "resize_short", "keep_aspect_ratio", "ensure_multiple_of"}
_FILTERS: Mapping[Any, str] = dict(enumerate(("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")))


def image_processor(native: Any) -> ImageProcessor:
    """Return how the model of an image processor of transformers wants its images.

    Args:
        native: what ``AutoImageProcessor.from_pretrained`` returns; it is kept as ``native``.

    Raises:
        ModelError: it does something else than resize, crop, scale and normalise, or crops without resizing.
    """
    name = type(native).__name__
    steps = [key for key, on in vars(native).items() if on and (key.startswith("do_") or key in _UNKNOWN)]
    others = [key for key in steps if key not in _KNOWN]
    if others:
        raise ModelError(f"{name} has a step that potstill does not know: {', '.join(others)}")
    if not _sizes(native, "size") or name.startswith("Perceiver"):  # which crops first
        raise ModelError(f"expected an image processor of transformers that resizes to a size, got {name}")
    size, shorter, squash = _geometry(native)
    mean, std = _normalisation(native)
    resample = getattr(native, "resample", 2)
    interpolation = _FILTERS.get(resample, str(getattr(resample, "value", resample)).removesuffix("-exact"))
    return ImageProcessor(
        size=size,
        shorter=shorter,
        interpolation=cast(Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"], interpolation),
        mean=mean,
        std=std,
        native=native,
        squash=squash,
        floor=True,
    )


def _geometry(native: Any) -> tuple[tuple[int, int] | None, int | None, tuple[int, int] | None]:
    """Return ``size``, ``shorter`` and ``squash``."""
    asked = _sizes(native, "size")
    crop = _pair(_sizes(native, "crop_size")) if getattr(native, "do_center_crop", False) else None
    if not getattr(native, "do_resize", True):
        if crop:
            raise ModelError(f"{type(native).__name__} crops without resizing; give the data a size and drop the crop")
        return None, None, None
    both, edge, share = _pair(asked), asked.get("shortest_edge"), getattr(native, "crop_pct", None)
    if set(asked) not in ({"height", "width"}, {"shortest_edge"}):
        raise ModelError(f"expected a size of height and width or of the shortest edge, got {asked}")
    if edge is None:
        if share and both:
            return crop or both, *_enlarged(both, share)
        return crop or both, None, both if crop else None
    if share and crop:  # PoolFormer
        return crop, int(edge / share), None
    if share:  # ConvNeXt, ResNet, RegNet: below 384 the image keeps its shape, from there on it is squashed
        return (edge, edge), int(edge / share) if edge < 384 else None, None
    if type(native).__name__.startswith("Levit"):
        edge = int(256 / 224 * edge)
    return crop, edge, None


def _enlarged(both: tuple[int, int], share: float) -> tuple[int | None, tuple[int, int] | None]:
    """PoolFormer, told both edges: of a square it takes the shorter edge, anything else it squashes."""
    height, width = int(both[0] / share), int(both[1] / share)
    return (height, None) if both[0] == both[1] else (None, (height, width))


def _normalisation(native: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of values in [0, 1]."""
    factor = 255 * (float(native.rescale_factor) if getattr(native, "do_rescale", True) else 1.0)
    mean, std = [0.0], [1.0]
    if getattr(native, "do_normalize", True):
        mean, std = (_numbers(each) for each in (native.image_mean, native.image_std))
    if getattr(native, "include_top", False):  # EfficientNet: divided twice by the standard deviation
        std = [each**2 for each in _numbers(native.image_std)]
        if not getattr(native, "do_normalize", True):
            std = _numbers(native.image_std)
    return tuple(each / factor for each in mean), tuple(each / factor for each in std)


def _numbers(value: Any) -> list[float]:
    return [float(each) for each in value] if isinstance(value, list | tuple) else [float(value)]


def _sizes(native: Any, key: str) -> dict[str, int]:
    value = getattr(native, key, None) or {}
    given = value if isinstance(value, Mapping) else vars(value)
    return {name: int(edge) for name, edge in given.items() if edge is not None}


def _pair(sizes: Mapping[str, int]) -> tuple[int, int] | None:
    return (sizes["height"], sizes["width"]) if "height" in sizes and "width" in sizes else None
