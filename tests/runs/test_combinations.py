"""Every scheme with every source: it runs, the source teaches, and a killed training ends with the same bits."""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from potstill.checks.findings import refuse
from potstill.data.load import Splits
from potstill.errors import PotstillError
from potstill.interfaces import Progress, Task
from potstill.losses.objective import Objective
from potstill.recipe import build
from potstill.recipe.load import recipe_from
from potstill.recipe.schema import Recipe
from potstill.registry import schemes, teacher_sources
from potstill.runs import distilling, teaching
from potstill.runs.cache import Cache
from potstill.runs.preflight import before_training
from potstill.runs.steps import Run
from potstill.teachers.cached import Cached
from potstill.teachers.column import Column
from potstill.teachers.ensemble import Ensemble
from potstill.teachers.live import Deferred, Live
from potstill.teachers.moving_average import MovingAverage
from potstill.teachers.per_task import PerTask
from potstill.teachers.remote import Remote
from potstill.training import trainer as engine
from potstill.training.module import DistillationModule
from potstill.training.trainer import DistillationTrainer
from tests.runs import combinations
from tests.runs.combinations import (
    COLUMNS,
    GRAPH,
    KINDS,
    SCHEMES,
    SOFT,
    SOURCES,
    URL,
    Tree,
    refusal,
    runs,
    tried,
)
from tests.runs.test_steps import Killed
from tests.teachers.served import Served

TRAININGS = {
    "born_again": ("generation-1", "distilled"),
    "assistant": ("mid", "distilled"),
    "stages": ("distilled/first", "distilled/second"),
}
"""The trainings of a scheme that read teachers, where there are several."""

EXAMINED = ("live", "joint", "per_task")
"""Sources with which the preflight looks at every scheme."""

LITTLE = 1e-5
"""Below it a gradient is that of rounding."""

ASKED = (Live, Deferred, Cached, Ensemble, MovingAverage, Column, PerTask, Remote)


@pytest.fixture(scope="module", autouse=True)
def _thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _quick_collection(_thawed: None) -> None:
    """Every training begins with a full garbage collection, which need not look through all that was before."""
    gc.freeze()


@dataclass
class Stand:
    """What all combinations share: data, trained teachers, a server, a graph."""

    folder: Path
    server: Served
    splits: dict[str, Splits] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)

    def recipe(self, tree: Tree) -> Recipe:
        """The recipe with the address of the server and the file of the graph."""
        kind, classes = ("multi", 6) if tree["task"]["name"] == "multi-task" else ("one", 3)
        text = json.dumps(tree).replace(f'"{URL}"', f'"{self.server.url}/{classes}"')
        if GRAPH in text and not (self.folder / f"{kind}.onnx").exists():
            _graph(self.folder / f"{kind}.onnx", classes)
        return recipe_from(json.loads(text.replace(f"onnx:{GRAPH}", f"onnx:{self.folder / kind}.onnx")))

    def data(self, recipe: Recipe) -> Splits:
        """The splits with soft labels, read once."""
        name = recipe.task.name
        if name not in self.splits:
            read = build.make_splits(recipe)
            softened = {each: _with_soft_labels(getattr(read, each)) for each in ("train", "validation", "test")}
            self.splits[name] = replace(read, **softened)
        return self.splits[name]

    def run(self, recipe: Recipe, folder: Path) -> Run:
        made = Run(recipe, folder, bars=False, cache=Cache(folder / "cache"), splits=self.data(recipe))
        made.task = self.tasks.get(recipe.task.name) or made.task
        self.tasks[recipe.task.name] = made.task
        return made

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


def learn(stand: Stand, recipe: Recipe, folder: Path) -> Run:
    """What a run does between the preflight and the evaluation, with checkpoints and models left where they are."""
    run = stand.run(recipe, folder)
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
    """Make a run what it would be, had it been killed two steps into every training that learns from others."""
    for path in (run.folder / "checkpoints").rglob("checkpoint-4"):
        shutil.rmtree(path)
    shutil.rmtree(run.folder / "cache/teachers", ignore_errors=True)
    for folder in (run.folder / "models").iterdir():
        shutil.rmtree(folder)


def kill_in(patch: pytest.MonkeyPatch, training: str, step: int) -> None:
    """End the process before the next step of a training, once so many are done."""
    original = DistillationTrainer.training_step

    def watched(self: DistillationTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.args.output_dir.endswith(f"checkpoints/{training}") and self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    patch.setattr(DistillationTrainer, "training_step", watched)


def killed_in_the_second_stage(stand: Stand, recipe: Recipe, folder: Path) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        kill_in(patch, "distilled/second", 3)
        with pytest.raises(Killed):
            learn(stand, recipe, folder)
    return stand.run(recipe, folder)


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("stand")
    with Served(_answer) as server:
        yield Stand(folder, server)


PAIRS = [(scheme, source) for scheme, source in tried() if source == "none" or runs(scheme, source)]
REFUSALS = [
    (scheme, source, kind)
    for scheme, source in tried()
    for kind in KINDS
    if refusal(scheme, source, kind) is not None and (kind != "relation" or scheme == "offline")
]


@pytest.mark.parametrize(("scheme", "source"), PAIRS)
def test_it_runs_and_teaches_and_goes_on_to_the_same_bits(
    stand: Stand, tmp_path: Path, scheme: str, source: str
) -> None:
    """With every kind of term that can be at once."""
    recipe = stand.recipe(combinations.tree(scheme, source, runs(scheme, source)))
    posted = len(stand.server.requests)
    if scheme == "offline" or source in EXAMINED:
        refuse(before_training(stand.run(recipe, tmp_path / "run")))
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        run = learn(stand, recipe, tmp_path / "run")
    assert set(SOURCES[source]) - set(recipe.joint_teachers) - set(seen.asked) == set(), "a teacher was not asked"
    assert source != "http" or len(stand.server.requests) > posted
    assert {key for key, pull in seen.pull.items() if pull < LITTLE} == set(), "terms without a gradient"
    assert source == "none" or {name for name, _, _ in seen.pull} >= set(TRAININGS.get(scheme, ("distilled",)))
    _assert_all_learn(run)
    wanted = state(run)
    if scheme == "stages":
        run = killed_in_the_second_stage(stand, recipe, tmp_path / "again")
    else:
        go_back(run)
    run = learn(stand, recipe, run.folder.path)
    resumed = [event["resumed_from"] for event in run.folder.events() if event["event"] == "training"]
    assert resumed[-1] == "checkpoint-2"
    found = state(run)
    assert found.keys() == wanted.keys()
    assert [key for key, value in wanted.items() if not torch.equal(found[key], value)] == []


def _assert_all_learn(run: Run) -> None:
    """Every model, projector, exit and average moves between the two checkpoints: one that is in no optimizer stays."""
    for folder in (run.folder / "checkpoints").rglob("checkpoint-4"):
        for path in folder.rglob("*.safetensors"):
            before = load_file(folder.with_name("checkpoint-2") / path.relative_to(folder))
            after = load_file(path)
            assert before.keys() == after.keys()
            assert not after or any(not torch.equal(after[key], value) for key, value in before.items()), path


@pytest.mark.parametrize(("scheme", "source", "kind"), REFUSALS)
def test_what_cannot_be_is_refused(stand: Stand, tmp_path: Path, scheme: str, source: str, kind: str) -> None:
    said = refusal(scheme, source, kind)
    assert said is not None
    tree = combinations.tree(scheme, source, (kind,))
    with pytest.raises(PotstillError, match=said.message):
        _asked(stand, tree, tmp_path / "run", examined=scheme == "offline")


def _asked(stand: Stand, tree: Tree, folder: Path, *, examined: bool) -> None:
    recipe = stand.recipe(tree)
    if examined:
        refuse(before_training(stand.run(recipe, folder)))
    learn(stand, recipe, folder)


def test_every_component_is_in_the_table() -> None:
    """A new scheme or source is not forgotten."""
    assert set(schemes.names()) <= set(SCHEMES)
    named = {name for teachers in SOURCES.values() for spec in teachers.values() for name in _source(spec)}
    assert named == set(teacher_sources.names()) - {"openai"}


def _source(spec: Tree) -> list[str]:
    source = spec.get("source")
    return [] if source is None else list(source)


def test_the_table_of_the_docs_is_that_of_these_tests() -> None:
    assert combinations.FILE.read_text(encoding="utf-8") == combinations.written(), (
        "stale: run `python -m tests.runs.combinations --write`"
    )


def test_the_table_says_what_is_tested() -> None:
    """A tick stands for tests that ran; what is refused has its reason in the cell."""
    ran = {(scheme, source.partition(":")[0]) for scheme, source in PAIRS}
    table = combinations.table()
    for scheme, row in table["cells"].items():
        for column, cell in row.items():
            assert cell["runs"] == ((scheme, column) in ran)
            reasons = {
                each.why
                for own, source, kind in REFUSALS
                if own == scheme and source.partition(":")[0] == column
                for each in [refusal(own, source, kind)]
                if each is not None
            }
            assert set(cell["but"]) == reasons
            assert cell["runs"] or cell["but"]


def test_the_docs_show_the_table() -> None:
    """Each cell is where it belongs, and its numbers lead to its reasons."""
    spec = importlib.util.spec_from_file_location("potstill_docs_hooks", combinations.FILE.with_name("hooks.py"))
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="schemes.md"))
    shown = hooks.on_page_markdown("before\n\n<!-- combinations -->\n\nafter", page=page)
    head, _, *rows = [line for line in shown.splitlines() if line.startswith("|")]
    notes = dict(re.findall(r"^(\d+)\. (.+)$", shown, re.MULTILINE))
    table = combinations.table()
    columns = [cell.strip() for cell in head.strip("|").split("|")][1:]
    assert len(rows) == len(SCHEMES)
    for row in rows:
        called, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        scheme = next(name for name, text in SCHEMES.items() if text == called)
        for column, cell in zip(columns, cells, strict=True):
            wanted = table["cells"][scheme][next(name for name, text in COLUMNS.items() if text == column)]
            assert cell.startswith("✓" if wanted["runs"] else "–")
            assert [notes[number] for number in re.findall(r"\d+", cell)] == wanted["but"]
    assert hooks.on_page_markdown("nothing", page=page) == "nothing"
