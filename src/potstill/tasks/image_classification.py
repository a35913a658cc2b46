"""Image classification: one class for a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from datasets import Dataset, Image
from numpy.typing import NDArray
from PIL import Image as Pictures
from pydantic import Field
from torch import Tensor

from potstill.data.augment import Finish, make_views, split_step
from potstill.data.batching import InMemory, Lazy
from potstill.data.pictures import Geometry, Normalise, pixels, scaled
from potstill.data.thumbnails import thumbnail
from potstill.errors import TaskError
from potstill.interfaces import Batch
from potstill.models.origins import ImageProcessor
from potstill.registry import augmentations, tasks
from potstill.tasks.classification import Classification

MEMORY_LIMIT = 2**31
"""Bytes of decoded pixels up to which a split is kept in memory; above, images are decoded when asked for."""

_CHUNK = 256
"""Pictures that are decoded at once."""


@tasks.register("image-classification", input="image")
class ImageClassification(Classification):
    """One class for an image.

    An image is resized, scaled to [0, 1] where it is bytes, then normalised by ``mean`` and ``std`` per channel. What
    is not given here is as each model wants it (see :meth:`prepare`), else as the training split has it.

    Args:
        image: the column of the image: a picture, or an array ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``.
        label: the column of the class.
        size: height and width of every model's input. Images are resized to it, whatever their shape and whatever
            a model would crop, unless ``resize`` is given too. Needed where images differ and no model has a size.
        resize: the shorter edge becomes this many pixels, then the middle ``size`` is cropped.
        mean: per channel, after scaling.
        std: per channel, after scaling.
        augment: entries of ``data.augment``, applied before normalisation.
    """

    name = "image-classification"
    input_key = "pixel_values"

    def __init__(
        self,
        *,
        image: str = "image",
        label: str = "label",
        size: tuple[int, int] | None = None,
        resize: Annotated[int, Field(ge=1)] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augment: Sequence[Any] = (),
    ) -> None:
        super().__init__(label=label)
        self.image = image
        self.given = ImageProcessor(size=_pair(size), shorter=resize, mean=_numbers(mean), std=_numbers(std))
        self.learned = ImageProcessor()
        self.own = self._effective(None)
        self.channels = 0
        self.augment = list(augment)
        self._teachers: dict[str, ImageProcessor] = {}
        self._sizes: list[tuple[int, int]] = []

    def fit(self, train: Dataset) -> None:
        """Learn classes, channels, size, mean and standard deviation from the training split.

        Raises:
            TaskError: there is no such column, or what it holds is no image.
        """
        super().fit(train)
        self.require_column(train, self.image)
        rows = np.unique(np.linspace(0, len(train) - 1, 2048).astype(int))  # from all over: the rows may be sorted
        mean, std = self._look(train, rows.tolist())
        self._check_channels(self.given, {1, self.channels})
        size = self._sizes[0] if len(self._sizes) == 1 else None
        self.learned = ImageProcessor(size=size, mean=mean, std=std)
        self.prepare(None, {})

    def prepare(self, student: ImageProcessor | None, teachers: Mapping[str, ImageProcessor | None]) -> None:
        """Give each model its images as it wants them; what the recipe says of the images holds for all models.

        A model that has means for three channels sees an image of one channel in three equal ones.

        Args:
            student: how the student, or the only model, wants its images; ``None`` for as the task has them.
            teachers: the same for each teacher by the prefix of its batch entries, such as ``teacher/``.

        Raises:
            TaskError: a model is for images with other channels than those of the data.
        """
        self.own = self._effective(student)
        self._teachers = {prefix: self._effective(processor) for prefix, processor in teachers.items()}
        for processor in (self.own, *self._teachers.values()) if self.channels > 1 else ():
            self._check_channels(processor, {1, self.channels})

    def dataset(self, table: Dataset, *, training: bool, seed: int) -> InMemory:
        """Return batches with ``pixel_values`` float32 ``[B, C, H, W]``.

        A teacher that sees other pixels than the student has its own entry, ``teacher/pixel_values``.

        Raises:
            TaskError: there is no such column, or images differ in size and nothing says what it should be.
        """
        steps = self.augment if training else ()
        geometries, keys = self._plan(canvas=any(_takes_canvas(step) for step in steps))
        views = make_views(steps, keys=keys, seed=seed, num_classes=len(self.label_names))
        self.require_column(table, self.image)
        columns = self.base_columns(table)
        area = sum(geometry.size[0] * geometry.size[1] for geometry in geometries.values())
        if len(table) * self.channels * area > MEMORY_LIMIT:
            return Lazy(columns, lambda indices: self._read(table, indices, geometries), views)
        rows, step = list(range(len(table))), _CHUNK if isinstance(table.features[self.image], Image) else len(table)
        parts = [self._read(table, rows[at : at + step], geometries) for at in rows[::step]]
        stored = {name: torch.cat([part[name] for part in parts]) for name in geometries}
        return InMemory({**columns, **stored}, views)

    def facts(self) -> dict[str, Any]:
        """Return what a model built for this task may need.

        These are ``num_labels``, ``label_names``, ``auto_model``, ``in_channels`` and, where the size of the student's
        images is known, ``image_size`` and ``in_features`` (how many numbers are in an image).
        """
        channels, size = self._seen_channels(), self.own.size
        known = {} if size is None else {"image_size": size, "in_features": channels * size[0] * size[1]}
        names = {"label_names": list(self.label_names), "auto_model": "AutoModelForImageClassification"}
        return {**super().facts(), **names, "in_channels": channels, **known}

    def settings(self) -> dict[str, Any]:
        """Return labels, channels and how the student's images are made, as plain JSON."""
        own = self.own
        return {
            **super().settings(),
            "image": self.image,
            "size": list(own.size or ()),
            "resize": list(own.squash) if own.squash else own.shorter,
            "interpolation": own.interpolation,
            "crop": "floor" if own.floor else "round",
            "channels": self.channels,
            "mean": own.mean and list(own.mean),
            "std": own.std and list(own.std),
        }

    def restore(self, settings: Mapping[str, Any]) -> None:
        """Take back what :meth:`settings` returned."""
        super().restore(settings)
        self.image, self.channels = str(settings["image"]), int(settings["channels"])
        resize = settings.get("resize")
        self.own = ImageProcessor(
            size=_pair(settings["size"]),
            shorter=resize if isinstance(resize, int) else None,
            interpolation=settings.get("interpolation", "bilinear"),
            mean=_numbers(settings["mean"]),
            std=_numbers(settings["std"]),
            squash=None if isinstance(resize, int) else _pair(resize),
            floor=settings.get("crop") == "floor",
        )
        self.learned = ImageProcessor(size=self.own.size, mean=self.own.mean, std=self.own.std)
        self._teachers = {}

    def show(self, table: Dataset, rows: list[int]) -> list[list[dict[str, str]]]:
        """Return the image of each row as it is in the data, at most 160 pixels wide and high."""
        pictures = [thumbnail(image) for image in self._images(table, rows)]
        return [[{"name": self.image, "kind": "image", "value": picture}] for picture in pictures]

    def example_inputs(self, batch_size: int) -> Batch:
        """Return standard-normal images of the student's size.

        Raises:
            TaskError: images differ in size and nothing says what it should be.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (self._seen_channels(), *self._geometry(self.own).size)
        return {"pixel_values": torch.randn(batch_size, *shape, generator=generator)}

    def _effective(self, processor: ImageProcessor | None) -> ImageProcessor:
        """Return how a model's images are made: as the recipe says, else as the model wants, else as the data are."""
        given, learned, wanted = self.given, self.learned, processor or ImageProcessor()
        shorter, squash, floor = wanted.shorter, wanted.squash, wanted.floor
        if given.size or given.shorter:
            shorter, squash, floor = given.shorter, None, False
        size = given.size or wanted.size or ((shorter, shorter) if shorter else learned.size)
        crops = shorter is not None or squash not in (None, size)
        return ImageProcessor(
            size=size,
            shorter=shorter,
            interpolation=wanted.interpolation,
            mean=given.mean or wanted.mean or learned.mean,
            std=given.std or wanted.std or learned.std,
            native=wanted.native,
            squash=squash if crops else None,
            floor=crops and floor,
        )

    def _geometry(self, own: ImageProcessor) -> Geometry:
        if own.size is None:
            raise TaskError(f"images differ in size ({self._sizes[:3]}, …); say `task.size: [height, width]`")
        return Geometry(own.size, own.squash or own.shorter or own.size, own.interpolation, own.floor)

    def _plan(self, *, canvas: bool) -> tuple[dict[str, Geometry], dict[str, tuple[str, Finish]]]:
        """Return the images to store by name, and for each entry of a batch the stored name and its normalisation."""
        stored: dict[str, Geometry] = {}
        keys: dict[str, tuple[str, Finish]] = {}
        for prefix, own in {"": self.own, **self._teachers}.items():
            if prefix and own == self.own:
                continue
            geometry, output = self._geometry(own), prefix + "pixel_values"
            place = geometry.canvas() if canvas else geometry
            name = next((name for name, known in stored.items() if known == place), output)
            stored[name] = place
            keys[output] = (name, Normalise(own.mean or (0.0,), own.std or (1.0,), geometry.size))
        return stored, keys

    def _seen_channels(self) -> int:
        return max(self.channels, len(self.own.mean or ()), len(self.own.std or ()))

    def _check_channels(self, processor: ImageProcessor, allowed: set[int]) -> None:
        for name, values in (("mean", processor.mean), ("std", processor.std)):
            if values is not None and len(values) not in allowed:
                raise TaskError(f"expected {self.channels} numbers for {name}, one a channel, got {list(values)}")

    def _look(self, train: Dataset, rows: list[int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Learn channels and sizes from these rows; return mean and deviation, in which every image counts alike."""
        geometry = None if self.given.size is None else self._geometry(self._effective(None))
        sizes, grey, count, moments = set(), True, 0, []
        for raw in self._images(train, rows):
            if isinstance(raw, Tensor):
                grey, image = False, raw if geometry is None else geometry.array(raw[None])[0]
            else:
                grey, rgb = grey and raw.mode in ("1", "L"), raw.convert("RGB")
                image = pixels(rgb) if geometry is None else geometry.picture(rgb)
            sizes.add((int(image.shape[1]), int(image.shape[2])))
            values = scaled(image).double().flatten(1)
            count += values.shape[1]
            moments.append(torch.stack([values.mean(1), values.square().mean(1)]))
        self._sizes = sorted(sizes)
        mean, square = torch.stack(moments)[..., : 1 if grey else None].mean(0)
        self.channels = len(mean)
        std = ((square - mean**2).clamp_min(0) * count / max(1, count - 1)).sqrt().clamp_min(1e-6)
        return tuple(mean.tolist()), tuple(std.tolist())

    def _read(self, table: Dataset, indices: list[int], geometries: Mapping[str, Geometry]) -> Batch:
        """Return the images of these rows as they are stored: bytes for pictures, float32 or bytes for arrays."""
        if not isinstance(table.features[self.image], Image):
            arrays = self._arrays(table, indices)
            return {name: geometry.array(arrays) for name, geometry in geometries.items()}
        mode = "L" if self.channels == 1 else "RGB"
        pictures = [picture.convert(mode) for picture in self._pictures(table, indices)]
        return {name: torch.stack([g.picture(each) for each in pictures]) for name, g in geometries.items()}

    def _images(self, table: Dataset, rows: list[int]) -> Iterator[Pictures.Image | Tensor]:
        if not isinstance(table.features[self.image], Image):
            yield from self._arrays(table, rows)
            return
        for at in range(0, len(rows), _CHUNK):
            yield from self._pictures(table, rows[at : at + _CHUNK])

    def _pictures(self, table: Dataset, indices: list[int]) -> list[Pictures.Image]:
        pictures = table.select(indices)[self.image][:]
        for picture in pictures:
            if picture is None or picture.mode[0] in "IF":
                got = "no picture" if picture is None else f"mode {picture.mode}, which would be cut off at 255"
                raise TaskError(f"expected '{self.image}' to hold pictures of 8 bits a channel, got {got}")
        return list(pictures)

    def _arrays(self, table: Dataset, indices: list[int]) -> Tensor:
        """Return raw numbers ``[N, C, H, W]``."""
        arrays = np.asarray(table.select(indices).with_format("numpy")[self.image][:])
        if arrays.dtype == object or arrays.ndim not in (3, 4):
            raise TaskError(f"expected '{self.image}' to hold images of one size, got arrays of {arrays.ndim - 1} axes")
        if _dtype(table.features[self.image]) == "uint8":
            arrays = arrays.astype(np.uint8)  # `datasets` widens bytes to int64
        return torch.as_tensor(_channels_first(arrays))


def _takes_canvas(step: Any) -> bool:
    """Whether an augmentation crops by itself, so that it is to see the image before ``size`` is cropped."""
    return bool(augmentations.facts(split_step(step)[0]).get("canvas"))


def _pair(size: Sequence[int] | None) -> tuple[int, int] | None:
    return (int(size[0]), int(size[1])) if size else None


def _numbers(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def _channels_first(arrays: NDArray[Any]) -> NDArray[Any]:
    """``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` to ``[N, C, H, W]``."""
    if arrays.ndim == 3:
        return arrays[:, None]
    first, last = arrays.shape[1], arrays.shape[-1]
    if last not in (1, 3) and (first in (1, 3) or first < last):
        return arrays
    return arrays.transpose(0, 3, 1, 2)


def _dtype(feature: Any) -> str:
    """Return the type of the numbers in an array feature or in nested lists."""
    while not hasattr(feature, "dtype") and hasattr(feature, "feature"):
        feature = feature.feature
    return str(getattr(feature, "dtype", ""))
