"""Self-distillation by exits: classifiers at inner layers learn from the last one, and pull the layers along."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from potstill.data.draws import Draws
from potstill.errors import ObjectiveError, TrainingError
from potstill.interfaces import FOREIGN, Batch, Signals
from potstill.knowledge.layouts import Layout, layout_of
from potstill.losses.objective import Objective, Term, default_objective
from potstill.registry import schemes
from potstill.schemes.lesson import SELF, Extension, Lesson

Pool = Literal["mean", "first"]
"""What stands for a row of tokens: the mean of those that are no padding, or the first of them."""

FEATURES = "exit.features"
"""The signal that enters the student's own classifier, a vector where exits give one."""

_SIGNAL = re.compile(r"exit\.(?:(?P<number>[1-9]\d*)(?:\.features)?|features)")
_HARD = "cross_entropy"
_NEAR = 0.99  # of FOREIGN, which bf16 rounds


@schemes.register("exits", reference="https://arxiv.org/abs/1905.08094", makes=("exit.",))
class Exits:
    """Put a classifier at inner layers of the student while it learns, and let the last one teach them (BYOT).

    Signals that the student has then: ``exit.1``, ``exit.2``, … (logits, in the order of ``at``),
    ``exit.1.features``, … (what enters the classifier of an exit) and ``exit.features`` (what enters the student's
    own, of the same width and pooled likewise). In evaluation, and in what is saved, the student is the plain network.

    Terms about exits that the objective has stay as they are. Where it has none, these are added for each exit k::

        exit_k_hard: (1 − alpha) · CE(labels, exit.k)
        exit_k_soft: alpha · KL(softmax(logits/T) ‖ softmax(exit.k/T)), of the student's own logits without gradient
        exit_k_hint: hint · mean((exit.k.features − exit.features)²), without gradient of the latter

    alpha = 0.3, T = 3, no factor T² and 0.03 for the hints are of the authors' code for CIFAR
    (https://github.com/ArchipLab-LinfengZhang/pytorch-self-distillation-final). Its hint is the length of the
    difference over the whole batch, after another linear layer, and one exit has none; that of the paper is the squared
    length ‖·‖², the mean times the width. The mean depends on neither batch nor width.

    An exit on a map is a 1×1, a 3×3 and a 1×1 convolution, each with BatchNorm, then the mean over its places; on
    tokens or a vector two linear layers after the pooling; for a student that classifies each token, an exit does.

    Args:
        at: signals of the student, such as ``[hidden.2, hidden.4]`` or ``[layer1, layer2]``.
        width: inside an exit; a quarter of the features' if omitted, at least 8.
        pool: of tokens, for a student that gives one answer a sample.
        features: the student's signal that enters its classifier, such as ``input:fc``; if omitted, the input
            of the last linear layer, which must give the logits.
        alpha: share of the soft term, from 0 to 1.
        temperature: of the soft term.
        hint: weight of the hints; 0 leaves them out.

    Raises:
        TrainingError: no layers, or a number out of range.

    Reference: Zhang et al. 2019 (Be Your Own Teacher), https://arxiv.org/abs/1905.08094.
    """

    def __init__(
        self,
        *,
        at: list[str],
        width: int | None = None,
        pool: Pool = "mean",
        features: str | None = None,
        alpha: float = 0.3,
        temperature: float = 3.0,
        hint: float = 0.03,
    ) -> None:
        if not at or len(set(at)) < len(at):
            raise TrainingError(f"exits expected `at` to name layers of the student, each once, got {at}")
        if not (0 <= alpha <= 1 and temperature > 0 and hint >= 0 and (width is None or width > 0)):
            raise TrainingError(
                "exits expected alpha from 0 to 1, temperature and width above 0 and hint of 0 or more, got "
                f"alpha {alpha}, temperature {temperature}, width {width}, hint {hint}"
            )
        self.at, self.width, self.features, self.hint = list(at), width, features, hint
        self.pool: Pool = pool
        self.alpha, self.temperature = alpha, temperature

    def arrange(self, lesson: Lesson) -> Lesson:
        """Return a lesson whose student has exits.

        Raises:
            TrainingError: it has another extension already, or its classifier is not found.
        """
        student = lesson.student
        if student.extension is not None:
            raise TrainingError(f"exits expected a student as it is, got one with {type(student.extension).__name__}")
        objective = student.objective or default_objective()
        terms = dict(objective.named_terms())
        if not any(_SIGNAL.fullmatch(name) for term in terms.values() for name in term.student):
            terms |= self._terms(objective)
            balance = objective.balance
            settings = None if balance is None else balance.settings
            objective = Objective(terms, response_mask=objective.response_mask, balance=settings)
        read = [name.rpartition("/")[2] for term in terms.values() for name in (*term.student, *term.teacher)]
        deepest, found = self.features, None
        if deepest is None and any(name.endswith("features") and _SIGNAL.fullmatch(name) for name in read):
            found = _classifier(student.model)
            deepest = f"input:{found}"
        made = ExitHeads(self.at, width=self.width, pool=self.pool, deepest=deepest, seed=lesson.seed)
        if found is not None:
            made.expect(found, student.model.get_submodule(found))
        return replace(lesson, student=replace(student, objective=objective, extension=made))

    def _terms(self, objective: Objective) -> dict[str, Term]:
        own = [t for _, t in objective.named_terms() if t.hard and not t.virtual and t.student == ("logits",)]
        if own and own[0].loss_name != _HARD:
            raise TrainingError(
                f"exits by themselves expected a student that learns its labels by {_HARD}, got {own[0].loss_name}; "
                "write terms about them, such as `early: {loss: mse, student: exit.1, teacher: self/logits}`"
            )
        options = own[0].options if own else {}
        made: dict[str, Term] = {}
        for number in range(1, len(self.at) + 1):
            name = f"exit.{number}"
            made[f"exit_{number}_hard"] = Term(_HARD, name, weight=1 - self.alpha, **options)
            made[f"exit_{number}_soft"] = Term(
                "kl", name, f"{SELF}/logits", weight=self.alpha, temperature=self.temperature, scale="1/T^2"
            )
            if self.hint:
                made[f"exit_{number}_hint"] = Term("mse", f"{name}.features", f"{SELF}/{FEATURES}", weight=self.hint)
        return made


class ExitHeads(Extension):
    """The exits of a student; made by :meth:`materialize`, with weights that depend on the seed alone.

    Args:
        at: signals of the student.
        width: inside an exit; a quarter of the features' if omitted.
        pool: of tokens.
        deepest: the signal that enters the student's classifier; ``None`` where nothing is compared with it.
        seed: of the first weights.
    """

    def __init__(
        self, at: Sequence[str], *, width: int | None = None, pool: Pool = "mean", deepest: str | None, seed: int = 0
    ) -> None:
        super().__init__()
        self.at, self.width, self.deepest, self.seed = list(at), width, deepest, seed
        self.pool: Pool = pool
        self.heads = nn.ModuleList()
        self._expected: tuple[str, nn.Module] | None = None  # in a tuple: the layer is the student's

    def expect(self, path: str, layer: nn.Module) -> None:
        """Take a layer for the student's classifier, if it gives the logits that :meth:`materialize` sees."""
        self._expected = (path, layer)

    @property
    def pending(self) -> bool:
        """Whether the exits are still to be made."""
        return len(self.heads) < len(self.at)

    def taps(self) -> list[str]:
        """Return the layers where exits are, and what enters the student's classifier."""
        return self.at if self.deepest is None else [*self.at, self.deepest]

    def makes(self, signal: str) -> bool:
        """Return whether a signal is ``exit.k``, ``exit.k.features`` of one of the exits, or ``exit.features``."""
        match = _SIGNAL.fullmatch(signal)
        if match is None:
            return False
        return self.deepest is not None if match["number"] is None else int(match["number"]) <= len(self.at)

    def materialize(self, signals: Signals) -> None:
        """Make the exits for signals of these shapes.

        Raises:
            ObjectiveError: the student gives no logits ``[B, C]`` or ``[B, T, C]``, a layer has other axes, or the
                layer that was taken for the classifier gives something else.
        """
        logits = signals.get("logits")
        if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
            got = list(logits.shape) if isinstance(logits, Tensor) else "none"
            raise ObjectiveError(f"exits expected a student with logits [B, C] or [B, T, C], got {got}")
        self._check_classifier(signals, logits)
        by_token, classes = logits.ndim == 3, logits.shape[-1]
        layouts = [layout_of(signals[name]) for name in self.at]
        for name, layout in zip(self.at, layouts, strict=True):
            if by_token and layout.kind != "tokens":
                raise ObjectiveError(f"exits of a student that classifies tokens expected tokens at '{name}'")
        seen = None if self.deepest is None else layout_of(signals[self.deepest])
        generator = Draws(self.seed, 0, torch.zeros(1, dtype=torch.int64)).generator(0, "exits")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator.initial_seed())
            for layout in layouts:
                features = layout.width if seen is None else seen.width
                width = self.width or max(features // 4, 8)
                self.heads.append(_Exit(layout, width, features, classes, None if by_token else self.pool))
        self.heads.to(logits.device)

    @torch.no_grad()
    def _check_classifier(self, signals: Signals, logits: Tensor) -> None:
        if self._expected is None:
            return
        (path, layer), self._expected = self._expected, None
        given: Tensor = layer(signals[f"input:{path}"]).float()
        wanted = logits.float()
        if given.ndim == 3 and wanted.ndim == 2:  # of one of the tokens, such as the last
            wanted = wanted[:, None]
        right = given.shape[-1] == wanted.shape[-1] and given.shape[0] == wanted.shape[0] and given.ndim == wanted.ndim
        if right:
            near = torch.isclose(given, wanted, rtol=1e-2, atol=1e-2) | (wanted <= _NEAR * FOREIGN)
            each = near.all(-1)
            right = bool((each if logits.ndim == 3 or each.ndim == 1 else each.any(1)).all())
        if not right:
            raise ObjectiveError(
                f"exits took '{path}', the last linear layer, for the student's classifier, and it does not give the "
                "logits; say what enters the one that does, as in `scheme: {features: 'input:head'}`, or leave the "
                "hints out with `hint: 0`"
            )

    def forward(self, signals: Signals, batch: Batch) -> Signals:
        """Return the logits and the features of every exit, and those that enter the student's classifier."""
        made: Signals = {}
        mask = batch.get("attention_mask")
        for number, (name, head) in enumerate(zip(self.at, self.heads, strict=True), 1):
            features, logits = head(signals[name], mask)
            made[f"exit.{number}"], made[f"exit.{number}.features"] = logits, features
        if self.deepest is not None:
            signal = signals[self.deepest]
            pool = None if signals["logits"].ndim == 3 else self.pool
            made[FEATURES] = _pooled(layout_of(signal), signal, mask, pool)
        return made


class _Exit(nn.Module):
    """An exit at one layer: pooling and a bottleneck, which give the features, and a classifier."""

    def __init__(self, layout: Layout, width: int, features: int, classes: int, pool: Pool | None) -> None:
        super().__init__()
        self.layout, self.pool = layout, pool
        if layout.kind == "map":
            self.bottleneck: nn.Module = nn.Sequential(
                nn.Conv2d(layout.width, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, features, 1, bias=False),
                nn.BatchNorm2d(features),
            )
        else:
            self.bottleneck = nn.Sequential(nn.Linear(layout.width, width), nn.GELU(), nn.Linear(width, features))
        self.classifier = nn.Linear(features, classes)

    def forward(self, signal: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return features and logits."""
        signal = signal.to(self.classifier.weight.dtype)
        if self.layout.kind == "map":
            features = self.bottleneck(self.layout.split(signal)[0]).mean((2, 3))
        else:
            features = self.bottleneck(_pooled(self.layout, signal, mask, self.pool))
        return features, self.classifier(features)


def _pooled(layout: Layout, signal: Tensor, mask: Tensor | None, pool: Pool | None) -> Tensor:
    """Return a signal as a vector ``[B, width]``; as it is where it is one, or where each token counts by itself."""
    if layout.kind == "map":
        return layout.split(signal)[0].mean((2, 3))
    if layout.kind == "vector" or pool is None:
        return signal
    fits = mask is not None and mask.shape == signal.shape[:2]
    kept = (mask != 0) if mask is not None and fits else torch.ones(signal.shape[:2], device=signal.device).bool()
    if pool == "first":
        return signal[torch.arange(len(signal), device=signal.device), kept.int().argmax(1)]
    weights = kept.to(signal.dtype)[..., None]
    return (signal * weights).sum(1) / weights.sum(1).clamp_min(1)


def _classifier(model: nn.Module) -> str:
    """Return the path of the last linear layer of a model."""
    linear: list[str] = [path for path, module in model.named_modules() if path and isinstance(module, nn.Linear)]
    if not linear:
        raise TrainingError(
            f"exits found no linear layer that classifies in {type(model).__name__}; say what enters its classifier, "
            "as in `scheme: {features: 'input:head'}`, or leave the hints out with `hint: 0`"
        )
    return linear[-1]
