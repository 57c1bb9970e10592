"""What a process works with: the files of its owner, and the artefacts that it makes.

An artefact is a blob in the making. Its length at the last cursor is what a resume cuts it to; of a
table the database itself keeps the cursor, in the commit that brings the rows.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import (
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from errors import SluiceError
from jobs.files import Files
from jobs.kinds import Check, Column
from jobs.tables import Table
from jobs.zips import ZipDraft
from storage import (
    File,
    Reader,
    State,
    Writer,
)
from storage.tables import TableFile, flat

if TYPE_CHECKING:
    from jobs.process import Process

# A file that is named by the job that makes it, perhaps before it exists.
_JOB = re.compile(r"job:([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")


class OwnerFiles:
    """The files of one owner, as a process sees them."""

    def __init__(
        self, files: Files, state: State, owner: str, save_cursor: Callable[[], Awaitable[None]]
    ) -> None:
        self._files = files
        self._state = state
        self._owner = owner
        self._save_cursor = save_cursor

    async def find(self, name: str) -> File:
        if (made_by := _JOB.fullmatch(name)) is not None:
            return await self._made_by(made_by[1])
        return await self._files.find(name, self._owner)

    async def _made_by(self, job_id: str) -> File:
        """The file that a job has made."""
        job = await self._state.get(job_id, self._owner)
        if job is None:
            raise SluiceError("file-unknown", f"There is no job {job_id} that has made a file.")
        if job.result is None or job.result.file is None:
            raise SluiceError("file-unknown", f"Job {job_id} is {job.state} and has made no file.")
        return await self._files.get(job.result.file, self._owner)

    async def reader(self, file_id: str) -> Reader:
        return await self._files.reader(await self._files.get(file_id, self._owner))

    async def list(self, below: int | None, limit: int) -> Sequence[File]:
        return (await self._files.list(self._owner, None, below, limit)).items

    async def stored(self) -> tuple[int, int]:
        return await self._files.stored(self._owner)

    async def checks(self, file_id: str, skip: int, limit: int) -> Sequence[Check]:
        return await self._files.checks(await self._files.get(file_id, self._owner), skip, limit)

    async def keep_digests(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        await self._save_cursor()
        known = {}
        for file_id, found in digests.items():
            with suppress(SluiceError):  # it was deleted, or is another owner's
                await self._files.get(file_id, self._owner)
                known[file_id] = found
        await self._files.keep_digests(known)

    async def table(self, file_id: str) -> Table:
        return await self._files.table(await self._files.get(file_id, self._owner))


class Draft:
    """A file in the making; its length at the last checkpoint is what a resume cuts it to."""

    def __init__(
        self,
        blob: str,
        name: str,
        media_type: str,
        expires_s: float | None,
        layout: str,
        made_by: Writer | TableDraft | None,
        offset: int,
    ) -> None:
        self.blob = blob
        self.name = name
        self.media_type = media_type
        self.expires_s = expires_s
        self.layout = layout
        self.table = made_by if isinstance(made_by, TableDraft) else None
        self.writer = (
            None if isinstance(made_by, TableDraft) else made_by
        )  # a child writes its table
        self.offset = offset
        self.reader: Callable[[], Awaitable[Reader]]
        self.zip: ZipDraft | None = None  # once it was opened as that

    async def write(self, data: bytes | memoryview) -> int:
        assert self.writer is not None
        self.offset = await self.writer.write(memoryview(data))
        return self.offset

    async def sync(self) -> None:
        """Force its bytes to the disk; a table needs no sync to be committed."""
        if self.writer is not None:
            await self.writer.sync()

    async def close(self) -> None:
        if self.writer is not None:
            await self.writer.close()
        if self.table is not None:
            self.table.close()


class TableDraft:
    """A table in the making, see kinds.TableWriter.

    It remembers the cursor of the last rows: what is committed is that, whatever other cursor the
    process has told since.
    """

    def __init__(
        self, process: Process, file: TableFile, sync: Callable[[], Awaitable[None]]
    ) -> None:
        self._process = process
        self._file = file
        self._sync = sync
        self._lock = asyncio.Lock()  # nothing is added while the log is moved
        self._at: tuple[Any, dict[str, int]] | None = None  # what is not committed so far
        self._calls = 0

    @property
    def columns(self) -> list[Column]:
        return [Column(name, type) for name, type in self._file.columns]

    @property
    def rows(self) -> int:
        return self._file.rows

    def begin(self, columns: Sequence[Column], about: Mapping[str, Any], mark: Any) -> None:
        self._file.begin(columns, about, mark)

    async def write(self, rows: Sequence[Sequence[Any]], cursor: Any) -> None:
        await self.write_cells(flat(rows, len(self._file.columns)), cursor)

    async def write_cells(self, cells: Sequence[Any], cursor: Any) -> None:
        async with self._lock:
            self._file.add(cells)
            self._calls += 1
            self._at = cursor, self._process.wrote(cursor)
        if self._file.due:
            await self.commit()

    async def commit(self) -> None:
        """Commit what was written, with its cursor and the artefacts' lengths at it."""
        if (mark := await self._mark()) is not None:
            self._file.commit(mark)
            self._at = None
            self._process.sure(mark, by_table=True)
        if self._file.has_long_log:
            await self._fold()

    async def _fold(self) -> None:
        """Put the log into the database; the disk is waited for, but not by the loop."""
        async with self._lock:
            if self._at is not None:  # more came in between: after their commit
                return
            await self._sync()
            self._file.copy_log()
            await self._sync()
            self._file.drop_log()
            await self._sync()

    async def _mark(self) -> dict[str, Any] | None:
        """What belongs to the last rows; more of them may come while the artefacts are synced."""
        while self._at is not None:
            calls = self._calls
            mark = await self._process.make_mark(*self._at)
            if calls == self._calls:
                return mark if self._at is not None else None
        return None

    async def finish(self) -> None:
        """No rows follow: make it one file."""
        await self.commit()
        await self._fold()
        self._file.finish(self._file.mark)

    @property
    def lost(self) -> bool:
        """Rows were lost: only a new frame can go on, from the last commit."""
        return self._file.lost

    def close(self) -> None:
        self._file.close()
