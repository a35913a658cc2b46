"""Tiny models with random weights, in folders of the layout that the hub has: what `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SENTENCES = [
    ("a warm and funny film", 1),
    ("dull plot and flat jokes", 0),
    ("the cast is great", 1),
    ("a boring mess", 0),
    ("great jokes and a warm cast", 1),
    ("the film is a flat bore", 0),
    ("funny and great", 1),
    ("a dull and boring film", 0),
]
WORDS = sorted({word for text, _ in SENTENCES for word in text.split()})
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64}


def word_pieces(words: list[str] | None = None, lower: bool = True) -> Any:
    """A tokenizer of the BERT kind, one token a word."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: place for place, token in enumerate([*special, *(words or WORDS)])}
    return transformers.BertTokenizer(vocab=vocabulary, do_lower_case=lower, model_max_length=64)


def roberta_tokenizer() -> Any:
    """A tokenizer of another kind: other tokens, other special ones, no token types."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {token: place for place, token in enumerate([*special, *sorted(set("".join(WORDS)))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = ("bos", "pad", "eos", "unk", "mask")
    tokens = {f"{name}_token": token for name, token in zip(names, special, strict=True)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=60,
        model_input_names=["input_ids", "attention_mask"],
        **tokens,
    )


def decoder_tokenizer(pad: str | None = None) -> Any:
    """A tokenizer of the GPT kind: one token a word, none at the ends, and none to pad with."""
    vocabulary = {token: place for place, token in enumerate(["<unk>", "<end>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "eos_token": "<end>", **({} if pad is None else {"pad_token": pad})}
    inputs = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=64, model_input_names=inputs, **names
    )


def bert(folder: Path, *, layers: int = 4, head: list[str] | None = None, seed: int = 0, **config: Any) -> Path:
    """A BERT with its tokenizer; with ``head`` a classifier of these classes, else the bare encoder."""
    tokenizer = word_pieces()
    made = transformers.BertConfig(vocab_size=len(tokenizer), num_hidden_layers=layers, **{**SIZES, **config})
    return _saved(folder, made, "Bert", tokenizer, head, seed)


def distilbert(folder: Path, *, layers: int = 2, head: list[str] | None = None, seed: int = 1) -> Path:
    """A DistilBERT whose tokenizer gives BERT's tokens, without token types."""
    tokenizer = word_pieces()
    made = transformers.DistilBertConfig(
        vocab_size=len(tokenizer), n_layers=layers, dim=16, n_heads=2, hidden_dim=24, max_position_embeddings=64
    )
    path = _saved(folder, made, "DistilBert", tokenizer, head, seed)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(path)
    return path


def roberta(folder: Path, *, layers: int = 2, head: list[str] | None = None, seed: int = 2) -> Path:
    """A RoBERTa, whose tokens are not BERT's."""
    tokenizer = roberta_tokenizer()
    made = transformers.RobertaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=layers, pad_token_id=1, bos_token_id=0, eos_token_id=2, **SIZES
    )
    return _saved(folder, made, "Roberta", tokenizer, head, seed)


def gpt2(folder: Path, *, head: list[str] | None = None, pad: str | None = None, seed: int = 4) -> Path:
    """A GPT-2, which like most decoders has no padding token; ``pad`` names one for its tokenizer."""
    tokenizer = decoder_tokenizer(pad)
    made = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_layer=2, n_embd=16, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1
    )
    return _saved(folder, made, "GPT2", tokenizer, head, seed)


def llama(folder: Path, *, head: list[str] | None = None, pad: str | None = None, seed: int = 5) -> Path:
    """A Llama, likewise."""
    tokenizer = decoder_tokenizer(pad)
    made = transformers.LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, num_key_value_heads=1, bos_token_id=1, eos_token_id=1, **SIZES
    )
    return _saved(folder, made, "Llama", tokenizer, head, seed)


def vit(folder: Path, *, layers: int = 2, head: list[str] | None = None, size: int = 16, seed: int = 3) -> Path:
    """A ViT for images of ``size`` pixels, with its image processor."""
    made = transformers.ViTConfig(image_size=size, patch_size=4, num_hidden_layers=layers, **_without_positions())
    processor = transformers.ViTImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]
    )
    return _saved(folder, made, "ViT", processor, head, seed, kind="ImageClassification")


def _without_positions() -> dict[str, int]:
    return {name: value for name, value in SIZES.items() if name != "max_position_embeddings"}


def _saved(
    folder: Path,
    config: Any,
    family: str,
    processor: Any,
    head: list[str] | None,
    seed: int,
    kind: str = "SequenceClassification",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if head is not None:
        config.id2label = dict(enumerate(head))
        config.label2id = {name: place for place, name in enumerate(head)}
    name = f"{family}Model" if head is None else f"{family}For{kind}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        getattr(transformers, name)(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
