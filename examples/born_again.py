"""Born-again networks: a student teaches the next one of its kind, which teaches the next.

    python examples/born_again.py

The first generation learns from the labels alone, as there is no teacher; the last one is the run's student.

Promises: "three generations after the first: yes", "the last one learned: yes"
"""

import tempfile
from pathlib import Path

from potstill import load_recipe

RECIPE = """
name: born-again
task: {name: image-classification}
data: {source: sklearn, path: load_digits, test: 0.5, limit: {train: 400}}
student: {model: potstill:mlp, kwargs: {hidden: [32]}}
scheme: {name: born_again, generations: 3}
objective:
  soft: {loss: kl, weight: 0.7, temperature: 2.0}
  hard: {loss: cross_entropy, weight: 0.3}
train: {epochs: 12, batch_size: 32, learning_rate: 5.0e-3}
baseline: {enabled: false}
evaluate: {latency: false}
"""

folder = Path(tempfile.mkdtemp(prefix="born-again-"))
(folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
metrics = load_recipe(folder / "recipe.yaml").build(folder / "run", bars=False).execute()
for name, model in metrics.models.items():
    print(f"{name}: accuracy {model.metrics['accuracy'].value:.3f}")

generations = [f"generation-{number}" for number in range(3)]
print(f"three generations after the first: {'yes' if list(metrics.models) == [*generations, 'distilled'] else 'no'}")
print(f"the last one learned: {'yes' if metrics.models['distilled'].metrics['accuracy'].value > 0.7 else 'no'}")
