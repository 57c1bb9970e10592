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
from tests.harness import FULL, Server, eventually

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser

# Keeps what the page says, and loses all events until one that leads to the state ``lose``.
LOSSY = """
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
    expect(page.locator(".banner")).to_be_hidden()
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


def test_duplicated_tab(server: Server, page: Page, context: BrowserContext) -> None:
    """A tab whose twin has taken its name takes another; both stay connected and see all."""
    sockets: list[str] = []
    page.on("websocket", lambda socket: sockets.append(socket.url))
    page.goto(server.url)
    expect(page.locator(".live")).to_have_attribute("data-state", "live")
    name = page.evaluate("sessionStorage.getItem('tab')")
    twin = context.new_page()
    twin.on("websocket", lambda socket: sockets.append(socket.url))
    twin.add_init_script(f"sessionStorage.setItem('tab', '{name}')")
    twin.goto(server.url)
    page.wait_for_function("(name) => sessionStorage.getItem('tab') !== name", arg=name)
    job = count_slowly(server, "counting")
    for tab in (page, twin):
        see_values(tab, "counting", 2)
    server.post(f"/v1/jobs/{job}/cancel")
    for tab in (page, twin):
        expect(row(tab, "counting")).to_contain_text("Cancelled")
        expect(tab.locator(".live")).to_have_attribute("data-state", "live")
    assert twin.evaluate("sessionStorage.getItem('tab')") == name
    assert len(sockets) == 3  # the first of the page was closed, and no other


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


def test_older_jobs_are_loaded_after_a_resume(server: Server, page: Page) -> None:
    """A page that had to resume loads older jobs below those that it has."""
    for i in range(70):
        server.post("/v1/jobs", {"kind": "count", "params": {"steps": 0}, "name": f"job {i:03}"})
    job = count_slowly(server, "counting")
    eventually(lambda: len(server.jobs("?state=succeeded&limit=500")) == 70, "all have ended")
    page.add_init_script(LOSSY)
    page.goto(server.url)
    see_values(page, "counting", 1)
    lose_its_pause(server, page, job)
    count_slowly(server, "another")
    expect(row(page, "counting")).to_contain_text("Paused")
    assert len(subscriptions(page)) == 2
    expect(row(page, "job 000")).to_have_count(0)
    page.locator("li[data-job]").last.scroll_into_view_if_needed()
    expect(row(page, "job 000")).to_have_count(1)
    expect(page.locator("li[data-job]")).to_have_count(72)
