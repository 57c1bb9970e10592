"""Room for uploads: what is promised to those under way counts as used.

Without a ledger, uploads that each fit can together fill the disk, and then none of them can be
finished. So a length is reserved when an upload begins, against the disk, the owner's quota and
the number of uploads; the reservation shrinks on the disk's side as bytes arrive, and ends with the
upload. An upload of unknown length gets what nobody was promised. One that is joined from others
needs room on the disk beside them, but they stand for it in the quota: they go when it is there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from errors import SluiceError
from storage import Blobs, State

_RESERVE_BYTES = 16 << 20  # of the disk, left for the state: else not even a cancel could be noted


class Bounds(NamedTuple):
    """Numbers of the configuration; a quota of 0 is none."""

    max_bytes: int
    quota_bytes: int = 0
    max_uploads: int = 10_000


class _Claim:
    """What one upload holds: what it was promised, and what it has stored."""

    __slots__ = ("joined", "owner", "promised", "stored")

    def __init__(self, owner: str, promised: int | None, stored: int, joined: bool) -> None:
        self.owner = owner
        self.joined = joined
        self.promised = promised
        self.stored = stored

    @property
    def left(self) -> int:
        """Promised, and not yet taken from the disk."""
        return max(0, (self.promised or 0) - self.stored)

    @property
    def used(self) -> int:
        """What it counts of its owner's quota."""
        return 0 if self.joined else max(self.promised or 0, self.stored)


class Space:
    """The ledger of all uploads under way."""

    def __init__(self, blobs: Blobs, state: State, bounds: Bounds) -> None:
        self.bounds = bounds
        self._blobs = blobs
        self._state = state
        self._claims: dict[str, _Claim] = {}
        self._left = 0
        self._used: dict[str, int] = {}
        self._count: dict[str, int] = {}

    async def check(self, owner: str, length: int | None, parts: Collection[str] = ()) -> None:
        """Raise what stands against a new upload: too-large, quota-exceeded, disk-full,
        too-many-uploads."""
        if self._count.get(owner, 0) >= self.bounds.max_uploads:
            raise SluiceError(
                "too-many-uploads",
                f"{self.bounds.max_uploads} uploads are unfinished.",
                retry_after_s=30,
            )
        counted = sum(self._claims[part].used for part in set(parts) & self._claims.keys())
        await self._check_length(owner, length or 0, 0, counted)

    async def reserve(
        self, job_id: str, owner: str, length: int | None, parts: Collection[str] = ()
    ) -> None:
        """``check``, and hold it for an upload (joined from ``parts``, if any) until ``free``."""
        await self.check(owner, length, parts)
        self.hold(job_id, owner, length, 0, joined=bool(parts))

    async def extend(self, job_id: str, length: int) -> None:
        """The length of an upload has become known; raises as ``check`` does."""
        claim = self._claims.get(job_id)
        if claim is not None:
            await self._check_length(claim.owner, length, claim.used, claim.used)
            self.hold(job_id, claim.owner, length, claim.stored, joined=claim.joined)

    async def grow(self, job_id: str, n: int) -> None:
        """Raise if the next ``n`` bytes of an upload have no room."""
        claim = self._claims.get(job_id)
        if claim is None:
            return
        free = await self._blobs.free_bytes() - _RESERVE_BYTES
        if claim.promised is None:
            free -= self._left
            await self._check_quota(claim.owner, n)
        if n > free:
            raise SluiceError("disk-full", "The disk is full; the bytes stored so far are kept.")

    def hold(
        self, job_id: str, owner: str, length: int | None, stored: int, *, joined: bool = False
    ) -> None:
        """Note a claim without asking, in place of an earlier one."""
        self.free(job_id)
        claim = self._claims[job_id] = _Claim(owner, length, stored, joined)
        self._left += claim.left
        self._used[owner] = self._used.get(owner, 0) + claim.used
        self._count[owner] = self._count.get(owner, 0) + 1

    def moved(self, job_id: str, stored: int) -> None:
        """An upload has so many bytes now."""
        claim = self._claims.get(job_id)
        if claim is None:
            return
        left, used = claim.left, claim.used
        claim.stored = stored
        self._left += claim.left - left
        self._used[claim.owner] += claim.used - used

    def free(self, job_id: str) -> None:
        """An upload has ended."""
        claim = self._claims.pop(job_id, None)
        if claim is None:
            return
        self._left -= claim.left
        self._used[claim.owner] -= claim.used
        self._count[claim.owner] -= 1
        if not self._count[claim.owner]:
            del self._count[claim.owner], self._used[claim.owner]

    async def _check_length(self, owner: str, length: int, held: int, counted: int) -> None:
        """``held`` of it was promised on the disk already, ``counted`` is in the quota."""
        if length > self.bounds.max_bytes:
            raise SluiceError(
                "too-large", f"At most {self.bounds.max_bytes:,} bytes are taken, not {length:,}."
            )
        await self._check_quota(owner, length - counted)
        if length - held > await self._blobs.free_bytes() - _RESERVE_BYTES - self._left:
            raise SluiceError("disk-full", f"There is no room for {length:,} bytes.")

    async def _check_quota(self, owner: str, n: int) -> None:
        if not self.bounds.quota_bytes:
            return
        _, stored = await self._state.stored(owner)
        if stored + self._used.get(owner, 0) + n > self.bounds.quota_bytes:
            raise SluiceError(
                "quota-exceeded",
                f"{stored:,} of {self.bounds.quota_bytes:,} bytes are stored already; there is no "
                f"room for {n:,} more.",
            )
