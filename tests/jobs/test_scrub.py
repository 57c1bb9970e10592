"""The kind ``scrub``: damage that is one bit, what changes meanwhile, and its interruptions."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from pathlib import Path
from typing import Any

import pytest

import jobs.kinds.archive
from errors import SluiceError
from jobs.add import add
from jobs.kinds import kind_of, scrub
from jobs.uploads import Limits as UploadLimits
from storage import File, Job
from tests.jobs.disturb import How, Trap, at_every_checkpoint, disturbed, error_of, nothing_new
from tests.jobs.world import OWNER, World

KIB, MIB = 1 << 10, 1 << 20


def a_world(folder: Path, *, digest: str = "always", **more: Any) -> World:
    """A service that scrubs; uploads bring their digests, or none with ``digest="asked"``."""
    limits = UploadLimits(1 << 50, 3600.0, 3600.0, 300.0, "interval")._replace(digest=digest)
    kinds = kind_of(scrub), kind_of(jobs.kinds.archive)
    return World(folder, *kinds, uploads=limits, **more)


async def put(world: World, name: str, data: bytes, owner: str = OWNER) -> File:
    """Store a file."""
    path = world.folder / "in" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return await add(world.uploads, path, owner)


def flip(world: World, file: File, at: int) -> None:
    """Change one bit on the disk, behind everybody's back."""
    path = world.folder / "uploads" / file.id / file.name
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


async def scrubbed(world: World, **params: Any) -> Job:
    """Run a scrub to its end."""
    return await world.until(await world.start("scrub", params), "succeeded", "failed")


def data_of(job: Job) -> dict[str, Any]:
    """What it counted."""
    assert job.state == "succeeded", job.error
    assert job.result is not None
    return dict(job.result.data)


def report(world: World, job: Job) -> list[dict[str, Any]]:
    """The lines of the report."""
    assert job.result is not None
    (artifact,) = job.artifacts
    text = world.published()[f"{job.result.file}/{artifact.name}"]
    return [json.loads(line) for line in text.splitlines()]


async def test_all_is_well(tmp_path: Path) -> None:
    """Files, versions, empty ones: all are read once, and there is no report."""
    async with a_world(tmp_path) as world:
        sizes = (0, 1, 700_000, 256 * KIB, 3 * MIB)
        for n, size in enumerate(sizes):
            await put(world, f"{n % 3}", random.Random(n).randbytes(size))
        await put(world, "other", b"not ours", owner="bob")
        job = await scrubbed(world)
        total = sum(sizes)
        assert data_of(job) == {"files": 5, "bytes": total, "damaged": 0, "without_digest": 0}
        assert (job.progress.done, job.progress.total) == (total, total)
        assert job.progress.message == "5 of 5 files"
        assert job.artifacts == ()


@pytest.mark.parametrize("at", [0, 1, 256 * KIB - 1, 256 * KIB, 699_999])
async def test_one_bit_is_found(tmp_path: Path, at: int) -> None:
    """Wherever it is; the report, the log and the count name the file, and no other one."""
    async with a_world(tmp_path) as world:
        await put(world, "well", bytes(300 * KIB))
        file = await put(world, "ill", bytes(700_000))
        await put(world, "fine", b"abc")
        flip(world, file, at)
        job = await scrubbed(world)
        assert data_of(job)["damaged"] == 1
        lines = report(world, job)
        assert {line["file"] for line in lines} == {file.id}
        expected = hashlib.sha256(bytes(700_000)).hexdigest()
        assert {line["what"]: line["expected"] for line in lines}["sha-256"] == expected
        assert all(line["found"] != line["expected"] for line in lines)
        logged = [line for _, _, line in await world.state.lines(job.id, 0, 100)]
        assert len(logged) == len(lines)
        assert all(line.startswith(f"ill ({file.id})") for line in logged)


async def test_a_length_that_changed(tmp_path: Path) -> None:
    """Bytes that are missing or too many at the end are damage, too."""
    async with a_world(tmp_path, digest="asked") as world:
        short, long = await put(world, "short", b"abc"), await put(world, "long", b"abc")
        (world.folder / "uploads" / short.id / "short").write_bytes(b"ab")
        (world.folder / "uploads" / long.id / "long").write_bytes(b"abcd")
        job = await scrubbed(world)
        assert data_of(job)["damaged"] == 2
        found = {line["name"]: (line["problem"], line["found"]) for line in report(world, job)}
        assert found == {"short": ("size", 2), "long": ("size", 4)}
        assert (await world.files.get(short.id, OWNER)).digest == {}


async def test_a_file_that_is_gone_from_the_disk(tmp_path: Path) -> None:
    """A row without its bytes is damage; the others are read nevertheless."""
    async with a_world(tmp_path) as world:
        await put(world, "a", b"abc")
        file = await put(world, "b", b"def")
        (world.folder / "uploads" / file.id / "b").unlink()
        job = await scrubbed(world)
        assert data_of(job) == {"files": 2, "bytes": 6, "damaged": 1, "without_digest": 0}
        (line,) = report(world, job)
        assert (line["file"], line["problem"]) == (file.id, "unreadable")


async def test_a_digest_is_kept_where_there_is_none(tmp_path: Path) -> None:
    """The first scrub can only record it; the second one finds what changed since."""
    async with a_world(tmp_path, digest="asked") as world:
        data = random.Random(1).randbytes(500_000)
        file = await put(world, "a", data)
        assert file.digest == {}
        assert data_of(await scrubbed(world))["without_digest"] == 1
        kept = (await world.files.get(file.id, OWNER)).digest
        assert kept == {
            "sha-256": hashlib.sha256(data).hexdigest(),
            "crc-32": f"{zlib.crc32(data):08x}",
        }
        again = data_of(await scrubbed(world))
        assert (again["without_digest"], again["damaged"]) == (0, 0)
        flip(world, file, 400_000)
        assert data_of(await scrubbed(world))["damaged"] == 1
        assert (await world.files.get(file.id, OWNER)).digest == kept


async def test_every_recorded_digest_counts(tmp_path: Path) -> None:
    """Also one that only some uploads bring, and one that nobody here computes is left alone."""
    async with a_world(tmp_path, digest="asked") as world:
        file = await put(world, "a", b"abc")
        await world.files.keep_digests({file.id: {"md5": "0" * 32, "future": "1"}})
        (line,) = report(world, await scrubbed(world))
        assert (line["what"], line["found"]) == ("md5", hashlib.md5(b"abc").hexdigest())


async def test_damage_fails_the_job_if_that_is_wanted(tmp_path: Path) -> None:
    """All is read first; the error counts and names."""
    async with a_world(tmp_path) as world:
        for n in range(7):
            flip(world, await put(world, f"{n}", b"abc"), 0)
        error = error_of(await scrubbed(world, fail=True))
        assert error["code"] == "invalid-data"
        assert "7 of 7 files are damaged: 6, 5, 4, 3, 2 …" in error["detail"]
        await nothing_new(world, set(map(str, range(7))))


async def test_archives_are_read_as_a_download_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members whose files are gone are checked by the CRC-32s of the zip, each on its own."""
    monkeypatch.setattr(scrub, "_PAGE", 3)
    async with a_world(tmp_path) as world:
        sizes = (5, 300_000, 0, 7, 600_000, 0)
        names = [f"{n}" for n in range(len(sizes))]
        files = [
            await put(world, name, random.Random(n).randbytes(sizes[n]))
            for n, name in enumerate(names)
        ]
        made = await world.until(await world.start("archive", {"files": names}), "succeeded")
        assert made.result is not None and made.result.file is not None
        assert data_of(await scrubbed(world)) | {"bytes": 0} == {
            "files": 7,
            "bytes": 0,
            "damaged": 0,
            "without_digest": 1,
        }
        for file in files:
            if file.name != "0":
                await world.files.delete(file.id, OWNER)
        member = world.folder / "members" / made.result.file / files[4].id
        data = bytearray(member.read_bytes())
        data[-1] ^= 0x80
        member.write_bytes(bytes(data))
        lines = report(world, await scrubbed(world))
        assert {line["file"] for line in lines} == {made.result.file}
        assert [line["what"] for line in lines if line["problem"] == "member"] == ["4"]
        assert {line["what"] for line in lines} == {"4", "sha-256", "crc-32"}


async def test_an_archive_is_never_recorded_with_a_damaged_member(tmp_path: Path) -> None:
    """A first scrub sees by the members' checksums that something is wrong."""
    async with a_world(tmp_path) as world:
        file = await put(world, "a", b"abc" * 1000)
        made = await world.until(await world.start("archive", {"files": ["a"]}), "succeeded")
        assert made.result is not None and made.result.file is not None
        flip(world, file, 77)
        job = await scrubbed(world)
        assert data_of(job)["damaged"] == 2
        assert (await world.files.get(made.result.file, OWNER)).digest == {}


async def test_files_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is deleted before its turn is left out, and what comes meanwhile is not waited for."""
    async with a_world(tmp_path, warm_s=0) as world:
        files = [await put(world, f"{n}", bytes(300_000)) for n in range(6)]
        with monkeypatch.context() as inner:
            trap = Trap(inner, world, 10, "cold")  # in the second file
            job_id = await world.start("scrub")
            await world.until(job_id, "paused")
            for n in (5, 2, 0):
                await world.files.delete(files[n].id, OWNER)
            await put(world, "new", b"abc")
            await world.tell(job_id, "resume")
            job = await world.until(job_id, "succeeded", "failed")
        assert trap.sprung.is_set()
        assert data_of(job)["files"] == 4
        assert data_of(job)["damaged"] == 0
        assert job.progress.done == job.progress.total


@pytest.mark.parametrize("how", ["warm", "cold", "kill", "cancel"])
async def test_any_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: How) -> None:
    """Counts and report are the same, whenever it is held; cancelled it leaves no report."""
    monkeypatch.setattr(scrub, "_BLOCK_BYTES", 6 * KIB)
    monkeypatch.setattr(scrub, "_PAGE", 2)
    reports = set()
    sizes = (5, 9 * KIB, 3, 2)

    async def prepare(world: World) -> None:
        for n, size in enumerate(sizes):
            file = await put(world, f"{n}", bytes(size))
            found = {"sha-256": hashlib.sha256(bytes(size)).hexdigest()}
            await world.files.keep_digests({file.id: found} if n < 3 else {})
            if n in (1, 2):
                flip(world, file, size - 1)

    async def judge(world: World, job: Job) -> None:
        names = {f"{n}" for n in range(len(sizes))}
        if job.state == "cancelled":
            assert how == "cancel"
            await nothing_new(world, names)
            return
        wanted = {"files": 4, "bytes": sum(sizes), "damaged": 2, "without_digest": 1}
        assert data_of(job) == wanted
        lines = [(line["name"], line["what"], line["found"]) for line in report(world, job)]
        reports.add(tuple(lines))
        await nothing_new(world, names | {"scrub.jsonl"})

    count = await at_every_checkpoint(
        monkeypatch,
        lambda n: a_world(tmp_path / f"{n}", digest="asked", warm_s=0 if how == "cold" else 30),
        prepare,
        ("scrub", {}),
        how,
        judge,
    )
    assert count > 12
    assert len(reports) == 1


async def test_two_deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found before a crash is in the report once, and so is what comes after it."""
    async with a_world(tmp_path) as world:
        for n in range(4):
            flip(world, await put(world, f"{n}", bytes(1000)), 5)
        with monkeypatch.context() as inner:
            trap = Trap(inner, world, 9, "kill")
            job = await disturbed(world, await world.start("scrub"), trap, "kill")
        names = [line["name"] for line in report(world, job) if line["what"] == "sha-256"]
        assert names == ["3", "2", "1", "0"]


@pytest.mark.parametrize(
    ("params", "field"), [({"name": "a/b"}, "params.name"), ({"fail": 1}, "params.fail")]
)
async def test_wrong_parameters(tmp_path: Path, params: dict[str, Any], field: str) -> None:
    """They are refused at the start."""
    async with a_world(tmp_path) as world:
        with pytest.raises(SluiceError) as caught:
            await world.start("scrub", params)
        assert (caught.value.code, caught.value.field) == ("invalid-field", field)
