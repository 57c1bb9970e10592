"""A browser's download manager: the right name, and what it does when the connection is lost.

A download that ends short is resumed by Chromium itself; one that is reset waits for its user, who
goes to chrome://downloads. Either way it asks for the rest by ``Range`` with ``If-Range``, which it
does only where the answer had a strong validator. The browser has a profile of its own, because
that page does not show the downloads of Playwright's usual (private) contexts.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import pytest

from tests.browser.conftest import FLAGS, PATIENCE_MS
from tests.conftest import Serve, missing, need
from tests.harness import FULL, eventually
from tests.interop.rig import make_source
from tests.interop.tap import Request, Tap

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import sync_playwright

pytestmark = pytest.mark.browser

SIZE = (64 if FULL else 8) << 20
NAME = "Größe, 文件 и 🌊 v1.bin"


class Browser(NamedTuple):
    """Chromium, and the folder into which it saves."""

    context: BrowserContext
    folder: Path


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """Chromium with a profile of its own, which saves files without asking, as most people's."""
    path, folder = need("chromium"), tmp_path / "Downloads"
    if find_spec("playwright") is None:
        missing("Playwright")
    folder.mkdir()
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=path, headless=True, args=FLAGS, locale="en-GB"
        )
        context.set_default_timeout(PATIENCE_MS)
        session = context.new_cdp_session(context.pages[0])
        session.send(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)}
        )
        yield Browser(context, folder)
        context.close()


class Store(NamedTuple):
    """A stored file, and the relay through which the browser gets it."""

    tap: Tap
    sha256: str
    path: str

    def asked(self) -> list[Request]:
        """How the file was asked for."""
        return [request for request in self.tap.requests if request.path == self.path]


@pytest.fixture
def store(serve: Serve, tmp_path: Path) -> Iterator[Store]:
    """A big file under a name with letters of three scripts and a wave."""
    server = serve()
    source = make_source(tmp_path / "big", SIZE)
    query = f"file_name={quote(NAME)}&is_complete=true"
    answer = server.request("POST", f"/upload?{query}", source.path.read_bytes())
    with contextlib.closing(Tap(server.port)) as tap:
        yield Store(tap, source.sha256, f"/v1/files/{answer.json['id']}/content")


def click_to_download(browser: Browser, store: Store) -> Page:
    """Click on the file's link in the dashboard; the page."""
    page = browser.context.new_page()
    page.goto(f"{store.tap.url}/#files")
    page.get_by_role("link", name=f"Download {NAME}").click()
    return page


def saved(browser: Browser, store: Store) -> bool:
    """Whether the file is there, and nothing else."""
    if [path.name for path in browser.folder.iterdir()] != [NAME]:
        return False
    return hashlib.sha256((browser.folder / NAME).read_bytes()).hexdigest() == store.sha256


def came(browser: Browser) -> int:
    """The bytes that are on the disk."""
    return sum(path.stat().st_size for path in browser.folder.iterdir())


def test_saved_under_its_name(browser: Browser, store: Store) -> None:
    """A click on the link of a file saves it under its name."""
    click_to_download(browser, store)
    eventually(lambda: saved(browser, store), "the file is saved")
    assert len(store.asked()) == 1


def test_short_answer_is_resumed(browser: Browser, store: Store) -> None:
    """Chromium goes on by itself with a download that ends short."""
    store.tap.bytes_per_s = SIZE * 4
    store.tap.end_at(SIZE // 2)
    click_to_download(browser, store)
    eventually(lambda: saved(browser, store), "the file is saved")
    resumed(store)


def test_reset_is_resumed_by_the_user(browser: Browser, store: Store) -> None:
    """After a reset the part that came is kept, and Resume fetches the rest."""
    store.tap.bytes_per_s = SIZE * 4
    store.tap.hold_at(SIZE // 2)
    click_to_download(browser, store)
    eventually(lambda: store.tap.is_at_mark, "the mark is reached")
    # A reset loses what was not read yet.
    eventually(lambda: came(browser) > SIZE * 0.4, "what came is on the disk")
    store.tap.cut()
    page = browser.context.new_page()
    page.goto("chrome://downloads")
    page.get_by_role("button", name="More actions").click()
    page.get_by_role("menuitem", name="Resume").click()
    eventually(lambda: saved(browser, store), "the file is saved")
    resumed(store)


def resumed(store: Store) -> None:
    """Fail unless the rest, and only that, was asked for, of the version that was begun."""
    first, *more = store.asked()
    assert first.first_byte is None
    assert more
    for request in more:
        assert (request.first_byte or 0) > SIZE / 3
        assert request.headers["if-range"].startswith('"')
    assert store.tap.sent < SIZE * 1.3
