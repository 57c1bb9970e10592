"""One trial of a kind: its job runs on a folder of its own and is disturbed at one point.

Strategy. A *point* is where a disturbance can meet a job: a call of ``checkpoint``, ``sleep`` or
``undo``, and the end of ``run``. The kind is run through a ``Probe`` of its context that counts
them; at the trial's point it pauses or cancels the job by the manager, as a person would, or ends
the process by SIGKILL, before the call goes on. So each disturbance meets exactly that point.

Each trial has two sorts of processes, made by fork. A *warden* copies the prepared folder, and
starts the service's parts on it in a *server* process. When that was killed it starts another one,
which recovers like any start after a crash. The warden adopts whatever the kind leaves running.

Working folder and TMPDIR of the servers are an empty folder of the trial, so that files which a
kind makes by itself are seen, too.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import shutil
import signal
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple

import msgspec

from jobs import states
from jobs.add import add
from jobs.files import Files, now_ms
from jobs.kinds import JobCancelled, JobPaused, Kind, Registry, Source, load_kind
from jobs.manager import Manager
from jobs.runners import Runners
from jobs.uploads import Uploads
from storage import By, File, Filter, Job

OWNER = "local"

# What can be done to a job at a point, and what it means for people.
MODES = {
    "warm": "paused, and resumed where it stood",
    "cold": "paused, unwound, and resumed from its cursor",
    "kill": "killed after its cursor was saved, at the point that follows",
    "lost": "killed before its cursor was saved",
    "cancel": "cancelled",
    "abort": "cancelled, and killed before anything was undone",
}
ENDING = frozenset({"cancel", "abort"})
KILLING = frozenset({"kill", "lost", "abort"})
_ANYWHERE = frozenset({"checkpoint", "sleep"})

_SETTLE_S = 3.0  # for what follows the end of a job, and for processes that are told to end
_COPY_BYTES = 1 << 20
_WARM_S = 3600.0
_SUBREAPER = 36  # prctl: PR_SET_CHILD_SUBREAPER
_LOG_CHARS = 2000


class Ground(NamedTuple):
    """The parts of a service on one folder that a trial needs, recovered and open."""

    manager: Manager
    runners: Runners
    uploads: Uploads
    files: Files


Open = Callable[[Path, Registry, float], AbstractAsyncContextManager[Ground]]
"""Opens a folder as the server does: with these kinds, and a ``warm_s``."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is tried."""

    name: str  # of the kind
    source: Source
    params: dict[str, Any]
    base: str  # the prepared folder
    folder: str  # of this trial
    mode: str = ""  # one of MODES, or nothing
    point: int = 0  # from 1, over all sorts of points
    timeout_s: float = 60.0


class Artefact(msgspec.Struct, frozen=True, kw_only=True):
    """A file that the job has made; ``path`` has its content as a client would read it."""

    name: str
    media_type: str
    layout: str
    path: str


class Outcome(msgspec.Struct, kw_only=True):
    """What became of it."""

    state: str = ""
    data: Any = None
    error: str = ""
    artefacts: list[Artefact] = []
    points: list[str] = []  # sorts, in order
    reached: bool = False  # whether the job came to the plan's point
    wrong: list[str] = []  # what is left over, or unsound
    seconds: float = 0.0


def may(mode: str, sort: str) -> bool:
    """Whether a mode has a meaning at a sort of point."""
    return sort in _ANYWHERE or (sort in ("undo", "end") and mode in ("lost", "abort"))


# The probe: inside the job


class _Disturbance:
    """Counts the points of a job and does at one of them what the plan says."""

    def __init__(self, mode: str, point: int) -> None:
        self.points: list[str] = []
        self.reached = False
        self.frames = 0
        self.deaf: list[str] = []
        self._mode = mode
        self._point = point
        self._saved = False

    async def meet(self, sort: str, job_id: str, ground: Ground) -> None:
        """The job is about to do something of this sort."""
        self.points.append(sort)
        if self._saved:
            _die()
        if len(self.points) != self._point:
            return
        self.reached = True
        if self._mode in ("warm", "cold"):
            await _command(ground, job_id, "pause")
        elif self._mode in ENDING:
            await _command(ground, job_id, "cancel")
        if self._mode in ("lost", "abort"):
            _die()

    async def passed(self, ground: Ground) -> None:
        """The job has done it and goes on."""
        if self._mode == "kill" and len(self.points) == self._point:
            await ground.runners.save()
            self._saved = True


class _Probe:
    """A job's context, watched."""

    def __init__(self, ctx: Any, met: _Disturbance, ground: Ground) -> None:
        self._ctx = ctx
        self._met = met
        self._ground = ground
        self._ended = ""  # by what

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    async def checkpoint(self, cursor: Any = None, **progress: Any) -> None:
        """See Context."""
        await self.meet("checkpoint")
        await self._pass(self._ctx.checkpoint(cursor, **progress))

    async def sleep(self, seconds: float) -> None:
        """See Context."""
        await self.meet("sleep")
        await self._pass(self._ctx.sleep(seconds))

    async def undo(self, name: str, **args: Any) -> None:
        """See Context."""
        await self.meet("undo")
        await self._ctx.undo(name, **args)

    async def meet(self, sort: str) -> None:
        """The job is about to do something of this sort; not if it was told to end."""
        if self._ended:
            self._met.deaf.append(f"it went on after it was {self._ended}")
        await self._met.meet(sort, self._ctx.job_id, self._ground)

    async def _pass(self, call: Awaitable[None]) -> None:
        try:
            await call
        except (JobPaused, JobCancelled) as end:
            self._ended = "paused" if isinstance(end, JobPaused) else "cancelled"
            raise
        await self._met.passed(self._ground)


class _Live:
    """The ground under the kind that runs on it; it is there once the service is open."""

    def __init__(self, met: _Disturbance) -> None:
        self.met = met
        self.ground: asyncio.Future[Ground] = asyncio.get_running_loop().create_future()

    def watched(self, kind: Kind) -> Kind:
        """The kind, with a probe for its context."""

        async def run(ctx: Any, params: Any) -> Any:
            ground = await self.ground
            self.met.frames += 1
            probe = _Probe(ctx, self.met, ground)
            try:
                data = await kind.run(probe, params)
                await probe.meet("end")
                return data
            finally:
                self.met.frames -= 1

        return kind._replace(run=run)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _by() -> By:
    return By(actor=OWNER, via="system", at=now_ms())


async def _command(ground: Ground, job_id: str, verb: str) -> None:
    await ground.manager.command(job_id, verb, owner=OWNER, by=_by())


# A server process


async def prepare(opened: Open, folder: Path, files: list[Path]) -> None:
    """Make the folder that trials begin with: these files are stored in it."""
    async with opened(folder, Registry([]), 0.0) as ground:
        for path in files:
            await add(ground.uploads, path, OWNER)


async def _serve(plan: Plan, opened: Open) -> Outcome:
    """Start the job, or find it after a crash; drive it to its end, and look what is there."""
    folder = Path(plan.folder)
    begun = monotonic()
    met = _Disturbance(plan.mode, plan.point)
    live = _Live(met)
    kind = load_kind(plan.source, plan.name)
    warm_s = 0.0 if plan.mode == "cold" else _WARM_S
    async with opened(folder / "data", Registry([live.watched(kind)]), warm_s) as ground:
        manager = ground.manager
        held = set(_held(folder))
        live.ground.set_result(ground)
        page = await manager.find(Filter(owner=OWNER, kinds=(kind.name,)), None, 1)
        if page.items:
            job = page.items[0]
        else:
            params = manager.parse(kind.name, plan.params)
            job, _ = await manager.start(kind.name, params, owner=OWNER, by=_by())
        job = await _drive(ground, job.id, met, cold=plan.mode == "cold")
        found = await _look(ground, job, folder)
        found.points, found.reached = met.points, met.reached
        found.wrong += dict.fromkeys(met.deaf)
        found.wrong += await _settled(
            lambda: [
                *_left_files(Path(plan.base), folder, found),
                *(f"{name} is left open" for name in _held(folder) if name not in held),
                *_left_tasks(plan.source),
            ]
        )
    found.seconds = monotonic() - begun
    return found


async def _drive(ground: Ground, job_id: str, met: _Disturbance, *, cold: bool) -> Job:
    """Resume the job whenever it is paused; as it is at its end."""
    changed = asyncio.Event()

    def news(_: Job | None) -> None:
        changed.set()

    manager = ground.manager
    manager.listen(job_id, news)
    try:
        while True:
            changed.clear()
            job = await manager.get(job_id, OWNER)
            if job.state in states.FINAL:
                return job
            if job.state == states.PAUSED:
                while cold and met.frames:
                    await asyncio.sleep(0.001)
                await _command(ground, job_id, "resume")
            await changed.wait()
    finally:
        manager.unlisten(job_id, news)


async def _look(ground: Ground, job: Job, folder: Path) -> Outcome:
    """What the job has left in rows and files."""
    manager = ground.manager
    found = Outcome(state=job.state)
    error = job.error or {}
    found.error = f"{error.get('code', '')}: {error.get('detail', '')}" if error else ""
    if job.state == states.FAILED:
        lines = await manager.lines(job.id, OWNER, 0, 1000)
        found.error += "".join(f"\n{line}" for _, _, line in lines[-5:])
    found.wrong += states.violations(job)
    versions = [event.version for event in await manager.history(job.id, OWNER, 0, 100_000)]
    if versions != list(range(1, job.version + 1)):
        found.wrong.append("its history has gaps")
    if job.state != states.SUCCEEDED and job.undo:
        found.wrong.append(f"{len(job.undo)} entries of its undo journal were not run")
    if job.rollback is not None and job.rollback.failed:
        found.wrong.append(f"{job.rollback.failed} entries of its undo journal have failed")
    page = await ground.files.list(OWNER, None, None, 10_000)
    made = {file.id: file for file in page.items if file.job == job.id}
    known = {artifact.file for artifact in job.artifacts}
    found.wrong += [f"the file {made[i].name!r} is left" for i in made.keys() - known]
    found.wrong += [
        f"the artefact {a.name!r} is no file" for a in job.artifacts if a.file not in made
    ]
    names = {job.id: "JOB"}
    for number, artifact in enumerate(job.artifacts):
        names[artifact.file] = f"ARTEFACT-{number}"
        if artifact.file in made:
            path = folder / "out" / str(number)
            await _copy(ground, made[artifact.file], path)
            found.artefacts.append(
                Artefact(
                    name=artifact.name,
                    media_type=artifact.media_type,
                    layout=made[artifact.file].layout,
                    path=str(path),
                )
            )
    if job.result is not None:
        text = msgspec.json.encode(job.result.data).decode()
        for id, name in names.items():
            text = text.replace(id, name)
        found.data = msgspec.json.decode(text)
    return found


async def _copy(ground: Ground, file: File, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    reader = await ground.files.reader(file)
    try:
        with path.open("wb") as copy:
            at = 0
            while data := await reader.read(at, _COPY_BYTES):
                copy.write(data)
                at += len(data)
    finally:
        await reader.close()


async def _settled(look: Callable[[], list[str]]) -> list[str]:
    """What ``look`` finds when nothing more changes: nothing, or what stays for some time."""
    end = monotonic() + _SETTLE_S
    while (found := look()) and monotonic() < end:
        await asyncio.sleep(0.01)
    return found


def tree(folder: Path) -> set[str]:
    """The files below a folder, but for those of the rows."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(("state.db", "tables.db", "lock"))
    }


def _left_files(base: Path, folder: Path, found: Outcome) -> Iterator[str]:
    """Files of the data folder, and of the working folder of a job that has not succeeded."""
    left = tree(folder / "data") - tree(base)
    if found.state != states.SUCCEEDED:
        yield from (f"{name} is left in the data folder" for name in sorted(left))
        yield from (f"{name} is left" for name in sorted(tree(folder / "work")))
    else:
        tmp = (name for name in sorted(left) if name.startswith("tmp/"))
        yield from (f"{name} is left in the data folder" for name in tmp)


def _held(folder: Path) -> Iterator[str]:
    """Files of the trial that this process has open."""
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            inside = path.is_relative_to(folder / "data") or path.is_relative_to(folder / "work")
            if inside and not path.name.startswith(("state.db", "tables.db", "lock")):
                yield path.name


def _left_tasks(source: Source) -> Iterator[str]:
    """Tasks of the loop whose coroutine comes from the kind's file."""
    for task in asyncio.all_tasks():
        code = getattr(task.get_coro(), "cr_code", None)
        if code is not None and source[0] == "file" and code.co_filename == source[1]:
            yield f"the task {code.co_name} is left"


def _server(plan: Plan, opened: Open) -> None:
    """The life of a server process; never returns."""
    status = 1
    try:
        work = Path(plan.folder) / "work"
        os.chdir(work)
        os.environ["TMPDIR"] = tempfile.tempdir = str(work)
        outcome = asyncio.run(_serve(plan, opened))
        (Path(plan.folder) / "outcome").write_bytes(msgspec.json.encode(outcome))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


# A warden


def warden(plan: Plan, opened: Open) -> None:
    """Run a trial and leave its outcome in ``folder/result``; never returns."""
    status = 1
    folder = Path(plan.folder)
    try:
        os.setsid()
        ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1, 0, 0, 0)
        (folder / "work").mkdir(parents=True)
        _copy_base(Path(plan.base), folder / "data")
        with (folder / "log").open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        outcome = _watch(plan, opened)
        (folder / "result").write_bytes(msgspec.json.encode(outcome))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _copy_base(base: Path, data: Path) -> None:
    """Stored files never change, so that links will do for them."""

    def copy(source: str, target: str) -> None:
        if Path(source).is_relative_to(base / "uploads"):
            os.link(source, target)
        else:
            shutil.copyfile(source, target)

    shutil.copytree(base, data, copy_function=copy)


def _watch(plan: Plan, opened: Open) -> Outcome:
    """Start servers until one has seen the end of the job."""
    now, killed, left = plan, False, []
    while True:
        pid = os.fork()
        if pid == 0:
            _server(now, opened)
        status = _wait(pid, plan.timeout_s + _SETTLE_S)
        left += _orphans()
        if status == -signal.SIGKILL and now.mode in KILLING:
            now, killed = msgspec.structs.replace(plan, mode="", point=0), True
            continue
        break
    log = (Path(plan.folder) / "log").read_text(errors="replace")[-_LOG_CHARS:]
    if status is None:
        return Outcome(state="hanging", error=f"It did not end in {plan.timeout_s:.0f} s.\n{log}")
    if status != 0:
        return Outcome(state="crashed", error=f"The server ended with {status}.\n{log}")
    found = msgspec.json.decode((Path(plan.folder) / "outcome").read_bytes(), type=Outcome)
    found.reached |= killed
    found.wrong += [f"the process {name!r} is left" for name in left]
    if found.state == states.FAILED:
        found.error += f"\n{log}"
    return found


def _wait(pid: int, timeout_s: float) -> int | None:
    """The exit status of a child, negative for a signal; None if it had to be killed."""
    pidfd = os.pidfd_open(pid)
    try:
        waiting = select.poll()
        waiting.register(pidfd, select.POLLIN)
        in_time = bool(waiting.poll(timeout_s * 1000))
    finally:
        os.close(pidfd)
    if not in_time:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if in_time else None


def _orphans() -> list[str]:
    """Processes of the trial that don't end by themselves in a short time; they are killed."""
    end = monotonic() + _SETTLE_S
    while children := _children():
        if monotonic() > end:
            names = [_command_line(pid) for pid in children]
            for pid in children:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in children:
                with suppress(ChildProcessError):
                    os.waitpid(pid, 0)
            return names + _orphans()
        sleep(0.005)
    return []


def _children() -> list[int]:
    """The children of this process that live."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    found = []
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdigit():
                stat = Path(f"/proc/{name}/stat").read_text()
                if int(stat.rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


def _command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    return str(pid)
