"""Child processes without threads, and without orphans. Knows no jobs.

Strategy. ``Children`` is the server's end of one *warden* (warden.py), the process that owns all
children; it is started with the first of them. Both talk over a socket pair of packets, with the
descriptors that a child shall have. So the server itself never forks but once, waits for one
process only, by its pidfd, and when it is killed, the warden sees the socket end and leaves nothing
behind. Each child is the leader of a *family*, everything that it starts: signals go to all of it,
and its end is told when nothing of it runs any more.

If the warden dies, its children have died with it (the kernel sees to that), and what they had
started is found by the mark in its environment; so are leftovers of an earlier server at a start.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from errors import SluiceError
from jobs.warden import MARK, mark_of, processes

log = logging.getLogger("sluice.children")

Signal = Literal["STOP", "CONT", "TERM", "KILL"]

_PROGRAM = Path(__file__).with_name("warden.py")
_MESSAGE_BYTES = 128 << 10
_END_S = 5.0  # for the warden's own end, and for that of a family that was killed
_HEARD_MOST = 64  # messages taken in one turn of the loop
_UNHEARD = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # what a service manager sends to all
_KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ")  # of the server's environment


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a child may use; None is what the server may. See setrlimit(2)."""

    cpu_s: int | None = None
    memory_bytes: int | None = None
    file_bytes: int | None = None
    open_files: int | None = None
    nice: int = 5


class Exit(NamedTuple):
    """How a child ended: one of ``code`` and ``signal``; and what it has used."""

    code: int | None
    signal: int | None
    cpu_s: float = 0.0
    peak_bytes: int = 0

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit status {self.code}"
        with suppress(ValueError):
            return signal.Signals(self.signal).name
        return f"signal {self.signal}"


class Child:
    """One running program with all that it starts."""

    def __init__(self, children: Children, id: int) -> None:
        self._children = children
        self._id = id
        loop = asyncio.get_running_loop()
        self.pid = 0  # of the leader
        self.started: asyncio.Future[int] = loop.create_future()
        self.exited: asyncio.Future[Exit] = loop.create_future()
        self.stopped: asyncio.Future[None] | None = None  # while a stop is under way

    async def stop(self) -> None:
        """Stop the whole family (SIGSTOP); return when it stands, or has ended."""
        if self.stopped is None or self.stopped.done():
            self.stopped = asyncio.get_running_loop().create_future()
        self.signal("STOP")
        either: list[asyncio.Future[Any]] = [self.stopped, self.exited]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)

    def signal(self, name: Signal) -> None:
        """Signal the whole family; one that has ended is left alone."""
        if not self.exited.done():
            self._children.send({"op": "signal", "id": self._id, "signal": name})

    async def end(self, grace_s: float) -> Exit:
        """End the family: TERM, then KILL after ``grace_s``; how the leader ended.

        A stopped process does not see TERM before it goes on, hence CONT. May be cancelled: then
        it is killed at once.
        """
        try:
            if grace_s > 0 and not self.exited.done():
                self.signal("TERM")
                self.signal("CONT")
                await asyncio.wait([self.exited], timeout=grace_s)
        finally:
            self.signal("KILL")
        await asyncio.wait([self.exited], timeout=_END_S)
        if not self.exited.done():
            log.error("process %d can't be killed", self.pid)
            return Exit(None, int(signal.SIGKILL))
        return self.exited.result()


class Children:
    """All children of one server, whose data lies in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._work = folder.resolve() / "work"
        self._site = blake2b(str(self._work).encode(), digest_size=8).hexdigest()
        self._last_id = 0
        self._living: dict[int, Child] = {}
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._wire: socket.socket | None = None
        self._warden: subprocess.Popen[bytes] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._closed = False

    def __len__(self) -> int:
        """How many run."""
        return len(self._living)

    async def start(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        fds: Mapping[int, int] | None = None,
        limits: Limits | None = None,
    ) -> Child:
        """Start a program, without a shell, in a session of its own.

        ``fds`` are its descriptors, from their numbers there to ours, which stay open here; 0, 1
        and 2 are /dev/null if they are not among them. It gets ``env`` and little else of the
        environment. Raises kind-failed if it can't be started. Who is cancelled has started
        nothing.
        """
        if self._closed:
            raise SluiceError("stopping")
        limits = limits or Limits()
        self._last_id += 1
        child = Child(self, self._last_id)
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        mark = f"{self._site}/{os.getpid()}/{child._id}"
        bounds = {k: v for k, v in msgspec.structs.asdict(limits).items() if v is not None}
        nice = bounds.pop("nice")
        message = {
            "op": "start",
            "id": child._id,
            "argv": list(argv),
            "env": {**kept, **(env or {}), MARK: mark},
            "cwd": str(cwd),
            "targets": list(fds or {}),
            "limits": bounds,
            "nice": nice,
        }
        if len(msgspec.json.encode(message)) > _MESSAGE_BYTES:
            raise SluiceError("kind-failed", "The arguments of the program are too long.")
        self._open()
        self._living[child._id] = child
        self.send(message, list((fds or {}).values()))
        try:
            child.pid = await asyncio.shield(child.started)
        except asyncio.CancelledError:
            child.signal("KILL")
            raise
        return child

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Tell the warden something; never waits."""
        if self._wire is None:
            return
        # Descriptors must outlive the wait for room in the socket.
        self._unsent.append((msgspec.json.encode(message), [os.dup(fd) for fd in fds]))
        self._flush()

    async def open(self) -> None:
        """Kill the processes and remove the folders that an earlier server has left behind."""
        self._sweep()
        if self._work.exists():
            await self.remove_folder(self._work)

    async def make_folder(self, name: str) -> Path:
        """An empty folder for programs to work in."""
        folder = self._work / name
        if folder.exists():
            await self.remove_folder(folder)
        folder.mkdir(parents=True)
        return folder

    async def remove_folder(self, folder: Path) -> None:
        """Remove a folder with all that is in it; what may take long is left to a child."""
        with suppress(OSError):
            folder.rmdir()
            return
        if self._closed:  # the next start removes it
            return
        child = await self.start(["rm", "-rf", "--", str(folder)], cwd=Path("/"))
        await asyncio.shield(child.exited)

    def _sweep(self) -> None:
        """Kill what wardens of this folder have left; only while none of ours run."""
        killed = 0
        for pid in processes():
            if pid != os.getpid() and mark_of(pid).partition("/")[0] == self._site:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        if killed:
            log.warning("%d processes that had no warden were killed", killed)

    async def close(self) -> None:
        """Kill all that runs, and the warden."""
        self._closed = True
        ended = self._ended
        if self._wire is not None:
            self._drop_wire()
        if ended is not None:
            await asyncio.wait([ended], timeout=_END_S)

    # The warden

    def _open(self) -> None:
        if self._wire is not None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        # A blocked signal stays blocked in the new program, which has no moment to be hit in.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _UNHEARD)
        try:
            self._warden = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_PROGRAM)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise SluiceError("kind-failed", "No process can be started now.") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._wire = ours
        loop = asyncio.get_running_loop()
        loop.add_reader(ours, self._hear)
        self._ended = loop.create_future()
        pidfd = os.pidfd_open(self._warden.pid)
        loop.add_reader(pidfd, self._reap, pidfd, self._warden, self._ended)

    def _reap(
        self, pidfd: int, warden: subprocess.Popen[bytes], ended: asyncio.Future[None]
    ) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        with suppress(ChildProcessError):
            os.waitpid(warden.pid, 0)
        warden.returncode = 0  # so that Popen leaves it alone
        if not ended.done():
            ended.set_result(None)
        if self._warden is warden:
            if self._wire is not None:
                self._drop_wire()
            self._warden = None

    def _drop_wire(self) -> None:
        assert self._wire is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._wire)
        loop.remove_writer(self._wire)
        self._wire.close()
        self._wire = None
        while self._unsent:
            _close_all(self._unsent.popleft()[1])
        lost = list(self._living.values())
        self._living.clear()
        for child in lost:
            self._fail(child, "The process was lost.")
        if lost and not self._closed:
            log.error("the warden of %d processes has died, and they with it", len(lost))
            self._warden = None
            self._sweep()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._unsent and self._wire is not None:
            data, fds = self._unsent[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
            try:
                self._wire.sendmsg([data], rights)
            except BlockingIOError:
                loop.add_writer(self._wire, self._flush)
                return
            except OSError:  # the warden has died: _reap tells
                return
            _close_all(fds)
            self._unsent.popleft()
        if self._wire is not None:
            loop.remove_writer(self._wire)

    def _hear(self) -> None:
        for _ in range(_HEARD_MOST):
            if self._wire is None:
                return
            try:
                data = self._wire.recv(_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._drop_wire()
                return
            self._take(msgspec.json.decode(data))

    def _take(self, message: dict[str, Any]) -> None:
        child = self._living.get(message["id"])
        if child is None:
            return
        if "pid" in message:
            child.started.set_result(message["pid"])
            return
        if "stopped" in message:
            if child.stopped is not None and not child.stopped.done():
                child.stopped.set_result(None)
            return
        del self._living[message["id"]]
        if "error" in message:
            self._fail(child, f"The program can't be started: {message['error']}.")
            return
        child.exited.set_result(
            Exit(
                message.get("exit"), message.get("signal"), message["cpu_s"], message["peak_bytes"]
            )
        )

    def _fail(self, child: Child, detail: str) -> None:
        if not child.started.done():
            child.started.set_exception(SluiceError("kind-failed", detail))
            child.started.exception()  # its starter may have been cancelled
        if not child.exited.done():
            child.exited.set_result(Exit(None, int(signal.SIGKILL)))


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
