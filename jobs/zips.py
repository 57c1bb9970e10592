"""Zip files that are made while they are read.

An archive is not stored: its blob is a *manifest* that names its members, and the members are links
to the stored files' bytes. ``Layout`` computes from the manifest where everything lies in the zip,
so that ``ZipReader`` can make any byte of it on demand, and an archive has a length, ranges and a
resume like any other file, without a copy. It is own code because libraries write zips as streams
from the first byte to the last; none of them can say what lies at an offset.

The format is PKWARE's APPNOTE 6.3: method *stored*; sizes and CRC-32 in the local headers, so no
data descriptors; names in UTF-8 (flag bit 11); times in UTC, exactly in the extra field 0x5455; the
Zip64 records only where a number does not fit. Everything is a function of the manifest, so the
bytes are the same at every reading; they must stay so, as a download may go on after an upgrade.

A manifest is lines of JSON that are only appended, as a job goes on: a ``file`` for each member in
its order, then a ``crc-32`` for each member whose checksum was not known. All loops over members
are cut into slices, because an archive may have many.
"""

from __future__ import annotations

import asyncio
import re
import struct
import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from time import perf_counter
from typing import Final

import msgspec

from errors import SluiceError
from jobs.kinds import Check
from storage import Blobs, Bundle, File, Reader

CRC: Final = "crc-32"  # as it is called among the digests of a file
MEDIA_TYPE: Final = "application/zip"
PLAIN: Final = "plain"  # File.layout: the blob holds the bytes
ZIP: Final = "zip"  # File.layout: it holds a manifest

_SLICE_S = 0.002
_CALL_BYTES = 256 << 10
_NAME_BYTES = 255  # most file systems take no longer one
_KEPT_AT_ONCE = 100  # checksums of small files in one commit
_SMALL_BYTES = 1 << 20
_LAYOUTS = 4  # a few MB each, for the longest archives

_MAX16 = 0xFFFF
_MAX32 = 0xFFFFFFFF
_LOCAL = struct.Struct("<IHHHHHIIIHH")  # section 4.3.7
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")  # 4.3.12
_END64 = struct.Struct("<IQHHIIQQQQ")  # 4.3.14
_LOCATOR = struct.Struct("<IIQI")  # 4.3.15
_END = struct.Struct("<IHHHHIIH")  # 4.3.16
_TIME = struct.Struct("<HHBi")  # Info-ZIP's extended timestamp: tag, length, flags, time
_UTF8 = 1 << 11
_PLAIN, _ZIP64 = 20, 45  # "version needed to extract"
_MADE_BY = 3 << 8 | _ZIP64  # Unix, so that the attributes are a mode
_MODE = 0o100644 << 16
_LAST_S = 0x7FFFFFFF  # that the extended timestamp can say


class Member(msgspec.Struct, array_like=True, tag="file", gc=False):
    """One file of an archive; ``name`` is the one in the zip, ``at`` its time in seconds."""

    id: str
    name: str
    bytes: int
    at: int
    crc32: int | None = None


class _Crc(msgspec.Struct, array_like=True, tag="crc-32", gc=False):
    """The checksum of the n-th member (from 0), found since."""

    n: int
    crc32: int


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Member | _Crc).decode


class Names:
    """Names for a zip: safe wherever it is unpacked, and each only once."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}

    def take(self, name: str) -> None:
        """Note a name that was given before."""
        self._taken.add(_key(name))

    def give(self, name: str) -> str:
        """The name, or the first of ``name (2)``, ``name (3)``… that is free.

        Names that differ only in case or in Unicode's composition are the same: on some disks one
        of them would replace the other.
        """
        name = safe_name(name)
        key = _key(name)
        given, n = name, self._next.get(key, 2)
        while _key(given) in self._taken:
            given, n = _numbered(name, n), n + 1
        if given != name:
            self._next[key] = n
        self._taken.add(_key(given))
        return given


def safe_name(name: str) -> str:
    """A name that no program unpacks outside of the folder it was told: plain components."""
    return "/".join(map(_plain, name.split("/")))


def _plain(part: str) -> str:
    odd = ("Cc", "Cs")  # control characters, and halves of characters
    part = "".join("_" if c == "\\" or unicodedata.category(c) in odd else c for c in part)
    if re.match(r"[A-Za-z]:", part):  # a drive of Windows
        part = part.replace(":", "_", 1)
    if part.strip(". ") == "":  # also ".." itself, and the root
        part = f"_{part}"
    return _numbered(part)


def _numbered(name: str, n: int | None = None) -> str:
    """``stem (n).ending``, with a stem so short that the last part is a file name."""
    folders, slash, name = name.rpartition("/")
    stem, dot, ending = name.rpartition(".")
    if not stem or len(ending) > _NAME_BYTES // 8:
        stem, dot, ending = name, "", ""
    tail = (f" ({n})" if n is not None else "") + dot + ending
    room = _NAME_BYTES - len(tail.encode())
    return folders + slash + stem.encode()[:room].decode(errors="ignore") + tail


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class Layout:
    """Where everything lies in a zip. Members are added in order; then any part can be made.

    Offsets are in bytes from the start of the zip. No input or output, and no loop over members.
    """

    def __init__(self) -> None:
        self.members: list[Member] = []
        self._starts = array("Q")  # of the local headers
        self._records = array("Q")  # of the central directory, from its start
        self._body_bytes = 0  # before the central directory
        self._directory_bytes = 0

    def add(self, member: Member) -> None:
        """Put a member behind the others; its CRC-32 may be set later."""
        self._starts.append(self._body_bytes)
        self._records.append(self._directory_bytes)
        size = len(member.name.encode())
        large = member.bytes >= _MAX32
        far = self._body_bytes >= _MAX32
        self._directory_bytes += _CENTRAL.size + size + _time_bytes(member)
        self._directory_bytes += 4 + 16 * large + 8 * far if large or far else 0
        self._body_bytes += _LOCAL.size + size + _time_bytes(member) + 20 * large + member.bytes
        self.members.append(member)

    @property
    def size_bytes(self) -> int:
        """The length of the zip."""
        return self._body_bytes + self._directory_bytes + self._end_bytes

    @property
    def _is64(self) -> bool:
        """Whether the end needs the Zip64 records."""
        return (
            len(self.members) >= _MAX16
            or self._body_bytes >= _MAX32
            or self._directory_bytes >= _MAX32
        )

    @property
    def _end_bytes(self) -> int:
        return _END.size + (_END64.size + _LOCATOR.size if self._is64 else 0)

    def part(self, at: int) -> tuple[bytes, int | None, int]:
        """What begins at offset ``at``: bytes to send, or (b"", the member's number, its offset).

        The bytes of a member go on to its end. ``at`` lies before ``size_bytes``.
        """
        if at < self._body_bytes:
            n = bisect_right(self._starts, at) - 1
            at -= self._starts[n]
            header = self._local(n)
            return (header[at:], None, 0) if at < len(header) else (b"", n, at - len(header))
        at -= self._body_bytes
        if at < self._directory_bytes:
            n = bisect_right(self._records, at) - 1
            return self._central(n)[at - self._records[n] :], None, 0
        return self._end()[at - self._directory_bytes :], None, 0

    def checks(self, skip: int, limit: int) -> list[Check]:
        """The CRC-32s of some members, and where their bytes lie in the zip."""
        found = []
        for n, member in enumerate(self.members[skip : skip + limit], skip):
            assert member.crc32 is not None
            start = self._starts[n] + len(self._local(n))
            found.append(Check(member.name, start, member.bytes, member.crc32))
        return found

    def _local(self, n: int) -> bytes:
        """The local header of a member, with its name and extra fields."""
        member = self.members[n]
        extra = _time(member)
        large = member.bytes >= _MAX32
        if large:  # both sizes must be there (4.5.3)
            extra += struct.pack("<HHQQ", 1, 16, member.bytes, member.bytes)
        return self._head(_LOCAL, (0x04034B50,), member, large, extra, ())

    def _central(self, n: int) -> bytes:
        """The record of a member in the central directory."""
        member, start = self.members[n], self._starts[n]
        large, far = member.bytes >= _MAX32, start >= _MAX32
        numbers = [member.bytes] * 2 * large + [start] * far
        extra = _time(member)
        if numbers:  # only those that are all ones in the record (4.5.3)
            extra += struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers)
        tail = (0, 0, 0, _MODE, min(start, _MAX32))
        return self._head(_CENTRAL, (0x02014B50, _MADE_BY), member, large or far, extra, tail)

    def _head(
        self,
        layout: struct.Struct,
        begin: tuple[int, ...],
        member: Member,
        is64: bool,
        extra: bytes,
        tail: tuple[int, ...],
    ) -> bytes:
        """What a local header and a central record have in common."""
        name = member.name.encode()
        date, time = _dos_time(member.at)
        size = min(member.bytes, _MAX32)
        assert member.crc32 is not None
        fixed = layout.pack(
            *begin,
            *(_ZIP64 if is64 else _PLAIN, _UTF8, 0, time, date),
            *(member.crc32, size, size, len(name), len(extra)),
            *tail,
        )
        return fixed + name + extra

    def _end(self) -> bytes:
        """The end of the central directory."""
        count, size, start = len(self.members), self._directory_bytes, self._body_bytes
        end = b""
        if self._is64:
            versions = (_MADE_BY, _ZIP64)
            end += _END64.pack(0x06064B50, 44, *versions, 0, 0, count, count, size, start)
            end += _LOCATOR.pack(0x07064B50, 0, start + size, 1)
        few = min(count, _MAX16)
        numbers = (min(size, _MAX32), min(start, _MAX32))
        return end + _END.pack(0x06054B50, 0, 0, few, few, *numbers, 0)


def _dos_time(at: int) -> tuple[int, int]:
    """Date and time of the headers: from 1980 on, in steps of two seconds."""
    when = datetime.fromtimestamp(max(at, 0), UTC)
    if not 1980 <= when.year <= 2107:
        return (0x21, 0) if when.year < 1980 else (0xFF9F, 0xBF7D)
    date = (when.year - 1980) << 9 | when.month << 5 | when.day
    return date, when.hour << 11 | when.minute << 5 | when.second // 2


def _time(member: Member) -> bytes:
    """The extra field with the time of the last change; the same in both places."""
    return _TIME.pack(0x5455, 5, 1, member.at) if _time_bytes(member) else b""


def _time_bytes(member: Member) -> int:
    return _TIME.size if 0 <= member.at <= _LAST_S else 0


async def _lines(manifest: Reader) -> AsyncIterator[bytes]:
    """The lines of a manifest; between slices the loop turns. A cut last line is not given."""
    at, rest, began = 0, b"", perf_counter()
    while block := await manifest.read(at, _CALL_BYTES):
        at += len(block)
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line
            if perf_counter() - began > _SLICE_S:
                await asyncio.sleep(0)
                began = perf_counter()


async def load(manifest: Reader, names: Names | None = None) -> Layout:
    """Read a manifest that may still grow, without stopping the loop; its names are taken.

    Raises storage-failed.
    """
    layout = Layout()
    try:
        async for line in _lines(manifest):
            entry = _decode(line)
            if isinstance(entry, Member):
                layout.add(entry)
                if names is not None:
                    names.take(entry.name)
            else:
                layout.members[entry.n].crc32 = entry.crc32
    except (msgspec.MsgspecError, IndexError) as error:
        raise SluiceError("storage-failed", "The archive's manifest is damaged.") from error
    return layout


class ZipReader:
    """The bytes of an archive, made while they are read (see storage.Reader)."""

    def __init__(self, layout: Layout, bundle: Bundle) -> None:
        self.size_bytes = layout.size_bytes
        self._layout = layout
        self._bundle = bundle
        self._member: tuple[int, Reader] | None = None  # one is open at a time

    def fileno(self) -> int | None:
        """None: there is no such file."""
        return None

    async def read(self, start: int, n: int) -> bytes:
        """See the contract. What takes longer than a slice, as with many small members, ends it."""
        found: list[bytes] = []
        left = min(n, self.size_bytes - start, _CALL_BYTES)
        began = perf_counter()
        while left > 0:
            data, number, offset = self._layout.part(start)
            if number is not None:
                data = await self._read_member(number, offset, left)
            data = data[:left]
            found.append(data)
            start += len(data)
            left -= len(data)
            if perf_counter() - began > _SLICE_S:
                break
        return b"".join(found)

    async def _read_member(self, number: int, offset: int, n: int) -> bytes:
        member = self._layout.members[number]
        if self._member is None or self._member[0] != number:
            await self._close_member()
            self._member = number, await self._bundle.reader(member.id)
        data = await self._member[1].read(offset, min(n, member.bytes - offset))
        if not data:
            raise SluiceError("storage-failed", f"{member.name} is shorter than it was.")
        return data

    async def _close_member(self) -> None:
        if self._member is not None:
            (_, reader), self._member = self._member, None
            await reader.close()

    async def close(self) -> None:
        """See the contract."""
        await self._close_member()
        await self._bundle.close()


class Zips:
    """Opens archives for reading; keeps the layouts of the last few, as ranges come in numbers."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._layouts: dict[str, Layout] = {}  # the newest last

    async def reader(self, file: File) -> ZipReader:
        """Read an archive; it is readable to its end even if it is deleted meanwhile."""
        bundle = await self._blobs.bundle(file.id)
        try:
            layout = await self._layout(file)
        except BaseException:
            await bundle.close()
            raise
        return ZipReader(layout, bundle)

    async def checks(self, file: File, skip: int, limit: int) -> list[Check]:
        """Some members' CRC-32s, and where their bytes lie in the archive."""
        return (await self._layout(file)).checks(skip, limit)

    async def _layout(self, file: File) -> Layout:
        layout = self._layouts.pop(file.id, None) or await self._load(file)
        self._layouts[file.id] = layout
        if len(self._layouts) > _LAYOUTS:
            del self._layouts[next(iter(self._layouts))]
        return layout

    async def _load(self, file: File) -> Layout:
        manifest = await self._blobs.reader(file.id, file.name)
        try:
            return await load(manifest)
        finally:
            await manifest.close()


class ZipDraft:
    """An archive in the making, see kinds.ZipWriter: its manifest grows with each call.

    What was written behind the job's last cursor is cut off before this begins, so members and
    checksums are those of the cursor.
    """

    def __init__(
        self,
        layout: Layout,
        names: Names,
        blobs: Blobs,
        blob_id: str,
        find: Callable[[str], Awaitable[File]],
        append: Callable[[bytes], Awaitable[int]],
        keep_digests: Callable[[Mapping[str, Mapping[str, str]]], Awaitable[None]],
    ) -> None:
        self._layout = layout
        self._blobs = blobs
        self._blob_id = blob_id
        self._find = find
        self._append = append
        self._keep_digests = keep_digests
        self._names = names
        self._found: dict[str, dict[str, str]] = {}  # checksums that are still to be kept

    @property
    def members(self) -> list[Member]:
        """See ZipWriter."""
        return self._layout.members

    @property
    def size_bytes(self) -> int:
        """See ZipWriter."""
        return self._layout.size_bytes

    async def add(self, name: str) -> None:
        """See ZipWriter."""
        file = await self._find(name)
        if file.layout == ZIP:
            detail = f"{file.name} is an archive itself; put its files into this one."
            raise SluiceError("invalid-field", detail, field="params.files")
        await self._blobs.link(self._blob_id, file.id, file.name)
        known = file.digest.get(CRC)
        crc32 = int(known, 16) if known else None if file.bytes else 0
        in_zip = self._names.give(file.name)
        member = Member(file.id, in_zip, file.bytes, file.created_at // 1000, crc32)
        await self._append(_encode(member) + b"\n")
        self._layout.add(member)

    async def reader(self, number: int) -> Reader:
        """See ZipWriter."""
        bundle = await self._blobs.bundle(self._blob_id)
        try:
            return await bundle.reader(self.members[number].id)
        finally:
            await bundle.close()

    async def set_crc32(self, number: int, crc32: int) -> None:
        """See ZipWriter."""
        member = self.members[number]
        await self._append(_encode(_Crc(number, crc32)) + b"\n")
        member.crc32 = crc32
        self._found[member.id] = {CRC: f"{crc32:08x}"}
        if len(self._found) >= _KEPT_AT_ONCE or member.bytes > _SMALL_BYTES:
            await self._keep()

    async def finish(self) -> int:
        """Nothing more is added: the size of the zip. Raises kind-failed if it is not whole."""
        await self._keep()
        if any(member.crc32 is None for member in self.members):
            raise SluiceError("kind-failed", "A CRC-32 of the archive is missing.")
        return self.size_bytes

    async def _keep(self) -> None:
        """Keep the checksums that were found with their files."""
        found, self._found = self._found, {}
        if found:
            await self._keep_digests(found)
