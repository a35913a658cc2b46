"""Objectives as papers and other tools have them, by name: their terms as a recipe would write them.

In a recipe ``objective: {preset: hinton, temperature: 20.0}`` stands for the terms; keys that hold a term of their own
are added to them, or replace the one of that name. In Python see :func:`preset`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from potstill.losses.divergence import Temperature
from potstill.losses.objective import Objective, Term
from potstill.registry import presets

Weight = Annotated[float, Field(ge=0)]


@presets.register("hinton", reference="https://arxiv.org/abs/1503.02531")
def hinton(*, temperature: Temperature = 20.0, weight: Weight = 1.0) -> dict[str, dict[str, Any]]:
    """Soft cross-entropy times T², and the cross-entropy of the labels with weight 1 (Hinton, Vinyals, Dean 2015).

    Args:
        temperature: T of both models in the soft term; 20 on MNIST in the paper.
        weight: of the soft term. The paper gives the labels "a considerably lower weight" and no number.
    """
    return {
        "soft": {"loss": "soft_cross_entropy", "weight": weight, "temperature": temperature},
        "hard": {"loss": "cross_entropy", "weight": 1.0},
    }


def preset(name: str, **options: Any) -> Objective:
    """Return the objective of a preset.

    Args:
        name: one of ``potstill list presets``.
        options: of the preset, such as ``temperature``.

    Raises:
        ComponentError: there is no such preset.
        TypeError: it has no such option.

    Example:
        >>> print(preset("hinton", temperature=4.0).describe())  # doctest: +ELLIPSIS
        total = ...
    """
    return Objective({term: Term(**spec) for term, spec in presets.get(name)(**options).items()})
