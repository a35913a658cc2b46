"""How far gradients move when a batch is split: ragged accumulation, and two processes, against one big batch.

    python benchmarks/gradients.py

A tiny BERT teaches a tiny DistilBERT on 24 padded pairs, 5 of them without a label, by two soft terms and a hard one, a
feature term with a projector, and self-relations. One step of plain SGD tells the gradient. Prints the length of the
difference over the length of the gradient of one batch of 24, for the student and for the projector.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.training.tiny import flat, relative, student  # noqa: E402


def step(folder: Path, processes: int, batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
    """The gradient of one step, by part."""
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    worker = ["-m", "tests.training.worker", str(folder), str(batch_size), str(accumulation)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, *worker], cwd=ROOT, env=environment, check=True, capture_output=True)
    found = load_file(folder / "rank0.safetensors")
    started = {"student": flat(student())}
    torch.manual_seed(4)  # as the worker does before it makes the projector
    started["objective"] = flat(torch.nn.Linear(32, 48))
    return {name: start - found[name] for name, start in started.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        whole = step(work / "whole", 1, 24, 1)
        others = {"5+5+5+5+4": step(work / "ragged", 1, 5, 5), "2 processes × 3 × 4": step(work / "two", 2, 4, 3)}
    for name, found in others.items():
        print(name, json.dumps({part: float(f"{relative(found[part], whole[part]):.2e}") for part in whole}))


if __name__ == "__main__":
    main()
