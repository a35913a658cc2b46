"""Losses between predicted numbers. Plain regression distillation is :func:`~potstill.losses.feature.mse`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from potstill.errors import ObjectiveError
from potstill.losses.numerics import at_least_fp32
from potstill.registry import losses

_NEURIPS = "https://papers.nips.cc/paper/6676-learning-efficient-object-detection-models-with-knowledge-distillation"


@losses.register(
    "regression_kd",
    per="position",
    reference=f"Chen et al. 2017, {_NEURIPS}",
    formula="mean(({student} − labels)²) where that + {margin} > mean(({teacher} − labels)²), else 0",
    weight=0.5,
    example_shape=(6, 1),
)
def regression_kd(
    student: Tensor, teacher: Tensor, *, labels: Tensor, margin: Annotated[float, Field(ge=0)] = 0.0
) -> Tensor:
    """Squared error of the student, 0 where it is already below the teacher's by the margin.

    The teacher is no target, as a predicted number can be wrong in any direction, but the error that the student must
    reach. The paper sums over the coordinates of a box where this is their mean, weighs the term by 0.5 beside a
    smooth L1 loss, and names no margin.

    Args:
        student: predicted numbers ``[..., D]``, or ``[B]`` for one number a sample.
        teacher: predicted numbers of the same shape.
        labels: the true numbers, of the same shape, or ``[...]`` where D is 1.
        margin: by how much the student's error must be below the teacher's to count as reached, in squared units of
            the label.

    Returns:
        ``[...]``, in squared units of the label.

    Raises:
        ObjectiveError: the labels do not fit the predictions.

    Reference: Chen et al., *Learning Efficient Object Detection Models with Knowledge Distillation*, NeurIPS 2017,
    https://papers.nips.cc/paper/6676-learning-efficient-object-detection-models-with-knowledge-distillation.
    """
    said, taught = (each.unsqueeze(-1) if each.ndim == 1 else each for each in map(at_least_fp32, (student, teacher)))
    if labels.shape not in (student.shape, said.shape) and not (
        said.shape[-1] == 1 and labels.shape == said.shape[:-1]
    ):
        raise ObjectiveError(
            f"regression_kd expected labels {list(student.shape)} for predictions of that shape, got "
            f"{list(labels.shape)}; one column of predictions takes labels without that axis"
        )
    truth = labels.to(said.dtype).reshape(said.shape)
    error, bound = (said - truth).square().mean(-1), (taught - truth).square().mean(-1)
    return error * (error.detach() + margin > bound)
