"""Models of timm: built, trained weights taken from folders, saved as timm reads them."""

from __future__ import annotations

import json
import re
import sys

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision.transforms.v2 import functional as F

from potstill.errors import ComponentError, ModelError
from potstill.models.origins import ImageProcessor
from potstill.models.timm_models import Timm

ORIGIN = Timm()
FACTS = {"num_labels": 3, "in_channels": 3, "image_size": (32, 32), "auto_model": "AutoModelForImageClassification"}


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """The name of a folder that holds a "trained" model of three classes."""
    folder = tmp_path_factory.mktemp("timm") / "model"
    torch.manual_seed(7)
    model = ORIGIN.build("test_resnet", {}, FACTS, pretrained=False).model
    ORIGIN.save(model, folder, name="test_resnet", labels=["cat", "dog", "cow"], processor=None)
    return f"local-dir:{folder}"


def test_a_new_model_has_a_head_for_the_task():
    built = ORIGIN.build("test_resnet.r160_in1k", {"drop_rate": 0.3}, FACTS, pretrained=False)
    assert built.model.num_classes == 3
    assert built.model.drop_rate == 0.3
    assert (built.fresh, built.labels) == ([], [])
    assert built.model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_other_channels_than_those_of_the_weights():
    built = ORIGIN.build("test_resnet", {}, {**FACTS, "in_channels": 1}, pretrained=False)
    assert built.model(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    assert "in_chans" not in ORIGIN.complete("test_resnet", {}, FACTS)
    assert ORIGIN.complete("test_resnet", {"num_classes": 5}, {**FACTS, "in_channels": 1}) == {
        "num_classes": 5,  # what the recipe says wins
        "in_chans": 1,
    }


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_saved_and_loaded_by_timm(tmp_path, name):
    built = ORIGIN.build(name, {}, {**FACTS, "in_channels": 1}, pretrained=False)
    model = built.model.eval()
    seen = ImageProcessor((160, 160), 182, "bilinear", (0.2,), (0.3,))
    ORIGIN.save(model, tmp_path, name=name, labels=["a", "b", "c"], processor=seen)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 1, 160, 160)
    assert same(again, model)
    assert torch.equal(again(images), model(images))
    assert again.num_classes == 3
    assert again.pretrained_cfg["label_names"] == ["a", "b", "c"]
    read = resolve_model_data_config(again)
    assert (tuple(read["input_size"]), tuple(read["mean"]), tuple(read["std"])) == ((1, 160, 160), (0.2,), (0.3,))
    known = ORIGIN.processor(f"local-dir:{tmp_path}", {}, {"in_channels": 1})
    assert known == ImageProcessor((160, 160), 182, "bilinear", (0.2,), (0.3,), floor=False)


def test_the_head_is_kept_with_its_names(saved):
    built = ORIGIN.build(saved, {}, FACTS, pretrained=True)
    assert (built.fresh, built.labels) == ([], ["cat", "dog", "cow"])
    assert same(built.model, timm.create_model(saved, pretrained=True))


def test_a_head_of_another_size_is_fresh(saved):
    built = ORIGIN.build(saved, {}, {**FACTS, "num_labels": 4}, pretrained=True)
    assert (built.fresh, built.labels) == (["fc.bias", "fc.weight"], [])
    trained = timm.create_model(saved, pretrained=True)
    assert built.model.fc.out_features == 4
    assert torch.equal(built.model.conv1[0].weight, trained.conv1[0].weight)


def test_whatever_else_the_file_lacks_is_fresh_too(tmp_path):
    """With another head timm loads loosely: a norm that the other pooling needs would be random and nobody told."""
    model = ORIGIN.build("test_vit", {"global_pool": "token"}, FACTS, pretrained=False).model
    ORIGIN.save(model, tmp_path, name="test_vit", labels=[], processor=None)
    facts = {**FACTS, "num_labels": 5}
    built = ORIGIN.build(f"local-dir:{tmp_path}", {"global_pool": "avg"}, facts, pretrained=True)
    assert built.fresh == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]


def test_label_names_by_number(saved, tmp_path):
    folder = tmp_path / "copy"
    model = timm.create_model(saved, pretrained=True)
    ORIGIN.save(model, folder, name=saved, labels=[], processor=None)
    card = json.loads((folder / "config.json").read_text())
    for names, expected in [({"2": "c", "0": "a", "1": "b"}, ["a", "b", "c"]), ({"0": "a", "7": "b", "8": "c"}, [])]:
        (folder / "config.json").write_text(json.dumps({**card, "label_names": names}))
        assert ORIGIN.build(f"local-dir:{folder}", {}, FACTS, pretrained=True).labels == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_complete_says_all_of_the_architecture(channels):
    facts = {**FACTS, "in_channels": channels}
    first = ORIGIN.build("test_vit", {"img_size": 32}, facts, pretrained=False).model
    kwargs = json.loads(json.dumps(ORIGIN.complete("test_vit", {"img_size": 32}, facts)))
    again = ORIGIN.build("test_vit", kwargs, {}, pretrained=False).model
    assert str(again) == str(first)
    again.load_state_dict(first.state_dict())


def test_complete_needs_the_folder_no_more(tmp_path):
    """A distilled model must open where the folder that its teacher came from does not exist."""
    folder = tmp_path / "model"
    model = ORIGIN.build("test_resnet", {"stem_width": 16}, {**FACTS, "in_channels": 1}, pretrained=False).model
    ORIGIN.save(model, folder, name="test_resnet", labels=["x", "y", "z"], processor=None)
    facts = {"num_labels": 3, "in_channels": 1}
    kwargs = json.loads(json.dumps(ORIGIN.complete(f"local-dir:{folder}", {}, facts)))
    processor = ORIGIN.processor(f"local-dir:{folder}", {}, facts)
    folder.rename(tmp_path / "elsewhere")
    again = ORIGIN.build(f"local-dir:{folder}", kwargs, {}, pretrained=False).model
    again.load_state_dict(model.state_dict())
    assert ORIGIN.processor(f"local-dir:{folder}", kwargs, {}) == processor
    ORIGIN.save(again, tmp_path / "again", name=f"local-dir:{folder}", labels=["x", "y", "z"], processor=None)
    assert same(timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True), model)


# images


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "resnet50.tv_in1k", "test_vit", "vit_tiny_patch16_224"])
def test_images_are_prepared_as_timm_does(name):
    known = ORIGIN.processor(name, {}, FACTS)
    cfg = timm.models.get_pretrained_cfg(name).to_dict()
    transform = create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=cfg))
    generator = torch.Generator().manual_seed(3)
    image = Image.fromarray(torch.randint(0, 256, (301, 423, 3), generator=generator, dtype=torch.uint8).numpy())
    resized = F.resize(image, [known.shorter], interpolation=F.InterpolationMode(known.interpolation))
    own = F.normalize(F.to_dtype(F.to_image(F.center_crop(resized, known.size)), scale=True), known.mean, known.std)
    assert torch.allclose(own, transform(image), atol=1e-5)


@pytest.mark.parametrize(("share", "squash"), [(0.5, (448, 448)), (0.9, (248, 248)), (1.0, None)])
def test_squashed_images(share, squash):
    known = ORIGIN.processor("resnet18", {"pretrained_cfg_overlay": {"crop_mode": "squash", "crop_pct": share}}, FACTS)
    assert (known.size, known.shorter, known.squash, known.floor) == ((224, 224), None, squash, False)


def test_padded_images_are_refused_with_a_way_out():
    overlay = {"pretrained_cfg_overlay": {"crop_mode": "border"}}
    with pytest.raises(ModelError, match=r"crop_mode 'border', which potstill does not do; .*crop_mode: squash"):
        ORIGIN.processor("resnet18", overlay, FACTS)


def test_size_and_channels_of_the_recipe():
    known = ORIGIN.processor("vit_tiny_patch16_224", {"img_size": 32}, {**FACTS, "in_channels": 1})
    assert (known.size, known.shorter, known.mean, known.std) == ((32, 32), 35, None, None)


@pytest.mark.parametrize("shorter", [None, *range(160, 260)])
def test_timm_reads_the_same_sizes_back(tmp_path, shorter):
    from potstill.models.timm_models import _seen

    said = _seen(nn.Identity(), ImageProcessor((160, 160), shorter))
    transform = create_transform((3, 160, 160), crop_pct=said["crop_pct"], crop_mode=said["crop_mode"])
    assert transform.transforms[0].size == (shorter or (160, 160))


# mistakes


@pytest.mark.parametrize(
    ("name", "kwargs", "key", "message"),
    [
        ("resnet17", {}, "model", "timm has no model 'resnet17'; did you mean 'resnet1"),
        ("resnet18.a9_in1k", {}, "model", r"no weights 'a9_in1k' of resnet18; did you mean 'a[123]_in1k'"),
        ("local-dir:/nowhere", {}, "model", r"tried the folder /nowhere .*give `pretrained: false`"),
        ("hf-hub:resnet18", {}, "model", "expected timm:hf-hub:OWNER/NAME"),
        ("hub:timm/resnet18", {}, "model", "expected timm:NAME, timm:hf-hub:OWNER/NAME or timm:local-dir:FOLDER"),
        ("test_resnet", {"drop_raet": 0.1}, "drop_raet", "has no option 'drop_raet'"),
    ],
)
def test_what_shows_without_a_network(name, kwargs, key, message):
    (problem,) = ORIGIN.check(name, kwargs, ("teacher",))
    assert problem.path == (("teacher", "model") if key == "model" else ("teacher", "kwargs", key))
    assert re.search(message, str(problem))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {}),
        ("resnet18.a1_in1k", {"drop_path_rate": 0.1, "pretrained_cfg_overlay": {"crop_pct": 1.0}}),
        ("hf-hub:timm/resnet18.a1_in1k", {"drop_rate": 0.1}),
        ("test_vit", {"img_size": 32, "num_classes": 4}),
    ],
)
def test_what_is_right_has_no_problems(name, kwargs):
    state = torch.get_rng_state()
    assert ORIGIN.check(name, kwargs, ("student",)) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_that_is_right_has_no_problems(saved):
    assert ORIGIN.check(saved, {"drop_rate": 0.1}, ("teacher",)) == []


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "hf-hub:timm/test_resnet.r160_in1k"])
def test_without_a_network_the_way_out_is_said(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        ORIGIN.build(name, {}, FACTS, pretrained=True)
    message = str(caught.value)
    assert "tried timm/test_resnet.r160_in1k" in message
    assert "give `pretrained: false`, a folder as timm:local-dir:FOLDER, or a file as `weights:`" in message


def test_unknown_options_and_models(saved):
    with pytest.raises(ModelError, match=r"'timm:test_resnet' cannot be built: .*'width'"):
        ORIGIN.build("test_resnet", {"width": 3}, FACTS, pretrained=False)
    with pytest.raises(ModelError, match="timm has no model 'tset_resnet'; did you mean 'test_resnet'"):
        ORIGIN.complete("tset_resnet", {}, FACTS)
    with pytest.raises(ModelError, match=r"cannot be built: .*'crop'"):
        ORIGIN.processor("test_resnet", {"pretrained_cfg_overlay": {"crop": 1}}, FACTS)


def test_a_pickle_in_a_folder_does_not_run(saved, tmp_path):
    folder = tmp_path / "model"
    ORIGIN.save(timm.create_model(saved, pretrained=True), folder, name=saved, labels=[], processor=None)
    (folder / "model.safetensors").unlink()
    torch.save({"conv": Mark(str(tmp_path / "ran"))}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be built"):
        ORIGIN.build(f"local-dir:{folder}", {}, FACTS, pretrained=True)
    assert not (tmp_path / "ran").exists()


class Mark:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_without_timm_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ComponentError, match=r"needs timm: pip install 'potstill\[vision\]'"):
        ORIGIN.build("resnet18", {}, FACTS, pretrained=False)
    (problem,) = ORIGIN.check("resnet18", {}, ("teacher",))
    assert "needs timm" in str(problem)
