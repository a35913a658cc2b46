"""The Python door: a BERT teaches a DistilBERT, and ``transformers.pipeline`` runs what comes out.

    python examples/quick_start.py [--teacher MODEL] [--student MODEL] [--train FILE.csv] [--output FOLDER]

``--teacher`` and ``--student`` are ids of the hub or folders; ``--train`` is a file with a column of texts and
``label``. Without them the script makes tiny models of the same classes and short reviews with a liking or a disliking
word, and needs no network and no files:

    python examples/quick_start.py --teacher bert-base-uncased --student distilbert-base-uncased --train reviews.csv

The teacher has no head for this task, so it is fine-tuned first; the student is trained twice, with its teacher and
without one.

Promises: "the teacher was fine-tuned first: yes", "the student learned: yes", "the pipeline answers alike: yes"
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, load_dataset
from transformers import BertConfig, BertModel, BertTokenizer, DistilBertConfig, DistilBertModel, pipeline, set_seed

from potstill import DistillationConfig, Distiller, StudentConfig, StudentModel, TeacherConfig, TeacherModel
from potstill.evaluation.predict import Predictions

WORDS = {
    "dislike": ("dull", "boring", "flat", "weak", "tired", "empty", "clumsy", "cold"),
    "like": ("warm", "funny", "great", "clever", "fresh", "moving", "bright", "bold"),
}
NAMES = list(WORDS)
THINGS = ("film", "plot", "cast", "script", "ending", "music", "camera", "story")
BEGINNINGS = (
    "the {thing} is {word}",
    "a {word} {thing}",
    "what a {word} {thing} this is",
    "i found the {thing} {word}",
)


def reviews() -> Dataset:
    """Short reviews in random order, each with one word that says what was thought."""
    rows = [
        {"text": beginning.format(thing=thing, word=word), "label": NAMES.index(name)}
        for name, words in WORDS.items()
        for beginning, thing, word in itertools.product(BEGINNINGS, THINGS, words)
    ]
    random.Random(0).shuffle(rows)
    return Dataset.from_list(rows).cast_column("label", ClassLabel(names=NAMES))


def tiny_models(folder: Path, texts: list[str]) -> tuple[str, str]:
    """Save a BERT of two layers and a DistilBERT of one with their tokenizer, all untrained."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {token: place for place, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=32)
    shape = {"vocab_size": len(vocabulary), "max_position_embeddings": 32}
    bert = BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, **shape)
    distilbert = DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, **shape)
    for name, model in (("bert", BertModel(bert)), ("distilbert", DistilBertModel(distilbert))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "bert"), str(folder / "distilbert")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a tiny BERT if omitted")
    parser.add_argument("--student", default="distilbert-base-uncased", help="used where a teacher is given")
    parser.add_argument("--train", help="a csv file with a column of texts and `label`; made up if omitted")
    parser.add_argument("--output", type=Path, help="the run's folder; a temporary one if omitted")
    options = parser.parse_args()
    output = options.output or Path(tempfile.mkdtemp(prefix="quick-start-"))
    set_seed(0)
    data = reviews() if options.train is None else load_dataset("csv", data_files=options.train, split="train")
    splits = data.train_test_split(0.25, seed=0)
    args: dict[str, Any] | None = None  # three epochs at a learning rate for real models
    if options.teacher is None:
        options.teacher, options.student = tiny_models(output / "made", data["text"][:])
        args = {"epochs": 5, "batch_size": 16, "learning_rate": 3e-3}

    teacher = TeacherModel(TeacherConfig(model_name_or_path=options.teacher, task_type="classification"))
    student = StudentModel(StudentConfig(model_name_or_path=options.student, task_type="classification"))
    config = DistillationConfig(distillation_type="logit", temperature=4.0, alpha=0.7, beta=0.3)
    done = Distiller(teacher, student, config).distill(
        splits["train"], splits["test"], args=args, output=output / "run"
    )

    for name, model in done.metrics.models.items():
        accuracy = model.metrics["accuracy"]
        print(
            f"{name}: {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}], {model.parameters:,} parameters"
        )
    trained = done.run.recipe.all_teachers["teacher"].train is not None
    print(f"the teacher was fine-tuned first: {'yes' if trained else 'no'}")
    chance = done.metrics.chance or 0.0
    better = done.metrics.models["distilled"].metrics["accuracy"].value > chance + 0.2
    print(f"the student learned: {'yes' if better else 'no'}")

    texts = splits["test"]["text"][:] if "text" in data.column_names else []
    said = Predictions.load(done.folder / "predictions/distilled.test.safetensors").logits.argmax(-1)
    names = done.student.config.id2label
    answers = pipeline("text-classification", model=str(done.student_folder))(texts)
    alike = [answer["label"] for answer in answers] == [names[int(place)] for place in said[: len(texts)]]
    print(f"the pipeline answers alike: {'yes' if alike else 'no'}")
    print(f"student: {done.student_folder}")


if __name__ == "__main__":
    main()
