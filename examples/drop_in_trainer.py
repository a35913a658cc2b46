"""``DistillationTrainer`` in place of a ``Trainer`` whose ``compute_loss`` was overridden: a BERT teaches a DistilBERT.

    python examples/drop_in_trainer.py [--teacher MODEL] [--student MODEL] [--train FILE.csv] [--output FOLDER]

``--teacher`` and ``--student`` are ids of the hub or folders: a fine-tuned classifier of sentence pairs, and what is to
become one with the same vocabulary. ``--train`` is a file with the columns ``first``, ``second`` and ``label`` (0, 1,
…). Without them the script makes tiny models and a tiny tokenizer, trains the teacher on sentence pairs that it also
makes (is the second sentence negated?), and needs no network and no files:

    python examples/drop_in_trainer.py --teacher path/to/bert --student distilbert-base-uncased --train pairs.csv

What a hand-written ``compute_loss`` gets wrong is taken care of: the teacher sees ``token_type_ids`` though DistilBERT
has none, it stays in eval mode, the loss does not depend on how a batch is split, and the folder holds the bare
student.

Promises: "the teacher sees token_type_ids: yes", "the student learned: yes", "same predictions after reload: yes",
"the subclass trains: yes"
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, load_dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from potstill import DistillationTrainer, Term

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def sentence_pairs() -> Dataset:
    """All pairs of small sentences, each negated or not; the label says whether the second one is."""
    animals, verbs = ("cat", "dog", "bird", "fish", "horse"), ("sleeps", "eats", "runs", "hides")
    sentences = [f"the {animal} {verb}" for animal, verb in itertools.product(animals, verbs)]
    rows = []
    for first, second in itertools.product(sentences, sentences):
        for one, other in itertools.product((False, True), repeat=2):
            rows.append({"first": _said(first, one), "second": _said(second, other), "label": int(other)})
    random.Random(0).shuffle(rows)
    return Dataset.from_list(rows[:1000]).cast_column("label", ClassLabel(names=["plain", "negated"]))


def _said(sentence: str, negated: bool) -> str:
    return sentence.replace("the ", "not the ") if negated else sentence


def tiny_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer trained on these texts, which marks the two sentences as BERT's does."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return BertTokenizerFast(tokenizer_object=tokenizer)


def tiny_models(vocabulary: int) -> tuple[nn.Module, nn.Module]:
    """A BERT of two layers and a DistilBERT of one, untrained."""
    shape = {"vocab_size": vocabulary, "max_position_embeddings": 32, "num_labels": 2}
    teacher = BertConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        hidden_dropout_prob=0.0,
        **shape,
    )
    student = DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, **shape)
    return BertForSequenceClassification(teacher), DistilBertForSequenceClassification(student)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


class CalmTrainer(DistillationTrainer):
    """A subclass that overrides ``compute_loss``: the usual objective, less a bonus for being unsure.

    Reference: Pereyra et al. 2017, https://arxiv.org/abs/1701.06548.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return a mean over the micro-batch, as any ``compute_loss`` of ``Trainer`` may."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        entropy = torch.distributions.Categorical(logits=outputs.logits).entropy().mean()
        loss = loss - 0.01 * entropy
        return (loss, outputs) if return_outputs else loss


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    wanted = {
        "output_dir": str(folder),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 128,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**wanted, **changes})


def prepare(options: argparse.Namespace, folder: Path) -> tuple[nn.Module, nn.Module, PreTrainedTokenizerBase, Any]:
    """Teacher, student, tokenizer, and the two splits as token ids."""
    pairs = sentence_pairs() if options.train is None else load_dataset("csv", data_files=options.train, split="train")
    if options.teacher is None:
        tokenizer = tiny_tokenizer([*pairs["first"], *pairs["second"]])
        teacher, student = tiny_models(len(tokenizer))
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.teacher)
        teacher = AutoModelForSequenceClassification.from_pretrained(options.teacher)
        labels = {"id2label": teacher.config.id2label, "label2id": teacher.config.label2id}
        student = AutoModelForSequenceClassification.from_pretrained(options.student, **labels)

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(rows["first"], rows["second"], truncation=True, return_token_type_ids=True)
        return {**encoded, "labels": rows["label"]}

    splits = pairs.map(encode, batched=True, remove_columns=pairs.column_names).train_test_split(0.2, seed=0)
    if options.teacher is None:  # a tiny one must learn first; a real one comes trained
        data = {"train_dataset": splits["train"], "data_collator": DataCollatorWithPadding(tokenizer)}
        Trainer(model=teacher, args=arguments(folder / "teacher"), **data).train()
    return teacher, student, tokenizer, splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a fine-tuned classifier of sentence pairs; a tiny one if omitted")
    parser.add_argument("--student", default="distilbert-base-uncased", help="used where a teacher is given")
    parser.add_argument("--train", help="a csv file with the columns first, second and label; made up if omitted")
    parser.add_argument("--output", type=Path, help="where the student goes; a temporary folder if omitted")
    options = parser.parse_args()
    output = options.output or Path(tempfile.mkdtemp(prefix="drop-in-"))
    set_seed(0)
    teacher, student, tokenizer, splits = prepare(options, output)
    untrained = {name: value.clone() for name, value in student.state_dict().items()}
    data = {
        "train_dataset": splits["train"],
        "eval_dataset": splits["test"],
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": compute_metrics,
    }
    changes = {} if options.teacher is None else {"learning_rate": 5e-5}

    # was: DistillingTrainer(model=student, args=…, **data), with the loss written by hand in compute_loss
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        objective={"soft": Term("kl", weight=0.7, temperature=2.0), "hard": Term("cross_entropy", weight=0.3)},
        args=arguments(output, **changes),
        **data,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    print(f"the teacher sees token_type_ids: {'yes' if 'token_type_ids' in batch else 'no'}")
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    print(f"student: accuracy {before:.3f} before, {after:.3f} after")
    print(f"the student learned: {'yes' if after > before + 0.1 else 'no'}")

    trainer.save_model(str(output / "student"))
    answers = trainer.predict(splits["test"]).predictions
    reloaded = AutoModelForSequenceClassification.from_pretrained(output / "student").eval()
    batch = DataCollatorWithPadding(tokenizer)(list(splits["test"]))
    with torch.no_grad():
        again = reloaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.numpy()
    print(f"same predictions after reload: {'yes' if np.allclose(again, answers, atol=1e-4) else 'no'}")

    student.load_state_dict(untrained)
    calm = CalmTrainer(model=student, teacher=teacher, args=arguments(output / "calm", **changes), **data)
    calm.train()
    accuracy = calm.evaluate()["eval_accuracy"]
    print(f"subclass with its own compute_loss: accuracy {accuracy:.3f}")
    print(f"the subclass trains: {'yes' if accuracy > before + 0.1 else 'no'}")
    print(f"student: {output / 'student'}")


if __name__ == "__main__":
    main()
