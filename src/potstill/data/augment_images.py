"""Random views of images, each a pure function of (seed, epoch, sample id)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from scipy.stats import beta
from torch import Tensor
from torch.nn import functional as F

from potstill.data.draws import Draws
from potstill.data.pictures import resized
from potstill.errors import ComponentError, DataError
from potstill.interfaces import Batch
from potstill.registry import augmentations

_Share = Annotated[float, Field(gt=0, le=1)]
_Positive = Annotated[float, Field(gt=0)]

_INDICES = 1 << 53


@augmentations.register("crop", kind="image")
def crop(
    images: Tensor,
    *,
    draws: Draws,
    padding: Annotated[int, Field(ge=1)] = 4,
    mode: Literal["constant", "reflect", "edge"] = "constant",
    fill: float = 0.0,
) -> Tensor:
    """Pad each side and crop back to the old size at a random place.

    Args:
        images: float or uint8 ``[B, C, H, W]``.
        draws: random numbers of these samples.
        padding: pixels added on each side; the image moves by at most this much.
        mode: what the padding shows: one value, the mirrored image (border not repeated), or the border pixel.
        fill: the value of constant padding, in the units of ``images``.

    Returns:
        The same type and shape.

    Raises:
        DataError: ``reflect`` with a padding that is not smaller than the image.
    """
    smallest = min(images.shape[-2:])
    if mode == "reflect" and padding >= smallest:
        raise DataError(
            f"crop: a reflected padding must be smaller than the image, got {padding} for {smallest} pixels"
        )
    dy, dx = (draws.integers(f"crop.{axis}", -padding, padding + 1) for axis in "yx")
    return _move(images, dy, dx, mode, fill)


@augmentations.register("flip", kind="image")
def flip(images: Tensor, *, draws: Draws, p: Annotated[float, Field(ge=0, le=1)] = 0.5) -> Tensor:
    """Mirror each image ``[B, C, H, W]`` left to right with probability ``p``."""
    chosen = draws.uniform("flip") < p
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


@augmentations.register("shift", kind="image")
def shift(images: Tensor, *, draws: Draws, pixels: Annotated[int, Field(ge=1)] = 2, fill: float = 0.0) -> Tensor:
    """Move each image ``[B, C, H, W]`` by at most ``pixels`` in x and in y; what comes into view has value ``fill``."""
    dy, dx = (draws.integers(f"shift.{axis}", -pixels, pixels + 1) for axis in "yx")
    return _move(images, dy, dx, "constant", fill)


@augmentations.register("resized_crop", kind="image", canvas=True, reference="https://arxiv.org/abs/1409.4842")
def resized_crop(
    images: Tensor,
    *,
    draws: Draws,
    area: tuple[_Share, _Share] = (0.08, 1.0),
    ratio: tuple[_Positive, _Positive] = (3 / 4, 4 / 3),
) -> Tensor:
    """Show a part of each image of random area and shape, resized to the whole (Szegedy et al., 2015).

    The rule is that of torchvision's ``RandomResizedCrop``: the first of ten tries that fits, else the largest middle
    part of an allowed shape. Whether a try fits is told before rounding to pixels, so that two copies of an image in
    different resolutions show the same part.

    Args:
        images: float or uint8 ``[B, C, H, W]``.
        draws: random numbers of these samples.
        area: least and largest share of the image that is shown; torchvision's ``scale``.
        ratio: least and largest width by height of the part, drawn evenly on a logarithmic scale.

    Returns:
        The same type and shape; resizing is bilinear, smoothed where the part shrinks.

    Raises:
        DataError: a range begins above its end.
    """
    for name, (low, high) in (("area", area), ("ratio", ratio)):
        if low > high:
            raise DataError(f"resized_crop: expected {name} as [least, largest], got {[low, high]}")
    size, views = (images.shape[-2], images.shape[-1]), torch.empty_like(images)
    direct = images.is_floating_point() or images.device.type == "cpu"  # there torch resizes bytes, and much faster
    for i, (top, left, height, width) in enumerate(_boxes(images.shape[-2:], draws, area, ratio)):
        part = images[i : i + 1, :, top : top + height, left : left + width]
        views[i] = (F.interpolate(part, size, mode="bilinear", antialias=True) if direct else resized(part, size))[0]
    return views


@augmentations.register("randaugment", kind="image", reference="https://arxiv.org/abs/1909.13719")
def randaugment(
    images: Tensor,
    *,
    draws: Draws,
    num_ops: Annotated[int, Field(ge=1)] = 2,
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9,
    fill: float | None = None,
) -> Tensor:
    """Apply RandAugment (Cubuk et al., 2020) of torchvision to each image with its own seed.

    It works image by image, so it costs far more time than the other augmentations. The global generator of torch is
    seeded for each image and put back afterwards; do not draw from it in another thread meanwhile.

    Args:
        images: ``[B, C, H, W]`` with one or three channels: uint8, or float in [0, 1], so before normalisation.
        draws: random numbers of these samples.
        num_ops: operations applied to each image, one after the other.
        magnitude: their strength, 0 to 30.
        fill: value of pixels that come into view, in the units of ``images``; black by default.

    Returns:
        The same type and shape.

    Raises:
        ComponentError: torchvision is not installed.
        DataError: another number of channels, or values outside [0, 1].
    """
    _check_pixels(images)
    transform = _transforms().RandAugment(num_ops=num_ops, magnitude=magnitude, fill=fill)
    views = torch.empty_like(images)
    with torch.random.fork_rng(devices=[]):
        for i, image in enumerate(images):
            # not torch.manual_seed, which would seed the accelerators as well
            torch.default_generator.manual_seed(draws.generator(i, "randaugment").initial_seed())
            views[i] = transform(image)
    return views


@augmentations.register("mixup", kind="mix", reference="https://arxiv.org/abs/1710.09412")
def mixup(
    batch: Batch,
    *,
    draws: Draws,
    lookup: Callable[[Tensor], Batch],
    num_classes: int,
    alpha: Annotated[float, Field(gt=0)] = 0.2,
) -> Batch:
    """Mix each sample with a partner from the whole data set (Zhang et al., 2018): ``λ x + (1 - λ) x'``.

    Args:
        batch: every floating tensor in it is mixed, so ``teacher/…`` views get the same partner and the same λ.
            ``sample_id`` stays. ``labels`` are int64 ``[B]`` (below 0: none) or soft ``[B, C]``, and may be missing.
        draws: random numbers of these samples.
        lookup: returns the batch of the samples at these places of the data set; the indices are int64 ``[B]``, not
            negative, and to be taken modulo the number of samples.
        num_classes: C.
        alpha: λ comes from Beta(alpha, alpha), one for each sample.

    Returns:
        A new batch; its ``labels`` are float32 ``[B, C]``, a row of zeros where a sample or its partner is unlabelled.

    Raises:
        DataError: the batch holds integers other than labels and ids (tokens cannot be mixed), or a label out of range.
    """
    others = lookup(draws.integers("mixup.partner", 0, _INDICES))
    ratio = _ratio(draws, "mixup.lambda", alpha)
    mixed = dict(batch)
    for name, values in batch.items():
        if name == "labels":
            mixed[name] = _mixed_labels(values, others[name], ratio, num_classes)
        elif values.is_floating_point():
            mixed[name] = _mix(values, others[name], ratio)
        elif name != "sample_id":
            raise DataError(f"mixup mixes images and features, not '{name}' of type {values.dtype}")
    return mixed


@augmentations.register("cutmix", kind="mix", only="image", reference="https://arxiv.org/abs/1905.04899")
def cutmix(
    batch: Batch,
    *,
    draws: Draws,
    lookup: Callable[[Tensor], Batch],
    num_classes: int,
    alpha: Annotated[float, Field(gt=0)] = 1.0,
) -> Batch:
    """Put a box of another image of the whole data set into each image (Yun et al., 2019).

    The box has the image's shape and a share ``1 - λ`` of its area; its middle lies anywhere, and what would stick out
    is cut off, so the labels are mixed by the area that is really shown. A teacher's view in another resolution gets
    the same part of the same partner.

    Args:
        batch: every image ``[B, C, H, W]`` in it is mixed. ``sample_id`` stays. ``labels`` as in :func:`mixup`.
        draws: random numbers of these samples.
        lookup: as in :func:`mixup`.
        num_classes: C.
        alpha: λ comes from Beta(alpha, alpha), one for each sample; 1, as in the paper, is uniform.

    Returns:
        A new batch; its ``labels`` are float32 ``[B, C]``, a row of zeros where a sample or its partner is unlabelled.

    Raises:
        DataError: the batch holds other things than images, labels and ids, or no image, or a label out of range.

    Reference:
        Yun et al. 2019, *CutMix: Regularization strategy to train strong classifiers with localizable features*,
        https://arxiv.org/abs/1905.04899.
    """
    others = lookup(draws.integers("cutmix.partner", 0, _INDICES))
    edge = (1 - _ratio(draws, "cutmix.lambda", alpha).double()).sqrt()[:, None] / 2
    middle = torch.stack([draws.uniform(f"cutmix.{axis}") for axis in "yx"], dim=1).double()
    box = torch.stack([middle - edge, middle + edge]).clamp(0, 1)  # [start and end, B, y and x], as shares
    mixed, ratio = dict(batch), None
    for name, values in sorted(batch.items(), key=lambda entry: "/" in entry[0]):  # the student's image decides
        if values.ndim == 4:
            other = _inside(box, values.shape[-2], values.shape[-1]).to(values.device)
            mixed[name] = torch.where(other[:, None], others[name], values)
            ratio = 1 - other.float().mean((1, 2)) if ratio is None else ratio
        elif name not in ("labels", "sample_id"):
            raise DataError(f"cutmix mixes images [B, C, H, W], not '{name}' {list(values.shape)}")
    if ratio is None:
        raise DataError(f"cutmix mixes images [B, C, H, W], and the batch has none: {', '.join(batch)}")
    if "labels" in batch:
        mixed["labels"] = _mixed_labels(batch["labels"], others["labels"], ratio, num_classes)
    return mixed


def _ratio(draws: Draws, name: str, alpha: float) -> Tensor:
    """Return λ from Beta(alpha, alpha), float32 [B]."""
    quantile = draws.uniform(name).double().cpu().numpy()
    return torch.from_numpy(beta.ppf(quantile, alpha, alpha)).float().to(draws.sample_id.device)


def _inside(box: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels lie in each box of shares [2, B, 2], bool [B, H, W]."""
    start, end = (box * torch.tensor([height, width], device=box.device)).round().long()
    places = [torch.arange(size, device=box.device) for size in (height, width)]
    rows, columns = (
        (place >= start[:, axis, None]) & (place < end[:, axis, None]) for axis, place in enumerate(places)
    )
    inside: Tensor = rows[:, :, None] & columns[:, None, :]
    return inside


def _boxes(
    whole: Sequence[int], draws: Draws, area: tuple[float, float], ratio: tuple[float, float]
) -> list[tuple[int, int, int, int]]:
    """Return top, left, height and width of the part of each image that is shown."""
    height, width = whole
    share = area[0] + (area[1] - area[0]) * draws.uniform("resized_crop.area", 10).double()
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = torch.exp(low + (high - low) * draws.uniform("resized_crop.shape", 10).double())
    tries = torch.stack(
        [(share / shape * width / height).sqrt(), (share * shape * height / width).sqrt()]
    )  # of the edges
    fits = (tries <= 1 + 1e-9).all(0)
    first = tries.gather(2, fits.int().argmax(1).expand(2, -1)[:, :, None])[:, :, 0]
    middle = torch.tensor([min(1.0, width / height / ratio[0]), min(1.0, ratio[1] * height / width)]).double()
    chosen = torch.where(fits.any(1), first, middle[:, None].to(first.device))
    edges = torch.tensor([height, width], device=chosen.device)[:, None]
    size = (chosen * edges).round().long().clamp(min=1).minimum(edges)
    place = torch.stack([draws.uniform(f"resized_crop.{axis}") for axis in "yx"]).double()
    corner = torch.where(fits.any(1), (place * (edges - size + 1)).long(), (edges - size) // 2)
    return [(top, left, h, w) for top, left, h, w in torch.cat([corner, size]).T.tolist()]


def _mix(ours: Tensor, theirs: Tensor, ratio: Tensor) -> Tensor:
    weight = ratio.to(ours.dtype).reshape(-1, *(1 for _ in ours.shape[1:]))
    return weight * ours + (1 - weight) * theirs


def _mixed_labels(ours: Tensor, theirs: Tensor, ratio: Tensor, num_classes: int) -> Tensor:
    """Return soft labels float32 [B, C], a row of zeros where either of the two is unknown."""
    mixed = _mix(_soft(ours, num_classes), _soft(theirs, num_classes), ratio)
    return mixed * _labelled(ours, theirs)[:, None]


def _soft(labels: Tensor, num_classes: int) -> Tensor:
    if labels.is_floating_point():
        if labels.shape[1:] != (num_classes,):
            raise DataError(f"mixing needs soft labels [B, {num_classes}] or class ids [B], got {list(labels.shape)}")
        return labels.float()
    if labels.ndim != 1:
        raise DataError(f"mixing needs one class id per sample, got labels {list(labels.shape)}")
    if int(labels.max()) >= num_classes:
        raise DataError(f"mixing: labels must lie below {num_classes}, got {int(labels.max())}")
    return F.one_hot(labels.long().clamp(min=0), num_classes).float()


def _labelled(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the samples of which both labels are known, bool [B]; a soft one of zeros is not."""
    known = [labels >= 0 if labels.ndim == 1 else labels.any(-1) for labels in (ours, theirs)]
    return known[0] & known[1]


def _move(images: Tensor, dy: Tensor, dx: Tensor, mode: str, fill: float) -> Tensor:
    """Return the image seen through a window moved by (dy, dx) pixels, one pair a sample, by one gather."""
    height, width = images.shape[-2:]
    rows, seen_rows = _places(dy, height, mode)
    columns, seen_columns = _places(dx, width, mode)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    if mode != "constant":
        return moved
    seen = seen_rows[:, :, None] & seen_columns[:, None, :]
    return moved.masked_fill(~seen[:, None], fill)


def _places(offset: Tensor, size: int, mode: str) -> tuple[Tensor, Tensor]:
    """Return for each pixel of the view the source pixel, [B, size], and whether it lies inside the image."""
    place = torch.arange(size, device=offset.device)[None, :] + offset[:, None]
    inside = (place >= 0) & (place < size)
    if mode == "reflect":
        place = place.abs()
        place = torch.where(place >= size, 2 * (size - 1) - place, place)
    return place.clamp(0, size - 1), inside


def _check_pixels(images: Tensor) -> None:
    if images.shape[1] not in (1, 3):
        raise DataError(f"randaugment needs one or three channels, got {images.shape[1]}")
    if images.is_floating_point() and (float(images.min()) < 0 or float(images.max()) > 1):
        low, high = float(images.min()), float(images.max())
        raise DataError(
            f"randaugment needs uint8, or float in [0, 1] before normalisation, got {low:.3g} to {high:.3g}"
        )


def _transforms() -> Any:
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise ComponentError("randaugment needs torchvision: pip install 'potstill[vision]'") from error
    return v2
