"""What is special about bytes in a folder: its layout, its removals, its failures."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import storage.blobs_local
from errors import SluiceError
from storage.blobs_local import LocalBlobs, refusal
from tests.storage.conformance_blobs import MIB, content, put


@pytest.fixture
def blobs(tmp_path: Path, runner: asyncio.Runner) -> Iterator[LocalBlobs]:
    """An empty folder, open."""
    blobs = LocalBlobs(tmp_path / "data")
    runner.run(blobs.open())
    yield blobs
    runner.run(blobs.close())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the bytes are."""
    return tmp_path / "data"


def held(folder: Path) -> list[str]:
    """Open descriptors of this process on files in the folder, removed ones too."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:  # the one that listed
            continue
        if path.startswith(str(folder)):
            found.append(path)
    return found


def spy(patch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """The arguments of each call of a function of ``os``, which is made all the same."""
    calls: list[tuple[Any, ...]] = []
    real = getattr(os, name)

    def called(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    patch.setattr(os, name, called)
    return calls


class TestLayout:
    """What lies where."""

    async def test_files_are_found_by_people(self, blobs: LocalBlobs, folder: Path) -> None:
        """A published file lies under its own name, an unfinished one under its id."""
        await put(blobs, "b1", b"abc")
        assert (folder / "tmp/b1").read_bytes() == b"abc"
        await blobs.publish("b1", "żółw.csv")
        assert (folder / "uploads/b1/żółw.csv").read_bytes() == b"abc"
        assert not list((folder / "tmp").iterdir())

    async def test_nothing_is_left_behind(self, blobs: LocalBlobs, folder: Path) -> None:
        """Discarding takes the blob's folder along."""
        await put(blobs, "b1", b"abc")
        await blobs.publish("b1", "data.csv")
        await blobs.discard("b1")
        assert sorted(path.name for path in folder.rglob("*")) == ["tmp", "uploads"]

    async def test_a_crash_between_folder_and_rename(self, blobs: LocalBlobs, folder: Path) -> None:
        """An empty folder of an interrupted publishing does not stop the next one."""
        await put(blobs, "b1", b"abc")
        (folder / "uploads/b1").mkdir()
        assert not await blobs.unpublish("b1")
        (folder / "uploads/b1").mkdir()
        assert await blobs.publish("b1", "data.csv") == 3

    async def test_sweep_leaves_what_is_no_blob(self, blobs: LocalBlobs, folder: Path) -> None:
        """A folder that somebody made among the blobs is not the sweep's."""
        (folder / "tmp/somebody's").mkdir()
        assert await blobs.sweep([]) == 0
        assert (folder / "tmp/somebody's").is_dir()

    async def test_no_descriptor_leaks(self, blobs: LocalBlobs, folder: Path) -> None:
        """All calls together, also those that are refused, leave nothing open."""
        for i in range(3):
            await put(blobs, f"b{i}", b"abc")
        for offset in (4, 99):
            with pytest.raises(SluiceError):
                await blobs.writer("b1", 1, offset=offset)
        await content(blobs, "b1")
        await blobs.publish("b1", "data.csv")
        await blobs.concat("all", [("b0", None), ("b1", "data.csv")])
        with pytest.raises(SluiceError):
            await blobs.concat("all", [("b0", None), ("unknown", None)])
        reader = await blobs.reader("b1", "data.csv")
        await blobs.discard("b1")
        assert len(held(folder)) == 1
        await reader.close()
        await blobs.sweep([])
        assert held(folder) == []


class TestRemoving:
    """Big files, as sparse ones: their size costs nothing here."""

    async def test_big_files_go_in_slices(
        self, blobs: LocalBlobs, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The name goes at once, the bytes in steps of 16 MiB between which the loop turns."""
        cuts = spy(monkeypatch, "ftruncate")
        await put(blobs, "b1", b"abc")
        os.truncate(folder / "tmp/b1", 300 * MIB)
        await blobs.publish("b1", "data.csv")
        before = len(cuts)
        await blobs.discard("b1")
        assert not (folder / "uploads/b1").exists()
        assert len(cuts) == before
        turns = 0
        while held(folder):
            turns += 1
            await asyncio.sleep(0.001)
        sizes = [size for _, size in cuts[before:]]
        assert sizes == [*(n * MIB for n in range(284, 0, -16)), 0]
        assert turns >= 4

    async def test_close_waits_for_removals(self, blobs: LocalBlobs, folder: Path) -> None:
        """When the store is closed, the bytes that were discarded are gone."""
        for i in range(3):
            await put(blobs, f"b{i}", b"abc")
            os.truncate(folder / f"tmp/b{i}", 200 * MIB)
            await blobs.discard(f"b{i}")
        assert len(held(folder)) == 3
        await blobs.close()
        assert held(folder) == []

    async def test_a_big_file_is_not_cut_while_it_is_read(
        self, blobs: LocalBlobs, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of several readers the last one frees the bytes, and each reads to the end."""
        await put(blobs, "b1", b"begin")
        os.truncate(folder / "tmp/b1", 200 * MIB)
        writer = await blobs.writer("b1", 1, offset=200 * MIB)
        await writer.write(memoryview(b"end"))
        await writer.close()
        await blobs.publish("b1", "data.csv")
        cuts = spy(monkeypatch, "ftruncate")
        first, second = [await blobs.reader("b1", "data.csv") for _ in range(2)]
        await blobs.discard("b1")
        await asyncio.sleep(0.02)
        assert await first.read(200 * MIB, 9) == b"end"
        await first.close()
        await asyncio.sleep(0.02)
        assert cuts == []
        assert await second.read(0, 5) == b"begin"
        assert await second.read(200 * MIB, 9) == b"end"
        await second.close()
        await blobs.close()
        assert len(cuts) == 13  # 200 MiB and a little, by 16 MiB
        assert held(folder) == []

    async def test_a_reader_of_another_blob_does_not_matter(
        self, blobs: LocalBlobs, folder: Path
    ) -> None:
        """Only readers of the blob itself hold its bytes."""
        await put(blobs, "other", b"abc")
        reader = await blobs.reader("other", None)
        await put(blobs, "b1", b"abc")
        os.truncate(folder / "tmp/b1", 100 * MIB)
        await blobs.discard("b1")
        await blobs.close()
        assert len(held(folder)) == 1
        await reader.close()


class TestDurability:
    """What is forced to the disk, and when."""

    @pytest.mark.parametrize(
        ("durability", "synced", "folders"), [("interval", 1, 2), ("always", 1, 2), ("never", 0, 0)]
    )
    async def test_syncs(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        durability: str,
        synced: int,
        folders: int,
    ) -> None:
        """A sync forces the file, publishing forces both folders, unless it shall never be."""
        files, names = spy(monkeypatch, "fdatasync"), spy(monkeypatch, "fsync")
        blobs = LocalBlobs(tmp_path, durability)
        await blobs.open()
        await put(blobs, "b1", b"abc")
        assert len(files) == synced
        await blobs.concat("all", [("b1", None)])
        assert len(files) == 2 * synced
        await blobs.publish("b1", "data.csv")
        assert len(names) == folders
        await blobs.close()

    @pytest.mark.parametrize(("durability", "handed"), [("interval", True), ("never", False)])
    async def test_pages_are_handed_to_the_disk_early(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str, handed: bool
    ) -> None:
        """After each MiB the disk gets what was written, every byte once."""
        ranges: list[tuple[int, int]] = []
        monkeypatch.setattr(
            storage.blobs_local,
            "_sync_file_range",
            lambda _fd, start, n, _flags: ranges.append((start, n)),
        )
        blobs = LocalBlobs(tmp_path, durability)
        await blobs.open()
        writer = await blobs.writer("b1", 1)
        for _ in range(40):
            await writer.write(memoryview(bytes(100_000)))
        await writer.close()
        assert bool(ranges) == handed
        if handed:
            starts = [start for start, _ in ranges]
            ends = [start + n for start, n in ranges]
            assert starts == [0, *ends[:-1]]
            assert all(n >= MIB for _, n in ranges)
            assert 4_000_000 - ends[-1] < MIB
        await blobs.close()


class TestFailing:
    """Disks that are full, missing or broken."""

    @pytest.mark.parametrize(
        ("number", "code"),
        [
            (errno.ENOSPC, "disk-full"),
            (errno.EDQUOT, "disk-full"),
            (errno.ENOENT, "storage-missing"),
            (errno.EROFS, "storage-missing"),
            (errno.EACCES, "storage-missing"),
            (errno.EIO, "storage-failed"),
            (errno.EMFILE, "storage-failed"),
        ],
    )
    def test_what_an_error_means(self, number: int, code: str) -> None:
        """Each error of the system has its place in the catalogue, and no path comes along."""
        found = refusal(OSError(number, "?", "/secret/path"))
        assert found.code == code
        assert "secret" not in str(found.problem())

    @pytest.mark.parametrize(
        "call",
        [
            lambda blobs: blobs.writer("b1", 1),
            lambda blobs: blobs.writer("b1", 1, offset=3),
            lambda blobs: blobs.writer("b1", 1, length=3),
            lambda blobs: blobs.size("b1"),
            lambda blobs: blobs.publish("b1", "data.csv"),
            lambda blobs: blobs.reader("b1", None),
            lambda blobs: blobs.reader("b2", "data.csv"),
            lambda blobs: blobs.concat("all", [("b1", None)]),
            lambda blobs: blobs.sweep([]),
            lambda blobs: blobs.free_bytes(),
        ],
        ids=lambda call: call.__code__.co_names[0],
    )
    async def test_the_folder_is_gone(
        self, blobs: LocalBlobs, folder: Path, call: Callable[[LocalBlobs], Awaitable[object]]
    ) -> None:
        """A disk that is not there is no missing file: it says so, names no path, and heals."""
        await put(blobs, "b1", b"abc")
        await put(blobs, "b2", b"abc")
        await blobs.publish("b2", "data.csv")
        folder.rename(folder.with_name("away"))
        with pytest.raises(SluiceError) as caught:
            await call(blobs)
        assert caught.value.code == "storage-missing"
        assert str(folder) not in str(caught.value.problem())
        await blobs.discard("b1")
        folder.with_name("away").rename(folder)
        assert await content(blobs, "b1") == b"abc"
        assert await content(blobs, "b2", "data.csv") == b"abc"

    async def test_a_folder_that_can_not_be_made(self, tmp_path: Path) -> None:
        """Opening says that the place can't be used, without its path."""
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(SluiceError) as caught:
            await LocalBlobs(tmp_path / "file/data").open()
        assert caught.value.code == "storage-missing"
        assert str(tmp_path) not in str(caught.value)

    async def test_a_write_that_was_cut_short_is_taken_back(
        self, blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the disk takes half of a piece, the blob ends where the last whole one ended."""
        writer = await blobs.writer("b1", 1)
        await writer.write(memoryview(b"whole"))
        real = os.pwrite

        def half(fd: int, view: memoryview, offset: int) -> int:
            if len(view) < 4:
                raise OSError(errno.ENOSPC, "full")
            return real(fd, view[: len(view) // 2], offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", half)
            with pytest.raises(SluiceError) as caught:
                await writer.write(memoryview(b"0123456789"))
        assert caught.value.code == "disk-full"
        assert await content(blobs, "b1") == b"whole"
        assert await writer.write(memoryview(b"!")) == 6
        await writer.close()
        assert await content(blobs, "b1") == b"whole!"

    async def test_a_blob_that_can_not_be_discarded_is_an_error(
        self, blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bytes that stay are not reported as gone: a later attempt can still remove them."""
        await put(blobs, "b1", b"abc")

        def refuse(*_: Any) -> int:
            raise OSError(errno.EMFILE, "too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            with pytest.raises(SluiceError) as caught:
                await blobs.discard("b1")
        assert caught.value.code == "storage-failed"
        await blobs.discard("b1")
        assert await blobs.size("b1") is None

    async def test_a_sync_that_fails_is_an_error(
        self, blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No offset is called durable that the disk refused."""
        writer = await blobs.writer("b1", 1)
        await writer.write(memoryview(b"abc"))

        def refuse(_: int) -> None:
            raise OSError(errno.EIO, "broken")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", refuse)
            with pytest.raises(SluiceError) as caught:
                await writer.sync()
        assert caught.value.code == "storage-failed"
        await writer.close()
