"""tus 1.0.0 (https://tus.io/protocols/resumable-upload): headers in, one call of the domain, out.

POST creates an upload, PATCH appends to it, HEAD tells where to go on. An upload's id is that of
its job, so it can be watched and paused like any other. Extensions: see ``_EXTENSIONS``;
checksum-trailer is none of them, because Tornado takes no trailers.

- Whatever the head of a request shows to be wrong is refused in ``admit``: no byte of the body is
  asked for.
- HEAD, PATCH and DELETE take the upload over: the request that still writes it is ended, and what
  it delivered counts. Only a PATCH of bytes that are stored already is too late for that: browsers
  repeat requests by themselves, and such an echo must not end what its client does now.
  GET and OPTIONS disturb nobody.
- An upload whose bytes are all here may still fail. So no answer says that it is complete before
  it is, and one that has failed has no offset any more: its client starts anew.
- A status is chosen by what clients do with it. The usual ones try again after 409, 423 and 5xx,
  from the offset that HEAD tells then, and give the upload up after any other 4xx. Where HEAD
  fails, only 423 is tried again: anything else makes them start anew, from zero.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from collections.abc import Mapping
from email.utils import formatdate
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from tornado.httputil import HTTPHeaders

from errors import SluiceError
from handlers import fields
from handlers.auth import same_origin
from handlers.base import BaseHandler
from handlers.growing import GrowingHandler
from handlers.send import send_stored
from jobs import File, Job
from jobs.files import clean_path, uuid7
from jobs.states import FINAL
from jobs.upload import Plan, plan_of

_VERSION = "1.0.0"
_EXTENSIONS = (
    "creation,creation-with-upload,creation-defer-length,expiration,checksum,termination,"
    "concatenation,concatenation-unfinished"
)
_PROTOCOL = "tus"
_BODY = "application/offset+octet-stream"
_MOST_BYTES = (1 << 63) - 1
_FINISH_S, _JOIN_S = 5.0, 30.0  # that HEAD and a concatenation wait for the end of an upload
_TERMINATE_S = 5.0

_NUMBER = re.compile(r"[0-9]{1,19}")
_KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]+")  # ASCII without space and comma
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][\w!#$&^.+-]{0,126}/[A-Za-z0-9][\w!#$&^.+-]{0,126}", re.ASCII)
_ADDRESS = re.compile(r"/tus/([A-Za-z0-9-]{1,64})")

# A name in Upload-Checksum, the domain's name for it, and how many bytes it has.
_CHECKSUMS = {
    "sha1": ("sha", 20),
    "sha256": ("sha-256", 32),
    "md5": ("md5", 16),
    "crc32": ("crc-32", 4),
}

# Where tus, or what its clients do with a status, wants another one than the catalogue has.
_STATUS = {
    "offset-mismatch": 409,
    "upload-finishing": 423,
    "upload-busy": 423,
    "upload-stalled": 503,
    "upload-terminated": 410,
    "digest-mismatch": 410,
}
_TRIED_AGAIN = (409, 423, 460)


class Metadata(NamedTuple):
    """Upload-Metadata: as HEAD returns it, and its values by key."""

    raw: str
    values: dict[str, bytes]

    @property
    def name(self) -> str | None:
        """The file's name, if a usable one is given, below the folders of a ``relativePath``."""
        folders = _text(self.values.get("relativePath", b"")).rpartition("/")[0]
        for above in (folders, ""):  # a path that leads elsewhere is none
            for key in ("filename", "name"):
                try:
                    return clean_path(above, _text(self.values.get(key, b"")))
                except SluiceError:
                    continue
        return None

    @property
    def media_type(self) -> str | None:
        """The file's media type, if one is given that can be one."""
        given = (_text(self.values.get(key, b"")) for key in ("filetype", "type"))
        return next((text.lower() for text in given if _MEDIA_TYPE.fullmatch(text)), None)


class TusHandler(BaseHandler):
    """What both addresses share: the version, the extensions, and how an upload is told."""

    STREAMS = True
    OVERRIDES = True

    checksums: dict[str, str]
    expected: dict[str, str]
    wants_digest: bool

    def set_default_headers(self) -> None:
        """Tornado's hook: every answer names the version (tus "Tus-Resumable")."""
        super().set_default_headers()
        self.set_header("Tus-Resumable", _VERSION)
        self.clear_header("Content-Type")  # most answers have no content

    def _check(self) -> None:
        super()._check()
        version = self.request.headers.get("Tus-Resumable", _VERSION)
        if version != _VERSION and self.request.method != "OPTIONS":
            raise SluiceError("tus-version", f"Only tus {_VERSION} is spoken, not {version[:20]}.")

    async def options(self, *args: str, **kwargs: str) -> None:
        """Say what is spoken here (tus "OPTIONS")."""
        await super().options(*args, **kwargs)
        self.set_header("Tus-Version", _VERSION)
        self.set_header("Tus-Extension", _EXTENSIONS)
        self.set_header("Tus-Max-Size", str(self.services.uploads.limits.max_bytes))
        self.set_header("Tus-Checksum-Algorithm", ",".join(_CHECKSUMS))

    def _problem(self, error: SluiceError) -> bytes:
        """The answer to an error, with the status and the headers that tus gives it."""
        if error.status == error.entry.status:  # else it was chosen where it was raised
            error = error.with_status(_STATUS.get(error.code, error.status))
        if self.request.method == "HEAD" and error.status >= 500:
            error = error.with_status(423)
        body = super()._problem(error)
        if "bytes_read" in error.extra:
            self.set_header("Upload-Offset", str(error.extra["bytes_read"]))
        if error.code == "too-large":
            self.set_header("Tus-Max-Size", str(self.services.uploads.limits.max_bytes))
        if error.code == "tus-version":
            self.set_header("Tus-Version", _VERSION)
        return body

    async def upload(self, upload_id: str) -> Job:
        """An upload of this caller that is under way or complete; else raises why it is not.

        upload-unknown also for one that was terminated, and for one whose file was deleted;
        upload-gone when it expired; the error of one that failed.
        """
        owner = self.caller.owner
        job = await self.services.uploads.get(upload_id, owner, _PROTOCOL)
        unknown = SluiceError("upload-unknown", f"No upload has the id {upload_id[:64]!r}.")
        if job.want == "cancel" and job.reason != "expired":
            raise unknown
        if job.state == "succeeded" and job.result is not None and job.result.file is not None:
            try:
                await self.services.files.get(job.result.file, owner)
            except SluiceError as error:
                raise unknown from error
        elif job.state in FINAL and job.state != "succeeded":
            await self._raise_failure(job)
        return job

    async def _raise_failure(self, job: Job) -> None:
        """Raise why an upload has failed, with a status after which nobody tries it again."""
        try:
            await self.services.uploads.outcome(job)
        except SluiceError as error:
            status = _STATUS.get(error.code, error.status)
            again = status in _TRIED_AGAIN or status >= 500
            raise error.with_status(410 if again else status) from error

    def read_checks(self) -> None:
        """What the request says of its own bytes, and of the whole. Raises invalid-field."""
        headers = self.request.headers
        self.checksums = checksums(headers.get("Upload-Checksum"))
        self.expected = fields.digests(headers.get("Repr-Digest"))
        self.wants_digest = fields.wants_digest(headers.get("Want-Repr-Digest"))

    async def take(self, job: Job, offset: int) -> Job:
        """Append the body at ``offset``; the upload after it."""
        uploads = self.services.uploads
        if self.body.length != 0 or self.checksums:
            async with uploads.connect(job, self.body) as upload:
                await uploads.append(upload, offset, self.body, checksums=self.checksums)
        return await self.upload(job.id)

    async def settle(self, job: Job, wait_s: float | None = None) -> Job:
        """If all bytes are here, see the upload through to its end; the upload after it.

        Raises what ``Uploads.complete`` does. A part of a later whole ends with that.
        """
        uploads, plan = self.services.uploads, plan_of(job)
        waits = plan.partial and plan.complete
        if not waits and (job.state in FINAL or await uploads.arrived(job)):
            self._tell_digest(await uploads.complete(job, wait_s))
        return await self.upload(job.id)

    def _tell_digest(self, files: list[File]) -> None:
        digest = fields.repr_digest(files[0].digest) if files else ""
        if digest:
            self.set_header("Repr-Digest", digest)

    def tell_expiry(self, job: Job) -> None:
        """Say when an unfinished upload is dropped (tus "Expiration")."""
        expires_at = self.services.uploads.expires_at(job)
        if expires_at is not None:
            self.set_header("Upload-Expires", formatdate(expires_at / 1000, usegmt=True))

    def tell_offset(self, job: Job) -> None:
        """Say where to go on; one that is made of parts has no offset before it is complete."""
        if not plan_of(job).parts or job.state == "succeeded":
            self.set_header("Upload-Offset", str(self.services.uploads.offset(job)))


class CreationHandler(TusHandler):
    """``/tus/``: new uploads."""

    async def admit(self) -> None:
        """Refuse what can't become an upload (tus "Creation", "Concatenation")."""
        if self.request.method != "POST":
            return
        headers, uploads = self.request.headers, self.services.uploads
        self.metadata = metadata(headers.get("Upload-Metadata", ""))
        self.read_checks()
        self.takes_body = self.body.length != 0 and _body_type(headers) == _BODY
        self.concat = headers.get("Upload-Concat", "")
        kind, _, addresses = self.concat.partition(";")
        if kind != "final" and self.concat not in ("", "partial"):
            raise _wrong("Upload-Concat", "must be 'partial', or 'final;' and addresses.")
        self.then = self.following(self.metadata.values.get("then"))
        if self.then is not None and self.concat == "partial":
            raise _wrong("Upload-Metadata", "has a 'then': it belongs to the whole, not to a part.")
        self.parts = await self._parts(addresses) if kind == "final" else []
        self.length = _sum(self.parts) if self.parts else self._length()
        self.earlier = await self._joined()
        if not self.parts:
            await uploads.check(self.caller.owner, self.length)
        if self.takes_body:
            limit = uploads.limits.max_bytes if self.length is None else self.length
            _check_fits(0, self.body.length, limit)

    def _length(self) -> int | None:
        """The length of the upload; None if it is told later (tus "Upload-Defer-Length")."""
        headers = self.request.headers
        length, defer = number(headers, "Upload-Length"), headers.get("Upload-Defer-Length")
        if defer not in (None, "1"):
            raise _wrong("Upload-Defer-Length", "can only be 1.")
        if (length is None) == (defer is None):
            raise _wrong("Upload-Length", "or Upload-Defer-Length: 1 must be given, and not both.")
        return length

    async def _parts(self, addresses: str) -> list[Job]:
        """The partial uploads that shall be joined, in order (tus "Upload-Concat")."""
        headers = self.request.headers
        if "Upload-Length" in headers or "Upload-Defer-Length" in headers:
            raise _wrong("Upload-Length", "is the sum of the parts and can't be given.")
        if self.takes_body:
            raise _wrong("Upload-Concat", "makes an upload of others: it takes no bytes itself.")
        parts = [await self._part(address) for address in addresses.split()]
        if not parts:
            raise _wrong("Upload-Concat", "names no parts.")
        return parts

    async def _part(self, address: str) -> Job:
        """The partial upload at an address, absolute or not. Raises upload-unknown."""
        try:
            at = urlsplit(address)
            ours = at.scheme in ("", "http", "https") and not (at.query or at.fragment)
            ours = (
                ours
                and ".." not in at.path
                and (not at.netloc or same_origin(self.request, address))
            )
            path = urljoin(self.prefix + self.request.path, at.path)
            match = _ADDRESS.fullmatch(path.removeprefix(self.prefix)) if ours else None
        except ValueError:
            match = None
        if match is None:
            raise _wrong("Upload-Concat", f"{address[:200]!r} is not the address of an upload.")
        job = await self.services.uploads.get(match[1], self.caller.owner, _PROTOCOL)
        if not plan_of(job).partial:
            raise _wrong("Upload-Concat", f"{job.id} is not a partial upload.")
        if job.want == "cancel" or job.state == "failed":
            raise _wrong("Upload-Concat", f"{job.id} has ended.")
        return job

    async def _joined(self) -> Job | None:
        """The upload that is made of these parts already, when the request is repeated."""
        whole = await self.services.uploads.whole(self.parts) if self.parts else None
        if whole is None and any(part.state == "succeeded" for part in self.parts):
            raise _wrong("Upload-Concat", "names a part of another upload.")
        return whole

    async def post(self) -> None:
        """Create an upload, with its first bytes if the request brings them."""
        uploads = self.services.uploads
        job = self.earlier or await self._create()
        if self.takes_body:
            try:
                job = await self.take(job, 0)
            except SluiceError as error:
                if error.code != "upload-taken-over":  # else somebody knows the address
                    await uploads.fail(job, error)
                raise
        try:
            job = await self.settle(job, _JOIN_S if self.parts else None)
        except SluiceError as error:
            if error.code != "upload-finishing":
                raise
        self.set_status(201)
        self.set_header("Location", self._address(job))
        self.tell_expiry(job)
        if self.body.length != 0 or job.state == "succeeded":
            self.tell_offset(job)

    def _address(self, job: Job) -> str:
        """Where the upload is, as a reference from where the request was sent (tus "Creation").

        Its last part alone is right whatever host and path a proxy shows; aiotus takes no other.
        """
        if self.request.path.endswith("/"):
            return job.id
        return self.location(f"/tus/{job.id}")

    async def _create(self) -> Job:
        caller, partial = self.caller, self.concat == "partial"
        ids = [part.id for part in self.parts]
        same = hashlib.sha256(",".join(ids).encode()).hexdigest()
        name = self.metadata.name or f"{'part' if partial else 'upload'}-{uuid7()[-6:]}"
        params = {"metadata": self.metadata.raw, "concat": self.concat}
        job, _ = await self.services.uploads.create(
            name,
            owner=caller.owner,
            client=caller.client,
            by=caller.by(_PROTOCOL),
            protocol=_PROTOCOL,
            resumable=True,
            length=self.length,
            live_name=f"concat/{same}" if ids else None,
            params={key: value for key, value in params.items() if value},
            plan=Plan(
                by_length=True,
                partial=partial,
                parts=ids,
                digest=self.wants_digest,
                expect=self.expected,
                media_type=self.metadata.media_type,
            ),
            following=self.then,
        )
        return job


class UploadHandler(GrowingHandler, TusHandler):
    """``/tus/{id}``: one upload."""

    async def admit(self) -> None:
        """Refuse bytes that can't be appended (tus "PATCH"); DELETE brings none."""
        if self.request.method != "PATCH":
            return
        headers, uploads = self.request.headers, self.services.uploads
        if _body_type(headers) != _BODY:
            raise SluiceError("media-type-wrong", f"Send the bytes as Content-Type: {_BODY}.")
        self.offset = number(headers, "Upload-Offset")
        if self.offset is None:
            raise _wrong("Upload-Offset", "is missing.")
        length = number(headers, "Upload-Length")
        self.read_checks()
        job = await self.upload(self.path_args[0])
        if plan_of(job).parts:
            raise SluiceError("upload-joined", f"{job.id} is made of other uploads.")
        if self.offset >= uploads.offset(job):  # else it is late, and may disturb nobody
            job = await uploads.halt(job)
        stored = uploads.offset(job)
        if self.offset != stored:
            raise SluiceError(
                "offset-mismatch",
                f"{stored} bytes are stored; the request goes on at {self.offset}.",
                field="Upload-Offset",
                bytes_read=stored,
            )
        if length is not None:
            job = await uploads.set_length(job, length, self.caller.by(_PROTOCOL))
        self.length = job.transfer.length_bytes if job.transfer is not None else None
        limit = uploads.limits.max_bytes if self.length is None else self.length
        _check_fits(stored, self.body.length, limit)
        if job.state not in FINAL and (self.expected or self.wants_digest):
            job = await uploads.expect(job, self.expected, wanted=self.wants_digest)
        self.job = job

    async def patch(self, upload_id: str) -> None:
        """Append the body; the last byte completes the upload. Repeated, it is answered alike."""
        assert self.offset is not None
        job, repeated = self.job, self.offset == self.length
        if repeated:
            async for _ in self.body:  # chunked, so that its length was not known before
                raise _too_large(self.offset)
        else:
            job = await self.take(job, self.offset)
        job = await self.settle(job, _patience_s(job) if repeated else None)
        self.set_status(204)
        self.tell_offset(job)
        self.tell_expiry(job)

    async def head(self, upload_id: str) -> None:
        """Say where to go on, after the request that writes the upload was ended (tus "HEAD")."""
        job = await self.upload(upload_id)
        if job.state not in FINAL:
            job = await self.services.uploads.halt(job)
        try:
            job = await self.settle(job, _patience_s(job))
        except SluiceError as error:
            # What is made of parts is told to be unfinished by having no offset.
            if error.code != "upload-finishing" or not plan_of(job).parts:
                raise
        self.set_header("Cache-Control", "no-store")
        self.tell_offset(job)
        self.tell_expiry(job)
        length = await self._length(job)
        if length is not None:
            self.set_header("Upload-Length", str(length))
        elif not plan_of(job).parts:
            self.set_header("Upload-Defer-Length", "1")
        for header, param in (("Upload-Metadata", "metadata"), ("Upload-Concat", "concat")):
            if param in job.params:
                self.set_header(header, job.params[param])

    async def _length(self, job: Job) -> int | None:
        """How long the upload is or will be, if that is known by now."""
        uploads = self.services.uploads
        if job.state == "succeeded":
            return uploads.offset(job)
        parts = plan_of(job).parts
        owner = self.caller.owner
        return _sum([await uploads.get(part, owner, _PROTOCOL) for part in parts] or [job])

    async def get(self, upload_id: str) -> None:
        """The file that the upload has become, or what there is of it; ranges of both.

        With ``follow=1`` what is still to come as well (see handlers/growing.py).
        """
        follow = self.flag(self.query(), "follow")
        file_id = await self.send_growing(await self.upload(upload_id), None, follow)
        if file_id is not None:
            await send_stored(self, await self.services.files.get(file_id, self.caller.owner))

    async def delete(self, upload_id: str) -> None:
        """Terminate the upload and free its bytes; remove the file of a complete one."""
        manager, caller = self.services.manager, self.caller
        job = await self.upload(upload_id)
        if job.state not in FINAL:
            try:
                await manager.command(job.id, "cancel", owner=caller.owner, by=caller.by(_PROTOCOL))
            except SluiceError as error:
                if error.code != "job-finished":
                    raise
                job = await self.upload(upload_id)  # it was completed just now
            else:
                await manager.ended(job.id, _TERMINATE_S)
        if job.state == "succeeded":
            await self._delete_completed(job)
        self.set_status(204)

    async def _delete_completed(self, job: Job) -> None:
        caller = self.caller
        if self.services.settings.delete_completed == "refuse":
            raise SluiceError("upload-kept", f"The upload of {job.name} is complete.", job=job.id)
        if job.result is not None and job.result.file is not None:
            await self.services.files.delete(job.result.file, caller.owner)
        else:  # a part that was joined: nothing is left but the memory of it
            await self.services.manager.delete(job.id, owner=caller.owner, by=caller.by(_PROTOCOL))


def _patience_s(job: Job) -> float:
    """How long to wait for the end of an upload whose bytes are all here."""
    return 0 if job.want == "pause" else _FINISH_S


def _sum(jobs: list[Job]) -> int | None:
    """How long uploads are together; None if one's length is not known."""
    lengths = [job.transfer.length_bytes for job in jobs if job.transfer is not None]
    known = [length for length in lengths if length is not None]
    return sum(known) if len(known) == len(lengths) else None


def number(headers: HTTPHeaders, name: str) -> int | None:
    """A header as a number of bytes, None if it is missing. Raises invalid-field."""
    text = headers.get(name)
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or int(text) > _MOST_BYTES:
        raise _wrong(name, f"must be a number of bytes, not {text[:40]!r}.")
    return int(text)


def metadata(header: str) -> Metadata:
    """Upload-Metadata (tus "Upload-Metadata"): keys, each with a value in base64 or none.

    Raises invalid-field for what is no base64, and for a key that is empty or given twice.
    """
    values: dict[str, bytes] = {}
    pairs = []
    for pair in header.split(",") if header else ():
        key, _, value = pair.strip().partition(" ")
        if not _KEY.fullmatch(key) or key in values:
            raise _wrong("Upload-Metadata", f"the key {key[:40]!r} is empty, odd or given twice.")
        values[key] = _base64(value, "Upload-Metadata")
        pairs.append(f"{key} {value}" if value else key)
    return Metadata(",".join(pairs), values)


def checksums(header: str | None) -> dict[str, str]:
    """Upload-Checksum (tus "Checksum") as hex by the domain's name. Raises invalid-field."""
    if header is None:
        return {}
    name, _, value = header.partition(" ")
    if name not in _CHECKSUMS:
        known = ", ".join(_CHECKSUMS)
        raise _wrong("Upload-Checksum", f"{name[:40]!r} is not known, only {known}.")
    algorithm, size_bytes = _CHECKSUMS[name]
    digest = _base64(value, "Upload-Checksum")
    if len(digest) != size_bytes:
        raise _wrong("Upload-Checksum", f"a {name} has {size_bytes} bytes, not {len(digest)}.")
    return {algorithm: digest.hex()}


def _base64(text: str, field: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise _wrong(field, f"{text[:40]!r} is not base64.") from None


def _text(value: bytes) -> str:
    """A value as text; one that is not UTF-8 is Latin-1, where every byte is a character."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _body_type(headers: Mapping[str, str]) -> str:
    return headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _check_fits(offset: int, n: int | None, limit: int) -> None:
    """Raise too-large for ``n`` more bytes (None: unknown) that end behind ``limit``."""
    if n is not None and offset + n > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> SluiceError:
    return SluiceError("too-large", f"The upload would be longer than {limit:,} bytes.")


def _wrong(header: str, why: str) -> SluiceError:
    return SluiceError("invalid-field", f"{header} {why}", field=header)
