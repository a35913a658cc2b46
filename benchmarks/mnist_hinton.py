"""Temperature, weight and epochs of `mnist-hinton`, chosen on 10,000 training images; as many trials for each arm.

    python benchmarks/mnist_hinton.py data.path=FOLDER
    python benchmarks/accuracy.py mnist-hinton data.path=FOLDER            # then the experiment itself, three seeds,
    python benchmarks/accuracy.py mnist-hinton-shifted data.path=FOLDER    # the same with shifts for the student too,
    python benchmarks/mnist_hinton.py --table                              # and all of it in one table

The held-out images are drawn from the training split, so the test set is not looked at. One file a trial in
`benchmarks/results/mnist-hinton-trials`; a trial whose file is there is not run again. The teacher of all trials is
one, trained on the other 50,000 images.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from potstill.data.load import Splits
from potstill.evaluation.significance import mcnemar
from potstill.recipe.build import make_splits
from potstill.recipe.load import load_recipe
from potstill.runs.folder import write_json
from potstill.runs.steps import Run

RESULTS = Path(__file__).parent / "results/mnist-hinton-trials"
HELD_OUT = 10_000
ALONE = ["teacher=null", "objective={hard: {loss: cross_entropy}}"]
SHIFTED = ["train.augment=[{shift: {pixels: 2}}]"]


def taught(temperature: float, weight: float, rate: float, epochs: int) -> list[str]:
    """Return the changes of a trial with a teacher."""
    soft = [f"objective.temperature={temperature}", f"objective.weight={weight}"]
    return [*soft, f"train.learning_rate={rate}", f"train.epochs={epochs}"]


def alone(rate: float, epochs: int) -> list[str]:
    """Return the changes of a trial without a teacher."""
    return [*ALONE, f"train.learning_rate={rate}", f"train.epochs={epochs}"]


TRIALS = {
    "distilled-T4-w1-lr1e-3-e40": taught(4, 1, 1e-3, 40),
    "distilled-T20-w1-lr1e-3-e40": taught(20, 1, 1e-3, 40),
    "distilled-T20-w10-lr3e-3-e40": taught(20, 10, 3e-3, 40),
    "distilled-T20-w10-lr3e-3-e100": taught(20, 10, 3e-3, 100),
    "alone-lr1e-3-e10": alone(1e-3, 10),
    "alone-lr1e-3-e20": alone(1e-3, 20),
    "alone-lr1e-3-e40": alone(1e-3, 40),
    "alone-lr3e-3-e20": alone(3e-3, 20),
    "shifted-distilled-T4-w1-lr1e-3-e40": [*SHIFTED, *taught(4, 1, 1e-3, 40)],
    "shifted-distilled-T20-w10-lr1e-3-e40": [*SHIFTED, *taught(20, 10, 1e-3, 40)],
    "shifted-alone-lr1e-3-e40": [*SHIFTED, *alone(1e-3, 40)],
    "shifted-alone-lr3e-3-e40": [*SHIFTED, *alone(3e-3, 40)],
}
"""By arm: the student sees the images as they are, or (``shifted``) moved by at most two pixels."""


def main() -> None:
    """Do the trials that are missing and print all, the best of each arm first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="key=value")
    parser.add_argument("--runs", type=Path, default=Path("runs/mnist-hinton-trials"))
    parser.add_argument("--only", default="", help="only the trials whose name begins with this")
    parser.add_argument("--table", action="store_true", help="print what the experiment gave, and do no trial")
    asked = parser.parse_intermixed_args()
    if asked.table:
        print(table())
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    splits = held_out(asked.changes)
    for name, changes in TRIALS.items():
        file = RESULTS / f"{name}.json"
        if not file.is_file() and name.startswith(asked.only):
            found = trial([*asked.changes, *changes], splits, asked.runs / name)
            write_json(file, {"trial": name, **found, "changes": changes})
    found = [json.loads(file.read_text()) for file in RESULTS.glob("*.json")]
    for each in sorted(found, key=lambda each: (each["trial"].split("-T")[0].split("-lr")[0], each["errors"])):
        print(f"{each['trial']:<38} {each['errors']:>4} errors of {HELD_OUT:,}, teacher {each['teacher_errors']}")


def table() -> str:
    """Return the errors of every model on the test images by seed, and McNemar's test of those that matter."""
    plain, shifted = (
        [json.loads(file.read_text()) for file in sorted((RESULTS.parent / name).glob("seed-*.json"))]
        for name in ("mnist-hinton", "mnist-hinton-shifted")
    )
    arms = {
        "teacher": [each["right"]["teacher"] for each in plain],
        "student alone": [each["right"]["baseline"] for each in plain],
        "distilled": [each["right"]["distilled"] for each in plain],
        "student alone, with shifts": [each["right"]["baseline"] for each in shifted],
        "distilled, with shifts": [each["right"]["distilled"] for each in shifted],
    }
    lines = []
    for name, each in arms.items():
        errors = [right.count("0") for right in each]
        lines.append(f"{name:<28} {sum(errors) / max(1, len(errors)):6.1f} errors, by seed {errors}")
    for first, second in itertools.combinations(list(arms)[1:], 2):
        tests = []
        for one, other in zip(arms[first], arms[second], strict=False):
            counts = [sum(a == hit and b != hit for a, b in zip(one, other, strict=True)) for hit in "01"]
            tests.append(f"{counts[0] - counts[1]:+d} (p = {mcnemar(counts[0], counts[1]):.1e})")
        lines.append(f"{first} - {second}, errors by seed: {', '.join(tests)}")
    return "\n".join(lines)


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
