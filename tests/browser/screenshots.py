"""Make docs/images: the dashboard with something of everything on it.

    python tests/browser/screenshots.py [folder]

Starts a server on a temporary folder with one slot, keeps it busy for half a minute with curl, and
takes each view in light and in dark, on a desk and on a phone. The big files are sparse, so little
is written.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

from tests.browser.busy import KINDS  # noqa: E402
from tests.browser.conftest import FLAGS  # noqa: E402
from tests.harness import Server, eventually  # noqa: E402

MB = 1_000_000
DESKTOP: dict[str, Any] = {"viewport": {"width": 1200, "height": 860}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "has_touch": True,
}
SCHEMES: tuple[Literal["light"], Literal["dark"]] = ("light", "dark")


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


class Pages:
    """The page on a desk and on a phone, of the same person."""

    def __init__(self, browser: Browser, server: Server, target: Path) -> None:
        self._url = server.url
        self._target = target
        self.desktop = browser.new_context(locale="en-GB", **DESKTOP).new_page()
        self.desktop.goto(server.url)
        self.desktop.mouse.move(5, 840)  # a pointer over the list would hold it
        phone = browser.new_context(locale="en-GB", **PHONE)
        phone.add_cookies(self.desktop.context.cookies())  # type: ignore[arg-type]
        self.phone = phone.new_page()
        self.phone.goto(server.url)

    def take(self, name: str, address: str) -> None:
        """Take a view in every look."""
        for look, page in {"": self.desktop, "-phone": self.phone}.items():
            page.evaluate("(hash) => { location.hash = hash }", address)
            page.wait_for_load_state()
            page.evaluate("() => new Promise((done) => setTimeout(done, 1500))")
            for scheme in SCHEMES:
                page.emulate_media(color_scheme=scheme)
                page.screenshot(path=self._target / f"{name}{look}-{scheme}.png")


def stored(server: Server, folder: Path) -> str:
    """Files in some versions, and what has been made of them; the newest file's id."""
    upload = f"{server.url}/upload?is_complete=true&file_name="
    for name, sizes in {"samples.csv": (700, 900), "returns-2025.csv": (2400,)}.items():
        for size in sizes:
            rows = "".join(f"{i},{i % 7}.{i % 10},field {i % 12}\n" for i in range(size * 10))
            server.post(
                f"{upload.removeprefix(server.url)}{name}", f"id,mean,field\n{rows}".encode()
            )
    with sending(server, folder, "photos-archive.zip", 150 * MB, "60M"):
        eventually(lambda: server.jobs("?state=succeeded&q=photos"), "the archive is stored")
    file = str(server.get("/v1/files").json["items"][0]["id"])
    for start in (
        {"kind": "report", "params": {"rows": 240}, "name": "Report of March"},
        {"kind": "report", "params": {"rows": 240, "fails_at": 112}, "name": "Report of April"},
        {"kind": "checksum", "params": {"file": "samples.csv"}, "name": "Checksum of samples.csv"},
    ):
        server.wait_for(server.post("/v1/jobs", start).json["id"], "succeeded", "failed")
    return file


def lively(server: Server, folder: Path, pages: Pages) -> None:
    """Bring the server into a state in which there is something to see, then take the pictures."""
    pages.take("empty", "jobs")
    file = stored(server, folder)
    page = pages.desktop
    count = {"kind": "count", "params": {"steps": 600}, "name": "Count the samples"}
    after = {"kind": "checksum", "params": {"file": file}, "name": "Checksum of photos-archive.zip"}
    page.evaluate("location.hash = 'jobs'")
    with contextlib.ExitStack() as stack:
        for start in (count, after):
            server.post("/v1/jobs", start)
        stack.enter_context(sending(server, folder, "orders-2026.csv", 150 * MB, "21M"))
        stack.enter_context(sending(server, folder, "survey-2026-raw.parquet", 1800 * MB, "31M"))
        stack.enter_context(fetching(server, file, "3M"))
        percent(page, "orders-2026.csv", 60)
        page.get_by_role("button", name="Pause orders-2026.csv").click()
        page.mouse.move(5, 840)
        expect(page.locator("li.paused")).to_contain_text("paused by you")
        percent(page, "Count the samples", 20)
        pages.take("jobs", "jobs")
        pages.take("overview", "overview")
        report = server.jobs("?q=Report of March".replace(" ", "%20"))[0]["id"]
        pages.take("job", f"job={report}")
        pages.take("files", "files")
        pages.take("process", "processes?kind=csv.import")


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
        server = Server(folder / "data", "--slots", "1", "--kinds", str(KINDS)).start()
        try:
            lively(server, folder, Pages(browser, server, target))
        finally:
            browser.close()
            server.stop()


if __name__ == "__main__":
    main()
