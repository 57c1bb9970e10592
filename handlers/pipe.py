"""How frames leave: one after another, straight to the socket where that is possible.

A frame that many subscribers share is sent by the socket's own ``send``, without a copy; only what
the kernel does not take goes through the stream. Over TLS all of it does.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from tornado.iostream import IOStream, SSLIOStream, StreamClosedError

_KERNEL_BYTES = 16 << 10  # the kernel doubles it; what a stalled subscriber may fill
_ACKED = struct.Struct("Q")
_ACKED_AT = 120  # tcpi_bytes_acked in struct tcp_info (Linux 4.1)


class Pipe:
    """A connection that takes one frame after another; while one is unfinished it is ``busy``.

    ``direct`` sends to the kernel what it takes of a frame. It must be used only while neither this
    nor the stream has anything unsent (``is_idle``); over TLS there is none.
    """

    __slots__ = ("_acked", "_drained", "_moved_s", "_stream", "busy", "direct")

    def __init__(self, stream: IOStream, drained: Callable[[], None]) -> None:
        self.busy = False
        self._stream = stream
        self._drained = drained
        self._acked = 0
        self._moved_s = 0.0
        plain = not isinstance(stream, SSLIOStream)  # what is sent past TLS is not encrypted
        self.direct: Callable[[bytes], int] | None = stream.socket.send if plain else None
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _KERNEL_BYTES)

    def send(self, frame: bytes) -> None:
        """Send a frame, or begin to; only while not busy. A closed connection takes nothing."""
        sent = 0
        if self.direct is not None and not self._stream.writing():
            try:
                sent = self.direct(frame)
            except BlockingIOError:
                pass
            except OSError:
                self.fail()
                return
        if sent < len(frame):
            self.finish(frame, sent)

    @property
    def is_idle(self) -> bool:
        """Whether ``direct`` may be used."""
        return self.direct is not None and not self.busy and not self._stream.writing()

    def fail(self) -> None:
        """The connection is broken."""
        self._stream.close()
        self.busy = True

    def finish(self, frame: bytes, sent: int) -> None:
        """Send the rest of a frame."""
        try:
            rest = self._stream.write(memoryview(frame)[sent:])
        except StreamClosedError:
            self.busy = True
            return
        if rest.done():
            rest.exception()
            return
        self.busy = True
        self._moved_s, self._acked = monotonic(), self._bytes_acked()
        rest.add_done_callback(self._written)

    def _written(self, rest: asyncio.Future[None]) -> None:
        if rest.cancelled() or rest.exception() is not None:
            return  # closed; it stays busy
        self.busy = False
        self._drained()

    def stalled_s(self, now_s: float) -> float:
        """For how long it is busy and the peer has taken nothing."""
        if not self.busy:
            return 0.0
        acked = self._bytes_acked()
        if acked != self._acked:
            self._acked, self._moved_s = acked, now_s
        return now_s - self._moved_s

    def _bytes_acked(self) -> int:
        """How much the peer has received, ever."""
        try:
            info = self._stream.socket.getsockopt(
                socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_AT + _ACKED.size
            )
        except (OSError, AttributeError):  # closed
            return 0
        return int(_ACKED.unpack_from(info, _ACKED_AT)[0])

    def widen(self) -> None:
        """Let the kernel take all that is unfinished, and what is said at the end."""
        with suppress(OSError, AttributeError):  # closed
            self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 << 10)

    def close(self) -> None:
        """Send nothing more."""
        self.busy = True
