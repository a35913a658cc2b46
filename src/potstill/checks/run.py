"""Every check, one after the other: faults come as findings, and the models stay as they were."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from potstill.checks.findings import Finding, checks, ignored, refuse
from potstill.checks.subject import Subject, UnansweredError
from potstill.errors import ComponentError, did_you_mean

logger = logging.getLogger("potstill")

_ORDER = {"error": 0, "warning": 1, "note": 2}


def preflight(
    subject: Subject | Any, *, only: Iterable[str] | None = None, ignore: Iterable[str] = (), strict: bool = False
) -> list[Finding]:
    """Look for the silent faults of a set-up, before it is trained; what is examined stays as it is.

    Nothing that a training starts from is changed, the random generators included: a training after it comes to the
    same bits as one without.

    Args:
        subject: a :class:`potstill.training.trainer.DistillationTrainer`, or a
            :class:`potstill.checks.subject.Subject`.
        only: names of the checks to do; all if omitted.
        ignore: names of checks whose findings become notes.
        strict: whether errors are raised, and whether a teacher no better than chance is one.

    Returns:
        The findings, the worst first; errors and warnings are logged too.

    Raises:
        PreflightError: with ``strict``, all errors at once.
        ComponentError: there is no check of that name.

    Example:
        >>> from torch import nn, randn, tensor
        >>> from potstill import Objective, Term
        >>> batch = {"features": randn(4, 2), "labels": tensor([0, 1, 2, 7])}
        >>> setup = Subject(nn.Linear(2, 3), Objective({"hard": Term("cross_entropy")}), batch)
        >>> preflight(setup)[0].check
        'label-range'
    """
    from potstill.checks.trainers import subject_of

    examined = subject if isinstance(subject, Subject) else subject_of(subject, strict=strict)
    findings = run_checks(examined, only=only, ignore=ignore)
    if strict:
        refuse(findings)
    for finding in findings:
        if finding.level != "note":
            logger.warning("preflight: %s", finding)
    return findings


def run_checks(subject: Subject, *, only: Iterable[str] | None = None, ignore: Iterable[str] = ()) -> list[Finding]:
    """Return what the checks find, the worst first, and say nothing; see :func:`preflight`.

    Raises:
        ComponentError: there is no check of that name.
    """
    names, dropped = _known(checks.names() if only is None else only), _known(ignore)
    with subject.opened():
        found = [finding for name in names for finding in _results(name, subject)]
    return sorted(ignored(found, dropped), key=lambda finding: _ORDER[finding.level])


def _results(name: str, subject: Subject) -> list[Finding]:
    """Return what one check found; that it broke down is a finding as well."""
    found: list[Finding] = []
    try:
        for finding in checks.get(name)(subject):
            found.append(finding)  # those before an exception count
    except UnansweredError:  # told by the check that asks for the answer
        pass
    except Exception as error:  # a subject may hold any callable
        text = str(error).split("\n")[0]
        found.append(Finding(name, "warning", f"this could not be checked: {type(error).__name__}: {text}"))
    return found


def _known(names: Iterable[str]) -> list[str]:
    found = list(names)
    for name in found:
        if name not in checks.names():
            raise ComponentError(f"there is no check '{name}'; {did_you_mean(name, checks.names())}")
    return found
