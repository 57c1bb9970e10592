"""tus 1.0.0, section by section, as its clients and curl meet it.

What stands in quotes after "tus" is a section of the protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import io
import os
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.web import Application

from config import Config
from server import assembled, make_app, recover
from tests.conftest import Serve
from tests.handlers.clients import UUID7, Raw
from tests.handlers.tus_client import BODY, Tus, at_once, checksum, encoded, repr_digest, where
from tests.harness import Answer, Server, eventually

MAX_BYTES = 64 << 20
OPTIONS = ("--max-upload-bytes", "64MiB")
NOWHERE = "/tus/01a00000-0000-7000-8000-000000000000"


@pytest.fixture
def tus(site: Server) -> Tus:
    """A client of the module's server, whose uploads no other test sees as its own."""
    return Tus(site, uuid4().hex[:12])


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tus]:
    """A client of a server that grants little."""
    server = Server(
        tmp_path_factory.mktemp("strict") / "data",
        *("--quota-bytes", "1MiB", "--max-uploads", "3", "--delete-completed", "refuse"),
        *("--cors-origins", "https://app.example", "--trusted-proxies", "127.0.0.1"),
    )
    yield Tus(server.start(), "strict")
    server.close()


def refused(answer: Answer, status: int, code: str, field: str | None = None) -> None:
    """Check a problem that names the version, and no offset unless that is the point of it."""
    assert answer.status == status, answer
    assert answer.headers["Tus-Resumable"] == "1.0.0"
    assert answer.headers["Content-Type"] == "application/problem+json"
    if answer.body:  # HEAD has none
        assert (answer.json["code"], answer.json["status"]) == (code, status)
    if field is not None:
        assert answer.json["field"] == field
    known = code in ("offset-mismatch", "checksum-mismatch", "upload-unfinished")
    assert ("Upload-Offset" in answer.headers) == known


# What is spoken


@pytest.mark.parametrize("path", ["/tus", "/tus/", NOWHERE])
@pytest.mark.parametrize("version", ["", "1.0.0", "0.2.2"])
def test_options_tell_what_is_spoken(tus: Tus, path: str, version: str) -> None:
    """OPTIONS names version, extensions, limit and checksums whatever is asked (tus "OPTIONS")."""
    answer = tus.ask("OPTIONS", path, Tus_Resumable=version)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["Tus-Version"] == answer.headers["Tus-Resumable"] == "1.0.0"
    assert answer.headers["Tus-Max-Size"] == str(MAX_BYTES)
    assert answer.headers["Tus-Checksum-Algorithm"] == "sha1,sha256,md5,crc32"
    assert set(answer.headers["Tus-Extension"].split(",")) == {
        *("creation", "creation-with-upload", "creation-defer-length", "expiration", "checksum"),
        *("termination", "concatenation", "concatenation-unfinished"),
    }


@pytest.mark.parametrize("method", ["POST", "HEAD", "GET", "PATCH", "DELETE"])
@pytest.mark.parametrize("version", ["0.2.2", "1.0", "2.0.0", "1.0.0, 2.0.0"])
def test_another_version_is_not_processed(tus: Tus, method: str, version: str) -> None:
    """A version that is not spoken is a 412 that names the one that is (tus "Tus-Resumable")."""
    path = tus.new(5)
    before = len(tus.caller.jobs())
    target = "/tus/" if method == "POST" else path
    answer = tus.ask(
        method,
        target,
        b"hello" if method == "PATCH" else None,
        Tus_Resumable=version,
        Upload_Length="5" if method == "POST" else "",
        Upload_Offset="0",
        Content_Type=BODY,
    )
    refused(answer, 412, "tus-version")
    assert answer.headers["Tus-Version"] == "1.0.0"
    assert (tus.offset(path), len(tus.caller.jobs())) == (0, before)


def test_clients_need_not_name_the_version(tus: Tus, site: Server) -> None:
    """A person with curl need not send Tus-Resumable; every answer has it (tus "Tus-Resumable")."""
    answers = [tus.create(5, Tus_Resumable="")]
    path = where(answers[0])
    answers.append(tus.head(path, Tus_Resumable=""))
    answers.append(tus.patch(path, 0, b"hello", Tus_Resumable=""))
    answers.append(tus.ask("GET", path, Tus_Resumable=""))
    answers.append(tus.ask("DELETE", path, Tus_Resumable=""))
    answers.append(tus.ask("PUT", path))
    answers.append(tus.ask("GET", "/tus/"))
    assert [answer.status for answer in answers] == [201, 200, 204, 200, 204, 405, 405]
    assert all(answer.headers["Tus-Resumable"] == "1.0.0" for answer in answers)
    assert answers[3].body == b"hello"


# Creation


@pytest.mark.parametrize("path", ["/tus", "/tus/"])
def test_an_upload_is_created(tus: Tus, path: str) -> None:
    """POST answers 201 with the address of the upload and its time (tus "Creation")."""
    answer = tus.ask("POST", path, Upload_Length=100)
    assert (answer.status, answer.body) == (201, b"")
    location = where(answer)
    assert UUID7.fullmatch(location.removeprefix("/tus/"))
    assert "Upload-Offset" not in answer.headers
    expires = email.utils.parsedate_to_datetime(answer.headers["Upload-Expires"])
    assert expires.timestamp() == pytest.approx(time.time() + 7 * 86_400, abs=60)
    job = tus.job(location)
    assert (job["kind"], job["state"], job["client"]) == ("upload", "running", tus.caller.client)
    assert (job["transfer"]["protocol"], job["progress"]["total"]) == ("tus", 100)


def test_an_empty_upload_is_complete_at_once(tus: Tus) -> None:
    """A length of 0 is a complete upload, and that happens once (tus "Creation")."""
    answer = tus.create(0)
    assert answer.status == 201
    path = where(answer)
    assert "Upload-Expires" not in answer.headers
    assert (tus.offset(path), tus.content(path)) == (0, b"")
    assert tus.patch(path, 0, b"").status == 204
    job_id = path.rpartition("/")[2]
    events = tus.server.get(f"/v1/jobs/{job_id}/events").json["items"]
    assert [event["to"] for event in events].count("succeeded") == 1


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({}, "Upload-Length"),
        ({"Upload_Length": "5", "Upload_Defer_Length": "1"}, "Upload-Length"),
        *(
            ({"Upload_Length": length}, "Upload-Length")
            for length in ("-1", "+5", "1e3", "5x", "5 5", "5,5", "0x5", "1.0", "٣", str(1 << 63))
        ),
        *(({"Upload_Defer_Length": d}, "Upload-Defer-Length") for d in ("0", "2", "true", "1,1")),
    ],
)
def test_a_wrong_length_creates_nothing(tus: Tus, headers: dict[str, Any], field: str) -> None:
    """A length that is missing, doubtful or malformed is a 400 (tus "Creation")."""
    headers = {k: v.encode().decode("latin-1") for k, v in headers.items()}
    refused(tus.create(**headers), 400, "invalid-field", field)
    assert tus.caller.jobs() == []


@pytest.mark.parametrize("length", [MAX_BYTES + 1, (1 << 63) - 1])
def test_an_upload_that_is_too_long_is_not_created(tus: Tus, length: int) -> None:
    """A length over the limit is a 413 that tells the limit (tus "Tus-Max-Size")."""
    answer = tus.create(length)
    refused(answer, 413, "too-large")
    assert answer.headers["Tus-Max-Size"] == str(MAX_BYTES)
    assert tus.caller.jobs() == []


@pytest.mark.parametrize(
    "header",
    [
        "filename ?",
        "filename YQ",
        "filename YQ=",
        "filename YQ==YQ==",
        "filename  YQ==",
        "filename YQ== ",
        "a YQ==,,b YQ==",
        "a YQ==,",
        ",",
        " YQ==",
        "a YQ==,a Yg==",
        "a,a",
        "ä YQ==",
    ],
)
def test_malformed_metadata_creates_nothing(tus: Tus, header: str) -> None:
    """Bad base64 and keys that are empty, odd or doubled are a 400 (tus "Upload-Metadata")."""
    if header != header.strip():  # around a value the server sees no space
        header = f"x YQ==, {header.strip()} YQ==" if header.endswith(" ") else f",{header}"
    answer = tus.create(5, Upload_Metadata=header.encode().decode("latin-1"))
    refused(answer, 400, "invalid-field", "Upload-Metadata")


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        ("a YQ==,b Yg==", "a YQ==,b Yg=="),
        ("a YQ==, b Yg==,  c", "a YQ==,b Yg==,c"),
        ("is_confidential", "is_confidential"),
        ("a ,b Yg==", "a,b Yg=="),
        ("x /v8A", "x /v8A"),
        ("odd;key=!~ YQ==", "odd;key=!~ YQ=="),
    ],
)
def test_metadata_is_returned(tus: Tus, given: str, returned: str) -> None:
    """HEAD returns what was given, whatever bytes it is, without spaces (tus "HEAD")."""
    path = tus.new(5, Upload_Metadata=given)
    assert tus.head(path).headers["Upload-Metadata"] == returned


@pytest.mark.parametrize(
    ("given", "name", "media_type"),
    [
        ({"filename": "a b.txt"}, "a b.txt", "text/plain"),
        ({"name": "ü.png", "type": "image/PNG"}, "ü.png", "image/png"),
        ({"filename": "a.bin", "name": "b.txt", "filetype": "video/mp4"}, "a.bin", "video/mp4"),
        ({"filename": "../../etc/passwd"}, "passwd", "application/octet-stream"),
        ({"filename": "C:\\x\\y.txt", "filetype": "text"}, "y.txt", "text/plain"),
        ({"filename": b"\xfcber.txt", "filetype": b"a/b\r\nX: y"}, "über.txt", "text/plain"),
        ({"filename": "..", "name": "fine.txt"}, "fine.txt", "text/plain"),
        ({"filename": "a.txt", "relativePath": "x/ü y/a.txt"}, "x/ü y/a.txt", "text/plain"),
        ({"filename": "b.txt", "relativePath": "/x//./a.txt"}, "x/b.txt", "text/plain"),
        ({"filename": "a.txt", "relativePath": "null"}, "a.txt", "text/plain"),
        ({"filename": "a.txt", "relativePath": "../x/a.txt"}, "a.txt", "text/plain"),
        ({"filename": "a.txt", "relativePath": "x/" * 600 + "a.txt"}, "a.txt", "text/plain"),
        ({"filename": "../a.txt", "relativePath": "C:\\x/y\0/"}, "x/y/a.txt", "text/plain"),
    ],
)
def test_metadata_names_the_file(
    tus: Tus, given: dict[str, str | bytes], name: str, media_type: str
) -> None:
    """The file gets the name and the type that clients tell; folders only by relativePath."""
    header = ",".join(f"{key} {encoded(value)}" for key, value in given.items())
    path = tus.whole(b"x", Upload_Metadata=header)
    file = tus.file(path)
    assert (file["name"], file["media_type"]) == (name, media_type)
    assert tus.ask("GET", path).headers["Content-Type"] == media_type


def test_folders_are_part_of_the_name_only(tus: Tus) -> None:
    """A file with folders is found by its whole name; what leaves or is made has the last part."""
    header = f"filename {encoded('ü.txt')},relativePath {encoded('one/two/ü.txt')}"
    file = tus.file(tus.whole(b"deep", Upload_Metadata=header))
    found = tus.ask("GET", f"/v1/files/by-name/{quote('one/two/ü.txt', safe='')}")
    assert found.headers["Location"] == f"/v1/files/{file['id']}/content"
    content = tus.ask("GET", found.headers["Location"])
    assert content.body == b"deep"
    assert quote("ü.txt") in content.headers["Content-Disposition"]
    assert "one" not in content.headers["Content-Disposition"]
    made = {}
    for kind, params in (
        ("archive", {"files": ["one/two/ü.txt"]}),
        ("compress", {"file": file["id"]}),
    ):
        started = tus.server.post("/v1/jobs", {"kind": kind, "params": params})
        assert started.status in (200, 201, 202), started
        made[kind] = tus.server.wait_for(started.json["id"], "succeeded")["artifacts"][0]
    assert made["compress"]["name"].startswith("ü.txt.")
    archive = tus.ask("GET", f"/v1/files/{made['archive']['file']}/content").body
    with zipfile.ZipFile(io.BytesIO(archive)) as unpacked:
        assert {i.filename: unpacked.read(i) for i in unpacked.infolist()} == {
            "one/two/ü.txt": b"deep"
        }


@pytest.mark.parametrize("given", ["", "filename", f"filename {encoded('x' * 300)}", "name Li4="])
def test_a_file_without_a_usable_name_gets_one(tus: Tus, given: str) -> None:
    """An upload that names no file is one all the same."""
    assert tus.file(tus.whole(b"x", Upload_Metadata=given))["name"].startswith("upload-")


def test_an_upload_can_come_with_its_creation(tus: Tus) -> None:
    """POST takes the first bytes, or all (tus "Creation With Upload")."""
    answer = tus.create(5, b"hel")
    path = where(answer)
    assert (answer.status, answer.headers["Upload-Offset"]) == (201, "3")
    assert "Upload-Expires" in answer.headers
    assert tus.patch(path, 3, b"lo").headers["Upload-Offset"] == "5"
    assert tus.content(path) == b"hello"

    answer = tus.create(5, b"hello", Upload_Checksum=checksum("sha1", b"hello"))
    assert (answer.status, answer.headers["Upload-Offset"]) == (201, "5")
    assert "Upload-Expires" not in answer.headers
    assert tus.content(where(answer)) == b"hello"

    answer = tus.create("", b"hel", Upload_Defer_Length=1)
    assert (answer.status, answer.headers["Upload-Offset"]) == (201, "3")


@pytest.mark.parametrize("content_type", ["application/octet-stream", "text/plain", BODY + "s"])
def test_a_body_of_another_type_is_not_stored(tus: Tus, content_type: str) -> None:
    """POST stores only what is marked as bytes of the upload (tus "Creation With Upload")."""
    answer = tus.create(5, b"hello", Content_Type=content_type)
    assert (answer.status, answer.headers["Upload-Offset"]) == (201, "0")
    assert tus.offset(where(answer)) == 0


def test_a_creation_that_breaks_off_keeps_what_came(tus: Tus) -> None:
    """The upload is there with the bytes that came; who finds it can go on."""
    with Raw(tus.server) as raw:
        raw.head(
            "POST", "/tus/", **tus.headers(Upload_Length=10, Content_Type=BODY, Content_Length=10)
        )
        raw.send(b"hello")
        path = f"/tus/{tus.caller.job('upload')['id']}"
        tus.received(path, 5)
        raw.cut()
    eventually(lambda: tus.job(path)["reason"] == "client-gone", "the client has gone")
    assert tus.offset(path) == 5
    assert tus.patch(path, 5, b"world").status == 204
    assert tus.content(path) == b"helloworld"


def test_a_creation_whose_bytes_are_wrong_leaves_nothing(tus: Tus) -> None:
    """Nobody knows the address of an upload whose POST was refused: it holds no room."""
    answer = tus.create(5, b"hello", Upload_Checksum=checksum("sha1", b"other"))
    refused(answer, 460, "checksum-mismatch")
    (job,) = tus.caller.jobs()
    assert job["state"] == "failed"
    assert tus.head(f"/tus/{job['id']}").status == 410


def expecting(tus: Tus, method: str, path: str, **headers: Any) -> Answer:
    """The first answer to a request that waits with its body until it is asked for it."""
    with Raw(tus.server) as raw:
        raw.head(method, path, **tus.headers(Expect="100-continue", **headers))
        return raw.answer()


def test_a_body_that_will_be_refused_is_not_asked_for(tus: Tus, strict: Tus) -> None:
    """The final answer comes instead of 100 (tus "Creation With Upload"; RFC 9110 10.1.1)."""
    gib = 1 << 30
    body: dict[str, Any] = {"Content_Type": BODY, "Content_Length": gib}
    path = tus.new(100)
    posts: list[tuple[Tus, dict[str, Any], str]] = [
        (tus, {"Upload_Length": gib}, "too-large"),
        (tus, {"Upload_Length": 5}, "too-large"),
        (tus, {"Upload_Defer_Length": 1}, "too-large"),
        (tus, {"Upload_Length": "x"}, "invalid-field"),
        (tus, {"Upload_Length": 5, "Upload_Metadata": "a ?"}, "invalid-field"),
        (strict, {"Upload_Length": gib}, "quota-exceeded"),
    ]
    for client, headers, code in posts:
        answer = expecting(client, "POST", "/tus/", **body, **headers)
        assert answer.json["code"] == code
    patches: list[tuple[dict[str, Any], str]] = [
        ({"Upload_Offset": 0}, "too-large"),
        ({"Upload_Offset": 5}, "offset-mismatch"),
        ({"Upload_Offset": 0, "Content_Type": "text/plain"}, "media-type-wrong"),
        ({"Upload_Offset": 0, "Upload_Checksum": "x"}, "invalid-field"),
        ({}, "invalid-field"),
    ]
    for headers, code in patches:
        answer = expecting(tus, "PATCH", path, **(body | headers))
        assert answer.json["code"] == code
    assert expecting(tus, "PATCH", NOWHERE, **body, Upload_Offset=0).status == 404
    # What is fine is asked for.
    fine: dict[str, Any] = {"Content_Type": BODY, "Content_Length": 100}
    assert expecting(tus, "PATCH", path, **fine, Upload_Offset=0).status == 100
    assert expecting(tus, "POST", "/tus/", **fine, Upload_Length=100).status == 100


# HEAD


def test_head_tells_where_to_go_on(tus: Tus) -> None:
    """HEAD has offset, length, metadata and time, no content, and is not kept (tus "HEAD")."""
    path = tus.new(10, b"hello", Upload_Metadata="filename YS5iaW4=")
    answer = tus.head(path)
    assert (answer.status, answer.body) == (200, b"")
    shown = {k: v for k, v in answer.headers.items() if k.startswith("Upload-")}
    assert shown.pop("Upload-Expires").endswith(" GMT")
    assert shown == {
        "Upload-Offset": "5",
        "Upload-Length": "10",
        "Upload-Metadata": "filename YS5iaW4=",
    }
    assert answer.headers["Cache-Control"] == "no-store"

    deferred = tus.head(tus.new(Upload_Defer_Length=1)).headers
    assert (deferred["Upload-Offset"], deferred["Upload-Defer-Length"]) == ("0", "1")
    assert not {"Upload-Length", "Upload-Metadata", "Upload-Concat"} & deferred.keys()

    complete = tus.head(tus.whole(b"hello")).headers
    assert (complete["Upload-Offset"], complete["Upload-Length"]) == ("5", "5")
    assert "Upload-Expires" not in complete


@pytest.mark.parametrize("method", ["HEAD", "GET", "PATCH", "DELETE"])
def test_what_is_not_there_is_a_404(tus: Tus, method: str) -> None:
    """Unknown, terminated, and not of this dialect: nothing is there (tus "HEAD")."""
    terminated = tus.new(5, b"hel")
    assert tus.ask("DELETE", terminated).status == 204
    other = tus.caller.block("blocks.bin", 0, b"x")
    assert other.status == 200
    blocks = next(job["id"] for job in tus.caller.jobs() if job["name"] == "blocks.bin")
    for path in (NOWHERE, terminated, f"/tus/{blocks}"):
        body = b"x" if method == "PATCH" else None
        answer = tus.ask(method, path, body, Upload_Offset=3, Content_Type=BODY)
        refused(answer, 404, "upload-unknown")


def test_a_label_grants_nothing_and_takes_nothing(tus: Tus) -> None:
    """Who knows the address can go on: a 403 would let clients forget it and start from zero."""
    path = tus.new(10, b"hello")
    other = Tus(tus.server, "other")
    assert other.offset(path) == 5
    assert other.patch(path, 5, b"world").status == 204
    assert tus.content(path) == b"helloworld"


# PATCH


def test_bytes_are_appended(tus: Tus) -> None:
    """PATCH answers the new offset, and the time while something is missing (tus "PATCH")."""
    data = os.urandom(3 << 20)
    path = tus.new(len(data))
    first = tus.patch(path, 0, data[: 1 << 20])
    assert (first.status, first.body) == (204, b"")
    assert (first.headers["Upload-Offset"], tus.offset(path)) == (str(1 << 20), 1 << 20)
    assert first.headers["Upload-Expires"].endswith(" GMT")
    last = tus.patch(path, 1 << 20, data[1 << 20 :])
    assert (last.status, last.headers["Upload-Offset"]) == (204, str(len(data)))
    assert "Upload-Expires" not in last.headers
    assert tus.content(path) == data
    assert tus.job(path)["state"] == "succeeded"


@pytest.mark.parametrize("offset", [0, 2, 4, 10, 1000])
@pytest.mark.parametrize("n", [0, 3, 1 << 20])
def test_another_offset_changes_nothing(tus: Tus, offset: int, n: int) -> None:
    """An offset below or above is a 409 that tells the true one (tus "PATCH")."""
    path = tus.new(1 << 20, b"hel")
    answer = tus.patch(path, offset, bytes(n))
    refused(answer, 409, "offset-mismatch", "Upload-Offset")
    assert answer.headers["Upload-Offset"] == "3"
    assert tus.offset(path) == 3


def test_a_refused_body_does_not_become_the_next_request(tus: Tus) -> None:
    """After a 409 the connection is closed, so that the bytes go nowhere (RFC 9112 9.6)."""
    path = tus.new(1 << 20, b"hel")
    with Raw(tus.server) as raw:
        head = tus.headers(Upload_Offset=0, Content_Type=BODY, Content_Length=1 << 19)
        raw.head("PATCH", path, **head)
        answer = raw.answer()
        assert (answer.status, answer.headers["Connection"]) == (409, "close")
        with contextlib.suppress(OSError):
            raw.send(f"DELETE {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode() * 1000)
            raw.socket.shutdown(1)
        assert raw.rest() == b""
    assert tus.offset(path) == 3


@pytest.mark.parametrize("offset", ["", "-1", "+0", "x", "0,0", "1.0", "0x0", str(1 << 63)])
def test_a_malformed_offset_is_a_400(tus: Tus, offset: str) -> None:
    """Upload-Offset is a number and must be there (tus "Upload-Offset")."""
    path = tus.new(5)
    refused(tus.patch(path, offset, b"hello"), 400, "invalid-field", "Upload-Offset")
    assert tus.offset(path) == 0


@pytest.mark.parametrize("content_type", ["", "application/octet-stream", "text/plain"])
def test_another_type_is_a_415(tus: Tus, content_type: str) -> None:
    """Only what is marked as bytes of the upload is appended (tus "PATCH")."""
    path = tus.new(5)
    refused(tus.patch(path, 0, b"hello", Content_Type=content_type), 415, "media-type-wrong")
    assert tus.offset(path) == 0
    assert tus.patch(path, 0, b"he", Content_Type=BODY.upper() + "; x=y").status == 204


def test_more_than_the_length_is_refused_before_it_is_read(tus: Tus) -> None:
    """A Content-Length beyond the end is a 413, and nothing of it is stored."""
    path = tus.new(10, b"hello")
    refused(tus.patch(path, 5, b"worlds"), 413, "too-large")
    assert tus.offset(path) == 5
    deferred = tus.new(Upload_Defer_Length=1)
    with Raw(tus.server) as raw:
        head = tus.headers(Upload_Offset=0, Content_Type=BODY, Content_Length=MAX_BYTES + 1)
        raw.head("PATCH", deferred, **head)
        assert raw.answer().status == 413


def test_chunks_beyond_the_length_are_refused(tus: Tus) -> None:
    """Chunked bytes beyond the end are a 413; what is stored stays within the length."""
    path = tus.new(10, b"hello")
    with tus.open(path, 5, b"wor", None) as raw:
        raw.chunk(b"lds and more")
        answer = raw.answer()
        assert (answer.status, answer.headers["Tus-Max-Size"]) == (413, str(MAX_BYTES))
    assert tus.offset(path) == 8
    assert tus.patch(path, 8, b"ld").status == 204
    assert tus.content(path) == b"helloworld"


def test_chunked_bytes_are_appended(tus: Tus) -> None:
    """A PATCH needs no Content-Length (RFC 9112 section 7.1)."""
    path = tus.new(10)
    with tus.open(path, 0, b"hello", None) as raw:
        raw.chunk(b"world")
        raw.chunk(b"")
        answer = raw.answer()
        assert (answer.status, answer.headers["Upload-Offset"]) == (204, "10")
    assert tus.content(path) == b"helloworld"


def test_an_empty_patch_changes_nothing(tus: Tus) -> None:
    """No bytes at the right offset are fine, also while the upload is paused."""
    path = tus.new(10, b"hello")
    answer = tus.patch(path, 5, b"")
    assert (answer.status, answer.headers["Upload-Offset"]) == (204, "5")
    with tus.open(path, 5, b"", None) as raw:
        raw.chunk(b"")
        assert raw.answer().status == 204
    tus.command(path, "pause")
    with at_once():
        assert tus.patch(path, 5, b"").status == 204


def test_the_last_patch_can_be_repeated(tus: Tus, name: str) -> None:
    """At the end of a complete upload the same answer comes again, and nothing else happens."""
    metadata = f"filename {encoded(name)}"
    path = tus.new(5, Upload_Metadata=metadata, Want_Repr_Digest="sha-256=1")
    first = tus.patch(path, 0, b"hello")
    for again in (tus.patch(path, 5, b""), tus.patch(path, 5, b"", Upload_Length=5)):
        for header in ("Upload-Offset", "Repr-Digest"):
            assert again.headers[header] == first.headers[header]
        assert again.status == first.status == 204
    with tus.open(path, 5, b"", None) as raw:
        raw.chunk(b"")
        assert raw.answer().status == 204
    assert len(tus.caller.versions(name)) == 1
    refused(tus.patch(path, 0, b"hello"), 409, "offset-mismatch")
    refused(tus.patch(path, 5, b"x"), 413, "too-large")
    with Raw(tus.server) as raw:
        head = tus.headers(Upload_Offset=5, Content_Type=BODY, Transfer_Encoding="chunked")
        raw.head("PATCH", path, **head)
        raw.chunk(b"x")
        assert raw.answer().status == 413
    assert tus.content(path) == b"hello"


def test_a_deferred_length_is_bound_once(tus: Tus) -> None:
    """PATCH tells the length; it can't be changed nor be too short (tus "Upload-Defer-Length")."""
    path = tus.new(Upload_Defer_Length=1)
    assert tus.patch(path, 0, b"hel").status == 204
    assert "Upload-Length" not in tus.head(path).headers
    refused(tus.patch(path, 3, b"", Upload_Length=2), 400, "invalid-field")
    refused(tus.patch(path, 3, b"", Upload_Length="x"), 400, "invalid-field")
    answer = tus.patch(path, 3, b"", Upload_Length=MAX_BYTES + 1)
    refused(answer, 413, "too-large")
    assert answer.headers["Tus-Max-Size"] == str(MAX_BYTES)
    refused(tus.patch(path, 3, b"lo!", Upload_Length=5), 413, "too-large")
    assert tus.patch(path, 3, b"l", Upload_Length=5).status == 204
    head = tus.head(path).headers
    assert (head["Upload-Length"], "Upload-Defer-Length" in head) == ("5", False)
    refused(tus.patch(path, 4, b"o", Upload_Length=6), 400, "invalid-field")
    assert tus.patch(path, 4, b"o", Upload_Length=5).status == 204
    assert tus.content(path) == b"hello"


def test_an_upload_is_complete_when_its_length_is_told_at_the_end(tus: Tus) -> None:
    """A sender that learns only at the end that there is no more says so by an empty PATCH."""
    path = tus.new("", b"hello", Upload_Defer_Length=1)
    answer = tus.patch(path, 5, b"", Upload_Length=5)
    assert (answer.status, answer.headers["Upload-Offset"]) == (204, "5")
    assert tus.content(path) == b"hello"


# Checksums


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "md5", "crc32"])
def test_bytes_with_their_checksum_are_appended(tus: Tus, algorithm: str) -> None:
    """Each checksum that is offered is verified; wrong bytes do not count (tus "Checksum")."""
    data = os.urandom(100_000)
    path = tus.new(len(data))
    half = len(data) // 2
    fine = checksum(algorithm, data[:half])
    assert tus.patch(path, 0, data[:half], Upload_Checksum=fine).status == 204
    answer = tus.patch(path, half, data[half:], Upload_Checksum=fine)
    refused(answer, 460, "checksum-mismatch")
    assert answer.headers["Upload-Offset"] == str(half)
    assert tus.offset(path) == half
    rest = checksum(algorithm, data[half:])
    assert tus.patch(path, half, data[half:], Upload_Checksum=rest).status == 204
    assert tus.content(path) == data


@pytest.mark.parametrize(
    "given",
    [
        "sha1",
        "sha1 ",
        "sha1 ?",
        "sha1 YQ==",
        "sha512 YQ==",
        "SHA1 qvTGHdzF6KLavt4PO0gs2a6pQ00=",
        "=",
        "sha1  qvTGHdzF6KLavt4PO0gs2a6pQ00=",
    ],
)
def test_a_malformed_checksum_is_a_400(tus: Tus, given: str) -> None:
    """An algorithm or a value that is none keeps the offset (tus "Checksum")."""
    path = tus.new(5)
    refused(tus.patch(path, 0, b"hello", Upload_Checksum=given), 400, "invalid-field")
    assert tus.offset(path) == 0


def test_bytes_whose_checksum_was_not_seen_do_not_count(tus: Tus) -> None:
    """A connection that breaks before the last byte leaves nothing behind (tus "Checksum")."""
    path = tus.new(10, b"hello")
    with tus.open(path, 5, b"wor", 5, Upload_Checksum=checksum("sha1", b"world")) as raw:
        assert tus.job(path)["transfer"]["stored_bytes"] == 5
        raw.cut()
    eventually(lambda: tus.job(path)["reason"] == "client-gone", "the client has gone")
    assert tus.offset(path) == 5
    assert tus.patch(path, 5, b"world").status == 204
    assert tus.content(path) == b"helloworld"


def test_a_takeover_drops_bytes_whose_checksum_was_not_seen(tus: Tus) -> None:
    """HEAD during a PATCH with a checksum tells the offset before it."""
    path = tus.new(10, b"hello")
    with tus.open(path, 5, b"wor", 5, Upload_Checksum=checksum("md5", b"world")), at_once():
        assert tus.offset(path) == 5


# Interruptions


def test_received_bytes_outlive_their_connection(tus: Tus) -> None:
    """What came before the connection broke is kept (tus "PATCH")."""
    data = os.urandom(2 << 20)
    path = tus.new(len(data))
    with tus.open(path, 0, data[: 1 << 20], len(data)) as raw:
        raw.cut()
    assert tus.offset(path) == 1 << 20
    assert tus.patch(path, 1 << 20, data[1 << 20 :]).status == 204
    assert tus.content(path) == data


def test_head_takes_an_open_upload_over(tus: Tus) -> None:
    """HEAD ends a stalled PATCH at once, and its offset holds for the next one (tus "HEAD")."""
    data = os.urandom(1 << 20)
    path = tus.new(len(data))
    with tus.open(path, 0, data[:70_000], len(data)) as raw:
        with at_once():
            answer = tus.head(path)
        assert (answer.status, answer.headers["Upload-Offset"]) == (200, "70000")
        ousted = raw.answer()
        refused(ousted, 409, "upload-taken-over")
        with contextlib.suppress(OSError):
            raw.send(bytes(50_000))  # come too late
        assert tus.patch(path, 70_000, data[70_000:]).status == 204
    assert tus.content(path) == data


def test_patch_takes_an_open_upload_over(tus: Tus) -> None:
    """A newer PATCH ends the stalled one; the bytes of both count, none of them twice."""
    data = os.urandom(1 << 20)
    path = tus.new(len(data))
    with tus.open(path, 0, data[:70_000], len(data)) as raw:
        with at_once():
            answer = tus.patch(path, 70_000, data[70_000:])
        assert (answer.status, answer.headers["Upload-Offset"]) == (204, str(len(data)))
        refused(raw.answer(), 409, "upload-taken-over")
        with contextlib.suppress(OSError):
            raw.send(bytes(50_000))
    assert tus.content(path) == data


def test_a_patch_at_a_wrong_offset_learns_where_the_open_one_stands(tus: Tus) -> None:
    """A late one, whose bytes are stored, disturbs nobody; after one that is ahead 409 is true."""
    path = tus.new(10)
    with tus.open(path, 0, b"hello", 10) as raw:
        with at_once():
            late = tus.patch(path, 0, b"helloworld")
        assert (late.status, late.headers["Upload-Offset"]) == (409, "5")
        assert tus.job(path)["transfer"]["connected"]
        with at_once():
            ahead = tus.patch(path, 6, b"orld")
        refused(raw.answer(), 409, "upload-taken-over")  # it can't move the offset any more
    assert (ahead.status, ahead.headers["Upload-Offset"]) == (409, "5")
    assert tus.patch(path, 5, b"world").status == 204
    assert tus.content(path) == b"helloworld"


def test_delete_ends_an_open_upload(tus: Tus) -> None:
    """DELETE during a PATCH is done at once, with its bytes; its sender is not to come back."""
    before = tus.caller.temporary()
    path = tus.new(1 << 20)
    with tus.open(path, 0, bytes(70_000), 1 << 20) as raw:
        assert len(tus.caller.temporary() - before) == 1
        with at_once():
            assert tus.ask("DELETE", path).status == 204
        assert tus.caller.temporary() <= before
        refused(raw.answer(), 410, "upload-terminated")
    assert tus.job(path)["state"] == "cancelled"


def test_get_disturbs_nobody(tus: Tus) -> None:
    """To look at an unfinished upload ends no PATCH; what is stored so far is the answer."""
    path = tus.new(10)
    with tus.open(path, 0, b"hello", 10) as raw:
        eventually(lambda: tus.ask("GET", path).body == b"hello", "it is stored")
        tus.ask("OPTIONS", path)
        raw.send(b"world")
        assert raw.answer().status == 204


def test_an_upload_cancelled_from_elsewhere_is_not_tried_again(tus: Tus) -> None:
    """Who cancels the job ends the PATCH by a 410; after it nothing is there."""
    path = tus.new(10)
    with tus.open(path, 0, b"hello", 10) as raw:
        tus.command(path, "cancel")
        refused(raw.answer(), 410, "upload-terminated")
    refused(tus.head(path), 404, "upload-unknown")


def test_a_paused_upload_goes_on_when_it_is_resumed(tus: Tus) -> None:
    """Paused and resumed over /v1/jobs, one PATCH delivers all of it."""
    path = tus.new(10)
    with tus.open(path, 0, b"hello", 10) as raw:
        tus.command(path, "pause")
        raw.send(b"world")
        time.sleep(0.3)  # in which nothing is taken
        transfer = tus.job(path)["transfer"]
        assert (transfer["stored_bytes"], transfer["connected"]) == (5, True)
        tus.command(path, "resume")
        assert raw.answer().status == 204
    assert tus.content(path) == b"helloworld"


def test_a_paused_upload_tells_its_offset_at_once(tus: Tus) -> None:
    """HEAD needs no resume; the next PATCH is held again until there is one."""
    path = tus.new(10)
    with tus.open(path, 0, b"hello", 10) as raw:
        tus.command(path, "pause")
        with at_once():
            assert tus.offset(path) == 5
        refused(raw.answer(), 409, "upload-taken-over")
    with Raw(tus.server) as raw:
        head = tus.headers(Upload_Offset=5, Content_Type=BODY, Content_Length=5)
        raw.head("PATCH", path, **head)
        raw.send(b"world")
        eventually(lambda: tus.job(path)["transfer"]["connected"], "the PATCH is held")
        job = tus.job(path)
        assert (job["state"], job["transfer"]["stored_bytes"]) == ("paused", 5)
        tus.command(path, "resume")
        assert raw.answer().status == 204
    assert tus.content(path) == b"helloworld"


def test_all_bytes_are_here_is_not_complete(tus: Tus) -> None:
    """While an upload is being finished it is 423 and to be asked again, never a success."""
    path = tus.new("", b"hello", Upload_Defer_Length=1)
    tus.command(path, "pause")
    with at_once():
        last = tus.patch(path, 5, b"", Upload_Length=5)
    with at_once():
        head = tus.head(path)
    with at_once():
        again = tus.patch(path, 5, b"")
    for answer in (last, head, again):
        refused(answer, 423, "upload-finishing")
        assert int(answer.headers["Retry-After"]) >= 1
    tus.command(path, "resume")
    assert (tus.offset(path), tus.content(path)) == (5, b"hello")


def test_a_kill_keeps_the_offset(serve: Serve) -> None:
    """After kill -9 the upload goes on from what was acknowledged, and not before it."""
    server = serve()
    tus = Tus(server, "kill")
    data = os.urandom(1 << 20)
    path = tus.new(len(data), Upload_Metadata="filename YS5iaW4=")
    assert tus.patch(path, 0, data[:300_000]).status == 204
    server.kill()
    server.start()
    head = tus.head(path).headers
    assert (head["Upload-Offset"], head["Upload-Length"]) == ("300000", str(len(data)))
    assert head["Upload-Metadata"] == "filename YS5iaW4="
    assert tus.patch(path, 300_000, data[300_000:]).status == 204
    assert tus.content(path) == data
    server.kill()
    server.start()
    assert (tus.offset(path), tus.content(path)) == (len(data), data)


# X-HTTP-Method-Override


def test_post_may_stand_for_the_other_methods(tus: Tus) -> None:
    """Clients that can only POST name the method they mean (tus "X-HTTP-Method-Override")."""
    path = tus.new(5)
    meant = {"Upload_Offset": 0, "Content_Type": BODY}
    answer = tus.ask("POST", path, b"hel", X_HTTP_Method_Override="PATCH", **meant)
    assert (answer.status, answer.headers["Upload-Offset"]) == (204, "3")
    answer = tus.ask("POST", path, X_HTTP_Method_Override="HEAD")
    assert (answer.status, answer.headers["Upload-Offset"], answer.body) == (200, "3", b"")
    assert tus.ask("POST", path, X_HTTP_Method_Override="DELETE").status == 204
    assert tus.head(path).status == 404
    assert tus.ask("POST", path).status == 405


# Termination


def test_an_upload_can_be_terminated(tus: Tus) -> None:
    """DELETE frees what came; the upload is gone then (tus "Termination")."""
    path = tus.new(10, b"hello")
    answer = tus.ask("DELETE", path)
    assert (answer.status, answer.body) == (204, b"")
    refused(tus.ask("DELETE", path), 404, "upload-unknown")
    refused(tus.ask("GET", path), 404, "upload-unknown")
    assert tus.job(path)["state"] == "cancelled"


def test_a_paused_upload_can_be_terminated(tus: Tus) -> None:
    """DELETE needs no resume."""
    path = tus.new(10, b"hello")
    tus.command(path, "pause")
    with at_once():
        assert tus.ask("DELETE", path).status == 204
    assert tus.job(path)["state"] == "cancelled"
    assert tus.head(path).status == 404


def test_a_complete_upload_can_be_deleted(tus: Tus) -> None:
    """DELETE of a complete upload removes its file, and its address with it."""
    path = tus.whole(b"hello")
    file_id = tus.file(path)["id"]
    assert tus.ask("DELETE", path).status == 204
    assert tus.server.get(f"/v1/files/{file_id}").status == 404
    for method in ("GET", "HEAD", "DELETE"):
        refused(tus.ask(method, path), 404, "upload-unknown")


def test_a_file_deleted_elsewhere_takes_its_upload_along(tus: Tus) -> None:
    """An upload whose file is gone is not there: its client would believe that it is stored."""
    path = tus.whole(b"hello")
    assert tus.server.delete(f"/v1/files/{tus.file(path)['id']}").status == 204
    refused(tus.head(path), 404, "upload-unknown")


def test_complete_uploads_can_be_kept(strict: Tus) -> None:
    """With delete_completed = refuse a DELETE is a 403; unfinished uploads are not kept."""
    path = strict.whole(b"hello")
    refused(strict.ask("DELETE", path), 403, "upload-kept")
    assert strict.content(path) == b"hello"
    assert strict.ask("DELETE", strict.new(5)).status == 204


# GET


def test_a_complete_upload_can_be_read(tus: Tus) -> None:
    """GET gives the file under its name, with ranges and a validator (RFC 9110 section 14)."""
    path = tus.whole(bytes(range(256)), Upload_Metadata=f"filename {encoded('b.bin')}")
    answer = tus.ask("GET", path)
    assert (answer.status, answer.body) == (200, bytes(range(256)))
    assert 'filename="b.bin"' in answer.headers["Content-Disposition"]
    etag = answer.headers["Etag"]
    part = tus.ask("GET", path, Range="bytes=10-19")
    assert (part.status, part.body) == (206, bytes(range(10, 20)))
    assert part.headers["Content-Range"] == "bytes 10-19/256"
    assert tus.ask("GET", path, If_None_Match=etag).status == 304
    beyond = tus.ask("GET", path, Range="bytes=256-")
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, "bytes */256")


# Digests


def test_the_digest_of_the_whole_is_told(tus: Tus) -> None:
    """Who wants a digest gets it with the last PATCH, HEAD and the file (RFC 9530)."""
    path = tus.new(10, Want_Repr_Digest="sha-256=10")
    assert "Repr-Digest" not in tus.patch(path, 0, b"hello").headers
    last = tus.patch(path, 5, b"world")
    assert last.headers["Repr-Digest"] == repr_digest(b"helloworld")
    assert tus.head(path).headers["Repr-Digest"] == repr_digest(b"helloworld")
    file = tus.ask("GET", path).headers
    assert file["Repr-Digest"] == repr_digest(b"helloworld")
    assert file["Digest"] == "SHA-256=" + repr_digest(b"helloworld")[9:-1]

    path = tus.new(5)
    last = tus.patch(path, 0, b"hello", Want_Repr_Digest="sha-512=1")
    assert last.headers["Repr-Digest"] == repr_digest(b"hello")
    assert "Repr-Digest" not in tus.head(tus.whole(b"hello")).headers


def test_a_wrong_digest_is_a_failure_that_is_not_tried_again(tus: Tus, name: str) -> None:
    """An upload with another digest than was told fails, and HEAD says so (RFC 9530)."""
    metadata = f"filename {encoded(name)}"
    path = tus.new(5, Repr_Digest=repr_digest(b"hullo"), Upload_Metadata=metadata)
    refused(tus.patch(path, 0, b"hello"), 410, "digest-mismatch")
    for method in ("HEAD", "GET", "DELETE"):
        refused(tus.ask(method, path), 410, "digest-mismatch")
    refused(tus.patch(path, 5, b""), 410, "digest-mismatch")
    assert tus.caller.versions(name) == []

    path = tus.new(5, Upload_Metadata=metadata)
    answer = tus.patch(path, 0, b"hello", Repr_Digest=repr_digest(b"hello"))
    assert answer.headers["Repr-Digest"] == repr_digest(b"hello")


# Concatenation


def parts_of(tus: Tus, *pieces: bytes) -> list[str]:
    """Complete partial uploads."""
    return [tus.whole(piece, Upload_Concat="partial") for piece in pieces]


def joined(tus: Tus, *paths: str, **headers: Any) -> Answer:
    """Ask for the whole of partial uploads."""
    return tus.create(Upload_Concat=f"final;{' '.join(paths)}", **headers)


def test_a_partial_upload_is_not_published(tus: Tus, name: str) -> None:
    """HEAD tells what it is; no file appears (tus "Concatenation")."""
    given = {"Upload_Concat": "partial", "Upload_Metadata": f"filename {encoded(name)}"}
    path = tus.whole(b"hello", **given)
    head = tus.head(path).headers
    assert (head["Upload-Concat"], head["Upload-Offset"]) == ("partial", "5")
    assert tus.caller.versions(name) == []
    assert tus.patch(path, 5, b"").status == 204
    refused(tus.ask("GET", path), 404, "content-unknown")
    assert tus.ask("DELETE", path).status == 204
    assert tus.head(path).status == 404


def test_partial_uploads_become_one(tus: Tus, name: str) -> None:
    """The whole has the bytes of its parts in their order (tus "Concatenation")."""
    first, second = parts_of(tus, b"hello ", b"world")
    given = {"Upload_Metadata": f"filename {encoded(name)}", "Want_Repr_Digest": "sha-256=1"}
    answer = joined(tus, first, second, first, **given)
    assert (answer.status, answer.headers["Upload-Offset"]) == (201, "17")
    assert answer.headers["Repr-Digest"] == repr_digest(b"hello worldhello ")
    whole = where(answer)
    head = tus.head(whole).headers
    assert (head["Upload-Offset"], head["Upload-Length"]) == ("17", "17")
    assert head["Upload-Concat"] == f"final;{first} {second} {first}"
    assert tus.content(whole) == b"hello worldhello "
    assert len(tus.caller.versions(name)) == 1
    refused(tus.patch(whole, 17, b""), 403, "upload-joined")
    # The parts were used up: they stay to be asked, but their bytes are in the whole.
    assert (tus.offset(first), tus.offset(second)) == (6, 5)
    assert tus.ask("GET", first).status == 404
    assert tus.ask("DELETE", first).status == 204
    assert tus.head(first).status == 404
    assert tus.content(whole) == b"hello worldhello "


def test_parts_are_named_in_any_way_that_is_ours(tus: Tus) -> None:
    """Addresses are absolute or not, with our own host (tus "Upload-Concat")."""
    url = tus.server.url
    first, second, third = parts_of(tus, b"a", b"b", b"c")
    other = f"//127.0.0.1:{tus.server.port}{third}"
    answer = joined(tus, url + first, second, other)
    assert tus.content(where(answer)) == b"abc"


def test_addresses_have_the_prefix_of_a_proxy(strict: Tus) -> None:
    """Behind a proxy that shows the service under a path, addresses are those that it shows."""
    seen = {"X_Forwarded_Prefix": "/files", "X_Forwarded_Host": "127.0.0.1"}
    plain = strict.ask("POST", "/tus", Upload_Length=1, **seen).headers["Location"]
    assert plain.startswith("/files/tus/")
    strict.ask("DELETE", plain.removeprefix("/files"))
    created = strict.create(1, b"a", Upload_Concat="partial", **seen).headers["Location"]
    assert "/" not in created  # so it is right under any path
    answer = joined(strict, f"http://127.0.0.1/files/tus/{created}", **seen)
    assert answer.status == 201
    strict.server.delete(f"/v1/files/{strict.file(where(answer))['id']}")


def test_the_same_request_gives_the_same_whole(tus: Tus) -> None:
    """A concatenation that is repeated, before or after its end, makes nothing new."""
    first = tus.new(3, b"a", Upload_Concat="partial")
    (second,) = parts_of(tus, b"xyz")
    answers = [joined(tus, first, second), joined(tus, first, tus.server.url + second)]
    assert tus.patch(first, 1, b"bc").status == 204
    whole = where(answers[0])
    eventually(lambda: tus.job(whole)["state"] == "succeeded", "the whole is complete")
    answers += [joined(tus, first, second)]
    assert [answer.status for answer in answers] == [201, 201, 201]
    assert {where(answer) for answer in answers} == {whole}
    assert tus.content(whole) == b"abcxyz"
    # In another order it is another whole, and the parts are used up.
    refused(joined(tus, second, first), 400, "invalid-field", "Upload-Concat")
    tus.ask("DELETE", whole)
    refused(joined(tus, first, second), 404, "upload-unknown")


def test_a_whole_waits_for_its_parts(tus: Tus) -> None:
    """Parts may be unfinished: no offset until they are joined (tus "Concatenation")."""
    first = tus.new(3, b"a", Upload_Concat="partial")
    second = tus.new(Upload_Concat="partial", Upload_Defer_Length=1)
    answer = joined(tus, first, second)
    assert (answer.status, "Upload-Offset" in answer.headers) == (201, False)
    whole = where(answer)
    with at_once():
        head = tus.head(whole)
    assert head.status == 200
    assert not {"Upload-Offset", "Upload-Length", "Upload-Defer-Length"} & head.headers.keys()
    assert head.headers["Upload-Concat"] == f"final;{first} {second}"
    refused(tus.patch(whole, 0, b""), 403, "upload-joined")
    unfinished = tus.ask("GET", whole)
    refused(unfinished, 503, "not-yet")
    assert tus.patch(second, 0, b"xyz", Upload_Length=3).status == 204
    head = tus.head(whole)
    assert (head.headers["Upload-Length"], "Upload-Offset" in head.headers) == ("6", False)
    assert tus.patch(first, 1, b"bc").status == 204
    eventually(lambda: tus.job(whole)["state"] == "succeeded", "the whole completes by itself")
    assert (tus.offset(whole), tus.content(whole)) == (6, b"abcxyz")


def test_a_whole_without_one_of_its_parts_fails(tus: Tus) -> None:
    """When a part is terminated nobody waits for the whole any more."""
    first, (second,) = tus.new(3, Upload_Concat="partial"), parts_of(tus, b"xyz")
    whole = where(joined(tus, first, second))
    assert tus.ask("DELETE", first).status == 204
    eventually(lambda: tus.job(whole)["state"] == "failed", "the whole fails")
    refused(tus.head(whole), 410, "upload-gone")
    assert joined(tus, second).status == 201  # what is left can be used otherwise


def test_what_can_not_be_joined_is_refused(tus: Tus) -> None:
    """Unknown, foreign and other uploads are no parts (tus "Upload-Concat")."""
    (part,) = parts_of(tus, b"hello")
    final = where(joined(tus, *parts_of(tus, b"x")))
    ended = tus.new(5, Upload_Concat="partial")
    tus.ask("DELETE", ended)
    whole, unfinished = tus.whole(b"hello"), tus.new(5)
    waiting = where(joined(tus, tus.new(5, Upload_Concat="partial")))
    for bad in (
        *("http://foreign.example" + part, f"ftp://127.0.0.1:{tus.server.port}{part}"),
        *(f"/tus/../tus{part.removeprefix('/tus')}", f"/x{part}", part + "?a=b", part + "#a"),
        *("http://[", "/tus/", part.replace("-", "%2d")),
        *(final, waiting, ended, whole, unfinished),
    ):
        refused(joined(tus, part, bad), 400, "invalid-field", "Upload-Concat")
    for unknown in (NOWHERE, "x"):
        refused(joined(tus, part, unknown), 404, "upload-unknown")
    refused(joined(tus), 400, "invalid-field", "Upload-Concat")
    refused(joined(tus, part, Upload_Length=5), 400, "invalid-field")
    refused(joined(tus, part, Upload_Defer_Length=1), 400, "invalid-field")
    refused(joined(tus, part, body=b"x"), 400, "invalid-field")
    for concat in ("final", "finale;" + part, "partial;" + part, "Partial", "x"):
        refused(tus.create(5, Upload_Concat=concat), 400, "invalid-field")


def test_parts_are_named_as_their_address_was_told(tus: Tus) -> None:
    """A relative address counts from where the request is sent (tus "Upload-Concat")."""
    told = tus.create(5, b"hello", Upload_Concat="partial").headers["Location"]
    assert tus.content(where(joined(tus, told, told))) == b"hellohello"


def test_a_whole_that_is_too_long_is_refused(tus: Tus) -> None:
    """The sum of the parts is a length like any other (tus "Tus-Max-Size")."""
    parts = [tus.new(MAX_BYTES // 2 + n, Upload_Concat="partial") for n in (0, 1)]
    answer = joined(tus, *parts)
    refused(answer, 413, "too-large")
    assert answer.headers["Tus-Max-Size"] == str(MAX_BYTES)


# Room, overload, other sites


def test_a_quota_is_kept(strict: Tus) -> None:
    """What the owner may not store is refused before and amid its bytes, and the rest is kept."""
    refused(strict.create(2 << 20), 413, "quota-exceeded")
    path = strict.new(Upload_Defer_Length=1)
    pieces = (bytes(1 << 18) for _ in range(8))
    answer = strict.patch(path, 0, pieces)  # type: ignore[arg-type]
    refused(answer, 413, "quota-exceeded")
    at = strict.offset(path)
    assert 0 < at <= 1 << 20
    assert strict.ask("DELETE", path).status == 204


def test_a_whole_counts_once(strict: Tus) -> None:
    """Parts that fill the quota can be joined: they stand for the whole until it is there."""
    halves = [os.urandom(500 << 10) for _ in range(2)]
    answer = joined(strict, *parts_of(strict, *halves))
    assert answer.status == 201
    path = where(answer)
    assert strict.content(path) == b"".join(halves)
    assert strict.server.delete(f"/v1/files/{strict.file(path)['id']}").status == 204

    part = strict.new(600 << 10, Upload_Concat="partial")
    whole = where(joined(strict, part))
    other = strict.new(300 << 10)  # fits beside the part, and would not beside both
    assert [strict.ask("DELETE", path).status for path in (whole, part, other)] == [204] * 3


def test_too_many_uploads_are_told_to_wait(strict: Tus) -> None:
    """One more than is allowed is a 429 with a time, which lets clients hold their queue."""
    paths = [strict.new(5) for _ in range(3)]
    answer = strict.create(5)
    refused(answer, 429, "too-many-uploads")
    assert int(answer.headers["Retry-After"]) >= 1
    assert [strict.ask("DELETE", path).status for path in paths] == [204] * 3
    assert strict.ask("DELETE", strict.new(5)).status == 204


def test_pages_of_other_sites(strict: Tus) -> None:
    """An allowed page may send and read what tus needs; another one gets no grant (Fetch 3.2)."""
    asked = {
        "Access_Control_Request_Method": "PATCH",
        "Access_Control_Request_Headers": "tus-resumable,upload-offset,content-type",
    }
    answer = strict.ask("OPTIONS", NOWHERE, Origin="https://app.example", **asked)
    assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert {"PATCH", "HEAD", "DELETE"} <= set(
        answer.headers["Access-Control-Allow-Methods"].split(", ")
    )
    may = {name.lower() for name in answer.headers["Access-Control-Allow-Headers"].split(", ")}
    assert may >= {
        *("tus-resumable", "upload-length", "upload-offset", "upload-metadata", "upload-concat"),
        *("upload-defer-length", "upload-checksum", "content-type", "x-http-method-override"),
    }
    created = strict.create(5, Origin="https://app.example")
    shown = created.headers["Access-Control-Expose-Headers"]
    assert {"Location", "Upload-Offset", "Upload-Length"} <= set(shown.split(", "))
    strict.ask("DELETE", where(created))
    for method in ("OPTIONS", "POST"):
        answer = strict.ask(method, "/tus/", Origin="https://evil.example", **asked)
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert "Origin" in answer.headers["Vary"]
    assert answer.status == 403


# The same service in this process, where its disk and its clock can be bent


@pytest.fixture
def app(io_loop: IOLoop, tmp_path: Path) -> Iterator[Application]:
    """The service in this process."""
    opened = assembled(Config(data=tmp_path / "data", upload_expires_s=0.001))
    parts = io_loop.run_sync(opened.__aenter__)
    io_loop.run_sync(lambda: recover(parts))
    app = make_app(parts.services)
    app.settings["parts"] = parts
    yield app
    io_loop.run_sync(lambda: parts.services.manager.close(5))
    io_loop.run_sync(lambda: opened.__aexit__(None, None, None))


class Near:
    """A tus client on the loop of the service."""

    def __init__(self, client: AsyncHTTPClient, url: str) -> None:
        self._client = client
        self._url = url

    async def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: Any
    ) -> HTTPResponse:
        """One request."""
        named = {"Tus-Resumable": "1.0.0"} | {
            k.replace("_", "-"): str(v) for k, v in headers.items()
        }
        if method in ("POST", "PATCH"):
            body = body or b""
        return await self._client.fetch(
            self._url + path, method=method, body=body, headers=named, raise_error=False
        )


@pytest.fixture
def near(http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str) -> Near:
    """A client of the service in this process."""
    return Near(http_client, base_url)


@pytest.mark.gen_test
async def test_an_upload_left_alone_is_gone(app: Application, near: Near) -> None:
    """An upload whose time is over is a 410 and nothing else (tus "Expiration")."""
    path = where(await near.ask("POST", "/tus/", Upload_Length=5))
    await asyncio.sleep(0.01)
    assert await app.settings["parts"].services.uploads.expire() == 1
    for method in ("HEAD", "GET", "PATCH", "DELETE"):
        body = b"hello" if method == "PATCH" else None
        answer = await near.ask(method, path, body, Upload_Offset=0, Content_Type=BODY)
        assert (answer.code, "Upload-Offset" in answer.headers) == (410, False)


@pytest.mark.gen_test
async def test_a_full_disk_is_told_and_keeps_what_is_stored(
    app: Application, near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    """507 before or amid the bytes, without a path; with room it goes on (RFC 4918 11.5)."""
    blobs, room = app.settings["parts"].blobs, [1 << 40]

    async def free_bytes() -> int:
        return room.pop() if len(room) > 1 else room[0]

    monkeypatch.setattr(blobs, "free_bytes", free_bytes)
    room[:] = [20 << 20]
    answer = await near.ask("POST", "/tus/", Upload_Length=5 << 20)
    assert answer.code == 507
    data = os.urandom(3 << 20)
    room[:] = [1 << 40]
    path = where(await near.ask("POST", "/tus/", Upload_Length=len(data)))
    room[:] = [0, 1 << 40]  # enough for the first look, not for the second
    sent = {"Content_Type": BODY}
    answer = await near.ask("PATCH", path, data, Upload_Offset=0, **sent)
    assert (answer.code, b"/data" in answer.body) == (507, False)
    room[:] = [1 << 40]
    at = int((await near.ask("HEAD", path)).headers["Upload-Offset"])
    assert 0 < at < len(data)
    answer = await near.ask("PATCH", path, data[at:], Upload_Offset=at, **sent)
    assert answer.code == 204
    assert (await near.ask("GET", path)).body == data


@pytest.mark.gen_test
async def test_requests_at_once_give_one_whole(near: Near) -> None:
    """A client that asks again while it is being answered makes nothing new."""
    part = (await near.ask("POST", "/tus/", Upload_Length=3, Upload_Concat="partial")).headers
    again = [near.ask("POST", "/tus/", Upload_Concat=f"final;{part['Location']}") for _ in range(8)]
    answers = await asyncio.gather(*again)
    assert {answer.code for answer in answers} == {201}
    assert len({where(answer) for answer in answers}) == 1


@pytest.mark.gen_test
@pytest.mark.parametrize("phase", ["starting", "stopping"])
async def test_a_service_that_starts_or_stops_makes_nobody_start_anew(
    app: Application, near: Near, phase: str
) -> None:
    """HEAD is then a 423, after which alone tus-js-client keeps an upload (tus "HEAD")."""
    path = where(await near.ask("POST", "/tus/", Upload_Length=5))
    life = app.settings["services"].life
    life.ready = phase != "starting"
    life.stopping = phase == "stopping"
    head = await near.ask("HEAD", path)
    patch = await near.ask("PATCH", path, b"hello", Upload_Offset=0, Content_Type=BODY)
    life.ready, life.stopping = True, False
    assert (head.code, patch.code) == (423 if phase == "starting" else 200, 503)
    assert int((await near.ask("HEAD", path)).headers["Upload-Offset"]) == 0
