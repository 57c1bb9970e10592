"""Bytes in one folder of this machine.

Layout: ``tmp/<id>`` grows, and ``tmp/<id>-wal`` and the like belong to it; ``uploads/<id>/<name>``
is published and never changes; ``members/<id>/<other id>`` is a hard link to another blob's bytes,
which stay until both names are gone. All lie on one file system, so that publishing is an atomic
rename (the system's own temporary folder often is another one, and there a rename would be a copy).

Strategy. Calls are synchronous system calls of at most 1 MiB; nothing here waits, and there are no
threads. Written pages are handed to the disk at once (``sync_file_range``, *write-behind*), so that
the final fdatasync finds little to do. A fast disk does that in less than a helper would cost; once
it was slow, all further syncs are a helper process's (helper.py), and another one hashes. Removing
a big file takes the disk long: its name goes at once, its bytes are cut off in slices between which
the loop turns, and never while a reader or another name still holds it. A folder of members goes to
``tmp/`` at once, by a rename, and is emptied in slices when its last bundle is closed.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from errors import SluiceError
from storage.helper import Digest, Helper

log = logging.getLogger("sluice.blobs")

_SLICE_BYTES = 16 << 20  # freed at once: 1-5 ms on ext4, 2 ms on tmpfs
_CALL_BYTES = 1 << 20
_WRITE_BEHIND_BYTES = 1 << 20
_RESERVE_BYTES = 16 << 20  # left free for the state, so that a full disk can still be recorded
_SLOW_S = 0.005  # a sync that takes longer may not be the loop's
_PROBES = 8
_PROBE_BYTES = 4096

_GONE = "Stored bytes of the upload are gone."
_MEMBERS = ".members"  # how a folder in tmp/ ends whose members are to be removed
_SIDES = ("-journal", "-wal", "-shm")  # what SQLite keeps beside a database
_SLICE_S = 0.002  # of removing small files between two turns of the loop

_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)
_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def refusal(error: OSError) -> SluiceError:
    """What a failing disk means to the caller; names no path."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SluiceError("disk-full", "The disk is full; the bytes stored so far are kept.")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EROFS, errno.EACCES):
        return SluiceError("storage-missing", "The data folder is gone or can't be written.")
    return SluiceError("storage-failed", f"The disk refused: {os.strerror(error.errno or 0)}.")


class LocalWriter:
    """An unfinished blob, open for appending."""

    def __init__(self, blobs: LocalBlobs, fd: int, offset: int, durability: str) -> None:
        self._blobs = blobs
        self._fd = fd
        self._offset = offset
        self._behind = offset  # handed to the disk up to here
        self._durability = durability

    async def write(self, view: memoryview) -> int:
        """See the contract. A call that the disk cut short is taken back whole."""
        begin = self._offset
        try:
            while view:
                n = os.pwrite(self._fd, view[:_CALL_BYTES], self._offset)
                self._offset += n
                view = view[n:]
        except OSError as error:
            self._offset = begin
            with suppress(OSError):
                os.ftruncate(self._fd, begin)
            raise refusal(error) from error
        if self._offset - self._behind >= _WRITE_BEHIND_BYTES and self._durability != "never":
            _sync_file_range(
                self._fd, self._behind, self._offset - self._behind, _SYNC_FILE_RANGE_WRITE
            )
            self._behind = self._offset
        return self._offset

    async def sync(self) -> int:
        """See the contract. What is written while this waits is left to the next one."""
        offset = self._offset
        try:
            await self._blobs._sync(self._fd)
        except OSError as error:
            raise refusal(error) from error
        return offset

    async def close(self) -> None:
        """See the contract."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class LocalReader:
    """A blob, open for reading; the descriptor outlives the name."""

    def __init__(self, blobs: LocalBlobs, fd: int) -> None:
        self._blobs = blobs
        self._fd = fd
        self.size_bytes = os.fstat(fd).st_size

    def fileno(self) -> int | None:
        """See the contract."""
        return self._fd

    async def read(self, start: int, n: int) -> bytes:
        """See the contract."""
        try:
            return os.pread(self._fd, min(n, _CALL_BYTES), start)
        except OSError as error:
            raise refusal(error) from error

    async def close(self) -> None:
        """See the contract."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._blobs._release(fd)


class _Members:
    """A folder of members that is open: where it lies now, and for how many."""

    __slots__ = ("discarded", "folder", "users")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.users = 0
        self.discarded = False


class LocalBundle:
    """The members of a blob; its folder outlives the blob while this is open."""

    def __init__(self, blobs: LocalBlobs, blob_id: str, members: _Members) -> None:
        self._blobs = blobs
        self._blob_id = blob_id
        self._members: _Members | None = members

    async def reader(self, member_id: str) -> LocalReader:
        """See the contract."""
        assert self._members is not None
        return LocalReader(self._blobs, self._blobs._hold(self._members.folder / member_id))

    async def close(self) -> None:
        """See the contract."""
        if self._members is not None:
            members, self._members = self._members, None
            self._blobs._let_go(self._blob_id, members)


class LocalBlobs:
    """The Blobs contract over a folder."""

    def __init__(self, folder: Path, durability: str = "interval") -> None:
        self._tmp = folder / "tmp"
        self._uploads = folder / "uploads"
        self._members = folder / "members"
        self._durability = durability
        self._readers: dict[tuple[int, int], int] = {}
        self._bundles: dict[str, _Members] = {}
        self._emptied: set[Path] = set()  # folders of members that are not the sweep's
        self._removals: set[asyncio.Task[None]] = set()
        self._hasher = Helper("hashing")
        self._syncer = Helper("syncs")  # another one, so that no sync waits behind a hash
        self._slow = False

    async def open(self) -> None:
        """See the contract."""
        try:
            for folder in (self._tmp, self._uploads):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self._tmp / ".probe"
            await self._probe(probe)
            probe.rename(self._uploads / ".probe")
            (self._uploads / ".probe").unlink()
        except OSError as error:
            raise refusal(error) from error

    async def close(self) -> None:
        """See the contract."""
        if self._removals:
            await asyncio.gather(*self._removals)
        await asyncio.gather(self._hasher.close(), self._syncer.close())

    async def writer(
        self, blob_id: str, fence: int, *, offset: int = 0, length: int | None = None
    ) -> LocalWriter:
        """See the contract. One process owns the folder, so the fence needs no check here."""
        missing = (length or 0) - offset
        if missing > 0 and missing > await self.free_bytes() - _RESERVE_BYTES:
            raise SluiceError("disk-full", f"There is no room for {missing:,} bytes.")
        flags = os.O_RDWR | os.O_CLOEXEC | (0 if offset else os.O_CREAT)
        try:
            fd = os.open(self._tmp / blob_id, flags, 0o640)
        except FileNotFoundError as error:
            raise self._absent(error, "storage-failed", _GONE) from error
        except OSError as error:
            raise refusal(error) from error
        try:
            size = os.fstat(fd).st_size
            if size < offset:
                raise SluiceError("storage-failed", _GONE)
            if size > offset:
                os.ftruncate(fd, offset)
        except (OSError, SluiceError) as error:
            os.close(fd)
            raise refusal(error) if isinstance(error, OSError) else error from error
        return LocalWriter(self, fd, offset, self._durability)

    async def size(self, blob_id: str) -> int | None:
        """See the contract."""
        try:
            return (self._tmp / blob_id).stat().st_size
        except FileNotFoundError as error:
            if self._tmp.is_dir():
                return None
            raise refusal(error) from error
        except OSError as error:
            raise refusal(error) from error

    async def place(self, blob_id: str) -> Path:
        """See the contract."""
        return self._tmp / blob_id

    async def sync(self, blob_id: str) -> None:
        """See the contract."""
        for end in ("", *_SIDES):
            try:
                fd = os.open(self._tmp / f"{blob_id}{end}", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                await self._sync(fd)
            except OSError as error:
                raise refusal(error) from error
            finally:
                os.close(fd)

    def _drop_sides(self, blob_id: str, *, empty: bool) -> None:
        """Remove the side files of a blob; with ``empty``, refuse if one of them has bytes."""
        for side in _SIDES:
            path = self._tmp / f"{blob_id}{side}"
            if empty and path.exists() and path.stat().st_size:
                raise SluiceError("storage-failed", "A part of the blob lies beside it.")
            self._unlink(path)

    async def publish(self, blob_id: str, name: str) -> int:
        """See the contract. The folder entries are forced to the disk as well."""
        unfinished, folder = self._tmp / blob_id, self._uploads / blob_id
        try:
            size = unfinished.stat().st_size
            self._drop_sides(blob_id, empty=True)
            folder.mkdir(exist_ok=True)
            if os.listdir(folder):  # a rename would replace bytes that never change
                raise SluiceError("storage-failed", "The blob has been published before.")
            os.rename(unfinished, self._path(blob_id, name))
            members = self._members / blob_id
            linked = (members, self._members) if members.is_dir() else ()
            for path in (*linked, folder, self._uploads):
                await self._sync_folder(path)
        except FileNotFoundError as error:
            raise self._absent(error, "storage-failed", _GONE) from error
        except OSError as error:
            raise refusal(error) from error
        return size

    def _is_published(self, blob_id: str) -> bool:
        with suppress(FileNotFoundError):  # the folder may be there without the file: a crash
            return bool(os.listdir(self._uploads / blob_id))
        return False

    async def unpublish(self, blob_id: str) -> bool:
        """See the contract."""
        folder = self._uploads / blob_id
        try:
            names = os.listdir(folder)
            for name in names:
                os.rename(folder / name, self._tmp / blob_id)
            folder.rmdir()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise refusal(error) from error
        return bool(names)

    async def reader(self, blob_id: str, name: str | None) -> LocalReader:
        """See the contract."""
        return LocalReader(self, self._hold(self._path(blob_id, name)))

    async def digester(
        self,
        blob_id: str,
        algorithms: Collection[str],
        *,
        start: int = 0,
        name: str | None = None,
    ) -> Digest:
        """See the contract."""
        fd = self._hold(self._path(blob_id, name))
        try:
            return self._hasher.digest(fd, algorithms, start, self._release)
        except ValueError:
            self._release(fd)
            raise

    def _path(self, blob_id: str, name: str | None) -> Path:
        if name is None:
            return self._tmp / blob_id
        return self._uploads / blob_id / name.rpartition("/")[2]  # a name may tell folders

    def _hold(self, path: Path) -> int:
        """Open a blob for reading; its bytes are there until ``_release``."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise self._absent(error, "file-unknown", "The file's bytes are gone.") from error
        except OSError as error:
            raise refusal(error) from error
        key = _inode(fd)
        self._readers[key] = self._readers.get(key, 0) + 1
        return fd

    async def link(self, blob_id: str, source_id: str, source_name: str) -> None:
        """See the contract: a hard link."""
        source, folder = self._path(source_id, source_name), self._members / blob_id
        try:
            try:
                os.link(source, folder / source_id)
            except FileNotFoundError:  # the folder, or the source?
                self._members.mkdir(exist_ok=True)
                folder.mkdir(exist_ok=True)
                os.link(source, folder / source_id)
        except FileExistsError:
            return
        except FileNotFoundError as error:
            raise self._absent(error, "file-unknown", "The file's bytes are gone.") from error
        except OSError as error:
            if error.errno == errno.EMLINK:
                raise SluiceError("storage-failed", "The file is in too many archives.") from error
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP):
                detail = "This disk keeps no file under two names (hard links)."
                raise SluiceError("storage-failed", detail) from error
            raise refusal(error) from error

    async def bundle(self, blob_id: str) -> LocalBundle:
        """See the contract."""
        folder = self._members / blob_id
        members = self._bundles.get(blob_id)
        if members is None:
            if not folder.is_dir():
                error = FileNotFoundError(errno.ENOENT, "no members")
                raise self._absent(error, "file-unknown", "The archive's members are gone.")
            members = self._bundles[blob_id] = _Members(folder)
        members.users += 1
        return LocalBundle(self, blob_id, members)

    def _let_go(self, blob_id: str, members: _Members) -> None:
        """A bundle was closed; the last one of a discarded blob removes the members."""
        members.users -= 1
        if members.users:
            return
        if members.discarded:
            self._spawn(self._empty(members.folder))
        else:
            del self._bundles[blob_id]

    def _discard_members(self, blob_id: str) -> None:
        """Take the members out of sight; they go now, or when nobody has them open any more."""
        aside = self._tmp / f"{blob_id}.{os.urandom(6).hex()}{_MEMBERS}"
        try:
            os.rename(self._members / blob_id, aside)
        except FileNotFoundError:
            return
        except OSError as error:
            raise refusal(error) from error
        self._emptied.add(aside)
        members = self._bundles.pop(blob_id, None)
        if members is None:
            self._spawn(self._empty(aside))
        else:
            members.folder = aside
            members.discarded = True

    async def _empty(self, folder: Path) -> None:
        """Remove a folder of members, a slice a turn; what fails is left to the next start."""
        try:
            left, began = True, perf_counter()
            while left:  # a list of thousands of names would hold the loop, too
                left = False
                with os.scandir(folder) as entries:
                    for entry in entries:
                        left = True
                        fd = self._remove(Path(entry.path))
                        if fd is not None and self._is_big_and_free(fd):
                            await _cut(fd)
                        elif fd is not None:
                            os.close(fd)
                        if perf_counter() - began > _SLICE_S:
                            await asyncio.sleep(0)
                            began = perf_counter()
            folder.rmdir()
        except OSError as error:
            log.warning("members could not be removed: %s", os.strerror(error.errno or 0))
        finally:
            self._emptied.discard(folder)

    async def discard(self, blob_id: str) -> None:
        """See the contract. The name is gone when this returns; the space follows in slices."""
        folder = self._uploads / blob_id
        self._drop_sides(blob_id, empty=False)
        self._unlink(self._tmp / blob_id)
        with suppress(OSError):
            for name in os.listdir(folder):
                self._unlink(folder / name)
            folder.rmdir()
        self._discard_members(blob_id)

    def _unlink(self, path: Path) -> None:
        try:
            fd = self._remove(path)
        except OSError as error:
            raise refusal(error) from error
        if fd is not None:
            self._free(fd)

    def _remove(self, path: Path) -> int | None:
        """Remove a name; what it stood for, open, if it was there. Raises OSError."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            os.unlink(path)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _is_big_and_free(self, fd: int) -> bool:
        """Whether nobody has a file any more (neither name nor reader: the last one frees it), and
        closing it would take the disk long."""
        status = os.fstat(fd)
        if status.st_nlink or self._readers.get((status.st_dev, status.st_ino)):
            return False
        return status.st_size > _SLICE_BYTES

    def _free(self, fd: int) -> None:
        """Give an unlinked file's space back, once nobody has it; closes ``fd``."""
        if self._is_big_and_free(fd):
            self._spawn(_cut(fd))
        else:
            os.close(fd)

    def _spawn(self, removal: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(removal)
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    def _release(self, fd: int) -> None:
        """A reader lets go; the last one of an unlinked file frees it."""
        key = _inode(fd)
        left = self._readers[key] - 1
        if left:
            self._readers[key] = left
            os.close(fd)
            return
        del self._readers[key]
        if os.fstat(fd).st_nlink:
            os.close(fd)
            return
        try:  # reading descriptors can't truncate: open the nameless inode again
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            os.close(fd)
            return
        os.close(fd)
        self._free(again)

    async def concat(
        self,
        blob_id: str,
        parts: Sequence[tuple[str, str | None]],
        pace: Callable[[int], Awaitable[None]] | None = None,
    ) -> int:
        """See the contract. ``copy_file_range`` shares the blocks where the disk can."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            target = os.open(self._tmp / blob_id, flags, 0o640)
        except OSError as error:
            raise refusal(error) from error
        total = 0
        try:
            for part_id, name in parts:
                reader = await self.reader(part_id, name)
                try:
                    total += await self._copy(reader, target, total, pace)
                finally:
                    await reader.close()
            await self._sync(target)  # there is no writer that could be asked to
        except BaseException as error:
            self._unlink(self._tmp / blob_id)  # a part of the whole is of no use to anyone
            if isinstance(error, OSError):
                raise refusal(error) from error
            raise
        finally:
            os.close(target)
        return total

    async def _copy(
        self,
        reader: LocalReader,
        target: int,
        at: int,
        pace: Callable[[int], Awaitable[None]] | None,
    ) -> int:
        """Append a reader's bytes at ``at``; how many."""
        done = 0
        source = reader.fileno()
        assert source is not None
        while done < reader.size_bytes:
            n = os.copy_file_range(source, target, _CALL_BYTES, done, at + done)
            if n == 0:
                break
            if self._durability != "never":
                _sync_file_range(target, at + done, n, _SYNC_FILE_RANGE_WRITE)
            done += n
            await asyncio.sleep(0)
            if pace is not None:
                await pace(at + done)
        return done

    async def sweep(self, keep: Collection[str]) -> int:
        """See the contract."""
        swept = 0
        try:
            with os.scandir(self._tmp) as entries:
                for entry in entries:
                    blob_id = _blob_of(entry.name)
                    if blob_id not in keep and entry.is_file(follow_symlinks=False):
                        self._unlink(self._tmp / entry.name)
                        swept += blob_id == entry.name
                    elif entry.name.endswith(_MEMBERS) and Path(entry.path) not in self._emptied:
                        self._emptied.add(Path(entry.path))
                        self._spawn(self._empty(Path(entry.path)))
            for blob_id in os.listdir(self._members) if self._members.is_dir() else ():
                if blob_id not in keep and not self._is_published(blob_id):
                    self._discard_members(blob_id)
        except OSError as error:
            raise refusal(error) from error
        return swept

    async def free_bytes(self) -> int:
        """See the contract."""
        return self._usage()[2]

    async def disk_bytes(self) -> int:
        """See the contract."""
        return self._usage()[0]

    def _usage(self) -> tuple[int, int, int]:
        """Bytes of the disk: all, used, free."""
        try:
            return shutil.disk_usage(self._tmp)
        except OSError as error:
            raise refusal(error) from error

    async def _probe(self, path: Path) -> None:
        """Make a file, and find out whether the disk is slow. Raises OSError."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        try:
            for i in range(_PROBES):
                if self._slow or self._durability == "never":
                    break
                os.pwrite(fd, bytes(_PROBE_BYTES), i * _PROBE_BYTES)
                await self._sync(fd)
        finally:
            os.close(fd)

    async def _sync_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            await self._sync(fd, full=True)
        finally:
            os.close(fd)

    async def _sync(self, fd: int, *, full: bool = False) -> None:
        """Force a file's bytes (or ``full``: all of it) to the disk. Raises OSError.

        ``fd`` may be closed meanwhile.
        """
        if self._durability == "never":
            return
        if not self._slow:
            self._sync_here(fd, full)
            return
        own = os.dup(fd)
        try:
            await self._syncer.sync(own, full=full)
        except SluiceError:  # no helper: late is better than not at all
            self._sync_here(own, full)
        finally:
            os.close(own)

    def _sync_here(self, fd: int, full: bool) -> None:
        """Sync in the loop; never again, if possible, once that took long."""
        begin = perf_counter()
        (os.fsync if full else os.fdatasync)(fd)
        took = perf_counter() - begin
        if took > _SLOW_S and not self._slow:
            self._slow = True
            log.info("A sync took %.0f ms: a process of its own does it from now on", took * 1e3)

    def _absent(self, error: OSError, code: str, detail: str) -> SluiceError:
        """A file is missing: it alone, or the whole folder with it (a disk that is not there)?"""
        return SluiceError(code, detail) if self._tmp.is_dir() else refusal(error)


def _blob_of(name: str) -> str:
    """The blob that a name in tmp/ belongs to: its own, or the one that it is a side file of."""
    for side in _SIDES:
        if name.endswith(side):
            return name[: -len(side)]
    return name


def _inode(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


async def _cut(fd: int) -> None:
    """Shorten an unlinked file to nothing, a slice a turn."""
    try:
        size = os.fstat(fd).st_size
        while size > 0:
            size = max(0, size - _SLICE_BYTES)
            os.ftruncate(fd, size)
            await asyncio.sleep(0.005)
    finally:
        os.close(fd)
