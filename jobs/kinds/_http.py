"""One GET of another server, read at the pace of whoever takes it.

Strategy. ``Exchange`` runs in a task of its own: find the addresses, connect, ask, read. Each piece
of the body is handed over and waited for, so while nobody takes it nothing is read, and TCP holds
the other side. It connects to the addresses that it was given and to nothing else; the name is only
said, in Host and for the certificate. A connection serves one request.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote, unquote, urljoin, urlsplit

from tornado.http1connection import HTTP1Connection, HTTP1ConnectionParameters
from tornado.httputil import (
    HTTPHeaders,
    HTTPMessageDelegate,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import IOStream, SSLIOStream, StreamClosedError

from errors import SluiceError
from jobs.kinds import Address

_PIECE_BYTES = 256 << 10
_BUFFER_BYTES = 1 << 20
_HEADER_BYTES = 64 << 10
_ANY_BYTES = 1 << 62  # whoever takes the body counts it
_URL_CHARS = 8192
_PORTS = {"http": 80, "https": 443}
_SAFE = "/%:@!$&'()*+,;=~-._"  # what a path may have unquoted, RFC 3986
_BAD = re.compile(r"[\x00-\x20\x7f\\]")

TLS = ssl.create_default_context()  # read once, at the start: it takes some 20 ms


class Cut(Exception):
    """The answer did not come, or not to its end; another try may help."""

    def __init__(self, why: str, after_s: float | None = None) -> None:
        super().__init__(why)
        self.after_s = after_s  # what the other server asks for


class Place(NamedTuple):
    """What a URL says."""

    scheme: str
    host: str  # without brackets
    port: int
    path: str  # with the query

    @property
    def host_header(self) -> str:
        """The host as it is said to the server."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL, without a fragment."""
        return f"{self.scheme}://{self.host_header}{self.path}"

    @property
    def name(self) -> str:
        """The last part of the path, as people read it."""
        return unquote(self.path.partition("?")[0].rpartition("/")[2])


def place_of(url: str, base: Place | None = None) -> Place:
    """Take a URL apart; ``base`` is that from which a relative one came.

    Raises ValueError, which does not repeat the URL: it may hold a secret.
    """
    if len(url) > _URL_CHARS or _BAD.search(url):
        raise ValueError("is too long, or has characters that a URL can't have")
    parts = urlsplit(urljoin(base.url, url) if base else url)
    if parts.scheme not in _PORTS:
        raise ValueError("is no http:// or https:// URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("has a user name or password; they are not sent")
    if not parts.hostname or "%" in parts.hostname:
        raise ValueError("has no host, or one that can't be")
    try:
        port = parts.port or _PORTS[parts.scheme]
        host = parts.hostname if ":" in parts.hostname else _ascii(parts.hostname)
        if ":" in host:
            ipaddress.IPv6Address(host)
    except ValueError as error:
        raise ValueError("has a host or port that can't be") from error
    path = quote(parts.path or "/", safe=_SAFE)
    query = "?" + quote(parts.query, safe=_SAFE + "?[]") if parts.query else ""
    return Place(parts.scheme, host, port, path + query)


def _ascii(host: str) -> str:
    name = host if host.isascii() else host.encode("idna").decode()
    if not re.fullmatch(r"[a-z0-9_.-]{1,253}", name):
        raise ValueError
    return name


class Exchange(HTTPMessageDelegate):
    """A request under way. Close it, whatever comes of it."""

    def __init__(
        self,
        find: Callable[[], Awaitable[Sequence[Address]]],
        place: Place,
        headers: Mapping[str, str],
        connect_s: float,
    ) -> None:
        self.place = place
        self.status = 0  # until the head of the answer is there
        self.reason = ""
        self.headers = HTTPHeaders()
        self.piece: bytes | None = None  # of the body; ``go`` asks for the next one
        self.over = False  # nothing more comes: the whole body was there if there is no error
        self.error: Exception | None = None
        self._find = find
        self._request = HTTPHeaders({"Host": place.host_header, "Connection": "close", **headers})
        self._connect_s = connect_s
        self._news: asyncio.Future[None] | None = None
        self._taken: asyncio.Future[None] | None = None
        self._stream: IOStream | None = None
        self._finished = False
        self._closed = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def has_news(self) -> bool:
        """Whether the head or a piece waits to be taken."""
        return self._taken is not None

    def news(self) -> asyncio.Future[None]:
        """Is done when there is something: the head, a piece, or the end."""
        self._news = asyncio.get_running_loop().create_future()
        if self._taken is not None or self.over:
            self._news.set_result(None)
        return self._news

    def go(self) -> None:
        """What was there was taken: read on."""
        self.piece = None
        taken, self._taken = self._taken, None
        if taken is not None and not taken.done():
            taken.set_result(None)

    async def close(self) -> None:
        """End it; returns when nothing of it is left."""
        self._closed = True
        if self._stream is None:
            self._task.cancel()  # it looks for the addresses
        else:
            self._stream.close()
        self.go()
        await asyncio.wait([self._task])

    # The task

    async def _run(self) -> None:
        try:
            stream = await self._connect()
            parameters = HTTP1ConnectionParameters(
                no_keep_alive=True,
                chunk_size=_PIECE_BYTES,
                max_header_size=_HEADER_BYTES,
                max_body_size=_ANY_BYTES,
            )
            connection = HTTP1Connection(stream, True, parameters)
            start = RequestStartLine("GET", self.place.path, "HTTP/1.1")
            await connection.write_headers(start, self._request)
            connection.finish()
            await connection.read_response(self)
            if not self._finished:
                self.error = Cut("the answer is malformed, or was cut")
            elif stream.error is not None:  # a body without a length, ended by a reset
                self.error = Cut("the connection was cut")
        except StreamClosedError:
            self.error = Cut("the connection was cut")
        except Exception as error:
            self.error = error
        finally:
            self.over = True
            if self._stream is not None:
                self._stream.close()
            self._tell()

    async def _connect(self) -> IOStream:
        """Connect to the first address that answers. Raises Cut, SluiceError."""
        why: BaseException | None = None
        for family, sockaddr in await self._find():
            if self._closed:
                break
            sock = socket.socket(socket.AddressFamily(family), socket.SOCK_STREAM)
            if self.place.scheme == "https":
                stream: IOStream = SSLIOStream(sock, ssl_options=TLS, max_buffer_size=_BUFFER_BYTES)
            else:
                stream = IOStream(sock, max_buffer_size=_BUFFER_BYTES)
            self._stream = stream
            try:
                async with asyncio.timeout(self._connect_s):
                    await stream.connect(sockaddr, server_hostname=self.place.host)
                stream.set_nodelay(True)
                return stream
            except (TimeoutError, OSError) as error:  # also StreamClosedError
                why = stream.error or error
                stream.close()
        if isinstance(why, ssl.SSLCertVerificationError):
            raise SluiceError(
                "fetch-refused", f"The certificate of {self.place.host} is not valid for it."
            )
        raise Cut("can't be reached")

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def _hand_over(self) -> None:
        """Return when what is there was taken. Must not raise: Tornado would log it."""
        if not self._closed:
            self._taken = asyncio.get_running_loop().create_future()
            self._tell()
            await asyncio.wait([self._taken])

    # See HTTPMessageDelegate

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        assert isinstance(start_line, ResponseStartLine)
        if start_line.code < 200:
            return None
        self.status, self.reason, self.headers = start_line.code, start_line.reason, headers
        return self._hand_over()

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        if self._closed:
            return None
        self.piece = chunk
        return self._hand_over()

    def finish(self) -> None:
        self._finished = True

    def on_connection_close(self) -> None:
        """What was cut is told by what ``_run`` meets."""
