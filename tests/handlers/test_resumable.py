"""Resumable uploads of the IETF, version by version, as their clients and a bare socket meet them.

Sections are those of the newest draft (draft-ietf-httpbis-resumable-upload, editor's copy of July
2026); where an older one wants something else, its number is named.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import http_sf
import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.web import Application

from config import Config
from errors import SluiceError
from handlers import resumable
from jobs import Job
from server import assembled, make_app, recover
from tests.conftest import Serve, need
from tests.handlers.clients import Caller, Raw
from tests.handlers.tus_client import at_once
from tests.harness import ROOT, Answer, Server, eventually

OPTIONS = ("--max-upload-bytes", "64MiB")
MAX_BYTES = 64 << 20
VERSIONS = (5, 6, 7, 8, None)
PATH = re.compile(r"/resumable/[0-9a-f-]{36}")
FILE = re.compile(r"/v1/files/[0-9a-f-]{36}")
NOWHERE = "/resumable/01a00000-0000-7000-8000-000000000000"
PARTIAL = "application/partial-upload"
PROBLEMS = "https://iana.org/assignments/http-problem-types#"
MISMATCH, INCONSISTENT, COMPLETED = (
    PROBLEMS + name
    for name in ("mismatching-upload-offset", "inconsistent-upload-length", "completed-upload")
)


class Resumer:
    """A client of one version (None: it names none). A header that is empty is not sent."""

    def __init__(self, server: Server, version: int | None, label: str) -> None:
        self.server = server
        self.version = version
        self.caller = Caller(server, label)
        self.old = version in (5, 6)

    def headers(self, **headers: Any) -> dict[str, str]:
        """What every request says, and more; an underscore stands for a hyphen."""
        version = "" if self.version is None else self.version
        named = {
            "Upload_Draft_Interop_Version": version,
            "X_Client_Id": self.caller.client,
            **headers,
        }
        return {k.replace("_", "-"): str(v) for k, v in named.items() if v != ""}

    def ask(self, method: str, path: str, body: Any = None, **headers: Any) -> Answer:
        """One request."""
        answer = self.server.request(method, path, body, self.headers(**headers))
        told = None if self.version is None else str(self.version)
        assert answer.headers.get("Upload-Draft-Interop-Version") == told
        return answer

    def create(self, body: Any, complete: str = "?0", **headers: Any) -> Answer:
        """Begin, whatever comes of it; an iterable of bytes is sent in chunks."""
        return self.ask("POST", "/resumable/", body, Upload_Complete=complete, **headers)

    def begin(self, body: bytes = b"", **headers: Any) -> str:
        """Begin; the path of the upload resource."""
        answer = self.create(body, **headers)
        assert answer.status == 201, answer
        path = answer.headers["Location"]
        assert PATH.fullmatch(path), path
        return path

    def append(
        self, path: str, offset: object, body: Any, complete: str = "?0", **headers: Any
    ) -> Answer:
        """Append, in the same way."""
        named = {"Content_Type": PARTIAL, "Upload_Offset": offset, "Upload_Complete": complete}
        return self.ask("PATCH", path, body, **{**named, **headers})

    def whole(self, data: bytes, **headers: Any) -> str:
        """Upload bytes in two steps; the path of the complete upload."""
        path = self.begin(data[:1], **headers)
        assert self.append(path, 1, data[1:], "?1").status == 201
        return path

    def state(self, path: str) -> tuple[int, str]:
        """Where to go on, and whether it is complete."""
        answer = self.ask("HEAD", path)
        assert answer.status == 204, answer
        return int(answer.headers["Upload-Offset"]), answer.headers["Upload-Complete"]

    def job(self, path: str) -> Any:
        """The upload as a job; to look at it disturbs nobody."""
        return self.server.job(path.rpartition("/")[2])

    @contextmanager
    def open(self, method: str, path: str, data: bytes, **headers: Any) -> Iterator[Raw]:
        """A request that stays open after its first bytes, which have come when this returns."""
        before = self.offset_of(path) if method == "PATCH" else 0
        with Raw(self.server) as raw:
            raw.head(method, path, **self.headers(**headers))
            if data:
                raw.send(data)
                eventually(lambda: self._received(before + len(data)), f"{len(data)} bytes came")
            yield raw

    def offset_of(self, path: str) -> int:
        """How much of an upload has come, asked without disturbing it."""
        return int(self.job(path)["transfer"]["received_bytes"])

    def _received(self, n: int) -> bool:
        transfers = [job["transfer"] for job in self.caller.jobs() if job["state"] == "running"]
        return any(t and t.get("received_bytes", 0) >= n for t in transfers)


@pytest.fixture(params=VERSIONS, ids=lambda version: f"v{version}")
def client(request: pytest.FixtureRequest, site: Server, name: str) -> Resumer:
    """A client of each version; the server sends no 104."""
    return Resumer(site, request.param, name)


@pytest.fixture
def newest(site: Server, name: str) -> Resumer:
    """A client of the newest version, for what is the same in all."""
    return Resumer(site, 8, name)


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that sends 104."""
    server = Server(tmp_path_factory.mktemp("telling") / "data", "--informational", "on")
    yield server.start()
    server.close()


@pytest.fixture(params=(5, 6, 7, 8), ids=lambda version: f"v{version}")
def told(request: pytest.FixtureRequest, telling: Server, name: str) -> Resumer:
    """A client of each version that can be told 104; only its bare sockets can read it."""
    return Resumer(telling, request.param, name)


def limit(answer: Answer) -> dict[str, Any]:
    """The limits of an answer."""
    found: Any = http_sf.parse(answer.headers["Upload-Limit"].encode(), tltype="dictionary")
    return {key: value for key, (value, _) in found.items()}


def digest(data: bytes, algorithm: str = "sha-256") -> str:
    """A Content-Digest or Repr-Digest."""
    found = hashlib.new(algorithm.replace("-", ""), data).digest()
    return f"{algorithm}=:{base64.b64encode(found).decode()}:"


def refused(answer: Answer, status: int, code: str, *, type: str = "", complete: str = "") -> None:
    """Check a problem, and whether it claims to be the result of the upload."""
    assert answer.status == status, answer
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (answer.json["code"], answer.json["status"]) == (code, status)
    assert answer.json["type"] == (type or f"/errors/{code}")
    assert answer.headers.get("Upload-Complete", "") == complete


def is_result(answer: Answer, client: Resumer, data: bytes) -> None:
    """Check the answer for a whole upload, and that the file is there."""
    assert answer.status == 201, answer
    assert answer.headers["Upload-Complete"] == "?1"
    assert answer.headers["Upload-Offset"] == str(len(data))
    assert answer.json["bytes"] == len(data)
    place = f"/v1/files/{answer.json['id']}"
    upload = f"/resumable/{answer.json['job']}"
    if client.version in (8, None):
        assert answer.headers["Location"] == place
    else:
        assert answer.headers["Location"] == upload
        assert answer.headers["Content-Location"] == place
    assert client.caller.content(answer.json["id"]) == data
    assert client.state(upload) == (len(data), "?1")


# Creation


@pytest.mark.parametrize("path", ["/resumable", "/resumable/"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_any_method_that_can_carry_a_body_creates(client: Resumer, method: str, path: str) -> None:
    """POST, PUT and PATCH begin an upload, whatever the slash (section 4.2.1)."""
    answer = client.ask(method, path, b"hello", Upload_Complete="?1")
    is_result(answer, client, b"hello")


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 8192], ids=["0", "1", "2MiB"])
def test_the_whole_in_one_request_is_answered_with_the_result(client: Resumer, data: bytes) -> None:
    """?1 and all bytes are answered by what the target made of them (section 4.2.2)."""
    is_result(client.create(data, "?1", Upload_Length=len(data)), client, data)


@pytest.mark.parametrize("data", [b"", b"hello"], ids=["empty", "partial"])
@pytest.mark.parametrize("length", ["", 10])
def test_a_beginning_is_answered_with_the_upload_resource(
    client: Resumer, data: bytes, length: object
) -> None:
    """?0 is a 201 that tells address, limits, offset and that more is wanted (section 4.2.2)."""
    answer = client.create(data, Upload_Length=length)
    assert (answer.status, answer.body) == (201, b"")
    assert PATH.fullmatch(answer.headers["Location"])
    assert answer.headers["Upload-Complete"] == "?0"
    assert answer.headers["Upload-Offset"] == str(len(data))
    assert limit(answer)["max-size"] == MAX_BYTES
    assert client.state(answer.headers["Location"]) == (len(data), "?0")


def test_a_conventional_upload_is_a_whole_one(client: Resumer) -> None:
    """A body without Upload-Complete is stored like by any other upload (section 11.1.1)."""
    answer = client.ask("PUT", "/resumable/", b"hello", Upload_Complete="")
    is_result(answer, client, b"hello")


def test_a_request_without_anything_to_upload_is_refused(client: Resumer) -> None:
    """Neither a body nor Upload-Complete: nothing is made of that (section 4.2.1)."""
    refused(client.ask("POST", "/resumable/", b""), 400, "invalid-field", complete="?0")
    assert client.caller.jobs() == []


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('inline; filename="a b.txt"', "a b.txt"),
        ("attachment; filename=plain.txt", "plain.txt"),
        ("inline; filename=\"x.txt\"; filename*=UTF-8''na%C3%AFve%20%E2%82%AC.txt", "naïve €.txt"),
        ('inline; filename="../../etc/passwd"', "passwd"),
        ('inline; filename="C:\\\\temp\\\\a.txt"', "a.txt"),
        ('inline; filename="naïve.txt"'.encode().decode("latin-1"), "naïve.txt"),
    ],
)
def test_the_name_comes_from_the_content_disposition(
    newest: Resumer, header: str, expected: str
) -> None:
    """filename* comes before filename, and neither is a path (section 4.2.1, RFC 6266)."""
    answer = newest.create(b"x", "?1", Content_Disposition=header)
    assert answer.json["filename"] == expected


@pytest.mark.parametrize("header", ["", "inline", "inline; name=x", 'inline; filename=""'])
def test_a_file_without_a_name_is_given_one(newest: Resumer, header: str) -> None:
    """An upload that names no file is stored as well (section 4.2.1)."""
    answer = newest.create(b"x", "?1", Content_Disposition=header)
    assert re.fullmatch(r"upload-[0-9a-f]{6}", answer.json["filename"])


def test_a_name_that_can_be_none_is_refused(newest: Resumer) -> None:
    """Nothing is stored under a name that it was not sent with (section 12)."""
    answer = newest.create(b"x", "?1", Content_Disposition='inline; filename=".."')
    refused(answer, 400, "invalid-field", complete="?0")
    assert newest.caller.jobs() == []


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        ("image/png", "image/png"),
        ("Text/HTML; charset=utf-8", "text/html"),
        ("application/octet-stream", "text/plain"),
        ("application/x-www-form-urlencoded", "text/plain"),
        ("nonsense", "text/plain"),
        ("", "text/plain"),
    ],
)
def test_the_media_type_comes_from_the_creation(newest: Resumer, sent: str, stored: str) -> None:
    """The type of the first request is that of the file, not that of appends (section 4.2.1)."""
    named = {"Content_Disposition": 'inline; filename="a.txt"', "Content_Type": sent}
    job = newest.job(newest.whole(b"hello", **named))
    row = newest.caller.get(f"/v1/files/{job['result']['file']}").json
    assert row["media_type"] == stored


def test_an_upload_is_a_job(newest: Resumer) -> None:
    """The id of the upload resource is that of a job, with its protocol and its owner's label."""
    job = newest.job(newest.begin(b"hello", Upload_Length=10))
    assert (job["kind"], job["state"], job["client"]) == ("upload", "running", newest.caller.client)
    assert job["transfer"]["protocol"] == "resumable"
    assert (job["progress"]["done"], job["progress"]["total"]) == (5, 10)


# Lengths


@pytest.mark.parametrize(
    ("complete", "length"), [("?1", 4), ("?1", 6), ("?0", 4)], ids=["less", "more", "beyond"]
)
def test_a_creation_whose_lengths_disagree_is_refused(
    client: Resumer, complete: str, length: int
) -> None:
    """Content-Length contradicts Upload-Length: 400, before the body is asked for (4.1.3, 7.2)."""
    named = client.headers(
        Upload_Complete=complete,
        Upload_Length=length,
        Content_Length=5,
        Expect="100-continue",
    )
    with Raw(client.server) as raw:
        raw.head("POST", "/resumable/", **named)
        refused(raw.answer(), 400, "length-mismatch", type=INCONSISTENT, complete="?0")
    assert client.caller.jobs() == []


@pytest.mark.parametrize(("complete", "length"), [("?1", ""), ("?0", 11), ("?0", 9), ("?1", 10)])
def test_an_append_whose_lengths_disagree_is_refused(
    client: Resumer, complete: str, length: object
) -> None:
    """A length is told once; another one is a 400 that changes nothing (sections 4.1.3, 7.2)."""
    path = client.begin(b"hello", Upload_Length=10)
    answer = client.append(path, 5, b"you", complete, Upload_Length=length)
    refused(answer, 400, "length-mismatch", type=INCONSISTENT, complete="?0")
    assert answer.headers["Upload-Offset"] == "5"
    assert client.state(path) == (5, "?0")
    is_result(client.append(path, 5, b"world", "?1"), client, b"helloworld")


def test_a_length_that_is_told_later_binds(client: Resumer) -> None:
    """Upload-Length with an append counts from then on, and HEAD tells it (section 4.1.3)."""
    path = client.begin(b"hello")
    assert "Upload-Length" not in client.ask("HEAD", path).headers
    assert client.append(path, 5, b"wo", Upload_Length=10).status in (201, 204)
    assert client.ask("HEAD", path).headers["Upload-Length"] == "10"
    answer = client.append(path, 7, b"", Upload_Length=11)
    refused(answer, 400, "length-mismatch", type=INCONSISTENT, complete="?0")


def test_a_length_below_what_is_stored_is_refused(client: Resumer) -> None:
    """Upload-Length can't be less than the offset (section 4.1.3)."""
    path = client.begin(b"hello")
    answer = client.append(path, 5, iter([b"x"]), Upload_Length=4)
    refused(answer, 400, "length-mismatch", type=INCONSISTENT, complete="?0")
    assert client.state(path) == (5, "?0")


def test_the_end_of_a_chunked_body_must_be_the_length(client: Resumer) -> None:
    """?1 whose bytes end too early does not complete; the rest may follow (section 4.1.3)."""
    path = client.begin(b"hello", Upload_Length=10)
    answer = client.append(path, 5, iter([b"wor"]), "?1")
    refused(answer, 400, "length-mismatch", type=INCONSISTENT, complete="?0")
    assert client.state(path) == (8, "?0")
    is_result(client.append(path, 8, b"ld", "?1"), client, b"helloworld")


@pytest.mark.parametrize("body", [b"world!", iter], ids=["content-length", "chunked"])
def test_bytes_beyond_the_length_make_the_upload_invalid(client: Resumer, body: Any) -> None:
    """What would exceed the length is a 400, and the upload is of no more use (section 4.4.2)."""
    path = client.begin(b"hello", Upload_Length=10)
    before = client.caller.temporary()
    sent = iter([b"world", b"!"]) if body is iter else body
    answer = client.append(path, 5, sent)
    refused(answer, 400, "length-mismatch", type=INCONSISTENT, complete="?0")
    assert "Upload-Offset" not in answer.headers
    gone = 404 if client.old else 400
    assert client.ask("HEAD", path).status == gone
    answer = client.append(path, 5, b"world", "?1")
    refused(answer, gone, "length-mismatch", type=INCONSISTENT, complete="?0")
    assert client.job(path)["state"] == "failed"
    assert len(client.caller.temporary()) < len(before)


# Questions


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_question_is_answered_with_the_state(client: Resumer, method: str) -> None:
    """204 with offset, completeness, length, limits; never from a cache (section 4.3.2)."""
    answer = client.ask(method, client.begin(b"hello", Upload_Length=10))
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["Upload-Offset"] == "5"
    assert answer.headers["Upload-Complete"] == "?0"
    assert answer.headers["Upload-Length"] == "10"
    assert answer.headers["Cache-Control"] == "no-store"
    assert limit(answer)["max-size"] == MAX_BYTES


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_question_for_a_complete_upload_names_its_file(client: Resumer, method: str) -> None:
    """204 and ?1, with the place of what the upload has become (section 4.3.2)."""
    path = client.whole(b"hello")
    answer = client.ask(method, path)
    assert answer.status == 204
    assert answer.headers["Upload-Complete"] == "?1"
    assert answer.headers["Upload-Offset"] == answer.headers["Upload-Length"] == "5"
    assert FILE.fullmatch(answer.headers["Content-Location"])
    assert limit(answer) == {"max-size": MAX_BYTES}


@pytest.mark.parametrize("method", ["HEAD", "GET", "PATCH", "DELETE"])
def test_nothing_redirects(newest: Resumer, method: str) -> None:
    """A slash too many is a 404 and no 301, after which a client would forget HEAD (4.3.2)."""
    path = newest.begin()
    assert newest.server.request(method, path + "/").status == 404
    assert newest.state(path) == (0, "?0")


@pytest.mark.parametrize("method", ["HEAD", "PATCH", "DELETE"])
def test_an_unknown_upload_is_a_404(client: Resumer, method: str) -> None:
    """No address is an upload that was not told by us (section 4.3.1)."""
    named = {"Upload_Offset": 0, "Upload_Complete": "?0"} if method == "PATCH" else {}
    answer = client.ask(method, NOWHERE, b"" if named else None, Content_Type=PARTIAL, **named)
    assert answer.status == 404
    assert "Upload-Offset" not in answer.headers


def test_uploads_of_other_dialects_are_unknown(newest: Resumer) -> None:
    """Only what began here goes on here."""
    newest.caller.block("other.bin", 0, b"x")
    assert newest.ask("HEAD", f"/resumable/{newest.caller.jobs()[0]['id']}").status == 404


@pytest.mark.parametrize("method", ["HEAD", "DELETE"])
@pytest.mark.parametrize("field", ["Upload-Offset", "Upload-Complete"])
def test_old_drafts_forbid_to_tell_a_state_in_a_question(
    client: Resumer, method: str, field: str
) -> None:
    """Until -05 HEAD and DELETE with a state are a 400; since -06 they are as any other."""
    path = client.begin(b"hello")
    answer = client.ask(method, path, **{field: "?0" if field == "Upload-Complete" else "5"})
    assert answer.status == (400 if client.old else 204)


# Appends


def test_an_append_that_is_not_the_end(client: Resumer) -> None:
    """?0 is acknowledged: 204 since -06, 201 before, and always with the offset (section 4.4.2)."""
    path = client.begin(b"hello")
    answer = client.append(path, 5, b" wor")
    assert (answer.status, answer.body) == (201 if client.old else 204, b"")
    assert answer.headers["Upload-Complete"] == "?0"
    assert answer.headers["Upload-Offset"] == "9"
    assert "Location" not in answer.headers
    assert client.state(path) == (9, "?0")
    is_result(client.append(path, 9, b"ld", "?1"), client, b"hello world")


def test_chunked_bodies_count_without_their_coding(client: Resumer) -> None:
    """Offsets count what is left when the transfer coding is removed (section 9)."""
    answer = client.create(iter([b"hel", b"lo"]))
    assert answer.headers["Upload-Offset"] == "5"
    path = answer.headers["Location"]
    is_result(client.append(path, 5, iter([b" ", b"world"]), "?1"), client, b"hello world")


def test_content_codings_are_kept(client: Resumer) -> None:
    """Offsets and lengths count the coded bytes, and those are stored (section 8)."""
    data = gzip.compress(b"hello" * 1000)
    path = client.begin(data[:20], Content_Encoding="gzip", Upload_Length=len(data))
    assert client.state(path) == (20, "?0")
    is_result(client.append(path, 20, data[20:], "?1", Content_Encoding="gzip"), client, data)


@pytest.mark.parametrize("offset", [0, 4, 6, 999_999_999_999_999])
def test_a_wrong_offset_is_a_conflict(client: Resumer, offset: int) -> None:
    """409 with the right offset, and nothing changes (sections 4.4.2, 7.1)."""
    path = client.begin(b"hello")
    answer = client.append(path, offset, b"xyz")
    refused(answer, 409, "offset-mismatch", type=MISMATCH, complete="?0")
    assert (answer.json["expected-offset"], answer.json["provided-offset"]) == (5, offset)
    assert answer.headers["Upload-Offset"] == "5"
    assert "Location" not in answer.headers
    assert client.state(path) == (5, "?0")


def test_a_wrong_offset_is_refused_before_the_body(newest: Resumer) -> None:
    """A client that waits for 100 (Continue) need not send what nobody wants (RFC 9110 10.1.1)."""
    path = newest.begin(b"hello")
    named = {"Upload_Offset": 3, "Upload_Complete": "?0", "Content_Type": PARTIAL}
    with newest.open("PATCH", path, b"", Content_Length=10, Expect="100-continue", **named) as raw:
        assert raw.answer().status == 409


@pytest.mark.parametrize("sent", ["", "application/octet-stream", "text/plain"])
def test_an_append_names_its_media_type(client: Resumer, sent: str) -> None:
    """415 for anything but application/partial-upload since -04; -03 had no such type (6)."""
    path = client.begin(b"hello")
    answer = client.append(path, 5, b"x", Content_Type=sent)
    if client.version == 5:
        assert answer.status == 201
        return
    refused(answer, 415, "media-type-wrong", complete="?0")
    assert client.state(path) == (5, "?0")


def test_the_media_type_may_have_parameters(newest: Resumer) -> None:
    """A media type is compared without case and parameters (RFC 9110 8.3.1)."""
    path = newest.begin(b"hello")
    answer = newest.append(path, 5, b"x", Content_Type="Application/Partial-Upload; a=b")
    assert answer.status == 204


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("Upload-Offset", value) for value in ("", "-1", "1.5", "?1", '"5"', "5, 5", "five")),
        *(("Upload-Complete", value) for value in ("", "1", "true", "?2", "?1, ?1")),
    ],
)
def test_a_malformed_field_counts_as_missing(client: Resumer, field: str, value: str) -> None:
    """What is no valid structured field is ignored, and then it is missing: 400 (section 4.1)."""
    path = client.begin(b"hello")
    answer = client.append(path, 5, b"x", **{field.replace("-", "_"): value})
    refused(answer, 400, "invalid-field", complete="?0")
    assert answer.json["field"] == field
    assert client.state(path) == (5, "?0")


@pytest.mark.parametrize("value", ["1", "true", "?2"])
def test_a_creation_whose_completeness_is_malformed_is_conventional(
    client: Resumer, value: str
) -> None:
    """A malformed Upload-Complete is ignored; without a body nothing is left (section 4.1.2)."""
    is_result(client.create(b"hello", value), client, b"hello")
    refused(client.create(b"", value), 400, "invalid-field", complete="?0")


@pytest.mark.parametrize("value", ["-1", "4.0", "five"])
def test_a_malformed_length_is_ignored(client: Resumer, value: str) -> None:
    """A length that is none is as if it were not told (section 4.1.3)."""
    is_result(client.create(b"hello", "?1", Upload_Length=value), client, b"hello")


def test_an_empty_append_completes(client: Resumer) -> None:
    """?1 without content completes what is all there (section 4.4.1)."""
    path = client.begin(b"hello")
    is_result(client.append(path, 5, b"", "?1"), client, b"hello")


def test_to_reach_the_length_is_not_the_end(client: Resumer) -> None:
    """Offset and length say nothing of completeness; the client does (section 4.1.3)."""
    path = client.begin(b"hello", Upload_Length=10)
    assert client.append(path, 5, b"world").headers["Upload-Complete"] == "?0"
    assert client.state(path) == (10, "?0")
    assert client.job(path)["state"] == "running"
    assert client.caller.get("/v1/files").status == 200
    is_result(client.append(path, 10, b"", "?1"), client, b"helloworld")


def test_an_empty_append_that_is_not_the_end_changes_nothing(client: Resumer) -> None:
    """?0 without content is acknowledged with the same offset (section 4.4.2)."""
    path = client.begin(b"hello")
    answer = client.append(path, 5, b"")
    assert answer.status == (201 if client.old else 204)
    assert client.state(path) == (5, "?0")


def test_the_result_can_be_had_again(client: Resumer) -> None:
    """Who lost the result gets it by an empty ?1, as it was; not in -04 to -08 (section 4.4.2)."""
    path = client.begin(b"hello")
    first = client.append(path, 5, b"", "?1")
    again = client.append(path, 5, b"", "?1")
    if client.version in (6, 7):
        refused(again, 400, "upload-complete", type=COMPLETED, complete="?0")
        return
    is_result(again, client, b"hello")
    assert again.body == first.body
    different = {"X-Request-Id", "Date"}
    assert {k: v for k, v in again.headers.items() if k not in different} == {
        k: v for k, v in first.headers.items() if k not in different
    }
    assert len(client.caller.versions(first.json["filename"])) == 1


def test_the_result_survives_a_restart(serve: Serve) -> None:
    """It is stored, not remembered (section 4.4.2)."""
    server = serve()
    client = Resumer(server, 8, "x")
    path = client.begin(b"hello")
    first = client.append(path, 5, b"", "?1")
    server.kill()
    server.start()
    assert client.append(path, 5, b"", "?1").body == first.body
    assert client.state(path) == (5, "?1")


@pytest.mark.parametrize(
    ("offset", "body", "complete", "expected"),
    [
        (4, b"o", "?1", (409, "offset-mismatch")),
        (5, b"!", "?1", (400, "length-mismatch")),
        (5, b"", "?0", (400, "upload-complete")),
        (5, b"!", "?0", (400, "upload-complete")),
    ],
)
def test_nothing_is_appended_to_a_complete_upload(
    client: Resumer, offset: int, body: bytes, complete: str, expected: tuple[int, str]
) -> None:
    """An append that can't be a repetition is refused, and harms nothing (section 4.4.2)."""
    path = client.whole(b"hello")
    answer = client.append(path, offset, body, complete)
    if client.version in (6, 7):
        expected = (400, "upload-complete")
    types = {"offset-mismatch": MISMATCH, "length-mismatch": INCONSISTENT}
    refused(answer, *expected, type=types.get(expected[1], COMPLETED), complete="?0")
    assert client.state(path) == (5, "?1")


# Limits


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes little, and gives nothing away."""
    server = Server(
        tmp_path_factory.mktemp("narrow") / "data",
        *("--max-upload-bytes", "1000", "--delete-completed", "refuse"),
    )
    yield server.start()
    server.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_more_than_the_limit_is_refused_with_the_limit(
    narrow: Server, version: int | None, name: str
) -> None:
    """413 and Upload-Limit for creation and append, told or chunked; the rest stays (4.1.4)."""
    client = Resumer(narrow, version, name)
    path = client.begin(bytes(600))
    answers = [
        client.create(b"", Upload_Length=1001),
        client.create(bytes(1001)),
        client.create(bytes(1001), "?1"),
        client.append(path, 600, bytes(401)),
        client.append(path, 600, bytes(401), "?1"),
        client.append(path, 600, b"", Upload_Length=1001),
    ]
    for answer in answers:
        refused(answer, 413, "too-large", complete="?0")
        assert limit(answer)["max-size"] == 1000
    assert client.state(path) == (600, "?0")
    answer = client.append(path, 600, iter([bytes(300), bytes(300)]))
    refused(answer, 413, "too-large", complete="?0")
    assert limit(answer)["max-size"] == 1000
    at, _ = client.state(path)
    is_result(client.append(path, at, bytes(1000 - at), "?1"), client, bytes(1000))


def test_more_than_the_limit_is_refused_before_the_body(narrow: Server, name: str) -> None:
    """What the head shows to be too much is not asked for (RFC 9110 10.1.1)."""
    client = Resumer(narrow, 8, name)
    path = client.begin(bytes(600))
    sent = {"Upload_Complete": "?0", "Expect": "100-continue"}
    with client.open("POST", "/resumable/", b"", Content_Length=1001, **sent) as raw:
        assert raw.answer().status == 413
    sent |= {"Upload_Offset": "600", "Content_Type": PARTIAL}
    with client.open("PATCH", path, b"", Content_Length=401, **sent) as raw:
        assert raw.answer().status == 413
    assert len(client.caller.jobs()) == 1


def test_small_appends_are_taken(client: Resumer) -> None:
    """There is no least size, neither for creations nor for appends (section 4.1.4)."""
    path = client.begin(b"")
    for at in range(3):
        assert client.append(path, at, b"x").status in (201, 204)
    assert not {"min-append-size", "max-append-size"} & limit(client.ask("HEAD", path)).keys()


@pytest.mark.parametrize("path", ["/resumable", "/resumable/"])
def test_options_tell_the_limits(client: Resumer, path: str) -> None:
    """204 with Upload-Limit, and what PATCH takes (section 4.1.4, -11)."""
    answer = client.ask("OPTIONS", path)
    assert answer.status == 204
    lifetime = "expires" if client.old else "max-age"
    assert limit(answer) == {"max-size": MAX_BYTES, lifetime: 7 * 86_400}
    assert answer.headers["Accept-Patch"] == PARTIAL
    assert {"POST", "PUT", "PATCH"} <= set(answer.headers["Allow"].split(", "))


def test_the_lifetime_is_told_in_the_words_of_the_draft(client: Resumer) -> None:
    """max-age, called expires until -05, in every state; it never ends earlier (section 4.1.4)."""
    path = client.begin(b"hello")
    answers = [client.ask("HEAD", path), client.append(path, 5, b"x"), client.ask("GET", path)]
    for answer in answers:
        found = limit(answer)
        assert found.keys() == {"max-size", "expires" if client.old else "max-age"}
        assert 7 * 86_400 - 60 < found["expires" if client.old else "max-age"] <= 7 * 86_400


def test_without_a_limit_there_still_is_a_value(serve: Serve) -> None:
    """A limit that is no Integer is not told; where none is left, min-size=0 is (section 4.1.4)."""
    client = Resumer(serve("--max-upload-bytes", "1024TiB"), 8, "x")
    assert limit(client.ask("OPTIONS", "/resumable/")) == {"max-age": 7 * 86_400}
    assert limit(client.ask("HEAD", client.whole(b"hello"))) == {"min-size": 0}


def test_the_quota_is_asked_again_with_each_request(serve: Serve) -> None:
    """What others have taken meanwhile is missed when the upload goes on (section 12)."""
    client = Resumer(serve("--quota-bytes", "10000"), 8, "x")
    path = client.begin(bytes(4000))
    client.create(bytes(5000), "?1")
    for body in (bytes(2000), iter([bytes(2000)])):
        answer = client.append(path, 4000, body, "?1")
        refused(answer, 413, "quota-exceeded", complete="?0")
        assert answer.headers["Upload-Offset"] == "4000"
    is_result(client.append(path, 4000, bytes(1000), "?1"), client, bytes(5000))


def test_pages_of_other_sites(serve: Serve) -> None:
    """An allowed page may send and read what is needed here; another one changes nothing."""
    server = serve("--cors-origins", "https://app.example")
    client = Resumer(server, 8, "x")
    asked = {"Access_Control_Request_Method": "PATCH", "Origin": "https://app.example"}
    answer = client.ask("OPTIONS", NOWHERE, **asked)
    may = {name.lower() for name in answer.headers["Access-Control-Allow-Headers"].split(", ")}
    assert may >= {
        *("upload-complete", "upload-offset", "upload-length", "upload-draft-interop-version"),
        *("content-disposition", "content-digest", "repr-digest", "want-repr-digest"),
    }
    answer = client.create(b"", Origin="https://app.example")
    shown = set(answer.headers["Access-Control-Expose-Headers"].split(", "))
    assert shown >= {"Location", "Upload-Offset", "Upload-Complete", "Upload-Limit"}
    for method in ("HEAD", "DELETE"):
        path = answer.headers["Location"]
        assert client.ask(method, path, Origin="https://evil.example").status == 403


# Interim answers


def names_an_upload(answer: Answer, client: Resumer) -> str:
    """Check the 104 that tells the address; the path."""
    assert answer.status == 104
    assert answer.headers["Upload-Draft-Interop-Version"] == str(client.version)
    assert limit(answer).keys() == {"max-size", "expires" if client.old else "max-age"}
    path = answer.headers["Location"]
    assert PATH.fullmatch(path)
    return path


@pytest.mark.parametrize("complete", ["?0", "?1", ""])
@pytest.mark.parametrize("chunked", [False, True])
def test_104_tells_the_address_before_the_body(told: Resumer, complete: str, chunked: bool) -> None:
    """104 has address, limits and version; the last answer to ?0 the same address (4.2.2, 5)."""
    size = {"Transfer_Encoding": "chunked"} if chunked else {"Content_Length": 5}
    with told.open("POST", "/resumable/", b"", Upload_Complete=complete, **size) as raw:
        path = names_an_upload(raw.answer(), told)
        assert told.job(path)["state"] == "running"
        if chunked:
            raw.chunk(b"hello")
            raw.chunk(b"")
        else:
            raw.send(b"hello")
        answer = raw.answer()
    assert answer.status == 201
    if complete == "?0":
        assert answer.headers["Location"] == path
    else:
        is_result(answer, Resumer(told.server, told.version, "x"), b"hello")


def test_100_is_sent_besides_104(told: Resumer) -> None:
    """Who expects 100 (Continue) gets it, whatever else was sent (section 5)."""
    with told.open(
        "POST",
        "/resumable/",
        b"",
        Upload_Complete="?1",
        Content_Length=5,
        Expect="100-continue",
    ) as raw:
        names_an_upload(raw.answer(), told)
        assert raw.answer().status == 100
        raw.send(b"hello")
        assert raw.answer().status == 201


@pytest.mark.parametrize("version", ["", "3", "4", "9", "8.0", "?1", "8, 8", "eight"])
def test_no_104_without_a_version_that_both_know(telling: Server, version: str) -> None:
    """A missing or another version never gets 104 (appendix "Draft Version Identification")."""
    named = {"Upload_Draft_Interop_Version": version} if version else {}
    with Raw(telling) as raw:
        raw.head("POST", "/resumable/", Upload_Complete="?0", Content_Length=5, **named)
        raw.send(b"hello")
        answer = raw.answer()
    assert answer.status == 201
    assert "Upload-Draft-Interop-Version" not in answer.headers
    assert answer.headers["Upload-Offset"] == "5"


def test_no_104_to_old_http(telling: Server) -> None:
    """HTTP/1.0 has no interim answers (RFC 9110 15.2)."""
    with Raw(telling) as raw:
        raw.send(
            b"POST /resumable/ HTTP/1.0\r\nHost: localhost\r\nUpload-Complete: ?1\r\n"
            b"Upload-Draft-Interop-Version: 8\r\nContent-Length: 5\r\n\r\nhello"
        )
        assert raw.answer().status == 201


def test_no_104_before_a_refusal(told: Resumer) -> None:
    """What is refused by its head makes no upload that could be told (section 4.2.2)."""
    named = {"Upload_Complete": "?1", "Upload_Length": 6, "Content_Length": 5}
    with told.open("POST", "/resumable/", b"", **named) as raw:
        assert raw.answer().status == 400


def test_a_server_that_sends_no_104_sends_none(site: Server, name: str) -> None:
    """By default Python's client, which takes 104 for the answer, meets none (section 5)."""
    client = Resumer(site, 8, name)

    def slowly() -> Iterator[bytes]:
        yield b"he"
        time.sleep(1.5)  # one would be due
        yield b"llo"

    answer = client.create(slowly())
    assert answer.status == 201
    is_result(client.append(answer.headers["Location"], 5, slowly(), "?1"), client, b"hello" * 2)


@pytest.mark.parametrize("creates", [True, False], ids=["creation", "append"])
def test_104_acknowledges_what_is_stored(telling: Server, name: str, creates: bool) -> None:
    """Once a second at most; no address, never less, never more than is kept (section 4.4.2)."""
    client = Resumer(telling, 8, name)
    plain = Resumer(telling, None, name)
    path, base, named = "/resumable/", 0, {"Upload_Complete": "?0", "Content_Length": 1000}
    if not creates:
        path, base = plain.begin(b"hello"), 5
        named |= {"Upload_Offset": base, "Content_Type": PARTIAL}
    start = time.monotonic()
    with client.open("POST" if creates else "PATCH", path, b"", **named) as raw:
        if creates:
            path = names_an_upload(raw.answer(), client)
        acknowledged: list[int] = []
        raw.send(bytes(400))
        while not acknowledged or acknowledged[-1] < base + 900:
            answer = raw.answer()
            assert answer.status == 104
            assert "Location" not in answer.headers
            assert answer.headers["Upload-Draft-Interop-Version"] == "8"
            acknowledged.append(int(answer.headers["Upload-Offset"]))
            if len(acknowledged) == 1:
                raw.send(bytes(500))
        assert base < acknowledged[0] <= base + 400
        assert acknowledged == sorted(set(acknowledged))
        assert len(acknowledged) <= time.monotonic() - start
        assert plain.state(path) == (base + 900, "?0")
        assert raw.answer().status == 409  # a question ends the request


def test_what_104_acknowledges_survives_a_crash(serve: Serve) -> None:
    """An offset is a promise: after kill -9 it is not less (section 4.1.1)."""
    server = serve("--informational", "on")
    client = Resumer(server, 8, "x")
    with client.open(
        "POST", "/resumable/", b"", Upload_Complete="?1", Content_Length=1 << 20
    ) as raw:
        path = names_an_upload(raw.answer(), client)
        raw.send(bytes(300_000))
        acknowledged = int(raw.answer().headers["Upload-Offset"])
        assert acknowledged > 0
        server.kill()
    server.start()
    plain = Resumer(server, None, "x")
    at, complete = plain.state(path)
    assert (acknowledged <= at, complete) == (True, "?0")
    is_result(plain.append(path, at, bytes((1 << 20) - at), "?1"), plain, bytes(1 << 20))


def test_an_upload_that_has_lost_bytes_is_no_more(serve: Serve) -> None:
    """An offset never decreases: what was acknowledged and lost ends the upload (section 4.1.1)."""
    server = serve()
    client = Resumer(server, 8, "x")
    path = client.begin(b"hello")
    server.kill()
    (blob,) = (server.folder / "tmp").iterdir()
    blob.write_bytes(b"hel")
    server.expected = ("3 of 5 bytes are left",)
    server.start()
    eventually(lambda: client.job(path)["state"] == "failed", "the upload has failed")
    assert client.ask("HEAD", path).status == 410
    refused(client.append(path, 3, b"lo"), 410, "storage-failed", complete="?0")


# Interruptions, and who comes next


@pytest.mark.parametrize("method", ["HEAD", "GET", "PATCH", "DELETE"])
def test_a_new_request_ends_a_stalled_one_at_once(client: Resumer, method: str) -> None:
    """The old request is cut, what it delivered counts, its late bytes do not (section 4.6)."""
    path = client.begin(b"hello")
    named = {"Upload_Offset": 5, "Upload_Complete": "?1", "Content_Type": PARTIAL}
    with client.open("PATCH", path, b" wo", Content_Length=6, **named) as stalled:
        with at_once():
            if method == "PATCH":
                answer = client.append(path, 8, b"rl")
            else:
                answer = client.ask(method, path)
        assert answer.status in (201, 204)
        cut = stalled.answer()
        assert cut.status == 409
        assert cut.json["code"] == (
            "upload-terminated" if method == "DELETE" else "upload-taken-over"
        )
        stalled.send(b"XXX")
        assert ("Upload-Offset" in cut.headers) == (method != "DELETE")
        if method == "DELETE":
            assert client.ask("HEAD", path).status == 404
            return
        at = 10 if method == "PATCH" else 8
        assert client.state(path) == (at, "?0")
        is_result(client.append(path, at, b"hello world"[at:], "?1"), client, b"hello world")


def test_a_question_ends_a_stalled_creation(told: Resumer) -> None:
    """The client that has learnt the address asks there how far it came (sections 4.3, 4.6)."""
    with told.open("POST", "/resumable/", b"hello", Upload_Complete="?1", Content_Length=11) as raw:
        path = names_an_upload(raw.answer(), told)
        plain = Resumer(told.server, None, "x")
        with at_once():
            answer = plain.ask("HEAD", path)
        assert answer.headers["Upload-Offset"] == "5"
        assert answer.headers["Upload-Length"] == "11"
    is_result(plain.append(path, 5, b" world", "?1"), plain, b"hello world")


def test_a_cut_append_keeps_what_arrived(client: Resumer) -> None:
    """The beginning of an interrupted append counts, and is not complete (section 4.4.2)."""
    path = client.begin(b"hello")
    named = {"Upload_Offset": 5, "Upload_Complete": "?1", "Content_Type": PARTIAL}
    with client.open("PATCH", path, b" wo", Content_Length=6, **named) as raw:
        raw.cut()
    eventually(lambda: client.job(path)["reason"] == "client-gone", "the cut was noticed")
    assert client.state(path) == (8, "?0")
    is_result(client.append(path, 8, b"rld", "?1"), client, b"hello world")


def test_a_cut_creation_goes_on_if_its_address_is_known(told: Resumer) -> None:
    """After a 104 an interrupted creation is resumed (sections 4.2.1, 4.2.2)."""
    with told.open("POST", "/resumable/", b"hello", Upload_Complete="?1", Content_Length=11) as raw:
        path = names_an_upload(raw.answer(), told)
        raw.cut()
    plain = Resumer(told.server, None, "x")
    eventually(lambda: plain.job(path)["reason"] == "client-gone", "the cut was noticed")
    assert plain.state(path) == (5, "?0")
    is_result(plain.append(path, 5, b" world", "?1"), plain, b"hello world")


@pytest.mark.parametrize("complete", ["?0", "?1"])
def test_a_cut_creation_whose_address_is_unknown_leaves_nothing(
    client: Resumer, complete: str
) -> None:
    """Bytes that nobody can find again take no room (section 4.2.1)."""
    before = client.caller.temporary()
    with client.open(
        "POST", "/resumable/", b"hello", Upload_Complete=complete, Content_Length=11
    ) as raw:
        raw.cut()
    eventually(lambda: client.caller.jobs()[0]["state"] == "failed", "it has failed")
    eventually(lambda: client.caller.temporary() <= before, "its bytes are gone")


def test_a_creation_that_fails_tells_where_it_goes_on(serve: Serve) -> None:
    """Where a request ends by an error but the upload lives, its address and offset are told."""
    server = serve("--max-upload-bytes", "1000")
    answer = Resumer(server, 8, "x").create(iter([bytes(600), bytes(600)]))
    refused(answer, 413, "too-large", complete="?0")
    path = answer.headers["Location"]
    assert Resumer(server, 8, "x").state(path) == (int(answer.headers["Upload-Offset"]), "?0")


def test_a_sender_that_stalls_may_go_on(serve: Serve) -> None:
    """Who sends nothing for too long is cut off by a 5xx, with the offset (section 4.4.1)."""
    # Nothing may be silent for so long by chance, between a head and its body.
    client = Resumer(serve("--body-idle-s", "3"), 8, "x")
    path = client.begin(b"hello")
    named = {"Upload_Offset": 5, "Upload_Complete": "?1", "Content_Type": PARTIAL}
    with client.open("PATCH", path, b" wo", Content_Length=6, **named) as raw:
        answer = raw.answer()
    refused(answer, 503, "upload-stalled", complete="?0")
    assert answer.headers["Upload-Offset"] == "8"
    is_result(client.append(path, 8, b"rld", "?1"), client, b"hello world")


def test_a_paused_upload_holds_and_goes_on(newest: Resumer) -> None:
    """A pause of the job stops the bytes, not the questions; resumed, it goes on where it was."""
    path = newest.begin(b"hello")
    job = path.rpartition("/")[2]
    newest.server.post(f"/v1/jobs/{job}/pause")
    newest.server.wait_for(job, "paused")
    assert newest.state(path) == (5, "?0")
    newest.server.post(f"/v1/jobs/{job}/resume")
    is_result(newest.append(path, 5, b"", "?1"), newest, b"hello")


def test_a_paused_upload_can_become_invalid(newest: Resumer) -> None:
    """What can't be right any more ends also while it is paused (section 4.4.2)."""
    path = newest.begin(b"hello", Upload_Length=5)
    job = path.rpartition("/")[2]
    newest.server.post(f"/v1/jobs/{job}/pause")
    newest.server.wait_for(job, "paused")
    assert newest.append(path, 5, b"!").status == 400
    assert newest.ask("HEAD", path).status == 400


# Cancellation


def test_delete_frees_the_bytes(client: Resumer) -> None:
    """204, and then there is neither an upload nor its bytes (section 4.5.2)."""
    before = client.caller.temporary()
    path = client.begin(b"hello")
    assert len(client.caller.temporary() - before) == 1
    answer = client.ask("DELETE", path)
    assert (answer.status, answer.body) == (204, b"")
    assert client.caller.temporary() <= before
    for method in ("HEAD", "GET", "DELETE"):
        assert client.ask(method, path).status == 404
    refused(client.append(path, 5, b"x"), 404, "upload-unknown", complete="?0")


def test_delete_of_a_complete_upload_removes_the_file(client: Resumer) -> None:
    """By default the file that the upload has become goes with it (section 4.5.2)."""
    path = client.whole(b"hello")
    file = client.job(path)["result"]["file"]
    assert client.ask("DELETE", path).status == 204
    assert client.caller.get(f"/v1/files/{file}").status == 404
    for method in ("HEAD", "GET", "DELETE"):
        assert client.ask(method, path).status == 404
    refused(client.append(path, 5, b"", "?1"), 404, "upload-unknown", complete="?0")


def test_delete_of_a_complete_upload_can_be_forbidden(narrow: Server, name: str) -> None:
    """With delete_completed=refuse the file stays."""
    client = Resumer(narrow, 8, name)
    path = client.whole(b"hello")
    assert client.ask("DELETE", path).status == 403
    assert client.state(path) == (5, "?1")


def test_a_job_that_is_cancelled_elsewhere_is_no_more(client: Resumer) -> None:
    """Cancelled from any screen, the upload resource is gone (section 4.5.2)."""
    path = client.begin(b"hello")
    job = path.rpartition("/")[2]
    client.server.post(f"/v1/jobs/{job}/cancel")
    client.server.wait_for(job, "cancelled")
    assert client.ask("HEAD", path).status == 404


# Digests


@pytest.mark.parametrize("algorithm", ["sha-256", "sha-512"])
def test_content_whose_digest_is_wrong_is_not_appended(client: Resumer, algorithm: str) -> None:
    """Content-Digest is that of one request: wrong, and none of its bytes count (10.2)."""
    path = client.begin(b"hello", Content_Digest=digest(b"hello", algorithm))
    answer = client.append(path, 5, b" wurld", Content_Digest=digest(b" world", algorithm))
    refused(answer, 400, "checksum-mismatch", complete="?0")
    assert answer.headers["Upload-Offset"] == "5"
    assert client.state(path) == (5, "?0")
    right = client.append(path, 5, b" world", "?1", Content_Digest=digest(b" world", algorithm))
    is_result(right, client, b"hello world")


def test_a_creation_whose_content_digest_is_wrong_stores_nothing(client: Resumer) -> None:
    """The first bytes are compared like any others (section 10.2)."""
    answer = client.create(b"hello", Content_Digest=digest(b"hullo"))
    refused(answer, 400, "checksum-mismatch", complete="?0")
    assert answer.headers["Upload-Offset"] == "0"
    path = answer.headers["Location"]
    assert client.state(path) == (0, "?0")
    answer = client.create(b"hello", "?1", Content_Digest=digest(b"hullo"))
    refused(answer, 400, "checksum-mismatch", complete="?0")
    assert not {"Location", "Upload-Offset"} & answer.headers.keys()  # nothing is left of it
    assert client.caller.jobs()[0]["state"] == "failed"


@pytest.mark.parametrize("header", ["sha-256=abc", "md5=:AAAA:", "sha-256=:AAAA:", "garbage;;"])
def test_a_digest_that_is_none_is_ignored(newest: Resumer, header: str) -> None:
    """Malformed and unknown digests count as not sent (RFC 9530 section 2)."""
    named = {"Content_Digest": header, "Repr_Digest": header, "Want_Repr_Digest": header}
    is_result(newest.create(b"hello", "?1", **named), newest, b"hello")


@pytest.mark.parametrize("algorithm", ["sha-256", "sha-512"])
@pytest.mark.parametrize("late", [False, True], ids=["creation", "last-append"])
def test_a_whole_whose_digest_is_wrong_has_failed(
    client: Resumer, algorithm: str, late: bool
) -> None:
    """Repr-Digest is that of the whole; wrong, it is a failure that stays one (section 10.1)."""
    wrong = {"Repr_Digest": digest(b"hello wurld", algorithm)}
    path = client.begin(b"hello", **({} if late else wrong))
    answer = client.append(path, 5, b" world", "?1", **(wrong if late else {}))
    refused(answer, 409, "digest-mismatch", complete="?1")
    assert "Upload-Offset" not in answer.headers
    assert client.job(path)["state"] == "failed"
    gone = 404 if client.old else 409
    assert client.ask("HEAD", path).status == gone
    refused(client.append(path, 11, b"", "?1"), gone, "digest-mismatch", complete="?1")


@pytest.mark.parametrize("algorithm", ["sha-256", "sha-512"])
@pytest.mark.parametrize("late", [False, True], ids=["creation", "last-append"])
def test_a_whole_whose_digest_is_right(client: Resumer, algorithm: str, late: bool) -> None:
    """Repr-Digest is compared, stored, and told (section 10.1)."""
    right = {"Repr_Digest": digest(b"hello world", algorithm)}
    path = client.begin(b"hello", **({"Want_Repr_Digest": "sha-256=1"} if late else right))
    answer = client.append(path, 5, b" world", "?1", **(right if late else {}))
    is_result(answer, client, b"hello world")
    assert digest(b"hello world", algorithm) in answer.headers["Repr-Digest"]
    hexadecimal = hashlib.new(algorithm.replace("-", ""), b"hello world").hexdigest()
    assert answer.json["digest"][algorithm] == hexadecimal


def test_a_digest_amid_the_upload_says_nothing_of_the_whole(client: Resumer) -> None:
    """Repr-Digest counts with the creation and with the last append (section 10.1)."""
    path = client.begin(b"hello")
    client.append(path, 5, b" wor", Repr_Digest=digest(b" wor"))
    is_result(client.append(path, 9, b"ld", "?1"), client, b"hello world")


@pytest.mark.parametrize("late", [False, True], ids=["creation", "last-append"])
def test_a_digest_is_told_to_who_wants_it(client: Resumer, late: bool) -> None:
    """Want-Repr-Digest brings a Repr-Digest with the result; else there is none (section 10.1)."""
    wanted = {"Want_Repr_Digest": "sha-256=9, unixsum=1"}
    path = client.begin(b"hello", **({} if late else wanted))
    answer = client.append(path, 5, b" world", "?1", **(wanted if late else {}))
    is_result(answer, client, b"hello world")
    assert answer.headers["Repr-Digest"] == digest(b"hello world")
    assert "Repr-Digest" not in client.create(b"hello", "?1").headers


# The page


def test_the_walk_through_of_the_page_works(site: Server, tmp_path: Path) -> None:
    """The commands of docs/resumable.md do what stands there."""
    for program in ("curl", "openssl"):
        need(program)
    page = (ROOT / "docs" / "resumable.md").read_text()
    (script,) = re.findall(r"```sh\n(.*?)```", page, re.S)
    ran = subprocess.run(
        ["bash", "-euc", script.replace("localhost:8888", f"127.0.0.1:{site.port}")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    data = (tmp_path / "big.bin").read_bytes()
    assert "Upload-Offset: 2000000\n" in ran.stdout
    first, again, whole = (json.loads(line) for line in ran.stdout.splitlines() if "{" in line)
    assert first == again
    assert (first["filename"], first["bytes"]) == ("big.bin", len(data))
    assert whole["digest"]["sha-256"] == hashlib.sha256(data).hexdigest()
    assert site.get(f"/v1/files/{first['id']}").status == 404
    assert site.get(f"/v1/files/{whole['id']}/content").body == data


# The same service in this process, where its disk and its clock can be bent


@pytest.fixture
def app(io_loop: IOLoop, tmp_path: Path) -> Iterator[Application]:
    """The service in this process."""
    config = Config(data=tmp_path / "data", upload_expires_s=0.001, informational="on")
    opened = assembled(config)
    parts = io_loop.run_sync(opened.__aenter__)
    io_loop.run_sync(lambda: recover(parts))
    app = make_app(parts.services)
    app.settings["parts"] = parts
    yield app
    io_loop.run_sync(lambda: parts.services.manager.close(5))
    io_loop.run_sync(lambda: opened.__aexit__(None, None, None))


class Near:
    """A client on the loop of the service."""

    def __init__(self, client: AsyncHTTPClient, url: str) -> None:
        self._client = client
        self._url = url

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: Any) -> HTTPResponse:
        """One request."""
        named = {k.replace("_", "-"): str(v) for k, v in headers.items()}
        sent = body if method in ("POST", "PATCH") else None
        return await self._client.fetch(
            self._url + path, method=method, body=sent, headers=named, raise_error=False
        )

    async def begin(self, body: bytes) -> str:
        """Begin; the path of the upload resource."""
        answer = await self.ask("POST", "/resumable/", body, Upload_Complete="?0")
        return answer.headers["Location"]

    async def complete(self, path: str, offset: int) -> HTTPResponse:
        """Say that all is there."""
        named: dict[str, Any] = {"Upload_Offset": offset, "Upload_Complete": "?1"}
        return await self.ask("PATCH", path, b"", Content_Type=PARTIAL, **named)


@pytest.fixture
def near(http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str) -> Near:
    """A client of the service in this process."""
    return Near(http_client, base_url)


@pytest.mark.gen_test
async def test_104_acknowledges_only_what_is_committed(
    app: Application, http_server: HTTPServer, http_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that were received but not yet noted down are no promise (section 4.1.1)."""
    monkeypatch.setattr(resumable, "_TELL_S", 0.05)
    state, go_on = app.settings["parts"].state, asyncio.Event()
    save = state.save

    async def late(*args: Any, **more: Any) -> None:
        await go_on.wait()
        await save(*args, **more)

    monkeypatch.setattr(state, "save", late)
    reader, writer = await asyncio.open_connection("127.0.0.1", http_port)
    head = (
        "POST /resumable/ HTTP/1.1\r\nHost: localhost\r\nUpload-Draft-Interop-Version: 8\r\n"
        "Upload-Complete: ?1\r\nContent-Length: 1000\r\n\r\n"
    )
    writer.write(head.encode() + bytes(600))
    assert b"Location: /resumable/" in await reader.readuntil(b"\r\n\r\n")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.5):
            await reader.readuntil(b"\r\n\r\n")
    go_on.set()
    assert b"Upload-Offset: 600\r\n" in await reader.readuntil(b"\r\n\r\n")
    writer.close()


class Gate:
    """A point in the service at which a test holds whoever comes there."""

    def __init__(self) -> None:
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()

    async def passed(self) -> None:
        """Say that somebody is here, and wait."""
        self.reached.set()
        await self.go_on.wait()


@pytest.fixture
def publishing(app: Application, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """No file is published before this lets it pass."""
    blobs, gate = app.settings["parts"].blobs, Gate()
    publish = blobs.publish

    async def late(blob_id: str, name: str) -> int:
        await gate.passed()
        return int(await publish(blob_id, name))

    monkeypatch.setattr(blobs, "publish", late)
    return gate


@pytest.mark.gen_test
async def test_nobody_is_told_a_result_before_there_is_one(
    near: Near, publishing: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the last bytes are being made a file: 503 and Retry-After, then the result (4.3.2)."""
    monkeypatch.setattr(resumable, "_FINISH_S", 0.05)
    path = await near.begin(b"hello")
    first = asyncio.ensure_future(near.complete(path, 5))
    await publishing.reached.wait()
    second = asyncio.ensure_future(near.complete(path, 5))
    for method in ("HEAD", "GET"):
        answer = await near.ask(method, path)
        assert (answer.code, int(answer.headers["Retry-After"])) == (503, 2)
        assert "Upload-Complete" not in answer.headers
    publishing.go_on.set()
    assert [(await one).code for one in (first, second)] == [201, 201]
    assert (await first).body == (await second).body
    assert (await near.ask("HEAD", path)).headers["Upload-Complete"] == "?1"


@pytest.mark.parametrize(("version", "status"), [(5, 423), (6, 423), (7, 503), (8, 503)])
@pytest.mark.gen_test
async def test_clients_of_each_version_ask_again(
    near: Near,
    publishing: Gate,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    status: int,
) -> None:
    """A HEAD that can't be answered yet gets what the usual client of that version repeats."""
    monkeypatch.setattr(resumable, "_FINISH_S", 0)
    path = await near.begin(b"hello")
    finishing = asyncio.ensure_future(near.complete(path, 5))
    await publishing.reached.wait()
    answer = await near.ask("HEAD", path, Upload_Draft_Interop_Version=version)
    assert (answer.code, int(answer.headers["Retry-After"])) == (status, 2)
    publishing.go_on.set()
    assert (await finishing).code == 201


@pytest.mark.gen_test
async def test_a_question_waits_for_the_result(
    app: Application, near: Near, publishing: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short finishing is waited for; one that is paused is not (section 4.3.2)."""
    monkeypatch.setattr(resumable, "_FINISH_S", 1000)
    uploads, waits = app.settings["services"].uploads, asyncio.Event()
    complete = uploads.complete

    async def told(job: Job, wait_s: float | None = None) -> Any:
        if wait_s == 1000:
            waits.set()
        return await complete(job, wait_s)

    monkeypatch.setattr(uploads, "complete", told)
    path = await near.begin(b"hello")
    finishing = asyncio.ensure_future(near.complete(path, 5))
    await publishing.reached.wait()
    question = asyncio.ensure_future(near.ask("HEAD", path))
    await waits.wait()
    await asyncio.sleep(0.05)  # in which it gets no answer
    assert not question.done()
    await near.ask("POST", f"/v1/jobs/{path.rpartition('/')[2]}/pause")
    assert (await near.ask("HEAD", path)).code == 503
    publishing.go_on.set()
    assert (await question).headers["Upload-Complete"] == "?1"
    assert (await finishing).code == 201


@pytest.mark.gen_test
async def test_a_finishing_that_fails_is_told_and_tried_again(
    app: Application, near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the disk refuses is a 5xx and no result; the next question tries again (4.3.2)."""
    blobs = app.settings["parts"].blobs

    async def full(blob_id: str, name: str) -> int:
        raise SluiceError("disk-full")

    path = await near.begin(b"hello")
    with monkeypatch.context() as broken:
        broken.setattr(blobs, "publish", full)
        answer = await near.complete(path, 5)
        assert (answer.code, answer.headers["Upload-Complete"]) == (507, "?0")
        assert answer.headers["Upload-Offset"] == "5"
        assert (await near.ask("HEAD", path)).code == 507
    answer = await near.ask("HEAD", path)
    assert (answer.code, answer.headers["Upload-Complete"]) == (204, "?1")


@pytest.mark.gen_test
async def test_delete_ends_a_finishing(near: Near, publishing: Gate) -> None:
    """A cancel that comes before the result wins, and who waits for the result is told (4.5.2)."""
    path = await near.begin(b"hello")
    finishing = asyncio.ensure_future(near.complete(path, 5))
    await publishing.reached.wait()
    delete = asyncio.ensure_future(near.ask("DELETE", path))
    job = f"/v1/jobs/{path.rpartition('/')[2]}"
    while json.loads((await near.ask("GET", job)).body)["state"] != "cancelling":
        await asyncio.sleep(0)
    publishing.go_on.set()
    assert (await delete).code == 204
    answer = await finishing
    assert (answer.code, answer.headers["Upload-Complete"]) == (409, "?0")
    assert (await near.ask("HEAD", path)).code == 404


@pytest.mark.gen_test
async def test_an_upload_left_alone_is_gone(app: Application, near: Near) -> None:
    """When its lifetime is over, the upload resource is not there (section 4.1.4)."""
    path = await near.begin(b"hello")
    await asyncio.sleep(0.01)
    assert await app.settings["parts"].services.uploads.expire() == 1
    for method in ("HEAD", "GET", "DELETE"):
        assert (await near.ask(method, path)).code == 404
    assert (await near.complete(path, 5)).code == 404


@pytest.mark.gen_test
async def test_a_full_disk_is_told_and_keeps_what_is_stored(
    app: Application, near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    """507 amid the bytes, with address and offset; with room it goes on (RFC 4918 11.5)."""
    blobs, room = app.settings["parts"].blobs, [1 << 40]

    async def free_bytes() -> int:
        return room.pop() if len(room) > 1 else room[0]

    monkeypatch.setattr(blobs, "free_bytes", free_bytes)
    data = os.urandom(3 << 20)
    room[:] = [0, 1 << 40, 1 << 40, 1 << 40]
    answer = await near.ask("POST", "/resumable/", data, Upload_Complete="?0")
    assert (answer.code, answer.headers["Upload-Complete"]) == (507, "?0")
    room[:] = [1 << 40]
    path = answer.headers["Location"]
    at = int((await near.ask("HEAD", path)).headers["Upload-Offset"])
    assert at == int(answer.headers["Upload-Offset"])
    named = {"Upload_Offset": at, "Upload_Complete": "?1", "Content_Type": PARTIAL}
    answer = await near.ask("PATCH", path, data[at:], **named)
    assert (answer.code, answer.headers["Upload-Complete"]) == (201, "?1")
