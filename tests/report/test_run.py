"""Reading a run: what is there, and what is said of what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from potstill.errors import RunError
from potstill.report import load_run, load_seeds
from tests.report import made


def test_all_of_it(tmp_path: Path) -> None:
    view = load_run(made.run(tmp_path, examples=[made.example()]))
    assert view.metrics == made.metrics()
    assert set(view.histories) == {"baseline", "distilled"}
    assert view.predictions["distilled"].logits.shape == (400, 3)
    assert view.examples[0]["sample_id"] == 12
    assert "name: flowers" in view.recipe
    assert view.named("teacher") == ["teacher"]


def test_the_metrics_alone(tmp_path: Path) -> None:
    view = load_run(made.run(tmp_path, histories=False, logits=False))
    assert (view.histories, view.predictions, view.examples) == ({}, {}, [])


def test_answers_that_do_not_suit_are_left_out(tmp_path: Path) -> None:
    made.run(tmp_path)
    three = {"logits": np.zeros((4, 5, 3), np.float32), "sample_id": np.arange(4)}
    safetensors.numpy.save_file(three, str(tmp_path / "predictions/baseline.test.safetensors"))
    unknown = {"logits": np.zeros((4, 3), np.float32), "labels": np.full(4, -100), "sample_id": np.arange(4)}
    safetensors.numpy.save_file(unknown, str(tmp_path / "predictions/teacher.test.safetensors"))
    view = load_run(tmp_path)
    assert set(view.predictions) == {"teacher", "distilled"}
    assert view.predictions["teacher"].labels is None


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no recipe\.resolved\.yaml: expected the folder of a run"):
        load_run(tmp_path)
    with pytest.raises(RunError, match="expected the folder of a run"):
        load_seeds(tmp_path)


def test_an_unfinished_one(tmp_path: Path) -> None:
    made.run(tmp_path)
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(RunError, match="the run is not finished; `potstill distill` goes on with it"):
        load_run(tmp_path)


def test_unfinished_seeds(tmp_path: Path) -> None:
    made.seeds(tmp_path)
    (tmp_path / "seed-1/metrics.json").unlink()
    with pytest.raises(RunError, match="seed-1 holds no metrics"):
        load_seeds(tmp_path)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(RunError, match="the seeds are not finished"):
        load_seeds(tmp_path)


@pytest.mark.parametrize("name", ["metrics.json", "environment.json", "history/distilled.json", "examples.json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    made.run(tmp_path)
    (tmp_path / name).write_text('{"recipe": ')
    with pytest.raises(RunError, match=f"{name} cannot be read"):
        load_run(tmp_path)


def test_broken_answers_are_named(tmp_path: Path) -> None:
    made.run(tmp_path)
    (tmp_path / "predictions/distilled.test.safetensors").write_bytes(b"no tensors")
    with pytest.raises(RunError, match=r"distilled\.test\.safetensors cannot be read"):
        load_run(tmp_path)
