"""Whether the models see what they were trained on: pixels, tokens, and labels at the right positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.checks.findings import Finding, Level, checks
from potstill.checks.subject import Feed, Subject, rows
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


@checks.register("normalisation")
def normalisation(subject: Subject) -> Iterator[Finding]:
    """Tell which model gets its pixels normalised otherwise than it was trained."""
    for name, feed in subject.feeds.items():
        yield from _other_statistics(name, feed)
    for name in subject.teachers:
        yield from _better_otherwise(subject, name)
        yield from _unlike_its_statistics(subject, name)


@checks.register("tokenizer")
def tokenizer(subject: Subject) -> Iterator[Finding]:
    """Tell which model gets tokens that are not its own."""
    fix = "feed it with its own tokenizer (in a recipe: drop `processor:`)"
    for name in subject.teachers:
        outside = subject.outside_table(name)
        if outside is not None:
            message = f"the teacher '{name}' gets the token id {outside.asked}, and its table has {outside.size} tokens"
            yield Finding("tokenizer", "error", message, fix)
    for name, feed in subject.feeds.items():
        text = next((text for text in subject.texts if _differs(feed, text)), None)
        if text is None:
            continue
        whose = "the student" if name == "student" else f"the teacher '{name}'"
        fed, own = (each.tokenizer.encode(text)[:8] for each in (feed.fed, feed.own))
        level: Level = "warning" if feed.learns else "error"
        message = f"{whose} gets other tokens than those it was trained on: '{text[:40]}' is {fed} and was {own}"
        yield Finding("tokenizer", level, message, fix)


@checks.register("shift")
def shift(subject: Subject) -> Iterator[Finding]:
    """Tell which trained teacher predicts the labels of other positions than those it is compared with."""
    for name in subject.teachers:
        judged = subject.judgement(name)
        if judged is None or judged[1].ndim != 2 or judged[1].shape[1] < 6:
            continue
        means = {by: _loss_at(*judged, by) for by in (-2, -1, 0, 1, 2)}
        best = min(means, key=lambda by: float(means[by].mean()))
        gap = means[0] - means[best]
        error = float(gap.std() / len(gap) ** 0.5) if len(gap) > 1 else float("inf")
        if best and float(gap.mean()) > max(5 * error, 0.2 * float(means[0].mean())):
            what, fix = (
                ("shifted too often", "shift them once: a task, or a model that shifts its labels, and not both")
                if best < 0
                else ("not shifted", "let the label of a position be the next token")
            )
            yield Finding(
                "shift",
                "error",
                f"the labels are {what}: the teacher '{name}' predicts those {abs(best)} position(s) "
                f"{'earlier' if best < 0 else 'later'} (loss {means[best].mean():.3f}, and {means[0].mean():.3f} where "
                "it is compared)",
                fix,
            )


def _loss_at(logits: Tensor, labels: Tensor, by: int) -> Tensor:
    """Return the mean loss of each sample when logits are compared with labels ``by`` positions later, inside."""
    length = labels.shape[1]
    said = logits[:, 2 : length - 2]
    wanted = labels[:, 2 + by : length - 2 + by].clone()
    wanted[(labels[:, 2 : length - 2] == IGNORED) | (wanted >= logits.shape[-1])] = IGNORED
    losses = F.cross_entropy(said.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    known = (wanted != IGNORED).sum(1)
    return (losses.sum(1) / known.clamp_min(1))[known > 0]


def _differs(feed: Feed, text: str) -> bool:
    fed, own = getattr(feed.fed, "tokenizer", None), getattr(feed.own, "tokenizer", None)
    if fed is None or own is None or fed is own:
        return False
    return list(fed.encode(text)) != list(own.encode(text))


def _other_statistics(name: str, feed: Feed) -> Iterator[Finding]:
    fed, own = _statistics(feed.fed), _statistics(feed.own)
    if fed is None or own is None or _near(fed, own):
        return
    whose = "the student" if name == "student" else f"the teacher '{name}'"
    message = f"{whose} was trained on pixels with {_words(own)}, and gets them with {_words(fed)}"
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
    key, labels = _pixels(subject.judged, subject, name), judged[1]
    if key is None:
        return
    images = subject.judged[key]
    as_is = (judged[0].argmax(-1) == labels) & (labels != IGNORED)
    best: tuple[float, str] | None = None
    for given in _given(subject, name, images):
        raw = _affine(images, given, back=True)
        for what, other in _USUAL.items():
            if _near(given, other):
                continue
            changed = {**subject.judged, key: _affine(raw, other, back=False).to(images)}
            right = (subject.logits(name, changed).argmax(-1) == labels) & (labels != IGNORED)
            won, lost = int((right & ~as_is).sum()), int((as_is & ~right).sum())
            share = float(right.sum() - as_is.sum()) / max(1, int((labels != IGNORED).sum()))
            clear = won + lost > 0 and binomtest(won, won + lost, 0.5, alternative="greater").pvalue < 1e-4
            if clear and share > 0.1 and (best is None or share > best[0]):
                best = share, what
    if best is not None:
        message = (
            f"the teacher '{name}' is {100 * best[0]:.0f} points more accurate on the same pixels with {best[1]}: "
            "it was trained on pixels that were normalised otherwise"
        )
        yield Finding("normalisation", "error", message, "normalise its inputs as its own pipeline does")


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
