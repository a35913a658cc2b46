"""Deep mutual learning: three small networks learn the digits together, each from the labels and from the two others.

    python examples/mutual_learning.py

Nobody is trained before. The one called ``student`` is what the run is for; its peers are saved too.

Promises: "each learned from both others: yes", "all three learned: yes"
"""

import json
import tempfile
from pathlib import Path

from potstill import load_recipe

RECIPE = """
name: mutual-learning
task: {name: image-classification}
data: {source: sklearn, path: load_digits, test: 0.5, limit: {train: 400}}
teachers:
  wide: {model: "potstill:convnet", kwargs: {widths: [12, 24]}, train: jointly}
  deep: {model: "potstill:convnet", kwargs: {widths: [8, 16], depth: 2}, train: jointly}
student: {model: "potstill:convnet", kwargs: {widths: [8, 16]}}
scheme: {name: mutual}
objective:
  hard: {loss: cross_entropy}
  soft: {loss: kl}            # of all others, averaged
train: {epochs: 10, batch_size: 32, learning_rate: 1.0e-2}
evaluate: {latency: false}
"""

folder = Path(tempfile.mkdtemp(prefix="mutual-learning-"))
(folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
metrics = load_recipe(folder / "recipe.yaml").build(folder / "run", bars=False).execute()
for name, model in metrics.models.items():
    print(f"{name}: accuracy {model.metrics['accuracy'].value:.3f}")

logged = {key for line in json.loads((folder / "run/history/distilled.json").read_text()) for key in line}
taught = {"loss/soft_wide", "loss/soft_deep", "loss/wide.soft_student", "loss/wide.soft_deep", "loss/deep.soft_wide"}
learned = all(metrics.models[name].metrics["accuracy"].value > 0.6 for name in ("wide", "deep", "distilled"))
print(f"each learned from both others: {'yes' if taught <= logged else 'no'}")
print(f"all three learned: {'yes' if learned else 'no'}")
