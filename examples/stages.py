"""Two stages: first the features, with the head frozen, then the answers of the whole network.

    python examples/stages.py

Each stage goes on with the weights of the one before, and has its own optimizer, schedule and projectors. The baseline
is trained in the same stages, by their hard terms.

Promises: "the stages followed one another: yes", "the student learned: yes"
"""

import json
import tempfile
from pathlib import Path

from potstill import load_recipe

RECIPE = """
name: stages
task: {name: image-classification}
data: {source: sklearn, path: load_digits, test: 0.5, limit: {train: 400}}
teacher: {model: potstill:convnet, kwargs: {widths: [24, 48]}, train: {epochs: 8, learning_rate: 3.0e-3}}
student: {model: potstill:convnet, kwargs: {widths: [8, 16]}}
objective:
  soft: {loss: kl, weight: 0.7, temperature: 4.0}
  hard: {loss: cross_entropy, weight: 0.3}
train: {epochs: 8, batch_size: 32, learning_rate: 1.0e-2}
stages:
  - name: features
    objective:
      hint: {loss: mse, student: stages.1, teacher: stages.1, project: linear}
    freeze: [head]
    train: {epochs: 3}
  - {name: answers}
evaluate: {latency: false}
"""

folder = Path(tempfile.mkdtemp(prefix="stages-"))
(folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
metrics = load_recipe(folder / "recipe.yaml").build(folder / "run", bars=False).execute()
for name, model in metrics.models.items():
    print(f"{name}: accuracy {model.metrics['accuracy'].value:.3f}")

lines = json.loads((folder / "run/history/distilled.json").read_text())
order = list(dict.fromkeys(line["stage"] for line in lines))
print(f"the stages followed one another: {'yes' if order == ['features', 'answers'] else 'no'}")
print(f"the student learned: {'yes' if metrics.models['distilled'].metrics['accuracy'].value > 0.6 else 'no'}")
