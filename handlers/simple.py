"""The simple API: one call, plain answers, good for curl and scripts.

``/upload`` takes a form or blocks, ``/export`` and ``/download`` give files back, and
``/{name}/process`` runs a process. Everything that takes time is a job like any other, visible on
the channel and under ``/v1/jobs``. Where ``/v1`` answers 202 or 409, this API says 200 or 400.
docs/simple-api.md has all of it with examples.
"""

from __future__ import annotations

import base64
import re
from collections import OrderedDict
from time import monotonic
from typing import Any

import msgspec

from errors import SluiceError
from handlers.auth import is_prefetch
from handlers.base import BaseHandler
from handlers.fields import preferences
from handlers.send import send_file
from handlers.wire import Body, Form, Part
from jobs import File, Filter, Job
from jobs.files import clean_name, now_ms
from jobs.upload import Plan

_INTEGER = re.compile(r"[0-9]{1,18}")
_MAX_CHUNK_BYTES = 4 << 20
_PIN_S = 600.0
_PINS = 10_000
_TERMINATE_WAIT_S = 5.0


def whole(values: dict[str, str], name: str) -> int | None:
    """A parameter as a non-negative integer, or None if it is not given."""
    text = values.get(name)
    if text is None:
        return None
    if not _INTEGER.fullmatch(text):
        raise SluiceError(
            "invalid-field",
            f"{name} must be a whole number, 0 or more, not {text[:40]!r}.",
            field=name,
        )
    return int(text)


def truth(values: dict[str, str], name: str) -> bool:
    """A parameter as true or false."""
    text = values.get(name, "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise SluiceError("invalid-field", f"{name} must be true or false.", field=name)
    return text in ("true", "1")


class SimpleHandler(BaseHandler):
    """What the endpoints of this API share."""

    def given(self, *known: str) -> dict[str, str]:
        """The query's parameters; a slash at its end is dropped."""
        return self.query(*known, drop_slash=True)

    def named(self, values: dict[str, str]) -> str:
        """The file name that must be given."""
        if "file_name" not in values:
            raise SluiceError("invalid-field", "file_name is missing.", field="file_name")
        return clean_name(values["file_name"])

    async def block_upload(self, name: str) -> Job | None:
        """This caller's unfinished upload by blocks of that name."""
        return await self.services.manager.holder(self.caller.owner, self.live_name(name))

    def live_name(self, name: str) -> str:
        """Under which a caller's upload by blocks is found again."""
        return f"blocks/{self.caller.client}/{name}"

    async def cancel(self, jobs: list[Job]) -> list[str]:
        """Cancel jobs and wait until nothing is left of them; the ids of those that were."""
        manager = self.services.manager
        done = []
        for job in jobs:
            try:
                await manager.command(
                    job.id, "cancel", owner=self.caller.owner, by=self.caller.by("simple")
                )
            except SluiceError as error:
                if error.code != "job-finished":
                    raise
                continue
            done.append(job.id)
        for job_id in done:
            await manager.ended(job_id, _TERMINATE_WAIT_S)
        return done


class UploadHandler(SimpleHandler):
    """A file by a form, or by blocks that can be resumed."""

    STREAMS = True

    async def get(self) -> None:
        """Where to go on with an upload by blocks."""
        if self.has_body:
            raise SluiceError("body-unexpected", "GET takes no body; send the block by POST.")
        values = self.given("file_name", "bytes_read")
        name = self.named(values)
        whole(values, "bytes_read")
        job = await self.block_upload(name)
        if job is not None:
            at = self.services.uploads.offset(job)
            self.reply({"bytes_read": at, "is_complete": False})
            return
        file = await self.services.files.newest(name, self.caller.owner)
        if file is None:
            raise SluiceError("upload-unknown", f"No upload or file is named {name!r}.")
        self.reply({"bytes_read": file.bytes, "is_complete": True})

    async def admit(self) -> None:
        """Refuse what the head of the request already shows to be wrong."""
        await self.services.uploads.check(self.caller.owner, self.body.length)
        self.content_type = self.request.headers.get("Content-Type", "")
        self.is_form = self.content_type.lower().startswith("multipart/form-data")
        known = ("file_name", "bytes_read", "file_size", "is_complete", "then")
        self.values = self.given(*known)
        self.then = self.following(self.values.get("then"))
        if "file_name" in self.values:
            await self._admit_block()
        elif not self.is_form:
            raise SluiceError(
                "invalid-field",
                "Send a multipart form with a field named 'file', or name the file by file_name.",
                field="file_name",
            )

    async def _admit_block(self) -> None:
        self.name = self.named(self.values)
        self.offset = whole(self.values, "bytes_read") or 0
        self.size = whole(self.values, "file_size")
        self.complete = truth(self.values, "is_complete")
        await self.services.uploads.check(self.caller.owner, self.size)
        job = await self.block_upload(self.name)
        stored = self.services.uploads.offset(job) if job is not None else 0
        if job is None and await self._published() is not None:
            return
        if self.offset != stored:
            raise self._mismatch(stored)
        length = job.transfer.length_bytes if job is not None and job.transfer else None
        if self.size is not None and length is not None and self.size != length:
            raise SluiceError("invalid-field", f"file_size was {length} before.", field="file_size")
        end = self.offset + (self.body.length or 0)
        if self.size is not None and not self.is_form and end > self.size:
            raise SluiceError(
                "invalid-field",
                f"The block ends at {end}, behind file_size.",
                field="file_size",
                bytes_read=stored,
            )

    def _mismatch(self, stored: int) -> SluiceError:
        return SluiceError(
            "offset-mismatch",
            f"{stored} bytes of {self.name!r} are stored; the block begins at {self.offset}.",
            field="bytes_read",
            bytes_read=stored,
        )

    async def _published(self) -> File | None:
        """The file that an empty last block asks for, if its upload has ended already.

        An upload of which all bytes are here ends by itself after a crash, and the answer to the
        last block may be lost: then its sender asks again, and gets the same answer.
        """
        if not self.offset or self.body.length != 0:
            return None
        file = await self.services.files.newest(self.name, self.caller.owner)
        if file is None or file.bytes != self.offset or self.size not in (None, file.bytes):
            return None
        return file

    async def post(self) -> None:
        """Take a form, or the next block."""
        if "file_name" in self.values:
            await self._take_block()
        else:
            await self._take_form()

    async def _take_form(self) -> None:
        """All files of a form, or none."""
        uploads = self.services.uploads
        form = Form(self.body, self.content_type)
        part = await self._file_part(form, "file")
        job, _ = await uploads.create(
            clean_name(part.filename, "filename"),
            owner=self.caller.owner,
            client=self.caller.client,
            by=self.caller.by("simple"),
            protocol="form",
            resumable=False,
            expected=form.rest_bytes,
            following=self.then,
        )
        async with uploads.connect(job, self.body) as upload:
            following: Part | None = part
            while following is not None:
                async for piece in following:
                    await uploads.write(upload, piece)
                following = await form.next_part("file")
                if following is not None:
                    await uploads.next_file(upload, clean_name(following.filename, "filename"))
        files = await uploads.complete(job)
        answer: dict[str, Any] = {
            "message": f"{files[0].name} was uploaded.",
            "id": files[0].id,
            "job": job.id,
            "filename": files[0].name,
            "bytes": files[0].bytes,
        }
        if len(files) > 1:
            answer["message"] = f"{len(files)} files were uploaded."
            answer["files"] = [
                {"id": file.id, "filename": file.name, "bytes": file.bytes} for file in files
            ]
        self.reply(answer)

    async def _file_part(self, form: Form, field: str | None) -> Part:
        part = await form.next_part(field)
        if part is None:
            others = ", ".join(repr(name) for name in form.fields[:10]) or "none"
            raise SluiceError(
                "no-file-part", f"The form has no file in a field 'file'; its fields: {others}."
            )
        return part

    async def _take_block(self) -> None:
        """The next block of a file; the last one publishes it."""
        uploads = self.services.uploads
        job = await self._begin() if self.offset == 0 else await self.block_upload(self.name)
        if job is None:  # it has ended, perhaps since it was looked for
            file = await self._published()
            if file is None:
                raise self._mismatch(0)
            self._reply_published(file)
            return
        if self.size is not None:
            job = await uploads.set_length(job, self.size, self.caller.by("simple"))
        if self.body.length == 0 and uploads.finishing(job):
            self._reply_published((await uploads.complete(job))[0])
            return
        async with uploads.connect(job, self.body) as upload:
            before = upload.stored
            block: Body | Part = self.body
            form = Form(self.body, self.content_type) if self.is_form else None
            if form is not None:
                block = await self._file_part(form, None)
            stored = await uploads.append(upload, self.offset, block)
            if form is not None and await form.next_part(None) is not None:
                raise SluiceError(
                    "multipart-invalid", "A block is one file part, not several.", bytes_read=stored
                )
            if not self.complete and stored not in (before, upload.length):
                self.reply({"bytes_read": stored})
                return
            if upload.length is not None and stored < upload.length:
                raise SluiceError(
                    "invalid-field",
                    f"{stored} of {upload.length} bytes are stored: the upload is not complete.",
                    field="is_complete",
                    bytes_read=stored,
                )
        self._reply_published((await uploads.complete(job))[0])

    async def _begin(self) -> Job:
        """The upload that a first block belongs to: a new one, unless one has no bytes yet."""
        caller = self.caller
        job, _ = await self.services.uploads.create(
            self.name,
            owner=caller.owner,
            client=caller.client,
            by=caller.by("simple"),
            protocol="blocks",
            resumable=True,
            length=self.size,
            live_name=self.live_name(self.name),
            plan=Plan(by_length=True),
            following=self.then,
        )
        return job

    def _reply_published(self, file: File) -> None:
        self.reply({"bytes_read": file.bytes, "is_complete": True, "id": file.id, "job": file.job})


class UploadTerminateHandler(SimpleHandler):
    """End uploads that are under way."""

    async def delete(self) -> None:
        """End this caller's running uploads, or the one that is named."""
        values = self.given("id", "file_name")
        uploads = self.services.uploads
        found = await uploads.find(self.caller.owner, self.caller.client)
        if "id" in values:
            found = [job for job in found if job.id == values["id"]]
        elif "file_name" in values:
            found = [job for job in found if job.name == clean_name(values["file_name"])]
        else:
            recent = now_ms() - int(self.services.settings.terminate_recent_s * 1000)
            found = [job for job in found if uploads.connected(job) or job.saved_at >= recent]
        done = await self.cancel(found)
        if not done:
            raise SluiceError("nothing-uploading", "You are not uploading anything currently.")
        self.reply({"message": "The upload was terminated.", "terminated": done})


class UploadCancelHandler(SimpleHandler):
    """Give an upload by blocks up."""

    async def post(self) -> None:
        """Remove the partial file."""
        name = self.named(self.given("file_name"))
        job = await self.block_upload(name)
        if job is None or not await self.cancel([job]):
            raise SluiceError("upload-unknown", f"No unfinished upload is named {name!r}.")
        self.reply({"message": f"The upload of {name} was cancelled.", "cancelled": job.id})


class ExportRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of an export."""

    filename: str


class ExportHandler(SimpleHandler):
    """A stored file as an attachment, as a job."""

    async def post(self) -> None:
        """Stream the file; with ``Prefer: respond-async`` make a job whose result it is."""
        name = self.json(ExportRequest).filename
        file = await self.services.files.find(clean_name(name, "filename"), self.caller.owner)
        downloads, caller = self.services.downloads, self.caller
        by = caller.by("simple")
        if "respond-async" in preferences(self.request.headers.get("Prefer")):
            job = await downloads.ready(file, owner=caller.owner, client=caller.client, by=by)
            self.set_header("Location", self.location(f"/v1/jobs/{job.id}"))
            self.set_header("Preference-Applied", "respond-async")
            self.reply(self.services.manager.row(job), 202)
            return
        job = await downloads.create(
            file, file.bytes, owner=caller.owner, client=caller.client, by=by, protocol="export"
        )
        await send_file(self, file, 0, file.bytes, job=job, attachment=True)


class ExportTerminateHandler(SimpleHandler):
    """End exports that are under way."""

    async def post(self) -> None:
        """End this caller's exports, or the one that is named."""
        values = self.given("id", "file_name")
        found = await self.services.downloads.find(self.caller.owner, self.caller.client)
        found = [job for job in found if job.transfer and job.transfer.protocol == "export"]
        if "id" in values:
            found = [job for job in found if job.id == values["id"]]
        if "file_name" in values:
            found = [job for job in found if job.name == clean_name(values["file_name"])]
        done = await self.cancel(found)
        if not done:
            raise SluiceError("nothing-exporting", "You are not currently exporting any file.")
        self.reply({"message": "The export was terminated.", "terminated": done})


class Pins:
    """Which version of a name a caller began to read; the oldest are forgotten first."""

    def __init__(self) -> None:
        self._pins: OrderedDict[tuple[str, str, str], tuple[float, str]] = OrderedDict()

    def put(self, key: tuple[str, str, str], file_id: str) -> None:
        """Remember a version for ten minutes."""
        self._pins[key] = (monotonic() + _PIN_S, file_id)
        self._pins.move_to_end(key)
        if len(self._pins) > _PINS:
            self._pins.popitem(last=False)

    def get(self, key: tuple[str, str, str]) -> str | None:
        """The version, if it was begun less than ten minutes ago."""
        until, file_id = self._pins.get(key, (0.0, ""))
        return file_id if until > monotonic() else None


_pins = Pins()


class DownloadHandler(SimpleHandler):
    """A stored file in pieces inside JSON."""

    async def get(self) -> None:
        """The piece that begins at ``bytes_read``: text as text, anything else as base64."""
        values = self.given("file_name", "bytes_read", "chunk_bytes", "id")
        start = whole(values, "bytes_read")
        if start is None:
            raise SluiceError("invalid-field", "bytes_read is missing.", field="bytes_read")
        chunk = whole(values, "chunk_bytes")
        if chunk is None:
            chunk = self.services.settings.chunk_bytes
        if not 1 <= chunk <= _MAX_CHUNK_BYTES:
            raise SluiceError(
                "invalid-field", "chunk_bytes must be 1 to 4194304.", field="chunk_bytes"
            )
        file = await self._version(values, start)
        if start > file.bytes:
            raise SluiceError(
                "invalid-field",
                f"bytes_read is {start}, behind the end at {file.bytes}.",
                field="bytes_read",
            )
        reader = await self.services.files.reader(file)
        try:
            data = await _read(reader, start, max(chunk, 4))
        finally:
            await reader.close()
        text, used = as_text(data, chunk, at_end=start + len(data) >= file.bytes)
        self.services.downloads.sent_bytes += used
        end = start + used
        self.set_header("Cache-Control", "no-store")
        self.reply(
            {
                "file_content": text
                if text is not None
                else base64.b64encode(data[:used]).decode("ascii"),
                "bytes_read": end,
                "is_complete": end >= file.bytes,
                "encoding": "utf-8" if text is not None else "base64",
                "id": file.id,
            }
        )

    async def _version(self, values: dict[str, str], start: int) -> Any:
        """The version to read: by id exactly, else the one that this caller began."""
        files, owner = self.services.files, self.caller.owner
        if "id" in values:
            file = await files.get(values["id"], owner)
            if "file_name" in values and file.name != self.named(values):
                raise SluiceError("file-unknown", "The id is that of a file with another name.")
            return file
        name = self.named(values)
        key = (owner, self.caller.client, name)
        pinned = _pins.get(key) if start > 0 else None
        if pinned is not None:
            return await files.get(pinned, owner)
        file = await files.find(name, owner)
        _pins.put(key, file.id)
        return file


async def _read(reader: Any, start: int, n: int) -> bytes:
    parts = []
    while n > 0 and (part := await reader.read(start, n)):
        parts.append(part)
        start += len(part)
        n -= len(part)
    return b"".join(parts)


def as_text(data: bytes, chunk: int, *, at_end: bool) -> tuple[str | None, int]:
    """``data`` up to ``chunk`` bytes as text, cut at a character; how many bytes that takes.

    None for what is not UTF-8. At least one whole character is taken, even if it is longer than
    ``chunk``.
    """
    cut = data[:chunk]
    used = _whole_characters(cut)
    if used == 0 and cut:
        used = next((n for n in range(1, 5) if _whole_characters(data[:n]) == n), 0)
    # A character that the cut has broken is fine; one that the file's end breaks is not UTF-8.
    broken = used == 0 if cut else False
    if used < len(cut) and at_end and len(data) <= chunk:
        broken = True
    if broken or len(cut) - used > 3:
        return None, len(cut)
    return data[:used].decode(), used


def _whole_characters(data: bytes) -> int:
    """How many bytes of the beginning are whole UTF-8 characters; 0 if it is not UTF-8."""
    try:
        data.decode()
        return len(data)
    except UnicodeDecodeError as error:
        tail = len(data) - error.start
        return error.start if error.reason == "unexpected end of data" and tail <= 3 else 0


class ProcessHandler(SimpleHandler):
    """Start a process under a name of the caller's."""

    CHANGES = True

    async def get(self, name: str) -> None:
        """Start it, or return the live one of that name."""
        await self._start(name)

    async def post(self, name: str) -> None:
        """The same; the parameters may come as a JSON object, too."""
        await self._start(name)

    async def _start(self, name: str) -> None:
        manager, owner = self.services.manager, self.caller.owner
        values = self.given()
        typed = self.json(dict[str, Any]) if self.has_body else {}
        kind = values.pop("kind", typed.pop("kind", None))
        kind = None if kind is None else str(kind)
        live = await self._live(name)
        if live is None and is_prefetch(self.request):
            raise SluiceError("prefetch")
        if live is not None and (kind is None or kind == live.kind):
            self.reply(manager.row(live))
            return
        if live is not None:
            raise _in_use(name, live)
        params = self._params(kind, values, typed)
        job, created = await manager.start(
            self.services.settings.default_kind if kind is None else kind,
            params,
            owner=owner,
            client=self.caller.client,
            by=self.caller.by("simple"),
            name=name,
            live_name=True,
        )
        if not created and kind is not None and job.kind != kind:
            raise _in_use(name, job)
        self.reply(await manager.full_row(job))

    async def _live(self, name: str) -> Job | None:
        """The owner's live process of that name; a transfer's name is no process's."""
        manager, owner = self.services.manager, self.caller.owner
        if (holder := await manager.holder(owner, name)) is not None:
            return holder
        found = await manager.find(Filter(owner=owner, name=name, live=True), None, 100)
        return next((job for job in found.items if job.transfer is None), None)

    def _params(
        self, kind: str | None, values: dict[str, str], typed: dict[str, Any]
    ) -> dict[str, Any]:
        kinds, settings = self.services.manager.kinds, self.services.settings
        if kind is None and not values and not typed:
            return kinds.parse(settings.default_kind, settings.default_params)
        name = settings.default_kind if kind is None else kind
        lists = kinds.lists(name)
        split: dict[str, Any] = {
            key: value.split(",") if key in lists else value for key, value in values.items()
        }
        return kinds.parse(name, {**split, **typed}, text=True)


class ProcessCommandHandler(SimpleHandler):
    """Pause, resume or cancel a process by its name or its id."""

    async def post(self, name: str, verb: str) -> None:
        """Do it; what the state does not allow is a 400 here."""
        manager, owner = self.services.manager, self.caller.owner
        job = await self._find(name)
        try:
            job, _ = await manager.command(job.id, verb, owner=owner, by=self.caller.by("simple"))
        except SluiceError as error:
            if error.status != 409:
                raise
            raise error.with_status(400) from error
        row = manager.row(job)
        if verb == "resume":
            row["work_types"] = manager.kinds.names()
        self.reply(row)

    async def _find(self, name: str) -> Job:
        """The newest process of that name, or the job of that id."""
        manager, owner = self.services.manager, self.caller.owner
        if (holder := await manager.holder(owner, name)) is not None:
            return holder
        found = await manager.find(Filter(owner=owner, name=name), None, 20)
        for job in found.items:
            if job.transfer is None:
                return job
        return await manager.get(name, owner)


def _in_use(name: str, job: Job) -> SluiceError:
    return SluiceError(
        "name-in-use", f"{name!r} is a live job of kind {job.kind!r}.", field="kind", job=job.id
    )
