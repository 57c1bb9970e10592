"""Every flow by keyboard alone, in a real browser: no test here has a pointer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.pages import MB, content, count_slowly, row
from tests.harness import Server, eventually

if TYPE_CHECKING:
    from playwright.sync_api import Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def tab_to(page: Page, name: str, most: int = 120) -> None:
    """Press Tab until the control of that name has the focus."""
    for _ in range(most):
        page.keyboard.press("Tab")
        said = page.evaluate(
            "(() => { const at = document.activeElement;"
            " return [at.getAttribute('aria-label'), at.textContent.trim(),"
            " ...[...(at.labels ?? [])].map((label) => label.textContent.trim())] })()"
        )
        if name in said:
            return
    raise AssertionError(f"{name} can't be reached by Tab")


def focused(page: Page) -> str:
    """The name of the row that has the focus."""
    return str(page.evaluate("document.activeElement.querySelector('.name')?.textContent"))


def test_jobs_by_keyboard(server: Server, page: Page) -> None:
    """Rows are walked, paused, resumed, cancelled, retried, removed and brought back by keys."""
    for name in ("one", "two", "three"):
        count_slowly(server, name)
    page.goto(server.url)
    expect(row(page, "three")).to_contain_text("Running")
    page.keyboard.press("j")
    assert focused(page) == "three"
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert focused(page) == "two"
    page.keyboard.press("p")
    expect(row(page, "two")).to_contain_text("paused by you")
    page.keyboard.press("p")
    expect(row(page, "two")).to_contain_text("Running")
    page.keyboard.press("c")
    expect(row(page, "two")).to_contain_text("Cancelled by you")
    page.keyboard.press("r")
    eventually(lambda: len(server.jobs()) == 4, "it is retried")
    expect(page.locator("li[data-job]")).to_have_count(4)
    assert focused(page) == "two"
    page.keyboard.press("Delete")
    expect(page.locator("li[data-job]")).to_have_count(3)
    assert focused(page) == "one"
    page.keyboard.press("z")
    expect(page.locator("li[data-job]")).to_have_count(4)
    page.keyboard.press("m")
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("menuitem", name="Pause")).to_be_focused()
    page.keyboard.press("Enter")
    expect(row(page, "one")).to_contain_text("paused by you")


def test_a_selection_by_keyboard(server: Server, page: Page) -> None:
    """A range is selected with Shift, all with Ctrl, and a key commands them."""
    for name in "abcd":
        count_slowly(server, f"count {name}")
    page.goto(server.url)
    expect(row(page, "count d")).to_contain_text("Running")
    for key in ("j", "j", "x", "Shift+J"):
        page.keyboard.press(key)
    expect(page.locator(".many-text:visible")).to_have_text("2 selected")
    page.keyboard.press("p")
    for name in "bc":
        expect(row(page, f"count {name}")).to_contain_text("Paused")
    page.keyboard.press("Escape")
    expect(page.locator(".many-text:visible")).to_have_text("Select all")
    page.keyboard.press("ControlOrMeta+a")
    expect(page.locator(".many-text:visible")).to_have_text("4 selected")
    page.keyboard.press("c")
    eventually(lambda: len(server.jobs("?state=cancelled")) == 4, "all are cancelled")


def test_views_and_search_by_keyboard(server: Server, page: Page) -> None:
    """Numbers go to the views, / to the search, Enter to a job's page; ? tells of all that."""
    server.post("/v1/jobs", {"kind": "count", "params": {"steps": 0}, "name": "counted"})
    server.post("/v1/jobs", {"kind": "count", "params": {"steps": 0}, "name": "another"})
    page.goto(server.url)
    expect(row(page, "counted")).to_contain_text("Done")
    for key, view in (("2", "Files"), ("3", "Processes"), ("4", "Overview"), ("1", "Jobs")):
        page.keyboard.press(key)
        expect(page.locator("nav [aria-current=page]")).to_have_text(view)
    page.keyboard.press("/")
    page.keyboard.type("counted")
    expect(page.locator("li[data-job]")).to_have_count(1)
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(page.locator("h1:visible")).to_have_text("counted")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("pause or resume")
    tab_to(page, "Single letters do something on this page")
    page.keyboard.press("Space")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("1")
    expect(page.locator("h1:visible")).to_have_text("counted")  # they are off, and stay off
    page.reload()
    expect(page.locator("h1:visible")).to_have_text("counted")
    page.keyboard.press("1")
    expect(page.locator("h1:visible")).to_have_text("counted")


def test_upload_by_keyboard(
    server: Server, page: Page, make: Callable[[str, int], Path], tmp_path: Path
) -> None:
    """A file is chosen by a key or by Tab and Enter, and fetched again from the list."""
    page.on("filechooser", lambda chooser: None)  # else the first may be missed
    page.goto(server.url)
    expect(page.get_by_role("heading", name="Nothing here yet")).to_be_visible()
    path = make("by-key.bin", MB)
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("u")
    chooser.value.set_files(path)
    expect(row(page, "by-key.bin")).to_contain_text("Done")
    assert content(server, "by-key.bin") == path.read_bytes()
    tab_to(page, "Download by-key.bin")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    download.value.save_as(tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == path.read_bytes()


def test_process_by_keyboard(server: Server, page: Page) -> None:
    """A process is started from the form without a pointer, and cancelled by its button."""
    page.goto(server.url)
    expect(page.get_by_role("heading", name="Nothing here yet")).to_be_visible()
    page.keyboard.press("n")
    tab_to(page, "Kind")
    page.keyboard.type("Count to")
    tab_to(page, "Steps")
    page.keyboard.type("100000")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("100000")
    page.keyboard.press("Enter")
    expect(page.locator("li[data-job]")).to_be_visible()
    expect(page.locator("li[data-job]")).to_contain_text("Running")
    name = server.jobs()[0]["name"]
    tab_to(page, f"Cancel {name}")
    page.keyboard.press("Enter")
    expect(page.locator("li[data-job]")).to_contain_text("Cancelled by you")
