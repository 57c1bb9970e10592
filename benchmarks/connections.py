"""10,000 connections of the live channel on one process that has nothing to tell them.

Each has said hello, subscribed to everything and got its snapshot; they answer pings and nothing
else. Claims: the server's memory (PSS) grows by at most 20 KiB for each, all 10,000 hold for a
minute, each gets a heartbeat at least every 20 seconds, and 99 of 100 small requests are answered
within 25 ms meanwhile. nchan has the same connections afterwards; it pings each 20 seconds.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import (
    Nchan,
    Report,
    Sluice,
    Verdict,
    allow_many_files,
    at_most,
    cpu_s,
    main,
    place,
    pss_kib,
)
from benchmarks.subscribers import Subscribers, Taken

CONNECTIONS = 10_000
_PROCESSES = 4
_HOLD_S = 60.0
_BEAT_S = 20.0
_ASK_S = 0.1
_SUBSCRIBE = '{"t":"sub","id":1}'


class Held(NamedTuple):
    """What one server needed for all connections."""

    kib: float  # for each
    connect_s: float
    cpu_percent: float  # of one core, while nothing happens
    taken: list[Taken]
    health_ms: float = 0.0  # p99
    lag_ms: float = 0.0  # the worst that the server told of its loop

    @property
    def open(self) -> int:
        """Connections that were there at the end."""
        return sum(one.open for one in self.taken)

    @property
    def beats(self) -> int:
        """Heartbeats of the connection that got the fewest."""
        return min(one.least_beats for one in self.taken)

    def row(self, name: str) -> list[str]:
        """A line of the table; only our server was asked for the last two."""
        return [
            name,
            f"{self.open:,}",
            f"{self.kib:.1f}",
            f"{self.connect_s:.1f}",
            f"{self.cpu_percent:.1f}",
            *([f"{self.health_ms:.1f}", f"{self.lag_ms:.1f}"] if self.health_ms else ["", ""]),
        ]


def hold(server: Sluice | Nchan, path: str, subscribe: str) -> Held:
    """Connect all, wait, and look."""
    memory_kib, begin = pss_kib(server.pid), time.perf_counter()
    with ExitStack() as stack:
        crowds = [
            stack.enter_context(
                Subscribers(server.port, path, CONNECTIONS // _PROCESSES, subscribe, samples=0)
            )
            for _ in range(_PROCESSES)
        ]
        for crowd in crowds:
            crowd.ready()
        connect_s = time.perf_counter() - begin
        time.sleep(2.0)
        each_kib = (pss_kib(server.pid) - memory_kib) / CONNECTIONS
        for crowd in crowds:
            crowd.take()
        before, begin = cpu_s(server.pid), time.perf_counter()
        if isinstance(server, Sluice):
            health_ms, lag_ms = _ask(server)
        else:
            health_ms = lag_ms = 0.0
            time.sleep(_HOLD_S)
        percent = (cpu_s(server.pid) - before) / (time.perf_counter() - begin) * 100
        taken = [crowd.take() for crowd in crowds]
    return Held(each_kib, connect_s, percent, taken, health_ms, lag_ms)


def _ask(server: Sluice) -> tuple[float, float]:
    """Ask for something small all the time: its p99, and how late the loop was at the worst."""
    connection = server.connection()
    end = time.perf_counter() + _HOLD_S
    taken_ms, lag_ms = [], 0.0
    while (begin := time.perf_counter()) < end:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}")
        taken_ms.append((time.perf_counter() - begin) * 1e3)
        if len(taken_ms) % 10 == 0:
            lag_ms = max(lag_ms, server.call("GET", "/v1/status")[1]["loop_lag_ms"])
        time.sleep(_ASK_S)
    connection.close()
    return quantiles(taken_ms, n=100)[98], lag_ms


def measure() -> Report:
    """Ours, then nchan."""
    allow_many_files()
    with place() as folder:
        with Sluice(folder, "--max-sockets", str(2 * CONNECTIONS)) as server:
            for _ in range(20):
                server.call("POST", "/v1/jobs", {"kind": "count", "params": {"steps": 0}})
            ours = hold(server, "/v1/ws", _SUBSCRIBE)
        with Nchan(folder) as nchan:
            peer = hold(nchan, nchan.path, "")
    least = int(_HOLD_S / _BEAT_S)
    return Report(
        f"{CONNECTIONS:,} idle connections of the live channel",
        (
            *("Server", "connections", "KiB each", "connected in s", "CPU % of a core"),
            *("p99 of GET /healthz, ms", "worst lag of the loop, ms"),
        ),
        [ours.row("Sluice"), peer.row("nchan")],
        [
            at_most("memory of a connection", ours.kib, 20.0, "KiB"),
            Verdict(
                f"connections after {_HOLD_S:.0f} s",
                f"{ours.open:,}",
                f"{CONNECTIONS:,}",
                ours.open == CONNECTIONS,
            ),
            Verdict(
                "heartbeats of the connection that got the fewest",
                str(ours.beats),
                f"at least {least}",
                ours.beats >= least,
            ),
            at_most("p99 of GET /healthz meanwhile", ours.health_ms, 25.0, "ms"),
        ],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
