"""Files that grow, read over real sockets while they come (RFC 9110 section 14.4, RFC 8673)."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import Serve, need
from tests.handlers.clients import FORM, Caller, Raw, form_head
from tests.handlers.tus_client import Tus, at_once, encoded
from tests.harness import Answer, Server, eventually

VERY_LARGE = (1 << 63) - 1
DATA = os.urandom(300_000)

# Writes "line N" lines; each waits until a file of that number exists, so that a test says when.
LINES = """
import msgspec
from pathlib import Path
KIND, TITLE, UNIT, RESUMABLE = "lines", "Write lines", "rows", {resumable}
class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    steps: str
    lines: int
    names: tuple[str, ...] = ("lines.txt",)
    fails: bool = False
async def run(ctx, params):
    at = ctx.cursor or 0
    while at < params.lines:
        while not (Path(params.steps) / str(at + 1)).exists():
            await ctx.sleep(0.02)
        at += 1
        for name in params.names:
            out = await ctx.artifact(name, "text/plain")
            await out.write(f"line {{at}}\\n".encode())
        await ctx.checkpoint({cursor}, done=at)
    if params.fails:
        raise ValueError("as it was told")
    return {{"lines": at}}
"""


class Reading:
    """One GET that is read bit by bit."""

    def __init__(self, server: Server, path: str, **headers: Any) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
        self._connection.request("GET", path, headers=named)
        self.answer = self._connection.getresponse()
        self.status, self.headers = self.answer.status, self.answer.headers

    def take(self, n: int) -> bytes:
        """The next ``n`` bytes."""
        data = self.answer.read(n)
        assert len(data) == n
        return data

    def rest(self) -> tuple[bytes, bool]:
        """All that follows, and whether the answer was complete."""
        parts = []
        try:
            while part := self.answer.read1():
                parts.append(part)
        except (http.client.IncompleteRead, ConnectionResetError):
            return b"".join(parts), False
        finally:
            self.close()
        return b"".join(parts), self.answer.length in (None, 0)

    def close(self) -> None:
        """Go away."""
        self.answer.close()
        self._connection.close()


@contextmanager
def reading(server: Server, path: str, **headers: Any) -> Iterator[Reading]:
    """A GET that ends with the block."""
    found = Reading(server, path, **headers)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def tus(site: Server, caller: Caller) -> Tus:
    """A caller that uploads by tus."""
    return Tus(site, caller.client)


def content(path: str, more: str = "") -> str:
    """The address of what an upload makes."""
    return f"/v1/jobs/{path.rpartition('/')[2]}/content{more}"


def final(server: Server, path: str) -> str:
    """The address of what a complete upload has made, as the service tells it."""
    answer = server.get(content(path))
    assert answer.status == 307, answer
    return str(answer.headers["Location"])


def file_of(etag: str) -> str:
    """The address of the file that has this ETag."""
    return f"/v1/files/{etag[1:-1]}/content"


def refused(answer: Answer, status: int, code: str) -> None:
    """Check a problem."""
    assert (answer.status, answer.json["code"]) == (status, code), answer


def once(server: Server, path: str, fits: Callable[[Answer], bool], **headers: str) -> Answer:
    """The answer to a GET as soon as it fits."""
    answers: list[Answer] = []

    def look() -> bool:
        answers.append(server.get(path, **headers))
        return fits(answers[-1])

    eventually(look, path)
    return answers[-1]


def half(tus: Tus, n: int = 150_000, **headers: Any) -> str:
    """An upload of which the first ``n`` bytes are there."""
    path = tus.new(len(DATA), **headers)
    assert tus.patch(path, 0, DATA[:n]).status == 204
    return path


def descriptors(server: Server) -> int:
    """How many descriptors the server has open on blobs and connections."""
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    port = f":{server.port:04X}"
    ours = {f"socket:[{row[9]}]" for row in table if row[1].endswith(port)}
    found = 0
    for entry in Path(f"/proc/{server.pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        found += target in ours or target.startswith(str(server.folder / "tmp"))
    return found


def at_rest(server: Server) -> int:
    """The same when all that went before has gone: only the socket that listens."""
    return eventually(lambda: descriptors(server) == 1, "nothing is open")


# Without follow


def test_case_62_what_is_there_is_served(site: Server, tus: Tus) -> None:
    """Without a range all that is stored comes, in chunks, with the ETag of the file to be."""
    path = half(tus, Upload_Metadata="filename " + encoded('n"ä.txt'))
    with reading(site, content(path)) as got:
        assert (got.status, got.headers["Transfer-Encoding"]) == (200, "chunked")
        assert "Content-Length" not in got.headers
        assert "Repr-Digest" not in got.headers
        assert got.headers["Accept-Ranges"] == "bytes"
        assert got.headers["Cache-Control"] == "no-store"
        assert got.headers["X-Content-Type-Options"] == "nosniff"
        assert got.headers["Content-Type"] == "text/plain"
        assert got.headers["Content-Disposition"].startswith("attachment; ")
        assert got.headers["Content-Disposition"].endswith("filename*=UTF-8''n%22%C3%A4.txt")
        assert got.rest() == (DATA[:150_000], True)
    assert tus.patch(path, 150_000, DATA[150_000:]).status == 204
    file = site.get(final(site, path))
    assert (file.body, file.headers["Etag"]) == (DATA, got.headers["ETag"])


def test_nothing_is_there(site: Server, tus: Tus) -> None:
    """An upload that has only begun has no bytes so far, and says so by an empty answer."""
    answer = site.get(content(tus.new(10)))
    assert (answer.status, answer.body) == (200, b"")
    assert "Content-Length" not in answer.headers


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=100-149999", 100, 149_999),
        ("bytes=100-150000", 100, 149_999),
        ("bytes=149999-", 149_999, 149_999),
        ("BYTES=7-99999999999999999999999999", 7, 149_999),
        ("bytes=-200000", 100_000, 149_999),  # the length is known, so it is clear which they are
    ],
)
def test_case_62_a_range_of_what_is_there(
    site: Server, tus: Tus, asked: str, first: int, last: int
) -> None:
    """A range is cut to what is there, and its answer has no length of the whole."""
    answer = site.get(content(half(tus)), Range=asked)
    assert (answer.status, answer.body) == (206, DATA[first : last + 1])
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/*"
    assert answer.headers["Content-Length"] == str(last + 1 - first)


@pytest.mark.parametrize("asked", ["bytes=150000-", "bytes=150000-150001", "bytes=-10"])
def test_a_range_that_has_not_come(site: Server, tus: Tus, asked: str) -> None:
    """Bytes that may come are refused for now, not for ever."""
    answer = site.get(content(half(tus)), Range=asked)
    refused(answer, 503, "not-yet")
    assert answer.headers["Retry-After"] == "1"
    assert answer.json["bytes"] == 150_000
    assert "Content-Range" not in answer.headers


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,5-6", "lines=0-1", "bytes=5-2", "bytes=-", "bytes=-0"]
)
def test_ranges_that_are_ignored(site: Server, tus: Tus, asked: str) -> None:
    """Several ranges, other units and what is malformed: all that is there is the answer."""
    answer = site.get(content(half(tus, 20)), Range=asked)
    assert (answer.status, answer.body) == (200, DATA[:20])


def test_the_last_bytes_of_an_unknown_length(site: Server, tus: Tus) -> None:
    """While the end is not known, the last n bytes are not either: everything is the answer."""
    path = tus.new(Upload_Defer_Length=1)
    tus.patch(path, 0, b"hello")
    answer = site.get(content(path), Range="bytes=-2")
    assert (answer.status, answer.body) == (200, b"hello")


def test_case_62_a_range_has_a_416_only_at_the_end(site: Server, tus: Tus) -> None:
    """The same request is not-yet while the upload grows, and 416 with the length after it."""
    path = half(tus)
    refused(site.get(content(path), Range="bytes=300000-"), 503, "not-yet")
    tus.patch(path, 150_000, DATA[150_000:])
    answer = site.get(final(site, path), Range="bytes=300000-")
    refused(answer, 416, "range-not-satisfiable")
    assert answer.headers["Content-Range"] == "bytes */300000"


def test_case_62_ranges_of_another_generation(site: Server, tus: Tus) -> None:
    """If-Range sends everything to who began something else; If-Match refuses them."""
    path = half(tus, 20)
    etag = site.get(content(path)).headers["Etag"]
    where = content(path)
    for good in (etag,):
        answer = site.get(where, Range="bytes=10-", If_Range=good, If_Match=good)
        assert (answer.status, answer.body) == (206, DATA[10:20])
    for other in ('"another"', f"W/{etag}", "Sun, 22 Nov 2026 03:00:00 GMT"):
        answer = site.get(where, Range="bytes=10-", If_Range=other)
        assert (answer.status, answer.body) == (200, DATA[:20])
    refused(site.get(where, Range="bytes=10-", If_Match='"another"'), 412, "version-mismatch")
    assert site.get(where, If_None_Match=etag).status == 200  # it may have grown


def test_head_says_what_get_would(site: Server, tus: Tus) -> None:
    """HEAD has the headers of GET, no length of what grows, and never waits."""
    path = half(tus)
    for more in ("", "?follow=1"):
        whole = site.request("HEAD", content(path, more))
        assert (whole.status, whole.body) == (200, b"")
        assert "Content-Length" not in whole.headers
        assert whole.headers["Etag"]
    part = site.request("HEAD", content(path), headers={"Range": "bytes=0-"})
    assert (part.status, part.headers["Content-Range"]) == (206, "bytes 0-149999/*")
    with at_once():
        later = site.request("HEAD", content(path, "?follow=1"), headers={"Range": "bytes=200000-"})
    assert later.status == 503
    with Raw(site) as raw:  # nothing follows the headers, and the next request has its answer
        for more in ("", "?follow=1"):
            raw.head("HEAD", content(path, more), Range="bytes=0-99")
            while raw.file.readline() != b"\r\n":
                pass
            raw.head("GET", "/healthz")
            assert raw.answer().status == 200
    tus.patch(path, 150_000, DATA[150_000:])
    assert site.request("HEAD", content(path)).status == 307


# Which file


def test_what_makes_nothing_has_no_content(site: Server, tus: Tus) -> None:
    """Other jobs, other owners' names, wrong parameters: each a clear 4xx."""
    refused(site.get("/v1/jobs/nobody/content"), 404, "job-unknown")
    path = half(tus, 20)
    refused(site.get(content(path, "?name=other")), 404, "content-unknown")
    refused(site.get(content(path, "?follow=yes")), 400, "invalid-field")
    refused(site.get(content(path, "?more=1")), 400, "invalid-field")
    part = tus.new(5, Upload_Concat="partial")
    refused(site.get(content(part)), 404, "content-unknown")
    tus.caller.store("whole.bin", b"data")
    tus.caller.post("/export", {"filename": "whole.bin"})
    job = tus.caller.job("download")
    refused(site.get(f"/v1/jobs/{job['id']}/content"), 404, "content-unknown")
    count = site.post("/v1/jobs", {"kind": "count", "params": {"steps": 1}}).json["id"]
    site.wait_for(count, "succeeded")
    refused(site.get(f"/v1/jobs/{count}/content"), 404, "content-unknown")


def test_a_job_that_was_cancelled_has_no_content(site: Server, tus: Tus) -> None:
    """After a cancel it is gone for good."""
    path = half(tus)
    tus.command(path, "cancel")
    refused(site.get(content(path)), 410, "content-gone")
    refused(site.get(content(path, "?follow=1")), 410, "content-gone")


def test_the_files_of_a_form(site: Server, caller: Caller) -> None:
    """Each file of a form has a name; the one before is complete when the next one comes."""
    with Raw(site) as raw:
        raw.head(
            "POST", "/upload", Content_Type=FORM, Content_Length=1 << 20, X_Client_Id=caller.client
        )
        raw.send(form_head("a.txt") + b"aaaa\r\n" + form_head("b.txt") + b"b" * 70_000)
        job = caller.job("upload")["id"]
        first = f"/v1/jobs/{job}/content"
        with reading(site, f"{first}?name=b.txt&follow=1") as got:  # also if it waits for it
            assert got.take(60_000) == b"b" * 60_000
            once(site, first, lambda answer: answer.body == b"aaaa")
            refused(site.get(f"{first}?name=c.txt"), 503, "not-yet")
            raw.cut()
            rest, complete = got.rest()
        assert set(rest) <= {ord("b")}
        assert not complete
    site.wait_for(job, "failed")
    refused(site.get(first), 410, "content-gone")


# With follow


def test_a_follower_gets_all_and_the_end(site: Server, tus: Tus) -> None:
    """Bytes come as they arrive, block by block; the answer ends when the upload has succeeded."""
    path = tus.new(len(DATA))
    with reading(site, content(path, "?follow=1")) as got:
        assert (got.status, got.headers["Transfer-Encoding"]) == (200, "chunked")
        for at in range(0, len(DATA), 50_000):
            tus.patch(path, at, DATA[at : at + 50_000])
            assert got.take(50_000) == DATA[at : at + 50_000]
        assert got.rest() == (b"", True)
    assert site.get(final(site, path)).headers["Etag"] == got.headers["ETag"]


def test_a_file_that_comes_at_once(site: Server, tus: Tus) -> None:
    """Who waits for the first byte gets the file, although it is published when he opens it."""
    path = tus.new(5)
    with reading(site, content(path, "?follow=1")) as got:
        assert tus.patch(path, 0, b"hello").status == 204
        assert got.rest() == (b"hello", True)


def test_a_follower_needs_no_end_of_a_request(site: Server, tus: Tus) -> None:
    """Of a long PATCH the bytes that were committed meanwhile come, at least once a second."""
    path = tus.new(len(DATA))
    with (
        reading(site, content(path, "?follow=1")) as got,
        tus.open(path, 0, DATA[:100_000], len(DATA)) as raw,
    ):
        assert got.take(100_000) == DATA[:100_000]
        raw.send(DATA[100_000:])
        assert got.rest() == (DATA[100_000:], True)


def test_a_follower_stays_over_pauses_and_reconnects(site: Server, tus: Tus) -> None:
    """Neither a pause nor a sender that goes and comes again ends what a follower reads."""
    path = tus.new(len(DATA))
    with reading(site, content(path, "?follow=1")) as got:
        with tus.open(path, 0, DATA[:100_000], len(DATA)) as raw:
            raw.cut()
        assert got.take(100_000) == DATA[:100_000]
        tus.command(path, "pause")
        tus.command(path, "resume")
        with tus.open(path, 100_000, DATA[100_000:200_000], 200_000) as raw:
            tus.command(path, "pause")
            assert got.take(100_000) == DATA[100_000:200_000]
            tus.command(path, "resume")
            raw.send(DATA[200_000:])
            assert got.rest() == (DATA[200_000:], True)


def test_many_followers_of_one_file(site: Server, tus: Tus) -> None:
    """Each follower gets all of it, wherever it began."""
    path = half(tus)
    readers = [
        Reading(site, content(path, "?follow=1"), Range=f"bytes={at}-")
        for at in range(0, 150_000, 10_000)
    ]
    tus.patch(path, 150_000, DATA[150_000:])
    for i, got in enumerate(readers):
        assert got.rest() == (DATA[i * 10_000 :], True)


def test_a_follower_of_an_empty_file(site: Server, tus: Tus) -> None:
    """A file that ends up empty ends its follower well."""
    path = tus.new(Upload_Defer_Length=1)
    with reading(site, content(path, "?follow=1")) as got:
        assert tus.patch(path, 0, b"", Upload_Length=0).status == 204
        assert got.rest() == (b"", True)


def test_a_cancel_cuts_a_follower_short(site: Server, tus: Tus) -> None:
    """If the upload is cancelled the answer has no last chunk, and so it does not look complete."""
    path = half(tus)
    with reading(site, content(path, "?follow=1")) as got:
        assert got.take(150_000) == DATA[:150_000]
        tus.command(path, "cancel")
        assert got.rest() == (b"", False)


def test_a_failure_cuts_a_follower_short(site: Server, tus: Tus) -> None:
    """The bytes may all be there: without the right digest the answer does not look complete."""
    path = tus.new(len(DATA), Repr_Digest=f"sha-256=:{'A' * 43}=:")
    with reading(site, content(path, "?follow=1")) as got:
        assert tus.patch(path, 0, DATA).status == 410
        assert got.rest() == (DATA, False)
    refused(site.get(content(path)), 410, "content-gone")


def test_bytes_that_are_taken_back_are_not_served(site: Server, tus: Tus) -> None:
    """A block whose checksum is wrong is never seen by a follower."""
    path = half(tus)
    wrong = DATA[:50_000][::-1]
    with reading(site, content(path, "?follow=1"), Range="bytes=149999-") as got:
        digest = f"sha1 {encoded(bytes(20))}"
        assert tus.patch(path, 150_000, wrong, Upload_Checksum=digest).status == 460
        assert tus.patch(path, 150_000, DATA[150_000:]).status == 204
        assert got.rest() == (DATA[149_999:], True)


# With follow and a range


def test_case_62_a_followed_range_waits_for_its_end(site: Server, tus: Tus) -> None:
    """A range within the known length is promised and waited for; the upload goes on."""
    path = half(tus)
    with reading(site, content(path, "?follow=1"), Range="bytes=149990-150009") as got:
        assert (got.status, got.headers["Content-Length"]) == (206, "20")
        assert got.headers["Content-Range"] == "bytes 149990-150009/*"
        assert got.take(10) == DATA[149_990:150_000]
        tus.patch(path, 150_000, DATA[150_000:200_000])
        assert got.rest() == (DATA[150_000:150_010], True)


def test_a_followed_range_waits_for_its_start(site: Server, tus: Tus) -> None:
    """Who asks for what has not come waits for the answer itself."""
    path = half(tus)
    with Raw(site) as raw:
        raw.head("GET", content(path, "?follow=1"), Range="bytes=150000-150004")
        tus.patch(path, 150_000, DATA[150_000:200_000])
        answer = raw.answer()
    assert (answer.status, answer.body) == (206, DATA[150_000:150_005])
    assert answer.headers["Content-Range"] == "bytes 150000-150004/*"


def test_a_start_that_never_comes_is_a_416_in_the_end(site: Server, tus: Tus) -> None:
    """Who waits behind the end is sent to the whole file, which knows its length."""
    path = half(tus)
    with Raw(site) as raw:
        raw.head("GET", content(path, "?follow=1"), Range="bytes=300000-")
        tus.patch(path, 150_000, DATA[150_000:])
        answer = raw.answer()
    assert answer.status == 307
    assert answer.headers["Location"] == final(site, path)


@pytest.mark.parametrize("last", ["", "299999", "300000", str(VERY_LARGE)])
def test_an_end_that_is_known_is_told(site: Server, tus: Tus, last: str) -> None:
    """Where the length is known the range that is told ends with it (RFC 8673 section 2.2)."""
    path = half(tus)
    with reading(site, content(path, "?follow=1"), Range=f"bytes=100000-{last}") as got:
        assert got.headers["Content-Range"] == "bytes 100000-299999/*"
        tus.patch(path, 150_000, DATA[150_000:])
        assert got.rest() == (DATA[100_000:], True)


@pytest.mark.parametrize("last", ["", "9007199254740991", str(VERY_LARGE)])
def test_an_end_that_is_not_known_is_very_large(site: Server, tus: Tus, last: str) -> None:
    """The end that was asked for is echoed, else it is 2^63-1; the answer ends with the file."""
    path = tus.new(Upload_Defer_Length=1)
    tus.patch(path, 0, DATA[:100])
    with reading(site, content(path, "?follow=1"), Range=f"bytes=50-{last}") as got:
        assert got.headers["Content-Range"] == f"bytes 50-{last or VERY_LARGE}/*"
        assert got.headers["Transfer-Encoding"] == "chunked"
        tus.patch(path, 100, DATA[100:200], Upload_Length=200)
        assert got.rest() == (DATA[50:200], True)


def test_an_unknown_end_that_comes_ends_the_answer(site: Server, tus: Tus) -> None:
    """A range ends with its last byte, although the length of the whole was never known."""
    path = tus.new(Upload_Defer_Length=1)
    tus.patch(path, 0, DATA[:100])
    with reading(site, content(path, "?follow=1"), Range="bytes=50-149") as got:
        assert got.headers["Content-Range"] == "bytes 50-149/*"
        tus.patch(path, 100, DATA[100:200])
        assert got.rest() == (DATA[50:150], True)
    assert tus.job(path)["state"] == "running"


# tus


def test_tus_get_grows_too(site: Server, tus: Tus) -> None:
    """GET of the upload itself serves what is there, and follows; at the end it is the file."""
    path = half(tus)
    answer = tus.ask("GET", path, Range="bytes=0-9")
    assert (answer.status, answer.headers["Content-Range"]) == (206, "bytes 0-9/*")
    assert answer.headers["Tus-Resumable"] == "1.0.0"
    with reading(site, f"{path}?follow=1") as got, Raw(site) as raw:
        raw.head("GET", f"{path}?follow=1", Range="bytes=300000-")
        tus.patch(path, 150_000, DATA[150_000:])
        assert got.rest() == (DATA, True)
        refused(raw.answer(), 416, "range-not-satisfiable")


# Clients that go, stall, or are old


def test_a_follower_that_has_gone_leaves_nothing(site: Server, tus: Tus) -> None:
    """A client that goes while it waits for bytes is noticed: no descriptor is left."""
    path = half(tus)
    before = at_rest(site)
    followers = []
    for more in ({}, {"Range": "bytes=0-149999"}, {"Range": "bytes=0-299999"}):
        got = Reading(site, content(path, "?follow=1"), **more)
        assert got.take(150_000) == DATA[:150_000]
        followers.append(got)
    waiting = Raw(site)  # for its headers even
    waiting.head("GET", content(path, "?follow=1"), Range="bytes=200000-")
    eventually(lambda: descriptors(site) >= before + 6, "they are there")
    for got in followers:
        got.close()
    waiting.close()
    eventually(lambda: descriptors(site) <= before, "they have gone")
    tus.patch(path, 150_000, DATA[150_000:])
    assert tus.content(path) == DATA


def old(server: Server, path: str, *headers: str) -> tuple[socket.socket, Any]:
    """A GET of HTTP/1.0."""
    client = socket.create_connection(("127.0.0.1", server.port), 20)
    host = f"Host: 127.0.0.1:{server.port}"
    client.sendall("\r\n".join([f"GET {path} HTTP/1.0", host, *headers, "", ""]).encode())
    return client, client.makefile("rb")


@pytest.mark.parametrize("headers", [(), ("Connection: keep-alive",)])
def test_http_10_ends_with_the_connection(site: Server, tus: Tus, headers: tuple[str, ...]) -> None:
    """A client without chunks gets the bytes plain, and their end is that of the connection."""
    path = half(tus)
    client, file = old(site, content(path, "?follow=1"), *headers)
    with client, file:
        head = iter(file.readline, b"\r\n")
        lines = [line.decode().strip().lower() for line in head]
        assert not any(line.startswith(("transfer-encoding", "content-length")) for line in lines)
        assert "connection: keep-alive" not in lines
        assert file.read(150_000) == DATA[:150_000]
        tus.patch(path, 150_000, DATA[150_000:])
        assert file.read() == DATA[150_000:]


def test_http_10_sees_a_cut(site: Server, tus: Tus) -> None:
    """A client that can't see a missing last chunk gets a reset instead of an end."""
    path = half(tus)
    client, file = old(site, content(path, "?follow=1"))
    with client, file:
        while file.readline() != b"\r\n":
            pass
        assert file.read(150_000) == DATA[:150_000]
        tus.command(path, "cancel")
        with pytest.raises(ConnectionResetError):
            file.read()


def test_only_who_does_not_read_is_timed_out(serve: Serve) -> None:
    """A follower that leaves bytes unread is cut; one that waits for bytes far longer is not."""
    site = serve("--write-idle-s", "0.5")
    tus = Tus(site, "slow")
    size = 16 << 20
    path = tus.new(size + 5)
    assert tus.patch(path, 0, bytes(size)).status == 204
    before = at_rest(site)
    # What is there for the one that reads fits into its socket, however late it reads it.
    near_the_end = {"Range": f"bytes={size - 10}-"}
    with (
        Raw(site, receive_bytes=4096) as slow,
        reading(site, content(path, "?follow=1"), **near_the_end) as got,
    ):
        slow.head("GET", content(path, "?follow=1"))
        begin = monotonic()
        assert slow.file.readline() == b"HTTP/1.1 200 OK\r\n"
        assert got.take(10) == bytes(10)
        # The slow one is gone while the other one waits.
        eventually(lambda: descriptors(site) <= before + 2, "the slow one was cut")
        eventually(lambda: monotonic() - begin > 1.5, "longer than anyone may be silent")
        assert tus.patch(path, size, b"hello").status == 204
        assert got.rest() == (b"hello", True)
        assert len(slow.rest()) < size


# The server goes


def resume(server: Server, where: str, had: bytes, etag: str) -> bytes:
    """Go on with what was begun."""
    answer = server.get(where, Range=f"bytes={len(had)}-", If_Range=etag)
    assert answer.status == 206
    return had + answer.body


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_follower_goes_on_after_the_server_went(serve: Serve, how: str) -> None:
    """A stop or a kill -9 cuts a follower; by Range and If-Range the finished file completes it."""
    site = serve()
    tus = Tus(site, "sender")
    path = tus.new(len(DATA))
    with (
        reading(site, content(path, "?follow=1")) as got,
        tus.open(path, 0, DATA[:150_000], len(DATA)) as raw,
    ):
        had = got.take(100_000)  # committed in the middle of a request
        (site.stop if how == "stop" else site.kill)()
        rest, complete = got.rest()
        raw.rest()
    had += rest
    assert not complete
    site.start()
    assert tus.offset(path) >= len(had)  # what was served was never taken back
    with reading(
        site, content(path, "?follow=1"), If_Range=got.headers["ETag"], Range="bytes=99999-"
    ) as again:
        assert again.status == 206
        offset = tus.offset(path)
        tus.patch(path, offset, DATA[offset:])
        assert again.rest() == (DATA[99_999:], True)
    assert had == DATA[: len(had)]
    assert resume(site, final(site, path), had, got.headers["ETag"]) == DATA


def test_a_stop_waits_for_no_follower(serve: Serve) -> None:
    """No follower keeps the server from ending, also if it has no answer so far."""
    site = serve("--stop-grace-s", "5m")
    tus = Tus(site, "sender")
    path = half(tus)
    with reading(site, content(path, "?follow=1")) as got, Raw(site) as raw:
        raw.head("GET", content(path, "?follow=1"), Range="bytes=200000-")
        got.take(150_000)
        assert site.stop() == 0
        assert got.rest() == (b"", False)
        assert raw.rest() == b""


# What a process makes


class Lines:
    """A process that writes a line whenever it is told to."""

    def __init__(self, server: Server, folder: Path, n: int, **params: Any) -> None:
        self.server = server
        self.folder = folder
        folder.mkdir(exist_ok=True)
        asked = {"steps": str(folder), "lines": n, **params}
        answer = server.post("/v1/jobs", {"kind": "lines", "params": asked})
        assert answer.status == 201, answer
        self.id = str(answer.json["id"])
        self.content = f"/v1/jobs/{self.id}/content"

    def step(self, *numbers: int) -> None:
        """Let it write these lines."""
        for number in numbers:
            (self.folder / str(number)).touch()


def lines(*numbers: int) -> bytes:
    """What it writes."""
    return b"".join(b"line %d\n" % number for number in numbers)


Writers = Callable[..., Server]


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    """A server that knows the process ``lines``; its log is checked."""
    servers = []

    def start(*options: str, resumable: bool = True) -> Server:
        kind = tmp_path / "lines_kind.py"
        cursor = "at" if resumable else "None"
        kind.write_text(LINES.format(resumable=resumable, cursor=cursor))
        server = Server(tmp_path / "data", *options)
        server.env = {"SLUICE_KINDS": str(kind)}
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize("resumable", [True, False])
def test_an_artefact_is_followed(writers: Writers, tmp_path: Path, resumable: bool) -> None:
    """What a process writes comes while it runs; the file that it makes has the same ETag."""
    site = writers(resumable=resumable)
    job = Lines(site, tmp_path / "steps", 3)
    refused(site.get(job.content), 503, "not-yet")  # there is no file so far
    with Raw(site) as raw:
        raw.head("GET", f"{job.content}?follow=1")  # but who follows waits for it
        job.step(1)
        assert raw.file.readline() == b"HTTP/1.1 200 OK\r\n"
    with reading(site, f"{job.content}?follow=1&name=lines.txt") as got:
        assert (got.take(7), got.headers["Content-Type"]) == (lines(1), "text/plain")
        job.step(2)
        assert got.take(7) == lines(2)
        part = site.get(job.content, Range="bytes=7-")
        assert (part.status, part.body) == (206, lines(2))
        assert part.headers["Content-Range"] == "bytes 7-13/*"
        job.step(3)
        assert got.rest() == (lines(3), True)
    answer = site.get(job.content)
    assert answer.status == 307
    file = site.get(answer.headers["Location"])
    assert (file.body, file.headers["Etag"]) == (lines(1, 2, 3), got.headers["ETag"])


def test_an_artefact_by_its_name(writers: Writers, tmp_path: Path) -> None:
    """Of several files the name chooses one, else it is the first, also in the end."""
    site = writers()
    job = Lines(site, tmp_path / "steps", 2, names=["b.txt", "a.txt"])
    job.step(1)
    for which in ("", "?name=b.txt", "?name=a.txt"):
        once(site, job.content + which, lambda answer: answer.body == lines(1))
    first, a = (site.get(job.content + w).headers["Etag"] for w in ("", "?name=a.txt"))
    job.step(2)
    site.wait_for(job.id, "succeeded")
    assert site.get(job.content).headers["Location"] == file_of(first)
    assert site.get(f"{job.content}?name=a.txt").headers["Location"] == file_of(a)
    refused(site.get(f"{job.content}?name=c.txt"), 404, "content-unknown")


def test_a_process_that_fails_cuts_its_followers(writers: Writers, tmp_path: Path) -> None:
    """An answer about a process that failed does not look complete."""
    site = writers()
    site.expected = (
        "as it was told",
        "Traceback",
        "  File",
        "failed",
        "raise ValueError",
        "^",
        "    ",
    )
    job = Lines(site, tmp_path / "steps", 2, fails=True)
    job.step(1)
    with reading(site, f"{job.content}?follow=1") as got:
        assert got.take(7) == lines(1)
        job.step(2)
        rest, complete = got.rest()
    assert not complete
    assert rest in (b"", lines(2))
    refused(site.get(job.content), 410, "content-gone")


def test_an_artefact_over_a_cold_pause(writers: Writers, tmp_path: Path) -> None:
    """A pause that unwinds the process ends no follower: it goes on with the next frame."""
    site = writers("--warm-s", "0.1")
    job = Lines(site, tmp_path / "steps", 2)
    job.step(1)
    with reading(site, f"{job.content}?follow=1") as got:
        assert got.take(7) == lines(1)
        site.post(f"/v1/jobs/{job.id}/pause")
        site.wait_for(job.id, "paused")
        once(site, job.content, lambda answer: answer.body == lines(1))
        site.post(f"/v1/jobs/{job.id}/resume")
        job.step(2)
        assert got.rest() == (lines(2), True)


def test_an_artefact_that_is_begun_anew_is_another_one(writers: Writers, tmp_path: Path) -> None:
    """Who follows a process that must start over is cut, and its ETag fits no more."""
    site = writers("--warm-s", "0.1", resumable=False)
    job = Lines(site, tmp_path / "steps", 2)
    job.step(1)
    with reading(site, f"{job.content}?follow=1") as got:
        assert got.take(7) == lines(1)
        site.post(f"/v1/jobs/{job.id}/pause")
        site.wait_for(job.id, "paused")
        once(site, job.content, lambda answer: answer.status == 503)  # its frame has gone
        site.post(f"/v1/jobs/{job.id}/resume")
        assert got.rest() == (b"", False)
    etag = got.headers["ETag"]
    begun = {"Range": "bytes=7-", "If_Range": etag}
    once(site, job.content, lambda answer: (answer.status, answer.body) == (200, lines(1)), **begun)
    refused(site.get(job.content, If_Match=etag), 412, "version-mismatch")
    job.step(2)
    site.wait_for(job.id, "succeeded")


def test_an_artefact_survives_a_kill(writers: Writers, tmp_path: Path) -> None:
    """After kill -9 nothing that was served has changed, and a follower completes it exactly."""
    site = writers()
    job = Lines(site, tmp_path / "steps", 60)
    job.step(*range(1, 31))
    with reading(site, f"{job.content}?follow=1") as got:
        had = got.take(7)
        for number in range(31, 50):
            job.step(number)
        site.kill()
        rest, complete = got.rest()
        had += rest
    assert not complete
    site.start()
    answer = once(site, job.content, lambda answer: answer.status == 200)
    assert answer.body[: len(had)] == had
    with reading(
        site,
        f"{job.content}?follow=1",
        Range=f"bytes={len(had) - 1}-",
        If_Range=got.headers["ETag"],
    ) as again:
        assert again.status == 206
        job.step(*range(50, 61))
        rest, complete = again.rest()
    assert complete
    assert had[:-1] + rest == lines(*range(1, 61))


@pytest.mark.parametrize("rows", [False, True])
def test_what_a_resume_would_cut_off_is_not_served(tmp_path: Path, rows: bool) -> None:
    """What was written since the last saved cursor is not there for readers.

    Where rows are written, only the cursors that come with rows count.
    """
    site = Server(tmp_path / "data", "--warm-s", "0.1")
    code = LINES.format(resumable=True, cursor="at" if rows else "None if at == 2 else at")
    if rows:
        write = "        table = await ctx.table('t', [Column('n', 'integer')])\n"
        write += "        if at != 2: await table.write([[at]], at)\n"
        code = code.replace("        await ctx.checkpoint", f"{write}        await ctx.checkpoint")
        code = code.replace("import msgspec", "import msgspec\nfrom jobs.kinds import Column", 1)
    kind = tmp_path / "lines_kind.py"
    kind.write_text(code)
    site.env = {"SLUICE_KINDS": str(kind)}
    site.start()
    try:
        job = Lines(site, tmp_path / "steps", 3)
        job.step(1)
        once(site, job.content, lambda answer: answer.body == lines(1))
        job.step(2)
        eventually(lambda: site.job(job.id)["progress"]["done"] == 2, "the second is written")
        assert lines(1, 2) in [blob.read_bytes() for blob in (site.folder / "tmp").iterdir()]
        with reading(site, f"{job.content}?follow=1", Range="bytes=6-") as got:
            assert (got.status, got.take(1)) == (206, b"\n")
            site.post(f"/v1/jobs/{job.id}/pause")  # which saves its cursor
            site.wait_for(job.id, "paused")
            refused(site.get(job.content, Range="bytes=7-"), 503, "not-yet")
            site.post(f"/v1/jobs/{job.id}/resume")
            job.step(3)
            assert got.rest() == (lines(2, 3), True)
    finally:
        site.close()


# Clients that people have


def test_curl_goes_on_with_a_growing_file(site: Server, tus: Tus, tmp_path: Path) -> None:
    """``curl -C -`` takes what is there, then the rest while it comes."""
    curl = need("curl")
    path = half(tus)
    file = tmp_path / "got.bin"
    command = [curl, "-sSfN", "-o", str(file), "-C", "-"]
    url = f"{site.url}{content(path)}"
    subprocess.run([*command, url], check=True, timeout=30)
    assert file.read_bytes() == DATA[:150_000]
    again = subprocess.Popen([*command, f"{url}?follow=1"])
    try:
        tus.patch(path, 150_000, DATA[150_000:250_000])
        eventually(lambda: file.stat().st_size == 250_000, "curl has more")
        tus.patch(path, 250_000, DATA[250_000:])
        assert again.wait(20) == 0
    finally:
        again.kill()
        again.wait()
    assert file.read_bytes() == DATA


def test_curl_follows_to_the_file(site: Server, tus: Tus, tmp_path: Path) -> None:
    """Once it is whole, the address leads to the file, with ranges."""
    curl = need("curl")
    path = tus.whole(DATA)
    file = tmp_path / "got.bin"
    file.write_bytes(DATA[:1000])
    url = f"{site.url}{content(path)}?follow=1"
    subprocess.run([curl, "-sSfL", "-C", "-", "-o", str(file), url], check=True, timeout=30)
    assert file.read_bytes() == DATA
    assert urlsplit(final(site, path)).path.endswith("/content")


def test_a_file_that_is_not_there_yet(site: Server, tus: Tus) -> None:
    """The address of the file itself is unknown until the file is complete."""
    path = half(tus)
    refused(site.get(file_of(site.get(content(path)).headers["Etag"])), 404, "file-unknown")
