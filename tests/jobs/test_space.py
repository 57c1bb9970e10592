"""Tests of the ledger of room."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import SluiceError
from jobs.space import Bounds, Space
from storage.blobs_local import LocalBlobs
from storage.state_sqlite import SqliteState

ANN, BOB = "ann", "bob"
MIB = 1 << 20
FREE_BYTES = 1 << 40


class Disk(LocalBlobs):
    """A disk that nobody else writes to."""

    async def free_bytes(self) -> int:
        """See the contract."""
        return FREE_BYTES


@asynccontextmanager
async def a_space(folder: Path, **bounds: int) -> AsyncIterator[Space]:
    """A ledger over real storage."""
    blobs, state = Disk(folder), SqliteState(folder / "state.db")
    await blobs.open()
    await state.open()
    try:
        yield Space(blobs, state, Bounds(**({"max_bytes": 1 << 50} | bounds)))
    finally:
        await state.close()
        await blobs.close()


async def refusal(space: Space, owner: str, length: int | None) -> str:
    """The code with which a new upload is refused, or nothing."""
    try:
        await space.check(owner, length)
    except SluiceError as error:
        return error.code
    return ""


async def test_a_length_over_the_limit_is_too_large(tmp_path: Path) -> None:
    """The limit itself is allowed, one byte more is not."""
    async with a_space(tmp_path, max_bytes=MIB) as space:
        assert await refusal(space, ANN, MIB) == ""
        assert await refusal(space, ANN, MIB + 1) == "too-large"


async def test_what_is_promised_counts_as_used(tmp_path: Path) -> None:
    """Two uploads that each fit on the disk, but not both, are not both begun."""
    async with a_space(tmp_path) as space:
        most = FREE_BYTES * 2 // 3
        await space.reserve("one", ANN, most)
        assert await refusal(space, BOB, most) == "disk-full"
        space.free("one")
        assert await refusal(space, BOB, most) == ""


async def test_what_was_written_is_no_longer_promised(tmp_path: Path) -> None:
    """Bytes that have arrived are on the disk already and are not counted twice."""
    async with a_space(tmp_path) as space:
        most = FREE_BYTES * 2 // 3
        await space.reserve("one", ANN, most)
        space.moved("one", most)  # the test writes nothing, so the room is there again
        assert await refusal(space, BOB, most) == ""


async def test_an_upload_of_unknown_length_gets_what_nobody_was_promised(tmp_path: Path) -> None:
    """It is stopped before it takes the room of another; the other goes on."""
    async with a_space(tmp_path) as space:
        await space.reserve("open", ANN, None)
        await space.grow("open", MIB)
        await space.reserve("known", ANN, FREE_BYTES - 17 * MIB)
        await space.grow("known", MIB)
        with pytest.raises(SluiceError, match="disk-full"):
            await space.grow("open", 2 * MIB)


async def test_a_quota_counts_what_is_stored_and_what_is_under_way(tmp_path: Path) -> None:
    """Lengths that were promised count from the beginning, and for their owner only."""
    async with a_space(tmp_path, quota_bytes=10 * MIB) as space:
        await space.reserve("one", ANN, 6 * MIB)
        assert await refusal(space, ANN, 4 * MIB) == ""
        assert await refusal(space, ANN, 4 * MIB + 1) == "quota-exceeded"
        assert await refusal(space, BOB, 10 * MIB) == ""


async def test_an_upload_of_unknown_length_is_stopped_by_the_quota(tmp_path: Path) -> None:
    """The quota is looked at while it grows."""
    async with a_space(tmp_path, quota_bytes=10 * MIB) as space:
        await space.reserve("open", ANN, None)
        space.moved("open", 10 * MIB - 5)
        await space.grow("open", 5)
        with pytest.raises(SluiceError, match="quota-exceeded"):
            await space.grow("open", 6)


async def test_a_length_that_becomes_known_is_promised(tmp_path: Path) -> None:
    """It is checked like that of a new upload, without what is stored already."""
    async with a_space(tmp_path, quota_bytes=10 * MIB) as space:
        await space.reserve("open", ANN, None)
        space.moved("open", 4 * MIB)
        await space.extend("open", 10 * MIB)
        assert await refusal(space, ANN, 1) == "quota-exceeded"
        with pytest.raises(SluiceError, match="quota-exceeded"):
            await space.extend("open", 11 * MIB)


async def test_an_owner_has_so_many_uploads(tmp_path: Path) -> None:
    """One more is refused with the advice to wait; an end makes room."""
    async with a_space(tmp_path, max_uploads=2) as space:
        await space.reserve("one", ANN, 1)
        await space.reserve("two", ANN, None)
        with pytest.raises(SluiceError) as caught:
            await space.check(ANN, 1)
        assert (caught.value.status, caught.value.retry_after_s) == (429, 30)
        assert await refusal(space, BOB, 1) == ""
        space.free("one")
        assert await refusal(space, ANN, 1) == ""


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["hold", "moved", "free"]),
        st.sampled_from("abc"),
        st.sampled_from([ANN, BOB]),
        st.integers(0, 50) | st.none(),
        st.integers(0, 60),
    )
)


@given(MOVES)
@settings(max_examples=200, deadline=None)
def test_the_sums_are_those_of_the_claims(
    moves: list[tuple[str, str, str, int | None, int]],
) -> None:
    """After any sequence of claims the running sums equal the sums over what is left."""
    space = Space(LocalBlobs(Path("nowhere")), SqliteState(Path("nowhere")), Bounds(1 << 50))
    for move, job, owner, length, stored in moves:
        if move == "hold":
            space.hold(job, owner, length, stored)
        elif move == "moved":
            space.moved(job, stored)
        else:
            space.free(job)
    claims = space._claims.values()
    assert space._left == sum(claim.left for claim in claims)
    for owner in (ANN, BOB):
        held = [claim for claim in claims if claim.owner == owner]
        assert space._used.get(owner, 0) == sum(claim.used for claim in held)
        assert space._count.get(owner, 0) == len(held)
