"""A stored file as gzip or Zstandard.

Strategy. The result is made of *parts*, and the cursor stands between two: parts of one gzip member
(_gzip.py), or frames of Zstandard. Where they end, and in which pieces the library gets the text,
follows from the parameters and the source's bytes alone, so that the result has the same bytes
however often the job was paused or killed. What an unfinished part has written is cut off by a
resume. A piece takes about a millisecond at the usual levels, and up to a tenth of a second at the
slowest ones.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

import msgspec
import zstandard

from errors import SluiceError
from jobs.kinds import ArtifactWriter, Context
from jobs.kinds._gzip import HEAD, PART_BYTES, Member
from jobs.kinds._input import Input
from jobs.kinds._names import check_name, with_suffix

KIND = "compress"
TITLE = "A stored file as gzip or Zstandard"
UNIT = "bytes"
RUNNER = "child"
CPU_BOUND = True
PAUSE = "at once; after 30 s, gzip repeats at most 1 MiB of the source, zstd 8 MiB"

_FRAME_BYTES = 8 << 20  # of text in one frame of Zstandard
_WRITE_BYTES = 256 << 10
_SUFFIX = {"gzip": ".gz", "zstd": ".zst"}
_MEDIA_TYPE = {"gzip": "application/gzip", "zstd": "application/zstd"}
_LEVEL = {"gzip": 6, "zstd": 3}
_PIECE_BYTES = {"gzip": 16 << 10, "zstd": 128 << 10}  # compressed at once: a block of Zstandard


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which file, and how."""

    file: Annotated[str, msgspec.Meta(min_length=1, description="a file's id, or its name")]
    format: Annotated[Literal["gzip", "zstd"], msgspec.Meta(description="of the result")] = "gzip"
    level: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=19)] | None,
        msgspec.Meta(description="from fast to small: gzip 1 to 9 (6), zstd 1 to 19 (3)"),
    ] = None
    name: Annotated[
        str | None, msgspec.Meta(description="of the result; default: the file's, and .gz or .zst")
    ] = None
    expires_s: Annotated[
        Annotated[int, msgspec.Meta(ge=60, le=315_360_000)] | None,
        msgspec.Meta(description="the result is kept so long; default: for good"),
    ] = None

    def __post_init__(self) -> None:
        if self.format == "gzip" and self.level is not None and self.level > 9:
            raise ValueError("The field `level` is above 9, the highest one of gzip")
        if self.name is not None:
            check_name(self.name)


class _Packer(Protocol):
    """Makes compressed parts of text."""

    part_bytes: int

    def begin(self, size_bytes: int) -> None:
        """Begin a part of so much text."""
        ...

    def add(self, text: bytes) -> bytes:
        """Add a piece to the part; what is known of its compressed form."""
        ...

    def end_part(self) -> bytes:
        """The rest of a part."""
        ...

    def end(self) -> bytes:
        """What follows the last part."""
        ...

    @property
    def state(self) -> list[int]:
        """What it takes to go on behind a part."""
        ...


class _Gzip:
    """One gzip member, in parts."""

    part_bytes = PART_BYTES

    def __init__(self, level: int, state: list[int]) -> None:
        self._member = Member(level, *state)
        self._head = b"" if state else HEAD

    def begin(self, size_bytes: int) -> None:
        """See _Packer."""

    def add(self, text: bytes) -> bytes:
        """See _Packer."""
        head, self._head = self._head, b""
        return head + self._member.add(text)

    def end_part(self) -> bytes:
        """See _Packer."""
        return self.add(b"") + self._member.end_part()

    def end(self) -> bytes:
        """See _Packer."""
        return self._member.end()

    @property
    def state(self) -> list[int]:
        """See _Packer."""
        return [self._member.crc32, self._member.size_bytes]


class _Zstd:
    """Frames with a checksum each."""

    part_bytes = _FRAME_BYTES
    state: list[int] = []  # noqa: RUF012 - a frame needs nothing of those before it

    def __init__(self, level: int) -> None:
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
        self.begin(0)

    def begin(self, size_bytes: int) -> None:
        """See _Packer."""
        self._frame = self._compressor.compressobj(size=size_bytes)

    def add(self, text: bytes) -> bytes:
        """See _Packer."""
        return self._frame.compress(text)

    def end_part(self) -> bytes:
        """See _Packer."""
        return self._frame.flush()

    def end(self) -> bytes:
        """See _Packer."""
        return b""


class Cursor(msgspec.Struct):
    """Between two parts."""

    file: str  # id: a newer version of the name may come meanwhile
    at: int = 0
    state: list[int] = []


async def run(ctx: Context, params: Params) -> dict[str, Any]:
    """Compress part by part."""
    cursor = None if ctx.cursor is None else msgspec.convert(ctx.cursor, Cursor)
    info = await ctx.files.find(cursor.file if cursor else params.file)
    cursor = cursor or Cursor(info.id)
    format = params.format
    name = params.name or with_suffix(info.name, _SUFFIX[format])
    file = await ctx.artifact(name, _MEDIA_TYPE[format], expires_s=params.expires_s)
    level = params.level or _LEVEL[format]
    piece_bytes = _PIECE_BYTES[format]
    packer: _Packer = _Gzip(level, cursor.state) if format == "gzip" else _Zstd(level)
    reader = await ctx.files.reader(info.id)
    try:
        source = Input(reader, cursor.at)
        await _save(ctx, cursor, total=info.bytes)
        while cursor.at < info.bytes or not file.offset:
            size_bytes = min(packer.part_bytes, info.bytes - cursor.at)
            await _part(ctx, source, packer, file, size_bytes, piece_bytes)
            cursor = Cursor(info.id, source.at, packer.state)
            await _save(ctx, cursor)
    finally:
        await reader.close()
    await _write(file, packer.end())
    return {
        "file": info.id,
        "name": name,
        "source_bytes": info.bytes,
        "bytes": file.offset,
        "format": format,
        "level": level,
    }


async def _part(
    ctx: Context,
    source: Input,
    packer: _Packer,
    file: ArtifactWriter,
    size_bytes: int,
    piece_bytes: int,
) -> None:
    """Make one part of what comes next."""
    packer.begin(size_bytes)
    made = bytearray()
    while size_bytes:
        piece = await source.upto(min(size_bytes, piece_bytes))
        if not piece:
            raise SluiceError("storage-failed", "The file is shorter than it was.")
        size_bytes -= len(piece)
        made += packer.add(piece)
        if len(made) >= _WRITE_BYTES:
            await _write(file, bytes(made))
            made.clear()
        await ctx.checkpoint(done=source.at)  # the cursor stays: a resume makes the part again
    await _write(file, bytes(made + packer.end_part()))


async def _write(file: ArtifactWriter, data: bytes) -> None:
    if data:
        await file.write(data)


async def _save(ctx: Context, cursor: Cursor, total: int | None = None) -> None:
    await ctx.checkpoint(msgspec.to_builtins(cursor), done=cursor.at, total=total)
