"""How good a recipe's student is over several seeds: one result file a seed, and what they say together.

    python benchmarks/accuracy.py sst2-minilm --seeds 3 --runs FOLDER data.path=FOLDER teacher.model=FOLDER

A seed whose file is in ``benchmarks/results/RECIPE`` is not run again, and a run that was stopped goes on: a machine
may take as many turns as it needs. Differences are given twice: over the seeds (t-interval), and over the test samples
(paired bootstrap of the mean over the seeds).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.evaluation.predict import Predictions
from potstill.evaluation.significance import mean_interval
from potstill.recipe.load import load_recipe
from potstill.runs.folder import write_json
from potstill.runs.steps import Run

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 10_000


def main() -> None:
    """Run what is missing, write one file a seed and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("changes", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs are, one folder a seed")
    asked = parser.parse_intermixed_args()
    folder = RESULTS / asked.recipe
    for seed in range(asked.seeds):
        file = folder / f"seed-{seed}.json"
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, one(asked.recipe, [*asked.changes, f"seed={seed}"], asked.runs / f"seed-{seed}"))
        print(f"{file}: done", flush=True)
    summary = summarise([json.loads((folder / f"seed-{seed}.json").read_text()) for seed in range(asked.seeds)])
    write_json(folder / "summary.json", summary)
    print(json.dumps(summary, indent=2))


def one(recipe: str, changes: list[str], folder: Path) -> dict[str, Any]:
    """Do one run and return its figures, and for each model which test samples it answered rightly."""
    run = Run(load_recipe(recipe, changes), folder, bars=False)
    metrics = run.execute().model_dump(mode="json", exclude={"notes"})  # which name folders of this machine
    right = {}
    for name in metrics["models"]:
        said = Predictions.load(run.folder / f"predictions/{name}.test.safetensors")
        if said.labels is None:
            raise SystemExit("the test split has no labels")
        right[name] = "".join(str(int(hit)) for hit in said.logits.argmax(-1) == said.labels)
    training = [event for event in run.folder.events() if event["event"] in ("begin", "done")]
    times = {f"{event['event']} {event['step']}": event["time"] for event in training}
    return {"metrics": metrics, "right": right, "times": times}


def summarise(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means and intervals over the seeds, and the differences that a student is judged by."""
    names = list(found[0]["metrics"]["models"])
    kinds = list(found[0]["metrics"]["models"][names[0]]["metrics"])
    models: dict[str, Any] = {name: {} for name in names}
    for name in names:
        for kind in kinds:
            values = [each["metrics"]["models"][name]["metrics"][kind]["value"] for each in found]
            models[name][kind] = {**mean_interval(values), "values": values}
    right = {name: np.array([[int(hit) for hit in each["right"][name]] for each in found]) for name in names}
    pairs = [("distilled", "teacher")] + ([("distilled", "baseline")] if "baseline" in names else [])
    return {
        "recipe": found[0]["metrics"]["recipe"],
        "seeds": [each["metrics"]["seed"] for each in found],
        "chance": found[0]["metrics"]["chance"],
        "retention": mean_interval([each["metrics"]["retention"] for each in found]),
        "models": models,
        "accuracy_differences": {f"{a} - {b}": difference(right[a], right[b]) for a, b in pairs},
    }


def difference(first: NDArray[Any], second: NDArray[Any]) -> dict[str, Any]:
    """Return the difference of two models' accuracies, both ``[seeds, samples]`` of 0 and 1."""
    gap = (first - second).astype(float)
    draw = np.random.default_rng(0)
    samples = gap.mean(0)
    drawn = [samples[draw.integers(0, len(samples), len(samples))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"over_seeds": mean_interval(gap.mean(1).tolist()), "over_samples": {"low": float(low), "high": float(high)}}


if __name__ == "__main__":
    main()
