"""Many WebSocket subscribers in one process, which cost little beside the server that they measure.

One epoll loop over raw sockets. Of most subscribers only the frames are counted, by their first
bytes; a few, the sample, read what they get: they keep the chain of the events, the state of each
job, and how long each event was under way. It is a process of its own, so that a server's client
does not wait for the benchmark that publishes. Each line on its input asks for what was counted;
the end of the input ends it.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import msgspec

EV, P, HB, SNAP = b'{"t":"ev"', b'{"t":"p",', b'{"t":"hb"', b'{"t":"sna'
_TYPES = (EV, P, HB, SNAP)
_HELLO = b'{"t":"hello","ver":1}'
_PIECE_BYTES = 32 << 10
_CONNECT_S = 120.0
_INPUT = 0
_TAKE, _LOOK = b"take\n", b"look\n"
_CLOSE, _PING = 8, 9


class Taken(msgspec.Struct):
    """What came since the last time; a frame counts once, however many messages it carries."""

    open: int = 0
    lost: int = 0  # connections that ended, ever
    frames: int = 0  # with events
    events: int = 0
    progress: int = 0  # messages with progress
    beats: int = 0
    least_beats: int = 0  # of the connection that got the fewest
    bytes: int = 0
    progress_rows: float = 0.0  # values that were new to the sample, in a message with progress
    updates: int = 0  # steps that the sample saw all jobs go
    sample_events: int = 0  # of one subscriber
    delays_ms: list[float] = []  # from the events' own time to their arrival, of the sample
    recorded: list[tuple[float, str]] = []  # what one subscriber got of events, and when
    states: dict[str, tuple[str, int]] = {}  # of each job that it knows: state and version
    broken: str = ""  # an event that did not follow the one before it


class _Row(msgspec.Struct):
    id: str
    state: str
    version: int


class _Message(msgspec.Struct):
    t: str
    s: int | None = None
    p: int | None = None
    to: str | None = None
    at: str | None = None
    row: _Row | None = None
    jobs: list[_Row] = []
    u: list[list[Any]] = []


_read = msgspec.json.Decoder(_Message | list[_Message]).decode


class _Sample:
    """A subscriber that reads what it gets."""

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps
        self.s: int | None = None
        self.states: dict[str, tuple[str, int]] = {}
        self.done: dict[int, int] = {}
        self.broken = ""
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        self.delays_ms: list[float] = []
        self.recorded: list[tuple[float, str]] = []
        self.events = self.updates = self.rows = self.frames = 0

    def take(self, payload: bytes) -> None:
        """Read one frame."""
        arrived_s = time.time()
        found = _read(payload)
        messages = found if isinstance(found, list) else [found]
        for message in messages:
            match message.t:
                case "ev":
                    self._event(message, arrived_s)
                case "p":
                    self._progress(message)
                case "mark":
                    self.s = message.s
                case "snap":
                    self.s = message.s
                    self.states |= {row.id: (row.state, row.version) for row in message.jobs}
        if self.keeps and any(message.t == "ev" for message in messages):
            self.recorded.append((arrived_s, payload.decode()))

    def _event(self, message: _Message, arrived_s: float) -> None:
        self.events += 1
        if self.s is not None:
            if message.p != self.s:
                self.broken = self.broken or f"{message.s} follows {message.p}, not {self.s}"
            self.s = message.s
        if message.row is not None:
            self.states[message.row.id] = (message.row.state, message.row.version)
            if message.to == "deleted":
                del self.states[message.row.id]
        if message.at is not None:
            at_s = datetime.fromisoformat(message.at).timestamp()
            self.delays_ms.append((arrived_s - at_s) * 1e3)

    def _progress(self, message: _Message) -> None:
        self.frames += 1
        for h, _, done, *_ in message.u:
            was = self.done.get(h, 0)
            if done != was:
                self.rows += 1
                self.updates += done - was if was else 0
                self.done[h] = done


class _Crowd:
    """All subscribers of this process."""

    def __init__(self, port: int, path: str, subscribe: str) -> None:
        self._port = port
        self._subscribe = subscribe
        protocol = "Sec-WebSocket-Protocol: jobs.v1.json\r\n" if subscribe else ""
        self._request = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: c2x1aWNlLWJlbmNobWFyaw==\r\n{protocol}\r\n"
        ).encode()
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._rest: dict[int, bytes] = {}
        self._samples: dict[int, _Sample] = {}
        self._frames: Counter[bytes] = Counter()
        self._messages: Counter[bytes] = Counter()
        self._beats: dict[int, int] = {}
        self._bytes = 0
        self._lost = 0
        self._snaps = 0

    def connect(self, n: int, samples: int) -> None:
        """Connect all, and wait until each that subscribes has got its snapshot."""
        for i in range(n):
            self._connect(sampled=i * samples // n != (i - 1) * samples // n)
            self._poll(0)
        end = time.monotonic() + _CONNECT_S
        while self._subscribe and self._snaps < n:
            self._poll(1)
            if self._lost or time.monotonic() > end:
                raise RuntimeError(f"{self._snaps:,} snapshots for {n:,}, {self._lost:,} lost")

    def serve(self) -> None:
        """Receive and answer until the input ends."""
        self._epoll.register(_INPUT, select.EPOLLIN)
        while self._poll(60):
            pass

    def _connect(self, sampled: bool) -> None:
        sock = socket.create_connection(("127.0.0.1", self._port), timeout=60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fd = sock.fileno()
        if sampled:
            self._samples[fd] = _Sample(keeps=not self._samples)
        sock.sendall(self._request)
        answer = b""
        while b"\r\n\r\n" not in answer:
            piece = sock.recv(_PIECE_BYTES)
            if not piece:
                raise RuntimeError(answer.decode("latin-1"))
            answer += piece
        head, _, rest = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            raise RuntimeError(answer.decode("latin-1"))
        self._sockets[fd] = sock
        self._beats[fd] = 0
        if self._subscribe:
            sock.sendall(_masked(1, _HELLO) + _masked(1, self._subscribe.encode()))
        sock.setblocking(False)
        self._take(fd, rest)
        self._epoll.register(fd, select.EPOLLIN)

    def _poll(self, timeout_s: float) -> bool:
        """Receive what is there; whether the input goes on."""
        for fd, _ in self._epoll.poll(timeout_s):
            if fd != _INPUT:
                self._receive(fd)
            elif asked := os.read(_INPUT, 4096):
                taken = self._taken() if asked == _TAKE else Taken(frames=self._frames[EV])
                print(msgspec.json.encode(taken).decode(), flush=True)
            else:
                return False
        return True

    def _receive(self, fd: int) -> None:
        try:
            data = self._sockets[fd].recv(_PIECE_BYTES)
        except OSError:
            data = b""
        if not data:
            self._lose(fd)
            return
        self._bytes += len(data)
        rest = self._rest.pop(fd, None)
        self._take(fd, data if rest is None else rest + data)

    def _take(self, fd: int, data: bytes) -> None:
        """Look at each whole frame (RFC 6455 section 5.2), and keep the rest."""
        at, n = 0, len(data)
        while n - at >= 4 or (n - at >= 2 and not data[at + 1]):
            begin, size = at + 2, data[at + 1]
            if size == 126:
                begin, size = at + 4, data[at + 2] << 8 | data[at + 3]
            elif size == 127:
                begin, size = at + 10, int.from_bytes(data[at + 2 : at + 10], "big")
            end = begin + size
            if end > n:
                break
            if data[at] == 0x81:
                self._note(fd, data, begin, end)
            else:
                self._control(fd, data[at] & 15, data[begin:end])
            at = end
        if at < n and fd in self._sockets:
            self._rest[fd] = data[at:]

    def _note(self, fd: int, data: bytes, begin: int, end: int) -> None:
        first = data[begin : begin + 9]
        if first[:1] == b"[":
            for each in _TYPES:
                if n := data.count(each, begin, end):
                    self._count(fd, each, n)
        else:
            self._count(fd, first, 1)
        if fd in self._samples:
            self._samples[fd].take(data[begin:end])

    def _count(self, fd: int, kind: bytes, n: int) -> None:
        self._frames[kind] += 1
        self._messages[kind] += n
        if kind == HB:
            self._beats[fd] += n
        elif kind == SNAP:
            self._snaps += n

    def _control(self, fd: int, opcode: int, payload: bytes) -> None:
        if opcode == _PING:
            self._sockets[fd].send(_masked(10, payload))
        elif opcode == _CLOSE:
            self._lose(fd)

    def _lose(self, fd: int) -> None:
        if (sock := self._sockets.pop(fd, None)) is not None:
            self._lost += 1
            self._epoll.unregister(fd)
            sock.close()

    def _taken(self) -> Taken:
        samples = list(self._samples.values()) or [_Sample(False)]
        one = samples[0]
        taken = Taken(
            open=len(self._sockets),
            lost=self._lost,
            frames=self._frames[EV],
            events=self._messages[EV],
            progress=self._messages[P],
            beats=self._messages[HB],
            least_beats=min(self._beats.values(), default=0),
            bytes=self._bytes,
            progress_rows=one.rows / one.frames if one.frames else 0.0,
            updates=one.updates,
            sample_events=one.events,
            delays_ms=[delay for sample in samples for delay in sample.delays_ms],
            recorded=one.recorded,
            states=one.states,
            broken=" ".join(sample.broken for sample in samples if sample.broken),
        )
        self._frames.clear()
        self._messages.clear()
        self._beats = dict.fromkeys(self._beats, 0)
        self._bytes = 0
        for sample in samples:
            sample.forget()
        return taken


def _masked(opcode: int, payload: bytes) -> bytes:
    """A client's frame of less than 126 bytes; its mask is zero, which changes nothing."""
    return bytes((0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0)) + payload


class Subscribers:
    """The process of subscribers, as a benchmark uses it; ``subscribe`` is empty for a peer."""

    def __init__(self, port: int, path: str, n: int, subscribe: str = "", samples: int = 1) -> None:
        arguments = [str(port), path, str(n), subscribe, str(samples)]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> Self:
        """Wait until all are connected and subscribed."""
        if self._line() != "ready":
            raise RuntimeError("the subscribers could not connect")
        return self

    def take(self) -> Taken:
        """What they have got since the last time."""
        return self._ask(_TAKE)

    def settled(self) -> Taken:
        """The same, once no more events arrive."""
        frames = -1
        while frames != (frames := self._ask(_LOOK).frames):
            time.sleep(0.2)
        return self.take()

    def _ask(self, what: bytes) -> Taken:
        assert self._process.stdin is not None
        self._process.stdin.write(what.decode())
        self._process.stdin.flush()
        return msgspec.json.decode(self._line(), type=Taken)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _main(port: str, path: str, n: str, subscribe: str, samples: str) -> None:
    crowd = _Crowd(int(port), path, subscribe)
    crowd.connect(int(n), int(samples))
    print("ready", flush=True)
    crowd.serve()


if __name__ == "__main__":
    _main(*sys.argv[1:])
