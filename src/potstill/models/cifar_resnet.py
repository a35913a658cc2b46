"""The residual networks for CIFAR, named ``potstill:cifar_resnet`` in recipes."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from potstill.errors import ModelError
from potstill.registry import models

Size = Annotated[int, Field(gt=0)]
_DEPTHS = "expected a depth of 6n + 2, such as 20, 32, 44, 56 or 110"


def _checked(depth: int) -> int:
    if depth < 8 or depth % 6 != 2:
        raise ValueError(_DEPTHS)
    return depth


@models.register("cifar_resnet", reference="https://arxiv.org/abs/1512.03385")
class CifarResNet(nn.Module):
    """The residual network for small images of section 4.2, with parameter-free shortcuts (option A).

    Three stages of 16, 32 and 64 channels, each of ``(depth - 2) / 6`` blocks of two 3×3 convolutions; the names of
    the weights are those of the published ones of akamaster/pytorch_resnet_cifar10.

    Args:
        depth: layers with weights, 6n + 2: 20, 32, 44, 56 or 110.
        num_labels: classes; known from the data.
        in_channels: channels of the image; known from the data.

    Raises:
        ModelError: another depth.
    """

    def __init__(
        self, depth: Annotated[int, AfterValidator(_checked)], num_labels: Size, in_channels: Size = 3
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ModelError(f"{_DEPTHS}, got {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_labels)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of images ``[B, C_in, H, W]``, 32×32 in the paper."""
        features = F.relu(self.bn1(self.conv1(pixel_values)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.linear(features.mean((-2, -1)))
        return logits


class _Block(nn.Module):
    """Two convolutions beside a shortcut that halves the image and pads the channels with zeros."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.added = (width - channels) // 2

    def forward(self, features: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(features)))))
        if self.stride != 1 or self.added:
            features = F.pad(features[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return F.relu(inner + features)


def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Block(channels, width, stride)
    return nn.Sequential(first, *(_Block(width, width, 1) for _ in range(blocks - 1)))
