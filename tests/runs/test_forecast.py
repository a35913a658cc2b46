"""What `potstill plan` says of a run: the steps, the memory and the arithmetic are those of the run itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from potstill.errors import TrainingError
from potstill.recipe import arguments, build
from potstill.recipe.load import recipe_from
from potstill.recipe.schema import Recipe
from potstill.runs.forecast import CACHED, FLOOR, LIVE, Forecast, Trial
from potstill.runs.plan import Plan
from potstill.teachers.live import Live
from tests.local_models import bert

DIGITS: dict[str, Any] = {
    "name": "digits",
    "task": {"name": "image-classification"},
    "data": {"source": "sklearn", "path": "load_digits", "limit": {"train": 50}, "test": 64},
    "teacher": {"model": "potstill:mlp", "kwargs": {"hidden": [24]}, "train": {"epochs": 1}},
    "student": {"model": "potstill:mlp", "kwargs": {"hidden": [12], "dropout": 0.1}},
    "objective": {"soft": {"loss": "kl", "temperature": 4.0}, "hard": {"loss": "cross_entropy"}},
    "train": {"epochs": 4, "batch_size": 16, "learning_rate": 0.01},
}
HINT = {"loss": "mse", "teacher": "body.1", "student": "body.1", "project": "linear"}
QUIET = {"save_strategy": "no", "eval_strategy": "no"}
FLIPPED = {**DIGITS["train"], "augment": ["flip"]}


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Thirty texts of three to fourteen tokens, and one of sixteen."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"{'good film ' * (1 + row % 6)},{'good' if row % 2 else 'bad'}" for row in range(30)]
    (folder / "train.csv").write_text("\n".join(["text,label", *lines, f"{'good ' * 14},good"]), encoding="utf-8")
    (folder / "test.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    return {
        "name": "texts",
        "task": {"name": "text-classification", "text": "text", "max_length": 16},
        "data": {"source": "files", "path": str(folder), "validation": 0},
        "teacher": {"model": str(bert(folder / "teacher", layers=2)), "train": {"epochs": 1}},
        "student": {"from_teacher": {"keep_blocks": [0]}},
        "objective": {"soft": {"loss": "kl", "temperature": 2.0}, "hard": {"loss": "cross_entropy"}},
        "train": {"epochs": 3, "batch_size": 8},
    }


def digits(cache: Any = "auto", **changes: Any) -> Recipe:
    tree = {**DIGITS, **changes}
    return recipe_from({**tree, "teacher": {**tree["teacher"], "cache": cache}})


def alone(**changes: Any) -> Recipe:
    tree = {key: value for key, value in DIGITS.items() if key != "teacher"}
    return recipe_from({**tree, "objective": {"hard": {"loss": "cross_entropy"}}, **changes})


def forecast(recipe: Recipe) -> Forecast:
    return Trial(Plan(recipe)).forecast(budget_s=0)


def size(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def test_each_way_of_a_step_is_timed(texts: dict[str, Any]) -> None:
    for recipe in (digits(), digits(objective={**DIGITS["objective"], "hint": HINT}), recipe_from(texts)):
        found = forecast(recipe)
        assert list(found.step_ms) == [FLOOR, LIVE, CACHED]
        assert min(found.step_ms.values()) > 0
        assert found.seconds == pytest.approx(found.step_ms[CACHED] * found.steps / 1000)
    found = forecast(alone())
    assert list(found.step_ms) == [FLOOR]
    assert (found.cached, found.can_be_cached, found.memory["teachers"]) == (False, False, 0)
    assert found.seconds == pytest.approx(found.step_ms[FLOOR] * found.steps / 1000)


@pytest.mark.parametrize(
    ("cache", "train", "cached", "can_be_cached", "is_proposed"),
    [
        ("auto", {}, True, True, False),
        (True, {"epochs": 1}, True, True, False),
        (False, {}, False, True, True),
        (False, {"epochs": 1}, False, True, False),  # each answer would be made anyway
        ("auto", {"augment": ["flip"]}, False, False, False),
        (False, {"augment": ["flip"]}, False, False, False),
        ("auto", {"augment": ["flip"], "views": 2}, True, True, False),
        ("auto", {"augment": ["flip"], "views": 4}, False, True, False),
    ],
)
def test_whether_the_teacher_is_cached(
    cache: Any, train: dict[str, Any], cached: bool, can_be_cached: bool, is_proposed: bool
) -> None:
    found = forecast(digits(cache, train={**DIGITS["train"], **train}))
    assert (found.cached, found.can_be_cached) == (cached, can_be_cached)
    assert ("teacher.cache=true" in found.faster) == is_proposed
    assert found.seconds == pytest.approx(found.step_ms[CACHED if cached else LIVE] * found.steps / 1000)


def test_a_cache_of_endless_views_is_refused() -> None:
    with pytest.raises(TrainingError, match="each epoch shows new random views"):
        forecast(digits(True, train=FLIPPED))


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"epochs": 2.5},
        {"gradient_accumulation_steps": 3, "epochs": 2.5},
        {"gradient_accumulation_steps": 9},
        {"max_steps": 3},
        {"batch_size": 64},
    ],
)
def test_the_steps_are_those_that_a_training_does(train: dict[str, Any]) -> None:
    trial = Trial(Plan(digits(train={**DIGITS["train"], **QUIET, **train})))
    trainer = trial.trainer(trial.plan.recipe.train, None)
    trainer.train()
    assert trial.forecast(budget_s=0).steps == trainer.state.global_step


def test_the_steps_of_texts_of_a_token_budget(texts: dict[str, Any]) -> None:
    trial = Trial(Plan(recipe_from({**texts, "train": {**texts["train"], **QUIET, "batch_tokens": 32}})))
    trainer = trial.trainer(trial.plan.recipe.train, None)
    trainer.train()
    assert trial.forecast(budget_s=0).steps == trainer.state.global_step


def test_a_step_of_several_micro_batches_runs_through_all_of_them() -> None:
    """Else the training would take as many times as long as it is said to."""
    asked: list[int] = []
    hook = register_module_forward_hook(lambda module, *_: asked.append(id(module)))
    try:
        counts = []
        for steps in (1, 3):
            asked.clear()
            train = {**DIGITS["train"], "gradient_accumulation_steps": steps}
            memory = forecast(digits(train=train)).memory
            counts.append((len(asked), memory["activations"]))
    finally:
        hook.remove()
    assert counts[1][0] > 2 * counts[0][0]
    assert counts[1][1] == counts[0][1]  # which are those of one micro-batch at a time


def test_memory_is_that_of_the_models_and_of_the_optimizer() -> None:
    convnet = {"model": "potstill:convnet", "kwargs": {"widths": [3, 5]}}
    hint = {"loss": "mse", "teacher": "stages.1", "student": "stages.1", "project": "linear"}
    recipe = digits(
        teacher={**convnet, "train": {"epochs": 1}},
        student={**convnet, "kwargs": {"widths": [2, 4]}, "freeze": ["stages.0"]},
        objective={**DIGITS["objective"], "hint": hint},
    )
    plan = Plan(recipe)
    memory, student = forecast(recipe).memory, plan.student()
    projector = nn.Conv2d(4, 5, 1)
    every = [*student.parameters(), *projector.parameters()]
    trained = [each for each in every if each.requires_grad]
    gradients = sum(4 * each.numel() for each in trained)
    assert len(trained) < len(every)
    assert memory["student"] == size(student) + size(projector)
    assert memory["gradients"] == gradients
    assert memory["optimizer"] == 2 * gradients + 4 * len(trained)  # two moments, and how many steps there were
    teacher = build.make_blueprint(recipe.all_teachers["teacher"]).build(plan.task.facts(), seed=0)
    assert memory["teachers"] == size(teacher)
    assert memory["activations"] > 0
    assert memory["data"] == 50 * (64 * 4 + 8 + 8)  # pixels, label and sample_id of each row
    assert forecast(alone(train={**DIGITS["train"], "optimizer": "SGD"})).memory["optimizer"] == 0


def test_two_teachers_take_the_memory_of_both() -> None:
    tree = {key: value for key, value in DIGITS.items() if key != "teacher"}
    terms = {name: {"loss": "kl", "teacher": f"{name}/logits"} for name in ("large", "small")}
    small = {**DIGITS["teacher"], "kwargs": {"hidden": [8]}}
    found = forecast(
        recipe_from({**tree, "teachers": {"large": DIGITS["teacher"], "small": small}, "objective": terms})
    )
    assert list(found.step_ms) == [FLOOR, LIVE, CACHED]
    assert found.memory["teachers"] == 4 * ((64 + 1) * 24 + (24 + 1) * 10 + (64 + 1) * 8 + (8 + 1) * 10)


def test_memory_is_looked_at_in_the_largest_batch(texts: dict[str, Any]) -> None:
    seen: list[int] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.Embedding) and module.training and args[0].ndim == 2:
            seen.append(args[0].numel())

    trial = Trial(Plan(recipe_from({**texts, "train": {**texts["train"], "batch_size": 1}})))
    hook = register_module_forward_hook(see)
    try:
        trial.forecast(budget_s=0)
    finally:
        hook.remove()
    assert max(seen) == 16


@pytest.fixture
def fp16_unless_told() -> Iterator[None]:
    """As on a GPU, where autocast is in fp16 if nothing is said."""
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    yield
    torch.set_autocast_dtype("cpu", before)


@pytest.mark.parametrize("own", ["fp32", "bf16", "medium"])
@pytest.mark.usefixtures("fp16_unless_told")
def test_each_precision_is_tried_in_that_precision(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    students: dict[nn.Module, str] = {}
    found: dict[str, set[Any]] = {}
    make = Trial.trainer

    def known(self: Trial, spec: Any, source: Any) -> Any:
        trainer = make(self, spec, source)
        students.update(dict.fromkeys(trainer.distillation_module.student.modules(), arguments.precision_of(spec)))
        return trainer

    def see(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d) and module in students:
            found.setdefault(students[module], set()).add((output.dtype, torch.get_float32_matmul_precision()))

    monkeypatch.setattr(Trial, "trainer", known)
    hook = register_module_forward_hook(see)
    try:
        forecast_ = forecast(digits(train={**DIGITS["train"], "precision": own}))
    finally:
        hook.remove()
    usual = "highest"
    assert found == {
        "fp32": {(torch.float32, usual)},
        "bf16": {(torch.bfloat16, usual)},
        "medium": {(torch.float32, "medium")} | ({(torch.float32, usual)} if own == "medium" else set()),
    }
    assert forecast_.precision == own
    others = {"fp32", "bf16", "medium"} - {own}
    assert {name for name in forecast_.faster if "precision" in name} == {f"train.precision={name}" for name in others}
    assert torch.get_float32_matmul_precision() == usual


def test_the_live_teacher_answers_in_the_precision_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: set[Any] = set()
    answer = Live.__call__

    def watched(self: Live, batch: Any) -> Any:
        signals = answer(self, batch)
        kinds.add(signals["logits"].dtype)
        return signals

    monkeypatch.setattr(Live, "__call__", watched)
    forecast(digits(teacher={**DIGITS["teacher"], "precision": "bf16"}))
    assert kinds == {torch.bfloat16}


def test_padding_is_counted_where_texts_are_not_grouped(texts: dict[str, Any]) -> None:
    usual = forecast(recipe_from(texts)).faster
    shuffled = forecast(recipe_from({**texts, "train": {**texts["train"], "group_by_length": False}})).faster
    assert "train.group_by_length=true" not in usual
    assert shuffled["train.group_by_length=true"] > 1


def test_a_transfer_set_without_labels(tmp_path: Path) -> None:
    """No term can do without the teacher, so the student alone is one whose teacher costs nothing."""
    rows = [(i % 7, i % 5) for i in range(40)]
    (tmp_path / "train.csv").write_text("a,b\n" + "".join(f"{a},{b}\n" for a, b in rows))
    (tmp_path / "test.csv").write_text("a,b,label\n" + "".join(f"{a},{b},{int(a > b)}\n" for a, b in rows[:20]))
    tree = {
        "name": "transfer",
        "task": {"name": "tabular-classification"},
        "data": {"source": "files", "path": str(tmp_path)},
        "teacher": {"model": "potstill:mlp", "kwargs": {"hidden": [8]}},
        "student": {"model": "potstill:mlp"},
        "objective": {"soft": {"loss": "kl"}},
    }
    assert list(forecast(recipe_from(tree)).step_ms) == [FLOOR, LIVE, CACHED]


def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {name: tmp_path / name for name in ("here", "cache", "temporary")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.chdir(folders["here"])
    monkeypatch.setenv("POTSTILL_CACHE", str(folders["cache"]))
    monkeypatch.setattr("tempfile.tempdir", str(folders["temporary"]))
    trial = Trial(Plan(digits()))
    trial.forecast(budget_s=0)
    trial.profile(steps=5)
    del trial
    gc.collect()
    assert {name: list(folder.iterdir()) for name, folder in folders.items()} == {name: [] for name in folders}


@pytest.mark.parametrize("train", [{}, {"augment": ["flip"], "views": 2}, {"gradient_accumulation_steps": 2}])
def test_a_profile_of_a_cached_run_asks_the_teacher_nothing(
    train: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows the steps as they are after the first epoch, whatever views they show."""
    trial = Trial(Plan(digits(train={**DIGITS["train"], **train})))
    asked: list[int] = []
    answer = Live.__call__
    monkeypatch.setattr(Live, "__call__", lambda self, batch: asked.append(1) or answer(self, batch))
    ask = Trial._ask

    def until_now(self: Trial, *args: Any) -> None:
        ask(self, *args)
        asked.clear()

    monkeypatch.setattr(Trial, "_ask", until_now)
    found = trial.profile(steps=11)
    assert found.steps == 8
    assert asked == []
    assert found.sections["teacher"] > 0


def test_a_profile_of_a_live_run_asks_it_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    answer = Live.__call__
    monkeypatch.setattr(Live, "__call__", lambda self, batch: asked.append(1) or answer(self, batch))
    Trial(Plan(digits(False))).profile(steps=5)
    assert len(asked) == 5
