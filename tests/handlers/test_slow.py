"""Senders that take their time: each is ended, whatever it is in the middle of."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from tests.conftest import Serve
from tests.harness import Server

IDLE_S = 1.0


@pytest.fixture
def server(serve: Serve) -> Server:
    """A server with little patience."""
    return serve("--body-idle-s", str(IDLE_S), "--body-min-bytes-per-s", "1000")


def trickle(server: Server, head: str, beginning: bytes, drop: bytes) -> Iterator[bytes]:
    """Send a beginning, then a drop ten times a second; what comes back, to the end."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as sender:
        sender.sendall(head.encode() + b"\r\nHost: localhost\r\n\r\n" + beginning)
        sender.settimeout(0.1)
        end = time.monotonic() + 20 * IDLE_S
        while time.monotonic() < end:
            try:
                data = sender.recv(65536)
                if not data:
                    return
                yield data
            except TimeoutError:
                try:
                    sender.sendall(drop)
                except OSError:
                    return
            except OSError:
                return
        raise AssertionError("the connection was not ended")


@pytest.mark.parametrize("drop", [b"", b"x"], ids=["silent", "trickling"])
def test_an_upload_that_is_too_slow_is_ended(server: Server, drop: bytes) -> None:
    """It is told so by an answer that tus clients retry, and what it has sent stays."""
    where = "/tus/" + server.post("/tus/", None, Upload_Length="100000").headers["Location"]
    head = (
        f"PATCH {where} HTTP/1.1\r\nContent-Length: 100000\r\nUpload-Offset: 0\r\n"
        "Content-Type: application/offset+octet-stream"
    )
    answer = b"".join(trickle(server, head, b"abc", drop))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert int(server.request("HEAD", where).headers["Upload-Offset"]) >= 3


@pytest.mark.parametrize("drop", [b"", b"x"], ids=["silent", "trickling"])
def test_a_form_that_never_comes_to_its_file_is_ended(server: Server, drop: bytes) -> None:
    """There is no upload yet that could be watched."""
    head = (
        "POST /upload HTTP/1.1\r\nContent-Length: 100000\r\n"
        "Content-Type: multipart/form-data; boundary=xyz"
    )
    beginning = b'--xyz\r\nContent-Disposition: form-data; name="note"\r\n\r\n'
    assert b"".join(trickle(server, head, beginning, drop)).startswith(b"HTTP/1.1 408 ")
    assert server.jobs() == []


@pytest.mark.parametrize("drop", [b"", b"x"], ids=["silent", "trickling"])
def test_a_small_body_that_never_ends_is_ended(server: Server, drop: bytes) -> None:
    """JSON is waited for no longer, either."""
    head = "POST /v1/jobs HTTP/1.1\r\nContent-Length: 1000\r\nContent-Type: application/json"
    assert b"".join(trickle(server, head, b"{", drop)) == b""
