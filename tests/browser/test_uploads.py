"""Uploads that people make, or watch, on the page, in a real browser."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.pages import (
    DOWN,
    MB,
    Curl,
    beats,
    content,
    digest,
    row,
    see_values,
)
from tests.harness import Server

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def stored_bytes(server: Server, job_id: str) -> int:
    """What the server has of an upload."""
    return int(server.job(job_id)["transfer"]["stored_bytes"])


def slow_down(context: BrowserContext, page: Page, bytes_per_s: float) -> None:
    """Let the page upload no faster than that."""
    limits = {
        "offline": False,
        "latency": 0,
        "downloadThroughput": -1,
        "uploadThroughput": bytes_per_s,
    }
    session = context.new_cdp_session(page)
    session.send("Network.enable")
    session.send("Network.emulateNetworkConditions", limits)


def test_curl_uploads_move_the_bar(
    server: Server, page: Page, curl: Curl, make: Callable[[str, int], Path]
) -> None:
    """The bars of a form and of a raw upload by curl show at least three different values."""
    page.goto(server.url)
    form, raw = make("form.bin", 10 * MB), make("raw.bin", 10 * MB)
    curl("--limit-rate", "2M", "-F", f"file=@{form}", f"{server.url}/upload")
    see_values(page, "form.bin", 3)
    query = f"file_name=raw.bin&file_size={10 * MB}"
    curl("--limit-rate", "2M", "-X", "POST", "-T", str(raw), f"{server.url}/upload?{query}")
    see_values(page, "raw.bin", 3)
    for path in (form, raw):
        done = row(page, path.name)
        done.get_by_text("Done", exact=True).wait_for()
        assert content(server, path.name) == path.read_bytes()


def test_upload_is_paused_and_resumed_by_button(
    server: Server, page: Page, curl: Curl, make: Callable[[str, int], Path]
) -> None:
    """A paused upload stores nothing more; resumed, it ends at 100 % with the right digest."""
    page.goto(server.url)
    path = make("big.bin", 8 * MB)
    sender = curl("--limit-rate", "2M", "-F", f"file=@{path}", f"{server.url}/upload")
    see_values(page, "big.bin", 2)
    page.get_by_role("button", name="Pause big.bin").click()
    expect(row(page, "big.bin")).to_contain_text("Paused")
    expect(row(page, "big.bin")).to_contain_text("paused by you")
    [job] = server.jobs()
    before = stored_bytes(server, job["id"])
    beats(page, 2)
    assert stored_bytes(server, job["id"]) == before < 8 * MB
    assert sender.poll() is None
    page.get_by_role("button", name="Resume big.bin").click()
    expect(row(page, "big.bin")).to_contain_text("Done")
    expect(row(page, "big.bin")).to_contain_text("100\u00a0%")
    assert digest(content(server, "big.bin")) == digest(path.read_bytes())


def test_page_uploads_a_file_that_comes_back_the_same(
    server: Server,
    page: Page,
    context: BrowserContext,
    make: Callable[[str, int], Path],
    tmp_path: Path,
) -> None:
    """A chosen file is uploaded with progress, and the download has the same bytes."""
    page.goto(server.url)
    slow_down(context, page, 5 * MB)
    path = make("a & b %41 ünï.bin", 30 * MB)
    page.set_input_files("#picker", path)
    see_values(page, path.name, 3)
    row(page, path.name).get_by_text("Done", exact=True).wait_for()
    with page.expect_download() as download:
        page.get_by_role("link", name=f"Download {path.name}").click()
    copy = tmp_path / "copy"
    download.value.save_as(copy)
    assert copy.read_bytes() == path.read_bytes()
    assert download.value.suggested_filename == path.name


def test_page_upload_survives_kill_and_restart(
    server: Server,
    page: Page,
    context: BrowserContext,
    make: Callable[[str, int], Path],
    allowed: list[str],
) -> None:
    """An upload from the page goes on by itself after kill -9 and a restart in its middle."""
    allowed += [*DOWN, "status of 423"]
    page.goto(server.url)
    slow_down(context, page, 8 * MB)
    path = make("survivor.bin", 30 * MB)
    page.set_input_files("#picker", path)
    assert see_values(page, path.name, 10)[-1] < 90
    server.kill()
    server.start()
    assert [job["state"] for job in server.jobs()] == ["running"]
    expect(row(page, path.name)).to_contain_text("Done", timeout=30_000)
    assert content(server, path.name) == path.read_bytes()
    assert [job["state"] for job in server.jobs()] == ["succeeded"]


def test_upload_without_a_sender_says_what_is_safe(server: Server, page: Page) -> None:
    """An upload whose sender is away shows how much is stored, and that it waits."""
    page.goto(server.url)
    server.post(f"/upload?file_name=half.bin&file_size={2 * MB}", bytes(MB))
    half = row(page, "half.bin")
    expect(half).to_contain_text("1.0\u00a0MB are safe. Waits for its sender to go on.")
    expect(half.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "50")
    server.post(f"/upload?file_name=half.bin&bytes_read={MB}", bytes(MB))
    expect(half).to_contain_text("Done")


def test_page_upload_is_cancelled(
    server: Server,
    page: Page,
    context: BrowserContext,
    make: Callable[[str, int], Path],
    allowed: list[str],
) -> None:
    """A page's upload that is cancelled by its button stops for good."""
    allowed += [*DOWN, "409", "404"]
    page.goto(server.url)
    slow_down(context, page, 4 * MB)
    path = make("unwanted.bin", 30 * MB)
    page.set_input_files("#picker", path)
    see_values(page, path.name, 2)
    page.get_by_role("button", name=f"Cancel {path.name}").click()
    expect(row(page, path.name)).to_contain_text("Cancelled by you")
    beats(page, 2)
    expect(page.locator(".mine li")).to_have_count(0)
    assert [job["state"] for job in server.jobs()] == ["cancelled"]
