"""What subscribers see: a ring over the event log, the latest progress, and cursors into both.

Strategy. The hub tails the log once, whoever writes it, and keeps the newest events in a ring. A
subscriber is a cursor (the seq it has seen), not a queue: it asks for what lies behind its cursor
whenever its socket has room, from the ring, or from the log when it lags further. Progress is a
map with one row a job, ordered by when the row was last replaced; a subscriber remembers only the
stamp of the newest one it has sent. So one that sleeps costs nothing and misses no transition.

``Subscription`` is pure: it decides what belongs to a subscriber and builds the frames.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any

import msgspec

from jobs import states
from jobs.files import now_ms
from jobs.manager import Mark
from jobs.rows import rfc3339
from storage import Boot, Event, Job, State

RING = 4096
_MARK_S = 60.0
_encode = msgspec.json.Encoder().encode


class Select(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which jobs a subscriber wants; every field that is given must match."""

    owner: str | None = None
    kind: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()

    def takes(self, job: Job) -> bool:
        """Whether a job as it is now belongs to it."""
        return (not self.kind or job.kind in self.kind) and (
            not self.state or job.state in self.state
        )


class Hub:
    """Fans events and progress out to everyone who listens."""

    def __init__(self, state: State, boot: Boot) -> None:
        self.epoch = boot.epoch
        self.seq = boot.seq
        self._state = state
        self._ring: deque[Event] = deque(maxlen=RING)
        self._marks: OrderedDict[str, tuple[int, float, Mark]] = OrderedDict()
        self._stamp = 0
        self._listeners: set[Callable[[], None]] = set()

    async def run(self) -> None:
        """Tail the log and the progress until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tail())
            group.create_task(self._collect())

    async def _tail(self) -> None:
        while True:
            await self._state.wait(self.seq)
            while events := await self._state.events(self.seq, 500):
                self.seq = events[-1].seq
                self._ring.extend(events)
                for event in events:
                    if event.to in states.FINAL or event.to == states.DELETED:
                        self._marks.pop(event.job, None)
                self._wake()

    async def _collect(self) -> None:
        async for marks in self._state.progress_in():
            for mark in marks:
                self._stamp += 1
                self._marks[mark[0]] = (self._stamp, monotonic(), Mark(*mark))
                self._marks.move_to_end(mark[0])
            self._forget_old()
            self._wake()

    def _forget_old(self) -> None:
        """Drop progress that was not replaced for long: the job's row has it, or the job ended."""
        limit = monotonic() - _MARK_S
        while self._marks and next(iter(self._marks.values()))[1] < limit:
            self._marks.popitem(last=False)

    def listen(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` whenever there may be something new, until ``unlisten``."""
        self._listeners.add(wake)

    def unlisten(self, wake: Callable[[], None]) -> None:
        """Stop calling ``wake``."""
        self._listeners.discard(wake)

    async def after(self, seq: int, n: int) -> list[Event]:
        """Up to ``n`` events behind a cursor, from the ring if it reaches back that far."""
        if seq >= self.seq:
            return []
        if self._ring and self._ring[0].seq <= seq + 1:
            # By search: the events of a deleted job leave holes in the numbers.
            begin = bisect_right(self._ring, seq, key=lambda event: event.seq)
            return [self._ring[i] for i in range(begin, min(begin + n, len(self._ring)))]
        return await self._state.events(seq, n)

    async def resumable(self, epoch: str | None, seq: int) -> str | None:
        """Why a cursor can't be honoured (epoch, retention), or None if it can."""
        if epoch != self.epoch or seq > self.seq:
            return "epoch"
        return "retention" if seq < await self._state.oldest() - 1 else None

    def marks(self, stamp: int) -> tuple[list[Mark], int]:
        """Progress that was replaced after ``stamp``, oldest first, and the newest stamp."""
        newer = []
        for at, _, mark in reversed(self._marks.values()):
            if at <= stamp:
                break
            newer.append(mark)
        newer.reverse()
        return newer, self._stamp

    def _wake(self) -> None:
        for wake in list(self._listeners):
            wake()


class Subscription:
    """One subscriber's filter and cursor; pure."""

    def __init__(self, id: int, owner: str, select: Select, seq: int, stamp: int = 0) -> None:
        self.id = id
        self.owner = owner
        self.select = select
        self.seq = seq  # everything up to here was looked at
        self.sent = seq  # what the subscriber knows its cursor to be
        self.stamp = stamp

    def wants(self, event: Event) -> bool:
        """Whether the event belongs to it: by its old or its new state, so that leaving shows."""
        select = self.select
        return (
            event.owner == self.owner
            and select.owner in (None, event.owner)
            and (not select.kind or event.kind in select.kind)
            and (not select.jobs or event.job in select.jobs)
            and (not select.state or event.to in select.state or event.from_ in select.state)
        )

    def wants_mark(self, mark: Mark) -> bool:
        """Whether the progress belongs to it."""
        select = self.select
        return (
            mark.owner == self.owner
            and select.owner in (None, mark.owner)
            and (not select.kind or mark.kind in select.kind)
            and (not select.jobs or mark.job in select.jobs)
            and (not select.state or mark.state in select.state)
        )

    def frames(self, events: Sequence[Event]) -> list[bytes]:
        """``ev`` frames for events that follow the cursor; each points at the one before it."""
        frames = []
        for event in events:
            if self.wants(event):
                frames.append(ev_frame(self.id, event, self.sent))
                self.sent = event.seq
            self.seq = event.seq
        return frames

    def mark(self) -> bytes | None:
        """A ``mark`` frame if events were looked at that did not belong to it."""
        if self.sent == self.seq:
            return None
        self.sent = self.seq
        return _encode({"t": "mark", "id": self.id, "s": self.seq})


def ev_frame(id: int, event: Event, previous: int) -> bytes:
    """One transition; the whole row, to replace the one before."""
    head = {
        "t": "ev",
        "id": id,
        "s": event.seq,
        "p": previous,
        "from": event.from_,
        "to": event.to,
        "cause": event.cause,
        "at": rfc3339(event.at),
    }
    return _encode(head)[:-1] + b',"row":' + bytes(event.row) + b"}"


def progress_frame(marks: Iterable[Mark]) -> bytes:
    """Latest progress of many jobs: [h, v, done, rate, eta, total, phase, message] each."""
    rows = [
        (
            mark.h,
            mark.version,
            mark.progress.done,
            mark.progress.rate_per_s,
            mark.progress.eta_s,
            mark.progress.total,
            mark.progress.phase,
            mark.progress.message,
        )
        for mark in marks
    ]
    return _encode({"t": "p", "u": rows, "now": now_ms()})


def snap_frame(
    id: int,
    epoch: str,
    seq: int,
    page: int,
    last: bool,
    rows: Sequence[dict[str, Any]],
    counts: dict[str, int],
    cursor: int | None,
) -> bytes:
    """Rows as they are at ``seq`` or later; ``cursor`` asks for the next page by ``more``."""
    return _encode(
        {
            "t": "snap",
            "id": id,
            "epoch": epoch,
            "s": seq,
            "page": page,
            "last": last,
            "cursor": cursor,
            "jobs": rows,
            "counts": counts,
        }
    )
