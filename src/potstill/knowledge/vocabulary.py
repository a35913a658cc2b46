"""Two vocabularies, two ways to split a text: which tokens are the same, and which positions have read the same."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.errors import ObjectiveError

_PADDING = 0.01  # heads are padded to a multiple of 64 or more; a vocabulary that is larger by more is another one
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class VocabularyMap(nn.Module):
    """Which ids of the student's vocabulary mean the same token as which of the teacher's.

    A token is compared by the text that it stands for where the tokenizers mark the beginning of a word in other ways
    (``Ġthe``, ``▁the``, and WordPiece's ``the`` beside ``##the``), so that no beginning of a word is taken for the
    middle of one; letter case counts. The tokens that end a text correspond, whatever they are called, where neither
    vocabulary has the other's. Make it with :meth:`of_tokenizers` or :meth:`of_sizes`.

    Args:
        student_ids: ids of the common tokens at the student ``[K]``, increasing.
        teacher_ids: ids of the same tokens at the teacher ``[K]``.
        student_size: number of the student's tokens.
        teacher_size: number of the teacher's.
        minimum: share of the smaller vocabulary that must be common for tokens to be compared one by one.

    Attributes:
        kind: ``same`` where the ids 0 to K − 1 mean the same tokens and one vocabulary has no others; ``common`` where
            enough tokens are in both; ``other`` where too few are.
        share: common tokens by those of the smaller vocabulary, 0 to 1.
    """

    student_ids: Tensor
    teacher_ids: Tensor

    def __init__(
        self, student_ids: Tensor, teacher_ids: Tensor, student_size: int, teacher_size: int, *, minimum: float = 0.5
    ) -> None:
        super().__init__()
        self.register_buffer("student_ids", student_ids, persistent=False)
        self.register_buffer("teacher_ids", teacher_ids, persistent=False)
        count, smaller = len(student_ids), min(student_size, teacher_size)
        self.share = count / max(1, smaller)
        self._largest = {
            whose: int(ids.max()) if count else -1
            for whose, ids in (("student", student_ids), ("teacher", teacher_ids))
        }
        alike = torch.equal(student_ids, teacher_ids) and torch.equal(student_ids, torch.arange(count))
        self.kind: Literal["same", "common", "other"] = "other"
        if count and self.share >= minimum:
            self.kind = "same" if alike and count == smaller else "common"

    @classmethod
    def of_tokenizers(cls, student: Any, teacher: Any, *, minimum: float = 0.5) -> VocabularyMap:
        """Return the map between the vocabularies of two tokenizers.

        Args:
            student: a tokenizer of transformers or of tokenizers, or a mapping from token to id.
            teacher: likewise.
            minimum: share of the smaller vocabulary that must be common for tokens to be compared one by one.
        """
        ours, theirs = _vocabulary(student), _vocabulary(teacher)
        marks = _marks(ours), _marks(theirs)
        alike = marks[0] == marks[1]  # then tokens are the same where they are written the same
        mine, others = (
            _keys(vocabulary, "" if alike else mark, tokenizer)
            for vocabulary, mark, tokenizer in zip((ours, theirs), marks, (student, teacher), strict=True)
        )
        ends = _end(student), _end(teacher)
        pairs = [(place, others[key]) for key, place in mine.items() if key in others]
        if ends[0] in ours and ends[1] in theirs and ends[0] not in theirs and ends[1] not in ours:
            pairs.append((ours[ends[0]], theirs[ends[1]]))
        pairs.sort()
        ids = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
        return cls(ids[:, 0].contiguous(), ids[:, 1].contiguous(), len(ours), len(theirs), minimum=minimum)

    @classmethod
    def of_sizes(cls, student: int, teacher: int) -> VocabularyMap:
        """Return the map between vocabularies of which only the sizes of the logits are known.

        Up to one per cent more counts as padding of the same vocabulary; all else is another one.

        Args:
            student: size of the student's logits.
            teacher: size of the teacher's.
        """
        smaller, larger = sorted((student, teacher))
        ids = torch.arange(smaller if larger - smaller <= _PADDING * smaller else 0)
        return cls(ids, ids.clone(), student, teacher)

    def align_logits(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both logits over the common tokens, in the student's order.

        What is left out, padding of the head included, takes no part in the softmax that follows: the student's
        probability of it is left to the hard loss. :meth:`covered` tells how much that is.

        Args:
            student: ``[..., V]``; V may be larger than the tokenizer's vocabulary.
            teacher: ``[..., V']`` at positions that correspond; see :func:`align_spans`.

        Raises:
            ObjectiveError: too few tokens are common, or there are fewer logits than ids.
        """
        if self.kind == "other":
            raise ObjectiveError(
                f"the vocabularies differ: {self.share:.0%} of the smaller one is in both, so tokens cannot be "
                "compared one by one; compare sorted probabilities with `loss: uld`"
            )
        return self._gather(student, "student"), self._gather(teacher, "teacher")

    def covered(self, logits: Tensor, whose: Literal["student", "teacher"]) -> Tensor:
        """Return the share of the probability ``[...]`` that is on common tokens.

        Args:
            logits: ``[..., V]`` of that model.
            whose: which of the two models they are from.

        Raises:
            ObjectiveError: there are fewer logits than ids.
        """
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self._gather(wide.softmax(-1), whose).sum(-1)

    def extra_repr(self) -> str:
        """Return what is shown of it."""
        return f"{self.kind}, {len(self.student_ids)} common tokens, {self.share:.1%} of the smaller vocabulary"

    def _gather(self, logits: Tensor, whose: str) -> Tensor:
        ids = self.student_ids if whose == "student" else self.teacher_ids
        if self._largest[whose] >= logits.shape[-1]:
            raise ObjectiveError(
                f"the {whose}'s tokenizer has ids to {self._largest[whose]}, got logits {list(logits.shape)}; "
                "is it the tokenizer of this model?"
            )
        if self.kind == "same":
            return pad_logits(logits, len(ids))
        return logits.index_select(-1, ids.to(logits.device))


def pad_logits(logits: Tensor, size: int) -> Tensor:
    """Return logits over ``size`` tokens: the last ones cut off, or tokens at −inf added, which are impossible.

    A token padded with 0 would take part in the softmax, often as the most likely one.

    Args:
        logits: ``[..., V]``.
        size: number of tokens wanted.

    Returns:
        ``[..., size]``.
    """
    return F.pad(logits, (0, size - logits.shape[-1]), value=-math.inf) if size != logits.shape[-1] else logits


@dataclass(frozen=True, eq=False)
class SpanGroups:
    """The smallest pieces of a text at whose ends both tokenizers split it.

    Attributes:
        student: positions of the first and the last token of each piece at the student ``[B, G, 2]``; 0 and −1 where
            there is none.
        teacher: likewise at the teacher.
        mask: the pieces that there are ``[B, G]``; they stand first.
    """

    student: Tensor
    teacher: Tensor
    mask: Tensor


def align_spans(student: Tensor, teacher: Tensor) -> SpanGroups:
    """Return the groups of student's and of teacher's tokens that cover the same characters of one text.

    Two tokens that share a character are in one group, so the bytes of an emoji are. Tokens without characters (0 to 0:
    special ones, padding) are in none, nor are characters that only one tokenizer has a token for. In a pair of texts,
    whose offsets begin anew, the first is aligned with the first and the second with the second.

    Args:
        student: offsets of each token, first character and the one after the last, ``[B, T, 2]``: the
            ``offset_mapping`` of a fast tokenizer.
        teacher: offsets in the same texts ``[B, T', 2]``.

    Raises:
        ObjectiveError: they are not offsets of the same number of texts.
    """
    if len(student) != len(teacher) or any(side.ndim != 3 or side.shape[2] != 2 for side in (student, teacher)):
        raise ObjectiveError(
            f"aligning tokens expected offsets [B, T, 2] in the same texts, got {list(student.shape)} and "
            f"{list(teacher.shape)}; ask the tokenizers for return_offsets_mapping=True"
        )
    teacher = teacher.to(student.device)
    length = int(max(student.max(), teacher.max())) if student.numel() and teacher.numel() else 0
    sides = [_unrolled(offsets.long(), length) for offsets in (student, teacher)]
    size = 1 + max(int(side.max()) if side.numel() else 0 for side in sides)
    cuts = ~(_inside(sides[0], size) | _inside(sides[1], size))
    number = cuts.long().cumsum(1) - 1
    ends = [_ends(side, number, size) for side in sides]
    both = (ends[0][..., 1] >= 0) & (ends[1][..., 1] >= 0)
    count = int(both.sum(1).max()) if len(both) else 0
    order = both.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    mask = both.gather(1, order)
    absent = torch.tensor([0, -1], device=mask.device)
    taken = [torch.where(mask[..., None], end.gather(1, order[..., None].expand(-1, -1, 2)), absent) for end in ends]
    return SpanGroups(taken[0], taken[1], mask)


def gather_spans(signal: Tensor, spans: Tensor, how: Literal["last", "mean"] = "last") -> Tensor:
    """Return one vector a span.

    Args:
        signal: hidden states or logits ``[B, T, ...]``.
        spans: first and last positions ``[B, G, 2]``, of :class:`SpanGroups`.
        how: ``last`` takes the last token of the span: it alone has read all of it in a causal model, and its logits
            are those of what comes next. ``mean`` averages the tokens of the span.

    Returns:
        ``[B, G, ...]``; zeros where there is no span.

    Raises:
        ObjectiveError: there is no such way, or the spans are of another batch.
    """
    if how not in ("last", "mean"):
        raise ObjectiveError(f"spans are gathered by 'last' or 'mean', got '{how}'")
    if signal.ndim < 2 or spans.ndim != 3 or len(signal) != len(spans):
        raise ObjectiveError(
            f"expected a signal [B, T, ...] and spans [B, G, 2], got {list(signal.shape)} and {list(spans.shape)}"
        )
    first, last = spans.to(signal.device).unbind(-1)
    width = (last - first + 1).reshape(*first.shape, *[1] * (signal.ndim - 2))
    if how == "last":
        return _at(signal, last.clamp_min(0)).masked_fill(width <= 0, 0)
    total = torch.zeros_like(_at(signal, first), dtype=torch.promote_types(signal.dtype, torch.float32))
    for step in range(int(width.max()) if width.numel() else 0):
        total = total + _at(signal, (first + step).clamp_max(signal.shape[1] - 1)).masked_fill(width <= step, 0)
    return (total / width.clamp_min(1)).to(signal.dtype)


def _vocabulary(tokenizer: Any) -> Mapping[str, int]:
    vocabulary: Mapping[str, int] = tokenizer if isinstance(tokenizer, Mapping) else tokenizer.get_vocab()
    return vocabulary


def _marks(vocabulary: Mapping[str, int]) -> str:
    """Return how a vocabulary marks where words begin (``Ġ``, ``▁``), do not (``##``) or end (``</w>``)."""
    counts = {mark: sum(token.startswith(mark) for token in vocabulary) for mark in ("Ġ", "▁", "##")}
    counts["</w>"] = sum(token.endswith("</w>") for token in vocabulary)
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else "words"


def _keys(vocabulary: Mapping[str, int], mark: str, tokenizer: Any) -> dict[bytes | str, int]:
    """Return the ids by what the tokens mean: as they are written for special ones, else the text they stand for."""
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    keys: dict[bytes | str, int] = {}
    for token, place in sorted(vocabulary.items(), key=lambda item: item[1]):
        keys.setdefault(token if token in special else _text(token, mark), place)
    return keys


def _end(tokenizer: Any) -> str:
    """Return the token that ends a text, empty where there is none."""
    return getattr(tokenizer, "eos_token", None) or ""


def _text(token: str, mark: str) -> bytes | str:
    """Return the bytes that a token stands for, with the space before the word that it begins."""
    if mark == "Ġ":
        known = all(letter in _BYTES for letter in token)
        return bytes(_BYTES[letter] for letter in token) if known else token.encode()
    if mark == "▁":
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
    if mark in ("##", "words"):
        inner = token.startswith("##") and mark == "##" and len(token) > 2
        begins = not inner and any(letter.isalnum() for letter in token)  # a comma follows a word without a space
        return (" " * begins + (token[2:] if inner else token)).encode()
    return token


def _byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for; GPT-2's table."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_letters()


def _unrolled(offsets: Tensor, length: int) -> Tensor:
    """Return offsets of which those of a second text come after all of the first; 0 and 0 for tokens without any."""
    if not offsets.numel():
        return offsets
    start, end = offsets.unbind(-1)
    valid = end > start
    places = torch.arange(offsets.shape[1], device=offsets.device).expand_as(start)
    seen = torch.where(valid, places, -1).cummax(1).values
    before = F.pad(seen, (1, -1), value=-1)  # the last token with characters that stands before
    prior = offsets.gather(1, before.clamp_min(0)[..., None].expand(-1, -1, 2))
    apart = (start < prior[..., 0]) | (before != places - 1)
    anew = valid & (before >= 0) & (start < prior[..., 1]) & apart
    return (offsets + (anew.long().cumsum(1) * length)[..., None]) * valid[..., None]


def _inside(offsets: Tensor, size: int) -> Tensor:
    """Return the places between two characters of one token, bool ``[B, size]``."""
    start, end = offsets.unbind(-1)
    valid = (end > start).long()
    steps = torch.zeros(len(offsets), size + 1, dtype=torch.long, device=offsets.device)
    steps.scatter_add_(1, start + valid, valid).scatter_add_(1, end, -valid)
    return steps.cumsum(1)[:, :size] > 0


def _ends(offsets: Tensor, number: Tensor, size: int) -> Tensor:
    """Return the first and the last token of each piece ``[B, size, 2]``; the last is −1 where it has none."""
    start, end = offsets.unbind(-1)
    piece = torch.where(end > start, number.gather(1, start), size)
    places = torch.arange(offsets.shape[1], device=offsets.device).expand_as(start)
    firsts = torch.full((len(offsets), size + 1), offsets.shape[1], device=offsets.device)
    first = firsts.scatter_reduce(1, piece, places, "amin")[:, :size]
    last = (firsts * 0 - 1).scatter_reduce(1, piece, places, "amax")[:, :size]
    return torch.stack([first, last], -1)


def _at(signal: Tensor, places: Tensor) -> Tensor:
    """Return the vectors ``[B, G, ...]`` at places ``[B, G]``."""
    index = places.reshape(*places.shape, *[1] * (signal.ndim - 2)).expand(*places.shape, *signal.shape[2:])
    return signal.gather(1, index)
