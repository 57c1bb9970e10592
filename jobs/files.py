"""Stored files: found by id or by name, read, deleted, expired.

A file is an immutable version of a name. Its blob is published before its row is committed and
discarded after its row is gone, so that a row always has its bytes. An archive's blob is a
manifest, and its bytes are made while it is read (zips.py).
"""

from __future__ import annotations

import asyncio
import logging
import mimetypes
import os
import time
import unicodedata
from collections.abc import Mapping, Sequence
from hashlib import sha256
from zlib import crc32

import msgspec

from errors import SluiceError
from jobs.kinds import Check
from jobs.tables import TABLE, Table
from jobs.zips import ZIP, Zips
from storage import Blobs, File, Page, Reader, State

log = logging.getLogger("sluice.files")

DIGESTS = ("sha-256", "crc-32")  # that are computed where any is wanted: one pass, and one answer

_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 1024
_TINY_BYTES = 256 << 10  # takes less time here than to tell another process
_SMALL_BYTES = 16 << 20  # is hashed while its first reader waits: some hundredths of a second
_ASKED_BYTES = 256 << 20  # so is this for who asks for a digest
_MAX_HASHING = 4
_PAGE, _PAGES = 500, 10  # of files that are looked through for tables


def now_ms() -> int:
    """The time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def uuid7() -> str:
    """A new id: a version 7 UUID (RFC 9562 section 5.7), so that ids sort by time."""
    value = (now_ms() << 80) | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def clean_name(raw: str, field: str = "file_name") -> str:
    """A file name as it is stored: a label, never a path (but see clean_path).

    Only the part behind the last slash or backslash, without control characters, in NFC. Raises
    invalid-field for what is then empty, ``.``, ``..`` or longer than 255 bytes.
    """
    base = raw.replace("\\", "/").rpartition("/")[2]
    base = "".join(c for c in base if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp"))
    name = unicodedata.normalize("NFC", base).strip()
    if name in ("", ".", ".."):
        raise SluiceError("invalid-field", f"{field}: {raw[:80]!r} names no file.", field=field)
    if len(name.encode()) > _MAX_NAME_BYTES:
        raise SluiceError(
            "invalid-field", f"{field}: the name is longer than 255 bytes.", field=field
        )
    return name


def clean_path(folders: str, name: str) -> str:
    """The name, below its folders: what a sender of whole folders stores a file as.

    Each part is cleaned as a name is, and none leads up; the whole has at most 1,024 bytes. Raises
    invalid-field as ``clean_name`` does.
    """
    parts = [clean_name(part) for part in folders.split("/") if part.strip() not in ("", ".")]
    path = "/".join([*parts, clean_name(name)])
    if len(path.encode()) > _MAX_PATH_BYTES:
        raise SluiceError("invalid-field", "The path is longer than 1,024 bytes.", field="path")
    return path


def media_type_of(name: str) -> str:
    """The media type that the name suggests."""
    return mimetypes.guess_type(name, strict=True)[0] or "application/octet-stream"


class Files:
    """The stored files of all owners."""

    def __init__(self, state: State, blobs: Blobs) -> None:
        self._state = state
        self._blobs = blobs
        self._zips = Zips(blobs)
        self._hashing: dict[str, asyncio.Task[File]] = {}

    async def get(self, file_id: str, owner: str) -> File:
        """A file by its id. Raises file-unknown."""
        file = await self._state.file(file_id, owner)
        if file is None:
            raise SluiceError("file-unknown", f"There is no file with the id {file_id[:64]}.")
        return file

    async def newest(self, name: str, owner: str) -> File | None:
        """The newest version of a name."""
        return await self._state.newest(owner, name)

    async def find(self, name: str, owner: str) -> File:
        """The newest version of a name, or the file of that id. Raises file-unknown."""
        file = await self._state.newest(owner, name) or await self._state.file(name, owner)
        if file is None:
            raise SluiceError("file-unknown", f"There is no file named {name[:255]!r}.")
        return file

    async def list(
        self,
        owner: str,
        name: str | None,
        after: int | None,
        limit: int,
        *,
        newest: bool = False,
        text: str | None = None,
    ) -> Page[File]:
        """Files, newest first; see State.find_files."""
        return await self._state.find_files(owner, name, after, limit, newest=newest, text=text)

    async def reader(self, file: File) -> Reader:
        """Open a file; it is readable to its end even if it is deleted meanwhile."""
        if file.layout == ZIP:
            return await self._zips.reader(file)
        return await self._blobs.reader(file.id, file.name)

    async def checks(self, file: File, skip: int, limit: int) -> Sequence[Check]:
        """The members of an archive behind the first few, with where they lie in its bytes."""
        if file.layout != ZIP:
            return []
        return await self._zips.checks(file, skip, limit)

    async def find_table(self, name: str, owner: str) -> File:
        """The newest version of a table, or the one of that id. Raises table-unknown."""
        file = await self._state.newest(owner, name) or await self._state.file(name, owner)
        if file is None or file.layout != TABLE:
            raise SluiceError("table-unknown", f"There is no table named {name[:255]!r}.")
        return file

    async def tables(self, owner: str, after: int | None, limit: int) -> Page[File]:
        """The newest versions of all tables, newest first.

        One call looks at a bounded number of files: a page may then have fewer than ``limit``,
        even none, though ``next`` promises more.
        """
        found: list[File] = []
        for _ in range(_PAGES):
            page = await self._state.find_files(owner, None, after, _PAGE)
            for file in page.items:
                after = file.h
                if file.layout != TABLE:
                    continue
                newest = await self._state.newest(owner, file.name)
                if newest is not None and newest.id == file.id:
                    found.append(file)
                    if len(found) == limit:
                        return Page(found, after)
            if page.next is None:
                return Page(found, None)
        return Page(found, after)

    async def table(self, file: File) -> Table:
        """Open a table for its rows, as ``reader``. Raises table-unknown."""
        if file.layout != TABLE:
            raise SluiceError("table-unknown", f"{file.name} is a file, but no table.")
        reader = await self._blobs.reader(file.id, file.name)
        try:
            return Table(reader)
        except BaseException:
            await reader.close()
            raise

    async def digested(self, file: File, *, asked: bool) -> File:
        """The file with its digests, if they can be told soon.

        What has none so far is hashed, once, if it is small or if somebody asks for it. The answer
        waits for that up to 256 MiB; of a larger file the next one will have the digests.
        """
        if "sha-256" in file.digest or file.layout == ZIP:
            return file
        if file.bytes > _SMALL_BYTES and not asked:
            return file
        task = self._hashing.get(file.id)
        if task is None:
            if len(self._hashing) >= _MAX_HASHING:
                return file
            task = asyncio.get_running_loop().create_task(self._hash(file))
            self._hashing[file.id] = task
            task.add_done_callback(lambda _: self._hashing.pop(file.id))
        return await asyncio.shield(task) if file.bytes <= _ASKED_BYTES else file

    async def _hash(self, file: File) -> File:
        """Compute the digests and keep them; without them if that fails."""
        try:
            if file.bytes <= _TINY_BYTES:
                found = await self._hash_here(file)
            else:
                found = await self._hash_there(file)
            await self.keep_digests({file.id: found})
        except SluiceError as error:
            log.info("file %s could not be hashed: %s", file.id, error)
            return file
        return msgspec.structs.replace(file, digest=found | file.digest)

    async def _hash_here(self, file: File) -> dict[str, str]:
        reader = await self._blobs.reader(file.id, file.name)
        try:
            data = await reader.read(0, file.bytes)
        finally:
            await reader.close()
        if len(data) < file.bytes:
            raise SluiceError("storage-failed", "The file is shorter than it was.")
        return {"sha-256": sha256(data).hexdigest(), "crc-32": f"{crc32(data):08x}"}

    async def _hash_there(self, file: File) -> dict[str, str]:
        """By the process that hashes."""
        digester = await self._blobs.digester(file.id, DIGESTS, name=file.name)
        try:
            await digester.reach(file.bytes)
            return await digester.result()
        finally:
            digester.close()

    async def keep_digests(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """Keep digests (hex, by algorithm) with files, by their ids; unknown ids are fine."""
        await self._state.add_digests(digests)

    async def delete(self, file_id: str, owner: str) -> None:
        """Remove a file. Raises file-unknown."""
        await self.get(file_id, owner)
        await self._state.delete_file(file_id)
        await self._blobs.discard(file_id)

    async def expire(self) -> int:
        """Remove some of the files whose time has passed; how many."""
        files = await self._state.expired_files(now_ms(), 100)
        for file in files:
            await self._state.delete_file(file.id)
            await self._blobs.discard(file.id)
        return len(files)

    async def stored(self, owner: str | None) -> tuple[int, int]:
        """How many files and bytes are stored."""
        return await self._state.stored(owner)

    async def free_bytes(self) -> int:
        """Room that is left for files."""
        return await self._blobs.free_bytes()

    async def disk_bytes(self) -> int:
        """The size of the disk that they are on."""
        return await self._blobs.disk_bytes()
