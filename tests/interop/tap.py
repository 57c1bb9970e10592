"""The relay turned around: what the server sends is counted, held, cut, slowed down and changed.

Here a hold is also for connections that are opened while it lasts: a client may open several, and
some of them late. A cut can be a reset, or an end that looks regular (FIN) but for the bytes that
are missing. The requests that pass are noted, so that a test sees with which of them a client went
on.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Mapping
from email.parser import Parser
from typing import NamedTuple

from tests.interop.proxy import Proxy

_PIECE_BYTES = 64 << 10
_REQUEST = re.compile(rb"([A-Z]+) (\S+) HTTP/1\.1\r\n(.*?\r\n)\r\n", re.DOTALL)


class Request(NamedTuple):
    """The head of a request; the names of its headers are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]

    @property
    def first_byte(self) -> int | None:
        """Where the range begins that it asks for; None if it asks for everything."""
        match = re.match(r"bytes=(\d+)-", self.headers.get("range", ""))
        return int(match[1]) if match else None


class Tap(Proxy):
    """A relay for downloads: ``sent``, and the marks, count what the server has sent."""

    def __init__(self, to_port: int) -> None:
        self.requests: list[Request] = []
        self.bytes_per_s: float | None = None  # of all connections together
        self.change = (b"", b"")  # a pattern in what the server sends, and what to put there
        self._free_at = 0.0
        self._is_holding = False
        self._short: set[asyncio.Event] = set()
        super().__init__(to_port)

    def end_at(self, n: int) -> None:
        """End the answers that are on their way, with FIN, as soon as ``n`` bytes have passed."""
        self._at(n, lambda: self._short.update(self._links.values()))

    def resumed_at(self) -> list[int]:
        """Where the ranges began that were asked for; a client that resumes asks for one."""
        return [at for request in self.requests if (at := request.first_byte)]

    # In the loop

    def _hold(self) -> None:
        self._is_holding = True
        super()._hold()

    def _release(self) -> None:
        self._is_holding = False
        super()._release()

    def _cut(self) -> None:
        super()._cut()
        self._is_holding = False

    async def _connect(self, server: socket.socket) -> None:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PIECE_BYTES)  # little lies here
        await super()._connect(server)

    async def _up(self, client: socket.socket, server: socket.socket, go: asyncio.Event) -> None:
        seen = b""
        while piece := await self._loop.sock_recv(client, _PIECE_BYTES):
            seen += piece
            while match := _REQUEST.match(seen):
                found = Parser().parsestr(match[3].decode())
                headers = {name.lower(): value for name, value in found.items()}
                self.requests.append(Request(match[1].decode(), match[2].decode(), headers))
                seen = seen[match.end() :]
            await self._loop.sock_sendall(server, piece)
        server.shutdown(socket.SHUT_WR)

    async def _down(self, server: socket.socket, client: socket.socket, go: asyncio.Event) -> None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIECE_BYTES)
        if self._is_holding:
            go.clear()
        while piece := await self._loop.sock_recv(server, _PIECE_BYTES):
            pattern, other = self.change
            if pattern:
                piece = re.sub(pattern, other, piece)
            await self._turn(len(piece))
            await go.wait()
            if go in self._short:
                break
            await self._loop.sock_sendall(client, piece)
            self._count(len(piece))
        client.shutdown(socket.SHUT_WR)

    async def _turn(self, n: int) -> None:
        """Wait until ``n`` bytes may pass."""
        now = self._loop.time()
        if self.bytes_per_s is not None:
            self._free_at = max(self._free_at, now) + n / self.bytes_per_s
            await asyncio.sleep(self._free_at - now)
