"""One trial of a kind: its job runs on a folder of its own and is disturbed at one point.

Strategy. A *point* is where a disturbance can meet a job: a call of ``checkpoint``, ``sleep`` or
``undo``, a wait for a program, and the end of ``run``. The job is a ``Process`` that counts them;
at the trial's point it pauses or cancels itself by the manager, as a person would, or ends the
server by SIGKILL, before the call goes on. So each disturbance meets exactly that point. A kind
that runs in a child is met in the same way, since its child waits at each checkpoint.

Each trial has two sorts of processes, made by fork. An *overseer* copies the prepared folder, and
starts the service's parts on it in a *server* process. When that was killed it starts another one,
which recovers like any start after a crash. The overseer adopts whatever the kind leaves running.

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
from jobs.process import Process
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
    "child": "its child processes killed",
    "both": "killed together with its child processes",
}
ENDING = frozenset({"cancel", "abort"})
KILLING = frozenset({"kill", "lost", "abort", "both"})
OF_PROGRAMS = frozenset({"child", "both"})
_ANYWHERE = frozenset({"checkpoint", "sleep", "wait"})

_SETTLE_S = 3.0  # for what follows the end of a job, and for processes that are told to end
_RETRY_S = 0.01  # instead of the kind's own waits
_COPY_BYTES = 1 << 20
_WARM_S = 3600.0
_SUBREAPER = 36  # prctl: PR_SET_CHILD_SUBREAPER
_LOG_CHARS = 2000


class Ground(NamedTuple):
    """The parts of a service on one folder that a trial needs, recovered and open."""

    manager: Manager
    uploads: Uploads
    files: Files


Open = Callable[[Path, Registry, float], AbstractAsyncContextManager[Ground]]
"""Opens a folder as the server does: with these kinds, and a ``warm_s``."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is tried."""

    params: dict[str, Any]
    base: str  # the prepared folder
    folder: str  # of this trial
    mode: str = ""  # one of MODES, or nothing
    sort: str = ""  # of the point at which
    nth: int = 0  # of that sort, from 1
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
    with_program: list[bool] = []  # of each point: whether a program of the job ran then
    reached: bool = False  # whether the job came to the plan's point
    wrong: list[str] = []  # what is left over, or unsound
    seconds: float = 0.0


def may(mode: str, sort: str, with_program: bool) -> bool:
    """Whether a mode has a meaning at a sort of point."""
    if mode in OF_PROGRAMS and not with_program:
        return False
    return sort in _ANYWHERE or (sort in ("undo", "end") and mode in ("lost", "abort"))


# Inside the job


class _Disturbance:
    """Counts the points of a job and does at one of them what the plan says."""

    def __init__(self, mode: str, sort: str, nth: int) -> None:
        self.points: list[str] = []
        self.with_program: list[bool] = []  # of each point: whether a program of the job ran
        self.reached = False
        self.frames = 0
        self.deaf: list[str] = []
        self._mode = mode
        self._sort = sort
        self._left = {sort: nth}  # how many points of a sort until it is the one
        self._is_here = False
        self._saved = False

    async def meet(self, sort: str, job_id: str, manager: Manager, pids: list[int]) -> None:
        """The job is about to do something of this sort; its programs are these processes."""
        self.points.append(sort)
        self.with_program.append(bool(pids))
        if self._saved and (sort != "wait" or self._sort == "wait"):
            _die()
        self._left[sort] = self._left.get(sort, 0) - 1
        self._is_here = self._left[sort] == 0
        if not self._is_here:
            return
        self.reached = True
        match self._mode:
            case "warm" | "cold":
                await _command(manager, job_id, "pause")
            case "cancel" | "abort":
                await _command(manager, job_id, "cancel")
            case "child" | "both":
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
        if self._mode in ("lost", "abort", "both"):
            _die()

    async def passed(self, runners: Runners) -> None:
        """The job has done it and goes on."""
        if self._mode == "kill" and self._is_here:
            await runners.save()
            self._saved = True


class _Watched(Process):
    """A process whose points are counted; so are those of its child, which waits at each."""

    met: _Disturbance

    def __init__(self, runners: Runners, job: Job, kind: Kind) -> None:
        super().__init__(runners, job, kind)
        self.is_exact = True
        self._told = ""  # to end, and how

    async def checkpoint(self, cursor: Any = None, **progress: Any) -> None:
        """See Context."""
        # A program's own turns say nothing, and how many there are is chance.
        says_nothing = cursor is None and not progress and self._programs
        await self._meet("wait" if says_nothing else "checkpoint")
        await self._pass(super().checkpoint(cursor, **progress))

    async def sleep(self, seconds: float) -> None:
        """See Context."""
        await self._meet("sleep")
        await self._pass(super().sleep(seconds))

    async def attend(self, news: asyncio.Future[None], wait_s: float) -> None:
        """See Process."""
        await self._meet("wait")
        await self._pass(super().attend(news, wait_s))

    async def undo(self, name: str, **args: Any) -> None:
        """See Context."""
        await self._meet("undo")
        await super().undo(name, **args)

    async def _work(self, params: Any) -> dict[str, Any] | None:
        self.met.frames += 1
        try:
            data = await super()._work(params)
            await self._meet("end")
            return data
        finally:
            self.met.frames -= 1

    async def _meet(self, sort: str) -> None:
        if self._told:
            self.met.deaf.append(f"it went on after it was {self._told}")
        pids = [program.pid for program in self._programs]
        await self.met.meet(sort, self.job_id, self._runners.manager, pids)

    async def _pass(self, call: Awaitable[None]) -> None:
        try:
            await call
        except (JobPaused, JobCancelled) as end:
            self._told = "paused" if isinstance(end, JobPaused) else "cancelled"
            raise
        await self.met.passed(self._runners)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _by() -> By:
    return By(actor=OWNER, via="system", at=now_ms())


async def _command(manager: Manager, job_id: str, verb: str) -> None:
    await manager.command(job_id, verb, owner=OWNER, by=_by())


# A server process


async def prepare(opened: Open, folder: Path, files: list[Path]) -> None:
    """Make the folder that trials begin with: these files are stored in it."""
    async with opened(folder, Registry([]), 0.0) as ground:
        for path in files:
            await add(ground.uploads, path, OWNER)


async def _serve(plan: Plan, kind: Kind, opened: Open) -> Outcome:
    """Start the job, or find it after a crash; drive it to its end, and look what is there."""
    folder = Path(plan.folder)
    begun = monotonic()
    met = _Watched.met = _Disturbance(plan.mode, plan.sort, plan.nth)
    Runners.process = _Watched
    if kind.source[1]:  # a fresh one, as a start would have; else it is no module
        kind = load_kind(kind.source, kind.name)
    if kind.retry is not None:
        kind = kind._replace(retry=kind.retry._replace(base_s=_RETRY_S, max_s=_RETRY_S))
    warm_s = 0.0 if plan.mode == "cold" else _WARM_S
    async with opened(folder / "data", Registry([kind]), warm_s) as ground:
        manager = ground.manager
        held = set(_held(folder))
        page = await manager.find(Filter(owner=OWNER, kinds=(kind.name,)), None, 1)
        if page.items:
            job = page.items[0]
        else:
            params = manager.parse(kind.name, plan.params)
            job, _ = await manager.start(kind.name, params, owner=OWNER, by=_by())
        job = await _drive(ground, job.id, met, cold=plan.mode == "cold" and kind.resumable)
        found = await _look(ground, job, folder)
        found.points, found.reached = met.points, met.reached
        found.with_program = met.with_program
        found.wrong += dict.fromkeys(met.deaf)
        found.wrong += await _settled(
            lambda: [
                *_left_files(Path(plan.base), folder, found),
                *(f"{name} is left open" for name in _held(folder) if name not in held),
                *_left_tasks(kind.source),
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
                while cold and met.frames:  # programs that can't go on from a cursor stay warm
                    await asyncio.sleep(0.001)
                await _command(manager, job_id, "resume")
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
    """The files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _left_files(base: Path, folder: Path, found: Outcome) -> Iterator[str]:
    """Files of the data folder, and of the working folder of a job that has not succeeded."""
    new = tree(folder / "data") - tree(base)
    left = {name for name in new if "/" in name}  # those at the top are the service's own
    if found.state != states.SUCCEEDED:
        yield from (f"{name} is left in the data folder" for name in sorted(left))
        yield from (f"{name} is left" for name in sorted(tree(folder / "work")))
    else:
        tmp = (name for name in sorted(left) if name.startswith(("tmp/", "work/")))
        yield from (f"{name} is left in the data folder" for name in tmp)


def _held(folder: Path) -> Iterator[str]:
    """Files of the trial that this process has open."""
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            own = folder / "data"  # the service's own files lie there, without a folder
            if path.is_relative_to(folder) and path.parent not in (own, folder):
                yield path.name


def _left_tasks(source: Source) -> Iterator[str]:
    """Tasks of the loop whose coroutine comes from the kind's file."""
    for task in asyncio.all_tasks():
        code = getattr(task.get_coro(), "cr_code", None)
        if code is not None and source[0] == "file" and code.co_filename == source[1]:
            yield f"the task {code.co_name} is left"


def _server(plan: Plan, kind: Kind, opened: Open) -> None:
    """The life of a server process; never returns."""
    status = 1
    try:
        work = Path(plan.folder) / "work"
        os.chdir(work)
        os.environ["TMPDIR"] = tempfile.tempdir = str(work)
        outcome = asyncio.run(_serve(plan, kind, opened))
        (Path(plan.folder) / "outcome").write_bytes(msgspec.json.encode(outcome))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


# An overseer


def overseer(plan: Plan, kind: Kind, opened: Open) -> None:
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
        outcome = _watch(plan, kind, opened)
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


def _watch(plan: Plan, kind: Kind, opened: Open) -> Outcome:
    """Start servers until one has seen the end of the job."""
    now, killed, left = plan, False, []
    while True:
        pid = os.fork()
        if pid == 0:
            _server(now, kind, opened)
        status = _wait(pid, plan.timeout_s + _SETTLE_S)
        left += _orphans()
        if status == -signal.SIGKILL and now.mode in KILLING:
            now, killed = msgspec.structs.replace(plan, mode="", sort="", nth=0), True
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
