"""What all tests share: a cache of their own, quiet libraries, one thread, tiny models, and where real data may lie."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gc

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path_factory.getbasetemp() / "potstill-cache"))


@pytest.fixture(autouse=True, scope="session")
def _no_search_through_the_libraries() -> None:
    """Accelerate collects garbage at each training; most of that time goes through what the imports left."""
    import transformers  # noqa: F401

    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _plots_only_where_they_are_looked_at() -> Iterator[None]:
    """Reports of runs are written without plots, but in `tests/report` and where a test asks for them."""
    from potstill.report import html
    from tests.pictures import wanted

    draw = html._plots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "_plots", lambda view: draw(view) if wanted() else [])
        yield


@pytest.fixture
def ends() -> Iterator[None]:
    """Ends a test that would go on for ever, as an exponential one does; no measure of speed."""

    def stop(*_: object) -> None:
        raise TimeoutError("after two minutes this would go on for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets beside the project, or a skip that says what is missing."""
    folder = Path(os.environ.get("POTSTILL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data sets are not at {folder} (set POTSTILL_DATA)")
    return folder
