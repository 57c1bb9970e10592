"""Files that are still growing, as answers: ``/v1/jobs/{id}/content``, and for other dialects.

RFC 9110 section 14.4 has ``*`` for a length that is not known, and RFC 8673 says how one asks for
bytes that have not come: by an end that lies beyond what is there, which the answer repeats. That
is done only for ``follow=1``; anyone else gets what is there now.

- The ETag names the blob: its bytes never change, and the complete file has the same one. So
  If-Range and If-Match hold across the end. If-None-Match is not looked at: "not modified" would
  be wrong for what has grown.
- An answer without an end of its own has no Content-Length. Its last chunk is sent only when the
  job has succeeded; otherwise the connection is closed without it, which no client can mistake.
- Time passes only for a reader that does not read what is there, never for one that waits.
- There is no 416: while a file grows, no one can say which ranges will never be satisfied.
"""

from __future__ import annotations

import re
import socket
import struct
import time
from typing import NamedTuple

from errors import SluiceError
from handlers.base import BaseHandler
from handlers.ranges import Shown, decide
from handlers.send import Sender, disposition
from jobs import Job, Reader
from jobs.growing import Follower
from jobs.manager import Grown
from jobs.uploads import ClientGone

_END = 1 << 63  # behind the very large value of RFC 8673 section 4
_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)", re.IGNORECASE)
_DIGITS = 20  # enough for any number below _END


class _Piped:
    """A reader without a descriptor, so that its bytes pass through Tornado, which chunks them."""

    def __init__(self, reader: Reader) -> None:
        self.size_bytes = reader.size_bytes
        self.read = reader.read
        self.close = reader.close

    def fileno(self) -> int | None:
        """See Reader."""
        return None


class _Answer(NamedTuple):
    """What is sent: bytes ``[start, end)``; as far as they come if not ``sized``."""

    start: int
    end: int
    sized: bool


class GrowingHandler(BaseHandler):
    """A handler that can answer GET and HEAD with a file that is still growing."""

    _follower: Follower | None = None
    _sender: Sender | None = None

    def on_connection_close(self) -> None:
        """Tornado's hook: whoever waits, for bytes or for the reader, is told that it has gone."""
        super().on_connection_close()
        if self._follower is not None:
            self._follower.leave()
        if self._sender is not None:
            self._sender.wake()

    async def send_growing(self, job: Job, name: str | None, follow: bool) -> str | None:
        """Answer with what there is of a file that the job makes; None if that was done.

        Else the id of the file, which has become whole, and nothing was answered so far. ``name``
        as in ``Growing.follow``. Raises not-yet, content-gone, content-unknown, version-mismatch.
        """
        async with self.services.growing.follow(job, name) as follower:
            self._follower = follower
            try:
                return await self._answer_with(follower, follow)
            except ClientGone:
                self.connection.stream.close()
                return None

    async def _answer_with(self, follower: Follower, follow: bool) -> str | None:
        waits = follow and self.request.method == "GET"
        if waits:
            await follower.beyond(-1)
        if follower.whole or follower.grown is None:
            return _whole(follower)
        asked = self._range(follower.grown)
        if waits and asked is not None:
            await follower.beyond(asked[0])
        if follower.whole or (asked is not None and follower.bytes <= asked[0]):
            return _whole(follower)
        await self._send(follower, _answer(follower.grown, asked, follow), asked is not None)
        return None

    def _range(self, grown: Grown) -> tuple[int, int] | None:
        """The range ``[start, end)`` that is asked for; None for everything.

        Everything it is for other units, several ranges, what is malformed, and the last n bytes
        of a file whose length is not known: no 416 could be told for it. Raises version-mismatch.
        """
        headers = self.request.headers
        conditions = {name: headers[name] for name in ("If-Match", "If-Range") if name in headers}
        now_s = time.time()
        any_range = conditions | {"Range": "bytes=0-0"}
        shown = Shown(_etag(grown), int(now_s), 1)
        applies = decide(any_range, shown, get=True, now_s=now_s).status == 206
        match = _RANGE.fullmatch(headers.get("Range", ""))
        if not applies or match is None or match[0].endswith("=-"):
            return None
        first, last = _number(match[1]), _number(match[2])
        if match[1]:
            end = min(last + 1, _END) if match[2] else _END
            return (first, end) if first < end else None
        if grown.length_bytes is None or not last:
            return None
        return max(0, grown.length_bytes - last), grown.length_bytes

    async def _send(self, follower: Follower, answer: _Answer, partial: bool) -> None:
        """The answer, to its end. A failure after the headers closes the connection short."""
        grown, begun, reader = follower.grown, False, None
        assert grown is not None
        try:
            if grown.bytes > answer.start:
                reader = await self.services.growing.reader(grown)
            self._tell(grown, answer, partial)
            begun = True
            self._sender, gate = Sender(self), self.services.downloads
            await self._sender.head(gate)
            if self.request.method == "HEAD":
                return
            at = answer.start
            while at < answer.end:
                await follower.beyond(at)
                there = min(follower.bytes, answer.end)
                if there <= at:
                    break  # it is whole, and shorter than was asked for
                reader = reader or await self.services.growing.reader(grown)
                source = reader if answer.sized else _Piped(reader)
                at += await self._sender.send(source, at, there, gate)
            if at < answer.end and answer.sized:
                raise SluiceError("storage-failed", "The file is shorter than it was to be.")
            if self._ends_by_close(answer):
                self.connection.stream.close()
        except (SluiceError, ClientGone):
            if not begun:
                raise
            self._cut(answer)
        finally:
            if reader is not None:
                await reader.close()

    def _tell(self, grown: Grown, answer: _Answer, partial: bool) -> None:
        """Set the headers."""
        if partial:
            last = min(answer.end, grown.length_bytes or _END) - 1
            if answer.sized:
                last = answer.end - 1
            self.set_status(206)
            self.set_header("Content-Range", f"bytes {answer.start}-{last}/*")
        if answer.sized:
            self.set_header("Content-Length", str(answer.end - answer.start))
        elif self._ends_by_close(answer):  # whatever the client would like
            self.request.headers.pop("Connection", None)
            self.set_header("Connection", "close")
        self.set_header("Content-Type", grown.media_type)
        self.set_header("Content-Disposition", disposition(grown.name, True))
        self.set_header("Accept-Ranges", "bytes")
        self.set_header("ETag", _etag(grown))
        self.set_header("Cache-Control", "no-store")

    def _ends_by_close(self, answer: _Answer) -> bool:
        return not answer.sized and self.request.version == "HTTP/1.0"

    def _cut(self, answer: _Answer) -> None:
        """Close the connection so that the client knows that something is missing."""
        stream = self.connection.stream
        if self._ends_by_close(answer) and not stream.closed():  # only a reset is no end
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.close()


class JobContentHandler(GrowingHandler):
    """The bytes that a job makes."""

    async def head(self, job_id: str) -> None:
        """What ``get`` would say; it never waits."""
        await self._answer(job_id)

    async def get(self, job_id: str) -> None:
        """What is there of a file of the job, and with ``follow=1`` what comes; then its address.

        ``name`` chooses a file by its name or id.
        """
        await self._answer(job_id)

    async def _answer(self, job_id: str) -> None:
        values = self.query("name", "follow")
        follow = self.flag(values, "follow")
        job = await self.services.manager.get(job_id, self.caller.owner)
        file_id = await self.send_growing(job, values.get("name"), follow)
        if file_id is not None:
            self.set_status(307)
            self.set_header("Location", self.location(f"/v1/files/{file_id}/content"))
            self.set_header("Cache-Control", "no-store")


def _answer(grown: Grown, asked: tuple[int, int] | None, follow: bool) -> _Answer:
    """What is sent for a range, or for everything. It is sized if no end of the job is waited for:

    it is there, or it is a range that ends within the length that is known.
    """
    start, end = asked or (0, _END)
    if not follow:
        return _Answer(start, min(end, grown.bytes), asked is not None)
    return _Answer(start, end, end <= max(grown.bytes, grown.length_bytes or 0))


def _whole(follower: Follower) -> str:
    """The id of the whole file; raises not-yet if it is not whole."""
    if follower.whole and follower.grown is not None:
        return follower.grown.blob
    there = follower.bytes
    detail = f"{there:,} bytes are there so far." if there >= 0 else "It has not been begun so far."
    raise SluiceError("not-yet", detail, retry_after_s=1, bytes=max(0, there))


def _etag(grown: Grown) -> str:
    """That of the complete file (see File.etag)."""
    return f'"{grown.blob}"'


def _number(digits: str) -> int:
    """A number, at most _END."""
    return min(int(digits.lstrip("0")[:_DIGITS] or 0), _END)
