"""The factor by which a term's convention differs from potstill's: a missing T², a mean over the classes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from potstill.errors import ObjectiveError

_PART = re.compile(r"(?P<symbol>[TC])(?:\^?(?P<power>\d+|²))?|(?P<number>\d+(?:\.\d*)?)")
_HELP = "a scale is a number, or a product such as 1/T^2, 1/C or 2/(T^2*C), of T (the temperature) and C (the classes)"


@dataclass(frozen=True)
class Scale:
    """A factor ``number · T^temperature · C^classes``.

    Attributes:
        number: the constant.
        temperature: the power of the loss's option ``temperature``.
        classes: the power of the size of the signal's last axis.
    """

    number: float = 1.0
    temperature: int = 0
    classes: int = 0

    def __call__(self, *, temperature: Any, classes: int) -> Any:
        """Return the factor for a temperature and a number of classes."""
        value = self.number * float(classes) ** self.classes
        return value * temperature**self.temperature if self.temperature else value

    def __str__(self) -> str:
        above = [] if self.number == 1 else [f"{self.number:g}"]
        below: list[str] = []
        for symbol, power in (("T", self.temperature), ("C", self.classes)):
            if power:
                (above if power > 0 else below).append(symbol + ("" if abs(power) == 1 else f"^{abs(power)}"))
        under = below[0] if len(below) == 1 else f"({'·'.join(below)})"
        return ("·".join(above) or "1") + (f"/{under}" if below else "")


def as_scale(value: float | str | Scale) -> Scale:
    """Return a scale from a number or a product of T and C, such as ``1/T^2``, ``1/C`` or ``1/(T²·C)``.

    Raises:
        ObjectiveError: it is neither.
    """
    if isinstance(value, Scale):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return Scale(float(value))
    if not isinstance(value, str):
        raise ObjectiveError(f"{_HELP}; got {value!r}")
    above, slash, below = value.replace(" ", "").partition("/")
    if below.startswith("(") and below.endswith(")"):
        below = below[1:-1]
    elif "*" in below or "·" in below:
        raise ObjectiveError(f"{_HELP}, with brackets below the line; got '{value}'")
    factors = [(_parts(above, value), 1)] + ([(_parts(below, value), -1)] if slash else [])
    number, powers = 1.0, {"T": 0, "C": 0}
    for parts, sign in factors:
        for symbol, power in parts:
            if isinstance(symbol, str):
                powers[symbol] += sign * power
            else:
                number *= symbol**sign
    return Scale(number, powers["T"], powers["C"])


def _parts(text: str, whole: str) -> list[tuple[str | float, int]]:
    found: list[tuple[str | float, int]] = []
    for part in re.split(r"[*·]", text):
        match = _PART.fullmatch(part)
        if match is None or (match["number"] and not float(match["number"])):
            raise ObjectiveError(f"{_HELP}; got '{whole}'")
        if match["number"]:
            found.append((float(match["number"]), 1))
        else:
            power = match["power"] or "1"
            found.append((match["symbol"], 2 if power == "²" else int(power)))
    return found
