"""What the ways of distilling are worth on one pair of models: equal budgets, several seeds, a result file a unit.

    python benchmarks/methods.py cifar10 --data FOLDER --teacher FILE
    python benchmarks/methods.py sst2 --data FOLDER --teacher FOLDER

Every method trains the same student on the same data for the same number of epochs, with the settings of the packaged
recipe; its weights and temperatures are those published, not tuned here, and its figure is that of the last epoch. One
file a (method, seed) lies in ``benchmarks/results/methods/PAIR``: what is there is not run again, so that a machine may
take as many turns as it needs. ``--table`` runs nothing and writes the table of the docs.

On CIFAR-10 each epoch shows a random view of its own, the same for all methods: a teacher of whom only logits are read
is asked once for each view.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from potstill.evaluation.significance import mean_interval
from potstill.recipe.load import load_recipe, recipe_from
from potstill.runs.folder import write_json
from potstill.runs.steps import Run

RESULTS = Path(__file__).parent / "results" / "methods"
BASELINES = ("alone", "label-smoothing")
Terms = dict[str, dict[str, Any]]

WARM_UP = {"from": 0.0, "to": 1.0, "end": 20 / 240}
"""The first 20 of 240 epochs, as DKD and ReviewKD were published."""

HARD: Terms = {"hard": {"loss": "cross_entropy", "weight": 1.0}}
SOFT: Terms = {
    "soft": {"loss": "kl", "weight": 0.9, "temperature": 4.0},
    "hard": {"loss": "cross_entropy", "weight": 0.1},
}


def soft(loss: str, weight: float = 0.9, **options: Any) -> Terms:
    """Return a soft term in place of that of plain distillation."""
    return {**SOFT, "soft": {"loss": loss, "weight": weight, **options}}


def stages(loss: str, **options: Any) -> Terms:
    """Return a term for each of the three stages of the network, beside the labels."""
    names = ("layer1", "layer2", "layer3")
    return {**HARD, **{name: {"loss": loss, "student": name, "teacher": name, **options} for name in names}}


def pooled(*losses: str, **options: Any) -> Terms:
    """Return terms on the vector before the classifier, beside the labels."""
    name = "input:linear"
    return {**HARD, **{loss: {"loss": loss, "student": name, "teacher": name, **options} for loss in losses}}


CIFAR10: dict[str, Terms] = {
    "alone": HARD,
    "label-smoothing": {"hard": {**HARD["hard"], "label_smoothing": 0.1}},
    "kd": SOFT,
    "dkd": {**HARD, "soft": {"loss": "dkd", "weight": WARM_UP}},
    "dist": {**HARD, "soft": {"loss": "dist", "temperature": 4.0}},
    "logit standardisation": {"soft": {"loss": "kl_standardized"}, "hard": SOFT["hard"]},
    "at": stages("attention_transfer"),
    "sp": {**HARD, "layer3": stages("similarity")["layer3"]},
    "rkd": pooled("rkd_distance", "rkd_angle"),
    "crd": pooled("crd"),
    "fitnet": {**HARD, "hint": {**stages("mse", project="auto")["layer2"], "weight": 100.0}},
    "vid": stages("vid"),
    "pkt": pooled("pkt"),
    "reverse kl": soft("reverse_kl", temperature=4.0),
    "jsd": soft("jsd", temperature=4.0),
    "nkd": {**HARD, "soft": {"loss": "nkd"}},
    "wsld": {**HARD, "soft": {"loss": "wsld"}},
    "mse on logits": soft("mse"),
    "tf-kd": {"soft": {"loss": "virtual_teacher"}, "hard": {"loss": "cross_entropy", "weight": 0.9}},
    "cc": pooled("correlation_congruence"),
    "icc": {**HARD, "layer3": stages("icc")["layer3"]},
    "review": {
        **HARD,
        "review": {
            "loss": "review",
            "weight": WARM_UP,
            "student": ["layer1", "layer2", "layer3"],
            "teacher": ["layer1", "layer2", "layer3"],
        },
    },
}

_LAYERS = {1: 2, 2: 4, 3: 6}
_KD: Terms = {
    "soft": {"loss": "kl", "weight": 0.7, "temperature": 4.0},
    "hard": {"loss": "cross_entropy", "weight": 0.3},
}
SST2: dict[str, Terms] = {
    "alone": HARD,
    "label-smoothing": CIFAR10["label-smoothing"],
    "kd": _KD,
    "kd + hidden states": {
        **_KD,
        "hidden": {"loss": "mse", "student": "hidden", "teacher": "hidden", "layers": _LAYERS},
    },
    "pkd": {**_KD, "hidden": {"loss": "normalized_mse", "student": "hidden", "teacher": "hidden", "layers": _LAYERS}},
    "tinybert": {
        **_KD,
        "hidden": {"loss": "mse", "student": "hidden", "teacher": "hidden", "layers": {0: 0, **_LAYERS}},
        "attention": {
            "loss": "attention_mse",
            "student": "attention",
            "teacher": "attention",
            "layers": _LAYERS,
            "mask": "attention_mask",
        },
    },
    "minilmv2": {
        **_KD,
        "relations": {
            "loss": "minilmv2",
            "mask": "attention_mask",
            "student": ["query.3", "key.3", "value.3"],
            "teacher": ["query.6", "key.6", "value.6"],
        },
    },
    "dkd": {**HARD, "soft": {"loss": "dkd", "temperature": 4.0}},
    "reverse kl": {**_KD, "soft": {**_KD["soft"], "loss": "reverse_kl"}},
    "rkd": {
        **_KD,
        **{
            loss: {"loss": loss, "student": "hidden.3", "teacher": "hidden.6", "mask": "attention_mask"}
            for loss in ("rkd_distance", "rkd_angle")
        },
    },
}


def cifar10(asked: argparse.Namespace) -> list[str]:
    """Return what differs from the packaged recipe."""
    return [
        "cifar10-resnet",
        f"data.path={asked.data}",
        f"teacher.weights={asked.teacher}",
        f"train.epochs={asked.epochs or 10}",
        f"train.views={asked.epochs or 10}",
        "train.logging_steps=0.5",
    ]


def sst2(asked: argparse.Namespace) -> list[str]:
    """Return what differs from the packaged recipe."""
    return [
        "sst2-minilm",
        f"data.path={asked.data}",
        f"teacher.model={asked.teacher}",
        f"train.epochs={asked.epochs or 3}",
        "data.limit={train: 10000}",
    ]


PAIRS: dict[str, tuple[Callable[[argparse.Namespace], list[str]], dict[str, Terms]]] = {
    "cifar10": (cifar10, CIFAR10),
    "sst2": (sst2, SST2),
}


def main() -> None:
    """Run what is missing, seed after seed, and write a file a unit; or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=PAIRS)
    parser.add_argument("--data", type=Path, help="the folder of the data set")
    parser.add_argument("--teacher", type=Path, help="the teacher's weights (cifar10) or folder (sst2)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="in place of 10 (cifar10) or 3 (sst2)")
    parser.add_argument("--only", nargs="*", metavar="METHOD")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/methods"), help="where the runs are until they are done"
    )
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    asked = parser.parse_args()
    if asked.table:
        print(table(asked.pair))
        return
    settings, methods = PAIRS[asked.pair]
    for seed in range(asked.seeds):
        for method in asked.only or methods:
            file = RESULTS / asked.pair / f"{method.replace(' ', '-')}.{seed}.json"
            if file.is_file() and json.loads(file.read_text())["settings"] != plain(settings(asked)):
                raise SystemExit(f"{file} was made with other settings; move it away")
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, one(settings(asked), methods[method], seed, asked.runs / asked.pair / file.stem))
            print(f"{file.name}: {json.loads(file.read_text())['accuracy']:.4f}", flush=True)


def one(settings: list[str], terms: Terms, seed: int, folder: Path) -> dict[str, Any]:
    """Do one run and return its figures on the test split, after the last epoch."""
    base, *changes = settings
    tree = load_recipe(base, [*changes, f"seed={seed}"]).model_dump(mode="json", exclude_unset=True)
    taught = any(term["loss"] not in ("cross_entropy", "virtual_teacher") for term in terms.values())
    asks_logits = all(term.get("teacher", "logits") == "logits" for term in terms.values())
    tree["teacher"]["cache"] = "views" in tree["train"] and taught and asks_logits
    run = Run(recipe_from({**tree, "objective": terms, "baseline": {"enabled": False}}), folder, bars=False)
    metrics = run.execute()
    student, teacher = metrics.models["distilled"], metrics.models["teacher"]
    events = {f"{event['event']} {event['step']}": event["time"] for event in run.folder.events() if "step" in event}
    shutil.rmtree(folder)
    return {
        "method": folder.name.rpartition(".")[0],
        "seed": seed,
        "accuracy": student.metrics["accuracy"].value,
        "f1_macro": student.metrics["f1_macro"].value,
        "agreement": student.agreement,
        "teacher": teacher.metrics["accuracy"].value,
        "begin": events["begin distilled"],
        "end": events["done distilled"],
        "settings": plain(settings),
        "terms": terms,
    }


def plain(settings: list[str]) -> list[str]:
    """Return what differs from the packaged recipe, without the folders of this machine."""
    return [each.partition("/")[0] for each in settings[1:]]


def table(pair: str) -> str:
    """Return the mean over the seeds of every method with its 95 % interval, and the gain over the student alone."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted((RESULTS / pair).glob("*.json")):
        unit = json.loads(file.read_text())
        found.setdefault(unit["method"], {})[unit["seed"]] = unit
    alone = {seed: unit["accuracy"] for seed, unit in found["alone"].items()}
    rows = []
    for method, units in found.items():
        values = [unit["accuracy"] for unit in units.values()]
        gains = [unit["accuracy"] - alone[seed] for seed, unit in units.items() if seed in alone]  # paired by seed
        agreement = sum(unit["agreement"] for unit in units.values()) / len(units)
        rows.append((sum(values) / len(values), method, shown(values), shown(gains, sign="+"), agreement, len(units)))
    lines = [
        "| method | accuracy | over the student alone | agreement with the teacher | seeds |",
        "|---|---|---|---|---|",
    ]
    for _, method, accuracy, gain, agreement, seeds in sorted(rows, reverse=True):
        over = "–" if method == "alone" else gain
        lines.append(f"| {method.replace('-', ' ')} | {accuracy} | {over} | {100 * agreement:.1f} | {seeds} |")
    return "\n".join(lines)


def shown(values: list[float], sign: str = "") -> str:
    """A mean in percent, with the half-width of its 95 % interval where there are three values or more."""
    mean = f"{100 * sum(values) / len(values):{sign}.1f}".replace("-", "−")
    if len(values) < 3:
        return mean
    interval = mean_interval(values)
    return f"{mean} ± {50 * (interval['high'] - interval['low']):.1f}"


if __name__ == "__main__":
    main()
