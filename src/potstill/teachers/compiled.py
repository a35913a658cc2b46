"""A teacher's forward, compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import nn

from potstill.interfaces import Batch, Signals
from potstill.knowledge.capture import capture
from potstill.models.inputs import accepted_inputs

logger = logging.getLogger("potstill")

Answer: TypeAlias = Callable[[nn.Module, Batch], Signals]
"""What a teacher does with its own view of a batch."""


def weights_state(model: nn.Module) -> list[tuple[int, ...]]:
    """Return what changes whenever a parameter or buffer of a model is replaced, moved or written to."""
    tensors = (*model.parameters(), *model.buffers())
    return [(id(each), each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors]


class Compiled:
    """Answers with a model by compiled code, made at the first call; eagerly, after a warning, where that fails.

    Sizes are dynamic, so batches of texts of any length share the code. On a CPU the weights are constants in it: a
    model that has changed needs a new object. It is one whole graph or none: parts of a broken one would meet no tap,
    and would outlive the weights in them.

    Args:
        taps: signals to capture beside the responses.
        respond: ``(model, batch) -> responses``.
        backend: of ``torch.compile``.
    """

    def __init__(
        self, taps: Sequence[str], respond: Callable[[nn.Module, Batch], Signals], *, backend: str = "inductor"
    ) -> None:
        self.answer = _answering(list(taps), respond)
        self.is_eager = False
        self._backend = backend
        self._compiled: Answer | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Signals:
        """Return responses and taps."""
        if self.is_eager:
            return self.answer(model, batch)
        try:
            if self._compiled is None:
                self._compiled = self._compile(model)
            with self._constants(model):
                return self._compiled(model, batch)
        except RuntimeError as error:  # of the compiler; what is wrong with the model itself comes again
            answered = self.answer(model, batch)
            self.is_eager, self._compiled = True, None
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("the teacher cannot be compiled, so it answers uncompiled: %s", reason)
            return answered

    def _compile(self, model: nn.Module) -> Answer:
        accepted_inputs(model)  # looked up before the tracer comes along
        compiled: Answer = torch.compile(self.answer, dynamic=True, fullgraph=True, backend=self._backend)
        return compiled

    def _constants(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return the context in which code is made that has the weights in it, where that was seen to be faster."""
        place = next(iter(model.parameters()), None)
        if self._backend != "inductor" or place is None or place.device.type != "cpu":
            return nullcontext()
        from torch._inductor import config

        patched: AbstractContextManager[Any] = config.patch(freezing=True)
        return patched


def _answering(taps: list[str], respond: Callable[[nn.Module, Batch], Signals]) -> Answer:
    def answer(model: nn.Module, batch: Batch) -> Signals:
        with capture(model, taps, detach=True) as signals:
            answered = respond(model, batch)
        return {**answered, **signals}

    # The limit of recompilations counts by code object: each teacher has one of its own.
    code = answer.__code__.replace()
    return FunctionType(code, answer.__globals__, answer.__name__, None, answer.__closure__)
