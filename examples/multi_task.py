"""One student for two tasks, each with a teacher of its own.

    python examples/multi_task.py

Which digit is it, and is it even? Each question has its own rows. The student has 10 + 2 outputs; a row is compared
with the teacher of its task, over the classes of its task.

Promises: "both tasks were learned by one model: yes"
"""

import tempfile
from pathlib import Path

from datasets import Dataset
from sklearn.datasets import load_digits

from potstill import load_recipe

RECIPE = """
name: multi-task
task:
  name: multi-task
  sampling: sqrt
  tasks: {digit: {name: image-classification}, parity: {name: image-classification}}
data:
  source: tasks
  kwargs:
    tasks:
      digit: {source: files, path: digit.parquet}
      parity: {source: files, path: parity.parquet}
teachers:
  digits: {model: "potstill:mlp", kwargs: {hidden: [64]}, task: digit, train: {epochs: 8}}
  parities: {model: "potstill:mlp", kwargs: {hidden: [64]}, task: parity, train: {epochs: 8}}
  both: {source: {per_task: {teachers: {digit: digits, parity: parities}}}}
student: {model: potstill:mlp, kwargs: {hidden: [32]}}
objective:
  soft: {loss: kl, teacher: both/logits, weight: 0.7, temperature: 2.0}
  hard: {loss: cross_entropy, weight: 0.3}
train: {epochs: 10, batch_size: 64, learning_rate: 1.0e-2}
evaluate: {latency: false}
"""

folder = Path(tempfile.mkdtemp(prefix="multi-task-"))
images, digits = load_digits().images, load_digits().target
for name, rows, labels in (("digit", slice(600), digits), ("parity", slice(600, 1000), digits % 2)):
    Dataset.from_dict({"image": images[rows], "label": labels[rows]}).to_parquet(folder / f"{name}.parquet")
(folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
metrics = load_recipe(folder / "recipe.yaml").build(folder / "run", bars=False).execute()
for name, model in metrics.models.items():
    print(f"{name}: " + ", ".join(f"{key} {value.value:.3f}" for key, value in model.metrics.items()))

own = metrics.models["distilled"].metrics
learned = own["digit/accuracy"].value > 0.7 and own["parity/accuracy"].value > 0.7
print(f"both tasks were learned by one model: {'yes' if learned else 'no'}")
