"""Blocks one after another: a student of two blocks learns from a teacher of four, the first block first.

    python examples/progressive_distillation.py

The block of the student that is nearer to the text learns the teacher's second block, from the first step on; the other
one joins for the last two thirds, and with it the answers and the labels.

Promises: "the second block waited for its turn: yes", "the first block never stopped: yes"
"""

import itertools
import json
import tempfile
from pathlib import Path

from datasets import ClassLabel, Dataset
from transformers import BertConfig, BertModel, BertTokenizer, set_seed

import potstill

THINGS = ["film", "plot", "cast", "script", "ending", "music", "camera", "story"]
WORDS = {"dislike": ["dull", "boring", "flat", "weak", "tired"], "like": ["warm", "funny", "great", "clever", "fresh"]}
rows = [(f"the {thing} is {word}", name) for name in WORDS for thing, word in itertools.product(THINGS, WORDS[name])]
texts = [text for text, _ in rows]
data = Dataset.from_dict({"text": texts, "label": [list(WORDS).index(name) for _, name in rows]})
data = data.cast_column("label", ClassLabel(names=list(WORDS))).train_test_split(0.25, seed=0)

folder = Path(tempfile.mkdtemp(prefix="progressive-distillation-"))
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in texts for word in text.split()})]
set_seed(0)
sizes = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 32}
BertModel(BertConfig(vocab_size=len(words), num_hidden_layers=4, **sizes)).save_pretrained(folder / "teacher")
tokens = {word: place for place, word in enumerate(words)}
BertTokenizer(vocab=tokens, model_max_length=32).save_pretrained(folder / "teacher")

teacher = potstill.TeacherModel(potstill.TeacherConfig(str(folder / "teacher")))
student = potstill.StudentModel(potstill.StudentConfig(keep_blocks=[1, 3]))  # counted from 0: the second and the last
part = potstill.ProgressiveDistillation(
    teacher_layers=4, student_layers=2, distillation_schedule="custom", shares=[1 / 3, 2 / 3]
)
config = potstill.DistillationConfig("progressive", progressive_distillation=part, alpha=0.7, beta=0.3)
args = {"epochs": 12, "batch_size": 16, "learning_rate": 3e-3}
done = potstill.Distiller(teacher, student, config).distill(data["train"], data["test"], args=args, output=folder)

print(f"accuracy {done.metrics.models['distilled'].metrics['accuracy'].value:.3f}")
lines = [line for line in json.loads((folder / "history/distilled.json").read_text()) if "loss" in line]
for line in lines[:: len(lines) // 6]:
    values = ", ".join(f"{key[5:]} {value:.4f}" for key, value in line.items() if key.startswith("loss/"))
    print(f"step {line['step']}: {values}")
first, second = ([f"loss/progressive_{pair}" in line for line in lines] for pair in ("1_2", "2_4"))
print(f"the second block waited for its turn: {'yes' if not second[0] and second[-1] else 'no'}")
print(f"the first block never stopped: {'yes' if all(first) else 'no'}")
