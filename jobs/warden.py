"""The program that owns all child processes, so that none is ever left behind.

Strategy. One warden serves one server; its only tie is the socket on descriptor 0. It starts what
it is told to start, each as the leader of a session of its own, a *family* with all that comes of
it. A family is signalled as a whole: first its process group, then whoever has left the group. As
the warden is the reaper of its descendants' orphans (PR_SET_CHILD_SUBREAPER), nobody can leave: a
process that has gone through ``setsid`` and lost its parents becomes a child of the warden, and is
known by its session or by the mark in its environment; one that shows neither is killed.

When the leader ends, what is left of its family is killed, and only then is the end reported: an
end means that nothing runs any more. When the socket ends, the server is gone, by whatever way:
everything is killed, and the warden ends. Would somebody kill the warden itself, its children get
SIGKILL from the kernel (PR_SET_PDEATHSIG).

Messages are JSON, one packet each. In come ``{"op": "start", "id", "argv", "env", "cwd",
"targets", "limits", "nice"}``, with a descriptor for each of ``targets``, the numbers that they
shall have in the child; and ``{"op": "signal", "id", "signal"}``. Out go ``{"id", "pid"}`` or
``{"id", "error"}``; ``{"id", "stopped"}`` when all of a family has been stopped; and ``{"id",
"exit" | "signal", "cpu_s", "peak_bytes"}``.

It is started by path (see children.py), imports nothing of ours, and little else.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
from contextlib import suppress
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MARK = "SLUICE_JOB"  # in the environment of all of a family: <site>/<id>

_MESSAGE_BYTES = 160 << 10
_DESCRIPTORS = 64
_PASSES = 5  # of a signal over a family that forks meanwhile
_SOON_S, _LATE_S = 0.002, 0.1  # between two looks at a family that is ending
_SUBREAPER, _PDEATHSIG = 36, 1  # prctl
_LIMITS = {
    "cpu_s": resource.RLIMIT_CPU,
    "memory_bytes": resource.RLIMIT_AS,
    "file_bytes": resource.RLIMIT_FSIZE,
    "open_files": resource.RLIMIT_NOFILE,
}

_libc = ctypes.CDLL(None, use_errno=True)


class Process:
    """One line of /proc: whose child it is, in which session, and whether it still runs."""

    __slots__ = ("parent", "pid", "session", "state")

    def __init__(self, pid: int, state: str, parent: int, session: int) -> None:
        self.pid = pid
        self.state = state
        self.parent = parent
        self.session = session


def processes() -> dict[int, Process]:
    """All processes that there are, by their numbers."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # The name stands in parentheses, and may hold any sign.
            words = file.read().rpartition(b")")[2].split()
            found[int(name)] = Process(int(name), words[0].decode(), int(words[1]), int(words[3]))
    return found


def mark_of(pid: int) -> str:
    """The mark in a process's environment, or nothing."""
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        for entry in file.read().split(b"\0"):
            if entry.startswith(MARK.encode() + b"="):
                return entry.partition(b"=")[2].decode(errors="replace")
    return ""


class Family:
    """A leader and all that came of it."""

    def __init__(self, id: int, leader: int, mark: str) -> None:
        self.id = id
        self.leader = leader
        self.mark = mark
        self.over = False  # the leader has ended
        self.look_at = 0.0  # when to look again whether the others have, too
        self.wait_s = _SOON_S


class Warden:
    """All families."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire
        self._families: dict[int, Family] = {}  # by the leader
        self._pid = os.getpid()

    def run(self) -> None:
        """Serve until the socket ends, then leave nothing."""
        if _libc.prctl(_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
        awake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self._wire, select.POLLIN)
        poll.register(awake, select.POLLIN)
        while True:
            poll.poll(self._pause_ms())
            with suppress(BlockingIOError):
                os.read(awake, 4096)
            if not self._hear():
                break
            self._look()
        self._kill_all()

    def _pause_ms(self) -> float | None:
        ending = [family.look_at for family in self._families.values() if family.over]
        return max(0.0, min(ending) - monotonic()) * 1000 + 1 if ending else None

    # Orders

    def _hear(self) -> bool:
        """Obey what has come; False at the end of the socket."""
        orders: list[tuple[Family, int]] = []
        while True:
            try:
                data, fds = self._receive()
            except BlockingIOError:
                break
            except ConnectionError:
                return False
            if not data:
                return False
            message = json.loads(data)
            if message["op"] == "start":
                self._start(message, fds)
                continue
            number = int(signal.Signals["SIG" + message["signal"]])
            orders += [(f, number) for f in self._families.values() if f.id == message["id"]]
        if orders:
            self._signal(orders)
        for family, number in orders:
            if number == signal.SIGSTOP:
                self._tell({"id": family.id, "stopped": True})
        return True

    def _receive(self) -> tuple[bytes, list[int]]:
        """A packet with its descriptors."""
        data, control, _, _ = self._wire.recvmsg(
            _MESSAGE_BYTES,
            socket.CMSG_LEN(4 * _DESCRIPTORS),
            socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
        )
        fds = array.array("i")
        for level, kind, payload in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        return data, list(fds)

    def _tell(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # the server is gone: the next turn sees it
            self._wire.sendmsg([json.dumps(message).encode()])

    def _start(self, message: dict[str, Any], fds: list[int]) -> None:
        reports, report = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            try:
                self._become(message, fds)
            except BaseException as error:
                number = error.errno if isinstance(error, OSError) else 0
                os.write(report, f"{number or 0} {type(error).__name__}".encode())
            os._exit(127)
        os.close(report)
        for fd in fds:
            os.close(fd)
        trouble = os.read(reports, 200).decode()  # empty as soon as the program runs
        os.close(reports)
        if trouble:
            os.waitpid(pid, 0)
            number = int(trouble.split()[0])
            self._tell({"id": message["id"], "error": os.strerror(number) if number else trouble})
            return
        self._families[pid] = Family(message["id"], pid, message["env"].get(MARK, ""))
        self._tell({"id": message["id"], "pid": pid})

    def _become(self, message: dict[str, Any], fds: list[int]) -> None:
        """In the new process: turn into the program, or raise."""
        os.setsid()
        _libc.prctl(_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != self._pid:
            os._exit(127)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        targets = message["targets"]
        above = max([*targets, *fds, 2]) + 1  # out of the way of any target
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in fds]
        for fd, target in zip(moved, targets, strict=True):
            os.dup2(fd, target, inheritable=True)
        null = os.open("/dev/null", os.O_RDWR)
        for target in {0, 1, 2}.difference(targets):
            os.dup2(null, target, inheritable=True)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for name, value in message["limits"].items():
            # A soft limit of CPU time ends with SIGXCPU, the hard one a little later with SIGKILL.
            hard = value + 5 if name == "cpu_s" else value
            resource.setrlimit(_LIMITS[name], (value, hard))
        os.nice(message["nice"])
        os.chdir(message["cwd"])
        os.execvpe(message["argv"][0], message["argv"], message["env"])

    # Families

    def _members(self) -> dict[int, list[Process]]:
        """Whoever lives of each family, by the leader; reaps the orphans that have ended."""
        everybody = processes()
        found: dict[int, list[Process]] = {leader: [] for leader in self._families}
        homes: dict[int, int] = dict.fromkeys((0, 1, self._pid), 0)

        def home(process: Process) -> int:
            """The leader of its family; 0 for a stranger."""
            path = []
            while process.pid not in homes:
                path.append(process.pid)
                if process.pid in self._families:
                    homes[process.pid] = process.pid
                elif process.parent == self._pid:
                    homes[process.pid] = self._home_of_orphan(process)
                elif process.parent in everybody:
                    process = everybody[process.parent]
                else:
                    homes[process.pid] = 0
            homes.update(dict.fromkeys(path, homes[process.pid]))
            return homes[process.pid]

        for process in everybody.values():
            if process.state in "ZX":
                if process.parent == self._pid and process.pid not in self._families:
                    with suppress(ChildProcessError):
                        os.waitpid(process.pid, os.WNOHANG)
            elif (leader := home(process)) in found:
                found[leader].append(process)
        return found

    def _home_of_orphan(self, orphan: Process) -> int:
        if orphan.session in self._families:
            return orphan.session
        mark = mark_of(orphan.pid)
        for leader, family in self._families.items():
            if mark and mark == family.mark:
                return leader
        _send(orphan.pid, signal.SIGKILL)  # it hides whose it is
        return 0

    def _signal(self, orders: list[tuple[Family, int]]) -> None:
        for family, number in orders:
            if not family.over:  # until it is reaped, the leader's number is its own
                with suppress(ProcessLookupError):
                    os.killpg(family.leader, number)
        done: set[tuple[int, int]] = set()
        for _ in range(_PASSES):
            members = self._members()
            fresh = False
            for family, number in orders:
                for process in members.get(family.leader, ()):
                    if (process.pid, number) in done:
                        continue
                    done.add((process.pid, number))
                    # The group has it already; twice would be one too many for a handler of TERM.
                    in_group = _group_of(process.pid) == family.leader
                    if not in_group or (number == signal.SIGSTOP and process.state not in "Tt"):
                        fresh |= process.pid != family.leader
                        _send(process.pid, number)
            if not fresh:
                return

    def _look(self) -> None:
        """Find the leaders that have ended, and report those whose family is no more."""
        for family in self._families.values():
            if not family.over:
                ended = os.waitid(os.P_PID, family.leader, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                family.over = ended is not None
        due = [f for f in self._families.values() if f.over and f.look_at <= monotonic()]
        if not due:
            return
        members = self._members()
        for family in due:
            left = members[family.leader]
            for process in left:
                _send(process.pid, signal.SIGKILL)
            if left:
                family.look_at = monotonic() + family.wait_s
                family.wait_s = min(2 * family.wait_s, _LATE_S)
            else:
                self._bury(family)

    def _bury(self, family: Family) -> None:
        _, status, usage = os.wait4(family.leader, 0)
        del self._families[family.leader]
        message: dict[str, Any] = {
            "id": family.id,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss << 10,
        }
        if os.WIFSIGNALED(status):
            message["signal"] = os.WTERMSIG(status)
        else:
            message["exit"] = os.WEXITSTATUS(status)
        self._tell(message)

    def _kill_all(self) -> None:
        while self._families:
            for leader, left in self._members().items():
                for process in left:
                    _send(process.pid, signal.SIGKILL)
                if os.waitid(os.P_PID, leader, os.WEXITED | os.WNOHANG | os.WNOWAIT) and not left:
                    os.waitpid(leader, 0)
                    del self._families[leader]
            select.select([], [], [], _SOON_S)


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def main() -> None:
    """Serve the socket on descriptor 0."""
    with socket.socket(fileno=os.dup(0)) as wire:
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)
        Warden(wire).run()


if __name__ == "__main__":
    main()
