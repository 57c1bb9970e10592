"""How many processes a second go through the service, and how many rows through SQLite.

No bound, only for information. Processes that do nothing are started by ``POST /v1/jobs`` on
eight connections, and the clock stops when the last one has succeeded. The peer is SQLite alone:
one commit for each row, in one loop, on the same file system and as durable as the service's
transitions. The rows that processes write come in commits of 1,000, each with its cursor.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.common import ROUNDS, Report, Sluice, main, place
from storage.tables import TableFile

_JOBS = 1000
_CLIENTS = 8
_COMMITS = 5000
_ROWS, _BLOCK = 100_000, 1000
_BODY = b'{"kind": "count", "params": {"steps": 0}}'


async def _client(port: int, n: int) -> None:
    """Start ``n`` processes, one after the other on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = (
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
    )
    for _ in range(n):
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 201"):
            raise RuntimeError(head.decode())
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))
    writer.close()
    await writer.wait_closed()


async def _clients(port: int) -> None:
    await asyncio.gather(*(_client(port, _JOBS // _CLIENTS) for _ in range(_CLIENTS)))


def processes_per_s(ours: Sluice) -> float:
    """From the first request until the last process has succeeded."""
    before = _succeeded(ours)
    begin = time.perf_counter()
    asyncio.run(_clients(ours.port))
    while _succeeded(ours) < before + _JOBS:
        time.sleep(0.005)
    return _JOBS / (time.perf_counter() - begin)


def _succeeded(ours: Sluice) -> int:
    return int(ours.call("GET", "/v1/jobs?limit=1")[1]["counts"].get("succeeded", 0))


def commits_per_s(path: Path) -> float:
    """SQLite alone, one row a commit."""
    con = sqlite3.connect(path, isolation_level=None)
    con.execute("PRAGMA journal_mode=WAL")
    con.execute("PRAGMA synchronous=FULL")
    con.execute("CREATE TABLE IF NOT EXISTS rows (id INTEGER PRIMARY KEY, doc BLOB)")
    doc = b"x" * 500
    begin = time.perf_counter()
    for _ in range(_COMMITS):
        con.execute("INSERT INTO rows (doc) VALUES (?)", (doc,))
    taken = time.perf_counter() - begin
    con.close()
    return _COMMITS / taken


def rows_per_s(path: Path) -> float:
    """A table made as a process makes it, to its last sync."""
    path.unlink(missing_ok=True)
    cells = [cell for n in range(_BLOCK) for cell in (n, f"row {n}", n / 7)]
    begin = time.perf_counter()
    table = TableFile(path)
    table.begin([("number", "integer"), ("text", "text"), ("value", "real")], {}, None)
    for at in range(0, _ROWS, _BLOCK):
        table.add(cells)
        table.commit(at)
    table.finish(_ROWS)
    return _ROWS / (time.perf_counter() - begin)


def measure() -> Report:
    """All three in turn."""
    names = (
        f"processes a second, {_CLIENTS} clients",
        "commits a second, SQLite alone",
        f"rows a second, {_BLOCK:,} and a cursor in each commit",
    )
    found: list[list[float]] = [[], [], []]
    with place() as folder, Sluice(folder) as ours:
        for turn in range(ROUNDS + 1):
            values = (
                processes_per_s(ours),
                commits_per_s(folder / "alone.db"),
                rows_per_s(folder / "rows.db"),
            )
            if turn:
                for each, value in zip(found, values, strict=True):
                    each.append(value)
    return Report(
        "Processes and rows",
        ("What", "median"),
        [[name, f"{median(each):,.0f}"] for name, each in zip(names, found, strict=True)],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
