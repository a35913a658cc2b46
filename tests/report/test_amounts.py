"""Figures as a person reads them, where there is nothing to show."""

from __future__ import annotations

import math

import pytest

from potstill.report import amounts


@pytest.mark.parametrize("shown", [amounts.amount(0), amounts.size(0), amounts.number(math.nan)])
def test_nothing_is_a_dash(shown: str) -> None:
    """A teacher on a server has no parameters that are known, not none."""
    assert shown == "–"


@pytest.mark.parametrize(("first", "second"), [(math.nan, 2.0), (2.0, math.nan), (0.0, 2.0), (2.0, 0.0)])
def test_no_ratio_to_what_is_not_known(first: float, second: float) -> None:
    assert amounts.factor(first, second, "faster", "slower") == ""


def test_a_ratio() -> None:
    assert amounts.factor(10.0, 4.0, "faster", "slower").startswith("2.5×")
