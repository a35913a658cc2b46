"""Soft labels from the table: what is read, in which forms, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from potstill.errors import ComponentError, DataError
from potstill.registry import teacher_sources
from potstill.teachers.column import Column, column
from potstill.teachers.context import SourceContext

NAMES = ["cat", "dog", "owl"]
SOFT = [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.1, 0.8, 0.1]]
ALL = {"sample_id": torch.tensor([2, 0, 1, 0])}


def source(table: Dataset | dict | None, names: list[str] = NAMES, **options: object) -> Column:
    table = Dataset.from_dict(table) if isinstance(table, dict) else table
    return column(SourceContext("people", table=table, label_names=names), **{"column": "soft", **options})


def said(table: Dataset | dict, names: list[str] = NAMES, **options: object) -> np.ndarray:
    """Probabilities of rows 2, 0, 1, 0."""
    logits = source(table, names, **options)(ALL)["logits"]
    assert logits.dtype == torch.float32
    return logits.softmax(-1).numpy()


def in_order(rows: list[list[float]]) -> np.ndarray:
    return np.array([rows[2], rows[0], rows[1], rows[0]])


class TestForms:
    def test_a_list_in_every_row(self):
        logits = source({"soft": SOFT})(ALL)["logits"].numpy()
        np.testing.assert_allclose(logits, np.log(np.clip(in_order(SOFT), 1e-6, None)), rtol=1e-5)
        assert logits[2, 1] == pytest.approx(math.log(1e-6))
        assert source({"soft": SOFT}, floor=0.01)(ALL)["logits"][2, 1].item() == pytest.approx(math.log(0.01))

    def test_a_column_for_each_class(self):
        table = {name: [row[place] for row in SOFT] for place, name in enumerate("abc")}
        np.testing.assert_allclose(said(table, column=["a", "b", "c"]), in_order(SOFT), atol=1e-5)
        turned = said(table, column=["c", "a", "b"])
        np.testing.assert_allclose(turned, in_order(SOFT)[:, [2, 0, 1]], atol=1e-5)

    def test_a_mapping_of_labels_to_numbers(self):
        """Its keys are in the order of the file, not of the classes."""
        table = {"soft": [{"owl": 0.5, "cat": 0.5}, {"dog": 1.0}, {"cat": 0.25, "dog": 0.75}]}
        expected = in_order([[0.5, 0, 0.5], [0, 1, 0], [0.25, 0.75, 0]])
        np.testing.assert_allclose(said(table), expected, atol=1e-5)
        counts = {"soft": [{"owl": 3, "cat": 1}, {"dog": 2}, {"cat": 1, "dog": 3}]}
        expected = in_order([[0.25, 0, 0.75], [0, 1, 0], [0.25, 0.75, 0]])
        np.testing.assert_allclose(said(counts, kind="votes"), expected, atol=1e-5)

    @pytest.mark.parametrize("form", ["names", "numbers", "classes"])
    def test_votes(self, form):
        votes = [["dog", "dog", "owl"], ["cat"], ["owl", "cat", "dog", "dog"]]
        counts = [[0, 2, 1], [1, 0, 0], [1, 2, 1]]
        table = Dataset.from_dict({"soft": votes})
        if form == "numbers":
            table = Dataset.from_dict({"soft": [[NAMES.index(vote) for vote in row] for row in votes]})
        if form == "classes":  # with numbers of its own
            own = ["owl", "cat", "dog"]
            features = Features({"soft": List(ClassLabel(names=own))})
            table = Dataset.from_dict({"soft": [[own.index(vote) for vote in row] for row in votes]}, features=features)
        options = {"kind": "votes"} if form == "numbers" else {}
        expected = np.array([[c / sum(row) for c in row] for row in counts])
        np.testing.assert_allclose(said(table, **options), in_order(expected.tolist()), atol=1e-5)
        smooth = np.array([[(c + 0.5) / (sum(row) + 1.5) for c in row] for row in counts])
        found = said(table, **options, smoothing=0.5)
        np.testing.assert_allclose(found, in_order(smooth.tolist()), atol=1e-5)

    @pytest.mark.parametrize("form", ["names", "numbers", "classes"])
    def test_hard_labels(self, form):
        table = Dataset.from_dict({"soft": ["owl", "cat", "dog"] if form == "names" else [2, 0, 1]})
        if form == "classes":
            own = ClassLabel(names=["cat", "owl", "dog"])
            table = Dataset.from_dict({"soft": [1, 0, 2]}, features=Features({"soft": own}))
        expected = in_order([[0, 0, 1], [1, 0, 0], [0, 1, 0]])
        np.testing.assert_allclose(said(table), expected, atol=1e-5)

    def test_logits_are_left_as_they_are(self):
        rows = [[-1.0, 2.0, 0.5], [3.0, 1.0, 0.0], [0.0, 0.0, -9.0]]
        for options in ({}, {"kind": "logits"}):
            np.testing.assert_allclose(source({"soft": rows}, **options)(ALL)["logits"].numpy(), in_order(rows))
        positive = [[1.0, 2.0, 0.5]] * 3
        assert source({"soft": positive}, kind="logits")(ALL)["logits"][0].tolist() == [1.0, 2.0, 0.5]

    def test_rounded_probabilities_are_taken(self):
        rounded = [[0.3333, 0.3333, 0.3333]] * 3
        np.testing.assert_allclose(said({"soft": rounded}).sum(1), 1, atol=1e-6)


class TestRows:
    def test_samples_are_found_by_their_id(self):
        """After a split the ids of the rows are no longer their places."""
        table = Dataset.from_dict({"soft": SOFT, "sample_id": [40, 7, 12]})
        logits = source(table)({"sample_id": torch.tensor([12, 40])})["logits"].exp()
        np.testing.assert_allclose(logits.numpy(), np.clip([SOFT[2], SOFT[0]], 1e-6, None), rtol=1e-4)
        with pytest.raises(DataError, match="no answer for the sample 8"):
            source(table)({"sample_id": torch.tensor([7, 8])})
        with pytest.raises(DataError, match="no answer for the sample 41"):
            source(table)({"sample_id": torch.tensor([41])})

    def test_chosen_rows_of_a_table(self):
        table = Dataset.from_dict({"soft": SOFT}).select([2, 0])
        logits = source(table)({"sample_id": torch.tensor([0, 1])})["logits"].exp()
        np.testing.assert_allclose(logits.numpy(), [SOFT[2], SOFT[0]], rtol=1e-4)

    def test_a_batch_without_ids(self):
        with pytest.raises(DataError, match="finds its answers by `sample_id`"):
            source({"soft": SOFT})({"features": torch.ones(1)})


class TestRefusals:
    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            ([SOFT[0], None, None], {}, "there is no answer in rows 1, 2"),
            ([SOFT[0], [0.5, 0.5], SOFT[1]], {}, "expected 3 numbers, one for each class, got 2 in row 1"),
            ([SOFT[0], SOFT[1], [0.2, 0.2, 0.2]], {}, r"do not sum to 1 .*got 0\.6 in row 2"),
            ([SOFT[0], SOFT[1], [0.7, 0.7, -0.4]], {"kind": "probabilities"}, "a negative number in row 2"),
            ([SOFT[0], [math.nan, 0.5, 0.5], SOFT[1]], {}, "a number that is none in row 1"),
            ([SOFT[0], [None, 0.5, 0.5], SOFT[1]], {}, "a number that is none in row 1"),
            ([[0, 1, 0]] * 3, {}, "holds lists of whole numbers; say `kind`"),
            ([[0, 1], [3], [-1]], {"kind": "votes"}, "expected labels from 0 to 2, got 3 in rows 1, 2"),
            ([["cat"], ["dgo"], ["owl"]], {}, "there is no class 'dgo'; did you mean 'dog'"),
            ([["cat"], [], ["owl"]], {}, "there is no vote in row 1"),
            (["cat", "dog", "wol"], {}, "there is no class 'wol'; did you mean 'owl'"),
            (["cat", None, "owl"], {}, "there is no answer in row 1"),
            ([0.1, 0.2, 0.3], {}, "expected labels as names or whole numbers, got double"),
            ([0, 1, 2], {"kind": "probabilities"}, "expected a list or a mapping in every row"),
            (SOFT, {"kind": "labels"}, "expected one label in every row, got lists"),
            ([{"cat": 1.0}, {"dog": 1.0}, {"fox": 1.0}], {}, "there is no class 'fox'"),
            ([{"cat": 1.0}, {"dog": -1.0}, {"owl": 1.0}], {}, "logits need a number for every class in every row"),
        ],
    )
    def test_wrong_rows(self, rows, options, message):
        with pytest.raises(DataError, match=message):
            source({"soft": rows}, **options)

    def test_many_wrong_rows_are_counted(self):
        with pytest.raises(DataError, match=r"in row 0") as raised:
            source({"soft": [None, *[SOFT[0]] * 2]})
        assert "rows" not in str(raised.value)
        with pytest.raises(DataError, match=r"in rows 0, 1, 2, 3, 4, … \(9 rows\)"):
            source(Dataset.from_dict({"soft": [None] * 9}, features=Features({"soft": List(Value("float32"))})))

    def test_wrong_columns(self):
        with pytest.raises(
            DataError, match="reads the column 'sfot', and there is no such column; did you mean 'soft'"
        ):
            source({"soft": SOFT}, column="sfot")
        with pytest.raises(DataError, match="expected 3 columns, one for each class, got 2"):
            source({"a": [0.5], "b": [0.5]}, column=["a", "b"])
        with pytest.raises(DataError, match="there is no table"):
            source(None)
        with pytest.raises(DataError, match="the task knows no classes"):
            source({"soft": ["cat"]}, [])

    def test_wrong_options(self):
        assert teacher_sources.get("column") is column
        assert teacher_sources.check("column", {"column": ["a", "b"], "kind": "votes", "smoothing": 1}) == []
        with pytest.raises(ComponentError, match="floor between 0 and 1"):
            source({"soft": SOFT}, floor=0.0)
        with pytest.raises(ComponentError, match="no negative smoothing"):
            source({"soft": SOFT}, smoothing=-1.0)
