"""Whether the pixels are normalised as they were when a model was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from potstill.checks.batches import chosen, classes_of, rows
from potstill.checks.findings import Finding, Level, checks
from potstill.checks.subject import Feed, Subject, whose_is
from potstill.interfaces import IGNORED, Batch
from potstill.models.inputs import TEACHER_PREFIX

Normaliser = tuple[tuple[float, ...], tuple[float, ...]]

_USUAL: Mapping[str, Normaliser] = {
    "the mean and deviation of ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mean 0.5 and deviation 0.5": ((0.5,), (0.5,)),
    "the mean and deviation of CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "the mean and deviation of MNIST": ((0.1307,), (0.3081,)),
    "no normalisation, values from 0 to 1": ((0.0,), (1.0,)),
    "no scaling, values from 0 to 255": ((0.0,), (1 / 255,)),
}

_GAIN = 0.1
"""By how much more accurate a teacher has to be with other pixels."""

_SCREENED, _ASKED = 64, 2
"""Samples on which every way is tried, and how many ways are then tried on all."""


@checks.register("normalisation")
def normalisation(subject: Subject) -> Iterator[Finding]:
    """Tell which model gets its pixels normalised otherwise than it was trained."""
    for name, feed in subject.feeds.items():
        yield from _other_statistics(name, feed)
    for name in subject.teachers:
        yield from _better_otherwise(subject, name)
        yield from _unlike_its_statistics(subject, name)


def _other_statistics(name: str, feed: Feed) -> Iterator[Finding]:
    fed, own = _statistics(feed.fed), _statistics(feed.own)
    if fed is None or own is None or _near(fed, own):
        return
    message = f"{whose_is(name)} was trained on pixels with {_words(own)}, and gets them with {_words(fed)}"
    level: Level = "note" if feed.learns else "error"
    yield Finding("normalisation", level, message, "drop `mean` and `std` of the task, or `processor:`")


def _statistics(processor: Any) -> Normaliser | None:
    mean, std = getattr(processor, "mean", None), getattr(processor, "std", None)
    return None if mean is None or std is None else (tuple(mean), tuple(std))


def _near(first: Normaliser, second: Normaliser) -> bool:
    for a, b in zip(first, second, strict=True):
        size = max(len(a), len(b))
        wide, other = (each * size if len(each) == 1 else each for each in (a, b))
        if len(wide) != len(other) or any(abs(x - y) > 0.02 for x, y in zip(wide, other, strict=True)):
            return False
    return True


def _words(statistics: Normaliser) -> str:
    mean, std = ([round(value, 3) for value in each] for each in statistics)
    return f"mean {mean} and deviation {std}"


def _better_otherwise(subject: Subject, name: str) -> Iterator[Finding]:
    """Judge a trained teacher on the same pixels, normalised in each of the usual ways."""
    judged = subject.judgement(name)
    if judged is None or subject.judged is None or judged[1].ndim != 1:
        return
    key, said = _pixels(subject.judged, subject, name), classes_of(judged[0], subject.answers)
    if key is None or said is None:
        return
    known = (judged[1] != IGNORED).nonzero()[:, 0]
    trial = _Trial(subject, name, key, known, (said == judged[1])[known])
    best = max(((trial.gain(way), way.what) for way in trial.promising()), default=(0.0, ""))
    if best[0] > _GAIN:
        message = (
            f"the teacher '{name}' is {100 * best[0]:.0f} points more accurate on the same pixels with {best[1]}: "
            "it was trained on pixels that were normalised otherwise"
        )
        yield Finding("normalisation", "error", message, "normalise its inputs as its own pipeline does")


class _Way(NamedTuple):
    """How pixels may have been normalised, how they are to be, its name, and which of few answers were then right."""

    given: Normaliser
    other: Normaliser
    what: str
    right: Tensor


@dataclass
class _Trial:
    """A teacher on judged samples whose pixels are normalised otherwise: few of them say which ways are worth all.

    Attributes:
        known: places of the samples with a label.
        as_is: which of them are answered rightly as they are.
    """

    subject: Subject
    name: str
    key: str
    known: Tensor
    as_is: Tensor

    def __post_init__(self) -> None:
        places = torch.arange(len(self.known))
        self.few = places[:: max(1, -(-len(places) // _SCREENED))]
        self.rest = places[~torch.isin(places, self.few)]

    def promising(self) -> list[_Way]:
        """Return the ways in which few samples, from all over, are answered clearly better, the best first."""
        if not len(self.known) or 1 - float(self.as_is.float().mean()) <= _GAIN:
            return []  # there is no room for a gain
        images = (self.subject.judged or {})[self.key]
        pairs = [
            (given, other, what)
            for given in _given(self.subject, self.name, images)
            for what, other in _USUAL.items()
            if not _near(given, other)
        ]
        least = float(self.as_is[self.few].float().mean()) + _GAIN / 2
        found = [_Way(*pair, self.right(pair[0], pair[1], self.few)) for pair in pairs]
        better = [way for way in found if float(way.right.float().mean()) > least]
        return sorted(better, key=lambda way: -int(way.right.sum()))[:_ASKED]

    def right(self, given: Normaliser, other: Normaliser, places: Tensor) -> Tensor:
        """Return which of some samples are answered rightly when their pixels are normalised in another way."""
        batch = self.subject.judged or {}
        part = chosen(batch, self.known[places].to(batch[self.key].device))
        images = part[self.key]
        changed = _affine(_affine(images, given, back=True), other, back=False).to(images)
        said = classes_of(self.subject.logits(self.name, {**part, self.key: changed}), self.subject.answers)
        return torch.zeros(len(places), dtype=torch.bool) if said is None else said == part["labels"].cpu()

    def gain(self, way: _Way) -> float:
        """Return by how much the accuracy on all samples is higher, 0 where that may be chance."""
        right = way.right
        if len(self.rest):
            right = torch.cat([right, self.right(way.given, way.other, self.rest)])
        as_is = torch.cat([self.as_is[self.few], self.as_is[self.rest]])
        won, lost = int((right & ~as_is).sum()), int((as_is & ~right).sum())
        clear = won + lost > 0 and binomtest(won, won + lost, 0.5, alternative="greater").pvalue < 1e-4
        return (won - lost) / len(right) if clear else 0.0


def _given(subject: Subject, name: str, images: Tensor) -> list[Normaliser]:
    """Return how the pixels were normalised: as is known, else in any usual way that explains their range."""
    feed = subject.feeds.get(name)
    known = None if feed is None else _statistics(feed.fed)
    if known is not None:
        return [known]
    found = []
    for usual in _USUAL.values():
        raw = _affine(images, usual, back=True)
        if float(raw.min()) > -0.02 and 0.2 < float(raw.max()) < 1.02:
            found.append(usual)
    return found


def _affine(images: Tensor, statistics: Normaliser, *, back: bool) -> Tensor:
    channels = images.shape[1]
    mean, std = (
        torch.tensor(each if len(each) == channels else [sum(each) / len(each)], device=images.device).view(1, -1, 1, 1)
        for each in statistics
    )
    return images.float() * std + mean if back else (images.float() - mean) / std


def _pixels(batch: Batch, subject: Subject, name: str) -> str | None:
    """Return the entry that holds the teacher's images [B, C, H, W]."""
    prefix = getattr(subject.teachers[name], "prefix", TEACHER_PREFIX)
    found = [
        key
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point() and value.shape[1] in (1, 3)
    ]
    own = [key for key in found if key.startswith(prefix)]
    shared = [key for key in found if "/" not in key]
    return next(iter(own or shared), None)


def _unlike_its_statistics(subject: Subject, name: str) -> Iterator[Finding]:
    """Compare what enters the first BatchNorm with what it met while it was trained."""
    subject.answer(name)
    layers = [m for m in subject.watches[name].kept if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if name not in subject.trained or subject.judged is None or _pixels(subject.judged, subject, name) is None:
        return
    seen: list[tuple[nn.Module, Tensor]] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append((module, args[0].detach().float().transpose(0, 1).flatten(1)))

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with torch.no_grad():
            subject.ask(name, rows(subject.judged, 0, 64))
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        return
    layer: Any = seen[0][0]
    values = seen[0][1]
    if layer.running_var is None or layer.training or int(layer.num_batches_tracked or 0) == 0 or len(values[0]) < 64:
        return
    ratio = float((values.var(1) / layer.running_var.float().clamp_min(1e-12)).clamp_min(1e-12).log().median().exp())
    apart = float(((values.mean(1) - layer.running_mean.float()).abs() / layer.running_var.float().sqrt()).median())
    if not 1 / 6 < ratio < 6 or apart > 2:
        message = (
            f"what enters the first BatchNorm of the teacher '{name}' is unlike its training: the variance is "
            f"{ratio:.3g} times that, the mean {apart:.2g} standard deviations away"
        )
        yield Finding("normalisation", "warning", message, "normalise its inputs as its own pipeline does")
