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
import types
from collections import deque
from collections.abc import (
    Callable,
    Coroutine,
    Generator,
    Mapping,
    Sequence,
)
from functools import partial
from pathlib import Path
from random import random
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

import msgspec

from errors import SluiceError
from jobs.children import Child, Limits
from jobs.clock import Clock
from jobs.context import Draft, OwnerFiles, TableDraft
from jobs.files import clean_name, media_type_of, now_ms, uuid7
from jobs.kinds import Address, Column, JobCancelled, JobPaused, Kind
from jobs.programs import Program, artifact_handler, pipe_to
from jobs.progress import Meter
from jobs.remote import run_in_child
from jobs.rows import rfc3339
from jobs.states import FINAL, SUCCEEDED, Input
from jobs.tables import MEDIA_TYPE as TABLE_TYPE
from jobs.tables import TABLE
from jobs.zips import MEDIA_TYPE, PLAIN, ZIP, Layout, Names, ZipDraft, load
from storage import (
    Artifact,
    Fenced,
    File,
    Job,
    Reader,
    Result,
    Undo,
    Writer,
)
from storage.tables import TableFile, check_columns

if TYPE_CHECKING:
    from jobs.runners import Runners

log = logging.getLogger("sluice.runners")

_SLICE_S = 0.002
_SLOW_STEP_S = 0.02
_CURSOR_BYTES = 64 << 10
_LOG_BUFFER = 1000  # lines between two saves; more are counted and dropped
_LINE_CHARS = 4096
_MAX_UNDO = 10_000
_AGAIN_S = 1.0  # before a cursor that could not be saved is tried again
_LATE_S = 10.0  # for a process that is over its time to end
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


class Process:
    """One live process: the context that its coroutine sees, and its task."""

    def __init__(self, runners: Runners, job: Job, kind: Kind) -> None:
        self._runners = runners
        self._kind = kind
        self._job = job
        self.job_id = job.id
        self.owner = job.owner
        self.attempt = job.attempt
        self.files = OwnerFiles(runners.files, runners.state, job.owner, self._save_cursor)
        self.meter = Meter(kind.unit, job.progress)
        self.fence = job.fence
        self.want = "run"
        self.parked = False  # it has given its slot back; only a new claim lets it go on
        self.over = False  # its frame is ending; only a new one can go on
        self._mark: dict[str, Any] = job.cursor or {}
        self.cursor: Any = self._mark.get("cursor")
        self._artifacts: dict[str, Draft] = {}
        self._dropped_blobs: list[str] = []  # of artefacts that were begun anew
        self._offsets: dict[str, int] = {}  # of the artefacts, at the last cursor
        self._sure: dict[str, Any] = artifacts_of(
            kind, job
        )  # what a resume finds, whatever happens
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
    ) -> Draft:
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
        made_by: Writer | TableDraft | None
        if is_elsewhere:
            made_by = None
        elif layout == TABLE:
            file = TableFile(await blobs.place(blob), syncs=False)
            made_by = TableDraft(self, file, partial(blobs.sync, blob))
        else:
            made_by = await blobs.writer(blob, self.fence, offset=offset)
        media_type = media_type or media_type_of(name)
        made = Draft(blob, name, media_type, expires_s, layout, made_by, offset)
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
        stdout: Draft | None = None,
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
        stdout: Draft | None = None,
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
    ) -> TableDraft:
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

    async def _seal(self, blob: str, table: TableDraft) -> None:
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
        found_again = [] if over or now is None else blobs_of(now)
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


def _descriptor(reader: Reader) -> int:
    fd = reader.fileno()
    if fd is None:
        raise SluiceError("kind-failed", "A program can't read that file: it is made when read.")
    return fd


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def blobs_of(job: Job) -> list[str]:
    artifacts = (job.cursor or {}).get("artifacts", {})
    return [artifact["blob"] for artifact in artifacts.values()]


def artifacts_of(kind: Kind | None, job: Job) -> dict[str, Any]:
    """The artefacts in a job's row; none where nothing of them will be used again."""
    if kind is None or not kind.resumable:
        return {}
    known: dict[str, Any] = (job.cursor or {}).get("artifacts", {})
    return known


def _cut_to(known: Mapping[str, Any], mark: Mapping[str, Any]) -> dict[str, Any]:
    """Artefacts with the lengths that they have in a mark; what is not in it has nothing."""
    lengths = {name: artifact["bytes"] for name, artifact in mark.get("artifacts", {}).items()}
    return {name: artifact | {"bytes": lengths.get(name, 0)} for name, artifact in known.items()}
