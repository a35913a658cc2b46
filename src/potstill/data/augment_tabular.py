"""Random views of table rows, each a pure function of (seed, epoch, sample id)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from potstill.data.draws import Draws
from potstill.errors import DataError
from potstill.registry import augmentations


@augmentations.register("noise", kind="tabular")
def noise(
    features: Tensor, *, draws: Draws, std: Annotated[float, Field(ge=0)] = 0.1, scale: Tensor | None = None
) -> Tensor:
    """Add normal noise to each number.

    Args:
        features: float ``[B, F]``; missing values (NaN) stay missing.
        draws: random numbers of these samples.
        std: standard deviation of the noise: in units of ``scale``, else in those of ``features``.
        scale: standard deviation of each column, ``[F]``.

    Returns:
        The same type and shape.

    Raises:
        DataError: the features are integers, or ``scale`` has another number of columns.
    """
    if not features.is_floating_point():
        raise DataError(f"noise needs floating features, got {features.dtype}")
    if scale is not None and scale.shape != features.shape[1:]:
        raise DataError(f"noise: scale must have shape {list(features.shape[1:])}, got {list(scale.shape)}")
    change = draws.normal("noise", *features.shape[1:]).to(features.dtype) * std
    return features + (change if scale is None else change * scale.to(features))
