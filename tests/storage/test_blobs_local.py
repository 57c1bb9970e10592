"""What is special about bytes in a folder: its layout, its removals, its failures, its helpers."""

import asyncio
import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import storage.blobs_local
import storage.helper
from errors import SluiceError
from storage.blobs_local import LocalBlobs, refusal
from storage.helper import Helper
from tests.storage.conformance_blobs import MIB, content, digests, put, settled, stored

SLOW_S = 0.2


def helper_pid(helper: Helper) -> int:
    """Its process, which is there."""
    assert helper.pid is not None
    return helper.pid


@pytest.fixture
def blobs(tmp_path: Path, runner: asyncio.Runner) -> Iterator[LocalBlobs]:
    """An empty folder, open."""
    blobs = LocalBlobs(tmp_path / "data")
    runner.run(blobs.open())
    yield blobs
    runner.run(blobs.close())


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk is today, nobody minds."""
    monkeypatch.setattr(storage.blobs_local, "_SLOW_S", 60.0)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Each sync of this process takes 0.2 s; when they were."""
    return slow_syncs(monkeypatch)


def slow_syncs(patch: pytest.MonkeyPatch) -> list[float]:
    """Let each sync of this process take 0.2 s; when they were."""
    begins: list[float] = []

    def sync(_: int) -> None:
        begins.append(time.monotonic())
        time.sleep(SLOW_S)

    patch.setattr(os, "fdatasync", sync)
    patch.setattr(os, "fsync", sync)
    return begins


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
        for i in range(3):
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


class TestMembers:
    """Hard links, and how they go."""

    async def test_nothing_is_copied(self, blobs: LocalBlobs, folder: Path) -> None:
        """A member is another name of the same file."""
        await stored(blobs, "b1", b"abc")
        await blobs.link("all", "b1", "data.csv")
        assert (folder / "members/all/b1").samefile(folder / "uploads/b1/data.csv")

    @pytest.mark.parametrize("first", ["b1", "all"])
    async def test_big_bytes_go_with_their_last_name(
        self, blobs: LocalBlobs, folder: Path, monkeypatch: pytest.MonkeyPatch, first: str
    ) -> None:
        """As long as one name is left nothing is cut off; then all is, in slices."""
        await put(blobs, "b1", b"begin")
        os.truncate(folder / "tmp/b1", 100 * MIB)
        await blobs.publish("b1", "data.csv")
        await blobs.link("all", "b1", "data.csv")
        cuts = spy(monkeypatch, "ftruncate")
        reader = await blobs.reader("b1", "data.csv")
        await blobs.discard(first)
        await reader.close()
        await settled()
        assert cuts == []
        assert held(folder) == []
        await blobs.discard({"b1": "all", "all": "b1"}[first])
        await settled()
        assert [size for _, size in cuts] == [*(n * MIB for n in range(84, 0, -16)), 0]
        assert held(folder) == []
        assert not list((folder / "tmp").iterdir())

    async def test_a_member_is_not_cut_while_it_is_read(
        self, blobs: LocalBlobs, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last name may go before the last reader does, who then frees the bytes."""
        await put(blobs, "b1", b"begin")
        os.truncate(folder / "tmp/b1", 100 * MIB)
        await blobs.publish("b1", "data.csv")
        await blobs.link("all", "b1", "data.csv")
        bundle = await blobs.bundle("all")
        reader = await bundle.reader("b1")
        await bundle.close()
        cuts = spy(monkeypatch, "ftruncate")
        await blobs.discard("b1")
        await blobs.discard("all")
        await settled()
        assert cuts == []
        assert await reader.read(0, 5) == b"begin"
        await reader.close()
        await settled()
        assert len(cuts) == 7
        assert held(folder) == []

    async def test_many_members_go_in_slices(
        self, blobs: LocalBlobs, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are out of sight at once; removing thousands does not hold the loop."""
        await stored(blobs, "b0", b"abc")
        (folder / "members/all").mkdir(parents=True)
        for i in range(3000):
            os.link(folder / "uploads/b0/data.csv", folder / f"members/all/b{i}")
        removed = spy(monkeypatch, "unlink")
        monkeypatch.setattr(storage.blobs_local, "_SLICE_S", 0.0)  # else one might be enough
        await blobs.discard("all")
        assert not (folder / "members/all").exists()
        assert [args for args in removed if "members" in str(args[0])] == []
        counts = []
        while asyncio.all_tasks() - {asyncio.current_task()}:
            before = len(removed)
            await asyncio.sleep(0)
            counts.append(len(removed) - before)
        assert sum(counts) == 3000
        assert max(counts) < 2000
        assert not list((folder / "tmp").iterdir())

    async def test_leftovers_are_swept(self, blobs: LocalBlobs, folder: Path) -> None:
        """A death in the middle of a removal, before or after the rename, leaves nothing for good.

        A blob's folder without the blob in it does not count as published.
        """
        await stored(blobs, "b1", b"abc")
        await blobs.link("all", "b1", "data.csv")
        await blobs.link("other", "b1", "data.csv")
        os.rename(folder / "members/all", folder / "tmp/all.0123456789ab.members")
        (folder / "uploads/other").mkdir()
        assert await blobs.sweep([]) == 0
        await settled()
        assert not list((folder / "tmp").iterdir())
        assert not list((folder / "members").iterdir())
        assert os.stat(folder / "uploads/b1/data.csv").st_nlink == 1

    @pytest.mark.parametrize(
        ("number", "code", "said"),
        [
            (errno.EXDEV, "storage-failed", "hard links"),
            (errno.EPERM, "storage-failed", "hard links"),
            (errno.EMLINK, "storage-failed", "too many archives"),
            (errno.ENOSPC, "disk-full", "full"),
            (errno.EROFS, "storage-missing", "can't be written"),
        ],
    )
    async def test_a_disk_without_links(
        self, blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch, number: int, code: str, said: str
    ) -> None:
        """Whatever stands against a second name is said, without a path."""
        await stored(blobs, "b1", b"abc")

        def link(*_: Any) -> None:
            raise OSError(number, "?", "/secret/path")

        monkeypatch.setattr(os, "link", link)
        with pytest.raises(SluiceError) as caught:
            await blobs.link("all", "b1", "data.csv")
        assert caught.value.code == code
        assert said in caught.value.detail
        assert "secret" not in str(caught.value.problem())

    async def test_a_folder_that_is_gone(self, blobs: LocalBlobs, folder: Path) -> None:
        """Without the data folder nothing is linked, opened, or made anew."""
        await stored(blobs, "b1", b"abc")
        folder.rename(folder.with_name("away"))
        for call in (blobs.link("all", "b1", "data.csv"), blobs.bundle("all")):
            with pytest.raises(SluiceError) as caught:
                await call
            assert caught.value.code == "storage-missing"
        assert not folder.exists()
        folder.with_name("away").rename(folder)


@pytest.mark.usefixtures("fast_disk")
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
        blobs = LocalBlobs(tmp_path, durability)
        await blobs.open()
        files, names = spy(monkeypatch, "fdatasync"), spy(monkeypatch, "fsync")
        await put(blobs, "b1", b"abc")
        assert len(files) == synced
        await blobs.concat("all", [("b1", None)])
        assert len(files) == 2 * synced
        await blobs.publish("b1", "data.csv")
        assert len(names) == folders
        await blobs.link("all", "b1", "data.csv")
        assert len(names) == folders
        await blobs.publish("all", "files.zip")  # its members, too
        assert len(names) == 3 * folders
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
            lambda blobs: blobs.disk_bytes(),
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

    @pytest.mark.usefixtures("fast_disk")
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


class TestSlowDisks:
    """Who syncs: the loop while the disk is fast, then a process of its own."""

    @pytest.mark.usefixtures("fast_disk")
    @pytest.mark.parametrize(("durability", "n"), [("interval", 8), ("always", 8), ("never", 0)])
    async def test_a_fast_disk(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        durability: str,
        n: int,
    ) -> None:
        """It is found out by a few syncs at the start; then the loop goes on doing them."""
        calls: list[int] = []
        monkeypatch.setattr(os, "fdatasync", calls.append)
        blobs = LocalBlobs(tmp_path, durability)
        await blobs.open()
        assert len(calls) == n
        await put(blobs, "b1", b"abc")
        assert len(calls) == n + bool(n)
        assert blobs._syncer.pid is None
        assert list((tmp_path / "tmp").iterdir()) == [tmp_path / "tmp/b1"]
        await blobs.close()

    async def test_a_slow_disk(
        self, tmp_path: Path, slow_disk: list[float], caplog: pytest.LogCaptureFixture
    ) -> None:
        """The loop is held once, when that is found out, and said; nothing is left undone."""
        caplog.set_level(logging.INFO)
        blobs = LocalBlobs(tmp_path)
        await blobs.open()
        assert len(slow_disk) == 1
        assert len([line for line in caplog.messages if "sync" in line]) == 1
        for i in range(10):
            await put(blobs, f"b{i}", b"abc")
            await blobs.publish(f"b{i}", "data.csv")
        await blobs.concat("all", [("b1", "data.csv"), ("b2", "data.csv")])
        assert len(slow_disk) == 1
        assert len([line for line in caplog.messages if "sync" in line]) == 1
        assert await content(blobs, "all") == b"abcabc"
        assert await content(blobs, "b9", "data.csv") == b"abc"
        pid = helper_pid(blobs._syncer)
        await blobs.close()
        assert not Path(f"/proc/{pid}").exists()
        assert held(tmp_path) == []

    async def test_a_disk_that_becomes_slow(
        self, blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One slow call is enough, whichever it is."""
        blobs._slow = False
        await put(blobs, "b1", b"abc")
        calls = slow_syncs(monkeypatch)
        for i in range(3):
            await blobs.publish("b1", f"data{i}")
            await blobs.unpublish("b1")
        assert len(calls) <= 1
        helper_pid(blobs._syncer)

    async def test_uploads_go_on_meanwhile(self, tmp_path: Path, slow_disk: list[float]) -> None:
        """A sync covers what was written before it, and is safe when its writer is closed."""
        blobs = LocalBlobs(tmp_path)
        await blobs.open()
        await put(blobs, "b0", b"abc")
        writer, other = await blobs.writer("b1", 1), await blobs.writer("b2", 1)
        await writer.write(memoryview(b"abc"))
        await other.write(memoryview(b"abc"))
        pid = helper_pid(blobs._syncer)
        os.kill(pid, signal.SIGSTOP)
        sync, closed = asyncio.ensure_future(writer.sync()), asyncio.ensure_future(other.sync())
        await asyncio.sleep(0)
        assert await writer.write(memoryview(b"def")) == 6
        await other.close()
        assert not sync.done()
        os.kill(pid, signal.SIGCONT)
        assert await sync == 3
        assert await closed == 3
        assert await writer.sync() == 6
        await writer.close()
        assert len(slow_disk) == 1
        assert held(tmp_path) == []
        await blobs.close()

    async def test_without_a_helper(
        self, tmp_path: Path, slow_disk: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If none can be started the loop has to wait: late is better than not at all."""
        blobs = LocalBlobs(tmp_path)
        await blobs.open()
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        await put(blobs, "b1", b"abc")
        assert len(slow_disk) == 2
        await blobs.publish("b1", "data.csv")
        assert len(slow_disk) == 4
        await blobs.close()
        assert held(tmp_path) == []

    async def test_a_helper_that_dies(
        self, tmp_path: Path, slow_disk: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The sync is the next helper's, and in the end the loop's."""
        monkeypatch.setattr(storage.helper, "monotonic", lambda: 1000.0)  # both die in no time
        blobs = LocalBlobs(tmp_path)
        await blobs.open()
        await put(blobs, "b0", b"abc")
        writer = await blobs.writer("b1", 1)
        await writer.write(memoryview(b"abc"))
        pids: set[int] = set()
        os.kill(helper_pid(blobs._syncer), signal.SIGSTOP)
        sync = asyncio.ensure_future(writer.sync())
        while not sync.done():
            pid = blobs._syncer.pid
            if pid is not None and pid not in pids:
                pids.add(pid)
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0)
        assert await sync == 3
        assert len(pids) == 2
        assert len(slow_disk) == 2
        await writer.close()
        await blobs.close()
        assert held(tmp_path) == []

    async def test_what_a_slow_disk_refuses(self, tmp_path: Path, slow_disk: list[float]) -> None:
        """The helper's error is the loop's: a pipe stands for a disk that can't be forced."""
        blobs = LocalBlobs(tmp_path)
        await blobs.open()
        ends = os.pipe()
        for full in (False, True):
            with pytest.raises(OSError) as caught:
                await blobs._sync(ends[0], full=full)
            assert caught.value.errno == errno.EINVAL
        for end in ends:
            os.close(end)
        writer = await blobs.writer("b1", 1)
        await writer.close()
        with pytest.raises(SluiceError) as refused:
            await writer.sync()
        assert refused.value.code == "storage-failed"
        assert len(slow_disk) == 1
        await blobs.close()


class TestHashing:
    """What is special about digests of files."""

    async def test_no_descriptor_leaks(self, blobs: LocalBlobs, folder: Path) -> None:
        """Each digest holds one, and none that was refused does."""
        await put(blobs, "b1", b"abc")
        before = held(folder)
        some = [await blobs.digester("b1", ["md5"]) for _ in range(3)]
        for algorithms in (["sha-3"], []):
            with pytest.raises(ValueError, match="algorithms"):
                await blobs.digester("b1", algorithms)
        assert len(held(folder)) == len(before) + 3
        for digester in some:
            await digester.reach(3)
            digester.close()
        assert held(folder) == before

    async def test_a_big_file_is_not_cut_while_it_is_hashed(
        self, blobs: LocalBlobs, folder: Path
    ) -> None:
        """The last digest of a discarded blob frees its bytes, in slices."""
        await put(blobs, "b1", b"begin")
        os.truncate(folder / "tmp/b1", 100 * MIB)
        digester = await blobs.digester("b1", ["crc-32"])
        await digester.reach(1)
        await blobs.discard("b1")
        await digester.reach(100 * MIB)
        right = digests(b"begin" + bytes(100 * MIB - 5))["crc-32"]
        assert await digester.result() == {"crc-32": right}
        digester.close()
        assert len(held(folder)) == 1
        await blobs.close()
        assert held(folder) == []

    async def test_close_ends_both_helpers(self, tmp_path: Path, slow_disk: list[float]) -> None:
        """In the middle of their work, and a digest may be closed afterwards."""
        blobs = LocalBlobs(tmp_path)
        await blobs.open()
        await put(blobs, "b1", b"abc")
        os.truncate(tmp_path / "tmp/b1", 1 << 36)
        digester = await blobs.digester("b1", ["sha-256"])
        digester.follow(1 << 36)
        await digester.reach(1)
        pids = [helper_pid(blobs._syncer), helper_pid(blobs._hasher)]
        await blobs.close()
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        with pytest.raises(SluiceError) as caught:
            await digester.reach(1 << 36)
        assert caught.value.code == "storage-failed"
        digester.close()
        assert held(tmp_path) == []
        assert len(slow_disk) == 1
