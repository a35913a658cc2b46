"""Weights on disk: strict, named when they do not fit, and never a pickle."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from potstill.errors import ModelError
from potstill.models.weights import load_modules, load_student, save_modules, save_student


def net(width: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3))


def bert(seed: int = 0, labels: int = 2) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=8, num_labels=labels))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16))


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def rewrite(path, change) -> None:
    state = safetensors.torch.load_file(str(path))
    change(state)
    safetensors.torch.save_file(state, str(path), metadata={"format": "pt"})


@pytest.mark.parametrize("make", [net, bert, gpt2])
def test_there_and_back(tmp_path, make):
    """GPT-2 shares its embedding with its head: saved once, loaded into both."""
    saved, fresh = make(seed=0), make(seed=1)
    assert not same(saved, fresh)
    save_student(saved, tmp_path / "model")
    load_student(fresh, tmp_path / "model")
    assert same(saved, fresh)


@pytest.mark.parametrize("make", [net, bert, gpt2])
def test_a_folder_of_a_student_holds_no_pickle(tmp_path, make):
    """A pickle runs code on whoever opens it."""
    save_student(make(), tmp_path)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json"}
    assert any(file.suffix == ".safetensors" for file in files)
    for file in files:
        assert not file.read_bytes().startswith((b"\x80", b"PK"))


def test_shared_weights_stay_shared(tmp_path):
    model = gpt2()
    save_student(model, tmp_path)
    load_student(model, tmp_path)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_gathered_weights_are_saved_in_place_of_the_models_own(tmp_path):
    model, gathered = net(seed=0), net(seed=1).state_dict()
    save_student(model, tmp_path, gathered)
    load_student(model, tmp_path)
    assert all(torch.equal(value, gathered[name]) for name, value in model.state_dict().items())


def test_missing_left_over_and_other_shapes_are_named(tmp_path):
    save_student(net(), tmp_path)

    def change(state):
        state["0.wieght"] = state.pop("0.weight")
        state["2.weight"] = torch.zeros(3, 9)

    rewrite(tmp_path / "model.safetensors", change)
    with pytest.raises(ModelError) as caught:
        load_student(net(), tmp_path)
    message = str(caught.value)
    assert "does not fit Sequential" in message
    assert "'0.weight' is missing (the file has '0.wieght')" in message
    assert "'0.wieght' is left over" in message
    assert "'2.weight' expected [3, 5], got [3, 9]" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("2.weight"), "'2.weight' is missing"),
        (lambda state: state.pop("1.running_mean"), "'1.running_mean' is missing"),
        (lambda state: state.update(extra=torch.zeros(2)), "'extra' is left over"),
    ],
)
def test_each_of_them_alone_is_refused(tmp_path, change, message):
    save_student(net(), tmp_path)
    rewrite(tmp_path / "model.safetensors", change)
    with pytest.raises(ModelError, match=message):
        load_student(net(seed=1), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("classifier.weight"), "'classifier.weight' is missing"),
        (lambda state: state.update(extra=torch.zeros(2)), "'extra' is left over"),
        (
            lambda state: state.update({"classifier.weight": torch.zeros(3, 8)}),
            r"'classifier.weight' expected \[2, 8\], got \[3, 8\]",
        ),
    ],
    ids=["missing", "left over", "other shape"],
)
def test_transformers_models_are_strict_too(tmp_path, change, message):
    """`from_pretrained` fills what is missing with random numbers and goes on: a resumed student with a new head."""
    save_student(bert(), tmp_path)
    rewrite(tmp_path / "model.safetensors", change)
    fresh = bert(seed=1)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        load_student(fresh, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_a_pickle_is_not_read_instead(tmp_path):
    model = bert()
    save_student(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="expected weights in"):
        load_student(bert(), tmp_path)


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x04K\x01."])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors does not fit Sequential: the file is damaged"):
        load_modules(net(), path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"expected weights in .*objective\.safetensors, and there is no such file"):
        load_modules(net(), tmp_path / "objective.safetensors")


class Average:
    """A teacher source with a state that is no module."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor([value])

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_anything_with_a_state_is_saved(tmp_path):
    path = tmp_path / "sources.safetensors"
    save_modules(Average(3.0), path)
    other = Average(0.0)
    load_modules(other, path)
    assert other.value.item() == 3.0


def test_what_has_no_state_writes_and_reads_nothing(tmp_path):
    save_modules(lambda batch: {}, tmp_path / "none")
    load_modules(lambda batch: {}, tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_weights_keep_their_type(tmp_path):
    save_student(net().half(), tmp_path)
    assert safetensors.torch.load_file(str(tmp_path / "model.safetensors"))["0.weight"].dtype == torch.float16
    half = net(seed=1).half()
    load_student(half, tmp_path)
    assert half[0].weight.dtype == torch.float16
    save_student(bert().bfloat16(), tmp_path / "bert")
    narrow = bert(seed=1).bfloat16()
    load_student(narrow, tmp_path / "bert")
    assert narrow.dtype == torch.bfloat16
    assert same(narrow, bert().bfloat16())
