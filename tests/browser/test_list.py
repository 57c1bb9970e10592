"""The list of jobs: filters, search, pages, in a real browser."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.browser.pages import (
    row,
)
from tests.harness import Server, eventually

if TYPE_CHECKING:
    from playwright.sync_api import Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def test_many_jobs_are_paged_filtered_and_removed(server: Server, page: Page) -> None:
    """The list loads page by page, chips count what the server counts, the menu removes a job."""
    for i in range(120):
        server.post("/v1/jobs", {"kind": "count", "params": {"steps": 0}, "name": f"job {i:03}"})
    server.post("/v1/jobs", {"kind": "checksum", "params": {"file": "none"}, "name": "the bad one"})
    eventually(lambda: len(server.jobs("?state=succeeded&limit=500")) == 120, "all have ended")
    page.goto(server.url)
    expect(page.locator(".chip[data-group=all]")).to_have_text("All 121")
    page.locator(".chip[data-group=done]").click()
    expect(page.locator(".chip[data-group=done]")).to_have_text("Done 120")
    page.get_by_label("Search").fill("job 000")
    expect(page.locator("li[data-job]")).to_have_count(1)
    page.locator(".chip[data-group=failed]").click()
    expect(page.get_by_text("No job matches.")).to_be_visible()
    page.get_by_role("button", name="Show all jobs").click()
    bad = row(page, "the bad one")
    more = bad.get_by_role("button", name="More the bad one")
    more.focus()
    page.keyboard.press("Enter")
    page.get_by_role("menuitem", name="Open").press("Escape")
    expect(more).to_be_focused()
    more.click()
    page.get_by_role("menuitem", name="Remove").click()
    expect(bad).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(bad).to_have_count(1)
    more.click()
    page.get_by_role("menuitem", name="Remove").click()
    page.get_by_role("button", name="Dismiss").click()
    expect(page.locator(".chip[data-group=all]")).to_have_text("All 120")
    expect(bad).to_have_count(0)
    page.mouse.wheel(0, 20_000)
    expect(row(page, "job 000")).to_have_count(1)
    page.mouse.wheel(0, 20_000)
