"""A program as part of a job: it is held when the job is paused, and ends with it.

Strategy. The job's coroutine takes what the program has said, piece by piece: each pipe has a
handler, and nothing is read while nobody asks, so a slow disk or a pause holds the program by the
pipe's own bound. While it waits the job stands at a checkpoint. A pause stops the program's whole
family with SIGSTOP before the job counts as paused, a resume continues it, and whatever way the
job's coroutine ends, the program is ended first.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic
from typing import Any, Protocol

from jobs.children import Child, Exit
from jobs.kinds import Line

_PIECE_BYTES = 64 << 10  # what a pipe holds
_LINE_BYTES = 64 << 10
_LINES = 1000  # that nobody has taken so far; then the pipes wait
TICK_S = 0.25

Handler = Callable[[bytes], Awaitable[None]]


class Holder(Protocol):
    """The process that a program belongs to (see runners.Process)."""

    async def checkpoint(self) -> None:
        """Give way, hold or stop."""
        ...

    async def attend(self, news: asyncio.Future[None], wait_s: float) -> None:
        """Wait for news, at most so long; hold or stop at once when that is wanted."""
        ...


class Program:
    """One program of a job. Iterate over it: its lines, and None at least every 0.25 s."""

    def __init__(self, holder: Holder, child: Child) -> None:
        self._holder = holder
        self._child = child
        self._pipes: dict[int, Handler] = {}
        self._lines: deque[Line] = deque()
        self._rest: dict[str, bytearray] = {}
        self._input: int | None = None  # a copy of its standard input, if that is a file
        self._news: asyncio.Future[None] | None = None
        child.exited.add_done_callback(lambda _: self._wake())

    @property
    def pid(self) -> int:
        """The number of its first process."""
        return self._child.pid

    def listen(self, fd: int, handler: Handler) -> None:
        """Let ``handler`` take what comes from a descriptor, which is ours from now on."""
        os.set_blocking(fd, False)
        self._pipes[fd] = handler

    def listen_lines(self, fd: int, source: str) -> None:
        """Take lines from a descriptor; a longer one than 64 KiB is cut."""

        async def split(data: bytes) -> None:
            self._split(source, data)

        self.listen(fd, split)

    def watch_input(self, fd: int) -> None:
        """The program reads this file; its position is how far it has come."""
        self._input = os.dup(fd)

    def read_bytes(self) -> int:
        """How far it is in its standard input if that is a file, else all that it has read."""
        if self._input is not None:
            return os.lseek(self._input, 0, os.SEEK_CUR)
        with suppress(OSError), open(f"/proc/{self.pid}/io", encoding="ascii") as file:
            return int(file.readline().split()[1])
        return 0

    def __aiter__(self) -> Program:
        return self

    async def __anext__(self) -> Line | None:
        tick = monotonic() + TICK_S
        while True:
            if self._lines:
                return self._lines.popleft()
            ended = self._child.exited.done()  # before the look: what it wrote at last is there
            if await self.pump():
                await self._holder.checkpoint()
                continue
            if self._lines:
                continue
            if ended:
                self._close_pipes()
                if self._lines:
                    continue
                raise StopAsyncIteration
            left_s = tick - monotonic()
            if left_s <= 0:
                return None
            await self._holder.attend(self.news(), left_s)

    async def exit(self) -> Exit:
        """How it has ended, after the iteration."""
        return await asyncio.shield(self._child.exited)

    async def pump(self) -> bool:
        """Take what there is, without waiting for more; whether there was anything."""
        found = False
        if len(self._lines) >= _LINES:
            return found
        for fd, handler in list(self._pipes.items()):
            try:
                data = os.read(fd, _PIECE_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            found = True
            if data:
                await handler(data)
            else:
                self._close_pipe(fd)
        return found

    def news(self) -> asyncio.Future[None]:
        """A future that is done when there may be something to take, or the program has ended."""
        loop = asyncio.get_running_loop()
        if self._news is None or self._news.done():
            self._news = loop.create_future()
            for fd in self._pipes:
                loop.add_reader(fd, self._wake)
        if self._child.exited.done():
            self._wake()
        return self._news

    def _wake(self) -> None:
        if self._news is None:
            return
        loop = asyncio.get_running_loop()
        for fd in self._pipes:
            loop.remove_reader(fd)
        if not self._news.done():
            self._news.set_result(None)

    # For the process

    async def hold(self) -> None:
        """Stop all of it, for a pause."""
        await self._child.stop()

    def go(self) -> None:
        """Let it go on."""
        self._child.signal("CONT")

    async def end(self, grace_s: float) -> None:
        """End it, if it has not ended; what it still says is dropped."""
        self._wake()
        loop = asyncio.get_running_loop()
        for fd in self._pipes:
            loop.add_reader(fd, self._drop, fd)
        try:
            if not self._child.exited.done():
                await self._child.end(grace_s)
        finally:
            self._close_pipes()
            if self._input is not None:
                os.close(self._input)
                self._input = None

    def _drop(self, fd: int) -> None:
        try:
            if os.read(fd, _PIECE_BYTES):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._close_pipe(fd)

    def _close_pipe(self, fd: int) -> None:
        del self._pipes[fd]
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)

    def _close_pipes(self) -> None:
        for fd in list(self._pipes):
            self._close_pipe(fd)
        for source, rest in self._rest.items():
            if rest:
                self._add_line(source, bytes(rest))
                rest.clear()

    def _split(self, source: str, data: bytes) -> None:
        """Lines end with LF or CR: a program that draws its progress sends no LF for long."""
        rest = self._rest.setdefault(source, bytearray())
        *lines, last = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._add_line(source, bytes(rest) + line)
            rest.clear()
        rest += last[: _LINE_BYTES - len(rest)]

    def _add_line(self, source: str, line: bytes) -> None:
        if line.strip():
            self._lines.append(Line(source, line[:_LINE_BYTES].decode(errors="replace")))


def pipe_to(data: dict[int, int], target: int) -> int:
    """A pipe whose writing end becomes ``target`` of a child; the reading end, which is ours."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    data[target] = writing
    return reading


def artifact_handler(writer: Any) -> Handler:
    """Write what comes to an artefact."""

    async def write(data: bytes) -> None:
        await writer.write(data)

    return write
