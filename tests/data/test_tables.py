"""Tables in memory: batches are, value by value, those that Trainer's collators make of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array2D, ClassLabel, Dataset, Features, LargeList, List, Value, concatenate_datasets
from transformers import DataCollatorWithPadding, default_data_collator

from potstill.data.tables import in_memory
from tests.local_models import decoder_tokenizer, roberta_tokenizer, word_pieces

SIZE = 9
CHOSEN = [[4, 0, 7], [3], list(range(SIZE)), [8, 8, 1]]
DRAW = np.random.default_rng(0)


def table(values: Any, feature: Any = None, name: str = "x") -> Dataset:
    return Dataset.from_dict({name: values}, features=None if feature is None else Features({name: feature}))


def same(given: Dataset, tokenizer: Any = None) -> None:
    """Compare with the collator that Trainer takes, on several batches."""
    collate = default_data_collator if tokenizer is None else DataCollatorWithPadding(tokenizer)
    found = in_memory(given, tokenizer)
    assert found is not None
    assert len(found) == len(given)
    for chosen in CHOSEN:
        wanted = dict(collate([given[place] for place in chosen]))
        batch = dict(found.__getitems__(chosen))
        if "sample_id" not in given.column_names:
            assert batch.pop("sample_id").tolist() == chosen
        assert set(batch) == set(wanted)
        for name, value in wanted.items():
            assert batch[name].dtype == value.dtype, name
            assert torch.equal(batch[name], value), name


WHOLE, REAL = DRAW.integers(-100, 100, SIZE).tolist(), DRAW.normal(size=SIZE).tolist()
GRID = DRAW.normal(size=(SIZE, 2, 3)).tolist()

COLUMNS = {
    **{kind: (WHOLE, Value(kind), "x") for kind in ("int8", "int16", "int32", "int64")},
    "uint8": ([abs(value) for value in WHOLE], Value("uint8"), "x"),
    "bool": ([value > 0 for value in WHOLE], Value("bool"), "x"),
    "float32": (REAL, Value("float32"), "x"),
    "float64": ([*REAL[:-4], 1e300, float("inf"), 1e-50, 0.1], Value("float64"), "x"),
    "list": ([row[0] for row in GRID], None, "x"),
    "fixed list": ([row[0] for row in GRID], List(Value("float32"), length=3), "x"),
    "large list": ([row[0] for row in GRID], LargeList(Value("float64")), "x"),
    "list of bools": ([[value > 0, True] for value in WHOLE], None, "x"),
    "list of lists": (GRID, None, "x"),
    "array": (GRID, Array2D((2, 3), "float32"), "x"),
    "array of whole numbers": ((np.abs(GRID) * 99).astype(int).tolist(), Array2D((2, 3), "uint8"), "x"),
    "label": ([abs(value) for value in WHOLE], None, "label"),
    "label of classes": ([place % 2 for place in range(SIZE)], ClassLabel(names=["a", "b"]), "label"),
    "label of bools": ([value > 0 for value in WHOLE], None, "label"),
    "label to regress": (REAL, None, "label"),
    "several labels": ([[0, 1, place % 2] for place in range(SIZE)], None, "label"),
    "label_ids": ([[0, 1, place % 2] for place in range(SIZE)], None, "label_ids"),
    "label_ids to regress": ([row[0] for row in GRID], None, "label_ids"),
    "labels": (WHOLE, Value("int32"), "labels"),
    "labels of tokens": ([[0, -100, place % 2] for place in range(SIZE)], None, "labels"),
    "sample_id": ([value * 7 for value in WHOLE], None, "sample_id"),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_batches_are_those_of_the_default_collator(kind):
    same(table(*COLUMNS[kind]))


def test_several_columns_together():
    same(Dataset.from_dict({"features": GRID, "label": WHOLE, "age": REAL, "sample_id": list(range(SIZE))}))


def test_rows_that_were_chosen_shuffled_and_put_together():
    """The rows of the table, not those of the file behind it."""
    whole = Dataset.from_dict({"x": [row[0] for row in GRID], "label": WHOLE})
    same(concatenate_datasets([whole.shuffle(seed=1), whole.select([5, 2, 2])]).select(range(1, 10)))
    same(concatenate_datasets([whole.select(range(3, 9)), whole.select(range(3, 6))]))


def tokens(tokenizer: Any, *, drop: tuple[str, ...] = (), special: bool = False, same_length: bool = False) -> Dataset:
    texts = ["great", "a boring mess", "dull", "funny and great", "a", "the cast is great", "flat jokes and plot", "a"]
    texts = ["a warm film" for _ in range(SIZE)] if same_length else [*texts, "a dull and boring film"]
    found = tokenizer(texts, return_special_tokens_mask=special)
    columns = {name: value for name, value in found.items() if name not in drop}
    return Dataset.from_dict({**columns, "label": [place % 3 for place in range(SIZE)], "weight": REAL})


def left(tokenizer: Any) -> Any:
    tokenizer.padding_side = "left"
    return tokenizer


TOKENIZERS = {
    "bert": word_pieces,
    "padded on the left": lambda: left(word_pieces()),
    "roberta": roberta_tokenizer,
    "decoder": lambda: left(decoder_tokenizer("<end>")),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"drop": ("attention_mask",)}, {"special": True}, {"same_length": True, "drop": ("attention_mask",)}],
)
def test_batches_are_those_of_the_padding_collator(kind, options):
    tokenizer = TOKENIZERS[kind]()
    same(tokens(tokenizer, **options), tokenizer)


@pytest.mark.parametrize("name", ["label", "label_ids", "labels", "x"])
@pytest.mark.parametrize("values", [WHOLE, REAL, [row[0] for row in GRID], [value > 0 for value in WHOLE]])
def test_other_columns_beside_tokens(name, values):
    tokenizer = word_pieces()
    columns = tokens(tokenizer).remove_columns("label").to_dict()
    same(Dataset.from_dict({**columns, name: values}), tokenizer)


def test_token_types_are_padded_with_the_tokenizers_own():
    tokenizer = word_pieces()
    tokenizer._pad_token_type_id = 3
    same(tokens(tokenizer), tokenizer)


def test_texts_of_differing_length_have_lengths():
    """So that those of like length can share a batch."""
    tokenizer = word_pieces()
    given = tokens(tokenizer)
    assert in_memory(given, tokenizer).lengths.tolist() == [len(row) for row in given["input_ids"]]
    assert not hasattr(in_memory(tokens(tokenizer, same_length=True), tokenizer), "lengths")


LEFT_ALONE = {
    "texts": table(["a"] * SIZE),
    "a missing value": table([*WHOLE[:-1], None]),
    "a missing list": table([*[[1, 2]] * 8, None]),
    "a missing value in a list": table([*[[1, 2]] * 8, [1, None]]),
    "half precision": table(REAL, Value("float16")),
    "large whole numbers": table([1] * SIZE, Value("uint64")),
    "dates": table([1] * SIZE, Value("timestamp[s]")),
    "lists of differing length": table([[1] * (1 + place % 3) for place in range(SIZE)]),
    "lists in lists of differing length": table([[[1], [1] * (1 + place % 3)] for place in range(SIZE)]),
    "empty lists": table([[] for _ in range(SIZE)], List(Value("int64"))),
    "an empty list": table([*[[1, 2]] * 8, []]),
    "lists of texts": table([["a"]] * SIZE),
    "structures": table([{"a": 1}] * SIZE),
    "label_ids that are no lists": table(WHOLE, name="label_ids"),
    "labels twice": Dataset.from_dict({"label": WHOLE, "labels": WHOLE}),
    "a format": table(WHOLE).with_format("torch"),
    "a transform": table(WHOLE).with_transform(lambda rows: rows),
    "columns chosen by a format": Dataset.from_dict({"x": WHOLE, "y": WHOLE}).with_format(None, columns=["x"]),
    "no rows": table(WHOLE).select([]),
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_other_tables_are_left_alone(kind):
    assert in_memory(LEFT_ALONE[kind]) is None


def test_a_format_that_is_set_in_place():
    given = table(WHOLE)
    given.set_format("numpy")
    assert in_memory(given) is None


def test_tables_that_are_too_large_are_left_alone():
    given = Dataset.from_dict({"x": [[1.0, 2.0]] * SIZE, "y": WHOLE})
    needed = SIZE * (2 * 4 + 8)
    assert in_memory(given, limit=needed) is not None
    assert in_memory(given, limit=needed - 1) is None
    assert in_memory(given, limit=1) is None


def beside(tokenizer: Any, **columns: Any) -> Dataset:
    given = tokens(tokenizer)
    return Dataset.from_dict({**given.to_dict(), **columns})


def test_what_a_tokenizer_cannot_pad_is_left_alone():
    """The collator then says what is wrong, as it did."""
    tokenizer = word_pieces()
    given = tokens(tokenizer)
    ids = [list(row) for row in given["input_ids"]]
    wrong = [
        given.remove_columns("input_ids"),
        beside(tokenizer, labels=ids).remove_columns("label"),
        beside(tokenizer, attention_mask=[row[1:] for row in ids]),
        beside(tokenizer, attention_mask=[[True] * len(row) for row in ids]),
        beside(tokenizer, input_ids=[[float(number) for number in row] for row in ids]),
        beside(tokenizer, input_ids=[[number + 2**32 for number in row] for row in ids]),
        beside(tokenizer, text=["a"] * SIZE),
        beside(tokenizer, **{"teacher/input_ids": ids}),
    ]
    assert [in_memory(each, tokenizer) for each in wrong] == [None] * len(wrong)
    assert in_memory(given, decoder_tokenizer()) is None  # it has nothing to pad with
    assert in_memory(given) is None


def test_a_tokenizer_that_pads_in_its_own_way_is_left_alone():
    class Own(type(word_pieces())):
        def _pad(self, *args, **kwargs):
            return super()._pad(*args, **kwargs)

    tokenizer = word_pieces()
    given = tokens(tokenizer)
    tokenizer.__class__ = Own
    assert in_memory(given, tokenizer) is None
    assert in_memory(given, object()) is None
