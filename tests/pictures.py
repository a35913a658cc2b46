"""Whether reports are written with their plots: drawing them takes most of a second, in every run of every test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_drawn = [False]


def wanted() -> bool:
    """Whether plots are drawn now."""
    return _drawn[0]


@contextmanager
def drawn() -> Iterator[None]:
    """Draw plots inside the block."""
    before, _drawn[0] = _drawn[0], True
    yield
    _drawn[0] = before
