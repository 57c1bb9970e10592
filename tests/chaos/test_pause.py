"""Pausing real transfers of real clients, and what big files cost."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need
from tests.harness import FULL, Server, eventually, form
from tests.interop.proxy import Proxy

pytestmark = pytest.mark.chaos

MIB = 1 << 20
WATCH_S = 60.0 if FULL else 2.0
BIG = 4 << 30 if FULL else 256 * MIB
SLOW = b"paused in the middle " * 50_000


@contextmanager
def at_work(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run a client beside the test; what it returned is in the list at the end."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    yield results
    thread.join(60)
    assert not thread.is_alive()


def transfer(server: Server, kind: str) -> Any:
    """The one live transfer of that kind, once it has moved some bytes."""

    def moving() -> Any:
        found = server.jobs(f"?kind={kind}&state=running")
        return found and found[0]["transfer"]["stored_bytes"] > 0 and found[0]

    return eventually(moving, f"there is a {kind}")


def stands_still(server: Server, job_id: str, go_on: Callable[[], None]) -> None:
    """Pause, and let the client go on; from 100 ms after the answer no byte moves until a resume.

    Up to here the client stops in the middle, so that there is something to pause.
    """
    began = time.monotonic()
    paused = server.post(f"/v1/jobs/{job_id}/pause")
    assert paused.status in (200, 202), paused
    time.sleep(max(0.0, 0.1 - (time.monotonic() - began)))
    job = server.wait_for(job_id, "paused")
    go_on()
    assert job["transfer"]["warm"]
    at = job["transfer"]["stored_bytes"]
    assert at > 0
    end = time.monotonic() + WATCH_S
    while time.monotonic() < end:
        now = server.job(job_id)
        assert (now["state"], now["transfer"]["stored_bytes"]) == ("paused", at)
        assert now["progress"]["rate_per_s"] is None
        time.sleep(0.1)
    resumed = server.post(f"/v1/jobs/{job_id}/resume")
    assert (resumed.status, resumed.json["state"]) == (200, "running")


def trickle(server: Server, head: str, body: bytes, gate: threading.Event) -> bytes:
    """Send a request with its body in small pieces, the second half behind a gate; the answer."""
    with socket.create_connection(("127.0.0.1", server.port), 120) as sock:
        sock.sendall(f"{head}Host: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        for start in range(0, len(body), 1 << 15):
            if start > len(body) // 2:
                gate.wait()
            sock.sendall(body[start : start + (1 << 15)])
            time.sleep(0.01)
        answer = sock.recv(1 << 16)
    return answer.partition(b"\r\n\r\n")[2]


def has(server: Server, file_id: str, data: bytes) -> None:
    """The file has these bytes."""
    content = server.get(f"/v1/files/{file_id}/content").body
    assert hashlib.sha256(content).digest() == hashlib.sha256(data).digest()


def test_upload_by_curl_is_paused_and_resumed(server: Server, tmp_path: Path) -> None:
    """curl -F knows nothing of a pause: it just waits, and its file arrives whole."""
    curl = need("curl")
    source = tmp_path / "by curl.bin"
    source.write_bytes(SLOW)

    with closing(Proxy(server.port)) as proxy:
        command = [curl, "-sS", "-F", f"file=@{source}", f"{proxy.url}/upload"]
        proxy.hold_at(len(SLOW) // 2)

        def run() -> bytes:
            return subprocess.run(command, capture_output=True, check=True).stdout

        with at_work(run) as results:
            eventually(lambda: proxy.is_at_mark, "half of it is sent")
            stands_still(server, transfer(server, "upload")["id"], proxy.release)
    has(server, json.loads(results[0])["id"], SLOW)


def test_block_is_paused_and_resumed(server: Server) -> None:
    """A raw POST is held in the middle of its block, and goes on where it stood."""
    head = f"POST /upload?file_name=raw&bytes_read=0&file_size={len(SLOW)} HTTP/1.1\r\n"
    gate = threading.Event()
    with at_work(lambda: trickle(server, head, SLOW, gate)) as results:
        stands_still(server, transfer(server, "upload")["id"], gate.set)
    has(server, json.loads(results[0])["id"], SLOW)


def test_export_is_paused_and_resumed(server: Server) -> None:
    """A reader gets nothing more until the resume, and then the rest of the file."""
    data = bytes(range(256)) * (64 * MIB // 256)
    body, content_type = form(("file", "out.bin", data))
    server.request("POST", "/upload", body, {"Content-Type": content_type})
    gate = threading.Event()

    def read() -> bytes:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
            sock.settimeout(120)
            sock.connect(("127.0.0.1", server.port))
            asked = b'{"filename":"out.bin"}'
            sock.sendall(
                b"POST /export HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(asked) + asked
            )
            digest, got, seen = hashlib.sha256(), 0, b""
            while b"\r\n\r\n" not in seen:
                seen += sock.recv(1 << 16)
            chunk = seen.partition(b"\r\n\r\n")[2] or sock.recv(1 << 16)
            while chunk:
                digest.update(chunk)
                got += len(chunk)
                if got > 8 * MIB:  # many more than are on their way are left
                    gate.wait()
                chunk = sock.recv(1 << 16)
            return digest.digest()

    with at_work(read) as results:
        stands_still(server, transfer(server, "download")["id"], gate.set)
    assert results == [hashlib.sha256(data).digest()]


def test_big_files_need_little_memory(server: Server) -> None:
    """Up and down again, a file much bigger than the memory that the server takes for it."""
    zeros = bytes(MIB)
    with socket.create_connection(("127.0.0.1", server.port), 600) as sock:
        begin = b"--b\r\nContent-Disposition: form-data; name=file; filename=big\r\n\r\n"
        end = b"\r\n--b--\r\n"
        sock.sendall(
            b"POST /upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
            % (len(begin) + BIG + len(end))
            + begin
        )
        for _ in range(BIG // MIB):
            sock.sendall(zeros)
        sock.sendall(end)
        answer = json.loads(sock.recv(1 << 16).partition(b"\r\n\r\n")[2])
    assert answer["bytes"] == BIG
    got = 0
    with socket.create_connection(("127.0.0.1", server.port), 600) as sock:
        sock.sendall(
            f"GET /v1/files/{answer['id']}/content HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        got -= len(sock.recv(1 << 16, socket.MSG_PEEK).partition(b"\r\n\r\n")[0]) + 4
        buffer = bytearray(MIB)
        while n := sock.recv_into(buffer):
            got += n
    assert got == BIG
    assert server.status("VmHWM") < 80_000
    assert server.status("Threads") == 1
