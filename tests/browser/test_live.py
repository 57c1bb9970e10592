"""The live list beside lost connections, restarts and other tabs, in a real browser."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.conftest import Heard, new_page
from tests.browser.pages import DOWN, MB, Curl, count_slowly, row, see_steps, see_values
from tests.conftest import Serve
from tests.harness import FULL, Server, eventually
from tests.interop.proxy import Proxy

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import Error, expect

pytestmark = pytest.mark.browser

# Keeps the socket in the page; keeps what is said, loses all events until one to ``lose``, and with
# ``cut`` closes behind the next command.
LOSSY = """
window.SharedWorker = undefined;
window.said = [];
window.WebSocket = class extends WebSocket {
  set onmessage(hear) {
    super.onmessage = hear && ((event) => {
      const events = [JSON.parse(event.data)].flat().filter((message) => message.t === "ev");
      if (!window.lose || events.length === 0) hear(event);
      else if (events.some((message) => message.to === window.lose)) window.lose = null;
    });
  }
  send(text) {
    window.said.push(JSON.parse(text));
    super.send(text);
    if (window.cut && text.includes('"cmd"')) {
      window.cut = false;
      this.close();
    }
  }
};
"""


# Keeps when a tab was told of a pause. Chromium paints a tab behind another once a second at times.
WHEN = """
const { get, set } = Object.getOwnPropertyDescriptor(MessagePort.prototype, "onmessage");
Object.defineProperty(MessagePort.prototype, "onmessage", {
  get,
  set(hear) {
    set.call(this, (event) => {
      if (event.data.frames?.some(({ to }) => to === "paused")) window.paused = Date.now();
      hear(event);
    });
  },
});
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


def open_live(page: Page, server: Server) -> None:
    """Open the dashboard, and wait until it is connected."""
    page.goto(server.url)
    expect(page.locator(".live")).to_have_attribute("data-state", "live")


def subscribers(server: Server) -> int:
    """How many connections to the channel there are."""
    return int(server.get("/v1/status").json["subscribers"])


def run_some(server: Server, done: int, failed: int) -> None:
    """Let so many jobs succeed, and so many fail."""
    before = server.get("/v1/jobs?limit=1").json["counts"]
    server.post("/v1/jobs", [{"kind": "count", "params": {"steps": 0}}] * done)
    for _ in range(failed):
        server.post("/v1/jobs", {"kind": "checksum", "params": {"file": "none"}})

    def ended() -> bool:
        counts = server.get("/v1/jobs?limit=1").json["counts"]
        return all(
            counts.get(state, 0) - before.get(state, 0) == n
            for state, n in (("succeeded", done), ("failed", failed))
        )

    eventually(ended, "all have ended")


def look_away(page: Page, state: str) -> None:
    """Make the page believe that it is ``hidden`` or ``visible``."""
    page.evaluate(
        """(state) => {
        Object.defineProperty(document, 'visibilityState', { value: state, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));
        }""",
        state,
    )


def crash(page: Page) -> None:
    """Let the process of a page die."""
    with contextlib.suppress(Error):  # it does not arrive
        page.goto("chrome://crash")


def until_said(page: Page, heard: Heard, wanted: Callable[[Any], bool]) -> None:
    """Wait until the worker has said that; asking a page lets its words come in."""
    eventually(lambda: page.evaluate("1") and any(map(wanted, heard.said)), "it is said")


def test_tabs_share_one_connection(
    server: Server, page: Page, context: BrowserContext, heard: Heard
) -> None:
    """Two tabs have one socket and agree within frames; one lives on when the other is closed."""
    context.add_init_script(WHEN)
    open_live(page, server)
    twin = new_page(context, heard)
    open_live(twin, server)
    assert subscribers(server) == 1
    job = count_slowly(server, "counting")
    for tab in (page, twin):
        see_values(tab, "counting", 2)
    apart_ms = []
    for _ in range(3):
        twin.get_by_role("button", name="Pause counting").click()
        for tab in (page, twin):
            expect(row(tab, "counting")).to_contain_text("Paused")
        at = [tab.evaluate("window.paused") for tab in (page, twin)]
        apart_ms.append(abs(at[0] - at[1]))
        server.post(f"/v1/jobs/{job}/resume")
        for tab in (page, twin):
            expect(row(tab, "counting")).to_contain_text("Running")
    # It is a frame or two where nothing else is done.
    assert min(apart_ms) < 500
    page.close()
    until_said(twin, heard, lambda said: said["t"] == "unsub")
    see_values(twin, "counting", 2)
    assert subscribers(server) == 1
    twin.close()
    eventually(lambda: subscribers(server) == 0, "nobody is there")


def test_a_tab_crashes(
    server: Server, page: Page, context: BrowserContext, heard: Heard, allowed: list[str]
) -> None:
    """A crashed tab is unsubscribed; if the socket dies with it, the others open another one."""
    allowed += ["chrome://crash"]
    twins = [new_page(context, heard) for _ in range(2)]
    for tab in (page, *twins):
        open_live(tab, server)
    gone = [m["id"] for m in heard.said if m["t"] == "sub"][-1]
    crash(twins.pop())
    until_said(page, heard, lambda said: said == {"t": "unsub", "id": gone})
    if not FULL:  # that a worker is gone takes five seconds to be noticed
        return
    crash(page)
    [twin] = twins
    job = count_slowly(server, "counting")
    expect(row(twin, "counting")).to_be_visible()
    see_values(twin, "counting", 2)
    twin.get_by_role("button", name="Cancel counting").click()
    server.wait_for(job, "cancelled")
    assert subscribers(server) == 1


def test_more_tabs_than_a_connection_takes(server: Server, page: Page) -> None:
    """Sixteen tabs share a connection, the next ones another."""
    open_live(page, server)
    page.evaluate(
        """async () => {
        const { Channel } = await import('/static/channel.js');
        window.channels = Array.from({ length: 17 }, () =>
          new Channel({ frame: () => null, status: () => {} }));
        for (const channel of channels) channel.open();
        }"""
    )
    page.wait_for_function("() => channels.every((channel) => channel.state === 'live')")
    assert subscribers(server) == 2


def test_too_many_connections(serve: Serve, page: Page) -> None:
    """A page for which there is no room says what to do, and does not ask again by itself."""
    server = serve("--max-sockets", "1")
    socket = server.socket("jobs.v1.json")
    page.goto(server.url)
    expect(page.locator(".banner")).to_contain_text("Too many pages are open.")
    socket.close()
    eventually(lambda: subscribers(server) == 0, "there is room again")
    page.get_by_role("button", name="Reload").click()
    expect(page.locator(".live")).to_have_attribute("data-state", "live")
    expect(page.locator(".banner")).to_be_hidden()


def test_offline_and_back(
    server: Server, page: Page, context: BrowserContext, allowed: list[str]
) -> None:
    """What the browser says of its network is obeyed at once, and what was missed is told."""
    allowed += DOWN
    open_live(page, server)
    run_some(server, 1, 0)
    expect(page.locator("li.done")).to_have_count(1)
    for done, failed, told, state in (
        (3, 1, "3 done, 1 failed.", "failed"),
        (2, 0, "2 done.", "done"),
    ):
        context.set_offline(True)
        expect(page.locator(".banner")).to_contain_text("The connection was lost")
        expect(page.locator(".live")).to_have_text("offline")
        eventually(lambda: subscribers(server) == 0, "the socket is closed")
        run_some(server, done, failed)
        context.set_offline(False)
        expect(page.locator(".banner")).to_contain_text(f"While you were away: {told}")
        expect(page.locator(".live")).to_contain_text("live")
        page.get_by_role("button", name="Show", exact=True).click()
        expect(page.locator(".banner")).to_be_hidden()
        assert page.url.endswith(f"#jobs?state={state}")
        expect(page.locator("li[data-job]")).to_have_count(failed or 6)


def test_back_within_a_second_is_silent(server: Server, page: Page, heard: Heard) -> None:
    """A connection that is there again within a second is no word worth; nothing is missed."""
    open_live(page, server)
    # To the page not a second passes, however long it takes here.
    page.evaluate("() => { const now = Date.now(); Date.now = () => now; }")
    page.evaluate(
        """() => { window.shown = []; new MutationObserver(() => window.shown.push(1)).observe(
        document.querySelector('.banner'), { attributes: true, subtree: true, childList: true });
        }"""
    )
    heard.said.clear()
    page.evaluate("for (const name of ['offline', 'online']) dispatchEvent(new Event(name))")
    run_some(server, 2, 0)
    expect(page.locator("li.done")).to_have_count(2)
    expect(page.locator(".live")).to_have_attribute("data-state", "live")
    until_said(page, heard, lambda said: said["t"] == "hello")
    assert page.evaluate("window.shown") == []


def test_graceful_restart(server: Server, page: Page, allowed: list[str]) -> None:
    """A server that says goodbye is told as such, with when the page comes back."""
    allowed += DOWN
    open_live(page, server)
    server.stop()
    expect(page.locator(".banner")).to_contain_text("The server is restarting, back in ")
    page.get_by_role("button", name="Try now").click()
    server.start()
    expect(page.locator(".banner")).to_be_hidden()
    expect(page.locator(".live")).to_have_attribute("data-state", "live")


@pytest.mark.parametrize("reset", [False, True])
def test_while_nobody_looked(
    serve: Serve, page: Page, context: BrowserContext, allowed: list[str], reset: bool
) -> None:
    """What ended while a tab was hidden is told exactly, also if its place was forgotten."""
    allowed += DOWN
    server = serve("--keep-events", "100")
    open_live(page, server)
    run_some(server, 2, 1)
    going = count_slowly(server, "counting")
    see_values(page, "counting", 1)
    look_away(page, "hidden")
    if reset:
        context.set_offline(True)
        eventually(lambda: subscribers(server) == 0, "the socket is closed")
    run_some(server, 3, 2)
    server.post(f"/v1/jobs/{going}/cancel")
    server.wait_for(going, "cancelled")
    if not reset:
        expect(row(page, "counting")).to_contain_text("Cancelled")
    else:
        names = [{"kind": "count", "params": {"steps": 0}, "name": f"short {i}"} for i in range(60)]
        short = server.post("/v1/jobs", names).json["items"]
        for item in short:
            server.wait_for(item["job"]["id"], "succeeded")
        server.post("/v1/jobs/delete", {"filter": {"q": "short"}})
        context.set_offline(False)
        expect(page.locator(".live")).to_have_attribute("data-state", "live")
    look_away(page, "visible")
    away = "While you were away: 3 done, 2 failed, 1 cancelled."
    expect(page.locator(".banner")).to_contain_text(away)
    page.get_by_role("button", name="Dismiss").click()
    expect(page.locator("li[data-job]")).to_have_count(9)
    look_away(page, "hidden")
    look_away(page, "visible")
    expect(page.locator(".banner")).to_be_hidden()


def test_a_command_outlives_its_connection(server: Server, page: Page) -> None:
    """A command whose answer was lost is said again under its key, and done once."""
    page.add_init_script(LOSSY)
    page.goto(server.url)
    job = count_slowly(server, "counting")
    see_values(page, "counting", 1)
    page.evaluate("window.cut = true")
    page.get_by_role("button", name="Pause counting").click()
    expect(row(page, "counting")).to_contain_text("Paused")
    page.wait_for_function(
        "() => window.said.filter((message) => message.t === 'cmd').length === 2"
    )
    first, again = (m for m in page.evaluate("window.said") if m["t"] == "cmd")
    assert first["key"] == again["key"]
    expect(row(page, "counting")).not_to_contain_text("did not work")
    history = server.get(f"/v1/jobs/{job}/events").json["items"]
    assert [event["to"] for event in history].count("paused") == 1


def test_true_state_after_kill_and_restart(
    server: Server,
    relay: Proxy,
    page: Page,
    curl: Curl,
    make: Callable[[str, int], Path],
    allowed: list[str],
) -> None:
    """After kill -9 the page, not reloaded, shows what goes on and what has failed."""
    allowed += DOWN
    page.goto(server.url)
    count = count_slowly(server, "counting")
    path = make("cut.bin", 9 * MB)
    relay.hold_at(MB)
    curl("-F", f"file=@{path}", f"{relay.url}/upload")
    see_steps(page, "cut.bin", 2, relay)
    before = see_values(page, "counting", 2)[-1]
    page.evaluate("window.mark = 'same page'")
    server.kill()
    expect(page.locator(".banner")).to_contain_text("Reconnecting")
    page.get_by_role("button", name="Pause counting").click()
    expect(page.locator(".notices")).to_contain_text(
        "Pause did not work: counting: There is no connection"
    )
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


def test_a_page_that_hears_nothing_says_so(server: Server, page: Page) -> None:
    """When the server stands still the page says of what time it is what it shows."""
    open_live(page, server)
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    expect(page.locator(".live")).to_contain_text("as of ")
    server.process.send_signal(signal.SIGCONT)
    expect(page.locator(".live")).to_contain_text("live")


# Random rows, events and resets against a plain model: all of it must be in the store, in order.
MODEL = """
async ([steps, seed]) => {
  const { Store } = await import('/static/store.js');
  let state = seed;
  const random = (n) => {
    state = (state * 16807) % 2147483647;
    return Math.floor((state / 2147483647) * n);
  };
  const server = new Map();
  let h = 0;
  const row = (one) => ({ ...one, progress: { done: one.version, total: null } });
  const store = new Store();
  const newest = () => [...server.values()].sort((a, b) => b.h - a.h);
  const ask = (cursor, first) => {
    const rows = newest().filter((one) => cursor === null || one.h < cursor);
    const jobs = rows.slice(0, 7).map(row);
    const last = rows.length <= 7;
    const following = last ? null : jobs.at(-1).h;
    const page = { t: 'snap', epoch: 'e', jobs, counts: {}, last, cursor: following };
    return store.frame(page, first);
  };
  let next = ask(null, true);
  for (let i = 0; i < steps; i += 1) {
    const ids = [...server.keys()];
    const what = random(10);
    let frame = null;
    if (what < 3 || ids.length === 0) {
      h += 1;
      server.set(`j${h}`, { id: `j${h}`, h, version: 1, state: 'running' });
      frame = { t: 'ev', from: null, to: 'running', row: row(server.get(`j${h}`)) };
    } else if (what < 6) {
      const one = server.get(ids[random(ids.length)]);
      one.version += 1;
      one.state = ['running', 'paused', 'succeeded'][random(3)];
      frame = { t: 'ev', from: 'running', to: one.state, row: row(one) };
    } else if (what < 8) {
      const one = server.get(ids[random(ids.length)]);
      server.delete(one.id);
      frame = { t: 'ev', from: one.state, to: 'deleted', row: row(one) };
    }
    const lost = random(20) === 0; // this and then a reset
    if (frame && !lost) store.frame(frame);
    if (frame && random(4) === 0) store.frame(frame); // again
    if (lost) next = ask(null, true);
    else if (next && random(3) === 0) next = ask(next, false);
  }
  while (next) next = ask(next, false);
  const told = (one) => `${one.id} ${one.version} ${one.state}`;
  const { complete } = store;
  return { wanted: newest().map(told), shown: store.sorted.map(told),
    size: store.rows.size, complete };
}
"""


def test_the_store_holds_what_the_server_has(server: Server, page: Page) -> None:
    """However pages, events, repeats and resets follow each other, rows and order are right."""
    open_live(page, server)
    for seed in range(100 if FULL else 10):
        found = page.evaluate(MODEL, [600, seed + 1])
        assert found["shown"] == found["wanted"]
        assert (found["size"], found["complete"]) == (len(found["wanted"]), True)


# One page of a list, then a reset: one job is new, one has ended, one was only not here before.
ABSENCE = """
async () => {
  const { Store } = await import('/static/store.js');
  const row = (h, version, state) =>
    ({ id: `j${h}`, h, version, state, progress: { done: 0, total: null } });
  const page = { t: 'snap', epoch: 'e', counts: {}, last: false, cursor: 9 };
  const store = new Store();
  store.frame({ ...page, jobs: [row(9, 1, 'running')] }, true);
  store.away = {};
  store.frame({ ...page, jobs: [row(10, 2, 'failed'), row(9, 2, 'succeeded')] }, true);
  store.frame({ ...page, jobs: [row(8, 2, 'succeeded')], last: true, cursor: null }, false);
  for (let i = 0; i < 2; i += 1) {
    store.frame({ t: 'ev', from: 'running', to: 'failed', row: row(10, 2, 'failed') });
    store.frame({ t: 'ev', from: 'running', to: 'failed', row: row(11, 2, 'failed') });
  }
  return store.away;
}
"""


def test_an_absence_is_counted_once(server: Server, page: Page) -> None:
    """What a snapshot brings counts only if it was not over before; nothing counts twice."""
    open_live(page, server)
    assert page.evaluate(ABSENCE) == {"failed": 2, "succeeded": 1}


def test_all_jobs_are_loaded(server: Server, page: Page) -> None:
    """Every job comes to the page, one page of them after another, and what follows is shown."""
    n = 10_000 if FULL else 400
    for begin in range(0, n, 500):
        some = range(begin, min(n, begin + 500))
        starts = [{"kind": "count", "params": {"steps": 0}, "name": f"job {i}"} for i in some]
        server.post("/v1/jobs", starts)
    eventually(
        lambda: server.get("/v1/jobs?limit=1").json["counts"].get("succeeded", 0) == n,
        "all have ended",
        120,
    )
    open_live(page, server)
    expect(row(page, f"job {n - 1}")).to_have_attribute("aria-setsize", str(n), timeout=60_000)
    job = count_slowly(server, "counting")
    see_values(page, "counting", 2)
    server.post(f"/v1/jobs/{job}/cancel")
    expect(row(page, "counting")).to_contain_text("Cancelled")
