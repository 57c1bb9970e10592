"""The program in a helper process: it hashes and syncs files whose descriptors it is given.

Strategy. Its only tie to the service is the socket on descriptor 0, and the end of that is its own
end, whatever happened to the service: between two slices of work it looks whether there is news.
Files with work take turns, 4 MiB each, so that a small one does not wait for a big one. Each piece
is read into one buffer that stays in the processor's cache while all algorithms see it. A file's
descriptor is kept only while it has work; what has been hashed so far outlives it.

Messages are words, one packet each, so that they can be read in a trace. In come
``hash <id> <start> <upto> <answer_at> <algorithm>…`` (with the descriptor if there is more to hash;
``answer_at`` is the offset at which an answer is wanted, or -1), ``drop <id>``, and
``sync <id> data|full`` (with the descriptor). Out go ``at <id> <offset>``,
``is <id> <offset> <algorithm>=<hex>…``, ``error <id> <errno>`` and ``synced <id> <errno>``.

It is started by path (see helper.py), imports nothing of ours, and little else: each import is
paid at every start.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import sys
import zlib
from contextlib import suppress
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing would take a fifth of the start
    from collections.abc import Callable
    from typing import Protocol

    class Sum(Protocol):
        """One algorithm at work."""

        def update(self, data: memoryview, /) -> None:
            """Go on with more bytes."""
            ...

        def hexdigest(self) -> str:
            """The digest so far; it can go on afterwards."""
            ...


# Of 32 KiB to 4 MiB all are equally fast within 3 %; this fits into a core's own cache anywhere.
# Mapping the file is not faster, and would kill the process when a file is cut meanwhile.
_PIECE_BYTES = 256 << 10
_SLICE_BYTES = 4 << 20  # 3.5 ms for SHA-256 and CRC-32
_REPORT_S = 0.05  # between two reports of how far a long piece of work is
_MESSAGE_BYTES = 1024
_FD_BYTES = socket.CMSG_LEN(4)


class Crc32:
    """CRC-32 in the manner of hashlib."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview) -> None:
        """Go on with more bytes."""
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        """Eight hex digits."""
        return f"{self._value:08x}"


# By the names of RFC 9530 where there is one.
ALGORITHMS: dict[str, Callable[[], Sum]] = {
    "sha-256": hashlib.sha256,
    "sha-512": hashlib.sha512,
    "sha": lambda: hashlib.sha1(usedforsecurity=False),
    "md5": lambda: hashlib.md5(usedforsecurity=False),
    "crc-32": Crc32,
}


class Sums:
    """How far one blob is hashed, and how far it may be."""

    def __init__(self, start: int) -> None:
        self.offset = start
        self.upto = start
        self.fd = -1
        self.answer_at = -1
        self.reported_s = 0.0
        self._sums: dict[str, Sum] = {}

    def begin(self, names: list[str]) -> None:
        """Take up the algorithms. Raises ValueError for one that this machine forbids."""
        self._sums = {name: ALGORITHMS[name]() for name in names}

    def slice(self, buffer: memoryview) -> None:
        """Hash the next bytes. Raises OSError; ENODATA if the file is shorter than was told."""
        end = min(self.upto, self.offset + _SLICE_BYTES)
        while self.offset < end:
            n = os.preadv(self.fd, [buffer[: end - self.offset]], self.offset)
            if n == 0:
                raise OSError(errno.ENODATA, "the file is too short")
            piece = buffer[:n]
            for one in self._sums.values():
                one.update(piece)
            self.offset += n

    def digests(self) -> str:
        """All digests up to here."""
        return " ".join(f"{name}={one.hexdigest()}" for name, one in self._sums.items())

    def hold(self, fd: int) -> None:
        """Take another descriptor, or none (-1), and close the former one."""
        _close(self.fd)
        self.fd = fd


class Child:
    """The loop of the process."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire
        self._buffer = memoryview(bytearray(_PIECE_BYTES))
        self._sums: dict[int, Sums] = {}
        self._working: dict[int, Sums] = {}  # in the order of their turns

    def run(self) -> None:
        """Serve until the socket ends."""
        while self._hear():
            key, sums = next(iter(self._working.items()))
            del self._working[key]
            try:
                sums.slice(self._buffer)
            except Exception as error:  # nothing about one file may end the work on the others
                self._fail(key, error)
            else:
                self._report(key, sums)

    def _hear(self) -> bool:
        """Do what has come; without work, wait for some. False when nothing will come."""
        while True:
            flags = socket.MSG_DONTWAIT if self._working else 0
            try:
                # recv_fds would forget the flags
                message, extra, _, _ = self._wire.recvmsg(_MESSAGE_BYTES, _FD_BYTES, flags)
            except BlockingIOError:
                return True
            if not message:
                return False
            verb, number, *words = message.decode().split()
            fd = int.from_bytes(extra[0][2][:4], sys.byteorder) if extra else -1
            self._obey(verb, int(number), words, fd)

    def _obey(self, verb: str, key: int, words: list[str], fd: int) -> None:
        if verb == "sync":
            self._tell(f"synced {key} {_sync(fd, words[0] == 'full')}")
        elif verb == "drop":
            self._drop(key)
        else:
            self._hash(key, words, fd)

    def _hash(self, key: int, words: list[str], fd: int) -> None:
        start, upto, answer_at, *names = words
        sums = self._sums.get(key)
        if fd >= 0 and sums is not None:
            sums.hold(fd)
        if sums is None:
            sums = self._sums[key] = Sums(int(start))
            sums.hold(fd)
            try:
                sums.begin(names)
            except Exception as error:
                self._fail(key, error)
                return
        sums.upto = max(sums.upto, int(upto))
        sums.answer_at = max(sums.answer_at, int(answer_at))
        if sums.offset < sums.upto:
            self._working[key] = sums
        self._answer(key, sums)

    def _report(self, key: int, sums: Sums) -> None:
        """After a slice: tell how far it is, if it is time, and see to its next turn."""
        now = monotonic()
        more = sums.offset < sums.upto
        if more:
            self._working[key] = sums
        else:
            sums.hold(-1)
        if not more or now - sums.reported_s >= _REPORT_S:
            sums.reported_s = now
            self._tell(f"at {key} {sums.offset}")
        self._answer(key, sums)

    def _answer(self, key: int, sums: Sums) -> None:
        if 0 <= sums.answer_at <= sums.offset:
            sums.answer_at = -1
            self._tell(f"is {key} {sums.offset} {sums.digests()}")

    def _fail(self, key: int, error: Exception) -> None:
        self._drop(key)
        number = error.errno if isinstance(error, OSError) else None
        self._tell(f"error {key} {number or errno.EIO}")

    def _drop(self, key: int) -> None:
        self._working.pop(key, None)
        sums = self._sums.pop(key, None)
        if sums is not None:
            sums.hold(-1)

    def _tell(self, message: str) -> None:
        self._wire.send(message.encode())  # waits if the service does: there is no hurry then


def _sync(fd: int, full: bool) -> int:
    """Force a file to the disk and close it; the error's number, or 0."""
    try:
        (os.fsync if full else os.fdatasync)(fd)
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        _close(fd)
    return 0


def _close(fd: int) -> None:
    if fd >= 0:
        with suppress(OSError):  # a network disk may complain again; nobody could do anything
            os.close(fd)


if __name__ == "__main__":
    with suppress(ConnectionError):  # the service is gone; so is the work
        Child(socket.socket(fileno=0)).run()
