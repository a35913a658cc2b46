import sys

import pytest
import torch

from potstill.data.augment_images import _boxes, crop, flip, mixup, randaugment, resized_crop, shift
from potstill.data.draws import Draws
from potstill.errors import ComponentError, DataError
from potstill.registry import augmentations

COUNT = 64


def draws(count: int = COUNT, start: int = 0, epoch: int = 0) -> Draws:
    return Draws(0, epoch, torch.arange(start, start + count))


def pictures(dtype: torch.dtype = torch.float32, count: int = COUNT, channels: int = 3) -> torch.Tensor:
    values = torch.randint(1, 256, (count, channels, 7, 9), generator=torch.Generator().manual_seed(0))
    return values.to(torch.uint8) if dtype == torch.uint8 else values / 255


def windows(image: torch.Tensor, by: int, **pad) -> list[torch.Tensor]:
    """Every view that moves an image by at most `by` pixels."""
    padded = torch.nn.functional.pad(image[None], (by,) * 4, **pad)[0]
    height, width = image.shape[-2:]
    return [padded[:, y : y + height, x : x + width] for y in range(2 * by + 1) for x in range(2 * by + 1)]


AUGMENTATIONS = {
    "crop": lambda x, d: crop(x, draws=d, padding=2),
    "flip": lambda x, d: flip(x, draws=d),
    "shift": lambda x, d: shift(x, draws=d, pixels=3),
    "randaugment": lambda x, d: randaugment(x, draws=d),
    "resized_crop": lambda x, d: resized_crop(x, draws=d),
}


@pytest.fixture(params=AUGMENTATIONS)
def augment(request):
    if request.param == "randaugment":
        pytest.importorskip("torchvision", reason="randaugment needs torchvision")
    return AUGMENTATIONS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_view_is_a_pure_function_of_the_sample(augment, dtype):
    images = pictures(dtype)
    before, state = images.clone(), torch.get_rng_state()
    views = augment(images, draws())
    assert views.dtype == dtype
    assert views.shape == images.shape
    assert views.is_contiguous()
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(augment(images[5:8], draws(3, start=5)), views[5:8])  # whatever else is in the batch
    assert not torch.equal(augment(images, draws(epoch=1)), views)
    assert not torch.equal(views, images)


@pytest.mark.parametrize(
    ("mode", "pad"),
    [("constant", {"value": 0.5}), ("reflect", {"mode": "reflect"}), ("edge", {"mode": "replicate"})],
)
def test_crop_is_a_window_of_the_padded_image(mode, pad):
    images = pictures()
    views = crop(images, draws=draws(), padding=2, mode=mode, fill=0.5)
    places = []
    for image, view in zip(images, views, strict=True):
        hits = [place for place, window in enumerate(windows(image, 2, **pad)) if torch.equal(window, view)]
        assert len(hits) == 1
        places += hits
    assert len(set(places)) > 18  # of 25 places


def test_every_place_of_a_crop_is_as_likely():
    images = torch.arange(1.0, 10).reshape(1, 1, 3, 3).expand(9000, 1, 3, 3)
    views = crop(images, draws=draws(9000), padding=1)
    _, counts = views.flatten(1).unique(dim=0, return_counts=True)
    assert len(counts) == 9
    assert (counts - 1000).abs().max() < 200


def test_crop_refuses_to_reflect_more_than_the_image():
    with pytest.raises(DataError, match="smaller than the image, got 7 for 7 pixels"):
        crop(pictures(), draws=draws(), padding=7, mode="reflect")


def test_shift_moves_by_at_most_so_many_pixels_and_fills():
    images = pictures()
    for image, view in zip(images, shift(images, draws=draws(), pixels=2, fill=-1.0), strict=True):
        assert any(torch.equal(window, view) for window in windows(image, 2, value=-1.0))


def test_shift_beyond_the_image_leaves_the_fill_value():
    views = shift(pictures(), draws=draws(), pixels=100)
    assert (views.flatten(1) == 0).all(1).any()


def test_flip_mirrors_left_to_right_with_its_probability():
    images = pictures()
    assert torch.equal(flip(images, draws=draws(), p=0), images)
    assert torch.equal(flip(images, draws=draws(), p=1), images.flip(-1))
    many = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2).expand(4000, 1, 1, 2)
    flipped = flip(many, draws=draws(4000), p=0.25)[:, 0, 0, 0].mean()
    assert float(flipped) == pytest.approx(0.25, abs=0.04)


def places(height: int, width: int) -> torch.Tensor:
    """An image whose two channels say where each pixel lies, from 0 to 1."""
    rows, columns = ((torch.arange(n) + 0.5) / n for n in (height, width))
    return torch.stack([rows[:, None].expand(height, width), columns[None].expand(height, width)])


def parts(count: int, height: int, width: int, **options) -> torch.Tensor:
    """Height, width, top and left of the part that each view shows, as shares of the image, [B, 4]."""
    views = resized_crop(places(height, width).expand(count, 2, height, width), draws=draws(count), **options)
    first, last = views[:, :, :1, :1].flatten(1), views[:, :, -1:, -1:].flatten(1)
    return torch.cat([last - first, first], 1).double()


def test_resized_crop_shows_areas_and_shapes_as_torchvision_does():
    """The distribution, from many draws of ours and theirs: area, logarithm of the shape, place."""
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="compares with torchvision")
    count, height, width = 4000, 64, 96
    theirs = v2.RandomResizedCrop(8, scale=(0.2, 0.9), ratio=(0.5, 2))
    image = torch.empty(1, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        boxes = [theirs.make_params([image]) for _ in range(count)]
    expected = torch.tensor([[b["height"], b["width"], b["top"], b["left"]] for b in boxes]).double()
    size = torch.tensor([height, width] * 2)
    ours = torch.tensor(_boxes((height, width), draws(count), (0.2, 0.9), (0.5, 2.0)))[:, [2, 3, 0, 1]].double()
    for found, wanted in zip((ours / size).T, (expected / size).T, strict=True):
        quantiles = torch.linspace(0.02, 0.98, 25).double()
        assert (found.quantile(quantiles) - wanted.quantile(quantiles)).abs().max() < 0.035
    assert (ours[:, :2] + ours[:, 2:] <= size[:2]).all()
    assert (ours[:, :2] >= 1).all()


def test_resized_crop_of_the_whole_is_the_image():
    for image in (pictures(torch.uint8), pictures()):
        assert torch.equal(resized_crop(image, draws=draws(), area=(1, 1), ratio=(9 / 7, 9 / 7)), image)


@pytest.mark.parametrize(
    ("height", "width", "ratio", "part"),
    [(10, 100, (0.9, 1.1), (10, 11)), (100, 10, (0.9, 1.1), (11, 10)), (30, 30, (2, 2), (15, 30))],
)
def test_resized_crop_without_a_part_that_fits_takes_the_middle(height, width, ratio, part):
    top, left = (height - part[0]) // 2, (width - part[1]) // 2
    assert _boxes((height, width), draws(3), (1.0, 1.0), ratio) == [(top, left, *part)] * 3


def test_resized_crop_shows_the_same_part_in_another_resolution():
    small, large = parts(200, 64, 64), parts(200, 256, 256)
    assert (small - large).abs().max() < 3 / 64


def test_resized_crop_resizes_as_torchvision_does():
    functional = pytest.importorskip("torchvision.transforms.v2.functional", reason="compares with torchvision")
    for images, close in ((pictures(torch.uint8), 1), (pictures(), 1e-5)):
        views = resized_crop(images, draws=draws())
        for image, view, box in zip(images, views, _boxes((7, 9), draws(), (0.08, 1.0), (3 / 4, 4 / 3)), strict=True):
            expected = functional.resized_crop(image, *box, [7, 9], antialias=True)
            assert (expected.double() - view.double()).abs().max() <= close


def test_resized_crop_refuses_a_range_that_is_the_wrong_way_round():
    with pytest.raises(DataError, match=r"expected area as \[least, largest\], got \[1, 0.5\]"):
        resized_crop(pictures(), draws=draws(), area=(1, 0.5))


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_is_torchvisions(channels):
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="randaugment needs torchvision")
    images = pictures(torch.uint8, count=8, channels=channels)
    views = randaugment(images, draws=draws(8), num_ops=3, magnitude=14)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws(8).generator(6, "randaugment").initial_seed())
        assert torch.equal(v2.RandAugment(num_ops=3, magnitude=14)(images[6]), views[6])


def test_randaugment_refuses_what_it_would_spoil():
    pytest.importorskip("torchvision", reason="randaugment needs torchvision")
    with pytest.raises(DataError, match=r"float in \[0, 1\] before normalisation, got .* to 16"):
        randaugment(torch.full((2, 1, 8, 8), 16.0), draws=draws(2))
    with pytest.raises(DataError, match="one or three channels, got 4"):
        randaugment(torch.zeros(2, 4, 8, 8), draws=draws(2))


def test_randaugment_without_torchvision_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ComponentError, match=r"pip install 'potstill\[vision\]'"):
        randaugment(pictures(count=2), draws=draws(2))


class Store:
    """A data set whose samples are told apart by their value; indices go round."""

    def __init__(self, count: int, classes: int, **extra):
        self.columns = {
            "sample_id": torch.arange(count),
            "pixel_values": torch.arange(count).float().reshape(-1, 1, 1, 1).expand(count, 1, 2, 2),
            "labels": torch.arange(count) % classes,
            **extra,
        }

    def __call__(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        assert indices.dtype == torch.int64
        assert int(indices.min()) >= 0
        return {name: values[indices % len(self.columns["sample_id"])] for name, values in self.columns.items()}


def test_mixup_mixes_inputs_and_labels_by_the_same_ratio():
    twice = {"teacher/pixel_values": torch.arange(1000.0)[:, None] * 2, "labels": torch.arange(1000)}
    store = Store(1000, 1000, **twice)
    batch = store(torch.arange(1000))
    mixed = mixup(batch, draws=draws(1000), lookup=store, num_classes=1000, alpha=1.0)
    assert torch.equal(mixed["sample_id"], batch["sample_id"])
    labels = mixed["labels"]
    assert labels.dtype == torch.float32
    assert labels.sum(1).tolist() == pytest.approx([1.0] * 1000)
    assert (labels > 0).sum(1).max() == 2
    pixels = mixed["pixel_values"][:, 0, 0, 0]
    assert torch.allclose(pixels, labels @ torch.arange(1000.0), rtol=1e-4, atol=1e-2)
    assert torch.allclose(mixed["teacher/pixel_values"][:, 0], 2 * pixels)
    ratio = labels[torch.arange(1000), torch.arange(1000)].double()
    assert float(ratio.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(ratio.var()) == pytest.approx(1 / 12, abs=0.02)  # Beta(1, 1) is uniform
    assert batch["labels"].dtype == torch.int64  # the argument stays as it was


@pytest.mark.parametrize("alpha", [0.01, 0.2, 5.0])
def test_mixup_ratios_follow_the_beta_distribution(alpha):
    store = Store(2, 2)
    batch = {"sample_id": torch.arange(4000), "pixel_values": torch.ones(4000, 1)}
    other = {"sample_id": torch.arange(4000), "pixel_values": torch.zeros(4000, 1)}
    assert store.columns
    ratio = mixup(batch, draws=draws(4000), lookup=lambda _: other, num_classes=2, alpha=alpha)["pixel_values"].double()
    assert torch.isfinite(ratio).all()
    assert float(ratio.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(ratio.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_mixup_does_not_depend_on_the_batch():
    store = Store(50, 5)
    whole = mixup(store(torch.arange(50)), draws=draws(50), lookup=store, num_classes=5)
    part = mixup(store(torch.arange(7, 10)), draws=draws(3, start=7), lookup=store, num_classes=5)
    assert torch.equal(part["labels"], whole["labels"][7:10])
    assert torch.equal(part["pixel_values"], whole["pixel_values"][7:10])


def test_mixup_gives_unlabelled_samples_no_label():
    store = Store(10, 5, labels=torch.tensor([-1, 0, 1, 2, 3, 4, 0, 1, 2, 3]))
    labels = mixup(store(torch.arange(10)), draws=draws(10), lookup=store, num_classes=5)["labels"]
    assert labels[0].abs().sum() == 0
    assert set(labels.sum(1).round(decimals=5).tolist()) == {0.0, 1.0}


def test_mixup_keeps_soft_labels_and_needs_none():
    soft = torch.full((6, 3), 1 / 3)
    store = Store(6, 3, labels=soft)
    assert torch.allclose(mixup(store(torch.arange(6)), draws=draws(6), lookup=store, num_classes=3)["labels"], soft)
    del store.columns["labels"]
    assert "labels" not in mixup(store(torch.arange(6)), draws=draws(6), lookup=store, num_classes=3)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"input_ids": torch.zeros(6, 2, dtype=torch.int64)}, "not 'input_ids' of type torch.int64"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0, 1])}, "must lie below 3, got 3"),
        ({"labels": torch.rand(6)}, r"soft labels \[B, 3\] or class ids \[B\], got \[6\]"),
        ({"labels": torch.zeros(6, 4, dtype=torch.int64)}, r"one class id per sample, got labels \[6, 4\]"),
    ],
)
def test_mixup_refuses_what_cannot_be_mixed(extra, message):
    store = Store(6, 3, **extra)
    with pytest.raises(DataError, match=message):
        mixup(store(torch.arange(6)), draws=draws(6), lookup=store, num_classes=3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flip", {"p": 1.5}, "less than or equal to 1"),
        ("crop", {"pading": 4}, "has no option 'pading'"),
        ("crop", {"mode": "mirror"}, "'constant', 'reflect' or 'edge'"),
        ("shift", {"pixels": 0}, "greater than or equal to 1"),
        ("randaugment", {"magnitude": 31}, "less than or equal to 30"),
        ("mixup", {"alpha": 0}, "greater than 0"),
        ("resized_crop", {"area": [0, 1]}, "greater than 0"),
        ("resized_crop", {"ratio": 1}, "valid tuple"),
    ],
)
def test_options_are_checked(name, options, message):
    problems = augmentations.check(name, options)
    assert any(message in str(problem) for problem in problems), problems


def test_kinds():
    kinds = {name: augmentations.facts(name)["kind"] for name in ("crop", "flip", "shift", "randaugment", "mixup")}
    assert augmentations.facts("resized_crop")["kind"] == "image"
    assert kinds == {"crop": "image", "flip": "image", "shift": "image", "randaugment": "image", "mixup": "mix"}
