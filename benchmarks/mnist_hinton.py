"""Temperature, weight and epochs of `mnist-hinton`, chosen on 10,000 training images; as many trials for each arm.

    python benchmarks/mnist_hinton.py data.path=FOLDER
    python benchmarks/accuracy.py mnist-hinton data.path=FOLDER          # then the experiment itself, three seeds

The held-out images are drawn from the training split, so the test set is not looked at. One file a trial in
`benchmarks/results/mnist-hinton-trials`; a trial whose file is there is not run again. The teacher of all trials is
one, trained on the other 50,000 images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from potstill.data.load import Splits
from potstill.recipe.build import make_splits
from potstill.recipe.load import load_recipe
from potstill.runs.folder import write_json
from potstill.runs.steps import Run

RESULTS = Path(__file__).parent / "results/mnist-hinton-trials"
HELD_OUT = 10_000
ALONE = ["teacher=null", "objective={hard: {loss: cross_entropy}}"]

DISTILLED = {
    f"distilled-T{temperature}-w{weight}-e{epochs}": [
        f"objective.soft.temperature={temperature}",
        f"objective.soft.weight={weight}",
        f"train.epochs={epochs}",
    ]
    for temperature, weight, epochs in ((4, 1, 40), (8, 1, 40), (20, 1, 40), (20, 0.1, 40), (20, 10, 40), (20, 1, 100))
}
BASELINE = {
    f"alone-lr{rate}-e{epochs}": [*ALONE, f"train.learning_rate={rate}", f"train.epochs={epochs}"]
    for rate, epochs in ((1e-3, 10), (1e-3, 20), (1e-3, 40), (3e-4, 20), (3e-4, 40), (1e-3, 100))
}


def main() -> None:
    """Do the trials that are missing and print all, the best of each arm first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="key=value")
    parser.add_argument("--runs", type=Path, default=Path("runs/mnist-hinton-trials"))
    parser.add_argument("--arm", choices=["alone", "distilled"], help="only the trials of this arm")
    asked = parser.parse_intermixed_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    splits = held_out(asked.changes)
    for name, changes in {**DISTILLED, **BASELINE}.items():
        file = RESULTS / f"{name}.json"
        if not file.is_file() and name.startswith(asked.arm or ""):
            found = trial([*asked.changes, *changes], splits, asked.runs / name)
            write_json(file, {"trial": name, **found, "changes": changes})
    found = [json.loads(file.read_text()) for file in RESULTS.glob("*.json")]
    for each in sorted(found, key=lambda each: (each["trial"].split("-")[0], each["errors"])):
        print(f"{each['trial']:<28} {each['errors']:>4} errors of {HELD_OUT:,}, teacher {each['teacher_errors']}")


def held_out(changes: list[str]) -> Splits:
    """Return 50,000 training images, and 10,000 others in the place of the test set."""
    whole = make_splits(load_recipe("mnist-hinton", changes)).train
    parts = whole.train_test_split(test_size=HELD_OUT, seed=42, stratify_by_column="label")
    return Splits(parts["train"], None, parts["test"], ["the test split is 10,000 training images"])


def trial(changes: list[str], splits: Splits, folder: Path) -> dict[str, Any]:
    """Train one student and return its errors on the held-out images."""
    recipe = load_recipe("mnist-hinton", [*changes, "baseline.enabled=false", "evaluate.latency=false"])
    models = Run(recipe, folder, bars=False, splits=splits).execute().models
    errors = {key: round((1 - model.metrics["accuracy"].value) * HELD_OUT) for key, model in models.items()}
    return {"errors": errors["distilled"], "teacher_errors": errors.get("teacher")}


if __name__ == "__main__":
    main()
