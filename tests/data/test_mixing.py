"""Several tasks in one table and one batch: whose each row is, its class among all, and how often it is seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch.utils.data import DataLoader

from potstill.data.batching import InMemory
from potstill.data.load import splits_from
from potstill.data.mixing import Mixed, Padding, drawn_rows, from_tasks, join_splits
from potstill.data.splits import Splits
from potstill.errors import DataError


def mood(count: int = 4, **more) -> Dataset:
    rows = {"text": [f"mood {i}" for i in range(count)], "label": [i % 2 for i in range(count)], **more}
    features = {name: Value("string") for name in rows} | {"label": ClassLabel(names=["sad", "glad"])}
    return Dataset.from_dict(rows, features=Features(features))


def pairs(labels=(2, 0, -1)) -> Dataset:
    rows = {"text": [f"pair {i}" for i in range(len(labels))], "gold": list(labels)}
    kinds = Features({"text": Value("string"), "gold": ClassLabel(names=["yes", "no", "maybe"])})
    return Dataset.from_dict(rows, features=kinds).add_column("sample_id", list(range(90, 90 + len(labels))))


# the table


def test_a_table_of_two_tasks():
    """Columns of one name stay apart, classes follow each other, and an unlabelled row stays unlabelled."""
    joined = join_splits(
        {"mood": Splits(mood(), test=mood(2), notes=["a"]), "nli": Splits(pairs(), validation=pairs((1,)))},
        labels={"nli": "gold"},
    )
    table = joined.train
    assert table.features["label"].names == ["mood/sad", "mood/glad", "nli/yes", "nli/no", "nli/maybe"]
    assert table.features["task"].names == ["mood", "nli"]
    assert table["task"][:] == [0, 1, 0, 1, 0, 1, 0]  # at 1/8, 1/6, 3/8, 3/6, 5/8, 5/6, 7/8 of the way
    assert table["label"][:] == [0, 4, 1, 2, 0, -1, 1]
    assert table["sample_id"][:] == list(range(7))
    assert table["mood.text"][:] == ["mood 0", None, "mood 1", None, "mood 2", None, "mood 3"]
    assert table["nli.text"][:] == [None, "pair 0", None, "pair 1", None, "pair 2", None]
    assert set(table.column_names) == {"mood.text", "nli.text", "task", "label", "sample_id"}
    assert joined.notes == ["mood: a"]
    assert (joined.validation["task"][:], joined.validation["label"][:]) == ([1], [3])  # numbers as in train
    assert joined.validation.features["task"].names == ["mood", "nli"]
    assert joined.test["label"][:] == [0, 1]


def test_tasks_without_labels():
    bare = Splits(mood().remove_columns("label"))
    assert "label" not in join_splits({"a": bare, "b": bare}).train.column_names
    with pytest.raises(DataError, match="the task 'b' has no classes, and others have"):
        join_splits({"a": Splits(mood()), "b": bare})
    joined = join_splits({"a": Splits(mood()), "b": bare}, classes={"b": ["x", "y"]})
    assert joined.train["label"][:] == [0, -1, 1, -1, 0, -1, 1, -1]
    with pytest.raises(DataError, match=r"label 'text' of the task 'a' to hold classes, got Value\('string'\)"):
        join_splits({"a": Splits(mood())}, labels={"a": "text"})


def written(folder: Path, name: str, rows: list[dict], kind: str = "jsonl") -> str:
    path = folder / f"{name}.{kind}"
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_each_entry_is_what_data_says(tmp_path):
    """Columns, label, limits and shares are each task's own; the seed is the recipe's where an entry has none."""
    one = written(tmp_path, "one", [{"sentence": f"s {i}", "score": "bg"[i % 2]} for i in range(40)], "csv")
    two = written(tmp_path, "two", [{"text": f"t {i}", "label": i % 3} for i in range(30)])
    entries = {
        "mood": {"source": "files", "path": one, "label": "score", "labels": ["g", "b"], "limit": {"train": 6}},
        "nli": {"source": "files", "path": two, "validation": 3, "test": 0.5, "columns": {"body": "text"}},
    }
    loaded = from_tasks(tasks=entries, seed=3)
    tables = loaded.splits
    counts = {name: np.bincount(table["task"][:]).tolist() for name, table in tables.items()}
    assert counts == {"train": [6, 12], "validation": [4, 3], "test": [8, 15]}
    assert tables["train"].features["label"].names == ["mood/g", "mood/b", "nli/0", "nli/1", "nli/2"]
    row = next(row for row in tables["test"] if row["task"] == 0)
    assert (row["mood.sentence"][:2], row["nli.body"]) == ("s ", None)
    assert int(row["mood.sentence"][2:]) % 2 == 1 - row["label"]  # b is the second class now
    assert all("mood: " in note or "nli: " in note for note in loaded.notes)
    again = from_tasks(tasks=entries, seed=3).splits["train"]
    other = from_tasks(tasks=entries, seed=4).splits["train"]
    assert again["mood.sentence"][:] == tables["train"]["mood.sentence"][:] != other["mood.sentence"][:]
    again = splits_from(dict(tables), label="label")  # what `load_splits` does with what a source gives
    assert again.train["sample_id"][:] == list(range(18))
    assert again.train["label"][:] == tables["train"]["label"][:]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"source": "files", "path": "nowhere"}, "the data of the task 'a': .*nowhere"),
        ({"source": "files", "path": "x", "limits": {}}, "the data of the task 'a' has no option 'limits'; .*'limit'"),
        ({"path": "x"}, "the data of the task 'a' needs the option 'source'"),
        ({"source": "my.code:rows"}, "'a' come from code of one's own .'my.code:rows'.*expected one of: .*files"),
        ({"source": "files", "path": "x", "allow_code": True}, "no option 'allow_code'"),
    ],
)
def test_data_that_cannot_be(entry, message):
    with pytest.raises(DataError, match=message):
        from_tasks(tasks={"a": entry})


def test_no_data():
    with pytest.raises(DataError, match="needs the data of at least one task"):
        from_tasks(tasks={})


# how often a row is seen


def test_how_many_rows_of_each_task():
    owner = np.repeat([0, 1, 2], [5, 3, 2])
    counts = {a: np.bincount(owner[drawn_rows(owner, a, seed=0, epoch=0)]).tolist() for a in (0, 0.5, 1)}
    # 10 · (√5, √3, √2) / 5.382 = 4.155, 3.218, 2.627, and the largest rest is rounded up; 10 / 3 each
    assert counts == {0: [4, 3, 3], 0.5: [4, 3, 3], 1: [5, 3, 2]}
    wide = np.repeat([0, 1], [900, 100])
    assert np.bincount(wide[drawn_rows(wide, 0.5, seed=0, epoch=7)]).tolist() == [750, 250]
    assert np.bincount(np.array([0, 2, 2])[drawn_rows(np.array([0, 2, 2]), 0, seed=0, epoch=0)]).tolist() == [2, 0, 1]


def test_all_rows_of_a_task_before_any_again():
    owner = np.array([1, 0, 0, 1, 0, 0, 0, 0, 0, 1])
    epochs = [drawn_rows(owner, 0, seed=5, epoch=epoch) for epoch in range(14)]
    for task in (0, 1):
        rows = np.flatnonzero(owner == task)
        walk = np.concatenate([epoch[owner[epoch] == task] for epoch in epochs])
        laps = [walk[start : start + len(rows)] for start in range(0, len(walk) - len(rows) + 1, len(rows))]
        assert len(laps) > 5
        assert all(sorted(lap) == rows.tolist() for lap in laps)
        assert len({tuple(lap) for lap in laps}) > 3  # another order each time


def test_rows_are_a_function_of_seed_and_epoch():
    owner = np.repeat([0, 1], [30, 10])
    first = drawn_rows(owner, 0.5, seed=1, epoch=3)
    np.random.seed(0)
    assert np.array_equal(first, drawn_rows(owner, 0.5, seed=1, epoch=3))
    assert not np.array_equal(first, drawn_rows(owner, 0.5, seed=1, epoch=4))
    assert not np.array_equal(first, drawn_rows(owner, 0.5, seed=2, epoch=3))


# batches


class Numbers(InMemory):
    """Rows that are told apart by what they hold: ``start + row``, as many times as the row's length says."""

    def __init__(self, ids, start, lengths, labels=None, **more):
        super().__init__({"sample_id": torch.tensor(ids), **({} if labels is None else {"labels": labels}), **more})
        self.start, self.lengths = start, np.asarray(lengths)

    def __getitems__(self, indices):
        batch = super().__getitems__(indices)
        width = int(self.lengths[indices].max())
        batch["input_ids"] = torch.full((len(indices), width), -7)
        for place, index in enumerate(indices):
            batch["input_ids"][place, : self.lengths[index]] = self.start + index
        return batch


def mixed(exponent=None, labels=True, left=False, **more) -> Mixed:
    """Rows 0, 2, 4 are of `a` (2 classes), rows 1 and 3 of `b` (3 classes)."""
    a = Numbers([0, 2, 4], 100, [1, 2, 3], torch.tensor([1, -100, 0]) if labels else None)
    b = Numbers([1, 3], 200, [5, 4], torch.tensor([2, 0]) if labels else None, **more)
    return Mixed(
        torch.arange(5),
        torch.tensor([0, 1, 0, 1, 0]),
        {"a": a, "b": b},
        starts={"a": 0, "b": 2},
        classes=5,
        padding={"input_ids": Padding(-7, left), "extra": Padding(9)},
        exponent=exponent,
    )


def test_rows_come_in_the_order_asked_for():
    batch = mixed().__getitems__([4, 1, 0, 3, 2])
    assert batch["sample_id"].tolist() == [4, 1, 0, 3, 2]
    assert batch["input_ids"].tolist() == [
        [102, 102, 102, -7, -7],
        [200] * 5,
        [100, -7, -7, -7, -7],
        [201, 201, 201, 201, -7],
        [101, 101, -7, -7, -7],
    ]
    assert batch["labels"].tolist() == [0, 4, 1, 2, -100]
    assert batch["task"].tolist() == [0, 1, 0, 1, 0]
    assert batch["task/a"].tolist() == [True, False, True, False, True]
    assert batch["task/b"].tolist() == [False, True, False, True, False]
    assert batch["task/a/labelled"].tolist() == [True, False, True, False, False]
    assert batch["task/b/labelled"].tolist() == [False, True, False, True, False]


def test_padding_on_the_left():
    batch = mixed(left=True).__getitems__([0, 1])
    assert batch["input_ids"].tolist() == [[-7, -7, -7, -7, 100], [200] * 5]


def test_a_batch_of_one_task():
    batch = mixed(labels=False).__getitems__([2, 0])
    assert batch["input_ids"].tolist() == [[101, 101], [100, -7]]
    assert not batch["task/b"].any()
    assert not {"labels", "task/a/labelled"} & set(batch)


def test_what_one_task_lacks_is_padding():
    batch = mixed(extra=torch.tensor([[1, 2], [3, 4]])).__getitems__([3, 0])
    assert batch["extra"].tolist() == [[3, 4], [9, 9]]


def test_labels_of_mixed_samples():
    shares = torch.tensor([[0.25, 0.75], [0.0, 0.0], [1.0, 0.0]])
    a = Numbers([0, 1, 2], 100, [1, 1, 1], shares)
    b = Numbers([3], 200, [1], torch.tensor([[0.0, 0.5, 0.5]]))
    made = Mixed(torch.arange(4), torch.tensor([0, 0, 0, 1]), {"a": a, "b": b}, starts={"a": 0, "b": 2}, classes=5)
    batch = made.__getitems__([3, 0, 1])
    assert batch["labels"].tolist() == [[0, 0, 0, 0.5, 0.5], [0.25, 0.75, 0, 0, 0], [0] * 5]
    assert batch["task/a/labelled"].tolist() == [False, True, False]


def test_tensors_that_do_not_stack():
    parts = {
        name: InMemory({"sample_id": torch.tensor([row]), "pixel_values": torch.zeros(1, 1, size, size)})
        for row, (name, size) in enumerate({"a": 8, "b": 6}.items())
    }
    made = Mixed(torch.arange(2), torch.tensor([0, 1]), parts, starts={"a": 0, "b": 1}, classes=2)
    with pytest.raises(DataError, match=r"'pixel_values' of different shapes, \[1, 6, 6\] and \[1, 8, 8\]"):
        made.__getitems__([0, 1])


def test_an_epoch_of_another_sampling():
    """The epoch decides the rows, lengths are left out, and going back to an epoch gives its rows again."""
    made = mixed(exponent=0.0)
    assert len(made) == 5
    assert not hasattr(made, "lengths")
    epochs = []
    for epoch in (0, 1, 2, 1):
        made.set_epoch(epoch)
        epochs.append(made.__getitems__(range(5))["sample_id"].tolist())
    assert epochs[1] == epochs[3]
    assert epochs[0] != epochs[1]
    owner = made.columns["task"].numpy()
    assert epochs[2] == drawn_rows(owner, 0.0, seed=0, epoch=2).tolist()


def test_a_worker_that_stays_sees_the_epoch():
    made = mixed(exponent=0.0)
    loader = DataLoader(made, 5, num_workers=1, persistent_workers=True, collate_fn=lambda batch: batch)
    for epoch in (0, 1, 2):
        made.set_epoch(epoch)
        seen = next(iter(loader))["sample_id"].tolist()
        assert seen == drawn_rows(made.columns["task"].numpy(), 0.0, seed=0, epoch=epoch).tolist()


def test_lengths_are_those_of_the_rows():
    assert mixed().lengths.tolist() == [1, 5, 2, 4, 3]


def test_views_and_epochs_reach_the_tasks():
    made = mixed()
    made.views = 2
    made.set_epoch(3)
    assert [(part.views, part.view_number) for part in made.parts.values()] == [(2, 1), (2, 1)]
    assert (made.views, made.view_number, made.is_random) == (2, 1, False)
    made.parts["b"].view = type("View", (), {"is_random": True})()
    assert made.is_random
