"""How long the command line takes to answer, as a whole process.

python benchmarks/startup.py --runs 11
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=11)
    options = parser.parse_args()
    potstill = str(Path(sys.executable).parent / "potstill")
    commands = {"potstill --help": [potstill, "--help"], "python -c pass": [sys.executable, "-c", "pass"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(options.runs + 1):
        for name, command in commands.items():
            found = seconds(command)
            if turn:
                times[name].append(found)
    print(json.dumps({name: round(statistics.median(found), 3) for name, found in times.items()}))


if __name__ == "__main__":
    main()
