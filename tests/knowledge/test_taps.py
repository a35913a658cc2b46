"""What a tap can be, what a module path reads, and what a person reads when a tap names nothing."""

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    LongT5Config,
    LongT5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from potstill.errors import SignalError
from potstill.knowledge.capture import capture
from potstill.knowledge.taps import available, is_token_signal, resolve, resolve_all

SMALL = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


def bert():
    return BertForSequenceClassification(BertConfig(**SMALL))


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=3, num_decoder_layers=2, num_heads=2)
    )


def bart():
    sizes = {
        f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")
    }
    return BartForConditionalGeneration(BartConfig(vocab_size=20, d_model=16, max_position_embeddings=16, **sizes))


def test_the_taps_of_a_model_start_with_its_own_numbering():
    names = available(bert())
    assert names[:5] == ["hidden.0", "hidden.1", "hidden.2", "attention.1", "attention.2"]
    assert {"query.2", "key.1", "value.2", "bert.encoder.layer.1.attention.self", "classifier"} <= set(names)
    assert not {"attention.0", "attention.3", "hidden.3", "cross_attention.1", ""} & set(names)


def test_every_available_tap_resolves():
    for model in (bert(), t5(), bart(), nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))):
        names = available(model)
        assert [tap.where for tap in resolve_all(model, names)] == names
        assert len(set(names)) == len(names)


def test_encoder_decoders_name_the_tower():
    for model, layers in ((t5(), 3), (bart(), 2)):
        names = set(available(model))
        assert {f"encoder.hidden.{layers}", "decoder.hidden.2"} <= names
        assert not {f"encoder.hidden.{layers + 1}", "decoder.hidden.3", "encoder.cross_attention.1", "hidden.1"} & names
        with pytest.raises(SignalError, match=r"say encoder\.hidden\.1 or decoder\.hidden\.1"):
            resolve(model, "hidden.1")
        assert resolve(model, "decoder.hidden.1").module is model.get_decoder()
    assert resolve(model, "cross_attention.1").module is model.get_decoder()
    assert resolve(model, "encoder.attention.1").module is model.get_encoder()
    assert "decoder.cross_attention.2" in names


def test_blocks_that_transformers_does_not_name_are_the_longest_outer_list():
    config = LongT5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)  # 3 parts in a block
    names = [name for name in available(LongT5ForConditionalGeneration(config)) if name.startswith("decoder.hidden.")]
    assert names == ["decoder.hidden.0", "decoder.hidden.1", "decoder.hidden.2"]


def test_a_lone_encoder_needs_no_prefix():
    model = T5EncoderModel(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))
    assert resolve(model, "hidden.2").module is model.encoder
    assert resolve(model, "encoder.hidden.2").module is model.encoder


def test_towers_of_other_models_are_named_by_their_path():
    model = nn.ModuleDict({side: BertModel(BertConfig(**SMALL)) for side in ("queries", "documents")})
    assert resolve(model, "documents.hidden.1").module is model["documents"]
    assert {"queries.hidden.2", "documents.attention.1"} <= set(available(model))
    with pytest.raises(SignalError, match=r"queries\.attention\.1 or documents\.attention\.1"):
        resolve(model, "attention.1")


def test_a_transformers_model_is_found_inside_another_module():
    inner = BertModel(BertConfig(**SMALL))
    wrapper = nn.ModuleDict({"backbone": inner, "head": nn.Linear(16, 2)})
    assert resolve(wrapper, "hidden.2").module is inner
    assert resolve(wrapper, "backbone.hidden.2").module is inner
    assert resolve(wrapper, "head").module is wrapper["head"]


def test_the_first_block_is_number_one():
    model = bert()
    block = model.bert.encoder.layer[0]
    assert block.attention.self in resolve(model, "attention.1").parts
    assert model.bert.encoder.layer[1].attention.self in resolve(model, "query.2").parts


def test_self_and_cross_attention_are_told_apart():
    model = bart()
    block = model.model.decoder.layers[0]
    assert resolve(model, "cross_key.1").parts == (block.encoder_attn,)
    assert {block, block.self_attn} == set(resolve(model, "decoder.key.1").parts)
    model = t5()
    if "decoder.attention.2" not in available(model):
        pytest.skip("this version of transformers does not run T5 through its attention interface")
    block = model.decoder.block[1]
    own, cross = resolve(model, "decoder.attention.2").parts, resolve(model, "decoder.cross_attention.2").parts
    assert block.layer[0].SelfAttention in own
    assert block.layer[0].SelfAttention not in cross
    assert block.layer[1].EncDecAttention in cross
    assert block.layer[1].EncDecAttention not in own


@pytest.mark.parametrize("tap", ["hidden.3", "hidden.-1", "hidden.99@1"])
def test_hidden_states_out_of_range_name_the_range(tap):
    with pytest.raises(SignalError, match=r"hidden\.0 \(the embeddings\) to hidden\.2"):
        resolve(bert(), tap)


def test_the_embeddings_have_no_attention():
    with pytest.raises(SignalError, match=r"the embeddings have no attention; the first block's is 'attention\.1'"):
        resolve(bert(), "attention.0")


@pytest.mark.parametrize("tap", ["attention.3", "value.-1"])
def test_attention_out_of_range_names_the_range(tap):
    kind = tap.partition(".")[0]
    with pytest.raises(SignalError, match=rf"{kind}\.1 to {kind}\.2"):
        resolve(bert(), tap)


def test_a_model_of_one_shared_block_has_as_many_hidden_states_as_runs():
    model = AlbertModel(AlbertConfig(**{**SMALL, "num_hidden_layers": 3}, embedding_size=8))
    assert resolve(model, "hidden.3").layer == 3
    with pytest.raises(SignalError, match=r"its block runs 3 times, 'attention\.1@k'"):
        resolve(model, "attention.2")
    with pytest.raises(SignalError, match=r"to hidden\.3"):
        resolve(model, "hidden.4")


@pytest.mark.parametrize(
    ("tap", "near"),
    [
        ("bert.encoder.layers.1", "bert.encoder.layer.1"),
        ("hiden.2", "hidden.2"),
        ("bert.pooler.dens", "bert.pooler.dense"),
        ("encoder.hidden.1", "hidden.1"),
    ],
)
def test_an_unknown_tap_names_the_nearest(tap, near):
    with pytest.raises(
        SignalError, match=f"'{tap}' names nothing in BertForSequenceClassification; did you mean '{near}'"
    ):
        resolve(bert(), tap)


def test_a_model_without_any_transformer_says_what_it_has():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(SignalError, match="known: 0"):
        resolve(model, "hidden.1")
    assert available(model) == ["0"]


def test_cross_attention_that_is_not_there():
    with pytest.raises(SignalError, match="no cross-attention"):
        resolve(bert(), "cross_attention.1")
    with pytest.raises(SignalError, match="no cross-attention"):
        resolve(t5(), "encoder.cross_value.1")


def test_a_module_path_wins_over_the_other_meaning():
    model = nn.ModuleDict({"hidden": nn.ModuleList([nn.Linear(2, 2)])})
    tap = resolve(model, "hidden.0")
    assert (tap.kind, tap.module) == ("module", model["hidden"][0])


def test_the_parts_of_a_tap():
    model = nn.Sequential(nn.LSTM(2, 2))
    tap = resolve(model, "0:1@2")
    assert (tap.module, tap.element, tap.call, tap.mode) == (model[0], "1", 2, "")
    assert resolve(model, "input:0").mode == "input"
    assert resolve(model, "clone:0:out").mode == "clone"
    assert resolve(bert(), "hidden.1@3").call == 3


@pytest.mark.parametrize("tap", ["", ":0", "0@x", "0@", "0:"])
def test_what_is_no_tap_at_all(tap):
    with pytest.raises(SignalError, match="is no tap"):
        resolve(nn.Sequential(nn.ReLU()), tap)


@pytest.mark.parametrize("tap", ["hidden.1:0", "input:hidden.1", "clone:attention.1"])
def test_decorations_are_for_module_paths(tap):
    with pytest.raises(SignalError, match="are for module paths"):
        resolve(bert(), tap)


def test_attention_needs_an_implementation_that_can_be_read():
    model = bert()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        SignalError, match=r"'flash_attention_2' gives no probabilities; call .*set_attn_implementation\('sdpa'\)"
    ):
        resolve(model, "attention.1")
    assert resolve(model, "hidden.1").layer == 1


def test_a_model_with_its_own_attention_is_refused_and_its_hidden_states_are_not():
    model = DebertaV2Model(DebertaV2Config(**SMALL))
    assert "attention.1" not in available(model)
    assert resolve(model, "hidden.2").layer == 2
    with pytest.raises(SignalError, match="AttentionInterface"):
        resolve(model, "attention.1")


def test_eager_attention_with_gradient_checkpointing_is_refused():
    model = bert()
    model.set_attn_implementation("eager")
    model.gradient_checkpointing_enable()
    with pytest.raises(SignalError, match="gradient checkpointing"):
        resolve(model.train(), "attention.1")
    assert resolve(model.eval(), "attention.1").layer == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hidden.0", True),
        ("encoder.hidden.12", True),
        ("model.language_model.hidden.2@1", True),
        ("attention.1", False),
        ("hidden", False),
        ("hidden.x", False),
        ("myhidden.1", False),
        ("bert.encoder.layer.0", False),
        ("logits", False),
    ],
)
def test_token_signals_are_known_by_their_name(name, expected):
    assert is_token_signal(name) is expected


def test_a_model_that_gives_no_hidden_states_says_so():
    class Silent(BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **{**kwargs, "output_hidden_states": False})

    model = Silent(BertConfig(**SMALL))
    with pytest.raises(SignalError, match="Silent gave 0 hidden states"), capture(model, "hidden.1"):
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert hooks(model) == []


def test_looking_a_tap_up_leaves_no_trace():
    model = bert()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    resolve_all(model, available(model))
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()


# --- module paths: what each of their forms reads --------------------------------------------------------------------


class Pair(nn.Module):
    """Gives a tensor and a tuple."""

    def forward(self, x):
        return 2 * x, (x, x)


class Net(nn.Module):
    """Convolutions, a block that runs twice, a tuple output and an in-place sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 3, 3)
        self.act = nn.ReLU()
        self.shared = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.pair = Pair()

    def forward(self, x):
        features = self.act(self.conv(x)).mean((2, 3))
        features = self.shared(self.shared(features))
        out = self.norm(features)
        out += features
        return self.pair(out)[0]


def image_batch():
    torch.manual_seed(1)
    return torch.randn(4, 1, 5, 5)


def hooks(model):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [hook for module in model.modules() for table in tables for hook in getattr(module, table).values()]


def test_a_module_path_gives_that_modules_output():
    net, x = Net(), image_batch()
    with capture(net, ["conv", "act"]) as signals:
        net(x)
    assert torch.equal(signals["conv"], net.conv(x))
    assert torch.equal(signals["act"], net.conv(x).relu())


def test_signals_fill_while_the_block_runs():
    net, x = Net(), image_batch()
    with capture(net, "conv") as signals:
        assert signals == {}
        net(x)
        assert list(signals) == ["conv"]


def test_a_mapping_names_the_signals():
    net, x = Net(), image_batch()
    with capture(net, {"low": "conv", "again": "conv", "high": "norm@0"}) as signals:
        net.conv(x)
        net.norm(torch.ones(2, 3))
    assert set(signals) == {"low", "again", "high"}
    assert torch.equal(signals["low"], signals["again"])


def test_elements_of_tuples_and_dicts():
    net = Net()
    with capture(net, ["pair", "pair:0"]) as signals:
        net.pair(torch.ones(2))
    assert signals["pair"].tolist() == signals["pair:0"].tolist() == [2, 2]

    model = nn.ModuleDict({"body": BertModel(BertConfig(**SMALL)).eval()})
    with capture(model, ["body", "body:pooler_output", "body:1"]) as signals:
        out = model["body"](input_ids=torch.tensor([[3, 4, 5]]))
    assert torch.equal(signals["body"], out.last_hidden_state)
    assert torch.equal(signals["body:pooler_output"], out.pooler_output)
    assert torch.equal(signals["body:1"], out.pooler_output)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("pair:1", "gave tuple, not a tensor; say which element: 0, 1"),
        ("pair:2", "no element '2'; there are: 0, 1"),
        ("pair:state", "no element 'state'"),
        ("conv:0", "no element '0'; there are: none"),
    ],
)
def test_an_output_without_such_a_tensor(tap, message):
    net = Net()
    with pytest.raises(SignalError, match=message), capture(net, tap):
        net(image_batch())
    assert hooks(net) == []


def test_a_dict_gives_its_first_tensor():
    class Labelled(nn.Module):
        def forward(self, x):
            return {"name": "x", "value": x + 1, "other": x}

    net = nn.Sequential(Labelled())
    with capture(net, ["0", "0:other"]) as signals:
        net(torch.zeros(2))
    assert signals["0"].tolist() == [1, 1]
    assert signals["0:other"].tolist() == [0, 0]


def test_a_module_that_runs_twice_needs_the_number_of_the_call():
    net, x = Net(), image_batch()
    with pytest.raises(SignalError, match=r"'shared' was called more than once .* 'shared@0'"), capture(net, "shared"):
        net(x)
    assert hooks(net) == []
    with capture(net, ["shared@0", "shared@1"]) as signals:
        net(x)
    assert torch.equal(signals["shared@1"], net.shared(signals["shared@0"]))
    with pytest.raises(SignalError, match=r"no forward reached 'shared@2'"), capture(net, ["shared@2", "shared@1"]):
        net(x)


def test_the_first_input_of_a_module():
    net, x = Net(), image_batch()
    with capture(net, ["input:act", "conv", "input:shared@1", "shared@0"]) as signals:
        net(x)
    assert torch.equal(signals["input:act"], signals["conv"])
    assert torch.equal(signals["input:shared@1"], signals["shared@0"])
    with capture(net, "input:conv") as signals:
        net.conv(input=x)
    assert signals["input:conv"] is x


def test_an_output_that_is_overwritten_in_place_is_never_given_silently():
    net, x = Net(), image_batch()
    with pytest.raises(SignalError, match=r"'norm' was overwritten in place .* 'clone:norm'"), capture(net, "norm"):
        net(x)
    with capture(net, ["clone:norm", "shared@1"]) as signals:
        net(x)
    assert torch.equal(signals["clone:norm"], net.norm(signals["shared@1"]))


def test_unknown_paths_raise_before_anything_is_hooked():
    net = Net()
    with pytest.raises(SignalError, match="'convolution' names nothing in Net; did you mean 'conv'"):
        capture(net, ["act", "convolution"]).__enter__()
    assert hooks(net) == []


def test_a_tap_without_a_forward_is_named():
    net, x = Net(), image_batch()
    with (
        pytest.raises(SignalError, match="no forward reached 'pair', 'norm' before"),
        capture(net, ["pair", "conv", "norm"]),
    ):
        net.conv(x)
    assert hooks(net) == []


def test_no_taps_no_signals():
    with capture(Net(), []) as signals:
        pass
    assert signals == {}
