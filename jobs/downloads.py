"""Downloads that are jobs: a stored file streamed to one client, watched and controlled.

A plain GET needs none of this. Where the caller wants a job (an export, ``?track=1``), the file's
way to the client has progress, can be paused (nothing more is written; TCP holds the reader) and
cancelled (the connection is closed short of its Content-Length, the only honest sign there is).
It lives on its connection: when that ends early, or the server stops, it has failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from errors import SluiceError
from jobs.flow import Flow, Peer
from jobs.manager import Glance, Grown, Manager
from jobs.progress import Meter
from jobs.states import FINAL, Input
from jobs.uploads import ClientGone
from storage import By, File, Filter, Job, Progress, Result, Rollback, State, Transfer

KIND = "download"


class Download:
    """A live download."""

    def __init__(self, downloads: Downloads, job: Job, hold_s: float) -> None:
        self.job = job
        self._downloads = downloads
        self.flow = Flow(job.want, hold_s, job.limit_bytes_per_s)
        self.meter = Meter("bytes", job.progress)
        self.sent = 0
        self.released = asyncio.Event()

    @property
    def held(self) -> bool:
        """Whether nothing may leave now; meanwhile its clocks stand."""
        return not self.flow.open

    @property
    def most_bytes(self) -> int | None:
        """How long the next piece may be; None: any length; 0 while nothing may leave."""
        return self.flow.next_bytes()

    async def checkpoint(self) -> None:
        """Return when the next piece may leave; raises what ends the download."""
        if not self.flow.open:
            await self.flow.checkpoint()

    def moved(self, n: int) -> None:
        """``n`` more bytes were handed to the kernel."""
        self.sent += n
        self._downloads.moved(n)
        self.flow.spend(n)
        self.meter.mark(self.sent)


class Downloads:
    """The driver of all downloads, and the gate of a file that leaves without a job."""

    held = False
    most_bytes: int | None = None

    def __init__(self, manager: Manager, state: State, *, hold_s: float) -> None:
        self._hold_s = hold_s
        self.sent_bytes = 0  # since the start, of all files that left, jobs or not
        self._manager = manager
        self._state = state
        self._live: dict[str, Download] = {}
        manager.use(self, KIND)

    async def create(
        self, file: File, n: int, *, owner: str, client: str, by: By, protocol: str
    ) -> Job:
        """Begin a download of ``n`` bytes of a file."""
        transfer = Transfer(protocol=protocol, resumable=False, length_bytes=n, file=file.id)
        job, _ = await self._manager.begin(
            KIND, transfer, owner=owner, client=client, name=file.name, by=by, total=n
        )
        return job

    async def fail(self, job: Job, error: SluiceError) -> None:
        """End a download that could not even begin."""
        await self._manager.conclude(job.id, Input.FAIL, error=error)

    async def ready(self, file: File, *, owner: str, client: str, by: By) -> Job:
        """A job that has succeeded at once, and whose result is that file: nothing is copied."""
        job = await self.create(file, 0, owner=owner, client=client, by=by, protocol="async")
        result = Result(file=file.id, data={"bytes": file.bytes})
        done = await self._manager.report(job.id, Input.FINISH, result=result)
        return done or job

    async def find(self, owner: str, client: str) -> list[Job]:
        """Downloads of a caller that are under way, newest first."""
        page = await self._state.find(
            Filter(owner=owner, client=client, kinds=(KIND,), live=True), None, 500
        )
        return page.items

    def gone(self, job: Job) -> None:
        """The connection of a download has ended: so does the download, also while it is paused."""
        download = self._live.get(job.id)
        if download is not None:
            download.flow.end(SluiceError("client-gone", "The client went away."))

    async def checkpoint(self) -> None:
        """See held."""

    def moved(self, n: int) -> None:
        """``n`` more bytes have left, with or without a job."""
        self.sent_bytes += n

    @asynccontextmanager
    async def connect(self, job: Job, peer: Peer) -> AsyncIterator[Download]:
        """Let a request send the download; at the end its outcome is committed.

        Leaving without an error means that the last byte was handed to the kernel. A cancel
        raises export-terminated in whatever the request waits for.
        """
        download = Download(self, job, self._hold_s)
        download.flow.peer = peer
        self._live[job.id] = download
        current = await self._manager.get(job.id, job.owner)  # it may have changed since
        if current.want == "cancel":
            download.flow.end(_terminated(job))
        download.flow.limit(current.limit_bytes_per_s)
        download.flow.signal(current.want)
        try:
            yield download
        except BaseException as error:
            await self._broken_off(download, error)
            raise
        else:
            file = job.transfer.file if job.transfer is not None else None
            await self._manager.conclude(job.id, Input.FINISH, result=Result(file=file))
        finally:
            self._live.pop(job.id, None)
            download.released.set()

    async def _broken_off(self, download: Download, error: BaseException) -> None:
        job_id = download.job.id
        code = error.code if isinstance(error, SluiceError) else ""
        if code == "export-terminated":
            await self._manager.conclude(job_id, Input.UNWOUND)
            await self._manager.settled(job_id)
        elif code == "stopping":
            failure = _interrupted("interrupted", "The server stopped.", download.sent)
            await self._manager.conclude(job_id, Input.SHUTDOWN, error=failure)
        elif isinstance(error, SluiceError):
            failure = _interrupted(code, error.detail, download.sent)
            await self._manager.conclude(job_id, Input.FAIL, error=failure)
        elif isinstance(error, ClientGone):
            why = f"{error}." if str(error) else "The client went away."
            failure = _interrupted("client-gone", why, download.sent)
            await self._manager.conclude(job_id, Input.FAIL, error=failure)
        else:
            await self._manager.conclude(job_id, Input.FAIL, error=SluiceError("internal"))

    # For the manager (see Driver)

    def start(self, job: Job) -> None:
        """See Driver; a download starts with its request."""

    def signal(self, job: Job) -> bool:
        """See Driver."""
        download = self._live.get(job.id)
        if download is None:
            return False
        if job.want == "cancel":
            download.flow.end(_terminated(job))
            return True
        download.flow.signal(job.want)
        download.meter.hold()
        return False

    def tune(self, job: Job) -> None:
        """See Driver."""
        download = self._live.get(job.id)
        if download is not None:
            download.flow.limit(job.limit_bytes_per_s)

    def force(self, job: Job) -> None:
        """See Driver; a download ends at once anyway."""
        self.signal(job)

    async def rollback(self, job: Job) -> Rollback | None:
        """See Driver; a download leaves nothing behind."""
        return None

    async def discard(self, job: Job) -> None:
        """See Driver; the file is not the job's."""

    async def recover(self, job: Job, same_boot: bool) -> list[str]:
        """See Driver; the connection is gone, so the table lets it fail."""
        return []

    def glance(self, job: Job, finished: bool = False) -> Glance:
        """See Driver."""
        download = self._live.get(job.id)
        if download is None or job.transfer is None:
            return Glance(None, None)
        transfer = {
            "received_bytes": download.sent,
            "stored_bytes": download.sent,
            "durable_bytes": download.sent,
            "processed_bytes": download.sent,
            "connected": job.state not in FINAL,
            "protocol": job.transfer.protocol,
            "stalled_since": None,
            "warm": job.want == "pause",
            "limit_bytes_per_s": job.limit_bytes_per_s,
        }
        meter = download.meter
        return Glance(meter.finished() if finished else meter.progress(), transfer)

    def grown(self, job: Job, name: str | None) -> Grown | None:
        """See Driver; a download makes nothing."""
        raise SluiceError("content-unknown", "A download makes no file.", job=job.id)

    def changed(self) -> Iterable[tuple[str, Progress]]:
        """See Driver."""
        for job_id, download in list(self._live.items()):
            if download.meter.changed:
                download.meter.changed = False
                yield job_id, download.meter.progress()

    async def save(self) -> None:
        """See Driver; a download has nothing to store."""

    async def stop(self) -> None:
        """See Driver."""
        lives = list(self._live.values())
        for download in lives:
            download.flow.end(SluiceError("stopping", retry_after_s=5))
        await asyncio.gather(*(download.released.wait() for download in lives))


def _interrupted(code: str, why: str, sent_bytes: int) -> SluiceError:
    """How far a download came that has not reached its end."""
    return SluiceError(code, f"{why} The download was interrupted after {sent_bytes:,} bytes.")


def _terminated(job: Job) -> SluiceError:
    return SluiceError("export-terminated", f"The export of {job.name} was ended.", job=job.id)
