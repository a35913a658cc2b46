"""Progressive distillation: the first stage is taught first, the next ones join, the answers come last.

    python examples/progressive.py

Three stages are compared, so there are three phases; a term that has begun stays.

Promises: "the second stage waited for its turn: yes", "the student learned: yes"
"""

import json
import tempfile
from pathlib import Path

from potstill import load_recipe

RECIPE = """
name: progressive
task: {name: image-classification}
data: {source: sklearn, path: load_digits, test: 0.5, limit: {train: 400}}
teacher: {model: potstill:convnet, kwargs: {widths: [16, 32, 48]}, train: {epochs: 8, learning_rate: 3.0e-3}}
student: {model: potstill:convnet, kwargs: {widths: [8, 16, 24]}}
scheme: {name: progressive, schedule: custom, shares: [0.2, 0.2, 0.6]}
objective:
  maps: {loss: attention_transfer, weight: 10.0, layers: {stages.0: stages.0, stages.1: stages.1, stages.2: stages.2}}
  soft: {loss: kl, weight: 0.7, temperature: 4.0}
  hard: {loss: cross_entropy, weight: 0.3}
train: {epochs: 20, batch_size: 32, learning_rate: 2.0e-2, max_grad_norm: 0.0}
baseline: {enabled: false}
evaluate: {latency: false}
"""

folder = Path(tempfile.mkdtemp(prefix="progressive-"))
(folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
metrics = load_recipe(folder / "recipe.yaml").build(folder / "run", bars=False).execute()
for name, model in metrics.models.items():
    print(f"{name}: accuracy {model.metrics['accuracy'].value:.3f}")

lines = json.loads((folder / "run/history/distilled.json").read_text())
terms = [{key[5:] for key in line if key.startswith("loss/")} for line in lines if "loss" in line]
print(f"at first {', '.join(sorted(terms[0]))}; in the end {', '.join(sorted(terms[-1]))}")
waited = terms[0] == {"maps_stages-0_stages-0"} and "soft" in terms[-1]
print(f"the second stage waited for its turn: {'yes' if waited else 'no'}")
print(f"the student learned: {'yes' if metrics.models['distilled'].metrics['accuracy'].value > 0.6 else 'no'}")
