"""``/v1/events``: the channel for those who have no WebSocket, as SSE or by long-poll.

The same cursor, the same filters, the same rows as over the WebSocket, so a client may change the
door at any time. SSE is a ``Feed`` whose frames are chunks of an HTTP answer; a poll is one look
behind a cursor, which waits if nothing is there. Commands go by REST.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic

from tornado.iostream import StreamClosedError

from errors import SluiceError
from handlers.base import BaseHandler
from handlers.feed import STALLED_S, Feed, Shell
from handlers.messages import Bye, Sub, encode
from jobs import Event
from jobs.channel import Cursor, Said, Select, View, text_frame
from jobs.events import Hub, Lost
from jobs.rows import event_row

_RETRY_MS = 2000
_LONGEST_WAIT_S = 60.0
_EVENTS, _MOST_EVENTS = 100, 500
_LOOK = 500  # events that are looked through before the loop gets its turn
_FILTERS = {"kind": "kind", "state": "state", "job": "jobs"}


def sse_door(epoch: str, *, chunked: bool) -> SseDoor:
    """The door of a log. The same one each time, so that frames are shared."""
    return _doors.setdefault((epoch, chunked), SseDoor(epoch, chunked))


class SseDoor:
    """Messages as server-sent events; only those that move the cursor have an id (HTML 9.2)."""

    def __init__(self, epoch: str, chunked: bool) -> None:
        self._epoch = epoch.encode()
        self._chunked = chunked

    def __call__(self, said: Sequence[Said]) -> bytes:
        """One chunk of the answer."""
        lines = []
        for text, s in said:
            if s is not None:
                lines.append(b"id: %s:%d\n" % (self._epoch, s))
            lines.append(b"data: %s\n\n" % text)
        return self.chunk(b"".join(lines))

    def chunk(self, data: bytes) -> bytes:
        """Bytes as they travel."""
        return b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data


_doors: dict[tuple[str, bool], SseDoor] = {}


class EventsHandler(BaseHandler):
    """Transitions as they happen."""

    async def get(self) -> None:
        """A stream for who accepts text/event-stream, else what lies behind ``after``."""
        select, values = self._asked()
        if self.services.feeds.of(self.caller.owner) >= self.services.settings.max_sockets:
            raise SluiceError("too-many-sockets", retry_after_s=5)
        self.set_header("Cache-Control", "no-store")
        self.set_header("Vary", "Accept")
        if "text/event-stream" in self.request.headers.get("Accept", "").lower():
            await _Stream(self).run(select, values)
        else:
            await self._poll(select, values)

    def _asked(self) -> tuple[Select, dict[str, str]]:
        """The filter and the other parameters. Raises invalid-field."""
        others = ("owner", "q", "after", "wait", "limit", "rate")
        filters, values = self.filters(_FILTERS, *others)
        select = Select(
            owner=values.get("owner"),
            q=values.get("q") or None,
            **{field: tuple(filters[name]) for name, field in _FILTERS.items()},
        )
        return select, values

    def cursor(self, values: dict[str, str]) -> Cursor | None:
        """Where to go on. Raises invalid-field."""
        # A browser that comes back repeats the address; what it has seen since is in the header.
        name, text = "Last-Event-ID", self.request.headers.get("Last-Event-ID")
        if not text:
            name, text = "after", values.get("after")
        if not text:
            return None
        cursor = Cursor.parse(text)
        if cursor is None:
            raise SluiceError("invalid-field", f"{name} is <epoch>:<seq>.", field=name)
        return cursor

    async def _poll(self, select: Select, values: dict[str, str]) -> None:
        wait_s = self.decimal(values, "wait", 0, _LONGEST_WAIT_S) or 0.0
        limit = int(self.decimal(values, "limit", 1, _MOST_EVENTS) or _EVENTS)
        hub = self.services.hub
        cursor = self.cursor(values)
        why = await hub.why_reset(cursor) if cursor is not None else None
        if cursor is None or why is not None:
            self.reply({"events": [], "cursor": str(hub.cursor), "reset": why})
            return
        poll = _Poll(self, hub.view(1, self.caller.owner, select, text_frame), cursor.seq)
        self.gone = poll.wake
        try:
            events = await poll.events(limit, monotonic() + wait_s)
        except Lost:
            self.reply({"events": [], "cursor": str(hub.cursor), "reset": "retention"})
            return
        told = [event_row(event) for event in events]
        self.reply({"events": told, "cursor": str(Cursor(hub.epoch, poll.seq)), "reset": None})


class _Poll:
    """One look behind a cursor."""

    def __init__(self, handler: EventsHandler, view: View, seq: int) -> None:
        self.owner = view.owner
        self.seq = seq
        self._view = view
        self._hub: Hub = handler.services.hub
        self._feeds = handler.services.feeds
        self._fresh = asyncio.Event()
        self._over = False

    async def events(self, limit: int, until_s: float) -> list[Event]:
        """What there is, or the first that comes. Raises Lost."""
        self._feeds.add(self)
        try:
            while True:
                self._fresh.clear()
                found = await self._look(limit)
                left_s = until_s - monotonic()
                if found or self._over or left_s <= 0:
                    return found
                try:
                    async with asyncio.timeout(left_s):
                        await self._fresh.wait()
                except TimeoutError:
                    self._over = True  # a last look, for it moves the cursor
        finally:
            self._feeds.remove(self)

    async def _look(self, limit: int) -> list[Event]:
        found: list[Event] = []
        while self.seq < self._hub.seq and len(found) < limit:
            events = await self._hub.after(self.seq, _LOOK)
            if not events:
                self.seq = self._hub.seq
            for event in events:
                if self._view.wants(event):
                    found.append(event)
                self.seq = event.seq
                if len(found) == limit:
                    break
            await asyncio.sleep(0)
        return found

    def wake(self) -> None:
        """Answer now."""
        self._over = True
        self._fresh.set()

    def pump(self, now_s: float) -> None:
        """There is something new."""
        self._fresh.set()

    def beat(self, now_s: float) -> None:
        """Nothing is done by the clock."""

    def bye(self, retry_ms: int) -> None:
        """The service stops."""
        self.wake()

    def fail(self) -> None:
        """Answer with what there is."""
        self.wake()


class _Stream(Shell):
    """Server-sent events, until one side ends it."""

    def __init__(self, handler: EventsHandler) -> None:
        self._handler = handler
        self._ended = asyncio.Event()
        self._cut = False

    async def run(self, select: Select, values: dict[str, str]) -> None:
        """Send until the client goes or the service stops."""
        handler = self._handler
        services, caller = handler.services, handler.caller
        cursor = handler.cursor(values)
        rate = handler.decimal(values, "rate", 0.1, 10)
        handler.set_header("Content-Type", "text/event-stream")
        handler.set_header("X-Accel-Buffering", "no")
        chunked = handler.request.version != "HTTP/1.0"
        self._door = door = sse_door(services.hub.epoch, chunked=chunked)
        handler.write(f"retry: {_RETRY_MS}\n\n")
        stream = handler.connection.stream
        handler.gone = self._ended.set
        try:
            await handler.flush()
        except StreamClosedError:
            return
        if stream.closed():  # what was flushed was taken, and then the client has gone
            return
        stream.set_nodelay(True)
        self._feed = feed = Feed(services.feeds, caller.owner, stream, door, self, whole=True)
        services.feeds.add(feed)
        feed.pace.set(rate=rate)
        feed.subscribe(
            Sub(
                id=1,
                f=select,
                epoch=cursor.epoch if cursor else None,
                s=cursor.seq if cursor else None,
            )
        )
        try:
            await self._ended.wait()
        finally:
            feed.close()
        if self._cut:
            stream.close()

    def beat(self, now_s: float) -> bool:
        """End who does not read; it comes back to where it was."""
        if self._feed.pipe.stalled_s(now_s) > STALLED_S:
            self.fail()
            return False
        return True

    def bye(self, retry_ms: int) -> None:
        """Say when to come back, and end."""
        self._feed.say(encode(Bye(why="restart", retry_ms=retry_ms, final=False)))
        if not self._feed.pipe.busy:  # a browser obeys this field alone
            self._feed.pipe.send(self._door.chunk(b"retry: %d\n\n" % retry_ms))
        self._ended.set()

    def fail(self) -> None:
        """Cut; half an event is not dispatched, and the client resumes."""
        self._cut = True
        self._ended.set()
