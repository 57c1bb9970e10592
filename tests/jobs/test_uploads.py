"""Tests of uploads without a network: senders under the test's control, real files, real rows."""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from errors import SluiceError
from jobs.files import now_ms
from jobs.upload import Plan, plan_of
from jobs.uploads import ClientGone
from jobs.uploads import Limits as UploadLimits
from storage import Job
from tests.jobs.world import OWNER, MortalWriter, World, eventually

DATA = bytes(range(256)) * 4096  # 1 MiB
KIB = 1 << 10


class Sender:
    """A body whose bytes come when the test says so (see jobs.uploads.Pieces)."""

    def __init__(self, *pieces: bytes, ends: bool = True) -> None:
        self.gate: Callable[[], Awaitable[None]] | None = None
        self.most_bytes: Callable[[], int | None] | None = None
        self.given = 0
        self._queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()
        for piece in pieces:
            self.send(piece)
        if ends:
            self._queue.put_nowait(None)

    def send(self, piece: bytes) -> None:
        """Bytes arrive."""
        self._queue.put_nowait(piece)

    def end(self) -> None:
        """The body is complete."""
        self._queue.put_nowait(None)

    def cut(self) -> None:
        """The connection ends."""
        self._queue.put_nowait(ClientGone())

    def interrupt(self, error: SluiceError) -> None:
        """See Peer."""
        self._queue.put_nowait(error)

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        while True:
            if self.gate is not None:
                await self.gate()
            piece = await self._queue.get()
            if piece is None:
                return
            if isinstance(piece, BaseException):
                raise piece
            self.given += len(piece)
            yield memoryview(piece)


def limits(**changes: Any) -> UploadLimits:
    """Limits of the configuration, with changes."""
    return UploadLimits(1 << 50, 3600.0, 3600.0, 300.0, "interval")._replace(**changes)


async def begin(world: World, name: str = "a.bin", **more: Any) -> Job:
    """A resumable upload."""
    more.setdefault("plan", Plan(by_length=True))
    job, _ = await world.uploads.create(
        name, owner=OWNER, client="", by=world.by(), protocol="tus", resumable=True, **more
    )
    return job


async def put(world: World, job: Job, sender: Sender, **more: Any) -> int:
    """One request that brings a sender's bytes, from where the upload stands."""
    async with world.uploads.connect(job, sender) as upload:
        return await world.uploads.append(upload, upload.stored, sender, **more)


async def code_of(work: Awaitable[Any]) -> str:
    """The code of the error that something ends with."""
    with pytest.raises(SluiceError) as caught:
        await work
    return caught.value.code


async def causes(world: World, job: Job) -> list[str]:
    """The causes of a job's events, in order."""
    return [event.cause for event in await world.history(job.id)]


async def test_a_complete_upload_is_a_file(tmp_path: Path) -> None:
    """All bytes in two requests become one stored file; asking again gives the same."""
    async with World(tmp_path) as world:
        job = await begin(world, length=len(DATA))
        assert await put(world, job, Sender(DATA[:1000])) == 1000
        assert await put(world, job, Sender(DATA[1000:])) == len(DATA)
        files = await world.uploads.complete(job)
        again = await world.uploads.complete(job)
        assert [file.id for file in files] == [file.id for file in again]
        assert world.published() == {f"{files[0].id}/a.bin": DATA}
        assert world.unfinished() == []
        done = await world.job(job.id)
        assert (done.state, done.durable_bytes) == ("succeeded", len(DATA))
        assert done.progress.done == done.progress.total == len(DATA)


async def test_an_empty_upload_is_an_empty_file(tmp_path: Path) -> None:
    """A length of 0 is complete without a byte."""
    async with World(tmp_path) as world:
        job = await begin(world, length=0)
        (file,) = await world.uploads.complete(job)
        assert world.published() == {f"{file.id}/a.bin": b""}


async def test_the_outcome_survives_the_file(tmp_path: Path) -> None:
    """What a completed upload became is told after its file was deleted, too."""
    async with World(tmp_path) as world:
        job = await begin(world, length=4)
        await put(world, job, Sender(b"abcd"))
        (file,) = await world.uploads.complete(job)
        await world.files.delete(file.id, OWNER)
        (told,) = await world.uploads.complete(job)
        assert (told.id, told.name, told.bytes) == (file.id, "a.bin", 4)


async def test_nobody_needs_to_wait_for_the_end(tmp_path: Path) -> None:
    """An upload is finished although the request that brought the last byte has gone."""
    async with World(tmp_path) as world:
        job = await begin(world, length=4)
        await put(world, job, Sender(b"abcd"))
        waiting = asyncio.create_task(world.uploads.complete(job))
        await asyncio.sleep(0)
        waiting.cancel()
        assert (await world.until(job.id, "succeeded")).result is not None


async def test_a_newer_request_takes_over(tmp_path: Path) -> None:
    """The stalled one ends, what it delivered is kept, and its late bytes go nowhere."""
    async with World(tmp_path) as world:
        job = await begin(world, length=8)
        stalled = Sender(b"abcd", ends=False)
        request = asyncio.create_task(put(world, job, stalled))
        await eventually(lambda: world.uploads.offset(job) == 4, "four bytes are stored")
        job = await world.uploads.halt(job)
        assert job.stored_bytes == 4
        stalled.send(b"XXXX")
        assert await code_of(request) == "upload-taken-over"
        assert await put(world, job, Sender(b"efgh")) == 8
        (file,) = await world.uploads.complete(job)
        assert world.published()[f"{file.id}/a.bin"] == b"abcdefgh"
        assert "taken-over" in await causes(world, job)


async def test_many_requests_at_once_leave_one_writer(tmp_path: Path) -> None:
    """Of ten requests that connect in the same moment the last one writes, the others end."""
    async with World(tmp_path) as world:
        job = await begin(world, length=4)
        senders = [Sender(ends=False) for _ in range(10)]
        requests = [asyncio.create_task(put(world, job, sender)) for sender in senders]
        await eventually(lambda: sum(request.done() for request in requests) == 9, "nine ends")
        (left,) = [request for request in requests if not request.done()]
        ended = [request for request in requests if request is not left]
        assert {await code_of(request) for request in ended} == {"upload-taken-over"}
        writer = senders[requests.index(left)]
        writer.send(b"abcd")
        writer.end()
        assert await left == 4


async def test_watchers_are_told_of_what_happens_to_the_sender(tmp_path: Path) -> None:
    """A cut connection and its return are events; so the row says interrupted, then not."""
    async with World(tmp_path) as world:
        job = await begin(world, length=8)
        sender = Sender(b"abcd", ends=False)
        sender.cut()
        with pytest.raises(ClientGone):
            await put(world, job, sender)
        assert (await world.job(job.id)).reason == "client-gone"
        await put(world, job, Sender(b"ef"))
        assert (await world.job(job.id)).reason is None
        assert (await causes(world, job))[-2:] == ["client-gone", "client-back"]


async def test_what_came_before_a_crash_is_finished_after_it(tmp_path: Path) -> None:
    """All bytes were there, but nobody had finished the upload: the next start does."""
    async with World(tmp_path) as world:
        job = await begin(world, length=len(DATA))
        await put(world, job, Sender(DATA))
        await world.restart()
        done = await world.until(job.id, "succeeded")
        assert world.published() == {f"{done.result and done.result.file}/a.bin": DATA}


async def test_an_upload_that_the_sender_must_end_waits_for_it(tmp_path: Path) -> None:
    """Without by_length all bytes are no end: a restart leaves it open."""
    async with World(tmp_path) as world:
        job = await begin(world, length=4, plan=Plan())
        await put(world, job, Sender(b"abcd"))
        await world.restart()
        await asyncio.sleep(0.1)
        assert (await world.job(job.id)).state == "running"
        await world.uploads.complete(job)
        assert (await world.job(job.id)).state == "succeeded"


async def test_a_stop_in_the_middle_of_the_check_is_taken_up_again(tmp_path: Path) -> None:
    """Who has said that all is there need not come back."""
    async with World(tmp_path) as world:
        job = await begin(world, length=None, plan=Plan(digest=True))
        await put(world, job, Sender(DATA))
        await world.tell(job.id, "pause")
        waiting = asyncio.create_task(world.uploads.complete(job))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await world.tell(job.id, "resume")
        await waiting
        assert (await world.job(job.id)).state == "succeeded"


async def test_a_disk_that_comes_back_lets_the_upload_end(tmp_path: Path) -> None:
    """A publishing that the storage refuses is no success, loses nothing, and can be repeated."""
    async with World(tmp_path) as world:
        job = await begin(world, length=4)
        await put(world, job, Sender(b"abcd"))
        (tmp_path / "uploads").rename(tmp_path / "away")
        assert await code_of(world.uploads.complete(job)) in ("storage-missing", "storage-failed")
        assert (await world.job(job.id)).state == "running"
        (tmp_path / "away").rename(tmp_path / "uploads")
        (file,) = await world.uploads.complete(job)
        assert world.published() == {f"{file.id}/a.bin": b"abcd"}


async def test_a_cancel_frees_the_bytes_and_the_room(tmp_path: Path) -> None:
    """Whoever sends is told; nothing is left in the folder or in the ledger."""
    async with World(tmp_path, uploads=limits(quota_bytes=10)) as world:
        job = await begin(world, length=8)
        request = asyncio.create_task(put(world, job, Sender(b"abcd", ends=False)))
        await eventually(lambda: world.uploads.offset(job) == 4, "four bytes are stored")
        await world.tell(job.id, "cancel")
        assert await code_of(request) == "upload-terminated"
        assert (await world.job(job.id)).state == "cancelled"
        assert world.unfinished() == []
        await world.uploads.check(OWNER, 10)


async def test_room_is_held_over_a_restart(tmp_path: Path) -> None:
    """What an unfinished upload was promised is still promised after a crash."""
    async with World(tmp_path, uploads=limits(quota_bytes=10)) as world:
        await begin(world, length=8)
        await world.restart()
        assert await code_of(world.uploads.check(OWNER, 3)) == "quota-exceeded"
        await world.uploads.check(OWNER, 2)


async def test_a_length_is_bound_once(tmp_path: Path) -> None:
    """Another one, or one below the offset, is refused and changes nothing."""
    async with World(tmp_path) as world:
        job = await begin(world)
        await put(world, job, Sender(b"abcd"))
        assert await code_of(world.uploads.set_length(job, 3, world.by())) == "invalid-field"
        job = await world.uploads.set_length(job, 6, world.by())
        assert await code_of(world.uploads.set_length(job, 7, world.by())) == "invalid-field"
        job = await world.uploads.set_length(job, 6, world.by())
        assert job.transfer is not None
        assert job.transfer.length_bytes == 6
        assert await code_of(put(world, job, Sender(b"efg"))) == "too-large"
        assert (await world.job(job.id)).stored_bytes == 4


async def test_digests_are_those_of_the_bytes(tmp_path: Path) -> None:
    """They are computed over interruptions and a restart, and kept with the file."""
    async with World(tmp_path, uploads=limits(digest="always")) as world:
        job = await begin(world, length=len(DATA))
        await put(world, job, Sender(DATA[: 300 * KIB]))
        await put(world, job, Sender(DATA[300 * KIB : 700 * KIB]))
        await world.restart()
        await put(world, job, Sender(DATA[700 * KIB :]))
        (file,) = await world.uploads.complete(job)
        assert file.digest["sha-256"] == hashlib.sha256(DATA).hexdigest()
        assert file.digest["crc-32"] == f"{zlib.crc32(DATA):08x}"


async def test_nothing_is_hashed_unless_asked(tmp_path: Path) -> None:
    """By default only who asks gets digests."""
    async with World(tmp_path) as world:
        plain = await begin(world, length=4)
        await put(world, plain, Sender(b"abcd"))
        assert (await world.uploads.complete(plain))[0].digest == {}
        asked = await begin(world, length=4, plan=Plan(by_length=True, digest=True))
        await put(world, asked, Sender(b"abcd"))
        digest = (await world.uploads.complete(asked))[0].digest
        assert digest["sha-256"] == hashlib.sha256(b"abcd").hexdigest()


async def test_a_wrong_digest_is_a_failure_that_lasts(tmp_path: Path) -> None:
    """The job has failed, nothing is published, and whoever asks again is told the same."""
    async with World(tmp_path) as world:
        wrong = hashlib.sha256(b"other").hexdigest()
        job = await begin(world, length=4, plan=Plan(by_length=True, expect={"sha-256": wrong}))
        await put(world, job, Sender(b"abcd"))
        assert await code_of(world.uploads.complete(job)) == "digest-mismatch"
        assert await code_of(world.uploads.complete(job)) == "digest-mismatch"
        assert (await world.job(job.id)).state == "failed"
        await eventually(lambda: world.unfinished() == [], "the bytes are gone")
        assert world.published() == {}


async def test_bytes_with_a_wrong_checksum_do_not_count(tmp_path: Path) -> None:
    """The offset stays, and the right bytes can follow."""
    async with World(tmp_path, uploads=limits(digest="always")) as world:
        job = await begin(world, length=8)
        await put(world, job, Sender(b"abcd"))
        right = {"sha": hashlib.sha1(b"efgh").hexdigest()}
        bad = put(world, job, Sender(b"eXgh"), checksums=right)
        assert await code_of(bad) == "checksum-mismatch"
        assert (await world.job(job.id)).stored_bytes == 4
        assert await put(world, job, Sender(b"efgh"), checksums=right) == 8
        (file,) = await world.uploads.complete(job)
        assert file.digest["sha-256"] == hashlib.sha256(b"abcdefgh").hexdigest()


async def test_bytes_whose_checksum_was_not_seen_do_not_count(tmp_path: Path) -> None:
    """A connection that is cut, and a crash, in a request with a checksum leave the offset."""
    async with World(tmp_path) as world:
        job = await begin(world, length=8)
        await put(world, job, Sender(b"ab"))
        checksums = {"md5": hashlib.md5(b"cdefgh").hexdigest()}
        sender = Sender(b"cdef", ends=False)
        sender.cut()
        with pytest.raises(ClientGone):
            await put(world, job, sender, checksums=checksums)
        assert (await world.job(job.id)).stored_bytes == 2
        request = asyncio.create_task(
            put(world, job, Sender(b"cdef", ends=False), checksums=checksums)
        )
        blob = tmp_path / "tmp" / plan_of(job).blobs[0].id
        await eventually(lambda: blob.stat().st_size == 6, "the bytes are written")
        await world.uploads.save()
        await world.crash()
        request.cancel()
        await asyncio.wait([request])
        await world.open()
        assert (await world.job(job.id)).stored_bytes == blob.stat().st_size == 2


async def part(world: World, data: bytes, *, sent: bool = True) -> Job:
    """A part of a later whole."""
    job = await begin(world, length=len(data), plan=Plan(by_length=True, partial=True))
    if sent:
        await put(world, job, Sender(data))
        assert await world.uploads.complete(job) == []
    return job


async def whole(world: World, *parts: Job) -> Job:
    """An upload that is joined from parts."""
    plan = Plan(by_length=True, parts=[job.id for job in parts])
    return await begin(world, "whole", plan=plan)


async def test_parts_are_joined(tmp_path: Path) -> None:
    """The whole has their bytes in order; they have succeeded, and theirs are freed."""
    async with World(tmp_path) as world:
        one, two = await part(world, b"one"), await part(world, b"two")
        job = await whole(world, two, one, two)
        (file,) = await world.uploads.complete(job)
        assert world.published() == {f"{file.id}/whole": b"twoonetwo"}
        assert world.unfinished() == []
        assert [(await world.job(each.id)).state for each in (one, two)] == ["succeeded"] * 2


async def test_a_whole_waits_for_its_parts(tmp_path: Path) -> None:
    """It ends by itself when the last of them is there, over a restart, too."""
    async with World(tmp_path) as world:
        one, two = await part(world, b"one"), await part(world, b"two", sent=False)
        job = await whole(world, one, two)
        assert not await world.uploads.arrived(job)
        await world.restart()
        await put(world, two, Sender(b"two"))
        await world.uploads.complete(two)
        done = await world.until(job.id, "succeeded")
        assert world.published() == {f"{done.result and done.result.file}/whole": b"onetwo"}


async def test_a_joining_that_a_crash_cut_off_begins_anew(tmp_path: Path) -> None:
    """Half a whole is thrown away, and the parts are still there."""
    async with World(tmp_path) as world:
        one, two = await part(world, b"one"), await part(world, b"two")
        job = await whole(world, one, two)
        (tmp_path / "tmp" / plan_of(job).blobs[0].id).write_bytes(b"onet")
        await world.restart()
        done = await world.until(job.id, "succeeded")
        assert world.published() == {f"{done.result and done.result.file}/whole": b"onetwo"}


async def test_what_is_left_alone_expires_and_what_is_complete_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the unfinished one is cancelled; a request that is open keeps one alive."""
    async with World(tmp_path, uploads=limits(expires_s=60)) as world:
        done = await begin(world, length=4)
        await put(world, done, Sender(b"abcd"))
        await world.uploads.complete(done)
        left, open_ = await begin(world, length=4), await begin(world, length=4)
        request = asyncio.create_task(put(world, open_, Sender(ends=False)))
        await eventually(lambda: world.uploads.connected(open_), "its request is open")
        with monkeypatch.context() as patch:
            patch.setattr("jobs.uploads.now_ms", lambda: now_ms() + 61_000)
            assert await world.uploads.expire() == 1
        gone = await world.job(left.id)
        assert (gone.state, gone.reason) == ("cancelled", "expired")
        assert await code_of(world.uploads.outcome(gone)) == "upload-gone"
        assert (await world.job(open_.id)).state == "running"
        assert len(world.published()) == 1
        await world.uploads.halt(open_)
        assert await code_of(request) == "upload-taken-over"


async def test_bytes_are_forced_to_the_disk_after_their_request_has_gone(tmp_path: Path) -> None:
    """With "interval" the next tick makes durable what a block has left behind."""
    async with World(tmp_path) as world:
        job = await begin(world, length=8)
        await put(world, job, Sender(b"abcd"))
        await world.uploads.save()
        assert (await world.job(job.id)).durable_bytes == 4


async def test_a_slow_sync_takes_no_offset_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was acknowledged while the tick waited for the disk is not overwritten by it."""
    synced, go_on = asyncio.Event(), asyncio.Event()
    sync = MortalWriter.sync

    async def slow(writer: MortalWriter) -> int:
        done = await sync(writer)
        synced.set()
        await go_on.wait()
        return done

    async with World(tmp_path) as world:
        job = await begin(world, length=12)
        sender = Sender(b"abcd", ends=False)
        request = asyncio.create_task(put(world, job, sender))
        await eventually(lambda: world.uploads.offset(job) == 4, "four bytes are stored")
        monkeypatch.setattr(MortalWriter, "sync", slow)
        tick = asyncio.create_task(world.uploads.save())
        await synced.wait()
        sender.send(b"efgh")
        sender.end()
        assert await request == 8
        monkeypatch.undo()
        assert await put(world, job, Sender(b"ij")) == 10
        go_on.set()
        await tick
        assert (await world.job(job.id)).stored_bytes == 10
        assert await put(world, job, Sender(b"kl")) == 12
        (file,) = await world.uploads.complete(job)
        assert world.published()[f"{file.id}/a.bin"] == b"abcdefghijkl"


async def test_always_forces_them_before_they_are_acknowledged(tmp_path: Path) -> None:
    """With "always" they are durable when append returns."""
    async with World(tmp_path, uploads=limits(durability="always")) as world:
        job = await begin(world, length=8)
        async with world.uploads.connect(job, sender := Sender(b"abcd")) as upload:
            await world.uploads.append(upload, 0, sender)
            assert (await world.job(job.id)).durable_bytes == 4


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of senders, which goes on when the test says so: ``now_s``."""
    clock = SimpleNamespace(now_s=1000.0)
    for module in ("flow", "upload"):
        monkeypatch.setattr(f"jobs.{module}.monotonic", lambda: clock.now_s)
    return clock


async def test_a_silent_sender_is_cut_off(tmp_path: Path, clock: SimpleNamespace) -> None:
    """After idle_s without a byte; its bytes stay."""
    async with World(tmp_path, uploads=limits(idle_s=20)) as world:
        job = await begin(world, length=8)
        request = asyncio.create_task(put(world, job, Sender(b"abcd", ends=False)))
        await eventually(lambda: world.uploads.offset(job) == 4, "four bytes are stored")
        clock.now_s += 21
        await world.uploads.save()
        assert await code_of(request) == "upload-stalled"
        assert (await world.job(job.id)).stored_bytes == 4


async def test_a_trickle_is_cut_off(tmp_path: Path, clock: SimpleNamespace) -> None:
    """A byte now and then resets no clock: the average over idle_s counts."""
    async with World(tmp_path, uploads=limits(idle_s=20, min_bytes_per_s=1000)) as world:
        job = await begin(world, length=1 << 20)
        sender = Sender(ends=False)
        request = asyncio.create_task(put(world, job, sender))
        for count in (1, 2, 3):
            assert not request.done()
            sender.send(b"x")
            await eventually(lambda: world.uploads.offset(job) == count, "it is stored")  # noqa: B023
            clock.now_s += 7
            await world.uploads.save()
        assert await code_of(request) == "upload-stalled"


async def test_a_paused_sender_is_not_cut_off(tmp_path: Path, clock: SimpleNamespace) -> None:
    """It is not its fault that nothing comes."""
    async with World(tmp_path, uploads=limits(idle_s=20, min_bytes_per_s=1000)) as world:
        job = await begin(world, length=4)
        sender = Sender(ends=False)
        request = asyncio.create_task(put(world, job, sender))
        await eventually(lambda: world.uploads.connected(job), "its request is open")
        await world.tell(job.id, "pause")
        clock.now_s += 21
        await world.uploads.save()
        await world.tell(job.id, "resume")
        sender.send(b"abcd")
        sender.end()
        assert await request == 4
