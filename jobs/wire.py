"""JSON lines between the service and a child that runs a kind, over a socket; for both ends.

A message is one line of JSON. With ``"bytes": n`` it is followed by n bytes as they are, and with
``"fd": true`` a descriptor comes along. Nothing here waits: what the socket does not take stays
queued, and each side bounds what it has unanswered.
"""

from __future__ import annotations

import asyncio
import os
import socket
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

Message = dict[str, Any]

PAYLOAD_BYTES = 1 << 20
_LINE_BYTES = 1 << 20
_PIECE_BYTES = 256 << 10


class Wire:
    """One end. Whoever reads calls ``receive`` when the socket is readable."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._unsent: deque[tuple[memoryview, int | None]] = deque()
        self._buffer = bytearray()
        self._fds: deque[int] = deque()
        self._writing = False

    def send(
        self, message: Message, payload: bytes | memoryview = b"", fd: int | None = None
    ) -> None:
        """Queue a message; ``fd`` stays the caller's."""
        if payload:
            message = message | {"bytes": len(payload)}
        if fd is not None:
            message = message | {"fd": True}
        line = msgspec.json.encode(message) + b"\n"
        self._unsent.append((memoryview(line), None if fd is None else os.dup(fd)))
        if payload:
            self._unsent.append((memoryview(bytes(payload)), None))
        self._flush()

    def receive(self) -> bool:
        """Take what has come; False at the end of the socket."""
        try:
            data, control, _, _ = self.sock.recvmsg(
                _PIECE_BYTES, socket.CMSG_LEN(4 * 16), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return True
        except OSError:
            return False
        for level, kind, rights in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array("i")
                fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
                self._fds.extend(fds)
        self._buffer += data
        return bool(data)

    def take(self, data: bytes) -> Iterator[tuple[Message, bytes, int | None]]:
        """``messages``, after bytes that the caller has read; they bring no descriptors."""
        self._buffer += data
        return self.messages()

    def messages(self) -> Iterator[tuple[Message, bytes, int | None]]:
        """What is complete: message, payload, descriptor (the caller's from then on).

        Raises ValueError for what is no message.
        """
        while True:
            end = self._buffer.find(b"\n")
            if end < 0:
                if len(self._buffer) > _LINE_BYTES:
                    raise ValueError("a line is too long")
                return
            message = msgspec.json.decode(self._buffer[:end])
            if not isinstance(message, dict):
                raise ValueError("a line is no object")
            n = message.pop("bytes", 0)
            if not 0 <= n <= PAYLOAD_BYTES:
                raise ValueError("a payload is too long")
            if len(self._buffer) < end + 1 + n:
                return
            payload = bytes(self._buffer[end + 1 : end + 1 + n])
            del self._buffer[: end + 1 + n]
            yield message, payload, self._fds.popleft() if message.pop("fd", False) else None

    async def sent(self) -> None:
        """Return when the socket has taken all."""
        while self._unsent:
            await asyncio.sleep(0.001)

    def close(self) -> None:
        """Close the socket, and descriptors that nobody has taken."""
        if self._writing:
            asyncio.get_running_loop().remove_writer(self.sock)
        self.sock.close()
        for fd in (*self._fds, *(fd for _, fd in self._unsent if fd is not None)):
            os.close(fd)
        self._fds.clear()
        self._unsent.clear()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._unsent:
            data, fd = self._unsent[0]
            rights: Sequence[Any] = ()
            if fd is not None:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
            try:
                n = self.sock.sendmsg([data], rights)
            except BlockingIOError:
                if not self._writing:
                    loop.add_writer(self.sock, self._flush)
                    self._writing = True
                return
            except OSError:  # the other end is gone, which ``receive`` tells
                n = len(data)
            if fd is not None:
                os.close(fd)
            if n < len(data):
                self._unsent[0] = (data[n:], None)
            else:
                self._unsent.popleft()
        if self._writing:
            loop.remove_writer(self.sock)
            self._writing = False
