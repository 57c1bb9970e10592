"""Files that grow, without a network: what may be read, and who is told when."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from errors import SluiceError
from jobs.growing import Growing
from jobs.upload import Plan
from storage import Job
from tests.jobs.test_uploads import DATA, Sender, begin, put
from tests.jobs.world import OWNER, World, a_kind


def there(world: World, job: Job) -> int | None:
    """How much of the job's first file may be read."""
    grown = world.manager.grown(job, None)
    return grown.bytes if grown is not None else None


async def test_only_what_is_committed_may_be_read(tmp_path: Path) -> None:
    """Written bytes are told when their offset was committed, not before."""
    async with World(tmp_path) as world:
        job = await begin(world, length=len(DATA))
        async with world.uploads.connect(job, Sender()) as upload:
            await world.uploads.write(upload, memoryview(DATA[:1000]))
            assert (upload.stored, there(world, job)) == (1000, 0)
            await world.uploads.save()
            assert there(world, job) == 1000
            await world.uploads.write(upload, memoryview(DATA[1000:1500]))
            assert there(world, job) == 1000
        assert there(world, await world.job(job.id)) == 1500


async def test_a_follower_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits is woken by the commit of the bytes, and by the end; then nobody listens."""
    async with World(tmp_path) as world:
        growing = Growing(world.manager, world.blobs)
        job = await begin(world, length=len(DATA))
        async with growing.follow(job, None) as follower:
            waiting = asyncio.ensure_future(follower.beyond(0))
            with monkeypatch.context() as patch:
                patch.setattr("jobs.growing._TICK_S", 3600)
                await put(world, job, Sender(DATA[:1000]))
            assert not waiting.done()  # until the next tick
            growing._tick()
            await waiting
            assert (follower.bytes, follower.whole) == (1000, False)
            follower.hear(job)  # a row from before sets nothing back
            assert follower.bytes == 1000
            waiting = asyncio.ensure_future(follower.beyond(len(DATA)))
            await put(world, job, Sender(DATA[1000:]))
            assert not waiting.done()
            await world.uploads.complete(job)
            await waiting
            assert follower.whole
            assert follower.grown is not None
            reader = await growing.reader(follower.grown)  # published meanwhile
            assert await reader.read(0, 10) == DATA[:10]
            await reader.close()
            assert world.manager._news.keys() == {job.id}
        assert not world.manager._news


async def test_news_between_the_row_and_the_listener_is_not_missed(tmp_path: Path) -> None:
    """A follower that begins with an old row knows what has happened since."""
    async with World(tmp_path) as world:
        growing = Growing(world.manager, world.blobs)
        job = await begin(world, length=10)
        await put(world, job, Sender(DATA[:4]))
        async with growing.follow(job, None) as follower:
            assert follower.bytes == 4
        await world.tell(job.id, "cancel")
        with pytest.raises(SluiceError, match="content-gone"):
            async with growing.follow(job, None):
                pass


@pytest.mark.parametrize(("layout", "bytes"), [("plain", 7), ("zip", None)])
async def test_a_blob_that_is_no_file_is_not_shown(
    tmp_path: Path, layout: str, bytes: int | None
) -> None:
    """The blob of an archive holds other bytes than it; what is being cancelled has none."""

    async def run(ctx: Any, params: Any) -> None: ...

    async with World(tmp_path, a_kind("packs", run)) as world:
        made = {"blob": "b", "bytes": 7, "media_type": "text/plain", "layout": layout}
        cursor = {"artifacts": {"a": made}}
        job = Job(
            id="j", kind="packs", name="j", owner=OWNER, state="paused", created_at=1, cursor=cursor
        )
        assert there(world, job) == bytes
        going = msgspec.structs.replace(job, state="cancelling", want="cancel")
        with pytest.raises(SluiceError, match="content-gone"):
            world.manager.grown(going, None)


async def test_a_whole_has_no_bytes_before_it_is_joined(tmp_path: Path) -> None:
    """What is made of parts has no file so far, and its parts have none of their own."""
    async with World(tmp_path) as world:
        growing = Growing(world.manager, world.blobs)
        part = await begin(world, "part", length=10, plan=Plan(by_length=True, partial=True))
        whole = await begin(world, "whole", plan=Plan(by_length=True, parts=[part.id]))
        await put(world, part, Sender(DATA[:4]))
        assert there(world, whole) is None
        with pytest.raises(SluiceError, match="content-unknown"):
            world.manager.grown(part, None)
        async with growing.follow(whole, None) as follower:
            await put(world, part, Sender(DATA[4:10]))
            await world.uploads.complete(part)
            await follower.beyond(9)
            assert follower.bytes == 10
