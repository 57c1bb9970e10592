"""A network that fails when a test says so: a TCP relay between the clients and the server.

What clients send is counted. At a number of bytes the relay can hold the connections that are open
(they stay open, nothing more passes) or cut them (both ends get a reset, and what was still on its
way is lost). Connections that are opened later pass freely. Its loop runs in a thread of the test's
own process; a connection is two pumps, one in each direction.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future

_PIECE_BYTES = 256 << 10
_WINDOW_BYTES = 64 << 10  # little is on its way, so that a cut loses little
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST


class Proxy:
    """A relay to a port of this machine."""

    def __init__(self, to_port: int) -> None:
        self.sent = 0  # bytes passed on to the server
        self.patient = False  # wait for a server that is down, instead of refusing
        self._to = ("127.0.0.1", to_port)
        self._links: dict[asyncio.Task[None], asyncio.Event] = {}
        self._mark: tuple[int, Callable[[], None]] | None = None
        self._marked = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WINDOW_BYTES)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The server's base address by way of this relay, without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    def hold_at(self, n: int) -> None:
        """Hold the connections that are open as soon as ``n`` bytes in all have passed."""
        self._at(n, self._hold)

    def cut_at(self, n: int) -> None:
        """Reset the connections that are open as soon as ``n`` bytes in all have passed."""
        self._at(n, self._cut)

    @property
    def is_at_mark(self) -> bool:
        """Whether the mark of hold_at or cut_at was reached."""
        return self._marked.is_set()

    def release(self) -> None:
        """Let held connections go on, up to the next mark."""
        self._do(self._release)

    def open(self) -> None:
        """Let everything pass, whatever was marked."""

        def everything() -> None:
            self._mark = None
            self._release()

        self._do(everything)

    def cut(self) -> None:
        """Reset the connections that are open, held or not."""
        self._do(self._cut)

    def close(self) -> None:
        """Reset everything and stop."""
        self._do(self._end)
        self._thread.join(10)
        assert not self._thread.is_alive()

    # In the loop

    def _at(self, n: int, act: Callable[[], None]) -> None:
        def begin() -> None:
            self._marked.clear()
            self._mark = (n, act)

        self._do(begin)

    def _do(self, act: Callable[[], object]) -> None:
        """Call ``act`` in the loop, and wait for it."""
        done: Future[None] = Future()

        def call() -> None:
            act()
            done.set_result(None)

        self._loop.call_soon_threadsafe(call)
        done.result(10)

    def _hold(self) -> None:
        for go in self._links.values():
            go.clear()

    def _release(self) -> None:
        for go in self._links.values():
            go.set()

    def _cut(self) -> None:
        self._hold()  # a link that is busy is cancelled only a few pieces later
        for link in list(self._links):
            link.cancel()

    def _end(self) -> None:
        self._main.cancel()

    def _run(self) -> None:
        self._main = self._loop.create_task(self._serve())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main)
        self._loop.close()

    async def _serve(self) -> None:
        try:
            while True:
                client, _ = await self._loop.sock_accept(self._listener)
                go = asyncio.Event()
                go.set()
                link = self._loop.create_task(self._link(client, go))
                self._links[link] = go
                link.add_done_callback(self._links.pop)
                link.add_done_callback(functools.partial(_reset_if_not_begun, client))
        finally:
            self._listener.close()
            self._cut()
            await asyncio.gather(*self._links, return_exceptions=True)

    async def _link(self, client: socket.socket, go: asyncio.Event) -> None:
        server = socket.socket()
        both = (client, server)
        try:
            for end in both:
                end.setblocking(False)
            await self._connect(server)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._up(client, server, go))
                pumps.create_task(self._down(server, client, go))
        except* OSError:  # the one end broke, so the other one shall see it
            _reset_when_closed(both)
        except* asyncio.CancelledError:
            _reset_when_closed(both)
        finally:
            for end in both:
                end.close()

    async def _connect(self, server: socket.socket) -> None:
        while True:
            try:
                return await self._loop.sock_connect(server, self._to)
            except ConnectionRefusedError:
                if not self.patient:
                    raise
            await asyncio.sleep(0.001)

    async def _up(self, client: socket.socket, server: socket.socket, go: asyncio.Event) -> None:
        """Pass on what a client sends, until it ends; it is held for as long as ``go`` is."""
        while piece := await self._loop.sock_recv(client, _PIECE_BYTES):
            await go.wait()
            await self._loop.sock_sendall(server, piece)
            self._count(len(piece))
        server.shutdown(socket.SHUT_WR)

    async def _down(self, server: socket.socket, client: socket.socket, go: asyncio.Event) -> None:
        """Pass on what the server answers, until it ends."""
        while piece := await self._loop.sock_recv(server, _PIECE_BYTES):
            await self._loop.sock_sendall(client, piece)
        client.shutdown(socket.SHUT_WR)

    def _count(self, n: int) -> None:
        self.sent += n
        if self._mark is not None and self.sent >= self._mark[0]:
            (_, act), self._mark = self._mark, None
            act()
            self._marked.set()


def _reset_if_not_begun(client: socket.socket, link: asyncio.Task[None]) -> None:
    """Close what a link that was cut before its first step would have closed."""
    if link.cancelled():
        _reset_when_closed((client,))
        client.close()


def _reset_when_closed(ends: tuple[socket.socket, ...]) -> None:
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
