"""The live list beside lost connections, restarts and other tabs, in a real browser."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.pages import (
    DOWN,
    MB,
    Curl,
    count_slowly,
    row,
    see_values,
)
from tests.harness import FULL, Server

if TYPE_CHECKING:
    from playwright.sync_api import Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser

# Keeps the socket in the page; keeps what is said, and loses all events until one to ``lose``.
LOSSY = """
window.SharedWorker = undefined;
window.said = [];
window.WebSocket = class extends WebSocket {
  set onmessage(hear) {
    super.onmessage = (event) => {
      const events = [JSON.parse(event.data)].flat().filter((message) => message.t === "ev");
      if (!window.lose || events.length === 0) hear(event);
      else if (events.some((message) => message.to === window.lose)) window.lose = null;
    };
  }
  send(text) {
    window.said.push(JSON.parse(text));
    super.send(text);
  }
};
"""


def lose_its_pause(server: Server, page: Page, job_id: str) -> None:
    """Pause a job, and let the page lose the events that tell of it."""
    page.evaluate("window.lose = 'paused'")
    server.post(f"/v1/jobs/{job_id}/pause")
    page.wait_for_function("() => window.lose === null")
    expect(row(page, "counting")).not_to_contain_text("Paused")


def subscriptions(page: Page) -> list[Any]:
    """What a lossy page has subscribed with."""
    said: list[Any] = page.evaluate("window.said.filter((message) => message.t === 'sub')")
    return said


def test_true_state_after_kill_and_restart(
    server: Server,
    page: Page,
    curl: Curl,
    make: Callable[[str, int], Path],
    allowed: list[str],
) -> None:
    """After kill -9 the page, not reloaded, shows what goes on and what has failed."""
    allowed += DOWN
    page.goto(server.url)
    start = {"kind": "count", "params": {"steps": 2000, "delay_s": 0.02}, "name": "counting"}
    count = server.post("/v1/jobs", start).json["id"]
    path = make("cut.bin", 9 * MB)
    curl("--limit-rate", "1M", "-F", f"file=@{path}", f"{server.url}/upload")
    see_values(page, "cut.bin", 2)
    before = see_values(page, "counting", 2)[-1]
    page.evaluate("window.mark = 'same page'")
    server.kill()
    expect(page.locator(".banner")).to_contain_text("Reconnecting")
    page.get_by_role("button", name="Pause counting").click()
    expect(row(page, "counting")).to_contain_text("Pause did not work: There is no connection")
    server.start()
    expect(page.locator(".banner")).to_contain_text("While you were away: 1 failed.")
    expect(page.locator(".live")).to_contain_text("live")
    expect(row(page, "cut.bin")).to_contain_text("Failed")
    expect(row(page, "cut.bin")).to_contain_text("send it again")
    assert see_values(page, "counting", 2)[0] >= before
    page.get_by_role("button", name="Cancel counting").click()
    expect(row(page, "counting")).to_contain_text("Cancelled by you")
    assert server.job(count)["state"] == "cancelled"
    assert page.evaluate("window.mark") == "same page"


def test_page_drops_what_a_new_server_does_not_know(
    server: Server, page: Page, allowed: list[str]
) -> None:
    """When the server comes back without its data, the page shows that, without a reload."""
    allowed += DOWN
    server.post("/upload?file_name=old.txt&is_complete=true", b"old")
    page.goto(server.url)
    expect(row(page, "old.txt")).to_contain_text("Done")
    server.kill()
    shutil.rmtree(server.folder)
    server.start()
    expect(page.get_by_role("heading", name="Nothing here yet")).to_be_visible()
    expect(page.locator("li[data-job]")).to_have_count(0)
    server.post("/upload?file_name=new.txt&is_complete=true", b"new")
    expect(row(page, "new.txt")).to_contain_text("Done")


@pytest.mark.parametrize("by", ["next event", *(["heartbeat"] if FULL else [])])
def test_lost_event_is_noticed(server: Server, page: Page, by: str) -> None:
    """A page that has lost events asks from where it was, once, and shows what it has missed."""
    page.add_init_script(LOSSY)
    page.goto(server.url)
    job = count_slowly(server, "counting")
    see_values(page, "counting", 1)
    lose_its_pause(server, page, job)
    if by == "next event":
        count_slowly(server, "another")
    # else a heartbeat tells of it, when there was no event for 15 s
    expect(row(page, "counting")).to_contain_text("Paused", timeout=60_000)
    [first, again] = subscriptions(page)
    assert "s" not in first
    assert again["s"] > 0
    server.post(f"/v1/jobs/{job}/resume")
    see_values(page, "counting", 2)
    assert len(subscriptions(page)) == 2
