"""Geometry and normalisation, against the pipelines of torchvision and timm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.data.pictures import Geometry, Normalise, pixels, resized

FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
SHAPES = [(20, 20), (31, 20), (20, 31), (33, 47), (90, 41), (9, 14), (5, 200), (18, 17)]


def photo(height: int, width: int, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values)


def transforms():
    return pytest.importorskip("torchvision.transforms", reason="compares with torchvision")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("size", "edge"), [((16, 16), 19), ((16, 13), 16), ((16, 30), 18), ((7, 20), 24)])
def test_resize_and_crop_are_torchvisions(shape, interpolation, size, edge):
    tv = transforms()
    pipeline = tv.Compose([tv.Resize(edge, tv.InterpolationMode(interpolation)), tv.CenterCrop(size)])
    for picture in (photo(*shape), photo(*shape, channels=1)):
        found = Geometry(size, edge, interpolation).picture(picture)
        assert found.is_contiguous()
        assert torch.equal(found, tv.functional.pil_to_tensor(pipeline(picture)))


@pytest.mark.parametrize("shape", SHAPES)
def test_both_edges_are_squashed(shape):
    tv = transforms()
    pipeline = tv.Compose([tv.Resize((24, 21)), tv.CenterCrop((16, 16))])
    found = Geometry((16, 16), (24, 21)).picture(photo(*shape))
    assert torch.equal(found, tv.functional.pil_to_tensor(pipeline(photo(*shape))))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("share", [1.0, 0.875, 0.95])
def test_pipelines_of_timm(shape, mode, share):
    data = pytest.importorskip("timm.data", reason="compares with timm")
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    size, edge = (25, 25), int(25 / share)
    options = {"crop_pct": share, "crop_mode": mode, "interpolation": "bicubic", "mean": mean, "std": std}
    expected = data.create_transform((3, *size), **options)(photo(*shape))
    geometry = Geometry(size, edge if mode == "center" else (edge, edge), "bicubic")
    found = Normalise(mean, std)(geometry.picture(photo(*shape))[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_arrays_are_resized_and_cropped_as_torchvision_does_tensors(shape, interpolation, dtype):
    tv = transforms()
    images = pixels(photo(*shape))[None].to(dtype)
    edges = tv.Resize(19, tv.InterpolationMode(interpolation), antialias=True)
    expected = tv.CenterCrop((16, 24))(edges(images.float()))
    expected = expected.round().clamp(0, 255) if dtype == torch.uint8 else expected
    found = Geometry((16, 24), 19, interpolation).array(images)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected)


@pytest.mark.parametrize("interpolation", FILTERS)
def test_arrays_know_every_filter(interpolation):
    flat = torch.full((2, 4, 9, 12), 7.0)
    torch.testing.assert_close(Geometry((5, 5), 6, interpolation).array(flat), torch.full((2, 4, 5, 5), 7.0))


@pytest.mark.parametrize(("width", "floor", "left"), [(13, True, 1), (13, False, 2), (11, True, 0), (11, False, 0)])
def test_half_a_pixel_beside_the_crop(width, floor, left):
    """torchvision rounds to even, transformers down: for every fourth width they are one pixel apart."""
    picture = photo(10, width)
    geometry = Geometry((10, 10), 10, floor=floor)
    expected = pixels(picture)[:, :, left : left + 10]
    assert torch.equal(geometry.picture(picture), expected)
    assert torch.equal(geometry.array(pixels(picture)[None])[0], expected)


@pytest.mark.parametrize(
    ("geometry", "size"),
    [
        (Geometry((8, 8), 10), (10, 10)),
        (Geometry((8, 8), (12, 11)), (12, 11)),
        (Geometry((8, 8), (8, 8)), (8, 8)),
        (Geometry((8, 6), 10), (8, 6)),
    ],
)
def test_random_crops_are_taken_from_what_comes_before_the_crop(geometry, size):
    canvas = geometry.canvas()
    assert canvas.size == size
    assert canvas.picture(photo(20, 31)).shape == (3, *size)
    assert canvas.canvas() == canvas


def test_normalisation_scales_bytes_only():
    finish = Normalise((0.5,), (0.25,))
    torch.testing.assert_close(finish(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)), torch.full((1, 1, 2, 2), 2.0))
    torch.testing.assert_close(finish(torch.full((1, 1, 2, 2), 255.0)), torch.full((1, 1, 2, 2), 1018.0))


def test_normalisation_resizes_in_the_end():
    images = torch.rand(2, 3, 8, 8)
    found = Normalise((0.5,), (0.5,), (4, 6))(images)
    torch.testing.assert_close(found, (resized(images, (4, 6)) - 0.5) * 2)


def test_nothing_is_copied_that_has_its_size():
    images = torch.rand(2, 3, 8, 8)
    assert resized(images, (8, 8)) is images
