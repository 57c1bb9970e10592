"""Make docs/images: the dashboard with something of everything on it.

    python tests/browser/screenshots.py [folder]

Starts a server on a temporary folder with one slot, keeps it busy for half a minute with curl, and
takes the page in light, in dark and on a phone. The big files are sparse, so little is written.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

from tests.browser.conftest import FLAGS  # noqa: E402
from tests.harness import Server  # noqa: E402

MB = 1_000_000
DESKTOP: dict[str, Any] = {"viewport": {"width": 1200, "height": 860}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "has_touch": True,
    "color_scheme": "light",
    "device_scale_factor": 1.5,
}


@contextlib.contextmanager
def sending(server: Server, folder: Path, name: str, size: int, rate: str) -> Iterator[None]:
    """Upload a sparse file by curl while the block runs."""
    path = folder / name
    with path.open("wb") as file:
        file.truncate(size)
    url = f"{server.url}/upload?file_name={name}&file_size={size}"
    options = ["-s", "-o", "/dev/null", "--limit-rate", rate, "-H", f"X-Client-Id: curl-{name}"]
    process = subprocess.Popen(["curl", *options, "-X", "POST", "-T", str(path), url])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def fetching(server: Server, file: str, rate: str) -> Iterator[None]:
    """Download a stored file by curl while the block runs."""
    url = f"{server.url}/v1/files/{file}/content"
    process = subprocess.Popen(["curl", "-s", "-o", "/dev/null", "--limit-rate", rate, url])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def percent(page: Page, name: str, at_least: int) -> None:
    """Wait until a bar has come so far."""
    page.wait_for_function(
        "([name, least]) => [...document.querySelectorAll('li[data-job]')].some((row) =>"
        " row.querySelector('.name').textContent === name && Number("
        "row.querySelector('.track').getAttribute('aria-valuenow')) >= least)",
        arg=[name, at_least],
    )


def open_page(browser: Browser, server: Server, like: Page | None, **options: Any) -> Page:
    """A page in a window of its own, of the same person as ``like``."""
    context = browser.new_context(locale="en-GB", **options)
    if like is not None:
        context.add_cookies(like.context.cookies())  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator(".live")).to_have_attribute("data-state", "live")
    return page


def lively(browser: Browser, server: Server, folder: Path, target: Path) -> None:
    """Bring the server into that state, then take the pictures."""
    page = open_page(browser, server, None, **DESKTOP)
    phone = open_page(browser, server, page, **PHONE)
    rows = page.locator("li[data-job]")
    with sending(server, folder, "photos-archive.zip", 150 * MB, "40M"):
        expect(page.locator("li.done")).to_have_count(1)
    stored = server.get("/v1/files").json["items"][0]["id"]
    missing = {"kind": "checksum", "params": {"file": "returns.csv"}}
    server.post("/v1/jobs", missing | {"name": "Checksum of returns.csv"})
    expect(page.locator("li.failed")).to_have_count(1)
    count = {"kind": "count", "params": {"steps": 360}, "name": "Count the samples"}
    after = {"kind": "checksum", "params": {"file": stored}}
    after |= {"name": "Checksum of photos-archive.zip"}
    with contextlib.ExitStack() as stack:
        server.post("/v1/jobs", count)
        server.post("/v1/jobs", after)
        expect(page.locator("li.queued")).to_have_count(1)
        stack.enter_context(sending(server, folder, "orders-2026.csv", 150 * MB, "21M"))
        expect(rows).to_have_count(5)
        stack.enter_context(sending(server, folder, "survey-2026-raw.parquet", 900 * MB, "31M"))
        stack.enter_context(fetching(server, stored, "5M"))
        percent(page, "orders-2026.csv", 74)
        page.get_by_role("button", name="Pause orders-2026.csv").click()
        expect(page.locator("li.paused")).to_contain_text("paused by you")
        percent(page, "Count the samples", 42)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.mouse.move(600, 840)
            page.screenshot(path=target / f"jobs-{scheme}.png")
        phone.screenshot(path=target / "jobs-phone.png")


def main() -> None:
    """Run it."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    target.mkdir(parents=True, exist_ok=True)
    path = shutil.which("chromium")
    if path is None:
        raise SystemExit("Chromium is missing here")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        server = Server(folder / "data", "--slots", "1").start()
        try:
            lively(browser, server, folder, target)
        finally:
            browser.close()
            server.stop()


if __name__ == "__main__":
    main()
