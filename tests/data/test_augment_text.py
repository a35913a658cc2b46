import pytest
import torch

from potstill.data.augment_text import delete_words, mask_words, swap_words
from potstill.data.draws import Draws
from potstill.registry import augmentations

SENTENCE = " ".join(f"w{i}" for i in range(40))
TEXTS = [SENTENCE, "one", "", "  two   words \n", SENTENCE]


def draws(*samples: int, epoch: int = 0) -> Draws:
    return Draws(0, epoch, torch.tensor(samples, dtype=torch.int64))


ALL = pytest.mark.parametrize("augment", [mask_words, delete_words, swap_words])


@ALL
def test_a_view_is_a_pure_function_of_the_sample(augment):
    views = augment(TEXTS, draws=draws(0, 1, 2, 3, 4), p=0.3)
    assert augment([TEXTS[3]], draws=draws(3), p=0.3) == [views[3]]  # though the longest text is gone
    assert augment(TEXTS[3:], draws=draws(3, 4), p=0.3) == views[3:]
    assert augment(TEXTS, draws=draws(0, 1, 2, 3, 4, epoch=1), p=0.3) != views
    assert views[0] != views[4]  # the same text, another sample
    assert TEXTS[0] == SENTENCE


@ALL
def test_no_words_change_with_probability_zero(augment):
    assert augment(TEXTS, draws=draws(0, 1, 2, 3, 4), p=0) == [" ".join(text.split()) for text in TEXTS]


@ALL
def test_no_texts_and_empty_texts_pass(augment):
    assert augment([], draws=draws()) == []
    assert augment(["", " "], draws=draws(0, 1), p=1) == ["", ""]


def test_mask_words_replaces_each_word_with_its_probability():
    assert mask_words(["a b", "c"], draws=draws(0, 1), p=1, mask_token="<m>") == ["<m> <m>", "<m>"]
    views = mask_words([SENTENCE] * 100, draws=draws(*range(100)), p=0.2)
    for view in views:
        assert all(new in (old, "[MASK]") for old, new in zip(SENTENCE.split(), view.split(), strict=True))
    assert sum(view.count("[MASK]") for view in views) / 4000 == pytest.approx(0.2, abs=0.03)


def test_delete_words_keeps_the_order_and_at_least_one_word():
    views = delete_words([SENTENCE] * 100, draws=draws(*range(100)), p=0.2)
    for view in views:
        places = [int(word[1:]) for word in view.split()]
        assert places == sorted(set(places))
    assert sum(len(view.split()) for view in views) / 4000 == pytest.approx(0.8, abs=0.03)
    survivors = delete_words([SENTENCE] * 100, draws=draws(*range(100)), p=1)
    assert all(len(view.split()) == 1 for view in survivors)
    assert len(set(survivors)) > 20


def test_swap_words_swaps_neighbours_once():
    assert swap_words(["a b c d e"], draws=draws(0), p=1) == ["b a d c e"]
    moved = 0
    for view in swap_words([SENTENCE] * 100, draws=draws(*range(100)), p=0.2):
        distances = [abs(int(word[1:]) - place) for place, word in enumerate(view.split())]
        assert sorted(view.split()) == sorted(SENTENCE.split())
        assert max(distances) <= 1
        moved += sum(distances)
    assert moved / 4000 == pytest.approx(2 * 0.2 / 1.2, abs=0.04)  # a swap takes two places


def test_registration_and_options():
    for name in ("mask_words", "delete_words", "swap_words"):
        assert augmentations.facts(name)["kind"] == "text"
        assert any("less than or equal to 1" in str(each) for each in augmentations.check(name, {"p": 2}))
    assert augmentations.check("mask_words", {"p": 0.1, "mask_token": "<mask>"}) == []
