"""Layers by number: a BERT of four blocks teaches one of two its hidden states and its attention.

    python examples/feature_distillation.py

Layer 0 is the embeddings, layer n what comes out after block n. The student is narrower: a linear layer, which is left
behind afterwards, brings its states to the teacher's width. A layer that a model lacks is refused with one that fits.

Promises: "all hidden states came nearer to the teacher's: yes", "nothing but the student was saved: yes"
"""

import itertools
import json
import tempfile
from pathlib import Path

from datasets import ClassLabel, Dataset
from transformers import BertConfig, BertModel, BertTokenizer, set_seed

import potstill
from potstill.errors import TrainingError

THINGS = ["film", "plot", "cast", "script", "ending", "music", "camera", "story"]
WORDS = {"dislike": ["dull", "boring", "flat", "weak", "tired"], "like": ["warm", "funny", "great", "clever", "fresh"]}
rows = [(f"the {thing} is {word}", name) for name in WORDS for thing, word in itertools.product(THINGS, WORDS[name])]
texts = [text for text, _ in rows]
data = Dataset.from_dict({"text": texts, "label": [list(WORDS).index(name) for _, name in rows]})
data = data.cast_column("label", ClassLabel(names=list(WORDS))).train_test_split(0.25, seed=0)

folder = Path(tempfile.mkdtemp(prefix="feature-distillation-"))
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in texts for word in text.split()})]
set_seed(0)
for name, blocks, width in (("teacher", 4, 48), ("student", 2, 32)):
    sizes = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 32}
    config = BertConfig(vocab_size=len(words), num_hidden_layers=blocks, **sizes)
    BertModel(config).save_pretrained(folder / name)
    BertTokenizer(vocab={word: n for n, word in enumerate(words)}, model_max_length=32).save_pretrained(folder / name)
teacher = potstill.TeacherModel(potstill.TeacherConfig(str(folder / "teacher")))
student = potstill.StudentModel(potstill.StudentConfig(str(folder / "student")))
attention = potstill.AttentionDistillation(layer_mapping={0: 0, 2: 1, 4: 2}, attention_loss_weight=0.3)
args = {"epochs": 12, "batch_size": 16, "learning_rate": 3e-3}

for layers in ([2, 4], [1, 2]):
    part = potstill.FeatureDistillation(teacher_layers=[2, 4], student_layers=layers, feature_loss_weight=0.5)
    how = potstill.DistillationConfig("combined", feature_distillation=part, attention_distillation=attention)
    try:
        done = potstill.Distiller(teacher, student, how).distill(data["train"], data["test"], args=args, output=folder)
    except TrainingError as error:
        print(error)

print(f"accuracy {done.metrics.models['distilled'].metrics['accuracy'].value:.3f}")
lines = [line for line in json.loads((folder / "history/distilled.json").read_text()) if "loss" in line]
layers = [key for key in lines[0] if key.startswith(("loss/feature", "loss/attention"))]
print("\n".join(f"{key}: {lines[0][key]:.5f} at first, {lines[-1][key]:.5f} in the end" for key in layers))
nearer = all(lines[-1][key] < lines[0][key] for key in layers if "feature" in key)
print(f"all hidden states came nearer to the teacher's: {'yes' if nearer else 'no'}")
same = set(done.student.state_dict()) == set(student.model.state_dict())
print(f"nothing but the student was saved: {'yes' if same else 'no'}")
