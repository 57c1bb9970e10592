"""What people download with: curl, wget and aria2, broken off in the middle and begun again.

A relay holds a download at a number of bytes, so that "in the middle" is certain, and shows what a
client asks for and how much it gets: who resumes gets each byte about once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest

from tests.conftest import need
from tests.harness import FULL, Server, eventually
from tests.interop.fetchers import RESUME, Clients
from tests.interop.rig import make_source
from tests.interop.tap import Tap

MIB = 1 << 20
SIZE = (64 if FULL else 8) * MIB
MARK = SIZE * 2 // 5  # where downloads are interrupted
HEADS = 64 << 10  # more than all heads together
NAME = "Größe, 文件 и 🌊 v1.bin"
ASCII_NAME = "Gr__e, __ _ _ v1.bin"


def again(command: tuple[str, ...]) -> tuple[str, ...]:
    """Run a command until it succeeds; the URL follows."""
    return ("sh", "-c", f'until {" ".join(command)} "$0"; do sleep 0.1; done')


# They try again. aria2 has tries, too, but it makes all of them at once when a server is down.
RETRY = {
    "curl": again(RESUME["curl"]),
    "curl-retry": ("curl", "-sSf", "--retry", "50", "--retry-all-errors", "-o", "out"),
    "wget": (*RESUME["wget"], "--tries=50", "--waitretry=1", "--retry-connrefused"),
    "aria2c": again(RESUME["aria2c"]),
}


class Stored(NamedTuple):
    """A file on the server."""

    path: str
    sha256: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests of this module, which may kill it; it has digests of all files."""
    server = Server(tmp_path_factory.mktemp("server") / "data", "--digest", "always")
    yield server.start()
    server.close()


@pytest.fixture(autouse=True)
def _up(server: Server) -> None:
    """Start the server again if a test has failed while it was down."""
    if server.process is None:
        server.start()


def store(server: Server, folder: Path, name: str) -> Stored:
    """Store a big file of random bytes."""
    source = make_source(folder / "source", SIZE)
    query = f"file_name={quote(name)}&is_complete=true"
    answer = server.request("POST", f"/upload?{query}", source.path.read_bytes())
    assert answer.status == 200, answer
    return Stored(f"/v1/files/{answer.json['id']}/content", source.sha256)


@pytest.fixture(scope="module")
def stored(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A file under a name with letters of three scripts and a wave."""
    return store(server, tmp_path_factory.mktemp("stored"), NAME)


@pytest.fixture
def tap(server: Server) -> Iterator[Tap]:
    """A relay before the server."""
    with closing(Tap(server.port)) as tap:
        yield tap


@pytest.mark.parametrize("client", RESUME)
def test_killed_client_goes_on(client: str, stored: Stored, tap: Tap, clients: Clients) -> None:
    """A client that was killed in the middle and is started again fetches only the rest."""
    url = tap.url + stored.path
    tap.bytes_per_s = SIZE  # so that all eight connections of aria2 are open at the mark
    tap.hold_at(MARK)
    clients.start(*RESUME[client], url)
    eventually(lambda: tap.is_at_mark, "the mark is reached")
    eventually(lambda: clients.saved() > 0.9 * MARK - HEADS, "what came is on the disk")
    clients.kill()
    tap.cut()
    kept, passed = clients.saved(), tap.sent
    assert kept < SIZE / 2
    tap.requests.clear()
    tap.bytes_per_s = None
    assert clients.run(*RESUME[client], url) == 0, clients.said
    assert clients.digest() == stored.sha256
    assert clients.names() == {"out"}
    assert tap.sent - passed < SIZE - kept / 2
    if client != "aria2c":  # which asks for ranges anyway
        assert tap.resumed_at() == [kept]


@pytest.mark.parametrize("broken", ["reset", "ended short", "killed"])
@pytest.mark.parametrize("client", RETRY)
def test_client_that_retries(
    client: str, broken: str, server: Server, stored: Stored, tap: Tap, clients: Clients
) -> None:
    """A lost connection, and a server that was killed, are no end for a client that tries again."""
    need(client.partition("-")[0])
    tap.bytes_per_s = SIZE * 2
    if broken == "reset":
        tap.cut_at(MARK)
    elif broken == "ended short":
        tap.end_at(MARK)
    else:
        tap.hold_at(MARK)
    clients.start(*RETRY[client], tap.url + stored.path)
    eventually(lambda: tap.is_at_mark, "the mark is reached")
    if broken == "killed":
        server.kill()
        tap.release()
        server.start()
    assert clients.end() == 0, clients.said
    assert clients.digest() == stored.sha256
    assert len(tap.requests) > 1
    if client == "curl-retry":  # each of its tries begins where the first one did
        assert tap.sent > SIZE + MARK / 2
    else:
        assert tap.resumed_at() != []
        assert tap.sent < SIZE + MARK / 2


@pytest.mark.parametrize("client", RETRY)
def test_server_that_is_down(client: str, server: Server, stored: Stored, clients: Clients) -> None:
    """Who tries again also gets a file from a server that is started later."""
    need(client.partition("-")[0])
    server.kill()
    clients.start(*RETRY[client], server.url + stored.path)
    server.start()
    assert clients.end() == 0, clients.said
    assert clients.digest() == stored.sha256


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (RESUME["curl"], 22),
        (("curl", "-sS", "-C", "-", "-o", "out"), 0),
        (RESUME["wget"], 0),
        (RESUME["aria2c"], 0),
    ],
    ids=["curl-f", "curl", "wget", "aria2c"],
)
def test_finished_file_stays_as_it_is(
    command: tuple[str, ...], status: int, stored: Stored, tap: Tap, clients: Clients
) -> None:
    """To resume what is already whole changes nothing; only ``curl -f`` calls it an error."""
    url = tap.url + stored.path
    assert clients.run(*RESUME[command[0]], url) == 0, clients.said
    before = tap.sent
    assert clients.run(*command, url) == status, clients.said
    assert clients.digest() == stored.sha256
    if command[0] != "aria2c":  # which looks at the answer to a plain GET
        assert tap.requests[-1].first_byte == SIZE
        assert tap.sent - before < HEADS


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("curl", "-sSf", "-OJ"), ASCII_NAME),  # it knows nothing of filename*
        (("wget", "-nv", "--content-disposition"), NAME),
        (("aria2c", "-q"), NAME),
    ],
    ids=["curl", "wget", "aria2c"],
)
def test_name(
    command: tuple[str, ...], name: str, server: Server, stored: Stored, clients: Clients
) -> None:
    """wget and aria2 save a file under its own name, curl under what is left of it in ASCII."""
    assert clients.run(*command, server.url + stored.path) == 0, clients.said
    assert clients.names() == {name}


def test_aria2_checks_the_digest(stored: Stored, tap: Tap, clients: Clients) -> None:
    """aria2 compares what it has with the announced digest, and fails with 32 if they differ."""
    other = "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="  # of nothing
    tap.change = (rb"(?m)^Digest: SHA-256=[^\r,]+", f"Digest: SHA-256={other}".encode())
    assert clients.run(*RESUME["aria2c"], tap.url + stored.path) == 32, clients.said
    assert clients.digest() == stored.sha256


@pytest.mark.parametrize(
    "command", [(*RESUME["curl"], "-L"), RESUME["wget"], RESUME["aria2c"]], ids=RESUME
)
def test_newest_by_name(
    command: tuple[str, ...], server: Server, clients: Clients, tmp_path: Path
) -> None:
    """The address of a name leads to its newest version."""
    store(server, tmp_path, "by name, 文件.bin")
    newest = store(server, tmp_path, "by name, 文件.bin")
    url = f"{server.url}/v1/files/by-name/{quote('by name, 文件.bin')}"
    assert clients.run(*command, url) == 0, clients.said
    assert clients.digest() == newest.sha256


def test_version_that_was_begun(server: Server, tap: Tap, clients: Clients, tmp_path: Path) -> None:
    """Resumed where the name led to, a download stays the version that it was at first."""
    begun = store(server, tmp_path, "versions.bin")
    by_name = f"{tap.url}/v1/files/by-name/versions.bin"
    assert clients.run("curl", "-sS", "-w", "%{redirect_url}", by_name) == 0
    url = clients.said
    tap.hold_at(MARK)
    clients.start(*RESUME["curl"], url)
    eventually(lambda: tap.is_at_mark, "the mark is reached")
    eventually(lambda: clients.saved() > MARK / 2, "what came is on the disk")
    clients.kill()
    tap.cut()
    store(server, tmp_path, "versions.bin")
    assert clients.run(*RESUME["curl"], url) == 0, clients.said
    assert clients.digest() == begun.sha256
