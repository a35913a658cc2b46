"""A teacher assistant: where the step from a large teacher to a small student is long, one goes between.

    python examples/assistant.py

The assistant has an objective of its own, in which it learns from the large teacher; the student learns from the
assistant alone. It is one recipe and one run.

Promises: "the assistant was taught by the large one: yes", "the student learned: yes"
"""

import json
import tempfile
from pathlib import Path

from potstill import load_recipe

RECIPE = """
name: assistant
task: {name: image-classification}
data: {source: sklearn, path: load_digits, test: 0.5, limit: {train: 400}}
teachers:
  large: {model: "potstill:convnet", kwargs: {widths: [32, 64]}, train: {epochs: 8, learning_rate: 3.0e-3}}
  assistant:
    model: potstill:convnet
    kwargs: {widths: [16, 32]}
    train: {epochs: 8, learning_rate: 1.0e-2}
    objective:
      soft: {loss: kl, temperature: 4.0, weight: 0.7}       # of the only teacher before it: large
      hard: {loss: cross_entropy, weight: 0.3}
student: {model: potstill:convnet, kwargs: {widths: [6, 12]}}
objective:
  soft: {loss: kl, teacher: assistant/logits, temperature: 4.0, weight: 0.7}
  hard: {loss: cross_entropy, weight: 0.3}
train: {epochs: 12, batch_size: 32, learning_rate: 1.0e-2}
baseline: {enabled: false}
evaluate: {latency: false}
"""

folder = Path(tempfile.mkdtemp(prefix="assistant-"))
(folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
metrics = load_recipe(folder / "recipe.yaml").build(folder / "run", bars=False).execute()
for name, model in metrics.models.items():
    print(f"{name}: accuracy {model.metrics['accuracy'].value:.3f}")

path = folder / "run/history/assistant.json"  # not there where the assistant came from the cache of an earlier run
taught = not path.is_file() or any("loss/soft" in line for line in json.loads(path.read_text()))
print(f"the assistant was taught by the large one: {'yes' if taught else 'no'}")
print(f"the student learned: {'yes' if metrics.models['distilled'].metrics['accuracy'].value > 0.6 else 'no'}")
