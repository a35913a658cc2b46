"""Self-distillation: classifiers at inner layers learn from the last one, and pull the layers along.

    python examples/exits.py

There is no teacher. The exits are there while the student learns; the saved student is the plain network.

Promises: "both exits learned: yes", "the saved student is the plain network: yes"
"""

import json
import tempfile
from pathlib import Path

from safetensors import safe_open

from potstill import load_recipe

RECIPE = """
name: exits
task: {name: image-classification}
data: {source: sklearn, path: load_digits, test: 0.5, limit: {train: 400}}
student: {model: potstill:convnet, kwargs: {widths: [8, 16, 32]}}
scheme: {name: exits, at: [stages.0, stages.1], alpha: 0.3, temperature: 3.0}
objective:
  hard: {loss: cross_entropy}
train: {epochs: 12, batch_size: 32, learning_rate: 1.0e-2}
evaluate: {latency: false}
"""

folder = Path(tempfile.mkdtemp(prefix="exits-"))
(folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
metrics = load_recipe(folder / "recipe.yaml").build(folder / "run", bars=False).execute()
for name, model in metrics.models.items():
    print(f"{name}: accuracy {model.metrics['accuracy'].value:.3f}")

lines = [line for line in json.loads((folder / "run/history/distilled.json").read_text()) if "loss/exit_1_hard" in line]
falls = all(lines[-1][f"loss/exit_{number}_hard"] < lines[0][f"loss/exit_{number}_hard"] for number in (1, 2))
names = [safe_open(folder / f"run/models/{name}/model.safetensors", "pt").keys() for name in ("distilled", "baseline")]
print(f"both exits learned: {'yes' if falls else 'no'}")
print(f"the saved student is the plain network: {'yes' if set(names[0]) == set(names[1]) else 'no'}")
