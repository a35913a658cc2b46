"""Hard losses: they compare the student with the labels and know no teacher."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from potstill.errors import ObjectiveError
from potstill.interfaces import IGNORED
from potstill.losses.numerics import at_least_fp32
from potstill.registry import losses


@losses.register("cross_entropy", per="position", formula="CE(labels, softmax({student}))", probabilities=True)
def cross_entropy(
    student: Tensor, *, labels: Tensor, label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
) -> Tensor:
    """Cross-entropy with the labels, optionally smoothed (Szegedy et al., 2016).

    Args:
        student: logits ``[..., C]``.
        labels: class ids ``[...]``, −100 where there is none, or class probabilities ``[..., C]`` (mixup), all 0
            where there is none.
        label_smoothing: share of the target that is spread evenly over the classes, in [0, 1).

    Returns:
        ``[...]``, in nats; 0 where the label is −100.

    Raises:
        ObjectiveError: the labels fit the logits in neither form.

    Reference: https://arxiv.org/abs/1512.00567 (label smoothing).
    """
    logits = at_least_fp32(student)
    if labels.is_floating_point() and labels.shape == logits.shape:
        targets = labels.to(logits.dtype).flatten(0, -2)
    elif labels.shape == logits.shape[:-1] and not labels.is_floating_point():
        targets = labels.long().flatten()
    else:
        raise ObjectiveError(
            f"cross_entropy expected class ids {list(logits.shape[:-1])} or probabilities {list(logits.shape)}, "
            f"got labels {list(labels.shape)} of type {labels.dtype}"
        )
    values = F.cross_entropy(
        logits.flatten(0, -2), targets, reduction="none", ignore_index=IGNORED, label_smoothing=label_smoothing
    )
    return values.view(logits.shape[:-1])
