"""LIAR in the same epochs: the usual Trainer subclass with a live teacher, and potstill with cached answers.

    python benchmarks/speed_accuracy.py --data FOLDER --teacher FOLDER [--seeds 3] --output FOLDER

``--teacher`` is a BERT of six blocks that was fine-tuned on LIAR, such as ``models/teacher`` of a run of `liar-minilm`.
Both students begin as its blocks 0, 2 and 4 and minimise 0.7·T²·KL + 0.3·CE, T = 4, in batches of 32. One file for
each of the two and each seed is written; those that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from speed_worker import SAY, USUAL, usual_trainer
from transformers import TrainingArguments

from potstill.data.load import load_splits

EPOCHS = 3


def usual(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    folder = tempfile.mkdtemp()
    arguments = TrainingArguments(folder, num_train_epochs=EPOCHS, seed=seed, logging_strategy="no", **USUAL)
    trainer = usual_trainer("to-batch", options, arguments)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    test = load_splits("files", options.data, label="label").test
    tokens = test.map(
        lambda rows: trainer.processing_class(rows["statement"], truncation=True, max_length=128), batched=True
    )
    said = trainer.predict(tokens.remove_columns(["statement"]))
    answers: Any = said.predictions[0] if isinstance(said.predictions, tuple) else said.predictions
    return {"accuracy": float(np.mean(answers.argmax(-1) == said.label_ids)), "training_s": seconds}


def ours(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    _, without = SAY["liar"]
    said = [f"data.path={options.data}", f"teacher.model={options.teacher}", "teacher.train=", *without]
    said += ["objective.hard={loss: cross_entropy, weight: 0.3}", "baseline.enabled=false", f"seed={seed}"]
    said += [
        "objective.soft={loss: kl, weight: 0.7, temperature: 4.0}",
        f"train.epochs={EPOCHS}",
        "evaluate.latency=false",
    ]
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "potstill", "distill", "liar-minilm", *said, "-q", "-o", place]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        metrics = json.loads((Path(place) / "metrics.json").read_text())
        history = json.loads((Path(place) / "history/distilled.json").read_text())
    return {
        "accuracy": metrics["models"]["distilled"]["metrics"]["accuracy"]["value"],
        "teacher_accuracy": metrics["models"]["teacher"]["metrics"]["accuracy"]["value"],
        "training_s": next(line["train_runtime"] for line in history if "train_runtime" in line),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {"potstill": [], "usual": []}
    for seed in range(options.seeds):
        for name, train in (("potstill", ours), ("usual", usual)):
            path = options.output / f"{name}-{seed}.json"
            if not path.is_file():
                path.write_text(json.dumps(train(options, seed), indent=1) + "\n", encoding="utf-8")
            found[name].append(json.loads(path.read_text()))
            print(name, seed, found[name][-1], flush=True)
    for name, each in found.items():
        print(name, {key: round(statistics.mean(run[key] for run in each), 4) for key in each[0]})


if __name__ == "__main__":
    main()
