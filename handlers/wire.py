"""Bytes off a socket; the one place for it, whatever dialect they belong to.

Bodies with a Content-Length are read straight into a lent 1 MiB buffer, which makes Python as fast
as nginx here. For that the per-request connection object gets our ``_read_fixed_body``; should
Tornado ever rename it, the attribute is ignored and the body comes through ``data_received``:
slower, still right (a unit test notices). Chunked bodies always come that way.

Rules that keep this correct:
- A connection that waits holds no big buffer: one is borrowed only when bytes are there to read.
- A fast sender wakes us once for a batch, not for each of its writes.
- The read future is never cancelled (the stream would leak). To interrupt is to wake the waiter.
- A sender that is faster than the disk would keep the loop to itself: after each quantum, which
  shrinks as more bodies are read at once, it stands in a queue until it is its turn again.
- An answer that comes before the body was read is sent at once; then our side of the connection is
  shut, and what still arrives is thrown away for a while, so that the client sees the answer and
  not a reset. Afterwards ``StreamClosedError`` keeps Tornado from taking the rest of the body for
  the next request.
"""

from __future__ import annotations

import asyncio
import fcntl
import re
import socket
import struct
import termios
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from time import monotonic
from typing import Any
from urllib.parse import unquote

import multipart
from tornado.http1connection import HTTP1Connection
from tornado.iostream import IOStream, StreamClosedError

from errors import SluiceError
from jobs.uploads import ClientGone

_BIG_BYTES = 1 << 20
_SMALL_BYTES = 4 << 10  # what a connection that waits holds
_FAST_BYTES = 16 << 10  # a sender that delivers more at once is worth batches
_TURN_BYTES = 4 << 20  # all bodies together move about this much in one turn of the loop
_LEAST_BYTES = 512 << 10
_TRASH_BYTES = 64 << 10
_TURN_S = 0.001  # how long a body lets others finish what they have begun
_BATCH_BYTES, _BATCH_S = 256 << 10, 0.05  # what to wait for, and for how long
_POOL = 16  # big buffers kept for reuse

_DRAIN_ALL_BYTES, _DRAIN_ALL_S = 64 << 20, 5.0
_DRAIN_SOME_BYTES, _DRAIN_SOME_S = 8 << 20, 2.0

_EXTENDED_NAME = re.compile(r"(?i);\s*filename\*\s*=\s*utf-8'[^';]*'([^\s;\"]+)")


class _Turns:
    """Shares the loop among the bodies that have bytes to move.

    They stand in a queue, and a turn of the loop lets only some of them go on: so pieces can be
    big, which is cheap, and a turn is short all the same, however many bodies there are.
    """

    def __init__(self) -> None:
        self._queue: deque[asyncio.Future[None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None  # on which they are let go on
        self._until = 0.0  # when those in the queue go on, whatever else is ready
        self._spent = 0  # bytes that bodies were allowed in this turn without queueing
        self._pool: list[bytearray] = []

    @property
    def quantum(self) -> int:
        """How much one body may move before it stands in the queue again."""
        return min(_BIG_BYTES, self.share)

    @property
    def share(self) -> int:
        """The same without the bound of a big buffer."""
        return max(_LEAST_BYTES, _TURN_BYTES // (len(self._queue) + 1))

    def may_move(self, n: int) -> bool:
        """Whether a body that has just been woken may move ``n`` bytes without queueing.

        Many can be woken in one turn: the first ones need not wait, and the others shall.
        """
        if self._queue:
            return False
        if not self._spent:
            asyncio.get_running_loop().call_soon(self._end_turn)
        self._spent += n
        return self._spent <= _TURN_BYTES

    def _end_turn(self) -> None:
        self._spent = 0

    async def next(self) -> None:
        """Return when it is the body's turn; the loop has turned at least once."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._queue.clear()
            loop.call_soon(self._go_on)
        turn = loop.create_future()
        self._queue.append(turn)
        await turn

    def _go_on(self) -> None:
        """Let the next bodies go on.

        A small request takes several turns of the loop, and pieces of bodies in each of them would
        make it slow. So they wait, for a short time, while anything else is ready. (``_ready`` is
        asyncio's own; with a loop that has no such thing they never wait.)
        """
        loop = asyncio.get_running_loop()
        now = monotonic()
        self._until = self._until or now + _TURN_S  # those that went on last have had their turn
        if not getattr(loop, "_ready", None) or now >= self._until:
            for _ in range(min(len(self._queue), max(1, _TURN_BYTES // self.quantum))):
                turn = self._queue.popleft()
                if not turn.done():
                    turn.set_result(None)
            self._until = 0.0
        if self._queue:
            loop.call_soon(self._go_on)
        else:
            self._loop = None

    def borrow(self) -> bytearray:
        """A big buffer."""
        return self._pool.pop() if self._pool else bytearray(_BIG_BYTES)

    def give_back(self, buffer: bytearray) -> None:
        """Return a big buffer whose views are not used any more."""
        if len(self._pool) < _POOL:
            self._pool.append(buffer)


turns = _Turns()


# Private names of Tornado's; each is only used if it is there, and a test says so when it goes.
_FIXED, _CHUNKED = "_read_fixed_body", "_read_chunked_body"


def read_body_by(connection: HTTP1Connection, read: Callable[[int, Any], Awaitable[None]]) -> None:
    """Let ``read(length, delegate)`` take this request's body instead of Tornado.

    The object lives for one request, so nothing leaks to the next. Tornado still checks the
    length's syntax and the limit, and answers Expect: 100-continue.
    """
    setattr(connection, _FIXED, read)


def block_body(connection: HTTP1Connection, *, fed: bool) -> None:
    """Keep Tornado from reading on, and from taking the rest for the next request.

    ``fed``: it is in the middle of a chunked body, and will find the stream closed by itself.
    """

    async def closed(*_: Any) -> None:
        raise StreamClosedError

    setattr(connection, _FIXED, closed)
    if not fed:
        setattr(connection, _CHUNKED, closed)


class Body:
    """A request's body as pieces (see jobs.uploads.Pieces), pulled by whoever iterates.

    ``length`` is None for a chunked body. ``gate``, if set, is awaited before bytes are asked for,
    so that a paused transfer stands there with empty hands. ``most_bytes``, if set, bounds the
    piece that follows; not that of a chunked body, which Tornado cuts.
    """

    def __init__(self, connection: HTTP1Connection, length: int | None) -> None:
        self.length = length
        self.left = length
        self.gate: Callable[[], Awaitable[None]] | None = None
        self.most_bytes: Callable[[], int | None] | None = None
        self.read_into_used = False
        self._stream: IOStream = connection.stream
        self._error: SluiceError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._pending: Awaitable[int] | None = None  # a read that was interrupted
        self._small: bytearray | None = None
        self._big: bytearray | None = None
        self._plain = type(self._stream) is IOStream  # with TLS the kernel counts other bytes
        self._fast = self._plain
        self._wakes_at = 1
        self._work = 0
        self._chunk: bytes | None = None  # handed over by data_received
        self._taken: asyncio.Future[None] | None = None
        self._fed = False
        self._ended = length == 0
        self._discard_bytes: int | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def unread(self) -> bool:
        """Whether a part of the body is still to come."""
        return not self._ended and self.left != 0

    def __aiter__(self) -> AsyncIterator[memoryview]:
        return self

    async def __anext__(self) -> memoryview:
        self._return_big()
        if self._work >= turns.quantum:
            self._work = 0
            await turns.next()
        if self.gate is not None:
            await self.gate()
        if self._error is not None:
            raise self._error
        piece = await (self._next_fed() if self._fed else self._next_read())
        if piece is None:
            self._ended = True
            raise StopAsyncIteration
        self._work += len(piece)
        return piece

    def interrupt(self, error: SluiceError) -> None:
        """See Peer."""
        self._error = error
        self._wake()

    def let_go(self) -> None:
        """The transfer has ended: nothing holds or interrupts the rest of the body any more."""
        self.gate = self.most_bytes = self._error = None

    def bound(self, time_s: float) -> None:
        """Interrupt the body if no transfer, which has clocks of its own, holds it after that.

        So a sender can't hold a connection with a beginning, or a rest, that never ends.
        """
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(time_s, self._out_of_time)

    def _out_of_time(self) -> None:
        self._timer = None
        if self.gate is None:
            self.interrupt(SluiceError("upload-stalled"))

    # Pulled from the stream

    async def _next_read(self) -> memoryview | None:
        left = self.left
        if not left:
            return None
        self.read_into_used = True
        piece = self._piece(left)
        view = self._buffer(piece)
        future = self._stream.read_into(view, partial=True)  # type: ignore[arg-type]
        if not future.done():  # type: ignore[attr-defined]
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            future.add_done_callback(lambda _: self._wake())  # type: ignore[attr-defined]
            self._wake_at(min(piece, _BATCH_BYTES) if self._fast else 1)
            timer = loop.call_later(_BATCH_S, self._is_slow) if self._wakes_at > 1 else None
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
            if self._error is not None and not future.done():  # type: ignore[attr-defined]
                self._pending = future
                raise self._error
        try:
            n = await future
        except StreamClosedError:
            raise ClientGone from None
        if n == _SMALL_BYTES and self._big is None and self._plain:
            n = await self._read_more(view, left)
            view = view if self._big is None else memoryview(self._big)
        self.left = left - n
        self._fast = self._plain and (self._fast or n > _FAST_BYTES)
        if n == left:
            self._wake_at(1)  # the next request on this connection may be short
        return view[:n]

    def _piece(self, left: int) -> int:
        """How long the next piece may be; 0 while none may be read."""
        most = self.most_bytes() if self.most_bytes is not None else None
        return left if most is None else min(left, most)

    async def _read_more(self, beginning: memoryview, left: int) -> int:
        """Put what else has come behind a beginning, in a big buffer; how much there is then.

        A batch of which we were told by its first bytes so is one piece and not two. The beginning
        may have been waited for since before a pause or a limit, which hold for the rest of it.
        """
        n = len(beginning)
        if left <= n or not _readable_bytes(self._stream):
            return n
        if not turns.may_move(min(left, turns.quantum)):
            await turns.next()
        limit = min(self._piece(left), turns.quantum)
        if limit <= n:
            return n
        self._big = turns.borrow()
        self._big[:n] = beginning
        rest = memoryview(self._big)[n:limit]
        with suppress(StreamClosedError):  # what came before is still handed on
            n += await self._stream.read_into(rest, partial=True)  # type: ignore[arg-type]
        return n

    def _wake_at(self, n: int) -> None:
        """Let the kernel wake us only when ``n`` bytes have come (SO_RCVLOWAT), or the end.

        A sender that writes 64 KiB at a time would else wake us for each, which on a busy machine
        costs more than the bytes themselves.
        """
        if n != self._wakes_at and not self._stream.closed():
            self._wakes_at = n
            self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, n)

    def _is_slow(self) -> None:
        """The sender needs longer for a batch: take what there is."""
        self._fast = False
        self._wake_at(1)

    def _buffer(self, piece: int) -> memoryview:
        """A view to read into: big if bytes are waiting, else small, never beyond the piece."""
        n = min(piece, turns.quantum)
        if n > _SMALL_BYTES and _readable_bytes(self._stream) > 0:
            self._big = turns.borrow()
            return memoryview(self._big)[:n]
        if self._small is None:
            self._small = bytearray(_SMALL_BYTES)
        return memoryview(self._small)[: min(piece, _SMALL_BYTES)]

    def _return_big(self) -> None:
        if self._big is not None and self._pending is None:
            turns.give_back(self._big)
            self._big = None

    # Handed over by Tornado

    async def feed(self, chunk: bytes) -> None:
        """Take a chunk from ``data_received``; returns when it was consumed."""
        self._fed = True
        if self._discard_bytes is not None:
            self._discard_bytes -= len(chunk)
            if self._discard_bytes <= 0:
                self._stream.close()
            return
        self._chunk = chunk
        self._taken = asyncio.get_running_loop().create_future()
        self._wake()
        await self._taken

    def feed_end(self) -> None:
        """The body is complete."""
        self._fed = True
        self._ended = True
        self._wake()

    def discard(self) -> None:
        """Take what still comes, for nobody."""
        self._discard_bytes = self._discard_bytes or 1 << 62
        self._chunk = None
        self.closed()

    async def _next_fed(self) -> memoryview | None:
        if self._taken is not None and not self._taken.done() and self._chunk is None:
            self._taken.set_result(None)
        while self._chunk is None:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            if self._stream.closed():
                raise ClientGone
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        chunk, self._chunk = self._chunk, None
        return memoryview(chunk)

    def closed(self) -> None:
        """The body is over, or the connection has gone: whoever waits for a chunk learns it."""
        if self._timer is not None:
            self._timer.cancel()
        if self._taken is not None and not self._taken.done():
            self._taken.set_result(None)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # After an early answer

    async def drain(self) -> None:
        """Shut our side, and throw away what still comes, within bounds."""
        if self._stream.closed():  # the client had gone before it could be answered
            return
        all_of_it = self.left is not None and self.left <= _DRAIN_ALL_BYTES
        limit_bytes = _DRAIN_ALL_BYTES if all_of_it else _DRAIN_SOME_BYTES
        limit_s = _DRAIN_ALL_S if all_of_it else _DRAIN_SOME_S
        self._wake_at(1)
        with suppress(OSError):
            self._stream.socket.shutdown(socket.SHUT_WR)
        with suppress(TimeoutError, StreamClosedError):
            async with asyncio.timeout(limit_s):
                if self._fed:
                    await self._discard_fed(limit_bytes)
                else:
                    await self._discard_read(limit_bytes)

    async def _discard_fed(self, limit_bytes: int) -> None:
        self._discard_bytes = limit_bytes
        self.discard()
        while not self._ended and not self._stream.closed():
            await asyncio.sleep(0.02)

    async def _discard_read(self, limit_bytes: int) -> None:
        trash = bytearray(_TRASH_BYTES)
        while (self.left or 0) > 0 and limit_bytes > 0:
            n = min(self.left or 0, len(trash))
            pending, self._pending = self._pending, None
            future = pending or self._stream.read_into(
                memoryview(trash)[:n],  # type: ignore[arg-type]
                partial=True,
            )
            got = await asyncio.shield(future)
            self.left = (self.left or 0) - got
            limit_bytes -= got
            await turns.next()
        # All of it is here: wait for the client to close, so that it has read the answer.
        while limit_bytes > 0 and not self._stream.closed():
            future = self._stream.read_into(trash, partial=True)
            limit_bytes -= await asyncio.shield(future)


def _readable_bytes(stream: IOStream) -> int:
    """What the kernel (or the TLS layer) holds for us right now."""
    try:
        pending = getattr(stream.socket, "pending", None)
        if pending is not None and pending():
            return int(pending())
        raw = fcntl.ioctl(stream.socket.fileno(), termios.FIONREAD, b"\0\0\0\0")
        return int(struct.unpack("i", raw)[0])
    except (OSError, ValueError):
        return 0


class Part:
    """One file of a form: iterate it for its bytes, to the end."""

    def __init__(self, form: Form, filename: str) -> None:
        self.filename = filename
        self.gate: Callable[[], Awaitable[None]] | None = None  # the body's own are asked
        self.most_bytes: Callable[[], int | None] | None = None
        self._form = form

    def __aiter__(self) -> AsyncIterator[memoryview]:
        return self

    async def __anext__(self) -> memoryview:
        event = await self._form.next_event()
        if event is None or isinstance(event, multipart.MultipartSegment):
            raise StopAsyncIteration
        return memoryview(event)

    def interrupt(self, error: SluiceError) -> None:
        """See Peer."""
        self._form.body.interrupt(error)


class Form:
    """A multipart/form-data body, parsed as it arrives (RFC 7578)."""

    def __init__(self, body: Body, content_type: str) -> None:
        self.body = body
        self.fields: list[str] = []  # the names of the parts seen
        _, options = multipart.parse_options_header(content_type)
        boundary = options.get("boundary", "")
        if not boundary or len(boundary) > 70:
            raise SluiceError("multipart-invalid", "The Content-Type names no valid boundary.")
        self._tail_bytes = len(boundary) + 8  # CRLF -- boundary -- CRLF
        self._parser = multipart.PushMultipartParser(
            boundary, max_segment_count=1000, max_header_size=8192
        )
        self._delimiter = b"\r\n--" + boundary.encode()
        self._amid = False  # the parser is amid a part, and holds nothing back
        self._events = self._parse()
        self._parsed = -2  # before the first boundary there is no line break

    async def next_part(self, field: str | None) -> Part | None:
        """The next file under ``field`` (None: any), skipping other parts; None at the end.

        Raises multipart-invalid for a malformed or truncated form.
        """
        while not isinstance(event := await self.next_event(), _End):
            if not isinstance(event, multipart.MultipartSegment):
                continue
            self.fields.append(event.name)
            filename = _filename(event)
            if field in (None, event.name) and filename is not None:
                return Part(self, filename)
        return None

    @property
    def rest_bytes(self) -> int | None:
        """How long the current part is if it is the last one."""
        if self.body.length is None:
            return None
        return max(0, self.body.length - self._parsed - self._tail_bytes)

    async def next_event(self) -> Any:
        """A segment that begins, bytes of it, None at its end, or the form's end.

        The bytes are valid only until the next event is asked for.
        """
        return await anext(self._events, _END)

    async def _parse(self) -> AsyncIterator[Any]:
        parser = self._parser
        sized = False  # the part tells its length, which the parser checks
        try:
            async for piece in self.body:
                if self._amid and self._is_content(piece, 0):
                    self._parsed += len(piece)
                    yield piece
                    continue
                event: Any = None
                for event in parser.parse(bytes(piece)):
                    if isinstance(event, multipart.MultipartSegment):
                        sized = event.header("Content-Length") is not None
                        self._parsed += sum(len(n) + len(v) + 4 for n, v in event.headerlist)
                        self._parsed += self._tail_bytes
                    elif event is not None:
                        self._parsed += len(event)
                    yield event
                tail = len(piece) - len(self._delimiter) - 2
                amid = isinstance(event, bytes) and tail > 0 and not sized
                self._amid = amid and self._is_content(piece, tail)
            parser.close()
        except multipart.MultipartError as error:
            raise SluiceError("multipart-invalid", f"The form is malformed: {error}.") from error

    def _is_content(self, piece: memoryview, start: int) -> bool:
        """Whether no delimiter lies in a piece from ``start`` on, or begins at its end.

        Amid a part such a piece needs no parser, which saves a copy of nearly all bytes.
        """
        whole, end = piece.obj, len(piece)  # a piece is the beginning of its buffer
        assert isinstance(whole, bytes | bytearray)
        if whole.find(self._delimiter, start, end) >= 0:
            return False
        last = whole.rfind(b"\r", max(start, end - len(self._delimiter)), end)
        return last < 0 or not self._delimiter.startswith(whole[last:end])


def _filename(segment: Any) -> str | None:
    """The name of a part's file. ``filename*``, which RFC 7578 forbids, is sent by some."""
    unquoted = re.sub('"[^"]*"', '""', segment.header("Content-Disposition", ""))
    if extended := _EXTENDED_NAME.search(unquoted):
        with suppress(UnicodeDecodeError):
            return unquote(extended[1], errors="strict")
    return segment.filename  # type: ignore[no-any-return]


class _End:
    """The end of a form."""


_END = _End()
