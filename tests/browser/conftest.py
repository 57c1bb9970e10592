"""A headless Chromium, and pages on which nothing may go wrong unseen."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.browser.pages import Curl
from tests.conftest import missing, need
from tests.harness import Server
from tests.interop.proxy import Proxy

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

with contextlib.suppress(ImportError):
    from playwright.sync_api import expect, sync_playwright

FLAGS = [
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE_MS = 60_000
WORKER_SAYS = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The system's Chromium, started once a module: its client keeps a loop running meanwhile."""
    path = shutil.which("chromium")
    if path is None or find_spec("playwright") is None:
        missing("Chromium")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def allowed() -> list[str]:
    """Parts of console messages that a test expects, as of a server that was killed."""
    return []


@pytest.fixture
def look() -> dict[str, Any]:
    """Options of the page: viewport, colour scheme."""
    return {}


@pytest.fixture
def context(chromium: Browser, look: dict[str, Any], request: Any) -> Iterator[BrowserContext]:
    """A fresh browser profile."""
    options: dict[str, Any] = {"viewport": {"width": 1200, "height": 860}, "locale": "en-GB"}
    options |= look | getattr(request, "param", {})
    context = chromium.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    yield context
    context.close()


class Heard(NamedTuple):
    """What is heard of the pages of a test."""

    seen: list[str]
    """Lines of their consoles, and of that of the worker that has their socket."""
    said: list[Any]
    """What the worker has said to the server."""


@pytest.fixture
def heard(chromium: Browser, allowed: list[str]) -> Iterator[Heard]:
    """Listen to consoles; a script error or an unexpected line fails the test."""
    heard = Heard([], [])
    session = chromium.new_browser_cdp_session()

    def tell(worker: str, *methods: str) -> None:
        for i, method in enumerate(methods):
            told = {"sessionId": worker, "message": json.dumps({"id": i, "method": method})}
            session.send("Target.sendMessageToTarget", told)

    def appeared(event: Any) -> None:
        target = event["targetInfo"]
        if target["type"] == "shared_worker":
            attach = {"targetId": target["targetId"], "flatten": False}
            worker = session.send("Target.attachToTarget", attach)["sessionId"]
            tell(worker, "Runtime.enable", "Log.enable", "Network.enable")

    def said(event: Any) -> None:
        message = json.loads(event["message"])
        method = message.get("method")
        if method in WORKER_SAYS:
            heard.seen.append(f"worker: {json.dumps(message['params'])}")
        elif method == "Network.webSocketFrameSent":
            heard.said.append(json.loads(message["params"]["response"]["payloadData"]))
        elif method == "Inspector.targetReloadedAfterCrash":
            tell(event["sessionId"], "Runtime.runIfWaitingForDebugger")

    session.on("Target.targetCreated", appeared)
    session.on("Target.receivedMessageFromTarget", said)
    session.send("Target.setDiscoverTargets", {"discover": True})
    yield heard
    session.detach()
    assert [line for line in heard.seen if not any(part in line for part in allowed)] == []


@pytest.fixture
def page(context: BrowserContext, heard: Heard) -> Page:
    """A page; a script error, a console message or a breach of the policy fails the test."""
    return new_page(context, heard)


def new_page(context: BrowserContext, heard: Heard) -> Page:
    """Another page like that."""
    page = context.new_page()
    seen = heard.seen
    page.on("console", lambda message: seen.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.append(f"error: {error}"))
    page.add_init_script(
        "addEventListener('securitypolicyviolation',"
        " (e) => console.error('policy', e.violatedDirective, e.blockedURI))"
    )
    return page


@pytest.fixture
def relay(server: Server) -> Iterator[Proxy]:
    """A relay before the server, for clients that shall wait in the middle of what they send."""
    with contextlib.closing(Proxy(server.port)) as proxy:
        yield proxy


@pytest.fixture
def curl() -> Iterator[Curl]:
    """Run curl in the background; what is left of it ends with the test."""
    need("curl")
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            ["curl", "-sS", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str, int], Path]:
    """Make a file of random bytes."""

    def write(name: str, size: int) -> Path:
        path = tmp_path / name
        path.write_bytes(os.urandom(size))
        return path

    return write
