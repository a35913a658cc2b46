"""What the teacher's cache costs and what it survives.

python benchmarks/cache.py lookup            # microseconds a sample, read and written, 1,000 classes in fp16
python benchmarks/cache.py teacher           # what writing adds to a teacher's forward
python benchmarks/cache.py million           # 1,000,000 × 1,000 classes in fp16: time and memory as it grows
python benchmarks/cache.py kills --kills 30  # the process killed while the cache is written
python benchmarks/cache.py views --data MNIST  # a student of 8 random views, cached and live, to the bit
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from potstill.teachers.cached import Cached
from potstill.teachers.live import Live

CLASSES = 1000


class Table:
    """A teacher whose answers are rows of a table, so that nothing but the cache takes time."""

    prefix = "teacher/"

    def __init__(self, rows: int = 4096) -> None:
        self.rows = torch.randn(rows, CLASSES).half()

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"logits": self.rows[batch["sample_id"] % len(self.rows)]}


def batches(samples: int, size: int, features: int = 64, seed: int = 0) -> Any:
    """Batches in random order; the inputs of a sample depend on its number alone."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    base = torch.arange(features).float()
    for ids in order.split(size):
        yield {"features": ids[:, None].float() + base, "sample_id": ids}


def timed(source: Any, samples: int, size: int, seed: int) -> list[float]:
    taken = []
    for batch in batches(samples, size, seed=seed):
        begin = time.perf_counter()
        source(batch)
        taken.append((time.perf_counter() - begin) / len(batch["sample_id"]))
    return taken


def lookup(samples: int = 100_000) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for size in (32, 128, 256):
        with tempfile.TemporaryDirectory() as folder:
            live = Table()
            source = Cached(live, folder, identity="table")
            written, alone = timed(source, samples, size, 0), timed(live, samples, size, 0)
            read = timed(source, samples, size, 1)
            assert source.counts.found == source.counts.made == samples
            found[f"batch {size}"] = {
                "read_us": 1e6 * statistics.median(read),
                "write_us": 1e6 * (statistics.median(written) - statistics.median(alone)),
            }
    return found


def teacher(rounds: int = 12) -> dict[str, Any]:
    """Time of a ResNet-18's forward on 224 × 224 images, alone and with its answers written, in turns."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    live = Live(resnet18().eval())
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Cached(live, folder, identity="resnet18", precision="fp16")
        times: dict[str, list[float]] = {"alone": [], "written": []}
        ratios = []
        for turn in range(rounds):
            batch = {"pixel_values": torch.randn(32, 3, 224, 224), "sample_id": torch.arange(32) + 32 * turn}
            for name, ask in (("alone", live), ("written", source)):
                begin = time.perf_counter()
                ask(batch)
                times[name].append(time.perf_counter() - begin)
            if turn:
                ratios.append(times["written"][-1] / times["alone"][-1])
        added = [w - a for w, a in zip(times["written"][1:], times["alone"][1:], strict=True)]
        found["resnet18, 224 px, batch 32"] = {
            "forward_ms": 1000 * statistics.median(times["alone"][1:]),
            "written_over_alone": statistics.median(ratios),
            "added_ms": 1000 * statistics.median(added),
        }
    return found


def memory() -> dict[str, float]:
    """MiB of this process: its own, and of files that are mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
    return {"own": values["RssAnon"], "mapped": values["RssFile"]}


def million(samples: int = 1_000_000, size: int = 256) -> dict[str, Any]:
    found: dict[str, Any] = {"written": [], "read": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Cached(Table(), folder, identity="table")
        for kind, seed in (("written", 0), ("read", 1)):
            begin, done = time.perf_counter(), 0
            for batch in batches(samples, size, seed=seed):
                source(batch)
                done += len(batch["sample_id"])
                if done % 100_096 < size or done == samples:
                    seconds = time.perf_counter() - begin
                    found[kind].append({"samples": done, "seconds": round(seconds, 2), **memory()})
        source.close()
        found["gib"] = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 2**30
        found["counts"] = vars(source.counts)
    return found


# ---- kills ---------------------------------------------------------------------------------------------------------

VIEWS = 8
SHIFTED = [
    "data.augment=[]",
    "train.augment=[{shift: {pixels: 1}}]",
    "teacher.train.augment=[]",
    "teacher.train.epochs=6",
    "teacher.seed=0",
    "student.kwargs.dropout=0.1",
    "train.epochs=10",
    f"train.views={VIEWS}",
    "train.save_steps=0.05",
    "teacher.cache={precision: fp16}",
    "baseline.enabled=false",
    "evaluate.latency=false",
]


def run(folder: Path, cache: Path, *said: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "POTSTILL_CACHE": str(cache), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "potstill", "distill", *said, "--quiet", "--output", str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finished(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed:\n{errors.decode()[-3000:]}")


def wait_for_view(cache: Path, view: int) -> None:
    """Wait until the first answer of a view is being written."""
    while not list(cache.glob(f"signals/*/view-{view:05d}.index")):
        time.sleep(0.002)


def entries(cache: Path) -> dict[int, dict[int, tuple[bytes, bytes]]]:
    """Every record of the one store in a cache: by view and sample, what it answers and its bytes."""
    import numpy as np

    (store,) = (path.parent for path in (cache / "signals").glob("*/store.json"))
    found: dict[int, dict[int, tuple[bytes, bytes]]] = {}
    data = {int(p.stem.split("-")[1]): np.fromfile(p, np.uint64) for p in store.glob("data-*.bin")}
    for index in sorted(store.glob("view-*.index")):
        slots = np.fromfile(index, np.uint64).reshape(-1, 4)
        low = np.uint64((1 << 40) - 1)
        found[int(index.stem.split("-")[1])] = {
            int(row): (
                slots[row, 0].tobytes(),
                data[int(slots[row, 2] >> np.uint64(40))][
                    int(slots[row, 2] & low) : int(slots[row, 2] & low) + int(slots[row, 3] & low)
                ].tobytes(),
            )
            for row in np.flatnonzero(slots[:, 0])
        }
    return found


def kills(count: int, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    work = Path(tempfile.mkdtemp())
    teachers = work / "teachers"
    finished(run(work / "first", teachers, "digits", *SHIFTED))  # trains the teacher, which all find in the cache
    shutil.rmtree(teachers / "signals")
    base = work / "base"
    shutil.copytree(teachers, base)
    process = run(work / "whole", base, "digits", *SHIFTED)
    wait_for_view(base, 0)
    start = time.perf_counter()
    wait_for_view(base, VIEWS - 1)
    duration = (time.perf_counter() - start) * VIEWS / (VIEWS - 1)
    finished(process)
    wanted, records = load_file(work / "whole/models/distilled/model.safetensors"), entries(base)
    outcomes = []
    for number in range(count):
        folder, cache = work / f"run-{number}", work / f"cache-{number}"
        shutil.copytree(teachers, cache)
        process = run(folder, cache, "digits", *SHIFTED)
        wait_for_view(cache, 0)
        moment = draw.uniform(0.0, 1.0) * duration
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = sum(len(view) for view in entries(cache).values()) if list((cache / "signals").glob("*/*.index")) else 0
        finished(run(folder, cache, "digits", *SHIFTED))
        weights = load_file(folder / "models/distilled/model.safetensors")
        outcomes.append(
            {
                "moment_s": round(moment, 2),
                "records_at_the_kill": there,
                "same_student": all(bool((weights[name] == wanted[name]).all()) for name in wanted),
                "same_records": entries(cache) == records,
            }
        )
        print(json.dumps(outcomes[-1]), flush=True)
        shutil.rmtree(folder)
        shutil.rmtree(cache)
    shutil.rmtree(work)
    return {
        "kills": count,
        "records": sum(len(view) for view in records.values()),
        "same_student": sum(each["same_student"] for each in outcomes),
        "same_records": sum(each["same_records"] for each in outcomes),
        "killed_while_writing": sum(
            0 < each["records_at_the_kill"] < sum(len(view) for view in records.values()) for each in outcomes
        ),
    }


def views(data: str, epochs: int) -> dict[str, Any]:
    """Hinton's MNIST experiment where the student sees 8 shifted views: live and cached."""
    said = [
        "mnist-hinton-shifted",
        f"data.path={data}",
        "teacher.train.epochs=2",
        f"train.epochs={epochs}",
        "train.views=8",
        "baseline.enabled=false",
        "evaluate.latency=false",
    ]
    with tempfile.TemporaryDirectory() as place:
        work, seconds = Path(place), {}
        for name, cache in (("live", "false"), ("cached", "true")):
            begin = time.perf_counter()
            finished(run(work / name, work / "cache", *said, f"teacher.cache={cache}"))
            seconds[name] = round(time.perf_counter() - begin, 1)
        weights = {name: load_file(work / name / "models/distilled/model.safetensors") for name in seconds}
        same = all(bool((weights["live"][key] == weights["cached"][key]).all()) for key in weights["live"])
        lines = (work / "cached/events.jsonl").read_text().splitlines()
        counts = next(event for event in map(json.loads, lines) if event["event"] == "cache")
        return {"same_student_to_the_bit": same, "seconds": seconds, "found": counts["found"], "made": counts["made"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["lookup", "teacher", "million", "kills", "views"])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.what == "kills":
        found = kills(options.kills, options.seed)
    elif options.what == "views":
        found = views(options.data, options.epochs)
    else:
        found = {"lookup": lookup, "teacher": teacher, "million": million}[options.what]()
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
