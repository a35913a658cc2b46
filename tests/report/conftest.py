"""The tests of the report look at its plots."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pictures import drawn


@pytest.fixture(autouse=True)
def _with_plots() -> Iterator[None]:
    with drawn():
        yield
