"""What subscribers read: a ring over the event log, and the latest progress.

Strategy. The hub tails the log once, whoever writes it, and keeps the newest events in a ring. A
subscription (``jobs/channel.py``) asks for the next frame behind its cursor whenever its connection
has room: from the ring at once, or from the log when it lags further. So one that sleeps costs
nothing and misses no transition, and one frame serves all that stand at the same place.

Who wants to be woken gives one function; it is called after every change and must be short.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from itertools import islice
from time import monotonic
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

from jobs import states
from jobs.channel import (
    BATCH_EVENTS,
    Batch,
    Cursor,
    Door,
    Latest,
    Said,
    Select,
    Subscription,
    Sweep,
    View,
    Why,
    progress_text,
    why_reset,
)
from jobs.files import now_ms
from jobs.manager import Mark
from storage import Boot, Event, State

RING = 4096
_VIEWS = 64  # for which frames are kept at once
_MARK_S = 60.0  # after which progress that is not replaced is dropped


class Lost(Exception):
    """What follows the cursor was forgotten while its subscriber was away."""


class Place(Protocol):
    """Where someone, or many, stand in a view."""

    view: View
    seq: int
    sent: int


class _Told(NamedTuple):
    """A progress frame (or None: there is nothing to tell), and the sweep after it."""

    frame: bytes | None
    sweep: Sweep


class Hub:
    """The log and the progress, for everyone who watches."""

    def __init__(self, state: State, boot: Boot) -> None:
        self.epoch = boot.epoch
        self.seq = boot.seq
        self.latest = Latest()
        self._state = state
        self._ring: deque[Event] = deque(maxlen=RING)
        self._ring_from = boot.seq  # every event after it is in the ring
        self._listeners: set[Callable[[], None]] = set()
        self._views: WeakValueDictionary[tuple[int, str, Select, Door], View] = (
            WeakValueDictionary()
        )
        self._built: set[View] = set()
        self._told: dict[tuple[tuple[View, ...], Sweep], _Told] = {}

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
                if len(self._ring) == RING:
                    self._ring_from = self._ring[0].seq - 1
                for event in events:
                    if event.to in states.FINAL or event.to == states.DELETED:
                        self.latest.drop(event.job)
                self._wake()

    async def _collect(self) -> None:
        async for marks in self._state.progress_in():
            now = monotonic()
            for mark in marks:
                self.latest.put(Mark(*mark), now)
            self.latest.forget(now - _MARK_S)
            self._wake()

    def listen(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` whenever there may be something new, until ``unlisten``."""
        self._listeners.add(wake)

    def unlisten(self, wake: Callable[[], None]) -> None:
        """Stop calling ``wake``."""
        self._listeners.discard(wake)

    def _wake(self) -> None:
        for wake in list(self._listeners):
            wake()

    @property
    def cursor(self) -> Cursor:
        """The place behind the newest event."""
        return Cursor(self.epoch, self.seq)

    async def why_reset(self, cursor: Cursor) -> Why | None:
        """Why a cursor can't be honoured (epoch, retention), or None if it can."""
        return why_reset(cursor, self.epoch, self.seq, await self._state.oldest())

    def view(self, id: int, owner: str, select: Select, door: Door) -> View:
        """The view of all subscriptions that are alike; it lives as long as one of them."""
        key = (id, owner, select, door)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = View(id, owner, select, door)
        return view

    def next(self, sub: Place) -> Batch | None:
        """What follows a subscription's cursor, or None if only the log has it (see ``read``)."""
        batch = sub.view.memo.get((sub.seq, sub.sent))
        if batch is not None:
            return batch
        if sub.seq < self._ring_from:
            return None
        # By search: what is at a place can't be counted, for a log may have holes in its numbers.
        at = bisect_right(self._ring, sub.seq, key=lambda event: event.seq)
        self._make_room()
        self._built.add(sub.view)
        return sub.view.batch(islice(self._ring, at, None), sub.seq, sub.sent)

    async def read(self, sub: Subscription) -> Batch:
        """``next`` for one that lags behind the ring. Raises Lost."""
        events = await self.after(sub.seq, BATCH_EVENTS)
        if not events:
            return Batch(None, self.seq, sub.sent)
        self._make_room()
        self._built.add(sub.view)
        return sub.view.batch(events, sub.seq, sub.sent)

    async def after(self, seq: int, n: int) -> list[Event]:
        """Up to ``n`` events behind a place in the log. Raises Lost if they are not all there."""
        if seq >= self._ring_from:
            at = bisect_right(self._ring, seq, key=lambda event: event.seq)
            return list(islice(self._ring, at, at + n))
        events = await self._state.events(seq, n)
        if await self._state.oldest() > seq + 1:  # asked afterwards: it may just have happened
            raise Lost
        return events

    def progress(self, views: tuple[View, ...], sweep: Sweep) -> tuple[bytes | None, Sweep]:
        """The next progress frame of a subscriber with these views, and its sweep after it."""
        if not views or (sweep.h == 0 and sweep.base >= self.latest.stamp):
            return None, sweep
        told = self._told.get((views, sweep))
        if told is None:
            self._make_room()
            marks, after = self.latest.since(
                sweep, lambda mark: any(view.wants_mark(mark) for view in views)
            )
            text = Said(progress_text(marks, now_ms())) if marks else None
            told = _Told(views[0].door([text]) if text else None, after)
            self._told[views, sweep] = told
        return told

    def _make_room(self) -> None:
        """Where few are alike little is shared: frames kept for each would fill the memory."""
        if len(self._built) + len(self._told) >= _VIEWS:
            self.forget_frames()

    def forget_frames(self) -> None:
        """Drop the frames that were built; whoever comes later gets others."""
        for view in self._built:
            view.forget()
        self._built.clear()
        self._told.clear()
