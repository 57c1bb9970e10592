"""How many jobs that do nothing a second, from submission to the end of the last one.

Claim: submitted by ``manager.start``, at least 6 x the best of arq, SAQ and RQ. Ours run in one
process, with the lane, rows in SQLite (synchronous=FULL) and all events in the log. A peer's jobs
are submitted by its own client and run by one worker, each a process of its own, over a Redis that
syncs its log before it answers (appendfsync always). All is kept on the disk of the checkout, for
in memory no sync costs anything. Each queue has what suits it best: the peers 100 jobs at once,
hiredis and, where they can use it, uvloop. The second row is the whole service: lists of 1,000 by
``POST /v1/jobs`` on one connection.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import ROOT, ROUNDS, Report, Sluice, at_least, main, place
from benchmarks.domain import Nothing, a_kind, domain
from jobs.manager import Limits
from jobs.states import SUCCEEDED
from server import collect_rarely

_DISK = ROOT / "test-output"
_PEERS = {"arq": 1500, "SAQ": 4000, "RQ": 300}  # jobs in a round: one or two seconds
_START, _POST = "Sluice, manager.start", "Sluice, POST /v1/jobs"
_OURS = 8000
_SLOTS = 500
_STARTING = 250  # callers of manager.start at once
_LIST = 1000  # starts in a request
_WIDTH = 100  # jobs of a peer at once
_FIRST = 200  # jobs of a peer before those that count


# The peers


def peers() -> Path:
    """The Python of the peers' own virtual environment, made once in test-output/."""
    folder = _DISK / "queues"
    folder.mkdir(parents=True, exist_ok=True)
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = (ROOT / "benchmarks" / "requirements.txt").read_bytes()
    with (_DISK / "queues.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_bytes() != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir"]
            named = ["--disable-pip-version-check", "-r", "benchmarks/requirements.txt"]
            subprocess.run([*pip, *named], check=True, cwd=ROOT)
            stamp.write_bytes(wanted)
    return python


@contextmanager
def redis(folder: Path) -> Iterator[Path]:
    """A Redis that answers when its log is on the disk; its socket."""
    folder.mkdir()
    at = folder / "socket"
    options = ("--port", "0", "--unixsocket", str(at), "--dir", str(folder), "--save", "")
    durable = ("--appendonly", "yes", "--appendfsync", "always")
    server = subprocess.Popen(["redis-server", *options, *durable], stdout=subprocess.DEVNULL)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            while client.connect_ex(str(at)):
                time.sleep(0.01)
        yield at
    finally:
        server.terminate()
        server.wait(30)


def peer_per_s(python: Path, at: Path, name: str, n: int) -> float:
    """Jobs a second of a peer, with fresh ends."""
    with _end(python, at, name, "work", n) as worker, _end(python, at, name, "submit", n) as client:
        _line(worker)
        _line(worker)  # the first lot is done
        assert client.stdin is not None
        client.stdin.write("\n")
        client.stdin.flush()
        began = float(_line(client))
        return n / (float(_line(worker)) - began)


@contextmanager
def _end(python: Path, at: Path, name: str, role: str, n: int) -> Iterator[subprocess.Popen[str]]:
    numbers = (str(_WIDTH), str(_FIRST), str(n))
    end = subprocess.Popen(
        [
            str(python),
            str(ROOT / "benchmarks" / "queues_peer.py"),
            name.lower(),
            role,
            str(at),
            *numbers,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield end
    finally:
        end.kill()
        end.communicate()


def _line(end: subprocess.Popen[str]) -> str:
    assert end.stdout is not None
    line = end.stdout.readline()
    if not line:
        raise RuntimeError("a peer has ended by itself")
    return line


# Ours


async def nothing(_: Any, __: Nothing) -> None:
    """The job."""


async def _ours_per_s(folder: Path) -> float:
    limits = Limits(slots=_SLOTS, max_queued=2 * _OURS)
    async with domain(folder, limits, a_kind("nothing", nothing)) as ours:
        left = iter(range(_OURS))

        async def start() -> None:
            for _ in left:
                await ours.start("nothing")

        begin = time.perf_counter()
        await asyncio.gather(*(start() for _ in range(_STARTING)))
        await ours.ended(_OURS)
        return _OURS / (time.perf_counter() - begin)


def _posted_per_s(ours: Sluice) -> float:
    body = json.dumps([{"kind": "count", "params": {"steps": 0}}] * _LIST)
    before = _succeeded(ours)
    connection = ours.connection()
    begin = time.perf_counter()
    for _ in range(_OURS // _LIST):
        connection.request("POST", "/v1/jobs", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 201:
            raise RuntimeError(f"POST {answer.status}")
    while _succeeded(ours) < before + _OURS:
        time.sleep(0.01)
    taken = time.perf_counter() - begin
    connection.close()
    return _OURS / taken


def _succeeded(ours: Sluice) -> int:
    return int(ours.call("GET", "/v1/jobs?limit=1")[1]["counts"].get(SUCCEEDED, 0))


def measure() -> Report:
    """All in turn."""
    collect_rarely()  # as the service does it
    python = peers()
    found: dict[str, list[float]] = {name: [] for name in (_START, _POST, *_PEERS)}
    ratios: list[float] = []
    quiet = ("--slots", str(_SLOTS), "--log-level", "error")
    with (
        place(_DISK) as folder,
        redis(folder / "redis") as at,
        Sluice(folder, *quiet) as service,
    ):
        for turn in range(ROUNDS + 1):
            here = folder / f"ours-{turn}"
            here.mkdir()
            now = {_START: asyncio.run(_ours_per_s(here)), _POST: _posted_per_s(service)}
            now |= {name: peer_per_s(python, at, name, n) for name, n in _PEERS.items()}
            if turn:
                for name, value in now.items():
                    found[name].append(value)
                ratios.append(now[_START] / max(now[name] for name in _PEERS))
    best = max(median(found[name]) for name in _PEERS)
    return Report(
        "No-op jobs",
        ("Queue", "jobs/s", "best peer ="),
        [
            [name, f"{median(values):,.0f}", f"{median(values) / best:.2f} x"]
            for name, values in found.items()
        ],
        [at_least("manager.start : best of arq, SAQ and RQ", median(ratios), 6.0)],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
