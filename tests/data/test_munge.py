"""MUNGE against Algorithm 1 of the paper, written out with loops; the transfer set of a recipe made with it."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from potstill.data.load import Splits, load_splits
from potstill.data.munge import munge
from potstill.data.splits import with_transfer
from potstill.errors import DataError
from potstill.recipe import build
from potstill.recipe.load import recipe_from
from potstill.registry import synthesizers

SIZES = ["small", "large", "huge"]


def table(count: int = 40) -> Dataset:
    """Numbers of several kinds and categories of several kinds, all of them drawn."""
    draw = np.random.default_rng(1)
    columns = {
        "height": draw.normal(170, 10, count).astype(np.float32),
        "age": draw.integers(18, 90, count),
        "colour": draw.choice(["red", "green", "blue"], count).tolist(),
        "member": draw.random(count) < 0.5,
        "size": draw.integers(0, 3, count),
    }
    kinds = {"height": Value("float32"), "age": Value("int32"), "colour": Value("string"), "member": Value("bool")}
    return Dataset.from_dict(columns, features=Features({**kinds, "size": ClassLabel(names=SIZES)}))


def nearest(rows: list[dict]) -> list[int]:
    """The paper's: Euclidean over numbers scaled to [0, 1], Hamming over categories, by looking at every pair."""
    numbers = {key: [row[key] for row in rows] for key in ("height", "age")}

    def scaled(row: dict, key: str) -> float:
        return (row[key] - min(numbers[key])) / (max(numbers[key]) - min(numbers[key]))

    def squared(one: dict, other: dict) -> float:
        far = sum((scaled(one, key) - scaled(other, key)) ** 2 for key in numbers)
        return far + sum(one[key] != other[key] for key in ("colour", "member", "size"))

    return [
        min((j for j in range(len(rows)) if j != i), key=lambda j, i=i: squared(rows[i], rows[j]))
        for i in range(len(rows))
    ]


def test_with_certain_swaps_and_no_variance_it_is_the_papers_loop():
    """With p = 1 and s without end nothing is random: every attribute is exchanged, row after row, in place."""
    rows = list(table())
    changed = [dict(row) for row in rows]
    for i, j in enumerate(nearest(rows)):
        changed[i], changed[j] = changed[j], changed[i]
    found = munge(table(), seed=0, size=2, swap=1.0, local_variance=1e12, keep=False)
    assert len(found) == 80
    assert found.features == table().features
    for made, wanted in zip(found, [*changed, *changed], strict=True):
        assert made == {**wanted, "height": pytest.approx(wanted["height"], rel=1e-6)}


def test_without_swaps_nothing_changes():
    found = munge(table(), seed=0, size=3, swap=0.0)
    assert found.to_dict() == {name: values * 4 for name, values in table().to_dict().items()}


def test_what_is_kept_comes_first_and_draws_nothing():
    kept, alone = (munge(table(), seed=5, size=2, keep=keep) for keep in (True, False))
    assert kept.select(range(40)).to_dict() == table().to_dict()
    assert kept.select(range(40, 120)).to_dict() == alone.to_dict()


def test_the_rows_depend_on_the_seed_alone():
    first, again, other = (munge(table(), seed=seed, size=2, keep=False).to_dict() for seed in (3, 3, 4))
    assert first == again
    assert first != other
    passes = np.array(first["height"]).reshape(2, 40)
    assert not np.array_equal(passes[0], passes[1])  # each pass draws its own


def test_new_values_are_normal_around_the_neighbours_and_spread_by_their_distance():
    """Two rows, one attribute: a from N(b, |a - b| / s), then b from N(a, |a - b| / s); visited twice, from both."""
    pair = Dataset.from_dict({"x": [0.0, 1.0, np.nan]}).select([0, 1])
    three = Dataset.from_dict({"x": [0.0, 1.0, 50.0], "y": [0.0, 0.0, 9.0]})  # a third value: else x is nominal
    assert set(munge(pair, seed=0, size=50, keep=False)["x"][:]) == {0.0, 1.0}
    s, size = 4.0, 6000
    found = np.array(munge(three, seed=0, size=size, swap=1.0, local_variance=s, keep=False)["x"][:]).reshape(size, 3)
    draw = np.random.default_rng(7)
    wanted = []
    for _ in range(size):
        rows = [0.0, 1.0, 50.0]
        for i, j in ((0, 1), (1, 0), (2, 1)):
            a, b = rows[i], rows[j]
            rows[i], rows[j] = draw.normal(b, abs(a - b) / s), draw.normal(a, abs(a - b) / s)
        wanted.append(rows)
    for place in range(3):
        ours, theirs = found[:, place], np.array(wanted)[:, place]
        assert ours.mean() == pytest.approx(theirs.mean(), abs=4 * theirs.std() / size**0.5)
        assert ours.std() == pytest.approx(theirs.std(), rel=0.06)


def test_an_attribute_is_exchanged_with_its_probability():
    """Each attribute by a coin of its own: of a pair far from all others, both keep a value with p² + (1 - p)²."""
    rows = Dataset.from_dict({"a": ["x", "y"], "b": ["u", "v"]})
    found = munge(rows, seed=0, size=4000, swap=0.2, keep=False)
    for name, first in (("a", "x"), ("b", "u")):
        stayed = np.mean(np.array(found[name][:])[::2] == first)
        assert stayed == pytest.approx(0.2**2 + 0.8**2, abs=0.03)
    pairs = list(zip(found["a"][:][::2], found["b"][:][::2], strict=True))
    assert pairs.count(("x", "v")) / 4000 == pytest.approx(0.68 * 0.32, abs=0.03)  # apart from each other


def test_categories_stay_categories_and_whole_numbers_whole():
    found = munge(table(), seed=0, size=20, keep=False)
    assert set(found["colour"][:]) == {"red", "green", "blue"}
    assert set(found["member"][:]) == {True, False}
    assert all(isinstance(age, int) for age in found["age"][:])
    assert set(found["age"][:]) - set(table()["age"][:])  # and yet they are new numbers
    flags = Dataset.from_dict({"flag": [0, 1, 1, 0], "x": [0.0, 1.0, 2.0, 3.0]})
    assert set(munge(flags, seed=0, size=30, keep=False)["flag"][:]) == {0, 1}
    bytes_ = Dataset.from_dict({"x": [0, 1, 255, 7]}, features=Features({"x": Value("uint8")}))
    assert max(munge(bytes_, seed=0, size=50)["x"][:]) == 255  # a draw beyond the type stays within it


def test_missing_values_are_exchanged_as_they_are():
    rows = Dataset.from_dict({"x": [1.0, None, 3.0, 4.0], "n": [5, None, 7, 9], "c": ["a", None, "b", "b"]})
    found = munge(rows, seed=0, size=50, keep=False)
    for name in ("x", "n", "c"):
        missing = sum(value is None or value != value for value in found[name][:])
        assert missing == 50, name  # one a pass: none is lost, none is made


def test_what_it_refuses():
    with pytest.raises(DataError, match="'pixels' holds List"):
        munge(Dataset.from_dict({"pixels": [[1.0], [2.0]]}), seed=0)
    with pytest.raises(DataError, match="two rows to mix, got 1"):
        munge(Dataset.from_dict({"x": [1.0]}), seed=0)
    problems = synthesizers.check("munge", {"size": 0, "swap": 1.5, "local_variance": 0, "sizes": 3})
    assert len(problems) == 4


def splits() -> Splits:
    return load_splits("sklearn", "load_wine", label="label", validation=0.2, test=0.2)


class TestTransferSet:
    def test_it_has_features_alone_and_ids_of_its_own(self):
        before = splits()
        found = with_transfer(before, {"munge": {"size": 3}}, label="label", seed=1)
        names = set(before.train.column_names) - {"label"}
        assert found.transfer is not None
        assert set(found.transfer.column_names) == names
        assert found.transfer["sample_id"][:] == list(range(4 * len(before.train)))
        assert found.taught_on is found.transfer
        assert before.taught_on is before.train
        assert found.notes[-1].startswith(f"transfer: {4 * len(before.train):,} rows without labels by munge")
        for name in ("train", "validation", "test"):
            assert getattr(found, name) is getattr(before, name)

    def test_the_label_can_not_leak(self):
        """Other labels, the same rows: nothing of a label decides a neighbour or a value."""
        before = splits()
        labels = np.random.default_rng(0).permutation(before.train["label"][:])
        other = before.train.remove_columns("label").add_column("label", labels)
        made = [with_transfer(Splits(t), "munge", label="label").transfer for t in (before.train, other)]
        assert made[0].to_dict() == made[1].to_dict()

    def test_chosen_features_alone(self):
        found = with_transfer(splits(), "munge", label="label", features=["alcohol", "hue"])
        assert found.transfer.column_names == ["alcohol", "hue", "sample_id"]
        with pytest.raises(DataError, match="no column 'alcohool'"):
            with_transfer(splits(), "munge", label="label", features=["alcohool"])

    def test_mistakes(self):
        with pytest.raises(DataError, match="there is no synthesizer 'mung'; did you mean 'munge'"):
            with_transfer(splits(), "mung", label="label")
        with pytest.raises(DataError, match="has no option 'siez'; did you mean 'size'"):
            with_transfer(splits(), {"munge": {"siez": 3}}, label="label")

    def test_a_recipe_says_it(self):
        tree = {
            "name": "t",
            "task": {"name": "tabular-classification", "features": ["alcohol", "hue"]},
            "data": {"source": "sklearn", "path": "load_wine", "seed": 7, "synthesize": {"munge": {"size": 2}}},
            "student": {"model": "potstill:mlp"},
            "objective": {"hard": {"loss": "cross_entropy"}},
        }
        found = build.make_splits(recipe_from(tree))
        plain = build.make_splits(recipe_from({**tree, "data": {**tree["data"], "synthesize": None}}))
        wanted = munge(plain.train.select_columns(["alcohol", "hue"]), seed=7, size=2)
        assert found.transfer.remove_columns("sample_id").to_dict() == wanted.to_dict()
        assert found.train.to_dict() == plain.train.to_dict()
