"""A whole run: its folder, the teachers' cache, what it refuses, and that a killed one comes to the same bits."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer

from potstill.data.load import Splits
from potstill.errors import DataError, ObjectiveError, PreflightError, RunError, TaskError, TrainingError
from potstill.evaluation.predict import Predictions, predict
from potstill.losses.divergence import kl
from potstill.models.load import load_model, save_model
from potstill.models.plain import Mlp
from potstill.recipe import build
from potstill.recipe.load import load_recipe, recipe_from
from potstill.recipe.schema import Recipe
from potstill.report import html
from potstill.runs import folder, judging, steps
from potstill.runs.cache import Cache
from potstill.runs.folder import RunFolder
from potstill.runs.metrics import RunMetrics
from potstill.runs.steps import Run, open_run
from potstill.runs.teaching import teacher_key
from potstill.training import trainer as engine
from potstill.training.checkpoints import MARKER
from potstill.training.trainer import DistillationTrainer
from tests.pictures import drawn
from tests.runs.tried import dry_run
from tests.training.tiny import flat

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Every training begins with a full garbage collection, which need not look through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


TREE: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "task": {"name": "tabular-classification"},
    "data": {"source": "sklearn", "path": "load_iris"},
    "teacher": {"model": "potstill:mlp", "kwargs": {"hidden": [8]}, "train": {"epochs": 2, "batch_size": 32}},
    "student": {"model": "potstill:mlp", "kwargs": {"hidden": [4], "dropout": 0.2}},
    "objective": {"soft": {"loss": "kl", "weight": 0.7, "temperature": 4.0}, "hard": {"loss": "cross_entropy"}},
    "train": {"epochs": 2, "batch_size": 32, "learning_rate": 0.01},
    "evaluate": {"resamples": 100, "latency": False},
}


def guess(in_features: int, num_labels: int) -> torch.nn.Module:
    """A network that always says the first class."""
    made = torch.nn.Sequential(torch.nn.Linear(in_features, num_labels))
    with torch.no_grad():
        made[0].weight.mul_(1e-6)
        made[0].bias.copy_(torch.arange(num_labels) == 0)
    return made


def seven() -> torch.nn.Module:
    """A network with seven outputs."""
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 7))


def overflowing(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """A KL divergence of somebody's own."""
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    return (p * (p / q).log()).sum(-1)


STEPS = ("preflight", "teacher", "teachers", "baseline", "distilled", "evaluate", "report")


def recipe(**changes: Any) -> Recipe:
    """The recipe with some keys changed; ``teacher__train__epochs=3`` goes down, ``None`` takes a key away."""
    tree = copy.deepcopy(TREE)
    for path, value in changes.items():
        *keys, last = path.split("__")
        section = tree
        for key in keys:
            section = section.setdefault(key, {})
        if value is None:
            section.pop(last, None)
        else:
            section[last] = value
    return recipe_from(tree)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shared_cache: Cache) -> Run:
    """A run that was left alone."""
    run = Run(recipe(), tmp_path_factory.mktemp("runs") / "finished", bars=False, cache=shared_cache)
    run.execute()
    return run


def execute(asked: Recipe, folder: Path, cache: Cache | None = None) -> Run:
    run = Run(asked, folder, bars=False, cache=cache or Cache(folder.parent / f"cache-of-{folder.name}"))
    run.execute()
    return run


def events(run: Run, *kinds: str) -> list[tuple[str, str]]:
    return [(e["event"], e["step"]) for e in run.folder.events() if not kinds or e["event"] in kinds]


def weights(run: Run, name: str) -> torch.Tensor:
    return flat(run.load(name))


def results(run: Run) -> dict[str, Any]:
    """Everything that must not depend on how often a run was killed."""
    found: dict[str, Any] = {"metrics": json.loads((run.folder / "metrics.json").read_text())}
    for path in sorted((run.folder / "models").glob("*/*")):
        content = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
        found[f"{path.parent.name}/{path.name}"] = content
    for path in sorted((run.folder / "predictions").iterdir()):
        found[path.name] = load_file(path)
    return found


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.endswith(".safetensors"):
            assert found[name].keys() == value.keys()
            assert all(torch.equal(found[name][key], value[key]) for key in value), name
        else:
            assert found[name] == value, name


class TestFolder:
    def test_all_that_is_promised_is_there_and_nothing_else(self, finished: Run) -> None:
        found = {str(p.relative_to(finished.folder.path)) for p in finished.folder.path.rglob("*") if p.is_file()}
        names = ("teacher", "baseline", "distilled")
        wanted = {".lock", "recipe.resolved.yaml", "environment.json", "events.jsonl", "metrics.json"}
        wanted |= {f"models/{name}/{file}" for name in names for file in ("model.safetensors", "potstill.json")}
        wanted |= {f"history/{name}.json" for name in names}
        wanted |= {f"predictions/{name}.test.safetensors" for name in names}
        wanted |= {f"steps/{name}.json" for name in STEPS} | {"preflight.json", "examples.json", "report.html"}
        assert found - {".lock"} == wanted - {".lock"}

    def test_the_resolved_recipe_is_a_recipe_and_the_same_one(self, finished: Run) -> None:
        assert load_recipe(finished.folder / "recipe.resolved.yaml") == finished.recipe

    def test_what_the_figures_depend_on(self, finished: Run) -> None:
        about = json.loads((finished.folder / "environment.json").read_text())
        assert about["packages"]["torch"] == metadata.version("torch")
        assert about["threads"] >= 1
        assert {"potstill", "python", "platform", "processor", "cpus", "accelerators", "command"} <= set(about)

    def test_each_step_is_begun_and_done_once_in_order(self, finished: Run) -> None:
        wanted = [(kind, name) for name in STEPS for kind in ("begin", "done")]
        assert events(finished, "begin", "done") == wanted
        assert events(finished, "training") == [("training", name) for name in ("teacher", "baseline", "distilled")]

    def test_the_metrics_follow_the_schema(self, finished: Run) -> None:
        metrics = RunMetrics.model_validate_json((finished.folder / "metrics.json").read_text())
        assert metrics == finished.execute() == finished.metrics()
        assert {name: model.role for name, model in metrics.models.items()} == {
            "teacher": "teacher",
            "baseline": "baseline",
            "distilled": "student",
        }
        assert (metrics.recipe, metrics.seed, metrics.split, metrics.samples) == ("tiny", 3, "test", 30)
        assert [note.split(":")[0] for note in metrics.notes] == ["test", "validation"]
        assert metrics.gain is not None
        accuracy = {name: model.metrics["accuracy"].value for name, model in metrics.models.items()}
        assert metrics.gain.value == pytest.approx(accuracy["distilled"] - accuracy["baseline"])
        assert metrics.retention == pytest.approx(accuracy["distilled"] / accuracy["teacher"])

    def test_saved_models_answer_as_the_saved_predictions(self, finished: Run) -> None:
        """The figures are those of the models that are handed over, not of what was in memory."""
        data = finished.task.dataset(finished.splits.test, training=False, seed=0)
        for name in ("teacher", "baseline", "distilled"):
            model, card = load_model(finished.model_folder(name))
            stored = Predictions.load(finished.folder / f"predictions/{name}.test.safetensors")
            answered = predict(model, finished.task, data)
            assert np.array_equal(answered.logits, stored.logits)
            assert np.array_equal(answered.labels, stored.labels)
            assert np.array_equal(answered.sample_id, np.asarray(finished.splits.test["sample_id"][:]))
            right = stored.logits.argmax(-1) == stored.labels
            assert finished.metrics().models[name].metrics["accuracy"].value == pytest.approx(right.mean())
            assert card["task"] == "tabular-classification"
            assert card["settings"] == json.loads(json.dumps(finished.task.settings()))
        accuracy = finished.metrics().models["distilled"].agreement
        taught, said = (
            Predictions.load(finished.folder / f"predictions/{name}.test.safetensors").logits.argmax(-1)
            for name in ("teacher", "distilled")
        )
        assert accuracy == pytest.approx((taught == said).mean())

    def test_no_model_folder_holds_a_pickle(self, finished: Run) -> None:
        """A pickle from outside runs code when it is opened."""
        for path in (finished.folder / "models").rglob("*"):
            if path.is_file():
                assert path.suffix in (".json", ".safetensors")
                assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04")

    def test_the_history_has_losses_terms_and_evaluations(self, finished: Run) -> None:
        history = json.loads((finished.folder / "history/distilled.json").read_text())
        assert any({"loss", "loss/soft", "loss/hard"} <= set(entry) for entry in history)
        assert any({"eval_loss", "eval_accuracy"} <= set(entry) for entry in history)
        baseline = json.loads((finished.folder / "history/baseline.json").read_text())
        assert not any("loss/soft" in entry for entry in baseline)

    def test_a_finished_run_is_not_done_again(self, finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        before = (finished.folder / "events.jsonl").read_text()
        monkeypatch.setattr(build, "make_splits", lambda *_, **__: pytest.fail("the data were read again"))
        again = Run(recipe(), finished.folder.path, bars=False)
        assert again.execute() == finished.metrics()
        assert (finished.folder / "events.jsonl").read_text() == before

    def test_another_recipe_is_refused(self, finished: Run) -> None:
        with pytest.raises(RunError, match=r"another recipe \(they differ in train\.epochs\)"):
            Run(recipe(train__epochs=3), finished.folder.path, bars=False).execute()

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("")
        with pytest.raises(RunError, match="is a file; choose --output"):
            Run(recipe(), tmp_path / "x").execute()

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("")
        with pytest.raises(RunError, match=r"cannot be made: .*; choose --output"):
            Run(recipe(), tmp_path / "x/run").execute()

    def test_a_second_process_is_refused(self, tmp_path: Path) -> None:
        with RunFolder(tmp_path).locked(), pytest.raises(RunError, match="in use by process"):
            Run(recipe(), tmp_path, bars=False).execute()


class TestBuild:
    def test_a_recipe_becomes_its_run(self, finished: Run, tmp_path: Path) -> None:
        run = finished.recipe.build(finished.folder.path, bars=False)
        assert isinstance(run, Run)
        assert run.execute() == finished.metrics()
        assert recipe().build(tmp_path / "x", cache=Cache(tmp_path)).cache.root == tmp_path

    def test_the_same_recipe_has_the_same_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        first, second, other = (asked.build().folder.path for asked in (recipe(), recipe(), recipe(seed=4)))
        assert first == second != other
        assert first.parent == Path("runs")
        assert first.name.startswith("tiny-")
        assert not first.exists()


class TestEvaluate:
    def test_the_test_split_again(self, finished: Run) -> None:
        before = {path: path.stat().st_mtime_ns for path in finished.folder.path.rglob("*")}
        assert open_run(finished.folder.path).evaluate() == finished.metrics()
        assert {path: path.stat().st_mtime_ns for path in finished.folder.path.rglob("*")} == before

    def test_other_splits(self, finished: Run) -> None:
        run = open_run(finished.folder.path)
        for split, table in (("train", run.splits.train), ("validation", run.splits.validation)):
            found = run.evaluate(split)
            assert (found.split, found.samples) == (split, len(table))
            assert found.models["distilled"].agreement is not None

    def test_no_such_split(self, finished: Run, tmp_path: Path, shared_cache: Cache) -> None:
        with pytest.raises(RunError, match="there is no split 'valid'; did you mean 'validation'"):
            open_run(finished.folder.path).evaluate("valid")
        run = execute(recipe(data__validation=0), tmp_path / "x", shared_cache)
        with pytest.raises(RunError, match="there is no split 'validation'; known: test, train"):
            open_run(run.folder.path).evaluate("validation")

    def test_no_run_and_no_finished_run(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="expected the folder of a run"):
            open_run(tmp_path)
        run = Run(recipe(), tmp_path)
        run.folder.claim(run.tree)
        with pytest.raises(RunError, match="is not finished; `potstill distill` goes on with it"):
            open_run(tmp_path)


def table(folder: Path, name: str, count: int, *, labels: bool = True, seed: int = 0) -> None:
    """A small CSV table with three classes that its two columns tell apart."""
    draw = np.random.default_rng(seed)
    kinds = draw.integers(0, 3, count)
    points = draw.normal(size=(count, 2)) + 3 * np.stack([kinds == 1, kinds == 2], 1)
    header = "x,y,label" if labels else "x,y"
    lines = [f"{a:.4f},{b:.4f}" + (f",{'abc'[k]}" if labels else "") for (a, b), k in zip(points, kinds, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.csv").write_text("\n".join([header, *lines]) + "\n")


class TestData:
    def test_paths_are_kept_absolute(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_cache: Cache
    ) -> None:
        """A relative path in the resolved recipe would mean another folder, or none, elsewhere."""
        table(tmp_path / "here/rows", "train", 60)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        run = execute(recipe(data={"source": "files", "path": "rows"}), tmp_path / "run", shared_cache)
        assert load_recipe(run.folder / "recipe.resolved.yaml").data.path == str(tmp_path / "here/rows")
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert open_run(run.folder.path).evaluate() == run.metrics()

    def test_without_a_validation_split(self, tmp_path: Path, shared_cache: Cache) -> None:
        run = execute(recipe(data__validation=0), tmp_path / "x", shared_cache)
        assert run.splits.validation is None
        history = json.loads((run.folder / "history/distilled.json").read_text())
        assert not any(key.startswith("eval_") for entry in history for key in entry)
        assert run.metrics().samples == 30

    def test_without_a_test_split_nothing_is_trained(self, tmp_path: Path) -> None:
        """Found only after hours of training, there would be nothing to judge on."""
        with pytest.raises(DataError, match=r"no test split to judge the models on.*test: 0\.2"):
            execute(recipe(data__test=0), tmp_path / "x")
        assert not (tmp_path / "x/models").exists()
        with pytest.raises(DataError, match="no test split"):
            list(dry_run(recipe(data__test=0)))


class TestTransferSet:
    """Rows without labels to learn from: what needs labels is refused, what does not works."""

    @pytest.fixture
    def rows(self, tmp_path: Path) -> Path:
        table(tmp_path / "rows", "train", 60, labels=False)
        table(tmp_path / "rows", "test", 30, seed=1)
        return tmp_path / "rows"

    def unlabelled(self, rows: Path, **changes: Any) -> Recipe:
        """The data with a saved teacher, and a student that is told its number of classes."""
        torch.manual_seed(0)
        card = {"model": "potstill:mlp", "kwargs": {"in_features": 2, "num_labels": 3}, "settings": {}}
        save_model(Mlp(2, 3), rows.parent / "teacher", card)
        return recipe(
            data={"source": "files", "path": str(rows)},
            teacher={"model": str(rows.parent / "teacher")},
            **{"student__kwargs__num_labels": 3, **changes},
        )

    def test_hard_terms_are_refused_by_name(self, rows: Path, tmp_path: Path) -> None:
        asked = self.unlabelled(rows, objective__other={"loss": "cross_entropy", "weight": 0.1})
        message = r"no labels \(no column 'label'\), and these terms of the objective need them: hard, other"
        with pytest.raises(TrainingError, match=message):
            execute(asked, tmp_path / "x")
        with pytest.raises(TrainingError, match=message):
            list(dry_run(asked))

    def test_soft_terms_do_without_and_there_is_no_baseline(self, rows: Path, tmp_path: Path) -> None:
        run = execute(self.unlabelled(rows, objective__hard=None), tmp_path / "x")
        metrics = run.metrics()
        assert set(metrics.models) == {"teacher", "distilled"}
        assert metrics.gain is None
        assert "no baseline: the training split has no labels to train one on" in metrics.notes
        assert metrics.models["distilled"].metrics["accuracy"].value >= 0
        assert not torch.equal(weights(run, "distilled"), flat(run.student()))

    def test_a_teacher_cannot_be_trained_without_labels(self, rows: Path, tmp_path: Path) -> None:
        asked = self.unlabelled(rows, objective__hard=None)
        asked = asked.model_copy(update={"teacher": recipe(teacher__kwargs__num_labels=3).teacher})
        with pytest.raises(TrainingError, match="no labels to train the teacher 'teacher' on"):
            execute(asked, tmp_path / "x")


class TestBaseline:
    def test_it_can_be_left_out(self, tmp_path: Path, shared_cache: Cache) -> None:
        run = execute(recipe(baseline={"enabled": False}), tmp_path / "x", shared_cache)
        assert set(run.metrics().models) == {"teacher", "distilled"}
        assert run.metrics().gain is None
        assert ("begin", "baseline") not in events(run)

    def test_it_starts_as_the_distilled_student_and_differs_only_by_the_teacher(
        self, finished: Run, tmp_path: Path, shared_cache: Cache
    ) -> None:
        """An objective of the hard term alone makes the distilled student the baseline, to the bit."""
        hard = {"hard": {"loss": "cross_entropy"}}
        run = execute(recipe(objective=hard), tmp_path / "x", shared_cache)
        assert torch.equal(weights(run, "distilled"), weights(run, "baseline"))
        assert torch.equal(weights(run, "baseline"), weights(finished, "baseline"))
        assert not torch.equal(weights(finished, "distilled"), weights(finished, "baseline"))

    def test_settings_of_its_own_change_it_alone_and_are_told(
        self, finished: Run, tmp_path: Path, shared_cache: Cache
    ) -> None:
        run = execute(recipe(baseline={"train": {"epochs": 1}}), tmp_path / "x", shared_cache)
        assert torch.equal(weights(run, "distilled"), weights(finished, "distilled"))
        assert not torch.equal(weights(run, "baseline"), weights(finished, "baseline"))
        alone = execute(recipe(train__epochs=1), tmp_path / "y", shared_cache)
        assert torch.equal(weights(run, "baseline"), weights(alone, "baseline"))
        note = "the baseline is trained by settings of its own: epochs 1.0 (the student: 2.0)"
        assert note in run.metrics().notes
        assert not any("settings of its own" in note for note in alone.metrics().notes)

    def test_the_resolved_recipe_holds_only_its_changes(self) -> None:
        made = recipe(baseline={"train": {"epochs": 1}}, train__max_grad_norm=0.0)
        assert made.model_dump(mode="json")["baseline"] == {"enabled": True, "train": {"epochs": 1.0}}
        assert recipe_from(made.model_dump(mode="json")) == made
        assert made.baseline_train == made.train.model_copy(update={"epochs": 1.0})

    def test_no_teacher_at_all(self, tmp_path: Path) -> None:
        run = execute(recipe(teacher=None, objective={"hard": {"loss": "cross_entropy"}}), tmp_path / "x")
        assert set(run.metrics().models) == {"baseline", "distilled"}
        assert run.metrics().retention is None


class TestReport:
    def test_it_is_written_again_when_it_was_lost(self, tmp_path: Path, shared_cache: Cache) -> None:
        """With its plots, in the same bytes; nothing else is done again."""
        run = execute(recipe(), tmp_path / "x", shared_cache)
        before = (run.folder / "metrics.json").stat().st_mtime_ns
        (run.folder / "steps/report.json").unlink()
        with drawn():
            execute(recipe(), tmp_path / "x", shared_cache)
        page = (run.folder / "report.html").read_text(encoding="utf-8")
        assert page.count("<svg") >= 5
        assert (run.folder / "metrics.json").stat().st_mtime_ns == before


class TestPreflight:
    def test_what_is_ignored_changes_nothing_of_the_folder(self, tmp_path: Path, shared_cache: Cache) -> None:
        """One who follows the message and ignores a check goes on with what is trained already."""
        first = execute(recipe(), tmp_path / "x", shared_cache)
        again = Run(recipe(preflight={"ignore": ["duplicates"]}), tmp_path / "x", bars=False, cache=shared_cache)
        assert again.execute() == first.metrics()
        assert load_recipe(tmp_path / "x/recipe.resolved.yaml").preflight.ignore == ["duplicates"]
        assert steps.default_output(again.recipe) == steps.default_output(first.recipe)

    def test_a_folder_is_given_back_when_nothing_was_done(self, tmp_path: Path, shared_cache: Cache) -> None:
        wrong = recipe(objective__soft={"loss": f"{__name__}:overflowing"})
        with pytest.raises(PreflightError, match="saturation"):
            Run(wrong, tmp_path / "x", bars=False, cache=shared_cache).execute()
        assert execute(recipe(), tmp_path / "x", shared_cache).folder.is_done("report")

    def test_a_teacher_that_knows_nothing(
        self, tmp_path: Path, shared_cache: Cache, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A warning from Python, which is in the notes; a refusal where it is strict, until it is ignored."""
        teacher = {"model": f"{__name__}:guess", "train": {"epochs": 1, "learning_rate": 1e-9}}
        blind = recipe(teacher=teacher, data__path="load_breast_cancer")
        with pytest.raises(PreflightError, match=r"error \[teacher-above-chance\]"):
            Run(blind, tmp_path / "x", bars=False, cache=shared_cache, strict=True).execute()
        caplog.clear()
        run = execute(blind, tmp_path / "y", shared_cache)
        assert sum("[teacher-above-chance]" in note for note in run.metrics().notes) == 1
        assert sum("[teacher-above-chance]" in record.getMessage() for record in caplog.records) == 1
        ignored = recipe_from({**blind.model_dump(), "preflight": {"ignore": ["teacher-above-chance"]}})
        run = Run(ignored, tmp_path / "x", bars=False, cache=shared_cache, strict=True)
        assert not any("above-chance" in note for note in run.execute().notes)


class TestViews:
    """``augment`` of a ``train:`` section: what one model sees in place of ``data.augment``."""

    def test_each_model_has_its_own(self, finished: Run, tmp_path: Path, shared_cache: Cache) -> None:
        noise = [{"noise": {"std": 0.5}}]
        run = execute(recipe(teacher__train__augment=noise), tmp_path / "x", shared_cache)
        assert not torch.equal(weights(run, "teacher"), weights(finished, "teacher"))
        assert torch.equal(weights(run, "baseline"), weights(finished, "baseline"))

    def test_none_in_place_of_those_of_the_data(self, finished: Run, tmp_path: Path, shared_cache: Cache) -> None:
        changes = {"data__augment": [{"noise": {"std": 0.5}}], "train__augment": []}
        run = execute(recipe(**changes), tmp_path / "x", shared_cache)
        assert torch.equal(weights(run, "baseline"), weights(finished, "baseline"))
        own = execute(recipe(**changes, baseline={"train": {"augment": ["noise"]}}), tmp_path / "y", shared_cache)
        assert not torch.equal(weights(own, "baseline"), weights(finished, "baseline"))
        assert torch.equal(weights(own, "distilled"), weights(run, "distilled"))


class TestCache:
    def test_a_second_run_takes_the_teacher(self, finished: Run, tmp_path: Path, shared_cache: Cache) -> None:
        run = execute(recipe(train__epochs=1), tmp_path / "x", shared_cache)
        assert ("reused", "teacher") in events(run)
        assert ("training", "teacher") not in events(run)
        assert torch.equal(weights(run, "teacher"), weights(finished, "teacher"))
        assert not (run.model_folder("teacher") / ".used").exists()

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"seed": 4}, "another start and order"),
            ({"data__seed": 43}, "other rows to learn from"),
            ({"data__limit": {"train": 64}}, "fewer rows"),
            ({"data__limit": {"validation": 8}}, "other rows to choose the best weights by"),
            ({"data__augment": [{"noise": {"std": 0.1}}]}, "other views"),
            ({"teacher__train__epochs": 3}, "longer"),
            ({"teacher__train__batch_size": 16}, "other batches"),
            ({"teacher__kwargs__hidden": [9]}, "another model"),
            ({"task__features": ["petal length (cm)"]}, "other columns"),
        ],
    )
    def test_not_where_it_would_be_another_one(
        self, finished: Run, tmp_path: Path, shared_cache: Cache, changes: dict[str, Any], why: str
    ) -> None:
        """A teacher of other data or settings would teach, and be reported, as if it were the one asked for."""
        run = Run(recipe(**changes), tmp_path, bars=False, cache=shared_cache)
        known = teacher_key(finished, "teacher")
        assert shared_cache.find("teachers", known) is not None
        assert teacher_key(run, "teacher") != known, why
        assert shared_cache.find("teachers", teacher_key(run, "teacher")) is None

    def test_what_does_not_change_the_teacher_does_not_change_the_key(self, finished: Run, tmp_path: Path) -> None:
        changes = {"train__epochs": 9, "student__kwargs__hidden": [7], "name": "other", "objective__soft__weight": 0.1}
        assert teacher_key(Run(recipe(**changes), tmp_path), "teacher") == teacher_key(finished, "teacher")

    def test_weights_count_by_their_content(self, tmp_path: Path) -> None:
        """Fine-tuned from a file that was replaced, under its old name, the cached teacher is an old one."""
        keys = []
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            save_model(Mlp(4, 3, [8]), tmp_path / "w", {"model": "potstill:mlp", "kwargs": {}})
            file = tmp_path / "w/model.safetensors"
            keys.append(teacher_key(Run(recipe(teacher__weights=str(file)), tmp_path / "x"), "teacher"))
        assert keys[0] == keys[2] != keys[1]

    def test_a_teacher_that_is_not_trained_is_not_stored(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path / "cache")
        run = execute(recipe(teacher__train=None), tmp_path / "x", cache)
        assert [entry for entry in cache.entries() if entry.kind == "teachers"] == []
        (note,) = [note for note in run.metrics().notes if "teacher" in note]
        assert "neither trained nor given weights" in note
        assert any("random weights" in line for line in dry_run(recipe(teacher__train=None)))

    def test_a_saved_teacher_with_other_labels_is_refused(self, finished: Run, tmp_path: Path) -> None:
        """With the classes in another order, every answer of the teacher would be taken for another class."""
        shutil.copytree(finished.model_folder("teacher"), tmp_path / "teacher")
        card = json.loads((tmp_path / "teacher/potstill.json").read_text())
        asked = recipe(teacher={"model": str(tmp_path / "teacher")})
        assert torch.equal(weights(execute(asked, tmp_path / "x"), "teacher"), weights(finished, "teacher"))
        card["settings"]["label_names"].reverse()
        (tmp_path / "teacher/potstill.json").write_text(json.dumps(card))
        with pytest.raises(TaskError, match="expected the teacher 'teacher' to have the labels"):
            execute(asked, tmp_path / "y")


TEACHERS = {
    "a": {"model": "potstill:mlp", "kwargs": {"hidden": [8]}, "train": {"epochs": 2, "batch_size": 32}},
    "ab": {"model": "potstill:mlp", "kwargs": {"hidden": [6]}, "train": {"epochs": 1, "batch_size": 32}},
}


class TestSeveralTeachers:
    def test_one_with_other_outputs_may_teach_by_its_features(self, tmp_path: Path, shared_cache: Cache) -> None:
        """It is loaded, asked and timed; its answers are not compared with the classes."""
        wide = {"model": f"{__name__}:seven", "kwargs": {}}
        hint = {"loss": "mse", "student": "body.1", "teacher": "wide/0", "project": "linear"}
        soft = {**TREE["objective"]["soft"], "teacher": "main/logits"}
        tree = {**TREE, "teachers": {"main": TREE["teacher"], "wide": wide}, "objective": {"soft": soft, "hint": hint}}
        del tree["teacher"]
        run = execute(recipe_from(tree), tmp_path / "x", shared_cache)
        assert run.metrics().models["wide"].divergence is None
        assert run.metrics().models["baseline"].divergence is not None
        assert (run.folder / "report.html").is_file()

    def asked(self, **changes: Any) -> Recipe:
        objective = {
            "first": {"loss": "kl", "teacher": "a/logits", "weight": 0.5},
            "second": {"loss": "kl", "teacher": "ab/logits", "weight": 0.5},
            "hint": {"loss": "mse", "student": "body.1", "teacher": "ab/body.1", "project": "linear"},
        }
        return recipe(teacher=None, teachers=TEACHERS, **{"objective": objective, **changes})

    def test_each_is_trained_judged_and_listened_to(self, tmp_path: Path) -> None:
        run = execute(self.asked(), tmp_path / "x")
        metrics = run.metrics()
        roles = [(name, model.role) for name, model in metrics.models.items()]
        assert roles == [("a", "teacher"), ("ab", "teacher"), ("baseline", "baseline"), ("distilled", "student")]
        assert [metrics.models[name].agreement is None for name, _ in roles] == [True, False, False, False]
        accuracy = {name: model.metrics["accuracy"].value for name, model in metrics.models.items()}
        assert metrics.retention == pytest.approx(accuracy["distilled"] / accuracy["a"])
        history = json.loads((run.folder / "history/distilled.json").read_text())
        first = next(entry for entry in history if "loss" in entry)
        assert {"loss/first", "loss/second", "loss/hint"} <= set(first)
        assert first["loss/first"] != first["loss/second"]

    def test_a_dry_run_finds_the_taps_of_each(self) -> None:
        """The teacher `a` must not be asked for what belongs to `ab`."""
        lines = list(dry_run(self.asked()))
        assert [line.split(":")[0] for line in lines[-3:]] == ["objective.first", "objective.second", "objective.hint"]


class TestObjective:
    def test_a_projector_on_module_paths_is_trained(
        self, tmp_path: Path, shared_cache: Cache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A projector that is in no optimizer, or made twice, is a random matrix; the hint then teaches noise."""
        starts, ends = [], []
        original = DistillationTrainer._inner_training_loop

        def watched(self: DistillationTrainer, *args: Any, **kwargs: Any) -> Any:
            starts.append({k: v.clone() for k, v in self.distillation_module.objective.state_dict().items()})
            result = original(self, *args, **kwargs)
            ends.append(self.distillation_module.objective.state_dict())
            return result

        monkeypatch.setattr(DistillationTrainer, "_inner_training_loop", watched)
        hint = {"loss": "mse", "student": "body.1", "teacher": "body.1", "project": "linear"}
        run = execute(recipe(objective__hint=hint, student__kwargs__dropout=0.0), tmp_path / "x", shared_cache)
        assert starts[-1].keys() == {"terms.hint.projector.weight", "terms.hint.projector.bias"}
        assert [tuple(value.shape) for value in starts[-1].values()] == [(8, 4), (8,)]
        for name, value in starts[-1].items():
            assert not torch.equal(ends[-1][name], value), name
        assert not starts[0]  # the baseline has none
        assert set(load_file(run.model_folder("distilled") / "model.safetensors")) == set(run.student().state_dict())

    def test_ramps_change_what_is_learned_and_are_logged(
        self, finished: Run, tmp_path: Path, shared_cache: Cache
    ) -> None:
        changes = {
            "objective__soft__weight": {"from": 0.7, "to": 0.0},
            "objective__soft__temperature": {"from": 4.0, "to": 1.0, "shape": "exponential"},
        }
        run = execute(recipe(**changes), tmp_path / "x", shared_cache)
        lines = [e for e in json.loads((run.folder / "history/distilled.json").read_text()) if "loss" in e]
        steps_done = [line["step"] / lines[-1]["step"] for line in lines]
        assert [line["weight/soft"] for line in lines] == pytest.approx([0.7 * (1 - done) for done in steps_done])
        assert [line["temperature/soft"] for line in lines] == pytest.approx([4 * 0.25**done for done in steps_done])
        assert torch.equal(weights(run, "baseline"), weights(finished, "baseline"))
        assert not torch.equal(weights(run, "distilled"), weights(finished, "distilled"))

    def test_a_ramp_from_0_is_tried_out_by_the_dry_run(self) -> None:
        """While its weight is 0 a term is not computed: a wrong one would stop the training in its middle."""
        wrong = {"loss": "mse", "student": "body.1", "teacher": "body.1", "weight": {"from": 0.0, "to": 1.0}}
        with pytest.raises(ObjectiveError, match="`project: linear` maps one to the other"):
            list(dry_run(recipe(objective__late=wrong)))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"train__eval_strategy": "epoch", "data__validation": 0}, "eval_strategy: epoch needs a validation split"),
            ({"train__callbacks": ["early_stopping"], "data__validation": 0}, "early_stopping needs a validation"),
            ({"train__callbacks": ["best_checkpoint"], "train__save_steps": 0.07}, "multiple of the evaluation steps"),
            ({"teacher__train__dropout": 0.5}, "train.dropout is 0.5 and Mlp has no dropout layer"),
            ({"teacher__train__adam_beta1": 0.5}, "adam_beta1 has no effect"),
        ],
    )
    def test_the_dry_run_finds_what_no_training_can_do(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(TrainingError, match=message):
            list(dry_run(recipe(**changes)))

    def test_a_loss_of_ones_own(self, tmp_path: Path, shared_cache: Cache) -> None:
        """By its dotted path, without any registration."""
        own = recipe(objective__soft__loss="potstill.losses.divergence:kl")
        run = execute(own, tmp_path / "x", shared_cache)
        named = execute(recipe(), tmp_path / "y", shared_cache)
        assert kl.__module__ == "potstill.losses.divergence"
        assert torch.equal(weights(run, "distilled"), weights(named, "distilled"))


class Killed(BaseException):
    """What stands for a kill: nothing catches it."""


def at(owner: Any, name: str, *, turn: int = 1, after: bool = False) -> Callable[[pytest.MonkeyPatch], None]:
    """End the process at the ``turn``-th call of a function, before it does its work or after."""

    def install(patch: pytest.MonkeyPatch) -> None:
        original, seen = getattr(owner, name), []

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == turn and not after:
                raise Killed
            result = original(*args, **kwargs)
            if len(seen) == turn:
                raise Killed
            return result

        patch.setattr(owner, name, watched)

    return install


POINTS = {
    "after the folder was claimed": at(Run, "_step"),
    "in the middle of the teacher's training": at(DistillationTrainer, "training_step", turn=4),
    "while a checkpoint is written": at(Trainer, "_save_optimizer_and_scheduler", turn=3),
    "before a checkpoint is marked": at(engine, "mark_complete", turn=3),
    "between the teacher's last checkpoint and its model": at(Run, "save"),
    "while the teacher's folder is written": at(steps, "save_model", after=True),
    "while the teacher is put into the cache": at(Cache, "store"),
    "between the preflight and its marker": at(RunFolder, "mark_done"),
    "between the teacher's model and its marker": at(RunFolder, "mark_done", turn=2),
    "between the teacher's marker and its clean-up": at(RunFolder, "clear", turn=2),
    "in the middle of the baseline's training": at(DistillationTrainer, "training_step", turn=10),
    "in the middle of the distilled student's training": at(DistillationTrainer, "training_step", turn=16),
    "between the last step and the distilled student's model": at(Run, "save", turn=3),
    "while the distilled student's folder is written": at(steps, "save_model", turn=3),
    "before any model has answered": at(judging, "predict"),
    "before the figures are written": at(judging, "examples"),
    "while the report is written": at(html, "write_text"),
    "while predictions are written": at(Predictions, "save", turn=2),
    "between the predictions and the metrics": at(Predictions, "save", turn=3, after=True),
    "between the metrics and their marker": at(RunFolder, "mark_done", turn=6),
    "between the report and the last marker": at(RunFolder, "mark_done", turn=7),
}


class TestKilled:
    """Three models, early stopping, a projector, dropout, augmentation, and a training that ends within an epoch."""

    def asked(self, metric: str = "loss") -> Recipe:
        """By ``loss`` the best weights are the last, by ``accuracy`` earlier ones."""
        hint = {"loss": "mse", "student": "body.1", "teacher": "body.1", "project": "linear"}
        own = {
            "callbacks": [{"early_stopping": {"metric": metric, "patience": 50}}],
            "save_steps": 1,
            "eval_steps": 1,
            "epochs": 1.5,
        }
        return recipe(
            objective__hint=hint,
            data__augment=[{"noise": {"std": 0.1}}],
            train={**TREE["train"], **own},
            teacher__train={"epochs": 1.5, "batch_size": 32, "save_steps": 1, "eval_steps": 1, "scheduler": "constant"},
        )

    @pytest.fixture(scope="class")
    def alone(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        return results(execute(self.asked(), tmp_path_factory.mktemp("alone") / "run"))

    def assert_no_step_twice(self, run: Run) -> None:
        done: set[str] = set()
        for kind, step in events(run, "begin", "done"):
            assert step not in done, f"{kind} of {step} after it was done"
            done |= {step} if kind == "done" else set()

    @pytest.mark.parametrize("point", POINTS)
    def test_it_goes_on_to_the_same_bits(
        self, tmp_path: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch, point: str
    ) -> None:
        cache = Cache(tmp_path / "cache")
        with monkeypatch.context() as patch:
            POINTS[point](patch)
            with pytest.raises(Killed):
                execute(self.asked(), tmp_path / "run", cache)
        died_with = set((tmp_path / "run/steps").glob("*.json"))
        times = {path: path.stat().st_mtime_ns for path in died_with}
        run = execute(self.asked(), tmp_path / "run", cache)
        assert_equal(results(run), alone)
        self.assert_no_step_twice(run)
        assert {path: path.stat().st_mtime_ns for path in died_with} == times
        assert not list((run.folder / "checkpoints").glob("*"))
        assert not list(run.folder.path.rglob("*.tmp"))

    def test_it_goes_on_from_the_last_checkpoint_and_not_from_the_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            at(DistillationTrainer, "training_step", turn=4)(patch)
            with pytest.raises(Killed):
                execute(self.asked(), tmp_path / "run")
        trained: list[int] = []
        original = DistillationTrainer.training_step

        def counted(self: DistillationTrainer, *args: Any, **kwargs: Any) -> Any:
            trained.append(self.state.global_step)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(DistillationTrainer, "training_step", counted)
        run = execute(self.asked(), tmp_path / "run")
        training = [event for event in run.folder.events() if event["event"] == "training"]
        assert [event["resumed_from"] for event in training] == [None, "checkpoint-3", None, None]
        assert trained[0] == 3

    @pytest.mark.parametrize("how", ["no marker", "cut off", "missing file"])
    def test_a_checkpoint_that_is_not_whole_is_passed_over(
        self, tmp_path: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        with monkeypatch.context() as patch:
            at(DistillationTrainer, "training_step", turn=16)(patch)
            with pytest.raises(Killed):
                execute(self.asked(), tmp_path / "run")
        kept = sorted((tmp_path / "run/checkpoints/distilled").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
        newest = kept[-1]
        damaged = newest.with_name(f"checkpoint-{int(newest.name[11:]) + 1}")
        shutil.copytree(newest, damaged)
        if how == "no marker":
            (damaged / MARKER).unlink()
        elif how == "missing file":
            (damaged / "objective.safetensors").unlink()
        else:
            content = (damaged / "optimizer.pt").read_bytes()
            (damaged / "optimizer.pt").write_bytes(content[:-10])
        run = execute(self.asked(), tmp_path / "run")
        training = [event for event in run.folder.events() if event["event"] == "training"]
        assert training[-1]["resumed_from"] == newest.name
        assert_equal(results(run), alone)

    def test_while_the_teacher_is_copied_from_the_cache(
        self, tmp_path: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = Cache(tmp_path / "cache")
        execute(self.asked(), tmp_path / "first", cache)
        with monkeypatch.context() as patch:
            at(shutil, "copytree", after=True)(patch)
            with pytest.raises(Killed):
                execute(self.asked(), tmp_path / "run", cache)
        run = execute(self.asked(), tmp_path / "run", cache)
        assert ("reused", "teacher") in events(run)
        assert_equal(results(run), alone)
        assert not list(run.folder.path.rglob("*.tmp"))

    def test_while_the_folder_is_claimed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the figures depend on is written once; a claim without it would never get it."""
        with monkeypatch.context() as patch:
            at(folder, "write_text", turn=2, after=True)(patch)
            with pytest.raises(Killed):
                execute(recipe(), tmp_path / "run")
        run = execute(recipe(), tmp_path / "run")
        assert (run.folder / "environment.json").exists()

    def test_killed_again_and_again(
        self, tmp_path: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every few optimizer steps, until there is nothing left to do."""
        cache, deaths = Cache(tmp_path / "cache"), 0
        while not (tmp_path / "run/steps/evaluate.json").exists():
            with monkeypatch.context() as patch:
                at(DistillationTrainer, "training_step", turn=4)(patch)
                try:
                    execute(self.asked(), tmp_path / "run", cache)
                except Killed:
                    deaths += 1
            assert deaths < 20
        assert deaths >= 4
        assert_equal(results(Run(self.asked(), tmp_path / "run")), alone)

    def test_from_another_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Trainer notes where the best checkpoint lies; a relative note would be lost, and the last weights kept."""
        alone = execute(self.asked("accuracy"), tmp_path / "alone")
        history = json.loads((alone.folder / "history/distilled.json").read_text())
        scores = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
        assert scores.index(max(scores)) < len(scores) - 1
        (tmp_path / "a/b").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "a")
        cache = Cache(tmp_path / "cache")
        with monkeypatch.context() as patch:
            at(Run, "save", turn=3)(patch)
            with pytest.raises(Killed):
                Run(self.asked("accuracy"), "run", bars=False, cache=cache).execute()
        monkeypatch.chdir(tmp_path / "a/b")
        run = Run(self.asked("accuracy"), "../run", bars=False, cache=cache)
        run.execute()
        assert_equal(results(run), results(alone))


def test_a_factory_of_ones_own_gives_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits from Python reach every step as those of a file would."""
    iris = build.make_splits(recipe())
    assert isinstance(iris, Splits)
    assert isinstance(iris.train, Dataset)
    (tmp_path / "my_rows_for_a_run.py").write_text(
        "def rows(count=60):\n"
        "    return {'x': [float(i % 7) for i in range(count)], 'label': [i % 3 for i in range(count)]}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    asked = recipe(data={"source": "my_rows_for_a_run:rows", "kwargs": {"count": 45}})
    run = execute(asked, tmp_path / "x")
    assert run.metrics().samples == 9
    assert open_run(run.folder.path).evaluate() == run.metrics()


@pytest.mark.slow
def test_real_kills(tmp_path: Path) -> None:
    """SIGKILL at three random moments, as the benchmark does it thirty times."""
    command = [sys.executable, str(ROOT / "benchmarks/kill_resume.py"), "--kills", "3", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 kills: same weights, same metrics, no step done twice" in done.stdout
