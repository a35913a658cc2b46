"""Votes as a teacher: what several people said of each sample, in a column of the data.

    python examples/soft_labels.py

Here five small decision trees stand for the people who look at the same iris and disagree at times. The student learns
from the shares of the votes; the labels are used to judge.

Promises: "the votes were judged as a teacher: yes", "the student learned: yes"
"""

import tempfile
from pathlib import Path

from datasets import Dataset
from sklearn.datasets import load_iris
from sklearn.tree import DecisionTreeClassifier

from potstill import load_recipe

RECIPE = """
name: soft-labels
task: {name: tabular-classification, features: [sepal_length, sepal_width, petal_length, petal_width]}
data: {source: files, path: votes.parquet, test: 0.3}
teacher: {source: {column: {column: votes, kind: votes, smoothing: 0.1}}}
student: {model: potstill:mlp, kwargs: {hidden: [16]}}
objective:
  soft: {loss: soft_cross_entropy}
train: {epochs: 30, batch_size: 16, learning_rate: 2.0e-2}
evaluate: {latency: false}
"""

folder = Path(tempfile.mkdtemp(prefix="soft-labels-"))
flowers, kinds = load_iris(return_X_y=True)
people = [DecisionTreeClassifier(max_features=1, max_depth=3, random_state=seed) for seed in range(5)]
votes = [person.fit(flowers[seed::5], kinds[seed::5]).predict(flowers) for seed, person in enumerate(people)]
columns = dict(zip(("sepal_length", "sepal_width", "petal_length", "petal_width"), flowers.T, strict=True))
table = Dataset.from_dict({**columns, "label": kinds, "votes": [list(row) for row in zip(*votes, strict=True)]})
table.to_parquet(folder / "votes.parquet")
(folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
metrics = load_recipe(folder / "recipe.yaml").build(folder / "run", bars=False).execute()
for name, model in metrics.models.items():
    print(f"{name}: accuracy {model.metrics['accuracy'].value:.3f}")

said = metrics.models["teacher"]
print(f"the votes were judged as a teacher: {'yes' if said.metrics['accuracy'].value > 0.7 else 'no'}")
print(f"the student learned: {'yes' if metrics.models['distilled'].metrics['accuracy'].value > 0.7 else 'no'}")
