"""Texts as batches: what the tokenizer itself would give, and random views that depend on the sample alone."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from potstill.data.texts import PLACEHOLDER, Texts, Tokenizer, Tokens
from potstill.errors import DataError
from tests.local_models import SENTENCES, WORDS, decoder_tokenizer, roberta_tokenizer, word_pieces

FILMS = [text for text, _ in SENTENCES]
LONG = " ".join(WORDS)
MIXED = [LONG, "", *FILMS, "unheard of words", LONG + " " + LONG]
MASK_HALF = [{"mask_words": {"p": 0.5}}]


def pieces(side: str = "right"):
    tokenizer = word_pieces()
    tokenizer.padding_side = side
    return tokenizer


def texts(count: int = 0, tokenizers=None, **options) -> Texts:
    rows = (FILMS * 20)[: count or len(FILMS)]
    made = {"": Tokenizer(word_pieces(), 32)} if tokenizers is None else tokenizers
    return Texts({"sample_id": torch.arange(len(rows)) * 7 + 3}, [rows], made, **options)


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def rows(batch, name: str = "input_ids", mask: str = "attention_mask") -> dict[int, list[int]]:
    """The tokens of each sample without padding, by its id."""
    return {
        int(number): ids[on.bool()].tolist()
        for number, ids, on in zip(batch["sample_id"], batch[name], batch[mask], strict=True)
    }


def words(tokenizer, ids: list[int]) -> list[str]:
    found = tokenizer.convert_ids_to_tokens(ids)
    return [token for token in found if token not in {tokenizer.cls_token, tokenizer.sep_token}]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [3, 6, 64])
@pytest.mark.parametrize("paired", [False, True])
def test_batches_are_those_of_the_tokenizer(side, length, paired):
    tokenizer = pieces(side)
    seconds = MIXED[::-1] if paired else None
    tokens = Tokenizer(tokenizer, length)(MIXED, seconds)
    for chosen in ([0, 1, 2], [1], [5, 3, 3], [11, 0], list(range(len(MIXED)))):
        pair = None if seconds is None else [seconds[i] for i in chosen]
        options = {"truncation": True, "max_length": length, "padding": "longest", "return_tensors": "pt"}
        wanted = tokenizer([MIXED[i] for i in chosen], pair, **options)
        assert same(tokens.batch(torch.tensor(chosen)), dict(wanted))
    assert tokens.lengths.tolist() == [
        len(ids)
        for ids in tokenizer(MIXED, seconds, truncation=True, max_length=length)["input_ids"]  # unpadded
    ]


def test_another_number_than_zero_fills_up():
    """RoBERTa pads with 1, XLNet's token types with 3."""
    tokenizer = roberta_tokenizer()
    found = Tokenizer(tokenizer, 60)(["a", "great cast"]).batch(torch.tensor([0, 1]))
    assert same(found, dict(tokenizer(["a", "great cast"], padding=True, return_tensors="pt")))
    assert found["input_ids"][0, -1] == 1
    tokenizer = word_pieces()
    tokenizer._pad_token_type_id = 3
    found = Tokenizer(tokenizer, 60)(["a", "great cast"]).batch(torch.tensor([0, 1]))
    assert found["token_type_ids"].tolist() == [[0, 0, 0, 3], [0, 0, 0, 0]]


def test_texts_without_any_token():
    """A decoder's tokenizer adds none to an empty text; a batch of nothing would stop the training."""
    tokens = Tokenizer(decoder_tokenizer("<end>"), 9)(["", "a great cast", ""])
    assert tokens.batch(torch.tensor([2, 1, 0]))["attention_mask"].tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    empty = tokens.batch(torch.tensor([0, 2]))
    assert empty["input_ids"].tolist() == [[1], [1]]
    assert empty["attention_mask"].tolist() == [[0], [0]]
    nothing = Tokenizer(decoder_tokenizer("<end>"), 9)([""])
    assert nothing.batch(torch.tensor([0]))["input_ids"].tolist() == [[1]]


def test_an_empty_table_has_no_samples():
    empty = Texts({"sample_id": torch.arange(0)}, [[]], {"": Tokenizer(word_pieces(), 9)})
    assert len(empty) == len(empty.lengths) == 0


def test_columns_of_different_lengths_are_refused():
    """They would be read one beside the other."""
    with pytest.raises(DataError, match="expected 'attention_mask' to have as many numbers a text as 'input_ids'"):
        Tokens({"input_ids": [[1, 2], [3]], "attention_mask": [[1], [1, 1]]}, padding={})


def test_other_columns_and_ids_come_along():
    data = Texts(
        {"sample_id": torch.tensor([9, 4]), "labels": torch.tensor([1, 0])},
        [["a film", "great"]],
        {"": Tokenizer(word_pieces(), 8)},
    )
    batch = data.__getitems__([1, 0])
    assert batch["sample_id"].tolist() == [4, 9]
    assert batch["labels"].tolist() == [0, 1]
    assert batch["input_ids"].shape == (2, 4)
    assert data[1]["input_ids"].tolist() == [2, 14, 3]
    assert data[1]["sample_id"].item() == 4


def test_each_model_gets_its_own_tokens():
    own, other = word_pieces(), roberta_tokenizer()
    data = texts(tokenizers={"": Tokenizer(own, 32), "teacher/": Tokenizer(other, 32)})
    batch = data.__getitems__([2, 0])
    chosen = [FILMS[2], FILMS[0]]
    found = {name.removeprefix("teacher/"): value for name, value in batch.items() if name.startswith("teacher/")}
    assert same(found, dict(other(chosen, padding=True, truncation=True, max_length=32, return_tensors="pt")))
    mine = {name: value for name, value in batch.items() if not name.startswith("teacher/") and name != "sample_id"}
    assert same(mine, dict(own(chosen, padding=True, return_tensors="pt")))
    assert data.lengths.tolist() == [len(own(text)["input_ids"]) for text in FILMS]


# views


def test_a_view_is_a_function_of_seed_epoch_and_sample_id():
    """A resumed run, another batch size or another order must see the same words; another epoch must not."""
    data = texts(steps=MASK_HALF, seed=5)
    everyone = list(range(len(FILMS)))
    whole = rows(data.__getitems__(everyone))
    assert rows(data.__getitems__(everyone[::-1])) == whole
    assert {number: ids for i in everyone for number, ids in rows(data.__getitems__([i])).items()} == whole
    assert data[3]["input_ids"].tolist() == whole[3 * 7 + 3]
    data.set_epoch(1)
    assert rows(data.__getitems__(everyone)) != whole
    data.set_epoch(0)
    assert rows(data.__getitems__(everyone)) == whole
    assert rows(texts(steps=MASK_HALF, seed=6).__getitems__(everyone)) != whole
    moved = Texts(
        {"sample_id": torch.tensor([17, 3])}, [[FILMS[2], FILMS[0]]], data.tokenizers, steps=MASK_HALF, seed=5
    )
    assert rows(moved.__getitems__([0, 1])) == {17: whole[17], 3: whole[3]}


def test_a_view_is_a_tokenised_text():
    tokenizer = word_pieces()
    data = texts(steps=[{"mask_words": {"p": 1.0}}])
    found = data.__getitems__([0, 1])
    wanted = [" ".join([tokenizer.mask_token] * len(text.split())) for text in FILMS[:2]]
    del found["sample_id"]
    assert found.pop("view").tolist() == [0, 0]
    assert same(found, dict(tokenizer(wanted, padding=True, return_tensors="pt")))


def test_every_model_sees_the_same_words_and_its_own_mask():
    own, lower = word_pieces(), word_pieces(WORDS[::-1])
    third = roberta_tokenizer()
    made = {"": own, "teacher/big/": lower, "teacher/other/": third}
    data = texts(tokenizers={key: Tokenizer(each, 60) for key, each in made.items()}, steps=MASK_HALF)
    batch = data.__getitems__(list(range(len(FILMS))))
    mine, theirs = rows(batch), rows(batch, "teacher/big/input_ids", "teacher/big/attention_mask")
    others = rows(batch, "teacher/other/input_ids", "teacher/other/attention_mask")
    masked = 0
    for number, ids in mine.items():
        seen = words(own, ids)
        assert seen == words(lower, theirs[number])
        spelt = [third.mask_token if word == PLACEHOLDER else word for word in seen]
        assert others[number] == third(" ".join(spelt))["input_ids"]
        assert others[number].count(third.mask_token_id) == seen.count(own.mask_token)
        masked += seen.count(own.mask_token)
    assert masked > 0
    assert mine != theirs


def test_a_tokenizer_without_a_mask_uses_the_unknown_word():
    tokenizer = decoder_tokenizer("<end>")
    data = texts(tokenizers={"": Tokenizer(tokenizer, 32)}, steps=[{"mask_words": {"p": 1.0}}])
    assert data[0]["input_ids"].tolist() == [tokenizer.unk_token_id] * 5


def test_steps_follow_one_another_each_with_its_own_draws():
    steps = [{"delete_words": {"p": 0.3}}, {"mask_words": {"p": 0.3}}, "swap_words"]
    data = texts(steps=steps)
    assert rows(data.__getitems__([0, 1, 2])) == rows(texts(steps=steps).__getitems__([0, 1, 2]))
    twice = texts(160, steps=[{"mask_words": {"p": 0.5}}] * 2).__getitems__(list(range(160)))
    ids = [i for row in rows(twice).values() for i in row if i not in (2, 3)]
    assert np.mean([i == 4 for i in ids]) == pytest.approx(0.75, abs=0.05)  # with the same draws it would be a half


def test_the_texts_of_a_pair_have_draws_of_their_own():
    data = Texts(
        {"sample_id": torch.arange(1)}, [[LONG], [LONG]], {"": Tokenizer(word_pieces(), 64)}, steps=MASK_HALF, seed=1
    )
    sample = data[0]
    first, second = (sample["input_ids"][sample["token_type_ids"] == kind].tolist() for kind in (0, 1))
    assert len(first) - 1 == len(second) == len(WORDS) + 1
    assert first[1:] != second


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"mask_word": {}}, "mask_words"),
        ({"mask_words": {"p": 2}}, "less than or equal to 1"),
        ({"noise": {"std": 0.5}}, "'noise' does not change texts"),
    ],
)
def test_wrong_steps(step, message):
    with pytest.raises(DataError, match=message):
        texts(steps=[step])


def test_token_ids_alone_cannot_be_augmented():
    tokens = Tokenizer(word_pieces(), 8)(FILMS)
    plain = Texts({"sample_id": torch.arange(8)}, tokens={"": tokens})
    assert same(plain.__getitems__([1, 2]), texts().__getitems__([1, 2]) | {"sample_id": torch.tensor([1, 2])})
    with pytest.raises(DataError, match="hold only token ids; give the texts as well"):
        Texts({"sample_id": torch.arange(8)}, tokens={"": tokens}, steps=MASK_HALF)


# loaders


@pytest.mark.parametrize("steps", [[], MASK_HALF])
def test_workers_of_a_loader_give_the_same_batches(steps):
    made = {"": Tokenizer(word_pieces(), 32), "teacher/": Tokenizer(roberta_tokenizer(), 32)}
    data = texts(tokenizers=made, steps=steps)
    loader = DataLoader(
        data, batch_size=3, num_workers=2, collate_fn=lambda batch: batch, persistent_workers=True
    )  # its workers hold copies of the data set, made in epoch 0
    seen = []
    for epoch in range(2):
        data.set_epoch(epoch)
        for start, batch in zip((0, 3, 6), loader, strict=True):
            assert same(batch, data.__getitems__(list(range(start, min(start + 3, 8)))))
            seen.append(rows(batch))
    assert (seen[:3] != seen[3:]) == bool(steps)


def test_it_can_be_pickled():
    """Where workers are spawned and not forked, the data set is sent to them."""
    data = texts(steps=MASK_HALF, seed=4)
    data.set_epoch(3)
    again = pickle.loads(pickle.dumps(data))
    assert again.epoch == 3
    assert same(again.__getitems__([4, 1, 6]), data.__getitems__([4, 1, 6]))
