"""Teaching the heads alone: what a teacher says moves the output layer of a student, and nothing below it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from potstill.errors import ModelError, TrainingError, did_you_mean
from potstill.interfaces import FOREIGN, Batch, Signals
from potstill.registry import schemes
from potstill.schemes.lesson import Extension, Lesson

SIGNAL = "head.logits"
"""The student's logits whose graph ends at its output layer."""

_NEAR = 0.99  # of FOREIGN, which bf16 rounds


@schemes.register("separate_heads", makes=("head.",))
class SeparateHeads:
    """Give the student the signal ``head.logits``: its logits, behind which the output layer is all that learns.

    The output layer is applied once more to what entered it, dropout included, cut from the graph. The values are those
    of ``logits``; the gradient of a term that reads them reaches the weights of the output layer and stops there. With
    several tasks, where each has its own rows of the output layer, a term ``{loss: kl, student: head.logits}`` so
    teaches each head by its task's teacher, and the encoder that they share learns from the other terms alone::

        scheme: {name: separate_heads}
        objective:
          hard: {loss: cross_entropy, weight: 0.3}
          soft: {loss: kl, student: head.logits, weight: 0.7, temperature: 4.0}

    The classes that ``logits`` have excluded, as those of other tasks than the sample's, are excluded here too.

    Args:
        layer: path of the output layer; the last linear layer of the student if omitted.
    """

    def __init__(self, *, layer: str | None = None) -> None:
        self.layer = layer

    def arrange(self, lesson: Lesson) -> Lesson:
        """Return a lesson whose student has the signal.

        Raises:
            TrainingError: no term reads it, or the student has another extension already.
            ModelError: the output layer is not found.
        """
        student = lesson.student
        if student.extension is not None:
            kind = type(student.extension).__name__
            raise TrainingError(f"separate_heads expected a student as it is, got one with {kind}")
        read = [] if student.objective is None else student.objective.taps("student")
        if SIGNAL not in read:
            raise TrainingError(
                f"separate_heads expected a term that reads '{SIGNAL}', got {', '.join(read) or 'none'}; "
                f"say for example `objective: {{soft: {{loss: kl, student: {SIGNAL}}}}}`"
            )
        path = self.layer or _last_linear(student.model)
        return replace(lesson, student=replace(student, extension=DetachedHead(student.model, path)))


class DetachedHead(Extension):
    """The output layer of a student, applied to what enters it without its graph.

    Args:
        model: the student.
        path: of its output layer.

    Raises:
        ModelError: there is no module of that path.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        known = dict(model.named_modules())
        if path not in known:
            raise ModelError(f"{type(model).__name__} has no module '{path}'; {did_you_mean(path, known)}")
        self.path = path
        self.tap = f"input:{path}"
        self._layer = (known[path],)  # in a tuple: the layer is the student's, and saved with it
        self._checked = False

    @property
    def pending(self) -> bool:
        """Whether it is still to be seen that the layer gives the logits."""
        return not self._checked

    def taps(self) -> list[str]:
        """Return what enters the output layer."""
        return [self.tap]

    def makes(self, signal: str) -> bool:
        """Return whether a signal is ``head.logits``."""
        return signal == SIGNAL

    @torch.no_grad()
    def materialize(self, signals: Signals) -> None:
        """Look whether the layer gives the student's logits.

        Raises:
            ModelError: it gives something else.
        """
        made, logits = self._said(signals), signals.get("logits")
        if not isinstance(made, Tensor) or not isinstance(logits, Tensor) or made.shape != logits.shape:
            right = False
        else:
            right = bool(torch.allclose(made.float(), logits.float(), rtol=1e-2, atol=1e-2))
        if not right:
            raise ModelError(
                f"separate_heads expected the layer '{self.path}' to give the student's logits, and it does not; name "
                "the one that does, as in `scheme: {layer: classifier}`"
            )
        self._checked = True

    def forward(self, signals: Signals, batch: Batch) -> Signals:
        """Return ``head.logits``."""
        return {SIGNAL: self._said(signals)}

    def _said(self, signals: Signals) -> Tensor:
        logits: Tensor = signals["logits"]
        made: Tensor = self._layer[0](signals[self.tap].detach())
        if made.shape != logits.shape:
            return made
        return made.masked_fill(logits.detach() <= _NEAR * FOREIGN, FOREIGN)


def _last_linear(model: nn.Module) -> str:
    """Return the path of the last linear layer of a model."""
    linear: list[str] = [path for path, module in model.named_modules() if path and isinstance(module, nn.Linear)]
    if not linear:
        raise ModelError(
            f"separate_heads found no linear layer in {type(model).__name__}; name what gives its logits, as in "
            "`scheme: {layer: head}`"
        )
    return linear[-1]
