"""Small pictures as addresses."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.data.thumbnails import thumbnail


def opened(address):
    kind, _, data = address.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_small_picture_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    shown = opened(thumbnail(Image.fromarray(pixels)))
    np.testing.assert_array_equal(np.array(shown), pixels)


def test_a_large_picture_shrinks_and_keeps_its_shape():
    assert opened(thumbnail(Image.new("RGB", (400, 200)))).size == (160, 80)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
def test_every_mode_of_a_picture_is_written(mode):
    assert opened(thumbnail(Image.new(mode, (4, 4)))).size == (4, 4)


def test_an_array_is_spread_from_black_to_white():
    shown = opened(thumbnail(torch.tensor([[[0.0, 4.0], [8.0, 16.0]]])))
    assert np.array(shown).tolist() == [[0, 64], [128, 255]]


def test_bytes_are_shown_as_they_are_and_many_channels_by_the_first():
    image = torch.zeros(1, 2, 2, dtype=torch.uint8)
    image[0, 0, 0] = 7
    assert np.array(opened(thumbnail(image))).max() == 7
    assert opened(thumbnail(torch.rand(5, 3, 4))).size == (4, 3)
    assert opened(thumbnail(torch.full((3, 2, 2), 0.5))).mode == "RGB"
