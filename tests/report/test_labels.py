"""Texts for plots."""

from __future__ import annotations

from potstill.report.labels import told_apart


def test_long_names_that_begin_alike_are_told_apart() -> None:
    names = ["soft", "hints_stages-0_stages-0", "hints_stages-0_stages-1", "a_name_that_is_long_alone"]
    found = told_apart(names, 14)
    assert found == ["soft", "hint…_stages-0", "hint…_stages-1", "a_name_that_i…"]
    assert all(len(text) <= 14 for text in found)
