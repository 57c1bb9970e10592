"""What every subscriber gets, through whichever door it came.

Strategy. A ``Feed`` is one subscriber: its subscriptions, the answers it is owed, its pace. It has
no task of its own. ``Feeds`` has all of them: whenever the hub has something new it goes round and
lets each send what lies behind its cursors (``pump``), and a clock visits each once a second
(``beat``). A feed whose connection has not drained is passed by; when it has, it goes on by itself.
So a subscriber that does not read costs its cursors and one unfinished frame, and ten thousand idle
ones cost ten thousand visits a second.

Most subscribers are alike, have room and lack nothing. Those stand together in a ``_Pack``, which
has the cursor for all of them: a new event is one pass over the bound ``send`` of each. Whoever is
unlike the others leaves the pack with a cursor of its own, and comes back when it is up to date.

Order within a feed: answers and snapshots, then events, then progress. While a page of a snapshot
is read, the events of its subscription are held, so that none overtakes the rows it has changed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from itertools import repeat
from operator import call
from time import monotonic
from typing import Any, Protocol

import msgspec
from tornado.iostream import IOStream

from errors import SluiceError
from handlers import messages
from handlers.messages import encode
from handlers.pipe import Pipe
from jobs import Filter, Job
from jobs.channel import (
    Batch,
    Cursor,
    Door,
    Pace,
    Said,
    Select,
    Subscription,
    Sweep,
    View,
    Why,
    snap_text,
)
from jobs.events import Hub, Lost
from jobs.files import now_ms
from jobs.manager import Manager
from jobs.rows import rfc3339

log = logging.getLogger("sluice.live")

SUBSCRIPTIONS = 32  # of one feed, those to logs included
HEARTBEAT_S = 15.0
STALLED_S = 30.0

_TICK_S = 0.1
_TICKS = 10  # a second; each feed is visited in one of them
_SLICE = 128  # feeds that are visited before the loop gets its turn
_PACK = 500  # of those that take one call each; some 3 ms
_BATCHES = 8  # of one feed, likewise
_CONTROL_BYTES = 48 << 10  # answers in one frame
_BACKLOG_BYTES = 64 << 10  # answers that were not taken; then no more is heard
_PAGE_BYTES = 48 << 10
_LOOKS = 10  # pages without a row that are looked through before one is told
_WAITING = 64  # subscriptions and pages that are asked for at once
_LOG_LINES, _LOG_FIRST = 200, 1000
_BYE_MS, _BYE_SPREAD_MS = 250, 5000


class Shell(Protocol):
    """The door that a feed stands in."""

    def beat(self, now_s: float) -> bool:
        """Look after the connection, once a second; whether the feed shall go on."""
        ...

    def bye(self, retry_ms: int) -> None:
        """Say that the service stops, and end."""
        ...

    def fail(self) -> None:
        """End after a fault of ours."""
        ...


class Watcher(Protocol):
    """Whoever is woken by ``Feeds``."""

    owner: str

    def pump(self, now_s: float) -> None:
        """There may be something new: send it, if there is room."""
        ...

    def beat(self, now_s: float) -> None:
        """A second has passed."""
        ...

    def bye(self, retry_ms: int) -> None:
        """The service stops."""
        ...

    def fail(self) -> None:
        """End after a fault of ours."""
        ...


class Feed:
    """One subscriber on a connection."""

    __slots__ = (
        "_control",
        "_control_bytes",
        "_door",
        "_each",
        "_feeds",
        "_hb_after_s",
        "_hub",
        "_logs",
        "_pack",
        "_reading",
        "_room",
        "_said_s",
        "_shell",
        "_subs",
        "_sweep",
        "_told",
        "_views",
        "_waiting",
        "_whole",
        "_worker",
        "closed",
        "owner",
        "pace",
        "pipe",
        "told_counts",
        "wants_now",
    )

    def __init__(
        self,
        feeds: Feeds,
        owner: str,
        stream: IOStream,
        door: Door,
        shell: Shell,
        *,
        whole: bool = False,
    ) -> None:
        self.owner = owner
        self.pipe = Pipe(stream, self._drained)
        self.pace = Pace()
        self.wants_now = False
        self.told_counts = 0
        self.closed = False
        self._feeds = feeds
        self._hub = feeds.hub
        self._whole = whole  # all pages of a snapshot come unasked
        self._door = door
        self._shell = shell
        self._subs: dict[int, Subscription] = {}
        self._each: tuple[Subscription, ...] = ()  # of them, for those who only look through them
        self._views: tuple[View, ...] = ()
        self._pack: _Pack | None = None
        self._logs: dict[int, _Follow] | None = None
        self._sweep, self._told = Sweep(), 0
        self._control: list[Said] = []  # answers and snapshots, in order
        self._control_bytes = 0
        self._room: asyncio.Future[None] | None = None
        self._reading = False
        self._waiting: deque[Callable[[], Coroutine[Any, Any, None]]] | None = None
        self._worker: asyncio.Task[None] | None = None
        self._said_s = monotonic()
        self._hb_after_s = HEARTBEAT_S

    # What the shell asks for

    def say(self, text: bytes, s: int | None = None) -> None:
        """Send an answer as soon as there is room, before anything else."""
        self._control.append(Said(text, s))
        self._control_bytes += len(text)
        self.pump(monotonic())

    def room(self) -> asyncio.Future[None] | None:
        """Something to wait for before more is heard, if too many answers were not taken."""
        if self._control_bytes <= _BACKLOG_BYTES:
            return None
        if self._room is None:
            self._room = asyncio.get_running_loop().create_future()
        return self._room

    def subscribe(self, asked: messages.Sub) -> None:
        """Begin, or go on behind a cursor; or follow a job's log."""
        if asked.log is not None:
            self._do(asked.id, lambda: self._follow(asked))
        else:
            self._do(asked.id, lambda: self._subscribe(asked))

    def more(self, asked: messages.More) -> None:
        """Send the next page of a snapshot."""
        self._do(asked.id, lambda: self._more(asked))

    def unsubscribe(self, id: int) -> None:
        """End a subscription, after what was asked for before."""

        async def end() -> None:
            self._drop(id)

        if self._waiting is None:
            self._drop(id)
        else:
            self._do(id, end)

    def close(self) -> None:
        """Forget the subscriber."""
        self.leave()
        self.closed = True
        self.pipe.close()
        self._feeds.remove(self)
        self._feeds.followers.discard(self)
        self._subs.clear()
        self._set_views()
        for follow in (self._logs or {}).values():
            self._let_go(follow)
        self._logs = None
        if self._worker is not None:
            self._worker.cancel()
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    # What is asked for is done one after another: the answers come in the order of the questions

    def _do(self, id: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._waiting is None:
            self._waiting = deque()
        if len(self._waiting) >= _WAITING:
            self.say(messages.err(id, SluiceError("busy")))
            return
        self._waiting.append(work)
        if self._worker is None:
            self._worker = self._feeds.spawn(self._work(self._waiting), self._shell)

    async def _work(self, waiting: deque[Callable[[], Coroutine[Any, Any, None]]]) -> None:
        try:
            while waiting:
                await waiting.popleft()()
        finally:
            self._worker = self._waiting = None

    async def _subscribe(self, asked: messages.Sub) -> None:
        hub = self._hub
        self._drop(asked.id)
        if self._is_full(asked.id):
            return
        if asked.rate is not None:
            self.pace.set(rate=asked.rate)
        why = None
        if asked.s is not None:
            cursor = Cursor(asked.epoch or "", asked.s)
            why = await hub.why_reset(cursor)
            if why is None:
                self._answer(messages.Subscribed(id=asked.id, s=cursor.seq, resumed=True))
                sub = self._begin(asked.id, asked.f, cursor.seq)
                sub.page_rows = asked.page
                sub.pages = 1  # it has the first one, or it would not resume
                self.pump(monotonic())
                return
        self._answer(messages.Subscribed(id=asked.id, s=hub.seq, resumed=False))
        await self._anew(asked.id, asked.f, why, asked.page)

    def _is_full(self, id: int) -> bool:
        full = len(self._subs) + len(self._logs or ()) >= SUBSCRIPTIONS
        if full:
            refusal = SluiceError("bad-request", f"At most {SUBSCRIPTIONS} subscriptions.")
            self.say(messages.err(id, refusal))
        return full

    def _begin(self, id: int, select: Select, seq: int) -> Subscription:
        view = self._hub.view(id, self.owner, select, self._door)
        sub = self._subs[id] = Subscription(view, seq)
        self._set_views()
        self._sweep, self._told = Sweep(), 0  # the latest of what was not told before
        return sub

    def _drop(self, id: int) -> None:
        if self._subs.pop(id, None) is not None:
            self._set_views()
        if self._logs is not None:
            self._let_go(self._logs.pop(id, None))
            if not self._logs:
                self._feeds.followers.discard(self)

    def _let_go(self, follow: _Follow | None) -> None:
        if follow is not None:
            self._feeds.manager.unlisten(follow.job, follow.hear)

    def _set_views(self) -> None:
        self.leave()
        self._each = tuple(self._subs.values())
        self._views = tuple(sub.view for sub in self._each)

    async def _anew(self, id: int, select: Select, why: Why | None, rows: int) -> None:
        """Rows as they are now, and all that follows."""
        hub = self._hub
        if why is not None:
            self._answer(messages.Reset(id=id, why=why, epoch=hub.epoch))
        sub = self._begin(id, select, hub.seq)
        sub.page_rows = rows
        sub.held = True
        after = await self._page(sub, None)
        while self._whole and after is not None and not self.closed:
            await self._taken()
            after = await self._page(sub, after)
        self.told_counts = 0
        sub.held = False
        self.pump(monotonic())

    async def _begin_anew(self, sub: Subscription) -> None:
        """What followed its cursor was forgotten while it was away."""
        if self._subs.get(sub.view.id) is sub:  # it has not asked for something else meanwhile
            await self._anew(sub.view.id, sub.view.select, "retention", sub.page_rows)

    async def _more(self, asked: messages.More) -> None:
        sub = self._subs.get(asked.id)
        if sub is None:
            refusal = SluiceError("bad-request", "There is no such subscription.")
            self.say(messages.err(asked.id, refusal))
            return
        self.leave()
        sub.held = True
        await self._page(sub, asked.cursor)
        sub.held = False
        self.pump(monotonic())

    async def _page(self, sub: Subscription, after: int | None) -> int | None:
        """Put a page of rows where answers go, each at least as new as the cursor; the next key."""
        manager, hub = self._feeds.manager, self._hub
        jobs, following = await self._rows(sub.view.select, after, sub.page_rows)
        counts = await manager.counts(self.owner)
        rows: list[msgspec.Raw] = []
        size = 0
        for key, job in jobs:
            row = manager.row(job)
            del row["params"]
            raw = encode(row)
            size += len(raw)
            if rows and size > _PAGE_BYTES:
                break
            rows.append(msgspec.Raw(raw))
            after = key
        else:
            after = following
        sub.pages += 1
        cursor = Cursor(hub.epoch, sub.sent)
        text = snap_text(sub.view.id, cursor, sub.pages, after, rows, counts)
        # Who was cut in the middle of a snapshot must not go on behind it.
        self._put(text, sub.sent if after is None else None)
        return after

    async def _rows(
        self, select: Select, after: int | None, limit: int
    ) -> tuple[list[tuple[int, Job]], int | None]:
        """The jobs of the next page, each with what asks for those behind it; and for the next."""
        manager = self._feeds.manager
        if select.owner not in (None, self.owner):
            return [], None
        if select.jobs:
            begin = after or 0
            end = begin + limit
            found = []
            for at, job_id in enumerate(select.jobs[begin:end], begin + 1):
                job = await self._find(job_id)
                if job is not None and select.takes(job):
                    found.append((at, job))
            return found, end if end < len(select.jobs) else None
        where = Filter(
            owner=self.owner, kinds=select.kind, states=select.state, text=select.q or None
        )
        page = await manager.find(where, after, limit)
        for _ in range(_LOOKS):  # a text may be in none of those that one call looks at
            if page.items or page.next is None:
                break
            await asyncio.sleep(0)
            page = await manager.find(where, page.next, limit)
        return [(job.h, job) for job in page.items], page.next

    async def _find(self, job_id: str) -> Job | None:
        try:
            return await self._feeds.manager.get(job_id, self.owner)
        except SluiceError:
            return None

    async def _follow(self, asked: messages.Sub) -> None:
        """Subscribe to the log of a job."""
        assert asked.log is not None
        self._drop(asked.id)
        if self._is_full(asked.id):
            return
        try:
            await self._feeds.manager.get(asked.log, self.owner)
        except SluiceError as error:
            self.say(messages.err(asked.id, error))
            return
        if self._logs is None:
            self._logs = {}
        at = -_LOG_FIRST if asked.from_ is None else max(asked.from_, -10_000)
        follow = self._logs[asked.id] = _Follow(asked.log, at)
        self._feeds.manager.listen(asked.log, follow.hear)
        self._feeds.followers.add(self)
        self._answer(messages.Subscribed(id=asked.id, s=self._hub.seq, resumed=True))
        self.pump(monotonic())

    async def follow(self) -> None:
        """Send the new lines of the logs that are followed."""
        for id, follow in list((self._logs or {}).items()):
            if self.pipe.busy or self._control:
                return
            if not follow.is_fresh:
                continue
            follow.is_fresh = False
            try:
                lines = await self._feeds.manager.lines(
                    follow.job, self.owner, follow.after, _LOG_LINES
                )
            except SluiceError:  # deleted
                self._drop(id)
                continue
            if lines:
                follow.is_fresh = len(lines) == _LOG_LINES  # there may be others behind them
                follow.after = lines[-1][0]
                told = [{"n": n, "at": rfc3339(at), "line": line} for n, at, line in lines]
                message = {"t": "log", "id": id, "j": follow.job, "from": lines[0][0]}
                self.say(encode(message | {"lines": told}))

    # What it sends

    def _answer(self, message: msgspec.Struct) -> None:
        self._put(encode(message))

    def _put(self, text: bytes, s: int | None = None) -> None:
        self._control.append(Said(text, s))
        self._control_bytes += len(text)

    async def _taken(self) -> None:
        """Return when all answers were taken."""
        self.pump(monotonic())
        while self._control and not self.closed:
            if self._room is None:
                self._room = asyncio.get_running_loop().create_future()
            await self._room

    def _drained(self) -> None:
        if not self.closed:
            self.pump(monotonic())

    def pump(self, now_s: float) -> None:
        """Send whatever is new, as far as there is room."""
        if self.pipe.busy or self._reading:
            return
        if self._control and not self._say_control():
            return
        hub = self._hub
        newest = hub.seq
        for sub in self._each if self._pack is None else ():
            if sub.seq < newest and not self._events(sub, now_s):
                return
        if hub.latest.stamp > self._told and self.pace.due(now_s):
            if self._pack is not None and self._pack.seq < newest:
                self._feeds.look_again()  # the events of the pack go first
                return
            frame, self._sweep = hub.progress(self._views, self._sweep)
            self._told = self._sweep.base
            if frame is not None:
                self._push(frame)
                self.pace.sent(now_s)

    def _push(self, frame: bytes) -> None:
        self.pipe.send(frame)
        if self.pipe.busy:
            self.leave()

    def leave(self) -> None:
        """Go on alone."""
        pack = self._pack
        if pack is not None:
            self._pack = None
            del pack.members[self]
            sub = self._each[0]
            sub.seq, sub.sent = pack.seq, pack.sent
            self._said_s = max(self._said_s, pack.said_s)
            self._feeds.alone[self] = None

    def _join(self) -> None:
        """Go on together with those who are in the same place."""
        if len(self._each) != 1 or self._control or self._reading or not self.pipe.is_idle:
            return
        sub = self._each[0]
        if sub.held or sub.seq != self._hub.seq:
            return
        assert self.pipe.direct is not None
        self._pack = self._feeds.pack(sub.view, sub.seq, sub.sent)
        self._pack.members[self] = self.pipe.direct
        self._feeds.alone.pop(self, None)

    def cut_short(self, frame: bytes, sent: int) -> None:
        """The kernel did not take all of a frame that was sent to the pack."""
        if sent < 0:
            self.pipe.fail()
        else:
            self.pipe.finish(frame, sent)
        if self.pipe.busy:
            self.leave()

    def _events(self, sub: Subscription, now_s: float) -> bool:
        """Send the events behind a cursor; whether there are no more, and still room."""
        pipe, hub = self.pipe, self._hub
        batches = 0
        while sub.seq < hub.seq and not sub.held:
            batch = hub.next(sub)
            if batch is None:
                self._reading = True
                self._feeds.spawn(self._catch_up(sub), self._shell)
                return False
            frame, sub.seq, sub.sent = batch
            if frame is None:
                continue
            self._push(frame)
            self._said_s = now_s
            if pipe.busy:
                return False
            batches += 1
            if batches == _BATCHES:
                asyncio.get_running_loop().call_soon(self._drained)
                return False
        return True

    def _say_control(self) -> bool:
        """Send the answers; whether all were taken, and there is still room."""
        while self._control and not self.pipe.busy:
            size = n = 0
            while n < len(self._control) and (n == 0 or size <= _CONTROL_BYTES):
                size += len(self._control[n].text)
                n += 1
            if n > 1 and size > _CONTROL_BYTES:
                n -= 1
            said, self._control = self._control[:n], self._control[n:]
            self._control_bytes -= sum(len(one.text) for one in said)
            self._push(self._door(said))
        if not self._control and self._room is not None:
            if not self._room.done():
                self._room.set_result(None)
            self._room = None
        return not self.pipe.busy

    async def _catch_up(self, sub: Subscription) -> None:
        """Send one frame of what only the log has."""
        try:
            batch = await self._hub.read(sub)
        except Lost:
            self._reading = False
            sub.held = True
            if self._waiting is not None and len(self._waiting) >= _WAITING:
                self._shell.fail()  # it may begin anew, without all those questions
            else:
                self._do(sub.view.id, lambda: self._begin_anew(sub))
            return
        except BaseException:
            self._reading = False
            raise
        self._reading = False
        if self._subs.get(sub.view.id) is sub and not self.closed:
            sub.moved(batch)
            if batch.frame is not None:
                self._push(batch.frame)
                self._said_s = monotonic()
        self.pump(monotonic())

    # Once a second

    def beat(self, now_s: float) -> None:
        """Whatever is due by the clock: marks, counts, numbers, a heartbeat."""
        self.leave()
        if self.closed or not self._shell.beat(now_s):
            return
        if self.closed or self.pipe.busy or self._reading:
            return
        feeds = self._feeds
        due: list[Callable[[], bytes | None]] = [sub.mark for sub in self._each]
        counts = feeds.counts(self.owner)
        if counts is not None and counts.n != self.told_counts:
            due += [partial(self._counted, counts, id) for id in self._subs]
        if self.wants_now:
            due.append(partial(feeds.numbers, self.owner, self._door))
        if now_s - self._said_s > self._hb_after_s:
            due.append(self._heartbeat)
        for make in due:
            # Made only when it can be sent: a mark that is not sent must not move the cursor.
            if not self.pipe.busy and (frame := make()) is not None:
                self._push(frame)
        self.pump(now_s)
        if not self.closed:
            self._join()

    def _counted(self, counts: _Counts, id: int) -> bytes:
        self.told_counts = counts.n  # not before: what found no room is told a second later
        return counts.frame(id, self._door)

    def _heartbeat(self) -> bytes:
        """How far all was sent, for who has not been told by an event for a while."""
        self._said_s = monotonic()
        self._hb_after_s = HEARTBEAT_S * random.uniform(0.8, 1.0)
        sent = min((sub.sent for sub in self._subs.values()), default=self._hub.seq)
        return self._feeds.heartbeat(sent, self._door)

    def bye(self, retry_ms: int) -> None:
        """The service stops."""
        self._shell.bye(retry_ms)

    def fail(self) -> None:
        """End after a fault of ours."""
        self._shell.fail()


class _Follow:
    """Where a subscriber is in the log of a job."""

    __slots__ = ("after", "is_fresh", "job")

    def __init__(self, job: str, after: int) -> None:
        self.job = job
        self.after = after
        self.is_fresh = True  # there may be lines behind it

    def hear(self, job: Job | None) -> None:
        """See Manager.listen."""
        self.is_fresh = True


class _Pack:
    """At most ``_PACK`` feeds with the same one view that stand at the same place and have room."""

    __slots__ = ("members", "said_s", "sent", "seq", "view")

    def __init__(self, view: View, seq: int, sent: int) -> None:
        self.view = view
        self.seq = seq
        self.sent = sent
        self.said_s = 0.0
        self.members: dict[Feed, Callable[[bytes], int]] = {}

    def serve(self, batch: Batch, now_s: float) -> None:
        """Go on behind a batch, and send it to all members."""
        frame, self.seq, self.sent = batch
        if frame is not None:
            self.said_s = now_s
            self._send(frame)

    def tell(self, counts: _Counts) -> None:
        """Send the counts to all members."""
        for feed in self.members:
            feed.told_counts = counts.n
        self._send(counts.frame(self.view.id, self.view.door))

    def _send(self, frame: bytes) -> None:
        """Send a frame to all members; who did not take all of it leaves."""
        sent: list[int] = []
        sending = map(call, self.members.values(), repeat(frame))  # the loop itself is in C
        while len(sent) < len(self.members):
            try:
                sent.extend(sending)  # those before an error are in the list
            except BlockingIOError:
                sent.append(0)
            except OSError:
                sent.append(-1)
        if sent.count(len(frame)) < len(sent):
            for feed, n in zip(list(self.members), sent, strict=True):
                if n != len(frame):
                    feed.cut_short(frame, n)


class _Counts:
    """The counts of an owner as they were last told, as frames that are shared."""

    def __init__(self, n: int, counts: dict[str, int], seq: int) -> None:
        self.n = n  # one more with each change
        self.counts = counts
        self._seq = seq
        self._frames: dict[tuple[int, Door], bytes] = {}

    def frame(self, id: int, door: Door) -> bytes:
        """The frame for a subscription."""
        if (id, door) not in self._frames:
            text = encode(messages.CountsMessage(id=id, s=self._seq, n=self.counts))
            self._frames[id, door] = door([Said(text)])
        return self._frames[id, door]


def _pump(watcher: Watcher, now_s: float) -> None:
    watcher.pump(now_s)


def _beat(watcher: Watcher, now_s: float) -> None:
    watcher.beat(now_s)


class Feeds:
    """All subscribers of the service."""

    def __init__(self, hub: Hub, manager: Manager) -> None:
        self.hub = hub
        self.manager = manager
        self._buckets: list[dict[Watcher, None]] = [{} for _ in range(_TICKS)]
        self._bucket_of: dict[Watcher, int] = {}
        self._owners: Counter[str] = Counter()
        self._packs: dict[_Pack, None] = {}
        self._open: dict[tuple[View, int, int], _Pack] = {}  # where one may join, by place
        self._stamp = 0  # of the progress that all have been visited for
        self.alone: dict[Watcher, None] = {}  # those who are in no pack
        self._fresh = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._counts: dict[str, _Counts] = {}
        self._counted_at = -1
        self._numbers: dict[str, dict[str, Any]] = {}
        self._curious: set[str] = set()  # owners who asked for their numbers since they were made
        self._frames: dict[tuple[Any, ...], bytes] = {}
        self.tabs: dict[tuple[str, str], Shell] = {}  # by owner and name
        self.followers: set[Feed] = set()  # of logs

    @property
    def all(self) -> int:
        """How many there are."""
        return len(self._bucket_of)

    def of(self, owner: str) -> int:
        """How many an owner has."""
        return self._owners[owner]

    def add(self, watcher: Watcher) -> None:
        """Let a subscriber take part, until ``remove``."""
        bucket = min(range(_TICKS), key=lambda i: len(self._buckets[i]))
        self._buckets[bucket][watcher] = None
        self._bucket_of[watcher] = bucket
        self.alone[watcher] = None
        self._owners[watcher.owner] += 1

    def remove(self, watcher: Watcher) -> None:
        """End what ``add`` began; may be called again."""
        bucket = self._bucket_of.pop(watcher, None)
        if bucket is None:
            return
        del self._buckets[bucket][watcher]
        self.alone.pop(watcher, None)
        self._owners[watcher.owner] -= 1
        if not self._owners[watcher.owner]:
            del self._owners[watcher.owner]
            self._counts.pop(watcher.owner, None)

    def spawn(self, work: Coroutine[Any, Any, None], shell: Shell) -> asyncio.Task[None]:
        """Run something for a subscriber; if it fails the connection ends, and resumes later."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("the channel failed", exc_info=error)
                shell.fail()

        task.add_done_callback(ended)
        return task

    async def run(self, now: Callable[[str], Awaitable[dict[str, Any]]]) -> None:
        """Serve all until cancelled; ``now`` tells the numbers of an owner."""
        self.hub.listen(self._fresh.set)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._go_round())
            group.create_task(self._tick(now))

    async def _go_round(self) -> None:
        hub = self.hub
        while True:
            await self._fresh.wait()
            self._fresh.clear()
            for pack in list(self._packs):
                if self._advance(pack):
                    await asyncio.sleep(0)
            moved = hub.latest.stamp != self._stamp
            self._stamp = hub.latest.stamp
            await self._visit(self._bucket_of if moved else self.alone, _pump)
            if any(pack.seq < hub.seq for pack in self._packs):
                self._fresh.set()
            else:
                hub.forget_frames()

    def look_again(self) -> None:
        """Visit everyone in the next round: there is progress that had to wait for events."""
        self._stamp = -1

    def pack(self, view: View, seq: int, sent: int) -> _Pack:
        """A pack at a place that has room for one more."""
        place = (view, seq, sent)
        pack = self._open.get(place)
        if pack is None or len(pack.members) >= _PACK:
            pack = self._open[place] = _Pack(view, seq, sent)
            self._packs[pack] = None
        return pack

    def _advance(self, pack: _Pack) -> bool:
        """Bring a pack one frame further; whether one was sent."""
        hub = self.hub
        if pack.members and pack.seq == hub.seq:
            return False
        place = (pack.view, pack.seq, pack.sent)
        if self._open.get(place) is pack:
            del self._open[place]
        batch = hub.next(pack) if pack.members else None
        if batch is None:  # nobody is left, or the ring has gone on without them
            for feed in list(pack.members):
                feed.leave()
            del self._packs[pack]
            return False
        pack.serve(batch, monotonic())
        self._open.setdefault((pack.view, pack.seq, pack.sent), pack)
        return batch.frame is not None

    async def _visit(
        self, watchers: Iterable[Watcher], visit: Callable[[Watcher, float], None]
    ) -> None:
        """Visit those that are there now; between some and the next the loop gets its turn."""
        now_s = monotonic()
        for n, watcher in enumerate(list(watchers), 1):
            try:
                visit(watcher, now_s)
            except Exception as error:
                self._failed(watcher, error)
            if n % _SLICE == 0:
                await asyncio.sleep(0)
                now_s = monotonic()

    def _failed(self, watcher: Watcher, error: Exception) -> None:
        """The fault of one must not end the others."""
        log.error("the channel failed", exc_info=error)
        watcher.fail()

    async def _tick(self, now: Callable[[str], Awaitable[dict[str, Any]]]) -> None:
        due_s, tick = monotonic(), 0
        while True:
            due_s = max(due_s + _TICK_S, monotonic())
            await asyncio.sleep(due_s - monotonic())
            tick += 1
            await self._visit(self._buckets[tick % _TICKS], _beat)
            for feed in list(self.followers):
                try:
                    await feed.follow()
                except Exception as error:
                    self._failed(feed, error)
            if tick % _TICKS == 0:
                await self._count(now)
                self.hub.forget_frames()

    async def _count(self, now: Callable[[str], Awaitable[dict[str, Any]]]) -> None:
        """Once a second: the counts of each owner if anything has happened, and the numbers."""
        self._frames.clear()
        self._numbers.clear()
        happened = self._counted_at != self.hub.seq
        self._counted_at = self.hub.seq
        for owner in list(self._owners):
            known = self._counts.get(owner)
            if happened or known is None:
                counts = await self.manager.counts(owner)
                if known is None or counts != known.counts:
                    n = known.n + 1 if known is not None else 1
                    told = self._counts[owner] = _Counts(n, counts, self._counted_at)
                    await self._tell(owner, told)
        curious, self._curious = self._curious, set()
        for owner in curious:
            self._numbers[owner] = await now(owner)

    async def _tell(self, owner: str, counts: _Counts) -> None:
        """Tell the packs new counts; whoever is alone is told when it is visited."""
        for pack in list(self._packs):
            if pack.view.owner == owner and pack.members:
                pack.tell(counts)
                await asyncio.sleep(0)

    def counts(self, owner: str) -> _Counts | None:
        """The counts of an owner, as old as a second."""
        return self._counts.get(owner)

    def numbers(self, owner: str, door: Door) -> bytes | None:
        """The numbers of now, as a frame; None in the first second that an owner asks for them."""
        self._curious.add(owner)
        row = self._numbers.get(owner)
        if row is None:
            return None
        return self._frame(("now", owner, door), door, lambda: encode({"t": "now", **row}))

    def heartbeat(self, s: int, door: Door) -> bytes:
        """A heartbeat, as a frame."""
        return self._frame(("hb", s, door), door, lambda: encode(messages.Hb(s=s, now=now_ms())))

    def _frame(self, key: tuple[Any, ...], door: Door, make: Callable[[], bytes]) -> bytes:
        if key not in self._frames:
            self._frames[key] = door([Said(make())])
        return self._frames[key]

    def bye(self) -> None:
        """Tell everyone that the service stops, each with its own time to come back."""
        watchers = list(self._bucket_of)
        spread_ms = min(_BYE_SPREAD_MS, 2 * len(watchers))
        for i, watcher in enumerate(watchers):
            watcher.bye(_BYE_MS + i * spread_ms // len(watchers))
