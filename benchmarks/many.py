"""64 uploads at once, against nginx with the same 64; and a page of jobs asked for meanwhile.

Claims: 64 PATCH requests together move at least as much as nginx's 64 PUTs, and the 99th percentile
of ``GET /v1/jobs`` beside them stays under 50 ms, or under 5 x that of the idle server, whichever
is more. One curl process sends all 64 (``--parallel``), 1/32 of SIZE each.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from statistics import median, quantiles

from benchmarks.common import (
    HEAD,
    ROUNDS,
    SIZE,
    Nginx,
    Report,
    Shot,
    Sluice,
    Way,
    at_least,
    at_most,
    compare,
    curl_all,
    main,
    place,
    source_file,
)
from benchmarks.latency import ask, times_ms
from benchmarks.tus import create

MANY = 64


def patch_all(ours: Sluice, source: Path) -> Shot:
    """64 uploads, each by one PATCH."""
    size = source.stat().st_size
    urls = [f"{ours.url}{create(ours.port, '/tus/', size)}" for _ in range(MANY)]
    return curl_all(
        source,
        urls,
        *("-X", "PATCH", "-H", "Tus-Resumable: 1.0.0", "-H", "Upload-Offset: 0"),
        *("-H", "Content-Type: application/offset+octet-stream"),
    )


def clean(ours: Sluice) -> None:
    """Remove what was stored, and wait until its space is free."""
    for file in ours.call("GET", f"/v1/files?limit={MANY}")[1]["items"][1:]:
        ours.call("DELETE", f"/v1/files/{file['id']}")
    ours.remove_newest_file()


def p99_ms(ours: Sluice, source: Path) -> tuple[float, float]:
    """The percentile of the idle server and of the busy one, in turns."""
    idle, busy = [], []
    for _ in range(ROUNDS):
        connection = ours.connection()
        ask(connection, 50)
        idle.append(ask(connection, 400).p99)
        sending = threading.Thread(target=patch_all, args=(ours, source))
        sending.start()
        taken: list[float] = []
        while sending.is_alive():
            taken += times_ms(connection, 20)
        busy.append(quantiles(taken, n=100)[98])
        sending.join()
        connection.close()
        clean(ours)
    return median(idle), median(busy)


def measure() -> Report:
    """Compare the throughput, then look at the latency."""
    size = SIZE // 32
    with place() as folder, Sluice(folder) as ours, Nginx(folder) as nginx:
        source = source_file(folder / "source", size)
        targets = [f"{nginx.url}/target{i}" for i in range(MANY)]

        def empty() -> None:
            for path in nginx.files.iterdir():
                path.unlink()

        figures = compare(
            [
                Way("nginx, 64 PUT", nginx.pid, lambda: curl_all(source, targets), empty),
                Way(
                    "Sluice, 64 PATCH",
                    ours.pid,
                    lambda: patch_all(ours, source),
                    lambda: clean(ours),
                ),
            ],
            size * MANY,
        )
        idle, busy = p99_ms(ours, source)
    rows = [each.row for each in figures]
    rows.append([f"p99 of GET /v1/jobs: {idle:.1f} ms idle, {busy:.1f} ms beside 64", "", "", ""])
    return Report(
        "64 uploads at once",
        HEAD,
        rows,
        [
            at_least("64 PATCH : 64 PUT", figures[1].ratio, 1.0),
            at_most("p99 beside 64 uploads", busy, max(50.0, 5 * idle), "ms"),
        ],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
