"""Several tasks from Python: what each teacher teaches, to whom it gets, and what is said of each task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, load_dataset

from potstill import (
    AttentionDistillation,
    DistillationConfig,
    FeatureDistillation,
    MultiTaskDistiller,
    StudentConfig,
    StudentModel,
    TeacherConfig,
    TeacherModel,
)
from potstill.errors import DataError, ObjectiveError, PotstillError, TaskError, TrainingError
from potstill.interfaces import Progress
from potstill.registry import tasks as known_tasks
from potstill.runs.lessons import make_sources
from potstill.runs.preflight import before_training
from potstill.runs.steps import Run
from potstill.training.module import DistillationModule
from tests import local_models
from tests.local_models import SENTENCES

ROWS = SENTENCES * 3
TASKS = ["sentiment", "nli"]
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def bert(folder: Path) -> str:
    """A BERT of 4 blocks without a head."""
    return str(local_models.bert(folder / "bert"))


@pytest.fixture(scope="module")
def wide(folder: Path) -> str:
    """A wider one of 3 blocks that knows three classes."""
    return str(local_models.bert(folder / "wide", layers=3, head=["yes", "maybe", "no"], hidden_size=24))


@pytest.fixture(scope="module")
def distilbert(folder: Path) -> str:
    return str(local_models.distilbert(folder / "distilbert"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "execute", lambda run: None)


def sentiment() -> Dataset:
    table = Dataset.from_dict({"sentence": [text for text, _ in ROWS], "label": [grade for _, grade in ROWS]})
    return table.cast_column("label", ClassLabel(names=["bad", "good"]))


def nli() -> Dataset:
    texts = [text for text, _ in ROWS]
    rows = {"premise": texts, "hypothesis": [*texts[3:], *texts[:3]], "gold": [n % 3 for n in range(len(texts))]}
    return Dataset.from_dict(rows)


GOLD = {"nli": {"label": "gold", "label_names": ["yes", "maybe", "no"]}}


def data() -> dict[str, Dataset]:
    return {"sentiment": sentiment(), "nli": nli()}


def made(model: str, **changes: Any) -> MultiTaskDistiller:
    given = {"tasks": TASKS, "student": StudentModel(StudentConfig(model)), "options": GOLD, **changes}
    return MultiTaskDistiller(**given)


def both(one: str, other: str) -> dict[str, TeacherModel]:
    return {"sentiment": TeacherModel(TeacherConfig(one)), "nli": TeacherModel(TeacherConfig(other, task_type="nli"))}


# what comes out


def test_a_teacher_for_each_task_and_figures_for_each(bert: str, wide: str, distilbert: str, caplog: Any) -> None:
    """The one without a head is fine-tuned on the rows of its task; the other teaches as it is."""
    distiller = made(
        distilbert,
        task_weights=[0.4, 0.6],
        teachers=both(bert, wide),
        feature_distillation=FeatureDistillation(teacher_layers=[1, 3], student_layers=[1, 2], feature_loss_weight=0.5),
        config=DistillationConfig(temperature=2.0, alpha=0.5, beta=1.0),
    )
    done = distiller.distill(data(), data(), args=QUICK)
    assert caplog.text.count("has no trained head") == 1
    recipe = done.run.recipe
    assert recipe.all_teachers["sentiment-teacher"].train is not None
    assert recipe.all_teachers["nli-teacher"].train is None
    assert done.run.load("sentiment-teacher").config.id2label == {0: "bad", 1: "good"}

    weights = {name: term.weight for name, term in recipe.objective.items()}
    assert weights == pytest.approx(
        {"soft_sentiment": 0.2, "soft_nli": 0.3, "hard_sentiment": 0.4, "hard_nli": 0.6}
        | {"feature_sentiment": 0.2, "feature_nli": 0.3}
    )
    assert list(done.metrics.models) == ["per-task", "baseline", "distilled"]
    found = done.metrics.models["distilled"].metrics
    assert {"mean", "sentiment/accuracy", "nli/accuracy"} <= set(found)
    mean = (found["sentiment/accuracy"].value + found["nli/accuracy"].value) / 2
    assert found["mean"].value == pytest.approx(mean)
    names = ["sentiment/bad", "sentiment/good", "nli/yes", "nli/maybe", "nli/no"]
    assert list(done.student.config.id2label.values()) == names

    logged = (done.folder / "history/distilled.json").read_text(encoding="utf-8")
    last = next(line for line in reversed(json.loads(logged)) if "loss/feature_nli_2_3" in line)
    assert last["loss/feature_nli_2_3"] > 0
    assert_features_are_of_each_tasks_tokens(done.run)


def assert_features_are_of_each_tasks_tokens(run: Run) -> None:
    """Each term is the mean over its own task's tokens that are no padding, of its own teacher's layer."""
    from potstill.recipe import build

    task = build.prepared_for_distillation(run.recipe, run.task, run.processors)
    batch = task.dataset(run.splits.train, training=False, seed=0).__getitems__(list(range(12)))
    source = make_sources(run, [run.objective], train=run.recipe.train)["per-task"]
    teacher = {f"per-task/{name}": value for name, value in source(dict(batch)).items()}
    module = DistillationModule(run.student().eval(), run.objective, forward=task.forward).eval()
    module.materialize(teacher, batch)
    parts = module(teacher, progress=Progress(), **batch).parts
    tokens = batch["attention_mask"].bool()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        said = module.student(**inputs, output_hidden_states=True).hidden_states
        for number, name in enumerate(TASKS):
            kinds = {} if "token_type_ids" not in batch else {"token_type_ids": batch["token_type_ids"]}
            kinds |= {key.rpartition("/")[2]: batch[key] for key in batch if key.startswith(f"teacher/{name}-teacher/")}
            own = run.load(f"{name}-teacher").eval()
            taught = own(**{**inputs, **kinds}, output_hidden_states=True).hidden_states
            kept = tokens & (batch["task"] == number)[:, None]
            assert 0 < int(kept.sum()) < int(tokens.sum())
            for student, layer in ((1, 1), (2, 3)):
                term = f"feature_{name}_{student}_{layer}"
                projector = module.objective.terms[term].projector
                gap = projector(said[student]) - taught[layer]
                assert float(parts[term]) == pytest.approx(float(gap[kept].square().mean()), rel=1e-4), term


def test_heads_apart_the_encoder_learns_from_the_labels_alone(
    real_data: Path, bert: str, distilbert: str, tmp_path: Path
) -> None:
    """On SST-2 and SICK: after a step the encoder is, to the bit, that of a student without teachers; the heads not."""
    for name in ("sst2", "sick"):
        if not (real_data / name).is_dir():
            pytest.skip(f"no {name} in {real_data}")
    tables = {
        name: load_dataset("parquet", data_files=str(real_data / folder / "train.parquet"), split="train[:48]")
        for name, folder in (("sentiment", "sst2"), ("nli", "sick"))
    }
    step = {"max_steps": 1, "batch_size": 16, "max_grad_norm": 0.0, "learning_rate": 1e-3}
    outcomes = {}
    for name, alpha, shared in (("apart", 0.7, False), ("together", 0.7, True), ("labels", 0.0, True)):
        distiller = MultiTaskDistiller(
            tasks=TASKS,
            student=StudentModel(StudentConfig(distilbert)),
            teachers=both(bert, bert),
            shared_distillation=shared,
            config=DistillationConfig(alpha=alpha, beta=0.3, baseline=False),
        )
        done = distiller.distill(tables, args=step, output=tmp_path / name)
        outcomes[name] = done.student.state_dict()
    assert done.run.recipe.task.options["tasks"]["nli"]["pair"] == "sentence_B"
    assert len(outcomes["apart"]["classifier.bias"]) == 2 + 3
    encoder = [key for key in outcomes["apart"] if not key.startswith("classifier.")]
    assert all(torch.equal(outcomes["apart"][key], outcomes["labels"][key]) for key in encoder)
    assert not all(torch.equal(outcomes["together"][key], outcomes["labels"][key]) for key in encoder)
    assert not torch.equal(outcomes["apart"]["classifier.weight"], outcomes["labels"]["classifier.weight"])


@pytest.mark.usefixtures("_no_training")
class TestTheRecipe:
    def test_one_teacher_for_all_tasks(self, bert: str, distilbert: str) -> None:
        teacher = TeacherModel(TeacherConfig(bert, num_labels=5))
        part = AttentionDistillation({0: 0, 4: 2})
        config = DistillationConfig("attention", attention_distillation=part, max_length=16)
        run = made(distilbert, teacher=teacher, config=config).distill(data(), data()).run
        assert list(run.recipe.all_teachers) == ["teacher"]
        assert run.recipe.all_teachers["teacher"].train is not None
        assert run.recipe.objective["soft_nli"].weight == pytest.approx(0.35)
        for name, weight in (("sentiment", 0.5), ("nli", 0.5)):
            term = run.recipe.objective[f"attention_{name}"]
            assert (term.teacher, term.mask, term.weight) == ("attention", f"task/{name}", weight)
        assert run.recipe.task.options["tasks"]["sentiment"]["max_length"] == 16
        assert [str(each) for each in before_training(run) if each.level == "error"] == []
        student = StudentModel(StudentConfig(keep_blocks=[0, 3]))
        cut = made(distilbert, teacher=teacher, student=student).distill(data(), data()).run
        assert cut.student().config.num_hidden_layers == 2
        assert cut.student().config.num_labels == 5

    def test_heads_apart(self, bert: str, distilbert: str) -> None:
        distiller = made(distilbert, teachers=both(bert, bert), shared_distillation=False, task_weights=[1, 0])
        recipe = distiller.distill(data(), data()).run.recipe
        assert recipe.scheme.name == "separate_heads"
        assert set(recipe.objective) == {"soft_sentiment", "hard_sentiment"}
        assert recipe.objective["soft_sentiment"].student == "head.logits"
        assert recipe.objective["hard_sentiment"].student == "logits"

    def test_weights_of_tasks_weigh_their_layers_too(self, bert: str, distilbert: str) -> None:
        teacher, part = TeacherModel(TeacherConfig(bert, num_labels=5)), FeatureDistillation([4], [2], 0.5)
        given = {"task_weights": {"nli": 2, "sentiment": 1}, "feature_distillation": part}
        one = made(distilbert, teacher=teacher, **given).distill(data()).run.recipe.objective
        several = made(distilbert, teachers=both(bert, bert), **given).distill(data()).run.recipe.objective
        for terms in (one, several):
            found = {name: term.weight for name, term in terms.items() if name.startswith("feature")}
            assert found == {"feature_sentiment": 0.5, "feature_nli": 1.0}

    def test_student_and_teachers_may_come_late(self, bert: str, distilbert: str) -> None:
        distiller = MultiTaskDistiller(tasks=TASKS, task_weights=[0.6, 0.4], options=GOLD)
        student = StudentModel(StudentConfig(distilbert))
        with pytest.raises(TrainingError, match=r"no student yet; say .*distill\(student=…\)"):
            distiller.distill(data(), teachers=both(bert, bert))
        with pytest.raises(TrainingError, match="either `teachers`"):
            distiller.distill(data(), student=student)
        run = distiller.distill(data(), student=student, teachers=both(bert, bert)).run
        assert run.recipe.student.model == distilbert
        assert distiller.student is None

    def test_rows_that_are_not_given_are_carved(self, bert: str, distilbert: str) -> None:
        distiller = made(distilbert, teachers=both(bert, bert), sampling="uniform")
        run = distiller.distill(data(), {"nli": nli()}).run
        counts = dict.fromkeys(TASKS, 0)
        for number in run.splits.test["task"][:]:
            counts[TASKS[number]] += 1
        assert counts == {"sentiment": round(len(ROWS) / 5), "nli": len(ROWS)}
        assert run.recipe.task.options["sampling"] == "uniform"

    def test_another_name_is_a_classification(self, bert: str, distilbert: str) -> None:
        distiller = MultiTaskDistiller(
            tasks=["topic"],
            student=StudentModel(StudentConfig(distilbert)),
            teachers={"topic": TeacherModel(TeacherConfig(bert))},
            options={"topic": {"text": "a", "pair": "b"}},
        )
        rows = {"a": ["x", "y"] * 10, "b": ["x", "y"] * 10, "label": [0, 1] * 10}
        section = distiller.distill({"topic": Dataset.from_dict(rows)}).run.recipe.task.options["tasks"]["topic"]
        assert (section["name"], section["text"], section["pair"]) == ("text-classification", "a", "b")

    def test_other_tokens_have_no_common_layers(self, folder: Path, bert: str, distilbert: str) -> None:
        roberta = str(local_models.roberta(folder / "roberta"))
        part = FeatureDistillation([1], [1])
        with pytest.raises(ObjectiveError, match="the 'nli-teacher' and the student have different tokenizers"):
            made(distilbert, teachers=both(bert, roberta), feature_distillation=part).distill(data(), data())

    def test_a_layer_that_one_teacher_lacks(self, bert: str, wide: str, distilbert: str) -> None:
        part = FeatureDistillation([4], [2])
        with pytest.raises(TrainingError, match=r"the teacher of 'nli' has 3 blocks, so its layers are 0 to 3"):
            made(distilbert, teachers=both(bert, wide), feature_distillation=part).distill(data(), data())

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"sentiment": sentiment()}, "no training data for the task 'nli'"),
            ({**data(), "nil": nli()}, "there is no task 'nil'; did you mean 'nli'"),
            ({"sentiment": sentiment(), "nli": sentiment().rename_column("label", "gold")}, "'nli' compares two texts"),
        ],
    )
    def test_data_that_do_not_fit(self, bert: str, distilbert: str, given: dict[str, Dataset], message: str) -> None:
        with pytest.raises(PotstillError, match=message):
            made(distilbert, teachers=both(bert, bert)).distill(given)

    def test_tables_that_go_by_no_task(self, bert: str, distilbert: str) -> None:
        with pytest.raises(DataError, match=r"expected the training data as \{task: table\}, got Dataset"):
            made(distilbert, teachers=both(bert, bert)).distill(sentiment())

    def test_classes_are_compared_with_the_data(self, bert: str, distilbert: str) -> None:
        teachers = {**both(bert, bert), "nli": TeacherModel(TeacherConfig(bert, num_labels=2))}
        with pytest.raises(TaskError, match="the teacher of 'nli' is to have num_labels=2, and the data have 3"):
            made(distilbert, teachers=teachers).distill(data())
        student = StudentModel(StudentConfig(distilbert, num_labels=2))
        with pytest.raises(TaskError, match="the student is to have num_labels=2, and the data have 5 classes"):
            made(distilbert, teachers=both(bert, bert), student=student).distill(data())


# what is refused at once

TEACHER = TeacherModel(TeacherConfig("bert"))
PAIR = {"sentiment": TEACHER, "nli": TEACHER}
FEATURES = FeatureDistillation([1], [1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "expected the names of tasks"),
        ({"tasks": ["nli", "nli"]}, "each once"),
        ({"task_weights": [0.4, 0.3, 0.3]}, r"a weight for each of the 2 tasks \(sentiment, nli\), got 3"),
        ({"task_weights": [1, -1]}, "task_weights of 0 or more"),
        ({"teachers": {"sentiment": TEACHER}}, "there is no teacher for the task 'nli'"),
        ({"teachers": {**PAIR, "nil": TEACHER}}, "no task 'nil'; did you mean 'nli'"),
        ({"teacher": TEACHER}, "either `teachers`, one for each task, or `teacher`"),
        ({"tasks": "nli"}, r"as a list, got 'nli'; did you mean \['nli'\]"),
        ({"task_weights": {"sentiment": 1, "nil": 2}}, "no task 'nil'; did you mean 'nli'"),
        ({"task_weights": {"nli": 1}}, "a weight for each of the 2 tasks"),
        ({"task_weights": [float("nan"), 1]}, "task_weights to be finite numbers, got nan"),
        ({"task_weights": ["0.3", 1]}, "task_weights to be finite numbers, got '0.3'"),
        ({"task_weights": 1}, "task_weights as a list of numbers"),
        (
            {
                "config": DistillationConfig("feature", feature_distillation=FEATURES),
                "feature_distillation": FEATURES,
            },
            "feature_distillation once",
        ),
        ({"feature_distillation": FeatureDistillation([1], [1], mask="attention_mask")}, "leave `mask` out"),
        ({"options": {"nil": {}}}, "no task 'nil'; did you mean 'nli'"),
        ({"options": {"nli": {"lable": "x"}}}, "no option 'lable'; did you mean 'label'"),
        ({"options": {"nli": {"pair": "x"}}}, "a `pair` goes with the `text`"),
        ({"config": DistillationConfig(label="x")}, "each task has its own `label`"),
        ({"shared_distillation": False, "feature_distillation": FEATURES}, "keeps teachers from the encoder"),
        ({"student": StudentModel(StudentConfig(keep_blocks=[0]))}, "cut from one teacher"),
        ({"teachers": {**PAIR, "nli": TeacherModel(TeacherConfig("b", "tabular-classification"))}}, "got a teacher of"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TrainingError, TaskError), match=message):
        made("student", **{"teachers": PAIR, "options": {}, **changes})


def test_questions_join_with_their_task() -> None:
    """The distiller can be made, and says it when it is to distil."""
    distiller = MultiTaskDistiller(
        tasks=["sentiment", "nli", "qa"], task_weights=[0.4, 0.3, 0.3], shared_distillation=True
    )
    if "question-answering" not in known_tasks.names():
        with pytest.raises(TaskError, match="'qa' is question answering, which joins with its task"):
            distiller.distill({})
