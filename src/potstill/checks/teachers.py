"""Whether the teachers are at rest, and know what they teach."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest
from torch import Tensor, nn

from potstill.checks.batches import batch_size, classes_of, is_one_a_class, rows
from potstill.checks.findings import Finding, checks
from potstill.checks.subject import Subject, whose_is
from potstill.interfaces import FOREIGN, IGNORED, Batch, Signals

_ALIKE = 1e-3
"""By how much two answers to the same batch may differ, as a share of their spread: what kernels round."""

_ALONE = 0.05
"""The same for samples asked in another batch: other kernels, quantised activations."""

_MARGIN = 0.1
"""Share of the way from guessing to always right that a teacher has to be above."""


@checks.register("teacher-mode")
def teacher_mode(subject: Subject) -> Iterator[Finding]:
    """Tell which teacher answers the same samples in two ways, or answered in train mode."""
    for name in subject.teachers:
        first = subject.answer(name)
        ways = []
        if _difference(first, subject.ask(name, subject.few)) > _ALIKE:
            ways.append("answers the same batch twice in different ways, as dropout in train mode does")
        elif batch_size(subject.few) > 1 and _alone(subject, name, first) > _ALONE:
            ways.append("answers a sample by what else is in its batch, as BatchNorm in train mode does")
        awake = list(dict.fromkeys(type(m).__name__ for m in subject.watches[name].training if _has_mode(m)))
        if awake:
            ways.append(f"has layers in train mode ({', '.join(awake[:4])}{', …' if len(awake) > 4 else ''})")
        if ways:
            fix = "call its `eval()`, or pass the module itself, which is then frozen"
            yield Finding("teacher-mode", "error", f"the teacher '{name}' {', and '.join(ways)}", fix)


@checks.register("teacher-drift")
def teacher_drift(subject: Subject) -> Iterator[Finding]:
    """Tell which teacher changes by answering."""
    for name in subject.teachers:
        first = subject.answer(name)
        for batch in (_other(subject.few), subject.few if subject.judged is None else rows(subject.judged, 0, 8)):
            subject.ask(name, batch)
        watch = subject.watches[name]
        changed = watch.changed()
        fix = "a teacher in eval mode has fixed statistics: call its `eval()`, or pass the module itself"
        if changed:
            shown = f"{', '.join(changed[:4])}{', …' if len(changed) > 4 else ''}"
            yield Finding("teacher-drift", "error", f"the teacher '{name}' changes by answering: {shown}", fix)
        elif not watch.kept and _difference(first, subject.ask(name, subject.few)) > _ALIKE:
            message = f"the teacher '{name}' answers a batch in another way once it has seen others"
            yield Finding("teacher-drift", "error", message, fix)


@checks.register("teacher-above-chance")
def above_chance(subject: Subject) -> Iterator[Finding]:
    """Tell which trained teacher is no better than the best constant guess, where the samples are enough to tell."""
    for name in subject.teachers:
        judged = subject.right(name)
        if judged is None or not len(judged[1]):
            continue
        right, labels = (each.numpy() for each in judged)
        chance = np.unique(labels, return_counts=True)[1].max() / len(labels)
        found = binomtest(int(right.sum()), len(right), chance, alternative="greater")
        high = binomtest(int(right.sum()), len(right), chance, alternative="less").proportion_ci(0.95).high
        if found.pvalue > 0.05 and high < chance + _MARGIN * (1 - chance) and not _tells_classes_apart(right, labels):
            yield Finding(
                "teacher-above-chance",
                "error" if subject.strict else "warning",
                f"the teacher '{name}' is no better than always guessing the most frequent class: accuracy "
                f"{right.mean():.3f} against {chance:.3f} on {len(labels)} samples",
                "train it (`train:`), give its weights, or see whether its inputs are those that it was trained on",
            )


def _tells_classes_apart(right: NDArray[np.bool_], labels: NDArray[np.int64]) -> bool:
    """Return whether the mean recall is well above one over the classes: of rare classes accuracy says little."""
    each = [right[labels == one] for one in np.unique(labels)]
    recalls = np.array([hits.mean() for hits in each])
    spread = np.sqrt(sum(recall * (1 - recall) / len(hits) for recall, hits in zip(recalls, each, strict=True)))
    least = recalls.mean() - 1.645 * spread / len(each)
    return len(each) > 1 and bool(least > 1 / len(each) + _MARGIN * (1 - 1 / len(each)))


@checks.register("label-map")
def label_map(subject: Subject) -> Iterator[Finding]:
    """Tell where teacher and data count the classes differently, and in which order a teacher has them."""
    yield from _widths(subject)
    for name in subject.teachers:
        judged = subject.judgement(name)
        if judged is None or judged[1].ndim != 1 or subject.class_count(judged[0]) != judged[0].shape[-1]:
            continue
        said, known = classes_of(judged[0], subject.answers), judged[1] != IGNORED
        if said is None:
            continue
        guesses, truth = said[known].numpy(), judged[1][known].numpy()
        order = _renaming(guesses, truth, judged[0].shape[-1])
        if order is not None:
            moved = [
                f"its {_shown(subject, place)} is the data's {_shown(subject, int(to))}"
                for place, to in enumerate(order)
                if place != to and place in guesses
            ]
            yield Finding(
                "label-map",
                "error",
                f"the teacher '{name}' has the classes in another order: with {', '.join(moved[:6])}"
                f"{', …' if len(moved) > 6 else ''} its accuracy is {np.mean(order[guesses] == truth):.3f} and not "
                f"{np.mean(guesses == truth):.3f}",
                "put the data's classes in the teacher's order (`data: {labels: […]}`), or reorder its last layer",
            )


def _widths(subject: Subject) -> Iterator[Finding]:
    labels = subject.few.get("labels")
    response = subject.responses[0]
    classes = len(subject.label_names)
    if labels is None or labels.ndim != 1 or labels.is_floating_point() or not classes:
        return
    outputs = {"student": subject.said.get(response)}
    outputs |= {name: subject.answer(name).get(response) for name in subject.teachers if subject.is_read(name)}
    for name, logits in outputs.items():
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[-1] == classes:
            continue
        if is_one_a_class(logits, subject.answers):
            message = f"{whose_is(name)} has {logits.shape[-1]} outputs, and the data have {classes} classes"
            yield Finding("label-map", "error", message, "give it a head for these classes")


def _renaming(guesses: NDArray[Any], truth: NDArray[Any], size: int) -> NDArray[Any] | None:
    """Return the class of the data for each of the teacher's, found on one half and clearly better on the other."""
    if len(truth) < 20 or any(each.min() < 0 or each.max() >= size for each in (truth, guesses)):
        return None
    table = np.zeros((size, size), dtype=np.int64)
    np.add.at(table, (guesses[::2], truth[::2]), 1)
    table = table * (size + 1) + np.eye(size, dtype=np.int64)  # of equal ones, that which moves least
    order = np.asarray(linear_sum_assignment(table, maximize=True)[1])
    guesses, truth = guesses[1::2], truth[1::2]
    renamed, as_is = order[guesses] == truth, guesses == truth
    won, lost = int((renamed & ~as_is).sum()), int((as_is & ~renamed).sum())
    clear = won + lost > 0 and binomtest(won, won + lost, 0.5, alternative="greater").pvalue < 1e-3
    clear = clear and renamed.mean() - as_is.mean() > 0.1
    return order if clear and _tells_classes_apart(renamed, truth) else None  # a constant answer has no order


def _shown(subject: Subject, place: int) -> str:
    return f"{place} ({subject.label_names[place]})" if place < len(subject.label_names) else str(place)


def _alone(subject: Subject, name: str, whole: Signals) -> float:
    """How far the answers to half of the samples are from those that the whole batch got."""
    size, half = batch_size(subject.few), (batch_size(subject.few) + 1) // 2
    own = {k: v[:half] for k, v in whole.items() if isinstance(v, Tensor) and v.ndim and len(v) == size}
    return _difference(own, subject.ask(name, rows(subject.few, 0, half)))


def _difference(first: Signals, second: Signals) -> float:
    """Return the largest difference over the signals, each by the spread of its values; NaN agrees with NaN."""
    found = [0.0]
    for name, value in first.items():
        other = second.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape == other.shape:
            a, b = value.detach().double().nan_to_num(), other.detach().double().nan_to_num()
            possible = (a > FOREIGN) | (b > FOREIGN)  # without the classes of other tasks, which say nothing
            a, b = a[possible], b[possible]
            spread = float(a.std(correction=0)) if a.numel() else 0.0
            apart = float((a - b).square().mean().sqrt()) if a.numel() else 0.0
            found.append(apart / spread if spread > 0 else (math.inf if apart else 0.0))
    return max(found)


def _has_mode(module: nn.Module) -> bool:
    """Whether a layer answers in train mode otherwise than in eval mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "drop" in type(module).__name__.lower()


def _other(batch: Batch) -> Batch:
    """Return other inputs of the same shapes: the numbers doubled, for statistics to move; tokens as they are."""
    return {
        name: value * 2 + 1 if value.is_floating_point() and value.ndim > 1 else torch.roll(value, 1, 0)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
