"""The report as a page: whole, safe, the same bytes, and nothing fetched; and the verb that writes it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from potstill.report import write_report
from potstill.runs.metrics import Estimate
from tests.report import made

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Elements, ids and links of a page; tags that do not match are mistakes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        about = dict(attrs)
        self.tags.append(tag)
        self.open += [] if tag in VOID else [tag]
        self.ids += [about["id"]] if "id" in about else []
        self.links += [about[key] for key in ("src", "href", "xlink:href") if key in about]
        self.images += [about] if tag == "svg" else []

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def text_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture
def page(tmp_path: Path) -> str:
    return text_of(made.run(tmp_path, examples=[made.example()]))


class TestPage:
    def test_the_parts_in_order(self, page: str) -> None:
        headings = re.findall(r"<h2>(.*?)</h2>", page)
        assert headings == [
            "Side by side",
            "Is the difference real",
            "In pictures",
            "Notes",
            "Where student and teacher disagree most",
            "How to do it again",
        ]
        assert page.index("<h1>") < page.index('class="verdict"') < page.index("Side by side")

    def test_it_is_whole(self, page: str) -> None:
        found = Page(page)
        assert len(found.ids) == len(set(found.ids))
        assert len(found.images) == 5
        for image in found.images:
            assert image["role"] == "img"
            assert image["aria-label"]
        assert "script" not in found.tags
        assert all(link.startswith(("#", "data:")) for link in found.links)
        assert '<html lang="en">' in page
        assert "width=device-width" in page
        assert len(page.encode()) < 2_000_000

    def test_the_references_of_the_drawings_lead_somewhere(self, page: str) -> None:
        found = Page(page)
        used = {link[1:] for link in found.links if link.startswith("#")} | set(re.findall(r"url\(#(.*?)\)", page))
        assert used <= set(found.ids)

    def test_what_it_says(self, page: str) -> None:
        for words in (
            "Irises.",
            "to be or not to be",
            "versicolor",
            "McNemar",
            "p = 0.036",
            "--seeds 5",
            "data:image/png",
        ):
            assert words in page
        assert "potstill distill x" in page
        assert not re.search(r"\bnan\b|None", page)

    def test_the_same_run_gives_the_same_bytes(self, page: str, tmp_path: Path) -> None:
        assert write_report(tmp_path, tmp_path / "again.html").read_text(encoding="utf-8") == page

    def test_what_comes_from_data_is_text(self, tmp_path: Path) -> None:
        name = "<img src=x onerror=alert(1)>"
        models = {name: made.model("teacher"), "baseline": made.model("baseline"), "distilled": made.model("student")}
        found = made.metrics(recipe=EVIL, label_names=[EVIL, '"onload="x', "c"], notes=[EVIL], models=models)
        evil = made.example(EVIL, answers={name: {"answer": 0, "confidence": 0.5}})
        evil["shown"] += [
            {"name": EVIL, "kind": "number", "value": EVIL},
            {"name": "x", "kind": "image", "value": "javascript:alert(1)"},
            {"name": "x", "kind": "image", "value": "https://example.org/x.png"},
        ]
        page = text_of(made.run(tmp_path, found, recipe=f"name: x\ndescription: '{EVIL}'\n", examples=[evil]))
        parsed = Page(page)
        assert "script" not in parsed.tags
        assert all(link.startswith(("#", "data:")) for link in parsed.links)
        assert "img" in parsed.tags  # that of the example, and no other
        assert parsed.tags.count("img") == 1
        assert "&lt;script&gt;" in page

    def test_a_long_text_is_clipped(self, tmp_path: Path) -> None:
        assert "word " * 100 not in text_of(made.run(tmp_path, examples=[made.example("word " * 500)]))


class TestWhatMayBeMissing:
    def test_labels(self, tmp_path: Path) -> None:
        page = text_of(made.run(tmp_path, made.without_labels(), labels=False))
        assert "no labels" in page
        assert "Is the difference real" not in page
        assert "How good" not in page

    def test_baseline_teacher_latency_and_intervals(self, tmp_path: Path) -> None:
        bare = made.model("student", latency_ms={}, throughput=None, calibration=None, agreement=None, divergence=None)
        bare = bare.model_copy(update={"metrics": {"accuracy": Estimate(value=0.9)}})
        nothing: dict[str, Any] = {"gain": None, "to_teacher": None, "retention": None, "label_names": []}
        page = text_of(made.run(tmp_path, made.metrics(models={"distilled": bare}, **nothing), histories=False))
        Page(page)
        assert "No gain can be claimed" in page
        assert not re.search(r"\bnan\b", page)

    def test_several_teachers_and_many_classes(self, tmp_path: Path) -> None:
        models = {"large": made.model("teacher"), "small": made.model("teacher"), "distilled": made.model("student")}
        page = text_of(made.run(tmp_path, made.metrics(models=models, gain=None, label_names=[]), classes=1000))
        Page(page)
        assert len(page.encode()) < 2_000_000

    def test_a_recipe_that_is_no_mapping(self, tmp_path: Path) -> None:
        Page(text_of(made.run(tmp_path, recipe="- 1\n")))


class TestSeeds:
    def test_both_intervals(self, tmp_path: Path) -> None:
        made.seeds(tmp_path)
        write_report(tmp_path / "seed-1")
        page = text_of(tmp_path)
        Page(page)
        for words in ("Over test samples", "Over seeds", "over 3 seeds", "All that follows is of seed 0"):
            assert words in page
        assert '<a href="seed-1/report.html">' in page
        assert "seed-2/report.html" not in page

    def test_one_seed(self, tmp_path: Path) -> None:
        assert not re.search(r"\bnan\b", text_of(made.seeds(tmp_path, (0.02,))))
