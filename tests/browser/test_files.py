"""The view of stored files, its dialogs, and what becomes of a selection, in a real browser."""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.pages import DOWN, content
from tests.harness import FULL, Server, eventually, form

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser

MARKUP = "<img src=x onerror=alert(1)>.csv"
ROWS = b"id,state,note\r\n" + b"".join(
    b'%d,%s,"a ""%d"", b"\r\n' % (n, b"open" if n % 2 else b"done", n) for n in range(40)
)


def store(server: Server, name: str, data: bytes = b"x") -> None:
    """Upload a file."""
    body, kind = form(("file", name, data))
    assert server.post("/upload", body, Content_Type=kind).status == 200


def names(server: Server) -> list[str]:
    """All stored files, the newest first."""
    return [file["name"] for file in server.get("/v1/files?limit=500").json["items"]]


def files(page: Page) -> Locator:
    """The rows that are shown, without those of older versions."""
    return page.locator(".files > li[data-file]:visible")


def file(page: Page, name: str) -> Locator:
    """The row of a name."""
    return files(page).filter(has=page.locator(".name").get_by_text(name, exact=True)).first


def cells(dialog: Locator) -> list[list[str]]:
    """What a preview shows."""
    return [row.locator("th, td").all_inner_texts() for row in dialog.locator("tr").all()]


def test_files_show_what_they_are(server: Server, page: Page) -> None:
    """A row has size, date, type, digest and job; a name from strangers stays a text."""
    store(server, MARKUP, b"x" * 1234)
    server.post("/v1/jobs", {"kind": "archive", "params": {"files": [MARKUP]}})
    eventually(lambda: len(names(server)) == 2, "the archive is there")
    page.goto(f"{server.url}/#files")
    row = file(page, MARKUP)
    expect(row).to_contain_text("1.2\u00a0kB")
    expect(row).to_contain_text("v1 · text/csv")
    expect(page.locator("img")).to_have_count(0)
    expect(file(page, "files.zip")).to_contain_text("until")
    link = row.get_by_role("link", name=f"Download {MARKUP}")
    with page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename.endswith(".csv")
    assert Path(download.value.path()).read_bytes() == b"x" * 1234
    row.get_by_role("link", name=f"Job {MARKUP}").click()
    expect(page).to_have_url(re.compile("#job="))


def test_a_digest_is_copied(server: Server, page: Page) -> None:
    """The digest is shown short, has all of it as a title, and is copied by a click."""
    store(server, "a.bin", b"")
    found = server.get("/v1/files").json["items"][0]
    job = server.post("/v1/jobs", {"kind": "scrub"}).json["id"]
    server.wait_for(job, "succeeded")
    hex_ = server.get(f"/v1/files/{found['id']}").json["digest"]["sha-256"]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(f"{server.url}/#files")
    digest = page.get_by_role("button", name="Copy the SHA-256 a.bin")
    expect(digest).to_have_text(f"SHA-256 {hex_[:4]}…{hex_[-4:]}")
    expect(digest).to_have_attribute("title", hex_)
    digest.click()
    expect(page.locator(".notice")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == hex_


def test_many_files_are_paged_and_searched(server: Server, page: Page) -> None:
    """The newest hundred are shown, then more; a search asks the server and is in the address."""
    n = 250 if FULL else 120
    for i in range(n):
        server.post(f"/upload?file_name=part-{i:03}.bin&is_complete=true", b"x")
    page.goto(f"{server.url}/#files")
    expect(files(page)).to_have_count(100)
    for shown in range(100, n, 100):
        page.get_by_role("button", name="Show older files").click()
        expect(files(page)).to_have_count(min(shown + 100, n))
    expect(page.get_by_role("button", name="Show older files")).to_be_hidden()
    expect(files(page).last).to_contain_text("part-000.bin")
    page.keyboard.press("Tab")
    page.locator("body").press("/")
    page.keyboard.type("T-00")
    expect(files(page)).to_have_count(10)
    expect(page).to_have_url(re.compile(r"#files\?q=T-00$"))
    page.reload()
    expect(files(page)).to_have_count(10)
    page.get_by_role("searchbox").fill("nothing like it")
    expect(page.get_by_text("No file matches.")).to_be_visible()


def test_new_files_do_not_move_what_is_under_the_pointer(server: Server, page: Page) -> None:
    """They appear by themselves, but wait behind a button while the pointer is over the list."""
    store(server, "first.bin")
    page.goto(f"{server.url}/#files")
    expect(files(page)).to_have_count(1)
    store(server, "second.bin")
    expect(files(page)).to_have_count(2)
    file(page, "first.bin").hover()
    store(server, "third.bin")
    fresh = page.get_by_role("button", name="1 new file")
    expect(fresh).to_be_visible()
    expect(files(page)).to_have_count(2)
    fresh.click()
    expect(files(page).first).to_contain_text("third.bin")
    expect(fresh).to_be_hidden()


def test_versions_are_listed_downloaded_and_deleted(server: Server, page: Page) -> None:
    """A name has one row; its versions open below it, and each can be fetched or deleted."""
    for text in (b"one", b"two!", b"three"):
        store(server, "notes.txt", text)
    page.goto(f"{server.url}/#files")
    expect(files(page)).to_have_count(1)
    page.locator(".files summary").press("Enter")
    versions = page.locator(".files details li:visible")
    expect(versions).to_have_count(3)
    link = versions.nth(1).get_by_role("link", name="Download notes.txt")
    assert page.request.get(f"{server.url}{link.get_attribute('href')}").body() == b"two!"
    versions.nth(1).get_by_role("button", name="Delete notes.txt").click()
    expect(versions).to_have_count(2)
    page.get_by_role("button", name="Dismiss").click()  # then it isn't undone
    eventually(lambda: len(names(server)) == 2, "the version is gone")
    expect(versions).to_have_count(2)
    files(page).first.locator("> .acts").get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Dismiss").click()
    eventually(lambda: len(names(server)) == 1, "the newest is gone")
    expect(files(page)).to_contain_text("v1")
    assert content(server, "notes.txt") == b"one"


def test_a_deletion_is_undone_or_refused(server: Server, page: Page, allowed: list[str]) -> None:
    """A row hides at once; Undo brings it back, and so does a refusal, with its reason."""
    for name in ("a.bin", "b.bin", "c.bin"):
        store(server, name)
    page.goto(f"{server.url}/#files")
    file(page, "b.bin").get_by_role("button", name="Delete b.bin").press("Enter")
    expect(files(page)).to_have_count(2)
    expect(page.get_by_role("checkbox", name="Select a.bin")).to_be_focused()
    page.get_by_role("button", name="Undo").press("Enter")
    expect(files(page)).to_have_count(3)
    assert len(names(server)) == 3
    allowed += DOWN
    page.context.set_offline(True)
    file(page, "b.bin").get_by_role("button", name="Delete b.bin").click()
    page.locator(".notice").filter(has_text="b.bin").get_by_role("button", name="Dismiss").click()
    expect(page.locator(".notice.bad")).to_contain_text("Delete did not work")
    page.context.set_offline(False)
    expect(files(page)).to_have_count(3)
    assert len(names(server)) == 3


def test_a_selection_by_keys_is_deleted(server: Server, page: Page) -> None:
    """Shift takes a range, the box above all or none; leaving the page carries a deletion out."""
    for i in range(6):
        store(server, f"{i}.bin")
    page.goto(f"{server.url}/#files")
    page.get_by_label("Select 4.bin").click()
    page.get_by_label("Select 1.bin").click(modifiers=["Shift"])
    bar = page.locator(".picks:visible")
    expect(bar).to_contain_text("4 selected · 4\u00a0B")
    page.get_by_role("checkbox", name="Select all").press("Space")
    expect(bar).to_contain_text("Select all")
    page.get_by_role("checkbox", name="Select all").press("Space")
    expect(bar).to_contain_text("6 selected")
    page.get_by_label("Select 5.bin").press("Space")
    page.get_by_role("button", name="Delete", exact=True).press("Enter")
    expect(files(page)).to_have_count(1)
    expect(page.get_by_role("checkbox", name="Select all")).to_be_focused()
    page.goto("about:blank")
    eventually(lambda: names(server) == ["5.bin"], "they are deleted")


def test_a_table_is_exported_with_a_preview(server: Server, page: Page, allowed: list[str]) -> None:
    """Columns and filter show in the first rows; a wrong filter is told at its field; by keys."""
    allowed.append("status of 400")
    store(server, "orders.csv", ROWS)
    job = server.post("/v1/jobs", {"kind": "csv.import", "params": {"source": "orders.csv"}}).json
    server.wait_for(job["id"], "succeeded")
    page.goto(f"{server.url}/#files")
    page.get_by_label("Select orders", exact=True).press("Space")
    page.get_by_role("button", name="Export").press("Enter")
    dialog = page.get_by_role("dialog", name="Export")
    expect(dialog.locator("tr")).to_have_count(11)
    where = dialog.get_by_label("Where")
    where.press_sequentially("state = 'open")
    expect(dialog.locator("#x-params-where-error")).to_contain_text("quote")
    expect(where).to_be_focused()
    page.keyboard.type("' and id > 5")
    expect(dialog.locator("#x-params-where-error")).to_be_empty()
    dialog.get_by_label("id", exact=True).press("Space")
    dialog.get_by_label("note", exact=True).press("Space")
    dialog.get_by_label("id", exact=True).press("Space")  # now behind state
    expect(dialog.locator("td").first).to_have_text("open")
    assert cells(dialog)[:3] == [["state", "id"], ["open", "7"], ["open", "9"]]
    dialog.get_by_label("Format").press("j")
    dialog.get_by_label("Name").press_sequentially("open.jsonl")
    page.keyboard.press("Enter")
    expect(dialog).to_have_count(0)
    expect(page).to_have_url(re.compile("#jobs"))
    eventually(lambda: "open.jsonl" in names(server), "it is made")
    lines = content(server, "open.jsonl").splitlines()
    assert (len(lines), json.loads(lines[0])) == (17, {"state": "open", "id": 7})


def test_a_csv_file_is_exported_with_a_preview(
    server: Server, page: Page, allowed: list[str]
) -> None:
    """CSV and JSONL show their first rows, too; what is refused at the start stays open."""
    allowed.append("status of 400")
    store(server, MARKUP, ROWS)
    store(server, "lines.jsonl", b'{"a":1,"b":{"c":"<b>"}}\n{"a":2}\n')
    page.goto(f"{server.url}/#files")
    page.get_by_label(f"Select {MARKUP}").check()
    page.get_by_role("button", name="Export").click()
    dialog = page.get_by_role("dialog", name="Export")
    expect(dialog.locator("tr")).to_have_count(11)
    assert cells(dialog)[:2] == [["id", "state", "note"], ["0", "done", 'a "0", b']]
    dialog.get_by_label("Where").fill("id = 7")
    expect(dialog.locator("tr")).to_have_count(2)
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Export")).to_be_focused()
    page.get_by_label("Select lines.jsonl").check()
    page.get_by_label(f"Select {MARKUP}").uncheck()
    page.get_by_role("button", name="Export").click()
    expect(dialog.locator("tr")).to_have_count(3)
    assert cells(dialog) == [["a", "b"], ["1", '{"c":"<b>"}'], ["2", ""]]
    dialog.locator("form").evaluate("(form) => { form.noValidate = true }")
    dialog.get_by_label("Name").fill("a/b")
    dialog.get_by_role("button", name="Start").click()
    expect(dialog.locator("#x-params-name-error")).not_to_be_empty()
    expect(dialog.get_by_label("Name")).to_be_focused()
    dialog.get_by_label("Name").fill("b.csv")
    dialog.get_by_label("a", exact=True).uncheck()
    dialog.get_by_role("button", name="Start").click()
    eventually(lambda: "b.csv" in names(server), "it is made")
    assert content(server, "b.csv") == b'b\r\n"{""c"":""<b>""}"\r\n""\r\n'


def test_a_selection_is_archived(server: Server, page: Page, allowed: list[str]) -> None:
    """The dialog lists what goes in and its size; what has no rows, and no network, is told."""
    allowed += [*DOWN, "status of 422"]
    for name in ("a.bin", "b.bin", "c.bin"):
        store(server, name, name.encode() * 1000)
    page.goto(f"{server.url}/#files")
    page.get_by_label("Select a.bin").check()
    page.get_by_label("Select c.bin").check()
    page.context.set_offline(True)
    page.get_by_role("button", name="Archive").click()
    expect(page.locator(".notice.bad")).to_contain_text("no connection")
    page.context.set_offline(False)
    page.get_by_role("button", name="Export").click()
    expect(page.get_by_role("dialog")).to_contain_text("neither CSV nor JSONL")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Archive").press("Enter")
    dialog = page.get_by_role("dialog", name="Archive")
    expect(dialog.locator("li")).to_have_text(["c.bin5.0\u00a0kB", "a.bin5.0\u00a0kB"])
    expect(dialog).to_contain_text("2 selected · 10.0\u00a0kB")
    dialog.get_by_label("Name").press_sequentially("both.zip")
    page.keyboard.press("Enter")
    eventually(lambda: names(server)[0] == "both.zip", "it is made")
    assert zipfile.ZipFile(BytesIO(content(server, "both.zip"))).namelist() == ["c.bin", "a.bin"]


def test_no_files_are_an_invitation(server: Server, page: Page) -> None:
    """Without a file there is a word about it, and a way to choose some."""
    page.goto(f"{server.url}/#files")
    expect(page.get_by_text("No files yet")).to_be_visible()
    with page.expect_file_chooser():
        page.get_by_role("button", name="Upload", exact=True).click()
