"""Numbers that change while training goes on: constants, ramps and callables of the progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeAlias

from potstill.errors import ObjectiveError, did_you_mean
from potstill.interfaces import Progress

Shape: TypeAlias = Literal["linear", "cosine", "exponential"]


@dataclass(frozen=True)
class Ramp:
    """A number that goes from one value to another between two points of the training.

    Attributes:
        start: value until ``begin``.
        stop: value from ``end`` on.
        shape: ``linear``, ``cosine`` (slow at both ends) or ``exponential`` (equal factors; both values positive).
        begin: share of the training at which it leaves ``start``, in [0, 1].
        end: share of the training at which it reaches ``stop``, above ``begin``.

    Raises:
        ObjectiveError: ends that are no numbers, points out of order, or an exponential ramp through 0.
    """

    start: float
    stop: float
    shape: Shape = "linear"
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        numbers: dict[str, Any] = {"from": self.start, "to": self.stop, "begin": self.begin, "end": self.end}
        for name, value in numbers.items():
            if not isinstance(value, Real):
                raise ObjectiveError(f"a ramp expected a number for '{name}', got {value!r}")
        if not 0 <= self.begin < self.end <= 1:
            raise ObjectiveError(f"a ramp expected 0 ≤ begin < end ≤ 1, got begin {self.begin} and end {self.end}")
        if self.shape == "exponential" and min(self.start, self.stop) <= 0:
            raise ObjectiveError(f"an exponential ramp expected values above 0, got {self.start} to {self.stop}")
        if self.shape not in ("linear", "cosine", "exponential"):
            hint = did_you_mean(self.shape, ("linear", "cosine", "exponential"))
            raise ObjectiveError(f"there is no ramp shape '{self.shape}'; {hint}")

    def __call__(self, progress: Progress) -> float:
        """Return the value at this point of the training."""
        share = min(1.0, max(0.0, (progress.fraction - self.begin) / (self.end - self.begin)))
        if self.shape == "exponential":
            return float(self.start * (self.stop / self.start) ** share)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.stop - self.start) * share

    def __str__(self) -> str:
        span = "" if (self.begin, self.end) == (0.0, 1.0) else f" over {self.begin:g}–{self.end:g} of the training"
        return f"({self.start:g}→{self.stop:g} {self.shape}{span})"


Number: TypeAlias = float | Ramp | Callable[[Progress], float]


def is_ramp(value: Any) -> bool:
    """Return whether a value of a recipe means a ramp: a mapping with ``from`` or ``to``."""
    return isinstance(value, Mapping) and bool({"from", "to"} & set(value))


def as_number(value: Any) -> Any:
    """Turn ``{from: 1.0, to: 0.0, shape: cosine}`` into a :class:`Ramp`; leave everything else as it is.

    Raises:
        ObjectiveError: an unknown or missing key in a ramp.
    """
    if not is_ramp(value):
        return value
    names = {"from": "start", "to": "stop", "shape": "shape", "begin": "begin", "end": "end"}
    for key in value:
        if key not in names:
            raise ObjectiveError(f"a ramp has no key '{key}'; {did_you_mean(str(key), names)}")
    if not {"from", "to"} <= set(value):
        raise ObjectiveError(f"a ramp needs `from` and `to`, got {dict(value)}")
    return Ramp(**{names[key]: item for key, item in value.items()})


def at(value: Any, progress: Progress) -> Any:
    """Return the value of a number at this point of the training; values that are no ramp come back unchanged."""
    return value(progress) if isinstance(value, Ramp) or callable(value) else value
