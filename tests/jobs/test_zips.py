"""Zips that are made while they are read: the layout against other programs, and the reader."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import random
import subprocess
import unicodedata
import zipfile
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import SluiceError
from jobs.zips import Layout, Member, Names, ZipReader, Zips, load, safe_name
from storage import Blobs, File
from storage.blobs_local import LocalBlobs
from tests.conftest import need

GIB = 1 << 30
AT = 1_790_000_001  # 2026-09-21 14:13:21 UTC
DOS_TIME = (2026, 9, 21, 14, 13, 20)


def layout_of(files: list[tuple[str, bytes]], at: int = AT) -> Layout:
    """The layout of a zip of these names and contents."""
    layout = Layout()
    for number, (name, data) in enumerate(files):
        layout.add(Member(f"f{number}", name, len(data), at, zlib.crc32(data)))
    return layout


def made(layout: Layout, contents: list[bytes], start: int = 0, end: int | None = None) -> bytes:
    """The bytes ``[start, end)`` of a zip."""
    found = bytearray()
    end = layout.size_bytes if end is None else end
    while start + len(found) < end:
        data, number, offset = layout.part(start + len(found))
        if number is not None:
            data = contents[number][offset:]
        assert data
        found += data
    return bytes(found[: end - start])


class Sparse(io.RawIOBase):
    """A zip whose members are zeros, for zipfile; headers are made, and members never."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._at = 0

    def seekable(self) -> bool:
        """See io."""
        return True

    def readable(self) -> bool:
        """See io."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """See io."""
        self._at = (0, self._at, self._layout.size_bytes)[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """See io."""
        if self._at >= self._layout.size_bytes:
            return 0
        data, number, offset = self._layout.part(self._at)
        if number is not None:
            data = bytes(min(len(buffer), self._layout.members[number].bytes - offset))
        n = min(len(data), len(buffer))
        buffer[:n] = data[:n]
        self._at += n
        return n


NAMES = ["a.txt", "żółw 🐢 数据.csv", ".hidden", "x" * 255, "é" * 127, "no ending", "a b; c.d.e"]


class TestLayout:
    """What lies where, and whether others read it."""

    def test_zipfile_reads_it(self) -> None:
        """Names, contents, times and modes come out as they went in."""
        files = [(name, name.encode() * n) for n, name in enumerate(NAMES)]
        data = made(layout_of(files), [content for _, content in files])
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.testzip() is None
            assert [info.filename for info in archive.infolist()] == NAMES
            for info, (_, content) in zip(archive.infolist(), files, strict=True):
                assert archive.read(info) == content
                assert info.date_time == DOS_TIME
                assert info.compress_type == zipfile.ZIP_STORED
                assert info.external_attr >> 16 == 0o100644
                assert info.flag_bits == 1 << 11

    @pytest.mark.parametrize(
        ("program", "arguments"), [("unzip", ["-t"]), ("bsdtar", ["-xOf"]), ("7z", ["t"])]
    )
    def test_other_programs_read_it(
        self, tmp_path: Path, program: str, arguments: list[str]
    ) -> None:
        """No program finds anything wrong with it."""
        files = [(name, name.encode() * n) for n, name in enumerate(NAMES)]
        path = tmp_path / "files.zip"
        path.write_bytes(made(layout_of(files), [content for _, content in files]))
        done = subprocess.run(
            [need(program), *arguments, str(path)], capture_output=True, check=False
        )
        assert done.returncode == 0, done
        if program == "bsdtar":
            assert done.stdout == b"".join(content for _, content in files)

    def test_unpacked_files_have_name_time_and_mode(self, tmp_path: Path) -> None:
        """The extra field brings the exact second in UTC, whatever the zone of who unpacks."""
        (tmp_path / "files.zip").write_bytes(made(layout_of([("ü 🐢.txt", b"abc")]), [b"abc"]))
        subprocess.run(
            [need("unzip"), "-q", "files.zip"],
            cwd=tmp_path,
            check=True,
            env={"TZ": "Asia/Tokyo", "LC_ALL": "C.UTF-8"},
        )
        status = (tmp_path / "ü 🐢.txt").stat()
        assert int(status.st_mtime) == AT
        assert status.st_mode & 0o777 == 0o644

    @pytest.mark.parametrize(
        ("at", "date_time"),
        [
            (-5, (1980, 1, 1, 0, 0, 0)),
            (0, (1980, 1, 1, 0, 0, 0)),
            (315_532_800, (1980, 1, 1, 0, 0, 0)),
            (315_532_803, (1980, 1, 1, 0, 0, 2)),
            ((1 << 31) + 1, (2038, 1, 19, 3, 14, 8)),
            (4_354_819_199, (2107, 12, 31, 23, 59, 58)),
            (9_000_000_000, (2107, 12, 31, 23, 59, 58)),
        ],
    )
    def test_any_time(self, at: int, date_time: tuple[int, ...]) -> None:
        """Times that the format can't say become the nearest that it can."""
        data = made(layout_of([("a", b"abc")], at), [b"abc"])
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.testzip() is None
            assert archive.infolist()[0].date_time == date_time

    @settings(deadline=None, max_examples=60)
    @given(
        st.lists(st.tuples(st.sampled_from(NAMES), st.binary(max_size=60)), max_size=9), st.data()
    )
    def test_any_range_is_a_slice(self, files: list[tuple[str, bytes]], dice: Any) -> None:
        """Whatever the members: a part that is made alone is a slice of the whole."""
        layout, contents = layout_of(files), [content for _, content in files]
        whole = made(layout, contents)
        assert len(whole) == layout.size_bytes
        start = dice.draw(st.integers(0, len(whole)))
        end = dice.draw(st.integers(start, len(whole)))
        assert made(layout, contents, start, end) == whole[start:end]

    def test_the_bytes_never_change(self) -> None:
        """A download may go on after an upgrade: the same members are the same zip for ever."""
        files = [(name, name.encode() * n) for n, name in enumerate(NAMES)]
        data = made(layout_of(files), [content for _, content in files])
        assert hashlib.sha256(data).hexdigest() == (
            "34e644470696c94cfa424205c82c026eb98060f9bc9363daac93bb3e8ee22c76"
        )
        large = Layout()
        for number, size in enumerate([5 * GIB, 7]):
            large.add(Member(f"f{number}", f"{number}", size, AT, number))
        heads = made(large, [], large._body_bytes) + large.part(0)[0]
        assert hashlib.sha256(heads).hexdigest() == (
            "aa4cea67f40419cee375c305f3748be99c753eedceaa988ba7301fee62287218"
        )

    def test_70_000_members(self, tmp_path: Path) -> None:
        """More than 65,535 entries need Zip64's end, and other programs understand it."""
        files = [(f"{n}.txt", b"%d" % n) for n in range(70_000)]
        data = made(layout_of(files), [content for _, content in files])
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert len(archive.infolist()) == 70_000
            assert archive.read("69999.txt") == b"69999"
        path = tmp_path / "files.zip"
        path.write_bytes(data)
        for program in (["unzip", "-tqq"], ["7z", "t", "-bso0"]):
            assert (
                subprocess.run([need(program[0]), *program[1:], path], check=False).returncode == 0
            )

    @pytest.mark.parametrize("count", [65_534, 65_535, 65_536])
    def test_the_edge_of_16_bits(self, count: int) -> None:
        """65,535 is Zip64's mark in the end record, so that count needs it already."""
        layout = layout_of([(f"{n}", b"") for n in range(count)])
        end = made(layout, [b""] * count, layout.size_bytes - 98)
        assert (b"PK\6\6" in end) == (count >= 65_535)
        with zipfile.ZipFile(io.BufferedReader(Sparse(layout))) as archive:
            assert len(archive.infolist()) == count

    @pytest.mark.parametrize(
        "sizes",
        [
            [4 * GIB - 2, 1],
            [4 * GIB - 1, 1],
            [4 * GIB, 1],
            [3 * GIB, 3 * GIB, 5 * GIB, 7, 0],
            [1 << 42, 1 << 43],
            [4 * GIB - 46, 1],  # the next header begins at 4 GiB - 1, or about there
            [4 * GIB - 42, 1],
            [4 * GIB - 41, 1],
            [4 * GIB - 40, 1],
            [4 * GIB - 39, 1],
        ],
    )
    def test_large_members_and_far_ones(self, sizes: list[int]) -> None:
        """Sizes and offsets from 4 GiB - 1 on stand in Zip64 fields, all others do not."""
        layout = Layout()
        for number, size in enumerate(sizes):
            crc32 = zlib.crc32(bytes(min(size, 9)))  # nobody reads the large ones to their end
            layout.add(Member(f"f{number}", f"{number}", size, AT, crc32))
        with zipfile.ZipFile(io.BufferedReader(Sparse(layout))) as archive:
            infos = archive.infolist()
            assert [info.file_size for info in infos] == sizes
            offset = 0
            for info, size in zip(infos, sizes, strict=True):
                assert info.header_offset == offset
                large, far = size >= 0xFFFFFFFF, offset >= 0xFFFFFFFF
                assert info.extract_version == (45 if large or far else 20)
                assert (b"\1\0" + bytes([16 * large + 8 * far]) in info.extra) == (large or far)
                local, _, _ = layout.part(offset)
                assert len(local) == 30 + 1 + 9 + 20 * large
                with archive.open(info) as member:  # zipfile checks the rest of it
                    assert member.read(9) == bytes(min(size, 9))
                offset += 30 + 1 + 9 + (20 if large else 0) + size


class TestNames:
    """Safe and unique."""

    def test_duplicates_are_numbered(self) -> None:
        """The second of a name gets a (2), before the ending."""
        names = Names()
        given = [names.give(name) for name in ("a.csv", "a.csv", "a.csv", "b", "b", "a (2).csv")]
        assert given == ["a.csv", "a (2).csv", "a (3).csv", "b", "b (2)", "a (2) (2).csv"]

    def test_disks_that_ignore_case(self) -> None:
        """Names that some disk takes for one are different afterwards."""
        names = Names()
        given = [
            names.give(name) for name in ("A.txt", "a.TXT", "é", unicodedata.normalize("NFD", "é"))
        ]
        assert given == ["A.txt", "a (2).TXT", "é", unicodedata.normalize("NFD", "é") + " (2)"]

    @pytest.mark.parametrize(
        ("name", "safe"),
        [
            ("/etc/passwd", "_/etc/passwd"),
            ("a/../../b", "a/_../_../b"),
            ("a/C:x/\\/b", "a/C_x/_/b"),
            ("..", "_.."),
            (".", "_."),
            ("..\\..\\x", ".._.._x"),
            ("C:evil", "C_evil"),
            ("12:30.log", "12:30.log"),
            ("a\nb\0c", "a_b_c"),
            ("", "_"),
            ("ü 🐢.txt", "ü 🐢.txt"),
        ],
    )
    def test_no_name_escapes(self, name: str, safe: str) -> None:
        """What could lead out of a folder, on whatever system, does so no more."""
        assert safe_name(name) == safe

    @given(
        st.lists(
            st.sampled_from(["x" * 255, "é" * 127, "a.txt", "A.TXT", "d/a.txt", "d/A.txt"])
            | st.text(max_size=9)
        )
    )
    def test_any_names(self, raw: list[str]) -> None:
        """However they come: unique without case, of plain components that are no longer than 255
        bytes, and the same if they are given in two goes."""
        first, names = Names(), []
        for name in raw:
            names.append(first.give(name))
        assert len({name.casefold() for name in names}) == len(raw)
        for part in (part for name in names for part in name.split("/")):
            assert 0 < len(part.encode()) <= 255
            assert part not in (".", "..")
            assert not set(part) & set("\\\0\n")
        half = len(raw) // 2
        again = Names()
        for name in names[:half]:
            again.take(name)
        assert [again.give(name) for name in raw[half:]] == names[half:]


async def a_zip(blobs: Blobs, files: list[tuple[str, bytes]], extra: bytes = b"") -> File:
    """An archive of these files, as a job leaves it."""
    layout = layout_of(files)
    lines = b"".join(msgspec.json.encode(member) + b"\n" for member in layout.members)
    for number, (_, data) in enumerate(files):
        await put(blobs, f"f{number}", data)
        await blobs.publish(f"f{number}", "data")
        await blobs.link("zip", f"f{number}", "data")
        await blobs.discard(f"f{number}")
    await put(blobs, "zip", lines + extra)
    await blobs.publish("zip", "files.zip")
    return File(
        id="zip",
        name="files.zip",
        bytes=layout.size_bytes,
        media_type="application/zip",
        owner="ann",
        job=None,
        created_at=0,
        layout="zip",
    )


async def put(blobs: Blobs, blob_id: str, data: bytes) -> None:
    """An unfinished blob."""
    writer = await blobs.writer(blob_id, 1)
    await writer.write(memoryview(data))
    await writer.close()


async def read(reader: ZipReader, start: int, end: int) -> bytes:
    """Bytes of an open archive, by as many calls as it takes."""
    found = b""
    while start + len(found) < end:
        piece = await reader.read(start + len(found), end - start - len(found))
        assert piece
        found += piece
    return found


class TestReader:
    """Over members in a folder."""

    async def test_any_range(self, tmp_path: Path) -> None:
        """Ranges at random, across headers and members of every size, are slices of the whole."""
        dice = random.Random(1)
        sizes = [0, 1, 70_000, 0, 400_000, 3]
        files = [(f"{n}.bin", dice.randbytes(size)) for n, size in enumerate(sizes)]
        blobs = LocalBlobs(tmp_path, "never")
        await blobs.open()
        file = await a_zip(blobs, files)
        reader = await Zips(blobs).reader(file)
        whole = made(layout_of(files), [data for _, data in files])
        assert reader.size_bytes == file.bytes == len(whole)
        assert reader.fileno() is None
        assert await read(reader, 0, file.bytes) == whole
        for _ in range(300):
            start = dice.randrange(file.bytes)
            end = min(file.bytes, start + dice.choice([1, 50, 5_000, 300_000]))
            assert await read(reader, start, end) == whole[start:end]
        assert await reader.read(file.bytes, 10) == b""
        assert await reader.read(file.bytes + 99, 10) == b""
        assert await reader.read(5, 0) == b""
        await reader.close()
        await reader.close()
        await blobs.close()

    async def test_one_member_is_open_at_a_time(self, tmp_path: Path) -> None:
        """An archive costs one descriptor while it is read, and none afterwards."""
        blobs = LocalBlobs(tmp_path, "never")
        await blobs.open()
        before = len(os.listdir("/proc/self/fd"))
        file = await a_zip(blobs, [(f"{n}", b"abc") for n in range(50)])
        reader = await Zips(blobs).reader(file)
        for at in range(0, file.bytes, 7):
            await reader.read(at, 7)
            assert len(os.listdir("/proc/self/fd")) <= before + 1
        await reader.close()
        assert len(os.listdir("/proc/self/fd")) == before
        await blobs.close()

    async def test_a_long_archive_does_not_hold_the_loop(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Opening 30,000 members, and reading their directory, is cut into slices."""
        monkeypatch.setattr("jobs.zips._SLICE_S", 0.0001)  # short, so that any machine needs some
        layout = layout_of([(f"file number {n}.txt", b"") for n in range(30_000)])
        blobs = LocalBlobs(tmp_path, "never")
        await blobs.open()
        file = await a_zip(blobs, [("a", b"abc")])
        await put(blobs, "long", b"".join(msgspec.json.encode(m) + b"\n" for m in layout.members))
        manifest = await blobs.reader("long", None)
        turns = 0

        async def watch() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        watcher = asyncio.ensure_future(watch())
        loaded = await load(manifest)
        watcher.cancel()
        await asyncio.wait([watcher])
        assert turns > 3  # it was let on in between
        bundle = await blobs.bundle(file.id)
        reader = ZipReader(loaded, bundle)
        pieces = []
        at = loaded.size_bytes - 500_000
        while piece := await reader.read(at, 1 << 20):
            pieces.append(len(piece))
            at += len(piece)
        assert len(pieces) > 3  # the directory in slices, too, and none of 256 KiB
        assert max(pieces) < 256 << 10
        await reader.close()
        await manifest.close()
        await blobs.close()

    async def test_a_cut_line_is_no_member(self, tmp_path: Path) -> None:
        """A manifest whose last line was cut off in the middle is read without it."""
        blobs = LocalBlobs(tmp_path, "never")
        await blobs.open()
        member = msgspec.json.encode(Member("f", "a", 1, AT))
        await put(blobs, "zip", member + b'\n["crc-32",0,17]\n' + member[:9])
        manifest = await blobs.reader("zip", None)
        layout = await load(manifest)
        await manifest.close()
        assert [(m.name, m.crc32) for m in layout.members] == [("a", 17)]
        await blobs.close()

    @pytest.mark.parametrize(
        "line", [b"rubbish\n", b'["crc-32",5,1]\n', b'["file",1]\n', b"\xff\n"]
    )
    async def test_a_damaged_manifest(self, tmp_path: Path, line: bytes) -> None:
        """It is refused, and nothing stays open."""
        blobs = LocalBlobs(tmp_path, "never")
        await blobs.open()
        file = await a_zip(blobs, [("a", b"abc")], line)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(SluiceError) as caught:
            await Zips(blobs).reader(file)
        assert caught.value.code == "storage-failed"
        assert len(os.listdir("/proc/self/fd")) == before
        await blobs.discard("zip")
        await blobs.close()
        assert not list((tmp_path / "tmp").iterdir())  # no bundle holds the members either

    async def test_a_member_that_is_shorter_than_it_was(self, tmp_path: Path) -> None:
        """It ends the reading with an error: no other bytes are put in its place."""
        blobs = LocalBlobs(tmp_path, "never")
        await blobs.open()
        file = await a_zip(blobs, [("a", b"abcdef"), ("b", b"x")])
        os.truncate(tmp_path / "members/zip/f0", 3)
        reader = await Zips(blobs).reader(file)
        with pytest.raises(SluiceError) as caught:
            await read(reader, 0, file.bytes)
        assert caught.value.code == "storage-failed"
        await reader.close()
        await blobs.close()

    async def test_layouts_are_kept_for_the_next_range(self, tmp_path: Path) -> None:
        """A second reader needs no manifest; of many archives the oldest is forgotten."""
        blobs = LocalBlobs(tmp_path, "never")
        await blobs.open()
        file = await a_zip(blobs, [("a", b"abc")])
        zips = Zips(blobs)
        first = await zips.reader(file)
        second = await zips.reader(file)
        assert first._layout is second._layout
        for number in range(9):
            await put(blobs, f"z{number}", b"")
            await blobs.publish(f"z{number}", "files.zip")
            await blobs.link(f"z{number}", "zip", "files.zip")
            other = msgspec.structs.replace(file, id=f"z{number}")
            await (await zips.reader(other)).close()
        assert len(zips._layouts) == 4
        third = await zips.reader(file)
        assert third._layout is not first._layout
        for reader in (first, second, third):
            assert len(await read(reader, 0, file.bytes)) == file.bytes
            await reader.close()
        await blobs.close()
