"""Checkpoints are whole or not there: the marker, the choice of the newest, rotation, kills between any two writes."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from potstill.data.batching import InMemory
from potstill.losses.objective import Objective, Term
from potstill.models.plain import Mlp
from potstill.training import state
from potstill.training import trainer as engine
from potstill.training.checkpoints import MARKER, is_complete, latest_checkpoint, mark_complete, rotate
from potstill.training.trainer import DistillationTrainer, ready_batch
from tests.training.tiny import arguments, flat


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Every training begins with a full garbage collection, which need not look through all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    """A folder like a checkpoint: two files and one in a folder below."""
    path = folder / f"checkpoint-{step}"
    (path / "deep").mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "deep/state.json"):
        (path / name).write_text(f"{name} of step {step}")
    if whole:
        mark_complete(path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestMarker:
    def test_a_checkpoint_is_whole_once_it_is_marked(self, tmp_path: Path) -> None:
        path = checkpoint(tmp_path, 1, whole=False)
        assert not is_complete(path)
        mark_complete(path)
        assert is_complete(path)
        assert names(path) == sorted(["model.safetensors", "optimizer.pt", "deep", MARKER])

    @pytest.mark.parametrize("name", ["model.safetensors", "deep/state.json"])
    @pytest.mark.parametrize("how", ["cut off", "gone", "longer"])
    def test_a_file_of_another_size_shows(self, tmp_path: Path, name: str, how: str) -> None:
        """A disk that was full, or a copy that was broken off, leaves the marker and not the weights."""
        path = checkpoint(tmp_path, 1)
        text = (path / name).read_text()
        if how == "gone":
            (path / name).unlink()
        else:
            (path / name).write_text(text[:-1] if how == "cut off" else text + "!")
        assert not is_complete(path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"model.safetensors"'])
    def test_a_damaged_marker_is_none(self, tmp_path: Path, text: str) -> None:
        path = checkpoint(tmp_path, 1)
        (path / MARKER).write_text(text)
        assert not is_complete(path)

    def test_marking_twice_is_marking_once(self, tmp_path: Path) -> None:
        path = checkpoint(tmp_path, 1)
        mark_complete(path)
        assert is_complete(path)
        assert MARKER not in (path / MARKER).read_text()


class TestLatest:
    def test_the_highest_step_wins_by_number(self, tmp_path: Path) -> None:
        """By name, `checkpoint-9` comes after `checkpoint-10`, and a run would go back without a word."""
        for step in (9, 10, 2):
            checkpoint(tmp_path, step)
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"

    def test_partial_ones_are_passed_over_and_deleted(self, tmp_path: Path) -> None:
        for step in (1, 2):
            checkpoint(tmp_path, step)
        checkpoint(tmp_path, 3, whole=False)
        (checkpoint(tmp_path, 4) / "optimizer.pt").write_text("")
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]

    def test_other_things_are_left_alone(self, tmp_path: Path) -> None:
        for name in ("checkpoint-best", "checkpoint-7.bak", "runs"):
            (tmp_path / name).mkdir()
        (tmp_path / "checkpoint-8").write_text("a file")
        assert latest_checkpoint(tmp_path) is None
        assert names(tmp_path) == ["checkpoint-7.bak", "checkpoint-8", "checkpoint-best", "runs"]

    def test_no_folder_no_checkpoint(self, tmp_path: Path) -> None:
        assert latest_checkpoint(tmp_path / "missing") is None


class TestRotation:
    def test_the_newest_stay(self, tmp_path: Path) -> None:
        for step in (8, 9, 10, 11):
            checkpoint(tmp_path, step)
        rotate(tmp_path, 2)
        assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]

    def test_the_best_stays_beside_them(self, tmp_path: Path) -> None:
        for step in (1, 2, 3):
            checkpoint(tmp_path, step)
        rotate(tmp_path, 1, keep="elsewhere/checkpoint-1")
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]
        assert is_complete(tmp_path / "checkpoint-1")

    @pytest.mark.parametrize("limit", [None, 0, -1])
    def test_without_a_limit_all_stay(self, tmp_path: Path, limit: int | None) -> None:
        for step in (1, 2, 3):
            checkpoint(tmp_path, step)
        rotate(tmp_path, limit)
        assert len(names(tmp_path)) == 3

    def test_a_half_deleted_one_is_not_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Killed while it deletes: what remains of the old checkpoint must never be resumed from."""
        for step in (1, 2):
            checkpoint(tmp_path, step)

        def killed(path: Path, **_: Any) -> None:
            (path / "deep/state.json").unlink()
            raise KeyboardInterrupt

        monkeypatch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            rotate(tmp_path, 1)
        assert not (tmp_path / "checkpoint-1" / MARKER).exists()
        assert is_complete(tmp_path / "checkpoint-2")


class Weights(TrainerCallback):
    """Remembers the student's weights after every step."""

    def __init__(self) -> None:
        self.at: dict[int, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = flat(kwargs["model"].student)


def trainer(folder: Path, *callbacks: TrainerCallback, scores: list[float] | None = None, **changes: Any) -> Any:
    """A student with dropout and a projector, four steps, a checkpoint at each, of which one may stay."""
    draw = torch.Generator().manual_seed(5)
    columns = {
        "features": torch.randn(16, 6, generator=draw),
        "labels": torch.randint(0, 3, (16,), generator=draw),
        "sample_id": torch.arange(16),
    }
    torch.manual_seed(6)
    teacher, student = Mlp(6, 3, [8]), Mlp(6, 3, [4], dropout=0.2)
    objective = Objective({"soft": Term("kl"), "hint": Term("mse", "body.1", "body.1", project="linear")})
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "remove_unused_columns": False}
    if scores is not None:
        settings |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "score"}
        settings |= {"load_best_model_at_end": True, "greater_is_better": True}
    made = DistillationTrainer(
        model=student,
        teacher=teacher,
        objective=objective,
        train_dataset=InMemory(columns),
        eval_dataset=InMemory(columns),
        data_collator=ready_batch,
        callbacks=list(callbacks),
        compute_metrics=lambda _: {"score": (scores or [0.0] * 9)[made.state.global_step - 1]},
        args=arguments(folder, **{**settings, **changes}),
    )
    return made


class Killed(BaseException):
    """What stands for a kill: nothing catches it."""


def kill(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, turn: int, after: bool = False) -> None:
    """Let the ``turn``-th call of a function end the process, before or after it did its work."""
    original, seen = getattr(owner, name), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        if len(seen) == turn and not after:
            raise Killed
        result = original(*args, **kwargs)
        if len(seen) == turn:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, watched)


POINTS: dict[str, tuple[Any, str, int, bool, int]] = {
    "before the weights": (DistillationTrainer, "_save", 3, False, 2),
    "before the projector": (state, "save_modules", 3, False, 2),
    "before the optimizer": (Trainer, "_save_optimizer_and_scheduler", 3, False, 2),
    "before the trainer's state": (Trainer, "_save_rng_state", 3, True, 2),
    "before the marker": (engine, "mark_complete", 3, False, 2),
    "before the old one is deleted": (engine, "rotate", 3, False, 3),
    "after the old one is deleted": (engine, "rotate", 3, True, 3),
}


class TestInTraining:
    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
        made = trainer(tmp_path_factory.mktemp("whole"))
        made.train()
        return flat(made.distillation_module)

    @pytest.mark.parametrize("point", POINTS)
    def test_a_limit_of_one_never_leaves_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, whole: torch.Tensor
    ) -> None:
        """Trainer deletes the old checkpoint while the new one may still be cut off; hours would be lost."""
        owner, name, turn, after, wanted = POINTS[point]
        with monkeypatch.context() as patched:
            kill(patched, owner, name, turn=turn, after=after)
            with pytest.raises(Killed):
                trainer(tmp_path).train()
        latest = latest_checkpoint(tmp_path)
        assert latest is not None
        assert latest.name == f"checkpoint-{wanted}"
        resumed = trainer(tmp_path)
        resumed.train(resume_from_checkpoint=str(latest))
        assert torch.equal(flat(resumed.distillation_module), whole)

    def test_the_limit_of_the_arguments_is_put_back(self, tmp_path: Path) -> None:
        made = trainer(tmp_path)
        made.train()
        assert made.args.save_total_limit == 1
        assert names(tmp_path) == ["checkpoint-4"]

    def test_rotation_keeps_the_best_while_training_goes_on(self, tmp_path: Path) -> None:
        """Deleted with the others, the best weights could not be loaded at the end."""
        seen: list[list[str]] = []

        class Look(TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                seen.append([name for name in names(tmp_path) if is_complete(tmp_path / name)])

        weights = Weights()
        made = trainer(tmp_path, Look(), weights, scores=[0.1, 0.9, 0.3, 0.2], save_total_limit=1)
        made.train()
        assert seen[2:] == [["checkpoint-2", "checkpoint-3"], ["checkpoint-2", "checkpoint-4"]]
        assert torch.equal(flat(made.distillation_module.student), weights.at[2])
        assert not torch.equal(weights.at[4], weights.at[2])
