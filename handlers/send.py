"""Files onto a socket; the one place for it, whatever dialect they belong to.

They leave by sendfile, waiting on an epoll of our own: Tornado's registration of the socket would
replace ours. TLS, and blobs without a descriptor, take the plain path. Between two pieces the
transfer's checkpoint is asked, so that a pause stops the writing and TCP holds the reader. A reader
that takes nothing is let go after a while, whatever it is that waits for it: headers, the text
between two ranges, or bytes. So is one that has gone, at once, also while it is paused.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import select
import time
from collections.abc import Awaitable
from contextlib import suppress
from email.utils import formatdate
from typing import NamedTuple, Protocol
from urllib.parse import quote

from tornado.http1connection import HTTP1Connection
from tornado.iostream import IOStream, StreamClosedError

from errors import SluiceError
from handlers import fields
from handlers.base import BaseHandler
from handlers.ranges import Shown, Span, byteranges, decide
from handlers.wire import turns
from jobs import File, Job, Reader
from jobs.uploads import ClientGone

_FILE_BYTES = 2 << 20  # one sendfile call; it copies nothing, and takes no longer than a 1 MiB read
_PLAIN_BYTES = 256 << 10
_READ_AHEAD_BYTES = 8 << 20
_REMAINING = "_expected_content_remaining"  # a private name of Tornado's

# Shown in the browser. Anything else is saved, and so is all that can carry scripts, as HTML, SVG
# and PDF can.
_INLINE = frozenset(
    {
        "text/plain",
        "image/png",
        "image/jpeg",
        "image/gif",
        "image/webp",
        "audio/mpeg",
        "audio/ogg",
        "video/mp4",
        "video/webm",
    }
)


class Gate(Protocol):
    """What a file on its way out asks between two pieces (see jobs.downloads.Download)."""

    @property
    def held(self) -> bool:
        """Whether nothing may leave now."""
        ...

    @property
    def most_bytes(self) -> int | None:
        """How long the next piece may be; None: any length; 0 while nothing may leave."""
        ...

    async def checkpoint(self) -> None:
        """Return when the next piece may leave."""
        ...

    def moved(self, n: int) -> None:
        """``n`` bytes have left."""
        ...


class _Writable:
    """Tells when sockets can be written, on an epoll of its own that hangs in the loop."""

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: dict[int, asyncio.Future[None]] = {}

    async def wait(self, fd: int, waiter: asyncio.Future[None]) -> None:
        """Return when ``fd`` can be written (or has failed), or when ``waiter`` is set."""
        epoll = self._open()
        self._waiters[fd] = waiter
        events = select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLONESHOT
        try:
            try:
                epoll.register(fd, events)
            except FileExistsError:
                epoll.modify(fd, events)
            await waiter
        finally:
            if self._waiters.get(fd) is waiter:
                del self._waiters[fd]

    def forget(self, fd: int) -> None:
        """The socket will be closed, or used by others again."""
        with suppress(OSError, ValueError):
            if self._epoll is not None:
                self._epoll.unregister(fd)

    def _open(self) -> select.epoll:
        loop = asyncio.get_running_loop()
        if self._epoll is None or self._loop is not loop:
            self._epoll, self._loop = select.epoll(), loop
            loop.add_reader(self._epoll.fileno(), self._ready)
        return self._epoll

    def _ready(self) -> None:
        assert self._epoll is not None
        for fd, _ in self._epoll.poll(0):
            waiter = self._waiters.get(fd)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)


writable = _Writable()


class Sender:
    """Sends an answer's headers, then bytes of a blob as its body."""

    def __init__(self, handler: BaseHandler) -> None:
        self._handler = handler
        self._connection: HTTP1Connection = handler.connection
        self._stream: IOStream = self._connection.stream
        self._idle_s = handler.services.settings.write_idle_s
        self._error: SluiceError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.sendfile_used = False

    def interrupt(self, error: SluiceError) -> None:
        """See Peer."""
        self._error = error
        self.wake()

    def wake(self) -> None:
        """Look again at what is waited for: something has changed."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def head(self, gate: Gate) -> None:
        """Send the headers. Raises what ``send`` raises."""
        await self._written(self._handler.flush(), gate)

    async def send(self, reader: Reader, start: int, end: int, gate: Gate) -> int:
        """Send ``[start, end)``; the bytes that were handed to the kernel.

        Raises ClientGone, or what ``gate`` or ``interrupt`` brings.
        """
        fd = reader.fileno()
        plain = type(self._stream) is not IOStream or fd is None
        if plain or not hasattr(self._connection, _REMAINING):
            return await self._send_plain(reader, start, end, gate)
        assert fd is not None
        return await self._sendfile(fd, start, end, gate)

    async def _sendfile(self, source: int, start: int, end: int, gate: Gate) -> int:
        self.sendfile_used = True
        if self._stream.closed():  # since the headers were flushed
            raise ClientGone
        target = self._stream.socket.fileno()
        at = ahead = start
        work = 0
        try:
            while at < end:
                await self._pass(gate)
                if ahead < end and at >= ahead - _READ_AHEAD_BYTES // 2:  # each page once
                    more = min(_READ_AHEAD_BYTES, end - ahead)
                    os.posix_fadvise(source, ahead, more, os.POSIX_FADV_WILLNEED)
                    ahead += more
                quantum = min(_FILE_BYTES, turns.share)
                try:
                    n = os.sendfile(target, source, at, _piece(end - at, quantum, gate))
                except BlockingIOError:
                    work = 0
                    await self._wait(target, gate)
                    continue
                if n == 0:
                    raise SluiceError("storage-failed", "The file is shorter than it was.")
                at += n
                work += n
                gate.moved(n)
                if work >= quantum:
                    work = 0
                    await turns.next()
        except OSError as error:
            raise ClientGone from error
        finally:
            if not self._stream.closed():  # else the number may be another socket's by now
                writable.forget(target)
        remaining = getattr(self._connection, _REMAINING)
        if remaining is not None:  # Tornado counts what passes through its own write
            setattr(self._connection, _REMAINING, remaining - (at - start))
        return at - start

    async def _send_plain(self, reader: Reader, start: int, end: int, gate: Gate) -> int:
        at = start
        while at < end:
            await self._pass(gate)
            data = await reader.read(at, _piece(end - at, _PLAIN_BYTES, gate))
            if not data:
                raise SluiceError("storage-failed", "The file is shorter than it was.")
            await self._written(self._write(data), gate)
            at += len(data)
            gate.moved(len(data))
            await turns.next()
        return at - start

    async def text(self, text: bytes, gate: Gate) -> None:
        """Send bytes that are not of the blob. Raises what ``send`` raises."""
        await self._pass(gate)
        await self._written(self._write(text), gate)
        gate.moved(len(text))

    def _write(self, data: bytes) -> Awaitable[None]:
        self._handler.write(data)
        self._handler.flush()
        # The future of flush hides that bytes were dropped; this one follows them and tells.
        try:
            return self._stream.write(b"")
        except StreamClosedError as error:
            raise ClientGone from error

    async def _written(self, write: Awaitable[None], gate: Gate) -> None:
        """Return when a write of Tornado's is done. Raises what ``send`` raises.

        If it does so, the stream is closed: part of what was written may have left.
        """
        writing = asyncio.ensure_future(write)
        try:
            while not writing.done():
                self._waiter = asyncio.get_running_loop().create_future()
                done, _ = await asyncio.wait(
                    [writing, self._waiter],
                    timeout=self._idle_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done and gate.held:
                    await gate.checkpoint()
                elif not done:
                    raise ClientGone("The reader read nothing for too long")
                elif writing not in done and self._error is not None:
                    raise self._error
            await writing
        except StreamClosedError as error:
            raise ClientGone from error
        finally:
            self._waiter = None
            if not writing.done():
                self._stream.close()  # which ends the writing
                with suppress(StreamClosedError):
                    await writing

    async def _pass(self, gate: Gate) -> None:
        await gate.checkpoint()
        if self._error is not None:
            raise self._error
        if self._stream.closed():
            raise ClientGone

    async def _wait(self, fd: int, gate: Gate) -> None:
        """Return when ``fd`` may take more, or when the time is up but the clock stands."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._idle_s):
                await writable.wait(fd, self._waiter)
        except TimeoutError:
            if gate.held:
                return
            raise ClientGone("The reader read nothing for too long") from None
        finally:
            self._waiter = None


def _piece(left: int, most: int, gate: Gate) -> int:
    """How many bytes to send at once, now that the checkpoint was passed."""
    bound = gate.most_bytes
    return min(left, most) if bound is None else min(left, most, bound)


def disposition(name: str, attachment: bool) -> str:
    """Content-Disposition with a name in ASCII and, exactly, in UTF-8 (RFC 6266, appendix D).

    Of a path only its last part, and no control characters.
    """
    name = re.sub(r"[\x00-\x1f\x7f]", "", re.split(r"[/\\]", name)[-1]) or "download"
    ascii_name = re.sub(r'[^\x20-\x7e]|["%]', "_", name)
    exact_name = quote(name, safe="", errors="replace")
    kind = "attachment" if attachment else "inline"
    return f"{kind}; filename=\"{ascii_name}\"; filename*=UTF-8''{exact_name}"


async def send_stored(
    handler: BaseHandler, file: File, *, attachment: bool = False, track: bool = False
) -> None:
    """Answer GET or HEAD with a stored file, or what the request wants of it (see ranges).

    The address must be one at which the bytes never change. ``track``: bytes that leave are a job,
    which the header Sluice-Job names. Raises version-mismatch, range-not-satisfiable.
    """
    get = handler.request.method == "GET"
    shown = Shown(file.etag, file.created_at // 1000, file.bytes)
    decision = decide(handler.request.headers, shown, get=get, now_s=time.time())
    handler.set_status(decision.status)
    handler.set_header("Cache-Control", "private, max-age=31536000, immutable")
    if decision.status == 304:
        _identify(handler, file)
        return
    file = await handler.services.files.digested(file, asked=_wants_digest(handler))
    _describe(handler, file, attachment=attachment)
    if decision.status == 206:
        body = _partial(handler, file, decision.spans)
    else:
        body = _Body([_Part(b"", *span) for span in decision.spans])
    reader = await handler.services.files.reader(file)
    try:
        job = await _tracked(handler, file, body.length_bytes) if track and get else None
        await _send(handler, reader, body, job)
    finally:
        await reader.close()


async def send_file(
    handler: BaseHandler,
    file: File,
    start: int,
    end: int,
    *,
    job: Job | None = None,
    attachment: bool = False,
) -> None:
    """Answer with bytes ``[start, end)`` of a file; with ``job``, as that job.

    A failure after the headers closes the connection short of its Content-Length.
    """
    _describe(handler, file, attachment=attachment)
    try:
        reader = await handler.services.files.reader(file)
    except SluiceError as error:
        if job is not None:
            await handler.services.downloads.fail(job, error)
        raise
    try:
        await _send(handler, reader, _Body([_Part(b"", start, end)]), job)
    finally:
        await reader.close()


class _Part(NamedTuple):
    """Bytes ``[start, end)`` of the file, and the text before them."""

    text: bytes
    start: int
    end: int


class _Body(NamedTuple):
    """What follows the headers."""

    parts: list[_Part]
    tail: bytes = b""

    @property
    def length_bytes(self) -> int:
        """Its Content-Length."""
        return len(self.tail) + sum(len(text) + end - start for text, start, end in self.parts)


def _describe(handler: BaseHandler, file: File, *, attachment: bool) -> None:
    """Set the headers that GET, HEAD and each 206 have in common.

    Both digests are of the whole file, whatever part of it is sent: that is what a client which
    puts the parts together can check.
    """
    handler.set_header("Content-Type", file.media_type)
    handler.set_header("Accept-Ranges", "bytes")
    _identify(handler, file)
    inline = not attachment and file.media_type in _INLINE
    handler.set_header("Content-Disposition", disposition(file.name, not inline))
    if digest := fields.repr_digest(file.digest):
        handler.set_header("Repr-Digest", digest)
        handler.set_header("Digest", fields.legacy_digest(file.digest))


def _wants_digest(handler: BaseHandler) -> bool:
    headers = handler.request.headers
    return fields.wants_digest(headers.get("Want-Repr-Digest")) or fields.wants_legacy_digest(
        headers.get("Want-Digest")
    )


def _identify(handler: BaseHandler, file: File) -> None:
    handler.set_header("ETag", file.etag)
    handler.set_header("Last-Modified", formatdate(file.created_at // 1000, usegmt=True))


def _partial(handler: BaseHandler, file: File, spans: list[Span]) -> _Body:
    """The body of a 206; says in the headers of which kind it is (RFC 9110 section 15.3.7)."""
    if len(spans) == 1:
        start, end = spans[0]
        handler.set_header("Content-Range", f"bytes {start}-{end - 1}/{file.bytes}")
        return _Body([_Part(b"", start, end)])
    boundary = secrets.token_hex(16)  # nobody can have written it into a file
    handler.set_header("Content-Type", f"multipart/byteranges; boundary={boundary}")
    heads, tail = byteranges(spans, file.media_type, file.bytes, boundary)
    return _Body([_Part(head, *span) for head, span in zip(heads, spans, strict=True)], tail)


async def _tracked(handler: BaseHandler, file: File, n: int) -> Job:
    """Make a job of an answer of ``n`` bytes, and say so."""
    caller = handler.caller
    job = await handler.services.downloads.create(
        file, n, owner=caller.owner, client=caller.client, by=caller.by("rest"), protocol="rest"
    )
    handler.set_header("Sluice-Job", job.id)
    return job


async def _send(handler: BaseHandler, reader: Reader, body: _Body, job: Job | None) -> None:
    services = handler.services
    handler.set_header("Content-Length", str(body.length_bytes))
    if handler.request.method == "HEAD":
        return
    sender = Sender(handler)
    sending = _Sending(handler, sender, job)
    try:
        if job is None:
            await sending.run(reader, body, services.downloads)
        else:
            async with services.downloads.connect(job, sender) as download:
                await download.checkpoint()  # so that an early end can still be an answer
                await sending.run(reader, body, download)
    except (SluiceError, ClientGone):
        if not sending.begun:
            raise
        handler.connection.stream.close()


class _Sending:
    """One answer on its way."""

    def __init__(self, handler: BaseHandler, sender: Sender, job: Job | None) -> None:
        self.begun = False
        self._handler = handler
        self._sender = sender
        self._job = job
        handler.connection.set_close_callback(self._closed)

    async def run(self, reader: Reader, body: _Body, gate: Gate) -> None:
        """Flush the headers, then send."""
        self.begun = True
        sender = self._sender
        await sender.head(gate)
        for number, part in enumerate(body.parts):
            if number:
                await turns.next()  # many small parts are work, too
            if part.text:
                await sender.text(part.text, gate)
            await sender.send(reader, part.start, part.end, gate)
        if body.tail:
            await sender.text(body.tail, gate)

    def _closed(self) -> None:
        """The connection has ended, which our own epoll does not see."""
        self._handler.on_connection_close()
        self._sender.wake()
        if self._job is not None:
            self._handler.services.downloads.gone(self._job)
