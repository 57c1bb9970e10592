"""Resumable uploads of the IETF (draft-ietf-httpbis-resumable-upload), versions 5 to 8 of it.

``/resumable/`` takes a file, whole or its beginning; ``/resumable/{id}`` is the upload resource,
where the client asks how far it came, appends, and gives up. What the versions want differently
is one table, ``_DRAFTS``; sections are those of the newest draft.

- Whatever the head of a request shows to be wrong is refused in ``admit``, before 100 (Continue)
  and before the body. A new upload is made there, too, so that 104 tells its address in time.
- HEAD, GET, PATCH and DELETE end the request that still writes; what it delivered counts.
- ``Upload-Complete: ?1`` in an answer says that it is the result. After a 4xx clients give up,
  after a 5xx they ask again; the statuses are chosen by that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from tornado.httputil import HTTPServerRequest

from errors import SluiceError
from handlers import fields
from handlers.base import BaseHandler
from jobs import Job
from jobs.files import clean_name, now_ms, uuid7
from jobs.states import FINAL
from jobs.upload import Plan, Upload
from jobs.uploads import ClientGone

_PROTOCOL = "resumable"
_PARTIAL = "application/partial-upload"
_WRITING = ("POST", "PUT", "PATCH")
_FINISH_S = 5.0  # that a question waits for what follows the last byte
_DELETE_S = 5.0  # that DELETE waits until the bytes are gone
_TELL_S = 1.0  # between two 104 of one request
_MOST = 999_999_999_999_999  # an Integer can say no more (RFC 9651 section 3.3.1)

# Section 7 ("completed-upload" until -11): what the draft calls our problems, and their status.
_TYPES = {
    "offset-mismatch": "mismatching-upload-offset",
    "length-mismatch": "inconsistent-upload-length",
    "upload-complete": "completed-upload",
}
_STATUS = {
    "offset-mismatch": 409,
    "upload-complete": 400,
    "checksum-mismatch": 400,
    "upload-finishing": 503,
    "upload-stalled": 503,
}
_ENDS = ("upload-terminated", "digest-mismatch")  # the upload; there is no offset any more


class Draft(NamedTuple):
    """What a version of the draft wants otherwise than others do."""

    append_type: str | None = _PARTIAL
    appended: int = 204  # the status of an append that completes nothing
    lifetime: str = "max-age"  # its key in Upload-Limit
    replays: bool = True  # an append to a complete upload gets the result again, not 400
    is_strict: bool = False  # HEAD and DELETE that tell a state are 400, what has failed is 404
    # The header of the result that names the stored file. Until -09 Location may always be taken
    # for the upload resource (-03 to -05 demand that it is), and Content-Location is free. Since
    # then the result of a request says by Location what it has created (section 4.2).
    file_header: str = "Location"
    unsure: int = 503  # of a HEAD that can't be answered now; tus-js-client tries again after 423


_OLD = Draft(
    appended=201, lifetime="expires", is_strict=True, file_header="Content-Location", unsure=423
)
_DRAFTS = {
    5: _OLD._replace(append_type=None),  # -03
    6: _OLD._replace(replays=False),  # -04, -05
    7: Draft(replays=False, file_header="Content-Location"),  # -06 to -08
    8: Draft(),  # -09 to -12, and what the RFC will be
}


class ResumableHandler(BaseHandler):
    """What both addresses share: versions, lengths, the way of the bytes, and how all is told."""

    STREAMS = True

    creates = False  # an upload, if all goes well
    offset = 0  # where the content begins
    complete = False  # with this request all is there
    checksums: Mapping[str, str] = {}  # of the content
    job: Job | None = None  # what the request writes
    upload: Upload | None = None

    def initialize(self) -> None:
        """Find out what the client speaks."""
        super().initialize()
        self.version = _version(self.request)
        self.draft = _DRAFTS[self.version or max(_DRAFTS)]
        # A 104 needs a version that both sides know (appendix "Draft Version Identification"), and
        # one of HTTP that knows interim answers.
        takes = self.version is not None and self.request.version == "HTTP/1.1"
        self.informs = takes and self.services.settings.informational

    def set_default_headers(self) -> None:
        """Tornado's hook; also called before an error is written."""
        super().set_default_headers()
        version = _version(self.request)
        if version is not None:
            self.set_header("Upload-Draft-Interop-Version", str(version))

    # What the request tells

    def number(self, name: str) -> int | None:
        """A field that is a number of bytes; any other value counts as none (section 4.1)."""
        value = fields.integer(self.request.headers.get(name))
        return value if value is not None and value >= 0 else None

    @property
    def end(self) -> int | None:
        """Where in the whole the content ends, if that is known by now."""
        return None if self.body.length is None else self.offset + self.body.length

    def length(self, known: int | None) -> int | None:
        """The length of the whole, if it was told (section 4.1.3). Raises length-mismatch."""
        told = (known, self.number("Upload-Length"), self.end if self.complete else None)
        lengths = sorted({length for length in told if length is not None})
        if len(lengths) > 1:
            both = f"{lengths[0]} and {lengths[-1]}"
            raise SluiceError("length-mismatch", f"The length can't be {both} bytes.")
        if not lengths:
            return None
        if lengths[0] < (self.offset if self.end is None else self.end):
            raise _too_long(lengths[0])
        return lengths[0]

    # The way of the bytes

    async def receive(self, job: Job, appended: int) -> None:
        """Store the content, then answer: with ``appended``, or with the result if that was all."""
        uploads = self.services.uploads
        try:
            async with uploads.connect(job, self.body) as upload:
                self.upload = upload
                with self._telling(upload):
                    stored = await uploads.append(
                        upload, self.offset, self.body, checksums=self.checksums
                    )
        except SluiceError as error:
            length = self.upload.length if self.upload is not None else None
            if error.code != "too-large" or length is None:
                raise
            raise await self.invalid(job, length) from error
        if not self.complete:
            self.set_status(appended)
            self.tell_state(await uploads.get(job.id, job.owner, _PROTOCOL), stored)
        elif upload.length is not None and stored < upload.length:
            raise SluiceError(
                "length-mismatch", f"{stored} of {upload.length} bytes came; more are missing."
            )
        else:
            await self.tell_result(job)

    async def invalid(self, job: Job, length: int) -> SluiceError:
        """End an upload whose sender goes beyond its length (section 4.4.2); the error to raise."""
        self.job, error = None, _too_long(length)
        await self.services.uploads.fail(job, error)
        return error

    @contextmanager
    def _telling(self, upload: Upload) -> Iterator[None]:
        """Meanwhile tell by 104 what is committed: a client may free what is acknowledged."""

        async def tell() -> None:
            told = upload.saved
            while True:
                await asyncio.sleep(_TELL_S)
                if upload.saved > told:
                    told = upload.saved
                    self.inform({"Upload-Offset": str(told)})

        telling = asyncio.get_running_loop().create_task(tell()) if self.informs else None
        try:
            yield
        finally:
            if telling is not None:
                telling.cancel()

    def inform(self, headers: Mapping[str, str]) -> None:
        """Send 104 ahead of the answer, to a client that can take it (section 5)."""
        stream = self.connection.stream
        if not self.informs or stream.closed():
            return
        lines = [
            "HTTP/1.1 104 Upload Resumption Supported",
            f"Upload-Draft-Interop-Version: {self.version}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        stream.write("".join(f"{line}\r\n" for line in [*lines, ""]).encode())

    # Answers

    def address(self, job: Job) -> str:
        """Where the upload resource is."""
        return self.location(f"/resumable/{job.id}")

    def limits(self, job: Job | None) -> str:
        """Upload-Limit (section 4.1.4): of an upload, or (None) of those that may be made."""
        uploads = self.services.uploads
        members: dict[str, int | bool | bytes] = {}
        if uploads.limits.max_bytes <= _MOST:
            members["max-size"] = uploads.limits.max_bytes
        if job is None:
            members[self.draft.lifetime] = int(uploads.limits.expires_s)
        elif (expires_at := uploads.expires_at(job)) is not None:
            members[self.draft.lifetime] = max(0, expires_at - now_ms()) // 1000
        return fields.dictionary(members or {"min-size": 0})

    def tell_state(self, job: Job, stored: int, *, complete: bool = False) -> None:
        """Say where an upload stands (section 4.3.2)."""
        known = job.transfer.length_bytes if job.transfer is not None else None
        length = stored if complete else known
        self.set_header("Upload-Offset", str(stored))
        self.set_header("Upload-Complete", "?1" if complete else "?0")
        if length is not None:
            self.set_header("Upload-Length", str(length))
        self.set_header("Upload-Limit", self.limits(job))
        self.set_header("Cache-Control", "no-store")

    async def tell_result(self, job: Job) -> None:
        """Finish the upload, and answer for the whole (section 4.2.2), however often it is asked.

        Raises as ``Uploads.complete`` does.
        """
        uploads = self.services.uploads
        file = (await uploads.complete(job))[0]
        job = await uploads.get(job.id, job.owner, _PROTOCOL)
        self.tell_state(job, file.bytes, complete=True)
        self.set_header("Location", self.address(job))
        self.set_header(self.draft.file_header, self.location(f"/v1/files/{file.id}"))
        if digest := fields.repr_digest(file.digest):
            self.set_header("Repr-Digest", digest)
        answer = {
            "id": file.id,
            "job": job.id,
            "filename": file.name,
            "bytes": file.bytes,
            "digest": file.digest,
        }
        self.reply(answer, 201)

    def _problem(self, error: SluiceError) -> bytes:
        """The answer to an error: in the draft's words, and with what is needed to go on."""
        problem = super()._problem(self._worded(error))
        if error.status == 413:
            self.set_header("Upload-Limit", self.limits(None))
        if self.request.method in _WRITING:
            # A digest is compared when all has come: only this error is a result.
            self.set_header("Upload-Complete", "?1" if error.code == "digest-mismatch" else "?0")
            if error.code not in _ENDS:
                self._tell_offset()
        return problem

    def _tell_offset(self) -> None:
        """Say from where on the request can be repeated, if it can."""
        if self.job is None or self.job.transfer is None or not self.job.transfer.resumable:
            return
        uploads = self.services.uploads
        at = self.upload.saved if self.upload is not None else uploads.offset(self.job)
        self.set_header("Upload-Offset", str(at))
        if self.creates:  # so the client may not know it yet
            self.set_header("Location", self.address(self.job))

    def _worded(self, error: SluiceError) -> SluiceError:
        extra: dict[str, Any] = {}
        if error.code in _TYPES:
            name = _TYPES[error.code]
            extra["type"] = f"https://iana.org/assignments/http-problem-types#{name}"
        if error.code == "offset-mismatch":
            extra |= {
                "expected-offset": error.extra["bytes_read"],
                "provided-offset": self.offset,
            }
        status = _STATUS.get(error.code, error.status)
        if status == 503 and self.request.method == "HEAD":
            status = self.draft.unsure
        return error.with_status(status, **extra)


class CreationHandler(ResumableHandler):
    """``/resumable/``: files that begin here, by any method that can carry content."""

    creates = True

    async def options(self, *args: str, **kwargs: str) -> None:
        """Say that uploads can be resumed here, and their limits (section 4.1.4)."""
        await super().options(*args, **kwargs)
        self.set_header("Upload-Limit", self.limits(None))
        self.set_header("Accept-Patch", _PARTIAL)  # -10 and -11 want it

    async def admit(self) -> None:
        """Make the upload, unless the head shows that it can't be one (section 4.2.2)."""
        headers, uploads, caller = self.request.headers, self.services.uploads, self.caller
        complete = fields.boolean(headers.get("Upload-Complete"))
        if complete is None and self.body.length == 0:
            raise _missing("Upload-Complete")
        self.complete = complete is not False  # without it, this is a conventional upload
        self.checksums = fields.digests(headers.get("Content-Digest"))
        length = self.length(None)
        await uploads.check(caller.owner, self.body.length if length is None else length)
        name = fields.file_name(headers.get("Content-Disposition"))
        then = self.following(self.get_query_argument("then", None))
        self.job, _ = await uploads.create(
            clean_name(name, "filename") if name else f"upload-{uuid7()[-6:]}",
            owner=caller.owner,
            client=caller.client,
            by=caller.by(_PROTOCOL),
            protocol=_PROTOCOL,
            resumable=self.informs or not self.complete,  # else nobody learns the address
            length=length,
            plan=Plan(
                digest=fields.wants_digest(headers.get("Want-Repr-Digest")),
                expect=fields.digests(headers.get("Repr-Digest")),
                firm=True,  # section 4.1.1
                media_type=fields.media_type(headers.get("Content-Type")),
            ),
            following=then,
        )
        self.inform({"Location": self.address(self.job), "Upload-Limit": self.limits(self.job)})

    async def post(self) -> None:
        """Take the whole file, or its beginning."""
        assert self.job is not None
        self.set_header("Location", self.address(self.job))
        try:
            await self.receive(self.job, 201)
        except ClientGone:
            if not self.informs:  # it has gone without having learnt the address
                await self.services.uploads.fail(self.job, SluiceError("client-gone"))
            raise

    async def put(self) -> None:
        """See ``post``."""
        await self.post()

    async def patch(self) -> None:
        """See ``post``."""
        await self.post()


class UploadHandler(ResumableHandler):
    """``/resumable/{id}``: the upload resource."""

    CHANGES = True  # even a question ends the request that writes

    is_over = False  # an earlier request has said that all is there

    async def admit(self) -> None:
        """Refuse what can't be appended (section 4.4.2)."""
        if self.request.method != "PATCH":
            return
        headers, uploads = self.request.headers, self.services.uploads
        given = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if self.draft.append_type not in (None, given):
            raise SluiceError("media-type-wrong", f"Send the bytes as Content-Type: {_PARTIAL}.")
        offset = self.number("Upload-Offset")
        complete = fields.boolean(headers.get("Upload-Complete"))
        if offset is None:
            raise _missing("Upload-Offset")
        if complete is None:
            raise _missing("Upload-Complete")
        self.offset, self.complete = offset, complete
        self.job = job = await self._taken_over(self.path_args[0])
        self.is_over = job.state in FINAL or uploads.finishing(job)
        if self.is_over and not (complete and (self.draft.replays or job.state not in FINAL)):
            raise SluiceError("upload-complete", "The upload is complete: nothing is appended.")
        stored = uploads.offset(job)
        if offset != stored:
            raise SluiceError(
                "offset-mismatch", f"{stored} bytes are stored, not {offset}.", bytes_read=stored
            )
        if self.is_over and self.body.length != 0:
            raise _too_long(stored)
        if not self.is_over:
            self.job = await self._admit_more(job)

    async def _admit_more(self, job: Job) -> Job:
        """Note what the head tells of the whole; the upload after it."""
        headers, uploads = self.request.headers, self.services.uploads
        known = job.transfer.length_bytes if job.transfer is not None else None
        if known is not None and self.end is not None and self.end > known:
            raise await self.invalid(job, known)
        length = self.length(known)
        if length is not None:
            job = await uploads.set_length(job, length, self.caller.by(_PROTOCOL))
        elif self.end is not None and self.end > uploads.limits.max_bytes:
            raise SluiceError("too-large", f"At most {uploads.limits.max_bytes:,} bytes are taken.")
        self.checksums = fields.digests(headers.get("Content-Digest"))
        # With an append that is not the last one it would be that of something else.
        expected = fields.digests(headers.get("Repr-Digest")) if self.complete else {}
        wanted = fields.wants_digest(headers.get("Want-Repr-Digest"))
        if expected or wanted:
            job = await uploads.expect(job, expected, wanted=wanted)
        return job

    async def patch(self, upload_id: str) -> None:
        """Append the content; or give the result again to a client that has missed it."""
        assert self.job is not None
        if self.is_over:
            await self.tell_result(self.job)
        else:
            await self.receive(self.job, self.draft.appended)

    async def head(self, upload_id: str) -> None:
        """Say where to go on (section 4.3.2)."""
        self._refuse_state("Upload-Offset", "Upload-Complete", "Upload-Length")
        uploads = self.services.uploads
        job = await self._taken_over(upload_id)
        self.set_status(204)
        if job.state not in FINAL and not uploads.finishing(job):
            self.tell_state(job, uploads.offset(job))
            return
        files = await uploads.complete(job, 0 if job.want == "pause" else _FINISH_S)
        self.tell_state(job, files[0].bytes, complete=True)
        self.set_header("Content-Location", self.location(f"/v1/files/{files[0].id}"))

    async def get(self, upload_id: str) -> None:
        """See ``head``."""
        await self.head(upload_id)

    async def delete(self, upload_id: str) -> None:
        """Give the upload up and free its bytes (section 4.5.2); also the file it has become."""
        self._refuse_state("Upload-Offset", "Upload-Complete")
        manager, caller = self.services.manager, self.caller
        job = await self._found(upload_id)
        if job.state not in FINAL:
            try:
                await manager.command(job.id, "cancel", owner=caller.owner, by=caller.by(_PROTOCOL))
                await manager.ended(job.id, _DELETE_S)
            except SluiceError as error:
                if error.code != "job-finished":
                    raise
                job = await self._found(upload_id)  # it was completed just now
        if job.result is not None:
            if self.services.settings.delete_completed == "refuse":
                raise SluiceError("upload-kept", f"The upload of {job.name} is complete.")
            await self.services.files.delete(job.result.file or "", caller.owner)
        self.set_status(204)

    async def _taken_over(self, upload_id: str) -> Job:
        """The upload, after the request that still writes it was ended (section 4.6)."""
        job = await self._found(upload_id)
        if self.services.uploads.connected(job):
            await self.services.uploads.halt(job)
            job = await self._found(upload_id)
        return job

    async def _found(self, upload_id: str) -> Job:
        """An upload that is under way or has become a file; else raises why it is not there."""
        uploads, owner = self.services.uploads, self.caller.owner
        job = await uploads.get(upload_id, owner, _PROTOCOL)
        if job.state == "failed":
            try:
                await uploads.outcome(job)
            except SluiceError as error:
                if self.draft.is_strict:
                    raise error.with_status(404) from error
                if error.status >= 500:  # after which it would be asked for again
                    raise error.with_status(410) from error
                raise
        if job.state in ("cancelling", "cancelled"):
            code = "expired" if job.reason == "expired" else "upload-unknown"
            raise SluiceError(code, f"The upload {job.id} was given up.")
        if job.result is not None:
            try:
                await self.services.files.get(job.result.file or "", owner)
            except SluiceError as error:
                raise SluiceError("upload-unknown", "Its file was deleted.") from error
        return job

    def _refuse_state(self, *names: str) -> None:
        """Old drafts forbid to tell a state where it is asked for or given up."""
        for name in names:
            if self.draft.is_strict and name in self.request.headers:
                raise SluiceError("invalid-field", f"{name} has no meaning here.", field=name)


def _version(request: HTTPServerRequest) -> int | None:
    """The version that the client speaks, if it is one of ours."""
    version = fields.integer(request.headers.get("Upload-Draft-Interop-Version"))
    return version if version in _DRAFTS else None


def _missing(name: str) -> SluiceError:
    return SluiceError("invalid-field", f"{name} is missing or malformed.", field=name)


def _too_long(length: int) -> SluiceError:
    return SluiceError("length-mismatch", f"The upload ends at {length} bytes; there are more.")
