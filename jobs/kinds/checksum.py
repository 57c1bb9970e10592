"""Digests of a stored file, several algorithms in one pass.

The state of a hash can't be saved, so a resume that has lost it reads the file again from its
start; the cursor only says which file was meant (the newest version may have changed meanwhile).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from errors import SluiceError
from jobs.kinds import Context
from jobs.kinds._digests import hasher

KIND = "checksum"
TITLE = "Digests of a stored file"
UNIT = "bytes"
PAUSE = "within 256 KiB; resuming after 30 s reads the file again"

_BLOCK_BYTES = 256 << 10  # well under 2 ms for all algorithms together

Algorithm = Literal["sha256", "sha512", "sha1", "md5", "blake2b", "crc32"]


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which file, which digests."""

    file: Annotated[str, msgspec.Meta(min_length=1, description="a file's id, or its name")]
    algorithms: Annotated[
        list[Algorithm], msgspec.Meta(min_length=1, max_length=6, description="one pass for all")
    ] = msgspec.field(default_factory=lambda: ["sha256"])
    expect: Annotated[
        dict[Algorithm, str], msgspec.Meta(description="digests in hex that the file must have")
    ] = {}


async def run(ctx: Context, params: Params) -> dict[str, Any]:
    """Read the file once and compare what was expected."""
    info = await ctx.files.find(ctx.cursor or params.file)
    names = list(dict.fromkeys([*params.algorithms, *params.expect]))
    hashers = {name: hasher(name) for name in names}
    reader = await ctx.files.reader(info.id)
    try:
        await ctx.checkpoint(info.id, done=0, total=info.bytes, phase="reading")
        at = 0
        while block := await reader.read(at, _BLOCK_BYTES):
            for one in hashers.values():
                one.update(block)
                await ctx.checkpoint(info.id, done=at)
            at += len(block)
            await ctx.checkpoint(info.id, done=at)
    finally:
        await reader.close()
    digests = {name: one.hexdigest() for name, one in hashers.items()}
    for name, expected in params.expect.items():
        if digests[name] != expected.lower():
            raise SluiceError(
                "digest-mismatch", f"{name} is {digests[name]}, expected was {expected.lower()}."
            )
    return {"file": info.id, "name": info.name, "bytes": info.bytes, "digests": digests}
