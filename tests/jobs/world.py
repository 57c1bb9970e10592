"""The whole domain on one loop and one folder, with kinds of the test's own; and its sudden end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any, TypeVar

import msgspec

from jobs import states
from jobs.add import add
from jobs.children import Children
from jobs.files import Files, now_ms
from jobs.kinds import Kind, Registry, kind_of
from jobs.manager import Limits, Manager
from jobs.resolve import Resolver
from jobs.runners import Runners
from jobs.uploads import Limits as UploadLimits
from jobs.uploads import Uploads
from jobs.warden import processes
from storage import By, Event, File, Job, Writer
from storage.blobs_local import LocalBlobs
from storage.state_sqlite import SqliteState

T = TypeVar("T")
OWNER = "ann"
HOLDING = ("running", "pausing", "cancelling")  # a slot


class Nothing(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """No parameters."""


def a_kind(name: str, run: Callable[..., Any], **more: Any) -> Kind:
    """A kind made of one coroutine function."""
    fields = {"KIND": name, "TITLE": name, "Params": Nothing, "run": run} | more
    return kind_of(SimpleNamespace(**fields))


class Dead(asyncio.CancelledError):
    """The process was killed: nothing is written any more."""


class MortalState(SqliteState):
    """A state that writes nothing after its death."""

    dead = False

    def _write(self, change: Any, *, full: bool = True) -> Any:
        if self.dead:
            raise Dead
        return super()._write(change, full=full)

    def die(self) -> None:
        """Drop what was not committed."""
        self.dead = True
        for handle in (self._flushing, self._checkpoint):
            if handle is not None:
                handle.cancel()
        for write in self._queue:
            write.future.cancel()
        self._con.close()


class MortalBlobs(LocalBlobs):
    """Blobs that don't change after their death; only the calls of processes matter here."""

    dead = False

    async def writer(
        self, blob_id: str, fence: int, *, offset: int = 0, length: int | None = None
    ) -> Any:
        """See the contract."""
        self._check()
        return MortalWriter(
            self, await super().writer(blob_id, fence, offset=offset, length=length)
        )

    async def place(self, blob_id: str) -> Path:
        """See the contract."""
        self._check()
        return await super().place(blob_id)

    async def publish(self, blob_id: str, name: str) -> int:
        """See the contract."""
        self._check()
        return await super().publish(blob_id, name)

    async def link(self, blob_id: str, source_id: str, source_name: str) -> None:
        """See the contract."""
        self._check()
        await super().link(blob_id, source_id, source_name)

    async def unpublish(self, blob_id: str) -> bool:
        """See the contract."""
        self._check()
        return await super().unpublish(blob_id)

    async def discard(self, blob_id: str) -> None:
        """See the contract."""
        self._check()
        await super().discard(blob_id)

    def _check(self) -> None:
        if self.dead:
            raise Dead


class MortalWriter:
    """A writer whose blobs may die."""

    def __init__(self, blobs: MortalBlobs, writer: Writer) -> None:
        self._blobs = blobs
        self._writer = writer

    async def write(self, view: memoryview) -> int:
        """See the contract."""
        self._blobs._check()
        return await self._writer.write(view)

    async def sync(self) -> int:
        """See the contract."""
        self._blobs._check()
        return await self._writer.sync()

    async def close(self) -> None:
        """See the contract."""
        await self._writer.close()


class World:
    """A service without its network."""

    def __init__(
        self,
        folder: Path,
        *kinds: Kind,
        warm_s: float = 30.0,
        limits: Limits | None = None,
        stop_s: float = 20.0,
        uploads: UploadLimits | None = None,
        child_grace_s: float = 20.0,
        resolver: Callable[[Children], Resolver] = Resolver,
    ) -> None:
        self.folder = folder
        self.kinds = kinds
        self.warm_s = warm_s
        self.limits = limits or Limits()
        self.stop_s = stop_s
        self.child_grace_s = child_grace_s
        self.make_resolver = resolver
        self.upload_limits = uploads or UploadLimits(1 << 50, 3600.0, 3600.0, 300.0, "interval")

    async def __aenter__(self) -> World:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Start, as the server does."""
        self.blobs = MortalBlobs(self.folder)
        await self.blobs.open()
        self.state = MortalState(self.folder / "state.db")
        boot = await self.state.open()
        self.boot = boot
        self.manager = Manager(self.state, Registry(self.kinds), boot, self.limits)
        self.files = Files(self.state, self.blobs)
        self.children = Children(self.folder)
        await self.children.open()
        self.runners = Runners(
            self.manager,
            self.state,
            self.blobs,
            self.files,
            warm_s=self.warm_s,
            children=self.children,
            child_grace_s=self.child_grace_s,
            resolver=self.make_resolver(self.children),
        )
        self.uploads = Uploads(self.manager, self.state, self.blobs, self.upload_limits)
        keep = await self.manager.recover()
        self.swept = await self.blobs.sweep(set(keep))
        self.manager.open()

    async def close(self) -> None:
        """Stop, as the server does."""
        await self.manager.close(self.stop_s)
        await self.children.close()
        await self.blobs.close()
        await self.state.close()

    async def crash(self) -> None:
        """kill -9: what was not committed is lost, and nobody tidies up."""
        logging.disable(logging.CRITICAL)
        try:
            self.state.die()
            self.blobs.dead = True
            await self.children.close()
            for timer in (*self.manager._alarms.values(), self.manager._due_timer):
                if timer is not None:
                    timer.cancel()
            while left := self._tasks():
                for task in left:
                    task.cancel()
                await asyncio.wait(left, timeout=0.05)
            await self.blobs.close()
        finally:
            logging.disable(logging.NOTSET)

    def _tasks(self) -> set[asyncio.Task[Any]]:
        """What still runs of it."""
        frames = {process.task for process in self.runners._live.values()}
        return {task for task in self.manager._tasks | frames if not task.done()}

    async def restart(self) -> None:
        """Crash, and start again on the same folder."""
        await self.crash()
        await self.open()

    # Short ways

    def by(self) -> By:
        """The author of a command."""
        return By(actor=OWNER, via="rest", at=now_ms())

    async def start(
        self, kind: str, params: dict[str, Any] | None = None, *, owner: str = OWNER, **more: Any
    ) -> str:
        """Start a job; its id."""
        checked = self.manager.kinds.parse(kind, params or {})
        job, _ = await self.manager.start(kind, checked, owner=owner, by=self.by(), **more)
        return job.id

    async def store(self, name: str, data: bytes) -> File:
        """Store a file."""
        path = self.folder / "in" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return await add(self.uploads, path, OWNER)

    async def tell(self, job_id: str, verb: str, **more: Any) -> tuple[str, int]:
        """A command; the state after it and the status of its answer."""
        job, status = await self.manager.command(job_id, verb, owner=OWNER, by=self.by(), **more)
        return job.state, status

    async def job(self, job_id: str) -> Job:
        """The job now."""
        return await self.manager.get(job_id, OWNER)

    async def until(self, job_id: str, *wanted: str, within_s: float = 60) -> Job:
        """The job as soon as it is in one of these states; woken by the event log."""
        end = monotonic() + within_s
        while True:
            seq = self.state._seq
            job = await self.job(job_id)
            if job.state in wanted:
                await self._heard(job)
                return job
            assert monotonic() < end, f"{job.kind} is {job.state}, not {wanted}"
            try:
                await asyncio.wait_for(self.state.wait(seq), 0.2)
            except TimeoutError:
                continue

    async def _heard(self, job: Job) -> None:
        """Let the manager hear of a commit, too: a row is seen a moment before that."""
        turns = 0 if job.state in HOLDING else 20
        while turns and job.id in self.manager._slots:
            turns -= 1
            await asyncio.sleep(0)

    async def history(self, job_id: str) -> list[Event]:
        """All events of a job."""
        return await self.manager.history(job_id, OWNER, 0, 10_000)

    async def path(self, job_id: str) -> list[str]:
        """The states that the job went through."""
        words = [event.to for event in await self.history(job_id)]
        return [word for i, word in enumerate(words) if i == 0 or words[i - 1] != word]

    def unfinished(self) -> list[str]:
        """Names in tmp/."""
        return sorted(path.name for path in (self.folder / "tmp").iterdir())

    def published(self) -> dict[str, bytes]:
        """What is in uploads/: id/name → bytes."""
        root = self.folder / "uploads"
        return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in root.glob("*/*")}

    def unsound(self, jobs: list[Job]) -> list[str]:
        """What is wrong with these rows, and with the slots."""
        found = [
            f"{job.kind} {job.state}: {text}" for job in jobs for text in states.violations(job)
        ]
        if len(self.manager._slots) > self.limits.slots:
            found.append(f"{len(self.manager._slots)} slots are taken")
        return found


async def eventually(check: Callable[[], T], what: str, within_s: float = 60) -> T:
    """The first true value of ``check``, asked once in a few turns of the loop."""
    end = monotonic() + within_s
    while not (value := check()):
        assert monotonic() < end, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.002)
    return value


def descendants() -> list[int]:
    """The processes of programs that run now; the warden is none."""
    children: dict[int, list[int]] = {}
    for pid, process in processes().items():
        if process.state != "Z":
            children.setdefault(process.parent, []).append(pid)
    found: list[int] = []
    below = children.get(os.getpid(), [])  # the warden
    while below := [child for pid in below for child in children.get(pid, [])]:
        found += below
    return sorted(found)


def standing() -> list[int]:
    """These processes if all of them are stopped, which each is as soon as it gets a turn.

    One that waits in vfork (D) for a child that is stopped before it becomes a program stands, too.
    """
    pids, table = descendants(), processes()
    return pids if all(pid in table and table[pid].state in "TD" for pid in pids) else []
