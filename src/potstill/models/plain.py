"""Small models of potstill's own, named ``potstill:mlp`` and ``potstill:convnet`` in recipes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from potstill.registry import models

Size = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


@models.register("mlp", reference="https://arxiv.org/abs/1503.02531")
class Mlp(nn.Module):
    """Fully connected layers with ReLU between them; any input is flattened.

    Args:
        in_features: numbers in one sample; known from the data.
        num_labels: classes; known from the data.
        hidden: width of each hidden layer.
        dropout: share of hidden units dropped while training.
        input_dropout: share of inputs dropped while training.
    """

    def __init__(
        self,
        in_features: Size,
        num_labels: Size,
        hidden: list[Size] | None = None,
        dropout: Share = 0.0,
        input_dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        if input_dropout:
            layers.append(nn.Dropout(input_dropout))
        width = in_features
        for units in hidden or []:
            layers += [nn.Linear(width, units), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = units
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_labels)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of ``[B, ...]``."""
        logits: Tensor = self.head(self.body(features))
        return logits


@models.register("convnet")
class ConvNet(nn.Module):
    """Stages of 3×3 convolution, batch normalisation and ReLU, halved between stages, averaged at the end.

    Args:
        in_channels: channels of the image; known from the data.
        num_labels: classes; known from the data.
        widths: channels of each stage.
        depth: convolutions in each stage.
        dropout: share of the pooled features dropped while training.
    """

    def __init__(
        self,
        in_channels: Size,
        num_labels: Size,
        widths: Annotated[list[Size], Field(min_length=1)] | None = None,
        depth: Size = 1,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = in_channels
        for place, width in enumerate([16, 32] if widths is None else widths):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if place else []
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of images ``[B, C_in, H, W]``."""
        features = self.stages(pixel_values).mean((-2, -1))
        logits: Tensor = self.head(self.dropout(features))
        return logits
