"""Runs whose teacher is a classifier of scikit-learn, on the labelled rows or on rows that MUNGE makes of them."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.ensemble import RandomForestClassifier
from transformers import TrainingArguments

from potstill.data.batching import InMemory
from potstill.errors import ModelError, PreflightError, RecipeError, TrainingError
from potstill.interfaces import Batch, Signals
from potstill.losses.objective import Term
from potstill.models import sklearn_models
from potstill.models.plain import Mlp
from potstill.models.sklearn_models import SklearnModel, SklearnTeacher
from potstill.recipe.load import recipe_from
from potstill.recipe.schema import Recipe
from potstill.runs.cache import Cache
from potstill.runs.filling import forecast
from potstill.runs.forecast import Trial
from potstill.runs.plan import Plan
from potstill.runs.steps import Run, open_run
from potstill.teachers.live import Live
from potstill.training.trainer import DistillationTrainer, ready_batch
from tests.runs.tried import dry_run, found
from tests.training.tiny import flat


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a process of its own: nothing that another fitted is there."""
    monkeypatch.setattr(sklearn_models, "_FITTED", type(sklearn_models._FITTED)())


TREE: dict[str, Any] = {
    "name": "forest",
    "seed": 3,
    "task": {"name": "tabular-classification"},
    "data": {"source": "sklearn", "path": "load_wine", "validation": 0.1, "test": 0.3},
    "teacher": {"model": "sklearn:RandomForestClassifier", "kwargs": {"n_estimators": 9}},
    "student": {"model": "potstill:mlp", "kwargs": {"hidden": [8]}},
    "objective": {"soft": {"loss": "kl", "weight": 1.0, "temperature": 2.0}},
    "train": {"epochs": 3, "batch_size": 16, "learning_rate": 0.01, "save_strategy": "no"},
    "evaluate": {"resamples": 100, "latency": False},
}
MUNGED = {**TREE["data"], "synthesize": {"munge": {"size": 2}}}


def recipe(**changes: Any) -> Recipe:
    return recipe_from({**copy.deepcopy(TREE), **changes})


def execute(asked: Recipe, folder: Path) -> Run:
    run = Run(asked, folder, bars=False, cache=Cache(folder.parent / "cache"))
    run.execute()
    return run


def steps(run: Run, name: str) -> int:
    """How many steps a model was trained for, as its history has it."""
    history = json.loads((run.folder / f"history/{name}.json").read_text())
    return max(int(line["step"]) for line in history)


class TestFittedTeacher:
    def test_a_run_with_it_has_all_that_a_run_has(self, tmp_path: Path) -> None:
        run = execute(recipe(evaluate={"resamples": 100}), tmp_path / "run")
        metrics = run.metrics()
        teacher = metrics.models["teacher"]
        assert list(metrics.models) == ["teacher", "baseline", "distilled"]
        assert teacher.metrics["accuracy"].value > 0.9
        assert (teacher.parameters, teacher.agreement) == (0, None)
        assert teacher.bytes > 5000
        assert teacher.latency_ms["1"] > 0
        assert metrics.models["distilled"].agreement is not None
        assert metrics.models["distilled"].divergence is not None
        assert metrics.retention is not None
        assert run.folder.is_done("report")
        events = [(each["event"], each.get("rows")) for each in run.folder.events() if each.get("step") == "teacher"]
        assert events == [("begin", None), ("fitted", len(run.splits.train)), ("done", None)]
        assert not [note for note in metrics.notes if "preflight" in note or "noise" in note]

    def test_it_is_fitted_to_what_the_task_makes_of_the_training_split_alone(self, tmp_path: Path) -> None:
        run = execute(recipe(), tmp_path / "run")
        data = run.task.dataset(run.splits.train, training=False, seed=0)
        options = json.loads((run.model_folder("teacher") / "sklearn.json").read_text())
        forest = RandomForestClassifier(9, random_state=options["random_state"])
        forest.fit(data.columns["features"].double().numpy(), data.columns["labels"].numpy())
        test = run.task.dataset(run.splits.test, training=False, seed=0).columns["features"]
        expected = torch.tensor(forest.predict_proba(test.double().numpy())).clip(1e-7).log()
        torch.testing.assert_close(run.load("teacher")(test), expected.float())

    def test_a_run_that_goes_on_in_another_process_comes_to_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = execute(recipe(), tmp_path / "whole")
        halfway = Run(recipe(), tmp_path / "two", bars=False, cache=Cache(tmp_path / "other cache"))
        halfway.prepare_teachers()
        monkeypatch.setattr(sklearn_models, "_FITTED", type(sklearn_models._FITTED)())
        later = execute(recipe(), tmp_path / "two")
        assert torch.equal(flat(later.load("distilled")), flat(whole.load("distilled")))
        assert later.metrics() == whole.metrics()
        assert open_run(tmp_path / "two").evaluate() == whole.metrics()

    def test_another_fit_under_its_name_is_refused(self, tmp_path: Path) -> None:
        halfway = Run(recipe(), tmp_path / "run", bars=False, cache=Cache(tmp_path / "cache"))
        halfway.prepare_teachers()
        file = halfway.model_folder("teacher") / "model.safetensors"
        state = load_file(file)
        save_file({**state, "labels": (state["labels"] + 1) % 3}, file)
        sklearn_models._FITTED.clear()
        with pytest.raises(ModelError, match="answers otherwise than it did"):
            execute(recipe(), tmp_path / "run")

    def test_its_answers_are_cached_under_what_was_fitted(self, tmp_path: Path) -> None:
        """The seeds of the students share the answers, and another forest has its own."""
        teacher = {**TREE["teacher"], "seed": 0, "cache": True}
        runs = [
            execute(recipe(seed=seed, teacher=each, baseline={"enabled": False}), tmp_path / str(place))
            for place, (seed, each) in enumerate([(1, teacher), (2, teacher), (2, {**teacher, "seed": 1})])
        ]
        counts = [[(e["found"], e["made"]) for e in run.folder.events() if e["event"] == "cache"] for run in runs]
        rows = len(runs[0].splits.train)
        assert counts == [[(2 * rows, rows)], [(3 * rows, 0)], [(2 * rows, rows)]]

    def test_several_of_them(self, tmp_path: Path) -> None:
        teachers = {"forest": TREE["teacher"], "bayes": {"model": "sklearn:GaussianNB"}}
        terms = {
            name: {"loss": "kl", "weight": 0.5, "temperature": 2.0, "teacher": f"{name}/logits"} for name in teachers
        }
        run = execute(recipe(teacher=None, teachers=teachers, objective=terms), tmp_path / "run")
        assert list(run.metrics().models) == ["forest", "bayes", "baseline", "distilled"]

    def test_it_sees_images_as_rows_of_pixels(self, tmp_path: Path) -> None:
        data = {"source": "sklearn", "path": "load_digits", "limit": {"train": 200}, "test": 100, "validation": 0}
        run = execute(recipe(task={"name": "image-classification"}, data=data), tmp_path / "run")
        assert run.metrics().models["teacher"].metrics["accuracy"].value > 0.8

    def test_the_preflight_raises_no_alarm_and_fits_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SklearnModel, "fit", lambda *_: pytest.fail("fitted"))
        assert [finding for finding in found(recipe(data=MUNGED)) if finding.level != "note"] == []
        lines = list(dry_run(recipe(data=MUNGED)))
        assert "teacher: sklearn:RandomForestClassifier, 0 parameters" in lines
        assert any(line.startswith("objective.soft: ") for line in lines)

    def test_one_that_knows_nothing_is_told_of_once_it_is_fitted(self, tmp_path: Path) -> None:
        """What a trained teacher is judged by, a fitted one is judged by as well."""
        constant = {"model": "sklearn:DummyClassifier"}
        with pytest.raises(PreflightError, match="is the same for every sample, so it teaches nothing"):
            execute(recipe(teacher=constant), tmp_path / "constant")
        guessing = {"model": "sklearn:DummyClassifier", "kwargs": {"strategy": "stratified"}}
        run = Run(recipe(teacher=guessing), tmp_path / "guessing", bars=False, strict=True)
        with pytest.raises(PreflightError, match=r"no better than always guessing|in different ways"):
            run.execute()

    def test_what_it_costs_is_measured_on_a_fitted_one(self, tmp_path: Path) -> None:
        plan = Plan(recipe(data=MUNGED))
        trial = Trial(plan)
        assert isinstance(trial.live, Live)
        assert trial.live.model.is_fitted
        rows = len(plan.splits.train)
        assert forecast(plan, "teacher", batches=2).samples == 3 * rows
        assert trial.forecast(budget_s=0.5).steps == 3 * -(-3 * rows // 16)

    @pytest.mark.parametrize(
        ("changes", "path", "message"),
        [
            ({"teacher": {**TREE["teacher"], "train": {"epochs": 1}}}, "teacher.train", "takes no `train`"),
            ({"teacher": {**TREE["teacher"], "compile": True}}, "teacher.compile", "takes no `compile`"),
            ({"teacher": {**TREE["teacher"], "precision": "int8"}}, "teacher.precision", "takes no `precision`"),
            ({"student": {"model": "sklearn:GaussianNB"}}, "student.model", "cannot be a student: it has no gradient"),
            ({"teacher": {"model": "sklearn:RandomForest"}}, "teacher.model", "did you mean 'RandomForestClassifier'?"),
            ({"data": {**MUNGED, "synthesize": "munch"}}, "data.synthesize", "did you mean 'munge'?"),
            ({"data": {**MUNGED, "synthesize": {"munge": {"size": 0}}}}, "data.synthesize.munge.size", "greater than"),
            (
                {"data": {**MUNGED, "synthesize": {"munge": {}, "more": {}}}},
                "data.synthesize",
                "expected what makes rows",
            ),
            (
                {"task": {"name": "image-classification"}, "data": MUNGED},
                "data.synthesize",
                "rows of the kind 'tabular'",
            ),
        ],
    )
    def test_mistakes_of_a_recipe(self, changes: dict[str, Any], path: str, message: str) -> None:
        with pytest.raises(RecipeError) as caught:
            recipe(**changes)
        assert any(".".join(map(str, each.path)) == path and message in str(each) for each in caught.value.problems)

    def test_the_resolved_recipe_is_the_same_one(self, tmp_path: Path) -> None:
        asked = recipe(data=MUNGED)
        assert recipe_from(asked.model_dump(mode="json")) == asked


class TestTransferSet:
    def test_the_student_learns_from_new_rows_and_the_others_from_the_labelled_ones(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: dict[str, list[Batch]] = {"teacher": [], "student": []}
        answer, learn = Live.__call__, Mlp.forward

        def ask(self: Live, batch: Batch) -> Signals:
            seen["teacher"].append(dict(batch))
            return answer(self, batch)

        def train(self: Mlp, features: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen["student"].append({"features": features})
            return learn(self, features)

        monkeypatch.setattr(Live, "__call__", ask)
        asked = recipe(data=MUNGED, teacher={**TREE["teacher"], "cache": False})
        run = Run(asked, tmp_path / "run", bars=False, cache=Cache(tmp_path / "cache"))
        run.prepare_teachers()
        seen["teacher"].clear()
        monkeypatch.setattr(Mlp, "forward", train)
        metrics = run.execute()
        rows = len(run.splits.train)
        made = run.task.dataset(run.splits.transfer, training=False, seed=0).columns["features"]
        real = run.task.dataset(run.splits.train, training=False, seed=0).columns["features"]
        ids = torch.cat([batch["sample_id"] for batch in seen["teacher"]])
        assert all("labels" not in batch for batch in seen["teacher"])
        assert sorted(ids.tolist()) == sorted(3 * list(range(3 * rows)))  # three epochs of the transfer set
        shown = torch.cat([batch["features"] for batch in seen["student"]])
        assert len(shown) > 9 * rows
        assert torch.equal(shown[-9 * rows :].unique(dim=0), made.unique(dim=0))
        assert torch.equal(shown[: -9 * rows].unique(dim=0), real.unique(dim=0))  # the baseline's
        assert metrics.samples == len(run.splits.test)
        assert json.loads((run.model_folder("teacher") / "sklearn.json").read_text())["rows"] == rows

    @pytest.mark.parametrize(
        ("train", "processes"), [({}, 1), ({"gradient_accumulation_steps": 2}, 1), ({"dataloader_drop_last": True}, 1)]
    )
    def test_the_baseline_takes_as_many_steps(self, train: dict[str, Any], processes: int, tmp_path: Path) -> None:
        run = execute(recipe(data=MUNGED, train={**TREE["train"], **train}), tmp_path / "run")
        assert steps(run, "baseline") == steps(run, "distilled") > 3 * len(run.splits.train) // 16 // 2
        (note,) = [note for note in run.metrics().notes if note.startswith("the baseline")]
        rows = len(run.splits.train)
        assert note == (
            f"the baseline is trained on the {rows} labelled rows for {steps(run, 'distilled')} steps, "
            "as many as the student"
        )

    def test_a_baseline_with_epochs_of_its_own_keeps_them(self, tmp_path: Path) -> None:
        run = execute(recipe(data=MUNGED, baseline={"train": {"epochs": 2}}), tmp_path / "run")
        assert steps(run, "baseline") == 2 * -(-len(run.splits.train) // 16)
        notes = [note for note in run.metrics().notes if note.startswith("the baseline")]
        assert notes[0].endswith("labelled rows")
        assert "epochs 2.0 (the student: 3.0)" in notes[1]

    def test_a_term_on_labels_says_what_is_missing(self, tmp_path: Path) -> None:
        objective = {**TREE["objective"], "hard": {"loss": "cross_entropy"}}
        with pytest.raises(TrainingError, match=r"no labels .*: hard; drop them to distil from a transfer set"):
            execute(recipe(data=MUNGED, objective=objective), tmp_path / "run")

    def test_a_network_teaches_on_it_as_well(self, tmp_path: Path) -> None:
        teacher = {"model": "potstill:mlp", "kwargs": {"hidden": [16]}, "train": {"epochs": 3, "batch_size": 16}}
        plain, munged = (
            execute(recipe(data=data, teacher=teacher), tmp_path / name)
            for name, data in (("plain", TREE["data"]), ("munged", MUNGED))
        )
        assert torch.equal(flat(munged.load("teacher")), flat(plain.load("teacher")))
        assert ("reused", "teacher") in [(e["event"], e.get("step")) for e in munged.folder.events()]
        assert not torch.equal(flat(munged.load("distilled")), flat(plain.load("distilled")))

    def test_random_views_of_the_new_rows_are_answered_as_they_are_shown(self, tmp_path: Path) -> None:
        """With a cache of replayed views: the mixed rows are asked once each, and the student is the same."""
        train = {**TREE["train"], "augment": [{"noise": {"std": 0.1}}, {"mixup": {"alpha": 1.0}}], "views": 1}
        runs = [
            execute(
                recipe(data=MUNGED, train=train, teacher={**TREE["teacher"], "cache": cache}), tmp_path / str(cache)
            )
            for cache in (False, True)
        ]
        rows = 3 * len(runs[0].splits.train)
        (count,) = [e for e in runs[1].folder.events() if e["event"] == "cache"]
        assert (count["made"], count["found"]) == (rows, 2 * rows)
        assert torch.equal(*(flat(run.load("distilled")) for run in runs))


class TestPython:
    def test_a_fitted_estimator_teaches_in_a_trainer(self, tmp_path: Path) -> None:
        draw = torch.Generator().manual_seed(0)
        features = torch.randn(96, 2, generator=draw)
        labels = (features.prod(1) > 0).long()
        forest = RandomForestClassifier(20, random_state=0).fit(features.numpy(), labels.numpy())
        data = InMemory({"features": features, "labels": labels, "sample_id": torch.arange(96)})
        torch.manual_seed(0)
        student = Mlp(2, 2, [32])
        args = TrainingArguments(
            str(tmp_path),
            num_train_epochs=60,
            per_device_train_batch_size=32,
            learning_rate=0.03,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        trainer = DistillationTrainer(
            model=student,
            teacher=SklearnTeacher(forest),
            objective={"soft": Term("kl", temperature=1.0)},
            args=args,
            train_dataset=data,
            data_collator=ready_batch,
        )
        trainer.train()
        agreed = (student.eval()(features).argmax(-1).numpy() == forest.predict(features.numpy())).mean()
        assert agreed > 0.95
