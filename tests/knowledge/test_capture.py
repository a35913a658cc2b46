"""Signals are what the model computed, a model computes the same with and without taps, and nothing is left behind."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from potstill.errors import SignalError
from potstill.knowledge.capture import _readers as listeners
from potstill.knowledge.capture import capture
from potstill.knowledge.taps import available

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 0, 0], [5, 5, 6, 0, 0, 0]])
TEXT = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
SIDES = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 4}
FFN = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
T5 = {"vocab_size": 20, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
IMAGES = {"image_size": 8, "patch_size": 4, **{k: v for k, v in SIZES.items() if k != "vocab_size"}}

MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=20, dim=16, n_layers=2, n_heads=4, hidden_dim=16)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(vocab_size=20, d_model=16, **SIDES, **FFN)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**IMAGES)),
}


def build(name):
    """Return a tiny random model in eval mode whose attention is far from uniform, and its padded inputs."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if name == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 8, 8)}
    if name in ("t5", "bart"):
        return model, {**TEXT, "decoder_input_ids": IDS[:, :5], "decoder_attention_mask": TEXT["attention_mask"][:, :5]}
    return model, TEXT


def layered(model, *kinds):
    """Return the taps of these kinds; the transformers version at hand may not run T5 through its interface."""
    paths = dict(model.named_modules())
    names = [n for n in available(model) if n not in paths and n.rpartition(".")[0].rpartition(".")[2] in kinds]
    if not names:
        pytest.skip(f"this version of transformers gives {type(model).__name__} none of {kinds}")
    return names


def reported(outputs, tap, plural):
    """Return what transformers itself reports for a tap, such as ``decoder_attentions[0]`` for decoder.attention.1."""
    path, _, layer = tap.rpartition(".")
    tower = "cross_" if "cross_" in path else f"{path.partition('.')[0]}_" if "." in path else ""
    return outputs[f"{tower}{plural}"][int(layer) - (plural == "attentions")]


def own_hooks(model):
    """Return every hook that is not transformers' own, which it installs once for good and keeps inert."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    hooks = [hook for module in model.modules() for table in tables for hook in getattr(module, table).values()]
    return [hook for hook in hooks if "output_capturing" not in getattr(hook, "__module__", "")]


def traces(model):
    """Return what a capture could have left in a model: hooks, marks, implementations."""
    marks = [module for module in model.modules() if module in listeners]
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    return own_hooks(model), marks, {getattr(config, "_attn_implementation", None) for config in configs}


CLEAN = ([], [], {"sdpa"})


class Net(nn.Module):
    """A layer that runs twice, and a sum in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.rest = nn.ModuleList([nn.Linear(3, 2)])

    def forward(self, x):
        features = self.shared(self.shared(x))
        out = self.norm(features)
        out += features
        return self.rest[0](out)


def raise_(error):
    raise error


def twice(model, inputs, taps):
    with capture(model, taps) as signals:
        model(**inputs)
        model(**inputs)
    return signals


def test_an_exception_passes_through_and_leaves_nothing():
    model, inputs = build("bert")
    taps = ["bert.pooler", "input:classifier", "hidden.1", "attention.1"]
    for error in (RuntimeError, KeyboardInterrupt):
        model.bert.pooler.forward = lambda states, error=error: raise_(error)
        with pytest.raises(error), capture(model, taps):  # not a SignalError about the taps that saw no forward
            model(**inputs)
        assert traces(model) == CLEAN


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tap", ["bert.encoder.layer.0.output", "hidden.1", "attention.1", "value.1"])
def test_signals_carry_the_graph_unless_detached(tap):
    model, inputs = build("bert")
    with capture(model, tap) as signals:
        model(**inputs)
    signals[tap].pow(2).sum().backward()
    assert model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    with capture(model, tap, detach=True) as cut:
        model(**inputs)
    assert not cut[tap].requires_grad
    assert torch.equal(cut[tap], signals[tap])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    model, inputs = build("llama")
    taps = ["model.layers.0.mlp", "hidden.2", "attention.2"]
    with capture(model, taps) as expected:
        model(**inputs)
    with context(), capture(model, taps) as signals:
        model(**inputs)
    for tap in taps:
        assert torch.equal(signals[tap], expected[tap])
        assert not signals[tap].requires_grad


def test_the_gradient_of_attention_is_that_of_eager():
    model, inputs = build("gpt2")
    with capture(model, "attention.2") as signals:
        model(**inputs)
    torch.manual_seed(2)
    weights = torch.randn_like(signals["attention.2"])
    found = torch.autograd.grad((signals["attention.2"] * weights).sum(), model.transformer.wte.weight)[0]
    model.set_attn_implementation("eager")
    probabilities = model(**inputs, output_attentions=True).attentions[1]
    expected = torch.autograd.grad((probabilities * weights).sum(), model.transformer.wte.weight)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# --- transformers models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_the_models_own(name):
    model, inputs = build(name)
    taps, before = layered(model, "hidden"), traces(model)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        plain = model(**inputs)
        with capture(model, taps) as signals:
            output = model(**inputs)
    for tap in taps:
        assert torch.equal(signals[tap], reported(expected, tap, "hidden_states")), tap
    states = [value for key, value in expected.items() if key.endswith("hidden_states")]
    assert len(taps) == sum(len(value) for value in states)  # all of them, and no more
    assert list(output.keys()) == list(plain.keys())
    assert torch.equal(output.logits, plain.logits)
    assert traces(model) == before


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("start", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_attention_is_that_of_eager(name, start, padded):
    model, inputs = build(name)
    if not padded:  # then a causal model has no mask at all
        inputs = {key: value for key, value in inputs.items() if "mask" not in key}
    taps = layered(model, "attention", "cross_attention")
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    model.set_attn_implementation(start)
    with torch.no_grad():
        expected = eager(**inputs, output_attentions=True)
        plain = model(**inputs)
        with capture(model, taps) as signals:
            output = model(**inputs)
    for tap in taps:
        own = reported(expected, tap, "attentions")
        torch.testing.assert_close(signals[tap], own, atol=1e-5, rtol=0)
        assert (own - own.mean(-1, keepdim=True)).abs().max() > 0.05  # else a uniform answer would pass
    torch.testing.assert_close(output.logits, plain.logits, atol=0 if start == "sdpa" else 1e-4, rtol=0)
    assert traces(model) == ([], [], {start})


@pytest.mark.parametrize("name", MODELS)
def test_probabilities_are_before_dropout_and_the_model_is_not_disturbed(name):
    model, inputs = build(name)
    tap = layered(model, "attention", "cross_attention")[0]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        for attribute in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.3)
    model.train()
    torch.manual_seed(3)
    plain = model(**inputs).logits
    torch.manual_seed(3)
    with capture(model, tap) as signals:
        output = model(**inputs).logits
    assert torch.equal(output, plain)
    assert not torch.equal(output, model(**inputs).logits)  # dropout is at work
    torch.testing.assert_close(signals[tap].sum(-1), torch.ones(signals[tap].shape[:-1]))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
def test_probabilities_times_values_are_what_the_block_goes_on_with(name):
    model, inputs = build(name)
    paths = {
        "bert": ("", "bert.encoder.layer.1.attention.output.dense"),
        "gpt2": ("", "transformer.h.1.attn.c_proj"),
        "llama": ("", "model.layers.1.self_attn.o_proj"),
        "t5": ("decoder.", "decoder.block.1.layer.0.SelfAttention.o"),
        "bart": ("decoder.cross_", "model.decoder.layers.1.encoder_attn.out_proj"),
    }
    prefix, path = paths[name]
    layered(model, "value")
    taps = {"p": f"{prefix}attention.2", "v": f"{prefix}value.2", "q": f"{prefix}query.2", "out": f"input:{path}"}
    with torch.no_grad(), capture(model, taps) as signals:
        model(**inputs)
    groups = signals["q"].shape[1] // signals["v"].shape[1]
    assert groups == (2 if name == "llama" else 1)
    mixed = (signals["p"] @ signals["v"].repeat_interleave(groups, 1)).transpose(1, 2).flatten(2)
    real = inputs["attention_mask"][:, : mixed.shape[1]].bool()
    torch.testing.assert_close(mixed[real], signals["out"][real], atol=1e-5, rtol=1e-5)


def test_queries_and_keys_make_the_probabilities():
    model, inputs = build("distilbert")
    inputs = {"input_ids": inputs["input_ids"]}
    with torch.no_grad(), capture(model, ["query.1", "key.1", "attention.1"]) as signals:
        model(**inputs)
    scores = signals["query.1"] @ signals["key.1"].transpose(-1, -2) / 4**0.5
    torch.testing.assert_close(signals["attention.1"], scores.softmax(-1))


def test_rows_that_see_nothing_are_finite():
    model, inputs = build("llama")
    left = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}  # causal and padded on the left
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad(), capture(model, ["attention.1", "attention.2"]) as signals:
        model(**left)
    expected = eager(**left, output_attentions=True).attentions
    torch.testing.assert_close(signals["attention.1"], expected[0], atol=1e-5, rtol=0)
    assert signals["attention.2"].isfinite().all()


@pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.float32).min])
def test_additive_masks(lowest):
    model, _ = build("bert")
    mask = torch.zeros(3, 1, 6, 6)
    mask[0, :, :, 4:] = lowest
    mask[1, :, 2] = lowest  # one query sees no key
    with torch.no_grad(), capture(model, ["attention.1", "query.1", "key.1"]) as signals:
        model(input_ids=IDS, attention_mask=mask)
    free = (signals["query.1"] @ signals["key.1"].transpose(-1, -2) / 2).softmax(-1)
    torch.testing.assert_close(signals["attention.1"][2], free[2])
    assert signals["attention.1"][0, :, :, 4:].abs().max() == 0
    torch.testing.assert_close(signals["attention.1"].sum(-1), torch.ones(3, 4, 6))


def test_a_softcap_is_refused_rather_than_left_out():
    model, inputs = build("llama")
    with pytest.raises(SignalError, match="LlamaAttention has a softcap"), capture(model, "attention.2"):
        model(**inputs, softcap=5.0)
    assert traces(model) == CLEAN


def test_half_precision_keeps_its_type_and_its_rows():
    model, inputs = build("llama")
    model.to(torch.bfloat16)
    with torch.no_grad(), capture(model, "attention.1") as signals:
        model(**inputs)
    assert signals["attention.1"].dtype == torch.bfloat16
    torch.testing.assert_close(signals["attention.1"].float().sum(-1), torch.ones(3, 4, 6), atol=0.02, rtol=0)


def test_only_tapped_layers_pay_for_their_probabilities(monkeypatch):
    model, inputs = build("bert")
    seen = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, *a, **k: seen.append(1) or softmax(self, *a, **k))
    with capture(model, ["attention.2", "value.1"]):
        model(**inputs)
    assert len(seen) == 1


def test_what_the_caller_asked_for_stays():
    model, inputs = build("bert")
    with torch.no_grad(), capture(model, "hidden.1") as signals:
        output = model(**inputs, output_hidden_states=True)
        assert len(output.hidden_states) == 3
        assert torch.equal(signals["hidden.1"], output.hidden_states[1])
    with torch.no_grad(), capture(model.bert, "hidden.1"):
        as_tuple = model.bert(**inputs, return_dict=False)
    expected = model.bert(**inputs).to_tuple()
    assert isinstance(as_tuple, tuple)
    assert [item.shape for item in as_tuple] == [item.shape for item in expected]


def test_two_forwards_in_one_block():
    model, inputs = build("bert")
    taps = ["hidden.2", "attention.1"]
    for tap in taps:
        with pytest.raises(SignalError, match=f"'{tap}' was called more than once"):
            twice(model, inputs, [tap])
        assert traces(model) == CLEAN
    other = {**inputs, "input_ids": inputs["input_ids"] + 1}
    with torch.no_grad(), capture(model, [f"{tap}@1" for tap in taps]) as second:
        model(**inputs)
        model(**other)
    with torch.no_grad(), capture(model, taps) as alone:
        model(**other)
    for tap in taps:
        assert torch.equal(second[f"{tap}@1"], alone[tap])


def test_blocks_inside_one_another():
    model, inputs = build("bert")
    taps = ["hidden.1", "attention.1", "bert.pooler"]
    with torch.no_grad(), capture(model, taps) as outer:
        with capture(model, taps) as inner:
            output = model(**inputs)
        assert model.config._attn_implementation != "sdpa"
    for tap in taps:
        assert torch.equal(outer[tap], inner[tap])
    assert output.hidden_states is None
    assert traces(model) == CLEAN


def test_capturing_many_times_leaks_nothing():
    model, inputs = build("llama")
    taps = ["model.layers.0", "hidden.1", "attention.2"]

    def size():
        return sum(len(vars(module)) + len(module._forward_hooks) for module in model.modules())

    with torch.no_grad():
        with capture(model, taps):
            model(**inputs)
        before = size()
        for _ in range(20):
            with capture(model, taps):
                model(**inputs)
    assert size() == before
    assert traces(model) == CLEAN


# --- gradient checkpointing and compilation ---------------------------------------------------------------------------


def loss_of(signals, logits):
    torch.manual_seed(5)
    total = logits.pow(2).mean()
    for value in signals.values():
        total = total + (value * torch.randn(value.shape)).mean()
    return total


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_gradient_checkpointing_changes_nothing(name):
    model, inputs = build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    paths = {"bert": "bert.encoder.layer.0.intermediate", "gpt2": "transformer.h.1.mlp", "llama": "model.layers.0.mlp"}
    tower = "decoder." if name == "t5" else ""
    taps = [paths.get(name, "encoder.block.0.layer.1"), f"{tower}hidden.1", f"{tower}hidden.2"]
    taps += [tap for tap in (f"{tower}attention.2", f"{tower}value.1") if tap in available(model)]
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        with capture(model, taps) as signals:
            logits = model(**inputs).logits
        results.append((dict(signals), gradients(model, loss_of(signals, logits))))
    (plain, expected), (found, grads) = results
    for tap in taps:
        torch.testing.assert_close(found[tap], plain[tap], atol=1e-5, rtol=1e-5)
    assert grads.keys() == expected.keys()
    for key, value in grads.items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4)


class Distillation(nn.Module):
    """A module whose forward enters a capture, as the engine's does."""

    def __init__(self, student, taps):
        super().__init__()
        self.student = student
        self.taps = taps

    def forward(self, **inputs):
        with capture(self.student, self.taps) as signals:
            output = self.student(**inputs)
        return getattr(output, "logits", output), signals


def check_compiled(student, taps, inputs):
    module = Distillation(student, taps)
    untouched = copy.deepcopy(module)  # its hooks are not there yet, as in a run that is compiled from the start
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    logits, signals = compiled(**inputs)
    found = gradients(module, loss_of(signals, logits))
    compiled(**inputs)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled(**inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs <= 2  # no new one at every step
    assert own_hooks(student) == []
    expected_logits, expected_signals = untouched(**inputs)
    expected = gradients(untouched, loss_of({tap: expected_signals[tap] for tap in signals}, expected_logits))
    assert set(signals) == set(taps)
    torch.testing.assert_close(logits, expected_logits, atol=1e-6, rtol=1e-5)
    for tap in taps:
        torch.testing.assert_close(signals[tap], expected_signals[tap], atol=1e-6, rtol=1e-5)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5)


def test_compiled_without_a_graph_break_for_module_paths():
    check_compiled(Net(), ["rest.0", "shared@1", "input:shared@0", "clone:norm"], {"x": torch.randn(4, 3)})


def test_compiled_without_a_graph_break_an_overwritten_output_is_right():
    net, x = Net(), torch.randn(4, 3)
    torch._dynamo.reset()
    _, signals = torch.compile(Distillation(net, ["norm", "shared@1"]), backend="aot_eager", fullgraph=True)(x=x)
    torch.testing.assert_close(signals["norm"], net.norm(signals["shared@1"]))


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("kind", ["hidden", "attention"])
def test_compiled_without_a_graph_break_for_transformers(name, kind):
    student, inputs = build(name)
    taps = [f"{kind}.1", f"{kind}.2"]
    check_compiled(student, taps, inputs)
    assert traces(student) == CLEAN


def test_a_wrong_tap_is_told_under_compilation_too():
    torch._dynamo.reset()
    compiled = torch.compile(Distillation(Net(), ["shard"]), backend="aot_eager")
    with pytest.raises(SignalError, match="did you mean 'shared'"):
        compiled(x=torch.randn(4, 3))
