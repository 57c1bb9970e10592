"""The WebSocket protocol, frame by frame, against an echo that runs in the real server.

Most cases are those of the Autobahn test suite, sections 1 to 7 and 10, under its numbers; the
suite itself runs in tests/interop, where a Python that is old enough can be had. A case is what a
client sends and what it must get: every frame, the close code, and the end of the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import pytest
import tornado.util
import tornado.websocket
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application
from tornado.websocket import WebSocketProtocol13

import handlers.socket
from handlers.socket import StrictWebSocketHandler
from tests.harness import Server, eventually

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
PATIENCE_S = 30.0
LIMIT_BYTES = 64 << 20  # of the echo, see tests/serve.py
Frame = tuple[int, bytes]


class Wait(NamedTuple):
    """Instead of sending, wait for frames."""

    n: int = 1


class Case(NamedTuple):
    """What is sent, and all that must come back. A list is sent frame by frame."""

    name: str
    sent: list[bytes | Wait]
    answers: list[Frame]
    close: bytes
    """The payload's first two bytes: the code, or nothing."""
    chop: int = 0
    """Bytes sent at once; 0: each part of ``sent`` as a whole."""


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    n_bytes: int | None = None,
    extended: int | None = None,
) -> bytes:
    """A masked frame; ``n_bytes`` claims another length, in ``extended`` bytes after the head."""
    n = len(payload) if n_bytes is None else n_bytes
    if extended is None:
        extended = 0 if n < 126 else 2 if n < 1 << 16 else 8
    marker = {0: n, 2: 126, 8: 127}[extended]
    head = bytes([fin << 7 | rsv << 4 | opcode, 0x80 | marker])
    head += n.to_bytes(extended, "big") if extended else b""
    mask = b"\x37\xfa\x21\x3d"
    pad = (mask * (len(payload) // 4 + 1))[: len(payload)]
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(pad, "big")
    return head + mask + masked.to_bytes(len(payload), "big")


def more(payload: bytes, *, fin: bool = False) -> bytes:
    """A continuation."""
    return frame(0, payload, fin=fin)


def closing(code: int, reason: bytes = b"") -> bytes:
    """A close frame."""
    return frame(CLOSE, code.to_bytes(2, "big") + reason)


def bytewise(opcode: int, payload: bytes) -> list[bytes]:
    """A message in fragments of one byte."""
    last = len(payload) - 1
    return [frame(0 if i else opcode, payload[i : i + 1], fin=i == last) for i in range(last + 1)]


def good(name: str, *sent: bytes | Wait, answers: list[Frame], chop: int = 0) -> Case:
    """All is well, and the client closes at the end."""
    return Case(name, [*sent, closing(1000)], answers, b"\x03\xe8", chop)


def bad(
    name: str,
    *sent: bytes | Wait,
    code: int = 1002,
    answers: list[Frame] | None = None,
    chop: int = 0,
) -> Case:
    """The server ends the connection with a code."""
    return Case(name, list(sent), answers or [], code.to_bytes(2, "big"), chop)


def one(*sent: bytes | Wait) -> bytes:
    """Frames that are sent at once."""
    return b"".join(part for part in sent if isinstance(part, bytes))


HELLO = b"Hello, world!"
HELLO_BACK: list[Frame] = [(TEXT, HELLO)]
NOT_TEXT = b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff"
KOSME = bytes.fromhex("cebae1bdb9cf83cebcceb5")
OUT_OF_RANGE = b"\xf4\x90\x80\x80"
BROKEN = KOSME + OUT_OF_RANGE + b"edited"
UMLAUTS = "Hello-µ@ßöäüàá-UTF-8!!".encode()
HALVES: list[Frame] = [(TEXT, b"fragment1fragment2")]


def echoes() -> Iterator[Case]:
    """Section 1: messages of all lengths."""
    sizes = [0, 125, 126, 127, 128, 65535, 65536]
    for section, opcode, byte in ((1, TEXT, b"*"), (2, BINARY, b"\xfe")):
        for number, size in enumerate(sizes, 1):
            answers: list[Frame] = [(opcode, byte * size)]
            yield good(f"1.{section}.{number}", frame(opcode, byte * size), answers=answers)
        yield good(
            f"1.{section}.8",
            frame(opcode, byte * 65536),
            answers=[(opcode, byte * 65536)],
            chop=997,
        )


def pings() -> Iterator[Case]:
    """Section 2."""
    full = b"\xfe" * 125
    for number, payload in enumerate([b"", HELLO, NOT_TEXT, full], 1):
        yield good(f"2.{number}", frame(PING, payload), answers=[(PONG, payload)])
    yield bad("2.5", frame(PING, b"\xfe" * 126))
    yield good("2.6", frame(PING, full), answers=[(PONG, full)], chop=1)
    yield good("2.7", frame(PONG), answers=[])
    yield good("2.8", frame(PONG, b"unasked"), answers=[])
    yield good("2.9", frame(PONG, b"unasked"), frame(PING, HELLO), answers=[(PONG, HELLO)])
    ten = [b"payload-%d" % number for number in range(10)]
    pongs: list[Frame] = [(PONG, payload) for payload in ten]
    for name, chop in (("2.10", 0), ("2.11", 1)):
        yield good(name, one(*(frame(PING, payload) for payload in ten)), answers=pongs, chop=chop)


def reserved() -> Iterator[Case]:
    """Sections 3 and 4: reserved bits and opcodes."""
    hello, ping = frame(TEXT, HELLO), frame(PING)
    yield bad("3.1", frame(TEXT, HELLO, rsv=1))
    for name, rsv, chop in (("3.2", 2, 0), ("3.3", 3, 0), ("3.4", 4, 1)):
        sent = [hello, frame(TEXT, HELLO, rsv=rsv), ping]
        yield bad(name, *(sent if name == "3.3" else [one(*sent)]), answers=HELLO_BACK, chop=chop)
    yield bad("3.5", frame(BINARY, NOT_TEXT, rsv=5))
    yield bad("3.6", frame(PING, HELLO, rsv=6))
    yield bad("3.7", frame(CLOSE, rsv=7))
    for section, first in ((1, 3), (2, 11)):
        yield bad(f"4.{section}.1", frame(first))
        yield bad(f"4.{section}.2", frame(first + 1, b"payload"))
        for number, payload, chop in ((3, b"", 0), (4, HELLO, 0), (5, HELLO, 1)):
            sent = [hello, frame(first + number - 1, payload), ping]
            yield bad(f"4.{section}.{number}", one(*sent), answers=HELLO_BACK, chop=chop)


def fragments() -> Iterator[Case]:
    """Section 5."""
    yield bad("5.1", frame(PING, b"fragment1", fin=False), more(b"fragment2", fin=True))
    yield bad("5.2", frame(PONG, b"fragment1", fin=False), more(b"fragment2", fin=True))
    first, last = frame(TEXT, b"fragment1", fin=False), more(b"fragment2", fin=True)
    # At once, frame by frame, and byte by byte.
    manners: list[tuple[Callable[..., list[bytes]], int]] = [
        (lambda *sent: [one(*sent)], 0),
        (lambda *sent: list(sent), 0),
        (lambda *sent: list(sent), 1),
    ]
    pong: Frame = (PONG, b"ping")
    for number, (cut, chop) in enumerate(manners):
        yield good(f"5.{3 + number}", *cut(first, last), answers=HALVES, chop=chop)
        sent = cut(first, frame(PING, b"ping"), last)
        yield good(f"5.{6 + number}", *sent, answers=[pong, *HALVES], chop=chop)
        for base, fin in ((9, True), (12, False)):
            sent = cut(more(b"of nothing", fin=fin), frame(TEXT, HELLO))
            yield bad(f"5.{base + number}", *sent, chop=chop)
    stray = [first, last, more(b"fragment3"), frame(TEXT, b"fragment4")]
    yield bad("5.15", one(*stray), answers=HALVES)
    for name, fin in (("5.16", False), ("5.17", True)):
        yield bad(name, one(*[more(b"fragment1", fin=fin), first, last] * 2))
    yield bad("5.18", one(first, frame(TEXT, b"fragment2")))
    five = [b"fragment%d" % number for number in range(1, 6)]
    begun = [frame(TEXT, five[0], fin=False), more(five[1]), frame(PING, b"1")]
    ended = [more(five[2]), more(five[3]), frame(PING, b"2"), more(five[4], fin=True)]
    whole: list[Frame] = [(PONG, b"1"), (PONG, b"2"), (TEXT, b"".join(five))]
    yield good("5.19", one(*begun), Wait(), one(*ended), answers=whole)
    yield good("5.20", *begun, Wait(), *ended, answers=whole)


# Sections 6.5 to 6.23, in hexadecimal: a minus stands before what is no UTF-8.
UTF8 = {
    5: "68656c6c6f24776f726c64 68656c6c6fc2a2776f726c64 68656c6c6fe282ac776f726c64 "
    "68656c6c6ff0a4ada2776f726c64 cebae1bdb9cf83cebcceb5",
    6: "-ce ceba -cebae1 -cebae1bd cebae1bdb9 -cebae1bdb9cf cebae1bdb9cf83 -cebae1bdb9cf83ce "
    "cebae1bdb9cf83cebc -cebae1bdb9cf83cebcce cebae1bdb9cf83cebcceb5",
    7: "00 c280 e0a080 f0908080",
    8: "-f888808080 -fc8480808080",
    9: "7f dfbf efbfbf f48fbfbf",
    10: "-f7bfbfbf -fbbfbfbfbf -fdbfbfbfbfbf",
    11: "ed9fbf ee8080 efbfbd f48fbfbf -f4908080",
    12: "-80 -bf -80bf -80bf80 -80bf80bf -80bf80bf80 -80bf80bf80bf "
    f"-{bytes(range(0x80, 0xBF)).hex()}",
    13: " ".join(
        "-" + "".join(f"{byte:x}20" for byte in range(first, last))
        for first, last in ((0xC0, 0xDF), (0xE0, 0xEF), (0xF0, 0xF7), (0xF8, 0xFB), (0xFC, 0xFD))
    ),
    14: "-c0 -e080 -f08080 -f8808080 -fc80808080 -df -efbf -f7bfbf -fbbfbfbf -fdbfbfbfbf",
    15: "-c0e080f08080f8808080fc80808080dfefbff7bfbffbbfbfbffdbfbfbfbf",
    16: "-fe -ff -fefeffff",
    17: "-c0af -e080af -f08080af -f8808080af -fc80808080af",
    18: "-c1bf -e09fbf -f08fbfbf -f887bfbfbf -fc83bfbfbfbf",
    19: "-c080 -e08080 -f0808080 -f880808080 -fc8080808080",
    20: "-eda080 -edadbf -edae80 -edafbf -edb080 -edbe80 -edbfbf",
    21: "-eda080edb080 -eda080edbfbf -edadbfedb080 -edadbfedbfbf -edae80edb080 -edae80edbfbf "
    "-edafbfedb080 -edafbfedbfbf",
    22: " ".join(  # the last two of each plane are no characters, and allowed
        chr(plane << 16 | low).encode().hex() for plane in range(17) for low in (0xFFFE, 0xFFFF)
    ),
    23: "efbfb9 efbfba efbfbb efbfbc efbfbd efbfbe efbfbf",
}


def texts() -> Iterator[Case]:
    """Section 6: UTF-8, which is checked as it arrives."""
    empty = [frame(TEXT, fin=False), more(b""), more(b"", fin=True)]
    yield good("6.1.1", frame(TEXT), answers=[(TEXT, b"")])
    yield good("6.1.2", *empty, answers=[(TEXT, b"")])
    yield good("6.1.3", empty[0], more(HELLO), empty[2], answers=HELLO_BACK)
    yield good("6.2.1", frame(TEXT, UMLAUTS), answers=[(TEXT, UMLAUTS)])
    halves = [frame(TEXT, UMLAUTS[:15], fin=False), more(UMLAUTS[15:], fin=True)]
    yield good("6.2.2", *halves, answers=[(TEXT, UMLAUTS)])
    yield good("6.2.3", *bytewise(TEXT, UMLAUTS), answers=[(TEXT, UMLAUTS)])
    yield good("6.2.4", *bytewise(TEXT, KOSME), answers=[(TEXT, KOSME)])
    surrogate = KOSME + b"\xed\xa0\x80" + b"edited"
    yield bad("6.3.1", frame(TEXT, surrogate), code=1007)
    yield bad("6.3.2", *bytewise(TEXT, surrogate), code=1007)
    # The server must not wait for the rest: it is never sent. The pong shows that the first part
    # was taken.
    ping: list[bytes | Wait] = [frame(PING), Wait()]
    pong: list[Frame] = [(PONG, b"")]
    for name, first, second in (
        ("6.4.1", KOSME, OUT_OF_RANGE),
        ("6.4.2", BROKEN[:12], BROKEN[12:13]),
    ):
        sent = [frame(TEXT, first, fin=False), *ping, more(second)]
        yield bad(name, *sent, code=1007, answers=pong)
    whole = frame(TEXT, BROKEN)
    start = len(whole) - len(BROKEN)
    yield bad("6.4.3", whole[: start + 11], whole[start + 11 : start + 15], code=1007)
    yield bad("6.4.4", whole[: start + 12], whole[start + 12 : start + 13], code=1007)
    for section, payloads in UTF8.items():
        for number, payload in enumerate(payloads.split(), 1):
            text = bytes.fromhex(payload.lstrip("-"))
            if payload.startswith("-"):
                yield bad(f"6.{section}.{number}", frame(TEXT, text), code=1007)
            else:
                yield good(f"6.{section}.{number}", frame(TEXT, text), answers=[(TEXT, text)])


def closes() -> Iterator[Case]:
    """Section 7: how connections end."""
    hello, close = frame(TEXT, HELLO), closing(1000)
    yield good("7.1.1", hello, answers=HELLO_BACK)
    yield good("7.1.2", close, answers=[])
    yield Case("7.1.3", [close, frame(PING)], [], close_of(1000))
    yield Case("7.1.4", [close, hello], [], close_of(1000))
    sent = [frame(TEXT, b"fragment1", fin=False), close, more(b"fragment2", fin=True)]
    yield Case("7.1.5", [*sent], [], close_of(1000))
    big = b"BAsd7&jh23" * 26214
    sent = [frame(TEXT, big), hello, close, frame(PING)]
    yield Case("7.1.6", [one(*sent)], [(TEXT, big), *HELLO_BACK], close_of(1000))
    yield Case("7.3.1", [frame(CLOSE)], [], b"")
    yield bad("7.3.2", frame(CLOSE, b"a"))
    for number, reason in ((3, b""), (4, HELLO), (5, b"*" * 123)):
        yield Case(f"7.3.{number}", [closing(1000, reason)], [], close_of(1000))
    yield bad("7.3.6", closing(1000, b"*" * 124))
    yield bad("7.5.1", closing(1000, BROKEN), code=1007)
    legal = [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999]
    for number, code in enumerate(legal, 1):
        yield Case(f"7.7.{number}", [closing(code)], [], close_of(code))
    illegal = [0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999]
    for number, code in enumerate(illegal, 1):
        yield bad(f"7.9.{number}", closing(code))
    yield bad("7.13.1", closing(5000))
    yield bad("7.13.2", closing(65535))


def close_of(code: int) -> bytes:
    """The payload of a close frame without a reason."""
    return code.to_bytes(2, "big")


def others() -> Iterator[Case]:
    """Section 10, and what the suite leaves out."""
    long = b"*" * 65536
    pieces = [
        frame(0 if at else TEXT, long[at : at + 1300], fin=False) for at in range(0, 65536, 1300)
    ]
    sent = one(*pieces[:-1], more(long[(len(pieces) - 1) * 1300 :], fin=True))
    yield good("10.1.1", sent, answers=[(TEXT, long)])
    yield bad("unmasked", b"\x81\x05Hello")
    yield bad("unmasked-empty", b"\x81\x00")
    yield bad("unmasked-close", b"\x88\x02\x03\xe8")
    yield bad("length-in-2-for-1", frame(TEXT, HELLO, extended=2))
    yield bad("length-in-8-for-2", frame(TEXT, b"*" * 200, extended=8))
    yield bad("length-negative", frame(TEXT, n_bytes=1 << 63))
    yield bad("too-big", frame(BINARY, n_bytes=LIMIT_BYTES + 1), code=1009)
    first = frame(BINARY, b"*", fin=False)
    yield bad("too-big-in-all", first, frame(0, n_bytes=LIMIT_BYTES), code=1009)
    yield bad("text-in-a-fragmented-binary", first, frame(TEXT, HELLO))
    yield bad("cut-character", frame(TEXT, b"\xce", fin=False), more(b"", fin=True), code=1007)
    binary = [frame(BINARY, b"\xff\xce", fin=False), more(b"\xff", fin=True)]
    yield good("binary-is-not-checked", *binary, answers=[(BINARY, b"\xff\xce\xff")])
    yield bad("garbage", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
    for code in (1012, 1013, 1014):
        yield Case(f"close-{code}", [closing(code)], [], close_of(code))
    yield bad("close-1015", closing(1015))


CASES = [
    *(case for section in (echoes, pings, reserved, fragments) for case in section()),
    *(case for section in (texts, closes, others) for case in section()),
]


class Client:
    """A connection over which any bytes can be sent."""

    def __init__(self, port: int, path: str = "/echo") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._got = b""
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
            "Sec-WebSocket-Extensions: permessage-deflate\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self._got:
            self._more()
        head, _, self._got = self._got.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        assert b"extensions" not in head.lower()

    def _more(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise EOFError
        self._got += data

    def _take(self, n: int) -> bytes:
        while len(self._got) < n:
            self._more()
        taken, self._got = self._got[:n], self._got[n:]
        return taken

    def frame(self) -> Frame:
        """The next frame. Raises EOFError at the end of the connection."""
        first, second = self._take(2)
        assert first & 0xF0 == 0x80 and second < 0x80, (first, second)
        n_extended = {126: 2, 127: 8}.get(second, 0)
        n = int.from_bytes(self._take(n_extended), "big") if n_extended else second
        return first & 0x0F, self._take(n)

    def rest(self) -> list[Frame]:
        """All frames until the server ends the connection."""
        frames = []
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                frames.append(self.frame())
        assert self._got == b""
        return frames

    def send(self, data: bytes, chop: int = 0) -> None:
        """Send all, in pieces. The server may have ended the connection before."""
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(data), chop or len(data)):
                self.socket.sendall(data[at : at + (chop or len(data))])

    def is_cut(self) -> bool:
        """Whether the server takes nothing more at all."""
        try:
            self.socket.sendall(b"x")
        except OSError:
            return True
        return False

    def reset(self) -> None:
        """Cut the connection without a goodbye."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an echo; whatever clients do to it, it has nothing to log."""
    server = Server(tmp_path_factory.mktemp("echo") / "data")
    server.env = {"ECHO": "1"}
    yield server.start()
    server.close()


@pytest.fixture
def client(echo: Server) -> Iterator[Client]:
    """A connection to the echo."""
    client = Client(echo.port)
    yield client
    client.socket.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_case(client: Client, case: Case) -> None:
    """What comes back is exactly what must, and then the server ends the connection."""
    got: list[Frame] = []
    for part in case.sent:
        if isinstance(part, Wait):
            got += [client.frame() for _ in range(part.n)]
        else:
            client.send(part, case.chop)
    got += client.rest()
    assert got[:-1] == case.answers
    opcode, payload = got[-1]
    assert (opcode, payload[:2]) == (CLOSE, case.close)


def test_as_many_as_the_suite_has() -> None:
    """No case of the suite's sections is forgotten, and none is there twice."""
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert len([name for name in names if name[0].isdigit()]) == 247


@pytest.mark.parametrize("path", ["/echo", "/v1/ws"])
@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("Sec_WebSocket_Extensions", "x; a*0*=b; a*=c", 101),
        ("Sec_WebSocket_Extensions", ",;=", 101),
        ("Sec_WebSocket_Protocol", ",,", 101),
        ("Origin", "http://[::1", 403),
        ("Origin", "://[", 403),
    ],
)
def test_headers_of_garbage(echo: Server, path: str, name: str, value: str, status: int) -> None:
    """A header that nobody can read is ignored, or refused; it is no error of the server."""
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec_WebSocket_Key": "MDEyMzQ1Njc4OWFiY2RlZg==",
        "Sec_WebSocket_Version": "13",
        name: value,
    }
    assert echo.get(path, **headers).status == status


def test_not_half_open(echo: Server) -> None:
    """A client that does not hang up after the close frames is cut by the server."""
    clients = [Client(echo.port), Client(echo.port)]
    for client, last in zip(clients, (closing(1000), frame(3)), strict=True):
        client.send(last)
    for client in clients:
        assert [opcode for opcode, _ in client.rest()] == [CLOSE]
        eventually(client.is_cut, "the server has closed its half, too", PATIENCE_S)
        client.socket.close()


def test_cut_while_it_is_sent_to(echo: Server) -> None:
    """A client that resets the connection in the middle of an answer is nothing to log."""
    for _ in range(3):
        client = Client(echo.port)
        client.send(frame(BINARY, b"*" * (8 << 20)))
        assert client.socket.recv(1)
        client.reset()
    client = Client(echo.port)
    client.send(frame(TEXT, HELLO))
    assert client.frame() == (TEXT, HELLO)
    client.socket.close()


def test_private_names() -> None:
    """What is used of Tornado's inside is there; another Tornado needs another look."""
    for name in (
        *("_receive_frame_loop", "_write_frame", "_handle_message", "_run_callback", "_abort"),
        *("on_connection_close", "write_ping", "close"),
    ):
        assert callable(getattr(WebSocketProtocol13, name)), name
    assert callable(tornado.websocket._WebSocketParams)
    assert (
        tornado.util._websocket_mask(b"\x01\x02\x03\x04", b"\x01\x02\x03\x04\x05")
        == b"\0\0\0\0\x04"
    )
    assert tornado.version == "6.6.1"


# In this process, where the handler can be seen


class Recorder(StrictWebSocketHandler):
    """Lets a test do with a connection what it wants."""

    opened: asyncio.Queue[Recorder]

    def initialize(self, opened: asyncio.Queue[Recorder]) -> None:
        """Tornado's hook."""
        self.opened = opened
        self.heard: list[str | bytes] = []
        self.hold: Callable[[], Awaitable[None]] | None = None
        self.closed = asyncio.Event()

    def open(self, *args: str, **kwargs: str) -> None:
        """Tornado's hook."""
        self.opened.put_nowait(self)

    def on_message(self, message: str | bytes) -> Awaitable[None] | None:
        """Tornado's hook."""
        self.heard.append(message)
        return self.hold() if self.hold is not None else None

    def on_close(self) -> None:
        """Tornado's hook."""
        self.closed.set()


class Line(NamedTuple):
    """Both ends of a connection."""

    handler: Recorder
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


def on_a_line(test: Callable[[Line], Awaitable[None]]) -> None:
    """Run a coroutine with a connection."""

    async def run() -> None:
        opened: asyncio.Queue[Recorder] = asyncio.Queue()
        server = HTTPServer(Application([(r"/", Recorder, {"opened": opened})]))
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        port = sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        await reader.readuntil(b"\r\n\r\n")
        handler = await opened.get()
        await test(Line(handler, reader, writer))
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        await handler.closed.wait()
        server.stop()
        await server.close_all_connections()

    async def in_time() -> None:
        await asyncio.wait_for(run(), PATIENCE_S)

    asyncio.run(in_time())


def test_end_and_no_answer() -> None:
    """A client that does not answer our close frame is cut; nothing follows the frame."""

    async def test(line: Line) -> None:
        began_s = time.monotonic()
        protocol: Any = line.handler.ws_connection
        line.handler.end(4400, "bad frame")
        line.handler.end(4500, "again")
        with pytest.raises(tornado.websocket.WebSocketClosedError):
            line.handler.write_message("too late")
        with pytest.raises(tornado.websocket.WebSocketClosedError):
            protocol.write_ping(b"")
        line.writer.write(frame(PING) + frame(TEXT, HELLO))
        assert await line.reader.read() == b"\x88\x0b\x11\x30bad frame"
        assert time.monotonic() - began_s > 1.9
        await line.handler.closed.wait()
        assert line.handler.heard == []

    on_a_line(test)


def test_end_and_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that answers our close frame is let go at once, and no timer stays behind."""
    monkeypatch.setattr(handlers.socket, "_PATIENCE_S", 2 * PATIENCE_S)

    async def test(line: Line) -> None:
        protocol: Any = line.handler.ws_connection
        line.handler.end(1012, "restart")
        assert await line.reader.readexactly(11) == b"\x88\x09\x03\xf4restart"
        line.writer.write(closing(1012))
        assert await line.reader.read() == b""
        await line.handler.closed.wait()
        assert line.handler.close_code == 1012
        line.writer.close()
        while not protocol._cut.cancelled():
            await asyncio.sleep(0.01)
        assert protocol.stream.closed()

    on_a_line(test)


def test_long_reason() -> None:
    """A reason that does not fit into a close frame is cut between two characters."""

    async def test(line: Line) -> None:
        line.handler.end(4400, "ä" * 100)
        assert (await line.reader.readexactly(126))[4:].decode() == "ä" * 61

    on_a_line(test)


def test_one_message_at_a_time() -> None:
    """The next frame is not read before what on_message returned is done."""

    async def test(line: Line) -> None:
        go_on = asyncio.Event()

        async def hold() -> None:
            await go_on.wait()

        line.handler.hold = hold
        line.writer.write(frame(TEXT, b"1") + frame(PING) + frame(TEXT, b"2"))
        while not line.handler.heard:
            await asyncio.sleep(0)
        line.handler.ping(b"ours")
        assert await line.reader.readexactly(6) == b"\x89\x04ours"
        assert line.handler.heard == ["1"]
        go_on.set()
        assert await line.reader.readexactly(2) == b"\x8a\x00"
        while len(line.handler.heard) < 2:
            await asyncio.sleep(0)

    on_a_line(test)


def test_memory_of_a_connection() -> None:
    """A connection has few enough attributes that Python keeps them without a dict of its own."""

    async def test(line: Line) -> None:
        protocol: Any = line.handler.ws_connection
        line.writer.write(frame(TEXT, b"\xc3", fin=False) + more(b"\xa4", fin=True))
        while not line.handler.heard:
            await asyncio.sleep(0.01)
        line.handler.end(1000, "")
        assert line.handler.heard == ["ä"]
        assert len(vars(protocol)) <= 30

    on_a_line(test)


def test_told_at_once() -> None:
    """on_close is called when the client has broken a rule, not only when it has hung up."""

    async def test(line: Line) -> None:
        line.writer.write(frame(3))
        await line.handler.closed.wait()
        assert await line.reader.read() == b"\x88\x08\x03\xeaopcode"
        assert line.handler.close_code is None

    on_a_line(test)
