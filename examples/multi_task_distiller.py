"""One student for two tasks, from Python: the feeling of a sentence, and whether two sentences are about one thing.

    python examples/multi_task_distiller.py

Each task has a teacher, which is fine-tuned first on the rows of its task, and its own classes in the student. Once
what the teachers say shapes the encoder that both tasks share, and once it moves the heads alone.

Promises: "the feeling was learned beside the other task: yes", "the heads have the classes of both tasks: yes"
"""

import itertools
import random
import tempfile
from pathlib import Path

from datasets import ClassLabel, Dataset
from transformers import BertConfig, BertModel, BertTokenizer, set_seed

import potstill

THINGS = ["film", "plot", "cast", "music"]
WORDS = {"dislike": ["dull", "boring", "flat", "weak"], "like": ["warm", "funny", "great", "clever"]}
SAME = ["another thing", "the same thing"]
texts = {f"the {thing} is {word}": name for name in WORDS for thing, word in itertools.product(THINGS, WORDS[name])}
draw = random.Random(0)
pairs = [(one, other) for one in texts for other in draw.sample(list(texts), 6)]
about = [int(one.split()[1] == other.split()[1]) for one, other in pairs]
feeling = Dataset.from_dict({"text": list(texts), "label": [list(WORDS).index(name) for name in texts.values()]})
alike = Dataset.from_dict({"premise": [a for a, _ in pairs], "hypothesis": [b for _, b in pairs], "label": about})
data = {
    "sentiment": feeling.cast_column("label", ClassLabel(names=list(WORDS))).train_test_split(0.25, seed=0),
    "nli": alike.cast_column("label", ClassLabel(names=SAME)).train_test_split(0.25, seed=0),
}

folder = Path(tempfile.mkdtemp(prefix="multi-task-distiller-"))
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in texts for word in text.split()})]
set_seed(0)
for name, blocks in (("teacher", 2), ("student", 1)):
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 32}
    BertModel(BertConfig(vocab_size=len(words), num_hidden_layers=blocks, **sizes)).save_pretrained(folder / name)
    BertTokenizer(vocab={word: n for n, word in enumerate(words)}, model_max_length=32).save_pretrained(folder / name)

for shared in (True, False):
    distiller = potstill.MultiTaskDistiller(
        tasks=["sentiment", "nli"],
        task_weights=[0.5, 0.5],
        sampling="uniform",
        shared_distillation=shared,
        student=potstill.StudentModel(potstill.StudentConfig(str(folder / "student"))),
        teachers={task: potstill.TeacherModel(potstill.TeacherConfig(str(folder / "teacher"))) for task in data},
    )
    train, judged = ({task: each[split] for task, each in data.items()} for split in ("train", "test"))
    args = {"epochs": 16, "batch_size": 16, "learning_rate": 3e-3}
    done = distiller.distill(train, judged, args=args, output=folder / f"shared-{shared}")
    for name, model in done.metrics.models.items():
        print(f"{name}: " + ", ".join(f"{key} {found.value:.3f}" for key, found in model.metrics.items()))

learned = done.metrics.models["distilled"].metrics["sentiment/accuracy"].value > 0.8
print(f"the feeling was learned beside the other task: {'yes' if learned else 'no'}")
print(f"the heads have the classes of both tasks: {'yes' if len(done.student.config.id2label) == 4 else 'no'}")
