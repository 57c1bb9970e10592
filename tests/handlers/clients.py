"""Clients that the tests of this folder share: a labelled caller, and a bare connection."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from tests.harness import Answer, Server, eventually, form

# A kind with something to take back, which lasts until a file is there: so a test says how long.
UNDOING = """
import asyncio
from pathlib import Path
import msgspec

KIND, TITLE, PAUSE = "undoing", "Has something to take back", "at once"

class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    until: str

async def take_back(until):
    while not Path(until).exists():
        await asyncio.sleep(0.01)

UNDO = {"take_back": take_back}

async def run(ctx, params):
    await ctx.undo("take_back", until=params.until)
    await ctx.checkpoint(1, done=1)
    await ctx.sleep(3600)
"""

UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class Caller:
    """One client of a server; each request carries its label."""

    def __init__(self, server: Server, client: str) -> None:
        self.server = server
        self.client = client

    def get(self, path: str, **headers: str) -> Answer:
        """GET."""
        return self.server.get(path, X_Client_Id=self.client, **headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        """POST."""
        return self.server.post(path, body, X_Client_Id=self.client, **headers)

    def delete(self, path: str, **headers: str) -> Answer:
        """DELETE."""
        return self.server.delete(path, X_Client_Id=self.client, **headers)

    def send_form(self, *files: tuple[str, str, bytes], boundary: str = "xxBOUNDARYxx") -> Answer:
        """Upload files by a form."""
        body, content_type = form(*files, boundary=boundary)
        return self.post("/upload", body, Content_Type=content_type)

    def store(self, name: str, data: bytes) -> str:
        """Upload one file; its id."""
        answer = self.send_form(("file", name, data))
        assert answer.status == 200, answer
        return str(answer.json["id"])

    def block(self, name: str, at: int, data: bytes, more: str = "", **headers: str) -> Answer:
        """Send a block of a file."""
        path = f"/upload/?file_name={quote(name)}&bytes_read={at}{more}"
        return self.post(path, data, **headers)

    def content(self, file_id: str) -> bytes:
        """The bytes of a stored file."""
        answer = self.get(f"/v1/files/{file_id}/content")
        assert answer.status == 200, answer
        return answer.body

    def versions(self, name: str) -> list[Any]:
        """The stored files of that name, newest first."""
        return list(self.get(f"/v1/files?name={quote(name)}").json["items"])

    def jobs(self) -> list[Any]:
        """This caller's jobs, newest first."""
        items = self.server.jobs("?limit=500")
        return [job for job in items if job["client"] == self.client]

    def job(self, kind: str) -> Any:
        """This caller's one job of that kind, as soon as there is one."""
        return eventually(
            lambda: next((job for job in self.jobs() if job["kind"] == kind), None),
            f"a job of kind {kind}",
        )

    def temporary(self) -> set[str]:
        """What lies in the folder of unfinished bytes."""
        return {path.name for path in (self.server.folder / "tmp").iterdir()}


class Raw:
    """A connection of which the test says each byte."""

    def __init__(self, server: Server, *, receive_bytes: int | None = None) -> None:
        self.server = server
        self.socket = socket.socket()
        self.socket.settimeout(30)
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.connect(("127.0.0.1", server.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def head(self, method: str, path: str, **headers: Any) -> None:
        """Send the head of a request; an underscore in a header's name stands for a hyphen."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{self.server.port}"]
        lines += [f"{k.replace('_', '-')}: {v}" for k, v in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.socket.sendall(data)

    def chunk(self, data: bytes) -> None:
        """Send one chunk of a chunked body; an empty one ends it."""
        self.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def answer(self) -> Answer:
        """The next answer, also an interim one (100)."""
        line = self.file.readline()
        if not line:
            raise EOFError
        headers = http.client.parse_headers(self.file)  # a proxy may write them in lower case
        body = self.file.read(int(headers.get("Content-Length", 0)))
        return Answer(int(line.split()[1]), dict(headers.items()), body)

    def rest(self) -> bytes:
        """Everything until the server closes the connection."""
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while part := self.file.read1():
                parts.append(part)
        return b"".join(parts)

    @contextlib.contextmanager
    def pouring(self, n: int) -> Iterator[None]:
        """Meanwhile send ``n`` bytes, as fast as they are taken, until that fails."""

        def pour() -> None:
            with contextlib.suppress(OSError):
                for _ in range(n >> 16):
                    self.socket.sendall(bytes(1 << 16))
                self.socket.sendall(bytes(n & 0xFFFF))

        thread = threading.Thread(target=pour, daemon=True)
        thread.start()
        yield
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        thread.join(30)
        assert not thread.is_alive()

    def cut(self) -> None:
        """End the connection by a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """End the connection."""
        self.file.close()
        self.socket.close()


def form_head(name: str, field: str = "file") -> bytes:
    """What stands in a form before the bytes of its file; the boundary is ``b``."""
    return (
        f'--b\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
    )


FORM = "multipart/form-data; boundary=b"
FORM_END = b"\r\n--b--\r\n"
