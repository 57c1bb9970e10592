"""The kind ``archive`` over the whole domain: what it keeps, what it computes, and its ends."""

from __future__ import annotations

import asyncio
import io
import random
import zipfile
import zlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

import jobs.kinds.archive
from errors import SluiceError
from jobs.add import add
from jobs.files import now_ms
from jobs.kinds import Kind, kind_of
from jobs.process import Process
from jobs.uploads import Limits as UploadLimits
from storage import File, Job
from storage.blobs_local import LocalBlobs, LocalReader
from storage.state_sqlite import SqliteState
from tests.jobs.disturb import How, Trap
from tests.jobs.world import OWNER, Dead, World, a_kind, eventually

ARCHIVE = kind_of(jobs.kinds.archive)
KIB = 1 << 10
MIB = 1 << 20


def a_world(folder: Path, *kinds: Kind, digest: str = "", **more: Any) -> World:
    """A world that makes archives; ``digest="always"`` lets uploads bring their CRC-32."""
    limits = UploadLimits(1 << 50, 3600.0, 3600.0, 300.0, "interval")
    if digest:
        limits = limits._replace(digest=digest)
    return World(folder / "data", ARCHIVE, *kinds, uploads=limits, **more)


async def store(world: World, name: str, data: bytes) -> File:
    """Store a file."""
    path = world.folder.parent / "in" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return await add(world.uploads, path, OWNER)


async def stored(world: World, file_id: str) -> File:
    """A stored file's row."""
    file = await world.state.file(file_id, OWNER)
    assert file is not None
    return file


async def made(world: World, params: dict[str, Any]) -> tuple[Job, File]:
    """Run an archive to its end; the job and its file."""
    job = await world.until(await world.start("archive", params), "succeeded", "failed")
    assert job.state == "succeeded", job.error
    assert job.result is not None
    assert job.result.file is not None
    return job, await stored(world, job.result.file)


async def content(world: World, file: File) -> bytes:
    """All bytes of a file, as a download reads them."""
    reader = await world.files.reader(file)
    data = b""
    while piece := await reader.read(len(data), 1 << 30):
        data += piece
    await reader.close()
    assert len(data) == file.bytes == reader.size_bytes
    return data


async def unpacked(world: World, file: File) -> dict[str, bytes]:
    """What is in an archive, by name."""
    with zipfile.ZipFile(io.BytesIO(await content(world, file))) as archive:
        assert archive.testzip() is None
        return {info.filename: archive.read(info) for info in archive.infolist()}


def members(world: World) -> set[str]:
    """All that lies below members/, without the folder itself."""
    folder = world.folder / "members"
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


async def nothing_left(world: World, *files: File) -> None:
    """There are these files, and not a byte of anything else."""
    await eventually(lambda: members(world) == set(), "no members")
    await eventually(lambda: world.unfinished() == [], "nothing unfinished")
    assert {path.name for path in (world.folder / "uploads").iterdir()} == {f.id for f in files}
    page = await world.state.find_files(OWNER, None, None, 500)
    assert {file.id for file in page.items} == {file.id for file in files}


class TestMaking:
    """What comes out."""

    async def test_members_by_name_and_id(self, tmp_path: Path) -> None:
        """Names mean their newest versions, ids any; duplicates are numbered; empty files count."""
        async with a_world(tmp_path) as world:
            old = await store(world, "data.csv", b"old")
            await store(world, "data.csv", b"new")
            empty = await store(world, "empty", b"")
            await store(world, "żółw 🐢.txt", b"turtle" * 100_000)
            names = ["data.csv", old.id, "data.csv", empty.id, "żółw 🐢.txt"]
            job, file = await made(world, {"files": names})
            assert await unpacked(world, file) == {
                "data.csv": b"new",
                "data (2).csv": b"old",
                "data (3).csv": b"new",
                "empty": b"",
                "żółw 🐢.txt": b"turtle" * 100_000,
            }
            assert job.result is not None
            assert job.result.data == {"files": 5, "bytes": file.bytes, "name": "files.zip"}
            assert job.artifacts[0].bytes == file.bytes
            assert (file.name, file.media_type, file.layout) == (
                "files.zip",
                "application/zip",
                "zip",
            )
            assert file.expires_at is not None
            assert abs(file.expires_at - now_ms() - 86_400_000) < 60_000
            assert 600_000 < file.bytes < 602_000

    async def test_the_zip_knows_when_files_were_stored(self, tmp_path: Path) -> None:
        """A member's time is that of its version, to the second."""
        async with a_world(tmp_path) as world:
            stored_ = await store(world, "a", b"abc")
            _, file = await made(world, {"files": ["a"], "name": "b.zip"})
            assert file.name == "b.zip"
            data = await content(world, file)
            at = (stored_.created_at // 1000).to_bytes(4, "little")
            assert data.count(b"UT\5\0\1" + at) == 2

    async def test_nothing_is_copied(self, tmp_path: Path) -> None:
        """The archive's own bytes are a manifest, and its members other names of the files."""
        async with a_world(tmp_path) as world:
            big = await store(world, "big", bytes(3 * MIB))
            _, file = await made(world, {"files": ["big"]})
            manifest = world.published()[f"{file.id}/files.zip"]
            assert len(manifest) < 200
            member = world.folder / "members" / file.id / big.id
            assert member.samefile(world.folder / "uploads" / big.id / "big")

    async def test_a_file_may_go(self, tmp_path: Path) -> None:
        """Deleted and expired members are still in the zip; then the zip's end frees them."""
        async with a_world(tmp_path) as world:
            files = [await store(world, name, name.encode() * MIB) for name in "abc"]
            whole = {name: name.encode() * MIB for name in "abc"}
            _, archive = await made(world, {"files": ["a", "b", "c"], "expires_s": 3600})
            await world.files.delete(files[0].id, OWNER)
            assert await unpacked(world, archive) == whole
            for file in files[1:]:
                await world.files.delete(file.id, OWNER)
            assert await unpacked(world, archive) == whole
            await world.restart()
            assert await unpacked(world, archive) == whole
            await world.files.delete(archive.id, OWNER)
            await nothing_left(world)

    async def test_an_archive_expires(self, tmp_path: Path) -> None:
        """When its time has passed it goes with its members; the files stay."""
        async with a_world(tmp_path) as world:
            file = await store(world, "a", b"abc")
            _, archive = await made(world, {"files": ["a"], "expires_s": 1})
            assert archive.expires_at is not None
            await eventually(lambda: now_ms() > (archive.expires_at or 0), "its time is over")
            assert await world.files.expire() == 1
            await nothing_left(world, file)

    async def test_a_download_outlives_the_archive(self, tmp_path: Path) -> None:
        """Who has begun to read reads on when archive and members are deleted."""
        async with a_world(tmp_path) as world:
            files = [await store(world, name, name.encode() * MIB) for name in "ab"]
            _, archive = await made(world, {"files": ["a", "b"]})
            whole = await content(world, archive)
            reader = await world.files.reader(archive)
            begin = await reader.read(0, 1000)
            for file in (*files, archive):
                await world.files.delete(file.id, OWNER)
            with pytest.raises(SluiceError):
                await world.files.reader(archive)
            data = begin
            while piece := await reader.read(len(data), 1 << 20):
                data += piece
            assert data == whole
            await reader.close()
            await nothing_left(world)

    async def test_two_archives_of_one_file(self, tmp_path: Path) -> None:
        """The end of one takes nothing from the other."""
        async with a_world(tmp_path) as world:
            await store(world, "a", b"abc" * MIB)
            _, one = await made(world, {"files": ["a"]})
            _, other = await made(world, {"files": ["a"]})
            await world.files.delete(one.id, OWNER)
            await world.files.delete((await world.files.find("a", OWNER)).id, OWNER)
            assert await unpacked(world, other) == {"a": b"abc" * MIB}

    async def test_other_kinds_read_it(self, tmp_path: Path) -> None:
        """To a process an archive is a file like any other."""

        async def run(ctx: Any, params: Any) -> dict[str, Any]:
            info = await ctx.files.find("files.zip")
            reader = await ctx.files.reader(info.id)
            first = await reader.read(0, 4)
            await reader.close()
            return {"bytes": info.bytes, "first": first.decode("latin-1")}

        async with a_world(tmp_path, a_kind("peek", run)) as world:
            await store(world, "a", b"abc")
            _, archive = await made(world, {"files": ["a"]})
            job = await world.until(await world.start("peek"), "succeeded")
            assert job.result is not None
            assert job.result.data == {"bytes": archive.bytes, "first": "PK\3\4"}

    async def test_an_archive_counts_with_its_size(self, tmp_path: Path) -> None:
        """It holds its owner's bytes even when the files are deleted, so the quota sees them."""
        async with a_world(tmp_path) as world:
            await store(world, "a", b"abc")
            _, archive = await made(world, {"files": ["a"]})
            assert await world.files.stored(OWNER) == (2, 3 + archive.bytes)
            await world.files.delete(archive.id, OWNER)
            assert await world.files.stored(OWNER) == (1, 3)


class TestChecksums:
    """What is read, and what is not."""

    async def test_a_second_archive_reads_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each CRC-32 that was computed is kept with its file."""
        async with a_world(tmp_path) as world:
            dice = random.Random(3)
            data = {f"{n}": dice.randbytes(n * 1000) for n in range(150)}
            for name, bytes_ in data.items():
                await store(world, name, bytes_)
            big = await store(world, "big", dice.randbytes(2 * MIB))
            job, one = await made(world, {"files": [*data, "big"]})
            total = sum(map(len, data.values())) + 2 * MIB
            assert (job.progress.done, job.progress.total) == (total, total)
            assert (job.progress.phase, job.progress.unit) == ("reading", "bytes")
            for name, bytes_ in data.items():
                file = await world.files.find(name, OWNER)
                if bytes_:
                    assert file.digest == {"crc-32": f"{zlib.crc32(bytes_):08x}"}
            reads = spy_on_reads(monkeypatch)
            again, other = await made(world, {"files": [*data, "big"]})
            assert (again.progress.done, again.progress.total) == (0, 0)
            assert reads == []
            assert await content(world, one) == await content(world, other)
            assert "crc-32" in (await stored(world, big.id)).digest

    async def test_the_checksum_of_an_upload_is_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where uploads are hashed, an archive needs no pass at all."""
        async with a_world(tmp_path, digest="always") as world:
            await store(world, "a", b"abc" * MIB)
            reads = spy_on_reads(monkeypatch)
            job, archive = await made(world, {"files": ["a"]})
            assert (job.progress.done, job.progress.total, reads) == (0, 0, [])
            assert await unpacked(world, archive) == {"a": b"abc" * MIB}

    async def test_reads_are_short(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No read takes more than 256 KiB, so that no step holds the loop."""
        async with a_world(tmp_path) as world:
            await store(world, "a", bytes(2 * MIB + 1))
            reads = spy_on_reads(monkeypatch)
            await made(world, {"files": ["a"]})
            assert max(reads) == 256 * KIB
            assert len(reads) >= 9

    async def test_progress_never_goes_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither do pauses, warm or cold, read a byte twice; the zip is the same."""
        async with a_world(tmp_path) as world:
            dice = random.Random(4)
            data = {f"{number}": dice.randbytes(2 * MIB) for number in range(3)}
            for name, bytes_ in data.items():
                await store(world, name, bytes_)
            seen: list[int] = []
            job_id = ""
            hows: list[How] = ["warm", "cold", "cold", "warm"]
            for how in hows:
                world.runners.warm_s = 0 if how == "cold" else 30
                with monkeypatch.context() as inner:
                    Trap(inner, world, 5, how)
                    if job_id:
                        await world.tell(job_id, "resume")
                    else:
                        job_id = await world.start("archive", {"files": list(data)})
                    job = await world.until(job_id, "paused")
                seen.append(job.progress.done)
                if how == "cold":
                    await eventually(lambda: job_id not in world.runners._live, "it is cold")  # noqa: B023
            await world.tell(job_id, "resume")
            job = await world.until(job_id, "succeeded")
            assert 0 < seen[0] < seen[1] < seen[2] < seen[3] < 6 * MIB
            assert job.progress.done == 6 * MIB
            assert job.result is not None
            archive = await stored(world, str(job.result.file))
            assert await unpacked(world, archive) == data

    async def test_the_message_counts_files(self, tmp_path: Path) -> None:
        """A person sees how many of how many."""
        async with a_world(tmp_path) as world:
            for number in range(3):
                await store(world, f"{number}", b"abc")
            job, _ = await made(world, {"files": ["0", "1", "2"]})
            assert job.progress.message == "3 of 3 files"


class TestRefusing:
    """What can't be archived."""

    @pytest.mark.parametrize(
        ("params", "field"),
        [
            ({}, "params.files"),
            ({"files": []}, "params.files"),
            ({"files": ["a"] * 10_001}, "params.files"),
            ({"files": [""]}, "params.files[0]"),
            ({"files": ["a"], "name": "a/b.zip"}, "params.name"),
            ({"files": ["a"], "name": ".."}, "params.name"),
            ({"files": ["a"], "name": ""}, "params.name"),
            ({"files": ["a"], "name": "a\\b"}, "params.name"),
            ({"files": ["a"], "name": "a\nb"}, "params.name"),
            ({"files": ["a"], "name": "é" * 128}, "params"),
            ({"files": ["a"], "expires_s": 0}, "params.expires_s"),
            ({"files": ["a"], "expires_s": 1e12}, "params.expires_s"),
        ],
    )
    async def test_wrong_parameters(
        self, tmp_path: Path, params: dict[str, Any], field: str
    ) -> None:
        """They are refused at the start, with the field, and no job is made."""
        async with a_world(tmp_path) as world:
            with pytest.raises(SluiceError) as caught:
                await world.start("archive", params)
            assert (caught.value.code, caught.value.field) == ("invalid-field", field)
            assert await world.state.counts(OWNER) == {}

    async def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        """The job fails with what is missing, and leaves nothing of the members before it."""
        async with a_world(tmp_path) as world:
            file = await store(world, "a", b"abc")
            job_id = await world.start("archive", {"files": ["a", "gone.csv"]})
            job = await world.until(job_id, "failed")
            assert job.error is not None
            assert job.error["code"] == "file-unknown"
            assert "gone.csv" in job.error["detail"]
            await nothing_left(world, file)

    async def test_an_archive_in_an_archive(self, tmp_path: Path) -> None:
        """It is refused clearly: its bytes are nowhere that could be kept."""
        async with a_world(tmp_path) as world:
            file = await store(world, "a", b"abc")
            _, archive = await made(world, {"files": ["a"]})
            job_id = await world.start("archive", {"files": [file.id, archive.id]})
            job = await world.until(job_id, "failed")
            assert job.error is not None
            assert (job.error["code"], job.error["field"]) == ("invalid-field", "params.files")
            assert {path.name for path in (world.folder / "members").iterdir()} == {archive.id}

    async def test_names_are_unique_across_a_resume(self, tmp_path: Path) -> None:
        """What was added before a cold pause counts when the next name is given."""

        async def run(ctx: Any, params: Any) -> dict[str, Any]:
            archive = await ctx.zip("twice.zip")
            begun = ctx.cursor is not None
            await archive.add("empty")
            await ctx.checkpoint(1)
            if not begun:
                await ctx.sleep(3600)
            return {"names": [member.name for member in archive.members]}

        async with a_world(tmp_path, a_kind("twice", run), warm_s=0.01) as world:
            await store(world, "empty", b"")
            job_id = await world.start("twice")
            await eventually(lambda: _cursor(world, job_id) == 1, "it sleeps")
            await world.tell(job_id, "pause")
            await world.until(job_id, "paused")
            await eventually(lambda: job_id not in world.runners._live, "the pause is cold")
            await world.tell(job_id, "resume")
            job = await world.until(job_id, "succeeded")
            assert job.result is not None
            assert job.result.data == {"names": ["empty", "empty (2)"]}

    async def test_a_kind_that_forgets_a_checksum(self, tmp_path: Path) -> None:
        """An archive that is not whole is never published."""

        async def run(ctx: Any, params: Any) -> None:
            archive = await ctx.zip("bad.zip")
            await archive.add("a")

        async with a_world(tmp_path, a_kind("bad", run)) as world:
            file = await store(world, "a", b"abc")
            job = await world.until(await world.start("bad"), "failed")
            assert job.error is not None
            assert job.error["code"] == "kind-failed"
            await nothing_left(world, file)

    async def test_a_file_of_somebody_else(self, tmp_path: Path) -> None:
        """Only the owner's files can be named."""
        async with a_world(tmp_path) as world:
            path = tmp_path / "a"
            path.write_bytes(b"abc")
            file = await add(world.uploads, path, "bob")
            job_id = await world.start("archive", {"files": [file.id]})
            job = await world.until(job_id, "failed")
            assert job.error is not None
            assert job.error["code"] == "file-unknown"


POINTS = [
    (Process, "checkpoint", "before"),
    (LocalBlobs, "link", "after"),
    (LocalBlobs, "publish", "before"),
    (LocalBlobs, "publish", "after"),
    (SqliteState, "save", "before"),
    (SqliteState, "save", "after"),
    (SqliteState, "add_digests", "before"),
    (SqliteState, "add_digests", "after"),
]
SIZES = (0, 5, 700_000, 9, 300_000)


class TestDying:
    """kill -9 at each point; and cancels there."""

    @pytest.mark.parametrize("then", ["go on", "cancel"])
    @pytest.mark.parametrize(("owner", "attribute", "when"), POINTS)
    async def test_any_death(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        owner: Any,
        attribute: str,
        when: str,
        then: str,
    ) -> None:
        """After each restart it goes on to the same zip; cancelled instead it leaves nothing."""
        number = 1
        while True:
            world = a_world(tmp_path / f"{number}")
            world.folder.parent.mkdir()
            await world.open()
            dice = random.Random(5)
            data = {f"{n}": dice.randbytes(size) for n, size in enumerate(SIZES)}
            files = [await store(world, name, data_) for name, data_ in data.items()]
            with monkeypatch.context() as patch:
                died = mortal(patch, world, owner, attribute, when, number)
                job_id = await world.start("archive", {"files": list(data)})
                reached = await first(world.until(job_id, "succeeded", "failed"), died)
                if reached:
                    await world.crash()
            if not reached:
                await world.close()
                break
            await world.open()
            if then == "cancel":
                await cancel(world, job_id)
            if then == "cancel" and (await world.job(job_id)).state == "cancelled":
                await nothing_left(world, *files)
            else:
                await whole(world, job_id, files, data)
            await world.close()
            number += 1
        assert number > 1, "it was never called"

    async def test_members_go_while_it_is_down(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was kept before a crash is in the zip, though the file was deleted after it."""
        world = a_world(tmp_path)
        await world.open()
        file = await store(world, "a", bytes(2 * MIB))
        with monkeypatch.context() as inner:
            Trap(inner, world, 5, "warm")
            job_id = await world.start("archive", {"files": ["a"]})
            job = await world.until(job_id, "paused")
        assert 0 < job.progress.done < 2 * MIB
        await world.restart()
        await world.files.delete(file.id, OWNER)
        await world.tell(job_id, "resume")
        job = await world.until(job_id, "succeeded")
        assert job.result is not None
        archive = await stored(world, str(job.result.file))
        assert await unpacked(world, archive) == {"a": bytes(2 * MIB)}
        await world.close()


def spy_on_reads(patch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all reads of more than a manifest's."""
    reads: list[int] = []
    original = LocalReader.read

    async def read(self: LocalReader, start: int, n: int) -> bytes:
        reads.append(n)
        return await original(self, start, n)

    patch.setattr(LocalReader, "read", read)
    return reads


def mortal(
    patch: pytest.MonkeyPatch, world: World, owner: Any, attribute: str, when: str, number: int
) -> asyncio.Event:
    """Let the world die at the n-th call; set when it has."""
    original = getattr(owner, attribute)
    died = asyncio.Event()
    calls = 0

    def die() -> None:
        world.state.die()
        world.blobs.dead = True
        died.set()
        raise Dead

    async def call(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            die()
        own = calls
        result = await original(*args, **more)
        if own == number and when == "after":
            die()
        return result

    patch.setattr(owner, attribute, call)
    return died


async def first(ending: Coroutine[Any, Any, Any], died: asyncio.Event) -> bool:
    """Wait for the end or the death; whether it was the latter."""
    tasks = [asyncio.ensure_future(ending), asyncio.ensure_future(died.wait())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return died.is_set()


async def whole(world: World, job_id: str, files: list[File], data: dict[str, bytes]) -> None:
    """The job comes to its end, with the zip that it would have made anyway, and leaves no more."""
    job = await world.until(job_id, "succeeded")
    assert job.result is not None
    archive = await stored(world, str(job.result.file))
    _, alone = await made(world, {"files": list(data)})
    assert await content(world, archive) == await content(world, alone)
    assert await unpacked(world, archive) == data
    assert len(members(world)) == 2 * (1 + len(data))
    for file in (archive, alone):
        await world.files.delete(file.id, OWNER)
    await nothing_left(world, *files)


async def cancel(world: World, job_id: str) -> None:
    """Cancel a job, if it has not ended, and see its end."""
    try:
        await world.tell(job_id, "cancel")
    except SluiceError as error:
        assert error.code == "job-finished"
    await world.until(job_id, "cancelled", "succeeded")


def _cursor(world: World, job_id: str) -> Any:
    """Where a live job stands."""
    process = world.runners._live.get(job_id)
    return process.cursor if process is not None else None
