"""The student's own average over its steps as its teacher."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from potstill.errors import ComponentError, ModelError
from potstill.interfaces import Batch, Progress, Signals
from potstill.models.weights import _wrong
from potstill.registry import teacher_sources
from potstill.teachers.context import SourceContext
from potstill.teachers.live import Live

Buffers: TypeAlias = Literal["average", "copy"]

_UPDATES = "updates"
_HALF = (torch.float16, torch.bfloat16)


class MovingAverage:
    """A mean teacher: a copy of the student whose weights follow the student's, answering in eval mode and fp32.

    See :func:`moving_average` for the options. It has a state, and acts after every optimizer step.

    Args:
        context: with the student, which is copied now.
        decay: how much of the average stays at each step, at least 0 and below 1.
        warm_up: whether the first steps count more.
        buffers: what becomes of BatchNorm's statistics and other floating-point buffers.

    Attributes:
        model: the averaged model, without gradients.
        updates: how often it was updated.

    Raises:
        ComponentError: there is no student, or the decay is none.
        ModelError: the student cannot be copied.
    """

    def __init__(
        self, context: SourceContext, *, decay: float = 0.999, warm_up: bool = True, buffers: Buffers = "average"
    ) -> None:
        if context.student is None:
            raise ComponentError(f"the moving average '{context.name}' needs a student that is trained, and has none")
        if not 0 <= decay < 1:
            raise ComponentError(f"the moving average '{context.name}' needs a decay in [0, 1), got {decay}")
        self.decay, self.warm_up, self.buffers, self.updates = decay, warm_up, buffers, 0
        self.student: nn.Module = getattr(context.student, "_orig_mod", context.student)  # what torch.compile wraps
        self.model = _copied(self.student)
        self._name = context.name
        self._live = Live(self.model, context.taps, forward=context.forward, prefix=context.prefix, precision="fp32")

    def __call__(self, batch: Batch) -> Signals:
        """Return what the average says, detached; ``logits`` are float32."""
        wide = {name: value.float() if value.dtype in _HALF else value for name, value in batch.items()}
        said = self._live(wide)
        return {name: value.float() if name == "logits" else value for name, value in said.items()}

    def narrow(self, names: Collection[str] | None) -> None:
        """Read these taps alone from now on, all for ``None``."""
        self._live.narrow(names)

    def to(self, device: torch.device | str) -> MovingAverage:
        """Move the average to a device and return it."""
        self._live.to(device)
        return self

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Take in the student's weights, after an optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm_up else self.decay
        new = dict(self.student.named_parameters())
        for name, weight in self.model.named_parameters():
            _follow(weight, new[name], decay)
        current = dict(self.student.named_buffers())
        for name, own in self.model.named_buffers():
            if name in current and current[name].shape == own.shape:
                _follow(own, current[name], decay if self.buffers == "average" else 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights, each tensor once, and how often they were updated."""
        return {**self._tensors(), _UPDATES: torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ModelError: weights are missing, left over, or of other shapes; names them.
        """
        own = {**self._tensors(), _UPDATES: torch.tensor(0)}
        wrong = _wrong(*({name: tuple(value.shape) for name, value in each.items()} for each in (own, state)))
        if wrong:
            raise ModelError(f"the state of the moving average '{self._name}' does not fit its student: {wrong}")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])
        self.updates = int(state[_UPDATES])

    def _tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the model's state under one name, also where it has several."""
        kept = self.model.state_dict()
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {f"model.{name}": value.detach() for name, value in own.items() if name in kept}


@teacher_sources.register("moving_average", reference="https://arxiv.org/abs/1703.01780", follows_student=True)
def moving_average(
    context: SourceContext,
    *,
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999,
    warm_up: bool = True,
    buffers: Buffers = "average",
) -> MovingAverage:
    """Return a mean teacher: the exponential moving average of the student's weights over its steps.

    It gives what the student gives: ``logits`` and the taps that are read. It answers in eval mode, in fp32 whatever
    the student's precision is, and keeps its weights in fp32, for in bf16 a decay of 0.999 would change nothing.

    Args:
        context: with the student.
        decay: what stays of the average at each step. The paper takes 0.99 while the student learns fast, then 0.999.
        warm_up: whether the decay of the n-th step is at most ``(1 + n) / (10 + n)``, as in TensorFlow's
            ``ExponentialMovingAverage(num_updates=…)`` and torch_ema: the first weights, which are random, are soon
            forgotten. The authors' PyTorch code takes ``1 − 1 / (n + 1)`` instead: the plain mean of all so far.
        buffers: what floating-point buffers such as the statistics of BatchNorm become: ``average`` as the weights
            do, ``copy`` the student's. Others are copied. (In the authors' code the teacher runs in train mode and
            gathers statistics of its own.)

    Returns:
        The source.

    Raises:
        ComponentError: there is no student, or the decay is not in [0, 1).
        ModelError: the student cannot be copied.

    Reference:
        Tarvainen and Valpola (2017), "Mean teachers are better role models", https://arxiv.org/abs/1703.01780.
    """
    return MovingAverage(context, decay=decay, warm_up=warm_up, buffers=buffers)


def _copied(student: nn.Module) -> nn.Module:
    """Return a copy without gradients, its half-precision tensors in fp32."""
    try:
        model = copy.deepcopy(student)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"{type(student).__name__} cannot be copied for a moving average: {error}") from error
    for parameter in model.requires_grad_(False).parameters():
        parameter.grad = None
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in _HALF:
            tensor.data = tensor.data.float()
    return model


def _follow(own: Tensor, new: Tensor, decay: float) -> None:
    """Move a tensor of the average towards the student's."""
    value = new.detach().to(own.device, own.dtype)
    if own.is_floating_point() and decay:
        own.lerp_(value, 1 - decay)
    else:
        own.copy_(value)
