"""Files on their way out: as jobs, over TLS, to readers that stall, vanish or take turns."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.iostream import IOStream, StreamClosedError
from tornado.tcpclient import TCPClient
from tornado.web import Application

from config import Config
from handlers import send
from handlers.base import BaseHandler
from jobs.uploads import ClientGone
from server import assembled, make_app, recover
from tests.conftest import Serve, need
from tests.handlers.clients import Caller, Raw
from tests.harness import FULL, ROOT, Answer, Server, eventually

BIG_BYTES = (64 if FULL else 16) << 20
PATTERN = bytes(range(256))
SMALL_RECEIVE_BYTES = 64 << 10


@pytest.fixture(scope="module")
def data() -> bytes:
    """What is more than the kernel keeps for a reader that stands still."""
    return os.urandom(1 << 20) * (BIG_BYTES >> 20)


@pytest.fixture(scope="module")
def big(site: Server, data: bytes) -> str:
    """A stored file of that."""
    answer = Caller(site, "d").block("big.bin", 0, data, "&is_complete=1")
    return str(answer.json["id"])


def content(file_id: str, query: str = "") -> str:
    """The address of a file's bytes."""
    return f"/v1/files/{file_id}/content{query}"


def head_of(raw: Raw) -> tuple[int, dict[str, str]]:
    """Status and headers of the next answer, whose body is not read yet."""
    status = int(raw.file.readline().split()[1])
    headers = {}
    while (line := raw.file.readline().decode().strip()) != "":
        name, value = line.split(": ", 1)
        headers[name] = value
    return status, headers


def downloads(server: Server) -> list[Any]:
    """All downloads that are jobs."""
    return server.jobs("?kind=download&limit=500")


def holders(pid: int, file_id: str) -> int:
    """How many descriptors of a process lead to that file's bytes."""
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            count += file_id in os.readlink(link)
    return count


# What the documentation says


@pytest.mark.parametrize("program", ["curl", "wget", "aria2c"])
def test_the_commands_of_the_docs_work(
    serve: Serve, tmp_path: Path, data: bytes, program: str
) -> None:
    """Each line that goes on with a download ends with the whole file, wherever it begins."""
    need(program)
    server = serve()
    file_id = Caller(server, "c").block("big.bin", 0, data, "&is_complete=1").json["id"]
    page = (ROOT / "docs" / "downloads.md").read_text()
    lines = re.findall(rf"^{program} .*$", page, re.MULTILINE)
    assert lines
    for line in lines:
        if program != "aria2c":  # which wants a file of its own beside a part
            (tmp_path / "big.bin").write_bytes(data[:1000] if " -c" in line.lower() else b"")
        done = subprocess.run(
            line.replace("localhost:8888", f"127.0.0.1:{server.port}"),
            shell=True,
            env=os.environ | {"FILE": file_id},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        if "redirect_url" in line:
            assert done.stdout == f"{server.url}{content(file_id)}"
        else:
            name = "copy.bin" if "copy.bin" in line else "big.bin"
            assert (tmp_path / name).read_bytes() == data
    if program == "curl":
        assert "Sluice-Job: " in (tmp_path / "head.txt").read_text()


# Downloads that are jobs


def test_a_tracked_download_is_a_job(caller: Caller, name: str) -> None:
    """The answer names a job that counts its bytes and succeeds with the last."""
    file_id = caller.store(name, PATTERN * 4)
    answer = caller.get(content(file_id, "?track=1"))
    assert (answer.status, answer.body) == (200, PATTERN * 4)
    job = caller.server.wait_for(answer.headers["Sluice-Job"], "succeeded")
    assert (job["kind"], job["name"], job["client"]) == ("download", name, caller.client)
    assert (job["progress"]["done"], job["progress"]["total"]) == (1024, 1024)
    assert job["result"]["file"] == file_id
    assert job["by"]["via"] == "rest"


@pytest.mark.parametrize("asked", ["bytes=100-199", "bytes=0-9,500-599", "bytes=-1"])
def test_the_total_of_a_tracked_range_is_that_of_the_answer(
    caller: Caller, name: str, asked: str
) -> None:
    """A range is a job of as many bytes as its answer has, the text between parts included."""
    file_id = caller.store(name, PATTERN * 4)
    answer = caller.get(content(file_id, "?track=1"), Range=asked)
    assert answer.status == 206
    job = caller.server.wait_for(answer.headers["Sluice-Job"], "succeeded")
    assert job["progress"]["done"] == job["progress"]["total"] == len(answer.body)


def test_an_empty_file_is_tracked_too(caller: Caller, name: str) -> None:
    """A job without a byte succeeds at once."""
    answer = caller.get(content(caller.store(name, b""), "?track=1"))
    assert (answer.status, answer.body) == (200, b"")
    caller.server.wait_for(answer.headers["Sluice-Job"], "succeeded")


@pytest.mark.parametrize(
    ("method", "query", "headers", "status"),
    [
        ("GET", "", {}, 200),
        ("GET", "?track=0", {}, 200),
        ("GET", "", {"Range": "bytes=0-9"}, 206),
        ("HEAD", "?track=1", {}, 200),
        ("GET", "?track=1", {"If-None-Match": "*"}, 304),
        ("GET", "?track=1", {"If-Match": '"x"'}, 412),
        ("GET", "?track=1", {"Range": "bytes=9999-"}, 416),
        ("GET", "?track=1", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("GET", "?track=1", {"Origin": "http://evil.example"}, 403),
        ("GET", "?track=1", {"Sec-Purpose": "prefetch"}, 403),
        ("GET", "?track=2", {}, 400),
        ("GET", "?track=1&track=1", {}, 400),
        ("GET", "?track", {}, 400),
        ("GET", "?disposition=inline", {}, 400),
        ("HEAD", "?colour=red", {}, 400),
    ],
)
def test_what_makes_no_job(
    caller: Caller, name: str, method: str, query: str, headers: dict[str, str], status: int
) -> None:
    """Only bytes that leave as the caller's own wish are a job."""
    path = content(caller.store(name, PATTERN), query)
    before = downloads(caller.server)
    answer = caller.server.request(method, path, headers=headers)
    assert answer.status == status
    assert "Sluice-Job" not in answer.headers
    assert downloads(caller.server) == before


def test_a_tracked_download_is_paused_and_resumed(site: Server, big: str, data: bytes) -> None:
    """Paused, nothing more is written; resumed, every byte arrives."""
    with Raw(site, receive_bytes=SMALL_RECEIVE_BYTES) as raw:
        raw.head("GET", content(big, "?track=1"), Range="bytes=1000-")
        status, headers = head_of(raw)
        assert (status, headers["Content-Range"]) == (
            206,
            f"bytes 1000-{BIG_BYTES - 1}/{BIG_BYTES}",
        )
        job = headers["Sluice-Job"]
        site.post(f"/v1/jobs/{job}/pause")
        site.wait_for(job, "paused")
        left = site.job(job)["transfer"]["stored_bytes"]
        got = raw.file.read(left)  # now there is room for more
        assert site.job(job)["transfer"]["stored_bytes"] == left
        site.post(f"/v1/jobs/{job}/resume")
        got += raw.file.read(BIG_BYTES - 1000 - left)
        assert got == data[1000:]
    assert site.wait_for(job, "succeeded")["progress"]["done"] == BIG_BYTES - 1000


@pytest.mark.parametrize("asked", [None, "bytes=0-1,100-"])
@pytest.mark.parametrize("paused", [False, True])
def test_a_cancelled_download_is_closed_short(
    site: Server, big: str, asked: str | None, paused: bool
) -> None:
    """A cancel ends the connection before the Content-Length is reached, also out of a pause."""
    with Raw(site, receive_bytes=SMALL_RECEIVE_BYTES) as raw:
        raw.head("GET", content(big, "?track=1"), **({"Range": asked} if asked else {}))
        _, headers = head_of(raw)
        job = headers["Sluice-Job"]
        if paused:
            site.post(f"/v1/jobs/{job}/pause")
            site.wait_for(job, "paused")
        site.post(f"/v1/jobs/{job}/cancel")
        site.wait_for(job, "cancelled")
        assert len(raw.rest()) < int(headers["Content-Length"])


def test_a_tracked_download_keeps_to_its_limit(site: Server, big: str) -> None:
    """A limit that is set while it runs holds the bytes back, and its end lets them go."""
    with Raw(site, receive_bytes=SMALL_RECEIVE_BYTES) as raw:
        raw.head("GET", content(big, "?track=1"))
        _, headers = head_of(raw)
        job = headers["Sluice-Job"]
        slow = {"limit_bytes_per_s": 1024}
        assert site.request("PATCH", f"/v1/jobs/{job}", slow).status == 200
        sent = site.job(job)["transfer"]["stored_bytes"]
        assert sent < BIG_BYTES
        raw.file.read(sent)
        assert site.job(job)["transfer"]["stored_bytes"] <= sent + (64 << 10)
        site.request("PATCH", f"/v1/jobs/{job}", {"limit_bytes_per_s": None})
        assert len(raw.file.read(BIG_BYTES - sent)) == BIG_BYTES - sent
    site.wait_for(job, "succeeded")


# Case 64: readers that are slow or vanish


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits a second for a reader."""
    folder = tmp_path_factory.mktemp("impatient") / "data"
    server = Server(folder, "--write-idle-s", "1s")
    yield server.start()
    server.close()


@pytest.mark.parametrize("asked", [None, "bytes=5-", "bytes=0-1,100-"])
def test_case_64_a_stalled_reader_is_let_go(
    impatient: Server, data: bytes, name: str, asked: str | None
) -> None:
    """Who reads nothing is cut off, its descriptor closed, and its job tells how far it came."""
    file_id = Caller(impatient, "c").block(name, 0, data, "&is_complete=1").json["id"]
    ranges = {"Range": asked} if asked else {}
    with Raw(impatient, receive_bytes=SMALL_RECEIVE_BYTES) as raw, Raw(impatient) as plain:
        raw.head("GET", content(file_id, "?track=1"), **ranges)
        plain.head("GET", content(file_id), **ranges)
        assert head_of(plain)[0] == (206 if asked else 200)
        _, headers = head_of(raw)
        failed = impatient.wait_for(headers["Sluice-Job"], "failed")
        eventually(lambda: holders(impatient.pid, file_id) == 0, "both descriptors are closed")
        got = len(raw.rest())
    assert failed["error"]["code"] == "client-gone"
    said = re.search(r"read nothing.* interrupted after ([\d,]+) bytes", failed["error"]["detail"])
    assert said
    sent = int(said[1].replace(",", ""))
    assert 0 < got <= sent < int(headers["Content-Length"])
    events = impatient.get(f"/v1/jobs/{headers['Sluice-Job']}/events").json["items"]
    assert (events[-1]["to"], events[-1]["row"]["error"]) == ("failed", failed["error"])


@pytest.mark.parametrize("end", ["reset", "close"])
@pytest.mark.parametrize(
    ("track", "paused"),
    [("", False), ("?track=1", False), ("?track=1", True)],
    ids=["plain", "tracked", "paused"],
)
def test_case_64_a_reader_that_vanishes_is_noticed_at_once(
    site: Server, data: bytes, name: str, end: str, track: str, paused: bool
) -> None:
    """Its descriptor is closed without waiting for a timeout, and its job has failed."""
    file_id = Caller(site, "c").block(name, 0, data, "&is_complete=1").json["id"]
    raws = [Raw(site, receive_bytes=SMALL_RECEIVE_BYTES) for _ in range(4)]
    ids = []
    for raw in raws:
        raw.head("GET", content(file_id, track))
        ids.append(head_of(raw)[1].get("Sluice-Job", ""))
        if paused:
            site.post(f"/v1/jobs/{ids[-1]}/pause")
            site.wait_for(ids[-1], "paused")
    assert holders(site.pid, file_id) == 4
    for raw in raws:
        if end == "reset":
            raw.cut()
        else:
            raw.close()
    eventually(lambda: holders(site.pid, file_id) == 0, "the descriptors are closed")
    for job in filter(None, ids):
        failed = site.wait_for(job, "failed")
        assert failed["error"]["code"] == "client-gone"
        assert re.search(r"interrupted after [\d,]+ bytes", failed["error"]["detail"])


@pytest.mark.parametrize("asked", ["", "?track=1"])
def test_case_64_readers_that_vanish_before_the_first_byte(
    serve: Serve, data: bytes, name: str, asked: str
) -> None:
    """Who resets while the headers leave costs nothing, and is no failure of the server."""
    server = serve()
    file_id = Caller(server, "c").block(name, 0, data, "&is_complete=1").json["id"]
    for _ in range(5):
        raws = [Raw(server) for _ in range(10)]
        for raw in raws:
            raw.head("GET", content(file_id, asked))
        for raw in raws:
            raw.cut()
        eventually(lambda: holders(server.pid, file_id) == 0, "the descriptors are closed")
    assert server.get(content(file_id)).body == data


def test_a_download_that_the_servers_end_interrupts(serve: Serve, data: bytes, name: str) -> None:
    """After a kill its job has failed, and says that it was interrupted."""
    server = serve()
    file_id = Caller(server, "c").block(name, 0, data, "&is_complete=1").json["id"]
    with Raw(server, receive_bytes=SMALL_RECEIVE_BYTES) as raw:
        raw.head("GET", content(file_id, "?track=1"))
        job = head_of(raw)[1]["Sluice-Job"]
        server.kill()
        server.start()
    assert server.job(job)["state"] == "failed"
    assert server.job(job)["error"]["code"] == "interrupted"


# Case 61: what happens to the file meanwhile


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_case_61_a_file_that_changes_is_served_to_its_end(
    caller: Caller, data: bytes, name: str, how: str
) -> None:
    """Who reads, reads that version to its end; who goes on later is told, and never splices."""
    server, newer = caller.server, b"newer" * 100
    old = caller.block(name, 0, data, "&is_complete=1").json["id"]
    with Raw(server, receive_bytes=SMALL_RECEIVE_BYTES) as raw:
        raw.head("GET", content(old))
        _, headers = head_of(raw)
        if how == "deleted":
            assert caller.delete(f"/v1/files/{old}").status == 204
        new = caller.store(name, newer)
        assert raw.file.read(BIG_BYTES) == data
    etag = headers["ETag" if "ETag" in headers else "Etag"]
    assert (old in etag) and old != new
    address = caller.get(f"/v1/files/by-name/{name}").headers["Location"]
    assert address == content(new)
    went_on = caller.get(address, Range="bytes=100-", If_Range=etag)
    assert (went_on.status, went_on.body) == (200, newer)
    assert caller.get(address, Range="bytes=100-", If_Match=etag).status == 412
    kept = caller.get(content(old), Range="bytes=100-", If_Range=etag)
    assert kept.status == (404 if how == "deleted" else 206)
    eventually(lambda: holders(server.pid, old) == 0, "nobody holds it")


# Several answers on one connection


def test_a_connection_is_kept_over_every_kind_of_answer(caller: Caller, name: str) -> None:
    """200, 206, several ranges, 304, 416, 412, HEAD: each leaves the connection as it was."""
    data = PATTERN * 4
    path = content(caller.store(name, data))
    with Raw(caller.server) as raw:
        for _ in range(2):
            raw.head("GET", path)
            assert raw.answer().body == data
            raw.head("GET", path, Range="bytes=1-2")
            assert raw.answer().body == data[1:3]
            raw.head("GET", path, Range="bytes=1-2,5-6,-1")
            assert raw.answer().body.count(b"Content-Range") == 3
            raw.head("GET", path, If_None_Match="*")
            assert raw.answer().status == 304
            raw.head("GET", path, Range="bytes=9999-")
            assert raw.answer().status == 416
            raw.head("GET", path, If_Match='"x"')
            assert raw.answer().status == 412
            raw.head("HEAD", path, Range="bytes=1-2")
            assert head_of(raw)[0] == 200


def test_pipelined_gets_are_answered_in_order(site: Server, big: str, data: bytes) -> None:
    """Requests that come at once do not mix their answers."""
    asked = ["bytes=0-9", "bytes=5-6,8-9", "bytes=-3000000", "bytes=0-1,-2500000", "bytes=7-7"]
    with Raw(site) as raw:
        for one in asked * 2:
            raw.head("GET", content(big), Range=one)
        answers = [raw.answer() for _ in asked * 2]
    assert [answer.status for answer in answers] == [206] * 10
    for first, several, long, both, last in (answers[:5], answers[5:]):
        assert (first.body, last.body) == (data[:10], data[7:8])
        assert long.body == data[-3000000:]
        assert data[5:7] in several.body and several.body.endswith(b"--\r\n")
        assert both.body.count(data[-2500000:]) == 1


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("asked", [None, "bytes=3-5", "bytes=0-1,4-5"])
def test_http_1_0(caller: Caller, name: str, asked: str | None, keep: bool) -> None:
    """An old client gets the same bytes; its connection ends unless it asked to keep it."""
    path = content(caller.store(name, PATTERN))
    lines = [f"GET {path} HTTP/1.0", "Host: localhost"]
    lines += [f"Range: {asked}"] if asked else []
    lines += ["Connection: keep-alive"] if keep else []
    request = "\r\n".join([*lines, "", ""]).encode()
    with Raw(caller.server) as raw:
        for _ in range(2 if keep else 1):
            raw.send(request)
            answer = raw.answer()
            assert answer.status == (206 if asked else 200)
            assert "Transfer-Encoding" not in answer.headers
            if asked != "bytes=0-1,4-5":
                assert answer.body == (PATTERN[3:6] if asked else PATTERN)
        if not keep:
            assert raw.rest() == b""


# TLS, with the server in this process


@pytest.fixture
def idle_s() -> float:
    """How long the service waits for a reader."""
    return 60.0


@pytest.fixture
def app(io_loop: IOLoop, tmp_path: Path, idle_s: float) -> Iterator[Application]:
    """The service in this process."""
    opened = assembled(Config(data=tmp_path / "data", write_idle_s=idle_s))
    parts = io_loop.run_sync(opened.__aenter__)
    io_loop.run_sync(lambda: recover(parts))
    yield make_app(parts.services)
    io_loop.run_sync(lambda: parts.services.manager.close(5))
    io_loop.run_sync(lambda: opened.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost, with its key."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = [need("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt"]
    command += ["ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(path), "-out", "-"]
    made = subprocess.run(command, capture_output=True, check=True)
    path.write_bytes(path.read_bytes() + made.stdout)
    return path


@pytest.fixture
def ssl_options(certificate: Path) -> ssl.SSLContext:
    """What pytest-tornado's https_server speaks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


class Client:
    """One connection to the server in this process."""

    def __init__(self, stream: IOStream) -> None:
        self.stream = stream

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        """Send a request."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.stream.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer."""
        text = (await self.stream.read_until(b"\r\n\r\n")).decode()
        first, *lines = text.strip().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines)
        return int(first.split()[1]), {name.title(): value for name, value in pairs}

    async def fetch(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        """A request and its answer."""
        await self.ask(method, path, body, **headers)
        status, given = await self.head()
        has_body = method != "HEAD" and status not in (204, 304)
        length = int(given.get("Content-Length", 0)) if has_body else 0
        return Answer(status, given, await self.stream.read_bytes(length))

    async def chunk(self) -> bytes:
        """The next chunk of an answer without a length; empty at its end."""
        size = int(await self.stream.read_until(b"\r\n"), 16)
        return (await self.stream.read_bytes(size + 2))[:-2]


Connect = Callable[[], Awaitable[Client]]


@pytest.fixture
def connect(https_server: HTTPServer, https_port: int, certificate: Path) -> Iterator[Connect]:
    """Open TLS connections; they are closed at the end."""
    made: list[Client] = []

    async def connected() -> Client:
        context = ssl.create_default_context(cafile=str(certificate))
        stream = await TCPClient().connect(
            "127.0.0.1", https_port, ssl_options=context, max_buffer_size=256 << 20
        )
        made.append(Client(stream))
        return made[-1]

    # The certificate is for a name, and no name is looked up.
    original = ssl.SSLContext.wrap_socket
    patch = pytest.MonkeyPatch()

    def named(self: ssl.SSLContext, *args: Any, **more: Any) -> Any:
        if not more.get("server_side"):
            more["server_hostname"] = "localhost"
        return original(self, *args, **more)

    patch.setattr(ssl.SSLContext, "wrap_socket", named)
    yield connected
    patch.undo()
    for one in made:
        one.stream.close()


async def stored(tls: Client, data: bytes) -> str:
    """Upload a file; its id."""
    answer = await tls.fetch("POST", "/upload?file_name=x.bin&bytes_read=0&is_complete=1", data)
    return str(answer.json["id"])


async def state(tls: Client, job: str, *wanted: str) -> Any:
    """The job as soon as it is in one of these states."""
    async with asyncio.timeout(20):
        while (found := (await tls.fetch("GET", f"/v1/jobs/{job}")).json)["state"] not in wanted:
            pass
    return found


async def until_held_by(n: int, file_id: str, client: Client) -> None:
    """Return when so many descriptors lead to the file."""
    async with asyncio.timeout(20):
        while holders(os.getpid(), file_id) != n:
            await client.fetch("GET", "/healthz")


@pytest.mark.gen_test(timeout=30)
async def test_tls_whole_and_ranges(connect: Connect) -> None:
    """Over TLS the same bytes come, whole, in one range or in several, on one connection."""
    tls = await connect()
    data = os.urandom(3 << 20)
    path = content(await stored(tls, data))
    for _ in range(2):
        assert (await tls.fetch("GET", path)).body == data
        one = await tls.fetch("GET", path, Range="bytes=1000000-")
        assert (one.status, one.body) == (206, data[1_000_000:])
        several = await tls.fetch("GET", path, Range="bytes=2000000-2999999,0-9")
        boundary = several.headers["Content-Type"].split("boundary=")[1].encode()
        pieces = several.body.split(b"--" + boundary)
        assert [piece.partition(b"\r\n\r\n")[2] for piece in pieces[1:3]] == [
            data[2_000_000:3_000_000] + b"\r\n",
            data[:10] + b"\r\n",
        ]
        assert (await tls.fetch("HEAD", path)).headers["Content-Length"] == str(len(data))
        assert (await tls.fetch("GET", path, Range="bytes=-0")).status == 416
        assert (await tls.fetch("GET", path, If_None_Match="*")).status == 304


@pytest.mark.gen_test(timeout=30)
async def test_tls_a_file_that_grows(connect: Connect) -> None:
    """Over TLS a growing file is followed to its end, and its ranges have their length."""
    tls, follower = await connect(), await connect()
    data = os.urandom(3 << 20)
    half = len(data) // 2
    block = "/upload?file_name=x.bin&bytes_read="
    await tls.fetch("POST", f"{block}0", data[:half])
    (job,) = (await tls.fetch("GET", "/v1/jobs?kind=upload")).json["items"]
    path = f"/v1/jobs/{job['id']}/content"
    await follower.ask("GET", f"{path}?follow=1", Range="bytes=10-")
    status, headers = await follower.head()
    assert (status, headers["Content-Range"]) == (206, f"bytes 10-{(1 << 63) - 1}/*")
    begun = b""
    while len(begun) < half - 10:
        begun += await follower.chunk()
    part = await tls.fetch("GET", path, Range=f"bytes={half - 9}-{half - 1}")
    assert (part.status, part.body) == (206, data[half - 9 : half])
    await tls.fetch("POST", f"{block}{half}&is_complete=1", data[half:])
    while chunk := await follower.chunk():
        begun += chunk
    assert begun == data[10:]


@pytest.mark.gen_test(timeout=60)
async def test_tls_pause_and_resume(connect: Connect, data: bytes) -> None:
    """Over TLS a pause stops the writing, and nothing is lost."""
    tls, other = await connect(), await connect()
    path = content(await stored(tls, data), "?track=1")
    await tls.ask("GET", path, Range="bytes=0-9,20-")
    status, headers = await tls.head()
    assert status == 206
    job = headers["Sluice-Job"]
    await other.fetch("POST", f"/v1/jobs/{job}/pause")
    found = await state(other, job, "paused")
    assert found["transfer"]["stored_bytes"] < len(data)
    left = found["transfer"]["stored_bytes"]
    body = await tls.stream.read_bytes(left)  # now there is room for more
    for _ in range(3):
        found = (await other.fetch("GET", f"/v1/jobs/{job}")).json
        assert found["transfer"]["stored_bytes"] - left <= 256 << 10  # what waited at the pause
    length = int(headers["Content-Length"])
    await other.fetch("POST", f"/v1/jobs/{job}/resume")
    body += await tls.stream.read_bytes(length - left)
    assert data[20:] in body
    assert (await state(other, job, "succeeded"))["progress"]["done"] == length


@pytest.mark.gen_test(timeout=60)
async def test_tls_a_pause_stops_the_clock(
    connect: Connect, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that is silent while its download is paused is not cut off, as others are."""
    senders: list[send.Sender] = []
    begin = send.Sender.__init__

    def seen(self: send.Sender, handler: BaseHandler) -> None:
        begin(self, handler)
        senders.append(self)

    def wait_at_most(idle_s: float, sender: send.Sender) -> None:
        sender._idle_s = idle_s
        sender.wake()

    monkeypatch.setattr(send.Sender, "__init__", seen)
    tls, witness, other = await connect(), await connect(), await connect()
    file_id = await stored(tls, data)
    await tls.ask("GET", content(file_id, "?track=1"))
    _, headers = await tls.head()
    job = headers["Sluice-Job"]
    await other.fetch("POST", f"/v1/jobs/{job}/pause")
    await state(other, job, "paused")
    wait_at_most(1.0, senders[0])
    await witness.ask("GET", content(file_id))
    await witness.head()
    assert holders(os.getpid(), file_id) == 2
    wait_at_most(1.0, senders[1])
    await until_held_by(1, file_id, other)  # the witness was silent for too long
    wait_at_most(60.0, senders[0])
    await other.fetch("POST", f"/v1/jobs/{job}/resume")
    assert await tls.stream.read_bytes(len(data)) == data
    await state(other, job, "succeeded")


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.gen_test(timeout=60)
async def test_tls_cancel(connect: Connect, data: bytes, paused: bool) -> None:
    """Over TLS a cancel closes short at once, also for a reader that does not read."""
    tls, other = await connect(), await connect()
    path = content(await stored(tls, data), "?track=1")
    await tls.ask("GET", path)
    _, headers = await tls.head()
    job = headers["Sluice-Job"]
    if paused:
        await other.fetch("POST", f"/v1/jobs/{job}/pause")
        await state(other, job, "paused")
    await other.fetch("POST", f"/v1/jobs/{job}/cancel")
    await state(other, job, "cancelled")
    with pytest.raises(StreamClosedError):
        await tls.stream.read_bytes(len(data))


@pytest.mark.parametrize(("end", "idle_s"), [("stalls", 1.0), ("vanishes", 60.0)])
@pytest.mark.gen_test(timeout=60)
async def test_tls_a_reader_that_stalls_or_vanishes(
    connect: Connect, data: bytes, end: str, idle_s: float
) -> None:
    """Over TLS, too, its job fails and tells how far it came, and its descriptor is closed."""
    tls, other = await connect(), await connect()
    file_id = await stored(tls, data)
    await tls.ask("GET", content(file_id, "?track=1"))
    _, headers = await tls.head()
    if end == "vanishes":
        tls.stream.close()
    failed = await state(other, headers["Sluice-Job"], "failed")
    assert failed["error"]["code"] == "client-gone"
    assert ("read nothing" in failed["error"]["detail"]) == (end == "stalls")
    assert "interrupted after" in failed["error"]["detail"]
    await until_held_by(0, file_id, other)


@pytest.mark.gen_test(timeout=60)
async def test_tls_readers_take_turns(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the plain path one reader does not hold the loop until its file is out."""
    order: list[int] = []
    written = send.Sender._written

    async def seen(self: send.Sender, *args: Any) -> None:
        order.append(id(self))
        await written(self, *args)

    monkeypatch.setattr(send.Sender, "_written", seen)
    readers = [await connect() for _ in range(2)]
    data = os.urandom(1 << 20)
    path = content(await stored(readers[0], data))
    bodies = await asyncio.gather(*(one.fetch("GET", path) for one in readers))
    assert [answer.body for answer in bodies] == [data, data]
    first, second = order[0], next(one for one in order if one != order[0])
    assert order.index(second) < len(order) - 1 - order[::-1].index(first)


@pytest.mark.gen_test(timeout=60)
async def test_a_connection_that_is_closed_here_is_noticed(
    http_server: HTTPServer, http_port: int, data: bytes
) -> None:
    """A socket that this process closes tells no epoll; who waits for it is woken all the same."""
    one = Client(await TCPClient().connect("127.0.0.1", http_port, max_buffer_size=256 << 20))
    file_id = await stored(one, data)
    await one.ask("GET", content(file_id))
    await one.head()
    try:
        async with asyncio.timeout(20):
            while not send.writable._waiters:
                await asyncio.sleep(0)
            await http_server.close_all_connections()
            while holders(os.getpid(), file_id):
                await asyncio.sleep(0)
    finally:
        one.stream.close()


class EndsWhileItIsRead:
    """A reader of zeros whose connection ends while it reads."""

    size_bytes = 10

    def __init__(self, stream: IOStream) -> None:
        self._stream = stream

    def fileno(self) -> int | None:
        """See Reader."""
        return None

    async def read(self, start: int, n: int) -> bytes:
        """See Reader."""
        self._stream.close()
        return bytes(n)

    async def close(self) -> None:
        """See Reader."""


class Ending(BaseHandler):
    """Sends from such a reader."""

    raised: ClassVar[list[Exception]] = []

    async def get(self) -> None:
        """Send, and keep what that raised."""
        sender, gate = send.Sender(self), self.services.downloads
        await sender.head(gate)
        reader = EndsWhileItIsRead(self.connection.stream)
        try:
            await sender.send(reader, 0, reader.size_bytes, gate)
        except Exception as error:
            self.raised.append(error)


@pytest.mark.gen_test(timeout=60)
async def test_a_connection_may_end_while_bytes_are_read(
    http_server: HTTPServer, http_port: int, app: Application
) -> None:
    """What was read then has no reader any more, which is no error of the server."""
    app.add_handlers(".*", [("/ending", Ending)])
    one = Client(await TCPClient().connect("127.0.0.1", http_port))
    await one.ask("GET", "/ending")
    with pytest.raises(StreamClosedError):
        await one.stream.read_bytes(1 << 20)
    assert [type(error) for error in Ending.raised] == [ClientGone]


def test_many_small_parts_take_turns(site: Server, big: str, data: bytes) -> None:
    """A hundred ranges are many small pieces of work, all of which come."""
    asked = ",".join(f"{i * 1000}-{i * 1000 + 9}" for i in range(100))
    answer = site.get(content(big), Range=f"bytes={asked}")
    assert answer.status == 206
    assert answer.headers["Content-Length"] == str(len(answer.body))
    assert all(data[i * 1000 : i * 1000 + 10] in answer.body for i in range(100))
