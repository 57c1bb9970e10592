"""A file, the clients, and a server behind a network that can be broken."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest

from tests.browser.conftest import chromium, context, look
from tests.conftest import missing, need
from tests.harness import Server
from tests.interop.clients import FLAVOURS, SIZE, VARIANTS, Client, Program, Uppy
from tests.interop.fetchers import Clients
from tests.interop.packages import Unavailable, installed
from tests.interop.proxy import Proxy
from tests.interop.rig import Rig, Source, all_uploads, make_source

__all__ = ["chromium", "context", "look"]  # fixtures

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A big file."""
    return make_source(tmp_path_factory.mktemp("source") / "big", SIZE)


@pytest.fixture(scope="session")
def packages() -> Path:
    """The folder with the clients of npm; they are installed when they are first needed."""
    need("node")
    try:
        return installed(HERE / "package.json", "interop")
    except Unavailable as error:
        missing(str(error))
        raise


class Origin(NamedTuple):
    """A web site."""

    url: str
    folder: Path


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="session")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    """A web site that is not the server; its folder is still empty."""
    folder = tmp_path_factory.mktemp("origin")
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        thread = threading.Thread(target=site.serve_forever, daemon=True)
        thread.start()
        yield Origin(f"http://127.0.0.1:{site.server_port}", folder)
        site.shutdown()
        thread.join(10)


@pytest.fixture(scope="session")
def uppy_page(origin: Origin, packages: Path) -> str:
    """The address of a page with Uppy, bundled into one script."""
    shutil.copy(HERE / "uppy.html", origin.folder)
    subprocess.run(
        [
            *(packages / "node_modules/.bin/esbuild", packages / "uppy.mjs", "--bundle"),
            *("--log-level=warning", f"--outfile={origin.folder / 'uppy.js'}"),
        ],
        check=True,
    )
    return f"{origin.url}/uppy.html"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, origin: Origin) -> Iterator[Server]:
    """One server for the tests of a module, which may kill and start it; its log is checked."""
    folder = tmp_path_factory.mktemp("server") / "data"
    server = Server(folder, "--cors-origins", origin.url)
    yield server.start()
    server.close()


@pytest.fixture
def source(big: Source, tmp_path: Path) -> Source:
    """The big file under a name of the test's own, with letters of three scripts and a wave."""
    path = tmp_path / f"{uuid4().hex[:8]} Größe, 文件 и 🌊.bin"
    path.hardlink_to(big.path)
    return Source(path, big.sha256)


@pytest.fixture
def program(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Program]]:
    """Make a client of Node or Python by the name of its file; it ends with the test."""
    made: list[Program] = []

    def make(name: str) -> Program:
        if name.endswith(".mjs"):
            command = [need("node"), str(request.getfixturevalue("packages") / name)]
        else:
            command = [sys.executable, str(HERE / name)]
        made.append(Program(command, tmp_path))
        return made[-1]

    yield make
    for client in made:
        client.kill()


@pytest.fixture
def uppy(request: pytest.FixtureRequest) -> Iterator[Uppy]:
    """Uppy in Chromium."""
    client = Uppy(request.getfixturevalue("context"), request.getfixturevalue("uppy_page"))
    yield client
    client.kill()


@pytest.fixture
def relay() -> Iterator[Callable[[Server], Proxy]]:
    """Put a relay before a server."""
    made: list[Proxy] = []

    def make(server: Server) -> Proxy:
        made.append(Proxy(server.port))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.fixture
def rig(
    request: pytest.FixtureRequest, server: Server, relay: Callable[[Server], Proxy]
) -> Iterator[Rig]:
    """The flavour that the test's parameter names; what it leaves on the server is removed."""
    if server.process is None:  # a test has failed while it was down
        server.start()
    flavour = (FLAVOURS | VARIANTS)[request.param]
    if flavour.program == "uppy":
        client: Client = request.getfixturevalue("uppy")
    else:
        client = request.getfixturevalue("program")(flavour.program)
    rig = Rig(server, relay(server), client, flavour, {job["id"] for job in all_uploads(server)})
    yield rig
    client.kill()
    if server.process is not None:
        rig.clean()


@pytest.fixture
def clients(tmp_path: Path) -> Iterator[Clients]:
    """Clients with an empty folder; the last one ends with the test."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    clients = Clients(folder)
    yield clients
    clients.kill()
