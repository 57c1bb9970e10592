"""``/v1/files``: list, metadata, content, delete."""

from __future__ import annotations

import re

from errors import SluiceError
from handlers.base import BaseHandler
from handlers.send import send_file
from jobs import File
from jobs.rows import file_row

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class FilesHandler(BaseHandler):
    """All files of the owner."""

    async def get(self) -> None:
        """Newest first; ``name`` lists the versions of one name."""
        values = self.query("limit", "after", "name")
        limit, after = self.paging(values)
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


def _tags(header: str) -> set[str]:
    """The validators of an If-Match or If-None-Match list (RFC 9110 section 13.1)."""
    return {tag.strip() for tag in header.split(",")}
