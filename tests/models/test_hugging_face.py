"""Models of transformers: heads, names of classes, padding of decoders, and folders that transformers reads back."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
import transformers

from potstill.errors import CodeNotAllowedError, ModelError
from potstill.models.frozen import Frozen
from potstill.models.hugging_face import HuggingFace, hub_commit, load_pretrained, name_labels
from potstill.models.load import Blueprint, load_model, save_model
from potstill.models.origins import ImageProcessor, TextProcessor
from tests.local_models import SENTENCES, bert, distilbert, gpt2, llama, roberta, vit, word_pieces

NAMES = ["bad", "good"]
AUTO = "AutoModelForSequenceClassification"
FACTS = {"num_labels": 2, "label_names": NAMES, "auto_model": AUTO}
TEXTS = [text for text, _ in SENTENCES] + ["a", "the film"]
HUB = HuggingFace()


def make(folder, seed: int = 0, facts=FACTS, pretrained: bool = True, **kwargs):
    return Blueprint(str(folder), kwargs, pretrained=pretrained).make(facts, seed=seed)


def same(one, two) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def trained(folder, name: str = AUTO):
    return getattr(transformers, name).from_pretrained(folder)


def logits(model, tokenizer, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits


def scaled(folder):
    """Weights so large that a wrong one shows in the logits."""
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    large = {name: value * 20 if value.ndim == 2 else value for name, value in weights.items()}
    safetensors.torch.save_file(large, path, metadata={"format": "pt"})
    return folder


# heads and names


@pytest.mark.parametrize("family", [bert, distilbert, roberta, gpt2, llama])
def test_a_trained_head_is_kept(family, tmp_path):
    folder = family(tmp_path, head=["neg", "pos"])
    built = make(folder)
    assert same(built.model, trained(folder))
    assert built.fresh == []
    assert built.labels == ["neg", "pos"]  # the caller compares them with the data set's
    assert built.model.config.id2label == {0: "neg", 1: "pos"}


@pytest.mark.parametrize(
    ("family", "head"),
    [
        (bert, {"classifier.weight", "classifier.bias"}),
        (distilbert, {"classifier.weight", "classifier.bias", "pre_classifier.weight", "pre_classifier.bias"}),
        (gpt2, {"score.weight"}),
    ],
)
def test_a_bare_encoder_gets_a_head_with_the_data_sets_names(family, head, tmp_path):
    built = make(family(tmp_path), facts={**FACTS, "label_names": ["a", "b", "c"]})
    assert set(built.fresh) == head
    assert built.labels == []
    assert built.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert built.model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert built.model.config.num_labels == 3
    encoder = trained(tmp_path, "AutoModel").state_dict()
    own = built.model.base_model.state_dict()
    assert all(torch.equal(own[name], encoder[name]) for name in own)


def test_two_classes_are_named_though_the_count_fits(tmp_path):
    """A configuration without names says LABEL_0 and LABEL_1, just as many as the data set has."""
    built = make(bert(tmp_path))
    assert built.fresh == ["classifier.bias", "classifier.weight"]
    assert built.model.config.id2label == {0: "bad", 1: "good"}


def test_a_head_for_other_classes_is_made_anew(tmp_path):
    folder = bert(tmp_path, head=["one", "two", "three"])
    built = make(folder)
    assert built.fresh == ["classifier.bias", "classifier.weight"]
    assert built.labels == []
    assert built.model.classifier.weight.shape == (2, 16)
    assert built.model.config.id2label == {0: "bad", 1: "good"}
    assert torch.equal(built.model.bert.pooler.dense.weight, trained(folder).bert.pooler.dense.weight)


def test_a_head_without_names_takes_the_data_sets(tmp_path):
    """Nothing says that its classes are others; there are no names to compare."""
    folder = bert(tmp_path, head=["LABEL_0", "LABEL_1"])
    built = make(folder)
    assert built.labels == built.fresh == []
    assert same(built.model, trained(folder))
    assert built.model.config.id2label == {0: "bad", 1: "good"}


def test_a_data_set_without_labels_leaves_the_head(tmp_path):
    folder = bert(tmp_path, head=["x", "y", "z"])
    built = make(folder, facts={"num_labels": 0, "label_names": [], "auto_model": AUTO})
    assert built.labels == ["x", "y", "z"]
    assert same(built.model, trained(folder))


def test_names_stand_in_the_order_of_the_outputs(tmp_path):
    """JSON has the ids as words, and as words 10 stands before 2."""
    names = [f"class {place}" for place in range(12)]
    assert make(bert(tmp_path, head=names), facts={**FACTS, "label_names": names}).labels == names


def test_the_architecture_alone(tmp_path):
    folder = bert(tmp_path, head=["one", "two", "three"])
    built = make(folder, pretrained=False, seed=7)
    assert built.fresh == built.labels == []
    assert built.model.config.id2label == {0: "bad", 1: "good"}
    old = trained(folder)
    assert type(built.model) is type(old)
    assert built.model.config.num_hidden_layers == 4
    matrices = [name for name, value in old.state_dict().items() if value.ndim == 2 and "classifier" not in name]
    new = built.model.state_dict()
    assert not any(torch.equal(new[name], old.state_dict()[name]) for name in matrices)
    assert same(make(folder, pretrained=False, seed=7).model, built.model)
    assert not same(make(folder, pretrained=False, seed=8).model, built.model)


def test_a_seed_gives_one_head_and_leaves_the_global_generator(tmp_path):
    """The distilled and the baseline student must start from the same head."""
    folder = bert(tmp_path)
    state = torch.get_rng_state()
    first = make(folder, seed=5).model
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(11)
    assert same(make(folder, seed=5).model, first)
    other = make(folder, seed=6).model
    assert not torch.equal(other.classifier.weight, first.classifier.weight)
    assert torch.equal(other.bert.pooler.dense.weight, first.bert.pooler.dense.weight)


def test_models_are_fine_enough_to_train(tmp_path):
    """Transformers takes the checkpoint's bfloat16, in which small steps are lost; a person may still ask for it."""
    folder = bert(tmp_path, head=NAMES)
    trained(folder).to(torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    for pretrained in (True, False):
        model = make(folder, pretrained=pretrained).model
        assert {each.dtype for each in model.parameters()} == {torch.float32}
        assert model.config.dtype in (torch.float32, "float32")
        assert {each.dtype for each in Frozen(model).model.parameters()} == {torch.float32}
        for asked in ("bfloat16", "auto"):
            coarse = make(folder, pretrained=pretrained, dtype=asked).model
            assert {each.dtype for each in coarse.parameters()} == {torch.bfloat16}


# options


@pytest.mark.parametrize("pretrained", [True, False])
def test_options_of_the_configuration_and_of_loading(pretrained, tmp_path):
    folder = bert(tmp_path, head=NAMES)
    built = make(
        folder, pretrained=pretrained, num_hidden_layers=2, hidden_dropout_prob=0.3, attn_implementation="eager"
    )
    assert len(built.model.bert.encoder.layer) == built.model.config.num_hidden_layers == 2
    assert built.model.dropout.p == built.model.config.hidden_dropout_prob == 0.3
    assert built.model.config._attn_implementation == "eager"
    assert built.fresh == []
    first = trained(folder).bert.encoder.layer[1].output.dense.weight
    assert torch.equal(built.model.bert.encoder.layer[1].output.dense.weight, first) == pretrained


def test_an_option_by_the_name_that_all_families_share(tmp_path):
    model = make(distilbert(tmp_path, layers=2), num_hidden_layers=1).model
    assert model.config.n_layers == len(model.distilbert.transformer.layer) == 1


def test_more_layers_than_were_trained_are_fresh(tmp_path):
    built = make(bert(tmp_path, layers=1, head=NAMES), num_hidden_layers=2)
    assert len(built.fresh) == 16
    assert all(name.startswith("bert.encoder.layer.1.") for name in built.fresh)


@pytest.mark.parametrize("layers", [2, 6])
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_family_that_lists_the_kinds_of_its_layers(layers, pretrained, tmp_path):
    """ModernBERT, Qwen and others list them: with another number of layers the list must be as long."""
    tokenizer = word_pieces()
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    )
    transformers.ModernBertModel(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model = make(tmp_path / "m", pretrained=pretrained, num_hidden_layers=layers).model
    assert len(model.model.layers) == len(model.config.layer_types) == layers
    if layers == 2:  # the first ones keep their kind: the trained weights are of that kind
        assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert model.config.id2label == {0: "bad", 1: "good"}
    HUB.save(model, tmp_path / "s", name="m", labels=NAMES, processor=None)
    again = load_pretrained(tmp_path / "s", AUTO)
    assert same(again, model)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hidden_droput_prob": 0.3}, "has no option 'hidden_droput_prob'; did you mean 'hidden_dropout_prob'?"),
        ({"n_hidden_layers": 2}, "did you mean 'num_hidden_layers'?"),
        ({"revison": "main"}, "did you mean 'revision'?"),
        ({"num_hidden_layers": "many"}, "expected int, got str"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"attn_implementation": "eagre"}, 'attn_implementation="eagre"` is not supported'),
        ({"dtype": "float33"}, "has no dtype 'float33'; did you mean 'float32'?"),
    ],
)
def test_wrong_options(kwargs, message, tmp_path):
    folder = bert(tmp_path)
    for pretrained in (True, False):
        with pytest.raises(ModelError, match=message):
            make(folder, pretrained=pretrained, **kwargs)


def test_a_task_without_models_of_transformers(tmp_path):
    with pytest.raises(ModelError, match=r"takes no model of transformers; name one as potstill:NAME"):
        make(bert(tmp_path), facts={"num_labels": 2, "in_features": 3})


def test_options_are_saved_as_they_are():
    assert HUB.complete("x", {"a": 1}, FACTS) == {"a": 1}


# decoders


@pytest.mark.parametrize("family", [gpt2, llama])
@pytest.mark.parametrize("pad", [None, "<unk>"])
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_decoder_reads_the_last_word_and_not_the_padding(family, pad, pretrained, tmp_path):
    """Without a padding token transformers refuses batches; with a wrong one it reads the padding, silently."""
    folder = scaled(family(tmp_path / "m", head=NAMES, pad=pad))
    tokenizer = HUB.processor(str(folder), {}, FACTS).tokenizer
    model = make(folder, pretrained=pretrained).model
    assert model.config.pad_token_id == tokenizer.pad_token_id == (1 if pad is None else 0)
    alone = torch.cat([logits(model, tokenizer, [text]) for text in TEXTS])
    assert alone.std(0).min() > 1e-4
    assert (logits(model, tokenizer, TEXTS) - alone).abs().max() < 1e-5
    save_model(
        model, tmp_path / "s", {"model": str(folder), "kwargs": {}, "auto_model": AUTO}, TextProcessor(tokenizer)
    )
    again, _ = load_model(tmp_path / "s")
    assert (logits(again, tokenizer, TEXTS) - alone).abs().max() < 1e-5
    assert HUB.processor(str(tmp_path / "s"), {}, FACTS).tokenizer.pad_token_id == tokenizer.pad_token_id


def test_a_padding_token_that_the_configuration_has_is_left(tmp_path):
    folder = gpt2(tmp_path, head=NAMES, pad="<unk>")
    assert make(folder, pad_token_id=3).model.config.pad_token_id == 3


# mistakes


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "~/no/such/folder/at/all"])
def test_a_model_that_is_nowhere(name):
    shown = name.removeprefix("~")
    with pytest.raises(ModelError, match=rf"no model could be loaded from '.*{shown}', neither from a folder nor"):
        make(name)
    with pytest.raises(ModelError, match=rf"no tokenizer could be loaded from '.*{shown}'"):
        Blueprint(name).processor(FACTS)


def test_a_name_without_its_prefix_is_proposed():
    with pytest.raises(ModelError, match="did you mean 'potstill:convnet'"):
        make("convnet")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=f"no model could be loaded from the folder {tmp_path}"):
        make(tmp_path)
    (problem,) = Blueprint(str(tmp_path)).check(("student",), allow_code=False)
    assert problem.path == ("student", "model")
    assert str(problem) == f"student.model: expected a model's folder with config.json, and {tmp_path} has none"


def test_a_folder_without_weights(tmp_path):
    folder = bert(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no model could be loaded from the folder"):
        make(folder)
    assert make(folder, pretrained=False).fresh == []


def test_references_are_checked_without_a_network(tmp_path):
    folder = bert(tmp_path)
    for good in (str(folder), "bert-base-uncased", "owner/name.with-dots_1"):
        assert HUB.check(good, {}, ("teacher",)) == []
    for bad in ("a/b/c", "two words", "owner/"):
        (problem,) = HUB.check(bad, {}, ("teacher",))
        assert problem.path == ("teacher", "model")
        assert f"expected a folder or a hub id such as bert-base-uncased or owner/name, got '{bad}'" in str(problem)


# code


@pytest.fixture
def coded(tmp_path, monkeypatch):
    """A folder whose own Python makes the model, and leaves a mark when it runs; whoever is asked says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = bert(tmp_path / "coded_model", head=NAMES)
    about = json.loads((folder / "config.json").read_text())
    places = {"AutoConfig": "own_code.OwnConfig", AUTO: "own_code.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**about, "model_type": "own_kind", "auto_map": places}))
    (folder / "own_code.py").write_text(
        "import pathlib\n"
        "from transformers import BertConfig, BertForSequenceClassification\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(BertConfig):\n"
        "    model_type = 'own_kind'\n"
        "class OwnModel(BertForSequenceClassification):\n"
        "    config_class = OwnConfig\n"
    )
    return folder


@pytest.mark.parametrize("pretrained", [True, False])
def test_code_of_a_model_runs_only_where_it_was_asked_for(coded, pretrained, tmp_path):
    """Transformers would ask on the terminal, past --allow-code."""
    with pytest.raises(ModelError, match="contains custom code"):
        make(coded, pretrained=pretrained)
    with pytest.raises(CodeNotAllowedError, match="would run the Python code in that repository"):
        Blueprint(str(coded), {"trust_remote_code": True}, pretrained=pretrained).make(FACTS, seed=0, allow_code=False)
    assert not (tmp_path / "ran").exists()
    built = make(coded, pretrained=pretrained, trust_remote_code=True)
    assert type(built.model).__name__ == "OwnModel"
    assert (tmp_path / "ran").exists()


def test_neither_tokenizers_nor_saved_folders_run_code(coded, tmp_path):
    HUB.processor(str(coded), {}, FACTS)
    with pytest.raises(ModelError):
        load_pretrained(coded, AUTO)
    with pytest.raises(ModelError):
        hub_commit(str(coded / "nothing"), {})
    assert not (tmp_path / "ran").exists()
    assert type(load_pretrained(coded, AUTO, trust_remote_code=True)).__name__ == "OwnModel"


# saving and loading


def test_a_saved_model_is_one_of_transformers(tmp_path, capsys):
    """Whoever gets the folder needs no potstill, and sees the data set's names."""
    folder = scaled(bert(tmp_path / "m"))
    model = make(folder).model
    processor = HUB.processor(str(folder), {}, FACTS)
    card = {"model": str(folder), "kwargs": {}, "auto_model": AUTO, "settings": {"label_names": NAMES}}
    capsys.readouterr()
    save_model(model, tmp_path / "s", card, processor)
    assert capsys.readouterr().err == ""
    assert not [file.name for file in (tmp_path / "s").iterdir() if file.suffix in (".bin", ".pt", ".pkl", ".tmp")]
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "s"), top_k=None)
    scores = logits(model, processor.tokenizer, TEXTS).softmax(-1)
    for found, wanted in zip(pipe(TEXTS, batch_size=4), scores.tolist(), strict=True):
        assert {each["label"]: each["score"] for each in found} == pytest.approx(
            dict(zip(NAMES, wanted, strict=True)), abs=1e-5
        )
    again, read = load_model(tmp_path / "s")
    assert same(again, model)
    assert read == card


def test_a_saved_model_gets_the_names_of_the_data_set(tmp_path):
    """A teacher's head may keep its own spelling while it is used."""
    model = make(bert(tmp_path / "m", head=["Bad", "GOOD"])).model
    HUB.save(model, tmp_path / "s", name="m", labels=NAMES, processor=None)
    assert load_pretrained(tmp_path / "s", AUTO).config.id2label == {0: "bad", 1: "good"}


def test_a_model_without_a_configuration_has_no_names():
    model = torch.nn.Linear(2, 2)
    name_labels(model, NAMES)
    assert not hasattr(model, "config")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("classifier.weight"), r"lacks weights: classifier\.weight$"),
        (lambda weights: weights.update(extra=torch.ones(1)), "has weights left over: extra"),
        (lambda weights: weights.update({"classifier.bias": torch.ones(3)}), "size mismatch|mismatch"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(change, message, tmp_path):
    """Transformers makes up what is missing: the model would answer at random."""
    folder = bert(tmp_path, head=NAMES)
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_pretrained(folder, AUTO)


def test_no_weights_are_an_error(tmp_path):
    folder = bert(tmp_path, head=NAMES)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no model could be loaded from the folder"):
        load_pretrained(folder, AUTO)


def test_nothing_is_unpickled_from_a_saved_folder(tmp_path):
    folder = bert(tmp_path, head=NAMES)
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        load_pretrained(folder, AUTO)


def test_the_commit_of_a_model_in_the_cache(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--me--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    bert(cached / "snapshots" / commit, head=NAMES)
    kwargs = {"cache_dir": str(tmp_path)}
    assert hub_commit("me/tiny", kwargs) == f"me/tiny@{commit}"
    assert make("me/tiny", **kwargs).labels == NAMES
    assert Blueprint("me/tiny", kwargs).processor(FACTS).tokenizer.vocab_size == 21
    with pytest.raises(ModelError, match="no model could be loaded from 'me/other'"):
        hub_commit("me/other", kwargs)


# tokenizers and image processors


def test_a_tokenizer_without_padding_pads_with_the_end(tmp_path):
    tokenizer = HUB.processor(str(gpt2(tmp_path)), {}, FACTS).tokenizer
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<end>", 1)
    assert HUB.processor(str(bert(tmp_path / "b")), {}, FACTS).tokenizer.pad_token == "[PAD]"


def test_a_tokenizer_that_cannot_pad(tmp_path):
    folder = gpt2(tmp_path)
    path = folder / "tokenizer_config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in about.items() if key != "eos_token"}))
    with pytest.raises(ModelError, match="has neither a padding token nor one that ends a text"):
        HUB.processor(str(folder), {}, FACTS)


@pytest.mark.parametrize(
    ("family", "own", "limit"),
    [(bert, 10**30, 64), (bert, 40, 40), (roberta, 10**30, 62), (gpt2, 10**30, 64), (distilbert, 512, 64)],
)
def test_the_limit_of_the_positions(family, own, limit, tmp_path):
    """Many tokenizers of the hub know no limit, and past its last position a model stops with an index error."""
    folder = family(tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": own}))
    tokenizer = HUB.processor(str(folder), {}, FACTS).tokenizer
    assert tokenizer.model_max_length == limit
    if limit >= 62:
        model, long = make(folder).model, ["a " * 99]
        model(**tokenizer(long, truncation=True, return_tensors="pt"))
        with pytest.raises((IndexError, RuntimeError)):
            model(**tokenizer(long, truncation=True, max_length=limit + 1, return_tensors="pt"))


def test_more_positions_by_an_option(tmp_path):
    folder = gpt2(tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 10**30}))
    assert HUB.processor(str(folder), {"max_position_embeddings": 80}, FACTS).tokenizer.model_max_length == 80


def test_a_tokenizer_alone_is_enough(tmp_path):
    word_pieces().save_pretrained(tmp_path)
    assert HUB.processor(str(tmp_path), {}, FACTS).tokenizer.model_max_length == 64


def test_an_image_model_comes_with_its_processor(tmp_path):
    facts = {**FACTS, "auto_model": "AutoModelForImageClassification"}
    folder = vit(tmp_path / "m", head=["cat", "dog"])
    found = Blueprint(str(folder)).processor(facts)
    assert isinstance(found, ImageProcessor)
    assert (found.size, found.mean, found.std) == ((16, 16), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    built = make(folder, facts=facts)
    assert built.labels == ["cat", "dog"]
    save_model(
        built.model, tmp_path / "s", {"model": str(folder), "kwargs": {}, "auto_model": facts["auto_model"]}, found
    )
    assert same(load_model(tmp_path / "s")[0], built.model)
    assert Blueprint(str(tmp_path / "s")).processor(facts) == found
    with pytest.raises(ModelError, match="no image processor could be loaded from the folder"):
        Blueprint(str(bert(tmp_path / "b"))).processor(facts)
