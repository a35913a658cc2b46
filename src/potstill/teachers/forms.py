"""The fastest form of a teacher that still says the same: measured, not assumed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import TrainingError
from potstill.interfaces import Batch, Signals, TeacherSource
from potstill.models.inputs import TEACHER_PREFIX, teacher_view
from potstill.teachers.live import Live
from potstill.teachers.precision import Precision
from potstill.teachers.precision import has_native_bf16 as has_native_bf16


@dataclass(frozen=True)
class Faithfulness:
    """How like two sources answer.

    Attributes:
        agreement: share of answers with the same class in front, in [0, 1].
        divergence: mean KL(exact ‖ fast) at temperature 1, in nats.
        largest: largest absolute difference of two logits.
        samples: answers that were compared: samples, or positions that are no padding.
    """

    agreement: float
    divergence: float
    largest: float
    samples: int


@dataclass(frozen=True)
class Form:
    """A form of a teacher, measured.

    Attributes:
        precision: in which it computes.
        compile: whether its forward is compiled.
        seconds: median over the repetitions of the time for all batches.
        faithfulness: compared with fp32, uncompiled.
        is_faithful: whether that is enough.
    """

    precision: Precision
    compile: bool
    seconds: float
    faithfulness: Faithfulness
    is_faithful: bool

    def __str__(self) -> str:
        return self.precision + (", compiled" if self.compile else "")


@dataclass(frozen=True)
class Choice:
    """The fastest faithful form of a teacher.

    Attributes:
        live: the teacher in that form.
        form: what was measured of it.
        forms: what was measured of every form, the chosen one included; fp32, uncompiled, comes first.
    """

    live: Live
    form: Form
    forms: tuple[Form, ...]

    def plain(self) -> dict[str, Any]:
        """Return the choice and all figures as plain JSON; a figure that is no number is null."""
        return {
            "precision": self.form.precision,
            "compile": self.form.compile,
            "forms": [_plain(asdict(form)) for form in self.forms],
        }


def faithfulness(fast: TeacherSource, exact: TeacherSource, batches: Iterable[Batch]) -> Faithfulness:
    """Return how like ``exact`` a faster source answers, by their ``logits``.

    A single logit is that of one of two classes. Padded positions (``attention_mask``) are left out.

    Args:
        fast: what is judged.
        exact: what it is compared with.
        batches: samples; at least one.

    Raises:
        TrainingError: there is no batch, or a source gives no logits.
    """
    prefix = getattr(exact, "prefix", TEACHER_PREFIX)
    alike, apart, samples, largest = 0, 0.0, 0, torch.zeros((), dtype=torch.float64)
    for batch in batches:
        wanted, found = (_logits(source(batch), teacher_view(batch, prefix)) for source in (exact, fast))
        alike += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        apart += float(_kl(wanted, found).sum())
        both = torch.isfinite(wanted) | torch.isfinite(found)
        largest = torch.maximum(largest, torch.where(both, (wanted - found).abs(), 0.0).max())  # NaN stays
        samples += len(wanted)
    if not samples:
        raise TrainingError("expected samples on which two forms of a teacher can be compared, got none")
    return Faithfulness(alike / samples, apart / samples, float(largest), samples)


def fastest(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    taps: Sequence[str] = (),
    forward: Callable[[nn.Module, Batch], Signals] | None = None,
    prefix: str = TEACHER_PREFIX,
    compile: bool = False,
    agreement: float = 0.99,
    divergence: float = 1e-3,
    repeats: int = 3,
) -> Choice:
    """Return the fastest form of a teacher that is faithful on samples.

    The forms are fp32, bf16 where the processor has it (:func:`has_native_bf16`), and each of them compiled as well as
    int8 where ``compile`` allows it and torchao is there. They are timed in turns, after a pass that is not timed.

    Args:
        model: the teacher, on the device where it is to answer.
        batches: samples on that device, as the training has them; they are held in memory.
        taps: see :class:`potstill.teachers.live.Live`, as are ``forward`` and ``prefix``.
        forward: ``(model, batch) -> responses``.
        prefix: of its own entries in a batch.
        compile: whether compiled forms are measured too; each takes up to a minute to compile.
        agreement: least share of answers with the same class in front.
        divergence: greatest mean KL in nats.
        repeats: passes that are timed of each form.

    Raises:
        TrainingError: there is no batch, or the teacher gives no logits.
    """
    batches = list(batches)
    place = next(iter(model.parameters()), torch.zeros(0)).device
    lives = {form: _live(model, taps, forward, prefix, *form) for form in _forms(place, compile)}
    exact = lives["fp32", False]
    found = {form: faithfulness(live, exact, batches) for form, live in lives.items()}
    lives = {form: live for form, live in lives.items() if live.is_compiled == form[1]}  # the others are there twice
    taken: dict[tuple[Precision, bool], list[float]] = {form: [] for form in lives}
    for turn in range(repeats):
        for form in list(lives)[:: -1 if turn % 2 else 1]:
            taken[form].append(_seconds(lives[form], batches, place))
    forms = {}
    for form, times in taken.items():
        like = found[form]
        is_faithful = like.agreement >= agreement and like.divergence <= divergence
        forms[form] = Form(*form, statistics.median(times), like, is_faithful or lives[form] is exact)
    chosen = min((form for form, measured in forms.items() if measured.is_faithful), key=lambda f: forms[f].seconds)
    return Choice(lives[chosen], forms[chosen], tuple(forms.values()))


def _forms(device: torch.device, compile: bool) -> list[tuple[Precision, bool]]:
    precisions: list[Precision] = ["fp32", "bf16"] if has_native_bf16(device) else ["fp32"]
    forms: list[tuple[Precision, bool]] = [(precision, False) for precision in precisions]
    if compile:
        forms += [(precision, True) for precision in precisions]
        forms += [("int8", True)] if find_spec("torchao") is not None else []
    return forms


def _live(
    model: nn.Module,
    taps: Sequence[str],
    forward: Callable[[nn.Module, Batch], Signals] | None,
    prefix: str,
    precision: Precision,
    compile: bool,
) -> Live:
    return Live(model, taps, forward=forward, prefix=prefix, precision=precision, compile=compile)


def _seconds(live: Live, batches: Sequence[Batch], device: torch.device) -> float:
    """Return how long a teacher takes for all batches."""
    begin = time.perf_counter()
    for batch in batches:
        live(batch)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begin


def _logits(signals: Signals, batch: Batch) -> Tensor:
    """Return the logits that count as float64 [N, C] on the CPU."""
    if "logits" not in signals:
        raise TrainingError(f"forms of a teacher are compared by their logits, and it gives {', '.join(signals)}")
    logits: Tensor = signals["logits"].detach().cpu().double()
    mask = batch.get("attention_mask")
    if logits.ndim == 3 and mask is not None and mask.shape == logits.shape[:2]:
        logits = logits[mask.cpu().bool()]
    logits = logits.reshape(-1, logits.shape[-1] if logits.ndim > 1 else 1)
    return torch.cat([torch.zeros_like(logits), logits], dim=-1) if logits.shape[-1] == 1 else logits


def _kl(wanted: Tensor, found: Tensor) -> Tensor:
    """Return KL(wanted ‖ found) [N] in nats; impossible classes add nothing."""
    lowest = torch.finfo(torch.float64).min
    right, own = (logits.log_softmax(-1).clamp_min(lowest) for logits in (wanted, found))
    return (right.exp() * (right - own)).sum(-1).clamp_min(0)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
