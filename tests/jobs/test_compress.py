"""Compressing and unpacking: what other programs read and write, bombs, damage, interruptions."""

from __future__ import annotations

import asyncio
import gzip
import os
import random
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard

from errors import SluiceError
from jobs.add import add
from jobs.kinds import Kind, _gzip, _zstd, compress, decompress, kind_of
from jobs.runners import Runners
from storage import Job
from tests.harness import FULL
from tests.jobs.disturb import (
    Exact,
    How,
    Trap,
    at_every_checkpoint,
    disturbed,
    error_of,
    nothing_new,
)
from tests.jobs.world import OWNER, World, a_kind

KIB, MIB = 1 << 10, 1 << 20
SIZES = (0, 1, 4096, 128 * KIB, _gzip.PART_BYTES, _gzip.PART_BYTES + 1, 9 * MIB + 7)


def on_the_lane(module: Any) -> Kind:
    """The kind without a process of its own: what it does is the same, and tests are quick."""
    return kind_of(SimpleNamespace(**(vars(module) | {"RUNNER": "lane"})))


def a_world(folder: Path, *, lane: bool = True, **more: Any) -> World:
    """A service that compresses and unpacks, here or where it is meant to."""
    make = on_the_lane if lane else kind_of
    return World(folder, make(compress), make(decompress), **more)


async def put(world: World, name: str, data: bytes) -> str:
    """Store a file; its id."""
    path = world.folder / "in" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return (await add(world.uploads, path, OWNER)).id


def text(size: int, seed: int = 1) -> bytes:
    """Something like a log, with some noise that does not compress."""
    dice = random.Random(seed)
    words = [dice.randbytes(6).hex().encode() for _ in range(300)]
    lines = b"\n".join(b" ".join(dice.choices(words, k=8)) for _ in range(300))
    noise = dice.randbytes(min(size, 64 * KIB))
    return (noise + lines * (size // len(lines) + 1))[:size]


def result(world: World, job: Job) -> bytes:
    """The bytes of a job's only file."""
    assert job.state == "succeeded", job.error
    assert job.result is not None
    (artifact,) = job.artifacts
    return world.published()[f"{job.result.file}/{artifact.name}"]


async def ran(world: World, kind: str, params: dict[str, Any]) -> Job:
    """Run a job to its end."""
    return await world.until(await world.start(kind, params), "succeeded", "failed", within_s=60)


class TestCompress:
    """What comes out of it."""

    @pytest.mark.parametrize("format", ["gzip", "zstd"])
    async def test_others_unpack_it(self, tmp_path: Path, format: str) -> None:
        """Python's own readers and ours get back what went in, whatever the size."""
        async with a_world(tmp_path) as world:
            for size in SIZES:
                data = text(size)
                await put(world, "in.log", data)
                job = await ran(world, "compress", {"file": "in.log", "format": format})
                packed = result(world, job)
                if format == "gzip":
                    assert gzip.decompress(packed) == data
                else:
                    reader = zstandard.ZstdDecompressor().stream_reader(
                        packed, read_across_frames=True
                    )
                    assert reader.read() == data
                assert job.result is not None
                assert job.result.data["source_bytes"] == job.progress.done == size
                assert job.result.data["bytes"] == len(packed)
                name = job.artifacts[0].name
                assert name == f"in.log{'.gz' if format == 'gzip' else '.zst'}"
                back = await ran(world, "decompress", {"file": name, "name": "back"})
                assert result(world, back) == data

    @pytest.mark.parametrize(
        ("format", "command"),
        [
            ("gzip", ["gzip", "-dc"]),
            ("gzip", ["7z", "x", "-so"]),
            ("zstd", ["zstd", "-dc"]),
        ],
    )
    async def test_real_programs_unpack_it(
        self, tmp_path: Path, format: str, command: list[str]
    ) -> None:
        """gzip, 7z and zstd give the source back, though it is made of parts."""
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not here")
        async with a_world(tmp_path) as world:
            data = text(10 * MIB)
            await put(world, "in", data)
            job = await ran(world, "compress", {"file": "in", "format": format})
            path = tmp_path / job.artifacts[0].name
            path.write_bytes(result(world, job))
            done = subprocess.run(
                [*command, str(path)], capture_output=True, check=True, timeout=60
            )
            assert done.stdout == data

    @pytest.mark.parametrize(
        ("format", "levels"), [("gzip", [1, 6, 9]), ("zstd", [1, 3, 6, 9, 12, 19])]
    )
    async def test_levels(self, tmp_path: Path, format: str, levels: list[int]) -> None:
        """A higher level is not larger; each of them can be read."""
        async with a_world(tmp_path) as world:
            data = text(600 * KIB)
            await put(world, "in", data)
            sizes = []
            for level in levels:
                params = {"file": "in", "format": format, "level": level, "name": "x"}
                packed = result(world, await ran(world, "compress", params))
                sizes.append(len(packed))
                unpack = gzip.decompress if format == "gzip" else zstandard.decompress
                assert unpack(packed) == data
            assert sizes[-1] < sizes[0] < len(data) * 0.9

    async def test_parts_cost_little(self, tmp_path: Path) -> None:
        """Parts and short blocks cost a few percent against one stream of the library."""
        async with a_world(tmp_path) as world:
            dice = random.Random(2)
            words = [b"%x" % dice.getrandbits(40) for _ in range(3000)]
            data = b" ".join(dice.choices(words, k=400_000))
            await put(world, "in", data)
            alone = {"gzip": len(gzip.compress(data, 6)), "zstd": len(zstandard.compress(data, 3))}
            for format, size in alone.items():
                job = await ran(world, "compress", {"file": "in", "format": format})
                assert len(result(world, job)) < size * 1.05

    @pytest.mark.parametrize(
        ("params", "field"),
        [
            ({}, "params.file"),
            ({"file": "a", "format": "rar"}, "params.format"),
            ({"file": "a", "level": 10}, "params.level"),
            ({"file": "a", "level": 0}, "params.level"),
            ({"file": "a", "format": "zstd", "level": 20}, "params.level"),
            ({"file": "a", "name": "../a"}, "params.name"),
        ],
    )
    async def test_wrong_parameters(
        self, tmp_path: Path, params: dict[str, Any], field: str
    ) -> None:
        """They are refused at the start, with the field."""
        async with a_world(tmp_path) as world:
            with pytest.raises(SluiceError) as caught:
                await world.start("compress", params)
            assert (caught.value.code, caught.value.field) == ("invalid-field", field)

    async def test_a_long_name_is_cut(self, tmp_path: Path) -> None:
        """The suffix stays, and no character is cut in two."""
        async with a_world(tmp_path) as world:
            await put(world, "ż" * 127, b"abc")
            job = await ran(world, "compress", {"file": "ż" * 127})
            assert job.artifacts[0].name == "ż" * 126 + ".gz"

    @pytest.mark.parametrize("format", ["gzip", "zstd"])
    @pytest.mark.parametrize("how", ["warm", "cold", "kill"])
    async def test_the_bytes_are_always_the_same(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        small: None,
        format: str,
        how: How,
    ) -> None:
        """Paused or killed at any checkpoint, it makes what it makes undisturbed."""
        data = text(18 * KIB)
        results = set()

        async def prepare(world: World) -> None:
            await put(world, "in", data)

        async def judge(world: World, job: Job) -> None:
            results.add(result(world, job))
            assert job.progress.done == len(data)
            await nothing_new(world, {"in", job.artifacts[0].name})

        count = await at_every_checkpoint(
            monkeypatch,
            lambda n: a_world(tmp_path / f"{n}", warm_s=0 if how == "cold" else 30),
            prepare,
            ("compress", {"file": "in", "format": format}),
            how,
            judge,
        )
        assert count >= 9
        assert len(results) == 1

    async def test_cancelled_anywhere_it_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
    ) -> None:
        """No file, and nothing unfinished."""

        async def prepare(world: World) -> None:
            await put(world, "in", text(20 * KIB))

        async def judge(world: World, job: Job) -> None:
            made = {"in.gz"} if job.state == "succeeded" else set()
            await nothing_new(world, {"in"} | made)

        await at_every_checkpoint(
            monkeypatch,
            lambda n: a_world(tmp_path / f"{n}"),
            prepare,
            ("compress", {"file": "in"}),
            "cancel",
            judge,
        )

    async def test_a_newer_version_is_not_mixed_in(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
    ) -> None:
        """It goes on with the version with which it began."""
        data = text(40 * KIB)

        async def run(ctx: Any, params: compress.Params) -> Any:
            if ctx.cursor is not None:
                await put(world, "in", b"new")
            return await compress.run(ctx, params)

        kind = a_kind("slow", run, Params=compress.Params)
        world = World(tmp_path, kind)
        await world.open()
        await put(world, "in", data)
        with monkeypatch.context() as inner:
            trap = Trap(inner, world, 9, "kill")
            job = await disturbed(world, await world.start("slow", {"file": "in"}), trap, "kill")
        assert gzip.decompress(result(world, job)) == data
        await world.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts and pieces of some KiB, so that a small file has many."""
    monkeypatch.setattr(compress._Gzip, "part_bytes", 8 * KIB)
    monkeypatch.setattr(compress._Zstd, "part_bytes", 8 * KIB)
    monkeypatch.setattr(compress, "_PIECE_BYTES", {"gzip": 4 * KIB, "zstd": 4 * KIB})
    monkeypatch.setattr(decompress, "_IN_BYTES", 2 * KIB)
    monkeypatch.setattr(decompress, "_OUT_BYTES", 4 * KIB)


def zframes(*parts: bytes, **more: Any) -> bytes:
    """Frames of Zstandard, one after the other."""
    return b"".join(
        zstandard.ZstdCompressor(level=3, write_checksum=True, **more).compress(part)
        for part in parts
    )


def skippable(data: bytes) -> bytes:
    """A frame that is to be skipped."""
    return struct.pack("<LL", 0x184D2A53, len(data)) + data


def streamed(data: bytes, **more: Any) -> bytes:
    """A frame whose size was not known when it began."""
    frame = zstandard.ZstdCompressor(**more).compressobj()
    return frame.compress(data) + frame.flush()


class TestDecompress:
    """What it reads."""

    @pytest.mark.parametrize(
        ("packed", "wanted"),
        [
            (gzip.compress(b"abc"), b"abc"),
            (gzip.compress(b"abc") + gzip.compress(b"") + gzip.compress(b"def"), b"abcdef"),
            (gzip.compress(b"abc") + bytes(70_000), b"abc"),
            (zframes(b"abc"), b"abc"),
            (zframes(b"abc", b"", b"def"), b"abcdef"),
            (zframes(text(300 * KIB)) + skippable(b"x" * 70_000) + zframes(b"z"), None),
            (skippable(b"") + zframes(b"abc") + skippable(b"end"), b"abc"),
            (streamed(text(3 * MIB), level=19), text(3 * MIB)),
            (streamed(bytes(3 * MIB)), bytes(3 * MIB)),
            (streamed(b""), b""),
        ],
        ids=range(10),
    )
    async def test_what_others_write(
        self, tmp_path: Path, packed: bytes, wanted: bytes | None
    ) -> None:
        """Several members or frames are one text; padding and skippable frames are nothing."""
        async with a_world(tmp_path) as world:
            await put(world, "a.bin", packed)
            job = await ran(world, "decompress", {"file": "a.bin"})
            assert result(world, job) == (text(300 * KIB) + b"z" if wanted is None else wanted)
            assert job.progress.done == len(packed)

    @pytest.mark.parametrize(
        ("command", "suffix"),
        [
            (["gzip", "-9c"], ".gz"),
            (["zstd", "-q", "-19", "-c"], ".zst"),
            (["zstd", "-q", "--ultra", "-22", "--long=27", "-c"], ".zst"),
        ],
    )
    async def test_what_real_programs_write(
        self, tmp_path: Path, command: list[str], suffix: str
    ) -> None:
        """gzip and zstd, with their largest usual windows; the name loses its suffix."""
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not here")
        data = text(5 * MIB)
        done = subprocess.run(command, input=data, capture_output=True, check=True, timeout=60)
        async with a_world(tmp_path) as world:
            await put(world, f"x.log{suffix}", done.stdout)
            job = await ran(world, "decompress", {"file": f"x.log{suffix}"})
            assert result(world, job) == data
            assert job.artifacts[0].name == "x.log"

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("a.TGZ", "a.tar"),
            ("a.tar.zst", "a.tar"),
            ("a.csv.gz", "a.csv"),
            (".gz", ".gz.out"),
            ("data", "data.out"),
        ],
    )
    async def test_names(self, tmp_path: Path, name: str, wanted: str) -> None:
        """The default name says what is inside; it has the media type of that."""
        async with a_world(tmp_path) as world:
            await put(world, name, gzip.compress(b"1,2"))
            job = await ran(world, "decompress", {"file": name})
            assert job.artifacts[0].name == wanted
            if wanted == "a.csv":
                assert job.artifacts[0].media_type == "text/csv"

    async def test_trailing_garbage_is_ignored_and_told(self, tmp_path: Path) -> None:
        """As gzip does; what was ignored stands in the result and in the log."""
        async with a_world(tmp_path) as world:
            await put(world, "a.gz", gzip.compress(b"abc") + b"\0\0garbage")
            job = await ran(world, "decompress", {"file": "a.gz"})
            assert result(world, job) == b"abc"
            assert job.result is not None
            assert job.result.data["ignored_bytes"] == 9
            lines = await world.state.lines(job.id, 0, 10)
            assert any("no gzip" in line for _, _, line in lines)

    @pytest.mark.parametrize(
        "packed",
        [
            b"",
            b"\x1f",
            b"plain text, of no use here",
            gzip.compress(text(100_000))[:-9],
            gzip.compress(text(100_000))[:-8] + bytes(8),
            gzip.compress(b"abc") + gzip.compress(b"def")[:12],
            b"\x1f\x8b\x07" + bytes(20),
            zframes(text(100_000))[:-1],
            zframes(text(100_000))[:-4] + b"abcd",
            zframes(text(100_000))[:50],
            zframes(text(300_000))[:66_000],
            zframes(b"abc") + b"garbage",
            zframes(b"abc") + skippable(b"x" * 100)[:-1],
            _zstd.MAGIC + b"\x20\x05" + b"\x07\x00\x00",
            _zstd.MAGIC + b"\x00\x58" + struct.pack("<L", (200_000 << 3) | 1)[:3] + bytes(10),
        ],
        ids=range(15),
    )
    async def test_damage(self, tmp_path: Path, packed: bytes) -> None:
        """What is cut short, changed or no such file at all fails the job, and leaves nothing."""
        async with a_world(tmp_path) as world:
            await put(world, "a.x", packed)
            error = error_of(await ran(world, "decompress", {"file": "a.x"}))
            assert (error["code"], error["field"]) == ("invalid-data", "params.file")
            assert error["detail"].startswith("a.x ")
            await nothing_new(world, {"a.x"})

    async def test_any_changed_byte_is_seen(self, tmp_path: Path) -> None:
        """A bit that flips anywhere never gives another text (as it can in a gzip header)."""
        data = text(3000)
        async with a_world(tmp_path) as world:
            for name, packed in (("gz", gzip.compress(data, mtime=0)), ("zst", zframes(data))):
                dice = random.Random(7)
                for at in sorted(dice.sample(range(len(packed)), 12 if not FULL else 100)):
                    wrong = bytearray(packed)
                    wrong[at] ^= 1 << dice.randrange(8)
                    await put(world, "wrong", bytes(wrong))
                    job = await ran(world, "decompress", {"file": "wrong", "name": f"{name}.out"})
                    assert job.state == "failed" or result(world, job) == data

    @pytest.mark.parametrize("format", ["gzip", "zstd"])
    async def test_bombs(self, tmp_path: Path, format: str) -> None:
        """Too much, or too much of too little, ends the job early and leaves nothing."""
        zeros = bytes(64 * MIB)
        if format == "gzip":
            bomb = gzip.compress(zeros)
        else:
            bomb = zframes(zeros)
        async with a_world(tmp_path) as world:
            await put(world, "bomb", bomb)
            for more, word in (({}, "max_ratio"), ({"max_bytes": 1000}, "max_bytes")):
                error = error_of(await ran(world, "decompress", {"file": "bomb"} | more))
                assert error["code"] == "too-large"
                assert word in error["detail"]
                await nothing_new(world, {"bomb"})
            limits = {"max_ratio": 100_000, "max_bytes": 64 * MIB}
            job = await ran(world, "decompress", {"file": "bomb"} | limits)
            assert result(world, job) == zeros

    async def test_a_window_that_is_too_large(self, tmp_path: Path) -> None:
        """A frame that needs more memory than zstd itself allows is refused before it is read."""
        header = _zstd.MAGIC + bytes([0, (28 - 10) << 3]) + b"\x01\x00\x00"
        single = _zstd.MAGIC + bytes([0xE0]) + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00"
        async with a_world(tmp_path) as world:
            for data in (header, single):
                await put(world, "wide", data)
                error = error_of(await ran(world, "decompress", {"file": "wide"}))
                assert error["code"] == "too-large"
                assert "memory" in error["detail"]

    @pytest.mark.parametrize("format", ["gzip", "zstd"])
    async def test_no_step_makes_more_than_it_may(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
    ) -> None:
        """Even of a bomb no more than 256 KiB are in memory at once."""
        sizes = []
        original = decompress._judge

        def judge(params: Any, made: int, read: int) -> None:
            sizes.append(made)
            original(params, made, read)

        monkeypatch.setattr(decompress, "_judge", judge)
        zeros = bytes(16 * MIB)
        async with a_world(tmp_path) as world:
            await put(world, "bomb", gzip.compress(zeros) if format == "gzip" else zframes(zeros))
            await ran(world, "decompress", {"file": "bomb"})
        steps = [b - a for a, b in zip([0, *sizes], sizes, strict=False)]
        assert max(steps) <= 256 * KIB
        assert sum(steps) == 16 * MIB

    @pytest.mark.parametrize("format", ["gzip", "zstd"])
    @pytest.mark.parametrize("how", ["warm", "cold", "kill", "cancel"])
    async def test_any_interruption(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        small: None,
        format: str,
        how: How,
    ) -> None:
        """Paused or killed at any checkpoint it makes the same; cancelled it leaves nothing."""
        parts = [text(6 * KIB, seed) for seed in range(2)]
        packed = b"".join(map(gzip.compress, parts)) if format == "gzip" else zframes(*parts)

        async def prepare(world: World) -> None:
            await put(world, "in", packed)

        async def judge(world: World, job: Job) -> None:
            if job.state == "succeeded":
                assert result(world, job) == b"".join(parts)
                assert job.progress.done == len(packed)
                await nothing_new(world, {"in", "in.out"})
            else:
                assert (job.state, how) == ("cancelled", "cancel")
                await nothing_new(world, {"in"})

        count = await at_every_checkpoint(
            monkeypatch,
            lambda n: a_world(tmp_path / f"{n}", warm_s=0 if how == "cold" else 30),
            prepare,
            ("decompress", {"file": "in"}),
            how,
            judge,
        )
        assert count >= 5


@pytest.mark.bench
@pytest.mark.parametrize(
    "params",
    [{"format": "gzip"}, {"format": "zstd"}, {"format": "zstd", "level": 9}],
    ids=["gzip", "zstd", "zstd-9"],
)
async def test_the_loop_stays_free(tmp_path: Path, params: dict[str, Any]) -> None:
    """While a file is compressed and unpacked, the loop turns every few milliseconds."""
    gaps: list[float] = []

    async def watch() -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(0)
            now = loop.time()
            gaps.append(now - last)
            last = now

    async with a_world(tmp_path, lane=False) as world:
        await put(world, "in", os.urandom(MIB) + text(7 * MIB))
        watching = asyncio.ensure_future(watch())
        job = await ran(world, "compress", {"file": "in"} | params)
        await ran(world, "decompress", {"file": job.artifacts[0].name})
        watching.cancel()
    gaps.sort()
    assert gaps[int(len(gaps) * 0.99)] < 0.01, f"{gaps[-5:]}"


@pytest.mark.parametrize(("format", "number"), [("gzip", 600), ("zstd", 100)])
async def test_paused_in_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, number: int
) -> None:
    """Warm, cold, and over a crash the process makes the bytes that the lane makes."""
    monkeypatch.setattr(Runners, "process", Exact)
    data = text(18 * MIB)
    params = {"file": "in", "format": format, "level": 9}
    hows: list[How] = ["warm", "cold", "kill"]
    async with a_world(tmp_path, lane=False) as world:
        await put(world, "in", data)
        alone = result(world, await ran(world, "compress", params))
        for how in hows:
            world.warm_s = world.runners.warm_s = 0 if how == "cold" else 30
            with monkeypatch.context() as inner:
                trap = Trap(inner, world, number, how)
                job = await disturbed(world, await world.start("compress", params), trap, how)
            assert trap.sprung.is_set()
            assert result(world, job) == alone
        assert len(world.children) == 0


def test_the_magic_is_not_taken_for_another() -> None:
    """Only what begins a frame does."""
    assert _zstd.is_frame(zlib.compress(b"")[:4]) is False
    assert _zstd.is_frame(b"\x5f\x2a\x4d\x18")
    assert not _zstd.is_frame(b"\x60\x2a\x4d\x18")
    assert not _zstd.is_frame(b"")
