"""The numbers of the whole service, in a real browser."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.pages import MB, Curl, count_slowly
from tests.harness import Server, eventually

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def section(page: Page, title: str) -> Locator:
    """The part of the view with that title."""
    return page.locator(".overview section").filter(
        has=page.get_by_role("heading", name=title, exact=True)
    )


def amount(text: str) -> float:
    """The bytes of the first size in a text."""
    found = re.search(r"([\d.,]+)\s([kMGT]?B)", text)
    assert found, text
    return float(found[1].replace(",", "")) * UNITS[found[2]]


def test_numbers_are_those_of_the_server(
    server: Server, page: Page, curl: Curl, make: Callable[[str, int], Path]
) -> None:
    """While something runs, arrives and leaves, the view shows what /v1/status tells."""
    for name in ("one", "two"):
        count_slowly(server, name)
    page.goto(f"{server.url}/#overview")
    path = make("big.bin", 30 * MB)
    server.post("/upload?file_name=big.bin&is_complete=true", path.read_bytes())
    file = server.get("/v1/files").json["items"][0]["id"]
    with path.open("r+b") as endless:
        endless.truncate(1000 * MB)
    curl("--limit-rate", "2M", "-F", f"file=@{path}", f"{server.url}/upload")
    curl("--limit-rate", "200k", "-o", "/dev/null", f"{server.url}/v1/files/{file}/content")
    rate = section(page, "In").locator(".big")

    def agrees() -> bool:
        told = server.get("/v1/status").json["in_bytes_per_s"]
        return bool(1e6 < told < 4e6 and 0.5 * told < amount(rate.inner_text()) < 2 * told)

    eventually(agrees, "the rates agree")
    for title in ("In", "Out"):
        expect(section(page, title).locator(".axis")).to_contain_text(re.compile("most .*[kM]B/s"))
        expect(section(page, title).locator(".line")).to_have_attribute("points", re.compile(" "))
    expect(section(page, "Running")).to_contain_text("2 of 8 slots in use")
    expect(section(page, "Running")).to_contain_text(re.compile("count ?2"))
    expect(section(page, "Jobs")).to_contain_text(re.compile("Done ?1"))
    status = server.get("/v1/status").json
    disk = section(page, "Disk")
    expect(disk).to_contain_text(re.compile(r"30.0.MB stored · 1 file"))
    free, size = disk.inner_text().split(" of ")
    assert amount(free) == pytest.approx(status["free_bytes"], rel=0.1)
    assert amount(size) == pytest.approx(status["disk_bytes"], rel=0.01)
    service = section(page, "Service")
    expect(service).to_contain_text(re.compile(r"Waiting for a slot ?0"))
    expect(service).to_contain_text(re.compile(r"Watching ?1"))


def test_samples_are_kept_unseen(server: Server, page: Page) -> None:
    """The lines go on while another view is shown."""
    page.goto(server.url)
    tile = page.locator(".flow .spark .line").first
    eventually(lambda: (tile.get_attribute("points") or "").count(",") >= 3, "three numbers")
    page.get_by_role("link", name="Overview").click()
    line = section(page, "In").locator(".line")
    assert (line.get_attribute("points") or "").count(",") >= 3
    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")
    expect(section(page, "Running")).to_contain_text("0 of 8 slots in use")
