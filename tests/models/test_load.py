"""From a reference to a model: reproducible, strict, and no code that nobody allowed."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from potstill.errors import CodeNotAllowedError, ModelError
from potstill.models.load import CARD, Blueprint, find_factory, load_model, save_model
from potstill.models.plain import ConvNet, Mlp
from potstill.models.weights import save_student

FACTS = {"num_labels": 3, "in_features": 4, "in_channels": 1, "image_size": (8, 8)}


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def own_module(tmp_path, monkeypatch) -> str:
    """A person's own module on the path, which leaves a mark when it runs."""
    (tmp_path / "mine_for_load.py").write_text(
        "import pathlib\n"
        "from torch import nn\n"
        "pathlib.Path(__file__).with_name('ran').touch()\n"
        "def make(num_labels, width=4, **rest):\n"
        "    return nn.Linear(width, num_labels)\n"
        "def text(num_labels):\n"
        "    return 'no model'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "mine_for_load"


def test_a_model_of_our_own_gets_the_facts_that_it_takes():
    model = Blueprint("potstill:mlp", {"hidden": [6, 5]}).build(FACTS, seed=0)
    assert isinstance(model, Mlp)
    assert model(torch.zeros(2, 4)).shape == (2, 3)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [(6, 4), (5, 6), (3, 5)]
    assert isinstance(Blueprint("potstill:convnet").build(FACTS, seed=0), ConvNet)


def test_what_the_recipe_says_wins_over_the_facts():
    assert Blueprint("potstill:mlp", {"num_labels": 7}).build(FACTS, seed=0).head.out_features == 7
    assert Blueprint("potstill:mlp", {"hidden": [2]}).complete(Mlp, FACTS) == {
        "num_labels": 3,
        "in_features": 4,
        "hidden": [2],
    }


@pytest.mark.parametrize("model", ["potstill:mlp", "potstill:convnet"])
def test_the_same_seed_gives_the_same_weights(model):
    """Baseline and distilled student must start from the same weights, whatever was drawn in between."""
    blueprint = Blueprint(model)
    first = blueprint.build(FACTS, seed=5)
    torch.randn(17)
    assert same(blueprint.build(FACTS, seed=5), first)
    assert not same(blueprint.build(FACTS, seed=6), first)


def test_the_global_generators_are_left_alone(monkeypatch):
    """Else building one more model changes the dropout of the next training; the accelerators' generators too."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    Blueprint("potstill:mlp", {"hidden": [8]}).build(FACTS, seed=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert seeded == []


def test_weights_are_loaded_strictly(tmp_path):
    source = Blueprint("potstill:mlp", {"hidden": [6]}).build(FACTS, seed=3)
    save_student(source, tmp_path)
    weights = tmp_path / "model.safetensors"
    assert same(Blueprint("potstill:mlp", {"hidden": [6]}, weights).build(FACTS, seed=0), source)
    with pytest.raises(ModelError, match=r"does not fit Mlp: .*expected \[5, 4\], got \[6, 4\]"):
        Blueprint("potstill:mlp", {"hidden": [5]}, weights).build(FACTS, seed=0)


def test_saved_and_loaded(tmp_path):
    model = Blueprint("potstill:convnet", {"widths": [4, 8]}).build(FACTS, seed=2)
    model.stages[0][1].running_mean.fill_(0.5)  # BatchNorm's statistics are part of the model
    card = {"model": "potstill:convnet", "kwargs": {"widths": [4, 8], "in_channels": 1, "num_labels": 3}, "task": "ü"}
    save_model(model, tmp_path / "m", card)
    again, read = load_model(tmp_path / "m")
    assert read == card
    assert same(again, model)
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == ["model.safetensors", CARD]
    inputs = torch.randn(2, 1, 8, 8)
    assert torch.equal(again.eval()(inputs), model.eval()(inputs))


def test_a_saved_folder_is_a_reference(tmp_path):
    model = Blueprint("potstill:mlp").build(FACTS, seed=2)
    save_model(model, tmp_path, {"model": "potstill:mlp", "kwargs": {"in_features": 4, "num_labels": 3}})
    blueprint = Blueprint(str(tmp_path))
    assert same(blueprint.build({}, seed=99), model)
    assert blueprint.check(("teacher",), allow_code=False) == []


@pytest.mark.parametrize("card", ["", "{", "[]", '{"model": "potstill:mlp"}', '{"model": "potstill:mlp", "kwargs": 3}'])
def test_a_damaged_card_is_named(tmp_path, card):
    save_student(Blueprint("potstill:mlp").build(FACTS, seed=0), tmp_path)
    (tmp_path / CARD).write_text(card)
    with pytest.raises(ModelError, match=r"potstill\.json is damaged"):
        load_model(tmp_path)


def test_a_folder_without_a_card(tmp_path):
    with pytest.raises(ModelError, match=r"expected a folder with potstill\.json"):
        load_model(tmp_path)


def test_a_card_and_weights_that_do_not_fit(tmp_path):
    save_student(Blueprint("potstill:mlp", {"hidden": [6]}).build(FACTS, seed=0), tmp_path)
    (tmp_path / CARD).write_text(json.dumps({"model": "potstill:mlp", "kwargs": {"in_features": 4, "num_labels": 3}}))
    with pytest.raises(ModelError, match=r"'body\.1\.weight' is left over"):
        load_model(tmp_path)


# code


def test_a_persons_own_factory(own_module, tmp_path):
    model = Blueprint(f"{own_module}:make", {"width": 6, "other": 1}).build(FACTS, seed=0)
    assert model.weight.shape == (3, 6)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("reference", ["mine_for_load:make", "os:system", "potstill.runs.folder:os.system"])
def test_code_that_nobody_allowed_does_not_run(own_module, tmp_path, reference):
    """A recipe from the net must not run a module, and not reach one through potstill's own either."""
    with pytest.raises(CodeNotAllowedError, match=r"would import and run .* allow it with --allow-code"):
        Blueprint(reference, {"command": f"touch {tmp_path / 'ran'}"}).build(FACTS, seed=0, allow_code=False)
    problems = Blueprint(reference).check(("student",), allow_code=False)
    assert [problem.path for problem in problems] == [("student", "model")]
    assert not (tmp_path / "ran").exists()


def test_a_saved_folder_cannot_bring_code(own_module, tmp_path):
    folder = tmp_path / "model"
    save_model(nn.Linear(4, 3), folder, {"model": f"{own_module}:make", "kwargs": {"num_labels": 3}})
    with pytest.raises(CodeNotAllowedError):
        load_model(folder, allow_code=False)
    with pytest.raises(CodeNotAllowedError):
        Blueprint(str(folder)).build({}, seed=0, allow_code=False)
    assert not (tmp_path / "ran").exists()
    assert isinstance(load_model(folder)[0], nn.Linear)


def test_a_registered_component_by_its_path_is_allowed():
    assert find_factory("potstill.models.plain:Mlp", allow_code=False) is Mlp


# mistakes


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("potstill:mpl", "there is no model 'mpl'; did you mean 'mlp'"),
        ("mlp", r"expected potstill:NAME, .* got 'mlp'; did you mean 'potstill:mlp'"),
        ("bert-base", "expected potstill:NAME, package.module:factory or a folder"),
    ],
)
def test_unknown_references(reference, message):
    with pytest.raises(ModelError, match=message):
        find_factory(reference)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hiden": [3]}, "has no option 'hiden'; did you mean 'hidden'"),
        ({"hidden": "wide"}, "valid list, got 'wide'"),
        ({"hidden": [0]}, "greater than 0"),
        ({"hidden": ["64"]}, "got \\['64'\\]"),
        ({"dropout": 1.0}, "less than 1"),
        ({"in_features": 4.0}, "expected a whole number, got 4.0"),
    ],
)
def test_wrong_options(kwargs, message):
    with pytest.raises(ModelError, match=message):
        Blueprint("potstill:mlp", kwargs).build(FACTS, seed=0)


def test_a_missing_fact_is_named():
    with pytest.raises(ModelError, match="needs the option 'in_features'"):
        Blueprint("potstill:mlp").build({"num_labels": 3}, seed=0)


def test_a_factory_of_something_else(own_module):
    with pytest.raises(ModelError, match=r"to return an nn\.Module, got str"):
        Blueprint(f"{own_module}:text").build(FACTS, seed=0)


@pytest.mark.parametrize(
    ("model", "kwargs", "expected"),
    [
        ("potstill:mlp", {}, {}),
        ("potstill:mlp", {"hidden": [8]}, {}),
        ("potstill:mpl", {}, {("student", "model"): "did you mean 'mlp'"}),
        (
            "potstill:mlp",
            {"hiden": [8], "dropout": "much", "hidden": [-1]},
            {
                ("student", "kwargs", "hiden"): "did you mean 'hidden'?",
                ("student", "kwargs", "dropout"): "valid number",
                ("student", "kwargs", "hidden", 0): "greater than 0",
            },
        ),
    ],
)
def test_check_needs_no_data(model: str, kwargs: dict[str, Any], expected: dict):
    problems = Blueprint(model, kwargs).check(("student",), allow_code=False)
    assert {problem.path for problem in problems} == set(expected)
    for problem in problems:
        assert expected[problem.path] in str(problem)


class TestWeightsByAddress:
    """A file with an address is fetched once; a name that holds the beginning of its hash is held to it."""

    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def published(self, folder, name: str) -> str:
        folder.mkdir(exist_ok=True)
        source = Blueprint("potstill:mlp", {"hidden": [6]}).build(FACTS, seed=3)
        torch.save(
            {"state_dict": {f"module.{key}": value for key, value in source.state_dict().items()}}, folder / name
        )
        return (folder / name).as_uri()

    def test_it_is_fetched_once(self, tmp_path, caplog):
        caplog.set_level("INFO")
        address = self.published(tmp_path / "web", "mlp.pth")
        wanted = Blueprint("potstill:mlp", {"hidden": [6]}).build(FACTS, seed=3)
        assert same(Blueprint("potstill:mlp", {"hidden": [6]}, address).build(FACTS, seed=0), wanted)
        assert "the prefix 'module.' was dropped" in caplog.text
        (tmp_path / "web/mlp.pth").unlink()
        assert same(Blueprint("potstill:mlp", {"hidden": [6]}, address).build(FACTS, seed=0), wanted)

    def test_another_content_than_its_name_says_is_refused(self, tmp_path):
        address = self.published(tmp_path / "web", "mlp-0123abcd.pth")
        with pytest.raises(ModelError, match="cannot be fetched: invalid hash value"):
            Blueprint("potstill:mlp", {"hidden": [6]}, address).build(FACTS, seed=0)
        assert not (tmp_path / "hub/checkpoints/mlp-0123abcd.pth").exists()

    def test_an_address_where_there_is_nothing(self, tmp_path):
        with pytest.raises(ModelError, match="cannot be fetched"):
            Blueprint("potstill:mlp", {}, (tmp_path / "none.pth").as_uri()).build(FACTS, seed=0)


class TestEcosystems:
    """A reference finds its ecosystem, and what was saved comes back with nothing but its folder."""

    @pytest.mark.parametrize(
        ("model", "kwargs", "keep"),
        [
            ("timm:test_vit", {}, None),
            ("timm:test_vit", {"depth": 4}, (0, 2)),
            ("torchvision:shufflenet_v2_x0_5", {}, None),
            ("potstill:cifar_resnet", {"depth": 8}, None),
        ],
    )
    def test_a_saved_model_answers_alike(self, tmp_path, model, kwargs, keep):
        pytest.importorskip(model.split(":")[0])
        facts = {"num_labels": 3, "label_names": ["a", "b", "c"], "in_channels": 3}
        blueprint = Blueprint(model, kwargs, pretrained=False, keep_blocks=keep, container="blocks" if keep else None)
        made = blueprint.build(facts, seed=1).eval()
        save_model(made, tmp_path / "m", {**blueprint.card(facts), "settings": {"label_names": ["a", "b", "c"]}})
        again, card = load_model(tmp_path / "m", allow_code=False)
        images = torch.randn(2, 3, 160, 160)
        with torch.no_grad():
            assert torch.equal(made(images), again.eval()(images))
        assert card["settings"]["label_names"] == ["a", "b", "c"]
        if keep:
            further = Blueprint(str(tmp_path / "m"), keep_blocks=(1,), container="blocks")
            assert further.card(facts)["keep_blocks"] == [2]  # of the first model's blocks

    def test_a_folder_with_pretrained_false_is_its_architecture(self, tmp_path):
        blueprint = Blueprint("potstill:mlp", {"hidden": [6]})
        save_model(blueprint.build(FACTS, seed=1), tmp_path / "m", blueprint.card(FACTS))
        new = Blueprint(str(tmp_path / "m"), pretrained=False).build(FACTS, seed=2)
        assert same(new, blueprint.build(FACTS, seed=2))
