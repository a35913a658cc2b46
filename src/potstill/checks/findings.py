"""What a check found, and the registry of checks: a new one is one function in a file of this folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from potstill.errors import PreflightError
from potstill.registry import Registry

checks = Registry("check", "potstill.checks")
"""Every check by its name: ``(subject) -> findings``; see :func:`potstill.checks.run.preflight`."""

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        check: the name of the check, by which it can be ignored.
        level: ``error`` (the training would be wrong), ``warning`` (it may well be) or ``note``.
        message: what was expected and what was found.
        fix: what to do; empty where there is nothing to do.
    """

    check: str
    level: Level
    message: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level} [{self.check}]: {self.message}{f'; {self.fix}' if self.fix else ''}"


def refuse(findings: Iterable[Finding]) -> None:
    """Raise if any of the findings is an error.

    Raises:
        PreflightError: lists every error at once.
    """
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        raise PreflightError(errors)


def ignored(findings: Iterable[Finding], names: Iterable[str]) -> list[Finding]:
    """Return the findings with those of the ignored checks as notes."""
    left = set(names)
    return [
        finding
        if finding.check not in left or finding.level == "note"
        else Finding(finding.check, "note", f"ignored {finding.level}: {finding.message}")
        for finding in findings
    ]
