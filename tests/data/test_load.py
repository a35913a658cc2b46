import itertools
import os
import sys
import types
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from potstill.data.load import load_splits
from potstill.errors import CodeNotAllowedError, ComponentError, DataError

SHARED = Path(os.environ.get("POTSTILL_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def load(monkeypatch):
    """Load what is given, through a factory of a module outside potstill."""

    def call(data, **options):
        module = types.ModuleType("outside_module")
        module.factory = lambda: data
        monkeypatch.setitem(sys.modules, "outside_module", module)
        return load_splits("outside_module:factory", allow_code=True, **options)

    return call


def rows(count: int, **columns) -> dict[str, list]:
    return {"text": [f"t{i}" for i in range(count)], **columns}


def classes(count: int, of: int = 2) -> list[int]:
    return [i % of for i in range(count)]


def three(label_train, label_test) -> dict[str, dict]:
    """A train and a test split with these labels."""
    return {
        "train": rows(len(label_train), label=label_train),
        "test": rows(len(label_test), label=label_test),
    }


def typed(values: list, feature) -> Dataset:
    return Dataset.from_dict(rows(len(values), label=values), Features({"text": Value("string"), "label": feature}))


# ids, carving, limits


def test_ids_are_the_rows_of_the_sources_own_split(load):
    splits = load(three(classes(100), classes(10)), label="label", validation=0.2, limit={"train": 30})
    assert splits.test["sample_id"][:] == list(range(10))
    for table in (splits.train, splits.validation, splits.test):
        assert table.features["sample_id"] == Value("int64")
        assert [f"t{i}" for i in table["sample_id"]] == table["text"][:]
    carved, kept = set(splits.validation["sample_id"]), set(splits.train["sample_id"])
    assert (len(carved), len(kept), len(carved & kept)) == (20, 30, 0)


def test_ids_that_exist_are_kept(load):
    splits = load(
        {"train": rows(3, sample_id=[7, 5, 9]), "test": rows(1, sample_id=np.array([7], "int32"))}, validation=0
    )
    assert splits.train["sample_id"][:] == [7, 5, 9]
    assert splits.test.features["sample_id"] == Value("int64")


@pytest.mark.parametrize("ids", [[1, 1, 2], ["a", "b", "c"], [1, None, 2], [0.5, 1.0, 2.0]])
def test_ids_that_are_no_ids_are_refused(load, ids):
    with pytest.raises(DataError, match="'sample_id' that is not one distinct integer per row"):
        load(rows(3, sample_id=ids), validation=0, test=0)


def test_missing_splits_are_carved_from_train_in_shares_of_the_whole(load):
    splits = load(rows(200, label=classes(200)), label="label")
    parts = [splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == [140, 20, 40]
    ids = [part["sample_id"][:] for part in parts]
    assert sorted(itertools.chain(*ids)) == list(range(200))
    assert all(each == sorted(each) for each in ids)
    reason = "of the training split (seed 42, stratified by class), because the data set has none"
    assert splits.notes == [f"test: 20 % {reason}", f"validation: 10 % {reason}"]


def test_carving_is_stratified(load):
    label = [0] * 180 + [1] * 20
    splits = load(rows(200, label=label), label="label")
    assert Counter(splits.validation["label"]) == {0: 18, 1: 2}
    assert Counter(splits.test["label"]) == {0: 36, 1: 4}


def test_carving_falls_back_where_a_class_is_too_small(load):
    splits = load(rows(50, label=["rare"] + ["often"] * 49), label="label", test=0)
    assert len(splits.validation) == 5
    assert splits.test is None
    assert splits.notes == [
        "validation: 10 % of the training split (seed 42, not stratified: a class has too few rows), "
        "because the data set has none"
    ]


def test_carving_takes_numbers_of_rows_and_never_the_test_split(load):
    data = three(classes(100), classes(10))
    splits = load(data, label="label", validation=7)
    assert [len(each) for each in (splits.train, splits.validation, splits.test)] == [93, 7, 10]
    assert splits.notes[0].startswith("validation: 7 rows of the training split")
    assert load(data, validation=0).validation is None


def test_carving_and_limits_depend_on_the_seed_alone(load):
    def ids(**options):
        splits = load(rows(100), **options)
        return [splits.train["sample_id"][:], splits.validation["sample_id"][:], splits.test["sample_id"][:]]

    base = ids(limit={"train": 20})
    assert ids(limit={"train": 20}) == base
    assert all(one != two for one, two in zip(ids(limit={"train": 20}, seed=43), base, strict=True))
    larger = ids(limit={"train": 30, "validation": 5})
    assert set(base[0]) < set(larger[0])  # a larger limit adds rows
    assert set(larger[1]) < set(base[1])
    assert larger[2] == base[2]


def test_limits_are_random_subsets_in_order(load):
    splits = load(three(classes(1000), classes(1000)), limit={"train": 100, "test": 2000}, validation=0)
    ids = splits.train["sample_id"][:]
    assert ids == sorted(ids)
    assert 300 < np.mean(ids) < 700
    assert len(splits.test) == 1000
    assert splits.notes == ["train: 100 of 1,000 rows, chosen at random (seed 42)"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"limit": {"tain": 5}},
            "`limit` names the split 'tain', which 'outside_module:factory' lacks; did you mean 'train'?",
        ),
        ({"limit": {"validation": 5}, "validation": 0}, "`limit` names the split 'validation'"),
        ({"limit": {"train": 0}}, "must keep at least one row of 'train', got 0"),
        ({"validation": 1.0}, "`validation` must be a share between 0 and 1 or a number of rows, got 1.0"),
        ({"validation": -1}, "got -1"),
        ({"validation": True}, "got True"),
        ({"validation": 20}, "asks for 20 rows, but 'outside_module:factory' has 20 rows left"),
        ({"splits": {"train": "trian"}}, "has no split 'trian'; did you mean 'train'?"),
        ({"splits": {"trian": "train"}}, "`splits` names 'trian'; did you mean 'train'?"),
        (
            {"splits": {"validation": "test", "test": "test"}},
            "takes 'test' of 'outside_module:factory' for 'validation' and",
        ),
        (
            {"columns": {"text": "txt"}},
            "the split 'train' of 'outside_module:factory' has no column 'txt'; did you mean 'text'?",
        ),
        ({"columns": {"text": "label"}}, "already has a column 'text', so 'label' cannot take that name"),
        ({"kwargs": {"n": 3}}, "n: the data source 'outside_module:factory' has no option 'n'"),
        ({"name": "x"}, "has no `name`, got 'x'"),
    ],
)
def test_mistakes(load, options, message):
    with pytest.raises(DataError) as caught:
        load(three(classes(20), classes(10)), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split_is_a_mistake(load, split):
    data = three(classes(20), classes(10))
    data[split] = {"text": [], "label": []}
    with pytest.raises(DataError, match=f"the split '{split}' of 'outside_module:factory' is empty"):
        load(data, label="label")


# splits and columns


def test_splits_go_by_their_usual_names_or_by_those_given(load):
    data = {"training": rows(20), "dev": rows(2), "eval": rows(3), "other": rows(4)}
    splits = load(data)
    assert [len(each) for each in (splits.train, splits.validation, splits.test)] == [20, 2, 3]
    splits = load(data, splits={"test": "other", "validation": "validation"})
    assert [len(each) for each in (splits.train, splits.validation, splits.test)] == [20, 2, 4]


def test_a_split_that_is_taken_is_not_used_twice(load):
    splits = load({"train": rows(20), "validation": rows(5)}, splits={"test": "validation"}, validation=2)
    assert [len(each) for each in (splits.train, splits.validation, splits.test)] == [18, 2, 5]


def test_no_training_split_says_what_there_is(load):
    with pytest.raises(DataError, match=r"no split 'train', only: validation; .*`splits: {train: validation}`"):
        load({"validation": rows(5)})
    assert len(load({"validation": rows(20)}, splits={"train": "validation"}).test) == 4


def test_columns_are_renamed_and_can_be_swapped(load):
    splits = load(rows(20, target=classes(20)), columns={"sentence": "text", "label": "target"}, label="label")
    assert sorted(splits.train.column_names) == ["label", "sample_id", "sentence"]
    swapped = load({"a": ["x"] * 9, "b": ["y"] * 9}, columns={"a": "b", "b": "a"})
    assert swapped.train[0]["a"] == "y"


# labels


def test_strings_become_classes_sorted_over_all_splits(load):
    splits = load(three(["true", "false"] * 10, ["pants-fire", "true"]), label="label")
    assert splits.train.features["label"] == ClassLabel(names=["false", "pants-fire", "true"])
    assert splits.test.features["label"] == splits.train.features["label"]
    assert splits.test["label"][:] == [1, 2]
    ordered = load(three(["b", "a"] * 10, ["c", "a"]), label="label", label_names=["c", "b", "a"])
    assert ordered.test["label"][:] == [0, 2]
    assert ordered.train.features["label"].names == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("values", "options", "names", "ids"),
    [
        ([0, 1, 2], {}, ["0", "1", "2"], [0, 1, 2]),
        ([0, 1, 3], {}, ["0", "1", "2", "3"], [0, 1, 3]),  # class 2 merely has no rows
        ([0, 1], {"label_names": ["no", "yes", "maybe"]}, ["no", "yes", "maybe"], [0, 1]),
        ([1, 5, 3], {}, ["1", "3", "5"], [0, 2, 1]),
        ([0, 4], {}, ["0", "4"], [0, 1]),
        ([-1, 1], {}, ["-1", "1"], [0, 1]),
        ([0, 1, -1, None], {}, ["0", "1"], [0, 1, -1, -1]),
        ([False, True], {}, ["False", "True"], [0, 1]),
        ([False, True], {"label_names": ["ham", "spam"]}, ["ham", "spam"], [0, 1]),
        (["b", None, "", "a"], {}, ["a", "b"], [1, -1, -1, 0]),
    ],
)
def test_names_and_ids(load, values, options, names, ids):
    splits = load(rows(len(values) * 5, label=values * 5), label="label", validation=0, test=0, **options)
    assert splits.train.features["label"] == ClassLabel(names=names)
    assert splits.train["label"][: len(ids)] == ids


def test_ranks_are_noted(load):
    splits = load(rows(10, label=[1, 5] * 5), label="label", validation=0, test=0)
    assert splits.notes == ["the ids of 'label' of 'outside_module:factory' are the ranks of its values (1, 5)"]


def test_class_labels_keep_their_names_and_unlabelled_rows_stay(load):
    label = ClassLabel(names=["neg", "pos"])
    data = DatasetDict(train=typed([0, 1, -1, None] * 5, label), test=typed([-1, -1], label))
    splits = load(data, label="label", validation=0)
    assert splits.train.features["label"] == label
    assert splits.train["label"][:4] == [0, 1, -1, -1]
    assert splits.notes == ["train: 10 of 20 rows have no label", "test: 2 of 2 rows have no label"]


def test_class_labels_numbered_differently_are_matched_by_name(load):
    data = {
        "train": typed([0, 1, 2] * 5, ClassLabel(names=["c", "a", "b"])),
        "test": typed([0, 1, -1], ClassLabel(names=["a", "d"])),
    }
    splits = load(data, label="label", validation=0)
    assert splits.train.features["label"].names == ["c", "a", "b", "d"]
    assert splits.train["label"][:3] == [0, 1, 2]
    assert splits.test["label"][:] == [1, 3, -1]
    assert "matched by name" in splits.notes[0]


def test_names_may_replace_digits_but_not_names(load):
    digits = typed([0, 1] * 10, ClassLabel(num_classes=2))
    assert load(digits, label="label", label_names=["neg", "pos"]).train.features["label"].names == ["neg", "pos"]
    named = typed([0, 1] * 10, ClassLabel(names=["no", "yes"]))
    assert load(named, label="label", label_names=["no", "yes"]).train["label"][0] in (0, 1)
    with pytest.raises(DataError, match=r"themselves \(no, yes\); remove `label_names`"):
        load(named, label="label", label_names=["yes", "never"])


def test_classes_may_be_put_in_another_order(load):
    """A teacher has its outputs in an order of its own; the rows keep their classes, unlabelled ones stay so."""
    named = typed([0, 1, -1, 2] * 5, ClassLabel(names=["no", "yes", "maybe"]))
    found = load(named, label="label", label_names=["maybe", "no", "yes"], test=0, validation=0)
    assert found.train.features["label"].names == ["maybe", "no", "yes"]
    assert found.train["label"][:4] == [1, 2, -1, 0]
    assert any("reordered" in note for note in found.notes)


def test_a_test_split_that_keeps_its_labels_back(load):
    """As in GLUE: models would be judged on nothing."""
    kind = ClassLabel(names=["no", "yes"])
    tables = {"train": typed([0, 1] * 20, kind), "validation": typed([1, 0, 1], kind), "test": typed([-1] * 4, kind)}
    found = load(tables, label="label")
    assert found.test["label"][:] == [1, 0, 1]
    assert len(found.validation) == 4
    assert len(found.train) == 36
    assert any("keeps its labels back" in note for note in found.notes)


def test_splits_may_store_class_labels_as_names_or_ids(load):
    train = typed([0, 1] * 10, ClassLabel(names=["no", "yes"]))
    assert load({"train": train, "test": typed(["yes", "no"], Value("string"))}, label="label").test["label"][:] == [
        1,
        0,
    ]
    assert load({"train": train, "test": typed([1, 0], Value("int32"))}, label="label").test["label"][:] == [1, 0]
    assert load({"train": train, "test": typed([None, None], Value("null"))}, label="label").test["label"][:] == [
        -1,
        -1,
    ]


def test_a_transfer_set_needs_no_labels(load):
    splits = load({"train": rows(20), "test": rows(2, label=["a", "b"])}, label="label")
    assert "label" not in splits.train.column_names
    assert splits.test.features["label"].names == ["a", "b"]
    assert splits.notes[0] == "train: no column 'label', so its rows have no labels; known: text"
    typo = load(rows(20, label=classes(20)), label="lable")
    assert typo.notes[0] == "train: no column 'lable', so its rows have no labels; did you mean 'label'?"


def test_a_test_split_may_lack_the_renamed_label(load):
    data = {"train": rows(20, target=classes(20)), "test": rows(2)}
    splits = load(data, columns={"label": "target"}, label="label")
    assert "label" not in splits.test.column_names


@pytest.mark.parametrize("values", [[0.5, 1.5], [[1, 2], [3]]])
def test_numbers_and_lists_stay_as_they_are(load, values):
    splits = load(rows(20, label=values * 10), label="label", validation=0, test=0)
    assert splits.train["label"][:2] == values
    assert splits.notes == []


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        (
            [0, 1, 2] * 5,
            [0],
            {"label_names": ["a", "b"]},
            "'train' of 'outside_module:factory', row 2: the label 'label' is 2, expected 0 to 1 (a, b)",
        ),
        (
            [0, 1, 2] * 5,
            [-2],
            {},
            "'test' of 'outside_module:factory', row 0: the label 'label' is -2, expected 0 to 2 (0, 1, 2), or -1",
        ),
        (
            ["true", "false"] * 5,
            ["treu"],
            {"label_names": ["true", "false"]},
            "the value 'treu', which is no class; did you mean 'true'?",
        ),
        (["a"] * 5, ["a"], {"label_names": ["a", "a"]}, "`label_names` names a class twice: a, a"),
        ([0.5] * 5, [0.5], {"label_names": ["a"]}, "is a number, not a class, so `label_names` cannot name it"),
        ([0, 1] * 5, ["a"], {}, "has different types: Value('int64') in 'train', Value('string') in 'test'"),
        ([0, 1] * 5, [0.5], {}, "has different types"),
        ([None] * 5, [None], {}, "no row has a label"),
        ([-1] * 5, [-1], {}, "no row has a label"),
    ],
)
def test_wrong_labels(load, train, test, options, message):
    with pytest.raises(DataError) as caught:
        load(three(train, test), label="label", validation=0, **options)
    assert message in str(caught.value)


def test_a_class_label_out_of_range_is_found(load):
    table = typed([0, 1] * 5, Value("int64"))
    info = table.info.copy()
    info.features = Features({"text": Value("string"), "label": ClassLabel(names=["a"])})
    with pytest.raises(DataError, match=r"row 1: the label 'label' is 1, expected 0 to 0 \(a\)"):
        load(Dataset(table.data, info=info), label="label")


# sources


@pytest.mark.parametrize(
    "data",
    [
        rows(20),
        {"train": rows(20)},
        Dataset.from_dict(rows(20)),
        {"train": Dataset.from_dict(rows(20))},
        DatasetDict(train=Dataset.from_dict(rows(20))),
    ],
)
def test_a_factory_may_return_any_of_these(load, data):
    splits = load(data)
    assert [len(each) for each in (splits.train, splits.validation, splits.test)] == [14, 2, 4]


def test_a_factory_is_called_with_its_options(monkeypatch):
    module = types.ModuleType("outside_module")
    module.factory = lambda path, *, count: {"text": [path] * count}
    monkeypatch.setitem(sys.modules, "outside_module", module)
    options = {"allow_code": True, "validation": 0, "test": 0}
    splits = load_splits("outside_module:factory", "here", kwargs={"count": 3}, **options)
    assert splits.train["text"][:] == ["here"] * 3
    with pytest.raises(DataError, match="needs the option 'count'"):
        load_splits("outside_module:factory", "here", **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2], "must give a Dataset, a DatasetDict or columns, got list for 'train'"),
        ({"text": ["a"], "label": [1, 2]}, "gave columns that do not make a table"),
    ],
)
def test_a_factory_that_returns_something_else(load, data, message):
    with pytest.raises(DataError, match=message):
        load(data)


def test_code_runs_only_where_it_is_allowed():
    with pytest.raises(CodeNotAllowedError, match="would import and run the Python module outside_module"):
        load_splits("outside_module:factory")


def test_unknown_sources_and_missing_paths():
    with pytest.raises(ComponentError, match=r"no data source 'file'; did you mean 'files'\?"):
        load_splits("file", "x")
    with pytest.raises(DataError, match="the data source 'files' needs a `path`"):
        load_splits("files")
    with pytest.raises(DataError, match="the data source 'files' has no `revision`, got 'main'"):
        load_splits("files", "x", revision="main")


def test_files_relative_to_the_recipe_with_options(tmp_path):
    (tmp_path / "train.csv").write_text("text;label\n" + "a;yes\nb;no\nc;\n" * 10)
    (tmp_path / "dev.csv").write_text("text;label\nd;\ne;\n")
    (tmp_path / "extra.csv").write_text("text;label\nf;no\n")
    splits = load_splits(
        "files",
        ".",
        base=tmp_path,
        label="label",
        splits={"validation": "dev", "test": "extra.csv"},
        kwargs={"delimiter": ";"},
    )
    assert [len(each) for each in (splits.train, splits.validation, splits.test)] == [30, 2, 1]
    assert splits.train.features["label"].names == ["no", "yes"]
    assert splits.validation["label"][:] == [-1, -1]
    with pytest.raises(DataError, match=r"has no option 'delimeter'; did you mean 'delimiter'\?"):
        load_splits("files", ".", base=tmp_path, kwargs={"delimeter": ";"})


def test_sklearn_with_kwargs():
    splits = load_splits("sklearn", "make_blobs", label="label", kwargs={"centers": 4, "n_samples": 100}, seed=3)
    assert [len(each) for each in (splits.train, splits.validation, splits.test)] == [70, 10, 20]
    assert splits.train.features["label"].names == ["0", "1", "2", "3"]
    assert splits.notes[0] == "make_blobs: generated with random_state 3"


def test_real_data_end_to_end():
    if not (SHARED / "liar").is_dir():
        pytest.skip(f"{SHARED / 'liar'} is not there")
    splits = load_splits(
        "files", "liar", base=SHARED, columns={"text": "statement"}, label="label", limit={"train": 1000}
    )
    assert [len(each) for each in (splits.train, splits.validation, splits.test)] == [1000, 1284, 1283]
    assert splits.train.features["label"].names == [
        "false",
        "half-true",
        "mostly-true",
        "true",
        "barely-true",
        "pants-fire",
    ]
    assert splits.notes == ["train: 1,000 of 10,269 rows, chosen at random (seed 42)"]
    adult = load_splits("files", "adult", base=SHARED, columns={"label": "income"}, label="label")
    assert adult.train.features["label"].names == ["<=50K", ">50K"]
    share = np.mean(adult.train["label"][:])
    assert np.mean(adult.validation["label"][:]) == pytest.approx(share, abs=1e-3)
