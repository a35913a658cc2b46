"""How fast a step of distillation is, beside the student alone, a hand-written loop and what people usually write.

    python benchmarks/speed.py liar --data FOLDER --teacher FOLDER [--peer NAME=COMMAND]…
    python benchmarks/speed.py mnist --data FOLDER [--peer NAME=COMMAND]…

Each contender is a process that loads everything, says how long that took, and then waits. They take turns: in each
round every one trains for about ``--seconds``, the others using no processor meanwhile. A rate is samples a second in a
turn; a ratio is that of two contenders in the same round; the medians over the rounds are shown, with the least and the
greatest. A turn in which other processes of the machine used more than ``--busy`` of its time is taken again, up to ten
times.

A ``--peer`` is any program that speaks as ``speed_worker.py`` describes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

WORKER = Path(__file__).with_name("speed_worker.py")
CONTENDERS = {
    "liar": [
        "potstill:cached",
        "potstill:alone",
        "potstill:live",
        "potstill:cached-fp32",
        "loop:cached",
        "loop:live",
        "usual:to-batch",
        "usual:to-128",
    ],
    "mnist": [
        "potstill:cached",
        "potstill:alone",
        "potstill:live",
        "potstill:live-fp32",
        "loop:cached",
        "loop:live",
        "tutorial:fp32",
    ],
}
RATIOS = {
    "step of the student with its cached teacher / alone": ("potstill:alone", "potstill:cached"),
    "step of the trainer / of a hand-written loop, cached": ("loop:cached", "potstill:cached"),
    "step of the trainer / of a hand-written loop, live": ("loop:live", "potstill:live"),
}


EPOCH = {"liar": 48, "mnist": 200}
"""Steps of a turn of potstill and of the hand-written loops: an epoch of their samples, see ``speed_worker.ROWS``."""


class Contender:
    """A process that trains when told."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.start_s = float(self.answer()["start_s"])
        self.steps = 5
        self.rates: list[float] = []
        self.step_s: list[float] = []

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended: see what it says when it is run alone")
        return dict(json.loads(line))

    def train(self, steps: int) -> tuple[dict[str, Any], float]:
        """Return what it did, and the share of the machine's time that others used meanwhile."""
        assert self.process.stdin is not None
        before = busy_s(), own_s(self.process.pid), time.perf_counter()
        self.process.stdin.write(f"steps {steps}\n")
        self.process.stdin.flush()
        found = self.answer()
        wall = (time.perf_counter() - before[2]) * (os.cpu_count() or 1)
        others = (busy_s() - before[0]) - (own_s(self.process.pid) - before[1])
        return found, max(0.0, others / wall)

    def quit(self) -> None:
        self.process.kill()
        self.process.wait()


def busy_s() -> float:
    """Seconds that all processors together have worked."""
    fields = [int(number) for number in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    idle = fields[3] + fields[4]
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")


def own_s(pid: int) -> float:
    """Seconds that a process has worked."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compete(pair: str, contenders: list[Contender], rounds: int, seconds: float, busy: float) -> None:
    for contender in contenders:  # warm-up, and how many steps fill a turn
        contender.train(contender.steps)
        found, _ = contender.train(contender.steps)
        contender.steps = max(5, round(seconds / (found["seconds"] / found["steps"])))
        if contender.name.startswith(("potstill", "loop")):
            contender.steps = EPOCH[pair]  # the same samples in every turn
    for turn in range(rounds):
        order = contenders if turn % 2 == 0 else contenders[::-1]
        for contender in order:
            for _ in range(10):
                found, others = contender.train(contender.steps)
                if others <= busy:
                    break
            contender.rates.append(found["samples"] / found["seconds"])
            contender.step_s.append(found["seconds"] / found["steps"])
        shown = ", ".join(f"{each.name} {each.rates[-1]:.1f}" for each in contenders)
        print(f"round {turn + 1}: {shown}", flush=True)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def summary(pair: str, contenders: list[Contender]) -> dict[str, Any]:
    named = {each.name: each for each in contenders}
    ratios = {}
    for what, (first, second) in RATIOS.items():
        if first in named and second in named:
            pairs = zip(named[first].rates, named[second].rates, strict=True)
            ratios[what] = spread([one / other for one, other in pairs])
    for own in ("potstill:cached", "potstill:live"):
        for other in (each for each in contenders if not each.name.startswith(("potstill", "loop"))):
            if own in named:
                pairs = zip(named[own].rates, other.rates, strict=True)
                ratios[f"{own} / {other.name}, samples a second"] = spread([one / two for one, two in pairs])
    return {
        "pair": pair,
        "samples_per_s": {each.name: spread(each.rates) for each in contenders},
        "step_ms": {each.name: 1000 * statistics.median(each.step_s) for each in contenders},
        "start_s": {each.name: round(each.start_s, 1) for each in contenders},
        "ratios": ratios,
        "rounds": len(contenders[0].rates),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "the system's"),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pair", choices=sorted(CONTENDERS))
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher")
    parser.add_argument("--only", nargs="*", help="these contenders alone")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--busy", type=float, default=0.05)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    given = ["--data", options.data, *(["--teacher", options.teacher] if options.teacher else [])]
    commands = {
        name: [sys.executable, str(WORKER), name, options.pair, *given]
        for name in (CONTENDERS[options.pair] if options.only is None else options.only)
    }
    commands |= {name: shlex.split(command) for name, _, command in (each.partition("=") for each in options.peer)}
    contenders: list[Contender] = []
    try:
        for name, command in commands.items():  # one after another: they would slow each other down
            contenders.append(Contender(name, command))
            print(f"{name}: ready after {contenders[-1].start_s:.1f} s", flush=True)
        compete(options.pair, contenders, options.rounds, options.seconds, options.busy)
        found = summary(options.pair, contenders)
    finally:
        for contender in contenders:
            contender.quit()
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
