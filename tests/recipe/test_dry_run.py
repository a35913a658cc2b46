"""What `check` finds out on one batch, and what a transfer set still knows of its classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potstill.errors import TrainingError
from potstill.recipe.dry_run import dry_run
from potstill.recipe.load import recipe_from
from potstill.runs.steps import Run

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
