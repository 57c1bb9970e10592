"""What follows the last byte of an upload: join, check, publish.

These are phases of the job, with progress of their own, and they belong to no request. Joining
copies the parts of a whole (in the kernel, without copying where the disk can share blocks).
Checking waits for the helper process that hashes: it has followed the bytes while they came, so
little is left; after a restart it reads them again, because a hash's state can't be kept.
Publishing is a rename and a commit. Up to there a pause holds and a cancel ends; whatever fails
leaves the bytes where they are, so that it can be tried again.
"""

from __future__ import annotations

import asyncio
from typing import Any

from errors import SluiceError
from jobs.files import DIGESTS, media_type_of, now_ms
from jobs.manager import Manager
from jobs.states import Input
from jobs.upload import CHECKING, JOINING, PUBLISHING, WAITING, Plan, PlannedFile, Upload, plan_of
from storage import Blobs, Digester, File, Job, Result, State

_STRIDE_BYTES = 64 << 20  # hashed between two looks at what is wanted


class Publishing:
    """Finishes uploads, one ``run`` each."""

    def __init__(self, manager: Manager, state: State, blobs: Blobs, always: bool) -> None:
        self._manager = manager
        self._state = state
        self._blobs = blobs
        self._always = always
        # By blob, with what they make; they outlive requests.
        self._digesters: dict[str, tuple[Digester, frozenset[str]]] = {}

    async def digester(self, upload: Upload) -> Digester | None:
        """Who hashes the file that is written now, if it is to be hashed."""
        plan = upload.plan
        if plan.partial or not (self._always or plan.digest or plan.expect):
            return None
        return await self._follower(upload.blob.id, plan)

    async def _follower(self, blob_id: str, plan: Plan) -> Digester:
        """Who has hashed a blob while it grew; somebody new if a digest is expected since."""
        wanted = frozenset((*DIGESTS, *plan.expect))
        if blob_id in self._digesters:
            digester, made = self._digesters[blob_id]
            if wanted <= made:
                return digester
            self.forget(blob_id)
        digester = await self._blobs.digester(blob_id, sorted(wanted))
        self._digesters[blob_id] = digester, wanted
        return digester

    def forget(self, blob_id: str) -> None:
        """The blob is published or gone: nobody hashes it any more."""
        if blob_id in self._digesters:
            digester, _ = self._digesters.pop(blob_id)
            digester.close()

    async def run(self, upload: Upload) -> list[File]:
        """Take an upload whose bytes are all here to its end; its files.

        A part of a later whole ends as durable bytes, without a file. Raises upload-terminated,
        digest-mismatch, stopping, and what the storage refuses; then the bytes are still there.
        """
        await upload.flow.checkpoint()
        plan = upload.plan
        if plan.parts and not plan.complete:
            await self._join(upload)
        await self._seal(upload)
        if plan.partial:
            return []
        digests = [await self._check(upload, blob) for blob in plan.blobs]
        await upload.flow.checkpoint()
        return await self._publish(upload, digests)

    async def hand_over(self, part: Job, whole: Job) -> None:
        """The part's bytes are in the whole: it has succeeded."""
        result = Result(data={"joined": whole.id})
        await self._manager.conclude(part.id, Input.FINISH, result=result)

    async def _join(self, upload: Upload) -> None:
        """Make the blob of a whole of the blobs of its parts, in their order."""
        sources: list[tuple[str, str | None]] = []
        total = 0
        for part_id in upload.plan.parts:
            part = await self._state.get(part_id, upload.job.owner)
            if part is None or not plan_of(part).complete or part.ended_at is not None:
                raise SluiceError("upload-unfinished", "A part of it is not there any more.")
            sources.append((plan_of(part).blobs[0].id, None))
            total += part.stored_bytes
        upload.meter.mark(0, total, JOINING)

        async def pace(done: int) -> None:
            upload.meter.mark(done)
            await upload.flow.checkpoint()

        joined = await self._blobs.concat(upload.blob.id, sources, pace)
        upload.received = upload.written = upload.stored = upload.durable = joined
        upload.meter.mark(joined)

    async def _seal(self, upload: Upload) -> None:
        """Force the last bytes to the disk, and note where that could not be seen otherwise.

        The earlier files of a form were sealed when the next one began.
        """
        plan, job = upload.plan, upload.job
        if upload.durable < upload.stored or not upload.stored - upload.before:
            writer = await self._blobs.writer(
                upload.blob.id, job.fence, offset=upload.stored - upload.before
            )
            try:
                upload.durable = max(upload.durable, upload.before + await writer.sync())
            finally:
                await writer.close()
        upload.blob.bytes = upload.stored - upload.before
        upload.digester = await self.digester(upload)
        known = plan.complete
        plan.complete = True
        lasts = upload.digester is not None or plan.partial or plan.parts
        resumable = job.transfer is not None and job.transfer.resumable
        if resumable and not known and (lasts or not plan.by_length):
            upload.meter.mark(phase=WAITING if plan.partial else CHECKING)
            await self._save(upload)

    async def _check(self, upload: Upload, blob: PlannedFile) -> dict[str, str]:
        """The digests of a file, if they are wanted. Raises digest-mismatch."""
        if upload.digester is None:
            return {}
        digester = await self._follower(blob.id, upload.plan)
        if digester.processed < blob.bytes:
            upload.meter.mark(phase=CHECKING)
        await hashed(digester, blob.bytes, upload)
        found = await digester.result()
        for name, expected in upload.plan.expect.items():
            if found[name] != expected:
                raise SluiceError(
                    "digest-mismatch",
                    f"The {name} of {blob.name} is {found[name]}, not {expected}.",
                    job=upload.job.id,
                )
        return found

    async def _publish(self, upload: Upload, digests: list[dict[str, str]]) -> list[File]:
        job, plan = upload.job, upload.plan
        upload.publishing = True
        upload.meter.mark(upload.stored, upload.stored, PUBLISHING)
        saving = asyncio.ensure_future(self._save(upload))  # shares the commit of the outcome
        try:
            files = []
            for blob, digest in zip(plan.blobs, digests, strict=True):
                files.append(await self._published(job, blob, digest, plan.media_type))
            upload.meter.phase = None
            ended = await self._manager.report(
                job.id,
                Input.FINISH,
                fence=job.fence,
                files=files,
                result=Result(file=files[0].id, data={"files": [_told(file) for file in files]}),
            )
        except SluiceError:  # no row followed: a later request shall find the bytes again
            for blob in plan.blobs:
                await self._blobs.unpublish(blob.id)
            raise
        finally:
            upload.publishing = False
            await asyncio.gather(saving, return_exceptions=True)
        if ended is None or ended.state != "succeeded":
            raise terminated(job)
        for blob in plan.blobs:
            self.forget(blob.id)
        return [await self._state.file(file.id, file.owner) or file for file in files]

    async def _published(
        self, job: Job, blob: PlannedFile, digest: dict[str, str], media_type: str | None
    ) -> File:
        return File(
            id=blob.id,
            name=blob.name,
            bytes=await self._blobs.publish(blob.id, blob.name),
            media_type=media_type or media_type_of(blob.name),
            digest=digest,
            owner=job.owner,
            job=job.id,
            created_at=now_ms(),
        )

    async def _save(self, upload: Upload) -> None:
        await self._state.save(
            upload.job.id,
            upload.job.fence,
            cursor=upload.plan.to_json(),
            stored_bytes=upload.stored,
            durable_bytes=upload.durable,
            progress=upload.meter.progress(),
        )
        upload.saved = max(upload.saved, upload.stored)
        self._manager.grew(upload.job.id)


async def hashed(digester: Digester, upto: int, upload: Upload) -> None:
    """Return when the first ``upto`` bytes were hashed; a pause holds, and a cancel ends it."""
    while digester.processed < upto:
        await upload.flow.checkpoint()
        await digester.reach(min(upto, digester.processed + _STRIDE_BYTES))
        upload.meter.mark(message=_share(digester.processed, upto))
    upload.meter.message = None


def terminated(job: Job) -> SluiceError:
    """What whoever waits for a cancelled upload is told."""
    return SluiceError("upload-terminated", f"The upload of {job.name} was aborted.", job=job.id)


def _told(file: File) -> dict[str, Any]:
    """A file as the job's result keeps it, so that the answer outlives the file."""
    return {
        "id": file.id,
        "name": file.name,
        "bytes": file.bytes,
        "media_type": file.media_type,
        "digest": file.digest,
    }


def _share(done: int, total: int) -> str:
    return f"{100 * done // max(1, total)} % checked"
