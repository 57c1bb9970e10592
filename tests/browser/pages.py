"""What the browser tests share: rows of the list, their bars, and the server behind them."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.harness import Server
from tests.interop.proxy import Proxy

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    pass

MB = 1_000_000
# What Chromium says of a server that is not there, or that is just starting.
DOWN = ["net::ERR_", "WebSocket connection", "status of 503"]
Curl = Callable[..., subprocess.Popen[bytes]]


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def row(page: Page, name: str) -> Locator:
    """The row of the job of that name."""
    return page.locator("li[data-job]").filter(has=page.get_by_text(name, exact=True))


def see_another(page: Page, name: str, values: list[int]) -> None:
    """Wait until the bar shows a value that is none of these, and add it; they only ever grow."""
    bar = row(page, name).get_by_role("progressbar")
    shown = page.wait_for_function(
        "([bar, seen]) => { const now = bar.getAttribute('aria-valuenow');"
        " return now !== null && !seen.includes(Number(now)) && now }",
        arg=[bar.element_handle(), values],
    )
    values.append(int(shown.json_value()))
    assert values == sorted(values)


def see_values(page: Page, name: str, n: int) -> list[int]:
    """Wait until the bar has shown ``n`` different values."""
    values: list[int] = []
    while len(values) < n:
        see_another(page, name, values)
    return values


def see_steps(page: Page, name: str, n: int, relay: Proxy) -> None:
    """Wait until the bar has shown ``n`` different values, and let another MB pass for each.

    It stands still in the end, however fast the client is: the relay is to hold the first MB.
    """
    values: list[int] = []
    for _ in range(n):
        see_another(page, name, values)
        if len(values) < n:
            relay.hold_at(relay.sent + MB)
            relay.release()


def beats(page: Page, n: int) -> None:
    """Let ``n`` seconds' numbers of the server arrive."""
    points = "document.querySelector('.spark .line').getAttribute('points')"
    for _ in range(n):
        page.wait_for_function(f"(before) => {points} !== before", arg=page.evaluate(points))


def count_slowly(server: Server, name: str) -> str:
    """Start a process that goes on for minutes, a percent each second or two; its id."""
    params = {"steps": 5000, "delay_s": 0.02}
    started = server.post("/v1/jobs", {"kind": "count", "params": params, "name": name})
    return str(started.json["id"])


def content(server: Server, name: str) -> bytes:
    """The newest stored file of that name."""
    files = server.get(f"/v1/files?name={name}").json["items"]
    return server.get(f"/v1/files/{files[0]['id']}/content").body
