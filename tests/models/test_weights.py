"""Weights on disk: strict, named when they do not fit, and never a pickle."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from potstill.errors import ModelError
from potstill.models.weights import load_modules, load_student, load_weights, save_modules, save_student


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


# files of other people


def prefixed(prefix: str, state) -> dict:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".th", ".bin"])
def test_a_file_that_fits(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    state = net(seed=1).state_dict()
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, str(path))
    else:
        torch.save(state, path)
    module = net(seed=0)
    assert load_weights(module, path) is None
    assert same(module, net(seed=1))


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda state: {"state_dict": state, "epoch": 3}, "the weights were found below 'state_dict'"),
        (lambda state: {"model": state, "optimizer": {"lr": 0.1}}, "below 'model'"),
        (lambda state: {"model_state_dict": state}, "below 'model_state_dict'"),
        (lambda state: {"net": state, "acc": 93.0}, "below 'net'"),
        (lambda state: {"model_ema": state, "args": None}, "below 'model_ema'"),
        (lambda state: {"model": {"config": 3}, "ema": state}, "below 'ema'"),
        (lambda state: prefixed("module.", state), "the prefix 'module.' was dropped from 9 names"),
        (lambda state: prefixed("_orig_mod.", state), "the prefix '_orig_mod.' was dropped from 9 names"),
        (lambda state: prefixed("module.student.net.", state), "the prefix 'module.student.net.' was dropped"),
        (lambda state: {"state_dict": prefixed("model.", state)}, "below 'state_dict'; the prefix 'model.' was"),
    ],
)
def test_what_wraps_a_state_dict_is_taken_off_and_told(tmp_path, wrap, note):
    torch.save(wrap(net(seed=1).state_dict()), tmp_path / "w.pth")
    module = net(seed=0)
    assert note in load_weights(module, tmp_path / "w.pth")
    assert same(module, net(seed=1))


def test_of_several_models_in_a_file_the_plain_one_is_taken(tmp_path):
    torch.save({"model_ema": net(seed=2).state_dict(), "model": net(seed=1).state_dict()}, tmp_path / "w.pth")
    module = net(seed=0)
    assert load_weights(module, tmp_path / "w.pth") == "the weights were found below 'model'"
    assert same(module, net(seed=1))


def test_a_prefix_that_the_module_has_is_put_before(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.body = net(seed=seed)

    torch.save(net(seed=1).state_dict(), tmp_path / "w.pt")
    module = Wrapped(seed=0)
    assert load_weights(module, tmp_path / "w.pt") == "the prefix 'body.' was put before 9 names"
    assert same(module.body, net(seed=1))
    torch.save(prefixed("module.", net(seed=2).state_dict()), tmp_path / "w.pt")
    note = "the prefix 'module.' was dropped from 9 names; the prefix 'body.' was put before 9 names"
    assert load_weights(module, tmp_path / "w.pt") == note
    assert same(module.body, net(seed=2))


def test_old_files_count_no_batches(tmp_path):
    state = net(seed=1).state_dict()
    count = state.pop("1.num_batches_tracked")
    torch.save(dict(state), tmp_path / "w.th")
    module = net(seed=0)
    assert load_weights(module, tmp_path / "w.th") is None
    assert torch.equal(module[1].num_batches_tracked, count)
    assert torch.equal(module[0].weight, state["0.weight"])


def test_a_weight_that_is_shared_may_be_in_the_file_once(tmp_path):
    save_student(gpt2(seed=1), tmp_path)
    fresh = gpt2(seed=0)
    assert load_weights(fresh, tmp_path / "model.safetensors") is None
    assert same(fresh, gpt2(seed=1))
    state = {
        name: value for name, value in gpt2(seed=2).state_dict().items() if "wte" not in name and "lm_" not in name
    }
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"'lm_head.weight' is missing; 'transformer.wte.weight' is missing"):
        load_weights(fresh, tmp_path / "w.pt")


def refusal(module: nn.Module, path, state) -> str:
    torch.save(state, path)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_weights(module, path)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    return str(caught.value)


def test_missing_left_over_and_other_shapes_of_a_file(tmp_path):
    state = prefixed("module.", net().state_dict())
    state["module.0.wieght"] = state.pop("module.0.weight")
    state["module.2.weight"] = torch.zeros(3, 9)
    message = refusal(net(), tmp_path / "w.pth", state)
    assert "w.pth does not fit Sequential: '0.weight' is missing (the file has '0.wieght')" in message
    assert "'0.wieght' is left over; '2.weight' expected [3, 5], got [3, 9]" in message
    assert "with 'module.' dropped from the file's names" in message


def test_a_head_for_other_classes_is_told_as_such(tmp_path):
    state = net().state_dict()
    state["2.weight"], state["2.bias"] = torch.zeros(100, 5), torch.zeros(100)
    message = refusal(net(), tmp_path / "w.pth", state)
    assert "'2.bias' expected [3], got [100]; '2.weight' expected [3, 5], got [100, 5]" in message
    assert "'2' has 100 outputs in the file and 3 in the model" in message
    assert "give the model 100 classes" in message
    assert "outputs in the file" not in refusal(net(), tmp_path / "w.pth", net(width=7).state_dict())


def test_a_part_of_the_file_that_would_fit_is_named(tmp_path):
    state = prefixed("student.", net().state_dict()) | prefixed("teacher.net.", net(width=9).state_dict())
    message = refusal(net(), tmp_path / "w.pth", state)
    assert "the 9 of 18 names that begin with 'student.' would fit; save these alone" in message


def test_long_lists_are_cut_and_counted(tmp_path):
    deep = nn.Sequential(*(nn.Linear(1, 1) for _ in range(20)))
    message = refusal(deep, tmp_path / "w.pth", {f"layer{n}.{kind}": torch.zeros(1) for n in range(9) for kind in "ab"})
    assert message.count("is missing") == 4
    assert message.count("is left over") == 4
    assert "… (40 missing, 18 left over, 0 of another shape)" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"epoch": 3, "history": [1, 2]},
            r"expected the state dict of a model in .*got a dict of \['epoch', 'history'\]",
        ),
        ({}, "got a dict of"),
        ([torch.zeros(2)], "got list"),
        (torch.zeros(2), "got Tensor"),
        ({"epoch": 1, "0.weight": torch.zeros(5, 4)}, "got a dict of"),
        ({"student": {"a": torch.zeros(1)}}, "got a dict of"),
    ],
)
def test_a_file_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=message):
        load_weights(net(), tmp_path / "w.pth")


class Mark:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("whole", [True, False])
def test_nothing_but_tensors_is_unpickled(tmp_path, whole):
    mark = Mark(str(tmp_path / "ran"))
    torch.save(mark if whole else {"state_dict": net().state_dict(), "extra": mark}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"holds more than weights, and nothing else is unpickled .*\.safetensors"):
        load_weights(net(), tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_a_saved_module_is_no_file_of_weights(tmp_path):
    torch.save(net(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds more than weights"):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut off"])
def test_a_damaged_file_of_weights(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        load_weights(net(), tmp_path / name)


def test_no_such_file_and_no_such_kind(tmp_path):
    with pytest.raises(ModelError, match=r"expected weights in .*and there is no such file"):
        load_weights(net(), tmp_path / "w.pth")
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(ModelError, match=r"expected a file of weights \(\.safetensors, \.pt, .*got .*w\.h5"):
        load_weights(net(), tmp_path / "w.h5")
