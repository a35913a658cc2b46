"""Texts for plots: short, and never read as a formula, whatever signs a name holds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def plain(text: str, limit: int = 22) -> str:
    """Return a text for a plot: one line, not too long, and no formula whatever signs it holds."""
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())
    text = text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
    return text.replace("$", r"\$")


def told_apart(names: Sequence[str], limit: int) -> list[str]:
    """Return texts for a plot; long names that begin alike are cut in the middle, for they differ at the end."""
    cut = [plain(name, limit) for name in names]
    alike = {text for text in cut if cut.count(text) > 1}
    head, tail = limit // 3, limit - limit // 3 - 1
    middle = [plain(f"{name[:head]}…{name[-tail:]}", limit) for name in names]
    return [other if text in alike else text for text, other in zip(cut, middle, strict=True)]


def wrapped(text: str, width: int = 16) -> str:
    """Return a text for a plot on at most two lines."""
    lines = textwrap.wrap(plain(text, 4 * width), width, max_lines=2, placeholder=" …")
    return "\n".join(lines)
