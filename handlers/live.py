"""The live channel over a WebSocket: ``jobs.v1``.

A thin shell: it decides who may connect, decodes what clients say, and ends the connections that do
not keep the rules. What a subscriber gets is the ``Feed``'s business (``handlers/feed.py``), what a
command does that of ``jobs/commands.py``. Commands are never waited for in ``on_message``: while
Tornado waits for it no frame is read, not even a pong. It waits only to slow down a client that
says too much, or does not read the answers.

docs/channel.md describes the protocol for those who write a subscriber.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

import msgspec
from tornado.websocket import WebSocketClosedError

from errors import SluiceError
from handlers.auth import Caller, check_site, identify, same_origin
from handlers.base import Services, WithOptions
from handlers.feed import HEARTBEAT_S, STALLED_S, SUBSCRIPTIONS, Feed
from handlers.messages import (
    PROTOCOL,
    VERSION,
    Beat,
    Bye,
    Cmd,
    Done,
    Hello,
    Limits,
    Message,
    More,
    Refused,
    Set,
    Sub,
    Unsub,
    Welcome,
    decode,
    encode,
    err,
    id_of,
)
from handlers.socket import StrictWebSocketHandler
from jobs import Filter
from jobs.channel import Select, text_frame
from jobs.commands import IN_FLIGHT, Command, Outcome
from jobs.files import now_ms, uuid7
from jobs.kinds import invalid

MESSAGE_BYTES = 64 << 10

_HELLO_S = 5.0
_PING_S = 20.0
_SILENT_S = 45.0
_BYE_S = 0.2
_MESSAGES = 100  # in one frame
_BYTES_PER_S, _BYTES_BURST = 256 << 10, 1 << 20
_MESSAGES_PER_S, _MESSAGES_BURST = 200, 1000
_LONGEST_WAIT_S = 1.0


class LiveHandler(WithOptions, StrictWebSocketHandler):
    """One subscriber on a WebSocket."""

    caller: Caller
    feed: Feed | None = None

    def initialize(self) -> None:
        """Find the services."""
        self.services: Services = self.application.settings["services"]
        self._welcomed = False
        self._read_only = False
        self._tab: tuple[str, str] | None = None
        self._began_s = self._heard_s = self._pinged_s = monotonic()
        self._bytes, self._messages = float(_BYTES_BURST), float(_MESSAGES_BURST)

    async def prepare(self) -> None:
        """Check where the request comes from, before the upgrade."""
        services = self.services
        try:
            services.hosts.check(self.request)
            if self.request.method == "OPTIONS":
                return
            check_site(self.request, services.cors)
            if self.request.query:
                raise SluiceError(
                    "invalid-field",
                    "The channel takes nothing from the address: addresses end up in logs.",
                    field="query",
                )
            self.caller = identify(self.request)
            if not services.life.ready or services.life.stopping:
                raise SluiceError("stopping" if services.life.stopping else "starting")
        except SluiceError as error:
            self.set_status(error.status)
            self.set_header("Content-Type", "application/problem+json")
            self.finish(encode(error.problem(uuid7())))

    def check_origin(self, origin: str) -> bool:
        """Tornado's hook: our own pages, and allowed ones. Programs send no Origin."""
        return same_origin(self.request, origin) or self.services.cors.allows(origin)

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        """Tornado's hook. A token among them is never sent back."""
        return PROTOCOL if PROTOCOL in subprotocols else None

    async def open(self, *args: str, **kwargs: str) -> None:
        """A plain socket gets everything, read-only; others say hello first."""
        assert self.ws_connection is not None
        feeds = self.services.feeds
        if feeds.of(self.caller.owner) >= self.services.settings.max_sockets:
            self.end(4429, "too many connections")
            return
        stream = self.ws_connection.stream
        assert stream is not None
        if stream.closed():  # it left right after the handshake
            return
        self.set_nodelay(True)
        self.feed = Feed(feeds, self.caller.owner, stream, text_frame, self)
        feeds.add(self.feed)
        self._session = self.services.commands.session(self.caller.owner, self.caller.client, "ws")
        self.request.headers.clear()  # they are not needed any more, and there are many of us
        if self.selected_subprotocol is None:
            self._read_only = True
            self._welcome(self.feed, Hello())
            self.feed.subscribe(Sub(id=1))

    def on_close(self) -> None:
        """Tornado's hook."""
        if self.feed is None:
            return
        self.feed.close()
        self._session.close()
        if self._tab is not None and self.services.feeds.tabs.get(self._tab) is self:
            del self.services.feeds.tabs[self._tab]

    # What clients say

    def on_pong(self, data: bytes) -> None:
        """Tornado's hook."""
        self._heard_s = monotonic()

    def on_message(self, message: str | bytes) -> Any:
        """Tornado's hook: dispatch. What it returns is awaited before the next is read."""
        feed = self.feed
        if feed is None or feed.closed:
            return None
        now_s = monotonic()
        passed_s, self._heard_s = now_s - self._heard_s, now_s
        try:
            said = decode(message) if isinstance(message, str) else None
        except msgspec.ValidationError as error:
            feed.say(err(id_of(str(message)), invalid(error)))
            said = []
        except (msgspec.DecodeError, RecursionError):
            said = None
        if said is None or (isinstance(said, list) and len(said) > _MESSAGES):
            self._end(4400, "bad frame")
            return None
        for one in said if isinstance(said, list) else [said]:
            self._hear(feed, one)
        wait_s = self._spend(len(message), len(said) if isinstance(said, list) else 1, passed_s)
        room = feed.room()
        return self._slow_down(wait_s, room) if wait_s > 0 or room is not None else None

    def _spend(self, n_bytes: int, n: int, passed_s: float) -> float:
        """Take a message from what may be said; for how long nothing more is heard."""
        self._bytes = min(_BYTES_BURST, self._bytes + passed_s * _BYTES_PER_S) - n_bytes
        self._messages = min(_MESSAGES_BURST, self._messages + passed_s * _MESSAGES_PER_S) - n
        over_s = max(-self._bytes / _BYTES_PER_S, -self._messages / _MESSAGES_PER_S)
        return min(_LONGEST_WAIT_S, over_s)

    async def _slow_down(self, wait_s: float, room: asyncio.Future[None] | None) -> None:
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        if room is not None:
            await room

    def _hear(self, feed: Feed, message: Message) -> None:
        if not self._welcomed and not isinstance(message, Hello):
            self._end(4400, "hello first")
            return
        match message:
            case Hello():
                self._welcome(feed, message)
            case Sub():
                feed.subscribe(message)
            case Unsub():
                feed.unsubscribe(message.id)
            case More():
                feed.more(message)
            case Cmd():
                self._command(feed, message)
            case Set():
                hidden = None if message.vis is None else message.vis == "hidden"
                feed.pace.set(rate=message.rate, hidden=hidden)
            case Beat():
                pass

    def _welcome(self, feed: Feed, hello: Hello) -> None:
        if hello.ver != VERSION:
            self._end(4406, "version")
            return
        self._welcomed = True
        feed.wants_now = "now" in hello.feat
        feed.pace.set(hidden=hello.vis == "hidden")
        if hello.cid:
            self._replace((self.caller.owner, hello.cid))
        cursor = self.services.hub.cursor
        welcome = Welcome(
            conn=uuid7(),
            epoch=cursor.epoch,
            s=cursor.seq,
            hb=HEARTBEAT_S,
            now=now_ms(),
            limits=Limits(subs=SUBSCRIPTIONS, in_flight=IN_FLIGHT, message_bytes=MESSAGE_BYTES),
            feat=("now", "counts"),
            ver=VERSION,
        )
        feed.say(encode(welcome))

    def _replace(self, tab: tuple[str, str]) -> None:
        """End what the same tab has opened before, and may not know to be gone."""
        tabs = self.services.feeds.tabs
        older = tabs.get(tab)
        if isinstance(older, LiveHandler) and older is not self:
            older._end(4409, "replaced")
        if self._tab is not None:
            tabs.pop(self._tab, None)
        self._tab = tab
        tabs[tab] = self

    def _command(self, feed: Feed, asked: Cmd) -> None:
        def answer(outcome: Outcome | SluiceError) -> None:
            if isinstance(outcome, SluiceError):
                feed.say(err(asked.id, outcome))
            else:
                feed.say(encode(_done(asked.id, outcome)))

        try:
            if self._read_only:
                raise SluiceError("bad-request", f"Open the socket with {PROTOCOL} to command.")
            if self.services.life.stopping:
                raise SluiceError("stopping", retry_after_s=5)
            command = Command(
                op=asked.op,
                job=asked.job,
                jobs=asked.jobs,
                where=_where(asked.f, self.caller.owner) if asked.f is not None else None,
                key=asked.key,
                if_v=asked.if_v,
                args=asked.args,
            )
        except SluiceError as error:
            answer(error)
            return
        self._session.submit(command, answer)

    # The feed's shell

    def beat(self, now_s: float) -> bool:
        """Ping, and end those who do not answer or do not read."""
        assert self.feed is not None
        if not self._welcomed and now_s - self._began_s > _HELLO_S:
            self._end(4511, "no hello")
        elif now_s - self._heard_s > _SILENT_S:
            self._end(4510, "silent")
        elif self.feed.pipe.stalled_s(now_s) > STALLED_S:
            self._end(4508, "stalled")
        elif now_s - self._pinged_s > _PING_S:
            self._pinged_s = now_s
            try:
                self.ping()
            except WebSocketClosedError:
                return False
        return self._welcomed

    def on_unsent(self) -> None:
        """A pong has to wait: what is sent past the stream would overtake it."""
        if self.feed is not None:
            self.feed.leave()

    def bye(self, retry_ms: int) -> None:
        """Say that the service restarts, and close."""
        assert self.feed is not None
        if self._welcomed:
            self.feed.say(encode(Bye(why="restart", retry_ms=retry_ms, final=False)))
        asyncio.get_running_loop().call_later(_BYE_S, self._end, 1012, "restart")

    def fail(self) -> None:
        """End after a fault of ours; the client resumes."""
        self._end(4500, "internal")

    def _end(self, code: int, reason: str) -> None:
        if self.feed is not None:
            self.feed.close()
            self.feed.pipe.widen()  # who does not read now shall still find the code
        self.end(code, reason)


def _where(select: Select, owner: str) -> Filter:
    """The jobs of a bulk command."""
    if select.jobs:
        raise SluiceError("invalid-field", "A list of jobs goes into jobs.", field="f")
    foreign = select.owner not in (None, owner)
    return Filter(
        owner="" if foreign else owner, kinds=select.kind, states=select.state, text=select.q
    )


def _done(id: int | str, outcome: Outcome) -> Done:
    if outcome.n is None:
        return Done(id=id, job=outcome.job, v=outcome.version)
    failed = [Refused(job=job, code=error.code, msg=error.detail) for job, error in outcome.failed]
    return Done(
        id=id, job=None, v=None, n=outcome.n, failures=outcome.failures, failed=failed or None
    )
