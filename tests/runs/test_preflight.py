"""What `check` finds out on a few samples, before the training and once teachers are trained; transfer sets."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from potstill.checks.findings import Finding
from potstill.cli.check import check
from potstill.errors import PreflightError, RecipeError, TrainingError
from potstill.recipe.load import load_recipe, recipe_from
from potstill.runs.plan import Plan
from potstill.runs.preflight import after_teachers, before_training
from potstill.runs.steps import Run
from tests import local_models
from tests.runs.tried import dry_run, found

TREE: dict[str, Any] = {
    "name": "flowers",
    "task": {"name": "tabular-classification"},
    "data": {"source": "sklearn", "path": "load_iris"},
    "teacher": {"model": "potstill:mlp", "kwargs": {"hidden": [8]}, "train": {"epochs": 1}},
    "student": {"model": "potstill:mlp", "kwargs": {"hidden": [4]}},
    "objective": {"soft": {"loss": "kl"}},
    "train": {"epochs": 1},
    "evaluate": {"resamples": 100, "latency": False},
}


@pytest.mark.parametrize("section", ["teacher", "student"])
def test_a_metric_that_no_evaluation_gives_is_found_before_any_training(section: str) -> None:
    """Else the mistake shows once the teacher is trained, hours later."""
    train = {"epochs": 1, "callbacks": [{"early_stopping": {"metric": "acuracy"}}]}
    change = {"train": train} if section == "student" else {"teacher": {**TREE["teacher"], "train": train}}
    with pytest.raises(TrainingError, match=rf"{section}: .*'acuracy'; did you mean 'accuracy'\?"):
        list(dry_run(recipe_from({**TREE, **change})))


def test_each_term_is_computed_once() -> None:
    lines = list(dry_run(recipe_from(TREE)))
    assert [line for line in lines if line.startswith("objective.")] == [
        next(x for x in lines if "objective.soft" in x)
    ]


def unlabelled(folder: Path) -> Path:
    """A training file without labels beside a labelled test file."""
    rows = [(i % 7, i % 5) for i in range(60)]
    (folder / "train.csv").write_text("a,b\n" + "".join(f"{a},{b}\n" for a, b in rows))
    tested = "".join(f"{a},{b},{'more' if a > b else 'less'}\n" for a, b in rows[:20])
    (folder / "test.csv").write_text("a,b,label\n" + tested)
    return folder


def test_a_transfer_set_takes_its_classes_from_the_test_split(tmp_path: Path) -> None:
    tree = {**TREE, "data": {"source": "files", "path": str(unlabelled(tmp_path))}}
    tree["teacher"] = {"model": "potstill:mlp", "kwargs": {"hidden": [8]}}
    run = Run(recipe_from(tree), tmp_path / "run", bars=False)
    metrics = run.execute()
    assert run.task.label_names == ["less", "more"]
    assert set(metrics.models) == {"teacher", "distilled"}
    assert 0 <= metrics.models["distilled"].metrics["accuracy"].value <= 1


def test_a_transfer_set_takes_its_classes_from_the_recipe_or_a_saved_teacher(tmp_path: Path) -> None:
    taught = Run(recipe_from(TREE), tmp_path / "first", bars=False)
    taught.execute()
    flowers = taught.splits.train.remove_columns(["label", "sample_id"])
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        flowers.to_parquet(str(folder / f"{split}.parquet"))
    tree = {**TREE, "data": {"source": "files", "path": str(folder)}}
    tree["teacher"] = {"model": str(taught.model_folder("teacher"))}
    run = Run(recipe_from(tree), tmp_path / "second", bars=False)
    metrics = run.execute()
    assert run.task.label_names == ["setosa", "versicolor", "virginica"]
    assert metrics.models["distilled"].agreement is not None
    assert not metrics.models["distilled"].metrics


def test_teachers_alike_in_the_recipe_are_not_the_same_model(tmp_path: Path) -> None:
    """With one seed for all, an ensemble of equals would be one teacher counted twice."""
    teacher = TREE["teacher"]
    objective = {"a": {"loss": "kl", "teacher": "a/logits"}, "b": {"loss": "kl", "teacher": "b/logits"}}
    tree = {k: v for k, v in TREE.items() if k != "teacher"}
    run = Run(recipe_from({**tree, "teachers": {"a": teacher, "b": teacher}, "objective": objective}), tmp_path)
    run.execute()
    first, second = (run.load(name).head.weight for name in ("a", "b"))
    assert not first.equal(second)


# ---- what the preflight finds of a recipe -------------------------------------------------------------------------


def grave(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level != "note"]


def test_the_packaged_digits_give_no_alarm(tmp_path: Path) -> None:
    """Neither before the training nor once the teacher is trained; with random views as without."""
    few = ["teacher.train.epochs=12", "train.epochs=1", "evaluate.latency=false", "baseline.enabled=false"]
    recipe = load_recipe("digits", [*few, "data.augment=[shift]"])
    assert grave(found(recipe)) == []
    run = Run(recipe, tmp_path, bars=False)
    run.execute()
    assert grave(after_teachers(run, strict=True)) == []


def test_a_trained_teacher_is_judged_by_check(tmp_path: Path) -> None:
    run = Run(
        recipe_from({**TREE, "teacher": {**TREE["teacher"], "train": {"epochs": 20, "learning_rate": 0.02}}}), tmp_path
    )
    run.execute()
    folder = run.model_folder("teacher")
    saved = {"model": str(folder), "labels": "dataset"}
    assert grave(found(recipe_from({**TREE, "teacher": saved}))) == []
    weights = load_file(folder / "model.safetensors")
    head = sorted(weights)[-2:]
    save_file({**weights, **{name: weights[name][[2, 0, 1]] for name in head}}, folder / "model.safetensors")
    assert "label-map" in {finding.check for finding in found(recipe_from({**TREE, "teacher": saved}))}


def test_what_is_ignored_is_a_note() -> None:
    silent = {**TREE, "preflight": {"ignore": ["duplicates"]}}
    levels = [
        [each.level for each in found(recipe_from(tree)) if each.check == "duplicates"] for tree in (TREE, silent)
    ]
    assert levels in ([[], []], [["note"], ["note"]], [["warning"], ["note"]])
    with pytest.raises(
        RecipeError, match=r"preflight.ignore.*there is no check 'dupli-cates'; did you mean 'duplicates'"
    ):
        recipe_from({**TREE, "preflight": {"ignore": ["dupli-cates"]}})


def telling(folder: Path) -> dict[str, Any]:
    """A table with a column that is the label under another name."""
    draw = random.Random(0)
    for split, count in (("train", 120), ("validation", 30), ("test", 30)):
        rows = [(draw.random(), draw.choice(["less", "more"])) for _ in range(count)]
        (folder / f"{split}.csv").write_text("a,b,label\n" + "".join(f"{a},{b},{b}\n" for a, b in rows))
    return {**TREE, "data": {"source": "files", "path": str(folder)}}


def test_check_refuses_errors_and_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = telling(tmp_path)
    (tmp_path / "mine.yaml").write_text(json.dumps(tree))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(PreflightError, match=r"error \[telling-columns\]: the column 'b' predicts the label alone"):
        check(str(tmp_path / "mine.yaml"), [])
    check(str(tmp_path / "mine.yaml"), ["preflight.ignore=[telling-columns]"])
    assert list(Path().iterdir()) == []


def test_a_column_that_is_no_input_is_a_note(tmp_path: Path) -> None:
    tree = {**telling(tmp_path), "task": {"name": "tabular-classification", "features": ["a"]}}
    assert [(each.check, each.level) for each in found(recipe_from(tree))] == [("telling-columns", "note")]


def texts(folder: Path, **teacher: Any) -> dict[str, Any]:
    """A BERT with a head that teaches a DistilBERT; nothing is trained already."""
    rows = [(f"{text} {other}", label) for text, label in local_models.SENTENCES for other in ("film", "cast", "plot")]
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for split, part in (("train", rows[::2]), ("test", rows[1::2])):
        (data / f"{split}.csv").write_text("text,label\n" + "".join(f"{t},{'good' if y else 'bad'}\n" for t, y in part))
    bert, distilbert = local_models.bert(folder / "bert"), local_models.distilbert(folder / "distilbert")
    return {
        **TREE,
        "task": {"name": "text-classification"},
        "data": {"source": "files", "path": str(data), "validation": 0},
        "teacher": {"model": str(bert), "train": {"epochs": 1}, **teacher},
        "student": {"model": str(distilbert)},
        "objective": {"soft": {"loss": "kl"}, "hint": {"loss": "mse", "student": "hidden.1", "teacher": "hidden.2"}},
    }


def test_texts_give_no_alarm(tmp_path: Path) -> None:
    assert grave(found(recipe_from(texts(tmp_path)))) == []


def test_a_teacher_with_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    """As many tokens in another order: nothing breaks, and the teacher reads noise."""
    other = tmp_path / "other"
    local_models.bert(other)
    local_models.word_pieces(local_models.WORDS[::-1]).save_pretrained(other)
    tree = texts(tmp_path, processor=str(other))
    tree["objective"].pop("hint")
    (finding,) = grave(found(recipe_from(tree)))
    assert (finding.check, finding.level) == ("tokenizer", "warning")
    judge = local_models.bert(tmp_path / "judge", head=["bad", "good"])
    tree["teacher"] = {"model": str(judge), "processor": str(other)}
    assert ("tokenizer", "error") in {(each.check, each.level) for each in found(recipe_from(tree))}


def test_a_student_cut_from_a_finetuned_teacher_needs_no_folder_of_it(tmp_path: Path) -> None:
    """Neither before there is one, nor once the teacher is trained: the student is looked at as it begins."""
    tree = texts(tmp_path)
    tree["student"] = {"from_teacher": {"keep_blocks": [0], "weights": "finetuned"}}
    tree["objective"] = {"soft": {"loss": "kl"}}
    run = Run(recipe_from(tree), tmp_path / "run", bars=False)
    assert grave(before_training(run)) == []
    assert not (tmp_path / "run/models").exists()
    run.execute()
    assert [each for each in after_teachers(run) if each.level == "error"] == []


def test_a_head_of_zeros_may_be_trained(tmp_path: Path) -> None:
    """As some pipelines begin; what is the same for every sample is a fault once the teacher is trained."""
    tree = {**TREE, "teacher": {"model": "tests.runs.tried:zero_head", "train": {"epochs": 3}}}
    run = Run(recipe_from(tree), tmp_path, bars=False)
    assert grave(before_training(run, strict=True)) == []
    run.execute()
    folder = run.model_folder("teacher")
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, folder / "model.safetensors")
    assert "dead-tap" in {each.check for each in after_teachers(run)}


def test_a_trained_teacher_beside_one_that_is_not(tmp_path: Path) -> None:
    """Once it is trained all that is said of signals still needs the other one's."""
    known = Run(recipe_from(TREE), tmp_path / "first", bars=False)
    known.execute()
    saved = {"model": str(known.model_folder("teacher")), "labels": "dataset"}
    terms = {n: {"loss": "mse", "student": "body", "teacher": f"{n}/body", "project": "linear"} for n in ("new", "old")}
    tree = {k: v for k, v in TREE.items() if k != "teacher"}
    run = Run(
        recipe_from({**tree, "teachers": {"new": TREE["teacher"], "old": saved}, "objective": terms}), tmp_path / "run"
    )
    run.execute()
    assert grave(after_teachers(run)) == []


def test_ordered_classes_with_a_threshold_between_any_two() -> None:
    """Two logits for three classes are no fault where the task reads them so."""
    thresholds = {"loss": "tests.runs.tried:thresholds"}
    tree = {**TREE, "task": {"name": "tests.runs.tried:Ordered"}, "objective": {"hard": thresholds, "soft": thresholds}}
    tree["objective"]["soft"] = {"loss": "mse"}
    tree["preflight"] = {"ignore": ["duplicates"]}
    assert grave(found(recipe_from(tree))) == []


def test_a_task_of_ones_own_that_is_called_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name says nothing of its columns."""
    (tmp_path / "texttasks.py").write_text("from tests.runs.tried import Bare as Bare\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert grave(found(recipe_from({**TREE, "task": {"name": "texttasks:Bare"}}))) == []


def test_before_training_leaves_the_generators_alone() -> None:
    plan = Plan(recipe_from(TREE))
    state = torch.get_rng_state()
    assert grave(before_training(plan)) == []
    assert torch.equal(state, torch.get_rng_state())
