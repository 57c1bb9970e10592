"""Processes that are started by the form, in a real browser."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

import pytest

from tests.browser.pages import (
    row,
    see_values,
)
from tests.harness import Server

if TYPE_CHECKING:
    from playwright.sync_api import Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def test_process_by_form_and_buttons(server: Server, page: Page) -> None:
    """A process is started by the form, then paused, resumed and cancelled by its buttons."""
    page.goto(server.url)
    page.get_by_role("button", name="New process").click()
    page.get_by_label("Kind").select_option("count")
    page.get_by_label("Steps", exact=True).fill("1000")
    page.get_by_label("Delay (s)").fill("0.02")
    page.get_by_label("Name", exact=True).fill("by form")
    page.get_by_role("button", name="Start").click()
    see_values(page, "by form", 2)
    page.get_by_role("button", name="Pause by form").click()
    expect(row(page, "by form")).to_contain_text("paused by you")
    page.get_by_role("button", name="Resume by form").click()
    see_values(page, "by form", 2)
    expect(page).to_have_title(re.compile("running"))
    page.get_by_role("button", name="Cancel by form").click()
    expect(row(page, "by form")).to_contain_text("Cancelled by you")
    expect(page).to_have_title("Sluice")
    job = server.jobs()[0]
    assert job["by"]["via"] == "ws"
    assert job["by"]["actor"] in page.evaluate("document.cookie")


def test_form_shows_a_refusal_at_its_field(server: Server, page: Page) -> None:
    """What the server refuses is said at the field that it names; a failed job says what to do."""
    page.goto(f"{server.url}/#processes")
    page.get_by_label("Kind").select_option("count")
    page.locator("form").evaluate("(form) => { form.noValidate = true }")
    page.get_by_label("Steps", exact=True).fill("-1")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#p-steps-error")).to_contain_text(">= 0")
    expect(page.get_by_label("Steps", exact=True)).to_be_focused()
    page.get_by_label("Kind").select_option("checksum")
    page.get_by_label("File", exact=True).fill("missing.csv")
    page.get_by_role("button", name="Start").click()
    failed = page.locator("li[data-job]")
    expect(failed).to_contain_text("Failed")
    expect(failed).to_contain_text("missing.csv")
    expect(failed).to_contain_text("Upload the file, then retry.")
    failed.get_by_role("button", name="Retry").click()
    expect(page.locator("li[data-job]")).to_have_count(2)
