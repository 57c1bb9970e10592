"""A subscriber on raw sockets: all doors, cut at any byte, and it reads only when it is told to.

The rules of the channel are those of ``jobs/replica.py``; here is what carries the messages.
Nothing is read in the background, so a test that does not call ``read`` is a client that does not
read, and the receive buffers are small, so that the server soon notices.
"""

from __future__ import annotations

import base64
import json
import os
import select
import socket
from collections.abc import Iterable, Mapping
from typing import Any, Literal
from urllib.parse import urlencode

from jobs.channel import Cursor
from jobs.replica import Replica
from tests.harness import Server, described

Door = Literal["ws", "sse", "poll"]

_RECEIVE_BYTES = 4 << 10
_SNAPSHOT_ROWS, _LIST_ROWS, _POLL_EVENTS = 3, 4, 20
_TEXT, _CLOSE, _PING, _PONG = 0x1, 0x8, 0x9, 0xA
_EVERYONE = 0  # the line of all replicas; else a line has the number of its replica


class _Answer:
    """An HTTP answer, byte by byte; what follows its head is the subclass's business."""

    status: bytes

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._open = False
        self.answers: list[bytes] = []  # frames that have to be sent
        self.ended = False

    def take(self, data: bytes) -> bool:
        """Keep some bytes; whether the head has come, which is left out of them."""
        self._bytes += data
        if not self._open:
            head, found, rest = bytes(self._bytes).partition(b"\r\n\r\n")
            if not found:
                return False
            assert head.startswith(b"HTTP/1.1 %s " % self.status), head
            self._open = True
            self._bytes[:] = rest
        return True


class Frames(_Answer):
    """The server's half of a WebSocket (RFC 6455 section 5.2)."""

    status = b"101"

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete now."""
        if not self.take(data):
            return []
        messages: list[Any] = []
        while (frame := self._frame()) is not None:
            opcode, payload = frame
            if opcode == _TEXT:
                said = json.loads(payload)
                messages += said if isinstance(said, list) else [said]
            elif opcode == _PING:
                self.answers.append(masked(_PONG, payload))
            elif opcode == _CLOSE:
                self.ended = True
        return messages

    def _frame(self) -> tuple[int, bytes] | None:
        data = self._bytes
        if len(data) < 2:
            return None
        assert data[0] & 0x80 and not data[1] & 0x80, "frames are whole, and not masked"
        more = {126: 2, 127: 8}.get(data[1], 0)
        begin = 2 + more
        if len(data) < begin:
            return None
        size = int.from_bytes(data[2:begin], "big") if more else data[1]
        if len(data) < begin + size:
            return None
        frame = data[0] & 0x0F, bytes(data[begin : begin + size])
        del data[: begin + size]
        return frame


class Chunks(_Answer):
    """The answer that server-sent events come in (HTML section 9.2)."""

    status = b"200"

    def __init__(self) -> None:
        super().__init__()
        self._text = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete now; the event's id is in ``"#"``."""
        if not self.take(data):
            return []
        while (chunk := self._chunk()) is not None:
            self._text += chunk
            self.ended = self.ended or not chunk
        *blocks, rest = bytes(self._text).split(b"\n\n")
        self._text[:] = rest
        messages = []
        for block in blocks:
            fields = dict(line.split(": ", 1) for line in block.decode().split("\n"))
            if "data" in fields:
                messages.append(json.loads(fields["data"]) | {"#": fields.get("id")})
        return messages

    def _chunk(self) -> bytes | None:
        size, found, rest = bytes(self._bytes).partition(b"\r\n")
        n = int(size, 16) if found else 0
        if not found or len(rest) < n + 2:
            return None
        self._bytes[:] = rest[n + 2 :]
        return rest[:n]


def masked(opcode: int, payload: bytes) -> bytes:
    """A client's frame (RFC 6455 section 5.3)."""
    mask = os.urandom(4)
    n = len(payload)
    size = bytes([0x80 | n]) if n < 126 else b"\xfe" + n.to_bytes(2, "big")
    body = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    return bytes([0x80 | opcode]) + size + mask + body


class Line:
    """A connection that may be cut after so many bytes (``left``)."""

    def __init__(self, server: Server, request: str, parser: Frames | Chunks) -> None:
        self.pid = server.pid
        self.left: int | None = None
        self.closed = False
        self._parser = parser
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        self.socket.settimeout(30)
        self.socket.connect(("127.0.0.1", server.port))
        self.send(request.encode())

    def send(self, data: bytes) -> None:
        """Send; if that fails, the line is closed."""
        if not self.closed:
            try:
                self.socket.sendall(data)
            except OSError:
                self.close()

    def read(self, most_bytes: int) -> list[Any]:
        """The messages in what is there; to be called when there is something."""
        if self.left is not None:
            most_bytes = min(most_bytes, self.left)
        try:
            data = self.socket.recv(most_bytes) if most_bytes else b""
        except OSError:
            data = b""
        messages = self._parser.feed(data)
        while self._parser.answers:
            self.send(self._parser.answers.pop(0))
        if self.left is not None:
            self.left -= len(data)
        if not data or self.left == 0 or self._parser.ended:
            self.close()
        return messages

    def close(self) -> None:
        """Cut it."""
        self.closed = True
        self.socket.close()


class Subscriber:
    """Replicas, and one way after another to fill them.

    A replica *stands* if the server, in its present life, has granted its place or has sent the
    whole snapshot: then what it lacks is on its way, and its cursor says how much.
    """

    def __init__(self, server: Server, replicas: Iterable[Replica]) -> None:
        self.replicas = {replica.id: replica for replica in replicas}
        self.door: Door = "ws"
        self.dropping: set[int] = set()  # replicas whose next event or mark gets lost
        self.has_dropped = False
        self._server = server
        self._lines: dict[int, Line] = {}
        self._listing: set[int] = set()
        self._standing: dict[int, int] = {}  # the server's process that said so

    def stands_at(self, id: int) -> int:
        """How much of the log a replica knows; −1 if it does not stand."""
        cursor = self.replicas[id].cursor
        stands = self._standing.get(id) == self._server.pid
        return cursor.seq if cursor is not None and stands else -1

    def cut(self) -> None:
        """End all connections."""
        for id in list(self._lines):
            self._end(id)

    def cut_after(self, n_bytes: int) -> None:
        """End each connection when so many more bytes were read."""
        for line in self._lines.values():
            line.left = n_bytes

    def go_to(self, door: Door) -> None:
        """Go on at another door, from where each replica is."""
        self.cut()
        self._standing.clear()
        self.door = door

    def replace(self, replica: Replica) -> None:
        """Begin anew with one replica; what it followed before is dropped."""
        self.cut()
        self.replicas[replica.id] = replica

    def read(self, most_bytes: int = 1 << 16, wait_s: float = 0.0) -> None:
        """Connect where need be, and apply what is there: up to so many bytes of each line."""
        if self.door == "poll":
            for replica in self.replicas.values():
                self._poll(replica)
            return
        for id in [_EVERYONE] if self.door == "ws" else self.replicas:
            if id not in self._lines:
                self._open(id)
        by_socket = {line.socket: id for id, line in self._lines.items()}
        for ready in select.select(list(by_socket), [], [], wait_s)[0]:
            id = by_socket[ready]
            line = self._lines[id]
            for message in line.read(most_bytes):
                self._hear(id, line, message)
                if self._lines[id] is not line:
                    break  # what else it has said is of no use
            if self._lines[id].closed:
                self._end(id)

    def _end(self, id: int) -> None:
        self._lines.pop(id).close()
        for replica in self.replicas.values() if id == _EVERYONE else [self.replicas[id]]:
            replica.cut()
            self._standing.pop(replica.id, None)

    # WebSocket and SSE

    def _open(self, id: int) -> None:
        if id != _EVERYONE:
            self.replicas[id].ask()
            self._open_stream(id)
            return
        key = base64.b64encode(os.urandom(16)).decode()
        line = self._lines[id] = Line(
            self._server,
            f"GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1:{self._server.port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: jobs.v1.json\r\n\r\n",
            Frames(),
        )
        self._say(line, {"t": "hello", "ver": 1})
        for replica in self.replicas.values():
            self._say(line, replica.ask())

    def _open_stream(self, id: int) -> None:
        replica = self.replicas[id]
        self._standing.pop(id, None)
        self._listing.discard(id)
        resume = f"Last-Event-ID: {replica.cursor}\r\n" if replica.cursor is not None else ""
        self._lines[id] = Line(
            self._server,
            f"GET /v1/events?{query(replica.select)} HTTP/1.1\r\n"
            f"Host: 127.0.0.1:{self._server.port}\r\nAccept: text/event-stream\r\n{resume}\r\n",
            Chunks(),
        )

    def _say(self, line: Line, message: dict[str, Any]) -> None:
        if message["t"] == "sub":
            message |= {"page": _SNAPSHOT_ROWS}
            self._standing.pop(message["id"], None)
            self._listing.discard(message["id"])
        line.send(masked(_TEXT, json.dumps(message).encode()))

    def _hear(self, id: int, line: Line, message: dict[str, Any]) -> None:
        place = message.pop("#", None)
        complaint = described(f"127.0.0.1:{self._server.port}").complaint(message)
        assert complaint is None, complaint
        if id != _EVERYONE and "id" in message:
            message["id"] = id  # a stream numbers its only subscription 1
        for replica in self.replicas.values() if id == _EVERYONE else [self.replicas[id]]:
            if message.get("id", replica.id) != replica.id:
                continue
            if message["t"] in ("ev", "mark") and replica.id in self.dropping:
                self.dropping.discard(replica.id)
                self.has_dropped = True
                continue
            self._note(replica.id, line, message)
            answers = replica.hear(message)
            if id == _EVERYONE:
                for answer in answers:
                    self._say(line, answer)
            elif any(answer["t"] == "sub" for answer in answers):
                line.close()
                self._open_stream(id)
            elif place is not None:
                assert place == str(replica.cursor), "a browser would resume somewhere else"

    def _note(self, id: int, line: Line, message: Mapping[str, Any]) -> None:
        """Whether the replica stands after a message."""
        match message["t"]:
            case "ack" if message["resumed"]:
                self._standing[id] = line.pid
            case "ack":
                self._listing.add(id)
            case "reset":
                self._standing.pop(id, None)
                self._listing.add(id)
            case "snap" if message["last"] and id in self._listing:
                self._listing.discard(id)
                self._standing[id] = line.pid

    # Poll

    def _poll(self, replica: Replica) -> None:
        if replica.cursor is None:
            self._list(replica)
            return
        asked = query(replica.select, after=str(replica.cursor), limit=_POLL_EVENTS)
        answer = self._server.get(f"/v1/events?{asked}").json
        if answer["reset"] is not None:
            replica.resets.append(answer["reset"])
            self._list(replica)
            return
        for event in answer["events"]:
            row = event["row"]
            replica.event(row, event["to"], out=not fits(replica.select, row))
        replica.cursor = Cursor.parse(answer["cursor"])
        self._standing[replica.id] = self._server.pid

    def _list(self, replica: Replica) -> None:
        listed, cursor = list_all(self._server, replica.select)
        replica.begin(cursor)
        replica.page(listed)
        replica.end()
        self._standing[replica.id] = self._server.pid


def query(select: Mapping[str, Any], **more: Any) -> str:
    """A filter as ``/v1/events`` takes it."""
    names = {"jobs": "job"}
    return urlencode({names.get(name, name): of for name, of in select.items()} | more, doseq=True)


def fits(select: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a row belongs to a filter."""
    return (
        row["kind"] in select.get("kind", [row["kind"]])
        and row["state"] in select.get("state", [row["state"]])
        and row["id"] in select.get("jobs", [row["id"]])
        and select.get("q", "").lower() in row["name"].lower()
    )


def list_all(server: Server, select: Mapping[str, Any]) -> tuple[list[Any], Cursor]:
    """The rows under a filter by REST, all pages, and the cursor of the first one."""
    asked = {name: of for name, of in select.items() if name != "jobs"}
    answer = server.get(f"/v1/jobs?{query(asked, limit=_LIST_ROWS)}").json
    cursor = Cursor.parse(answer["cursor"])
    assert cursor is not None
    rows = list(answer["items"])
    while answer["next"] is not None:
        more = query(asked, limit=_LIST_ROWS, after=answer["next"])
        answer = server.get(f"/v1/jobs?{more}").json
        rows += answer["items"]
    return [row for row in rows if row["id"] in select.get("jobs", [row["id"]])], cursor
