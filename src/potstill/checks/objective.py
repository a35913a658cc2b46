"""Whether the objective is finite, and whether what it says reaches those who learn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from potstill.checks.findings import Finding, checks
from potstill.checks.subject import Subject, UnansweredError
from potstill.errors import ObjectiveError
from potstill.interfaces import Signals
from potstill.losses.objective import Term

_SATURATED = 1e4
"""A logit that no softmax tells from infinity, and that every type of number can hold."""


@checks.register("loss")
def loss(subject: Subject) -> Iterator[Finding]:
    """Tell which term is not finite on the first samples."""
    for name, term, value in _values(subject):
        if not bool(value.isfinite()):
            message = f"term '{name}' ({term.loss_name}) is {float(value.detach()):g} on the first samples"
            yield Finding("loss", "error", message)


@checks.register("saturation")
def saturation(subject: Subject) -> Iterator[Finding]:
    """Tell which term on the responses is not finite once a model is sure of its answer."""
    subject.materialize()
    for name, term in subject.terms():
        if any(signal not in subject.responses for signal in term.student):
            continue
        bad = [case for case in ("agree", "disagree") if not _finite(subject, name, term, case)]
        if bad:
            yield Finding(
                "saturation",
                "error",
                f"term '{name}' ({term.loss_name}) is not finite where {' or '.join(_CASES[case] for case in bad)}",
                "compute with `log_softmax`, not with the logarithm of a softmax",
            )


_CASES = {"agree": "both models are sure and agree", "disagree": "both models are sure and disagree"}


@checks.register("gradients")
def gradients(subject: Subject) -> Iterator[Finding]:
    """Tell which term does not reach the student, which parameter gets nothing, and whether a teacher would learn."""
    named = {n: p for n, p in subject.student.named_parameters() if p.requires_grad}
    if not named:
        yield Finding(
            "gradients", "error", "no parameter of the student requires a gradient", "call `requires_grad_()`"
        )
        return
    reached: set[str] = set()
    for name, _, value in _values(subject):
        found = (
            torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
            if value.requires_grad
            else [None] * len(named)
        )
        own = {n for n, gradient in zip(named, found, strict=True) if gradient is not None}
        reached |= own
        if not own:
            message = f"term '{name}' reaches no parameter of the student"
            yield Finding("gradients", "error", message, "compare a signal that has a gradient")
    missed = [n for n in named if n not in reached]
    if missed and reached:
        shown = f"{', '.join(missed[:4])}{', …' if len(missed) > 4 else ''}"
        yield Finding("gradients", "note", f"no term reaches {len(missed)} parameters of the student: {shown}")
    yield from _teachers(subject, set(map(id, named.values())))


@checks.register("projectors")
def projectors(subject: Subject) -> Iterator[Finding]:
    """Tell what learns and is in no optimizer."""
    subject.materialize()
    optimizer = None if subject.optimizer is None else subject.optimizer()
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, term in subject.terms():
        if any(id(parameter) not in held for parameter in term.parameters() if parameter.requires_grad):
            message = f"the projector or memory of term '{name}' is not in the optimizer, so it stays random"
            fix = "let the trainer make the optimizer (`optimizer_cls_and_kwargs`), or add `objective.parameters()`"
            yield Finding("projectors", "error", message, fix)
    left = [n for n, p in subject.student.named_parameters() if p.requires_grad and id(p) not in held]
    if left:
        shown = f"{', '.join(left[:4])}{', …' if len(left) > 4 else ''}"
        message = f"{len(left)} parameters of the student are not in the optimizer: {shown}"
        yield Finding("projectors", "warning", message, "freeze them by `requires_grad_(False)`, or add them")


def _values(subject: Subject) -> Iterator[tuple[str, Term, Tensor]]:
    """Yield the terms that can be computed, with their values; what cannot be is told by ``shapes``."""
    subject.materialize()
    for name, term in subject.terms():
        try:
            value = subject.value(name, term, subject.said, subject.taught)
        except (ObjectiveError, UnansweredError, RuntimeError, ValueError, IndexError):
            continue
        if value is not None:
            yield name, term, value


def _finite(subject: Subject, name: str, term: Term, case: str) -> bool:
    for kind in (torch.float32, torch.bfloat16):
        said: Signals = {n: _sure(subject.said[n], 0, kind).requires_grad_() for n in term.student}
        by = 0 if case == "agree" else 1
        taught: Signals = {n: _sure(subject.taught[n], by, kind) for n in term.teacher}
        value = subject.value(name, term, said, taught)
        if value is None:
            return True
        found = [value]
        if value.requires_grad:
            given = torch.autograd.grad(value, list(said.values()), allow_unused=True)
            found += [gradient for gradient in given if gradient is not None]
        if not all(bool(each.isfinite().all()) for each in found):
            return False
    return True


def _sure(like: Tensor, by: int, kind: torch.dtype) -> Tensor:
    """Return logits [..., C] of a model that is sure of class 0, 1, 2, … in turn, moved by ``by``; the rest −1e4."""
    width = like.shape[-1]
    flat = torch.full((like.numel() // max(1, width), width), -_SATURATED, dtype=kind, device=like.device)
    places = (torch.arange(len(flat), device=like.device) + by) % width
    return flat.scatter_(1, places[:, None], _SATURATED).view(like.shape)


def _teachers(subject: Subject, learning: set[int]) -> Iterator[Finding]:
    for name in subject.teachers:
        answer = subject.answer(name)
        shared = [p for p in subject.watches[name].parameters() if id(p) in learning]
        if shared:
            message = f"the teacher '{name}' and the student share {len(shared)} parameters: it would change with it"
            yield Finding("gradients", "error", message, "copy the model (`copy.deepcopy`)")
        elif any(isinstance(value, Tensor) and value.requires_grad for value in answer.values()):
            message = f"the teacher '{name}' answers with a graph, which costs memory and time"
            yield Finding("gradients", "warning", message, "answer under `torch.no_grad()`")
