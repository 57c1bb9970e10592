"""The clients under one roof: each can be started, killed, and started again with its memory.

Those for Node and Python run in processes of their own (``tus_js.mjs``, ``tuspy_client.py``,
``aiotus_client.py``) and tell what happens in lines of JSON; Uppy runs in a page of Chromium.
``FLAVOURS`` names the ways to upload that the tests of all clients go through.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import quote

from tests.harness import FULL

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

SIZE = 1 << 30 if FULL else 8 << 20
CHUNK = SIZE // 8
PATIENCE_S = 240 if FULL else 120


class Flavour(NamedTuple):
    """A client, how it is told to upload, and where to."""

    program: str
    options: Mapping[str, Any]
    piece: int | None = None  # it sends so many bytes at a time, each piece is acknowledged
    path: str = "/tus/"


_CHUNKS = {"chunkSize": CHUNK}
FLAVOURS = {
    "tus-js": Flavour("tus_js.mjs", {}),
    "tus-js-chunks": Flavour("tus_js.mjs", _CHUNKS, CHUNK),
    "tus-js-parallel": Flavour("tus_js.mjs", {"parallelUploads": 3}),
    "tus-js-draft-05": Flavour(
        "tus_js.mjs", {"protocol": "ietf-draft-05", **_CHUNKS}, CHUNK, "/resumable/"
    ),
    "tus-js-draft-03": Flavour(
        "tus_js.mjs", {"protocol": "ietf-draft-03", **_CHUNKS}, CHUNK, "/resumable/"
    ),
    "tuspy": Flavour("tuspy_client.py", {"chunk_size": CHUNK}, CHUNK),
    "aiotus": Flavour("aiotus_client.py", {"chunksize": CHUNK}, CHUNK),
    "uppy": Flavour("uppy", {}),
}
# Other ways of the same clients; what they share with the above is not tested again.
VARIANTS = {
    # 4.3.1 waits forever for the end of a stream that is a multiple of its chunks.
    "tus-js-deferred": Flavour(
        "tus_js.mjs", {"uploadLengthDeferred": True, "chunkSize": CHUNK - 1}, CHUNK
    ),
    "tus-js-override": Flavour("tus_js.mjs", {"overridePatchMethod": True}),
    "tus-js-creation": Flavour("tus_js.mjs", {"uploadDataDuringCreation": True, **_CHUNKS}, CHUNK),
    "tuspy-checksum": Flavour(
        "tuspy_client.py", {"chunk_size": CHUNK, "upload_checksum": True}, CHUNK
    ),
    "aiotus-parts": Flavour("aiotus_client.py", {"parts": 3}),
    "uppy-parallel": Flavour("uppy", {"parallelUploads": 3}),
}


class Client(Protocol):
    """A client that uploads."""

    def start(self, endpoint: str, options: Mapping[str, Any], *paths: Path) -> None:
        """Begin, or go on with what was begun before it was killed."""

    def check(self) -> None:
        """Fail if it has ended."""

    def done(self) -> str:
        """Wait for the end; the URL of the upload. An error of the client fails the test."""
        ...

    def terminate(self) -> None:
        """Let it end the upload and remove it from the server; no ``done`` follows."""

    def kill(self) -> None:
        """End it as a crash would; nothing if it does not run."""


class Program:
    """A client in a process of its own."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._command = command
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._url: str | None = None

    def start(self, endpoint: str, options: Mapping[str, Any], *paths: Path) -> None:
        """See Client; one file."""
        [path] = paths
        orders = {
            "endpoint": endpoint,
            "file": str(path),
            "name": path.name,
            "memory": str(self._folder / "memory"),  # where it may note its uploads
            "url": self._url,
            "options": options,
        }
        self._errors = (self._folder / "errors").open("w+")
        self._process = subprocess.Popen(
            [*self._command, json.dumps(orders)],
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stdout,), daemon=True
        )
        self._reader.start()

    def _until(self, key: str) -> Any:
        """What stands under ``key`` in the next line that has it."""
        end = time.monotonic() + PATIENCE_S
        line: dict[str, Any] = {}
        while key not in line:
            try:
                line = self._lines.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                line = {"error": f"not within {PATIENCE_S} s: {key}"}
            assert "error" not in line, f"{line['error']}\n{self._said()}"
        return line[key]

    def check(self) -> None:
        """See Client."""
        assert self._process is not None
        assert self._process.poll() is None, self._said()

    def done(self) -> str:
        """See Client."""
        url = str(self._until("done"))
        self.kill()
        return url

    def terminate(self) -> None:
        """See Client."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._until("terminated")

    def kill(self) -> None:
        """See Client: kill -9."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(10)
        self._reader.join(10)
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self._process = None

    def _read(self, lines: IO[str]) -> None:
        for text in lines:
            line = json.loads(text)
            self._url = line.get("url", self._url)
            self._lines.put(line)
        self._lines.put({"error": "the client has ended"})

    def _said(self) -> str:
        """What it has told last, and written to stderr."""
        self._errors.seek(0)
        return f"{list(self._lines.queue)[-3:]}\n{self._errors.read()}"


class Uppy:
    """Uppy in a page; the next page of the same profile remembers what this one began."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self._context = context
        self._address = address
        self._page: Page | None = None

    @property
    def page(self) -> Page:
        """The page that is open."""
        assert self._page is not None
        return self._page

    def start(self, endpoint: str, options: Mapping[str, Any], *paths: Path) -> None:
        """See Client."""
        orders = json.dumps({"endpoint": endpoint, **options})
        self._page = self._context.new_page()
        self._page.goto(f"{self._address}?orders={quote(orders)}")
        self._page.set_input_files("input", [str(path) for path in paths])

    def check(self) -> None:
        """See Client."""
        assert self.page.evaluate("window.outcome") is None

    def outcome(self) -> tuple[list[str], list[str]]:
        """Wait for the end; the URLs of the uploads, and the errors."""
        self.page.wait_for_function("window.outcome", timeout=PATIENCE_S * 1000)
        outcome = self.page.evaluate("window.outcome")
        return outcome["done"], outcome["errors"]

    def done(self) -> str:
        """See Client."""
        urls, errors = self.outcome()
        assert errors == [], errors
        [url] = urls
        return url

    def terminate(self) -> None:
        """See Client."""
        self.page.evaluate("uppy.cancelAll()")

    def kill(self) -> None:
        """See Client: the tab goes, its profile stays."""
        if self._page is not None:
            self._page.goto("about:blank")  # ends its requests at once; closing alone does not
            self._page.close()
            self._page = None
