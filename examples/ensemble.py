"""An ensemble teaches: a forest, boosted trees and a network of three kinds speak with one voice.

    python examples/ensemble.py

Each teacher is fitted or trained first; what the student is told is the mean of their probabilities. The ensemble is
judged beside its members.

Promises: "the ensemble was judged: yes", "the student learned: yes"
"""

import tempfile
from pathlib import Path

from potstill import load_recipe

RECIPE = """
name: ensemble
task: {name: tabular-classification}
data: {source: sklearn, path: load_breast_cancer, test: 0.4}
teachers:
  forest: {model: "sklearn:RandomForestClassifier", kwargs: {n_estimators: 30}}
  trees: {model: "sklearn:HistGradientBoostingClassifier", kwargs: {max_iter: 20}}
  network: {model: "potstill:mlp", kwargs: {hidden: [64]}, train: {epochs: 10}}
  all: {source: {ensemble: {of: [forest, trees, network], by: probabilities}}}
student: {model: potstill:mlp, kwargs: {hidden: [4]}}
objective:
  soft: {loss: kl, teacher: all/logits, weight: 0.8}
  hard: {loss: cross_entropy, weight: 0.2}
train: {epochs: 20, batch_size: 32, learning_rate: 1.0e-2}
evaluate: {latency: false}
"""

folder = Path(tempfile.mkdtemp(prefix="ensemble-"))
(folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
metrics = load_recipe(folder / "recipe.yaml").build(folder / "run", bars=False).execute()
for name, model in metrics.models.items():
    print(f"{name}: accuracy {model.metrics['accuracy'].value:.3f}")

print(f"the ensemble was judged: {'yes' if metrics.models['all'].metrics['accuracy'].value > 0.8 else 'no'}")
print(f"the student learned: {'yes' if metrics.models['distilled'].metrics['accuracy'].value > 0.8 else 'no'}")
