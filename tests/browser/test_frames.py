"""A long list that lives: frames and tasks while it is scrolled, beside the same list at rest.

The bounds are ten times those of benchmarks/dashboard.py, because other tests run beside these. Of
three looks the best one counts: what the machine does once in a while is not the page's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser import measure
from tests.harness import FULL, Server

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

ROWS, RUNNING, SECONDS = (10_000, 200, 10) if FULL else (500, 50, 1.5)
LOOKS = 3
LONGEST_MS = 10 * 50
LEAST_FRAMES = 0.9 / 10


def test_scrolling_is_smooth_while_rows_are_updated(
    serve: Callable[..., Server], page: Page
) -> None:
    """While a long list is scrolled whose rows change ten times a second, no frame waits long."""
    server = serve("--slots", str(RUNNING))

    def call(path: str, body: Any) -> None:
        assert server.post(path, body).status in (200, 201)

    measure.fill(call, ROWS, RUNNING)
    page.goto(server.url)
    measure.ready(page, ROWS, "running", RUNNING)
    measure.updated(page)
    busy = [measure.scroll(page, RUNNING, SECONDS) for _ in range(LOOKS)]
    measure.hold(call)
    measure.ready(page, ROWS, "paused", RUNNING)
    idle = measure.scroll(page, RUNNING, SECONDS)
    assert min(max(look.long_tasks_ms, default=0) for look in busy) <= LONGEST_MS
    assert max(look.frames_per_s for look in busy) >= LEAST_FRAMES * idle.frames_per_s
    # Only those in sight exist.
    assert page.locator("li[data-job]").count() < 60
