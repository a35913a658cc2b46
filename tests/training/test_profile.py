"""Where the time of a step goes: every part is counted once, and the training is the one that is not watched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.errors import TrainingError
from potstill.losses.objective import Objective, Term
from potstill.models.freezing import freeze
from potstill.teachers.cached import Cached
from potstill.teachers.live import Live
from potstill.training.profile import SECTIONS, _Watch, profile
from potstill.training.trainer import DistillationTrainer
from tests.training.tiny import arguments, flat, pairs, student, teacher


def trainer(folder: Path, *, source: Any = "live", steps: int = 8, **changes: Any) -> DistillationTrainer:
    torch.manual_seed(5)
    taught = {"teacher": teacher()} if source == "live" else {} if source is None else {"teacher": source}
    objective = None if taught else Objective({"hard": Term("cross_entropy")})
    args = arguments(folder, max_steps=steps, **changes)
    return DistillationTrainer(
        model=student(dropout=0.2), objective=objective, train_dataset=pairs(), args=args, **taught
    )


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
@pytest.mark.parametrize("source", ["live", None], ids=["taught", "alone"])
def test_the_parts_add_up_to_the_step(source: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    watched = trainer(tmp_path, source=source, **changes)
    found = profile(watched)
    assert list(found.sections) == [*SECTIONS, "trainer"]
    assert found.steps == 8 - 3
    assert watched.state.global_step == 8
    assert sum(found.sections.values()) == pytest.approx(found.step_ms)
    assert {name for name, value in found.sections.items() if value == 0} == ({"teacher"} if source is None else set())
    assert found.trace is None


def test_each_part_is_measured_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the parts move: what each of them takes is what it says, once a micro-batch or a step."""
    clock = [0.0]
    monkeypatch.setattr(_Watch, "_now", lambda self: clock[0])
    watched = trainer(tmp_path, gradient_accumulation_steps=3)

    def slow(owner: Any, name: str, seconds: float) -> None:
        work = getattr(owner, name)

        def slower(*args: Any, **kwargs: Any) -> Any:
            clock[0] += seconds
            return work(*args, **kwargs)

        setattr(owner, name, slower)

    module = watched.distillation_module
    slow(watched, "get_batch_samples", 0.001)
    slow(module, "signals", 0.02)
    slow(module, "_loss", 0.3)
    slow(watched.accelerator, "backward", 4)
    answer = watched.teacher
    watched.teacher = lambda batch: (clock.__setitem__(0, clock[0] + 50), answer(batch))[1]
    found = profile(watched)
    assert {name: round(value) for name, value in found.sections.items()} == {
        "data": 1,
        "teacher": 150_000,
        "student": 60,
        "loss": 900,
        "gradients": 12_000,
        "optimizer": 0,
        "trainer": 0,
    }
    assert round(found.step_ms) == 162_961


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_the_student_is_the_same_to_the_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    """BERT's token types are asked for because of the teacher alone, and would be lost with sight of it."""
    plain = trainer(tmp_path / "plain", **changes)
    plain.train()
    watched = trainer(tmp_path / "watched", **changes)
    profile(watched, trace=tmp_path / "trace.json")
    assert torch.equal(flat(watched.distillation_module.student), flat(plain.distillation_module.student))
    assert "token_type_ids" in watched._signature_columns


def test_shared_layers_are_shared_while_it_watches(tmp_path: Path) -> None:
    """Else it would show a step that no training does."""
    args = arguments(tmp_path, max_steps=5)
    watched = DistillationTrainer(
        model=freeze(teacher(), ["bert.embeddings"]), teacher=teacher(), train_dataset=pairs(), args=args
    )
    profile(watched)
    assert watched._sharing._layers is not None
    assert watched._sharing._layers.pairs


def test_a_cached_teacher_is_watched_too(tmp_path: Path) -> None:
    source = Cached(Live(teacher()), tmp_path / "cache")
    found = profile(trainer(tmp_path, source=source))
    assert found.sections["teacher"] > 0
    assert source.counts.found > 0


def test_the_trace_names_every_part(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "trace.json"
    found = profile(trainer(tmp_path), trace=place, warm_up=2, traced=2)
    assert (found.steps, found.trace) == (4, place)
    events = json.loads(place.read_text(encoding="utf-8"))["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert {name for name in names if name.startswith("potstill: ")} == {f"potstill: {name}" for name in SECTIONS}
    assert names.count("potstill: teacher") == 2


@pytest.mark.parametrize(("steps", "options", "least"), [(3, {}, 4), (6, {"trace": True}, 7), (5, {"warm_up": 5}, 6)])
def test_too_few_steps(steps: int, options: dict[str, Any], least: int, tmp_path: Path) -> None:
    given = {**options, "trace": tmp_path / "trace.json"} if "trace" in options else options
    with pytest.raises(TrainingError, match=rf"expected at least {least} steps to profile, got {steps}"):
        profile(trainer(tmp_path, steps=steps), **given)
    assert not (tmp_path / "trace.json").exists()


def test_steps_without_a_warm_up(tmp_path: Path) -> None:
    found = profile(trainer(tmp_path, steps=2), warm_up=0)
    assert found.steps == 2
    assert sum(found.sections.values()) == pytest.approx(found.step_ms)
