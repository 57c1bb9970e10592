"""A tus client that sends exactly what a test tells it, one request at a time."""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any
from urllib.parse import urljoin

from tornado.httpclient import HTTPResponse

from tests.handlers.clients import Caller, Raw
from tests.harness import Answer, Server, eventually

BODY = "application/offset+octet-stream"
PATH = re.compile(r"/tus/[0-9a-f-]{36}")


def where(answer: Answer | HTTPResponse) -> str:
    """The path of an upload that was created by a request to ``/tus/``."""
    return urljoin("/tus/", answer.headers["Location"])


class Tus:
    """Uploads of one caller, named by their paths. A header that is empty is not sent."""

    def __init__(self, server: Server, client: str) -> None:
        self.server = server
        self.caller = Caller(server, client)

    def ask(self, method: str, path: str, body: Any = None, **headers: Any) -> Answer:
        """One request."""
        return self.server.request(method, path, body, self.headers(**headers))

    def headers(self, **headers: Any) -> dict[str, str]:
        """What every request says, and more; an underscore stands for a hyphen."""
        named = {"Tus_Resumable": "1.0.0", "X_Client_Id": self.caller.client, **headers}
        return {k.replace("_", "-"): str(v) for k, v in named.items() if v != ""}

    def create(self, length: object = "", body: bytes | None = None, **headers: Any) -> Answer:
        """Ask for an upload, whatever comes of it."""
        content_type = BODY if body is not None else ""
        named = {"Upload_Length": length, "Content_Type": content_type, **headers}
        return self.ask("POST", "/tus/", body, **named)

    def new(self, length: object = "", body: bytes | None = None, **headers: Any) -> str:
        """Create an upload; its path."""
        answer = self.create(length, body, **headers)
        assert answer.status == 201, answer
        path = where(answer)
        assert PATH.fullmatch(path), path
        return path

    def patch(self, path: str, offset: object, data: bytes, **headers: Any) -> Answer:
        """Append bytes."""
        return self.ask(
            "PATCH", path, data, **{"Upload_Offset": offset, "Content_Type": BODY, **headers}
        )

    def head(self, path: str, **headers: Any) -> Answer:
        """Ask where to go on."""
        return self.ask("HEAD", path, **headers)

    def offset(self, path: str) -> int:
        """Where to go on."""
        answer = self.head(path)
        assert answer.status == 200, answer
        return int(answer.headers["Upload-Offset"])

    def whole(self, data: bytes, **headers: Any) -> str:
        """Upload bytes; the path."""
        path = self.new(len(data), **headers)
        assert self.patch(path, 0, data).status == 204
        return path

    def content(self, path: str) -> bytes:
        """The bytes of a completed upload."""
        answer = self.ask("GET", path)
        assert answer.status == 200, answer
        return answer.body

    def job(self, path: str) -> Any:
        """The upload as a job; to look at it disturbs nobody."""
        return self.server.job(path.rpartition("/")[2])

    def file(self, path: str) -> Any:
        """The file that an upload has become."""
        return self.job(path)["result"]["data"]["files"][0]

    def received(self, path: str, n: int) -> None:
        """Wait until so many bytes of an upload have come."""
        eventually(lambda: self.job(path)["transfer"]["received_bytes"] == n, f"{n} bytes came")

    def command(self, path: str, verb: str) -> None:
        """Pause, resume or cancel the upload as a job, and wait until it is so."""
        job_id = path.rpartition("/")[2]
        assert self.server.post(f"/v1/jobs/{job_id}/{verb}").status in (200, 202)
        states = {"pause": "paused", "resume": "running succeeded", "cancel": "cancelled"}
        self.server.wait_for(job_id, *states[verb].split())

    @contextmanager
    def open(
        self, path: str, offset: int, data: bytes, length: int | None, **headers: Any
    ) -> Iterator[Raw]:
        """A PATCH of ``length`` bytes (None: chunked) that stays open after the first ones."""
        with Raw(self.server) as raw:
            size = (
                {"Transfer_Encoding": "chunked"} if length is None else {"Content_Length": length}
            )
            named = self.headers(Upload_Offset=offset, Content_Type=BODY, **size, **headers)
            raw.head("PATCH", path, **named)
            (raw.chunk if length is None else raw.send)(data)
            self.received(path, offset + len(data))
            yield raw


@contextmanager
def at_once() -> Iterator[None]:
    """The one request inside waits for nothing: the shortest wait there is lasts five seconds."""
    start = monotonic()
    yield
    assert monotonic() - start < 4.0


def checksum(algorithm: str, data: bytes) -> str:
    """An Upload-Checksum."""
    digest = zlib.crc32(data).to_bytes(4, "big") if algorithm == "crc32" else b""
    digest = digest or hashlib.new(algorithm, data).digest()
    return f"{algorithm} {base64.b64encode(digest).decode()}"


def repr_digest(data: bytes) -> str:
    """A Repr-Digest."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def encoded(value: str | bytes) -> str:
    """A value of Upload-Metadata."""
    return base64.b64encode(value.encode() if isinstance(value, str) else value).decode()
