"""The dashboard with 10,000 jobs of which 200 run, beside the same list with all of them paused.

Claims: the first row is painted within 300 ms of the navigation, with an empty cache. While 200
jobs tell their progress ten times a second and the list of all is scrolled over their rows for
10 s, no task of the page takes more than 50 ms, and it draws at least 0.9 x the frames of the page
at rest. HTML, CSS and JS weigh at most 40 KiB, compressed. The page runs in Chromium
without a screen; a task is long by the browser's own Long Tasks API, and a frame is one call of
``requestAnimationFrame``.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

from playwright.sync_api import Browser, sync_playwright

from benchmarks.common import ROUNDS, Report, Sluice, at_least, at_most, main, place
from tests.browser.conftest import FLAGS
from tests.browser.measure import NOTES, fill, go_on, hold, ready, scroll, updated, weight_bytes

_ROWS = 10_000
_RUNNING = 200
_SECONDS = 10
_LOADS = 3  # of the page in each state and round
_FIRST_ROW_MS = 300
_LONGEST_MS = 50


class _Round(NamedTuple):
    """One state of the server in one round."""

    first_row_ms: float
    frames_per_s: float
    longest_ms: float


@contextmanager
def _chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        raise SystemExit("Chromium is missing here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def _first_row_ms(browser: Browser, url: str) -> float:
    context = browser.new_context(viewport={"width": 1200, "height": 860})
    page = context.new_page()
    page.add_init_script(NOTES)
    page.goto(url)
    found: float = page.evaluate("window.firstRow")
    context.close()
    return found


def _round(browser: Browser, url: str, state: str) -> _Round:
    first = median(_first_row_ms(browser, url) for _ in range(_LOADS))
    context = browser.new_context(viewport={"width": 1200, "height": 860})
    page = context.new_page()
    page.goto(url)
    ready(page, _ROWS, state, _RUNNING)
    if state == "running":
        updated(page)
    seen = scroll(page, _RUNNING, _SECONDS)
    context.close()
    return _Round(first, seen.frames_per_s, max(seen.long_tasks_ms, default=0))


def _rounds() -> tuple[list[_Round], list[_Round]]:
    """Look in turns: with all paused, with all running."""
    idle: list[_Round] = []
    busy: list[_Round] = []
    options = ("--slots", str(_RUNNING), "--max-queued", str(_ROWS))
    with place() as folder, Sluice(folder, *options) as ours, _chromium() as browser:

        def call(path: str, body: Any) -> None:
            status, answer = ours.call("POST", path, body)
            if status >= 400:
                raise RuntimeError(f"{path}: {answer}")

        fill(call, _ROWS, _RUNNING)
        _first_row_ms(browser, ours.url)  # starts what Chromium starts with its first page
        for _ in range(ROUNDS):
            hold(call)
            idle.append(_round(browser, ours.url, "paused"))
            go_on(call)
            busy.append(_round(browser, ours.url, "running"))
    return idle, busy


def _columns(rounds: list[_Round]) -> list[str]:
    """The columns of one state."""
    first = median(each.first_row_ms for each in rounds)
    frames = median(each.frames_per_s for each in rounds)
    longest = max(each.longest_ms for each in rounds)
    return [f"{first:.0f}", f"{frames:.1f}", f"{longest:.0f}" if longest else "≤ 50"]


def measure() -> Report:
    """Measure and judge."""
    idle, busy = _rounds()
    first = median(each.first_row_ms for each in busy)
    ratio = median(b.frames_per_s / i.frames_per_s for i, b in zip(idle, busy, strict=True))
    slower = median(b.first_row_ms / i.first_row_ms for i, b in zip(idle, busy, strict=True))
    return Report(
        "The dashboard with 10,000 jobs",
        ("Jobs", "first row ms", "frames/s", "longest task ms"),
        [
            ["all at rest", *_columns(idle)],
            ["200 run", *_columns(busy)],
            ["ratio", f"{slower:.2f} x", f"{ratio:.2f} x", ""],
        ],
        [
            at_most("first row", first, _FIRST_ROW_MS, "ms"),
            at_least("frames while scrolling, running : at rest", ratio, 0.9),
            at_most("longest task", max(each.longest_ms for each in busy), _LONGEST_MS, "ms"),
            at_most("weight", weight_bytes() / 1024, 40, "KiB"),
        ],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
