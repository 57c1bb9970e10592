"""The driver of all processes: starts, signals, forces, rolls back, saves and stops them.

Strategy. Each live process (process.py) is a task; what is here finds it by its job, and does what
the manager asks of a driver. What can be many is done in slices: a thousand processes are saved and
tell their progress without holding the loop. The undo journal runs here, too, since it may outlive
the process that has written it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import (
    Iterable,
)
from time import monotonic
from typing import Any

from errors import SluiceError
from jobs.children import Children
from jobs.files import Files
from jobs.kinds import Kind
from jobs.manager import Glance, Grown, Manager
from jobs.process import Lane, Process, artifacts_of, blobs_of
from jobs.resolve import Resolver
from jobs.states import FINAL, RUNNING
from jobs.zips import PLAIN
from storage import (
    Blobs,
    Fenced,
    Job,
    Progress,
    Rollback,
    State,
    Undo,
)

log = logging.getLogger("sluice.runners")

_SAVES = 50  # cursors that are saved together: some 2 ms
_UNDO_TRIES = 3
_UNDO_S = 60.0
_NOTE_S = 0.25
_EARLY_S = 0.1  # until the first save of one that was running at a crash
_LAST_S = 0.5  # for those that must be cancelled at a stop


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
        for blob in blobs_of(job):
            await self.blobs.discard(blob)

    async def recover(self, job: Job, same_boot: bool) -> list[str]:
        """See Driver: artefacts that were published without a row are unfinished again."""
        for blob in blobs_of(job):
            await self.blobs.unpublish(blob)
        return blobs_of(job)

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
        known = process.grown() if process is not None else artifacts_of(kind, job)
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
