"""256 readers of one file at once, each with a range of its own, against nginx with the same 256.

Claims: all together get at least 0.8 x what nginx gives them, and none is starved: the slowest
reader has at least half the median reader's rate. One process reads for all of them in turn, and
throws the bytes away in the kernel, so that the server is what is measured.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from statistics import median
from typing import NamedTuple

from benchmarks.common import (
    GIB,
    ROUNDS,
    SIZE,
    Nginx,
    Report,
    Sluice,
    at_least,
    cpu_s,
    file_of_both,
    main,
    place,
)

READERS = 256
_PIECE_BYTES = 256 << 10
_HEAD_BYTES = 4 << 10


class Reader:
    """One connection that asks for one range and counts what comes."""

    def __init__(self, port: int, path: str, start: int, n: int) -> None:
        self.left = n
        self.seconds = 0.0
        self._begun = False
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", f"Range: bytes={start}-{start + n - 1}"]
        self._request = ("\r\n".join(head) + "\r\n\r\n").encode()

    def ask(self) -> None:
        """Send the request."""
        self.socket.sendall(self._request)

    def take(self, buffer: memoryview) -> None:
        """Throw away a piece of what has come, but look at the answer's head."""
        if self._begun:
            n = self.socket.recv_into(buffer, min(self.left, _PIECE_BYTES), socket.MSG_TRUNC)
            if n == 0:
                raise RuntimeError(f"cut off {self.left:,} bytes before the end")
            self.left -= n
        else:
            self.left -= self._begin(self.socket.recv(_HEAD_BYTES))

    def _begin(self, data: bytes) -> int:
        """How much of the body came with the head."""
        head, end, body = data.partition(b"\r\n\r\n")
        if not end or not head.startswith(b"HTTP/1.1 206 "):
            raise RuntimeError(head.decode("latin-1"))
        self._begun = True
        return len(body)


class Run(NamedTuple):
    """One round: the time of all, the server's CPU, and how the slowest fared."""

    seconds: float
    cpu: float
    slowest: float  # its rate, in parts of the median rate


def run(pid: int, port: int, path: str, size: int, n: int) -> Run:
    """All readers at once, each with ``n`` bytes of a file of ``size``."""
    readers = [Reader(port, path, i * (size - n) // (READERS - 1), n) for i in range(READERS)]
    by_fd = {reader.socket.fileno(): reader for reader in readers}
    buffer = memoryview(bytearray(_PIECE_BYTES))
    before = cpu_s(pid)
    began = time.perf_counter()
    for reader in readers:
        reader.ask()
    with select.epoll() as epoll:
        for fd in by_fd:
            epoll.register(fd, select.EPOLLIN)
        left = READERS
        while left:
            for fd, _ in epoll.poll(30):
                reader = by_fd[fd]
                reader.take(buffer)
                if not reader.left:
                    reader.seconds = time.perf_counter() - began
                    epoll.unregister(fd)
                    left -= 1
    seconds = time.perf_counter() - began
    used = cpu_s(pid) - before
    for reader in readers:
        reader.socket.close()
    times = [reader.seconds for reader in readers]
    return Run(seconds, used, median(times) / max(times))


def measure() -> Report:
    """Compare both, with the very same file."""
    n = SIZE // 64
    total = n * READERS
    found: dict[str, list[Run]] = {"nginx sendfile": [], "Sluice": []}
    with place() as folder, Sluice(folder) as ours, Nginx(folder) as nginx:
        file = file_of_both(folder, ours, nginx)
        ways = [
            ("nginx sendfile", nginx.pid, nginx.port, "/big"),
            ("Sluice", ours.pid, ours.port, f"/v1/files/{file}/content"),
        ]
        for turn in range(ROUNDS + 1):
            for name, pid, port, path in ways if turn % 2 else reversed(ways):
                one = run(pid, port, path, SIZE, n)
                if turn:
                    found[name].append(one)
    rows = []
    for name, runs in found.items():
        rows.append(
            [
                name,
                f"{total / median(one.seconds for one in runs) / 1e6:,.0f}",
                f"{median(one.cpu for one in runs) / (total / GIB):.2f}",
                f"{median(one.slowest for one in runs):.2f}",
            ]
        )
    pairs = list(zip(*found.values(), strict=True))
    ratio = median(peer.seconds / own.seconds for peer, own in pairs)
    slowest = median(own.slowest for _, own in pairs)
    return Report(
        f"{READERS} ranged readers at once",
        ("Way", "MB/s in all", "server CPU s/GiB", "slowest : median reader"),
        rows,
        [
            at_least("Sluice : nginx", ratio, 0.8),
            at_least("the slowest reader : the median", slowest, 0.5),
        ],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
