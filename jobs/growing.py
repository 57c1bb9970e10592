"""Files that grow: whoever reads one is told when more of it is there, and when it is whole.

What a reader may have is only what will not be taken back: the stored bytes of an upload, the
artefact of a process up to its last saved cursor. So there is news just when such a mark was
committed or the job's row has changed, and nothing has to be looked up: the manager calls the
follower, the follower asks the driver, both in memory. That a file has grown is told at most
twenty times a second by one timer that all followers share; that it has ended, at once.

A follower is bound to one blob. Whatever becomes of the job, it never goes on with another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from errors import SluiceError
from jobs.manager import Grown, Manager
from jobs.states import SUCCEEDED
from jobs.uploads import ClientGone
from storage import Blobs, Job, Reader

_TICK_S = 0.05


class Follower:
    """What one reader knows of a file that grows."""

    def __init__(self, growing: Growing, job: Job, name: str | None) -> None:
        self.grown: Grown | None = None  # None: there is no such file so far
        self.whole = False  # it is complete, and the job has succeeded
        self._growing = growing
        self._job = job
        self._name = name
        self._error: Exception | None = None  # why no more of it will come
        self._waiter: asyncio.Future[None] | None = None

    @property
    def bytes(self) -> int:
        """How much of it is there; -1 if there is no such file so far."""
        return self.grown.bytes if self.grown is not None else -1

    async def beyond(self, at: int) -> None:
        """Return when more than ``at`` bytes are there, or the file is whole.

        Raises content-gone, content-unknown, and ClientGone after ``leave``; bytes that are there
        already come first.
        """
        while self.bytes <= at and not self.whole:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def check(self) -> None:
        """Raise what stands against going on."""
        if self._error is not None:
            raise self._error

    def leave(self) -> None:
        """The reader has gone: whoever waits is told at once."""
        self._end(ClientGone())

    def hear(self, job: Job | None) -> None:
        """There is news (see Manager.listen)."""
        if job is not None and job.version >= self._job.version:
            self._job = job
        if self._error is not None or self.whole:
            return
        try:
            self._look()
        except SluiceError as error:
            self._end(error)

    def _look(self) -> None:
        now, known = self._growing.manager.grown(self._job, self._name), self.grown
        if now is None:
            return
        if known is not None and now.blob != known.blob:
            raise SluiceError("content-gone", "The file was begun anew.", job=self._job.id)
        if known is not None and known.bytes >= now.bytes:
            now = now._replace(bytes=known.bytes)
        self.grown = now
        self.whole = self._job.state == SUCCEEDED
        if self.whole:
            self.wake()
        elif now != known:
            self._growing.tell(self)

    def _end(self, error: Exception) -> None:
        self._error = self._error or error
        self.wake()

    def wake(self) -> None:
        """Let whoever waits look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Growing:
    """All that is followed."""

    def __init__(self, manager: Manager, blobs: Blobs) -> None:
        self.manager = manager
        self._blobs = blobs
        self._news: set[Follower] = set()  # who is to be told at the next tick
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def follow(self, job: Job, name: str | None) -> AsyncIterator[Follower]:
        """Follow a file that the job makes, by its name or id; None: the first one.

        Raises content-gone, content-unknown, job-unknown.
        """
        follower = Follower(self, job, name)
        self.manager.listen(job.id, follower.hear)
        try:
            # The row may have moved since it was read; from here on nothing is missed.
            follower.hear(await self.manager.get(job.id, job.owner))
            follower.check()
            yield follower
        finally:
            self.manager.unlisten(job.id, follower.hear)
            self._news.discard(follower)

    async def reader(self, grown: Grown) -> Reader:
        """Open the file; it is readable to its end even if it is published or removed meanwhile.

        Its size is that of this moment. Raises file-unknown.
        """
        try:
            return await self._blobs.reader(grown.blob, None)
        except SluiceError as error:
            if error.code != "file-unknown":
                raise
            return await self._blobs.reader(grown.blob, grown.name)  # it was published just now

    def tell(self, follower: Follower) -> None:
        """Wake a follower at the next tick."""
        self._news.add(follower)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        news, self._news = self._news, set()
        for follower in news:
            follower.wake()
