"""Born-again networks: a student's likes teach each other, one generation after the other (Furlanello et al. 2018)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from potstill.registry import schemes
from potstill.schemes.lesson import Lesson


@schemes.register("born_again", reference="Furlanello et al. 2018, https://arxiv.org/abs/1805.04770")
class BornAgain:
    """Each generation is a new student that learns from the one before, on the recipe's own budget.

    The first generation learns from the recipe's teachers; without any, from a generation 0 that is trained before it
    on the labels alone.
    A recipe is spread into as many trainings before they begin, see :func:`potstill.recipe.generations.spread_out`;
    within one of them nothing is arranged.

    Args:
        generations: students that learn from a teacher, the last of which is the run's.
    """

    def __init__(self, generations: Annotated[int, Field(ge=1)] = 2) -> None:
        self.generations = generations

    def arrange(self, lesson: Lesson) -> Lesson:
        """Return the lesson as it is."""
        return lesson
