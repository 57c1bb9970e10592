"""A stored file that is gzip or Zstandard, unpacked.

Strategy. Both are read one *frame* (of Zstandard) or *member* (of gzip) after the other, and the
cursor stands between two. No step takes more than 64 KiB or makes more than 256 KiB, whatever the
input says: gzip's library stops there, and Zstandard is read block by block (_zstd.py). How much
comes out of how much is watched, so that a bomb ends early. Checksums are verified by the libraries
as they go; whatever is wrong fails the job, and nothing of its result stays.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

import msgspec

from errors import SluiceError
from jobs.kinds import ArtifactWriter, Context, FileInfo
from jobs.kinds import _zstd as zstd
from jobs.kinds._input import Damaged, Input, TooMuch
from jobs.kinds._names import check_name, with_suffix

KIND = "decompress"
TITLE = "Unpack a stored gzip or Zstandard file"
UNIT = "bytes"
RUNNER = "child"
CPU_BOUND = True
PAUSE = "at once; after 30 s the frame (zstd) or member (gzip) it stood in is unpacked again"

_IN_BYTES = 64 << 10
_OUT_BYTES = 256 << 10
_WRITE_BYTES = 256 << 10  # a write of a process of its own waits for its answer
_RATIO_FROM_BYTES = 16 << 20  # of output: below it no ratio does harm
_GZIP_MAGIC = b"\x1f\x8b"
_SUFFIXES = {".gz": "", ".gzip": "", ".tgz": ".tar", ".zst": "", ".zstd": "", ".tzst": ".tar"}


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which file, and how much may come out of it."""

    file: Annotated[str, msgspec.Meta(min_length=1, description="a file's id, or its name")]
    format: Annotated[
        Literal["auto", "gzip", "zstd"], msgspec.Meta(description="auto: by its first bytes")
    ] = "auto"
    name: Annotated[
        str | None, msgspec.Meta(description="of the result; default: the file's without .gz, …")
    ] = None
    max_bytes: Annotated[
        int, msgspec.Meta(ge=0, description="a result that would be larger fails the job")
    ] = 64 << 30
    max_ratio: Annotated[
        int, msgspec.Meta(ge=1, description="so does more than this from one byte, beyond 16 MiB")
    ] = 250
    expires_s: Annotated[
        Annotated[int, msgspec.Meta(ge=60, le=315_360_000)] | None,
        msgspec.Meta(description="the result is kept so long; default: for good"),
    ] = None

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name(self.name)


class Cursor(msgspec.Struct):
    """Between two frames."""

    file: str  # id: a newer version of the name may come meanwhile
    format: Literal["gzip", "zstd"]
    at: int = 0
    frames: int = 0


async def run(ctx: Context, params: Params) -> dict[str, Any]:
    """Unpack frame by frame."""
    cursor = None if ctx.cursor is None else msgspec.convert(ctx.cursor, Cursor)
    info = await ctx.files.find(cursor.file if cursor else params.file)
    name = params.name or _name(info.name)
    reader = await ctx.files.reader(info.id)
    source = Input(reader, cursor.at if cursor else 0)
    try:
        if cursor is None:
            cursor = Cursor(info.id, await _format(source, info, params.format))
        file = await ctx.artifact(name, "", expires_s=params.expires_s)
        await _save(ctx, cursor, total=info.bytes)
        ignored_bytes = await _unpack(ctx, params, source, file, cursor, info)
    except Damaged as error:
        raise SluiceError(
            "invalid-data", f"{info.name} {error}, near byte {source.at:,}.", field="params.file"
        ) from error
    except TooMuch as error:
        raise SluiceError("too-large", f"{info.name} {error}.", field="params.file") from error
    finally:
        await reader.close()
    return {
        "file": info.id,
        "name": name,
        "source_bytes": info.bytes,
        "bytes": file.offset,
        "format": cursor.format,
        "frames": cursor.frames,
        "ignored_bytes": ignored_bytes,
    }


async def _unpack(
    ctx: Context,
    params: Params,
    source: Input,
    file: ArtifactWriter,
    cursor: Cursor,
    info: FileInfo,
) -> int:
    """Unpack all that is left; how many bytes behind the last frame were ignored."""
    while source.at < info.bytes:
        if cursor.format == "gzip" and cursor.frames and not await _is_gzip(source):
            zeros_only = await _zeros(ctx, source)
            if not zeros_only:
                ctx.log(f"ignored what follows at byte {cursor.at:,}: it is no gzip")
            return info.bytes - cursor.at
        frame = _member(source) if cursor.format == "gzip" else zstd.frame(source)
        made = bytearray()
        async with aclosing(frame) as pieces:
            async for piece in pieces:
                made += piece
                _judge(params, file.offset + len(made), source.at)
                if len(made) >= _WRITE_BYTES:
                    await file.write(bytes(made))
                    made.clear()
                await ctx.checkpoint(done=source.at)  # the cursor stays: a resume begins the frame
        if made:
            await file.write(bytes(made))
        cursor.at, cursor.frames = source.at, cursor.frames + 1
        await _save(ctx, cursor)
    return 0


def _judge(params: Params, made_bytes: int, read_bytes: int) -> None:
    """See that no more comes out than may. Raises TooMuch."""
    if made_bytes > params.max_bytes:
        raise TooMuch(f"makes more than {params.max_bytes:,} bytes (max_bytes)")
    if made_bytes > _RATIO_FROM_BYTES and made_bytes > params.max_ratio * read_bytes:
        raise TooMuch(f"makes more than {params.max_ratio} bytes of each of its own (max_ratio)")


async def _member(source: Input) -> AsyncGenerator[bytes, None]:
    """The text of the gzip member that begins here; the source is then behind it."""
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    data, more = b"", False
    while not unpacker.eof:
        if not data and not more:
            data = await source.some(_IN_BYTES)
            if not data:
                raise Damaged("is cut short")
        try:
            text = unpacker.decompress(data, _OUT_BYTES)
        except zlib.error as error:
            raise Damaged(f"is damaged ({error})") from error
        data = unpacker.unconsumed_tail
        more = len(text) == _OUT_BYTES  # the library may hold some back
        yield text
    source.seek(source.at - len(unpacker.unused_data))


async def _is_gzip(source: Input) -> bool:
    """Whether another member begins here."""
    at = source.at
    magic = await source.upto(len(_GZIP_MAGIC))
    source.seek(at)
    return magic == _GZIP_MAGIC


async def _zeros(ctx: Context, source: Input) -> bool:
    """Whether there are only zeros up to the end, as on tapes."""
    while data := await source.some(_IN_BYTES):
        if data.count(0) < len(data):
            return False
        await ctx.checkpoint(done=source.at)
    return True


async def _format(source: Input, info: FileInfo, wanted: str) -> Literal["gzip", "zstd"]:
    """What the file is, by its first bytes. Raises Damaged if it is not what is wanted."""
    magic = await source.upto(4)
    source.seek(0)
    if magic[:2] == _GZIP_MAGIC and wanted != "zstd":
        return "gzip"
    if zstd.is_frame(magic) and wanted != "gzip":
        return "zstd"
    known = {"auto": "neither gzip nor Zstandard", "gzip": "no gzip", "zstd": "no Zstandard"}
    raise Damaged(f"is {known[wanted]}")


def _name(name: str) -> str:
    """The name without what says that it is compressed."""
    for suffix, instead in _SUFFIXES.items():
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return with_suffix(name[: -len(suffix)], instead)
    return with_suffix(name, ".out")


async def _save(ctx: Context, cursor: Cursor, total: int | None = None) -> None:
    await ctx.checkpoint(msgspec.to_builtins(cursor), done=cursor.at, total=total)
