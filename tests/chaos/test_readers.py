"""Subscribers that do not read, or hardly: what they cost, and that they lose nothing.

The transitions are made by pausing and resuming jobs that wait for a far day: nothing runs, so the
log grows as fast as it can be committed. Each reader has an id of its own for its subscription, so
that no two share a frame: the most that they can cost.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import websocket

from tests.conftest import Serve
from tests.harness import FULL, Server, eventually

READERS, JOBS, TRANSITIONS = (1000, 1000, 100_000) if FULL else (100, 150, 1500)
KIB_EACH = 64
RING = 4096  # events that the server keeps in memory, whoever reads
NUDGE_S = 10.0
PROTOCOL = "jobs.v1.json"

pytestmark = pytest.mark.chaos


class Jobs:
    """Jobs that never run, and are paused and resumed all together."""

    def __init__(self, server: Server, n: int) -> None:
        self.n = n
        self.transitions = 0
        self._server = server
        self._paused = False
        self._socket = server.socket(PROTOCOL)
        self._socket.say(t="hello")
        args = {"kind": "count", "params": {"steps": 0}, "not_before": "2100-01-01T00:00:00Z"}
        for _ in range(n):
            self._command("start", args=args)

    def _command(self, op: str, **more: Any) -> Any:
        self._socket.say(t="cmd", id=1, op=op, **more)
        answer = self._socket.until(lambda m: m["t"] in ("ack", "err"), 120)
        assert answer["t"] == "ack", answer
        return answer

    def turn(self) -> None:
        """One transition of each."""
        ack = self._command("resume" if self._paused else "pause", f={"kind": ["count"]})
        assert (ack["n"], ack["failures"]) == (self.n, 0)
        self._paused = not self._paused
        self.transitions += self.n

    def versions(self) -> dict[str, int]:
        """The version of each job."""
        found: dict[str, int] = {}
        query = "?limit=500"
        while True:
            page = self._server.get(f"/v1/jobs{query}").json
            found |= {row["id"]: row["version"] for row in page["items"]}
            if page["next"] is None:
                return found
            query = f"?limit=500&after={page['next']}"

    def close(self) -> None:
        """Give no more commands."""
        self._socket.close()


class Reader:
    """A subscriber to all jobs that reads only when it is told to, and checks what it reads."""

    def __init__(self, server: Server, id: int = 1, cid: str = "") -> None:
        self.id = id
        self.cid = cid
        self.answers = True  # pings
        self.s = -1
        self.events = 0
        self.versions: dict[str, int] = {}
        self.resumed = 0
        self._server = server
        self._epoch = ""
        self._connect()
        while self.s < 0:
            assert self.take(), self.code

    def _connect(self, **cursor: Any) -> None:
        self.code: int | None = None
        self._unread = bytearray()
        self.ws: Any = websocket.create_connection(
            f"ws://127.0.0.1:{self._server.port}/v1/ws",
            subprotocols=[PROTOCOL],
            timeout=60,
            sockopt=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)],
            suppress_origin=True,
        )
        sub = {"t": "sub", "id": self.id, "f": {"kind": ["count"]}, "page": 1} | cursor
        self.ws.send(json.dumps([{"t": "hello", "cid": self.cid}, sub]))

    def resume(self) -> None:
        """Go on behind what was read, on a new connection."""
        self.close()
        self.resumed += 1
        self._connect(epoch=self._epoch, s=self.s)

    def take(self, n_bytes: int = 1 << 16) -> bool:
        """Read what is there, at least a byte; False at the end of the connection."""
        try:
            data = self.ws.sock.recv(n_bytes)
        except ConnectionResetError:
            data = b""
        self._unread += data
        while (frame := self._frame()) is not None:
            self._hear(*frame)
        return bool(data)

    def _frame(self) -> tuple[int, bytes] | None:
        """The next frame if it is there as a whole (RFC 6455 section 5.2)."""
        unread = self._unread
        if len(unread) < 2:
            return None
        begin = 2 + {126: 2, 127: 8}.get(unread[1], 0)
        if len(unread) < begin:
            return None
        end = begin + (int.from_bytes(unread[2:begin], "big") if begin > 2 else unread[1])
        if len(unread) < end:
            return None
        frame = unread[0], bytes(unread[begin:end])
        del unread[:end]
        return frame

    def _hear(self, first: int, data: bytes) -> None:
        assert first & 0xF0 == 0x80, "each frame is whole"
        assert self.code is None, "nothing follows the close"
        match first & 0x0F:
            case websocket.ABNF.OPCODE_CLOSE:
                self.code = int.from_bytes(data[:2], "big")
            case websocket.ABNF.OPCODE_PING:
                if self.answers:
                    with suppress(OSError):  # the server may have hung up since
                        self.ws.pong(data)
            case _:
                said = json.loads(data)
                for message in said if isinstance(said, list) else [said]:
                    self._apply(message)

    def _apply(self, message: Any) -> None:
        match message["t"]:
            case "snap":
                assert self.s < 0, "a resume needs no snapshot"
                self.s, self._epoch = message["s"], message["epoch"]
            case "ack":
                assert message["resumed"] == (self.s >= 0)
            case "ev" | "mark":
                assert message["p"] == self.s < message["s"]
                self.s = message["s"]
                if message["t"] == "ev":
                    self._event(message["row"])

    def _event(self, row: Any) -> None:
        known = self.versions.get(row["id"])
        assert known is None or row["version"] == known + 1
        self.versions[row["id"]] = row["version"]
        self.events += 1

    def read_to(self, seq: int) -> None:
        """Read up to a place in the log; if it was closed for its silence, go on from there."""
        self.ws.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)  # it hurries now
        while self.s < seq:
            if not self.take():
                # None: it has answered a ping of a server that had hung up, and was reset.
                assert self.code in (4508, 4510, None)
                self.resume()

    def close(self) -> None:
        """Hang up."""
        self.ws.shutdown()


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    """Closes what a test opens, before its server ends."""
    with ExitStack() as stack:
        yield stack


def newest(server: Server) -> int:
    """The number of the newest event."""
    return int(server.get("/v1/events").json["cursor"].rpartition(":")[2])


def kernel_kib(server: Server) -> int:
    """Memory that the kernel holds for what was not sent on the server's connections (ss -m)."""
    ours = ["sport", "=", f":{server.port}"]
    try:
        told = subprocess.run(["ss", "-Htmn", *ours], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    fields = [field for part in told.stdout.split("skmem:(")[1:] for field in part.split(",")]
    return sum(int(field[1:]) for field in fields if field[0] == "w" and field[1:].isdigit()) >> 10


def is_held(server: Server, reader: Reader) -> bool:
    """Whether the server's process still has a reader's connection; the kernel may keep it on."""
    ours = f":{reader.ws.sock.getsockname()[1]:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines():
        _, local, remote, *more = line.split()
        if local.endswith(f":{server.port:04X}") and remote.endswith(ours):
            return more[6] != "0"  # the inode
    return False


def test_subscribers_that_do_not_read_cost_little(
    serve: Serve, ends: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each costs less than 64 KiB however much happens, and gets all of it when it reads."""
    server = serve("--max-sockets", str(READERS + 10))
    jobs = Jobs(server, JOBS)
    ends.callback(jobs.close)
    while jobs.transitions <= RING:  # fills the ring, and warms all up
        jobs.turn()
    before_kib = server.status("VmRSS")
    readers = []
    for id in range(1, READERS + 1):
        readers.append(Reader(server, id))
        ends.callback(readers[-1].close)
    opened_kib = most_kib = server.status("VmRSS")
    began_s = nudged_s = time.monotonic()
    jobs.transitions = 0
    while jobs.transitions < TRANSITIONS:
        jobs.turn()
        most_kib = max(most_kib, server.status("VmRSS"))
        if time.monotonic() - nudged_s > NUDGE_S:
            # A bit and a sign of life, so that none is closed before the end and costs nothing.
            nudged_s = time.monotonic()
            for reader in readers:
                reader.take()
                # One turn may take longer than the server is patient.
                with suppress(OSError, websocket.WebSocketException):
                    reader.ws.send('{"t":"hb"}')
    took_s = time.monotonic() - began_s
    with capsys.disabled():
        print(
            f"\n{READERS} readers, {jobs.transitions} transitions in {took_s:.0f} s: "
            f"{(opened_kib - before_kib) / READERS:.1f} KiB each when opened, "
            f"{(most_kib - before_kib) / READERS:.1f} KiB at the most, "
            f"and {kernel_kib(server) / READERS:.1f} KiB in the kernel"
        )
    assert most_kib - before_kib < KIB_EACH * READERS

    end = newest(server)
    versions = jobs.versions()
    for reader in readers[:: READERS // 2]:
        assert reader.s < end, "it has not read"
        reader.read_to(end)
        assert (reader.events, reader.versions) == (jobs.transitions, versions)


def test_who_does_not_read_still_finds_why_it_was_closed(server: Server, ends: ExitStack) -> None:
    """A close comes behind all of the frame that was under way, however late that is read."""
    jobs = Jobs(server, 100)
    ends.callback(jobs.close)
    older = Reader(server, cid="tab")
    older.answers = False  # a pong to who has hung up would reset the connection
    ends.callback(older.close)
    for _ in range(10):
        jobs.turn()
    newer = Reader(server, cid="tab")
    ends.callback(newer.close)
    eventually(lambda: not is_held(server, older), "the server has closed it")
    while older.take():
        pass
    assert older.code == 4409
    assert 0 < older.events < jobs.transitions


if FULL:  # they need more than thirty seconds each

    def test_a_slow_reader_is_not_closed(server: Server, ends: ExitStack) -> None:
        """Who reads a few KiB a second for longer than thirty seconds stays connected."""
        jobs = Jobs(server, 1000)
        ends.callback(jobs.close)
        reader = Reader(server)
        ends.callback(reader.close)
        for _ in range(2):
            jobs.turn()
        until_s = time.monotonic() + 50  # longer than an unanswered ping is borne, too
        while time.monotonic() < until_s:
            assert reader.take(1024), reader.code
            time.sleep(0.25)
        end = newest(server)
        assert reader.s < end
        reader.read_to(end)
        assert reader.resumed == 0
        assert (reader.events, reader.versions) == (2000, jobs.versions())

    def test_who_reads_nothing_for_long_is_closed_and_resumes(
        server: Server, ends: ExitStack
    ) -> None:
        """After thirty seconds it is closed with 4508 behind whole frames, and misses nothing."""
        jobs = Jobs(server, 500)
        ends.callback(jobs.close)
        reader = Reader(server)
        reader.answers = False  # a pong to who has hung up would reset the connection
        ends.callback(reader.close)
        began_s = time.monotonic()
        for _ in range(2):
            jobs.turn()
        eventually(lambda: not is_held(server, reader), "the server has closed it", 120)
        assert time.monotonic() - began_s > 30
        while reader.take():
            pass
        assert reader.code == 4508
        end = newest(server)
        assert 0 < reader.events < 1000
        assert reader.s < end
        reader.read_to(end)
        assert reader.resumed == 1
        assert (reader.events, reader.versions) == (1000, jobs.versions())
