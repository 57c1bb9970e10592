"""The live channel: ``jobs.v1`` over a WebSocket.

A thin shell over ``jobs.events``: it parses what clients say, and one writer task a connection
takes what lies behind the subscriptions' cursors whenever the socket has drained. So a client that
does not read costs nothing but its cursors; a stalled one is closed and resumes later. Nothing is
awaited in ``on_message``: while Tornado waits for it no frame is read, not even a pong, and a live
client would be taken for dead.

docs/channel.md describes the protocol for those who write a subscriber.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterable
from time import monotonic
from typing import Any

import msgspec
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from errors import SluiceError
from handlers.auth import Caller, check_site, identify, same_origin
from handlers.base import Services, WithOptions
from jobs import Filter, Job
from jobs.events import Select, Subscription, progress_frame, snap_frame
from jobs.files import now_ms, uuid7
from jobs.kinds import invalid

log = logging.getLogger("sluice.live")

PROTOCOL = "jobs.v1.json"
VERSION = 1

_HELLO_S = 5.0
_HEARTBEAT_S = 15.0
_PING_S = 20.0
_SILENT_S = 45.0
_STALLED_S = 30.0
_EVENTS_A_FRAME = 64
_MARKS_A_FRAME = 200
_FRAME_BYTES = 64 << 10
_PAGE = 50
_MOST_SUBSCRIPTIONS = 32
_MOST_IN_FLIGHT = 16
_RATE, _MOST_RATE, _HIDDEN_RATE = 10.0, 20.0, 1.0
_NOW_S = 1.0

_encode = msgspec.json.Encoder().encode


class Hello(msgspec.Struct, tag_field="t", tag="hello"):
    """The first message of a client."""

    ver: int = VERSION
    cid: str = ""
    feat: tuple[str, ...] = ()
    hb: float | None = None
    vis: str = "visible"


class Sub(msgspec.Struct, tag_field="t", tag="sub"):
    """Subscribe, or resume after ``s`` of ``epoch``."""

    id: int
    f: Select = Select()
    epoch: str | None = None
    s: int | None = None
    rate: float | None = None


class Unsub(msgspec.Struct, tag_field="t", tag="unsub"):
    """End a subscription."""

    id: int


class More(msgspec.Struct, tag_field="t", tag="more"):
    """The next page of a snapshot."""

    id: int
    cursor: int


class Cmd(msgspec.Struct, tag_field="t", tag="cmd"):
    """A command; answered by exactly one ack or err, after its commit."""

    id: int | str
    op: str
    job: str | None = None
    if_v: int | None = None
    args: dict[str, Any] = {}


class Set(msgspec.Struct, tag_field="t", tag="set"):
    """What the client shows now."""

    vis: str | None = None
    rate: float | None = None


class Hb(msgspec.Struct, tag_field="t", tag="hb"):
    """A heartbeat: the cursor that was applied."""

    s: int | None = None
    lag: float | None = None
    rtt: float | None = None


Message = Hello | Sub | Unsub | More | Cmd | Set | Hb
_decoder = msgspec.json.Decoder(Message | list[Message])

_sockets: Counter[str] = Counter()


class LiveHandler(WithOptions, WebSocketHandler):
    """One subscriber."""

    caller: Caller

    def initialize(self) -> None:
        """Find the services."""
        self.services: Services = self.application.settings["services"]
        self._counted = False
        self._subs: dict[int, Subscription] = {}
        self._control: list[bytes] = []  # answers and snapshots, in order
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._chains: dict[str, asyncio.Task[None]] = {}  # the last command of each job
        self._in_flight = 0
        self._welcomed = False
        self._read_only = False
        self._rate = _RATE
        self._wants_now = False
        self._counts: dict[str, int] | None = None
        self._heard_at = self._said_at = monotonic()
        self._pending_at: float | None = None  # since when a message has not drained

    async def prepare(self) -> None:
        """Check where the request comes from, before the upgrade."""
        services = self.services
        try:
            services.hosts.check(self.request)
            if self.request.method == "OPTIONS":
                return
            check_site(self.request, services.cors)
            self.caller = identify(self.request)
            if not services.life.ready or services.life.stopping:
                raise SluiceError("stopping" if services.life.stopping else "starting")
            if _sockets[self.caller.owner] >= services.settings.max_sockets:
                raise SluiceError("too-many-sockets", retry_after_s=5)
        except SluiceError as error:
            self.set_status(error.status)
            self.set_header("Content-Type", "application/problem+json")
            self.finish(_encode(error.problem(uuid7())))

    def check_origin(self, origin: str) -> bool:
        """Tornado's hook: our own pages, and allowed ones. Programs send no Origin."""
        return same_origin(self.request, origin) or self.services.cors.allows(origin)

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        """Tornado's hook."""
        return PROTOCOL if PROTOCOL in subprotocols else None

    async def open(self, *args: str, **kwargs: str) -> None:
        """A plain socket gets everything, read-only; others say hello first."""
        _sockets[self.caller.owner] += 1
        self._counted = True
        connections.add(self)
        self.set_nodelay(True)
        self._start(self._write())
        self._start(self._watch())
        self.services.hub.listen(self._wake.set)
        if self.selected_subprotocol is None:
            self._read_only = True
            self._welcome(Hello())
            self._start(self._subscribe(Sub(id=1)))

    def on_message(self, message: str | bytes) -> None:
        """Tornado's hook: dispatch, never await."""
        self._heard_at = monotonic()
        if isinstance(message, bytes):
            self._end(4400, "bad frame")
            return
        try:
            said = _decoder.decode(message)
        except msgspec.ValidationError as error:
            refusal = invalid(error)
            self._say(_err(_id_of(message), refusal))
            return
        except (msgspec.DecodeError, RecursionError):
            self._end(4400, "bad frame")
            return
        for one in said if isinstance(said, list) else [said]:
            self._hear(one)

    def on_pong(self, data: bytes) -> None:
        """Tornado's hook."""
        self._heard_at = monotonic()

    def on_close(self) -> None:
        """Tornado's hook."""
        connections.discard(self)
        if self._counted:
            self._counted = False
            _sockets[self.caller.owner] -= 1
        self.services.hub.unlisten(self._wake.set)
        for task in self._tasks:
            task.cancel()

    # What clients say

    def _hear(self, message: Message) -> None:
        if not self._welcomed and not isinstance(message, Hello):
            self._end(4400, "hello first")
            return
        match message:
            case Hello():
                self._welcome(message)
            case Sub():
                self._start(self._subscribe(message))
            case Unsub():
                self._subs.pop(message.id, None)
            case More():
                self._start(self._more(message))
            case Cmd():
                self._command(message)
            case Set():
                self._set(message.vis, message.rate)
            case Hb():
                pass

    def _welcome(self, hello: Hello) -> None:
        if hello.ver != VERSION:
            self._end(4406, "version")
            return
        self._welcomed = True
        self._wants_now = "now" in hello.feat
        self._set(hello.vis, None)
        hub = self.services.hub
        self._say(
            {
                "t": "welcome",
                "conn": uuid7(),
                "epoch": hub.epoch,
                "s": hub.seq,
                "hb": _HEARTBEAT_S,
                "now": now_ms(),
                "limits": {"subs": _MOST_SUBSCRIPTIONS, "in_flight": _MOST_IN_FLIGHT},
                "feat": ["now", "counts"],
                "ver": VERSION,
            }
        )

    def _set(self, vis: str | None, rate: float | None) -> None:
        if vis is not None:
            self._rate = _HIDDEN_RATE if vis == "hidden" else _RATE
        if rate is not None:
            self._rate = min(_MOST_RATE, max(0.1, rate))

    async def _subscribe(self, asked: Sub) -> None:
        """Begin at a snapshot, or behind the cursor that the client has."""
        hub = self.services.hub
        if len(self._subs) >= _MOST_SUBSCRIPTIONS and asked.id not in self._subs:
            self._say(_err(asked.id, SluiceError("bad-request", "Too many subscriptions.")))
            return
        if asked.rate is not None:
            self._set(None, asked.rate)
        owner = self.caller.owner
        if asked.s is not None:
            why = await hub.resumable(asked.epoch, asked.s)
            if why is None:
                self._subs[asked.id] = Subscription(asked.id, owner, asked.f, asked.s)
                self._say({"t": "ack", "id": asked.id, "s": asked.s})
                return
            self._say({"t": "reset", "id": asked.id, "why": why, "epoch": hub.epoch})
        seq = hub.seq
        await self._snapshot(asked.id, asked.f, seq, 1, None)
        self._subs[asked.id] = Subscription(asked.id, owner, asked.f, seq)
        self._counts = None
        self._wake.set()

    async def _more(self, asked: More) -> None:
        sub = self._subs.get(asked.id)
        if sub is None:
            self._say(_err(asked.id, SluiceError("bad-request", "No such subscription.")))
            return
        await self._snapshot(asked.id, sub.select, sub.seq, 2, asked.cursor)

    async def _snapshot(
        self, id: int, select: Select, seq: int, page: int, after: int | None
    ) -> None:
        """One page of rows; each is at least as new as ``seq``."""
        manager = self.services.manager
        jobs: list[Job] = []
        following: int | None = None
        foreign = select.owner is not None and select.owner != self.caller.owner
        if select.jobs and not foreign:
            begin = after or 0
            end = begin + _PAGE
            found = [await self._find(job_id) for job_id in select.jobs[begin:end]]
            jobs = [job for job in found if job is not None and select.takes(job)]
            following = end if end < len(select.jobs) else None
        elif not foreign:
            where = Filter(owner=self.caller.owner, kinds=select.kind, states=select.state)
            jobs, following = await manager.find(where, after, _PAGE)
        rows = []
        for job in jobs:
            row = manager.row(job)
            del row["params"]
            rows.append(row)
        counts = await manager.counts(self.caller.owner)
        self._say(
            snap_frame(
                id, self.services.hub.epoch, seq, page, following is None, rows, counts, following
            )
        )

    async def _find(self, job_id: str) -> Job | None:
        try:
            return await self.services.manager.get(job_id, self.caller.owner)
        except SluiceError:
            return None

    def _command(self, asked: Cmd) -> None:
        """Run a command behind earlier ones of the same job."""
        if self._in_flight >= _MOST_IN_FLIGHT:
            self._say(_err(asked.id, SluiceError("queue-full", "Too many commands at once.")))
            return
        self._in_flight += 1
        key = asked.job or ""
        before = self._chains.get(key) if asked.job else None
        task = self._start(self._run_command(asked, before))
        if asked.job:
            self._chains[key] = task

            def unchain(done: asyncio.Task[None]) -> None:
                if self._chains.get(key) is done:
                    del self._chains[key]

            task.add_done_callback(unchain)

    async def _run_command(self, asked: Cmd, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        try:
            if self._read_only:
                raise SluiceError("bad-request", "Open the socket with jobs.v1.json to command.")
            if self.services.life.stopping:
                raise SluiceError("stopping", retry_after_s=5)
            job = await self._commanded(asked)
            version = job.version if job is not None else None
            self._say({"t": "ack", "id": asked.id, "v": version, "job": job.id if job else None})
        except SluiceError as error:
            self._say(_err(asked.id, error))
        except Exception as error:
            log.error("a command failed", exc_info=error)
            self._say(_err(asked.id, SluiceError("internal")))
        finally:
            self._in_flight -= 1

    async def _commanded(self, asked: Cmd) -> Job | None:
        manager, owner, by = self.services.manager, self.caller.owner, self.caller.by("ws")
        if asked.op == "start":
            start = msgspec.convert(asked.args, dict[str, Any])
            kind = str(start.get("kind", ""))
            params = manager.parse(kind, start.get("params") or {})
            name = start.get("name")
            job, _ = await manager.start(
                kind,
                params,
                owner=owner,
                client=self.caller.client,
                by=by,
                name=str(name)[:200] if name else None,
            )
            return job
        if asked.job is None:
            raise SluiceError("invalid-field", "job is missing.", field="job")
        if asked.op in ("pause", "resume", "cancel"):
            force = asked.args.get("force") is True
            job, _ = await manager.command(
                asked.job, asked.op, owner=owner, by=by, if_version=asked.if_v, force=force
            )
            return job
        if asked.op == "retry":
            return await manager.retry(asked.job, owner=owner, by=by)
        if asked.op == "delete":
            await manager.delete(asked.job, owner=owner, by=by, if_version=asked.if_v)
            return None
        raise SluiceError("invalid-field", f"op: {asked.op[:40]!r} is not known.", field="op")

    # What it says

    def _say(self, message: dict[str, Any] | bytes) -> None:
        self._control.append(message if isinstance(message, bytes) else _encode(message))
        self._wake.set()

    async def _write(self) -> None:
        """Send whatever is new, as fast as the client takes it."""
        progress_at = now_at = 0.0
        stamp = 0
        try:
            while True:
                await self._wait(progress_at, now_at)
                self._wake.clear()
                while self._control:  # an event may not overtake the snapshot that it follows
                    control, self._control = self._control, []
                    await self._send(control)
                behind = await self._send_events()
                now = monotonic()
                if now >= progress_at and not behind and self._subs:
                    stamp, sent = await self._send_progress(stamp)
                    if sent:  # a jitter keeps many clients from a common beat
                        progress_at = now + random.uniform(0.9, 1.1) / self._rate
                if now >= now_at and self._subs:
                    await self._send_now()
                    now_at = now + _NOW_S
                if behind:
                    self._wake.set()
                    await asyncio.sleep(0)
        except WebSocketClosedError:
            pass

    async def _wait(self, progress_at: float, now_at: float) -> None:
        """Until something is new; not before the time of the next progress or numbers."""
        loop = asyncio.get_running_loop()
        timers = [loop.call_later(max(0.0, now_at - monotonic()) or _NOW_S, self._wake.set)]
        if progress_at > monotonic():
            timers.append(loop.call_later(progress_at - monotonic(), self._wake.set))
        await self._wake.wait()
        for timer in timers:
            timer.cancel()

    async def _send_events(self) -> bool:
        """The next events of each subscription; whether there are more."""
        hub = self.services.hub
        behind = False
        for sub in list(self._subs.values()):
            if sub.seq >= hub.seq:
                continue
            events = await hub.after(sub.seq, _EVENTS_A_FRAME)
            frames = sub.frames(events)
            behind = behind or sub.seq < hub.seq
            if sub.seq >= hub.seq and (mark := sub.mark()) is not None:
                frames.append(mark)
            await self._send(frames)
        return behind

    async def _send_progress(self, stamp: int) -> tuple[int, bool]:
        """The latest progress of what the subscriptions want, many jobs in one frame."""
        marks, newest = self.services.hub.marks(stamp)
        wanted = [
            mark for mark in marks if any(sub.wants_mark(mark) for sub in self._subs.values())
        ]
        for i in range(0, len(wanted), _MARKS_A_FRAME):
            await self._send([progress_frame(wanted[i : i + _MARKS_A_FRAME])])
        return newest, bool(wanted)

    async def _send_now(self) -> None:
        """Once a second: the counts if they have changed, and the numbers if asked for."""
        counts = await self.services.manager.counts(self.caller.owner)
        frames = []
        if counts != self._counts:
            self._counts = counts
            seq = self.services.hub.seq
            frames = [
                _encode({"t": "counts", "id": sub.id, "s": seq, "n": counts})
                for sub in self._subs.values()
            ]
        if self._wants_now:
            row = await self.services.now.row(self.services, self.caller.owner)
            frames.append(_encode({"t": "now", **row}))
        await self._send(frames)

    async def _send(self, frames: Iterable[bytes]) -> None:
        """Send messages, several in one text frame as an array, and wait until they have left."""
        batch: list[bytes] = []
        size = 0
        for frame in frames:
            if batch and size + len(frame) > _FRAME_BYTES:
                await self._flush(batch)
                batch, size = [], 0
            batch.append(frame)
            size += len(frame) + 1
        if batch:
            await self._flush(batch)

    async def _flush(self, batch: list[bytes]) -> None:
        text = batch[0] if len(batch) == 1 else b"[" + b",".join(batch) + b"]"
        self._said_at = self._pending_at = monotonic()
        await self.write_message(text.decode())
        self._pending_at = None

    async def _watch(self) -> None:
        """Heartbeats, pings, and the ends of those who do not answer."""
        began = pinged = monotonic()
        while True:
            await asyncio.sleep(1.0)
            now = monotonic()
            if not self._welcomed and now - began > _HELLO_S:
                self._end(4511, "no hello")
                return
            if now - self._heard_at > _SILENT_S:
                self._end(4510, "silent")
                return
            if self._pending_at is not None and now - self._pending_at > _STALLED_S:
                self._end(4508, "stalled")
                return
            if now - self._said_at > _HEARTBEAT_S * random.uniform(0.8, 1.0) and self._welcomed:
                self._say({"t": "hb", "s": self.services.hub.seq, "now": now_ms()})
            if now - pinged > _PING_S:
                pinged = now
                try:
                    self.ping()
                except WebSocketClosedError:
                    return

    def bye(self, retry_ms: int) -> None:
        """Tell that the service restarts, and close."""
        self._say({"t": "bye", "why": "restart", "retry_ms": retry_ms, "final": False})
        asyncio.get_running_loop().call_later(0.2, self._end, 1012, "restart")

    def _end(self, code: int, reason: str) -> None:
        self.close(code, reason)
        if code in (4508, 4510, 1012) and self.ws_connection is not None:
            # Such a peer may never answer the closing handshake.
            asyncio.get_running_loop().call_later(2.0, self._cut)

    def _cut(self) -> None:
        stream = self.ws_connection.stream if self.ws_connection is not None else None
        if stream is not None:
            stream.close()

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the channel failed", exc_info=error)
            self._end(4500, "internal")


connections: set[LiveHandler] = set()


def say_bye() -> None:
    """Tell every subscriber that the service restarts, each with its own time to come back."""
    for i, connection in enumerate(list(connections)):
        connection.bye(500 + (i * 10) % 5000)


def _err(id: Any, error: SluiceError) -> dict[str, Any]:
    after_ms = None if error.retry_after_s is None else int(error.retry_after_s * 1000)
    return {
        "t": "err",
        "id": id,
        "code": error.code,
        "msg": error.detail,
        "retry": error.entry.retry,
        "after_ms": after_ms,
        "next": error.entry.next,
        "field": error.field,
    }


class _Identified(msgspec.Struct):
    id: Any = None


def _id_of(message: str) -> Any:
    """The request id of a message that is wrong in other ways."""
    try:
        return msgspec.json.decode(message, type=_Identified).id
    except msgspec.MsgspecError:
        return None
