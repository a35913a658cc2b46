"""What a step need not do again and again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate.utils.imports as looked_up

_LOOK = "_is_package_available"


@contextmanager
def packages_looked_up_once() -> Iterator[None]:
    """Let accelerate look on the disk for each optional package once inside the block, and not three times a step.

    What is installed does not change under a training. Each look takes about 0.1 ms (accelerate 1.15), which a small
    model notices.
    """
    look: Any = getattr(looked_up, _LOOK, None)
    if look is None or hasattr(look, "cache_info"):  # another version, or a training inside a training
        yield
        return
    setattr(looked_up, _LOOK, functools.cache(look))
    try:
        yield
    finally:
        setattr(looked_up, _LOOK, look)
