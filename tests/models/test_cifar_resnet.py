"""The residual networks for CIFAR: the sizes of the paper, and the accuracy of published weights."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from potstill.errors import ModelError
from potstill.models.cifar_resnet import CifarResNet
from potstill.models.load import Blueprint
from potstill.models.weights import load_weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.73)])
def test_the_sizes_of_the_paper(depth, parameters):
    """Table 6 counts them in millions."""
    with torch.device("meta"):
        model = CifarResNet(depth, 10)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


def test_shapes_and_names():
    model = CifarResNet(8, 5, in_channels=1)
    seen = {}
    for name in ("layer1", "layer2", "layer3"):
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.shape}))
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert seen == {"layer1": (2, 16, 32, 32), "layer2": (2, 32, 16, 16), "layer3": (2, 64, 8, 8)}
    assert model(torch.randn(2, 1, 20, 28)).shape == (2, 5)
    assert {name.split(".")[0] for name in model.state_dict()} == {
        "conv1",
        "bn1",
        "layer1",
        "layer2",
        "layer3",
        "linear",
    }


def test_the_shortcut_pads_with_zeros():
    model = CifarResNet(8, 5)
    block = model.layer2[0]
    nn.init.zeros_(block.bn2.weight)
    features = torch.rand(1, 16, 4, 4)
    out = block.eval()(features)
    assert torch.equal(out[:, 8:24], features[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_the_initialisation_of_the_paper():
    """Variance two over the inputs of a unit (He et al., arXiv:1502.01852)."""
    torch.manual_seed(0)
    weight = CifarResNet(20, 10).layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("depth", [2, 18, 21, 0, -4])
def test_other_depths(depth):
    with pytest.raises(ModelError, match=r"expected a depth of 6n \+ 2, such as 20"):
        CifarResNet(depth, 10)
    (problem,) = Blueprint("potstill:cifar_resnet", {"depth": depth}).check(("student",), allow_code=False)
    assert problem.path == ("student", "kwargs", "depth")
    assert "expected a depth of 6n + 2" in str(problem)


def test_by_its_name():
    model = Blueprint("potstill:cifar_resnet", {"depth": 8}).build({"num_labels": 4, "in_channels": 1}, seed=0)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize(
    ("depth", "file", "names", "accuracy"),
    [(20, "resnet20-12fca82f.th", 97, 0.915), (56, "resnet56-4bfd9763.th", 277, 0.926)],
)
def test_published_weights_are_as_good_as_published(real_data, depth, file, names, accuracy):
    path = real_data / "teachers" / file
    if not path.is_file():
        pytest.skip(f"the published weights of the CIFAR ResNet-{depth} are not at {path}")
    model = CifarResNet(depth, 10)
    note = load_weights(model, path)
    assert note == f"the weights were found below 'state_dict'; the prefix 'module.' was dropped from {names} names"
    table = pd.read_parquet(real_data / "cifar10" / "test.parquet")
    raw = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in table["img"]])
    images = torch.from_numpy(raw).permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.inference_mode():
        said = torch.cat([model.eval()(part).argmax(-1) for part in images.split(250)])
    assert (said == torch.tensor(table["label"].tolist())).float().mean().item() == pytest.approx(accuracy)
