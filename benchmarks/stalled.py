"""1,000 senders that have stopped, and one honest upload beside them.

Claims: beside them the honest upload keeps at least 0.8 x of its speed, and each of them costs the
server less than 64 KiB of memory. Each has begun a tus upload, has sent 10 KiB of its PATCH, and
sends nothing any more. The peer is the same server without them, in turns.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

from benchmarks.common import (
    ROUNDS,
    SIZE,
    Report,
    Sluice,
    at_least,
    at_most,
    main,
    place,
    source_file,
    status_of,
)
from benchmarks.tus import create, patch

MANY = 1000
_SENT = 10 << 10


def stall(ours: Sluice) -> socket.socket:
    """Begin an upload, send a little of it, and stop."""
    path = create(ours.port, "/tus/", 1 << 20)
    sender = socket.create_connection(("127.0.0.1", ours.port))
    head = (
        f"PATCH {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nTus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\n"
        f"Content-Type: application/offset+octet-stream\r\nContent-Length: {1 << 20}\r\n\r\n"
    )
    sender.sendall(head.encode() + bytes(_SENT))
    return sender


@contextmanager
def stalled(ours: Sluice) -> Iterator[None]:
    """1,000 of them; their uploads are cancelled at the end."""
    senders = [stall(ours) for _ in range(MANY)]
    time.sleep(1.5)  # their first commit
    try:
        yield
    finally:
        for sender in senders:
            sender.close()
        while jobs := ours.call("GET", "/v1/jobs?state=running&limit=500")[1]["items"]:
            for job in jobs:
                with suppress(OSError):
                    ours.call("POST", f"/v1/jobs/{job['id']}/cancel")


def speed(ours: Sluice, source: str) -> float:
    """One honest upload, in MB/s."""
    shot = patch(ours.port, "/tus/", source)
    if shot.status != 204:
        raise RuntimeError(f"status {shot.status}")
    ours.remove_newest_file()
    return shot.sent / shot.seconds / 1e6


def measure() -> Report:
    """Measure in turns: alone, beside them, alone, beside them."""
    alone: list[float] = []
    beside: list[float] = []
    each_kib: list[float] = []
    with place() as folder, Sluice(folder) as ours:
        source = str(source_file(Path(folder) / "source", SIZE))
        speed(ours, source)
        for turn in range(max(2, ROUNDS // 2)):
            alone += [speed(ours, source) for _ in range(3)]
            before = status_of(ours.pid, "VmRSS")
            with stalled(ours):
                if not turn:  # later ones reuse what the first have left
                    each_kib.append((status_of(ours.pid, "VmRSS") - before) / MANY)
                beside += [speed(ours, source) for _ in range(3)]
    ratio = median(beside) / median(alone)
    return Report(
        "1,000 stalled senders",
        ("Server", "honest upload MB/s", "KiB for each stalled one"),
        [
            ["alone", f"{median(alone):,.0f}", ""],
            ["beside them", f"{median(beside):,.0f}", f"{each_kib[0]:.1f}"],
            ["ratio", f"{ratio:.2f} x", ""],
        ],
        [
            at_least("beside them : alone", ratio, 0.8),
            at_most("memory of a stalled sender", each_kib[0], 64.0, "KiB"),
        ],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
