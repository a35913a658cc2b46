"""Images: pictures and arrays of every layout, sizes, normalisation, reading what does not fit into memory."""

from __future__ import annotations

import base64
import copy
import io
import json

import numpy as np
import pytest
import torch
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures

from potstill.data.batching import InMemory, Lazy
from potstill.errors import TaskError
from potstill.models.image_processors import image_processor
from potstill.models.origins import ImageProcessor
from potstill.tasks import image_classification
from potstill.tasks.image_classification import ImageClassification


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pictures(*arrays: np.ndarray, modes=None, labels=None) -> Dataset:
    made = [Pictures.fromarray(each) for each in arrays]
    if modes:
        made = [each.convert(mode) for each, mode in zip(made, modes, strict=True)]
    ids = list(range(100, 100 + len(made)))
    table = Dataset.from_dict(
        {"image": made, "sample_id": ids}, features=Features({"image": Image(), "sample_id": Value("int64")})
    )
    return labelled(table, labels)


def arrays(values: np.ndarray, feature=None, labels=None) -> Dataset:
    ids = list(range(100, 100 + len(values)))
    features = None if feature is None else Features({"image": feature, "sample_id": Value("int64")})
    return labelled(Dataset.from_dict({"image": list(values), "sample_id": ids}, features=features), labels)


def labelled(table: Dataset, labels) -> Dataset:
    if labels is None:
        return table
    return table.add_column("label", list(labels), feature=ClassLabel(names=["cat", "dog", "eel"]))


def fitted(train: Dataset, **options) -> ImageClassification:
    task = ImageClassification(**options)
    task.fit(train)
    return task


def pixels(task: ImageClassification, table: Dataset, training: bool = False, seed: int = 0) -> torch.Tensor:
    data = task.dataset(table, training=training, seed=seed)
    return data.__getitems__(list(range(len(data))))["pixel_values"]


PLAIN = {"mean": [0.0], "std": [1.0]}


def test_grey_pictures():
    grey = random_pixels(3, 4, 5)
    task = fitted(pictures(*grey), **PLAIN)
    found = pixels(task, pictures(*grey))
    assert found.shape == (3, 1, 4, 5)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy()[:, 0], grey / 255, rtol=1e-6)
    about = {"num_labels": 0, "label_names": [], "auto_model": "AutoModelForImageClassification"}
    assert task.facts() == {**about, "in_channels": 1, "image_size": (4, 5), "in_features": 20}


def test_colour_pictures():
    """Channels go first; [H, W, C] reshaped instead of transposed gives an image of the right shape and no sense."""
    colour = random_pixels(2, 4, 5, 3)
    found = pixels(fitted(pictures(*colour), **PLAIN), pictures(*colour))
    assert found.shape == (2, 3, 4, 5)
    np.testing.assert_allclose(found.numpy(), colour.transpose(0, 3, 1, 2) / 255, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5), (1, 4), (3, 3), (5, 1)])
def test_small_colour_pictures(shape):
    colour = random_pixels(2, *shape, 3)
    found = pixels(fitted(pictures(*colour), **PLAIN), pictures(*colour))
    np.testing.assert_allclose(found.numpy(), colour.transpose(0, 3, 1, 2) / 255, rtol=1e-6)


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "LA", "CMYK"])
def test_other_modes_are_converted(mode):
    colour = np.full((2, 4, 5, 3), 255, dtype=np.uint8)
    found = pixels(fitted(pictures(*colour, modes=[mode] * 2), **PLAIN), pictures(*colour, modes=[mode] * 2))
    assert found.shape == (2, 1 if mode == "1" else 3, 4, 5)
    torch.testing.assert_close(found, torch.ones_like(found))


def test_a_few_grey_pictures_among_colour_ones():
    """Real collections hold some; the colour ones must not become grey, nor the whole be refused."""
    train = pictures(random_pixels(4, 5), *random_pixels(2, 4, 5, 3))
    task = fitted(train, **PLAIN)
    found = pixels(task, train)
    assert found.shape == (3, 3, 4, 5)
    assert (found[0] == found[0, :1]).all()
    assert not (found[1] == found[1, :1]).all()


def test_the_training_split_decides_about_colour():
    grey, colour = pictures(*random_pixels(2, 4, 5)), pictures(*random_pixels(2, 4, 5, 3))
    assert pixels(fitted(grey), colour).shape == (2, 1, 4, 5)
    assert pixels(fitted(colour), grey).shape == (2, 3, 4, 5)


def test_pictures_of_16_bits_are_refused():
    """Pillow cuts them off at 255: an X-ray would become all white."""
    deep = Pictures.fromarray(np.full((4, 5), 3000, dtype=np.uint16))
    ids = [0]
    table = Dataset.from_dict(
        {"image": [deep], "sample_id": ids}, features=Features({"image": Image(), "sample_id": Value("int64")})
    )
    with pytest.raises(TaskError, match="8 bits a channel, got mode I;16"):
        fitted(table)


def test_a_missing_picture_is_named():
    table = Dataset.from_dict(
        {"image": [Pictures.fromarray(random_pixels(4, 5)), None], "sample_id": [0, 1]},
        features=Features({"image": Image(), "sample_id": Value("int64")}),
    )
    with pytest.raises(TaskError, match="got no picture"):
        fitted(table)


@pytest.mark.parametrize("channels", [1, 3, 2, 4, 8])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_arrays_in_either_layout(channels, layout):
    """Four channels first (multispectral) taken for four rows would train, badly."""
    stored = random_pixels(3, channels, 9, 10).astype(np.float32)
    shown = stored if layout == "first" else stored.transpose(0, 2, 3, 1)
    table = arrays(shown, Array3D(shown.shape[1:], "float32"))
    task = fitted(table, **PLAIN)
    assert task.facts()["in_channels"] == channels
    assert task.facts()["image_size"] == (9, 10)
    assert np.array_equal(pixels(task, table).numpy(), stored)


@pytest.mark.parametrize("feature", [None, Array2D((9, 10), "float32")], ids=["lists", "Array2D"])
def test_arrays_without_channels(feature):
    stored = random_pixels(3, 9, 10).astype(np.float64) / 7
    table = arrays(stored, feature)
    found = pixels(fitted(table, **PLAIN), table)
    np.testing.assert_allclose(found.numpy()[:, 0], stored, rtol=1e-6)


def test_arrays_of_bytes_are_scaled_as_pictures_are():
    """`datasets` hands out bytes as int64; unscaled, a given mean of 0.5 would be next to nothing."""
    stored = random_pixels(3, 9, 10)
    table = arrays(stored, Array2D((9, 10), "uint8"))
    task = fitted(table, mean=[0.5], std=[0.25])
    np.testing.assert_allclose(pixels(task, table).numpy()[:, 0], (stored / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-6)
    assert task.dataset(table, training=False, seed=0).columns["pixel_values"].dtype == torch.uint8


def test_normalisation_is_that_of_the_training_split_per_channel():
    colour = random_pixels(8, 6, 6, 3)
    colour[..., 1] //= 4
    train = pictures(*colour)
    task = fitted(train)
    scaled = colour / 255
    np.testing.assert_allclose(task.own.mean, scaled.mean((0, 1, 2)), rtol=1e-5)
    found = pixels(task, train)
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    dark = pictures(*(colour // 2))
    assert pixels(task, dark).mean() < -0.5  # not normalised by its own statistics


def test_given_normalisation_wins():
    grey = random_pixels(3, 4, 5)
    task = fitted(pictures(*grey), mean=[0.1307], std=[0.3081])
    np.testing.assert_allclose(pixels(task, pictures(*grey)).numpy()[:, 0], (grey / 255 - 0.1307) / 0.3081, rtol=1e-4)


def test_a_mean_for_other_channels_is_refused():
    """[B, 1, H, W] − [1, 3, 1, 1] broadcasts into three channels."""
    with pytest.raises(TaskError, match="expected 1 numbers for mean"):
        fitted(pictures(*random_pixels(2, 4, 5)), mean=[0.4, 0.5, 0.6])


def test_pictures_of_all_sizes_need_a_size():
    train = pictures(random_pixels(4, 5), random_pixels(8, 6))
    task = fitted(train)
    assert "image_size" not in task.facts()  # a model with a size of its own may still come
    for needs in (lambda: pixels(task, train), lambda: task.example_inputs(2)):
        with pytest.raises(TaskError, match=r"images differ in size \(\[\(4, 5\), \(8, 6\)\].*task\.size"):
            needs()
    task = fitted(train, size=(6, 6))
    assert pixels(task, train).shape == (2, 1, 6, 6)
    assert task.facts()["image_size"] == (6, 6)


def test_resizing_keeps_the_picture():
    """A flat image stays flat, a gradient stays a gradient in the right direction."""
    ramp = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None, :], 12, 0)  # 12 high, 16 wide
    task = fitted(pictures(ramp, np.full((12, 16), 77, np.uint8)), size=(6, 8), **PLAIN)
    found = pixels(task, pictures(ramp, np.full((12, 16), 77, np.uint8)))
    assert found.shape == (2, 1, 6, 8)
    torch.testing.assert_close(found[1], torch.full((1, 6, 8), 77 / 255))
    across = found[0, 0, 3] * 255
    assert (across.diff() > 15).all()
    assert found[0, 0].std(0).max() < 0.01


def test_arrays_are_resized_too():
    table = arrays(np.full((2, 3, 8, 8), 0.5, np.float32), Array3D((3, 8, 8), "float32"))
    found = pixels(fitted(table, size=[4, 6], **PLAIN), table)
    torch.testing.assert_close(found, torch.full((2, 3, 4, 6), 0.5))


def test_another_split_takes_the_size_of_training():
    task = fitted(pictures(*random_pixels(2, 6, 8)))
    assert pixels(task, pictures(random_pixels(12, 16), random_pixels(3, 5))).shape == (2, 1, 6, 8)


@pytest.mark.parametrize("kind", ["pictures", "arrays"])
@pytest.mark.parametrize("augment", [(), [{"shift": {"pixels": 1}}, "flip"]])
def test_reading_on_demand_gives_the_same_tensors(monkeypatch, kind, augment):
    stored = random_pixels(7, 6, 6)
    labels = [0, 1, 2, -1, 0, 1, None]
    table = pictures(*stored, labels=labels) if kind == "pictures" else arrays(stored, Array2D((6, 6), "uint8"), labels)
    task = fitted(table, augment=augment)
    held = task.dataset(table, training=True, seed=3)
    assert type(held) is InMemory
    monkeypatch.setattr(image_classification, "MEMORY_LIMIT", 7 * 36 - 1)
    lazy = task.dataset(table, training=True, seed=3)
    assert type(lazy) is Lazy
    assert "pixel_values" not in lazy.columns
    for rows in ([0, 1, 2, 3, 4, 5, 6], [5, 2], [3]):
        ours, theirs = lazy.__getitems__(rows), held.__getitems__(rows)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    monkeypatch.setattr(image_classification, "MEMORY_LIMIT", 7 * 36)
    assert type(task.dataset(table, training=True, seed=3)) is InMemory


def test_labels_and_ids():
    table = pictures(*random_pixels(4, 4, 5), labels=[2, -1, None, 0])
    task = fitted(table)
    batch = task.dataset(table, training=True, seed=0).__getitems__([3, 1, 0, 2])
    assert batch["labels"].tolist() == [0, -100, 2, -100]
    assert batch["sample_id"].tolist() == [103, 101, 100, 102]
    assert task.label_names == ["cat", "dog", "eel"]


def test_a_transfer_set_has_no_labels():
    table = pictures(*random_pixels(4, 4, 5))
    task = fitted(table)
    assert set(task.dataset(table, training=True, seed=0).__getitems__([0])) == {"sample_id", "pixel_values"}


def test_settings_go_through_json():
    train = pictures(*random_pixels(5, 6, 8, 3), labels=[0, 1, 2, 0, 1])
    task = fitted(train, size=(4, 4))
    again = ImageClassification()
    again.restore(json.loads(json.dumps(task.settings())))
    test = pictures(random_pixels(10, 9, 3, seed=1), random_pixels(5, 5, seed=2), labels=[2, -1])
    assert torch.equal(pixels(again, test), pixels(task, test))
    assert again.facts() == task.facts()
    assert again.settings() == task.settings()
    assert again.label_names == ["cat", "dog", "eel"]
    assert again.example_inputs(2)["pixel_values"].shape == (2, 3, 4, 4)


def test_views_are_a_function_of_seed_epoch_and_id():
    """Views drawn from the global generator differ after a resume, and no cached teacher answer fits them."""
    table = pictures(*random_pixels(6, 8, 8))
    task = fitted(table, augment=[{"shift": {"pixels": 2}}, "flip"])
    data = task.dataset(table, training=True, seed=5)
    whole = data.__getitems__(list(range(6)))["pixel_values"]
    torch.manual_seed(123)
    for rows in ([4, 1], [1], [5, 4, 3, 2, 1, 0]):
        assert torch.equal(data.__getitems__(rows)["pixel_values"], whole[rows])
    other = task.dataset(table.select([4, 1]), training=True, seed=5)
    assert torch.equal(other.__getitems__([0, 1])["pixel_values"], whole[[4, 1]])
    data.set_epoch(1)
    assert not torch.equal(data.__getitems__(list(range(6)))["pixel_values"], whole)
    data.set_epoch(0)
    assert torch.equal(data.__getitems__(list(range(6)))["pixel_values"], whole)
    assert not torch.equal(pixels(task, table, training=True, seed=6), whole)


def test_no_views_outside_training():
    table = pictures(*random_pixels(4, 8, 8))
    plain, task = fitted(table), fitted(table, augment=[{"shift": {"pixels": 2}}, "flip"])
    assert torch.equal(pixels(task, table, training=False), pixels(plain, table))
    assert not torch.equal(pixels(task, table, training=True), pixels(plain, table))


def test_views_come_before_normalisation():
    """A shift fills with 0, which is black only before the mean is taken off."""
    table = pictures(*np.full((4, 8, 8), 200, dtype=np.uint8))
    task = fitted(table, augment=[{"shift": {"pixels": 3}}], mean=[0.5], std=[0.5])
    values = pixels(task, table, training=True).unique()
    torch.testing.assert_close(values, torch.tensor([-1.0, (200 / 255 - 0.5) / 0.5]))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"image": "img"}, "there is no column 'img'; did you mean 'image'"), ({"label": "sample_id"}, "to hold classes")],
)
def test_mistakes(options, message):
    with pytest.raises(TaskError, match=message):
        fitted(pictures(*random_pixels(2, 4, 5), labels=[0, 1]), **options)


def test_ragged_arrays_are_refused():
    table = Dataset.from_dict({"image": [[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]], "sample_id": [0, 1]})
    with pytest.raises(TaskError, match="images of one size"):
        fitted(table)


def test_a_split_without_the_column_names_it():
    table = pictures(*random_pixels(2, 4, 5))
    with pytest.raises(TaskError, match="there is no column 'image'"):
        fitted(table).dataset(table.rename_column("image", "picture"), training=False, seed=0)


def test_labels_of_a_model_must_agree():
    """A teacher with the classes in another order teaches the wrong ones, with a falling loss."""
    task = fitted(pictures(*random_pixels(2, 4, 5), labels=[0, 1]))
    task.check_labels(["cat", "dog", "eel"], "the teacher")
    task.check_labels([], "the teacher")
    with pytest.raises(TaskError, match=r"the teacher to have the labels \[cat, dog, eel\].*, got \[dog, cat"):
        task.check_labels(["dog", "cat", "eel"], "the teacher")


SMALL = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
STUDENT = ImageProcessor(size=(8, 8), shorter=10, **SMALL)


def photos(count: int = 5, labels=None) -> Dataset:
    """Pictures of all sizes."""
    shapes = [(11, 17), (23, 12), (13, 13), (9, 30), (10, 11), (40, 33)]
    return pictures(*(random_pixels(*shapes[i % 6], 3, seed=i) for i in range(count)), labels=labels)


def prepared(train: Dataset, student, teachers=None, **options) -> ImageClassification:
    task = fitted(train, **options)
    task.prepare(student, teachers or {})
    return task


def batch_of(task: ImageClassification, table: Dataset, training: bool = False, rows=None):
    data = task.dataset(table, training=training, seed=3)
    return data.__getitems__(list(range(len(data))) if rows is None else rows)


def own_pipeline(size: int, shorter: int, mean, std, interpolation="bilinear"):
    presets = pytest.importorskip("torchvision.transforms._presets")
    mode = presets.InterpolationMode(interpolation)
    return presets.ImageClassification(crop_size=size, resize_size=shorter, mean=mean, std=std, interpolation=mode)


def test_each_model_sees_what_its_own_pipeline_gives():
    table = photos()
    native = pytest.importorskip("transformers").ConvNextImageProcessorPil(size={"shortest_edge": 14})
    teachers = {
        "teacher/net/": ImageProcessor(size=(12, 12), shorter=15, interpolation="bicubic", **SMALL),
        "teacher/next/": image_processor(native),
    }
    batch = batch_of(prepared(table, STUDENT, teachers), table)
    pipelines = {
        "pixel_values": own_pipeline(8, 10, **SMALL),
        "teacher/net/pixel_values": own_pipeline(12, 15, interpolation="bicubic", **SMALL),
        "teacher/next/pixel_values": lambda picture: native(picture, return_tensors="pt")["pixel_values"][0],
    }
    assert set(batch) == {"sample_id", *pipelines}
    for name, pipeline in pipelines.items():
        expected = torch.stack([pipeline(picture) for picture in table["image"]])
        torch.testing.assert_close(batch[name], expected, rtol=1e-5, atol=1e-5)


def test_models_that_agree_share_what_they_see():
    table = photos()
    same, normalised = ImageProcessor(size=(8, 8), shorter=10, **SMALL, native=object()), ImageProcessor((8, 8), 10)
    teachers = {"teacher/same/": same, "teacher/other/": normalised, "teacher/large/": ImageProcessor(size=(9, 9))}
    data = prepared(table, STUDENT, teachers).dataset(table, training=False, seed=0)
    assert set(data.columns) == {"sample_id", "pixel_values", "teacher/large/pixel_values"}
    assert data.columns["pixel_values"].dtype == torch.uint8
    batch = data.__getitems__([0, 1])
    assert set(batch) == {"sample_id", *(f"{who}pixel_values" for who in ("", "teacher/other/", "teacher/large/"))}
    learned = fitted(table).learned
    raw = batch["pixel_values"] * torch.tensor(SMALL["std"]).view(-1, 1, 1) + torch.tensor(SMALL["mean"]).view(-1, 1, 1)
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (learned.mean, learned.std))
    torch.testing.assert_close(batch["teacher/other/pixel_values"], (raw - mean) / std, rtol=1e-5, atol=1e-5)


def test_two_teachers_share_the_pixels_that_the_student_does_not_see():
    teachers = {
        f"teacher/{name}/": ImageProcessor(size=(9, 9), mean=(mean,)) for name, mean in (("a", 0.1), ("b", 0.2))
    }
    data = prepared(photos(), STUDENT, teachers).dataset(photos(), training=False, seed=0)
    assert set(data.columns) == {"sample_id", "pixel_values", "teacher/a/pixel_values"}
    assert {"teacher/a/pixel_values", "teacher/b/pixel_values"} < set(data.__getitems__([0]))


def test_without_teachers_of_their_own_nothing_changes():
    table = pictures(*random_pixels(4, 6, 6, 3))
    task = fitted(table)
    before, data = batch_of(task, table), task.learned
    task.prepare(None, {"teacher/": None, "teacher/b/": ImageProcessor(data.size, mean=data.mean, std=data.std)})
    after = batch_of(task, table)
    assert before.keys() == after.keys()
    assert torch.equal(before["pixel_values"], after["pixel_values"])


@pytest.mark.parametrize(
    ("given", "size", "shorter"),
    [
        ({}, (8, 8), 10),
        ({"size": [6, 4]}, (6, 4), None),
        ({"size": [6, 4], "resize": 7}, (6, 4), 7),
        ({"resize": 9}, (8, 8), 9),
        ({"mean": [0.1], "std": [0.7]}, (8, 8), 10),
    ],
)
def test_what_the_recipe_says_holds_for_all_models(given, size, shorter):
    teacher = ImageProcessor(size=(9, 9), squash=(12, 12), mean=(0.2,) * 3, std=(0.4,) * 3)
    task = prepared(photos(), STUDENT, {"teacher/": teacher}, **given)
    assert (task.own.size, task.own.shorter) == (size, shorter)
    assert task.own.mean == tuple(given.get("mean", SMALL["mean"]))
    assert task.own.std == tuple(given.get("std", SMALL["std"]))
    batch = batch_of(task, photos())
    assert batch["pixel_values"].shape == (5, 3, *size)
    assert batch["teacher/pixel_values"].shape == (5, 3, *given.get("size", (9, 9)))
    assert (task.dataset(photos(), training=False, seed=0).columns.keys() == {"sample_id", "pixel_values"}) == (
        "size" in given
    )


def test_a_shorter_edge_alone_crops_the_square():
    task = fitted(photos(), resize=7, **PLAIN)
    assert task.facts()["image_size"] == (7, 7)
    expected = own_pipeline(7, 7, (0.0,) * 3, (1.0,) * 3)
    torch.testing.assert_close(pixels(task, photos()), torch.stack([expected(each) for each in photos()["image"]]))


def test_statistics_of_pictures_of_all_sizes_count_each_alike():
    dark, bright = np.full((4, 4, 3), 51, np.uint8), np.full((40, 40, 3), 204, np.uint8)
    learned = fitted(pictures(dark, bright)).learned
    np.testing.assert_allclose(learned.mean, [0.5] * 3, rtol=1e-6)
    np.testing.assert_allclose(learned.std, [0.3] * 3, rtol=1e-3)


def test_a_task_can_be_prepared_for_each_model_alone():
    """The copies share what was learned; none may change what the others see."""
    table = photos()
    whole = prepared(table, STUDENT, {"teacher/": ImageProcessor(size=(9, 9))})
    expected = batch_of(whole, table)
    alone = copy.copy(whole)
    alone.prepare(ImageProcessor(size=(9, 9)), {})
    found = batch_of(alone, table)
    assert set(found) == {"sample_id", "pixel_values"}
    assert torch.equal(found["pixel_values"], expected["teacher/pixel_values"])
    assert alone.facts()["image_size"] == (9, 9)
    assert whole.facts()["image_size"] == (8, 8)
    assert all(torch.equal(batch_of(whole, table)[name], expected[name]) for name in expected)


def test_grey_images_for_a_model_of_colour_ones():
    table = pictures(*random_pixels(3, 8, 8))
    task = prepared(table, ImageProcessor(**SMALL))
    found = pixels(task, table)
    assert found.shape == (3, 3, 8, 8)
    assert task.facts()["in_channels"] == 3
    assert task.example_inputs(2)["pixel_values"].shape == (2, 3, 8, 8)
    back = found * torch.tensor(SMALL["std"]).view(-1, 1, 1) + torch.tensor(SMALL["mean"]).view(-1, 1, 1)
    torch.testing.assert_close(back, (torch.as_tensor(np.stack(random_pixels(3, 8, 8))) / 255)[:, None].expand_as(back))


def test_a_model_for_other_channels_is_refused():
    stored = random_pixels(3, 4, 9, 10).astype(np.float32)
    task = fitted(arrays(stored, Array3D((4, 9, 10), "float32")))
    for prepare in (lambda p: task.prepare(p, {}), lambda p: task.prepare(None, {"teacher/": p})):
        with pytest.raises(TaskError, match="expected 4 numbers for mean"):
            prepare(ImageProcessor(**SMALL))


def test_arrays_are_cropped_too():
    stored = random_pixels(3, 3, 20, 30).astype(np.float32)
    table = arrays(stored, Array3D((3, 20, 30), "float32"))
    found = pixels(prepared(table, ImageProcessor(size=(8, 8), shorter=10), mean=[0], std=[1]), table)
    transforms = pytest.importorskip("torchvision.transforms.v2")
    expected = transforms.CenterCrop(8)(transforms.Resize(10, antialias=True)(torch.as_tensor(stored)))
    torch.testing.assert_close(found, expected)


AUGMENTED = ["flip", {"shift": {"pixels": 3}}, {"mixup": {"alpha": 1.0}}]


def test_models_see_the_same_view_of_a_sample():
    """Another flip, shift or partner for the teacher would make its answer one about another image."""
    table = photos(12, labels=[0, 1, 2] * 4)
    brighter = ImageProcessor((8, 8), 11, mean=(0.0,) * 3, std=(0.5,) * 3)
    student = ImageProcessor((8, 8), 10, mean=(0.0,) * 3, std=(1.0,) * 3)
    task = prepared(table, student, {"teacher/": brighter, "teacher/b/": student}, augment=AUGMENTED)
    batch = batch_of(task, table, training=True)
    alone = copy.copy(task)
    alone.prepare(brighter, {})
    assert torch.equal(batch["teacher/pixel_values"], batch_of(alone, table, training=True)["pixel_values"])
    same = prepared(
        table, student, {"teacher/": ImageProcessor((8, 8), 10, mean=(0.0,), std=(0.5,))}, augment=AUGMENTED
    )
    batch = batch_of(same, table, training=True)
    torch.testing.assert_close(batch["teacher/pixel_values"], 2 * batch["pixel_values"])


@pytest.mark.parametrize("limit", [2**31, 0])
def test_views_of_teachers_are_a_function_of_seed_epoch_and_id(monkeypatch, limit):
    monkeypatch.setattr(image_classification, "MEMORY_LIMIT", limit)
    table = photos(6)
    augment = [{"resized_crop": {"area": [0.3, 1]}}, "flip", {"mixup": {"alpha": 1.0}}]
    task = prepared(table, STUDENT, {"teacher/": ImageProcessor(size=(9, 9))}, augment=augment)
    data = task.dataset(table, training=True, seed=5)
    assert type(data) is (Lazy if limit == 0 else InMemory)
    whole = data.__getitems__(list(range(6)))
    torch.manual_seed(1)
    data.set_epoch(1)
    assert not torch.equal(data.__getitems__([0])["teacher/pixel_values"], whole["teacher/pixel_values"][:1])
    data.set_epoch(0)
    for rows in ([4, 1], [1], [5, 4, 3, 2, 1, 0]):
        batch = data.__getitems__(rows)
        assert all(torch.equal(batch[name], whole[name][rows]) for name in whole)


def test_reading_on_demand_gives_the_same_views(monkeypatch):
    table = photos(6)
    task = prepared(table, STUDENT, {"teacher/": ImageProcessor(size=(9, 9))}, augment=["resized_crop", "flip"])
    held = batch_of(task, table, training=True, rows=[3, 1])
    monkeypatch.setattr(image_classification, "MEMORY_LIMIT", 6 * 3 * (10 * 10 + 9 * 9) - 1)
    data = task.dataset(table, training=True, seed=3)
    assert type(data) is Lazy
    assert all(torch.equal(value, held[name]) for name, value in data.__getitems__([3, 1]).items())
    monkeypatch.setattr(image_classification, "MEMORY_LIMIT", 6 * 3 * (10 * 10 + 9 * 9))
    assert type(task.dataset(table, training=True, seed=3)) is InMemory


def test_a_resized_crop_is_taken_from_all_that_is_left_of_the_picture():
    """Cropping the middle first and then at random would never show the borders."""
    table = photos(labels=[0, 1, 2, 0, 1])
    teacher = ImageProcessor((9, 9), 10, **SMALL)
    whole = {"resized_crop": {"area": [1, 1], "ratio": [1, 1]}}
    task = prepared(table, STUDENT, {"teacher/": teacher}, augment=[whole])
    data = task.dataset(table, training=True, seed=3)
    assert data.columns["pixel_values"].shape == (5, 3, 10, 10)
    assert "teacher/pixel_values" not in data.columns  # one canvas for both
    batch = data.__getitems__([0, 1, 2, 3, 4])
    squared = torch.stack([own_pipeline(10, 10, (0,) * 3, (1,) * 3)(picture) for picture in table["image"]])
    for name, edge in (("pixel_values", 8), ("teacher/pixel_values", 9)):
        expected = torch.nn.functional.interpolate(squared, (edge, edge), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(SMALL[each]).view(-1, 1, 1) for each in ("mean", "std"))
        torch.testing.assert_close(batch[name], (expected - mean) / std, rtol=1e-5, atol=1e-5)
    assert batch_of(task, table)["pixel_values"].shape == (5, 3, 8, 8)
    assert task.dataset(table, training=False, seed=0).columns["pixel_values"].shape == (5, 3, 8, 8)


@pytest.mark.parametrize(
    "processor",
    [
        STUDENT,
        ImageProcessor(interpolation="bicubic", size=(6, 8)),
        ImageProcessor(size=(8, 8), squash=(11, 12), interpolation="lanczos"),
        ImageProcessor(size=(8, 8), shorter=11, floor=True),
    ],
)
def test_what_a_model_wants_is_saved_with_it(processor):
    task = prepared(photos(), processor, {"teacher/": None}, size=None)
    again = ImageClassification()
    again.restore(json.loads(json.dumps(task.settings())))
    assert torch.equal(pixels(again, photos(6)), batch_of(alone(task, processor), photos(6))["pixel_values"])
    assert again.settings() == task.settings()
    assert again.facts() == task.facts()
    assert again.own == task.own


def alone(task: ImageClassification, processor) -> ImageClassification:
    task = copy.copy(task)
    task.prepare(processor, {})
    return task


def test_settings_of_older_versions_are_read():
    old = {"label": "label", "label_names": ["a"], "image": "image", "size": [4, 6]}
    task = ImageClassification()
    task.restore({**old, "channels": 1, "mean": [0.5], "std": [0.25]})
    ramp = np.arange(24, dtype=np.uint8).reshape(4, 6)
    np.testing.assert_allclose(pixels(task, pictures(ramp))[0, 0], (ramp / 255 - 0.5) / 0.25, rtol=1e-5)


def test_settings_without_a_size_say_so_when_one_is_needed():
    again = ImageClassification()
    again.restore(json.loads(json.dumps(fitted(photos()).settings())))
    with pytest.raises(TaskError, match="images differ in size"):
        pixels(again, photos())


def test_timm_sees_the_same():
    timm_data = pytest.importorskip("timm.data")
    config = {"input_size": (3, 24, 24), "crop_pct": 0.9, "interpolation": "bicubic", "mean": (0.4,) * 3}
    pipeline = timm_data.create_transform(**config, std=(0.3,) * 3)
    wanted = ImageProcessor((24, 24), int(24 / 0.9), "bicubic", (0.4,) * 3, (0.3,) * 3)
    expected = torch.stack([pipeline(picture) for picture in photos()["image"]])
    torch.testing.assert_close(pixels(prepared(photos(), wanted), photos()), expected, rtol=1e-5, atol=1e-5)


def test_what_a_person_sees_of_a_row():
    """The picture as it is in the data, not as a model gets it."""
    colour = random_pixels(3, 4, 5, 3)
    rows = pictures(*colour)
    (part,) = fitted(rows, size=[2, 2]).show(rows, [2])[0]
    assert (part["name"], part["kind"]) == ("image", "image")
    shown = Pictures.open(io.BytesIO(base64.b64decode(part["value"].split(",")[1])))
    np.testing.assert_array_equal(np.array(shown), colour[2])


def test_arrays_are_shown_too():
    rows = arrays(np.random.default_rng(0).random((3, 4, 5)).astype(np.float32), Array2D((4, 5), "float32"))
    assert len(fitted(rows).show(rows, [0, 2])) == 2
