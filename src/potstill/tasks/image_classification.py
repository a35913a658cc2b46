"""Image classification: one class for a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from potstill.data.augment import make_views
from potstill.data.batching import InMemory, Lazy
from potstill.errors import TaskError
from potstill.interfaces import Batch
from potstill.registry import tasks
from potstill.tasks.classification import Classification

MEMORY_LIMIT = 2**31
"""Bytes of decoded pixels up to which a split is kept in memory; above, images are decoded when asked for."""


@tasks.register("image-classification", input="image")
class ImageClassification(Classification):
    """One class for an image.

    Pixels are scaled to [0, 1] where they are bytes, then normalised by ``mean`` and ``std`` per channel.

    Args:
        image: the column of the image: a picture, or an array ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``.
        label: the column of the class.
        size: height and width to which images are resized (bilinear); needed where they differ.
        mean: per channel, after scaling; that of the training split if omitted.
        std: per channel, after scaling; that of the training split if omitted.
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
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augment: Sequence[Any] = (),
    ) -> None:
        super().__init__(label=label)
        self.image = image
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.mean, self.std = mean, std
        self.channels = 0
        self.augment = list(augment)

    def fit(self, train: Dataset) -> None:
        """Learn classes, channels, size and, unless given, mean and standard deviation from the training split.

        Raises:
            TaskError: there is no such column, or images differ in size and ``size`` is not given.
        """
        super().fit(train)
        self.require_column(train, self.image)
        rows = np.unique(np.linspace(0, len(train) - 1, 2048).astype(int))  # from all over: the rows may be sorted
        sample = self._read(train, rows.tolist())
        self.channels, height, width = sample.shape[1:]
        self.size = self.size or (height, width)
        scaled = _scaled(sample)
        self.mean = self.mean or scaled.mean((0, 2, 3)).tolist()
        self.std = self.std or scaled.std((0, 2, 3)).clamp_min(1e-6).tolist()
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise TaskError(f"expected {self.channels} numbers for {name}, one a channel, got {values}")

    def dataset(self, table: Dataset, *, training: bool, seed: int) -> InMemory:
        """Return batches with ``pixel_values`` float32 ``[B, C, H, W]``."""
        steps = self.augment if training else ()
        views = make_views(
            steps,
            key="pixel_values",
            seed=seed,
            num_classes=len(self.label_names),
            finish=self.normaliser(),
        )
        self.require_column(table, self.image)
        columns = self.base_columns(table)
        height, width = self.size or (0, 0)
        if len(table) * self.channels * height * width > MEMORY_LIMIT:
            return Lazy(columns, lambda indices: {"pixel_values": self._read(table, indices)}, views)
        return InMemory({**columns, "pixel_values": self._read(table, list(range(len(table))))}, views)

    def normaliser(self) -> Callable[[Tensor], Tensor]:
        """Return the map from stored pixels to the model's input."""
        mean = torch.tensor(self.mean or [0.0], dtype=torch.float32).view(1, -1, 1, 1)
        std = torch.tensor(self.std or [1.0], dtype=torch.float32).view(1, -1, 1, 1)
        return lambda pixels: (_scaled(pixels) - mean) / std

    def facts(self) -> dict[str, Any]:
        """Return ``num_labels``, ``in_channels``, ``image_size`` and ``in_features`` (their product)."""
        height, width = self.size or (0, 0)
        return {
            **super().facts(),
            "in_channels": self.channels,
            "image_size": (height, width),
            "in_features": self.channels * height * width,
        }

    def settings(self) -> dict[str, Any]:
        """Return labels, size, channels and normalisation as plain JSON."""
        own = {"size": list(self.size or ()), "channels": self.channels, "mean": self.mean, "std": self.std}
        return {**super().settings(), "image": self.image, **own}

    def restore(self, settings: Mapping[str, Any]) -> None:
        """Take back what :meth:`settings` returned."""
        super().restore(settings)
        self.image = str(settings["image"])
        self.size = (int(settings["size"][0]), int(settings["size"][1]))
        self.channels, self.mean, self.std = int(settings["channels"]), settings["mean"], settings["std"]

    def example_inputs(self, batch_size: int) -> Batch:
        """Return standard-normal images."""
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(batch_size, self.channels, *(self.size or ()), generator=generator)}

    def _read(self, table: Dataset, indices: list[int]) -> Tensor:
        """Return raw pixels ``[N, C, H, W]``: bytes for pictures, float32 for arrays."""
        rows = table.select(indices)
        feature = table.features[self.image]
        if isinstance(feature, Image):
            pictures = rows[self.image][:]
            grey = all(getattr(picture, "mode", None) in ("1", "L") for picture in pictures)
            return self._stack([self._decode(picture, self.channels or (1 if grey else 3)) for picture in pictures])
        arrays = np.asarray(rows.with_format("numpy")[self.image][:])
        if arrays.dtype == object or arrays.ndim not in (3, 4):
            raise TaskError(f"expected '{self.image}' to hold images of one size, got arrays of {arrays.ndim - 1} axes")
        if _dtype(feature) == "uint8":
            arrays = arrays.astype(np.uint8)  # `datasets` widens bytes to int64
        return self._resized(torch.as_tensor(_channels_first(arrays)))

    def _decode(self, picture: Any, channels: int) -> Tensor:
        if picture is None or picture.mode[0] in "IF":
            got = "no picture" if picture is None else f"mode {picture.mode}, which would be cut off at 255"
            raise TaskError(f"expected '{self.image}' to hold pictures of 8 bits a channel, got {got}")
        array = np.array(picture.convert("L" if channels == 1 else "RGB"))
        pixels = torch.as_tensor(array).reshape(*array.shape[:2], -1).permute(2, 0, 1)
        return self._resized(pixels[None])[0]

    def _resized(self, images: Tensor) -> Tensor:
        if self.size is None or tuple(images.shape[-2:]) == self.size:
            return images
        resized = F.interpolate(images.float(), self.size, mode="bilinear", antialias=True, align_corners=False)
        return resized.round().clamp(0, 255).to(images.dtype) if images.dtype == torch.uint8 else resized

    def _stack(self, images: list[Tensor]) -> Tensor:
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise TaskError(f"images differ in size ({sorted(shapes)[:3]}, …); say `task.size: [height, width]`")
        return torch.stack(images)


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


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
