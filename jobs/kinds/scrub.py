"""Every stored file read again, and held against the digests that were recorded with it.

Strategy. Files go by their number, the newest first; the cursor is the number of the last one that
was done, so what is added or deleted meanwhile does no harm. A file is read once, as a download
would read it, for all its digests; of an archive also each member's CRC-32 is looked at, which its
manifest has. What has no digest gets one, so that the next scrub can tell. The state of a hash
can't be saved: a resume that has lost it reads the file in which it stood again.
"""

from __future__ import annotations

import zlib
from typing import Annotated, Any

import msgspec

from errors import SluiceError
from jobs.kinds import ArtifactWriter, Check, Context, FileInfo
from jobs.kinds._digests import Hasher, hasher, is_known
from jobs.kinds._names import check_name

KIND = "scrub"
TITLE = "Verify every stored file"
UNIT = "bytes"
PAUSE = "within 256 KiB; after 30 s the file in which it stood is read again"

_BLOCK_BYTES = 256 << 10  # well under 2 ms for one algorithm
_PAGE = 100
_KEPT = ("sha-256", "crc-32")  # the digests that are recorded where there are none
_MEDIA_TYPE = "application/x-ndjson"
_GONE = "file-unknown"
_NAMED = 5  # damaged files in the error's detail


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What happens with what is found."""

    fail: Annotated[
        bool, msgspec.Meta(description="whether damage fails the job (then without a report)")
    ] = False
    name: Annotated[
        str, msgspec.Meta(description="of the report, which is made if anything is damaged")
    ] = "scrub.jsonl"

    def __post_init__(self) -> None:
        check_name(self.name)


class Damage(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A line of the report."""

    file: str
    name: str
    bytes: int
    problem: str  # size, digest, member or unreadable
    what: str = ""  # the algorithm, or the member's name
    expected: str | int = ""
    found: str | int = ""


class Cursor(msgspec.Struct):
    """Between two files."""

    below: int | None = None  # the number of the last one
    done: int = 0
    files: int = 0
    damaged: int = 0
    without_digest: int = 0
    named: list[str] = []
    fresh: dict[str, dict[str, str]] = {}  # digests that are still to be recorded, by id


async def run(ctx: Context, params: Params) -> dict[str, Any]:
    """Go through the files."""
    at = msgspec.convert(ctx.cursor or {}, Cursor)
    count, total = await ctx.files.stored()
    report: ArtifactWriter | None = None
    await ctx.checkpoint(msgspec.to_builtins(at), done=at.done, total=max(total, at.done))
    while page := await ctx.files.list(at.below, _PAGE):
        for info in page:
            message = f"{at.files + 1} of {max(count, at.files + 1)} files"
            found = await _verify(ctx, info, at.fresh, at.done, message)
            if found is None:  # deleted meanwhile
                at.below = info.h
                continue
            for damage in found:
                report = report or await ctx.artifact(params.name, _MEDIA_TYPE)
                await report.write(msgspec.json.encode(damage) + b"\n")
                ctx.log(_told(damage))
            if found and len(at.named) < _NAMED:
                at.named.append(info.name)
            at.below = info.h
            at.done += info.bytes
            at.files += 1
            at.damaged += bool(found)
            at.without_digest += not info.digest
            await ctx.checkpoint(msgspec.to_builtins(at), done=at.done, message=message)
            if len(at.fresh) >= _PAGE:
                await _keep(ctx, at)
    if at.fresh:
        await _keep(ctx, at)
    await ctx.checkpoint(done=at.done, total=at.done)  # files may have come and gone
    if at.damaged and params.fail:
        names = ", ".join(at.named) + (" …" if at.damaged > len(at.named) else "")
        raise SluiceError("invalid-data", f"{at.damaged} of {at.files} files are damaged: {names}.")
    return {
        "files": at.files,
        "bytes": at.done,
        "damaged": at.damaged,
        "without_digest": at.without_digest,
    }


async def _keep(ctx: Context, at: Cursor) -> None:
    """Record the digests that were found; the cursor that has them is saved before that."""
    await ctx.files.keep_digests(at.fresh)
    at.fresh = {}
    await ctx.checkpoint(msgspec.to_builtins(at))


async def _verify(
    ctx: Context, info: FileInfo, fresh: dict[str, dict[str, str]], done: int, message: str
) -> list[Damage] | None:
    """What is wrong with a file, if anything; None if it is not there any more.

    Digests that it has not so far are put into ``fresh``.
    """
    hashers = {name: hasher(name) for name in {*info.digest, *_KEPT} if is_known(name)}
    members = _Members(ctx, info)
    try:
        read = await _read(ctx, info, list(hashers.values()), members, done, message)
        found = members.damaged
        if read != info.bytes:
            found.append(_damage(info, "size", expected=info.bytes, found=read))
        digests = {name: one.hexdigest() for name, one in hashers.items()}
        for name, expected in info.digest.items():
            if digests.get(name, expected) != expected:
                found.append(_damage(info, "digest", name, expected=expected, found=digests[name]))
        if not found and not set(_KEPT) <= set(info.digest):
            fresh[info.id] = {name: digests[name] for name in _KEPT}
    except SluiceError as error:
        return await _unreadable(ctx, info, error)
    return found


async def _read(
    ctx: Context,
    info: FileInfo,
    hashers: list[Hasher],
    members: _Members,
    done: int,
    message: str,
) -> int:
    """Give a file's bytes to all who want them; how many there were."""
    reader = await ctx.files.reader(info.id)
    read = 0
    try:
        while block := await reader.read(read, _BLOCK_BYTES):
            for one in hashers:
                one.update(block)
                await ctx.checkpoint(done=done + read, message=message)
            await members.update(block, read)
            read += len(block)
            await ctx.checkpoint(done=done + read)
    finally:
        await reader.close()
    return read


async def _unreadable(ctx: Context, info: FileInfo, error: SluiceError) -> list[Damage] | None:
    """A file that can't be read: damaged, or deleted since it was listed."""
    if error.code not in (_GONE, "not-found", "storage-failed"):
        raise error
    try:
        await ctx.files.find(info.id)
    except SluiceError as other:
        if other.code == _GONE:
            return None
        raise
    return [_damage(info, "unreadable", error.detail)]


class _Members:
    """The members of an archive, as its bytes come by; other files have none."""

    def __init__(self, ctx: Context, info: FileInfo) -> None:
        self.damaged: list[Damage] = []
        self._ctx = ctx
        self._info = info
        self._taken = 0
        self._more = True
        self._left: list[Check] = []  # the next ones, the first at the end
        self._crc32 = 0

    async def update(self, block: bytes, start: int) -> None:
        """Look at the bytes of the file that begin at ``start``."""
        view, end = memoryview(block), start + len(block)
        while (check := await self._next()) is not None and check.start < end:
            begin = max(check.start, start)
            upto = min(check.start + check.bytes, end)
            self._crc32 = zlib.crc32(view[begin - start : max(upto, begin) - start], self._crc32)
            if upto < check.start + check.bytes:
                return
            if self._crc32 != check.crc32:
                expected, found = f"{check.crc32:08x}", f"{self._crc32:08x}"
                self.damaged.append(
                    _damage(self._info, "member", check.name, expected=expected, found=found)
                )
            self._left.pop()
            self._crc32 = 0

    async def _next(self) -> Check | None:
        """The member that comes next, or in which the file stands."""
        if not self._left and self._more:
            page = await self._ctx.files.checks(self._info.id, self._taken, _PAGE)
            self._taken += len(page)
            self._more = len(page) == _PAGE
            self._left = list(reversed(page))
        return self._left[-1] if self._left else None


def _damage(
    info: FileInfo,
    problem: str,
    what: str = "",
    *,
    expected: str | int = "",
    found: str | int = "",
) -> Damage:
    return Damage(
        file=info.id,
        name=info.name,
        bytes=info.bytes,
        problem=problem,
        what=what,
        expected=expected,
        found=found,
    )


def _told(damage: Damage) -> str:
    """A line for people."""
    where = f"{damage.name} ({damage.file})"
    if damage.problem == "unreadable":
        return f"{where} can't be read: {damage.what}"
    what = {"size": "its size", "digest": damage.what, "member": f"CRC-32 of {damage.what}"}
    return f"{where}: {what[damage.problem]} is {damage.found}, recorded was {damage.expected}"
