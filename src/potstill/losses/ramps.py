"""Numbers that change while training goes on: constants, ramps and callables of the progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

from potstill.errors import ObjectiveError, did_you_mean
from potstill.interfaces import Progress
from potstill.registry import import_dotted

Shape: TypeAlias = Literal["linear", "cosine", "exponential", "step"]
_SHAPES = get_args(Shape)


@dataclass(frozen=True)
class Ramp:
    """A number that goes from one value to another between two points of the training.

    Attributes:
        start: value until ``begin``.
        stop: value from ``end`` on.
        shape: ``linear``, ``cosine`` (slow at both ends), ``exponential`` (equal factors; both values positive) or
            ``step`` (``start`` until ``end``, then at once ``stop``).
        begin: where it leaves ``start``: a share of the training in [0, 1], or above 1 an optimizer step.
        end: where it reaches ``stop``, above ``begin``; also a share, or above 1 an optimizer step.

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
        if not 0 <= self.begin < self.end:
            raise ObjectiveError(f"a ramp expected 0 ≤ begin < end, got begin {self.begin} and end {self.end}")
        steps = [value for value in (self.begin, self.end) if value > 1]
        if any(value != int(value) for value in steps) or (steps and 0 < self.begin < 1):
            raise ObjectiveError(
                "a ramp expected begin < end as shares of the training from 0 to 1, or both as whole numbers of "
                f"optimizer steps, got begin {self.begin} and end {self.end}"
            )
        if self.shape == "exponential" and min(self.start, self.stop) <= 0:
            raise ObjectiveError(f"an exponential ramp expected values above 0, got {self.start} to {self.stop}")
        if self.shape not in _SHAPES:
            hint = did_you_mean(self.shape, _SHAPES)
            raise ObjectiveError(f"there is no ramp shape '{self.shape}'; {hint}")

    def __call__(self, progress: Progress) -> float:
        """Return the value at this point of the training."""
        reached = progress.step if self.end > 1 else progress.fraction
        share = min(1.0, max(0.0, (reached - self.begin) / (self.end - self.begin)))
        if self.shape == "step":
            return self.stop if share >= 1 else self.start
        if self.shape == "exponential":
            return float(self.start * (self.stop / self.start) ** share)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.stop - self.start) * share

    def __str__(self) -> str:
        unit = "steps" if self.end > 1 else "of the training"
        span = "" if (self.begin, self.end) == (0.0, 1.0) else f" over {self.begin:g}–{self.end:g} {unit}"
        if self.shape == "step":
            span = f" at {self.end:g} {unit}"
        return f"({self.start:g}→{self.stop:g} {self.shape}{span})"


@dataclass(frozen=True, eq=False)
class Schedule:
    """A number that a function of one's own gives at each step.

    Attributes:
        path: ``package.module:function``.
        function: ``(progress, **options) -> float``.
        options: its other arguments.
    """

    path: str
    function: Callable[..., Any]
    options: Mapping[str, Any]

    def __call__(self, progress: Progress) -> float:
        """Return the value at this point of the training."""
        value = self.function(progress, **self.options)
        if not isinstance(value, Real):
            raise ObjectiveError(f"the schedule '{self.path}' expected to return a number, got {value!r}")
        return float(value)

    def __str__(self) -> str:
        return f"{self.path}({', '.join(['progress', *(f'{key}={value}' for key, value in self.options.items())])})"


Number: TypeAlias = float | Ramp | Callable[[Progress], float]


def is_ramp(value: Any) -> bool:
    """Return whether a value of a recipe is a number that changes: a mapping with ``from``, ``to`` or ``schedule``."""
    return isinstance(value, Mapping) and bool({"from", "to", "schedule"} & set(value))


def as_number(value: Any, *, allow_code: bool = True) -> Any:
    """Turn ``{from: 1.0, to: 0.0, shape: cosine}`` into a :class:`Ramp`; leave everything else as it is.

    ``{schedule: package.module:function, option: 3}`` becomes a :class:`Schedule`.

    Raises:
        ObjectiveError: an unknown or missing key in a ramp.
        ComponentError: there is no such function.
        CodeNotAllowedError: a function outside potstill while ``allow_code`` is false.
    """
    if not is_ramp(value):
        return value
    if "schedule" in value:
        path, options = str(value["schedule"]), {key: item for key, item in value.items() if key != "schedule"}
        return Schedule(path, import_dotted(path, allow_code=allow_code), options)
    names = {"from": "start", "to": "stop", "shape": "shape", "begin": "begin", "end": "end"}
    for key in value:
        if key not in names:
            raise ObjectiveError(f"a ramp has no key '{key}'; {did_you_mean(str(key), names)}")
    if not {"from", "to"} <= set(value):
        raise ObjectiveError(f"a ramp needs `from` and `to`, got {dict(value)}")
    return Ramp(**{names[key]: item for key, item in value.items()})


def ends(value: Any) -> tuple[Any, Any]:
    """Return the first and the last value of a number, for a type check; of what does not change, itself twice."""
    if isinstance(value, Ramp):
        return value.start, value.stop
    return at(value, Progress()), at(value, Progress(step=1))


def at(value: Any, progress: Progress) -> Any:
    """Return the value of a number at this point of the training; values that are no ramp come back unchanged."""
    return value(progress) if isinstance(value, Ramp) or callable(value) else value
