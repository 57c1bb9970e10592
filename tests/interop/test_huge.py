"""A stored file that is bigger than memory: downloaded, broken off, resumed, and what that costs.

The file is sparse and published while the server is down, so that nothing is copied; every 16 MiB
stand some bytes that occur only there, and all that comes is compared with them.
"""

from __future__ import annotations

import asyncio
import filecmp
import http.client
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import pytest

from tests.conftest import need
from tests.harness import FULL, Server, eventually
from tests.interop.fetchers import RESUME, Clients
from tests.interop.tap import Tap
from tests.storage.sparse import MARK_EVERY, mark, store_sparse, write_sparse

MIB = 1 << 20
HUGE = (10 << 10 if FULL else 256) * MIB
TO_DISK = (1 << 10 if FULL else 64) * MIB
GROWTH_KB = 4_000
# Wide: the machine may do other things, too; a benchmark has the real figures.
LATE_S, LATE_TIMES = 0.1, 10


ZEROS = bytes(MIB)


def expected(at: int, n: int) -> bytes:
    """``n`` bytes of the file, at most 1 MiB, from ``at`` on."""
    before = at - at % MARK_EVERY
    if at - before >= len(mark(before)) and at + n <= before + MARK_EVERY:
        return ZEROS[:n]
    data = bytearray(n)
    for place in (before, before + MARK_EVERY):
        for i, byte in enumerate(mark(place), place - at):
            if 0 <= i < n:
                data[i] = byte
    return bytes(data)


def pipe(url: str, start: int, upto: int) -> int:
    """Let curl go on at ``start``, compare what comes, and kill it at ``upto``; where that was."""
    command = [need("curl"), "-sSf", "-C", str(start), url]
    at = start
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=MIB) as curl:
        assert curl.stdout is not None
        while at < upto and (piece := curl.stdout.read(MIB)):
            assert piece == expected(at, len(piece)), f"other bytes at {at} or behind"
            at += len(piece)
        if at < HUGE:
            curl.kill()
    assert curl.returncode == (-9 if at < HUGE else 0)
    return at


def peak_from_now_on(server: Server) -> int:
    """Let the kernel forget the peak of the start; what the server holds, in kB."""
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")
    return server.status("VmHWM")


@contextmanager
def asked_meanwhile(server: Server) -> Iterator[list[float]]:
    """Ask for /healthz again and again; the seconds that each answer took."""
    times: list[float] = []
    done = threading.Event()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        while not done.is_set():
            began = time.perf_counter()
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
            times.append(time.perf_counter() - began)
        connection.close()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield times
    finally:
        done.set()
        thread.join(30)
    assert not thread.is_alive()


def late_s(times: list[float]) -> float:
    """What 95 of 100 answers took at most."""
    return quantiles(times, n=20)[-1]


class Store(NamedTuple):
    """A server with two sparse files, by their paths."""

    server: Server
    huge: str
    to_disk: str


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A huge file, and one that may be written to the disk."""
    folder = tmp_path_factory.mktemp("server") / "data"
    paths = [asyncio.run(store_sparse(folder, f"{size}", size)) for size in (HUGE, TO_DISK)]
    server = Server(folder)
    yield Store(server.start(), *paths)
    server.close()


def test_huge_file_costs_nobody_anything(store: Store) -> None:
    """A huge file by a pipe, killed and resumed: the same bytes, little memory, others served."""
    server, url = store.server, store.server.url + store.huge
    with asked_meanwhile(server) as idle:
        eventually(lambda: len(idle) > 200, "the server answers while it has nothing to do")
    before_kb = peak_from_now_on(server)
    with asked_meanwhile(server) as busy:
        at = pipe(url, 0, HUGE * 2 // 5)
        assert HUGE / 3 < at < HUGE / 2
        assert pipe(url, at, HUGE) == HUGE
    assert server.status("VmHWM") - before_kb < GROWTH_KB
    assert late_s(busy) < LATE_TIMES * late_s(idle) + LATE_S


def test_eight_connections_to_the_disk(store: Store, clients: Clients, tmp_path: Path) -> None:
    """aria2 with eight connections, killed and started again, has the same bytes on its disk."""
    before_kb = peak_from_now_on(store.server)
    with closing(Tap(store.server.port)) as tap:
        tap.bytes_per_s = TO_DISK
        tap.hold_at(TO_DISK * 2 // 5)
        clients.start(*RESUME["aria2c"], tap.url + store.to_disk)
        eventually(lambda: tap.is_at_mark, "the mark is reached")
        eventually(lambda: clients.saved() > TO_DISK / 3, "what came is on the disk")
        clients.kill()
        tap.cut()
        assert clients.saved() < TO_DISK / 2
    assert clients.run(*RESUME["aria2c"], store.server.url + store.to_disk) == 0, clients.said
    write_sparse(tmp_path / "same", TO_DISK)
    assert filecmp.cmp(clients.out, tmp_path / "same", shallow=False)
    assert store.server.status("VmHWM") - before_kb < GROWTH_KB
