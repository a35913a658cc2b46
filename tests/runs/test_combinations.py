"""Every scheme with every source: it runs, the source teaches, and a training that was stopped ends with the same bits."""

from __future__ import annotations

import gc
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from potstill.data.load import Splits
from potstill.errors import PotstillError
from potstill.interfaces import Progress
from potstill.losses.objective import Objective
from potstill.recipe import build
from potstill.recipe.load import recipe_from
from potstill.runs import distilling, teaching
from potstill.runs.cache import Cache
from potstill.runs.preflight import after_teachers, before_training
from potstill.runs.steps import Run
from potstill.schemes.lesson import STUDENT
from potstill.teachers.cached import Cached
from potstill.teachers.column import Column
from potstill.teachers.ensemble import Ensemble
from potstill.teachers.live import Deferred, Live
from potstill.teachers.moving_average import MovingAverage
from potstill.teachers.per_task import PerTask
from potstill.teachers.remote import Remote
from potstill.training import trainer as engine
from potstill.training.module import DistillationModule
from tests.runs.combinations import FEATURES, GRAPH, MULTI, SOFT, URL, BASE, SOURCES, Tree
from tests.teachers.served import Served

ASKED = (Live, Deferred, Cached, Ensemble, MovingAverage, Column, PerTask, Remote)


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Every training begins with a full garbage collection, which need not look through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@dataclass
class Stand:
    """What all combinations share: data, trained teachers, a server, a graph."""

    folder: Path
    server: Served
    splits: dict[str, Splits] = field(default_factory=dict)

    def tree(self, tree: Tree) -> Tree:
        """The recipe with the address of the server and the file of the graph."""
        kind = "multi" if tree["task"]["name"] == "multi-task" else "one"
        text = json.dumps(tree).replace(f'"{URL}"', f'"{self.server.url}/{6 if kind == "multi" else 3}"')
        text = text.replace(f"onnx:{GRAPH}", f"onnx:{self.folder / kind}.onnx")
        found: Tree = json.loads(text)
        return found

    def data(self, tree: Tree) -> Splits:
        """The splits with soft labels."""
        name = tree["task"]["name"]
        if name not in self.splits:
            read = build.make_splits(
                recipe_from({**tree, "teachers": {}, "objective": {"hard": {"loss": "cross_entropy"}}})
            )
            self.splits[name] = replace(
                read, **{split: _with_soft_labels(getattr(read, split)) for split in ("train", "validation", "test")}
            )
        return self.splits[name]

    def run(self, tree: Tree, folder: Path) -> Run:
        return Run(recipe_from(tree), folder, bars=False, cache=Cache(folder / "cache"), splits=self.data(tree))

    def teachers(self, run: Run) -> None:
        """Give a run the teachers that learn from the labels alone, trained once for all."""
        for name, spec in run.recipe.model_teachers.items():
            if spec.train is None or spec.objective is not None or name.startswith("generation-"):
                continue
            kept = self.folder / f"{run.recipe.task.name} {name}"
            if not kept.exists():
                teaching.teach(run, name)
                shutil.copytree(run.model_folder(name), kept)
                shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
            elif not run.model_folder(name).exists():
                shutil.copytree(kept, run.model_folder(name))


def _with_soft_labels(table: Any) -> Any:
    classes = len(table.features["label"].names)
    labels = np.asarray(table["label"][:])
    sharp = np.full((len(labels), classes), 0.1 / (classes - 1))
    sharp[np.arange(len(labels)), labels] = 0.9
    return table.add_column(SOFT, sharp.tolist())


def _answer(path: str, body: Any) -> Any:
    """A server that tells classes by the first feature."""
    classes = int(path.rpartition("/")[2])
    rows = [
        [next((float(v) for v in row.values() if isinstance(v, float)), 0.0) for _ in range(classes)]
        for row in body["inputs"]
    ]
    return {"logits": [[value * (place % 3 - 1) for place, value in enumerate(row)] for row in rows]}


def _graph(path: Path, classes: int) -> None:
    onnx = pytest.importorskip("onnx", reason="needs potstill[export]: onnx")
    pytest.importorskip("onnxruntime", reason="needs potstill[export]: onnxruntime")
    weight = np.linspace(-2, 2, 4 * classes, dtype=np.float32).reshape(classes, 4)
    node = onnx.helper.make_node("Gemm", ["features", "weight"], ["logits"], transB=1)
    floats = onnx.TensorProto.FLOAT
    sides = [
        [onnx.helper.make_tensor_value_info(name, floats, ["batch", size])]
        for name, size in (("features", 4), ("logits", classes))
    ]
    graph = onnx.helper.make_graph([node], "linear", *sides, [onnx.numpy_helper.from_array(weight, "weight")])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(made, str(path))


@dataclass
class Seen:
    """What was watched of trainings."""

    names: dict[int, str] = field(default_factory=dict)
    learners: dict[int, str] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    pull: dict[tuple[str, str, str], float] = field(default_factory=dict)
    training: str = ""


def watch(patch: pytest.MonkeyPatch) -> Seen:
    """Watch who is asked, and how strongly each soft term pulls at whom."""
    seen = Seen()
    for owner in (distilling, teaching):
        _patch(patch, owner, "make_sources", lambda made, *_, **__: _note(seen, made))
    for kind in ASKED:
        _before(patch, kind, "__call__", lambda source, *_: seen.asked.update([seen.names.get(id(source), "")]))
    _before(patch, Run, "train", lambda run, name, *_, **__: setattr(seen, "training", name))
    _patch(patch, engine, "joined", lambda made, *_: _note_learners(seen, made[0]))
    original = DistillationModule._loss

    def weighed(self: DistillationModule, said: Any, teacher: Any, batch: Any, progress: Any, counts: Any) -> Any:
        heard = {**teacher, **self.own_signals(said, progress)}
        wanted = [p for p in self.student.parameters() if p.requires_grad]
        for name, term in self.objective.named_terms():
            if term.hard or not term.weight_at(progress or Progress()):
                continue
            alone = Objective({name: term}, response_mask=self.objective.response_mask)
            total = alone(said, heard, batch, progress).total
            grads = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
            size = sum(float(grad.abs().sum()) for grad in grads if grad is not None)
            key = seen.training, seen.learners[id(self)], name
            seen.pull[key] = max(size, seen.pull.get(key, 0.0))
        return original(self, said, teacher, batch, progress, counts)

    patch.setattr(DistillationModule, "_loss", weighed)
    return seen


def _note(seen: Seen, made: dict[str, Any]) -> None:
    seen.names |= {id(source): name for name, source in made.items()}
    seen.kept.append(made)  # or another object may have the same id


def _note_learners(seen: Seen, module: DistillationModule) -> None:
    seen.learners |= {id(each): name for name, each in module.learners.items()}
    seen.kept.append(module)


def _patch(patch: pytest.MonkeyPatch, owner: Any, name: str, look: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        look(result, *args, **kwargs)
        return result

    patch.setattr(owner, name, watched)


def _before(patch: pytest.MonkeyPatch, owner: Any, name: str, look: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        look(*args, **kwargs)
        return original(*args, **kwargs)

    patch.setattr(owner, name, watched)


def learn(stand: Stand, tree: Tree, folder: Path) -> Run:
    """What a run does between the preflight and the evaluation, with checkpoints and models left where they are."""
    run = stand.run(tree, folder)
    run.folder.path.mkdir(parents=True, exist_ok=True)
    stand.teachers(run)
    for name in run.recipe.all_teachers:
        teaching.teach(run, name)
    distilling.distil(run)
    return run


def state(run: Run) -> dict[str, torch.Tensor]:
    """Every tensor of every model and of every last checkpoint: learners, projectors, exits, sources, optimizers."""
    found: dict[str, torch.Tensor] = {}
    folders = [*(run.folder / "models").iterdir(), *(run.folder / "checkpoints").rglob("checkpoint-4")]
    for path in (each for folder in folders for each in sorted(folder.rglob("*"))):
        own = str(path.relative_to(run.folder.path))
        if path.suffix == ".safetensors":
            found |= {f"{own} {key}": value for key, value in load_file(path).items()}
        elif path.name in ("optimizer.pt", "scheduler.pt"):
            found |= {f"{own} {key}": value for key, value in _flat(torch.load(path, weights_only=True))}
    return found


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _flat(each, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for place, each in enumerate(value):
            yield from _flat(each, f"{path}.{place}")
    elif isinstance(value, torch.Tensor | int | float):
        yield path, torch.as_tensor(value)


def go_back(run: Run) -> None:
    """Make a run what one is that was killed after two steps of every training that learns from others."""
    for path in (run.folder / "checkpoints").rglob("checkpoint-4"):
        shutil.rmtree(path)
    shutil.rmtree(run.folder / "cache/teachers", ignore_errors=True)
    for folder in (run.folder / "models").iterdir():
        shutil.rmtree(folder)
