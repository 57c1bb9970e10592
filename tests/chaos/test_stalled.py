"""Many senders that have stopped, and those beside them."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack

import pytest

from tests.conftest import Serve
from tests.harness import FULL, Server, eventually

MANY = 1000 if FULL else 200
TUS = {"Tus-Resumable": "1.0.0"}
BODY = {"Content-Type": "application/offset+octet-stream"}


def begin(server: Server, length: int) -> str:
    """A new upload; its path."""
    answer = server.request("POST", "/tus/", headers=TUS | {"Upload-Length": str(length)})
    assert answer.status == 201, answer
    return "/tus/" + answer.headers["Location"]


def stall(server: Server) -> socket.socket:
    """A sender that sends a little of its block, and then nothing."""
    path = begin(server, 1 << 20)
    sender = socket.create_connection(("127.0.0.1", server.port), 20)
    sender.sendall(
        f"PATCH {path} HTTP/1.1\r\nHost: localhost\r\nTus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\n"
        f"Content-Type: {BODY['Content-Type']}\r\nContent-Length: {1 << 20}\r\n\r\n".encode()
        + bytes(10 << 10)
    )
    return sender


def send(server: Server, data: bytes) -> float:
    """One whole upload; how long it took."""
    path = begin(server, len(data))
    began = time.monotonic()
    answer = server.request("PATCH", path, data, TUS | BODY | {"Upload-Offset": "0"})
    assert answer.status == 204, answer
    return time.monotonic() - began


@pytest.mark.chaos
@pytest.mark.expects("could not be saved")
def test_stalled_senders_cost_little_and_hinder_nobody(serve: Serve) -> None:
    """Each holds less than 64 KiB; an honest upload beside them is done as before."""
    server = serve()
    data = bytes(64 << 20)
    alone_s = min(send(server, data) for _ in range(3))
    before_kib = server.status("VmRSS")
    with ExitStack() as senders:
        for _ in range(MANY):
            senders.enter_context(stall(server))
        eventually(
            lambda: (
                sum(
                    row["transfer"]["stored_bytes"] >= 10 << 10
                    for row in server.jobs("?kind=upload&state=running&limit=500")
                )
                >= min(MANY, 500)
            ),
            "what they have sent is stored",
        )
        assert server.status("VmRSS") - before_kib < 64 * MANY
        beside_s = min(send(server, data) for _ in range(3))
    # How much of its speed it keeps is for the benchmark to say; ten times would be a fault.
    assert beside_s < 10 * alone_s + 0.5
