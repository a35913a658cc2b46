"""What a browser makes of a report: console errors, what it fetches, widths, bytes; pictures of it on request.

pip install playwright && playwright install chromium
python benchmarks/report_check.py runs/demo/report.html --pictures /tmp/pictures

Playwright is no dependency of potstill; without it the check says so and ends with status 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

WIDTHS = (360, 768, 1200)
MOST_BYTES = 2_000_000
FULL = "() => document.querySelectorAll('details').forEach(one => one.open = true)"
OVERFLOWING = """() => [...document.querySelectorAll('main *')]
  .filter(one => !one.closest('svg') && !one.closest('thead'))
  .filter(one => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .slice(0, 5).map(one => one.tagName + '.' + one.className)"""
SMALLEST = """() => Math.min(...[...document.querySelectorAll('svg text')].map(one => {
  const shown = one.ownerSVGElement.getBoundingClientRect().width / one.ownerSVGElement.viewBox.baseVal.width;
  return parseFloat(getComputedStyle(one).fontSize) * shown;
}))"""


def looked_at(browser: Any, report: Path, width: int, scheme: str, pictures: Path | None) -> dict[str, Any]:
    """Open the page at a width and return what is to be seen of it."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme, device_scale_factor=1)
    said: list[str] = []
    fetched: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url[:80]))
    page.goto(report.absolute().as_uri())
    if pictures is not None:
        page.screenshot(path=str(pictures / f"{report.parent.name}-{report.stem}-{width}-{scheme}.png"), full_page=True)
    found = {"width": width, "scheme": scheme, "scroll_width": page.evaluate("document.scrollingElement.scrollWidth")}
    page.evaluate(FULL)
    found |= {
        "scroll_width_all_open": page.evaluate("document.scrollingElement.scrollWidth"),
        "overflowing": page.evaluate(OVERFLOWING),
        "smallest_text_of_plots_px": page.evaluate(SMALLEST),
        "console": said,
        "fetched": [url for url in fetched[1:] if not url.startswith("data:")],
    }
    page.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder for screenshots")
    parser.add_argument("--browser", help="a Chromium of your own; playwright's if omitted")
    options = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("skipped: playwright is not installed (pip install playwright && playwright install chromium)")
        return
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with sync_playwright() as playwright:
        for report in options.reports:
            size = report.stat().st_size
            print(json.dumps({"report": str(report), "bytes": size}))
            wrong += size >= MOST_BYTES
            for width, scheme in itertools.product(WIDTHS, ("light", "dark")):
                browser = playwright.chromium.launch(executable_path=options.browser)
                found = looked_at(browser, report, width, scheme, options.pictures)
                browser.close()
                print(json.dumps(found))
                wide = max(found["scroll_width"], found["scroll_width_all_open"]) > width
                wrong += bool(found["console"] or found["fetched"] or found["overflowing"] or wide)
    print(f"{wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
