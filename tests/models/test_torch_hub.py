"""Models of PyTorch Hub, from a local folder and from a repository that is in the cache already."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from potstill.errors import ModelError
from potstill.models.torch_hub import TorchHub, what_runs

ORIGIN = TorchHub()
FACTS = {"num_labels": 3, "in_channels": 3}
HUBCONF = '''
dependencies = ["torch"]
from torch import nn
from parts_of_hub_test import layer

def small(pretrained=False, num_classes=10, width=4):
    """A model."""
    model = layer(width, num_classes)
    if pretrained:
        nn.init.ones_(model.weight)
    return model

def labelled(num_labels, **rest):
    model = layer(2, num_labels)
    model.rest = rest
    return model

def vision(*, weights=None, **kwargs):
    model = layer(2, kwargs.get("num_classes", 7))
    model.weights = weights
    return model

def text():
    return "no model"

def broken():
    raise KeyError("oh no")

def _hidden():
    return nn.Identity()
'''


@pytest.fixture
def repo(tmp_path):
    folder = tmp_path / "repo"
    write(folder)
    return folder


def write(folder) -> None:
    folder.mkdir(parents=True)
    (folder / "hubconf.py").write_text(HUBCONF)
    (folder / "parts_of_hub_test.py").write_text("from torch import nn\nlayer = nn.Linear\n")


def test_the_entry_gets_what_its_signature_names(repo):
    model = ORIGIN.build(f"{repo}/small", {"width": 6}, FACTS, pretrained=True).model
    assert model.weight.shape == (3, 6)
    assert (model.weight == 1).all()
    fresh = ORIGIN.build(f"{repo}/small", {"pretrained": True}, FACTS, pretrained=False).model
    assert not (fresh.weight == 1).all()
    assert ORIGIN.build(f"{repo}/small", {"num_classes": 5}, FACTS, pretrained=False).model.out_features == 5
    labelled = ORIGIN.build(f"{repo}/labelled", {"other": 1}, FACTS, pretrained=False).model
    assert (labelled.out_features, labelled.rest) == (3, {"other": 1})


def test_an_entry_that_names_its_weights(repo):
    """Those of torchvision: without it a teacher with random weights would be taken for a trained one."""
    assert ORIGIN.build(f"{repo}/vision", {}, FACTS, pretrained=True).model.weights == "DEFAULT"
    assert ORIGIN.build(f"{repo}/vision", {"weights": "V1"}, FACTS, pretrained=True).model.weights == "V1"
    assert ORIGIN.build(f"{repo}/vision", {"weights": "V1"}, FACTS, pretrained=False).model.weights is None


def test_an_entry_that_cannot_be_told_is_warned_of(repo, caplog):
    ORIGIN.build(f"{repo}/labelled", {}, FACTS, pretrained=True)
    assert "has no option 'pretrained'" in caplog.text


def test_complete_and_save(repo, tmp_path):
    name = f"{repo}/small"
    kwargs = ORIGIN.complete(name, {"width": 6}, FACTS)
    assert kwargs == {"num_classes": 3, "width": 6}
    model = ORIGIN.build(name, {"width": 6}, FACTS, pretrained=True).model
    ORIGIN.save(model, tmp_path / "out", name=name, labels=[], processor=None)
    again = ORIGIN.build(name, kwargs, {}, pretrained=False).model
    again.load_state_dict(safetensors.torch.load_file(str(tmp_path / "out" / "model.safetensors")))
    assert torch.equal(again.weight, model.weight)
    assert ORIGIN.processor(name, {}, FACTS) is None


def test_a_repository_of_github(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    write(tmp_path / "hub" / "someone_things_v1")
    model = ORIGIN.build("someone/things:v1/small", {}, FACTS, pretrained=True).model
    assert isinstance(model, nn.Linear)
    assert model.out_features == 3
    assert (model.weight == 1).all()


def test_no_network_and_nothing_in_the_cache(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(ModelError, match=r"neither from GitHub nor from the cache of PyTorch Hub .*FOLDER/ENTRY"):
        ORIGIN.build("someone/things:v1/small", {}, FACTS, pretrained=True)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("smal", "has no entry 'smal'; did you mean 'small'"),
        ("hidden", "has no entry 'hidden'"),
        ("text", r"to return an nn\.Module, got str"),
        ("broken", "KeyError: 'oh no'"),
        ("labelled", "missing 1 required positional argument: 'num_labels'"),
    ],
)
def test_mistakes(repo, entry, message):
    with pytest.raises(ModelError, match=message):
        ORIGIN.build(f"{repo}/{entry}", {}, {}, pretrained=False)


def test_unknown_options(repo):
    with pytest.raises(ModelError, match="unexpected keyword argument 'widht'"):
        ORIGIN.build(f"{repo}/small", {"widht": 3}, FACTS, pretrained=False)


def test_a_hubconf_that_does_not_run(repo):
    (repo / "hubconf.py").write_text("import not_installed_anywhere")
    with pytest.raises(ModelError, match="No module named 'not_installed_anywhere'"):
        ORIGIN.build(f"{repo}/small", {}, FACTS, pretrained=False)


def test_missing_dependencies_are_named(repo):
    (repo / "hubconf.py").write_text("dependencies = ['not_installed']\ndef small(): ...")
    with pytest.raises(ModelError, match="Missing dependencies: not_installed"):
        ORIGIN.build(f"{repo}/small", {}, FACTS, pretrained=False)


@pytest.mark.parametrize(
    "name", ["", "small", "pytorch/vision", "/nowhere/at/all/small", "a/b/c/d", "a/b/not an entry"]
)
def test_names_that_are_none(name):
    (problem,) = ORIGIN.check(name, {}, ("teacher",))
    assert problem.path == ("teacher", "model")
    assert "expected torchhub:OWNER/REPO/ENTRY" in str(problem)
    with pytest.raises(ModelError, match="expected torchhub:OWNER/REPO/ENTRY"):
        ORIGIN.build(name, {}, FACTS, pretrained=False)


def test_check_runs_nothing(repo, tmp_path):
    (repo / "hubconf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert ORIGIN.check(f"{repo}/small", {}, ("teacher",)) == []
    assert ORIGIN.check("pytorch/vision:v0.10.0/resnet18", {}, ("teacher",)) == []
    assert ORIGIN.processor(f"{repo}/small", {}, FACTS) is None
    assert str(repo) in what_runs(f"{repo}/small")
    assert not (tmp_path / "ran").exists()
    (problem,) = ORIGIN.check(f"{tmp_path}/small", {}, ("teacher",))
    assert "expected a folder with hubconf.py" in str(problem)


def test_what_runs(repo):
    assert what_runs(f"{repo}/small") == f"the entry 'small' of {repo / 'hubconf.py'}"
    assert what_runs("pytorch/vision:v0.10/resnet18") == (
        "the entry 'resnet18' of hubconf.py in the repository pytorch/vision:v0.10 on GitHub"
    )
    assert "nonsense" in what_runs("nonsense")
