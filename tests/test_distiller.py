"""The Python door: the README's quick start word for word, raw or tokenised data, teachers with and without a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from potstill import DistillationConfig, Distiller, StudentConfig, StudentModel, TeacherConfig, TeacherModel
from potstill.errors import DataError, RecipeError, TaskError, TrainingError
from potstill.evaluation.predict import Predictions
from potstill.models.student import cut
from potstill.runs.steps import open_run
from tests import local_models
from tests.local_models import SENTENCES
from tests.training.tiny import flat

ROWS = SENTENCES * 6
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def bert(folder: Path) -> str:
    """A BERT without a head."""
    return str(local_models.bert(folder / "bert"))


@pytest.fixture(scope="module")
def judge(folder: Path) -> str:
    """A BERT with a head."""
    return str(local_models.bert(folder / "judge", head=["NEGATIVE", "POSITIVE"]))


@pytest.fixture(scope="module")
def distilbert(folder: Path) -> str:
    return str(local_models.distilbert(folder / "distilbert"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def table(column: str = "sentence", label: str = "label") -> Dataset:
    return Dataset.from_dict({column: [text for text, _ in ROWS], label: [grade for _, grade in ROWS]})


def distiller(teacher: str, student: str, **config: Any) -> Distiller:
    return Distiller(
        TeacherModel(TeacherConfig(teacher)), StudentModel(StudentConfig(student)), DistillationConfig(**config)
    )


def weights(done: Any) -> dict[str, float]:
    return {name: term.weight for name, term in done.run.recipe.objective.items()}


def test_the_quick_start_works_as_written(bert: str, distilbert: str, caplog: pytest.LogCaptureFixture) -> None:
    train_dataset = eval_dataset = table()
    teacher = TeacherModel(TeacherConfig(model_name_or_path=bert, task_type="classification", num_labels=2))
    student = StudentModel(StudentConfig(model_name_or_path=distilbert, task_type="classification", num_labels=2))
    distiller = Distiller(
        teacher, student, DistillationConfig(distillation_type="logit", temperature=4.0, alpha=0.7, beta=0.3)
    )
    done = distiller.distill(train_dataset, eval_dataset)

    assert "no trained head" in caplog.text
    assert "classifier.weight" in caplog.text
    assert list(done.metrics.models) == ["teacher", "baseline", "distilled"]
    assert done.metrics.samples == len(ROWS)
    assert type(done.student).__name__ == "DistilBertForSequenceClassification"
    assert type(done.run.load("teacher")).__name__ == "BertForSequenceClassification"
    assert done.folder.parent.name == "runs"
    recipe = done.run.recipe
    assert recipe.objective["soft"].options == {"temperature": 4.0}
    assert weights(done) == {"soft": 0.7, "hard": 0.3}
    assert recipe.teacher is not None
    assert recipe.teacher.train is not None


def test_its_student_answers_alike_in_a_pipeline(bert: str, distilbert: str) -> None:
    done = distiller(bert, distilbert, label_names=["bad", "good"]).distill(table(), table(), args=QUICK)
    assert "<html" in done.report.read_text(encoding="utf-8")
    pipeline = transformers.pipeline("text-classification", model=str(done.student_folder))
    answers = pipeline([text for text, _ in SENTENCES])
    found = Predictions.load(done.folder / "predictions/distilled.test.safetensors").logits[: len(SENTENCES)]
    names = ["bad", "good"]
    assert [answer["label"] for answer in answers] == [names[place] for place in found.argmax(-1)]


def test_a_teacher_with_a_head_is_taken_as_it_is(judge: str, distilbert: str) -> None:
    """NEGATIVE and negative are one label; the run's files have the data set's spelling."""
    done = distiller(judge, distilbert, label_names=["negative", "positive"]).distill(table(), table(), args=QUICK)
    assert done.run.recipe.teacher is not None
    assert done.run.recipe.teacher.train is None
    taught = transformers.AutoModelForSequenceClassification.from_pretrained(done.run.model_folder("teacher"))
    given = transformers.AutoModelForSequenceClassification.from_pretrained(judge)
    assert taught.config.id2label == {0: "negative", 1: "positive"}
    assert all((taught.state_dict()[name] == value).all() for name, value in given.state_dict().items())


def test_labels_that_differ_are_an_error_with_the_fix(judge: str, distilbert: str) -> None:
    with pytest.raises(TaskError, match=r"order differs.*`data: \{labels: \[negative, positive\]"):
        distiller(judge, distilbert, label_names=["positive", "negative"]).distill(table(), table(), args=QUICK)
    with pytest.raises(TaskError, match="labels: dataset"):
        distiller(judge, distilbert, label_names=["ham", "spam"]).distill(table(), table(), args=QUICK)
    teacher = TeacherModel(TeacherConfig(judge, labels="dataset"))
    config = DistillationConfig(label_names=["ham", "spam"], baseline=False)
    done = Distiller(teacher, StudentModel(StudentConfig(distilbert)), config).distill(table(), table(), args=QUICK)
    assert done.student.config.id2label == {0: "ham", 1: "spam"}


def test_train_false_only_warns(bert: str, distilbert: str) -> None:
    teacher = TeacherModel(TeacherConfig(bert, train=False))
    done = Distiller(teacher, StudentModel(StudentConfig(distilbert))).distill(table(), table(), args=QUICK)
    assert done.run.recipe.teacher is not None
    assert done.run.recipe.teacher.train is None
    assert any("teaches noise" in note for note in done.metrics.notes)


@pytest.mark.parametrize(
    ("cache", "epochs", "is_kept"),
    [("auto", 2, True), ("auto", 1, False), (True, 1, True), (False, 2, False), ({"precision": "fp16"}, 2, True)],
)
def test_a_teachers_answers_are_kept_on_disk(
    judge: str, distilbert: str, tmp_path: Path, cache: Any, epochs: int, is_kept: bool
) -> None:
    config = DistillationConfig(label_names=["negative", "positive"], baseline=False)
    made = Distiller(TeacherModel(TeacherConfig(judge, cache=cache)), StudentModel(StudentConfig(distilbert)), config)
    done = made.distill(table(), table(), args={**QUICK, "epochs": epochs})
    assert (tmp_path / "cache/signals").exists() == is_kept
    found = [(event["found"], event["made"]) for event in done.run.folder.events() if event["event"] == "cache"]
    assert found == ([((epochs - 1) * len(ROWS), len(ROWS))] if is_kept else [])


def test_a_cache_that_there_is_not(judge: str, distilbert: str) -> None:
    teacher = TeacherModel(TeacherConfig(judge, cache={"top": 3}))
    with pytest.raises(RecipeError, match=r"teacher\.cache.*top"):
        Distiller(teacher, StudentModel(StudentConfig(distilbert))).distill(table(), table(), args=QUICK)


def test_train_takes_the_keys_of_a_recipe(bert: str, distilbert: str) -> None:
    teacher = TeacherModel(TeacherConfig(bert, train={"epochs": 2, "batch_size": 8}))
    done = Distiller(teacher, StudentModel(StudentConfig(distilbert))).distill(table(), table(), args=QUICK)
    assert done.run.recipe.teacher is not None
    assert done.run.recipe.teacher.train is not None
    assert done.run.recipe.teacher.train.epochs == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"alpha": 0.6}, {"soft": 0.6, "hard": 0.4}),
        ({"alpha": 0.6, "beta": 1.0}, {"soft": 0.6, "hard": 1.0}),
        ({"alpha": 1.0}, {"soft": 1.0, "hard": 0.0}),
    ],
)
def test_alpha_weighs_the_soft_and_beta_the_hard_loss(config: dict[str, float], expected: dict[str, float]) -> None:
    objective = DistillationConfig(**config).answers(labelled=True)
    assert {name: term["weight"] for name, term in objective.items()} == pytest.approx(expected)


def test_tokenised_data(bert: str, distilbert: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(distilbert)
    raw = table()
    ready = raw.map(lambda row: tokenizer(row["sentence"], padding="max_length", max_length=20), batched=True)
    ready = ready.remove_columns("sentence").rename_column("label", "labels")
    ready.set_format("torch")
    tokens = distiller(bert, distilbert, seed=3).distill(ready, ready, args=QUICK, output="tokens")
    texts = distiller(bert, distilbert, seed=3).distill(raw, raw, args=QUICK, output="texts")
    tokens_, texts_ = (done.metrics.models["distilled"].metrics["accuracy"].value for done in (tokens, texts))
    assert tokens_ == texts_
    one, two = (done.student.state_dict() for done in (tokens, texts))
    assert all((one[name] == two[name]).all() for name in one)


def test_pairs_are_found_by_their_names(bert: str, distilbert: str) -> None:
    pairs = Dataset.from_dict(
        {
            "premise": [text for text, _ in ROWS],
            "hypothesis": [text for text, _ in reversed(ROWS)],
            "label": [grade for _, grade in ROWS],
        }
    )
    teacher = TeacherModel(TeacherConfig(bert, task_type="nli"))
    student = StudentModel(StudentConfig(distilbert, task_type="nli"))
    done = Distiller(teacher, student).distill(pairs, args=QUICK)
    assert done.run.recipe.task.options["text"] == "premise"
    assert done.run.recipe.task.options["pair"] == "hypothesis"
    assert done.metrics.samples == round(0.2 * len(ROWS)) or done.metrics.samples == len(ROWS) // 5


def test_columns_in_doubt_are_asked_for(bert: str, distilbert: str) -> None:
    doubtful = Dataset.from_dict({"a": ["x", "y"], "b": ["x", "y"], "label": [0, 1]})
    with pytest.raises(DataError, match=r"DistillationConfig\(text=…\)"):
        distiller(bert, distilbert).distill(doubtful)


def test_a_student_cut_from_its_teacher(judge: str) -> None:
    student = StudentModel(StudentConfig(keep_blocks=[0, 2], block_weights="finetuned"))
    config = DistillationConfig(label_names=["negative", "positive"])
    done = Distiller(TeacherModel(TeacherConfig(judge)), student, config).distill(table(), table(), args=QUICK)
    assert done.student.config.num_hidden_layers == 2
    assert torch.equal(flat(done.run.student()), flat(cut(done.run.load("teacher"), [0, 2])))


def test_features_add_terms(judge: str, distilbert: str) -> None:
    config = {"distillation_type": "feature", "features": {"hidden.2": "hidden.4"}, "feature_weight": 0.5}
    made = distiller(judge, distilbert, label_names=["negative", "positive"], **config)
    done = made.distill(table(), table(), args=QUICK)
    assert weights(done)["feature_0"] == 0.5
    with pytest.raises(TrainingError, match="needs feature_distillation"):
        distiller(judge, distilbert, distillation_type="feature").distill(table(), args=QUICK)


def test_without_labels_the_teacher_alone_teaches(judge: str, distilbert: str) -> None:
    config = {"label_names": ["negative", "positive"]}
    unlabelled = table().remove_columns("label")
    done = distiller(judge, distilbert, **config).distill(unlabelled, table(), args=QUICK)
    assert weights(done) == {"soft": 0.7}
    assert list(done.metrics.models) == ["teacher", "distilled"]


def test_training_arguments_are_taken_over(judge: str, distilbert: str, tmp_path: Path) -> None:
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "mine"),
        num_train_epochs=1,
        per_device_train_batch_size=24,
        learning_rate=1e-3,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        use_cpu=True,
    )
    config = {"label_names": ["negative", "positive"]}
    done = distiller(judge, distilbert, **config).distill(table(), table(), args=args)
    train = done.run.recipe.train
    assert (train.epochs, train.batch_size, train.learning_rate, train.scheduler) == (1, 24, 1e-3, "cosine")
    assert train.options["gradient_accumulation_steps"] == 2
    assert done.folder == tmp_path / "mine"


def test_label_smoothing_is_refused_with_what_to_say(judge: str, distilbert: str) -> None:
    args = transformers.TrainingArguments(output_dir="x", label_smoothing_factor=0.1)
    with pytest.raises(RecipeError, match=r"objective\.hard\.label_smoothing"):
        distiller(judge, distilbert).distill(table(), args=args)


def test_the_same_call_goes_on_and_other_data_are_another_run(judge: str, distilbert: str) -> None:
    config = {"label_names": ["negative", "positive"]}
    first = distiller(judge, distilbert, **config).distill(table(), table(), args=QUICK)
    again = distiller(judge, distilbert, **config).distill(table(), table(), args=QUICK)
    fewer = distiller(judge, distilbert, **config).distill(table().select(range(32)), table(), args=QUICK)
    assert again.folder == first.folder != fewer.folder
    trained = [event for event in again.run.folder.events() if event["event"] == "training"]
    assert len(trained) == 2  # baseline and student, once each


def test_what_the_run_was_given_is_said_where_it_is_gone(judge: str, distilbert: str) -> None:
    done = distiller(judge, distilbert, label_names=["negative", "positive"]).distill(table(), table(), args=QUICK)
    with pytest.raises(DataError, match=r"given in Python"):
        open_run(done.folder).evaluate()


def test_num_labels_is_compared_with_the_data(bert: str, distilbert: str) -> None:
    teacher = TeacherModel(TeacherConfig(bert, num_labels=3))
    with pytest.raises(TaskError, match="num_labels=3, and the data have 2 classes"):
        Distiller(teacher, StudentModel(StudentConfig(distilbert))).distill(table())


def test_task_types_agree_and_exist(bert: str, distilbert: str) -> None:
    with pytest.raises(TaskError, match="one task_type"):
        Distiller(TeacherModel(TeacherConfig(bert, "nli")), StudentModel(StudentConfig(distilbert)))
    with pytest.raises(TaskError, match="there is no task 'clasification'; did you mean 'classification'"):
        Distiller(
            TeacherModel(TeacherConfig(bert, "clasification")), StudentModel(StudentConfig(distilbert, "clasification"))
        )


def test_other_names_are_another_run(judge: str, distilbert: str) -> None:
    """Else the labels of a finished run would hide that the teacher's are in another order."""
    done = distiller(judge, distilbert, label_names=["negative", "positive"]).distill(
        table(), table(), args=QUICK, output="x"
    )
    assert done.run.recipe.data.labels == ["negative", "positive"]
    with pytest.raises(TaskError, match="order differs"):
        distiller(judge, distilbert, label_names=["positive", "negative"]).distill(
            table(), table(), args=QUICK, output="y"
        )


def test_a_seed_in_the_arguments_is_said_to_do_nothing(
    judge: str, distilbert: str, caplog: pytest.LogCaptureFixture
) -> None:
    args = transformers.TrainingArguments(output_dir="x", num_train_epochs=1, seed=9, use_cpu=True)
    made = distiller(judge, distilbert, label_names=["negative", "positive"], baseline=False)
    assert made.distill(table(), table(), args=args).run.recipe.seed == 0
    assert "DistillationConfig(seed=9)" in caplog.text


def test_a_student_is_named_or_cut() -> None:
    with pytest.raises(TrainingError, match="takes no kwargs"):
        StudentModel(StudentConfig(keep_blocks=[0], kwargs={"num_hidden_layers": 1}))
    with pytest.raises(TrainingError, match="either model_name_or_path or keep_blocks"):
        StudentModel(StudentConfig())


def test_models_can_be_looked_at_before(bert: str) -> None:
    model = TeacherModel(TeacherConfig(bert, num_labels=3)).model
    assert model.config.num_labels == 3


def test_images(folder: Path, tmp_path: Path) -> None:
    """A teacher of transformers and a student of timm, each with the pixels that it wants."""
    pytest.importorskip("timm")
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(24)]
    features = Features({"picture": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    data = Dataset.from_dict({"picture": pictures, "label": [0, 1] * 12}, features)
    vit = str(local_models.vit(folder / "vit", head=["cat", "dog"]))
    student = StudentModel(StudentConfig("timm:test_vit", pretrained=False, num_labels=2))
    done = Distiller(TeacherModel(TeacherConfig(vit)), student).distill(data, data, args=QUICK)
    assert done.run.recipe.task.name == "image-classification"
    assert done.metrics.samples == 24
    assert TeacherModel(TeacherConfig(vit, num_labels=2)).model.config.num_labels == 2
    assert student.model.num_classes == 2


@pytest.mark.parametrize("kind", ["dictionary", "rows", "frame"])
def test_other_kinds_of_tables(judge: str, distilbert: str, kind: str) -> None:
    raw = table()
    data: Any = {"dictionary": raw.to_dict, "rows": raw.to_list, "frame": raw.to_pandas}[kind]()
    done = distiller(judge, distilbert, label_names=["negative", "positive"], baseline=False).distill(
        data, data, args=QUICK
    )
    assert done.metrics.samples == len(ROWS)


def test_something_else_than_a_table(judge: str, distilbert: str) -> None:
    with pytest.raises(DataError, match=r"expected the train data as datasets\.Dataset"):
        distiller(judge, distilbert).distill(5)
