"""Files onto a socket; the one place for it, whatever dialect they belong to.

They leave by sendfile, waiting on an epoll of our own: Tornado's registration of the socket would
replace ours. TLS, and blobs without a descriptor, take the plain path. Between two pieces the
transfer's checkpoint is asked, so that a pause stops the writing and TCP holds the reader.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
from collections.abc import Awaitable, Callable
from contextlib import suppress
from email.utils import formatdate
from typing import Protocol
from urllib.parse import quote

from tornado.http1connection import HTTP1Connection
from tornado.iostream import IOStream, StreamClosedError

from errors import SluiceError
from handlers import fields
from handlers.base import BaseHandler
from handlers.wire import turns
from jobs import File, Job, Reader
from jobs.uploads import ClientGone

_FILE_BYTES = 2 << 20  # one sendfile call; it copies nothing, and takes no longer than a 1 MiB read
_PLAIN_BYTES = 256 << 10
_READ_AHEAD_BYTES = 8 << 20
_REMAINING = "_expected_content_remaining"  # a private name of Tornado's

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")

# Shown in the browser; anything else, and all that can run scripts, is saved.
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
        "application/pdf",
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
        """How long the next piece may be; None: any length."""
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
    """Sends bytes of a blob as the body of an answer whose headers were flushed."""

    def __init__(self, connection: HTTP1Connection, idle_s: float) -> None:
        self._connection = connection
        self._stream: IOStream = connection.stream
        self._idle_s = idle_s
        self._error: SluiceError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.sendfile_used = False

    def interrupt(self, error: SluiceError) -> None:
        """See Peer."""
        self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def send(
        self,
        reader: Reader,
        start: int,
        end: int,
        write: Callable[[bytes], Awaitable[None]],
        gate: Gate,
    ) -> int:
        """Send ``[start, end)``; the bytes that were handed to the kernel.

        ``write`` is the plain path. Raises ClientGone, or what ``gate`` or ``interrupt`` brings.
        """
        fd = reader.fileno()
        plain = type(self._stream) is not IOStream or fd is None
        if plain or not hasattr(self._connection, _REMAINING):
            return await self._send_plain(reader, start, end, write, gate)
        assert fd is not None
        return await self._sendfile(fd, start, end, gate)

    async def _sendfile(self, source: int, start: int, end: int, gate: Gate) -> int:
        self.sendfile_used = True
        target = self._stream.socket.fileno()
        at = ahead = start
        work = 0
        try:
            while at < end:
                await self._pass(gate)
                if at >= ahead - _READ_AHEAD_BYTES // 2:  # each page is asked for once
                    os.posix_fadvise(source, ahead, _READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
                    ahead += _READ_AHEAD_BYTES
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
            writable.forget(target)
        # Tornado counts what passes through its own write.
        setattr(self._connection, _REMAINING, 0)
        return at - start

    async def _send_plain(
        self,
        reader: Reader,
        start: int,
        end: int,
        write: Callable[[bytes], Awaitable[None]],
        gate: Gate,
    ) -> int:
        at = start
        try:
            while at < end:
                await self._pass(gate)
                data = await reader.read(at, _piece(end - at, _PLAIN_BYTES, gate))
                if not data:
                    raise SluiceError("storage-failed", "The file is shorter than it was.")
                writing = asyncio.ensure_future(write(data))
                while not (await asyncio.wait([writing], timeout=self._idle_s))[0]:
                    if not gate.held:
                        self._stream.close()  # which ends the writing
                await writing
                at += len(data)
                gate.moved(len(data))
                await turns.next()
        except StreamClosedError as error:
            raise ClientGone from error
        return at - start

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
            raise ClientGone("the reader read nothing for too long") from None
        finally:
            self._waiter = None


def _piece(left: int, most: int, gate: Gate) -> int:
    """How many bytes to send at once."""
    return min(left, most, gate.most_bytes or most)


def disposition(name: str, attachment: bool) -> str:
    """Content-Disposition with a name in ASCII and, exactly, in UTF-8 (RFC 6266)."""
    ascii_name = re.sub(r'[^\x20-\x7e]|["\\%]', "_", name)
    kind = "attachment" if attachment else "inline"
    return f"{kind}; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(name, safe='')}"


async def send_stored(handler: BaseHandler, file: File) -> None:
    """Answer GET or HEAD with a stored file: all of it, or one range (RFC 9110 sections 13, 14).

    The address must be one at which the bytes never change. Raises version-mismatch,
    range-not-satisfiable.
    """
    headers = handler.request.headers
    handler.set_header("Cache-Control", "private, max-age=31536000, immutable")
    if not {file.etag, "*"} & _tags(headers.get("If-Match", "*")):
        raise SluiceError("version-mismatch", "If-Match names another version of the file.")
    given = headers.get("If-None-Match", "")
    if {file.etag, "*"} & {tag.removeprefix("W/") for tag in _tags(given)}:
        handler.set_header("ETag", file.etag)
        handler.set_status(304)
        return
    start, end = 0, file.bytes
    # A range is only meant for the version that the client has begun (section 13.1.5).
    applies = headers.get("If-Range", file.etag).strip() == file.etag
    if handler.request.method == "GET" and applies:
        found = byte_range(headers.get("Range", ""), file.bytes)
        if found is not None:
            start, end = found
            handler.set_status(206)
            handler.set_header("Content-Range", f"bytes {start}-{end - 1}/{file.bytes}")
    await send_file(handler, file, start, end)


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """The one range that is asked for as ``[start, end)``; None to send everything.

    Other units and several ranges are ignored. Raises range-not-satisfiable.
    """
    if not header.startswith("bytes=") or "," in header or size == 0:
        return None
    match = _RANGE.fullmatch(header.replace(" ", ""))
    start = end = 0
    if match is not None and match[1]:
        start = int(match[1])
        end = min(int(match[2]) + 1, size) if match[2] else size
    elif match is not None and match[2]:
        start, end = max(0, size - int(match[2])), size
    if start >= end:
        raise SluiceError("range-not-satisfiable", f"The file has {size} bytes.", bytes=size)
    return start, end


def _tags(header: str) -> set[str]:
    """The validators of an If-Match or If-None-Match list (RFC 9110 section 13.1)."""
    return {tag.strip() for tag in header.split(",")}


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
    services = handler.services
    try:
        reader = await services.files.reader(file)
    except SluiceError as error:
        if job is not None:
            await services.downloads.fail(job, error)
        raise
    handler.set_header("Content-Type", file.media_type)
    handler.set_header("Content-Length", str(end - start))
    handler.set_header("Accept-Ranges", "bytes")
    handler.set_header("ETag", file.etag)
    handler.set_header("Last-Modified", formatdate(file.created_at / 1000, usegmt=True))
    inline = not attachment and file.media_type in _INLINE
    handler.set_header("Content-Disposition", disposition(file.name, not inline))
    if digest := fields.repr_digest(file.digest):
        handler.set_header("Repr-Digest", digest)
        handler.set_header("Digest", fields.legacy_digest(file.digest))
    sender = Sender(handler.connection, services.settings.write_idle_s)
    sending = _Sending(handler, sender)
    try:
        if handler.request.method == "HEAD":
            return
        if job is None:
            await sending.run(reader, start, end, services.downloads)
        else:
            async with services.downloads.connect(job, sender) as download:
                await download.checkpoint()  # so that an early end can still be an answer
                await sending.run(reader, start, end, download)
    except (SluiceError, ClientGone):
        if not sending.begun:
            raise
        handler.connection.stream.close()
    finally:
        await reader.close()


class _Sending:
    """One body on its way, with its plain path."""

    def __init__(self, handler: BaseHandler, sender: Sender) -> None:
        self.begun = False
        self._handler = handler
        self._sender = sender

    async def run(self, reader: Reader, start: int, end: int, gate: Gate) -> None:
        """Flush the headers, then send."""
        self.begun = True
        try:
            await self._handler.flush()
        except StreamClosedError:
            raise ClientGone from None
        await self._sender.send(reader, start, end, self._write, gate)

    async def _write(self, data: bytes) -> None:
        self._handler.write(data)
        await self._handler.flush()
