"""Several tasks in one model: exactly what a head for each of them would learn, say and be judged by."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from scipy.special import log_softmax, softmax
from sklearn.metrics import f1_score
from torch.nn import functional as F
from transformers import TrainingArguments

from potstill.data.load import splits_from
from potstill.data.mixing import from_tasks, join_splits
from potstill.data.splits import Splits
from potstill.errors import ObjectiveError, TaskError
from potstill.evaluation.metrics import calibrate, compare, estimate
from potstill.evaluation.predict import Predictions, predict
from potstill.interfaces import Progress
from potstill.losses.objective import Objective, Term
from potstill.losses.ramps import as_number
from potstill.models.load import Blueprint
from potstill.models.origins import TextProcessor
from potstill.registry import tasks
from potstill.tasks.multi_task import FOREIGN, MultiTask, per_task_terms
from potstill.tasks.text_classification import TextClassification
from potstill.training.trainer import DistillationTrainer, ready_batch
from tests.local_models import SENTENCES, bert, roberta_tokenizer, word_pieces

TASKS = {
    "mood": {"name": "text-classification", "text": "line"},
    "nli": {"name": "text-classification", "text": "line", "pair": "claim", "label": "gold", "max_length": 12},
}
LINES = [text for text, _ in SENTENCES]
MOODS = [label for _, label in SENTENCES]
PROGRESS = Progress()
GOLD = [2, 0, 1, -1, 2, 1]


def mood() -> Dataset:
    return Dataset.from_dict({"line": LINES, "label": MOODS}).cast_column("label", ClassLabel(names=["sad", "glad"]))


def nli() -> Dataset:
    rows = {"line": LINES[:6], "claim": LINES[2:], "gold": GOLD}
    kinds = {"line": Value("string"), "claim": Value("string"), "gold": ClassLabel(names=["yes", "no", "maybe"])}
    return Dataset.from_dict(rows, features=Features(kinds))


def sorted_(table: Dataset) -> Dataset:
    """The same rows task after task, for the slices of these tests."""
    table = table.select(np.argsort(table["task"][:], kind="stable")).remove_columns("sample_id")
    return table.add_column("sample_id", list(range(len(table))))


def rows() -> Dataset:
    return sorted_(join_splits({"mood": Splits(mood()), "nli": Splits(nli())}, labels={"nli": "gold"}).train)


def fitted(table: Dataset | None = None, teachers=None, **options) -> MultiTask:
    task = MultiTask(**{"tasks": TASKS, **options})
    task.fit(rows() if table is None else table)
    task.prepare(TextProcessor(word_pieces()), teachers or {})
    return task


def everything(task: MultiTask, table: Dataset | None = None):
    made = task.dataset(rows() if table is None else table, training=False, seed=0)
    return made.__getitems__(range(len(made)))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = bert(tmp_path_factory.mktemp("student"), layers=1)
    model = Blueprint(str(folder)).build(fitted().facts(), seed=3)
    with torch.no_grad():
        model.classifier.weight.mul_(40)  # of random ones all answers are alike
    return model.eval()


# what is learned


@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "soft_cross_entropy", "dkd", "jsd"])
def test_one_output_layer_is_a_head_for_each_task(student, loss):
    """Losses and the gradients of every weight are those of two heads on one encoder, each on its own samples."""
    task, table = fitted(), rows()
    batch = everything(task)
    taught = torch.randn(len(table), 5, generator=torch.Generator().manual_seed(1))
    teacher = task.forward(fixed(taught), batch)
    student.zero_grad()
    objective = Objective({"soft": Term(loss, weight=0.7, temperature=3.0), "hard": Term("cross_entropy", weight=0.3)})
    said = task.forward(student, batch)
    total = objective(said, teacher, batch).total
    total.backward()
    joint = {name: p.grad.clone() for name, p in student.named_parameters()}

    student.zero_grad()
    expected = torch.zeros(())
    for start, count, chosen in ((0, 2, slice(0, 8)), (2, 3, slice(8, 14))):
        inputs = {name: batch[name][chosen] for name in ("input_ids", "attention_mask", "token_type_ids")}
        hidden = student.dropout(student.bert(**inputs).pooler_output)
        head = student.classifier
        logits = F.linear(hidden, head.weight[start : start + count], head.bias[start : start + count])
        labels = batch["labels"][chosen] - start
        labels[batch["labels"][chosen] == -100] = -100
        own = {"logits": taught[chosen, start : start + count]}
        if loss in ("kl", "reverse_kl", "soft_cross_entropy", "jsd"):
            soft = 9.0 * by_hand(loss, logits / 3.0, own["logits"] / 3.0).sum()
        else:
            known = labels != -100  # without a label there is no class to decouple
            soft = (
                Term(loss, temperature=3.0).values({"logits": logits}, own, {"labels": labels}, PROGRESS)[known].sum()
            )
        hard = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        expected = expected + 0.7 * soft / (13 if loss == "dkd" else 14) + 0.3 * hard / 13
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in student.named_parameters():
        assert torch.allclose(joint[name], p.grad, rtol=1e-4, atol=1e-6), name
    assert joint["classifier.weight"].abs().max() > 1e-3


def fixed(logits: torch.Tensor) -> torch.nn.Module:
    class Fixed(torch.nn.Module):
        def forward(self, input_ids):
            return logits

    return Fixed()


def by_hand(loss: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Divergences of logits that are divided by the temperature already, without T²."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    if loss == "soft_cross_entropy":
        return -(p * q.log()).sum(-1)
    if loss == "jsd":
        middle = (p + q) / 2
        return ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2
    return (q * (q / p).log()).sum(-1) if loss == "reverse_kl" else (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_classes_of_other_tasks_have_no_probability(dtype, temperature):
    task = fitted()
    raw = torch.randn(14, 5, generator=torch.Generator().manual_seed(0)) * 30
    logits = task.forward(fixed(raw.to(dtype)), everything(task))["logits"]
    shares = (logits.float() / temperature).softmax(-1)
    assert logits.dtype == dtype
    assert float(shares[:8, 2:].max()) == float(shares[8:, :2].max()) == 0
    assert torch.equal(logits[:8, :2], raw.to(dtype)[:8, :2])


def test_a_model_of_one_task_is_left_as_it_is():
    task = fitted()
    assert float(task.forward(fixed(torch.zeros(14, 3)), everything(task))["logits"].abs().max()) == 0


def test_a_batch_must_say_whose_its_samples_are():
    task = fitted()
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    with pytest.raises(TaskError, match="no entry 'task'"):
        task.forward(fixed(torch.zeros(2, 5)), batch)


# terms


def test_a_weight_for_each_task(student):
    """Each task's term is the mean over its own samples, without those that have no label."""
    task = fitted()
    batch = everything(task)
    terms = {
        "soft": {"loss": "kl", "temperature": 2.0, "weight": 0.5},
        "hard": {"loss": "cross_entropy"},
        "hint": {"loss": "mse", "student": "hidden.1", "teacher": "hidden.1", "weight": 0.1},
    }
    made = per_task_terms(terms, {"mood": 1.0, "nli": 3.0})
    assert set(made) == {"soft_mood", "soft_nli", "hard_mood", "hard_nli", "hint"}
    assert made["hint"] == terms["hint"]
    objective = Objective({name: Term(**spec) for name, spec in made.items() if name != "hint"})
    taught = torch.randn(14, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        said = task.forward(student, batch)["logits"]
    found = objective({"logits": said}, task.forward(fixed(taught), batch), batch)
    expected = 0.0
    for factor, start, count, chosen in ((1.0, 0, 2, slice(0, 8)), (3.0, 2, 3, slice(8, 14))):
        own = said[chosen, start : start + count].double().numpy()
        other = taught[chosen, start : start + count].double().numpy()
        gap = softmax(other / 2, -1) * (log_softmax(other / 2, -1) - log_softmax(own / 2, -1))
        labels = np.array(MOODS if start == 0 else GOLD)
        hard = -log_softmax(own, -1)[np.arange(len(labels)), labels][labels >= 0].mean()
        expected += factor * (0.5 * 4 * gap.sum(-1).mean() + hard)
    assert float(found.total) == pytest.approx(expected, rel=1e-5)


def test_weights_that_change_or_are_none():
    ramp = {"from": 1.0, "to": 0.5, "shape": "cosine"}
    made = per_task_terms({"soft": {"loss": "kl", "weight": ramp}}, {"a": 0, "b": 4.0})
    assert set(made) == {"soft_b"}
    assert as_number(made["soft_b"]["weight"]) == as_number({"from": 4.0, "to": 2.0, "shape": "cosine"})
    assert made["soft_b"]["mask"] == "task/b"
    published = per_task_terms({"soft": {"loss": "nkd"}}, {"a": 2.0})["soft_a"]
    assert Term(**published).weight == 2 * Term("nkd").weight
    assert published["mask"] == "task/a/labelled"  # it compares with labels too
    with pytest.raises(ObjectiveError, match=r"objective\.soft has the mask 'attention_mask'"):
        per_task_terms({"soft": {"loss": "kl", "mask": "attention_mask"}}, {"a": 1.0})
    with pytest.raises(ObjectiveError, match="cannot be multiplied"):
        per_task_terms({"soft": {"loss": "kl", "weight": {"schedule": "a.b:c"}}}, {"a": 1.0})


@pytest.mark.parametrize(
    ("loss", "options", "fits"),
    [
        ("kl", {"temperature": 20.0}, True),
        ("cross_entropy", {}, True),
        ("cross_entropy", {"label_smoothing": 0.1}, False),
        ("dkd", {}, True),
        ("mse", {}, True),
        ("cosine", {}, False),
        ("kl_standardized", {}, False),
        ("virtual_teacher", {}, False),
        ("dist", {}, False),
    ],
)
def test_losses_that_mix_the_classes_of_tasks(loss, options, fits):
    task = fitted()
    objective = Objective({"it": Term(loss, **options), "hint": Term("cosine", "hidden.1", "hidden.1")})
    if fits:
        task.check_objective(objective)
    else:
        with pytest.raises(ObjectiveError, match=f"objective.it: {loss} compares the classes of all tasks"):
            task.check_objective(objective)


# the batches


def test_texts_and_pairs_in_one_batch():
    """Each row has the tokens that its own task gives it, cut at its own length, padded to the longest of all."""
    tokenizer = word_pieces()
    batch = everything(fitted())
    texts, pairs = LINES + LINES[:6], [None] * 8 + LINES[2:]
    alone = [
        tokenizer(text, pair, truncation=True, max_length=128 if pair is None else 12)
        for text, pair in zip(texts, pairs, strict=True)
    ]
    width = max(len(each["input_ids"]) for each in alone)
    assert batch["input_ids"].shape == (14, width)
    for place, each in enumerate(alone):
        for name, numbers in each.items():
            assert batch[name][place].tolist() == numbers + [0] * (width - len(numbers))
    assert batch["labels"].tolist() == [*MOODS, *(label + 2 if label >= 0 else -100 for label in GOLD)]


def test_a_teacher_with_other_tokens():
    other = roberta_tokenizer()
    task = fitted(teachers={"teacher/two/": TextProcessor(other)})
    batch = task.dataset(rows(), training=True, seed=0).__getitems__([9, 3])
    alone = other(LINES[1], LINES[3], truncation=True, max_length=12)["input_ids"], other(LINES[3])["input_ids"]
    for place, numbers in enumerate(alone):
        got = batch["teacher/two/input_ids"][place].tolist()
        assert got == numbers + [other.pad_token_id] * (len(got) - len(numbers))
    assert other.pad_token_id == 1


@pytest.mark.parametrize(("sampling", "counts"), [("proportional", None), ("uniform", 7), (0.0, 7), (1.0, None)])
def test_the_sampling_is_that_of_the_training(sampling, counts):
    task = fitted(sampling=sampling)
    assert everything(task)["sample_id"].tolist() == list(range(14))
    made = task.dataset(rows(), training=True, seed=0)
    batch = made.__getitems__(range(14))
    assert int(batch["task/nli"].sum()) == (counts or 6)
    assert hasattr(made, "lengths") == (counts is None)
    assert len(set(batch["sample_id"].tolist())) == 14 - (counts is not None)  # the smaller task repeats one row


def test_a_training_that_is_resumed_comes_to_the_same_bits(student, tmp_path):
    """Stopped within an epoch whose rows are drawn: the next batch is the one that would have come."""
    task = fitted(sampling="uniform")

    def train(folder, resume=None):
        args = TrainingArguments(
            str(tmp_path / folder),
            num_train_epochs=3,
            per_device_train_batch_size=4,
            save_steps=6,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        )
        model = copy.deepcopy(student)
        DistillationTrainer(
            model=model,
            objective={"hard": Term("cross_entropy")},
            forward=task.forward,
            args=args,
            train_dataset=task.dataset(rows(), training=True, seed=0),
            data_collator=ready_batch,
        ).train(resume_from_checkpoint=resume)
        return {name: value.cpu() for name, value in model.state_dict().items()}

    whole = train("whole")
    resumed = train("resumed", str(tmp_path / "whole" / "checkpoint-6"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(whole["classifier.weight"], student.classifier.weight)


def test_augmentations_are_for_all_tasks():
    task = fitted(augment=[{"mask_words": {"p": 1.0}}])
    plain, seen = (task.dataset(rows(), training=training, seed=0).__getitems__([0, 9]) for training in (False, True))
    ids = word_pieces()
    assert (seen["input_ids"] == ids.mask_token_id).sum(-1).tolist() == [5, 5 + 3]
    assert not (plain["input_ids"] == ids.mask_token_id).any()
    assert seen["view"].tolist() == [0, 0]
    bare = copy.copy(task)
    bare.augment = []  # as `build.with_views` does
    assert not bare.dataset(rows(), training=True, seed=0).is_random


# what is said of the answers


def judged() -> tuple[MultiTask, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    labels = np.concatenate([draw.integers(0, 2, 60), 2 + draw.integers(0, 3, 40), np.full(5, -100)])
    logits = np.full((105, 5), FOREIGN, np.float32)
    logits[:60, :2], logits[60:, 2:] = draw.normal(size=(60, 2)), draw.normal(size=(45, 3))
    return fitted(), logits, labels


def test_metrics_of_each_task():
    task, logits, labels = judged()
    answers = task.answers(logits)
    found = task.metrics(answers, labels)
    one = float(np.mean(logits[:60, :2].argmax(-1) == labels[:60]))
    two = float(np.mean(logits[60:100, 2:].argmax(-1) == labels[60:100] - 2))
    assert found["mood/accuracy"] == pytest.approx(one)
    assert found["nli/accuracy"] == pytest.approx(two)
    assert found["mean"] == pytest.approx((one + two) / 2)  # not the share of all rows
    f1 = f1_score(labels[60:100], answers[60:100], average="macro")
    assert found["nli/f1_macro"] == pytest.approx(f1)
    assert task.primary == "mean"
    each = [np.bincount(labels[:60]).max() / 60, np.bincount(labels[60:100]).max() / 40]
    assert task.chance(labels) == pytest.approx(np.mean(each))


def test_metrics_where_a_task_has_no_samples():
    task, logits, labels = judged()
    assert set(task.metrics(task.answers(logits[:9]), labels[:9])) == {"mean", "mood/accuracy", "mood/f1_macro"}
    assert task.metrics(np.array([0, 1]), np.array([-100, -100])) == {}
    assert task.chance(np.array([-100])) == 0
    wrong = task.metrics(np.array([4, 4, 1]), np.array([0, 1, 3]))  # answers that are classes of another task
    assert (wrong["mood/accuracy"], wrong["nli/accuracy"]) == (0, 0)


def test_figures_with_intervals():
    """Resamples may lack a task; calibration is that of the heads."""
    task, logits, labels = judged()
    few = np.r_[0:60, 60]  # one sample of the second task: many resamples have none
    made = Predictions(logits[few], labels[few], few)
    assert estimate(task, made, resamples=100)["nli/accuracy"][0] in (0, 1)
    gain = compare(task, made, made, resamples=100)
    assert (gain["value"], gain["only_first"]) == (0, 0)
    every = Predictions(logits, labels, np.arange(105))
    heads = [softmax(logits[:60, :2].astype(float), -1), softmax(logits[60:100, 2:].astype(float), -1)]
    picked = [heads[0][np.arange(60), labels[:60]], heads[1][np.arange(40), labels[60:100] - 2]]
    found = calibrate(task, every, resamples=100)
    assert found["nll"] == pytest.approx(-np.mean(np.log(np.concatenate(picked))), rel=1e-6)


def test_predictions_are_masked(student):
    task = fitted()
    made = predict(student, task, task.dataset(rows(), training=False, seed=0), batch_size=4)
    assert (made.logits[:8, 2:] == FOREIGN).all()
    assert (made.logits[8:, :2] == FOREIGN).all()
    assert made.labels.tolist() == everything(task)["labels"].tolist()


# one task by itself


def test_one_task_by_itself():
    """A teacher of one task is trained as it would be without the others: same rows, classes and tokens."""
    task = fitted()
    part, table = task.part("nli"), task.part_table(rows(), "nli")
    assert table.features["gold"].names == part.label_names == ["yes", "no", "maybe"]
    assert table["gold"][:] == GOLD
    assert set(table.column_names) == {"line", "claim", "gold", "sample_id"}
    alone = TextClassification(text="line", pair="claim", label="gold", max_length=12)
    given = nli().add_column("sample_id", list(range(8, 14)))
    alone.fit(given)
    alone.prepare(TextProcessor(word_pieces()), {})
    one, other = (
        t.dataset(d, training=False, seed=0).__getitems__(range(6)) for t, d in ((part, table), (alone, given))
    )
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert part.facts() == alone.facts()
    part.check_labels(["yes", "no", "maybe"], "the teacher")
    with pytest.raises(TaskError, match="there is no task 'mod'; did you mean 'mood'"):
        task.part("mod")


def test_rows_without_labels():
    bare = {"mood": Splits(mood().remove_columns("label")), "nli": Splits(nli().remove_columns("gold"))}
    table = join_splits(bare).train
    task = fitted(table)
    assert task.label_names == []
    task.label_names = ["mood/sad", "mood/glad", "nli/yes", "nli/no", "nli/maybe"]  # as `build.fitted_task` does
    batch = everything(task, table)
    assert "labels" not in batch
    assert task.spans == {"mood": (0, 2), "nli": (2, 3)}
    assert task.part("nli").label_names == ["yes", "no", "maybe"]
    assert task.facts()["num_labels"] == 5


# what is told


def test_what_models_and_cards_are_told():
    task = fitted(sampling="sqrt")
    names = ["mood/sad", "mood/glad", "nli/yes", "nli/no", "nli/maybe"]
    assert task.facts() == {
        "num_labels": 5,
        "label_names": names,
        "auto_model": "AutoModelForSequenceClassification",
    }
    task.check_labels(names, "the teacher")
    with pytest.raises(TaskError, match="labels must agree"):
        task.check_labels(["yes", "no", "maybe"], "the teacher")
    again = MultiTask()
    again.restore(json.loads(json.dumps(task.settings())))
    again.prepare(TextProcessor(word_pieces()), {})
    assert again.settings() == task.settings()
    assert torch.equal(everything(again)["input_ids"], everything(task)["input_ids"])


def test_what_a_person_sees():
    shown = fitted().show(rows(), [9, 0])
    assert [[part["value"] for part in row] for row in shown] == [["nli", LINES[1], LINES[3]], ["mood", LINES[0]]]


def test_example_inputs_are_the_longest(student):
    task = fitted()
    inputs = task.example_inputs(2)
    assert inputs["input_ids"].shape == (2, 64)  # not the 12 of the pairs
    assert task.forward(student, inputs)["logits"].shape == (2, 5)


def test_the_order_is_that_of_the_table():
    task = fitted(tasks=dict(reversed(TASKS.items())))
    assert list(task.parts) == ["mood", "nli"]
    assert everything(task)["labels"].tolist()[:8] == MOODS


# other inputs


def test_images_of_two_tasks():
    def pictures(count, names, seed):
        draw = np.random.default_rng(seed)
        made = {"image": draw.normal(size=(count, 6, 6)).astype(np.float32), "label": np.arange(count) % len(names)}
        return Splits(Dataset.from_dict(made).cast_column("label", ClassLabel(names=names)))

    table = join_splits({"a": pictures(4, ["x", "y"], 0), "b": pictures(3, ["x", "y", "z"], 1)}).train
    table = sorted_(table)
    task = MultiTask(tasks={name: {"name": "image-classification"} for name in "ab"})
    task.fit(table)
    task.prepare(None, {})
    batch = task.dataset(table, training=False, seed=0).__getitems__([5, 0])
    alone = task.part("b").dataset(task.part_table(table, "b"), training=False, seed=0).__getitems__([1])
    assert torch.equal(batch["pixel_values"][:1], alone["pixel_values"])
    assert batch["labels"].tolist() == [3, 0]
    assert task.facts()["image_size"] == (6, 6)


def numbers(**columns) -> Splits:
    made = Dataset.from_dict({**columns, "label": [0, 1, 1]})
    return Splits(made.cast_column("label", ClassLabel(names=["x", "y"])))


def test_tables_of_two_tasks():
    spec = {"name": "tabular-classification"}
    table = join_splits({"a": numbers(u=[1.0, 2.0, 3.0]), "b": numbers(v=[9.0, 8.0, 7.0])}).train
    table = sorted_(table)
    task = MultiTask(tasks={"a": spec, "b": spec})
    task.fit(table)
    assert task.facts()["in_features"] == 1
    batch = task.dataset(table, training=False, seed=0).__getitems__([3, 0])
    assert batch["features"].flatten().tolist() == pytest.approx([1.2247, -1.2247], abs=1e-3)
    wide = join_splits({"a": numbers(u=[1.0, 2.0, 3.0]), "b": numbers(v=[9.0, 8.0, 7.0], w=[1.0, 0.0, 0.0])}).train
    with pytest.raises(TaskError, match="equally many features of every task, got: a 1, b 2"):
        MultiTask(tasks={"a": spec, "b": spec}).fit(wide)


# what cannot be


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            {"a": {"name": "text-classification"}, "b": {"name": "image-classification"}},
            r"kind.*a \(text\), b \(image\)",
        ),
        ({"a": {"name": "text-clasification"}}, r"task.tasks.a: .*did you mean 'text-classification'"),
        ({"a": {"name": "text-classification", "txt": "x"}}, r"task.tasks.a.txt: .*no option 'txt'.*'text'"),
        ({"a": {"text": "x"}}, "task.tasks.a: expected the `name` of a task"),
        ({"a": {"name": "multi-task"}}, "'multi-task' cannot be one of several tasks"),
        ({"a/b": {"name": "text-classification"}}, "a task cannot be called 'a/b'"),
        ({"a": {"name": "os:system"}}, "task.tasks.a: .*os"),
    ],
)
def test_tasks_that_cannot_be(specs, message):
    with pytest.raises(TaskError, match=message):
        MultiTask(tasks=specs)


def test_tasks_that_the_data_lack():
    with pytest.raises(TaskError, match=r"the recipe has no task 'mood', and the data have; did you mean 'mod'\?"):
        fitted(tasks={"mod": TASKS["mood"], "nli": TASKS["nli"]})
    with pytest.raises(TaskError, match="the data have no task 'x', and the recipe has"):
        fitted(tasks={**TASKS, "x": TASKS["mood"]})
    with pytest.raises(TaskError, match="expected a column 'task'"):
        fitted(mood())
    with pytest.raises(TaskError, match="needs `tasks:"):
        fitted(tasks={})
    with pytest.raises(TaskError, match="the task 'mood': there is no column 'lines'"):
        fitted(tasks={**TASKS, "mood": {**TASKS["mood"], "text": "lines"}})
    unnamed = join_splits({"mood": Splits(mood()), "nli": Splits(nli())}, classes={"nli": ["a"]}).train
    with pytest.raises(TaskError, match="say `label: gold` in the data of the task too"):
        fitted(unnamed)


def test_options_are_checked_as_those_of_any_task():
    found = tasks.check("multi-task", {"tasks": TASKS, "sampling": 2.0})
    assert [problem.path[:1] for problem in found] == [("sampling",)]
    assert tasks.check("multi-task", {"tasks": TASKS, "sampling": 0.3}) == []


# real data


def test_sentiment_and_inference(real_data, tmp_path):
    entries = {
        "sst2": {"source": "files", "path": str(real_data / "sst2"), "limit": {"train": 60, "test": 20}},
        "sick": {"source": "files", "path": str(real_data / "sick"), "limit": {"train": 40, "test": 20}},
    }
    for name in entries:
        if not (real_data / name).is_dir():
            pytest.skip(f"{real_data / name} is not there")
    splits = splits_from(dict(from_tasks(tasks=entries).splits), label="label")
    task = MultiTask(
        tasks={
            "sst2": {"name": "text-classification", "text": "sentence"},
            "sick": {"name": "text-classification", "text": "sentence_A", "pair": "sentence_B"},
        },
    )
    task.fit(splits.train)
    task.prepare(TextProcessor(word_pieces()), {})
    assert task.label_names[:2] == ["sst2/negative", "sst2/positive"]
    assert len(task.label_names) == 5
    model = Blueprint(str(bert(tmp_path, layers=1))).build(task.facts(), seed=0)
    made = predict(model, task, task.dataset(splits.test, training=False, seed=0))
    assert set(estimate(task, made, resamples=100)) >= {"mean", "sst2/accuracy", "sick/accuracy"}
