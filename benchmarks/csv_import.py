"""A CSV file of a million rows made a table, against ``.import`` of the sqlite3 shell.

Claims: ``csv.import`` makes at least half the rows a second, from request to end of the job, of a
file without quotes and of one in which a text of each row is quoted. The peer makes a new database
of the same file (``sqlite3 new.db ".import --csv file t"``): all columns are text there, nothing is
checked, and it is one transaction. Ours tells and checks the types (an integer, a real, a date, a
boolean, three texts), commits ten times a second with the job's cursor, syncs, and publishes.
ROWS: how many.
"""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.common import ROUNDS, Report, Sluice, at_least, main, place

_ROWS = int(os.environ.get("ROWS", "1000000"))
_TICK_S = 0.02


def make(path: Path, quoted: bool) -> None:
    """Seven columns, some 60 bytes a row."""
    dice = random.Random(1)
    quote = '"' if quoted else ""
    with path.open("w", encoding="utf-8") as file:
        file.write("id,name,city,price,ordered,open,note\n")
        for n in range(_ROWS):
            file.write(
                f"{n},{quote}customer {dice.randrange(100_000)}{quote},"
                f"{dice.choice(('Rome', 'Oslo', 'Bern', 'Lima'))},{dice.randrange(100_000) / 100},"
                f"2026-{dice.randrange(1, 13):02d}-{dice.randrange(1, 29):02d},"
                f"{dice.choice(('true', 'false'))},note {n % 97}\n"
            )


def peer_s(path: Path) -> float:
    """The sqlite3 shell, as a process of its own."""
    made = path.with_suffix(".peer")
    made.unlink(missing_ok=True)
    begin = time.perf_counter()
    subprocess.run(["sqlite3", made, f".import --csv {path} t"], check=True)
    taken = time.perf_counter() - begin
    _check(made, "t")
    return taken


def ours_s(ours: Sluice, folder: Path, file: str) -> float:
    """From the request to the success of the job."""
    begin = time.perf_counter()
    status, job = ours.call(
        "POST", "/v1/jobs", {"kind": "csv.import", "params": {"source": file, "table": "made"}}
    )
    if status != 201:
        raise RuntimeError(job)
    while job["state"] != "succeeded":
        if job["state"] == "failed":
            raise RuntimeError(job["error"])
        time.sleep(_TICK_S)
        job = ours.call("GET", f"/v1/jobs/{job['id']}")[1]
    taken = time.perf_counter() - begin
    _check(folder / "sluice" / "uploads" / job["result"]["file"] / "made", "rows")
    ours.remove_newest_file()
    return taken


def _check(path: Path, table: str) -> None:
    con = sqlite3.connect(path)
    (found,) = con.execute(f"SELECT count(*) FROM {table}").fetchone()
    con.close()
    if found != _ROWS:
        raise RuntimeError(f"{found:,} rows in the table")


def measure() -> Report:
    """Both kinds of files, the two ways in turn."""
    rows, verdicts = [], []
    with place() as folder, Sluice(folder) as ours:
        for name in ("plain", "quoted"):
            path = folder / f"{name}.csv"
            make(path, name == "quoted")
            subprocess.run(
                [sys.executable, "server.py", "--data", str(folder / "sluice"), "add", str(path)],
                check=True,
                stdout=subprocess.DEVNULL,
                cwd=Path(__file__).parent.parent,
            )
            file = ours.newest_file()
            found: list[tuple[float, float]] = []
            for turn in range(ROUNDS + 1):
                if turn % 2:
                    ours_taken, peer_taken = ours_s(ours, folder, file), peer_s(path)
                else:
                    peer_taken, ours_taken = peer_s(path), ours_s(ours, folder, file)
                if turn:
                    found.append((peer_taken, ours_taken))
            ratio = median(peer / own for peer, own in found)
            for way, at in (("sqlite3 .import", 0), ("csv.import", 1)):
                rate = median(_ROWS / each[at] for each in found)
                shown = "" if at == 0 else f"{ratio:.2f} x"
                rows.append([f"{name}: {way}", f"{rate:,.0f}", shown])
            verdicts.append(at_least(f"{name}, csv.import : sqlite3", ratio, 0.5))
    return Report(
        f"Import of {_ROWS:,} rows", ("What", "rows a second", "to the peer"), rows, verdicts
    )


if __name__ == "__main__":
    sys.exit(main(measure))
