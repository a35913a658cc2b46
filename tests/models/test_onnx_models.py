"""Graphs of ONNX as teachers: what they answer, take and refuse, and that they come back from disk."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from potstill.errors import ModelError
from potstill.models import load
from potstill.models.inputs import accepted_inputs, respond
from potstill.models.load import Blueprint, load_model, save_model
from potstill.teachers.cached import weights_hash
from potstill.teachers.live import Live
from tests.local_models import SIZES, word_pieces

onnx = pytest.importorskip("onnx", reason="needs potstill[export]: onnx")
pytest.importorskip("onnxruntime", reason="needs potstill[export]: onnxruntime")
pytest.importorskip("onnxscript", reason="torch exports to ONNX by onnxscript")

from potstill.models.onnx_models import Onnx, OnnxModel  # noqa: E402

FACTS = {"num_labels": 3, "in_features": 5}


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(load.ORIGINS, "onnx", "potstill.models.onnx_models:Onnx")


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, num_hidden_layers=1, num_labels=3, return_dict=True, **SIZES)
    return transformers.BertForSequenceClassification(config).eval()


class Named(nn.Module):
    """Gives the tensors of a transformers model, which the exporter follows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return found.hidden_states[1], found.logits


def written(path: Path, output: str, *, softmax: bool = False) -> Path:
    """The layers of :func:`mlp`, put together by hand."""
    state = {name: value.numpy() for name, value in mlp().state_dict().items()}
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    last = "scores" if softmax else output
    nodes = [
        helper.make_node("Gemm", ["x", "0.weight", "0.bias"], ["first"], transB=1),
        helper.make_node("Relu", ["first"], ["hidden"]),
        helper.make_node("Gemm", ["hidden", "2.weight", "2.bias"], [last], transB=1),
    ]
    nodes += [helper.make_node("Softmax", [last], [output], axis=-1)] if softmax else []
    sides = [[helper.make_tensor_value_info(name, floats, ["batch", size])] for name, size in (("x", 5), (output, 3))]
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in state.items()]
    graph = helper.make_graph(nodes, "mlp", *sides, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("plain") / "mlp.onnx", "answer")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A tiny BERT with its weights in a file of their own, and a tokenizer beside it."""
    path = tmp_path_factory.mktemp("text") / "model.onnx"
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = (torch.randint(5, 40, (2, 7)), torch.ones(2, 7, dtype=torch.long))
    options = {"input_names": ["input_ids", "attention_mask"], "output_names": ["hidden", "logits"]}
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                Named(bert()),
                inputs,
                str(path),
                dynamic_shapes=(axes, axes),
                external_data=True,
                dynamo=True,
                optimize=False,
                verbose=False,
                **options,
            )
    finally:
        logging.disable(logging.NOTSET)
    word_pieces().save_pretrained(path.parent)
    labels = {"id2label": {"0": "bad", "1": "fair", "2": "good"}, "model_type": "bert"}
    (path.parent / "config.json").write_text(json.dumps(labels))
    return path


def model_of(path: Path, **kwargs: object) -> OnnxModel:
    found = Blueprint(f"onnx:{path}", kwargs).build(FACTS, seed=0)
    assert isinstance(found, OnnxModel)
    return found


def with_metadata(path: Path, folder: Path, **metadata: str) -> Path:
    graph = onnx.load(str(path))
    onnx.helper.set_model_props(graph, metadata)
    onnx.save(graph, str(folder / "named.onnx"))
    return folder / "named.onnx"


def texts(size: int = 5, length: int = 11) -> dict[str, torch.Tensor]:
    mask = (torch.arange(length)[None] < torch.arange(3, 3 + size)[:, None]).long()
    ids = torch.randint(5, 40, (size, length), generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": torch.zeros(size),
        "sample_id": torch.arange(size),
    }


class TestAnswers:
    def test_a_plain_graph_gets_the_main_input_and_says_what_torch_says(self, plain):
        model = model_of(plain)
        for size in (1, 6):
            batch = {"features": torch.randn(size, 5), "sample_id": torch.arange(size)}
            said = respond(model, batch)
            assert set(said) == {"logits"}
            torch.testing.assert_close(said["logits"], mlp()(batch["features"]).detach(), atol=1e-5, rtol=0)

    def test_a_graph_of_texts_gets_its_inputs_by_name(self, text):
        """Without the mask the answers about short texts would be wrong, and nothing would say so."""
        model = model_of(text)
        assert accepted_inputs(model) == {"input_ids", "attention_mask"}
        for batch in (texts(), texts(3, 20)):
            said = Live(model)(batch)
            with torch.no_grad():
                found = bert()(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
            torch.testing.assert_close(said["logits"], found.logits, atol=1e-5, rtol=0)
            torch.testing.assert_close(said["hidden"], found.hidden_states[1], atol=1e-5, rtol=0)
            assert said["logits"].dtype == torch.float32

    def test_two_graphs_take_each_its_own_inputs(self, plain, text):
        assert accepted_inputs(model_of(plain)) == {"x"}
        assert accepted_inputs(model_of(text)) == {"input_ids", "attention_mask"}
        assert accepted_inputs(model_of(plain)) == {"x"}

    def test_narrower_integers_and_floats_are_cast(self, plain, text):
        batch = texts()
        narrow = {**batch, "input_ids": batch["input_ids"].int(), "attention_mask": batch["attention_mask"].bool()}
        assert torch.equal(respond(model_of(text), narrow)["logits"], respond(model_of(text), batch)["logits"])
        inputs = torch.randn(3, 5).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            said = Live(model_of(plain))({"features": inputs})["logits"]
        torch.testing.assert_close(said, mlp()(inputs.float()).detach(), atol=1e-5, rtol=0)

    def test_probabilities_become_their_logarithms(self, tmp_path):
        inputs = torch.randn(4, 5) * 9
        path = written(tmp_path / "soft.onnx", "probabilities", softmax=True)
        expected = mlp()(inputs).softmax(-1).detach()
        for kwargs in ({}, {"probabilities": True, "output": "probabilities"}):
            said = respond(model_of(path, **kwargs), {"features": inputs})["logits"]
            torch.testing.assert_close(said, expected.clamp_min(1e-7).log(), atol=1e-4, rtol=1e-4)
        said = respond(model_of(path, probabilities=False), {"features": inputs})["logits"]
        torch.testing.assert_close(said, expected, atol=1e-5, rtol=0)

    def test_another_output(self, text):
        said = respond(OnnxModel(output="hidden").read(text), texts())
        assert said["logits"].shape == (5, 11, 16)


class TestRefusals:
    def test_inputs_that_the_batch_lacks(self, text):
        with pytest.raises(ModelError, match="takes input_ids, attention_mask, and the batch has no 'attention_mask'"):
            respond(model_of(text), {"input_ids": texts()["input_ids"]})

    def test_inputs_of_another_kind(self, plain, text):
        with pytest.raises(ModelError, match=r"'x' is a tensor\(float\), and the batch has int64"):
            respond(model_of(plain), {"input_ids": torch.ones(2, 5, dtype=torch.long)})
        with pytest.raises(ModelError, match=r"'attention_mask' is a tensor\(int64\), and the batch has float32"):
            respond(model_of(text), {**texts(), "attention_mask": torch.ones(5, 11)})

    def test_shapes_that_the_graph_does_not_take(self, plain):
        with pytest.raises(ModelError, match=r"cannot be run with x \[2, 7\] .*are its axes dynamic"):
            respond(model_of(plain), {"features": torch.ones(2, 7)})

    def test_files_that_are_none(self, tmp_path, text):
        with pytest.raises(ModelError, match="there is no file"):
            model_of(tmp_path / "missing.onnx")
        (tmp_path / "other.onnx").write_bytes(b"PK\x03\x04 nothing of the kind")
        with pytest.raises(ModelError, match=r"other\.onnx"):
            model_of(tmp_path / "other.onnx")
        (tmp_path / "alone.onnx").write_bytes(text.read_bytes())
        with pytest.raises(ModelError, match=r"keeps weights in 'model\.onnx\.data', and there is no such file"):
            model_of(tmp_path / "alone.onnx")

    def test_weights_outside_the_folder_are_not_read(self, tmp_path, text):
        graph = onnx.load(str(text), load_external_data=False)
        (tmp_path / "in").mkdir()
        (tmp_path / "model.onnx.data").write_bytes((text.parent / "model.onnx.data").read_bytes())
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../model.onnx.data"
        (tmp_path / "in" / "model.onnx").write_bytes(graph.SerializeToString())
        with pytest.raises(ModelError, match=r"keeps weights in '\.\./model\.onnx\.data'"):
            model_of(tmp_path / "in" / "model.onnx")

    def test_an_opset_of_the_future(self, tmp_path, plain):
        graph = onnx.load(str(plain))
        graph.opset_import[0].version = 999
        onnx.save(graph, str(tmp_path / "new.onnx"))
        with pytest.raises(ModelError, match=r"new\.onnx: ONNX Runtime .* cannot run the graph: .*opset"):
            model_of(tmp_path / "new.onnx")

    def test_another_number_of_classes(self, plain):
        with pytest.raises(ModelError, match=r"the task has 4 classes, and .* answers with 3"):
            Blueprint(f"onnx:{plain}").build({"num_labels": 4}, seed=0)

    def test_options_and_places(self, plain, tmp_path):
        check = Blueprint(f"onnx:{plain}", {"ouput": "x"}).check
        (problem,) = check(("teacher",), allow_code=False)
        assert problem.path == ("teacher", "kwargs", "ouput")
        (problem,) = Blueprint(f"onnx:{plain}").check(("student",), allow_code=False)
        assert "cannot be a student: it has no gradient" in str(problem)
        (problem,) = Blueprint(f"onnx:{tmp_path}/no.onnx").check(("teachers", "a"), allow_code=False)
        assert "there is no file" in str(problem)
        assert Blueprint(f"onnx:{plain}").check(("teacher",), allow_code=False) == []
        with pytest.raises(ModelError, match="no output 'answr' of floats; did you mean 'answer'"):
            model_of(plain, output="answr")
        with pytest.raises(ModelError, match="no provider 'GPU' here"):
            model_of(plain, providers=["GPU"])
        with pytest.raises(ModelError, match="there is no graph"):
            Blueprint(f"onnx:{plain}", pretrained=False).build(FACTS, seed=0)(torch.ones(1, 5))


class TestOnDisk:
    @pytest.mark.parametrize("name", ["data/{}", "data/../../{}", "data/in/../../{}", "{}"])
    def test_a_saved_graph_writes_nothing_outside_its_folder(self, name, plain, tmp_path, monkeypatch):
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        target = tmp_path / "written"
        key = name.format(target if ".." not in name else "written")
        state = {**OnnxModel().read(plain).state_dict(), key: torch.ones(3, dtype=torch.uint8)}
        with pytest.raises(ModelError, match="outside its folder"):
            OnnxModel().load_state_dict(state)
        assert sorted(each.name for each in tmp_path.rglob("*")) == ["tmp"]

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_say_the_same(self, again, text):
        model = OnnxModel().read(text)
        copied = again(model)
        assert accepted_inputs(copied) == accepted_inputs(model)
        assert copied.fingerprint == model.fingerprint
        assert torch.equal(respond(copied, texts())["logits"], respond(model, texts())["logits"])

    @pytest.mark.parametrize("which", ["plain", "text"])
    def test_it_comes_back_without_its_file_and_says_the_same(self, which, request, tmp_path):
        source = request.getfixturevalue(which)
        here = tmp_path / "here"
        here.mkdir()
        for file in source.parent.glob("*.onnx*"):
            (here / file.name).write_bytes(file.read_bytes())
        blueprint = Blueprint(f"onnx:{here / source.name}")
        model = blueprint.build(FACTS, seed=0)
        batch = texts() if which == "text" else {"features": torch.randn(4, 5)}
        before, known = respond(model, batch), weights_hash(model)
        card = {"task": "t", "settings": {"label_names": ["a", "b", "c"]}, **blueprint.card(FACTS)}
        save_model(model, tmp_path / "saved", card)
        assert {file.name for file in (tmp_path / "saved").iterdir()} == {"model.safetensors", "potstill.json"}
        for file in here.iterdir():
            file.unlink()
        for found in (
            load_model(tmp_path / "saved", allow_code=False)[0],
            Blueprint(str(tmp_path / "saved")).build({}, seed=1),
        ):
            assert accepted_inputs(found) == accepted_inputs(model)
            assert torch.equal(respond(found, batch)["logits"], before["logits"])
            assert weights_hash(found) == known
        again = Blueprint(str(tmp_path / "saved")).make({}, seed=1)
        assert again.labels == ["a", "b", "c"]

    def test_a_copy_opens_the_graph_for_itself(self, plain):
        model = model_of(plain)
        other = copy.deepcopy(model)
        inputs = torch.randn(2, 5)
        assert torch.equal(other(inputs)["logits"], model(inputs)["logits"])

    def test_a_cache_tells_graphs_apart(self, plain, text, tmp_path):
        changed = onnx.load(str(plain))
        weight = onnx.numpy_helper.to_array(changed.graph.initializer[0]).copy()
        weight.flat[0] += 1
        changed.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, changed.graph.initializer[0].name))
        onnx.save(changed, str(tmp_path / "changed.onnx"))
        hashes = {weights_hash(model_of(path)) for path in (plain, text, tmp_path / "changed.onnx")}
        assert len(hashes) == 3
        assert weights_hash(model_of(plain)) in hashes

    def test_a_state_without_a_graph(self, plain, tmp_path):
        model = model_of(plain)
        with pytest.raises(RuntimeError, match="graph"):
            model.load_state_dict({"other": torch.zeros(1)})
        with pytest.raises(ModelError, match="expected a graph of ONNX, got Linear"):
            Onnx().save(nn.Linear(2, 2), tmp_path, name="x", labels=[], processor=None)

    def test_its_size_is_that_of_its_files(self, text):
        assert model_of(text).size_in_bytes == sum(file.stat().st_size for file in text.parent.glob("model.onnx*"))


class TestFacts:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("names", "{0: 'bad', 2: 'good', 1: 'fair'}"),
            ("id2label", '{"1": "fair", "0": "bad", "2": "good"}'),
            ("classes", "{'bad': 0, 'good': 2, 'fair': 1}"),
            ("labels", '["bad", "fair", "good"]'),
        ],
    )
    def test_labels_in_the_file(self, key, value, plain, tmp_path):
        path = with_metadata(plain, tmp_path, **{key: value})
        assert Blueprint(f"onnx:{path}").make(FACTS, seed=0).labels == ["bad", "fair", "good"]

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("labels", "Trained on CIFAR, 2024, at home"),
            ("names", "[" * 5000),
            ("classes", "{'bad': 'x', 'fair': [], 'good': {}}"),
            ("labels", "['one', 'too', 'many', 'here']"),
        ],
    )
    def test_what_is_no_list_of_its_classes(self, key, value, plain, tmp_path):
        assert model_of(with_metadata(plain, tmp_path, **{key: value})).labels == []

    def test_labels_beside_the_file(self, text, plain):
        assert Blueprint(f"onnx:{text}").make(FACTS, seed=0).labels == ["bad", "fair", "good"]
        assert Blueprint(f"onnx:{plain}").make(FACTS, seed=0).labels == []

    def test_how_it_wants_its_inputs(self, text, plain):
        of_texts = {"auto_model": "AutoModelForSequenceClassification"}
        found = Blueprint(f"onnx:{text}").processor(of_texts)
        assert found.tokenizer("a warm film")["input_ids"] == word_pieces()("a warm film")["input_ids"]
        with pytest.raises(ModelError, match=r"no tokenizer beside .*mlp.onnx; name a model .* with `processor:`"):
            Blueprint(f"onnx:{plain}").processor(of_texts)
        assert Blueprint(f"onnx:{plain}").processor({}) is None
        images = {"auto_model": "AutoModelForImageClassification", "in_channels": 1}
        assert Blueprint(f"onnx:{plain}").processor(images) is None
