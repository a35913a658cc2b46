"""A teacher that is trained at the same time as its student, from the first step on.

    python examples/joint_teacher.py

Teacher and student take their steps together: the teacher by the labels, the student also by what the teacher says at
that step. Each has its own learning rate and its own gradient clipping, and no gradient of one reaches the other.

Promises: "teacher and student learned in one training: yes", "the student learned: yes"
"""

import tempfile
from pathlib import Path

from potstill import load_recipe

RECIPE = """
name: joint-teacher
task: {name: image-classification}
data: {source: sklearn, path: load_digits, test: 0.5, limit: {train: 400}}
teacher:
  model: potstill:convnet
  kwargs: {widths: [24, 48]}
  train: jointly
  joint: {learning_rate: 3.0e-3}
student: {model: potstill:convnet, kwargs: {widths: [8, 16]}}
objective:
  soft: {loss: kl, weight: 0.7, temperature: 4.0}
  hard: {loss: cross_entropy, weight: 0.3}
train: {epochs: 12, batch_size: 32, learning_rate: 1.0e-2}
evaluate: {latency: false}
"""

folder = Path(tempfile.mkdtemp(prefix="joint-teacher-"))
(folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
metrics = load_recipe(folder / "recipe.yaml").build(folder / "run", bars=False).execute()
for name, model in metrics.models.items():
    print(f"{name}: accuracy {model.metrics['accuracy'].value:.3f}")

trained = sorted(path.stem for path in (folder / "run/history").glob("*.json"))
print(f"teacher and student learned in one training: {'yes' if trained == ['baseline', 'distilled'] else 'no'}")
print(f"the student learned: {'yes' if metrics.models['distilled'].metrics['accuracy'].value > 0.6 else 'no'}")
