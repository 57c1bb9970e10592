"""WebSocket connections that keep RFC 6455 to the letter, and end those that do not.

Tornado 6.6.1 answers a broken frame with a silent cut, takes unmasked frames, echoes any close
code, and finds bad UTF-8 only at the end of a message. Here the frames are read anew, piece by
piece, so that the first wrong byte is answered with a close frame that says what was wrong.

However a connection ends, it ends as section 7.1.1 asks: our close frame, the end of our sending,
then what still comes in is thrown away until the client hangs up. A client gets ``_PATIENCE_S`` for
all that. Closing at once would let the kernel send a reset, and the client lose the close frame.

Private names of Tornado that are used: ``WebSocketProtocol13._receive_frame_loop``,
``_write_frame``, ``_handle_message``, ``_run_callback`` and ``_abort``;
``websocket._WebSocketParams``; ``util._websocket_mask``.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import socket
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from tornado.iostream import StreamClosedError
from tornado.util import _websocket_mask
from tornado.websocket import (
    WebSocketClosedError,
    WebSocketHandler,
    WebSocketProtocol,
    WebSocketProtocol13,
    _WebSocketParams,
)

_PATIENCE_S = 2.0
_PIECE_BYTES = 64 << 10
_TURN_BYTES = 256 << 10  # that much is read before others get a turn,
_FRAME_BYTES = 1 << 10  # and a frame counts as so many, however short it is
_REASON_BYTES = 123

_TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x1, 0x2, 0x8, 0x9, 0xA
_OPCODES = (0, _TEXT, _BINARY, _CLOSE, _PING, _PONG)


class _Violation(Exception):
    """The client broke the protocol; the code and the reason go into the close frame."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason


class StrictWebSocketHandler(WebSocketHandler):
    """A WebSocket without compression. Tornado's own pings are not sent.

    ``on_close`` is called as soon as nothing more may be sent, which may be two seconds before the
    connection is gone. Between ``end`` and ``on_close`` no more messages are handed over.
    """

    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Tornado's hook. Two headers are kept from it, because it fails where they are garbage."""
        headers = self.request.headers
        headers.pop("Sec-WebSocket-Extensions", None)  # none is spoken
        try:
            urlsplit(headers.get("Origin", ""))
        except ValueError:
            self.set_status(403)
            self.finish("Cross origin websockets not allowed")
            return
        await super().get(*args, **kwargs)

    def get_websocket_protocol(self) -> WebSocketProtocol | None:
        """Tornado's hook."""
        if self.request.headers.get("Sec-WebSocket-Version") != "13":
            return None
        return _StrictProtocol(self, _WebSocketParams(max_message_size=self.max_message_size))

    def on_unsent(self) -> None:
        """A frame of Tornado's own waits in the stream: nothing may be sent past it."""

    def end(self, code: int, reason: str) -> None:
        """Send a close frame, and cut the connection if it is not answered within two seconds.

        Nothing is sent after the first close frame; another ``end`` does nothing. Those who write
        to the stream themselves must stop. A reason over 123 bytes is cut.
        """
        self.close(code, reason)

    def log_exception(
        self,
        typ: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Tornado's hook. A client that left while something was sent to it is no fault."""
        if not isinstance(value, WebSocketClosedError | StreamClosedError):
            super().log_exception(typ, value, tb)


class _StrictProtocol(WebSocketProtocol13):
    # More than 30 attributes would cost each connection a dict of its own: Tornado has 29.
    __slots__ = ("_cut", "_farewell", "_is_text", "_message", "_unfinished")

    def __init__(self, handler: WebSocketHandler, params: _WebSocketParams) -> None:
        super().__init__(handler, False, params)
        self._message: bytearray | None = None  # what is there of a message
        self._is_text = False
        self._unfinished = b""  # the first bytes of a character at the end of a piece
        self._farewell: asyncio.Future[None] | None = None  # done when the close frame is written
        self._cut: asyncio.TimerHandle | None = None

    # Sending

    def _write_frame(
        self, fin: bool, opcode: int, data: bytes, flags: int = 0
    ) -> asyncio.Future[None]:
        if self.server_terminated:
            raise StreamClosedError
        written = super()._write_frame(fin, opcode, data, flags)
        if self.stream.writing() and isinstance(self.handler, StrictWebSocketHandler):
            self.handler.on_unsent()
        return written

    def write_ping(self, data: bytes) -> None:
        try:
            super().write_ping(data)
        except StreamClosedError:
            raise WebSocketClosedError from None

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        """Send a close frame, once. Tornado calls this again when the stream is closed."""
        if not self.server_terminated:
            if not self.stream.closed():
                data = b"" if code is None else code.to_bytes(2, "big") + _shortened(reason or "")
                self._farewell = self._write_frame(True, _CLOSE, data)
                self._cut = asyncio.get_running_loop().call_later(_PATIENCE_S, self.stream.close)
            self.server_terminated = True
        elif self._cut is not None and self.stream.closed():
            self._cut.cancel()

    def on_connection_close(self) -> None:
        """Do nothing: it is the loop below that says so, and it closes the stream itself."""

    # Receiving

    async def _receive_frame_loop(self) -> None:
        handler = self.handler
        try:
            try:
                done_bytes = 0
                while not self.client_terminated:
                    # Most connections wait here nearly always: no coroutine is kept below this.
                    head = await self.stream.read_bytes(2)
                    done_bytes += _FRAME_BYTES + await self._receive(*head)
                    if done_bytes >= _TURN_BYTES:
                        done_bytes = 0
                        await asyncio.sleep(0)
            except _Violation as violation:
                self.client_terminated = True
                self.close(violation.code, violation.reason)
            self._message = None
            handler.on_ws_connection_close(self.close_code, self.close_reason)
            await self._hang_up()
        except StreamClosedError:
            pass
        finally:
            self._abort()
            handler.on_ws_connection_close(self.close_code, self.close_reason)

    async def _hang_up(self) -> None:
        """End as section 7.1.1 asks. Raises StreamClosedError when it is done."""
        if self._farewell is not None:
            await self._farewell
        if not self.stream.closed():
            with contextlib.suppress(OSError):  # it is gone already
                self.stream.socket.shutdown(socket.SHUT_WR)
        while True:
            await self.stream.read_bytes(_PIECE_BYTES, partial=True)
            await asyncio.sleep(0)

    async def _receive(self, first: int, second: int) -> int:
        """Read one frame and act on it; the length of its payload in bytes."""
        final, opcode = bool(first & 0x80), first & 0x0F
        n_bytes = second & 0x7F
        self._check(first, second)
        n_extended = {126: 2, 127: 8}.get(n_bytes, 0)
        rest = await self.stream.read_bytes(n_extended + 4)
        if n_extended:
            n_bytes = int.from_bytes(rest[:n_extended], "big")
            if n_bytes < (126 if n_extended == 2 else 1 << 16) or n_bytes >> 63:
                raise _Violation(1002, "length")
        mask = rest[n_extended:]
        if opcode & 0x8:
            data = await self.stream.read_bytes(n_bytes) if n_bytes else b""
            data = _websocket_mask(mask, data)
            if opcode == _CLOSE:
                self._closed_by_client(data)
            else:
                await self._hand_over(self._handle_message(opcode, data))
            return n_bytes
        if opcode:
            self._message, self._is_text = bytearray(), opcode == _TEXT
        assert self._message is not None
        if len(self._message) + n_bytes > self.params.max_message_size:
            raise _Violation(1009, "message too big")
        await self._read_payload(self._message, n_bytes, mask, final)
        if final:
            whole, self._message = self._message, None
            message = whole.decode() if self._is_text else bytes(whole)
            if not self.server_terminated:
                await self._hand_over(self._run_callback(self.handler.on_message, message))
        return n_bytes

    def _check(self, first: int, second: int) -> None:
        """What can be said against a frame after its first two bytes."""
        final, opcode = first & 0x80, first & 0x0F
        if first & 0x70:
            raise _Violation(1002, "reserved bit")
        if opcode not in _OPCODES:
            raise _Violation(1002, "opcode")
        if not second & 0x80:
            raise _Violation(1002, "not masked")
        if opcode & 0x8:
            if not final or second & 0x7F > 125:
                raise _Violation(1002, "control frame")
        elif (opcode == 0) != (self._message is not None):
            raise _Violation(1002, "continuation")

    async def _read_payload(
        self, message: bytearray, n_bytes: int, mask: bytes, final: bool
    ) -> None:
        """Add a frame's payload to the message; a text is checked as it arrives."""
        while True:
            piece = b""
            if n_bytes:
                masked = await self.stream.read_bytes(min(n_bytes, _PIECE_BYTES), partial=True)
                piece = _websocket_mask(mask, masked)
                n_bytes -= len(piece)
                turn = len(piece) % 4
                mask = mask[turn:] + mask[:turn]
            if self._is_text:
                self._check_text(piece, final and not n_bytes)
            message += piece
            if not n_bytes:
                return
            await asyncio.sleep(0)

    def _check_text(self, piece: bytes, final: bool) -> None:
        piece = self._unfinished + piece
        try:
            _, n_bytes = codecs.utf_8_decode(piece, "strict", final)
        except UnicodeDecodeError:
            raise _Violation(1007, "UTF-8") from None
        self._unfinished = piece[n_bytes:]

    async def _hand_over(self, handled: asyncio.Future[Any] | None) -> None:
        if handled is not None:
            await handled

    def _closed_by_client(self, data: bytes) -> None:
        """Take a close frame and answer it with its code."""
        code = int.from_bytes(data[:2], "big")
        if data and (len(data) == 1 or not _legal(code)):
            raise _Violation(1002, "close code")
        try:
            self.close_reason = data[2:].decode() or None
        except UnicodeDecodeError:
            raise _Violation(1007, "UTF-8") from None
        self.close_code = code if data else None
        self.client_terminated = True
        self.close(self.close_code)


def _legal(code: int) -> bool:
    """Whether a close frame may have the code: section 7.4, and what IANA has added."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


def _shortened(reason: str) -> bytes:
    return reason.encode()[:_REASON_BYTES].decode(errors="ignore").encode()
