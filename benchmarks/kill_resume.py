"""Kill a run at random moments, start it again, and compare with a run that was left alone.

    python benchmarks/kill_resume.py --kills 30 --seed 1

Each trial starts the same command, sends SIGKILL to the process after a random time, starts the command again until it
ends, and compares the weights of every model to the bit, `metrics.json` (latency and throughput apart, which are
measurements of time), and the events: each step is begun, finished and written once, and a finished step is never
begun again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

COMMAND = [
    *(sys.executable, "-m", "potstill", "distill", "digits", "--quiet"),
    *(
        "data.augment=[{shift: {pixels: 1}}]",
        "student.kwargs.dropout=0.2",
        "train.save_steps=0.05",
        "train.eval_steps=0.05",
    ),
    *("train.epochs=20", "teacher.train.epochs=10", "teacher.train.save_steps=0.05"),
    "train.callbacks=[{early_stopping: {patience: 50}}]",
]


def start(folder: Path, cache: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "POTSTILL_CACHE": str(cache), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [*COMMAND, "--output", str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(folder: Path, cache: Path) -> float:
    begin = time.perf_counter()
    process = start(folder, cache)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed:\n{errors.decode()[-3000:]}")
    return time.perf_counter() - begin


def results(folder: Path) -> dict[str, Any]:
    """Everything that must be equal."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for model in metrics["models"].values():
        model.pop("latency_ms")
        model.pop("throughput")
    weights = {path.parent.name: load_file(path) for path in sorted((folder / "models").glob("*/model.safetensors"))}
    return {"metrics": metrics, "weights": weights}


def equal_weights(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        first[model].keys() == second[model].keys()
        and all(bool((first[model][name] == second[model][name]).all()) for name in first[model])
        for model in first
    )


def repeated_steps(folder: Path) -> list[str]:
    """Steps that were finished twice or begun after they were finished."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if line.endswith("}")]
    done: set[str] = set()
    wrong = []
    for event in events:
        if event["event"] in ("begin", "done") and event["step"] in done:
            wrong.append(f"{event['event']} {event['step']}")
        if event["event"] == "done":
            done.add(event["step"])
    return wrong


def trial(number: int, wanted: dict[str, Any], duration: float, draw: random.Random, work: Path) -> dict[str, Any]:
    folder, cache = work / f"trial-{number}", work / f"cache-{number}"
    process = start(folder, cache)
    moment = draw.uniform(0.15, 0.98) * duration
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    died_at = [path.stem for path in sorted((folder / "steps").glob("*.json"))] if folder.exists() else []
    finish(folder, cache)
    found = results(folder)
    outcome = {
        "moment_s": round(moment, 2),
        "finished_before_the_kill": died_at,
        "weights_equal": equal_weights(found["weights"], wanted["weights"]),
        "metrics_equal": found["metrics"] == wanted["metrics"],
        "repeated_steps": repeated_steps(folder),
        "resumed_from": [
            event["resumed_from"]
            for event in map(json.loads, (folder / "events.jsonl").read_text().splitlines())
            if event["event"] == "training" and event["resumed_from"]
        ],
    }
    shutil.rmtree(folder)
    shutil.rmtree(cache, ignore_errors=True)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        duration = finish(work / "whole", work / "cache")
        wanted = results(work / "whole")
        outcomes = []
        for number in range(options.kills):
            outcomes.append(trial(number, wanted, duration, draw, work))
            print(f"{number + 1}/{options.kills}: {json.dumps(outcomes[-1])}", flush=True)
    good = [o for o in outcomes if o["weights_equal"] and o["metrics_equal"] and not o["repeated_steps"]]
    resumed = [o for o in outcomes if o["resumed_from"]]
    print(f"{len(good)} of {len(outcomes)} kills: same weights, same metrics, no step done twice")
    print(f"{len(resumed)} of them went on from a checkpoint in the middle of a training")
    sys.exit(len(good) != len(outcomes))


if __name__ == "__main__":
    main()
