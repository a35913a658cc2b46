"""Where models come from: what an ecosystem has to say about a model of its own, and how a model wants its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from potstill.errors import Problem


@dataclass(frozen=True)
class ImageProcessor:
    """How a model wants its images.

    Attributes:
        size: height and width of its input; ``None`` for that of the data.
        shorter: the shorter edge is resized to this many pixels and ``size`` is cropped from the middle; with ``None``
            both edges are resized to ``size``.
        interpolation: how pixels are resized.
        mean: per channel, of values in [0, 1]; ``None`` for that of the data.
        std: per channel, of values in [0, 1]; ``None`` for that of the data.
        native: the ecosystem's own processor, saved beside the model; ``None`` where there is none.
        squash: height and width to which both edges are resized before ``size`` is cropped from the middle.
        floor: whether half a pixel beside the crop is rounded down, as in transformers; torchvision rounds it to even.
    """

    size: tuple[int, int] | None = None
    shorter: int | None = None
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    native: Any = field(default=None, compare=False, repr=False)
    squash: tuple[int, int] | None = None
    floor: bool = False


@dataclass(frozen=True)
class TextProcessor:
    """How a model wants its texts.

    Attributes:
        tokenizer: a tokenizer of transformers, with a padding token.
    """

    tokenizer: Any


@dataclass(frozen=True)
class Built:
    """A model and what is known of it.

    Attributes:
        model: the model.
        fresh: names of the parameters that were newly made although trained ones were asked for, such as a head.
        labels: names of the classes by output; empty where the model has no names for them.
    """

    model: nn.Module
    fresh: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


class Origin(Protocol):
    """An ecosystem of models, such as timm. A reference in a recipe is ``PREFIX:NAME``."""

    def build(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any], *, pretrained: bool) -> Built:
        """Return a model with a head for the task.

        Args:
            name: what stands after the prefix.
            kwargs: options of the recipe, passed to the ecosystem.
            facts: what the task knows: ``num_labels``, ``label_names``, ``in_channels``, ``image_size``, …, and
                ``auto_model`` (the name of transformers' auto class for the task).
            pretrained: whether to take trained weights, or the architecture alone.

        Raises:
            ModelError: no such model, wrong options, or weights that cannot be had.
        """
        ...

    def complete(self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with which ``build`` makes the same architecture without facts."""
        ...

    def processor(
        self, name: str, kwargs: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> ImageProcessor | TextProcessor | None:
        """Return how the model wants its inputs, without building it."""
        ...

    def check(self, name: str, kwargs: Mapping[str, Any], path: tuple[str | int, ...]) -> list[Problem]:
        """Return the mistakes in name and options that show without a network; ``path`` is that of the model."""
        ...

    def save(self, model: nn.Module, folder: Path, *, name: str, labels: list[str], processor: Any) -> None:
        """Write the model in the ecosystem's own layout, with ``model.safetensors`` in it."""
        ...
