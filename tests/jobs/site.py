"""Another web server, which does what a test tells it to, byte by byte."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field


@dataclass
class Request:
    """What somebody has asked for."""

    target: str
    headers: dict[str, str]
    writer: asyncio.StreamWriter
    sent: int = 0

    @property
    def start(self) -> int:
        """Where the wanted range begins."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        return int(match[1]) if match else 0

    async def head(self, status: str, **headers: object) -> None:
        """Send a head."""
        lines = [f"HTTP/1.1 {status}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        await self.writer.drain()

    async def body(self, data: bytes, piece: int = 16 << 10) -> None:
        """Send bytes, as fast as they are taken."""
        for at in range(0, len(data), piece):
            part = data[at : at + piece]
            self.writer.write(part)
            await self.writer.drain()
            self.sent += len(part)

    async def cut(self) -> None:
        """End the connection without a word, when all that was sent has left."""
        self.writer.transport.set_write_buffer_limits(0)
        await self.writer.drain()
        self.writer.transport.abort()


Answer = Callable[[Request], Awaitable[None]]


@dataclass
class Site:
    """A server on a free port of 127.0.0.1; each request goes to ``answer``."""

    answer: Answer
    host: str = "127.0.0.1"
    tls: ssl.SSLContext | None = None
    requests: list[Request] = field(default_factory=list)

    async def __aenter__(self) -> Site:
        self._open: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, self.host, 0, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._open:
            task.cancel()
        if self._open:
            await asyncio.wait(self._open)
        await self._server.wait_closed()

    def url(self, path: str = "/file.bin", host: str = "") -> str:
        """An address of this server."""
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{host or self.host}:{self.port}{path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                pairs = [line.partition(":") for line in head[1:] if line]
                headers = {name.lower(): value.strip() for name, _, value in pairs}
                request = Request(head[0].split(" ")[1], headers, writer)
                self.requests.append(request)
                await self.answer(request)
        finally:
            self._open.discard(task)
            writer.close()


def whole(
    data: bytes,
    more: Mapping[str, object] | None = None,
    *,
    etag: str = '"one"',
    ranges: bool = True,
) -> Answer:
    """Answer as a good server does: with ranges and a validator."""

    async def answer(request: Request) -> None:
        headers = {**({"ETag": etag} if etag else {}), **(more or {})}
        start = request.start
        if ranges and start and request.headers.get("if-range") == etag:
            if start >= len(data):
                await request.head("416 No", Content_Range=f"bytes */{len(data)}")
                return
            span = f"bytes {start}-{len(data) - 1}/{len(data)}"
            length = len(data) - start
            await request.head("206 Partial", Content_Length=length, Content_Range=span, **headers)
            await request.body(data[start:])
        else:
            await request.head("200 OK", Content_Length=len(data), **headers)
            await request.body(data)

    return answer


def cut_after(n: int, data: bytes, *, times: int = 1, then: Answer | None = None) -> Answer:
    """End the first answers after so many bytes; then be good."""
    left = times

    async def answer(request: Request) -> None:
        nonlocal left
        if left:
            left -= 1
            start = request.start
            span = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status = "206 Partial" if start else "200 OK"
            more = {"Content_Range": span} if start else {}
            await request.head(status, Content_Length=len(data) - start, ETag='"one"', **more)
            await request.body(data[start : start + n])
            await request.cut()
        else:
            await (then or whole(data))(request)

    return answer
