"""Whether the signals fire, say something, and fit each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.checks.findings import Finding, checks
from potstill.checks.subject import Subject, whose_is
from potstill.errors import ObjectiveError, SignalError
from potstill.interfaces import FOREIGN, IGNORED, Signals


@checks.register("signals")
def signals(subject: Subject) -> Iterator[Finding]:
    """Tell which model cannot answer, and which signal is missing or not finite."""
    everyone = {**subject.replies, "student": subject.said_or_error}
    told = [name for name in everyone if subject.outside_table(name) is not None]  # by the check `tokenizer`
    for name, found in everyone.items():
        whose = whose_is(name)
        if name in told:
            continue
        if isinstance(found, SignalError):
            yield Finding("signals", "error", f"a signal of {whose} is missing: {found}")
        elif isinstance(found, Exception):
            message = f"{whose} cannot take what it is given: {type(found).__name__}: {found}"
            yield Finding("signals", "error", message)
        else:
            for signal, value in found.items():
                if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                    yield Finding("signals", "error", f"the signal '{signal}' of {whose} is not finite")


@checks.register("dead-tap")
def dead_tap(subject: Subject) -> Iterator[Finding]:
    """Tell which signal of a teacher is the same for every sample, and which of the student's nothing can change."""
    for signal in subject.objective.taps("teacher"):
        if _constant(_trained(subject).get(signal)):
            message = f"the teacher's signal '{signal}' is the same for every sample, so it teaches nothing"
            yield Finding("dead-tap", "error", message, "tap another module")
    subject.materialize()
    for name, term in subject.terms():
        taps = [signal for signal in term.student if signal not in subject.responses]
        if not taps:
            continue
        reached = _reached(subject, [subject.said.get(signal) for signal in taps])
        if not reached:
            message = f"term '{name}' reads '{', '.join(taps)}' of the student, and no parameter of it is behind that"
            yield Finding("dead-tap", "error", message, "tap a module that the student learns with")
        for signal in taps:
            if reached == "zero" and _constant(subject.said.get(signal)):
                message = f"the student's signal '{signal}' is the same for every sample and nothing can change it"
                yield Finding("dead-tap", "error", message, "tap another module")


@checks.register("shapes")
def shapes(subject: Subject) -> Iterator[Finding]:
    """Tell which term cannot compare its signals, and which compares nothing."""
    try:
        subject.materialize()
    except ObjectiveError as error:
        yield Finding("shapes", "error", str(error))
        return
    for name, term in subject.terms():
        try:
            subject.value(name, term, subject.said, subject.taught)
        except (ObjectiveError, RuntimeError, ValueError, IndexError) as error:
            text = str(error)
            yield Finding("shapes", "error", text if text.startswith("term") else f"term '{name}': {text}")
        else:
            if int(subject.objective.counts(subject.batch)[name]) == 0:
                message = f"the mask of term '{name}' leaves nothing of a whole batch"
                yield Finding("shapes", "warning" if term.hard else "error", message)


@checks.register("label-range")
def label_range(subject: Subject) -> Iterator[Finding]:
    """Tell which labels are no class."""
    found = subject.labels_outside()
    if found is not None:
        yield _range(*found, "the training batch")
        return
    logits, column = subject.said.get(subject.responses[0]), subject.label
    count = subject.class_count(logits) if isinstance(logits, Tensor) and logits.ndim == 2 else None
    if count is None or column is None:
        return
    for split, table in subject.tables.items():
        if column in table.column_names:
            values = np.asarray([value for value in table[column][:] if isinstance(value, int)], dtype=np.int64)
            values = values[(values != subject.unlabelled) & (values != IGNORED)]
            if len(values) and not (values.min() >= 0 and values.max() < count):
                yield _range(int(values.min()), int(values.max()), count, f"the split '{split}'")


def _range(low: int, high: int, size: int, where: str) -> Finding:
    message = f"the labels of {where} go from {low} to {high}, and the student has the classes 0 to {size - 1}"
    fix = "subtract 1 from the labels" if (low, high) == (1, size) else f"labels are 0 to {size - 1}, or −100 for none"
    return Finding("label-range", "error", message, fix)


def _trained(subject: Subject) -> Signals:
    """Return what the teachers say that are trained already; one with a head of zeros may be trained from there."""
    several = len(subject.teachers) > 1
    known = [name for name in subject.teachers if name in subject.trained]
    found = {f"{name}/{key}": value for name in known for key, value in subject.answer(name).items()}
    return found if several else {**found, **(subject.answer(known[0]) if known else {})}


def _constant(value: Any) -> bool:
    """Whether a signal is the same for every sample; False where there is but one."""
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) < 2 or not value.is_floating_point():
        return False
    values = value.detach().float()
    values = values.masked_fill(values <= FOREIGN, 0.0)  # classes of other tasks
    apart = float((values - values[:1]).abs().max()) if values.numel() else 0.0
    return apart <= 1e-7 * float(values.abs().max())


def _reached(subject: Subject, values: list[Any]) -> str:
    """Return ``yes``, ``zero`` where every gradient vanishes, or nothing where no parameter is behind the values."""
    parameters = [p for p in subject.student.parameters() if p.requires_grad]
    sums = [value.float().square().sum() for value in values if isinstance(value, Tensor) and value.requires_grad]
    if not sums or not parameters:
        return ""
    total = torch.stack(sums).sum()
    found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    known = [gradient for gradient in found if gradient is not None]
    if not known:
        return ""
    return "yes" if any(bool(gradient.any()) for gradient in known) else "zero"
