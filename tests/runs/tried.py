"""A recipe tried out, as `check` does it: the lines alone, or what was found."""

from __future__ import annotations

from collections.abc import Iterator

from potstill.checks.findings import Finding
from potstill.recipe.schema import Recipe
from potstill.runs.plan import Plan
from potstill.runs.preflight import examine


def dry_run(recipe: Recipe, *, allow_code: bool = True) -> Iterator[str]:
    """What the recipe means, a line a thing."""
    return (line for line in examine(Plan(recipe, allow_code=allow_code)) if isinstance(line, str))


def found(recipe: Recipe) -> list[Finding]:
    """What the preflight finds."""
    return [line for line in examine(Plan(recipe)) if isinstance(line, Finding)]
