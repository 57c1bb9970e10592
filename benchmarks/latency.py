"""How long a small request takes while an upload runs at full speed.

Claim: the 99th percentile of ``GET /v1/jobs`` (a page of 100 jobs) stays under 25 ms, or under
5 x that of the idle server, whichever is more. The peer is the same server without the upload. One
client on one kept connection sends request after request; the upload is curl, again and again.
"""

from __future__ import annotations

import http.client
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from benchmarks.common import (
    ROUNDS,
    SIZE,
    Report,
    Sluice,
    at_most,
    curl,
    main,
    place,
    source_file,
)

_REQUESTS = 2000  # in each state, over all rounds


class Latency(NamedTuple):
    """Percentiles in milliseconds."""

    p50: float
    p99: float


@contextmanager
def uploading(ours: Sluice, source: Path) -> Iterator[list[float]]:
    """Upload the file again and again; the speeds in MB/s of the uploads that are done."""
    size = source.stat().st_size
    done: list[float] = []
    ending = threading.Event()

    def work() -> None:
        url = f"{ours.url}/upload?file_name=raw&file_size={size}"
        while not ending.is_set():
            shot = curl("-T", str(source), url, "-X", "POST")
            done.append(shot.sent / shot.seconds / 1e6)
            ours.call("DELETE", f"/v1/files/{ours.newest_file()}")

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    try:
        yield done
    finally:
        ending.set()
        thread.join()


def ask(connection: http.client.HTTPConnection, n: int) -> Latency:
    """The percentiles of ``n`` requests."""
    taken = times_ms(connection, n)
    return Latency(median(taken), quantiles(taken, n=100)[98])


def times_ms(connection: http.client.HTTPConnection, n: int) -> list[float]:
    """How long each of ``n`` requests takes."""
    taken = []
    for _ in range(n):
        begin = time.perf_counter()
        connection.request("GET", "/v1/jobs")
        answer = connection.getresponse()
        answer.read()
        taken.append((time.perf_counter() - begin) * 1e3)
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}")
    return taken


def measure() -> Report:
    """Ask in turns: idle, busy, idle, busy."""
    idle: list[Latency] = []
    busy: list[Latency] = []
    with place() as folder, Sluice(folder) as ours:
        source = source_file(folder / "source", SIZE)
        for _ in range(150):  # so that the page is full from the first request on
            ours.call("POST", "/v1/jobs", {"kind": "count", "params": {"steps": 0}})
        connection = ours.connection()
        ask(connection, 100)
        speeds: list[float] = []
        for _ in range(ROUNDS):
            idle.append(ask(connection, _REQUESTS // ROUNDS))
            with uploading(ours, source) as done:
                busy.append(ask(connection, _REQUESTS // ROUNDS))
            speeds += done
            time.sleep(0.5)  # the last file is being removed
        connection.close()
    idle_50, idle_99 = median(each.p50 for each in idle), median(each.p99 for each in idle)
    busy_50, busy_99 = median(each.p50 for each in busy), median(each.p99 for each in busy)
    return Report(
        "Latency of GET /v1/jobs",
        ("Server", "p50 ms", "p99 ms", "upload MB/s"),
        [
            ["idle", f"{idle_50:.1f}", f"{idle_99:.1f}", ""],
            ["beside an upload", f"{busy_50:.1f}", f"{busy_99:.1f}", f"{median(speeds):,.0f}"],
            ["ratio", f"{busy_50 / idle_50:.1f} x", f"{busy_99 / idle_99:.1f} x", ""],
        ],
        [at_most("p99 beside an upload", busy_99, max(25.0, 5 * idle_99), "ms")],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
