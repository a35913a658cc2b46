import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Value
from datasets.exceptions import DatasetNotFoundError
from PIL import Image

from potstill.data.sources import from_files, from_hub, from_sklearn
from potstill.errors import DataError
from potstill.registry import sources

SHARED = Path(os.environ.get("POTSTILL_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def table(**columns) -> Dataset:
    return Dataset.from_dict(columns or {"text": ["a", "b"], "label": [0, 1]})


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


# the hub


def raising(monkeypatch, *outcomes):
    """Let `load_dataset` raise or return these in turn; return the list of its calls."""
    calls, left = [], list(outcomes)

    def load_dataset(path, **options):
        calls.append((path, {name: value for name, value in options.items() if value is not None}))
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_passes_name_and_revision_on(monkeypatch):
    calls = raising(monkeypatch, DatasetDict(train=table(), test=table()))
    loaded = from_hub("nyu-mll/glue", name="sst2", revision="abc")
    assert calls == [("nyu-mll/glue", {"name": "sst2", "revision": "abc"})]
    assert sorted(loaded.splits) == ["test", "train"]
    assert loaded.notes == []


def test_hub_reads_the_parquet_conversion_of_a_script_repository(monkeypatch):
    script = RuntimeError("Dataset scripts are no longer supported, but found liar.py")
    calls = raising(monkeypatch, script, DatasetDict(train=table()))
    loaded = from_hub("ucsbnlp/liar", revision="v1")
    assert calls[1] == ("ucsbnlp/liar", {"revision": "refs/convert/parquet"})
    assert len(loaded.splits["train"]) == 2
    (note,) = loaded.notes
    assert "refs/convert/parquet" in note
    assert "not from the revision 'v1'" in note


def test_hub_without_a_conversion_is_a_data_error(monkeypatch):
    script = RuntimeError("Dataset scripts are no longer supported, but found x.py")
    raising(monkeypatch, script, DatasetNotFoundError("Revision 'refs/convert/parquet' doesn't exist for dataset 'x'"))
    with pytest.raises(DataError, match=r"cannot load 'x' from the hub: Revision 'refs/convert/parquet'"):
        from_hub("x")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'x' on the Hub (LocalEntryNotFoundError)"),
        DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub or cannot be accessed."),
        RuntimeError("something else"),
    ],
)
def test_hub_out_of_reach_points_to_files(monkeypatch, error):
    calls = raising(monkeypatch, error)
    with pytest.raises(DataError) as caught:
        from_hub("x")
    assert str(error) in str(caught.value)
    assert "`source: files`" in str(caught.value)
    assert len(calls) == 1


def test_hub_names_the_nearest_configuration(monkeypatch):
    raising(monkeypatch, ValueError("BuilderConfig 'sts2' not found. Available: ['cola', 'sst2', 'mrpc']"))
    with pytest.raises(DataError, match=r"it has no configuration 'sts2'; did you mean 'sst2'\?"):
        from_hub("nyu-mll/glue", name="sts2")


def test_hub_asks_for_a_configuration(monkeypatch):
    text = "Config name is missing.\nPlease pick one among the available configs: ['cola', 'sst2']\nExample of usage:"
    raising(monkeypatch, ValueError(text))
    with pytest.raises(DataError, match="several configurations, so `name` must say which; known: cola, sst2"):
        from_hub("nyu-mll/glue")


def test_hub_reads_a_local_folder_in_the_hubs_layout(tmp_path):
    folder = tmp_path / "mine"
    table().to_parquet(folder / "one" / "train-00000-of-00001.parquet")
    table(text=["c"], label=[1]).to_parquet(folder / "two" / "test-00000-of-00001.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}/{split}-*\n"
        for name, split in (("one", "train"), ("two", "test"))
    )
    write(folder / "README.md", f"---\nconfigs:\n{configs}---\n")
    loaded = from_hub("mine", name="two", base=tmp_path)
    assert {split: rows["text"][:] for split, rows in loaded.splits.items()} == {"test": ["c"]}
    assert loaded.notes == [f"mine: read from the folder {folder.resolve()}, not from the hub"]
    with pytest.raises(DataError, match=r"did you mean 'two'\?"):
        from_hub("mine", name="tow", base=tmp_path)


# files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", 'text,label\n"a, b",0\nc,1\n'),
        ("x.tsv", 'text\tlabel\n"a, b"\t0\nc\t1\n'),
        ("x.jsonl", '{"text": "a, b", "label": 0}\n{"text": "c", "label": 1}\n'),
        ("x.json", '[{"text": "a, b", "label": 0}, {"text": "c", "label": 1}]'),
        ("X.CSV", "\ufefftext,label\r\n'a, b',0\r\nc,1\r\n".replace("'", '"')),
    ],
)
def test_one_file_of_each_kind(tmp_path, name, text):
    loaded = from_files(str(write(tmp_path / name, text)))
    assert list(loaded.splits) == ["train"]
    assert loaded.splits["train"].features == {"text": Value("string"), "label": Value("int64")}
    assert loaded.splits["train"][:] == {"text": ["a, b", "c"], "label": [0, 1]}
    assert loaded.notes == []


def test_splits_from_file_names(tmp_path):
    names = ["my_train-00000-of-00002", "my_train-00001-of-00002", "dev", "liar.test.v2"]
    for number, name in enumerate(names):
        table(n=[number]).to_parquet(tmp_path / f"{name}.parquet")
    write(tmp_path / "article_split.json", "not json at all")
    loaded = from_files(str(tmp_path))
    assert {split: rows["n"][:] for split, rows in loaded.splits.items()} == {
        "train": [0, 1],
        "validation": [2],
        "test": [3],
    }
    assert loaded.notes == ["files without a split in their name were left out: article_split.json"]


@pytest.mark.parametrize("name", ["validation.csv", "valid.tsv", "val.jsonl", "DEV.csv", "x-val-1.csv"])
def test_validation_has_many_names(tmp_path, name):
    write(tmp_path / "train.csv", "a\n1\n")
    write(tmp_path / name, '{"a": 2}\n' if name.endswith("jsonl") else "a\n2\n")
    assert from_files(str(tmp_path)).splits["validation"]["a"][:] == [2]


def test_several_kinds_of_one_split_keep_their_names(tmp_path):
    for name in ("train", "validation_matched", "validation_mismatched"):
        write(tmp_path / f"{name}.csv", "a\n1\n")
    assert sorted(from_files(str(tmp_path)).splits) == ["train", "validation_matched", "validation_mismatched"]


def test_an_exact_name_wins_over_a_longer_one(tmp_path):
    for name, value in (("train", 1), ("train_extra", 2)):
        write(tmp_path / f"{name}.csv", f"a\n{value}\n")
    assert {k: v["a"][:] for k, v in from_files(str(tmp_path)).splits.items()} == {"train": [1], "train_extra": [2]}


def test_files_without_split_names_are_the_training_split(tmp_path):
    for number in (1, 2):
        write(tmp_path / f"part{number}.csv", f"a\n{number}\n")
    assert from_files(str(tmp_path)).splits["train"]["a"][:] == [1, 2]


def test_splits_may_name_files_of_the_folder(tmp_path):
    for name, value in (("adult.data", 0), ("rows.csv", 1), ("later.csv", 2), ("other.csv", 3)):
        write(tmp_path / name, f"a\n{value}\n")
    loaded = from_files(str(tmp_path), splits={"train": "rows.csv", "test": "later.csv"})
    assert {k: v["a"][:] for k, v in loaded.splits.items()} == {"rows.csv": [1], "later.csv": [2]}


@pytest.mark.parametrize("layout", ["{}/rows.csv", "data/{}.csv"])
def test_folders_of_splits_and_a_data_folder(tmp_path, layout):
    for number, split in enumerate(("train", "test")):
        write(tmp_path / layout.format(split), f"a\n{number}\n")
    assert {k: v["a"][:] for k, v in from_files(str(tmp_path)).splits.items()} == {"train": [0], "test": [1]}


def test_the_path_starts_at_base_then_at_the_working_directory_then_at_home(tmp_path, monkeypatch):
    for place, value in (("base", 1), ("work", 2), ("home", 3)):
        write(tmp_path / place / "x.csv", f"a\n{value}\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path, base, value in (("x.csv", "base", 1), ("x.csv", "empty", 2), ("~/x.csv", "base", 3)):
        assert from_files(path, base=tmp_path / base).splits["train"]["a"][:] == [value]


def test_names_with_brackets_are_no_patterns(tmp_path):
    table(a=[1]).to_parquet(tmp_path / "run [1]*" / "train.parquet")
    picture(tmp_path / "images [1]*" / "cat" / "1.png", 1)
    assert from_files(str(tmp_path / "run [1]*")).splits["train"]["a"][:] == [1]
    assert len(from_files(str(tmp_path / "images [1]*")).splits["train"]) == 1


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_a_changed_file_is_read_again(tmp_path, kind):
    for value in (1, 2):
        getattr(table(a=[value] * 3), f"to_{kind}")(tmp_path / f"train.{kind}")
        os.utime(tmp_path / f"train.{kind}", (value, value))
        assert from_files(str(tmp_path)).splits["train"]["a"][:] == [value] * 3


def test_words_for_missing_are_text_in_text_and_missing_in_numbers(tmp_path):
    path = write(tmp_path / "x.csv", "text,number,count\nnull,1.5,1\nNA,NA,\n,nan,3\n")
    rows = from_files(str(path)).splits["train"]
    assert rows[:] == {"text": ["null", "NA", None], "number": [1.5, None, None], "count": [1, None, 3]}
    assert rows.features["count"] == Value("int64")


def test_a_tsv_with_unbalanced_quotes_is_read_without_quoting(tmp_path):
    text = 'text\tlabel\n"a b\t0\nc"\t1\n"d"\t1\n5" e\t0\n'
    loaded = from_files(str(write(tmp_path / "x.tsv", text)))
    assert loaded.splits["train"][:] == {"text": ['"a b', 'c"', '"d"', '5" e'], "label": [0, 1, 1, 0]}
    assert loaded.notes == ["x.tsv: read without quoting, because its quotes are unbalanced"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('text\tlabel\n"a ""b"""\t0\nc "d" e\t1\n', ['a "b"', 'c "d" e']),
        ('text\tlabel\n"a\nb"\t0\nc\t1\n', ["a\nb", "c"]),
    ],
)
def test_a_tsv_with_balanced_quotes_is_unquoted(tmp_path, text, expected):
    loaded = from_files(str(write(tmp_path / "x.tsv", text)))
    assert loaded.splits["train"]["text"][:] == expected
    assert loaded.notes == []


def test_options_of_csv_and_json(tmp_path):
    path = write(tmp_path / "x.csv", "ä;1\nö;2\n", "latin-1")
    rows = from_files(str(path), delimiter=";", encoding="latin-1", column_names=["text", "label"]).splits["train"]
    assert rows[:] == {"text": ["ä", "ö"], "label": [1, 2]}
    path = write(tmp_path / "x.json", json.dumps({"version": 1, "data": [{"a": 1}, {"a": 2}]}))
    assert from_files(str(path), field="data").splits["train"]["a"][:] == [1, 2]


@pytest.mark.parametrize("layout", ["{split}/{label}/{number}.png", "{label}/{split}{number}.png"])
def test_images_in_class_folders(tmp_path, layout):
    for number, (split, label) in enumerate([("train", "dog"), ("train", "cat"), ("test", "dog")]):
        picture(tmp_path / layout.format(split=split, label=label, number=number), 10 * number)
    splits = from_files(str(tmp_path)).splits
    by_folder = layout.startswith("{split}")
    assert sorted(splits) == (["test", "train"] if by_folder else ["train"])
    for rows in splits.values():
        assert rows.features["label"] == ClassLabel(names=["cat", "dog"])
    found = [
        (rows.features["label"].int2str(r["label"]), np.asarray(r["image"])[0, 0])
        for rows in splits.values()
        for r in rows
    ]
    assert sorted(found) == [("cat", 10), ("dog", 0), ("dog", 20)]


@pytest.mark.parametrize("names", [["1.png", "2.png"], ["images/1.png", "images/2.png"], ["cat/1.png", "2.png"]])
def test_images_outside_class_folders_have_no_label(tmp_path, names):
    for name in names:
        picture(tmp_path / name, 1)
    assert from_files(str(tmp_path)).splits["train"].column_names == ["image"]


def test_folders_beside_split_folders_are_named(tmp_path):
    for name in ("train/cat/1.png", "train/dog/2.png", "spare/cat/3.png"):
        picture(tmp_path / name, 1)
    loaded = from_files(str(tmp_path))
    assert len(loaded.splits["train"]) == 2
    assert loaded.notes == ["folders that are no split were left out: spare"]


def test_images_with_a_table(tmp_path):
    for number in (1, 2):
        picture(tmp_path / f"{number}.png", number)
    write(tmp_path / "metadata.csv", "file_name,caption\n1.png,one\n2.png,two\n")
    rows = from_files(str(tmp_path)).splits["train"]
    assert [(row["caption"], np.asarray(row["image"])[0, 0]) for row in rows] == [("one", 1), ("two", 2)]


def test_images_keep_one_order(tmp_path):
    for number in range(12):
        picture(tmp_path / "ab"[number % 2] / f"{number:02d}.png", number)
    values = [int(np.asarray(row["image"])[0, 0]) for row in from_files(str(tmp_path)).splits["train"]]
    assert values == [*range(0, 12, 2), *range(1, 12, 2)]


def test_a_missing_path_names_the_places_and_the_nearest(tmp_path):
    write(tmp_path / "liar" / "train.csv", "a\n1\n")
    with pytest.raises(DataError) as caught:
        from_files("lair/train.csv", base=tmp_path)
    assert f"looked for {tmp_path / 'lair' / 'train.csv'}" in str(caught.value)
    assert f"did you mean '{tmp_path / 'liar'}'?" in str(caught.value)


def test_a_folder_without_data_says_what_it_holds(tmp_path):
    write(tmp_path / "weights.th", "")
    with pytest.raises(DataError, match=r"holds no data: expected files \(parquet, csv, .*found weights.th"):
        from_files(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.xlsx": ""}, "x.xlsx is no data file: expected one of .parquet, .csv"),
        ({"train.csv": "a\n1\n", "train.json": "[]"}, r"one split in several kinds of files \(train.csv, train.json\)"),
        ({"train1.csv": "a\n1\n", "train2.csv": "b\n1\n"}, r"train2.csv has the columns \['b'\], but .* has \['a'\]"),
        ({"x.csv": "a,b\n1,2\n1,2,3\n"}, "cannot read .*x.csv: .*Expected 2 fields in line 3, saw 3"),
        ({"x.csv": "a,b\n1,2,3\n1,2,3\n"}, r"x.csv: the rows have more fields than there are column names \(2\)"),
        ({"x.csv": ""}, "cannot read .*x.csv: No columns"),
        ({"x.parquet": "no parquet"}, "cannot read .*x.parquet: .*[Pp]arquet"),
        ({"x.jsonl": '{"a": 1}\n{"a": \n'}, "cannot read .*x.jsonl: "),
    ],
)
def test_damaged_files(tmp_path, files, message):
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(DataError, match=message):
        from_files(str(tmp_path / name if len(files) == 1 else tmp_path))


def test_a_wrong_encoding_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*x.csv: .*utf-8"):
        from_files(str(write(tmp_path / "x.csv", "text\nä\n", "latin-1")))
    with pytest.raises(DataError, match=r"cannot read .*x.csv: unknown encoding: utf9"):
        from_files(str(tmp_path / "x.csv"), encoding="utf9")


def test_an_unknown_home_is_a_data_error():
    with pytest.raises(DataError, match="'~nobody-of-this-name/x'"):
        from_files("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    ("name", "rows", "features"),
    [
        (
            "mnist",
            {"train": 60_000, "test": 10_000},
            {"image": datasets.Image(), "label": ClassLabel(names=list("0123456789"))},
        ),
        (
            "sst2",
            {"train": 67_349, "validation": 872, "test": 1821},
            {"label": ClassLabel(names=["negative", "positive"])},
        ),
        ("adult", {"train": 32_561, "test": 16_281}, {"age": Value("int64"), "income": Value("string")}),
    ],
)
def test_real_data(name, rows, features):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there")
    splits = from_files(str(SHARED / name)).splits
    assert {split: len(table) for split, table in splits.items()} == rows
    assert {key: splits["train"].features[key] for key in features} == features
    if name == "mnist":
        first = splits["train"][0]
        assert first["image"].size == (28, 28)
        assert first["label"] == 5


# scikit-learn


def test_digits_are_images():
    rows = from_sklearn("load_digits").splits["train"]
    assert rows.features == {
        "image": datasets.Array2D((8, 8), "float32"),
        "label": ClassLabel(names=list("0123456789")),
    }
    images = np.asarray(rows.with_format("numpy")[:]["image"])
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (0, 16)


@pytest.mark.parametrize(
    ("name", "features", "names"),
    [
        ("load_iris", 4, ["setosa", "versicolor", "virginica"]),
        ("load_wine", 13, ["class_0", "class_1", "class_2"]),
        ("load_breast_cancer", 30, ["malignant", "benign"]),
        ("load_diabetes", 10, None),
        ("make_moons", 2, ["0", "1"]),
        ("make_regression", 100, None),
    ],
)
def test_bundled_sets_and_generators(name, features, names):
    rows = from_sklearn(name).splits["train"]
    assert len(rows.column_names) == features + 1
    assert rows.features["label"] == (ClassLabel(names=names) if names else Value("float32"))
    assert all(rows.features[each] == Value("float32") for each in rows.column_names[:-1])
    assert np.isfinite(rows.to_pandas().to_numpy()).all()


def test_features_keep_their_names():
    assert from_sklearn("load_iris").splits["train"].column_names[0] == "sepal length (cm)"
    assert from_sklearn("make_blobs").splits["train"].column_names == ["x0", "x1", "label"]


def test_options_reach_the_generator():
    rows = from_sklearn("make_blobs", n_samples=30, centers=5, n_features=3).splits["train"]
    assert rows.shape == (30, 4)
    assert rows.features["label"].num_classes == 5
    assert from_sklearn("load_digits", n_class=3).splits["train"].features["label"].names == ["0", "1", "2"]


def test_generators_are_seeded():
    first, again, other = (from_sklearn("make_moons", noise=0.1, seed=seed) for seed in (1, 1, 2))
    assert first.splits["train"][:] == again.splits["train"][:]
    assert first.splits["train"][:] != other.splits["train"][:]
    assert first.notes == ["make_moons: generated with random_state 1"]
    given = from_sklearn("make_moons", noise=0.1, random_state=1, seed=2)
    assert given.splits["train"][:] == first.splits["train"][:]
    assert given.notes == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("load_digit", {}, "'load_digit'; did you mean 'load_digits'?"),
        ("fetch_openml", {}, "no bundled data set or generator 'fetch_openml'"),
        (
            "make_moons",
            {"n_sample": 3},
            "n_sample: scikit-learn's make_moons has no option 'n_sample'; did you mean 'n_samples'?",
        ),
        ("load_iris", {"return_X_y": True}, "has no option 'return_X_y'"),
        ("make_moons", {"n_samples": -1}, "scikit-learn's make_moons: The 'n_samples' parameter"),
        ("make_low_rank_matrix", {}, "does not give features and one label per row"),
        ("make_multilabel_classification", {}, "does not give features and one label per row"),
    ],
)
def test_wrong_names_and_options(name, options, message):
    with pytest.raises(DataError) as caught:
        from_sklearn(name, **options)
    assert message in str(caught.value)


def test_registration():
    assert {"hub", "files", "sklearn"} <= set(sources.names())
    assert sources.get("files") is from_files
