"""The view of stored files, in a real browser."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.pages import (
    content,
)
from tests.harness import Server, eventually, form

if TYPE_CHECKING:
    from playwright.sync_api import Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def test_files_are_exported_and_archived_by_form(server: Server, page: Page) -> None:
    """Both are started from the form, and their results are among the files."""
    body, kind = form(("file", "rows.csv", b"a,b\r\n1,2\r\n3,4\r\n"))
    assert server.post("/upload", body, Content_Type=kind).status == 200
    page.goto(f"{server.url}/#processes")
    page.get_by_label("Kind").select_option("export")
    page.get_by_label("Source", exact=True).fill("rows.csv")
    page.get_by_label("Where", exact=True).fill("a = 3")
    page.get_by_label("Format", exact=True).select_option("jsonl")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("li[data-job]")).to_have_count(2)  # the page has gone to the list
    expect(page.locator("li[data-job]").first).to_contain_text("Done")
    page.goto(f"{server.url}/#processes")
    page.get_by_label("Kind").select_option("archive")
    page.get_by_role("textbox", name="Files").fill("rows.csv, rows.jsonl")
    page.get_by_role("button", name="Start").click()
    eventually(lambda: server.jobs("?kind=archive")[0]["state"] == "succeeded", "it is made")
    content = server.get("/v1/files/by-name/rows.jsonl").headers["Location"]
    assert server.get(content).body == b'{"a":"3","b":"4"}\n'
    files = [file["name"] for file in server.get("/v1/files").json["items"]]
    assert files == ["files.zip", "rows.jsonl", "rows.csv"]


def test_files_are_listed_and_deleted(
    server: Server, page: Page, make: Callable[[str, int], Path]
) -> None:
    """The view of files shows versions, and deletes one after asking."""
    markup = "%3Cimg src=x onerror=alert(1)%3E".replace(" ", "%20")
    server.post(f"/upload?file_name={markup}&is_complete=true", b"x")
    for text in (b"one", b"two!"):
        server.post("/upload?file_name=notes.txt&is_complete=true", text)
    page.goto(f"{server.url}/#files")
    files = page.locator("li[data-file]")
    expect(files).to_have_count(3)
    expect(files.last).to_contain_text("<img src=x onerror=alert(1)>")
    expect(page.locator("img")).to_have_count(0)
    expect(files.first).to_contain_text("v2")
    expect(files.first).to_contain_text("4\u00a0B")
    files.first.get_by_role("button", name="Delete notes.txt").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(files).to_have_count(2)
    expect(files.first).to_contain_text("v1")
    assert content(server, "notes.txt") == b"one"
