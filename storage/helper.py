"""A process of its own for work that would stop the loop: hashing files, syncs on slow disks.

Strategy. ``Helper`` is the service's end of one child (helper_child.py), which is started at the
first need and ends when it had nothing to do for a minute. Both talk over a socket pair of
*packets*: each message comes whole, with the descriptor that belongs to it, so that there is no
framing and the child needs no path. Nothing here waits: what the socket does not take now stays
*wanted*, as an item that says what it needs when it can be said, so a child that stops costs one
entry for each digest and sync, however many bytes arrive meanwhile.

A descriptor lies in the child only while there is work for it, and at most ``_BUSY_MOST`` do;
further items are *held* until one has done. What the child has hashed of the others stays with it,
so that no number of digests lets it read anything twice.

When the child dies, its knowledge is gone: it is started again, and reads again what is needed.
When it dies twice in a short time something is wrong with the machine; then what waits is refused,
and a new start is not tried before the short time is over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Protocol, TypeVar

from errors import SluiceError
from storage.helper_child import ALGORITHMS

T = TypeVar("T")

log = logging.getLogger("sluice.helper")

_PROGRAM = Path(__file__).with_name("helper_child.py")
_MESSAGE_BYTES = 1024
_TELL_BYTES = 8 << 20  # a busy child is told of more bytes only by so many
_BUSY_MOST = 200  # descriptors in the child; well below the usual limit of 1,024
_HEARD_MOST = 64  # messages taken in one turn of the loop
_IDLE_S = 60.0
_SHORT_S = 10.0  # two deaths within it are one too many
_END_S = 5.0  # a child that ends later than this after it was let go is killed
_REAP_S = 0.005
_AGAIN_S = 0.05

_UNABLE = "The process that reads and syncs files can't be run now."

# To the child's group nobody sends these from a terminal, but a service manager may send them to
# all processes at once, and the service still needs its helpers while it stops.
_UNHEARD = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class _Item(Protocol):
    """A need for the child, which lasts until it is dropped."""

    key: int

    @property
    def known(self) -> bool:
        """Whether the child keeps something for it."""
        ...

    @property
    def busy(self) -> bool:
        """Whether the child has work and a descriptor for it."""
        ...

    @property
    def needy(self) -> bool:
        """Whether the child should be told something now."""
        ...

    def message(self) -> tuple[str, int]:
        """What to tell, and the descriptor that goes with it, or -1."""
        ...

    def told(self) -> None:
        """The message is on its way."""
        ...

    def heard(self, verb: str, words: list[str]) -> None:
        """The child told something."""
        ...

    def lost(self) -> None:
        """The child is gone, with all that it kept for this."""
        ...

    def refuse(self, trouble: str) -> None:
        """Whoever waits is told why it is in vain."""
        ...


class Helper:
    """One helper process, as long as it is needed, and all that is needed from it."""

    def __init__(self, what: str, idle_s: float = _IDLE_S) -> None:
        self.pid: int | None = None
        self._what = what  # for the log
        self._idle_s = idle_s
        self._wire: socket.socket | None = None
        self._full = False  # the wire takes no more now
        self._keys = 0
        self._items: dict[int, _Item] = {}
        self._wanted: dict[int, _Item] = {}
        self._held: dict[int, _Item] = {}
        self._busy: set[int] = set()
        self._drops: deque[int] = deque()
        self._leaving: dict[int, bool] = {}  # processes to reap; whether they end by themselves
        self._died_s = -_SHORT_S
        self._not_before_s = 0.0
        self._used_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def digest(
        self,
        fd: int,
        algorithms: Collection[str],
        start: int = 0,
        release: Callable[[int], None] = os.close,
    ) -> Digest:
        """Hash what ``fd`` can read, from ``start`` on; ``release`` gets it back at the end.

        Raises ValueError for an unknown algorithm, or none; then ``fd`` is still the caller's.
        """
        unknown = set(algorithms) - ALGORITHMS.keys()
        if unknown or not algorithms:
            raise ValueError(f"no digest algorithms: {sorted(unknown)}")
        digest = Digest(self, self._key(), fd, " ".join(algorithms), start, release)
        self._items[digest.key] = digest
        return digest

    async def sync(self, fd: int, *, full: bool = False) -> None:
        """Force a file to the disk: its bytes, or with ``full`` all that is known of it.

        ``fd`` must stay open until this returns. Raises OSError for what the disk says, and
        storage-failed if there is no helper; then it may or may not have been done.
        """
        item = _Sync(self._key(), fd, full)
        self._items[item.key] = item
        try:
            self.want(item)
            outcome = await item.outcome
        finally:
            self.drop(item)
        if isinstance(outcome, str):
            raise SluiceError("storage-failed", outcome)
        if outcome:
            raise OSError(outcome, os.strerror(outcome))

    async def close(self) -> None:
        """End the child and wait for its end; who waits for its work gets storage-failed."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._let_go(early=False)
        self._refuse("The storage was closed.")
        kill_s = monotonic() + _END_S
        while self._leaving and monotonic() < kill_s + 1.0:
            if monotonic() > kill_s:  # it waits for a disk that does not answer
                for pid in self._leaving:
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(_REAP_S)

    # For items

    def want(self, item: _Item) -> None:
        """Tell the child of an item as soon as it can be told. Raises storage-failed."""
        self._start()
        if item.key not in self._held:
            self._wanted[item.key] = item
            self._flush()

    def drop(self, item: _Item) -> None:
        """Forget an item, here and in the child."""
        if self._items.pop(item.key, None) is None:
            return
        self._wanted.pop(item.key, None)
        self._held.pop(item.key, None)
        self._busy.discard(item.key)
        if self._wire is None:
            return
        if item.known:
            self._drops.append(item.key)
        self._flush()
        if not self._items:
            loop = asyncio.get_running_loop()
            self._used_s = loop.time()
            if self._timer is None:
                self._timer = loop.call_later(self._idle_s, self._rest)

    # Talking

    def _key(self) -> int:
        self._keys += 1
        return self._keys

    def _flush(self) -> None:
        """Say what can be said now."""
        while self._drops and self._send(f"drop {self._drops[0]}", -1):
            self._drops.popleft()
        while queue := self._wanted or (self._held if len(self._busy) < _BUSY_MOST else None):
            key, item = next(iter(queue.items()))
            message, fd = item.message()
            fresh = fd >= 0 and key not in self._busy and queue is self._wanted
            if fresh and len(self._busy) + len(self._held) >= _BUSY_MOST:
                self._held[key] = queue.pop(key)
                continue
            if not self._send(message, fd):
                return
            del queue[key]
            item.told()
            if item.busy:
                self._busy.add(key)

    def _send(self, message: str, fd: int) -> bool:
        """Whether the socket took it; otherwise ``_flush`` is called when it does again."""
        if self._wire is None or self._full:
            return False
        try:
            if fd < 0:
                self._wire.send(message.encode())
            else:
                socket.send_fds(self._wire, [message.encode()], [fd])
        except BlockingIOError:
            self._full = True
            asyncio.get_running_loop().add_writer(self._wire, self._room)
        except ConnectionError:
            return False  # the child is gone, as will be heard
        except OSError:  # the system is short of something for a moment
            self._full = True
            asyncio.get_running_loop().call_later(_AGAIN_S, self._room)
        return not self._full

    def _room(self) -> None:
        self._full = False
        if self._wire is not None:
            asyncio.get_running_loop().remove_writer(self._wire)
            self._flush()

    def _hear(self) -> None:
        """Take what the child has told, or its end."""
        for _ in range(_HEARD_MOST):
            if self._wire is None:
                return
            try:
                message = self._wire.recv(_MESSAGE_BYTES)
            except BlockingIOError:
                break
            except ConnectionError:  # it left words of ours unread; its own come first
                continue
            if not message:
                self._died()
                return
            self._heard(message.decode())
        self._flush()

    def _heard(self, message: str) -> None:
        verb, number, *words = message.split()
        key = int(number)
        item = self._items.get(key)
        if item is None:
            return
        item.heard(verb, words)
        if verb == "error":  # a message that it has not seen yet would begin it anew
            self._drops.append(key)
        if not item.busy:
            self._busy.discard(key)
        if item.needy and key not in self._held:
            self._wanted[key] = item

    # Living

    def _start(self) -> None:
        """See that there is a child. Raises storage-failed."""
        if self._wire is not None:
            return
        if self._closed:
            raise SluiceError("storage-failed", "The storage was closed.")
        if monotonic() < self._not_before_s:
            raise SluiceError("storage-failed", _UNABLE)
        try:
            self._spawn()
        except OSError as error:
            log.warning("No helper process for %s can be started: %s", self._what, error)
            self._not_before_s = monotonic() + _SHORT_S
            self._refuse(_UNABLE)
            raise SluiceError("storage-failed", _UNABLE) from error

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        # A blocked signal stays blocked in the new program, which has no moment to be hit in.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _UNHEARD)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_PROGRAM)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        process.returncode = 0  # so that Popen leaves it alone: _reap waits for it
        self.pid = process.pid
        self._wire = ours
        # Whoever drops a helper without closing it ends its process, too.
        weakref.finalize(self, ours.close)
        asyncio.get_running_loop().add_reader(ours, self._hear)
        log.debug("process %d helps with %s", process.pid, self._what)

    def _let_go(self, *, early: bool) -> None:
        """Close the socket, which ends the child if it has not ended."""
        if self._wire is None or self.pid is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._wire)
        loop.remove_writer(self._wire)
        self._wire.close()
        self._wire = None
        self._full = False
        self._wanted.clear()
        self._held.clear()
        self._busy.clear()
        self._drops.clear()
        for item in self._items.values():
            item.lost()
        self._leaving[self.pid] = early
        self.pid = None
        self._reap()

    def _reap(self) -> None:
        for pid, early in list(self._leaving.items()):
            try:
                found, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # somebody else was quicker
                found, status = pid, 0
            if found:
                del self._leaving[pid]
                code = os.waitstatus_to_exitcode(status)
                if early:
                    log.warning("The helper process for %s ended early (%d).", self._what, code)
        if self._leaving:
            asyncio.get_running_loop().call_later(_REAP_S, self._reap)

    def _died(self) -> None:
        """Start again, once, and tell the new child everything."""
        self._let_go(early=True)
        now_s = monotonic()
        quickly = now_s - self._died_s < _SHORT_S
        self._died_s = now_s
        if quickly:
            log.warning("No helper process for %s is started for %.0f s", self._what, _SHORT_S)
            self._not_before_s = now_s + _SHORT_S
            self._refuse(_UNABLE)
            return
        needy = {key: item for key, item in self._items.items() if item.needy}
        if needy:
            with suppress(SluiceError):  # they have been refused
                self._start()
                self._wanted.update(needy)
                self._flush()

    def _refuse(self, trouble: str) -> None:
        for item in self._items.values():
            item.refuse(trouble)

    def _rest(self) -> None:
        """End a child that had nothing to do for long enough."""
        self._timer = None
        if self._items or self._wire is None:
            return
        loop = asyncio.get_running_loop()
        left_s = self._used_s + self._idle_s - loop.time()
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._rest)
        else:
            self._let_go(early=False)


class _Sync:
    """A file that shall be forced to the disk."""

    known = False

    def __init__(self, key: int, fd: int, full: bool) -> None:
        self.key = key
        self.outcome: asyncio.Future[int | str] = asyncio.get_running_loop().create_future()
        self._fd = fd
        self._full = full
        self._sent = False

    @property
    def busy(self) -> bool:
        """See _Item."""
        return self._sent and not self.outcome.done()

    @property
    def needy(self) -> bool:
        """See _Item."""
        return not self._sent and not self.outcome.done()

    def message(self) -> tuple[str, int]:
        """See _Item."""
        return f"sync {self.key} {'full' if self._full else 'data'}", self._fd

    def told(self) -> None:
        """See _Item."""
        self._sent = True

    def heard(self, verb: str, words: list[str]) -> None:
        """See _Item."""
        _settle([self.outcome], int(words[0]))

    def lost(self) -> None:
        """See _Item. The next child does it again; what was done costs nothing now."""
        self._sent = False

    def refuse(self, trouble: str) -> None:
        """See _Item."""
        _settle([self.outcome], trouble)


class Digest:
    """The contract Digester, in a helper process."""

    def __init__(
        self,
        helper: Helper,
        key: int,
        fd: int,
        algorithms: str,
        start: int,
        release: Callable[[int], None],
    ) -> None:
        self.key = key
        self.known = False
        self.processed = start
        self._helper = helper
        self._fd = fd
        self._algorithms = algorithms
        self._start = start
        self._release = release
        self._target = start  # there are bytes up to here,
        self._told = start  # the child knows of these,
        self._seen = start  # and has hashed these; less than ``processed`` after it died
        self._waiting: list[tuple[int, asyncio.Future[int | str]]] = []
        # Results that are wanted, and at which offset. While there is one the child is not told
        # of more, so that it can not pass that offset.
        self._asking: deque[tuple[int, asyncio.Future[dict[str, str] | str]]] = deque()
        self._asked = False  # the child knows of the first one
        self._trouble = ""  # why this can't go on, ever

    def follow(self, upto: int) -> None:
        """See the contract."""
        if upto > self._target:
            self._target = upto
            if self.needy:
                with suppress(SluiceError):  # whoever waits will hear of it
                    self._helper.want(self)

    async def reach(self, upto: int) -> None:
        """See the contract."""
        self._target = max(self._target, upto)
        if self.processed >= upto:
            return
        self._want()
        future: asyncio.Future[int | str] = asyncio.get_running_loop().create_future()
        self._waiting.append((upto, future))
        outcome = await future
        if isinstance(outcome, str):
            raise SluiceError("storage-failed", outcome)

    async def result(self) -> dict[str, str]:
        """See the contract."""
        future: asyncio.Future[dict[str, str] | str] = asyncio.get_running_loop().create_future()
        ask = (self._target, future)
        self._asking.append(ask)
        try:
            self._want()
        except SluiceError:
            self._asking.remove(ask)
            raise
        outcome = await future
        if isinstance(outcome, str):
            raise SluiceError("storage-failed", outcome)
        return dict(outcome)

    def close(self) -> None:
        """See the contract."""
        if self._fd < 0:
            return
        self._helper.drop(self)
        self._trouble = "The digest was given up."
        self.refuse(self._trouble)
        fd, self._fd = self._fd, -1
        self._release(fd)

    def _want(self) -> None:
        if self._trouble:
            raise SluiceError("storage-failed", self._trouble)
        if self.needy:
            self._helper.want(self)

    # For the helper

    @property
    def _limit(self) -> int:
        return self._asking[0][0] if self._asking else self._target

    @property
    def busy(self) -> bool:
        """See _Item."""
        return self._told > self._seen

    @property
    def needy(self) -> bool:
        """See _Item."""
        if self._trouble:
            return False
        untold = self._limit - self._told
        if untold >= _TELL_BYTES or (untold > 0 and not self.busy):
            return True
        return bool(self._asking) and not self._asked

    def message(self) -> tuple[str, int]:
        """See _Item. It says all that a child must know which has never heard of this."""
        limit = self._limit
        answer_at = limit if self._asking and not self._asked else -1
        fd = self._fd if limit > self._told else -1
        return f"hash {self.key} {self._start} {limit} {answer_at} {self._algorithms}", fd

    def told(self) -> None:
        """See _Item."""
        self.known = True
        self._told = self._limit
        self._asked = bool(self._asking)

    def heard(self, verb: str, words: list[str]) -> None:
        """See _Item."""
        if verb == "error":
            self._told = self._seen
            self._trouble = f"Stored bytes can't be read: {os.strerror(int(words[0]))}."
            self.refuse(self._trouble)
            return
        offset, *digests = words
        self._seen = int(offset)
        self.processed = max(self.processed, self._seen)
        there = [future for upto, future in self._waiting if upto <= self.processed]
        if there:
            self._waiting = [(upto, one) for upto, one in self._waiting if upto > self.processed]
            _settle(there, 0)
        if verb == "is":
            self._asked = False
            found = dict(digest.split("=", 1) for digest in digests)
            while self._asking and self._asking[0][0] <= self._seen:
                _settle([self._asking.popleft()[1]], found)

    def lost(self) -> None:
        """See _Item."""
        self.known = False
        self._told = self._seen = self._start
        self._asked = False

    def refuse(self, trouble: str) -> None:
        """See _Item."""
        _settle([future for _, future in self._waiting], trouble)
        _settle([future for _, future in self._asking], trouble)
        self._waiting.clear()
        self._asking.clear()


def _settle(futures: Collection[asyncio.Future[T]], outcome: T) -> None:
    """Wake whoever still waits. Refusals are outcomes, too: nobody need look at those."""
    for future in futures:
        if not future.done():
            future.set_result(outcome)
