"""A mean teacher: the student learns from the moving average of its own weights.

    python examples/mean_teacher.py

Of 400 cells 20 have a label. On all of them the student, which is trained with dropout, is to say what its average
says; the average is saved and judged as a model of its own.

Promises: "the average was judged as a teacher: yes", "it learned: yes"
"""

import tempfile
from pathlib import Path

from datasets import Dataset
from sklearn.datasets import load_breast_cancer

from potstill import load_recipe

RECIPE = """
name: mean-teacher
task: {name: tabular-classification}
data: {source: files, path: cells, validation: 0}
teacher: {source: {moving_average: {decay: 0.95}}}
student: {model: potstill:mlp, kwargs: {hidden: [32], dropout: 0.2}}
objective:
  consistency: {loss: kl, weight: {from: 0.0, to: 1.0, end: 0.3}}     # on all rows
  hard: {loss: cross_entropy}                                          # on those with a label
train: {epochs: 15, batch_size: 40, learning_rate: 5.0e-3}
evaluate: {latency: false}
"""

folder = Path(tempfile.mkdtemp(prefix="mean-teacher-"))
cells = load_breast_cancer(as_frame=True).frame.sample(frac=1, random_state=0).rename(columns={"target": "label"})
(folder / "cells").mkdir()
for split, rows, known in (("train", cells[:400], 20), ("test", cells[400:], 169)):
    labels = [label if place < known else -1 for place, label in enumerate(rows["label"])]
    Dataset.from_pandas(rows.assign(label=labels), preserve_index=False).to_parquet(folder / f"cells/{split}.parquet")
(folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
metrics = load_recipe(folder / "recipe.yaml").build(folder / "run", bars=False).execute()
for name, model in metrics.models.items():
    print(f"{name}: accuracy {model.metrics['accuracy'].value:.3f}")

average = metrics.models["teacher"]
print(f"the average was judged as a teacher: {'yes' if average.role == 'teacher' and average.parameters else 'no'}")
print(f"it learned: {'yes' if average.metrics['accuracy'].value > 0.8 else 'no'}")
