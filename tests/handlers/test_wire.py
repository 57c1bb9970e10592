"""Bytes off and onto the socket: fast paths, early answers, odd bodies, odd clients."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tornado.http1connection import HTTP1Connection
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.web import Application

from config import Config
from handlers import send, wire
from handlers.base import BaseHandler
from handlers.send import send_file
from server import assembled, make_app, recover
from tests.conftest import Serve, need
from tests.handlers.clients import FORM, FORM_END, Caller, Raw, form_head
from tests.harness import FULL, Server, eventually

BIG_BYTES = (128 if FULL else 12) << 20
OPTIONS = ("--max-upload-bytes", "256MiB", "--pause-hold-s", "60s")

# In one process with the server: which way the bytes took


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The data folder of the server in this process."""
    return tmp_path / "data"


@pytest.fixture
def app(io_loop: IOLoop, folder: Path) -> Iterator[Application]:
    """The service in this process, as pytest-tornado's http_server wants it."""
    opened = assembled(Config(data=folder))
    parts = io_loop.run_sync(opened.__aenter__)
    io_loop.run_sync(lambda: recover(parts))
    yield make_app(parts.services)
    io_loop.run_sync(lambda: parts.services.manager.close(5))
    io_loop.run_sync(lambda: opened.__aexit__(None, None, None))


class Seen:
    """The bodies and senders that were made."""

    def __init__(self) -> None:
        self.bodies: list[wire.Body] = []
        self.senders: list[send.Sender] = []


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Collects what the handlers make; all of it stays as it is."""
    found = Seen()
    begin_body, begin_sender = wire.Body.__init__, send.Sender.__init__

    def body(self: wire.Body, connection: HTTP1Connection, length: int | None) -> None:
        begin_body(self, connection, length)
        found.bodies.append(self)

    def sender(self: send.Sender, handler: BaseHandler) -> None:
        begin_sender(self, handler)
        found.senders.append(self)

    monkeypatch.setattr(wire.Body, "__init__", body)
    monkeypatch.setattr(send.Sender, "__init__", sender)
    return found


async def upload(client: AsyncHTTPClient, base_url: str, data: bytes) -> str:
    """Upload a block that ends its file; the file's id."""
    answer = await client.fetch(
        f"{base_url}/upload?file_name=x.bin&bytes_read=0&is_complete=1", method="POST", body=data
    )
    return str(json.loads(answer.body)["id"])


@pytest.mark.parametrize("name", ["_read_fixed_body", "_read_chunked_body"])
def test_tornado_still_reads_bodies_by_these_names(name: str) -> None:
    """The private methods that we take the place of exist in the installed Tornado."""
    assert callable(getattr(HTTP1Connection, name))


@pytest.mark.gen_test
async def test_tornado_still_counts_what_it_sends(
    http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str, seen: Seen
) -> None:
    """The private counter that sendfile sets to zero exists in the installed Tornado."""
    await http_client.fetch(f"{base_url}/healthz")
    connection = seen.bodies[0]._stream
    assert connection is not None
    assert hasattr(HTTP1Connection(connection, False), "_expected_content_remaining")


@pytest.mark.gen_test
async def test_a_body_with_a_length_is_read_into_a_buffer(
    http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str, seen: Seen
) -> None:
    """The fast way in is really taken, and the content leaves by sendfile."""
    data = bytes(range(256)) * 8000
    file_id = await upload(http_client, base_url, data)
    assert [body.read_into_used for body in seen.bodies] == [True]
    answer = await http_client.fetch(f"{base_url}/v1/files/{file_id}/content")
    assert answer.body == data
    assert [sender.sendfile_used for sender in seen.senders] == [True]


@pytest.mark.gen_test
async def test_if_tornado_renames_its_reader_bodies_still_arrive(
    http_client: AsyncHTTPClient,
    http_server: HTTPServer,
    base_url: str,
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where our reader is ignored, the body comes by Tornado's own way and is stored the same."""
    monkeypatch.setattr(wire, "_FIXED", "_no_such_name")
    data = bytes(range(256)) * 8000
    file_id = await upload(http_client, base_url, data)
    assert [body.read_into_used for body in seen.bodies] == [False]
    answer = await http_client.fetch(f"{base_url}/v1/files/{file_id}/content")
    assert answer.body == data


@pytest.mark.gen_test
async def test_if_tornado_renames_its_counter_files_still_leave(
    http_client: AsyncHTTPClient,
    http_server: HTTPServer,
    base_url: str,
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where Tornado's counter is not known, the content leaves by its own writes."""
    monkeypatch.setattr(send, "_REMAINING", "_no_such_name")
    data = bytes(range(256)) * 8000
    file_id = await upload(http_client, base_url, data)
    answer = await http_client.fetch(f"{base_url}/v1/files/{file_id}/content")
    assert answer.body == data
    assert [sender.sendfile_used for sender in seen.senders] == [False]


@pytest.mark.gen_test
@pytest.mark.parametrize(("wanted", "most_bytes"), [("pause", 4 << 10), ("limit", 32 << 10)])
async def test_a_pause_or_a_limit_during_a_silence_holds_for_what_comes_next(
    http_client: AsyncHTTPClient,
    http_server: HTTPServer,
    http_port: int,
    base_url: str,
    seen: Seen,
    wanted: str,
    most_bytes: int,
) -> None:
    """A pause or a limit that came while a sender was silent bounds also what it sends then."""
    n, begin = 1 << 20, 1000
    head = (
        "POST /upload?file_name=x&bytes_read=0 HTTP/1.1\r\n"
        f"Host: 127.0.0.1\r\nContent-Length: {n}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", http_port)) as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, n)
        sender.sendall(head.encode() + bytes(begin))
        while not seen.bodies or seen.bodies[0].left != n - begin:
            await asyncio.sleep(0.001)
        body = seen.bodies[0]
        jobs = json.loads((await http_client.fetch(f"{base_url}/v1/jobs")).body)["items"]
        url = f"{base_url}/v1/jobs/{jobs[0]['id']}"
        if wanted == "pause":
            await http_client.fetch(f"{url}/pause", method="POST", body="")
        else:
            limit = json.dumps({"limit_bytes_per_s": 50_000})
            await http_client.fetch(url, method="PATCH", body=limit)
        sender.setblocking(False)
        assert sender.send(bytes(n - begin)) > most_bytes  # all of it before the server looks
        while body.left == n - begin:
            await asyncio.sleep(0)
        assert body.left is not None
        assert n - begin - body.left <= most_bytes
        assert body._big is None or wanted == "limit"  # who waits holds no big buffer
        await http_client.fetch(f"{url}/cancel", method="POST", body="")


class EndedExport(BaseHandler):
    """Begins an export that was cancelled before its first byte."""

    async def get(self, name: str) -> None:
        """Export, too late."""
        file = await self.services.files.find(name, "local")
        by = self.caller.by("simple")
        downloads = self.services.downloads
        job = await downloads.create(
            file, file.bytes, owner="local", client="", by=by, protocol="export"
        )
        await self.services.manager.command(job.id, "cancel", owner="local", by=by)
        await send_file(self, file, 0, file.bytes, job=job, attachment=True)


@pytest.mark.gen_test
async def test_an_export_that_is_ended_before_its_first_byte_is_a_409(
    http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str, app: Application
) -> None:
    """As long as no byte has left, a terminated export is told by a status."""
    await upload(http_client, base_url, b"data")
    app.add_handlers(".*", [(r"/ended/(.*)", EndedExport)])
    answer = await http_client.fetch(f"{base_url}/ended/x.bin", raise_error=False)
    assert answer.code == 409
    assert b'"export-terminated"' in answer.body


# Early answers


def refusals(caller: Caller, n: int) -> Iterator[tuple[str, dict[str, Any], int, str]]:
    """Requests with a body of ``n`` bytes that are refused before it was read."""
    yield "/upload", {}, 400, "invalid-field"
    yield "/upload?file_name=x&bytes_read=7", {}, 400, "offset-mismatch"
    yield "/upload?file_name=x&bytes_read=0", {"Origin": "http://evil"}, 403, "cross-site"
    yield "/nowhere", {}, 404, "not-found"


@pytest.mark.parametrize("n", [70_000, 3 << 20, 40 << 20])
def test_a_refused_body_never_becomes_a_request(caller: Caller, n: int) -> None:
    """A body that is refused early is never taken for the next request on its connection."""
    evil = b"GET /evil/process/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    body = (evil * (n // len(evil) + 1))[:n]
    for path, headers, status, code in refusals(caller, n):
        with Raw(caller.server) as raw:
            raw.head("POST", path, Content_Length=n, X_Client_Id=caller.client, **headers)
            with suppress(OSError):  # it hangs up on who sends for too long
                raw.send(body)
            answer = raw.answer()
            assert (answer.status, answer.json["code"]) == (status, code)
            assert answer.headers["Connection"] == "close"
            assert raw.rest() == b""
    assert [job for job in caller.server.jobs() if job["name"] == "evil"] == []


def test_a_body_that_is_ended_in_the_middle_never_becomes_a_request(
    caller: Caller, name: str
) -> None:
    """What follows a terminated upload on its connection is thrown away."""
    evil = b"GET /evil/process/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 2000
    with Raw(caller.server) as raw:
        raw.head(
            "POST",
            f"/upload?file_name={name}&bytes_read=0",
            Content_Length=10 * len(evil),
            X_Client_Id=caller.client,
        )
        raw.send(evil)
        caller.job("upload")
        assert caller.delete("/upload/terminate").status == 200
        assert raw.answer().status == 409
        with suppress(OSError):  # it hangs up on who sends for too long
            raw.send(evil * 9)
        assert raw.rest() == b""
    assert [job for job in caller.server.jobs() if job["name"] == "evil"] == []


def test_a_body_whose_refusal_can_not_be_sent_never_becomes_a_request(
    caller: Caller, name: str
) -> None:
    """Also if the client has reset the connection, what was already read is thrown away."""
    evil = b"GET /evil/process/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    caller.block(name, 0, b"first")
    job = caller.job("upload")
    path = f"/v1/jobs/{job['id']}"
    caller.post(f"{path}/pause")
    caller.server.wait_for(job["id"], "paused")
    with Raw(caller.server) as raw:
        head = (
            f"POST /upload?file_name={name}&bytes_read=5 HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"X-Client-Id: {caller.client}\r\nContent-Length: 1000000\r\n\r\n"
        )
        raw.send(head.encode() + evil * 900)  # read with the head, and held there by the pause
        eventually(lambda: caller.get(path).json["transfer"]["connected"], "the block is held")
        raw.cut()
    assert caller.delete("/upload/terminate").status == 200
    assert [job for job in caller.server.jobs() if job["name"] == "evil"] == []


@pytest.mark.parametrize("way", ["-T", "-F", "--data-binary"])
@pytest.mark.parametrize("status", [409, 413])
def test_curl_sees_an_early_answer(
    caller: Caller, tmp_path: Path, name: str, way: str, status: int
) -> None:
    """curl gets the status and the message of an answer that comes while it still sends."""
    need("curl")
    file = tmp_path / "big"
    size = (300 << 20) if status == 413 else (200 << 20)
    with file.open("wb") as sparse:
        sparse.truncate(size)
    target = {"-F": f"file=@{file}", "-T": str(file), "--data-binary": f"@{file}"}[way]
    query = "" if way == "-F" else f"?file_name={name}&bytes_read=0"
    command = ["curl", "-sS", "-X", "POST", "-H", f"X-Client-Id: {caller.client}"]
    command += ["-H", "Expect:", "-w", "\n%{http_code}"]
    if status == 409:
        command += ["--limit-rate", "5M"]
    with subprocess.Popen(
        [*command, way, target, f"{caller.server.url}/upload{query}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as curl:
        if status == 409:
            caller.job("upload")
            assert caller.delete("/upload/terminate").status == 200
        out, errors = curl.communicate(timeout=30)
    assert out.splitlines()[-1] == str(status), (out, errors)
    assert {409: "upload-terminated", 413: "too-large"}[status] in out


@pytest.mark.parametrize("n", [1 << 20, 300 << 20])
def test_http_client_sees_an_early_answer(caller: Caller, name: str, n: int) -> None:
    """A client that sends all before it reads still finds the answer."""
    path = f"/upload?file_name={name}&bytes_read=9"
    connection = http.client.HTTPConnection("127.0.0.1", caller.server.port, timeout=30)
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", str(n))
    connection.endheaders()
    try:
        for _ in range(n >> 20):
            connection.send(bytes(1 << 20))
    except OSError:
        assert n > 64 << 20  # shorter bodies are taken to their end
    answer = connection.getresponse()
    assert answer.status == (413 if n > 256 << 20 else 400)
    assert b"bytes" in answer.read()
    connection.close()


# Expect: 100-continue


def test_a_good_request_is_told_to_continue(caller: Caller, name: str) -> None:
    """Who waits for 100 gets it before the body, and then the answer."""
    with Raw(caller.server) as raw:
        raw.head(
            "POST",
            f"/upload?file_name={name}&bytes_read=0",
            Content_Length=5,
            Expect="100-continue",
        )
        assert raw.answer().status == 100
        raw.send(b"hello")
        assert raw.answer().json == {"bytes_read": 5}


@pytest.mark.parametrize(
    ("path", "n", "status"),
    [
        ("/upload?file_name=x&bytes_read=9", 5, 400),
        ("/upload?file_name=x&bytes_read=0", 300 << 20, 413),
        ("/upload", 5, 400),
        ("/nowhere", 5, 404),
        ("/v1/jobs", 2 << 20, 400),
    ],
)
def test_a_refused_request_is_not_told_to_continue(
    site: Server, path: str, n: int, status: int
) -> None:
    """Who waits for 100 and is refused gets only the refusal, and sends nothing."""
    with Raw(site) as raw:
        raw.head("POST", path, Content_Length=n, Expect="100-continue")
        assert raw.answer().status == status


# Chunked bodies


def test_a_chunked_body_is_stored(caller: Caller, name: str) -> None:
    """A body of unknown length is taken until its last chunk."""
    path = f"/upload?file_name={name}&bytes_read=0&is_complete=1"
    data = bytes(range(256)) * 3000
    with Raw(caller.server) as raw:
        raw.head("POST", path, Transfer_Encoding="chunked", X_Client_Id=caller.client)
        for i in range(0, len(data), 50_000):
            raw.chunk(data[i : i + 50_000])
        raw.chunk(b"")
        done = raw.answer()
    assert caller.content(done.json["id"]) == data


@pytest.mark.parametrize("path", ["/upload?file_name={}&bytes_read=0", "/upload"])
def test_an_empty_chunked_body(caller: Caller, name: str, path: str) -> None:
    """A chunked body without a chunk is an empty block, or a form without an end."""
    with Raw(caller.server) as raw:
        headers = {"Content_Type": FORM} if path == "/upload" else {}
        raw.head("POST", path.format(name), Transfer_Encoding="chunked", **headers)
        raw.chunk(b"")
        answer = raw.answer()
    assert answer.status == (400 if path == "/upload" else 200), answer


def test_a_chunked_upload_is_paused_and_resumed(caller: Caller, name: str) -> None:
    """A paused chunked body is held like any other, and nothing of it is lost."""
    path = f"/upload?file_name={name}&bytes_read=0&is_complete=1"
    data = bytes(range(256)) * 400
    with Raw(caller.server) as raw:
        raw.head("POST", path, Transfer_Encoding="chunked", X_Client_Id=caller.client)
        raw.chunk(data)
        job = caller.job("upload")
        at = f"/v1/jobs/{job['id']}"
        eventually(
            lambda: caller.get(at).json["transfer"]["stored_bytes"] == len(data), "it is stored"
        )
        caller.post(f"{at}/pause")
        caller.server.wait_for(job["id"], "paused")
        raw.chunk(data)
        raw.chunk(data)
        raw.chunk(b"")
        assert caller.get(at).json["transfer"]["stored_bytes"] == len(data)
        caller.post(f"{at}/resume")
        done = raw.answer()
    assert caller.content(done.json["id"]) == data * 3


def test_a_chunked_upload_that_is_cut_keeps_what_arrived(caller: Caller, name: str) -> None:
    """A chunked block whose client goes away in the middle of a chunk can be gone on with."""
    path = f"/upload?file_name={name}&bytes_read=0"
    with Raw(caller.server) as raw:
        raw.head("POST", path, Transfer_Encoding="chunked", X_Client_Id=caller.client)
        raw.send(b"ffff\r\n" + bytes(1000))
        job = caller.job("upload")
        eventually(lambda: caller.get(path[:-13]).json.get("bytes_read") == 1000, "1000 arrived")
        raw.cut()
    eventually(
        lambda: not caller.server.job(job["id"])["transfer"]["connected"], "the cut is noticed"
    )
    assert caller.server.job(job["id"])["state"] == "running"
    done = caller.block(name, 1000, b"end", "&is_complete=1")
    assert caller.content(done.json["id"]) == bytes(1000) + b"end"


@pytest.mark.parametrize("bad", [b"xyz\r\n", b"-1\r\n", b"5;ext=1\r\nhello\r\n", b"5\r\nhelloXX"])
def test_a_malformed_chunk_ends_the_connection(caller: Caller, name: str, bad: bytes) -> None:
    """After a chunk that is none nothing more is read, and what came before it is kept."""
    with Raw(caller.server) as raw:
        raw.head(
            "POST",
            f"/upload?file_name={name}&bytes_read=0",
            Transfer_Encoding="chunked",
            X_Client_Id=caller.client,
        )
        raw.chunk(b"good")
        raw.send(bad + b"GET /evil/process/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"HTTP/1.1 200" not in raw.rest()
    eventually(
        lambda: all(not job["transfer"]["connected"] for job in caller.jobs()), "it has ended"
    )
    assert caller.versions(name) == []
    assert [job for job in caller.server.jobs() if job["name"] == "evil"] == []


# Several requests on one connection


def test_pipelined_requests_are_answered_in_order(caller: Caller, name: str) -> None:
    """Requests that come at once, with bodies of many sizes, swallow nothing of each other."""
    sizes = [10, 0, 70_000, 2_500_000, 1]
    with Raw(caller.server) as raw:
        for size in sizes:
            raw.head(
                "POST",
                f"/upload?file_name={name}-{size}&bytes_read=0&is_complete=1",
                Content_Length=size,
                X_Client_Id=caller.client,
            )
            raw.send(bytes(size))
            raw.head("GET", f"/upload?file_name={name}-{size}", X_Client_Id=caller.client)
        for size in sizes:
            assert raw.answer().json["bytes_read"] == size
            assert raw.answer().json == {"bytes_read": size, "is_complete": True}


def test_a_connection_is_kept_over_small_refusals(caller: Caller) -> None:
    """A refusal that has read its body keeps the connection for the next request."""
    with Raw(caller.server) as raw:
        for _ in range(3):
            raw.head("POST", "/export", Content_Length=2)
            raw.send(b"{}")
            assert raw.answer().status == 400
            raw.head("GET", "/healthz")
            assert raw.answer().status == 200


# Lengths that are none


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: +5"],
        ["Content-Length: 5_0"],
        ["Content-Length: -1"],
        ["Content-Length: 0x5"],
        ["Content-Length: 5 5"],
        ["Content-Length: "],
        ["Content-Length: 5, 6"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: \u0665"],
        ["Content-Length: 99999999999999999999999"],
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: gzip"],
        ["Transfer-Encoding: chunked, chunked"],
        ["Transfer-Encoding: gzip, chunked"],
    ],
)
@pytest.mark.parametrize("query", ["?file_name={}&bytes_read=0&is_complete=1", ""])
def test_a_length_that_is_none_stores_nothing(
    caller: Caller, name: str, headers: list[str], query: str
) -> None:
    """A body whose length is malformed or told twice differently is a 400 or 413, not stored."""
    lines = [
        f"POST /upload{query.format(name)} HTTP/1.1",
        "Host: 127.0.0.1",
        f"X-Client-Id: {caller.client}",
        f"Content-Type: {FORM}",
        *headers,
    ]
    with Raw(caller.server) as raw:
        raw.send("\r\n".join([*lines, "", ""]).encode())
        raw.send(b"hello" + b"GET /evil/process/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answers = raw.rest()
    assert answers.split(b" ")[1] in (b"400", b"413"), answers
    assert answers.count(b"HTTP/1.1 2") == 0
    assert caller.versions(name) == []
    assert all(job["state"] != "succeeded" for job in caller.jobs())
    assert [job for job in caller.server.jobs() if job["name"] == "evil"] == []


@pytest.mark.parametrize("end", ["cut", "close", "half"])
def test_a_body_that_ends_too_early_is_not_published(caller: Caller, name: str, end: str) -> None:
    """A client that sends less than its Content-Length and goes loses nothing it had sent."""
    with Raw(caller.server) as raw:
        raw.head(
            "POST",
            f"/upload?file_name={name}&bytes_read=0&is_complete=1",
            Content_Length=1000,
            X_Client_Id=caller.client,
        )
        raw.send(b"x" * 900)
        job = caller.job("upload")
        path = f"/upload?file_name={name}"
        eventually(lambda: caller.get(path).json.get("bytes_read") == 900, "900 arrived")
        if end == "half":
            raw.socket.shutdown(1)
            assert raw.rest() == b""
        elif end == "cut":
            raw.cut()
    eventually(
        lambda: not caller.server.job(job["id"])["transfer"]["connected"], "the end is noticed"
    )
    assert caller.versions(name) == []
    assert caller.get(path).json == {"bytes_read": 900, "is_complete": False}


def test_a_long_body_that_ends_with_its_sender_is_kept_to_its_last_byte(
    caller: Caller, name: str
) -> None:
    """Everything that a client sent before it closed in the middle is stored."""
    with Raw(caller.server) as raw:
        raw.head(
            "POST",
            f"/upload?file_name={name}&bytes_read=0",
            Content_Length=BIG_BYTES * 2,
            X_Client_Id=caller.client,
        )
        raw.send(bytes(BIG_BYTES))
        raw.socket.shutdown(1)
        assert raw.rest() == b""
    job = caller.job("upload")
    eventually(
        lambda: not caller.server.job(job["id"])["transfer"]["connected"], "the end is noticed"
    )
    assert caller.get(f"/upload?file_name={name}").json["bytes_read"] == BIG_BYTES


@pytest.mark.parametrize("chunked", [False, True])
def test_a_form_over_the_limit_ends_when_it_is_reached(
    serve: Serve, name: str, chunked: bool
) -> None:
    """An upload over max_upload_bytes is a 413, told by its length or found while it arrives."""
    caller = Caller(serve("--max-upload-bytes", "1MiB"), "c")
    body = form_head(name) + bytes(2 << 20) + FORM_END
    with Raw(caller.server) as raw:
        length = {"Transfer_Encoding": "chunked"} if chunked else {"Content_Length": len(body)}
        raw.head("POST", "/upload", Content_Type=FORM, X_Client_Id=caller.client, **length)
        if chunked:
            for i in range(0, len(body), 100_000):
                raw.chunk(body[i : i + 100_000])
            raw.chunk(b"")
        else:
            raw.send(body)
        answer = raw.answer()
    assert (answer.status, answer.json["code"]) == (413, "too-large")
    assert caller.versions(name) == []
    eventually(lambda: caller.temporary() == set(), "the unfinished bytes are gone")


def test_many_uploads_at_once_share_the_loop(caller: Caller, name: str) -> None:
    """While many bodies arrive at once, each is stored whole and others are answered."""
    n = 16
    size = BIG_BYTES // 4
    raws = [Raw(caller.server) for _ in range(n)]
    for i, raw in enumerate(raws):
        raw.head(
            "POST",
            f"/upload?file_name={i}-{name}&bytes_read=0&is_complete=1",
            Content_Length=size,
            X_Client_Id=caller.client,
        )
    for i in range(0, size, 1 << 18):
        for k, raw in enumerate(raws):
            raw.send(bytes([k]) * min(1 << 18, size - i))
    ids = [raw.answer().json["id"] for raw in raws]
    for raw in raws:
        raw.close()
    assert caller.content(ids[7]) == bytes([7]) * size
    assert all(caller.get(f"/v1/files/{i}").json["bytes"] == size for i in ids)


# Patience


@pytest.mark.parametrize("path", ["/upload", "/upload?file_name={}&bytes_read=0"])
@pytest.mark.parametrize("paused", [False, True])
def test_a_sender_is_not_awaited_for_ever(serve: Serve, name: str, path: str, paused: bool) -> None:
    """A silent sender gets a 408, a paused one a 503; blocks keep their bytes, a form is gone."""
    caller = Caller(serve("--pause-hold-s" if paused else "--body-idle-s", "1s"), "c")
    form = path == "/upload"
    code, status = ("paused-too-long", 503) if paused else ("upload-stalled", 408)
    with Raw(caller.server) as raw:
        lines = [f"POST {path.format(name)} HTTP/1.1", "Host: localhost", "X-Client-Id: c"]
        lines += [f"Content-Type: {FORM}"] * form + [f"Content-Length: {10**6}", "", ""]
        # All at once: who is silent between two sends would be silent for too long.
        raw.send("\r\n".join(lines).encode() + form_head(name) * form + bytes(1000))
        job_id = caller.job("upload")["id"]
        if paused:
            stored = f"/v1/jobs/{job_id}"
            eventually(lambda: caller.get(stored).json["transfer"]["stored_bytes"] > 900, "stored")
            caller.post(f"{stored}/pause")
        answer = raw.answer()
    assert (answer.status, answer.json["code"]) == (status, code)
    if form:
        assert caller.server.wait_for(job_id, "failed")["error"]["code"] == code
        assert caller.versions(name) == []
        return
    assert caller.get(path.format(name)).json["bytes_read"] == 1000
    assert caller.server.job(job_id)["state"] == ("paused" if paused else "running")


@pytest.mark.parametrize("paused", [False, True])
def test_a_reader_is_not_awaited_for_ever(serve: Serve, name: str, paused: bool) -> None:
    """An export whose reader stands still, or that is paused too long, is closed short."""
    caller = Caller(serve("--pause-hold-s" if paused else "--write-idle-s", "1s"), "c")
    assert caller.block(name, 0, bytes(BIG_BYTES), "&is_complete=1").status == 200
    body = json.dumps({"filename": name}).encode()
    with Raw(caller.server, receive_bytes=64 << 10) as raw:
        raw.head("POST", "/export", Content_Length=len(body), X_Client_Id="c")
        raw.send(body)
        assert raw.file.readline() == b"HTTP/1.1 200 OK\r\n"
        job = caller.job("download")
        if paused:
            caller.post(f"/v1/jobs/{job['id']}/pause")
            caller.server.wait_for(job["id"], "paused")
            left = caller.server.job(job["id"])["transfer"]["stored_bytes"]
            assert raw.file.read(left)  # there is room for more, but for the pause
        failed = caller.server.wait_for(job["id"], "failed")
        assert len(raw.rest()) < BIG_BYTES
    assert failed["error"]["code"] == ("paused-too-long" if paused else "client-gone")
