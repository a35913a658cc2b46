"""Two vocabularies, with real small tokenizers of three kinds: common tokens, and positions that have read the same."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from potstill.errors import ObjectiveError
from potstill.knowledge.vocabulary import VocabularyMap, align_spans, gather_spans, pad_logits

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "A café in Zürich sells naïve crêpes; the foxes are jumping overjoyed.",
    "Distillation of knowledge: the teacher teaches, the student learns the teacher's knowledge.",
    "Sleeping dogs lie. The brownest fox is quickest in the foxhole.",
]


@pytest.fixture(scope="module")
def byte_level() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of GPT-2's kind."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="module")
def word_piece() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of BERT's kind, uncased, which drops accents."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    ends = [("[CLS]", backend.token_to_id("[CLS]")), ("[SEP]", backend.token_to_id("[SEP]"))]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="module")
def sentence_piece() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of Llama's kind: spaces are letters, unknown bytes have tokens of their own."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=tokens[:2], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens(tokens[2:])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the same tokens, padded ----------------------------------------------------------------------------------------


def test_padding_is_impossible_and_not_zero():
    logits = torch.tensor([[-3.0, -4.0]])
    assert pad_logits(logits, 4).tolist() == [[-3.0, -4.0, -math.inf, -math.inf]]
    torch.testing.assert_close(pad_logits(logits, 4).softmax(-1)[:, :2], logits.softmax(-1))
    assert pad_logits(logits, 1).tolist() == [[-3.0]]
    assert pad_logits(logits, 2) is logits


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        (50257, 50304, "same"),  # GPT-2, padded to a multiple of 64
        (151936, 152064, "same"),  # Qwen2, small and large
        (32001, 32000, "same"),  # Llama with a token for padding
        (32000, 32768, "other"),  # Mistral 0.1 and 0.3, of which the ids are others
        (30522, 50257, "other"),
        (5, 8, "other"),
        (7, 7, "same"),
    ],
)
def test_sizes_alone_tell_padding_from_another_vocabulary(student, teacher, kind):
    assert VocabularyMap.of_sizes(student, teacher).kind == kind


def test_logits_that_are_padded_are_cut():
    student, teacher = randn(2, 3, 100), randn(2, 3, 101, seed=1)
    ours, theirs = VocabularyMap.of_sizes(100, 101).align_logits(student, teacher)
    assert torch.equal(ours, student)
    assert torch.equal(theirs, teacher[..., :100])


def test_the_same_tokenizer_with_padded_heads(byte_level):
    vocabulary = VocabularyMap.of_tokenizers(byte_level, byte_level)
    size = len(byte_level)
    assert (vocabulary.kind, vocabulary.share) == ("same", 1)
    student, teacher = randn(2, size + 5), randn(2, size + 22, seed=1)
    ours, theirs = vocabulary.align_logits(student, teacher)
    assert torch.equal(ours, student[:, :size])
    assert torch.equal(theirs, teacher[:, :size])
    teacher[:, size:] = 50.0  # the head's padding took all of the probability
    assert vocabulary.covered(teacher, "teacher").max() < 1e-6
    assert vocabulary.covered(teacher[:, :size], "teacher").tolist() == pytest.approx([1, 1])


def test_tokens_that_one_side_has_added_are_cut():
    ours = {"a": 0, "b": 1, "c": 2}
    vocabulary = VocabularyMap.of_tokenizers(ours, {**ours, "<new>": 3})
    assert vocabulary.kind == "same"
    student, teacher = torch.tensor([[1.0, 2, 3]]), torch.tensor([[4.0, 5, 6, 7]])
    assert vocabulary.align_logits(student, teacher)[1].tolist() == [[4, 5, 6]]
    expected = math.exp(-3) + math.exp(-2) + math.exp(-1)
    assert vocabulary.covered(teacher, "teacher").item() == pytest.approx(expected / (expected + 1))


# ---- other ids ------------------------------------------------------------------------------------------------------


def test_common_tokens_are_gathered_in_one_order():
    student, teacher = {"a": 0, "b": 1, "c": 2, "d": 3}, {"c": 0, "x": 1, "a": 2, "d": 3, "y": 4}
    vocabulary = VocabularyMap.of_tokenizers(student, teacher)
    assert (vocabulary.kind, vocabulary.share) == ("common", 0.75)
    ours, theirs = vocabulary.align_logits(torch.tensor([[10.0, 11, 12, 13]]), torch.tensor([[22.0, 91, 20, 23, 92]]))
    assert ours.tolist() == [[10, 12, 13]]
    assert theirs.tolist() == [[20, 22, 23]]
    assert "common, 3 common tokens, 75.0%" in repr(vocabulary)


def test_the_same_words_with_other_ids_are_not_the_same_vocabulary():
    """Compared id by id, each token would learn another one's probability, and nothing would fail."""
    assert VocabularyMap.of_tokenizers({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1, "x": 2}).kind == "common"
    vocabulary = VocabularyMap.of_tokenizers({"a": 0, "b": 1}, {"b": 0, "a": 1})
    assert vocabulary.kind == "common"
    ours, theirs = vocabulary.align_logits(torch.tensor([[1.0, 2]]), torch.tensor([[2.0, 1]]))
    assert torch.equal(ours, theirs)


def test_aligned_logits_keep_the_gradient_of_what_is_common():
    student = torch.zeros(1, 4, requires_grad=True)
    vocabulary = VocabularyMap.of_tokenizers({"a": 0, "b": 1, "c": 2, "d": 3}, {"d": 0, "b": 1, "x": 2})
    vocabulary.align_logits(student, torch.zeros(1, 3))[0].sum().backward()
    assert student.grad.tolist() == [[0, 1, 0, 1]]


def test_words_are_told_from_pieces_of_words(byte_level, word_piece):
    """``the`` begins a word in WordPiece and goes on with one in a byte-level vocabulary."""
    vocabulary = VocabularyMap.of_tokenizers(word_piece, byte_level, minimum=0.0)
    ours = {place: token for token, place in word_piece.get_vocab().items()}
    theirs = {place: token for token, place in byte_level.get_vocab().items()}
    pairs = {ours[a]: theirs[b] for a, b in zip(*map(Tensor.tolist, _ids(vocabulary)), strict=True)}
    assert pairs["the"] == "Ġthe"
    assert pairs["##e"] == "e"
    assert pairs[","] == ","
    assert len(pairs) > 20
    for one, other in pairs.items():
        inner = one.startswith("##") or not any(letter.isalnum() for letter in one)
        assert other == (one.removeprefix("##") if inner else f"Ġ{one}")


def test_bytes_spaces_and_ends_correspond(byte_level, sentence_piece):
    vocabulary = VocabularyMap.of_tokenizers(byte_level, sentence_piece, minimum=0.0)
    ours = {place: token for token, place in byte_level.get_vocab().items()}
    theirs = {place: token for token, place in sentence_piece.get_vocab().items()}
    pairs = {ours[a]: theirs[b] for a, b in zip(*map(Tensor.tolist, _ids(vocabulary)), strict=True)}
    assert pairs["<|end|>"] == "</s>"
    assert pairs["Ġthe"] == "▁the"
    assert pairs["ĉ"] == "<0x09>"  # the tabulator
    assert pairs["Ã"] == "<0xC3>"  # the first byte of é
    for one, other in pairs.items():
        if one != "<|end|>" and not other.startswith("<0x"):
            assert byte_level.backend_tokenizer.decoder.decode([one]) == other.replace("▁", " ")


def test_special_tokens_are_compared_by_name_alone():
    class Named(dict):
        all_special_tokens = ("[CLS]", "<end>")
        eos_token = "<end>"

    class Other(Named):
        all_special_tokens = ("[CLS]", "</s>")
        eos_token = "</s>"

    base = {"[CLS]": 0, "<end>": 1, "a": 2}
    assert VocabularyMap.of_tokenizers(Named(base), Other({"</s>": 0, "[CLS]": 1, "a": 2})).share == 1
    both = {**base, "</s>": 3}  # where both vocabularies have both, they mean what they mean
    assert VocabularyMap.of_tokenizers(Named(both), Other(both)).kind == "same"


def _ids(vocabulary: VocabularyMap) -> tuple[Tensor, Tensor]:
    return vocabulary.student_ids, vocabulary.teacher_ids


# ---- another vocabulary ---------------------------------------------------------------------------------------------


def test_another_vocabulary_is_refused_and_says_what_to_use():
    vocabulary = VocabularyMap.of_tokenizers({"a": 0, "b": 1, "c": 2}, {"x": 0, "y": 1, "a": 2})
    assert vocabulary.kind == "other"
    with pytest.raises(ObjectiveError, match=r"33% of the smaller one is in both.*`loss: uld`"):
        vocabulary.align_logits(torch.zeros(1, 3), torch.zeros(1, 3))
    assert VocabularyMap.of_tokenizers({"a": 0, "b": 1, "c": 2}, {"x": 0, "a": 2}, minimum=0.3).kind == "common"
    with pytest.raises(ObjectiveError, match="uld"):
        VocabularyMap.of_sizes(30522, 50257).align_logits(torch.zeros(1, 30522), torch.zeros(1, 50257))
    assert VocabularyMap.of_tokenizers({"a": 0}, {"b": 0}).covered(torch.zeros(2, 1), "student").tolist() == [0, 0]


def test_the_tokenizer_of_another_model_is_noticed():
    vocabulary = VocabularyMap.of_tokenizers({"a": 0, "b": 9}, {"a": 0, "b": 1})
    with pytest.raises(ObjectiveError, match=r"student's tokenizer has ids to 9, got logits \[1, 5\]"):
        vocabulary.align_logits(torch.zeros(1, 5), torch.zeros(1, 2))


def test_it_moves_with_its_owner_and_is_in_no_checkpoint():
    vocabulary = VocabularyMap.of_tokenizers({"a": 0, "b": 1}, {"b": 0, "a": 1})
    assert vocabulary.state_dict() == {}
    assert vocabulary.to("meta").student_ids.device.type == "meta"


# ---- spans ----------------------------------------------------------------------------------------------------------


def groups(student: list[tuple[int, int]], teacher: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    spans = align_spans(torch.tensor([student]), torch.tensor([teacher]))
    ranges = [
        [list(range(first, last + 1)) for first, last in side[0].tolist()] for side in (spans.student, spans.teacher)
    ]
    assert spans.mask.all()
    return list(zip(*ranges, strict=True))


def by_letters(student: list[tuple[int, int]], teacher: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """Tokens that share a letter belong together, directly or through others: connected components, one text."""
    nodes = [("s", place, span) for place, span in enumerate(student)] + [
        ("t", place, span) for place, span in enumerate(teacher)
    ]
    nodes = [node for node in nodes if node[2][1] > node[2][0]]
    label = {node[:2]: number for number, node in enumerate(nodes)}
    changed = True
    while changed:
        changed = False
        for one in nodes:
            for other in nodes:
                shares = max(one[2][0], other[2][0]) < min(one[2][1], other[2][1])
                if shares and label[one[:2]] != label[other[:2]]:
                    label[one[:2]] = label[other[:2]] = min(label[one[:2]], label[other[:2]])
                    changed = True
    found = []
    for number in dict.fromkeys(label.values()):
        sides = [[place for side, place in label if side == name and label[side, place] == number] for name in "st"]
        if all(sides):
            found.append((sides[0], sides[1]))
    return sorted(found)


EXAMPLES = {
    "the same split": ([(0, 3), (4, 7)], [(0, 3), (4, 7)], [([0], [0]), ([1], [1])]),
    "a word in pieces": ([(0, 2), (2, 5), (6, 9)], [(0, 5), (6, 9)], [([0, 1], [0]), ([2], [1])]),
    "pieces that cross": ([(0, 2), (2, 6)], [(0, 4), (4, 6)], [([0, 1], [0, 1])]),
    "spaces before words": ([(0, 3), (4, 7)], [(0, 3), (3, 7)], [([0], [0]), ([1], [1])]),
    "spaces after words": ([(0, 3), (4, 7)], [(0, 4), (4, 7)], [([0], [0]), ([1], [1])]),
    "special tokens": ([(0, 0), (0, 3), (4, 7), (0, 0)], [(0, 3), (4, 7), (7, 7)], [([1], [0]), ([2], [1])]),
    "a special token within a text": ([(0, 3), (0, 0), (4, 7)], [(0, 3), (4, 7)], [([0], [0]), ([2], [1])]),
    "bytes of an emoji": ([(0, 1), (0, 1), (0, 1), (1, 4)], [(0, 1), (1, 4)], [([0, 1, 2], [0]), ([3], [1])]),
    "a space of its own": ([(0, 3), (3, 4), (4, 7)], [(0, 3), (4, 7)], [([0], [0]), ([2], [1])]),
    "a letter that one drops": ([(0, 1), (2, 3)], [(0, 1), (1, 2), (2, 3)], [([0], [0]), ([1], [2])]),
    "nothing in common": ([(0, 2)], [(2, 4)], []),
    "nothing at all": ([(0, 0)], [(0, 0), (0, 0)], []),
    "two texts": (
        [(0, 0), (0, 3), (4, 6), (0, 0), (0, 2), (3, 8), (0, 0)],
        [(0, 0), (0, 6), (0, 0), (0, 0), (0, 8), (0, 0)],
        [([1, 2], [1]), ([4, 5], [4])],
    ),
    "two texts without a token between them": (
        [(0, 3), (4, 6), (0, 2), (3, 8)],
        [(0, 0), (0, 6), (0, 0), (0, 2), (3, 8)],
        [([0, 1], [1]), ([2], [3]), ([3], [4])],
    ),
    "two texts of one token": ([(0, 3), (0, 0), (0, 5)], [(0, 3), (0, 0), (0, 5)], [([0], [0]), ([2], [2])]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_spans_by_hand(name):
    student, teacher, expected = EXAMPLES[name]
    assert groups(student, teacher) == expected
    assert groups(teacher, student) == [(ours, theirs) for theirs, ours in expected]


def test_spans_are_the_connected_tokens():
    """Against a search over all pairs of tokens, on random splits with gaps and shared letters."""
    generator = torch.Generator().manual_seed(0)

    def split() -> list[tuple[int, int]]:
        offsets, place = [(0, 0)], 0
        while place < 30:
            width, gap, copies = (
                int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((1, 6), (0, 2), (1, 8))
            )
            offsets += [(place, place + width)] * (1 if copies < 6 else copies - 4)
            place += width + gap
        return [*offsets, (0, 0)]

    for _ in range(60):
        student, teacher = split(), split()
        assert groups(student, teacher) == by_letters(student, teacher)


def test_a_batch_is_padded_and_masked():
    student = torch.tensor([[[0, 3], [4, 7], [0, 0]], [[0, 2], [2, 5], [0, 0]]])
    teacher = torch.tensor([[[0, 3], [4, 7]], [[0, 5], [0, 0]]])
    spans = align_spans(student, teacher)
    assert spans.mask.tolist() == [[True, True], [True, False]]
    assert spans.student.tolist() == [[[0, 0], [1, 1]], [[0, 1], [0, -1]]]
    assert spans.teacher.tolist() == [[[0, 0], [1, 1]], [[0, 0], [0, -1]]]
    empty = align_spans(torch.zeros(2, 3, 2, dtype=torch.long), torch.zeros(2, 0, 2, dtype=torch.long))
    assert empty.mask.shape == (2, 0)


@pytest.mark.parametrize(
    "pair", [("byte_level", "word_piece"), ("sentence_piece", "byte_level"), ("word_piece", "sentence_piece")]
)
def test_spans_of_real_tokenizers_cover_the_same_letters(pair, request):
    texts = [*TEXTS, "Über-naïve 🦊🦊 jumps  twice\tover Zürich's café… 知識の蒸留!", "one", ""]
    sides = [request.getfixturevalue(name) for name in pair]
    encoded = [
        [tokenizer(text, return_offsets_mapping=True)["offset_mapping"] for text in texts] for tokenizer in sides
    ]
    longest = [max(map(len, side)) for side in encoded]
    offsets = [
        torch.tensor([[*row, *[(0, 0)] * (length - len(row))] for row in side])
        for side, length in zip(encoded, longest, strict=True)
    ]
    spans = align_spans(*offsets)
    for row, text in enumerate(texts):
        assert (
            groups(encoded[0][row], encoded[1][row]) == by_letters(encoded[0][row], encoded[1][row]) if text else True
        )
        seen: Counter[int] = Counter()
        for (a, b), (c, d), counts in zip(
            spans.student[row].tolist(), spans.teacher[row].tolist(), spans.mask[row].tolist(), strict=True
        ):
            if not counts:
                continue
            ours, theirs = (
                text[offset[row, first, 0] : offset[row, last, 1]].strip()
                for offset, first, last in ((offsets[0], a, b), (offsets[1], c, d))
            )
            assert ours == theirs
            seen.update(range(a, b + 1))
        assert max(seen.values(), default=1) == 1
        words = len(text.split())
        assert len(text) < 20 or int(spans.mask[row].sum()) >= 0.7 * words


def test_vectors_are_gathered_by_span():
    signal = torch.arange(1.0, 6.0)[None, :, None] * torch.tensor([1.0, 10.0])
    spans = torch.tensor([[[0, 0], [1, 3], [4, 4], [0, -1]]])
    assert gather_spans(signal, spans)[0, :, 0].tolist() == [1, 4, 5, 0]
    assert gather_spans(signal, spans, "mean")[0].tolist() == [[1, 10], [3, 30], [5, 50], [0, 0]]
    assert gather_spans(signal[..., 0], spans, "mean")[0].tolist() == [1, 3, 5, 0]


def test_what_is_outside_a_span_has_no_part_in_it():
    """Not even as NaN: a running sum, cut into spans, would spread it over all that follow."""
    signal = torch.tensor([[[1.0], [math.nan], [3.0], [5.0]]], requires_grad=True)
    spans = torch.tensor([[[0, 0], [2, 3]]])
    for how, expected in (("mean", [1, 4]), ("last", [1, 5])):
        value = gather_spans(signal, spans, how)
        assert value[0, :, 0].tolist() == expected
    gather_spans(signal, spans, "mean").sum().backward()
    assert signal.grad[0, :, 0].tolist() == [1, 0, 0.5, 0.5]


def test_means_of_narrow_types_are_taken_in_fp32():
    signal = torch.full((1, 600, 2), 1.01).bfloat16()
    value = gather_spans(signal, torch.tensor([[[0, 599]]]), "mean")
    assert value.dtype == torch.bfloat16
    assert torch.equal(value[:, 0], signal[:, 0])


def test_the_end_of_a_span_predicts_the_same_continuation(byte_level, sentence_piece):
    """What a causal model says after the last token of a span follows the same text on both sides."""
    text = TEXTS[1]
    encoded = [
        tokenizer(text, return_offsets_mapping=True, return_tensors="pt") for tokenizer in (byte_level, sentence_piece)
    ]
    spans = align_spans(*(each["offset_mapping"] for each in encoded))
    read = [
        gather_spans(each["offset_mapping"][..., 1], side)
        for each, side in zip(encoded, (spans.student, spans.teacher), strict=True)
    ]
    assert torch.equal(*read)
    assert len(set(read[0][0].tolist())) == read[0].shape[1] >= len(text.split())


@pytest.mark.parametrize(("student", "teacher"), [((2, 3, 2), (3, 3, 2)), ((2, 3), (2, 3)), ((2, 3, 4), (2, 3, 4))])
def test_offsets_must_be_offsets(student, teacher):
    with pytest.raises(ObjectiveError, match="return_offsets_mapping=True"):
        align_spans(torch.zeros(student, dtype=torch.long), torch.zeros(teacher, dtype=torch.long))


def test_wrong_gathering():
    with pytest.raises(ObjectiveError, match="'last' or 'mean', got 'first'"):
        gather_spans(torch.zeros(1, 2, 3), torch.zeros(1, 1, 2), "first")  # type: ignore[arg-type]
    with pytest.raises(ObjectiveError, match=r"got \[1, 2, 3\] and \[2, 1, 2\]"):
        gather_spans(torch.zeros(1, 2, 3), torch.zeros(2, 1, 2, dtype=torch.long))
