"""Where processes run: coroutines that share one CPU lane.

Strategy. A process is a task of the loop that calls its kind's ``run``. ``checkpoint`` is the only
place where it gives way. While nothing is wanted and less than 2 ms have passed since it last got
the loop, it returns without suspending. Else the process waits in the *lane*: one queue for all
processes, from which one is let on in each turn of the loop, so that all of them together take
about 2 ms a turn however many there are.

A pause is warm at first: the frame is kept, the slot is given back, and a resume goes on where it
stood. After ``warm_s`` the frame is unwound by JobPaused, and a resume calls ``run`` again with the
saved cursor, which is exactly what a restart after a crash does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import types
from collections import deque
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import random
from time import monotonic, perf_counter
from typing import Any

import msgspec

from errors import SluiceError
from jobs.children import Child, Children, Limits
from jobs.clock import Clock
from jobs.files import Files, clean_name, media_type_of, now_ms, uuid7
from jobs.kinds import Address, Check, Column, JobCancelled, JobPaused, Kind
from jobs.manager import Glance, Grown, Manager
from jobs.programs import Program, artifact_handler, pipe_to
from jobs.progress import Meter
from jobs.remote import run_in_child
from jobs.resolve import Resolver
from jobs.rows import rfc3339
from jobs.states import FINAL, RUNNING, SUCCEEDED, Input
from jobs.tables import MEDIA_TYPE as TABLE_TYPE
from jobs.tables import TABLE, Table
from jobs.zips import MEDIA_TYPE, PLAIN, ZIP, Layout, Names, ZipDraft, load
from storage import (
    Artifact,
    Blobs,
    Fenced,
    File,
    Job,
    Progress,
    Reader,
    Result,
    Rollback,
    State,
    Undo,
    Writer,
)
from storage.tables import TableFile, check_columns, flat

log = logging.getLogger("sluice.runners")

# A file that is named by the job that makes it, perhaps before it exists.
_JOB = re.compile(r"job:([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")

_SLICE_S = 0.002
_SLOW_STEP_S = 0.02
_CURSOR_BYTES = 64 << 10
_LOG_BUFFER = 1000  # lines between two saves; more are counted and dropped
_LINE_CHARS = 4096
_SAVES = 50  # cursors that are saved together: some 2 ms
_UNDO_TRIES = 3
_UNDO_S = 60.0
_NOTE_S = 0.25
_MAX_UNDO = 10_000
_AGAIN_S = 1.0  # before a cursor that could not be saved is tried again
_EARLY_S = 0.1  # until the first save of one that was running at a crash
_LATE_S = 10.0  # for a process that is over its time to end
_LAST_S = 0.5  # for those that must be cancelled at a stop
_LONG_S = 3600.0  # the longest single wait
_PATHS_FROM = 3  # the first descriptor of a program's files


class Lane:
    """Lets one waiting process on in each turn of the loop, first come first served."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turning = False

    def turn(self) -> asyncio.Future[None]:
        """A future that is done when it is the caller's turn; it may be set earlier by others."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.append(future)
        if not self._turning:
            self._turning = True
            loop.call_soon(self._next)
        return future

    def _next(self) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                break
        # The step that was just let on runs before this is called again.
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._next)
        else:
            self._turning = False


class _Files:
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


class _Artifact:
    """A file in the making; its length at the last checkpoint is what a resume cuts it to."""

    def __init__(
        self,
        blob: str,
        name: str,
        media_type: str,
        expires_s: float | None,
        layout: str,
        made_by: Writer | _Table | None,
        offset: int,
    ) -> None:
        self.blob = blob
        self.name = name
        self.media_type = media_type
        self.expires_s = expires_s
        self.layout = layout
        self.table = made_by if isinstance(made_by, _Table) else None
        self.writer = None if isinstance(made_by, _Table) else made_by  # a child writes its table
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


class _Table:
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


class Process:
    """One live process: the context that its coroutine sees, and its task."""

    def __init__(self, runners: Runners, job: Job, kind: Kind) -> None:
        self._runners = runners
        self._kind = kind
        self._job = job
        self.job_id = job.id
        self.owner = job.owner
        self.attempt = job.attempt
        self.files = _Files(runners.files, runners.state, job.owner, self._save_cursor)
        self.meter = Meter(kind.unit, job.progress)
        self.fence = job.fence
        self.want = "run"
        self.parked = False  # it has given its slot back; only a new claim lets it go on
        self.over = False  # its frame is ending; only a new one can go on
        self._mark: dict[str, Any] = job.cursor or {}
        self.cursor: Any = self._mark.get("cursor")
        self._artifacts: dict[str, _Artifact] = {}
        self._dropped_blobs: list[str] = []  # of artefacts that were begun anew
        self._offsets: dict[str, int] = {}  # of the artefacts, at the last cursor
        self._sure: dict[str, Any] = _artifacts(kind, job)  # what a resume finds, whatever happens
        self._base: dict[str, Any] | None = None  # where it stood when its table was begun
        self._by_table = False  # a cursor that came with rows wins over those that are saved here
        self._journal = list(job.undo)
        self._lines: list[str] = []
        self._dropped = 0
        self._dirty = False
        self._nap: asyncio.Future[None] | None = None
        self.is_exact = False  # its child waits at each checkpoint, for a harness that counts them
        self._programs: list[Program] = []
        self._moved = True  # there was a checkpoint since the clock has looked
        self._listens = False  # to its programs: that is no sign of life
        self._late: SluiceError | None = None
        self.lost = False  # the frame did not end when it was told to: nobody waits for it any more
        self._clock: Clock | None = None
        run_s, stall_s = runners.timeouts_s(kind)
        if run_s is not None or stall_s is not None:
            ran_s = self._mark.get("ran_s", 0.0)
            self._clock = Clock(run_s, stall_s, ran_s, self._is_alive, self._end_late)
        self._folder: Path | None = None
        self._cold_at = 0.0  # when a warm pause ends
        self._resumed = perf_counter()
        self.task = asyncio.get_running_loop().create_task(self._run())

    # The context (see kinds.Context)

    async def checkpoint(
        self,
        cursor: Any = None,
        *,
        done: int | None = None,
        total: int | None = None,
        phase: str | None = None,
        message: str | None = None,
        eta: bool | None = None,
    ) -> None:
        if cursor is not None:
            self._set_cursor(cursor)
        self.meter.mark(done, total, phase, message, eta)
        self._moved = True
        if self.want == "run" and perf_counter() - self._resumed < _SLICE_S:
            return
        if self.want == "run":
            await self._wait(self._runners.lane.turn())
        await self._obey()

    async def sleep(self, seconds: float) -> None:
        end = monotonic() + seconds
        while True:
            if self.want != "run":
                await self._obey()
            left_s = end - monotonic()
            if left_s <= 0:
                break
            await self._wait_s(left_s)

    async def undo(self, name: str, **args: Any) -> None:
        if name not in self._kind.undo:
            raise TypeError(f"{self._kind.name} has no undo named {name!r}")
        if len(self._journal) >= _MAX_UNDO:
            raise RuntimeError(f"more than {_MAX_UNDO} entries in the undo journal")
        self._journal.append(Undo(name=name, args=args))
        await self._runners.state.save(self.job_id, self.fence, undo=tuple(self._journal))

    def log(self, line: str) -> None:
        if len(self._lines) < _LOG_BUFFER:
            self._lines.append(line[:_LINE_CHARS])
        else:
            self._dropped += 1

    async def artifact(
        self,
        name: str,
        media_type: str = "application/octet-stream",
        *,
        expires_s: float | None = None,
        fresh: bool = False,
        layout: str = PLAIN,
        is_elsewhere: bool = False,
    ) -> _Artifact:
        name = clean_name(name, "name")  # it may come from a parameter, and becomes one on the disk
        known = self._mark.get("artifacts", {}).get(name)
        if name in self._artifacts and not fresh:
            return self._artifacts[name]
        if fresh and known:
            if name in self._artifacts:
                await self._artifacts.pop(name).close()
            self._dropped_blobs.append(known["blob"])
            known = None
        blob, offset = (known["blob"], known["bytes"]) if known else (uuid7(), 0)
        blobs = self._runners.blobs
        made_by: Writer | _Table | None
        if is_elsewhere:
            made_by = None
        elif layout == TABLE:
            file = TableFile(await blobs.place(blob), syncs=False)
            made_by = _Table(self, file, partial(blobs.sync, blob))
        else:
            made_by = await blobs.writer(blob, self.fence, offset=offset)
        media_type = media_type or media_type_of(name)
        made = _Artifact(blob, name, media_type, expires_s, layout, made_by, offset)
        made.reader = partial(blobs.reader, blob, None)
        self._artifacts[name] = made
        self._offsets[name] = offset
        await self._save_cursor()  # so that the blob is known before it has bytes
        while self._dropped_blobs:
            await blobs.discard(self._dropped_blobs.pop())
        return made

    async def zip(self, name: str, *, expires_s: float | None = None) -> ZipDraft:
        blobs, files = self._runners.blobs, self._runners.files
        made = await self.artifact(name, MEDIA_TYPE, expires_s=expires_s, layout=ZIP)
        if made.zip is None:
            layout, names = Layout(), Names()
            if made.offset:
                manifest = await blobs.reader(made.blob, None)
                try:
                    layout = await load(manifest, names)
                finally:
                    await manifest.close()
            made.zip = ZipDraft(
                layout, names, blobs, made.blob, self.files.find, made.write, files.keep_digests
            )
        return made.zip

    async def folder(self) -> Path:
        if self._folder is None:
            self._folder = await self._runners.children.make_folder(self.job_id)
        return self._folder

    async def program(
        self,
        argv: Sequence[str],
        *,
        stdin: Reader | None = None,
        files: Sequence[Reader] = (),
        stdout: _Artifact | None = None,
        env: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Program:
        given = {_PATHS_FROM + n: _descriptor(reader) for n, reader in enumerate(files)}
        if stdin is not None:
            given[0] = _descriptor(stdin)
        program = await self.spawn(argv, given, stdout=stdout, env=env, limits=limits)
        if stdin is not None:
            program.watch_input(given[0])
        return program

    def _only_table(self, name: str) -> str:
        """The name of the job's table, as it is stored. Raises TypeError for a second one."""
        name = clean_name(name, "name")
        for other, known in self._mark.get("artifacts", {}).items():
            if known.get("layout") == TABLE and other != name:
                raise TypeError(f"{self._kind.name} makes a second table; a job makes one")
        return name

    # For what runs in a child

    async def place_table(self, name: str, expires_s: float | None) -> tuple[Path, dict[str, Any]]:
        """Where the child makes the job's table, and the mark that it begins with."""
        made = await self.artifact(
            self._only_table(name),
            TABLE_TYPE,
            expires_s=expires_s,
            layout=TABLE,
            is_elsewhere=True,
        )
        if made.layout != TABLE:
            raise SluiceError("kind-failed", f"{self._kind.name} has made {name} as another file.")
        self._base = self._base or self._mark
        return await self._runners.blobs.place(made.blob), self._mark

    def _take_table(self) -> None:
        """The child that made a table has ended and closed it."""
        self._artifacts = {
            name: artifact
            for name, artifact in self._artifacts.items()
            if artifact.layout != TABLE or artifact.table is not None
        }

    async def spawn(
        self,
        argv: Sequence[str],
        fds: Mapping[int, int],
        *,
        stdout: _Artifact | None = None,
        env: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        make: Callable[[Process, Child], Program] = Program,
    ) -> Program:
        """Start a program with these descriptors, and with pipes for what it says."""
        folder = await self.folder()
        pipes: dict[int, int] = {}
        out, err = pipe_to(pipes, 1), pipe_to(pipes, 2)
        try:
            child = await self._runners.children.start(
                argv,
                cwd=folder,
                env={"HOME": str(folder), "TMPDIR": str(folder), **(env or {})},
                fds={**fds, **pipes},
                limits=msgspec.convert(limits or {}, Limits),
            )
        except BaseException:
            os.close(out)
            os.close(err)
            raise
        finally:
            for fd in pipes.values():
                os.close(fd)
        program = make(self, child)
        self._programs.append(program)
        if stdout is None:
            program.listen_lines(out, "out")
        else:
            program.listen(out, artifact_handler(stdout))
        program.listen_lines(err, "err")
        return program

    async def resolve(self, host: str, port: int) -> Sequence[Address]:
        return await self._runners.resolver.resolve(host, port)

    async def attend(self, news: asyncio.Future[None], wait_s: float) -> None:
        """Wait for news at most so long, standing at a checkpoint."""
        if self.want == "run":
            loop = asyncio.get_running_loop()
            timer = loop.call_later(wait_s, _done, news)
            self._listens = True
            try:
                await self._wait(news)
            finally:
                self._listens = False
                timer.cancel()
        if self.want != "run":
            await self._obey()

    def note(self, cursor: Any = None, **marks: Any) -> None:
        """A checkpoint that lies behind: keep what it said."""
        if cursor is not None:
            self._set_cursor(cursor)
        self.meter.mark(**marks)
        self._moved = True

    async def table(
        self,
        name: str,
        columns: Sequence[Column],
        *,
        about: Mapping[str, Any] | None = None,
        expires_s: float | None = None,
    ) -> _Table:
        name = self._only_table(name)
        check_columns(columns)
        made = await self.artifact(name, TABLE_TYPE, expires_s=expires_s, layout=TABLE)
        if made.table is None:
            raise TypeError(f"{self._kind.name} has made {name} as something else")
        if not made.table.columns:
            self._base = self._mark
            made.table.begin(columns, about or {}, self._mark)
        if made.table.columns != list(columns):
            raise SluiceError("kind-failed", f"The table {name} had other columns before.")
        return made.table

    # For the driver

    def wake(self, want: str) -> None:
        """Tell what is wanted; a process that waits somewhere looks at it at once."""
        self.want = want
        if self._nap is not None:
            _done(self._nap)

    def chill(self) -> None:
        """End a pause that is warm: its programs make room for others."""
        self.log("Its program was ended to make room for others; it starts anew.")
        self._cold_at = 0.0
        self.wake(self.want)

    def resume(self, job: Job) -> None:
        """Let the frame that is still here go on, with a new lease."""
        self.fence = job.fence
        self._job = job
        self.parked = False
        if self._clock is not None:
            self._clock.go()
        self.wake("run")

    def wrote(self, cursor: Any) -> dict[str, int]:
        """Rows were written up to a new cursor; the artefacts' lengths at it."""
        self._set_cursor(cursor)
        return self._offsets

    def sure(self, mark: dict[str, Any], *, by_table: bool = False) -> None:
        """A mark was committed, so no resume cuts the artefacts shorter than it says."""
        if by_table or not self._by_table:
            self._by_table |= by_table
            self._sure = mark["artifacts"]
            self._runners.manager.grew(self.job_id)

    def grown(self) -> dict[str, Any]:
        """The artefacts, with as many bytes as will never be others.

        A process that would begin anew makes other blobs, so all that is written counts.
        """
        if self._kind.resumable:
            return self._sure
        return {
            name: self._sure[name] | {"bytes": artifact.offset}
            for name, artifact in self._artifacts.items()
            if name in self._sure
        }

    @property
    def is_kept(self) -> bool:
        """It is paused, and its programs are stopped for as long as that lasts."""
        return self.parked and not self.over and self._cold_at == math.inf

    async def save(self) -> None:
        """Store cursor, progress and log lines, if they have changed."""
        await self._flush_log()
        if not self._kind.resumable:
            self._runners.manager.grew(self.job_id)
        dirty = self._dirty or self._clock is not None
        if dirty and not (self.parked or self.over):
            await self._save_cursor()

    # Inside

    async def _wait(self, future: asyncio.Future[None]) -> None:
        self._nap = future
        try:
            await future
        finally:
            self._nap = None

    async def _wait_s(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        timer = loop.call_later(seconds, _done, future)
        try:
            await self._wait(future)
        finally:
            timer.cancel()

    def _watch_step(self) -> None:
        step_s = perf_counter() - self._resumed
        if step_s > _SLOW_STEP_S:
            self._runners.manager.measures.held(self._kind.name, step_s)
            log.warning(
                "job %s (%s) held the loop for %.0f ms", self.job_id, self._kind.name, step_s * 1e3
            )

    async def _obey(self) -> None:
        """Hold or stop, as wanted; returns when the process shall go on."""
        while self.want != "run":
            if self.want == "cancel":
                raise JobCancelled
            for program in self._programs:
                await program.hold()
            try:
                await self._save_cursor()
            except SluiceError as error:
                tables = [artifact.table for artifact in self._artifacts.values()]
                if error.code == "kind-failed" or any(t is not None and t.lost for t in tables):
                    raise
                log.warning("job %s can't pause yet: %s", self.job_id, error)
                await self._wait_s(_AGAIN_S)
                continue
            if self.want == "stop":
                raise JobPaused
            if self.want == "pause":
                await self._park()
        for program in self._programs:
            program.go()

    async def _park(self) -> None:
        """Give the slot back and keep the frame, until a claim, a cancel, or the pause is cold."""
        self.parked = True
        self.meter.hold()
        if self._clock is not None:
            self._clock.hold()
        await self._tell(Input.UNWOUND, fence=self.fence)
        self._cold_at = monotonic() + self._runners.warm_s
        if self._programs and not self._kind.resumable:  # else it would have run for nothing
            self._cold_at = math.inf
            self._runners.keep(self)
        while self.parked and self.want not in ("cancel", "stop"):
            left_s = self._cold_at - monotonic()
            if left_s <= 0:
                break
            await self._wait_s(min(left_s, _LONG_S))
        if self.parked and self.want != "cancel":
            self.over = True
            raise JobPaused

    def _set_cursor(self, cursor: Any) -> None:
        self.cursor = cursor
        self._dirty = True
        if self._artifacts:
            self._offsets = {name: a.offset for name, a in self._artifacts.items()}

    async def _save_cursor(self) -> None:
        """Make the cursor durable, with what belongs to it.

        Where there is a table, its cursor counts; the row keeps the one from before the table, for
        the case that a power cut takes all of the table.
        """
        self._dirty = False
        for artifact in list(self._artifacts.values()):
            if artifact.table is not None:
                await artifact.table.commit()
        if self._base is None:
            mark = await self.make_mark(self.cursor, self._offsets)
        else:
            mark = self._base | {"artifacts": _cut_to(self._known(self._offsets), self._base)}
        await self._runners.state.save(
            self.job_id, self.fence, cursor=mark, progress=self.meter.progress()
        )
        self.sure(mark)

    def _known(self, offsets: Mapping[str, int]) -> dict[str, Any]:
        """The artefacts with these lengths; also those that were not opened again so far."""
        opened = {
            name: {
                "blob": artifact.blob,
                "bytes": offsets.get(name, 0),
                "media_type": artifact.media_type,
                "expires_s": artifact.expires_s,
                "layout": artifact.layout,
            }
            for name, artifact in self._artifacts.items()
        }
        known: dict[str, Any] = self._mark.get("artifacts", {})
        return known | opened

    async def make_mark(self, cursor: Any, offsets: Mapping[str, int]) -> dict[str, Any]:
        """A cursor and the artefacts' lengths at it, which are on the disk then."""
        mark: dict[str, Any] = {
            "v": self._kind.cursor_version,
            "cursor": cursor,
            "artifacts": self._known(offsets),
        }
        if self._clock is not None:
            mark["ran_s"] = round(self._clock.ran_s, 3)
        try:
            size = len(msgspec.json.encode(cursor))
        except (TypeError, ValueError) as error:
            raise SluiceError("kind-failed", f"The cursor is no JSON: {error}.") from error
        if size > _CURSOR_BYTES:
            raise SluiceError("kind-failed", "The cursor is longer than 64 KiB.")
        self._mark = mark
        for artifact in list(self._artifacts.values()):
            await artifact.sync()
        return mark

    async def _run(self) -> None:
        """The whole life of the process; reports its end."""
        try:
            await self._prepare()
            params = msgspec.convert(self._job.params, self._kind.params)
            data = await self._work(params)
            self.over = True
            await self._finish(data or {})
        except JobPaused:
            self.over = True
            if not self.parked:
                stopped = self.want == "stop"
                await self._tell(Input.SHUTDOWN if stopped else Input.UNWOUND, fence=self.fence)
        except (JobCancelled, asyncio.CancelledError):
            self.over = True
            if self._runners.closed:  # the next start puts it right
                return
            if self._late is not None:
                await self._fail(self._late)
            else:
                await self._tell(Input.UNWOUND)
        except Fenced:
            log.warning("job %s lost its lease (fence %d)", self.job_id, self.fence)
        except SluiceError as error:
            await self._fail(error)
        except Exception as error:
            log.error("job %s (%s) failed", self.job_id, self._kind.name, exc_info=error)
            detail = f"The process raised {type(error).__name__}; its log has more."
            self.log(f"{type(error).__name__}: {error}")
            await self._fail(SluiceError("kind-failed", detail))
        finally:
            await self._let_go()

    async def _work(self, params: Any) -> dict[str, Any] | None:
        """Run the kind where it belongs; its programs have ended when this returns or raises."""
        in_child = self._kind.runs_in(params) == "child"
        run = run_in_child(self, self._kind, params) if in_child else self._kind.run(self, params)
        grace_s = self._runners.child_grace_s
        try:
            data: dict[str, Any] | None = await self._stepped(run)
            self._take_table()
            return data
        except (JobPaused, asyncio.CancelledError):  # it stands still, or the grace is over
            grace_s = 0
            raise
        finally:
            if self._clock is not None:
                self._clock.hold()
            await self._end_programs(grace_s)

    async def _end_programs(self, grace_s: float) -> None:
        """End all of them; at once when this is cancelled, for by then the grace is over."""
        while self._programs:
            program = self._programs.pop()
            try:
                await program.end(grace_s)
            except BaseException:
                await self._end_programs(0)
                raise

    @types.coroutine
    def _stepped(self, work: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Drive ``work``: whenever it gets the loop, and be it by itself, a new slice begins."""
        resume, value = work.send, None
        while True:
            self._resumed = perf_counter()
            try:
                pending = resume(value)
            except StopIteration as end:
                return end.value
            finally:
                self._watch_step()
            try:
                value = yield pending
                resume = work.send
            except BaseException as error:
                resume, value = work.throw, error

    async def _tell(self, input: Input, **facts: Any) -> Job | None:
        """Report; also by one that is being cancelled, as what follows a commit must happen."""
        manager = self._runners.manager
        return await asyncio.shield(manager.spawn(manager.insist(self.job_id, input, **facts)))

    async def _prepare(self) -> None:
        """Find where to go on; where rows were written, the cursor that came with them wins."""
        if not self._kind.resumable:
            for artifact in self._mark.get("artifacts", {}).values():
                await self._runners.blobs.discard(artifact["blob"])
            self.cursor, self._mark = None, {}
        await self._find_table()
        if self._mark and self._mark.get("v") != self._kind.cursor_version:
            raise SluiceError("cursor-incompatible")

    async def _find_table(self) -> None:
        known = self._mark.get("artifacts", {})
        for table in known.values():
            if table.get("layout") != TABLE:
                continue
            mark = TableFile.found(await self._runners.blobs.place(table["blob"]))
            if mark is None:
                continue
            self._base = self._mark
            self._mark = mark | {"artifacts": _cut_to(known, mark) | mark["artifacts"]}
            self.cursor = mark["cursor"]
            self.sure(self._mark, by_table=True)

    async def _finish(self, data: dict[str, Any]) -> None:
        files, artifacts = [], []
        for name, known in self._mark.get("artifacts", {}).items():
            expires_s = known.get("expires_s")
            layout = known.get("layout", PLAIN)
            if layout == ZIP:
                await self.zip(name, expires_s=expires_s)
            else:
                await self.artifact(name, known["media_type"], expires_s=expires_s, layout=layout)
        self._artifacts = {name: self._artifacts[name] for name in self._known({})}
        for artifact in self._artifacts.values():
            if artifact.table is not None:  # its last commit syncs the others, so it comes first
                await self._seal(artifact.blob, artifact.table)
        for artifact in self._artifacts.values():
            zip_bytes = await artifact.zip.finish() if artifact.zip is not None else None
            await artifact.sync()
            await artifact.close()
            size = await self._runners.blobs.publish(artifact.blob, artifact.name)
            size = size if zip_bytes is None else zip_bytes
            published = now_ms()
            lasts_s = artifact.expires_s
            files.append(
                File(
                    id=artifact.blob,
                    name=artifact.name,
                    bytes=size,
                    media_type=artifact.media_type,
                    owner=self.owner,
                    job=self.job_id,
                    created_at=published,
                    expires_at=None if lasts_s is None else published + round(lasts_s * 1000),
                    layout=artifact.layout,
                )
            )
            artifacts.append(
                Artifact(
                    name=artifact.name,
                    file=artifact.blob,
                    bytes=size,
                    media_type=artifact.media_type,
                )
            )
        await self._flush_log()
        main = [file for file in files if file.layout == TABLE] or files
        done = await self._runners.manager.finish(
            self.job_id,
            self.fence,
            files,
            result=Result(file=main[0].id if len(main) == 1 else None, data=data),
            artifacts=tuple(artifacts),
        )
        if done is not None and done.state == SUCCEEDED:
            self._artifacts.clear()
        for artifact in self._artifacts.values():  # the end came too late
            await self._runners.blobs.unpublish(artifact.blob)

    async def _seal(self, blob: str, table: _Table) -> None:
        """Make a table one file, and force it to the disk."""
        blobs = self._runners.blobs
        await table.finish()
        writer = await blobs.writer(blob, self.fence, offset=await blobs.size(blob) or 0)
        try:
            await writer.sync()
        finally:
            await writer.close()

    async def _fail(self, error: SluiceError) -> None:
        self.over = True
        error = self._late or error
        retry_at = self._retry_at(error)
        if retry_at is not None:
            self.log(f"{error.code}: {error.detail} It is tried again at {rfc3339(retry_at)}.")
            try:
                await self._save_cursor()
            except SluiceError as unsaved:  # what was saved before is as good, only older
                log.warning("job %s: its cursor could not be saved: %s", self.job_id, unsaved)
        await self._flush_log()
        await self._tell(Input.FAIL, fence=self.fence, error=error, retry_at=retry_at)

    def _retry_at(self, error: SluiceError) -> int | None:
        """When the job is tried again after this error, if its kind grants it."""
        retry = self._kind.retry
        if retry is None or not error.entry.retry:
            return None
        delay_s = retry.delay_s(self._job.retries, random())
        return None if delay_s is None else now_ms() + round(delay_s * 1000)

    def _is_alive(self) -> bool:
        """See Clock: a checkpoint has come, or it waits where it does not have to."""
        moved, self._moved = self._moved, False
        return moved or (self._nap is not None and not self._listens)

    def _end_late(self, error: SluiceError) -> None:
        """The clock ends what has not ended by itself, wherever it stands."""
        if self.over or self.task.done():
            return
        self._late = error
        self.task.cancel()
        asyncio.get_running_loop().call_later(_LATE_S, self._leave)

    def _leave(self) -> None:
        """Go on without a frame that does not end: its job has failed, and has no lease."""
        if self.task.done() or self.over or self._runners.closed:
            return
        log.warning("job %s (%s) does not end when it is told to", self.job_id, self._kind.name)
        self.over = self.lost = True
        self.task.cancel()
        manager, error = self._runners.manager, self._late
        assert error is not None
        retry_at = self._retry_at(error)
        manager.spawn(
            manager.insist(
                self.job_id, Input.FAIL, fence=self.fence, error=error, retry_at=retry_at
            )
        )

    async def _let_go(self) -> None:
        """Close everything. What nobody will find again is removed.

        That is all of a job that was ended by force meanwhile, or will be cancelled, and an
        artefact that was about to be written down when the force came.
        """
        for artifact in self._artifacts.values():
            await artifact.close()
        if self._folder is not None:
            await self._runners.children.remove_folder(self._folder)
        if self._runners.closed:
            return
        await self._flush_log()
        if not self._artifacts:
            return
        now = await self._runners.state.get(self.job_id)
        over = now is None or now.state in FINAL or now.want == "cancel"
        found_again = [] if over or now is None else _blobs(now)
        for artifact in self._artifacts.values():
            if artifact.blob not in found_again:
                await self._runners.blobs.discard(artifact.blob)

    async def _flush_log(self) -> None:
        lines, self._lines = self._lines, []
        if self._dropped:
            lines.append(f"({self._dropped} lines were dropped: too many at once)")
            self._dropped = 0
        if lines:
            try:
                await self._runners.state.log(self.job_id, lines, now_ms())
                self._runners.manager.grew(self.job_id)
            except SluiceError as error:
                log.warning("job %s: its log could not be saved: %s", self.job_id, error)


class Runners:
    """The driver of all processes."""

    process: type[Process] = Process  # a harness has one that is watched

    def __init__(
        self,
        manager: Manager,
        state: State,
        blobs: Blobs,
        files: Files,
        *,
        warm_s: float,
        children: Children,
        child_grace_s: float = 5.0,
        max_stopped: int = 64,
        resolver: Resolver | None = None,
    ) -> None:
        self.manager = manager
        self.state = state
        self.blobs = blobs
        self.files = files
        self.warm_s = warm_s
        self.children = children
        self.child_grace_s = child_grace_s
        self.max_stopped = max_stopped
        self.resolver = resolver or Resolver(children)
        self.lane = Lane()
        self.closed = False
        self._live: dict[str, Process] = {}
        manager.use(self)

    def timeouts_s(self, kind: Kind) -> tuple[float | None, float | None]:
        """How long a job of a kind may run, and be silent: a setting comes before the kind."""
        limits = self.manager.limits
        return (
            limits.run_timeouts_s.get(kind.name, kind.run_timeout_s),
            limits.stall_timeouts_s.get(kind.name, kind.stall_timeout_s),
        )

    def start(self, job: Job) -> None:
        """See Driver: go on in the frame that is still here, else begin at the cursor."""
        process = self._live.get(job.id)
        if process is None or process.task.done() or process.lost:
            self._begin(job)
        elif not process.over:  # it was paused warm, or by force without having noticed
            process.resume(job)
        else:
            self.manager.spawn(self._begin_after(process, job))

    def keep(self, process: Process) -> None:
        """Keep the stopped programs of a paused job; of too many, the longest paused go."""
        kept = [p for p in self._live.values() if p.is_kept and p is not process]
        for other in kept[: max(0, len(kept) + 1 - self.max_stopped)]:
            other.chill()

    async def _begin_after(self, process: Process, job: Job) -> None:
        """Begin when the old frame has ended, if that is then still wanted."""
        await asyncio.wait([process.task])
        now = await self.state.get(job.id)
        if now is not None and now.state == RUNNING and now.fence == job.fence:
            self._begin(now)

    def _begin(self, job: Job) -> None:
        if self.closed:
            return
        kind = self.manager.kinds.get(job.kind)
        assert kind is not None
        process = self.process(self, job, kind)
        self._live[job.id] = process
        if job.crashes:  # the next one must not find it where it was, if it gets on
            asyncio.get_running_loop().call_later(_EARLY_S, self._save_early, process)

        def forget(task: asyncio.Task[None]) -> None:
            if self._live.get(job.id) is process:
                del self._live[job.id]
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("the runner of job %s failed", job.id, exc_info=error)

        process.task.add_done_callback(forget)

    def signal(self, job: Job) -> bool:
        """See Driver."""
        process = self._live.get(job.id)
        if process is None or process.task.done() or process.lost:
            return False
        if process.parked and (process.over or job.want == "pause"):
            return False
        if not (process.parked and job.want == "run"):
            process.wake(job.want)
        return True

    def tune(self, job: Job) -> None:
        """See Driver; a process has no limit."""

    def force(self, job: Job) -> None:
        """See Driver."""
        process = self._live.get(job.id)
        if process is not None and not process.over:
            process.task.cancel()

    async def rollback(self, job: Job) -> Rollback | None:
        """See Driver: run the undo journal from its end, one durable step after the other."""
        process = self._live.get(job.id)
        if process is not None and not process.lost:
            process.wake("cancel")
            await asyncio.wait([process.task])
        now = await self.state.get(job.id)
        if now is None:
            return None
        entries = list(now.undo)
        mark = dict(now.cursor or {})
        # How many there were, and how many failed, is kept with the entries that are left.
        total, failed = mark.get("rollback", (len(entries), 0))
        done, noted = total - len(entries), monotonic()
        kind = self.manager.kinds.get(now.kind)
        while entries:
            failed += not await _undo(kind, entries.pop())
            kept: dict[str, Any] = {}
            if mark.get("rollback") != [total, failed]:
                mark["rollback"] = [total, failed]
                kept = {"cursor": mark}
            await self.state.save(now.id, now.fence, undo=tuple(entries), **kept)
            done += 1
            if monotonic() - noted > _NOTE_S:
                noted = monotonic()
                await self.manager.undone(now.id, Rollback(done=done, total=total, failed=failed))
        await self.discard(now)
        if total == 0:
            return None
        return Rollback(done=done, total=total, failed=failed)

    async def discard(self, job: Job) -> None:
        """See Driver: the unfinished artefacts."""
        for blob in _blobs(job):
            await self.blobs.discard(blob)

    async def recover(self, job: Job, same_boot: bool) -> list[str]:
        """See Driver: artefacts that were published without a row are unfinished again."""
        for blob in _blobs(job):
            await self.blobs.unpublish(blob)
        return _blobs(job)

    def glance(self, job: Job, finished: bool = False) -> Glance:
        """See Driver."""
        process = self._live.get(job.id)
        if process is None:
            return Glance(None, None)
        meter = process.meter
        return Glance(meter.finished() if finished else meter.progress(), None)

    def grown(self, job: Job, name: str | None) -> Grown | None:
        """See Driver."""
        if job.state in FINAL:
            for made in job.artifacts:
                if name in (None, made.name, made.file):
                    return Grown(made.file, made.name, made.media_type, made.bytes, made.bytes)
            raise SluiceError(
                "content-unknown", "The job has made no file of that name.", job=job.id
            )
        process = self._live.get(job.id)
        kind = self.manager.kinds.get(job.kind)
        known = process.grown() if process is not None else _artifacts(kind, job)
        for found, artifact in known.items():
            if name in (None, found, artifact["blob"]):
                if artifact.get("layout", PLAIN) != PLAIN:  # its blob holds something else
                    return None
                size = artifact["bytes"]
                return Grown(artifact["blob"], found, artifact["media_type"], size, None)
        return None

    def changed(self) -> Iterable[tuple[str, Progress]]:
        """See Driver."""
        for job_id, process in list(self._live.items()):
            if process.meter.changed:
                process.meter.changed = False
                yield job_id, process.meter.progress()

    async def save(self) -> None:
        """See Driver. Some share a commit, so that the others of a thousand get there in time."""
        lives = list(self._live.values())
        for at in range(0, len(lives), _SAVES):
            await asyncio.gather(*(self._try_save(process) for process in lives[at : at + _SAVES]))

    async def _try_save(self, process: Process) -> None:
        try:
            await process.save()
        except (Fenced, SluiceError) as error:
            log.warning("job %s: its cursor could not be saved: %s", process.job_id, error)

    def _save_early(self, process: Process) -> None:
        if not (process.task.done() or self.closed):
            self.manager.spawn(self._try_save(process))

    async def stop(self) -> None:
        """See Driver."""
        try:
            while processes := self._unfinished():
                for process in processes:
                    process.wake("stop" if process.want != "cancel" else "cancel")
                await asyncio.wait([process.task for process in processes])
        finally:  # the grace may be over
            self.closed = True
            left = [process.task for process in self._unfinished()]
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left, timeout=_LAST_S)

    def _unfinished(self) -> list[Process]:
        return [process for process in self._live.values() if not process.task.done()]


def _descriptor(reader: Reader) -> int:
    fd = reader.fileno()
    if fd is None:
        raise SluiceError("kind-failed", "A program can't read that file: it is made when read.")
    return fd


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _blobs(job: Job) -> list[str]:
    artifacts = (job.cursor or {}).get("artifacts", {})
    return [artifact["blob"] for artifact in artifacts.values()]


def _artifacts(kind: Kind | None, job: Job) -> dict[str, Any]:
    """The artefacts in a job's row; none where nothing of them will be used again."""
    if kind is None or not kind.resumable:
        return {}
    known: dict[str, Any] = (job.cursor or {}).get("artifacts", {})
    return known


def _cut_to(known: Mapping[str, Any], mark: Mapping[str, Any]) -> dict[str, Any]:
    """Artefacts with the lengths that they have in a mark; what is not in it has nothing."""
    lengths = {name: artifact["bytes"] for name, artifact in mark.get("artifacts", {}).items()}
    return {name: artifact | {"bytes": lengths.get(name, 0)} for name, artifact in known.items()}


async def _undo(kind: Kind | None, entry: Undo) -> bool:
    """Take one effect back; False if that failed for good."""
    undo = kind.undo.get(entry.name) if kind is not None else None
    if undo is None:
        log.error("nothing undoes %r any more", entry.name)
        return False
    for tries in range(1, _UNDO_TRIES + 1):
        try:
            async with asyncio.timeout(_UNDO_S):
                await undo(**entry.args)
            return True
        except Exception as error:
            log.warning("undo %r failed (%d of %d): %s", entry.name, tries, _UNDO_TRIES, error)
    return False
