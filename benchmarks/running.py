"""A thousand running processes: how soon one obeys, and how long the others keep the loop.

Claims, at the 99th percentile: at most 100 ms from sending a pause or a cancel until ``GET`` shows
the job paused or cancelled, for any of 1,000 that run, half of them computing all the time and half
asleep between steps; and at most 20 ms (or 5 x the idle server) for a ``GET /healthz``, which waits
for the loop like everything else, while eight compute. Nobody else could do either: the peer is the
same server with nothing to do.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import time
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

from benchmarks.common import ROUNDS, Report, Sluice, at_most, main, place

_COMPUTING = {"steps": 10**12, "delay_s": 0}
_ASLEEP = {"steps": 10**12, "delay_s": 0.5}
_MANY = 1000
_FEW = 8
_COMMANDS = 100  # of each verb in a round
_REQUESTS = 1000  # for the loop's lag in a round


class Client:
    """One kept connection."""

    def __init__(self, ours: Sluice) -> None:
        self._connection = ours.connection()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request: the status and the answer."""
        sent = None if body is None else json.dumps(body)
        self._connection.request(method, path, sent, {"Content-Type": "application/json"})
        answer: http.client.HTTPResponse = self._connection.getresponse()
        return answer.status, json.loads(answer.read())

    def start(self, params: dict[str, Any], n: int) -> list[str]:
        """Start so many and wait until all run."""
        made = self.call("POST", "/v1/jobs", [{"kind": "count", "params": params}] * n)[1]
        while self.counts().get("queued", 0):
            time.sleep(0.02)
        return [str(item["job"]["id"]) for item in made["items"]]

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        counts: dict[str, int] = self.call("GET", "/v1/jobs?limit=1")[1]["counts"]
        return counts

    def cancel_all(self) -> None:
        """Cancel what has not ended, and wait for it."""
        self.call("POST", "/v1/jobs/cancel", {"filter": {"kind": "count"}})
        while any(self.counts().get(state, 0) for state in ("running", "cancelling")):
            time.sleep(0.02)

    def effective_ms(self, job: str, verb: str, state: str) -> float:
        """From sending a command until the job is in that state."""
        begin = time.perf_counter()
        status, row = self.call("POST", f"/v1/jobs/{job}/{verb}")
        if status not in (200, 202):
            raise RuntimeError(f"{verb}: {status} {row}")
        while row["state"] != state:
            row = self.call("GET", f"/v1/jobs/{job}")[1]
        return (time.perf_counter() - begin) * 1e3

    def lags_ms(self) -> list[float]:
        """How long requests take that do nothing."""
        taken = []
        for _ in range(_REQUESTS):
            begin = time.perf_counter()
            self.call("GET", "/healthz")
            taken.append((time.perf_counter() - begin) * 1e3)
        return taken


def p99(values: Sequence[float]) -> float:
    """The 99th percentile."""
    return quantiles(values, n=100)[98]


def obeyed_ms(client: Client) -> tuple[list[float], list[float]]:
    """Pauses and cancels of any of a thousand."""
    jobs = client.start(_COMPUTING, _MANY // 2) + client.start(_ASLEEP, _MANY // 2)
    random.shuffle(jobs)
    pauses = [client.effective_ms(job, "pause", "paused") for job in jobs[:_COMMANDS]]
    cancels = [
        client.effective_ms(job, "cancel", "cancelled") for job in jobs[_COMMANDS : 2 * _COMMANDS]
    ]
    client.cancel_all()
    return pauses, cancels


def measure() -> Report:
    """Idle, eight that compute, a thousand; in turn."""
    pauses: list[float] = []
    cancels: list[float] = []
    idle: list[float] = []
    busy: list[float] = []
    quiet = ("--slots", "1024", "--log-level", "error")
    with place() as folder, Sluice(folder, *quiet) as ours, Client(ours) as client:
        for turn in range(ROUNDS + 1):
            still = client.lags_ms()
            client.start(_COMPUTING, _FEW)
            computing = client.lags_ms()
            client.cancel_all()
            paused, cancelled = obeyed_ms(client)
            if turn:
                idle.append(p99(still))
                busy.append(p99(computing))
                pauses += paused
                cancels += cancelled
    rows = [
        ("GET /healthz, idle", idle),
        (f"GET /healthz, {_FEW} compute", busy),
    ]
    return Report(
        "A thousand running processes",
        ("What", "median ms", "p99 ms"),
        [
            *([name, "", f"{median(values):.1f}"] for name, values in rows),
            *(
                [f"{verb} of one of {_MANY:,}", f"{median(values):.1f}", f"{p99(values):.1f}"]
                for verb, values in (("pause", pauses), ("cancel", cancels))
            ),
        ],
        [
            at_most(f"pause of one of {_MANY:,}, p99", p99(pauses), 100.0, "ms"),
            at_most(f"cancel of one of {_MANY:,}, p99", p99(cancels), 100.0, "ms"),
            at_most(
                f"lag while {_FEW} compute, p99", median(busy), max(20.0, 5 * median(idle)), "ms"
            ),
        ],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
