"""One exception class for each kind of mistake that a user can make, and the words for "did you mean".

Everything that a user can cause is a :class:`PotstillError`; the command line prints its message and exits with
status 2. Any other exception is a bug in potstill.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


class PotstillError(Exception):
    """Base of everything that a user can cause and mend."""


class RecipeError(PotstillError):
    """A recipe has mistakes; all of them are listed.

    Args:
        problems: every mistake found, in the order of the file.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ComponentError(PotstillError):
    """A loss, task, scheme, model or other component does not exist or was given wrong options."""


class CodeNotAllowedError(ComponentError):
    """A recipe asks to import and run code and the person did not allow it."""


class DataError(PotstillError):
    """A data set cannot be read, or lacks a split, a column or labels."""


class TaskError(PotstillError):
    """A task cannot use these columns, labels or inputs."""


class ModelError(PotstillError):
    """A model cannot be built, loaded or saved, or does not fit its task."""


class SignalError(PotstillError):
    """A tap names nothing in the model, saw no forward, or saw several."""


class ObjectiveError(PotstillError):
    """A term of the objective cannot compare what it was given."""


class TrainingError(PotstillError):
    """Settings of the training that would give wrong results, or cannot work."""


class PreflightError(PotstillError):
    """A set-up has silent faults; all of them are listed.

    Args:
        findings: every error found, each with the name of its check.
    """

    def __init__(self, findings: Sequence[object]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(str(finding) for finding in self.findings))


class CacheError(PotstillError):
    """A teacher's cached answers belong to something else, or cannot be cached as asked."""


class RunError(PotstillError):
    """A run folder is in use, belongs to another recipe, or is damaged."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe.

    Attributes:
        path: keys from the top of the recipe, such as ``("objective", "soft", "temperature")``.
        message: what was expected and what came.
        hint: the nearest right thing, or what to do.
        file: the file that holds the value; ``None`` for a recipe made in Python.
        line: its line in that file, counted from 1.
    """

    path: tuple[str | int, ...]
    message: str
    hint: str | None = None
    file: str | None = None
    line: int | None = None

    def at(self, file: str | None, line: int | None) -> Problem:
        """Return the same problem with its place in a file."""
        return replace(self, file=file, line=line)

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.file and self.line else f"{self.file}: " if self.file else ""
        path = ".".join(str(key) for key in self.path)
        hint = f"; {self.hint}" if self.hint else ""
        return f"{place}{path + ': ' if path else ''}{self.message}{hint}"


def nearest(name: str, candidates: Iterable[str], *, count: int = 3) -> list[str]:
    """Return the candidates most like ``name``, best first, at most ``count``."""
    lowered: dict[str, str] = {}
    for candidate in candidates:
        lowered.setdefault(candidate.lower(), candidate)
    matches = difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.5)
    return [lowered[match] for match in matches]


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return ``did you mean 'x'?``, or the known names where none is near."""
    known = sorted(set(candidates))
    close = nearest(name, known, count=1)
    if close:
        return f"did you mean '{close[0]}'?"
    if not known:
        return "there are none"
    shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f"known: {shown}"
