"""Uploads: bytes that arrive become stored files, whatever dialect brings them.

A dialect creates an upload, *connects* a request to it, appends pieces and finishes it. Everything
else is here: the offset, the durable marks, pause and cancel, takeover by a newer request, expiry,
and what a crash leaves behind.

``stored_bytes`` are written and committed before they are acknowledged; ``durable_bytes`` were
forced to the disk before that was committed. After a crash the blob is cut back to the one, after
a power cut to the other. The blobs of an upload are named in its cursor *before* they are
published, so that a publishing without a row can always be found and taken back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, NamedTuple, Protocol

from errors import SluiceError
from jobs.files import media_type_of, now_ms, uuid7
from jobs.flow import Flow, Peer
from jobs.manager import Glance, Manager
from jobs.progress import Meter
from jobs.rows import rfc3339
from jobs.states import FINAL, Input
from storage import (
    Blobs,
    By,
    Fenced,
    File,
    Filter,
    Job,
    Progress,
    Result,
    Rollback,
    State,
    Transfer,
    Writer,
)

log = logging.getLogger("sluice.uploads")

KIND = "upload"

_SAVE_BYTES = 64 << 20  # stored between two commits of a long request, at most
_RESERVE_BYTES = 16 << 20  # of the disk, left for the state: else not even a cancel could be noted
_CHECK_BYTES = 1 << 20  # written between two looks at that
_STALLED_S = 12.0  # shown as stalled
_EXPIRY_BATCH = 200


class ClientGone(Exception):
    """The connection ended before the body did."""


class Pieces(Peer, Protocol):
    """A body as it arrives; each piece is valid only until the next is asked for.

    Raises ClientGone, or the error it was interrupted with. ``gate``, once set, is awaited before
    bytes are asked for.
    """

    gate: Callable[[], Awaitable[None]] | None

    def __aiter__(self) -> AsyncIterator[memoryview]:
        """The pieces in order."""
        ...


class Limits(NamedTuple):
    """Numbers of the configuration that uploads keep."""

    max_bytes: int
    expires_s: float
    hold_s: float
    idle_s: float
    durability: str


class Upload:
    """A live upload: the one request that writes it, and where it stands."""

    def __init__(self, job: Job, hold_s: float) -> None:
        self.job = job
        self.flow = Flow(job.want, hold_s)
        self.meter = Meter("bytes", job.progress)
        self.parts: list[dict[str, Any]] = [dict(part) for part in job.cursor["blobs"]]
        self.writer: Writer | None = None
        self.length = job.transfer.length_bytes if job.transfer is not None else None
        self.received = job.stored_bytes
        self.stored = job.stored_bytes  # written; committed at each save
        self.saved = job.stored_bytes
        self.durable = self.durable_saved = job.durable_bytes
        self.check_at = 0  # stored bytes at which the room is looked at again
        self.finishing = False
        self.released = asyncio.Event()
        self.meter.mark(job.stored_bytes)

    @property
    def before(self) -> int:
        """Bytes in the parts before the one that is written now."""
        return sum(part["bytes"] for part in self.parts[:-1])


class Uploads:
    """The driver of all uploads."""

    def __init__(self, manager: Manager, state: State, blobs: Blobs, limits: Limits) -> None:
        self.limits = limits
        self._manager = manager
        self._state = state
        self._blobs = blobs
        self._live: dict[str, Upload] = {}
        self.received_bytes = 0  # since the start, of all uploads
        manager.use(self, KIND)

    # For dialects

    async def create(
        self,
        name: str,
        *,
        owner: str,
        client: str,
        by: By,
        protocol: str,
        resumable: bool,
        length: int | None = None,
        expected: int | None = None,
        live_name: str | None = None,
    ) -> tuple[Job, bool]:
        """Begin an upload of a file ``name``; a live one of ``live_name`` is returned instead.

        ``length`` is binding; ``expected`` only tells the progress how long it may become.

        Raises too-large or disk-full before the first byte when ``length`` says so.
        """
        await self.check_length(length)
        return await self._manager.begin(
            KIND,
            Transfer(protocol=protocol, resumable=resumable, length_bytes=length),
            owner=owner,
            client=client,
            name=name,
            by=by,
            cursor={"blobs": [{"id": uuid7(), "name": name, "bytes": 0}]},
            total=length if length is not None else expected,
            live_name=live_name,
        )

    async def check_length(self, length: int | None) -> None:
        """Raise too-large for a length over the limit, disk-full for one without room."""
        if length is None:
            return
        if length > self.limits.max_bytes:
            raise SluiceError(
                "too-large", f"At most {self.limits.max_bytes:,} bytes are taken, not {length:,}."
            )
        if length > await self._blobs.free_bytes() - _RESERVE_BYTES:
            raise SluiceError("disk-full", f"There is no room for {length:,} bytes.")

    async def find(self, owner: str, client: str, name: str | None = None) -> list[Job]:
        """Unfinished uploads of a caller, newest first; those of a file ``name`` if given."""
        page = await self._state.find(
            Filter(owner=owner, client=client, kinds=(KIND,), live=True, name=name), None, 500
        )
        return page.items

    def offset(self, job: Job) -> int:
        """How many bytes are stored; the next block begins there."""
        live = self._live.get(job.id)
        return live.stored if live is not None else job.stored_bytes

    def connected(self, job: Job) -> bool:
        """Whether a request is open that writes the upload."""
        return job.id in self._live

    @asynccontextmanager
    async def connect(self, job: Job, pieces: Pieces) -> AsyncIterator[Upload]:
        """Let a request write the upload; at the end everything it delivered is committed.

        An earlier request that still holds the upload is ended, and its late bytes go nowhere. If
        the upload is cancelled meanwhile, upload-terminated is raised in whatever the request
        waits for. A form upload that ends unfinished has failed, and its bytes are freed.
        """
        await self._take_over(job.id)
        job = await self._manager.get(job.id, job.owner)
        if job.state in FINAL:
            raise SluiceError("upload-terminated", "The upload has ended.", job=job.id)
        upload = Upload(job, self.limits.hold_s)
        upload.flow.peer = pieces
        pieces.gate = upload.flow.checkpoint
        self._live[job.id] = upload
        if job.want == "cancel":
            upload.flow.end(_terminated(job))
        try:
            if job.reason == "client-gone":
                await self._manager.note(job.id, "client-back", reason=None)
            yield upload
        except BaseException as error:
            await self._broken_off(upload, error)
            raise
        else:
            await self._release(upload)
        finally:
            self._forget(upload)
            if upload.finishing or upload.flow.error is not None:
                # A pause or a cancel that came during the last commits was left to this request.
                await self._manager.conclude(job.id, Input.UNWOUND)

    async def append(self, upload: Upload, offset: int, pieces: Pieces) -> int:
        """Write pieces from ``offset`` on; the offset after them, committed.

        Raises offset-mismatch, too-large, disk-full, ClientGone; what was stored before stays.
        """
        if offset != upload.stored:
            raise SluiceError(
                "offset-mismatch",
                f"{upload.stored} bytes are stored; the block begins at {offset}.",
                bytes_read=upload.stored,
            )
        async for piece in pieces:
            await self.write(upload, piece)
        await self._save(upload)
        return upload.stored

    async def write(self, upload: Upload, piece: memoryview) -> None:
        """Write one piece as soon as the upload may go on."""
        flow = upload.flow
        upload.received += len(piece)
        if not flow.open:
            await flow.checkpoint()
        limit = self.limits.max_bytes if upload.length is None else upload.length
        if upload.stored + len(piece) > limit:
            raise SluiceError("too-large", f"The upload is longer than {limit:,} bytes.")
        if upload.stored >= upload.check_at:
            upload.check_at = upload.stored + _CHECK_BYTES
            if await self._blobs.free_bytes() < _RESERVE_BYTES + len(piece):
                raise SluiceError(
                    "disk-full", "The disk is full; the bytes stored so far are kept."
                )
        writer = await self._writer(upload)
        upload.stored = upload.before + await writer.write(piece)
        self.received_bytes += len(piece)
        flow.moved_at = monotonic()
        upload.meter.mark(upload.stored)
        if upload.stored - upload.saved >= _SAVE_BYTES:
            await self._save(upload)

    async def next_part(self, upload: Upload, name: str) -> None:
        """Begin another file of a form. Its blob is known durably before it has bytes."""
        await self._close_part(upload)
        upload.parts.append({"id": uuid7(), "name": name, "bytes": 0})
        await self._state.save(upload.job.id, upload.job.fence, cursor={"blobs": upload.parts})

    async def finish(self, upload: Upload) -> list[File]:
        """Make the bytes durable and publish the files; they are visible when this returns.

        Raises upload-terminated if a cancel was committed first.
        """
        job = upload.job
        await upload.flow.checkpoint()
        upload.finishing = True
        await self._writer(upload)  # an empty file, or all bytes came with earlier requests
        await self._close_part(upload)
        upload.durable = upload.stored
        upload.meter.mark(upload.stored, upload.stored)
        await self._save(upload)
        try:
            files = [await self._publish(job, part) for part in upload.parts]
            data = {"files": [file.id for file in files]} if len(files) > 1 else {}
            ended = await self._manager.report(
                job.id,
                Input.FINISH,
                fence=job.fence,
                files=files,
                result=Result(file=files[0].id, data=data),
            )
        except SluiceError:  # no row followed: a later request shall find the bytes again
            for part in upload.parts:
                await self._blobs.unpublish(part["id"])
            raise
        if ended is None or ended.state != "succeeded":
            await self._manager.settled(job.id)
            raise _terminated(job)
        return [await self._file(file) for file in files]

    async def _writer(self, upload: Upload) -> Writer:
        """The current part's blob, opened at its end when it is first needed."""
        if upload.writer is None:
            upload.writer = await self._blobs.writer(
                upload.parts[-1]["id"], upload.job.fence, offset=upload.stored - upload.before
            )
        return upload.writer

    async def _publish(self, job: Job, part: dict[str, Any]) -> File:
        return File(
            id=part["id"],
            name=part["name"],
            bytes=await self._blobs.publish(part["id"], part["name"]),
            media_type=media_type_of(part["name"]),
            owner=job.owner,
            job=job.id,
            created_at=now_ms(),
        )

    # For the manager (see Driver)

    def start(self, job: Job) -> None:
        """See Driver; an upload starts with its request."""

    def signal(self, job: Job) -> bool:
        """See Driver."""
        upload = self._live.get(job.id)
        if upload is None:
            return False
        if job.want == "cancel":
            upload.flow.end(_terminated(job))
            return True
        upload.flow.signal(job.want)
        upload.meter.hold()
        # Nothing is written any more from here on, so the pause is already in force.
        return upload.finishing

    def force(self, job: Job) -> None:
        """See Driver; an upload ends at once anyway."""
        self.signal(job)

    async def rollback(self, job: Job) -> Rollback | None:
        """See Driver: the bytes go."""
        upload = self._live.get(job.id)
        if upload is not None and upload.writer is not None:
            writer, upload.writer = upload.writer, None
            await writer.close()
        await self.discard(job)
        return None

    async def discard(self, job: Job) -> None:
        """See Driver."""
        for part in (job.cursor or {"blobs": []})["blobs"]:
            await self._blobs.discard(part["id"])
        upload = self._live.get(job.id)
        for part in upload.parts if upload is not None else []:
            await self._blobs.discard(part["id"])

    async def recover(self, job: Job, same_boot: bool) -> list[str]:
        """See Driver: cut the blob back to what was acknowledged."""
        blobs = [part["id"] for part in job.cursor["blobs"]]
        for blob in blobs:
            await self._blobs.unpublish(blob)
        if job.transfer is None or not job.transfer.resumable or job.want == "cancel":
            return blobs
        stored = job.stored_bytes if same_boot else job.durable_bytes
        size = await self._blobs.size(blobs[-1]) or 0
        stored = min(stored, size)
        if size != stored:
            writer = await self._blobs.writer(blobs[-1], job.fence, offset=stored)
            await writer.close()
        if stored != job.stored_bytes:
            log.warning("upload %s: %d of %d bytes are left", job.id, stored, job.stored_bytes)
            durable = min(stored, job.durable_bytes)
            await self._state.save(job.id, job.fence, stored_bytes=stored, durable_bytes=durable)
        return blobs

    def glance(self, job: Job, finished: bool = False) -> Glance:
        """See Driver."""
        upload = self._live.get(job.id)
        if upload is None:
            if job.transfer is None or job.state in FINAL:
                return Glance(None, None)
            done = Progress(done=job.stored_bytes, total=job.transfer.length_bytes, unit="bytes")
            return Glance(done, None)
        progress = upload.meter.finished() if finished else upload.meter.progress()
        return Glance(
            progress,
            {
                "received_bytes": upload.received,
                "stored_bytes": upload.stored,
                "durable_bytes": upload.durable,
                "connected": job.state not in FINAL,
                "protocol": upload.job.transfer.protocol if upload.job.transfer else "",
                "stalled_since": rfc3339(upload.flow.stalled_at),
                "warm": job.want == "pause",
            },
        )

    def changed(self) -> Iterable[tuple[str, Progress]]:
        """See Driver."""
        for job_id, upload in self._live.items():
            if upload.meter.changed:
                upload.meter.changed = False
                yield job_id, upload.meter.progress()

    async def save(self) -> None:
        """See Driver; here also senders that send nothing are noticed."""
        for upload in list(self._live.values()):
            if upload.finishing:
                continue
            self._watch_idle(upload)
            try:
                await self._save(upload, sync=self.limits.durability == "interval")
            except (Fenced, SluiceError) as error:
                log.warning("upload %s could not be saved: %s", upload.job.id, error)

    async def stop(self) -> None:
        """See Driver: end the open requests, keeping what they delivered."""
        lives = list(self._live.values())
        for upload in lives:
            upload.flow.end(SluiceError("stopping", retry_after_s=5))
        await asyncio.gather(*(upload.released.wait() for upload in lives))

    async def expire(self) -> int:
        """Cancel unfinished uploads that were left alone for too long; how many."""
        before = now_ms() - int(self.limits.expires_s * 1000)
        after: int | None = None
        expired = 0
        while True:
            page = await self._state.find(Filter(kinds=(KIND,), live=True), after, _EXPIRY_BATCH)
            for job in page.items:
                touched = max(job.created_at, job.saved_at, job.by.at if job.by else 0)
                if touched < before and job.id not in self._live:
                    await self._manager.report(job.id, Input.EXPIRE)
                    expired += 1
            if page.next is None:
                return expired
            after = page.next

    # Inside

    async def _take_over(self, job_id: str) -> None:
        """End the request that holds the upload, and wait until it has let go."""
        while (earlier := self._live.get(job_id)) is not None:
            if earlier.finishing:
                raise SluiceError("upload-busy", "The upload is being finished.", job=job_id)
            earlier.flow.end(
                SluiceError("upload-busy", "A newer request has taken the upload over.")
            )
            await earlier.released.wait()

    async def _broken_off(self, upload: Upload, error: BaseException) -> None:
        """The request ended by an error: keep what may be kept, report what has happened."""
        job = upload.job
        code = error.code if isinstance(error, SluiceError) else ""
        gone = isinstance(error, ClientGone)
        await self._release(upload)
        if code == "upload-terminated":
            await self._manager.conclude(job.id, Input.UNWOUND)
            await self._manager.settled(job.id)
        elif code == "stopping":
            interrupted = SluiceError("interrupted", "The server stopped during the upload.")
            await self._manager.conclude(job.id, Input.SHUTDOWN, error=interrupted)
        elif job.transfer is not None and not job.transfer.resumable:
            failure = SluiceError("client-gone" if gone else "internal")
            if isinstance(error, SluiceError):
                failure = error
            if (await self._manager.get(job.id, job.owner)).state not in FINAL:
                await self.discard(job)  # first: on a full disk it makes room to note the failure
            await self._manager.conclude(job.id, Input.FAIL, error=failure)
        elif gone:
            self._forget(upload)  # so that the event shows it as no longer connected
            await self._manager.note(job.id, "client-gone", reason="client-gone")

    async def _release(self, upload: Upload) -> None:
        """Commit what was written and let the blob go."""
        if upload.writer is not None:
            try:
                if not upload.finishing:
                    await self._save(upload, sync=self.limits.durability == "always")
            except (Fenced, SluiceError) as error:
                log.warning("upload %s could not be saved: %s", upload.job.id, error)
            writer, upload.writer = upload.writer, None
            await writer.close()

    def _forget(self, upload: Upload) -> None:
        if self._live.get(upload.job.id) is upload:
            del self._live[upload.job.id]
        upload.released.set()

    async def _close_part(self, upload: Upload) -> None:
        """End the current part durably."""
        if upload.writer is not None:
            await upload.writer.sync()
            writer, upload.writer = upload.writer, None
            await writer.close()
        upload.parts[-1]["bytes"] = upload.stored - upload.before

    async def _save(self, upload: Upload, *, sync: bool | None = None) -> None:
        """Commit the offset; with ``sync`` what it covers is durable as well."""
        if sync is None:
            sync = self.limits.durability == "always"
        stored = upload.stored
        if sync and upload.writer is not None and upload.durable < stored:
            upload.durable = upload.before + await upload.writer.sync()
        forced = upload.durable if upload.durable > upload.durable_saved else None
        if stored == upload.saved and forced is None:
            return
        await self._state.save(
            upload.job.id,
            upload.job.fence,
            stored_bytes=stored,
            durable_bytes=forced,
            progress=upload.meter.progress(),
        )
        upload.saved = stored
        upload.durable_saved = max(upload.durable_saved, forced or 0)

    def _watch_idle(self, upload: Upload) -> None:
        """Show a sender that sends nothing as stalled; end it after ``idle_s``.

        One that was silent before it was paused never comes to the checkpoint: it ends here, too.
        """
        idle_s = monotonic() - upload.flow.moved_at
        if upload.flow.open and idle_s > self.limits.idle_s:
            upload.flow.end(SluiceError("upload-stalled"))
        elif upload.flow.want == "pause" and idle_s > self.limits.hold_s:
            upload.flow.end(SluiceError("paused-too-long", retry_after_s=60))
        elif not upload.flow.open or idle_s < _STALLED_S:
            upload.flow.stalled_at = None
        elif upload.flow.stalled_at is None:
            upload.flow.stalled_at = now_ms() - int(idle_s * 1000)

    async def _file(self, file: File) -> File:
        return await self._state.file(file.id, file.owner) or file


def _terminated(job: Job) -> SluiceError:
    return SluiceError("upload-terminated", f"The upload of {job.name} was aborted.", job=job.id)
