"""Making two signals comparable: projectors sized by what the models really say."""

from __future__ import annotations

from torch import Tensor, nn

from potstill.errors import ObjectiveError, did_you_mean

_KINDS = ("linear",)


def make_projector(kind: str, student: Tensor, teacher: Tensor) -> nn.Module:
    """Return a module that maps the student's signal to the teacher's shape.

    Args:
        kind: ``linear``: one linear map of the width; of the channels (a 1×1 convolution) for ``[B, C, H, W]``.
        student: the student's signal on some batch, ``[..., H_s]`` or ``[B, C_s, H, W]``.
        teacher: the teacher's on the same batch, equal but for the width.

    Raises:
        ObjectiveError: unknown kind, or shapes that differ in more than the width.

    Reference: Romero et al. 2015 (FitNets), https://arxiv.org/abs/1412.6550.
    """
    if kind not in _KINDS:
        raise ObjectiveError(f"there is no projector '{kind}'; {did_you_mean(kind, _KINDS)}")
    channels_first = student.ndim == 4
    axis = 1 if channels_first else -1
    if student.ndim != teacher.ndim or _without(student, axis) != _without(teacher, axis):
        raise ObjectiveError(
            f"project: linear expected signals that differ in the width alone, got student {list(student.shape)} "
            f"and teacher {list(teacher.shape)}; pick layers of the same spatial size or length"
        )
    if channels_first:
        return nn.Conv2d(student.shape[1], teacher.shape[1], kernel_size=1)
    return nn.Linear(student.shape[-1], teacher.shape[-1])


def _without(tensor: Tensor, axis: int) -> list[int]:
    shape = list(tensor.shape)
    del shape[axis]
    return shape
