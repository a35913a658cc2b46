"""Students cut from a teacher: they answer as the teacher would without the other blocks, and can be saved."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers as hf
from torch import Tensor, nn

from potstill.errors import ModelError
from potstill.models.plain import ConvNet, Mlp
from potstill.models.student import block_count, cut, find_blocks
from potstill.models.weights import load_student, save_student

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
DEEP = {**TEXT, "num_hidden_layers": 4, "max_position_embeddings": 40, "num_labels": 3}
CAUSAL = {**DEEP, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 16, "patch_size": 8, "num_labels": 3, "num_hidden_layers": 4}
VIT = {**IMAGE, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


def bert() -> Any:
    return hf.BertForSequenceClassification(hf.BertConfig(**DEEP))


def distilbert() -> Any:
    sizes = {"vocab_size": 40, "dim": 16, "n_heads": 2, "hidden_dim": 24, "n_layers": 4, "max_position_embeddings": 40}
    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**sizes))


def deberta() -> Any:
    options = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3}
    return hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**DEEP, **options, position_buckets=8))


def gpt2() -> Any:
    config = hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=2, n_positions=40, pad_token_id=0)
    return hf.GPT2ForSequenceClassification(config)


def qwen3() -> Any:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**CAUSAL, **window))


def gemma3() -> Any:
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**CAUSAL, sliding_window=4, layer_types=types))


def modernbert() -> Any:
    config = hf.ModernBertConfig(
        **DEEP, local_attention=4, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    )
    return hf.ModernBertForSequenceClassification(config)


def roberta() -> Any:
    config = hf.RobertaConfig(**DEEP, type_vocab_size=1)
    return hf.RobertaForMaskedLM(config)


def t5_encoder() -> Any:
    return hf.T5EncoderModel(hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=4, num_heads=2))


def dinov2() -> Any:
    return hf.Dinov2ForImageClassification(hf.Dinov2Config(**VIT))


TRANSFORMERS = {
    "bert": bert,
    "bert without pooler": lambda: hf.BertModel(hf.BertConfig(**DEEP), add_pooling_layer=False),
    "distilbert": distilbert,
    "roberta": roberta,
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**DEEP, embedding_size=8)),
    "deberta": deberta,
    "mpnet": lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**DEEP)),
    "gpt2": gpt2,
    "llama": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**CAUSAL)),
    "qwen3": qwen3,
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**CAUSAL, sliding_window=4)),
    "gemma3": gemma3,
    "modernbert": modernbert,
    "t5 encoder": t5_encoder,
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**VIT)),
    "dinov2": dinov2,
}


def timm_vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 3}
    return timm.models.VisionTransformer(**sizes)


def torchvision_vit(num_layers: int = 4) -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 8, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24, "num_classes": 3}
    model = torchvision.models.VisionTransformer(num_layers=num_layers, **sizes)
    nn.init.normal_(model.heads.head.weight)  # zeros by default
    return model


class Block(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx = number
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


class Plain(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(number) for number in range(depth))
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = pixel_values.flatten(1)[:, :4]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


PLAIN = {"timm": timm_vit, "torchvision": torchvision_vit, "plain": Plain}
ALL = {**TRANSFORMERS, **PLAIN}


@pytest.fixture(scope="module", params=ALL)
def model(request) -> Any:
    torch.manual_seed(0)
    made = ALL[request.param]().eval()
    for weight in made.parameters():  # LayerNorms of all ones and biases of all zeros would hide a mistake
        weight.data.add_(torch.randn_like(weight) * 0.1)
    return made


def answer(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if getattr(model, "main_input_name", "") == "input_ids":
            ids = torch.randint(3, 40, (2, 12), generator=generator)
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        else:
            out = model(torch.randn(2, 3, 16, 16, generator=generator))
    return out if isinstance(out, Tensor) else out[0]


def without(model: nn.Module, kept: list[int]) -> Tensor:
    """Answer of a model in which the other blocks hand on what they are given."""
    model = copy.deepcopy(model)

    def skip(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    for number, block in enumerate(model.get_submodule(find_blocks(model)).children()):
        if number not in kept:
            block.register_forward_hook(skip, with_kwargs=True)
    return answer(model)


def storages(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}


def test_all_blocks_give_the_same_answer(model) -> None:
    assert block_count(model) == 4
    torch.testing.assert_close(answer(cut(model, range(4))), answer(model), rtol=0, atol=0)


@pytest.mark.parametrize("kept", [[0, 2], [0, 1, 3]])
def test_answers_as_if_the_other_blocks_were_skipped(model, kept) -> None:
    small = cut(model, kept)
    assert type(small) is type(model)
    assert block_count(small) == len(kept)
    torch.testing.assert_close(answer(small), without(model, kept), rtol=0, atol=0)
    assert not torch.equal(answer(small), answer(model))


def test_the_original_is_left_alone(model) -> None:
    before, state = torch.random.get_rng_state(), copy.deepcopy(model.state_dict())
    config = copy.deepcopy(getattr(model, "config", None))
    small = cut(model, [0, 2])
    assert not storages(small) & storages(model)
    for weight in small.parameters():
        weight.data.zero_()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert block_count(model) == 4
    if config is not None:
        assert config.to_dict() == model.config.to_dict()
        assert small.config is not model.config
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_saved_and_loaded(name, tmp_path) -> None:
    torch.manual_seed(0)
    small = cut(TRANSFORMERS[name]().eval(), [0, 2])
    small.save_pretrained(tmp_path)
    options = {"add_pooling_layer": False} if name == "bert without pooler" else {}
    again, found = type(small).from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(found.values()), found
    assert again.config.num_hidden_layers == 2
    torch.testing.assert_close(answer(again), answer(small), rtol=0, atol=0)


def test_a_plain_student_is_the_smaller_model(tmp_path) -> None:
    small = cut(torchvision_vit().eval(), [1, 3])
    save_student(small, tmp_path)
    again = torchvision_vit(num_layers=2).eval()
    load_student(again, tmp_path)
    torch.testing.assert_close(answer(again), answer(small), rtol=0, atol=0)


def test_each_block_keeps_its_type() -> None:
    assert cut(qwen3(), [1, 3]).config.layer_types == ["full_attention", "sliding_attention"]
    small = cut(modernbert(), [0, 2])
    assert small.config.layer_types == ["full_attention", "full_attention"]
    assert [layer.attention_type for layer in small.model.layers] == ["full_attention", "full_attention"]
    assert cut(gemma3(), [0, 3]).config.layer_types == ["sliding_attention"] * 2


def test_lists_that_count_something_else_are_kept() -> None:
    config = hf.LlamaConfig(**{**CAUSAL, "eos_token_id": [2, 3, 4, 5]})
    assert cut(hf.LlamaForCausalLM(config), [0]).config.eos_token_id == [2, 3, 4, 5]


def test_blocks_are_numbered_anew() -> None:
    assert [layer.self_attn.layer_idx for layer in cut(qwen3(), [1, 3]).model.layers] == [0, 1]
    assert [block.layer_idx for block in cut(Plain(), [1, 3]).blocks] == [0, 1]


def test_a_backbone_gives_out_its_last_stage() -> None:
    small = cut(hf.Dinov2Backbone(hf.Dinov2Config(**VIT)), [1, 3])
    assert small.config.stage_names == ["stem", "stage1", "stage2"]
    assert small.config.out_features == ["stage2"]
    with pytest.raises(ModelError, match=r"what the blocks \[0\] say"):
        cut(hf.Dinov2Backbone(hf.Dinov2Config(**VIT, out_features=["stage1", "stage4"])), [1, 3])


def test_modes_dtypes_ties_and_attention_are_kept() -> None:
    model = roberta().to(torch.bfloat16).eval()
    model.set_attn_implementation("eager")
    model.roberta.encoder.layer[2].output.LayerNorm.float()
    model.roberta.embeddings.requires_grad_(False)
    model.roberta.encoder.layer[2].train()
    small = cut(model, [0, 2])
    assert small.lm_head.decoder.weight is small.roberta.embeddings.word_embeddings.weight
    assert small.config._attn_implementation == "eager"
    assert small.dtype == torch.bfloat16
    assert small.roberta.encoder.layer[1].output.LayerNorm.weight.dtype == torch.float32
    assert not small.roberta.embeddings.word_embeddings.weight.requires_grad
    assert small.roberta.encoder.layer[1].attention.training
    assert not small.training
    assert not small.roberta.encoder.layer[0].training


def test_weights_that_a_person_tied_stay_tied() -> None:
    model = Plain()
    model.blocks[2].linear.weight = model.blocks[0].linear.weight
    small = cut(model, [0, 2])
    assert small.blocks[0].linear.weight is small.blocks[1].linear.weight
    assert small.blocks[0].linear.weight is not model.blocks[0].linear.weight


def test_a_transformers_model_inside_another() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = bert()
            self.head = nn.Linear(3, 2)

    model = Wrapped()
    assert find_blocks(model) == "body.bert.encoder.layer"
    small: Any = cut(model, [1, 2])
    assert small.body.config.num_hidden_layers == 2
    assert model.body.config.num_hidden_layers == 4
    assert not storages(small) & storages(model)


def test_one_tower_of_several() -> None:
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    text = {**tower, "num_hidden_layers": 4, "vocab_size": 40, "eos_token_id": 2}
    vision = {**tower, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision))
    with pytest.raises(ModelError, match=r"'text_model.encoder.layers' \(4\), 'vision_model.encoder.layers' \(3\)"):
        find_blocks(model)
    small = cut(model, [0, 2], container="vision_model.encoder.layers")
    assert (small.config.text_config.num_hidden_layers, small.config.vision_config.num_hidden_layers) == (4, 2)
    assert block_count(small, "text_model.encoder.layers") == 4


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([0, 4], "expected block numbers from 0 to 3, got 4"),
        ([-1], "expected block numbers from 0 to 3, got -1"),
        ([], r"expected at least one block to keep, got none; every other one is \[0, 2\]"),
        ([0, 0, 2], r"expected each block once, got \[0, 0, 2\]; did you mean \[0, 2\]\?"),
        ([2, 0], r"expected block numbers that increase, got \[2, 0\]; did you mean \[0, 2\]\?"),
        ([0, 1.5], "expected block numbers from 0 to 3, got 1.5"),
        ("02", "expected block numbers from 0 to 3, got '0', '2'"),
    ],
)
@pytest.mark.parametrize("made", [bert, Plain])
def test_wrong_numbers(made, numbers, message) -> None:
    with pytest.raises(ModelError, match=message):
        cut(made(), numbers)


def test_numbers_of_numpy_are_numbers() -> None:
    assert block_count(cut(Plain(), np.arange(0, 4, 2))) == 2


def no_stack() -> dict[str, tuple[Any, str]]:
    t5 = hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    bart = hf.BartConfig(vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=16)
    swin = hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2)
    albert = hf.AlbertConfig(**DEEP, embedding_size=8)
    return {
        "t5": (lambda: hf.T5ForConditionalGeneration(t5), "one stack of blocks, got an encoder-decoder"),
        "bart": (lambda: hf.BartForSequenceClassification(bart), "one stack of blocks, got an encoder-decoder"),
        "swin": (lambda: hf.SwinModel(swin), r"got one with 2 stages of \[1, 1\] blocks"),
        "albert": (lambda: hf.AlbertModel(albert), "got one block that is run 4 times"),
        "mlp": (lambda: Mlp(4, 3, hidden=[5, 5]), "no blocks found in Mlp"),
        "convnet": (lambda: ConvNet(1, 3), "no blocks found in ConvNet"),
        "resnet": (torchvision.models.resnet18, r"'layer1' \(2\), 'layer2' \(2\), .*; say which with `container`"),
    }


@pytest.mark.parametrize("name", no_stack())
def test_models_that_are_no_stack_of_blocks(name) -> None:
    made, message = no_stack()[name]
    with pytest.raises(ModelError, match=message):
        cut(made(), [0])


def test_blocks_that_do_not_fit_their_new_place() -> None:
    with pytest.raises(ModelError, match=r"layers.1.attn_norm' does not fit 'model.layers.0.attn_norm'.*Identity"):
        cut(modernbert(), [1, 3])
    with pytest.raises(ModelError, match=r"'encoder.block.0.layer.0.SelfAttention.relative_attention_bias' is missing"):
        cut(t5_encoder(), [1, 3])
    config = hf.GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=40, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="scaling is"):
        cut(hf.GPT2LMHeadModel(config), [0, 2])
    types = hf.GPTNeoConfig(
        vocab_size=40, hidden_size=16, num_layers=4, num_heads=2, attention_types=[[["global", "local"], 2]]
    )
    with pytest.raises(ModelError, match=r"attention_layers|read back"):
        cut(hf.GPTNeoForCausalLM(types), [0, 2])


def test_a_model_that_was_changed_by_hand_is_refused() -> None:
    model = bert()
    model.classifier = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3))
    with pytest.raises(ModelError, match=r"'classifier.0' is left over"):
        cut(model, [0, 2])


def test_positions_learned_for_each_block_are_refused() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_rope_mixed_224", depth=3)
    with pytest.raises(ModelError, match="rope_mixed"):
        cut(model, [0, 2])


def test_container() -> None:
    model = torchvision.models.resnet18().eval()
    small = cut(model, [0], container="layer3")
    assert (block_count(small, "layer3"), block_count(small, "layer2")) == (1, 2)
    assert small(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    with pytest.raises(ModelError, match="ResNet has no 'layer9'; did you mean 'layer"):
        cut(model, [0], container="layer9")
    with pytest.raises(ModelError, match=r"ModuleList or nn.Sequential with blocks, got Linear at 'fc'"):
        cut(model, [0], container="fc")
    with pytest.raises(ModelError, match=r"got 'bert.encoder'; did you mean 'bert.encoder.layer'\?"):
        cut(bert(), [0], container="bert.encoder")


def test_a_model_that_is_its_own_container() -> None:
    model = nn.Sequential(*[Block(number) for number in range(3)])
    assert find_blocks(model) == ""
    small = cut(model, [0, 2])
    assert torch.equal(small(torch.ones(1, 4)), model[2](model[0](torch.ones(1, 4))))
