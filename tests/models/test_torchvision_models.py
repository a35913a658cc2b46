"""Classifiers of torchvision: trained weights (from a filled cache), fresh heads, saved as torchvision loads them."""

from __future__ import annotations

import json
import re
import sys

import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.transforms.v2 import functional as F

from potstill.errors import ComponentError, ModelError
from potstill.models.inputs import respond
from potstill.models.torchvision_models import Torchvision, _drop_auxiliary, _new_head, _renamed

ORIGIN = Torchvision()
FACTS = {"num_labels": 3, "in_channels": 3, "image_size": (32, 32), "auto_model": "AutoModelForImageClassification"}
SMALL = "shufflenet_v2_x0_5"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function that puts what it is given where torchvision keeps a downloaded file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def fill(name: str, content) -> None:
        path = tmp_path / "hub" / "checkpoints" / get_model_weights(name).DEFAULT.url.rpartition("/")[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)

    return fill


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_new_model_has_a_head_for_the_task():
    built = ORIGIN.build(SMALL, {}, FACTS, pretrained=False)
    assert built.model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert (built.fresh, built.labels) == ([], [])
    assert ORIGIN.build(SMALL, {"num_classes": 5}, FACTS, pretrained=False).model.fc.out_features == 5


@pytest.mark.parametrize(("name", "head"), [(SMALL, "fc"), ("squeezenet1_1", "classifier.1")])
def test_trained_weights_with_their_head_and_with_another(cache, name, head):
    torch.manual_seed(1)
    trained = get_model(name)
    cache(name, trained.state_dict())
    whole = ORIGIN.build(name, {}, {"num_labels": 1000}, pretrained=True)
    assert same(whole.model, trained)
    assert (whole.fresh, whole.labels[:2], len(whole.labels)) == ([], ["tench", "goldfish"], 1000)
    built = ORIGIN.build(name, {"weights": "IMAGENET1K_V1"}, FACTS, pretrained=True)
    assert sorted(built.fresh) == [f"{head}.bias", f"{head}.weight"]
    assert built.labels == []
    kept = {key: value for key, value in trained.state_dict().items() if not key.startswith(f"{head}.")}
    assert all(torch.equal(built.model.state_dict()[key], value) for key, value in kept.items())
    assert built.model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out(name):
    """In training they make the answer a tuple of logits of which no loss sees but the first."""
    built = ORIGIN.build(name, {"init_weights": False}, FACTS, pretrained=False)
    assert not [key for key in built.model.state_dict() if key.lower().startswith("aux")]
    assert built.model.transform_input  # as the trained weights want; it changes answers and is no weight
    images = torch.zeros(2, 3, *((75, 75) if name == "inception_v3" else (32, 32)))
    assert list(respond(built.model.train(), {"pixel_values": images})) == ["logits"]
    assert isinstance(built.model(images), torch.Tensor)
    kwargs = ORIGIN.complete(name, {"init_weights": False}, FACTS)
    assert (kwargs["aux_logits"], kwargs["transform_input"]) == (False, True)


def test_trained_googlenet_loses_its_auxiliary_heads(cache):
    trained = get_model("googlenet", init_weights=False, transform_input=True)
    cache("googlenet", trained.state_dict())
    built = ORIGIN.build("googlenet", {}, FACTS, pretrained=True)
    assert built.fresh == ["fc.weight", "fc.bias"]
    assert isinstance(built.model.train()(torch.zeros(2, 3, 32, 32)), torch.Tensor)
    again = ORIGIN.build("googlenet", ORIGIN.complete("googlenet", {}, FACTS), {}, pretrained=False).model
    again.load_state_dict(built.model.state_dict())
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(again.eval()(images), built.model.eval()(images))


def test_each_classifier_has_one_last_layer():
    for name in list_models(module=torchvision.models):
        if name.startswith(("regnet", "vit_h", "vit_l")):
            continue  # cannot be made without memory, or as the smaller ones
        with torch.device("meta"):
            model = get_model(name, **({"init_weights": False} if name in ("googlenet", "inception_v3") else {}))
            _drop_auxiliary(model, name)
            fresh = _new_head(model, 1000, 7)
        shapes = {key: p.shape for key, p in model.named_parameters()}
        assert {key for key, shape in shapes.items() if shape[0] == 7} == set(fresh), name
        assert fresh, name
        assert all(shape[0] != 1000 for shape in shapes.values()), name


def test_a_model_without_a_head():
    with pytest.raises(ModelError, match="Sequential has no last layer of 1000 outputs"):
        _new_head(nn.Sequential(nn.Linear(2, 3)), 1000, 5)


def test_the_names_of_old_densenet_files():
    new = "features.denseblock1.denselayer12.norm1.running_mean"
    assert _renamed("features.denseblock1.denselayer12.norm.1.running_mean") == new
    assert _renamed(new) == new
    assert _renamed("features.norm5.weight") == "features.norm5.weight"


@pytest.mark.parametrize("name", [SMALL, "squeezenet1_1", "googlenet"])
def test_saved_and_loaded_by_torchvision(tmp_path, name):
    model = ORIGIN.build(name, {"init_weights": False} if name == "googlenet" else {}, FACTS, pretrained=False).model
    ORIGIN.save(model, tmp_path, name=name, labels=["a", "b", "c"], processor=None)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    further = {"aux_logits": False, "transform_input": True, "init_weights": False} if name == "googlenet" else {}
    again = get_model(name, num_classes=3, **further)
    again.load_state_dict(safetensors.torch.load_file(str(tmp_path / "model.safetensors")))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.eval()(images), model.eval()(images))


@pytest.mark.parametrize(("name", "kwargs"), [(SMALL, {}), ("mobilenet_v3_small", {"dropout": 0.4})])
def test_complete_says_all_of_the_architecture(name, kwargs):
    first = ORIGIN.build(name, kwargs, FACTS, pretrained=False).model
    completed = json.loads(json.dumps(ORIGIN.complete(name, kwargs, FACTS)))
    again = ORIGIN.build(name, completed, {}, pretrained=False).model
    assert str(again) == str(first)


def test_the_size_that_the_weights_of_a_vision_transformer_want():
    kwargs = {"weights": "IMAGENET1K_SWAG_E2E_V1"}
    completed = ORIGIN.complete("vit_b_16", kwargs, FACTS)
    assert completed == {"weights": "IMAGENET1K_SWAG_E2E_V1", "image_size": 384, "num_classes": 3}
    assert ORIGIN.processor("vit_b_16", completed, {}) == ORIGIN.processor("vit_b_16", kwargs, FACTS)


# images


@pytest.mark.parametrize(
    ("name", "kwargs", "interpolation"),
    [
        ("resnet18", {}, "bilinear"),
        ("efficientnet_b1", {"weights": "IMAGENET1K_V2"}, "bilinear"),
        ("efficientnet_b0", {}, "bicubic"),
        ("inception_v3", {}, "bilinear"),
    ],
)
def test_images_are_prepared_as_torchvision_does(name, kwargs, interpolation):
    known = ORIGIN.processor(name, kwargs, FACTS)
    assert known.interpolation == interpolation
    every = get_model_weights(name)
    transform = (every[kwargs["weights"]] if kwargs else every.DEFAULT).transforms()
    generator = torch.Generator().manual_seed(3)
    image = Image.fromarray(torch.randint(0, 256, (301, 423, 3), generator=generator, dtype=torch.uint8).numpy())
    resized = F.resize(image, [known.shorter], interpolation=F.InterpolationMode(known.interpolation))
    own = F.normalize(F.to_dtype(F.to_image(F.center_crop(resized, known.size)), scale=True), known.mean, known.std)
    assert torch.allclose(own, transform(image), atol=1e-5)


def test_another_size_of_the_recipe():
    known = ORIGIN.processor("vit_b_16", {"image_size": 112}, FACTS)
    assert (known.size, known.shorter) == ((112, 112), 128)


# mistakes


@pytest.mark.parametrize(
    ("name", "kwargs", "key", "message"),
    [
        ("resnet17", {}, "model", "torchvision has no classifier 'resnet17'; did you mean 'resnet1"),
        ("fcn_resnet50", {}, "model", "torchvision has no classifier 'fcn_resnet50'"),
        (
            "resnet50",
            {"weights": "IMAGENET1K_V3"},
            "weights",
            "has no weights 'IMAGENET1K_V3' of a classifier; did you mean 'IMAGENET1K_V[12]'",
        ),
        ("vgg16", {"weights": "IMAGENET1K_FEATURES"}, "weights", "no weights 'IMAGENET1K_FEATURES' of a classifier"),
        ("resnet18", {"widht_per_group": 64}, "widht_per_group", "has no option 'widht_per_group'"),
        ("googlenet", {"aux_logits": True}, "aux_logits", "get no loss in potstill"),
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
        ("resnet50", {"weights": "ResNet50_Weights.IMAGENET1K_V1", "zero_init_residual": True}),
        ("resnet50", {"weights": "DEFAULT"}),
        ("inception_v3", {"aux_logits": False}),
        ("regnet_y_400mf", {"num_classes": 4}),
        ("vit_b_32", {"dropout": 0.1}),
    ],
)
def test_what_is_right_has_no_problems(name, kwargs):
    state = torch.get_rng_state()
    assert ORIGIN.check(name, kwargs, ("student",)) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_all_mistakes_at_once():
    problems = ORIGIN.check("resnet18", {"weights": "V9", "depth": 3}, ("teacher",))
    assert [problem.path[-1] for problem in problems] == ["weights", "depth"]


def test_images_of_other_channels():
    with pytest.raises(ModelError, match="take images of 3 channels and the data has 1; take timm:resnet18"):
        ORIGIN.build("resnet18", {}, {**FACTS, "in_channels": 1}, pretrained=True)


def test_without_a_network_the_way_out_is_said(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(ModelError) as caught:
        ORIGIN.build(SMALL, {}, FACTS, pretrained=True)
    message = str(caught.value)
    assert "ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1 cannot be had, tried https://download.pytorch.org/" in message
    assert "give `pretrained: false`, or a file as `weights:`" in message


def test_unknown_options():
    with pytest.raises(ModelError, match=r"'torchvision:resnet18' cannot be built: .*'depth'"):
        ORIGIN.build("resnet18", {"depth": 3}, FACTS, pretrained=False)


class Mark:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_in_the_cache_does_not_run(cache, tmp_path):
    """torchvision's own builders would run it."""
    cache(SMALL, {"conv": Mark(str(tmp_path / "ran"))})
    with pytest.raises(ModelError, match="cannot be built"):
        ORIGIN.build(SMALL, {}, FACTS, pretrained=True)
    assert not (tmp_path / "ran").exists()


def test_without_torchvision_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ComponentError, match=r"needs torchvision: pip install 'potstill\[vision\]'"):
        ORIGIN.build("resnet18", {}, FACTS, pretrained=False)
    (problem,) = ORIGIN.check("resnet18", {}, ("teacher",))
    assert "needs torchvision" in str(problem)
