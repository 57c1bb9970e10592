"""What everybody can see and use: phone, colours, empty state, in a real browser."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import Server, eventually

if TYPE_CHECKING:
    from playwright.sync_api import Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def small_controls(page: Page) -> list[Any]:
    """The visible controls that no finger hits, with their boxes."""
    found: list[Any] = page.evaluate(
        """() => [...document.querySelectorAll('button, a, select, input:not([type=checkbox])')]
        .filter((node) => node.checkVisibility() && !node.matches('.hush, .skip'))
        .map((node) => [node.outerHTML, node.getBoundingClientRect()])
        .filter(([, box]) => box.width < 44 || box.height < 44)"""
    )
    return found


@pytest.mark.parametrize(
    "context",
    [{"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}],
    indirect=True,
    ids=["phone"],
)
def test_phone(server: Server, page: Page) -> None:
    """On a phone nothing scrolls sideways and every control is at least 44 px wide and high."""
    server.post("/upload?file_name=" + "long-name-" * 12 + "&is_complete=true", b"x")
    server.post("/v1/jobs", {"kind": "checksum", "params": {"file": "missing" * 20}})
    slow = {"kind": "count", "params": {"steps": 100_000, "delay_s": 0.1}}
    running = server.post("/v1/jobs", slow).json["id"]
    page.goto(server.url)
    expect(page.locator("li[data-job]")).to_have_count(3)
    for view in ("jobs", "files", "processes"):
        page.locator(f"nav a[href='#{view}']").click()
        expect(
            page.locator("main > :not([hidden]) :is(li, form) :is(a, button)").last
        ).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        # A row that was put in just now has no size before it is drawn.
        eventually(lambda: small_controls(page) == [], "every control is big enough", 5)
    server.post(f"/v1/jobs/{running}/cancel")


@pytest.mark.parametrize(
    "context", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True, ids=str
)
def test_empty_state_in_light_and_dark(server: Server, page: Page, tmp_path: Path) -> None:
    """An empty server shows the first step and a curl line, in the colours that are preferred."""
    page.goto(server.url)
    expect(page.get_by_role("heading", name="Nothing here yet")).to_be_visible()
    expect(page.locator("code")).to_contain_text(f"curl -F file=@movie.mkv {server.url}/upload")
    expect(page.locator(".live")).to_contain_text("live")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert background == ("rgb(15, 18, 20)" if dark else "rgb(246, 247, 248)")
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5_000
