"""Stored files: list, metadata, content, delete; and how a file leaves, for every dialect."""

from __future__ import annotations

import re
from base64 import b64encode
from email.utils import formatdate
from typing import Any
from urllib.parse import quote

from tornado.iostream import StreamClosedError

from errors import SluiceError
from handlers.base import BaseHandler
from handlers.paging import paging
from handlers.wire import Gate, Sender
from jobs import File, Job
from jobs.rows import file_row
from jobs.uploads import ClientGone

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


class FilesHandler(BaseHandler):
    """All files of the owner."""

    async def get(self) -> None:
        """Newest first; ``name`` lists the versions of one name."""
        values = self.query("limit", "after", "name")
        limit, after = paging(values)
        page = await self.services.files.list(self.caller.owner, values.get("name"), after, limit)
        self.reply(
            {
                "items": [file_row(file) for file in page.items],
                "next": str(page.next) if page.next is not None else None,
            }
        )


class FileHandler(BaseHandler):
    """One stored file."""

    async def get(self, file_id: str) -> None:
        """What is known of it."""
        file = await self.services.files.get(file_id, self.caller.owner)
        self.set_header("ETag", file.etag)
        self.reply(file_row(file))

    async def delete(self, file_id: str) -> None:
        """Remove it; who is reading it reads it to its end."""
        await self.services.files.delete(file_id, self.caller.owner)
        self.set_status(204)


class ContentHandler(BaseHandler):
    """The bytes of a file; they never change under this address."""

    async def head(self, file_id: str) -> None:
        """The headers of ``get``."""
        await self._send(file_id)

    async def get(self, file_id: str) -> None:
        """All of it, or one range (RFC 9110 section 14)."""
        await self._send(file_id)

    async def _send(self, file_id: str) -> None:
        file = await self.services.files.get(file_id, self.caller.owner)
        self.set_header("Cache-Control", "private, max-age=31536000, immutable")
        if not {file.etag, "*"} & _tags(self.request.headers.get("If-Match", "*")):
            raise SluiceError("version-mismatch", "If-Match names another version of the file.")
        given = self.request.headers.get("If-None-Match", "")
        if {file.etag, "*"} & {tag.removeprefix("W/") for tag in _tags(given)}:
            self.set_header("ETag", file.etag)
            self.set_status(304)
            return
        start, end = 0, file.bytes
        if self.request.method == "GET" and self._range_applies(file):
            found = byte_range(self.request.headers.get("Range", ""), file.bytes)
            if found is not None:
                start, end = found
                self.set_status(206)
                self.set_header("Content-Range", f"bytes {start}-{end - 1}/{file.bytes}")
        await send_file(self, file, start, end)

    def _range_applies(self, file: File) -> bool:
        """Whether the client still means this version (RFC 9110 section 13.1.5)."""
        condition = self.request.headers.get("If-Range")
        return condition is None or condition.strip() == file.etag

    def _problem(self, error: SluiceError) -> bytes:
        body = super()._problem(error)
        if error.code == "range-not-satisfiable":
            self.set_header("Content-Range", f"bytes */{error.extra['bytes']}")
        return body


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


def disposition(name: str, attachment: bool) -> str:
    """Content-Disposition with a name in ASCII and, exactly, in UTF-8 (RFC 6266)."""
    ascii_name = re.sub(r'[^\x20-\x7e]|["\\%]', "_", name)
    kind = "attachment" if attachment else "inline"
    return f"{kind}; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(name, safe='')}"


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
    if "sha-256" in file.digest:
        digest = b64encode(bytes.fromhex(file.digest["sha-256"])).decode()
        handler.set_header("Repr-Digest", f"sha-256=:{digest}:")
    sender = Sender(handler._connection, services.settings.write_idle_s)
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
        handler._connection.stream.close()
    finally:
        await reader.close()


class _Sending:
    """One body on its way, with its plain path."""

    def __init__(self, handler: BaseHandler, sender: Sender) -> None:
        self.begun = False
        self._handler = handler
        self._sender = sender

    async def run(self, reader: Any, start: int, end: int, gate: Gate) -> None:
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


def _tags(header: str) -> set[str]:
    """The validators of an If-Match or If-None-Match list (RFC 9110 section 13.1)."""
    return {tag.strip() for tag in header.split(",")}
