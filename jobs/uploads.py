"""Uploads: bytes that arrive become stored files, whatever dialect brings them.

A dialect creates an upload, *connects* a request to it, appends pieces and, when all bytes are
there, *completes* it. Everything else is here: the offset, the durable marks, pause and cancel,
takeover by a newer request, room, expiry, and what a crash leaves behind.

``stored_bytes`` are written and committed before they are acknowledged; ``durable_bytes`` were
forced to the disk before that was committed. After a crash the blob is cut back to the one, after
a power cut to the other. The blobs of an upload are named in its cursor *before* they are
published, so that a publishing without a row can always be found and taken back.

What follows the last byte (jobs/publishing.py) belongs to no request: it goes on when the client
has gone, and a client that asks again waits for the same outcome.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple, Protocol

import msgspec

from errors import SluiceError
from jobs.files import media_type_of, now_ms, uuid7
from jobs.flow import Peer
from jobs.manager import Following, Glance, Grown, Manager
from jobs.publishing import Publishing, hashed, terminated
from jobs.rows import rfc3339
from jobs.space import Bounds, Space
from jobs.states import FINAL, Input
from jobs.upload import Plan, PlannedFile, Upload, plan_of
from storage import (
    Blobs,
    By,
    Fenced,
    File,
    Filter,
    Job,
    Progress,
    Rollback,
    State,
    Transfer,
    Writer,
)

log = logging.getLogger("sluice.uploads")

KIND = "upload"

_SAVE_BYTES = 64 << 20  # stored between two commits of a long request, at most
_CHECK_BYTES = 1 << 20  # written between two looks at the room
_STALLED_S = 12.0  # shown as stalled
_EXPIRY_BATCH = 200


class ClientGone(Exception):
    """The connection ended before the body did."""


class Pieces(Peer, Protocol):
    """A body as it arrives; each piece is valid only until the next is asked for.

    Raises ClientGone, or the error it was interrupted with. ``gate``, once set, is awaited before
    bytes are asked for; ``most_bytes``, once set, tells how long the next piece may be (None: any
    length; 0: none may be read now).
    """

    gate: Callable[[], Awaitable[None]] | None
    most_bytes: Callable[[], int | None] | None

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
    quota_bytes: int = 0
    max_uploads: int = 10_000
    min_bytes_per_s: int = 0
    digest: str = "asked"


class Uploads:
    """The driver of all uploads."""

    def __init__(self, manager: Manager, state: State, blobs: Blobs, limits: Limits) -> None:
        self.limits = limits
        self.received_bytes = 0  # since the start, of all uploads
        self._manager = manager
        self._state = state
        self._blobs = blobs
        self._live: dict[str, Upload] = {}
        self._space = Space(
            blobs, state, Bounds(limits.max_bytes, limits.quota_bytes, limits.max_uploads)
        )
        self._publishing = Publishing(manager, state, blobs, limits.digest == "always")
        self._unforced: dict[str, Upload] = {}  # released since the last sync, with open writers
        self._moved: dict[str, Progress] = {}  # by requests that have ended since it was told
        self._waiting: dict[str, set[str]] = {}  # a part, and the uploads that are joined from it
        manager.use(self, KIND)

    # For dialects: beginning and looking

    async def check(self, owner: str, length: int | None) -> None:
        """Raise what stands against a new upload of that length, before its first byte.

        too-large, quota-exceeded, disk-full, too-many-uploads.
        """
        await self._space.check(owner, length)

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
        params: Mapping[str, object] | None = None,
        plan: Plan | None = None,
        following: Following | None = None,
    ) -> tuple[Job, bool]:
        """Begin an upload of a file ``name``; a live one of ``live_name`` is returned instead.

        The job ``following`` is made with it (see Manager.begin).

        ``length`` is binding; ``expected`` only tells the progress how long it may become. Room
        for either is held until the upload ends. Raises as ``check`` does.
        """
        job_id = uuid7()
        plan = plan or Plan()
        known = length if length is not None else expected
        await self._space.reserve(job_id, owner, known, plan.parts)
        plan.blobs = [PlannedFile(uuid7(), name)]
        try:
            job, created = await self._manager.begin(
                KIND,
                Transfer(protocol=protocol, resumable=resumable, length_bytes=length),
                job_id=job_id,
                owner=owner,
                client=client,
                name=name,
                by=by,
                cursor=plan.to_json(),
                params=dict(params or {}),
                total=length if length is not None else expected,
                live_name=live_name,
                following=following,
            )
        except BaseException:
            self._space.free(job_id)
            raise
        if not created:
            self._space.free(job_id)
        for part in plan.parts if created else ():
            self._waiting.setdefault(part, set()).add(job.id)
        return job, created

    async def get(self, job_id: str, owner: str, *protocols: str) -> Job:
        """An upload that began in one of these dialects, live or ended. Raises upload-unknown."""
        with suppress(SluiceError):
            job = await self._manager.get(job_id, owner)
            if job.transfer is not None and job.transfer.protocol in protocols:
                return job
        raise SluiceError("upload-unknown", f"No upload has the id {job_id[:64]!r}.")

    async def find(self, owner: str, client: str) -> list[Job]:
        """Unfinished uploads of a caller, newest first."""
        page = await self._state.find(
            Filter(owner=owner, client=client, kinds=(KIND,), live=True), None, 500
        )
        return page.items

    async def whole(self, parts: Sequence[Job]) -> Job | None:
        """The upload, under way or complete, that is made of just these parts in this order."""
        first = parts[0]
        # A part is waited for until its row names the whole, so one of both is seen.
        known = list(self._waiting.get(first.id, ()))
        found = await self._state.get(first.id, first.owner)
        if found is not None and found.result is not None:
            known.append(found.result.data["joined"])
        for job_id in known:
            job = await self._state.get(job_id, first.owner)
            ended = job is None or (job.state in FINAL and job.state != "succeeded")
            if job is not None and not ended and plan_of(job).parts == [part.id for part in parts]:
                return job
        return None

    def offset(self, job: Job) -> int:
        """How many bytes are stored; the next block begins there."""
        live = self._live.get(job.id)
        return live.stored if live is not None else job.stored_bytes

    def connected(self, job: Job) -> bool:
        """Whether a request is open that writes the upload."""
        live = self._live.get(job.id)
        return live is not None and live.ending is None

    def finishing(self, job: Job) -> bool:
        """Whether the sender has said that all is there; ``complete`` waits for what follows."""
        live = self._live.get(job.id)
        return plan_of(job).complete or (live is not None and live.ending is not None)

    def expires_at(self, job: Job) -> int | None:
        """When the upload is dropped if nothing comes any more, in ms; None once it has ended."""
        if job.state in FINAL:
            return None
        touched = max(job.created_at, job.saved_at, job.by.at if job.by else 0)
        return touched + int(self.limits.expires_s * 1000)

    # For dialects: writing

    async def halt(self, job: Job) -> Job:
        """End the request that writes the upload; the job, with its offset committed.

        What the request had delivered is kept, its late bytes go nowhere, and watchers see that
        it was taken over. An upload that is being finished is left alone.
        """
        upload = self._live.get(job.id)
        if upload is not None and upload.ending is None:
            await self._take_over(upload)
        return await self._manager.get(job.id, job.owner)

    async def set_length(self, job: Job, length: int, by: By) -> Job:
        """Bind the length of an upload that began without one; the job after it.

        Raises invalid-field if it had another one, or has more bytes already, and as ``check``.
        """
        job = await self._manager.get(job.id, job.owner)
        assert job.transfer is not None
        known = job.transfer.length_bytes
        if known == length:
            return job
        if known is not None or length < self.offset(job):
            at = f"was {known} before" if known is not None else "is less than what is stored"
            raise SluiceError("invalid-field", f"The length {at}.", field="length")
        await self._space.extend(job.id, length)
        transfer = msgspec.structs.replace(job.transfer, length_bytes=length)
        await self._manager.note(job.id, "command", by=by, transfer=transfer)
        return await self._manager.get(job.id, job.owner)

    async def expect(self, job: Job, digests: Mapping[str, str], *, wanted: bool = False) -> Job:
        """Let the whole be checked against hex ``digests`` when it is complete; the job.

        ``wanted``: digests are computed even where there is nothing to compare them with.
        """
        plan = plan_of(job)
        if (wanted and not plan.digest) or any(plan.expect.get(k) != digests[k] for k in digests):
            plan.expect |= digests
            plan.digest |= wanted
            await self._state.save(job.id, job.fence, cursor=plan.to_json())
        return await self._manager.get(job.id, job.owner)

    @asynccontextmanager
    async def connect(self, job: Job, pieces: Pieces) -> AsyncIterator[Upload]:
        """Let a request write the upload; at the end everything it delivered is committed.

        An earlier request that still holds the upload is ended. If the upload is cancelled
        meanwhile, upload-terminated is raised in whatever the request waits for. A form upload
        that ends by an error has failed, and its bytes are freed.
        """
        job, upload = await self._hold(job)
        upload.flow.peer = pieces
        pieces.gate = upload.flow.checkpoint
        pieces.most_bytes = upload.flow.next_bytes
        try:
            if job.reason in ("client-gone", "stalled"):
                await self._manager.note(job.id, "client-back", reason=None)
            yield upload
        except BaseException as error:
            await self._broken_off(upload, error)
            raise
        else:
            await self._release(upload, sync=self.limits.durability == "always")
        finally:
            self._forget(upload)
            if upload.flow.error is not None:
                # A cancel that came during the last commits was left to this request.
                await self._manager.conclude(job.id, Input.UNWOUND)

    async def append(
        self,
        upload: Upload,
        offset: int,
        pieces: Pieces,
        *,
        checksums: Mapping[str, str] | None = None,
    ) -> int:
        """Write pieces from ``offset`` on, and commit them; the offset after them.

        With ``checksums`` (hex by algorithm) none of the bytes count before all have come and
        have them. Raises offset-mismatch, checksum-mismatch, too-large, disk-full, ClientGone.
        """
        if offset != upload.stored:
            raise SluiceError(
                "offset-mismatch",
                f"{upload.stored} bytes are stored; the block begins at {offset}.",
                bytes_read=upload.stored,
            )
        if checksums:
            await self._append_checked(upload, pieces, checksums)
        else:
            async for piece in pieces:
                await self.write(upload, piece)
        await self._save(upload)
        return upload.stored

    async def _append_checked(
        self, upload: Upload, pieces: Pieces, checksums: Mapping[str, str]
    ) -> None:
        """Write pieces that count only if their checksums are right (read by the helper)."""
        await self._open(upload)
        start = upload.stored - upload.before
        digester = await self._blobs.digester(upload.blob.id, list(checksums), start=start)
        upload.unchecked = True
        try:
            async for piece in pieces:
                await self.write(upload, piece)
                digester.follow(upload.written - upload.before)
            await hashed(digester, upload.written - upload.before, upload)
            found = await digester.result()
            wrong = [name for name in checksums if found[name] != checksums[name]]
            if wrong:
                raise SluiceError(
                    "checksum-mismatch",
                    f"The {wrong[0]} of the bytes sent is another one; none of them is kept.",
                    bytes_read=upload.stored,
                )
            upload.unchecked = False
            self._stored(upload)
        finally:
            digester.close()
            if upload.unchecked:
                upload.unchecked = False
                upload.written = upload.stored
                await self._close_writer(upload)
                await self._open(upload)  # which cuts off what does not count

    async def write(self, upload: Upload, piece: memoryview) -> None:
        """Write one piece as soon as the upload may go on."""
        flow, n = upload.flow, len(piece)
        upload.received += n
        if not flow.open:
            await flow.checkpoint()
        limit = self.limits.max_bytes if upload.length is None else upload.length
        if upload.written + n > limit:
            raise SluiceError("too-large", f"The upload is longer than {limit:,} bytes.")
        if upload.written >= upload.check_at:
            upload.check_at = upload.written + _CHECK_BYTES
            await self._space.grow(upload.job.id, n)
        writer = upload.writer or await self._open(upload)
        upload.written = upload.before + await writer.write(piece)
        self.received_bytes += n
        flow.spend(n)
        if not upload.unchecked:
            self._stored(upload)
            if upload.stored - upload.saved >= _SAVE_BYTES:
                await self._save(upload)

    async def next_file(self, upload: Upload, name: str) -> None:
        """Begin another file of a form. Its blob is known durably before it has bytes."""
        await self._open(upload)  # an empty file is one, too
        await self._close_writer(upload, sync=True)
        upload.begin_file(PlannedFile(uuid7(), name))
        await self._state.save(upload.job.id, upload.job.fence, cursor=upload.plan.to_json())

    # For dialects: the end

    async def complete(self, job: Job, wait_s: float | None = None) -> list[File]:
        """Finish an upload whose bytes are all here; its files, which are visible then.

        The outcome belongs to the upload: whoever asks again gets the same one, and it is reached
        without anybody asking, too. A part of a later whole is only made durable, and has no files.
        Raises upload-finishing after ``wait_s``, upload-terminated if a cancel was committed first,
        digest-mismatch, and what the storage refuses (then it can be tried again).
        """
        upload = self._live.get(job.id)
        if upload is None or upload.ending is None:
            ended = await self._manager.get(job.id, job.owner)
            if ended.state in FINAL:
                return await self.outcome(ended)
            _, upload = await self._hold(job, takes_over=False)
            upload.ending = self._manager.spawn(self._end(upload))
        await asyncio.wait([upload.ending], timeout=wait_s)
        if not upload.ending.done():
            raise SluiceError("upload-finishing", retry_after_s=2, job=job.id)
        if upload.failure is not None:
            raise upload.failure
        return upload.files

    async def outcome(self, job: Job) -> list[File]:
        """The files of an upload that has ended; raises why there are none.

        A file that was deleted since is given as it was.
        """
        if job.state == "succeeded" and job.result is not None:
            made = {"owner": job.owner, "job": job.id, "created_at": job.ended_at or 0}
            return [msgspec.convert(row | made, File) for row in job.result.data.get("files", [])]
        if job.state == "failed" and job.error is not None:
            raise SluiceError(job.error["code"], job.error["detail"], job=job.id)
        if job.reason == "expired":
            raise SluiceError("upload-gone", "It was left alone for too long.", job=job.id)
        raise terminated(job)

    async def fail(self, job: Job, error: SluiceError) -> None:
        """End an upload that can't become what it was announced to be; its bytes go."""
        await self.halt(job)
        await self._manager.conclude(job.id, Input.FAIL, error=error)

    async def _end(self, upload: Upload) -> None:
        """Finish an upload, and leave the outcome in it. Raises nothing."""
        job = upload.job
        try:
            upload.files = await self._publishing.run(upload)
            if upload.plan.partial:
                self._part_arrived(job)
            else:
                self._space.free(job.id)
                for part in upload.plan.parts:
                    await self._joined(part, job)
        except (SluiceError, Fenced) as error:
            failure = error if isinstance(error, SluiceError) else terminated(job)
            upload.failure = failure
            await self._not_ended(upload, failure)
        except Exception as error:
            log.error("upload %s could not be finished", job.id, exc_info=error)
            upload.failure = SluiceError("internal")
        finally:
            self._forget(upload)

    async def _not_ended(self, upload: Upload, error: SluiceError) -> None:
        job_id = upload.job.id
        if error.code == "upload-terminated":
            await self._manager.conclude(job_id, Input.UNWOUND)
            await self._manager.settled(job_id)
        elif error.code == "stopping":
            await self._stopped(upload.job)
        elif error.code == "digest-mismatch" or not self._resumable(upload.job):
            await self._manager.conclude(job_id, Input.FAIL, error=error)
        else:
            log.warning("upload %s could not be finished: %s", job_id, error)

    # Wholes and their parts

    def _part_arrived(self, part: Job) -> None:
        for whole in self._waiting.get(part.id, ()):
            self._manager.spawn(self._go_on(whole))

    async def _go_on(self, job_id: str) -> None:
        """Finish an upload, for nobody who waits, if all its bytes are here."""
        with suppress(SluiceError):
            job = await self._state.get(job_id)
            if job is not None and job.state == "running" and await self.arrived(job):
                await self.complete(job)

    async def arrived(self, job: Job) -> bool:
        """Whether all bytes of an upload (or of all its parts) are here."""
        plan = plan_of(job)
        for part_id in plan.parts:
            part = await self._state.get(part_id, job.owner)
            if part is None or not plan_of(part).complete:
                return False
        length = job.transfer.length_bytes if job.transfer is not None else None
        return bool(plan.parts) or plan.complete or (plan.by_length and self.offset(job) == length)

    async def _joined(self, part_id: str, whole: Job) -> None:
        """A part's bytes are in the whole now: it has succeeded, and its own are freed."""
        part = await self._state.get(part_id)
        if part is not None and part.state not in FINAL:
            await self._publishing.hand_over(part, whole)
            await self.discard(part)

    async def _left_without(self, job_id: str, part: Job) -> None:
        """A part has gone: what was to be made of it can't be any more, unless it is made."""
        whole = await self._state.get(job_id)
        if whole is not None and whole.state not in FINAL:
            await self.fail(whole, SluiceError("upload-gone", f"Its part {part.id} has ended."))

    # For the manager (see Driver)

    def start(self, job: Job) -> None:
        """See Driver; an upload starts with its request."""

    def signal(self, job: Job) -> bool:
        """See Driver."""
        upload = self._live.get(job.id)
        if upload is None:
            if job.want == "run":
                self._manager.spawn(self._go_on(job.id))  # it was paused while it was finished
            return False
        if job.want == "cancel":
            upload.flow.end(terminated(job))
            return True
        upload.flow.signal(job.want)
        upload.meter.hold()
        # Nothing is written any more from here on, so the pause is already in force.
        return upload.publishing

    def tune(self, job: Job) -> None:
        """See Driver."""
        upload = self._live.get(job.id)
        if upload is not None:
            upload.flow.limit(job.limit_bytes_per_s)

    def force(self, job: Job) -> None:
        """See Driver; an upload ends at once anyway."""
        self.signal(job)

    async def rollback(self, job: Job) -> Rollback | None:
        """See Driver: the bytes go."""
        upload = self._live.get(job.id)
        if upload is not None:
            await self._close_writer(upload)
        await self.discard(job)
        return None

    async def discard(self, job: Job) -> None:
        """See Driver."""
        await self._close_unforced(job.id)
        upload = self._live.get(job.id)
        blobs = plan_of(job).blobs + (upload.plan.blobs if upload is not None else [])
        for blob in {blob.id for blob in blobs}:
            self._publishing.forget(blob)
            await self._blobs.discard(blob)
        self._space.free(job.id)
        for whole in self._waiting.pop(job.id, ()):
            self._manager.spawn(self._left_without(whole, job))

    async def recover(self, job: Job, same_boot: bool) -> list[str]:
        """See Driver: cut the blob back to what was acknowledged."""
        plan = plan_of(job)
        blobs = [blob.id for blob in plan.blobs]
        for blob in blobs:
            await self._blobs.unpublish(blob)
        if not self._resumable(job) or job.want == "cancel":
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
            plan.complete = False
            await self._state.save(
                job.id,
                job.fence,
                cursor=plan.to_json(),
                stored_bytes=stored,
                durable_bytes=durable,
            )
            if plan.firm:
                lost = SluiceError("storage-failed", "Stored bytes of the upload were lost.")
                self._manager.spawn(self._manager.conclude(job.id, Input.FAIL, error=lost))
        length = job.transfer.length_bytes if job.transfer is not None else None
        self._space.hold(job.id, job.owner, length, stored, joined=bool(plan.parts))
        for part in plan.parts:
            self._waiting.setdefault(part, set()).add(job.id)
        return blobs

    def glance(self, job: Job, finished: bool = False) -> Glance:
        """See Driver."""
        upload = self._live.get(job.id)
        if upload is None:
            if job.transfer is None or job.state in FINAL:
                return Glance(None, None)
            progress = msgspec.structs.replace(
                job.progress,
                done=job.stored_bytes,
                total=job.transfer.length_bytes,
                rate_per_s=None,
                eta_s=None,
            )
            return Glance(progress, None)
        progress = upload.meter.finished() if finished else upload.meter.progress()
        return Glance(
            progress,
            {
                "received_bytes": upload.received,
                "stored_bytes": upload.stored,
                "durable_bytes": upload.durable,
                "processed_bytes": upload.processed,
                "connected": job.state not in FINAL and upload.ending is None,
                "protocol": upload.job.transfer.protocol if upload.job.transfer else "",
                "stalled_since": rfc3339(upload.flow.stalled_at),
                "warm": job.want == "pause",
                "limit_bytes_per_s": job.limit_bytes_per_s,
            },
        )

    def grown(self, job: Job, name: str | None) -> Grown | None:
        """See Driver. What is committed counts: after a crash the sender goes on behind it.

        A part of a later whole is no file; what is made of parts has no bytes before it is joined.
        """
        unknown = SluiceError(
            "content-unknown", "The upload makes no file of that name.", job=job.id
        )
        if job.state in FINAL:
            made = job.result.data.get("files", ()) if job.result is not None else ()
            for file in made:
                if name in (None, file["name"], file["id"]):
                    size = file["bytes"]
                    return Grown(file["id"], file["name"], file["media_type"], size, size)
            raise unknown
        upload = self._live.get(job.id)
        plan = upload.plan if upload is not None else plan_of(job)
        if plan.partial:
            raise unknown
        if plan.parts and not plan.complete:
            return None
        left = upload.saved if upload is not None else job.stored_bytes
        length = job.transfer.length_bytes if job.transfer is not None else None
        for blob in plan.blobs:
            last = blob is plan.blobs[-1]
            if name in (None, blob.name, blob.id):
                known = length if len(plan.blobs) == 1 else None
                if not last or plan.complete:
                    known = blob.bytes
                there = left if last else min(left, blob.bytes)
                media_type = plan.media_type or media_type_of(blob.name)
                return Grown(blob.id, blob.name, media_type, max(0, there), known)
            left -= blob.bytes
        if self._resumable(job):  # a form may have another file
            raise unknown
        return None

    def changed(self) -> Iterable[tuple[str, Progress]]:
        """See Driver. The last of a request counts, too, however short it was."""
        moved, self._moved = self._moved, {}
        yield from moved.items()
        for job_id, upload in list(self._live.items()):
            if upload.meter.changed:
                upload.meter.changed = False
                yield job_id, upload.meter.progress()

    async def save(self) -> None:
        """See Driver; here also senders that send nothing are noticed."""
        interval = self.limits.durability == "interval"
        lives = [upload for upload in self._live.values() if upload.ending is None]
        for upload in lives:
            self._watch(upload)
        left, self._unforced = self._unforced, {}
        await asyncio.gather(
            *(self._try_save(upload, interval) for upload in lives),
            *(self._force(upload) for upload in left.values()),
        )

    async def _force(self, upload: Upload) -> None:
        """Force to the disk what a request has left behind that has ended since.

        Its writer was kept for that: to open the blob again could cut off what came later. Whoever
        has connected meanwhile sees to it himself.
        """
        job = upload.job
        try:
            if upload.writer is not None and job.id not in self._live:
                durable = upload.before + await upload.writer.sync()
                if job.id not in self._live:
                    await self._state.save(job.id, job.fence, durable_bytes=durable)
        except (Fenced, SluiceError) as error:  # it has ended, or the disk is in trouble
            log.debug("upload %s was not forced to the disk: %s", job.id, error)
        finally:
            await self._close_writer(upload)

    async def stop(self) -> None:
        """See Driver: end the open requests, keeping what they delivered."""
        lives = list(self._live.values())
        for upload in lives:
            upload.flow.end(SluiceError("stopping", retry_after_s=5))
        await asyncio.gather(*(upload.released.wait() for upload in lives))
        left, self._unforced = self._unforced, {}
        await asyncio.gather(*(self._force(upload) for upload in left.values()))

    async def expire(self) -> int:
        """Cancel unfinished uploads that were left alone for too long; how many."""
        now = now_ms()
        after: int | None = None
        expired = 0
        while True:
            page = await self._state.find(Filter(kinds=(KIND,), live=True), after, _EXPIRY_BATCH)
            for job in page.items:
                if (self.expires_at(job) or now) < now and job.id not in self._live:
                    await self._manager.report(job.id, Input.EXPIRE)
                    expired += 1
            if page.next is None:
                return expired
            after = page.next

    # Inside

    async def _hold(self, job: Job, *, takes_over: bool = True) -> tuple[Job, Upload]:
        """Make the upload live for one writer, after any other has let go."""
        while True:
            while (earlier := self._live.get(job.id)) is not None:
                if earlier.ending is not None:
                    raise SluiceError("upload-finishing", retry_after_s=2, job=job.id)
                if not takes_over:
                    raise SluiceError("upload-busy", retry_after_s=1, job=job.id)
                await self._take_over(earlier)
            job = await self._manager.get(job.id, job.owner)
            if job.state in FINAL:
                raise SluiceError("upload-terminated", "The upload has ended.", job=job.id)
            if job.id not in self._live:
                break
        upload = Upload(job, self.limits.hold_s)
        self._live[job.id] = upload
        await self._close_unforced(job.id)
        if job.want == "cancel":
            upload.flow.end(terminated(job))
        return job, upload

    async def _take_over(self, earlier: Upload) -> None:
        """End the request that writes an upload, and wait until it has let go."""
        earlier.flow.end(SluiceError("upload-taken-over", job=earlier.job.id))
        await earlier.released.wait()
        self._manager.spawn(self._manager.note(earlier.job.id, "taken-over"))

    async def _broken_off(self, upload: Upload, error: BaseException) -> None:
        """The request ended by an error: keep what may be kept, report what has happened."""
        job = upload.job
        code = error.code if isinstance(error, SluiceError) else ""
        gone = isinstance(error, ClientGone)
        await self._release(upload, sync=self.limits.durability == "always")
        if code == "upload-terminated":
            await self._manager.conclude(job.id, Input.UNWOUND)
            await self._manager.settled(job.id)
        elif code == "stopping":
            await self._stopped(job)
        elif not self._resumable(job):
            failure = SluiceError("client-gone" if gone else "internal")
            if isinstance(error, SluiceError):
                failure = error
            if (await self._manager.get(job.id, job.owner)).state not in FINAL:
                await self.discard(job)  # first: on a full disk it makes room to note the failure
            await self._manager.conclude(job.id, Input.FAIL, error=failure)
        elif gone:
            self._forget(upload)  # so that the event shows it as no longer connected
            await self._manager.note(job.id, "client-gone", reason="client-gone")

    async def _stopped(self, job: Job) -> None:
        interrupted = SluiceError("interrupted", "The server stopped during the upload.")
        await self._manager.conclude(job.id, Input.SHUTDOWN, error=interrupted)

    def _resumable(self, job: Job) -> bool:
        return job.transfer is not None and job.transfer.resumable

    def _stored(self, upload: Upload) -> None:
        """What was written counts."""
        upload.advance(upload.written)
        self._space.moved(upload.job.id, upload.stored)

    async def _open(self, upload: Upload) -> Writer:
        """The current file's blob, opened at its end."""
        if upload.writer is None:
            upload.writer = await self._blobs.writer(
                upload.blob.id, upload.job.fence, offset=upload.stored - upload.before
            )
            upload.digester = await self._publishing.digester(upload)
        return upload.writer

    async def _close_writer(self, upload: Upload, *, sync: bool = False) -> None:
        writer, upload.writer = upload.writer, None
        if writer is not None:
            try:
                if sync:
                    await writer.sync()
            finally:
                await writer.close()

    async def _release(self, upload: Upload, *, sync: bool) -> None:
        """Commit what was written and let the blob go."""
        await self._try_save(upload, sync)
        interval = self.limits.durability == "interval"
        if interval and self._resumable(upload.job) and upload.durable < upload.stored:
            self._unforced[upload.job.id] = upload
        else:
            await self._close_writer(upload)

    async def _close_unforced(self, job_id: str) -> None:
        left = self._unforced.pop(job_id, None)
        if left is not None:
            await self._close_writer(left)

    def _forget(self, upload: Upload) -> None:
        if self._live.get(upload.job.id) is upload:
            del self._live[upload.job.id]
            if upload.meter.changed:
                self._moved[upload.job.id] = upload.meter.progress()
        upload.released.set()

    async def _try_save(self, upload: Upload, sync: bool) -> None:
        try:
            await self._save(upload, sync=sync)
        except (Fenced, SluiceError) as error:
            log.warning("upload %s could not be saved: %s", upload.job.id, error)

    async def _save(self, upload: Upload, *, sync: bool | None = None) -> None:
        """Commit the offset; with ``sync`` what it covers is durable as well."""
        if sync is None:
            sync = self.limits.durability == "always"
        if sync and upload.writer is not None and upload.durable < upload.stored:
            before, stored = upload.before, upload.stored
            durable = min(stored, before + await upload.writer.sync())
            if self._live.get(upload.job.id) is not upload:
                return  # the request has ended meanwhile, and has saved what it had
            upload.durable = max(upload.durable, durable)
        stored = upload.stored  # not that from before the sync: an offset never goes back
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
        upload.saved = max(upload.saved, stored)
        upload.durable_saved = max(upload.durable_saved, forced or 0)
        self._manager.grew(upload.job.id)

    def _watch(self, upload: Upload) -> None:
        """Notice a sender that sends nothing, and one that sends again."""
        before = upload.flow.stalled_at
        upload.watch(
            self.limits.idle_s, self.limits.min_bytes_per_s, self.limits.hold_s, _STALLED_S
        )
        if (before is None) != (upload.flow.stalled_at is None):
            cause, reason = ("stalled", "stalled") if before is None else ("client-back", None)
            self._manager.spawn(self._manager.note(upload.job.id, cause, reason=reason))
