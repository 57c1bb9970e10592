"""1,000 subscribers of the live channel, against nginx with nchan and as many.

Transitions: pauses and resumes of real jobs, by commands over the channel, so that our CPU has the
jobs and the database in it. nchan then publishes what one of our subscribers got, byte for byte and
at the same pace, with the time replaced; a round of each, in turns, at three paces. Only frames
with events count, and one with several counts once. An arrival is when the one process that reads
for all 1,000 gets to it. Every subscriber must get every transition, and a sample must know each
job as it is. Claims: at the middle pace at most 1.3 x nchan's CPU for each frame that is delivered;
at the fastest 99 of 100 are there within 50 ms of the event's own time, which is taken before the
commit. The fastest is more than nchan can follow: it writes several waiting frames at once, so that
each comes later and costs less, which is why its delays stand beside its CPU and no ratio is
claimed there.

Progress: 200 jobs that each take 50 steps a second. nchan publishes every step as a message of its
own, or as many as it manages; we overwrite in place, and a step that is overwritten before it is
sent counts for nothing. Claim: at least 10 x nchan's updates for each second of CPU, though ours
has the jobs in it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import websocket

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import (
    ROUNDS,
    Nchan,
    Report,
    Sluice,
    allow_many_files,
    at_least,
    at_most,
    cpu_s,
    main,
    place,
)
from benchmarks.subscribers import Subscribers, Taken
from jobs.rows import rfc3339

SUBSCRIBERS = 1000
PATH = "/v1/ws"
_SAMPLES = 50
_ROUND_S = 6.0
_JOBS = 32
_CALM, _MIDDLE, _FASTEST = 10, 30, 50  # commands a second, with two transitions each
_TIME = re.compile(r'(?<="at":")[^"]*(?=","row":)')  # of an event, not of what is in its row
_EVENTS_ONLY = '{"t":"sub","id":1,"rate":0.1}'
_ALL = '{"t":"sub","id":1}'

_BUSY_JOBS, _STEPS_PER_S = 200, 50
_BUSY_OPTIONS = (
    *("--slots", str(_BUSY_JOBS), "--max-sockets", "20000"),
    *("--log-level", "error"),  # it would warn of the time that it was made to stand still
)


class Round(NamedTuple):
    """One way, one time."""

    us: float  # CPU for each delivered frame, or for each update of progress
    delivered_per_s: float
    published_per_s: float
    events: float = 0.0  # in each frame
    delays_ms: Sequence[float] = ()


Recording = list[tuple[float, str]]


def paced(per_s: float) -> Iterator[int]:
    """Count for the length of a round, each number at its time, or late."""
    begin = time.perf_counter()
    for i in range(int(per_s * _ROUND_S)):
        wait_until(begin + i / per_s)
        if time.perf_counter() - begin > _ROUND_S:
            return
        yield i


def wait_until(at_s: float) -> None:
    """Sleep until then (``perf_counter``), or not at all."""
    if (left_s := at_s - time.perf_counter()) > 0:
        time.sleep(left_s)


def measured(
    pid: int, subscribers: Subscribers, publish: Callable[[], None]
) -> tuple[Round, Taken]:
    """Publish, wait until all is delivered, and look at what it has cost."""
    subscribers.settled()
    before, begin = cpu_s(pid), time.perf_counter()
    publish()
    seconds = time.perf_counter() - begin
    taken = subscribers.settled()
    used = cpu_s(pid) - before
    if taken.lost or taken.broken or taken.events != SUBSCRIBERS * taken.sample_events:
        raise RuntimeError(
            f"{taken.lost} connections lost; {taken.events:,} events delivered, of "
            f"{taken.sample_events:,} for each; {taken.broken}"
        )
    frames = max(1, taken.frames)
    one = Round(
        used / frames * 1e6,
        frames / seconds,
        frames / SUBSCRIBERS / seconds,
        taken.events / frames,
        taken.delays_ms,
    )
    return one, taken


class Ours:
    """Our server with jobs that sleep, and are paused and resumed."""

    def __init__(self, server: Sluice, subscribers: Subscribers, commands_per_s: float) -> None:
        self._server = server
        self._commands_per_s = commands_per_s
        self._subscribers = subscribers
        self._channel = websocket.create_connection(
            f"ws://127.0.0.1:{server.port}{PATH}",
            subprotocols=["jobs.v1.json"],
            suppress_origin=True,
            timeout=60,
        )
        self._channel.send('{"t":"hello"}')
        self._channel.recv()
        body = {"kind": "count", "params": {"steps": 10, "delay_s": 3600}}
        jobs = [server.call("POST", "/v1/jobs", body)[1]["id"] for _ in range(_JOBS)]
        self._commands = cycle([(job, verb) for verb in ("pause", "resume") for job in jobs])

    def round(self) -> tuple[Round, Recording]:
        """Command the jobs; also what a subscriber got."""
        one, taken = measured(self._server.pid, self._subscribers, self._publish)
        rows = self._server.call("GET", f"/v1/jobs?limit={_JOBS}")[1]["items"]
        if taken.states != {row["id"]: (row["state"], row["version"]) for row in rows}:
            raise RuntimeError("the sample does not know the jobs as they are")
        return one, taken.recorded

    def _publish(self) -> None:
        for _ in paced(self._commands_per_s):
            job, verb = next(self._commands)
            command = '{"t":"cmd","id":1,"op":"%s","job":"%s"}'
            self._channel.send(command % (verb, job))
            answer = self._channel.recv()
            while '"t":"ack"' not in answer:
                if '"t":"hb"' not in answer:
                    raise RuntimeError(answer)
                answer = self._channel.recv()


def nchan_round(nchan: Nchan, subscribers: Subscribers, recording: Recording) -> Round:
    """Publish the same, when it came, with the time of now."""
    parts = [(at_s - recording[0][0], _TIME.split(text)) for at_s, text in recording]

    def publish() -> None:
        begin = time.perf_counter()
        for at_s, around in parts:
            wait_until(begin + at_s)
            now = rfc3339(int(time.time() * 1e3)) or ""
            nchan.publish(now.join(around).encode())

    return measured(nchan.pid, subscribers, publish)[0]


def fan_out(commands_per_s: float) -> dict[str, list[Round]]:
    """Both in turns; the first round of each is not counted."""
    found: dict[str, list[Round]] = {"Sluice": [], "nchan": []}
    with (
        place() as folder,
        Sluice(folder, "--slots", "64", "--max-sockets", "20000") as server,
        Nchan(folder) as nchan,
        Subscribers(server.port, PATH, SUBSCRIBERS, _EVENTS_ONLY, _SAMPLES) as to_us,
        Subscribers(nchan.port, nchan.path, SUBSCRIBERS, "", _SAMPLES) as to_nchan,
    ):
        to_us.ready()
        to_nchan.ready()
        ours = Ours(server, to_us, commands_per_s)
        _, recording = ours.round()
        for turn in range(ROUNDS + 1):
            for name in ("Sluice", "nchan") if turn % 2 else ("nchan", "Sluice"):
                if name == "nchan":
                    one = nchan_round(nchan, to_nchan, recording)
                else:
                    one, recording = ours.round()
                if turn:
                    found[name].append(one)
    return found


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """Nothing of the process runs meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def our_progress(server: Sluice, subscribers: Subscribers) -> Round:
    """The latest values that are delivered while the jobs run."""
    subscribers.take()
    before, begin = cpu_s(server.pid), time.perf_counter()
    time.sleep(_ROUND_S)
    taken = subscribers.take()
    used, seconds = cpu_s(server.pid) - before, time.perf_counter() - begin
    delivered = max(1.0, taken.progress * taken.progress_rows)
    return Round(used / delivered * 1e6, delivered / seconds, taken.updates / seconds)


def nchan_progress(nchan: Nchan, subscribers: Subscribers) -> Round:
    """Each step as a message, as many as there would be, or as nchan manages."""
    subscribers.take()
    published = delivered = 0
    before, begin = cpu_s(nchan.pid), time.perf_counter()
    for i in paced(_BUSY_JOBS * _STEPS_PER_S):
        row = b'{"t":"p","u":[[%d,2,%d,49.873,null,1000000000,null,null]],"now":%d}'
        nchan.publish(row % (100 + i % _BUSY_JOBS, 1000 + i // _BUSY_JOBS, time.time() * 1e3))
        published += 1
    seconds = time.perf_counter() - begin
    while more := subscribers.take().progress:
        delivered += more
        time.sleep(0.2)
    used = cpu_s(nchan.pid) - before
    return Round(used / max(1, delivered) * 1e6, delivered / seconds, published / seconds)


def progress() -> dict[str, list[Round]]:
    """Both in turns; our jobs stand still while nchan publishes."""
    found: dict[str, list[Round]] = {"Sluice": [], "nchan": []}
    with (
        place() as folder,
        Sluice(folder, *_BUSY_OPTIONS) as server,
        Nchan(folder) as nchan,
        Subscribers(server.port, PATH, SUBSCRIBERS, _ALL) as to_us,
        Subscribers(nchan.port, nchan.path, SUBSCRIBERS) as to_nchan,
    ):
        to_us.ready()
        to_nchan.ready()
        params = {"steps": 10**9, "delay_s": 1 / _STEPS_PER_S}
        for _ in range(_BUSY_JOBS):
            server.call("POST", "/v1/jobs", {"kind": "count", "params": params})
        for turn in range(ROUNDS + 1):
            for name in ("Sluice", "nchan") if turn % 2 else ("nchan", "Sluice"):
                if name == "nchan":
                    with standing_still(server.pid):
                        one = nchan_progress(nchan, to_nchan)
                    time.sleep(1.0)  # until our jobs are in step again
                else:
                    one = our_progress(server, to_us)
                if turn:
                    found[name].append(one)
    return found


def idle_delays_ms() -> list[float]:
    """How late the idle machine wakes a process that asked for it."""
    late = []
    for _ in range(1000):
        begin = time.perf_counter()
        time.sleep(0.001)
        late.append((time.perf_counter() - begin - 0.001) * 1e3)
    return late


def _percentiles(delays_ms: Sequence[float]) -> tuple[float, float]:
    return median(delays_ms), quantiles(delays_ms, n=100)[98]


def _row(name: str, what: str, rounds: Sequence[Round]) -> list[str]:
    delays = [_percentiles(one.delays_ms) for one in rounds if one.delays_ms]
    return [
        f"{name}, {what}",
        f"{median(one.us for one in rounds):.2f}",
        f"{median(one.published_per_s for one in rounds):,.0f}",
        f"{median(one.delivered_per_s for one in rounds):,.0f}",
        f"{median(one.events for one in rounds):.2f}" if delays else "",
        f"{median(p50 for p50, _ in delays):.1f}" if delays else "",
        f"{median(p99 for _, p99 in delays):.1f}" if delays else "",
    ]


def _ratio(a: Sequence[Round], b: Sequence[Round]) -> float:
    return median(one.us / other.us for one, other in zip(a, b, strict=True))


def measure() -> Report:
    """Transitions first, then progress."""
    allow_many_files()
    p50, p99 = _percentiles(idle_delays_ms())
    calm, middle, fastest = (fan_out(pace) for pace in (_CALM, _MIDDLE, _FASTEST))
    rows = progress()
    late = median(_percentiles(one.delays_ms)[1] for one in fastest["Sluice"])
    return Report(
        f"{SUBSCRIBERS:,} subscribers of the live channel",
        (
            *("What", "server CPU us each", "made a second", "delivered a second"),
            *("events in each", "p50 ms", "p99 ms"),
        ),
        [
            *(_row(name, "frames with events, calm", rounds) for name, rounds in calm.items()),
            *(_row(name, "the same, middle pace", rounds) for name, rounds in middle.items()),
            *(_row(name, "the same, fastest", rounds) for name, rounds in fastest.items()),
            *(_row(name, "updates of progress", rounds) for name, rounds in rows.items()),
            ["an idle process, woken", "", "", "", "", f"{p50:.1f}", f"{p99:.1f}"],
        ],
        [
            at_most("CPU for each frame, Sluice : nchan", _ratio(*middle.values()), 1.3),
            at_most("from the event's time to the client, p99", late, 50.0, "ms"),
            at_least("updates for the same CPU, Sluice : nchan", 1 / _ratio(*rows.values()), 10.0),
        ],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
