"""Whether the models see what they were trained on: tokens, and labels at the right positions."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from potstill.checks.batches import is_one_a_class
from potstill.checks.findings import Finding, Level, checks
from potstill.checks.subject import Feed, Subject, whose_is
from potstill.interfaces import IGNORED


@checks.register("tokenizer")
def tokenizer(subject: Subject) -> Iterator[Finding]:
    """Tell which model gets tokens that are not its own."""
    fix = "feed it with its own tokenizer (in a recipe: drop `processor:`)"
    for name in [*subject.teachers, "student"]:
        outside = subject.outside_table(name)
        if outside is not None:
            message = f"{whose_is(name)} gets the token id {outside.asked}, and its table has {outside.size} tokens"
            yield Finding("tokenizer", "error", message, fix)
    for name, feed in subject.feeds.items():
        text = next((text for text in subject.texts if _differs(feed, text)), None)
        if text is None:
            continue
        fed, own = (each.tokenizer.encode(text)[:8] for each in (feed.fed, feed.own))
        level: Level = "warning" if feed.learns else "error"
        message = (
            f"{whose_is(name)} gets other tokens than those it was trained on: '{text[:40]}' is {fed} and was {own}"
        )
        yield Finding("tokenizer", level, message, fix)


@checks.register("shift")
def shift(subject: Subject) -> Iterator[Finding]:
    """Tell which trained teacher predicts the labels of other positions than those it is compared with."""
    for name in subject.teachers:
        judged = subject.judgement(name)
        if judged is None or judged[1].ndim != 2 or judged[1].shape[1] < 6:
            continue
        if not is_one_a_class(judged[0], subject.answers):
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
