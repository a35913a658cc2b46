"""What the schemes are worth: equal budgets for the student, several seeds, a result file a unit.

    python benchmarks/schemes.py cifar10 --data FOLDER --teacher FILE
    python benchmarks/schemes.py sst2 --data FOLDER --teacher FOLDER
    python benchmarks/schemes.py tasks --data FOLDER --teacher FOLDER     # with the folders sst2, sick and liar in it

On each pair every scheme trains the same student on the same data for the same number of epochs, with the settings of
the packaged recipe and its published options, not tuned here; what a scheme trains beside the student (peers, earlier
generations, assistants) is counted in ``seconds``. One file a (scheme, seed) lies in
``benchmarks/results/schemes/PAIR``:
what is there is not run again, so that a machine may take as many turns as it needs. ``--table`` runs nothing and
writes the table of the docs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from methods import shown as percent

from potstill.recipe.load import load_recipe, recipe_from
from potstill.runs.folder import write_json
from potstill.runs.steps import Run

RESULTS = Path(__file__).parent / "results" / "schemes"
Tree = dict[str, Any]

HARD: Tree = {"hard": {"loss": "cross_entropy", "weight": 1.0}}
RESNET: Tree = {"model": "potstill:cifar_resnet"}


def kd(teacher: str = "logits", weight: float = 0.9) -> Tree:
    """Return plain distillation."""
    return {
        "soft": {"loss": "kl", "teacher": teacher, "weight": weight, "temperature": 4.0},
        "hard": {"loss": "cross_entropy", "weight": round(1 - weight, 3)},
    }


# ---- CIFAR-10 ------------------------------------------------------------------------------------------------------


def cifar10(asked: argparse.Namespace) -> Tree:
    """Return the packaged recipe with the files of this machine."""
    epochs = asked.epochs or 10
    changes = [f"data.path={asked.data}", f"teacher.weights={asked.teacher}", "train.logging_steps=0.5"]
    changes += [f"train.epochs={epochs}", f"train.views={epochs}"]
    tree = _tree("cifar10-resnet", changes)
    tree["teacher"]["cache"] = True
    return tree


def _no_teacher(tree: Tree, **changes: Any) -> Tree:
    return {**{key: value for key, value in tree.items() if key != "teacher"}, **changes}


def _assistant(tree: Tree, depth: int) -> Tree:
    middle = {**RESNET, "kwargs": {"depth": depth}, "train": tree["train"], "seed": 0, "objective": kd("large/logits")}
    teachers = {"large": tree["teacher"], "assistant": middle}
    return _no_teacher(tree, teachers=teachers, objective=kd("assistant/logits"))


CIFAR10: dict[str, Callable[[Tree], Tree]] = {
    "alone": lambda tree: {**tree, "objective": HARD},
    "offline": lambda tree: {**tree, "objective": kd()},
    "mutual": lambda tree: _no_teacher(
        tree,
        teachers={"peer": {**RESNET, "kwargs": {"depth": 20}, "train": "jointly", "seed": tree["seed"] + 100}},
        scheme={"name": "mutual"},
        objective={**HARD, "soft": {"loss": "kl", "teacher": "logits", "weight": 1.0}},
    ),
    "exits": lambda tree: _no_teacher(tree, scheme={"name": "exits", "at": ["layer1", "layer2"]}, objective=HARD),
    "mean teacher": lambda tree: _no_teacher(
        tree,
        teacher={"source": {"moving_average": {"decay": 0.99}}},
        objective={**HARD, "soft": {"loss": "kl", "weight": {"from": 0.0, "to": 1.0, "end": 0.25}}},
    ),
    "assistant": lambda tree: _assistant(tree, 32),
    "born again": lambda tree: _no_teacher(
        tree, scheme={"name": "born_again", "generations": 2}, objective=kd(weight=0.5)
    ),
    "mutual with a teacher": lambda tree: _no_teacher(
        tree,
        teachers={
            "large": tree["teacher"],
            "peer": {**RESNET, "kwargs": {"depth": 20}, "train": "jointly", "seed": tree["seed"] + 100},
        },
        scheme={"name": "mutual"},
        objective={**kd("large/logits"), "peers": {"loss": "kl", "teacher": "peer/logits", "weight": 1.0}},
    ),
}


# ---- SST-2 ---------------------------------------------------------------------------------------------------------

LAYERS: Tree = {"hidden": {"loss": "mse", "student": "hidden", "teacher": "hidden", "layers": {1: 2, 2: 4, 3: 6}}}


def sst2(asked: argparse.Namespace) -> Tree:
    """Return the packaged recipe with the files of this machine and 10,000 training rows."""
    changes = [f"data.path={asked.data}", f"teacher.model={asked.teacher}", "data.limit={train: 10000}"]
    return _tree("sst2-minilm", [*changes, f"train.epochs={asked.epochs or 3}"])


def _teachers(tree: Tree, count: int = 3) -> Tree:
    return {f"teacher-{seed}": {**tree["teacher"], "seed": seed} for seed in range(count)}


def _ensemble(tree: Tree) -> Tree:
    teachers = _teachers(tree)
    both = {"source": {"ensemble": {"of": list(teachers)}}}
    student = {"from_teacher": {"keep_blocks": [0, 2, 4], "teacher": "teacher-0"}}
    return _no_teacher(tree, teachers={**teachers, "all": both}, student=student, objective=kd("all/logits", 0.7))


def _best_single(tree: Tree) -> Tree:
    """The teacher that was best on the validation split, as the first unit of the ensemble found it."""
    file = RESULTS / "sst2" / "ensemble.0.json"
    if not file.is_file():
        raise SystemExit("run the ensemble first: it says which single teacher is the best on the validation split")
    found = json.loads(file.read_text())["validation"]
    teachers = _teachers(tree)
    best = max(teachers, key=lambda name: found[name])
    student = {"from_teacher": {"keep_blocks": [0, 2, 4], "teacher": "teacher-0"}}
    return _no_teacher(tree, teachers=teachers, student=student, objective=kd(f"{best}/logits", 0.7))


SST2: dict[str, Callable[[Tree], Tree]] = {
    "alone": lambda tree: {**tree, "objective": HARD},
    "ensemble": _ensemble,
    "best single teacher": _best_single,
    "all at once": lambda tree: {**tree, "objective": {**kd(weight=0.7), **LAYERS}},
    "progressive": lambda tree: {
        **tree,
        "objective": {**kd(weight=0.7), **LAYERS},
        "scheme": {"name": "progressive", "schedule": "linear"},
    },
    "module replacing": lambda tree: {
        **tree,
        "student": {"from_teacher": {"keep_blocks": [0, 2, 4], "weights": "finetuned"}},
        "objective": HARD,
        "scheme": {"name": "module_replacing"},
    },
    "progressive, responses throughout": lambda tree: {
        **tree,
        "objective": {**kd(weight=0.7), **LAYERS},
        "scheme": {"name": "progressive", "response": "throughout", "hard": "throughout"},
    },
}


# ---- three tasks ---------------------------------------------------------------------------------------------------

PARTS: Tree = {
    "sentiment": {"text": "sentence"},
    "nli": {"text": "sentence_A", "pair": "sentence_B"},
    "truth": {"text": "statement"},
}
FOLDERS = {"sentiment": "sst2", "nli": "sick", "truth": "liar"}


def three_tasks(asked: argparse.Namespace) -> Tree:
    """Return the settings of the SST-2 recipe; the units say the data and the task."""
    tree = _tree("sst2-minilm", [f"teacher.model={asked.teacher}", f"train.epochs={asked.epochs or 3}"])
    return {**tree, "folder": str(asked.data)}


def _rows(tree: Tree, part: str) -> Tree:
    return {"source": "files", "path": f"{tree['folder']}/{FOLDERS[part]}", "limit": {"train": 10000}}


def _single(part: str) -> Callable[[Tree], Tree]:
    def changed(tree: Tree) -> Tree:
        task = {"name": "text-classification", "max_length": 64, **PARTS[part]}
        made = {**tree, "task": task, "data": _rows(tree, part), "objective": kd(weight=0.7)}
        made.pop("folder")
        return made

    return changed


def _multi(weight: float) -> Callable[[Tree], Tree]:
    def changed(tree: Tree) -> Tree:
        parts = {name: {"name": "text-classification", "max_length": 64, **part} for name, part in PARTS.items()}
        teachers = {f"{name}-teacher": {**tree["teacher"], "task": name} for name in PARTS}
        every = {"source": {"per_task": {"teachers": {name: f"{name}-teacher" for name in PARTS}}}}
        made = _no_teacher(
            tree,
            task={"name": "multi-task", "tasks": parts},
            data={"source": "tasks", "kwargs": {"tasks": {name: _rows(tree, name) for name in PARTS}}},
            teachers={**teachers, "every": every},
            student={"from_teacher": {"keep_blocks": [0, 2, 4], "teacher": "sentiment-teacher"}},
            objective=kd("every/logits", weight) if weight else HARD,
        )
        made.pop("folder")
        return made

    return changed


TASKS: dict[str, Callable[[Tree], Tree]] = {
    "multi-task": _multi(0.7),
    **{f"{part} alone": _single(part) for part in PARTS},
    "multi-task without teachers": _multi(0.0),
}

PAIRS: dict[str, tuple[Callable[[argparse.Namespace], Tree], dict[str, Callable[[Tree], Tree]]]] = {
    "cifar10": (cifar10, CIFAR10),
    "sst2": (sst2, SST2),
    "tasks": (three_tasks, TASKS),
}


def _tree(name: str, changes: list[str]) -> Tree:
    return load_recipe(name, changes).model_dump(mode="json", exclude_unset=True)


def main() -> None:
    """Run what is missing, seed after seed, and write a file a unit; or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=PAIRS)
    parser.add_argument("--data", type=Path, help="the folder of the data")
    parser.add_argument("--teacher", type=Path, help="the teacher's weights (cifar10) or folder (sst2, tasks)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="in place of 10 (cifar10) or 3 (sst2, tasks)")
    parser.add_argument("--only", nargs="*", metavar="SCHEME")
    parser.add_argument("--runs", type=Path, default=Path("runs/schemes"), help="where runs are until they are done")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    asked = parser.parse_args()
    if asked.table:
        print(table(asked.pair))
        return
    settings, units = PAIRS[asked.pair]
    for seed in range(asked.seeds):
        for name in asked.only or units:
            file = RESULTS / asked.pair / f"{name.replace(' ', '-').replace(',', '')}.{seed}.json"
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                tree = {**settings(asked), "seed": seed, "baseline": {"enabled": False}}
                tree["evaluate"] = {"latency": False, "resamples": 100}
                write_json(file, one(name, units[name](tree), asked.runs / asked.pair / file.stem))
            print(f"{file.name}: {json.loads(file.read_text())['models']}", flush=True)


def one(name: str, tree: Tree, folder: Path) -> Tree:
    """Do one run and return the figures of all its models on the test split, after the last epoch."""
    run = Run(recipe_from(tree), folder, bars=False)
    metrics = run.execute()
    primary = metrics.primary
    # of models alone: what is asked elsewhere, such as an ensemble, has figures on the test split only
    validation = (
        run.evaluate("validation").models if run.splits.validation is not None and "all" in metrics.models else {}
    )
    events = [event for event in run.folder.events() if "step" in event]
    spent = {step: _seconds(events, step) for step in ("distilled", *run.recipe.all_teachers)}
    found = {
        "scheme": name,
        "seed": metrics.seed,
        "primary": primary,
        "models": {key: {m: v.value for m, v in each.metrics.items()} for key, each in metrics.models.items()},
        "agreement": metrics.models["distilled"].agreement,
        "validation": {key: each.metrics[primary].value for key, each in validation.items()},
        "seconds": {step: value for step, value in spent.items() if value is not None},
        "epochs": tree["train"]["epochs"],
        "recipe": {key: tree[key] for key in ("objective", "scheme") if key in tree},
    }
    shutil.rmtree(folder)
    return found


def _seconds(events: list[Tree], step: str) -> float | None:
    times = {event["event"]: event["time"] for event in events if event["step"] == step}
    if "begin" not in times or "done" not in times:
        return None
    begin, end = (datetime.strptime(times[key], "%Y-%m-%dT%H:%M:%S%z") for key in ("begin", "done"))
    return (end - begin).total_seconds()


def table(pair: str) -> str:
    """Return the mean over the seeds of every scheme with its 95 % interval, and the gain over the reference."""
    found: dict[str, dict[int, Tree]] = {}
    for file in sorted((RESULTS / pair).glob("*.json")):
        unit = json.loads(file.read_text())
        found.setdefault(unit["scheme"], {})[unit["seed"]] = unit
    return _of_tasks(found) if pair == "tasks" else _of_schemes(found)


def _of_schemes(found: dict[str, dict[int, Tree]]) -> str:
    alone = {seed: _student(unit) for seed, unit in found.get("alone", {}).items()}
    lines = ["| scheme | student | over the student alone | other models | seeds |", "|---|---|---|---|---|"]
    rows = []
    for name, units in found.items():
        values = [_student(unit) for unit in units.values()]
        gains = [_student(unit) - alone[seed] for seed, unit in units.items() if seed in alone]  # paired by seed
        others = [key for key in next(iter(units.values()))["models"] if key != "distilled"]
        shown = ", ".join(
            f"{key} {percent([u['models'][key][u['primary']] for u in units.values()])}" for key in others
        )
        over = "–" if name == "alone" else percent(gains, sign="+")
        rows.append((sum(values) / len(values), f"| {name} | {percent(values)} | {over} | {shown} | {len(units)} |"))
    return "\n".join([*lines, *(line for _, line in sorted(rows, reverse=True))])


def _of_tasks(found: dict[str, dict[int, Tree]]) -> str:
    lines = [f"| scheme | {' | '.join(PARTS)} | seeds |", "|---" * (len(PARTS) + 2) + "|"]
    for name, units in found.items():
        cells = []
        for part in PARTS:
            keys = [f"{part}/accuracy", "accuracy"] if name == f"{part} alone" else [f"{part}/accuracy"]
            values = [
                u["models"]["distilled"][k] for u in units.values() for k in keys if k in u["models"]["distilled"]
            ]
            cells.append(percent(values) if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {len(units)} |")
    return "\n".join(lines)


def _student(unit: Tree) -> float:
    return float(unit["models"]["distilled"][unit["primary"]])


if __name__ == "__main__":
    main()
