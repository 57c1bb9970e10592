"""``/v1/jobs/{id}/log``: what a job says, page by page, and as it says it.

A page is there at once, or with ``wait`` as soon as it has a line. With ``follow=1`` the answer
goes on with each line that comes, and ends by itself once the job has ended and all was sent. A
reader is woken by the commit of lines, and reads them from where it is: so one that is slow keeps
no lines waiting for it, and who comes back with the number of its last line misses none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from time import monotonic
from typing import Any

import msgspec
from tornado.iostream import StreamClosedError

from errors import SluiceError
from handlers.base import BaseHandler
from jobs import Job
from jobs.rows import rfc3339
from jobs.states import FINAL

_LONGEST_WAIT_S = 60.0
_LINES = 100  # read together
_WRITE_BYTES = 64 << 10  # after which the reader must have taken them

_Line = tuple[int, int, str]  # number, time, text


class LogHandler(BaseHandler):
    """The log lines of one job."""

    async def get(self, job_id: str) -> None:
        """The newest lines, or those ``after`` a number, oldest first; or all that come."""
        values = self.query("limit", "after", "wait", "follow")
        limit, after = self.paging(values)
        wait_s = self.decimal(values, "wait", 0, _LONGEST_WAIT_S) or 0.0
        follows = self.flag(values, "follow")
        services = self.services
        full = services.feeds.of(self.caller.owner) >= services.settings.max_sockets
        if full and (follows or wait_s):
            raise SluiceError("too-many-sockets", retry_after_s=5)
        await services.manager.get(job_id, self.caller.owner)
        self.set_header("Cache-Control", "no-store")
        with _Reader(self, job_id, -limit if after is None else after) as reader:
            if follows:
                await self._follow(reader)
            else:
                # One more tells whether there are others behind; behind the newest there are none.
                lines = await reader.read(limit if after is None else limit + 1, wait_s)
                following = str(lines[limit - 1][0]) if len(lines) > limit else None
                self.reply({"items": [_row(one) for one in lines[:limit]], "next": following})

    async def _follow(self, reader: _Reader) -> None:
        """Send each line as it comes, as JSON or as text."""
        is_text = "text/plain" in self.request.headers.get("Accept", "").lower()
        kind = "text/plain; charset=utf-8" if is_text else "application/x-ndjson"
        self.set_header("Content-Type", kind)
        self.set_header("Vary", "Accept")
        self.set_header("X-Accel-Buffering", "no")
        try:
            await self.flush()
            while lines := await reader.read(_LINES, None):
                for piece in _pieces(lines, _text if is_text else _json):
                    self.write(piece)
                    async with asyncio.timeout(self.services.settings.write_idle_s):
                        await self.flush()
        except (StreamClosedError, TimeoutError, SluiceError):
            reader.fail()
        if reader.is_cut:  # without its last chunk no client takes it for the whole
            self.connection.stream.close()


class _Reader:
    """A place in the log of a job, and whoever waits there: one of the watchers of ``Feeds``."""

    def __init__(self, handler: LogHandler, job_id: str, after: int) -> None:
        self.owner = handler.caller.owner
        self.is_cut = False  # it was ended before the job was
        self._handler = handler
        self._manager = handler.services.manager
        self._feeds = handler.services.feeds
        self._job_id = job_id
        self._after = after
        self._fresh = asyncio.Event()

    def __enter__(self) -> _Reader:
        self._manager.listen(self._job_id, self._hear)
        self._feeds.add(self)
        self._handler.gone = self.fail
        if self._handler.connection.stream.closed():
            self.fail()
        return self

    def __exit__(self, *_: object) -> None:
        self._feeds.remove(self)
        self._manager.unlisten(self._job_id, self._hear)

    async def read(self, limit: int, wait_s: float | None) -> list[_Line]:
        """The next lines; where none is, as soon as there is one.

        None at all if ``wait_s`` have passed (None: ever), the job has ended, or the reader or the
        service has. Raises job-unknown.
        """
        until_s = None if wait_s is None else monotonic() + wait_s
        while not self.is_cut:
            self._fresh.clear()
            job = await self._manager.get(self._job_id, self.owner)
            # Looked at afterwards: what a job has said is committed before its end is.
            lines = await self._manager.lines(self._job_id, self.owner, self._after, limit)
            if lines:
                self._after = lines[-1][0]
                return lines
            left_s = None if until_s is None else until_s - monotonic()
            if job.state in FINAL or (left_s is not None and left_s <= 0):
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._fresh.wait()
        return []

    def fail(self) -> None:
        """The reader has gone, or the service stops."""
        self.is_cut = True
        self._fresh.set()

    def bye(self, retry_ms: int) -> None:
        """See Watcher."""
        self.fail()

    def pump(self, now_s: float) -> None:
        """See Watcher; what happens to other jobs is nothing here."""

    def beat(self, now_s: float) -> None:
        """See Watcher; nothing is done by the clock."""

    def _hear(self, job: Job | None) -> None:
        self._fresh.set()


def _pieces(lines: list[_Line], write: Callable[[_Line], bytes]) -> Iterator[bytes]:
    """The lines as they travel, so many at a time as the reader must have taken before others."""
    piece = bytearray()
    for line in lines:
        piece += write(line)
        if len(piece) >= _WRITE_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


def _row(line: _Line) -> dict[str, Any]:
    n, at, text = line
    return {"n": n, "at": rfc3339(at), "line": text}


def _json(line: _Line) -> bytes:
    return msgspec.json.encode(_row(line)) + b"\n"


def _text(line: _Line) -> bytes:
    """The text alone; a line break in it would be one of ours."""
    return line[2].replace("\n", " ").encode() + b"\n"
