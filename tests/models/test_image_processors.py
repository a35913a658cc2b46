"""What is known of an image processor of transformers gives the pixels that it gives itself."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.data.pictures import Geometry, Normalise
from potstill.errors import ModelError
from potstill.models.image_processors import image_processor
from potstill.models.origins import ImageProcessor

SHAPES = [(240, 320), (133, 251), (300, 301), (227, 224), (225, 224)]


def photo(height: int, width: int) -> Image.Image:
    """Smooth, with some noise."""
    random = np.random.default_rng(height)
    coarse = random.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=int)
    return Image.fromarray((smooth + random.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8))


def ours(known, picture: Image.Image) -> torch.Tensor:
    assert isinstance(known, ImageProcessor)
    size = known.size or ((known.shorter,) * 2 if known.shorter else (picture.height, picture.width))
    geometry = Geometry(size, known.squash or known.shorter or size, known.interpolation, known.floor)
    return Normalise(known.mean, known.std)(geometry.picture(picture)[None])


def native(name: str, options):
    return getattr(pytest.importorskip("transformers"), name)(**options)


EDGE, CROP = {"size": {"shortest_edge": 224}}, {"crop_size": {"height": 224, "width": 224}}
CASES = [
    ("ViTImageProcessor", {}),  # Swin, Swin v2, ViT-MSN, DiNAT, SwiftFormer, I-JEPA
    ("ViTImageProcessor", {"do_rescale": False}),
    ("ViTImageProcessor", {"do_normalize": False}),
    ("ViTImageProcessor", {"do_resize": False}),
    ("ViTImageProcessor", {"rescale_factor": 1 / 127.5}),
    ("DeiTImageProcessor", {}),
    ("ConvNextImageProcessor", {}),  # ConvNeXT v2, ResNet, RegNet, CvT
    ("ConvNextImageProcessor", EDGE),
    ("ConvNextImageProcessor", {**EDGE, "crop_pct": 0.95}),
    ("MobileNetV1ImageProcessor", {}),
    ("MobileNetV2ImageProcessor", {}),
    ("EfficientNetImageProcessor", {}),
    ("EfficientNetImageProcessor", {"include_top": False, "do_center_crop": True}),
    ("EfficientNetImageProcessor", {"do_normalize": False}),
    ("BeitImageProcessor", {}),
    ("BeitImageProcessor", {"do_center_crop": True, "size": {"height": 256, "width": 256}}),
    ("BitImageProcessor", {}),  # DINOv2, FocalNet, Hiera
    ("CLIPImageProcessor", {}),
    ("LevitImageProcessor", {}),
    ("PoolFormerImageProcessor", {}),
    ("PoolFormerImageProcessor", {"size": {"height": 224, "width": 224}}),
    ("PoolFormerImageProcessor", {"size": {"height": 224, "width": 200}, **CROP}),
    ("PvtImageProcessor", {}),
    ("SegformerImageProcessor", {}),
    ("SiglipImageProcessor", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_pixels_are_those_of_the_processor(name, options):
    """Exact where it resizes by Pillow; with torchvision's kernels a few levels of 255 apart, for they round twice."""
    exact, close = native(name + "Pil", options), native(name, options)
    known = image_processor(exact)
    assert known == image_processor(close)
    assert known.native is exact
    for shape in SHAPES:
        found = ours(known, photo(*shape))
        expected = exact(photo(*shape), return_tensors="pt")["pixel_values"].float()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        levels = 255 * torch.tensor(known.std).view(1, -1, 1, 1)
        apart = (found - close(photo(*shape), return_tensors="pt")["pixel_values"]).abs() * levels
        assert apart.max() < 2.01
        assert apart.mean() < 0.5


@pytest.mark.parametrize("resample", range(6))
def test_every_filter_is_pillows(resample):
    exact = native("ViTImageProcessorPil", {"resample": resample})
    expected = exact(photo(100, 133), return_tensors="pt")["pixel_values"].float()
    torch.testing.assert_close(ours(image_processor(exact), photo(100, 133)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("EfficientNetImageProcessor", {"rescale_offset": True}, "does not know: rescale_offset"),
        ("MobileViTImageProcessor", {}, "does not know: do_flip_channel_order"),
        ("ImageGPTImageProcessor", {}, "does not know: do_color_quantize"),
        ("TextNetImageProcessor", {}, "does not know: size_divisor"),
        ("PPLCNetImageProcessor", {}, "does not know: resize_short"),
        ("PerceiverImageProcessor", {}, "resizes to a size, got PerceiverImageProcessor"),
        ("Siglip2ImageProcessor", {}, "resizes to a size, got Siglip2ImageProcessor"),
        ("ViTImageProcessor", {"do_pad": True}, "does not know: do_pad"),
        ("ViTImageProcessor", {"do_resize": False, "do_center_crop": True, **CROP}, "crops without resizing"),
        ("ViTImageProcessor", {"size": {"shortest_edge": 224, "longest_edge": 300}}, "or of the shortest edge, got"),
    ],
)
def test_what_potstill_cannot_do_is_refused(name, options, message):
    with pytest.raises(ModelError, match=message):
        image_processor(native(name, options))


def test_what_is_no_image_processor_is_refused():
    with pytest.raises(ModelError, match="expected an image processor of transformers that resizes"):
        image_processor(SimpleNamespace())


def test_the_shorter_edge_without_a_crop_leaves_the_size_to_the_task():
    known = image_processor(native("CLIPImageProcessor", {"do_center_crop": False}))
    assert (known.size, known.shorter) == (None, 224)


def test_it_imports_no_ecosystem():
    code = (
        "import sys, potstill.models.image_processors; print({'transformers', 'torchvision', 'timm'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
