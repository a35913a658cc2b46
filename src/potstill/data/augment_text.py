"""Random views of texts, word by word, each a pure function of (seed, epoch, sample id).

Words are what white space separates; a view joins them by single blanks.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from potstill.data.draws import Draws
from potstill.registry import augmentations


@augmentations.register("mask_words", kind="text", reference="https://arxiv.org/abs/1903.12136")
def mask_words(
    texts: list[str], *, draws: Draws, p: Annotated[float, Field(ge=0, le=1)] = 0.1, mask_token: str = "[MASK]"
) -> list[str]:
    """Replace each word by ``mask_token`` with probability ``p`` (Tang et al., 2019).

    Args:
        texts: B texts.
        draws: random numbers of these samples.
        p: probability for each word.
        mask_token: the teacher's and the student's mask token.

    Returns:
        B texts with as many words as before.
    """
    words = [text.split() for text in texts]
    chances = _chances(words, draws, "mask_words")
    return [
        " ".join(mask_token if chance < p else word for word, chance in zip(line, row, strict=False))
        for line, row in zip(words, chances, strict=True)
    ]


@augmentations.register("delete_words", kind="text", reference="https://arxiv.org/abs/1901.11196")
def delete_words(texts: list[str], *, draws: Draws, p: Annotated[float, Field(ge=0, le=1)] = 0.1) -> list[str]:
    """Delete each word with probability ``p`` (Wei and Zou, 2019), but at least one of each text stays.

    Args:
        texts: B texts.
        draws: random numbers of these samples.
        p: probability for each word.

    Returns:
        B texts; an empty one stays empty.
    """
    words = [text.split() for text in texts]
    chances = _chances(words, draws, "delete_words")
    views = []
    for line, row in zip(words, chances, strict=True):
        limit = min(p, max(row[: len(line)], default=0.0))  # the word with the largest draw stays
        views.append(" ".join(word for word, chance in zip(line, row, strict=False) if chance >= limit))
    return views


@augmentations.register("swap_words", kind="text", reference="https://arxiv.org/abs/1901.11196")
def swap_words(texts: list[str], *, draws: Draws, p: Annotated[float, Field(ge=0, le=1)] = 0.1) -> list[str]:
    """Swap a word with its right neighbour with probability ``p``, from left to right, each word at most once.

    Args:
        texts: B texts.
        draws: random numbers of these samples.
        p: probability for each pair of neighbours.

    Returns:
        B texts with the same words.
    """
    words = [text.split() for text in texts]
    chances = _chances(words, draws, "swap_words")
    for line, row in zip(words, chances, strict=True):
        place = 0
        while place < len(line) - 1:
            swapped = row[place] < p
            if swapped:
                line[place], line[place + 1] = line[place + 1], line[place]
            place += 2 if swapped else 1
    return [" ".join(line) for line in words]


def _chances(words: list[list[str]], draws: Draws, name: str) -> list[list[float]]:
    """Return a number in [0, 1) for each word, [B, longest]; a word's number does not depend on the longest."""
    chances: list[list[float]] = draws.uniform(name, max((len(line) for line in words), default=0)).tolist()
    return chances
