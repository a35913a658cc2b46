"""Tables: what becomes of numbers, categories, missing values and labels."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from potstill.errors import TaskError
from potstill.tasks.tabular_classification import TabularClassification


def table(labels=(0, 1, 0, -1), **columns) -> Dataset:
    size = len(next(iter(columns.values())))
    made = Dataset.from_dict({**columns, "sample_id": [10 + i for i in range(size)]})
    if labels is None:
        return made
    classes = [None if each is None else each for each in labels][:size]
    return made.add_column("label", classes, feature=ClassLabel(names=["no", "yes"]))


def fitted(train: Dataset, **options) -> TabularClassification:
    task = TabularClassification(**options)
    task.fit(train)
    return task


def features(task: TabularClassification, rows: Dataset) -> np.ndarray:
    data = task.dataset(rows, training=False, seed=0)
    return data.__getitems__(list(range(len(data))))["features"].numpy()


def test_numbers_are_standardised_by_the_training_split():
    """With the statistics of the test split itself, the model sees other numbers than it was trained on."""
    train = table(x=[1.0, 2.0, 3.0, 6.0], n=[10, 20, 30, 40])
    task = fitted(train)
    x = (np.array([1, 2, 3, 6]) - 3) / math.sqrt(3.5)
    n = (np.array([10, 20, 30, 40]) - 25) / math.sqrt(125)
    np.testing.assert_allclose(features(task, train), np.stack([x, n], 1), rtol=1e-6)
    test = table(x=[3.0, 13.0], n=[25, 0])
    np.testing.assert_allclose(features(task, test), [[0, 0], [10 / math.sqrt(3.5), -25 / math.sqrt(125)]], rtol=1e-6)


def test_a_constant_column_stays_finite():
    assert features(fitted(table(x=[5.0] * 4, y=[1.0, 2, 3, 4])), table(x=[5.0, 7.0], y=[2.5, 2.5])).tolist() == [
        [0, 0],
        [2, 0],
    ]


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_missing_and_infinite_numbers_become_the_mean(missing):
    """One infinity makes mean and deviation infinite, and the whole column would silently turn into zeros."""
    train = table(x=[1.0, missing, 3.0, 5.0])
    task = fitted(train)
    assert task.columns["x"] == pytest.approx({"mean": 3.0, "std": math.sqrt(8 / 3)})
    found = features(task, train)[:, 0]
    np.testing.assert_allclose(found, np.array([-2, 0, 0, 2]) / math.sqrt(8 / 3), rtol=1e-6)
    assert features(task, table(x=[missing, 3.0])).tolist() == [[0], [0]]


def test_missing_whole_numbers():
    rows = Dataset.from_dict(
        {"x": [1, None, 3], "sample_id": [0, 1, 2]},
        features=Features({"x": Value("int32"), "sample_id": Value("int64")}),
    )
    np.testing.assert_allclose(features(fitted(rows), rows)[:, 0], [-1, 0, 1])


def test_categories_become_columns_in_alphabetical_order():
    train = table(c=["b", "a", "c", "a"])
    task = fitted(train)
    assert task.columns["c"] == {"categories": ["a", "b", "c"]}
    assert features(task, train).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]


def test_unknown_and_missing_categories_are_all_zeros():
    """A new category must not be taken for a known one, nor shift the columns behind it."""
    task = fitted(table(c=["b", "a", "b", "a"], x=[1.0, 2, 3, 4]))
    found = features(task, table(c=["a", "z", None], x=[2.5, 2.5, 2.5]))
    assert found.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_the_text_none_is_not_a_missing_value():
    train = table(c=["None", "some", None, "None"])
    assert features(fitted(train), train).tolist() == [[1, 0], [0, 1], [0, 0], [1, 0]]


def test_class_labels_and_booleans_are_categories():
    names = ["low", "mid", "high"]
    rows = Dataset.from_dict({"b": [True, False, True], "sample_id": [0, 1, 2]})
    rows = rows.add_column("c", [2, None, 0], feature=ClassLabel(names=names))
    task = fitted(rows)
    assert task.columns == {"b": {"categories": ["False", "True"]}, "c": {"categories": names}}
    assert features(task, rows).tolist() == [[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0]]


def test_class_labels_are_matched_by_name():
    """Another split may number the same categories in another order."""
    rows = Dataset.from_dict({"sample_id": [0, 1]}).add_column("c", [0, 1], feature=ClassLabel(names=["x", "y"]))
    other = Dataset.from_dict({"sample_id": [0, 1]}).add_column("c", [0, 1], feature=ClassLabel(names=["y", "x"]))
    task = fitted(rows)
    assert features(task, other).tolist() == features(task, rows)[::-1].tolist()


def test_labels_and_ids():
    rows = table(labels=(0, 1, -1, None), x=[1.0, 2, 3, 4])
    data = fitted(rows).dataset(rows, training=True, seed=0)
    batch = data.__getitems__([3, 0, 2, 1])
    assert batch["labels"].tolist() == [-100, 0, -100, 1]
    assert batch["sample_id"].tolist() == [13, 10, 12, 11]
    assert batch["labels"].dtype == batch["sample_id"].dtype == torch.int64
    assert batch["features"].dtype == torch.float32


def test_a_transfer_set_has_no_labels():
    """Its ids must not be learnt as a feature either."""
    rows = table(labels=None, x=[1.0, 2.0, 4.0])
    task = fitted(rows)
    data = task.dataset(rows, training=True, seed=0)
    assert set(data.__getitems__([0, 1])) == {"sample_id", "features"}
    assert list(task.columns) == ["x"]
    assert task.label_names == []


def test_label_and_id_are_no_features():
    task = fitted(table(x=[1.0, 2, 3, 4], c=["a", "b", "a", "b"]))
    assert list(task.columns) == ["x", "c"]
    assert task.facts() == {"num_labels": 2, "in_features": 3}


def test_chosen_features_in_their_order():
    task = fitted(table(x=[1.0, 2, 3, 4], y=[1.0, 2, 3, 4], z=[0.0, 0, 0, 1]), features=["z", "x"])
    assert list(task.columns) == ["z", "x"]


def test_a_label_of_another_name():
    rows = table(x=[1.0, 2, 3, 4]).rename_column("label", "sick")
    task = fitted(rows, label="sick")
    assert task.label_names == ["no", "yes"]
    assert "labels" in task.dataset(rows, training=True, seed=0).columns


def test_settings_go_through_json():
    """What is saved with a model must give the same numbers months later, without the training split."""
    train = table(x=[1.0, None, 3.0, 7.0], c=["b", "a", "ü", "a"], n=[1, 2, 3, 5])
    task = fitted(train)
    again = TabularClassification()
    again.restore(json.loads(json.dumps(task.settings())))
    test = table(x=[2.0, None], c=["ü", "q"], n=[4, 4], labels=(1, 0))
    assert np.array_equal(features(again, test), features(task, test))
    assert again.facts() == task.facts()
    assert again.settings() == task.settings()
    data = again.dataset(test, training=False, seed=0)
    assert data.columns["labels"].tolist() == [1, 0]


def test_example_inputs_fit_the_model():
    task = fitted(table(x=[1.0, 2, 3, 4], c=["a", "b", "c", "a"]))
    assert task.example_inputs(3)["features"].shape == (3, 4)
    assert torch.equal(task.example_inputs(3)["features"], task.example_inputs(3)["features"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ["ages"]}, "there is no column 'ages'; did you mean 'age'"),
        ({"features": ["age", "label"]}, "beside the label 'label'"),
        ({"features": ["words"]}, "'words' to hold numbers or categories"),
        ({"label": "age"}, "'age' to hold classes"),
    ],
)
def test_mistakes(options, message):
    rows = table(age=[1.0, 2, 3, 4], words=[["a"], ["b"], ["c"], ["d"]])
    with pytest.raises(TaskError, match=message):
        fitted(rows, **options)


def test_a_table_of_labels_alone():
    with pytest.raises(TaskError, match="expected feature columns"):
        fitted(table(x=[1.0, 2, 3, 4]).remove_columns("x"))


def test_a_split_that_lacks_a_column_names_it():
    task = fitted(table(x=[1.0, 2, 3, 4], y=[1.0, 2, 3, 4]))
    with pytest.raises(TaskError, match="there is no column 'y'"):
        task.dataset(table(x=[1.0]), training=False, seed=0)


def test_noise_is_for_training_alone():
    rows = table(x=[1.0, 2, 3, 4], y=[4.0, 3, 2, 1])
    task = fitted(rows, augment=[{"noise": {"std": 0.5}}])
    plain, noisy = task.dataset(rows, training=False, seed=0), task.dataset(rows, training=True, seed=0)
    every = [0, 1, 2, 3]
    assert torch.equal(plain.__getitems__(every)["features"], plain.columns["features"])
    change = noisy.__getitems__(every)["features"] - plain.__getitems__(every)["features"]
    assert (change != 0).all()
    assert change.std() == pytest.approx(0.5, rel=0.7)


def test_noise_is_a_function_of_seed_epoch_and_id():
    """A run that is resumed, or a batch in another order, must see the same views; another epoch must not."""
    rows = table(x=[1.0, 2, 3, 4], y=[4.0, 3, 2, 1])
    task = fitted(rows, augment=[{"noise": {"std": 0.5}}])
    data = task.dataset(rows, training=True, seed=7)
    whole = data.__getitems__([0, 1, 2, 3])["features"]
    assert torch.equal(data.__getitems__([2, 0])["features"], whole[[2, 0]])
    assert torch.equal(data[3]["features"], whole[3])
    data.set_epoch(1)
    assert (data.__getitems__([0, 1, 2, 3])["features"] != whole).all()
    data.set_epoch(0)
    assert torch.equal(data.__getitems__([0, 1, 2, 3])["features"], whole)
    shuffled = task.dataset(rows.select([3, 1]), training=True, seed=7)  # the same ids in another table
    assert torch.equal(shuffled.__getitems__([0, 1])["features"], whole[[3, 1]])
    assert (task.dataset(rows, training=True, seed=8).__getitems__([0, 1, 2, 3])["features"] != whole).all()


def test_what_a_person_sees_of_a_row():
    train = table(x=[1.0, 2.5, None, 4.0], kind=["a", "b", None, "a"], n=[1, 2, 3, 4])
    seen = fitted(train).show(train, [1, 2])
    assert [[(part["name"], part["value"]) for part in row] for row in seen] == [
        [("x", "2.5"), ("kind", "b"), ("n", "2")],
        [("x", "–"), ("kind", "–"), ("n", "3")],
    ]
    assert {part["kind"] for row in seen for part in row} == {"number"}


def test_classes_are_shown_by_their_names():
    rows = Dataset.from_dict(
        {"c": [1, 0], "sample_id": [0, 1]},
        features=Features({"c": ClassLabel(names=["red", "blue"]), "sample_id": Value("int64")}),
    )
    assert [row[0]["value"] for row in fitted(rows).show(rows, [0, 1])] == ["blue", "red"]
