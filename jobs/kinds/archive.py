"""Many stored files as one zip, without a copy.

First each file is made a member: its bytes are kept for the archive, whatever becomes of the file.
Then the CRC-32s that no upload or earlier archive has left behind are computed, in one pass over
those members; each is kept with its file. That is all: the zip is made while it is downloaded. A
CRC-32 goes on from its value, so the cursor says where in which member it stood.
"""

from __future__ import annotations

import zlib
from typing import Annotated, Any

import msgspec

from errors import SluiceError
from jobs.kinds import Context, ZipWriter

KIND = "archive"
TITLE = "Many stored files as one zip"
UNIT = "bytes"
PAUSE = "within 256 KiB"

_BLOCK_BYTES = 256 << 10
_NAME_BYTES = 255

File = Annotated[str, msgspec.Meta(min_length=1, max_length=_NAME_BYTES)]


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which files, and the archive's name."""

    files: Annotated[
        list[File],
        msgspec.Meta(
            min_length=1,
            max_length=10_000,
            description="ids, or names (their newest versions); in this order",
        ),
    ]
    name: Annotated[
        str,
        msgspec.Meta(
            pattern=r"^(?!\.{1,2}$)[^\/\\\x00-\x1f\x7f]+$",  # also for a browser's form
            max_length=_NAME_BYTES,
            description="the archive's file name",
        ),
    ] = "files.zip"
    expires_s: Annotated[
        float, msgspec.Meta(ge=1, le=10 * 365 * 86_400, description="how long it is kept")
    ] = 86_400

    def __post_init__(self) -> None:
        if len(self.name.encode()) > _NAME_BYTES:
            raise ValueError(f"name is longer than {_NAME_BYTES} bytes")


async def run(ctx: Context, params: Params) -> dict[str, Any]:
    """Keep the members, then compute what is missing."""
    archive = await ctx.zip(params.name, expires_s=params.expires_s)
    count = len(params.files)
    for name in params.files[len(archive.members) :]:
        await archive.add(name)
        await ctx.checkpoint(
            {}, done=0, phase="linking", message=f"{len(archive.members)} of {count} files"
        )
    await _read(ctx, archive)
    return {"files": count, "bytes": archive.size_bytes, "name": params.name}


async def _read(ctx: Context, archive: ZipWriter) -> None:
    """Compute the CRC-32s that are missing."""
    cursor = ctx.cursor or {}
    done = cursor.get("done", 0)
    missing = [n for n, member in enumerate(archive.members) if member.crc32 is None]
    at, crc32 = cursor.get("at", 0), cursor.get("crc32", 0)  # in the first that is missing
    total = done - at + sum(archive.members[n].bytes for n in missing)
    await ctx.checkpoint(done=done, total=total, phase="reading")
    for left, n in zip(range(len(missing), 0, -1), missing, strict=True):
        message = f"{len(archive.members) - left + 1} of {len(archive.members)} files"
        reader = await archive.reader(n)
        try:
            while block := await reader.read(at, _BLOCK_BYTES):
                crc32 = zlib.crc32(block, crc32)
                at += len(block)
                done += len(block)
                cursor = {"at": at, "crc32": crc32, "done": done}
                await ctx.checkpoint(cursor, done=done, message=message)
        finally:
            await reader.close()
        if at != archive.members[n].bytes:
            raise SluiceError("storage-failed", f"{archive.members[n].name} is not whole.")
        await archive.set_crc32(n, crc32)
        at = crc32 = 0
        await ctx.checkpoint({"done": done}, done=done)
