"""Texts for plots: short, and never read as a formula, whatever signs a name holds."""

from __future__ import annotations

import textwrap


def plain(text: str, limit: int = 22) -> str:
    """Return a text for a plot: one line, not too long, and no formula whatever signs it holds."""
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())
    text = text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
    return text.replace("$", r"\$")


def wrapped(text: str, width: int = 16) -> str:
    """Return a text for a plot on at most two lines."""
    lines = textwrap.wrap(plain(text, 4 * width), width, max_lines=2, placeholder=" …")
    return "\n".join(lines)
