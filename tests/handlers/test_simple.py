"""The endpoints of the simple API, row by row, as curl or a script meets them."""

from __future__ import annotations

import base64
import http.client
import json
import os
import select
import signal
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import quote

import pytest

from tests.conftest import Serve
from tests.handlers.clients import FORM, FORM_END, UUID7, Caller, Raw, form_head
from tests.harness import FULL, Server, eventually, form

BIG_BYTES = (256 if FULL else 24) << 20
NAME = "xxBOUNDARYxx"
AT_ONCE_S = 2.0  # a hundred times what it takes; to wait for the sender would take five seconds


def refused(answer: Any, status: int, code: str, field: str | None = None) -> Any:
    """Check a problem; its JSON."""
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json
    assert (answer.status, problem["status"], problem["code"]) == (status, status, code), problem
    assert problem["message"] == problem["detail"] != ""
    if field is not None:
        assert problem["field"] == field, problem
    return problem


@contextmanager
def children_stopped(server: Server) -> Iterator[None]:
    """Meanwhile the server's helper processes do nothing."""
    pid = server.pid
    children = [
        int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]
    assert children
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in children:
            os.kill(pid, signal.SIGCONT)


# Row 1: a form


def test_a_form_is_answered_with_the_published_file_and_its_job(caller: Caller, name: str) -> None:
    """The answer to a form tells the file, its job, its name and its size."""
    answer = caller.send_form(("file", name, b"hello"))
    assert answer.status == 200
    assert set(answer.json) == {"message", "id", "job", "filename", "bytes"}
    assert (answer.json["filename"], answer.json["bytes"]) == (name, 5)
    assert UUID7.fullmatch(answer.json["id"]) and UUID7.fullmatch(answer.json["job"])
    job = caller.server.job(answer.json["job"])
    assert (job["kind"], job["state"], job["name"]) == ("upload", "succeeded", name)
    assert job["result"]["file"] == answer.json["id"]
    published = caller.server.folder / "uploads" / answer.json["id"] / name
    assert published.read_bytes() == b"hello"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\r\n",
        b"\r\n\r\n\r\n",
        b"line\r\nline\r\n",
        b"--",
        b"\r\n--",
        f"\r\n--{NAME[:-1]}".encode(),
        f"\r\n--{NAME}".encode()[:-1] + b"\r\n",
        f"--{NAME}--".encode(),
        bytes(range(256)) * 64,
        b"\r" * 70_001,
        bytes(16 << 10),
        bytes((16 << 10) + 1),
        bytes(range(251)) * 8357,
    ],
    ids=lambda data: f"{len(data)}-{data[:12].hex()}",
)
def test_a_file_in_a_form_is_stored_byte_for_byte(caller: Caller, name: str, data: bytes) -> None:
    """Whatever a file holds, also line breaks and almost the boundary, is stored as it is."""
    answer = caller.send_form(("file", name, data))
    assert (answer.status, answer.json["bytes"]) == (200, len(data))
    assert caller.content(answer.json["id"]) == data


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_boundary_may_be_split_over_reads(caller: Caller, name: str, size: int) -> None:
    """A form that arrives in pieces of any size is read as one that arrives at once."""
    data = f"a\r\n--{NAME[:4]}\r\n\r\n--b\r\n{NAME}".encode()
    body, content_type = form(("note", "n.txt", b"skip"), ("file", name, data), ("file", name, b""))
    with Raw(caller.server) as raw:
        raw.head("POST", "/upload", Content_Type=content_type, Transfer_Encoding="chunked")
        chunks = [body[i : i + size] for i in range(0, len(body), size)]
        raw.send(b"".join(f"{len(c):x}\r\n".encode() + c + b"\r\n" for c in chunks))
        raw.chunk(b"")
        answer = raw.answer()
    assert answer.status == 200, answer
    first, second = answer.json["files"]
    assert caller.content(first["id"]) == data
    assert caller.content(second["id"]) == b""


@pytest.mark.parametrize(
    ("boundary", "written"),
    [
        ("b", "b"),
        ("b", '"b"'),
        ("a b'()+_,-./:=?", '"a b\'()+_,-./:=?"'),
        ("x" * 70, "x" * 70),
        ("----WebKitFormBoundary7MA4YWxkTrZu0gW", "----WebKitFormBoundary7MA4YWxkTrZu0gW"),
    ],
)
def test_a_boundary_may_be_quoted(caller: Caller, name: str, boundary: str, written: str) -> None:
    """A boundary is taken from the Content-Type in any of its ways to be written."""
    body, _ = form(("file", name, b"data"), boundary=boundary)
    answer = caller.post("/upload", body, Content_Type=f"multipart/form-data; boundary={written}")
    assert answer.status == 200, answer
    assert caller.content(answer.json["id"]) == b"data"


def test_what_stands_around_the_parts_is_ignored(caller: Caller, name: str) -> None:
    """A preamble, an epilogue and other fields are no part of the file."""
    field = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n--no\r\n'
    body = b"preamble\r\n" + field + form_head(name) + b"data\r\n" + field + b"--b--\r\nepilogue"
    answer = caller.post("/upload", body, Content_Type=FORM)
    assert answer.status == 200, answer
    assert caller.content(answer.json["id"]) == b"data"


def test_several_files_are_all_published_by_one_job(caller: Caller, name: str) -> None:
    """Several file parts are answered as a list and belong to one job."""
    parts = [("file", f"{i}-{name}", bytes([i]) * 100_000) for i in range(3)]
    answer = caller.send_form(*parts)
    assert answer.status == 200
    assert [file["filename"] for file in answer.json["files"]] == [part[1] for part in parts]
    assert answer.json["id"] == answer.json["files"][0]["id"]
    for file, part in zip(answer.json["files"], parts, strict=True):
        assert caller.content(file["id"]) == part[2]
        assert caller.get(f"/v1/files/{file['id']}").json["job"] == answer.json["job"]


def test_of_several_files_all_or_none_are_published(caller: Caller, name: str) -> None:
    """If one of several files can't be taken, none is published and no bytes are left."""
    before = caller.temporary()
    answer = caller.send_form(("file", name, b"good"), ("file", "..", b"bad"))
    refused(answer, 400, "invalid-field", "filename")
    assert caller.versions(name) == []
    assert caller.job("upload")["state"] == "failed"
    eventually(lambda: caller.temporary() <= before, "the unfinished bytes are gone")


@pytest.mark.parametrize("field", ["datei", "files", "File", ""])
def test_a_file_under_another_name_is_refused_with_that_name(
    caller: Caller, name: str, field: str
) -> None:
    """A form without a part named file is a 400 that tells which fields it has."""
    problem = refused(caller.send_form((field, name, b"x")), 400, "no-file-part")
    assert repr(field) in problem["message"]
    assert caller.versions(name) == []
    assert caller.jobs() == []


def test_a_plain_field_named_file_is_no_file(caller: Caller) -> None:
    """A text field named file, as `curl -F file=text` sends it, is refused."""
    body = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n--b--\r\n'
    refused(caller.post("/upload", body, Content_Type=FORM), 400, "no-file-part")


GOOD = form_head("bad.bin") + b"data"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", GOOD + FORM_END),
        ("multipart/form-data; boundary=", GOOD + FORM_END),
        ("multipart/form-data; boundary=" + "x" * 71, GOOD + FORM_END),
        ("multipart/form-data; boundary=other", GOOD + FORM_END),
        (FORM, b""),
        (FORM, b"no form at all"),
        (FORM, GOOD),
        (FORM, GOOD + b"\r\n--b"),
        (FORM, GOOD + b"\r\n--b\r\n"),
        (FORM, GOOD + FORM_END[:-4]),
        (FORM, b"--b\r\n\r\ndata\r\n--b--\r\n"),
        (FORM, b'--b\r\nContent-Disposition: form-data; filename="bad.bin"\r\n\r\nx\r\n--b--\r\n'),
        (FORM, b"--b\r\nX: " + b"x" * 9000 + b"\r\n" + GOOD[5:] + FORM_END),
        (FORM, b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n' * 1100 + b"--b--"),
    ],
    ids=lambda value: f"{value[:70]!r}-{len(value)}",
)
def test_a_malformed_or_truncated_form_publishes_nothing(
    caller: Caller, content_type: str, body: bytes
) -> None:
    """A bad boundary, bad part or missing end of a form is a 400, and nothing is published."""
    before = caller.temporary()
    answer = caller.post("/upload", body, Content_Type=content_type)
    assert answer.status == 400, answer
    assert answer.json["code"] in ("multipart-invalid", "no-file-part")
    assert caller.versions("bad.bin") == []
    assert all(job["state"] == "failed" for job in caller.jobs())
    eventually(lambda: caller.temporary() <= before, "the unfinished bytes are gone")


def test_a_form_whose_client_goes_away_publishes_nothing(caller: Caller, name: str) -> None:
    """A form that is cut in the middle fails as client-gone and leaves no bytes."""
    before = caller.temporary()
    with Raw(caller.server) as raw:
        raw.head(
            "POST",
            "/upload",
            Content_Type=FORM,
            Content_Length=10_000_000,
            X_Client_Id=caller.client,
        )
        raw.send(form_head(name) + bytes(200_000))
        job = caller.job("upload")
        eventually(lambda: not caller.temporary() <= before, "bytes arrive in the temporary folder")
        assert caller.versions(name) == []
        raw.cut()
    assert caller.server.wait_for(job["id"], "failed")["error"]["code"] == "client-gone"
    eventually(lambda: caller.temporary() <= before, "the unfinished bytes are gone")
    assert caller.versions(name) == []


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("../../etc/passwd", "passwd"),
        ("/etc/passwd", "passwd"),
        ("C:\\\\a\\\\b.txt", "b.txt"),
        ("a\\\\..\\\\c.txt", "c.txt"),
        ("grüße 日本 🎈.txt", "grüße 日本 🎈.txt"),
        (unicodedata.normalize("NFD", "é.txt"), "é.txt"),
        ("a\tb\x01c.txt", "abc.txt"),
        ("a%22b.txt", 'a"b.txt'),
        ("  spaces .txt ", "spaces .txt"),
        ("x" * 255, "x" * 255),
        ("a?b&c=d#e.txt", "a?b&c=d#e.txt"),
        ("'; DROP TABLE files.txt", "'; DROP TABLE files.txt"),
    ],
)
def test_a_name_is_a_label_and_never_a_path(caller: Caller, given: str, stored: str) -> None:
    """Of a file's name its last part is kept, in NFC and without control characters."""
    answer = caller.send_form(("file", given, b"data"))
    assert answer.status == 200, answer
    assert answer.json["filename"] == stored
    assert caller.versions(stored)[0]["id"] == answer.json["id"]
    assert caller.content(answer.json["id"]) == b"data"


@pytest.mark.parametrize("given", ["", ".", "..", "a/", "x/..", "\x01", "x" * 256, "ü" * 128])
def test_a_name_that_names_no_file_is_refused(caller: Caller, given: str) -> None:
    """A name that is empty, a dot, or longer than 255 bytes is a 400 that names the field."""
    refused(caller.send_form(("file", given, b"x")), 400, "invalid-field", "filename")
    assert caller.jobs() == []


@pytest.mark.parametrize(
    ("extra", "stored"),
    [
        ("filename*=UTF-8''gr%C3%BC%C3%9Fe.txt", "grüße.txt"),
        ("filename=\"x.txt\"; filename*=utf-8'en'y.txt", "y.txt"),
        ("filename=\"x; filename*=UTF-8''y.txt\"", "x; filename*=UTF-8''y.txt"),
        ("filename=\"x.txt\"; filename*=UTF-8''%FF.txt", "x.txt"),
    ],
)
def test_an_extended_name_is_understood(caller: Caller, extra: str, stored: str) -> None:
    """A filename* with percent-encoded UTF-8, which some senders use, is the file's name."""
    head = f'--b\r\nContent-Disposition: form-data; name="file"; {extra}\r\n\r\n'
    answer = caller.post("/upload", head.encode() + b"data" + FORM_END, Content_Type=FORM)
    assert answer.status == 200, answer
    assert answer.json["filename"] == stored


def test_the_same_name_twice_makes_two_versions(caller: Caller, name: str) -> None:
    """By its name one gets the newest version of a file, by its id always the same bytes."""
    first, second = caller.store(name, b"first"), caller.store(name, b"second")
    assert [(f["id"], f["version"]) for f in caller.versions(name)] == [(second, 2), (first, 1)]
    assert caller.content(first) == b"first"
    assert caller.post("/export", {"filename": name}).body == b"second"


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain", ""]
)
def test_an_upload_that_is_neither_form_nor_block_is_refused(
    caller: Caller, content_type: str
) -> None:
    """Without a form and without file_name nobody knows what to store: 400."""
    refused(
        caller.post("/upload", b"data", Content_Type=content_type),
        400,
        "invalid-field",
        "file_name",
    )


def test_a_big_form_needs_no_memory(serve: Serve, name: str) -> None:
    """The bytes of a form go to a file while they arrive, never into memory."""
    server = serve()
    before = server.status("VmHWM")
    body_end = FORM_END
    head = form_head(name)
    with Raw(server) as raw:
        raw.head(
            "POST",
            "/upload",
            Content_Type=FORM,
            Content_Length=len(head) + BIG_BYTES + len(body_end),
        )
        raw.send(head)
        for _ in range(BIG_BYTES >> 20):
            raw.send(bytes(1 << 20))
        raw.send(body_end)
        answer = raw.answer()
    assert (answer.status, answer.json["bytes"]) == (200, BIG_BYTES)
    assert server.status("VmHWM") - before < 12 << 10


# Row 2: terminate


def begin_form(caller: Caller, raw: Raw, name: str, n: int = 1 << 30) -> Any:
    """Begin a form upload; its job, once bytes of it are stored."""
    raw.head("POST", "/upload", Content_Type=FORM, Content_Length=n, X_Client_Id=caller.client)
    raw.send(form_head(name) + bytes(100_000))
    return stored(caller, name)


def begin_block(caller: Caller, raw: Raw, name: str, n: int = 1 << 30) -> Any:
    """Begin an upload by blocks; its job, once bytes of it are stored."""
    raw.head(
        "POST",
        f"/upload?file_name={name}&bytes_read=0",
        Content_Length=n,
        X_Client_Id=caller.client,
    )
    raw.send(bytes(100_000))
    return stored(caller, name)


def begin_chunked(caller: Caller, raw: Raw, name: str) -> Any:
    """Begin an upload by blocks with a chunked body; its job, once bytes of it are stored."""
    raw.head(
        "POST",
        f"/upload?file_name={name}&bytes_read=0",
        Transfer_Encoding="chunked",
        X_Client_Id=caller.client,
    )
    raw.chunk(bytes(100_000))
    return stored(caller, name)


def stored(caller: Caller, name: str) -> Any:
    """The job of an upload, once bytes of it are stored."""
    return eventually(
        lambda: next(
            (
                job
                for job in caller.jobs()
                if job["name"] == name
                and job["transfer"]["connected"]
                and job["transfer"]["stored_bytes"] >= 90_000
            ),
            None,
        ),
        f"bytes of {name} are stored",
    )


Begin = Callable[[Caller, Raw, str], Any]


def check_aborted(answer: Any, job: Any) -> None:
    """Check the abort message of a terminated upload."""
    problem = refused(answer, 409, "upload-terminated")
    assert "abort" in problem["message"]
    assert problem["job"] == job["id"]


@pytest.mark.parametrize("begin", [begin_form, begin_block, begin_chunked])
def test_terminate_ends_a_stalled_upload_at_once(caller: Caller, name: str, begin: Begin) -> None:
    """An upload whose sender is silent gets its abort message at once."""
    before = caller.temporary()
    took_s = []
    for _ in range(3):
        with Raw(caller.server) as raw:
            job = begin(caller, raw, name)
            began = monotonic()
            ended = caller.delete("/upload/terminate")
            answer = raw.answer()
            took_s.append(monotonic() - began)
        assert (ended.status, ended.json["terminated"]) == (200, [job["id"]])
        assert ended.json["message"]
        check_aborted(answer, job)
        assert caller.server.job(job["id"])["state"] == "cancelled"
        assert caller.temporary() <= before
    assert min(took_s) < AT_ONCE_S, took_s
    assert caller.versions(name) == []


@pytest.mark.parametrize("begin", [begin_form, begin_block])
def test_terminate_ends_an_upload_that_is_still_sending(
    caller: Caller, name: str, begin: Begin
) -> None:
    """An upload in full flow gets its abort message at once, and its bytes are gone."""
    before = caller.temporary()
    took_s = []
    for _ in range(3):
        with Raw(caller.server) as raw:
            job = begin(caller, raw, name)
            with raw.pouring(1 << 30):
                began = monotonic()
                ended = caller.delete("/upload/terminate/")
                answer = raw.answer()
                took_s.append(monotonic() - began)
        assert ended.json["terminated"] == [job["id"]]
        check_aborted(answer, job)
        assert caller.temporary() <= before
    assert min(took_s) < AT_ONCE_S, took_s


@pytest.mark.parametrize("begin", [begin_form, begin_block, begin_chunked])
def test_terminate_ends_a_paused_upload(caller: Caller, name: str, begin: Begin) -> None:
    """An upload that is held by a pause ends like a running one."""
    before = caller.temporary()
    with Raw(caller.server) as raw:
        job = begin(caller, raw, name)
        assert caller.post(f"/v1/jobs/{job['id']}/pause").status in (200, 202)
        caller.server.wait_for(job["id"], "paused")
        assert caller.delete("/upload/terminate").json["terminated"] == [job["id"]]
        check_aborted(raw.answer(), job)
    assert caller.temporary() <= before


@pytest.mark.parametrize("by", ["id", "file_name"])
def test_terminate_picks_one_upload(caller: Caller, name: str, by: str) -> None:
    """With a selector only the upload that it names is ended."""
    with Raw(caller.server) as one, Raw(caller.server) as two:
        job = begin_form(caller, one, name)
        other = begin_form(caller, two, f"other-{name}")
        value = job["id"] if by == "id" else name
        ended = caller.delete(f"/upload/terminate?{by}={value}")
        assert ended.json["terminated"] == [job["id"]]
        check_aborted(one.answer(), job)
        assert caller.server.job(other["id"])["state"] == "running"


def test_terminate_never_touches_another_callers_upload(
    site: Server, caller: Caller, name: str
) -> None:
    """Neither without a selector nor by its id does one end the upload of another client."""
    stranger = Caller(site, "stranger")
    with Raw(site) as raw:
        job = begin_form(caller, raw, name)
        for query in ("", f"?id={job['id']}", f"?file_name={name}"):
            refused(stranger.delete(f"/upload/terminate{query}"), 404, "nothing-uploading")
        assert site.job(job["id"])["state"] == "running"


def test_terminate_without_an_upload_says_so(caller: Caller, name: str) -> None:
    """Who is not uploading gets a 404 and a message, also for an upload that has ended."""
    problem = refused(caller.delete("/upload/terminate"), 404, "nothing-uploading")
    assert "not uploading anything" in problem["message"]
    job = caller.send_form(("file", name, b"x")).json["job"]
    refused(caller.delete("/upload/terminate"), 404, "nothing-uploading")
    refused(caller.delete(f"/upload/terminate?id={job}"), 404, "nothing-uploading")
    assert len(caller.versions(name)) == 1


def test_terminate_ends_an_upload_by_blocks_between_two_blocks(caller: Caller, name: str) -> None:
    """An upload whose last block came a moment ago is ended although no request is open."""
    before = caller.temporary()
    assert caller.block(name, 0, b"abc").json == {"bytes_read": 3}
    job = caller.job("upload")
    assert caller.delete("/upload/terminate").json["terminated"] == [job["id"]]
    assert caller.temporary() <= before
    assert caller.get(f"/upload?file_name={name}").status == 404


def test_terminate_finds_an_old_upload_only_by_a_selector(serve: Serve, name: str) -> None:
    """An upload that was left alone for longer is ended only when it is named."""
    caller = Caller(serve("--terminate-recent-s", "0s"), "c")
    caller.block(name, 0, b"abc")
    began = monotonic()
    eventually(lambda: monotonic() > began + 0.01, "some milliseconds pass")
    refused(caller.delete("/upload/terminate"), 404, "nothing-uploading")
    assert len(caller.delete(f"/upload/terminate?file_name={name}").json["terminated"]) == 1


def test_terminate_knows_its_parameters(caller: Caller) -> None:
    """An unknown selector is a 400, and other methods than DELETE are a 405."""
    refused(caller.delete("/upload/terminate?file=x"), 400, "invalid-field", "file")
    answer = caller.post("/upload/terminate")
    refused(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "DELETE, OPTIONS"


# Rows 3 and 4: export


def test_export_streams_the_file_as_an_attachment(caller: Caller) -> None:
    """An export has the exact length, both kinds of file name, and a validator."""
    data = bytes(range(256)) * 9000
    file_id = caller.block('grüße "1".bin', 0, data, "&is_complete=1").json["id"]
    answer = caller.post("/export", {"filename": 'grüße "1".bin'})
    assert (answer.status, answer.body) == (200, data)
    assert answer.headers["Content-Length"] == str(len(data))
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Etag"] == caller.get(f"/v1/files/{file_id}").json["etag"]
    assert answer.headers["Content-Disposition"] == (
        "attachment; filename=\"gr__e _1_.bin\"; filename*=UTF-8''gr%C3%BC%C3%9Fe%20%221%22.bin"
    )
    job = caller.server.wait_for(caller.job("download")["id"], "succeeded")
    assert job["progress"]["done"] == job["progress"]["total"] == len(data)


def test_export_of_an_empty_file(caller: Caller, name: str) -> None:
    """An empty file is exported as an empty attachment."""
    caller.store(name, b"")
    answer = caller.post("/export/", {"filename": name})
    assert (answer.status, answer.body, answer.headers["Content-Length"]) == (200, b"", "0")
    caller.server.wait_for(caller.job("download")["id"], "succeeded")


def test_export_takes_the_content_type_of_the_document(caller: Caller, name: str) -> None:
    """The header may be written as in the document, and an id names a file, too."""
    file_id = caller.store(name, b"data")
    body = json.dumps({"filename": file_id}).encode()
    assert caller.post("/export", body, Content_Type="Application/json").body == b"data"


def test_export_of_an_unknown_file_is_a_404(caller: Caller, name: str) -> None:
    """A file that is not there can't be exported, and no job is made."""
    refused(caller.post("/export", {"filename": name}), 404, "file-unknown")
    assert caller.jobs() == []


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        (b"", "invalid-json", None),
        (b"filename=x", "invalid-json", None),
        (b'{"filename": "x"', "invalid-json", None),
        (b'{"filename": "\xff"}', "invalid-json", None),
        (b"[]", "invalid-field", None),
        (b'"x"', "invalid-field", None),
        (b"{}", "invalid-field", "filename"),
        (b'{"filename": 5}', "invalid-field", "filename"),
        (b'{"filename": null}', "invalid-field", "filename"),
        (b'{"filename": ""}', "invalid-field", "filename"),
        (b'{"filename": ".."}', "invalid-field", "filename"),
        (b'{"filename": "x", "file": "y"}', "invalid-field", "file"),
    ],
)
def test_export_wants_json_with_a_filename(
    caller: Caller, body: bytes, code: str, field: str | None
) -> None:
    """A body that is no JSON, or has no filename, is a 400."""
    refused(caller.post("/export", body), 400, code, field)


def test_export_in_the_background_makes_a_job_whose_result_is_the_file(
    caller: Caller, name: str
) -> None:
    """With Prefer: respond-async the answer is 202 and a job; nothing is copied."""
    file_id = caller.store(name, b"data")
    answer = caller.post("/export", {"filename": name}, Prefer="respond-async")
    assert answer.status == 202
    assert answer.headers["Location"] == f"/v1/jobs/{answer.json['id']}"
    job = caller.get(answer.headers["Location"]).json
    assert (job["state"], job["result"]["file"]) == ("succeeded", file_id)


def begin_export(caller: Caller, raw: Raw, name: str) -> Any:
    """Begin an export that its reader does not read on; its job, once it stands."""
    body = json.dumps({"filename": name}).encode()
    raw.head("POST", "/export", Content_Length=len(body), X_Client_Id=caller.client)
    raw.send(body)
    assert raw.file.readline() == b"HTTP/1.1 200 OK\r\n"
    return caller.job("download")


@pytest.fixture(scope="module")
def big(site: Server) -> tuple[str, bytes]:
    """A stored file that no socket's buffers hold, and its bytes."""
    data = bytes(range(256)) * (BIG_BYTES >> 8)
    assert Caller(site, "big").block("big.bin", 0, data, "&is_complete=1").status == 200
    return "big.bin", data


@pytest.mark.parametrize("query", ["", "?id={id}", "?file_name=big.bin", "/"])
def test_terminate_closes_an_export_short(
    caller: Caller, big: tuple[str, bytes], query: str
) -> None:
    """An export that is ended in the middle closes short of its Content-Length."""
    name, data = big
    with Raw(caller.server, receive_bytes=64 << 10) as raw:
        job = begin_export(caller, raw, name)
        headers = http.client.parse_headers(raw.file)
        assert headers["Content-Length"] == str(len(data))
        ended = caller.post("/export/terminate" + query.format(id=job["id"]))
        assert (ended.status, ended.json["terminated"]) == (200, [job["id"]])
        assert ended.json["message"]
        assert len(raw.rest()) < len(data)
    assert caller.server.job(job["id"])["state"] == "cancelled"


def test_export_terminate_without_an_export_says_so(
    site: Server, caller: Caller, big: tuple[str, bytes], name: str
) -> None:
    """Who is not exporting gets a 404 and a message; another's export is not touched."""
    problem = refused(caller.post("/export/terminate"), 404, "nothing-exporting")
    assert "not currently exporting" in problem["message"]
    with Raw(site, receive_bytes=64 << 10) as raw:
        job = begin_export(Caller(site, "other"), raw, big[0])
        for query in ("", f"?id={job['id']}", f"?file_name={big[0]}"):
            refused(caller.post(f"/export/terminate{query}"), 404, "nothing-exporting")
        assert site.job(job["id"])["state"] == "running"
        raw.cut()
    assert site.wait_for(job["id"], "failed")["error"]["code"] == "client-gone"


def test_an_export_is_paused_and_resumed(caller: Caller, big: tuple[str, bytes]) -> None:
    """A paused export sends nothing more; resumed it sends the rest, and no byte is missing."""
    name, data = big
    with Raw(caller.server, receive_bytes=64 << 10) as raw:
        job = begin_export(caller, raw, name)
        http.client.parse_headers(raw.file)
        caller.post(f"/v1/jobs/{job['id']}/pause")
        paused = caller.server.wait_for(job["id"], "paused")
        left = paused["transfer"]["stored_bytes"]  # handed to the kernel before the pause
        assert left < len(data)
        got = raw.file.read(left)
        assert caller.server.job(job["id"])["transfer"]["stored_bytes"] == left
        assert caller.post(f"/v1/jobs/{job['id']}/resume").json["state"] == "running"
        got += raw.file.read(len(data) - left)
    assert got == data
    assert caller.server.wait_for(job["id"], "succeeded")["progress"]["done"] == len(data)


# Row 5: blocks


def test_blocks_make_a_file_that_an_empty_block_ends(caller: Caller, name: str) -> None:
    """Blocks are stored one after the other; the file is published by an empty one."""
    blocks = [b"first", bytes(200_000), b"\r\nthird"]
    at = 0
    for block in blocks:
        answer = caller.block(name, at, block)
        at += len(block)
        assert (answer.status, answer.json) == (200, {"bytes_read": at})
        assert caller.versions(name) == []
    done = caller.block(name, at, b"")
    assert (done.status, done.json["bytes_read"], done.json["is_complete"]) == (200, at, True)
    assert caller.content(done.json["id"]) == b"".join(blocks)


@pytest.mark.parametrize("word", ["true", "1", "True"])
def test_is_complete_ends_an_upload(caller: Caller, name: str, word: str) -> None:
    """The last block may say that it is the last."""
    caller.block(name, 0, b"abc")
    done = caller.block(name, 3, b"def", f"&is_complete={word}")
    assert (done.json["bytes_read"], done.json["is_complete"]) == (6, True)
    assert caller.content(done.json["id"]) == b"abcdef"


def test_file_size_ends_an_upload_when_it_is_reached(caller: Caller, name: str) -> None:
    """Where the size is told with each block, the block that reaches it ends the upload."""
    assert caller.block(name, 0, b"abc", "&file_size=6").json == {"bytes_read": 3}
    done = caller.block(name, 3, b"def", "&file_size=6")
    assert done.json["is_complete"] is True
    assert caller.content(done.json["id"]) == b"abcdef"


def test_file_size_may_be_told_late(caller: Caller, name: str) -> None:
    """A size that only the last block tells ends the upload as well."""
    assert caller.block(name, 0, b"abc").json == {"bytes_read": 3}
    done = caller.block(name, 3, b"def", "&file_size=6")
    assert done.json.get("is_complete") is True, done
    assert caller.content(done.json["id"]) == b"abcdef"


def test_file_size_is_kept(caller: Caller, name: str) -> None:
    """A size that was told is binding: no other, no more bytes, no early end."""
    caller.block(name, 0, b"abc", "&file_size=6")
    refused(caller.block(name, 3, b"d", "&file_size=7"), 400, "invalid-field", "file_size")
    for more, chunked in (("&file_size=6", False), ("", False), ("", True)):
        body = iter([b"defg"]) if chunked else b"defg"
        answer = caller.post(f"/upload?file_name={name}&bytes_read=3{more}", body)
        assert answer.status in (400, 413), answer
        assert caller.get(f"/upload?file_name={name}").json["bytes_read"] == 3
    for block, more in ((b"d", "&is_complete=1"), (b"", "")):
        problem = refused(caller.block(name, 3, block, more), 400, "invalid-field", "is_complete")
        assert problem["bytes_read"] == 3 + len(block)
        caller_at = caller.get(f"/upload?file_name={name}").json["bytes_read"]
        assert caller_at == 3 + len(block)
        break
    done = caller.block(name, 4, b"ef")
    assert caller.content(done.json["id"]) == b"abcdef"


def test_an_empty_first_block_makes_an_empty_file(caller: Caller, name: str) -> None:
    """A file without bytes is uploaded by one empty block."""
    done = caller.block(name, 0, b"")
    assert (done.json["bytes_read"], done.json["is_complete"]) == (0, True)
    assert caller.content(done.json["id"]) == b""


@pytest.mark.parametrize("at", [0, 2, 4, 10**17])
def test_a_block_at_a_wrong_offset_changes_nothing(caller: Caller, name: str, at: int) -> None:
    """A block that does not begin where the stored bytes end is a 400 with the true offset."""
    caller.block(name, 0, b"abc")
    problem = refused(caller.block(name, at, b"xyz"), 400, "offset-mismatch", "bytes_read")
    assert problem["bytes_read"] == 3
    assert caller.get(f"/upload?file_name={name}").json == {"bytes_read": 3, "is_complete": False}
    done = caller.block(name, 3, b"def", "&is_complete=1")
    assert caller.content(done.json["id"]) == b"abcdef"


def test_a_wrong_offset_does_not_disturb_an_open_request(caller: Caller, name: str) -> None:
    """A block at a wrong offset is refused while the right one goes on."""
    with Raw(caller.server) as raw:
        begin_block(caller, raw, name, 200_000)
        for at in (0, 50_000, 10**6):
            problem = refused(caller.block(name, at, b"x"), 400, "offset-mismatch")
            assert problem["bytes_read"] == 100_000
        raw.send(bytes(100_000))
        assert raw.answer().json == {"bytes_read": 200_000}


def test_a_first_block_must_begin_at_zero(caller: Caller, name: str) -> None:
    """Nothing is stored of a file that is not begun at its beginning."""
    problem = refused(caller.block(name, 5, b"x"), 400, "offset-mismatch")
    assert problem["bytes_read"] == 0
    assert caller.get(f"/upload?file_name={name}").status == 404


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("file_name=x&bytes_read=-1", "bytes_read"),
        ("file_name=x&bytes_read=one", "bytes_read"),
        ("file_name=x&bytes_read=1.5", "bytes_read"),
        ("file_name=x&bytes_read=+1", "bytes_read"),
        ("file_name=x&bytes_read=1_0", "bytes_read"),
        ("file_name=x&bytes_read=%D9%A3", "bytes_read"),
        ("file_name=x&bytes_read=", "bytes_read"),
        ("file_name=x&bytes_read=0&file_size=-1", "file_size"),
        ("file_name=x&bytes_read=0&file_size=x", "file_size"),
        ("file_name=x&bytes_read=0&file_size=1", "file_size"),
        ("file_name=x&bytes_read=0&is_complete=maybe", "is_complete"),
        ("file_name=x&bytes_read=0&bytes_read=0", "bytes_read"),
        ("file_name=x&bytes_read=0&offset=0", "offset"),
        ("file_name=&bytes_read=0", "file_name"),
        ("file_name=..&bytes_read=0", "file_name"),
        ("file_name=a%2F&bytes_read=0", "file_name"),
    ],
)
def test_a_wrong_parameter_of_a_block_is_named(caller: Caller, query: str, field: str) -> None:
    """A parameter that is wrong, unknown or given twice is a 400 that names it."""
    refused(caller.post(f"/upload?{query}", b"data"), 400, "invalid-field", field)
    assert caller.jobs() == []


@pytest.mark.parametrize(
    "content_type",
    ["", "application/octet-stream", "text/plain", "application/x-www-form-urlencoded"],
)
def test_a_block_of_any_type_is_raw_bytes(caller: Caller, name: str, content_type: str) -> None:
    """Also curl's default form type does not change what a block is."""
    data = b"a=1&b=%20\r\n"
    done = caller.block(name, 0, data, "&is_complete=1", Content_Type=content_type)
    assert caller.content(done.json["id"]) == data


@pytest.mark.parametrize("field", ["file", "block"])
def test_the_one_file_part_of_a_form_is_the_block(caller: Caller, name: str, field: str) -> None:
    """With file_name a form's single file part is the next block, whatever its own names."""
    body, content_type = form((field, "blob", b"abc"))
    assert caller.block(name, 0, body, Content_Type=content_type).json == {"bytes_read": 3}
    done = caller.block(name, 3, body, "&file_size=6", Content_Type=content_type)
    assert caller.content(done.json["id"]) == b"abcabc"


def test_a_form_of_two_parts_is_no_block(caller: Caller, name: str) -> None:
    """Two file parts are refused, with how much is stored."""
    body, content_type = form(("file", "a", b"abc"), ("file", "b", b"def"))
    problem = refused(
        caller.block(name, 0, body, Content_Type=content_type), 400, "multipart-invalid"
    )
    at = problem["bytes_read"]
    assert caller.get(f"/upload?file_name={name}").json["bytes_read"] == at


def test_an_empty_file_part_ends_an_upload(caller: Caller, name: str) -> None:
    """An empty block in a form is an empty block."""
    caller.block(name, 0, b"abc")
    body, content_type = form(("file", "blob", b""))
    done = caller.block(name, 3, body, Content_Type=content_type)
    assert done.json["is_complete"] is True
    assert caller.content(done.json["id"]) == b"abc"


def test_an_upload_goes_on_after_its_connection_was_cut(caller: Caller, name: str) -> None:
    """What arrived before a cut is kept, and the next block goes on from there."""
    data = bytes(range(256)) * 2000
    with Raw(caller.server) as raw:
        raw.head(
            "POST",
            f"/upload?file_name={name}&bytes_read=0&file_size={len(data)}",
            Content_Length=len(data),
            X_Client_Id=caller.client,
        )
        raw.send(data[:300_001])
        job = stored(caller, name)
        eventually(
            lambda: caller.get(f"/upload?file_name={name}").json["bytes_read"] == 300_001,
            "all that was sent is stored",
        )
        raw.cut()
    eventually(
        lambda: not caller.server.job(job["id"])["transfer"]["connected"], "the cut is noticed"
    )
    assert caller.server.job(job["id"])["state"] == "running"
    at = caller.get(f"/upload?file_name={name}").json["bytes_read"]
    assert at == 300_001
    done = caller.block(name, at, data[at:])
    assert done.json["is_complete"] is True
    assert caller.content(done.json["id"]) == data
    causes = [e["cause"] for e in caller.get(f"/v1/jobs/{job['id']}/events").json["items"]]
    assert causes == ["created", "client-gone", "client-back", "done"]


def test_a_newer_request_takes_a_stalled_upload_over(caller: Caller, name: str) -> None:
    """A block at the true offset ends the silent request that still holds the upload."""
    with Raw(caller.server) as raw:
        begin_block(caller, raw, name)
        at = caller.get(f"/upload?file_name={name}").json["bytes_read"]
        done = caller.block(name, at, b"end", "&is_complete=1")
        assert done.status == 200, done
        refused(raw.answer(), 409, "upload-taken-over")
    assert caller.content(done.json["id"]) == bytes(100_000) + b"end"


def test_an_upload_goes_on_after_kill_9(serve: Serve, name: str) -> None:
    """What was acknowledged survives kill -9, and the upload goes on from there."""
    server = serve()
    caller = Caller(server, "c")
    assert caller.block(name, 0, b"abc" * 50_000).json == {"bytes_read": 150_000}
    server.kill()
    server.start()
    assert caller.get(f"/upload?file_name={name}").json["bytes_read"] == 150_000
    done = caller.block(name, 150_000, b"end", "&is_complete=1")
    assert caller.content(done.json["id"]) == b"abc" * 50_000 + b"end"


def test_uploads_of_one_name_by_two_callers_are_two(
    site: Server, caller: Caller, name: str
) -> None:
    """The key of an upload by blocks is its owner, its client and its name."""
    other = Caller(site, f"{caller.client}-other")
    caller.block(name, 0, b"mine")
    assert other.get(f"/upload?file_name={name}").status == 404
    assert other.block(name, 0, b"theirs").json == {"bytes_read": 6}
    first = caller.block(name, 4, b"", "")
    second = other.block(name, 6, b"", "")
    assert caller.content(first.json["id"]) == b"mine"
    assert caller.content(second.json["id"]) == b"theirs"
    assert len(caller.versions(name)) == 2


def test_an_upload_by_blocks_is_paused_and_resumed(caller: Caller, name: str) -> None:
    """A block for a paused upload is held; it is stored as soon as the upload is resumed."""
    caller.block(name, 0, b"abc")
    job = caller.job("upload")
    caller.post(f"/v1/jobs/{job['id']}/pause")
    caller.server.wait_for(job["id"], "paused")
    with Raw(caller.server) as raw:
        raw.head(
            "POST",
            f"/upload?file_name={name}&bytes_read=3&is_complete=1",
            Content_Length=3,
            X_Client_Id=caller.client,
        )
        raw.send(b"def")
        eventually(
            lambda: caller.server.job(job["id"])["transfer"]["connected"], "the block is held"
        )
        at = caller.get(f"/upload?file_name={name}").json
        assert at == {"bytes_read": 3, "is_complete": False}
        assert caller.post(f"/v1/jobs/{job['id']}/resume").json["state"] == "running"
        done = raw.answer()
    assert caller.content(done.json["id"]) == b"abcdef"


def test_the_last_block_may_be_repeated(caller: Caller, name: str) -> None:
    """An empty block that asks for what is published already gets the same answer, and no more."""
    caller.block(name, 0, b"abcdef")
    done = caller.block(name, 6, b"", "&is_complete=1")
    for more in ("", "&is_complete=1", "&file_size=6"):
        again = caller.block(name, 6, b"", more)
        assert (again.status, again.json) == (200, done.json)
    for at, block, more in ((5, b"", ""), (6, b"g", ""), (6, b"", "&file_size=7")):
        problem = refused(caller.block(name, at, block, more), 400, "offset-mismatch")
        assert problem["bytes_read"] == 0
    assert len(caller.versions(name)) == 1
    assert len(caller.jobs()) == 1


def test_the_last_block_waits_for_an_upload_that_is_being_finished(serve: Serve, name: str) -> None:
    """Who says that all is there while the upload is being finished gets its outcome, too."""
    server = serve("--digest", "always")
    caller = Caller(server, "c")
    caller.block("first.bin", 0, b"x", "&is_complete=1")  # the helper that hashes lives now
    caller.block(name, 0, b"abcdef")
    path = f"/upload?file_name={name}&bytes_read=6"
    with Raw(server) as one, Raw(server) as other:
        with children_stopped(server):
            for raw in (one, other):
                raw.head("POST", path, Content_Length=0, X_Client_Id="c")
                assert select.select([one.socket, other.socket], [], [], 0.3)[0] == []  # they wait
            at = caller.get(f"/upload?file_name={name}").json
            assert at == {"bytes_read": 6, "is_complete": False}
        answers = [one.answer(), other.answer()]
    assert [answer.status for answer in answers] == [200, 200]
    assert answers[0].json == answers[1].json
    assert caller.content(answers[0].json["id"]) == b"abcdef"


# Rows 6 and 7: where to go on, and cancel


@pytest.mark.parametrize(
    "path",
    [
        "/upload?file_name={}",
        "/upload/?file_name={}",
        "/upload/?file_name={}/",
        "/upload/?file_name={}&bytes_read=0",
        "/upload/?file_name={}&bytes_read=0/",
        "/upload/?bytes_read=99&file_name={}/",
    ],
)
def test_one_may_ask_where_to_go_on(caller: Caller, name: str, path: str) -> None:
    """The offset is told however the address is written; bytes_read is not compared."""
    caller.block(name, 0, b"abc")
    answer = caller.get(path.format(name))
    assert (answer.status, answer.json) == (200, {"bytes_read": 3, "is_complete": False})
    caller.block(name, 3, b"")
    assert caller.get(path.format(name)).json == {"bytes_read": 3, "is_complete": True}


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "file_name"),
        ("bytes_read=0", "file_name"),
        ("file_name=x&bytes_read=-1", "bytes_read"),
        ("file_name=x&bytes_read=x", "bytes_read"),
        ("file_name=x&bytes_read=", "bytes_read"),
        ("file_name=x&more=1", "more"),
    ],
)
def test_a_wrong_question_is_a_400(caller: Caller, query: str, field: str) -> None:
    """A question without a name, or with a wrong number, names what is wrong."""
    refused(caller.get(f"/upload/?{query}"), 400, "invalid-field", field)


def test_an_unknown_upload_is_a_404(caller: Caller, name: str) -> None:
    """Neither an unfinished upload nor a file of that name: 404."""
    refused(caller.get(f"/upload/?file_name={name}"), 404, "upload-unknown")


@pytest.mark.parametrize("n", [1, 3 << 20], ids=["short", "long"])
def test_a_get_with_a_body_names_post(caller: Caller, name: str, n: int) -> None:
    """Who sends the block by GET is told to send it by POST."""
    answer = caller.server.request(
        "GET", f"/upload/?file_name={name}&bytes_read=0", bytes(n), {"X-Client-Id": caller.client}
    )
    assert "POST" in refused(answer, 400, "body-unexpected")["message"]
    assert caller.jobs() == []


@pytest.mark.parametrize("path", ["/upload/cancel?file_name={}", "/upload/cancel/?file_name={}/"])
def test_cancel_removes_the_partial_file(caller: Caller, name: str, path: str) -> None:
    """A cancelled upload leaves nothing; cancelled again it is a 404."""
    before = caller.temporary()
    caller.block(name, 0, b"abc")
    job = caller.job("upload")
    assert caller.post(path.format(name)).status == 200
    assert caller.server.job(job["id"])["state"] == "cancelled"
    assert caller.temporary() <= before
    refused(caller.get(f"/upload?file_name={name}"), 404, "upload-unknown")
    refused(caller.post(path.format(name)), 404, "upload-unknown")
    assert caller.block(name, 0, b"again").json == {"bytes_read": 5}


def test_cancel_ends_an_open_request(caller: Caller, name: str) -> None:
    """A block that is under way when its upload is cancelled gets the abort message."""
    before = caller.temporary()
    with Raw(caller.server) as raw:
        job = begin_block(caller, raw, name)
        assert caller.post(f"/upload/cancel/?file_name={name}").status == 200
        check_aborted(raw.answer(), job)
    assert caller.temporary() <= before


def test_cancel_wants_the_name_of_an_unfinished_upload(caller: Caller, name: str) -> None:
    """Cancel without a name is a 400; a published file is not an unfinished upload."""
    refused(caller.post("/upload/cancel/"), 400, "invalid-field", "file_name")
    caller.store(name, b"data")
    refused(caller.post(f"/upload/cancel/?file_name={name}"), 404, "upload-unknown")
    assert len(caller.versions(name)) == 1


# Row 8: download


def download(caller: Caller, name: str, more: str = "", path: str = "/download/") -> list[Any]:
    """All pieces of a file, as a client of the document reads them."""
    pieces: list[Any] = []
    at = 0
    while not pieces or not pieces[-1]["is_complete"]:
        answer = caller.get(f"{path}?file_name={quote(name)}&bytes_read={at}{more}")
        assert answer.status == 200, answer
        assert set(answer.json) == {"file_content", "bytes_read", "is_complete", "encoding", "id"}
        assert answer.json["bytes_read"] > at or not answer.json["file_content"]
        pieces.append(answer.json)
        at = answer.json["bytes_read"]
    return pieces


def whole(pieces: list[Any]) -> bytes:
    """The bytes of all pieces."""
    return b"".join(
        piece["file_content"].encode()
        if piece["encoding"] == "utf-8"
        else base64.b64decode(piece["file_content"], validate=True)
        for piece in pieces
    )


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 7, 100])
@pytest.mark.parametrize(
    "text", ["", "plain", "grüße aus dem Süden", "日本語のテキスト", "a🎈b🎈é", "\0\r\n\t\u2028"]
)
def test_text_is_cut_at_characters(caller: Caller, name: str, text: str, chunk: int) -> None:
    """Text comes as text, in whole characters, at least one at a time, whatever the size."""
    caller.store(name, text.encode())
    pieces = download(caller, name, f"&chunk_bytes={chunk}")
    assert {piece["encoding"] for piece in pieces} == {"utf-8"}
    assert "".join(piece["file_content"] for piece in pieces) == text
    assert all(len(p["file_content"].encode()) <= max(chunk, 4) for p in pieces)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"abc\xff",
        b"\xc3",
        b"abc\xe6\x97",
        b"\x80\x80\x80\x80\x80",
        b"caf\xe9 au lait",
        b"\xed\xa0\x80 surrogate",
        b"\xf8\x88\x80\x80\x80",
        b"\xc0\x80",
        bytes(range(256)),
    ],
    ids=lambda value: value[:8].hex() if isinstance(value, bytes) else str(value),
)
def test_what_is_not_text_comes_as_base64(
    caller: Caller, name: str, data: bytes, chunk: int
) -> None:
    """Bytes that are no UTF-8 come as base64, and all pieces together are the file."""
    caller.store(name, data)
    pieces = download(caller, name, f"&chunk_bytes={chunk}")
    assert whole(pieces) == data
    assert "base64" in {piece["encoding"] for piece in pieces}


def test_a_piece_has_one_mebibyte_unless_asked_otherwise(caller: Caller, name: str) -> None:
    """Without chunk_bytes a piece has 1 MiB, with it at most 4 MiB."""
    data = bytes(range(256)) * (5 << 12)
    caller.store(name, data)
    pieces = download(caller, name)
    assert [piece["bytes_read"] for piece in pieces] == [n << 20 for n in range(1, 6)]
    assert whole(pieces) == data
    assert [p["bytes_read"] for p in download(caller, name, "&chunk_bytes=4194304")] == [
        4 << 20,
        5 << 20,
    ]


@pytest.mark.parametrize(
    "path", ["/download?file_name={}&bytes_read=3", "/download/?file_name={}&bytes_read=3/"]
)
def test_at_the_end_nothing_is_left(caller: Caller, name: str, path: str) -> None:
    """At the file's size the piece is empty and the download complete."""
    file_id = caller.store(name, b"abc")
    assert caller.get(path.format(name)).json == {
        "file_content": "",
        "bytes_read": 3,
        "is_complete": True,
        "encoding": "utf-8",
        "id": file_id,
    }


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("file_name={}", "bytes_read"),
        ("file_name={}&bytes_read=", "bytes_read"),
        ("file_name={}&bytes_read=-1", "bytes_read"),
        ("file_name={}&bytes_read=x", "bytes_read"),
        ("file_name={}&bytes_read=1.0", "bytes_read"),
        ("file_name={}&bytes_read=4", "bytes_read"),
        ("file_name={}&bytes_read=999999999999999999", "bytes_read"),
        ("bytes_read=0", "file_name"),
        ("file_name={}&bytes_read=0&chunk_bytes=0", "chunk_bytes"),
        ("file_name={}&bytes_read=0&chunk_bytes=4194305", "chunk_bytes"),
        ("file_name={}&bytes_read=0&chunk_bytes=x", "chunk_bytes"),
        ("file_name={}&bytes_read=0&offset=1", "offset"),
    ],
)
def test_a_wrong_download_is_a_400(caller: Caller, name: str, query: str, field: str) -> None:
    """A missing, wrong or too large number is a 400 that names the parameter."""
    caller.store(name, b"abc")
    refused(caller.get(f"/download/?{query.format(name)}"), 400, "invalid-field", field)


def test_an_unknown_file_is_a_404(caller: Caller, name: str) -> None:
    """Neither an unknown name nor an unknown id, nor an id of another name, is downloaded."""
    refused(caller.get(f"/download/?file_name={name}&bytes_read=0"), 404, "file-unknown")
    refused(caller.get("/download/?id=x&bytes_read=0"), 404, "file-unknown")
    file_id = caller.store(name, b"x")
    refused(
        caller.get(f"/download/?file_name=other&id={file_id}&bytes_read=0"), 404, "file-unknown"
    )


def test_a_new_version_never_splices(site: Server, caller: Caller, name: str) -> None:
    """A download goes on with the version that it began, by the caller or by its id."""
    first = caller.store(name, b"1111")
    piece = caller.get(f"/download/?file_name={name}&bytes_read=0&chunk_bytes=2").json
    assert (piece["file_content"], piece["id"]) == ("11", first)
    second = caller.store(name, b"2222")
    path = f"/download/?file_name={name}&bytes_read=2&chunk_bytes=2"
    assert (rest := caller.get(path).json)["file_content"] == "11"
    assert rest["id"] == first
    other = Caller(site, f"{caller.client}-other")
    assert other.get(path).json["id"] == second
    assert other.get(f"{path}&id={first}").json["file_content"] == "11"
    again = caller.get(f"/download/?file_name={name}&bytes_read=0").json
    assert (again["file_content"], again["id"]) == ("2222", second)


def test_downloads_make_no_jobs(caller: Caller, name: str) -> None:
    """Asking for pieces or for the offset is no job."""
    caller.store(name, b"abc")
    download(caller, name)
    caller.get(f"/upload?file_name={name}")
    assert [job["kind"] for job in caller.jobs()] == ["upload"]


# Row 9: a process


@pytest.fixture
def label(name: str) -> str:
    """A process name that no other test uses."""
    return f"p.{name}~x"


@pytest.mark.parametrize("path", ["/{}/process", "/{}/process/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_process_is_started_by_one_request(
    caller: Caller, label: str, method: str, path: str
) -> None:
    """GET and POST start the default kind at once, and the work goes on."""
    answer = caller.server.request(method, path.format(label))
    assert answer.status == 200
    job = answer.json
    assert (job["kind"], job["name"]) == ("count", label)
    assert job["params"] == {"steps": 100, "delay_s": 0.1, "undo_steps": 0}
    assert job["state"] in ("queued", "running")
    assert UUID7.fullmatch(job["id"])
    eventually(lambda: caller.server.job(job["id"])["progress"]["done"] > 0, "it counts")
    assert caller.post(f"/{label}/process/cancel").status == 200


def test_the_default_kind_is_a_setting(serve: Serve, label: str) -> None:
    """Another default kind with its parameters can be configured."""
    options = ("--default-kind", "count", "--default-params", '{"steps": 3, "delay_s": 0}')
    server = serve(*options)
    job = server.get(f"/{label}/process/").json
    assert job["params"]["steps"] == 3
    assert server.wait_for(job["id"], "succeeded")["result"]["data"] == {"counted": 3}


def test_parameters_come_by_query_or_as_json(caller: Caller, label: str) -> None:
    """A kind's parameters are taken from the query and from a JSON body."""
    job = caller.get(f"/{label}/process/?kind=count&steps=2&delay_s=0.001/").json
    assert job["params"] == {"steps": 2, "delay_s": 0.001, "undo_steps": 0}
    caller.server.wait_for(job["id"], "succeeded")
    job = caller.post(f"/{label}/process/", {"kind": "count", "steps": 4, "delay_s": 0}).json
    assert job["params"]["steps"] == 4
    assert caller.server.wait_for(job["id"], "succeeded")["result"]["data"] == {"counted": 4}


def test_a_list_is_written_with_commas(caller: Caller, name: str, label: str) -> None:
    """In a query the members of a list are separated by commas."""
    caller.store(name, b"abc")
    path = f"/{label}/process/?kind=checksum&file={name}&algorithms=md5,crc32"
    job = caller.server.wait_for(caller.get(path).json["id"], "succeeded")
    assert job["result"]["data"]["digests"] == {
        "md5": "900150983cd24fb0d6963f7d28e17f72",
        "crc32": "352441c2",
    }


def test_a_live_process_of_that_name_is_returned(caller: Caller, label: str) -> None:
    """Asked again, a live process is not started twice; after its end a new one starts."""
    path = f"/{label}/process/?kind=count&steps=1000&delay_s=0.05"
    first = caller.get(path).json
    for again in (path, f"/{label}/process/", f"/{label}/process/?kind=count&steps=5"):
        assert caller.get(again).json["id"] == first["id"]
    assert caller.post(f"/{label}/process/").json["id"] == first["id"]
    caller.post(f"/{label}/process/pause/")
    caller.server.wait_for(first["id"], "paused")
    assert caller.get(path).json["id"] == first["id"]
    caller.post(f"/{label}/process/cancel/")
    caller.server.wait_for(first["id"], "cancelled")
    second = caller.get(path).json
    assert second["id"] != first["id"]
    caller.post(f"/{label}/process/cancel/")


def test_another_kind_under_a_live_name_is_refused(caller: Caller, label: str) -> None:
    """A name is unique among live jobs: another kind under it is a 400."""
    job = caller.get(f"/{label}/process/").json
    answer = caller.get(f"/{label}/process/?kind=checksum&file=x")
    assert refused(answer, 400, "name-in-use")["job"] == job["id"]
    caller.post(f"/{label}/process/cancel/")


@pytest.mark.parametrize(
    ("query", "code", "field"),
    [
        ("kind=nope", "unknown-kind", "kind"),
        ("kind=upload", "unknown-kind", "kind"),
        ("kind=", "unknown-kind", "kind"),
        ("kind=count&steps=many", "invalid-field", "params.steps"),
        ("kind=count&steps=-1", "invalid-field", "params.steps"),
        ("kind=count&delay_s=nan", "invalid-field", "params.delay_s"),
        ("kind=count&colour=red", "invalid-field", "params.colour"),
        ("steps=x", "invalid-field", "params.steps"),
        ("kind=checksum", "invalid-field", "params.file"),
        ("kind=count&kind=count", "invalid-field", "kind"),
    ],
)
def test_a_wrong_start_is_a_400(
    caller: Caller, label: str, query: str, code: str, field: str
) -> None:
    """An unknown kind or a bad parameter is a 400 that names it, and nothing starts."""
    refused(caller.get(f"/{label}/process/?{query}"), 400, code, field)
    assert caller.jobs() == []


@pytest.mark.parametrize("body", [b"steps=5", b"[1]", b'"x"', b"{"])
def test_a_start_takes_only_a_json_object(caller: Caller, label: str, body: bytes) -> None:
    """A POST body that is no JSON object is a 400."""
    assert caller.post(f"/{label}/process/", body).status == 400
    assert caller.jobs() == []


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Sec-Purpose": "prefetch"}, 403, "prefetch"),
        ({"Sec-Purpose": "prefetch;prerender"}, 403, "prefetch"),
        ({"Purpose": "prefetch"}, 403, "prefetch"),
        ({"Sec-Fetch-Site": "cross-site"}, 403, "cross-site"),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403, "cross-site"),
        ({"Origin": "https://evil.example"}, 403, "cross-site"),
    ],
)
def test_a_page_elsewhere_or_a_guess_starts_nothing(
    caller: Caller, label: str, headers: dict[str, str], status: int, code: str
) -> None:
    """A prefetch, and a request that another site has caused, never start a process."""
    given = {k.replace("-", "_"): v for k, v in headers.items()}
    refused(caller.get(f"/{label}/process/", **given), status, code)
    assert caller.jobs() == []


@pytest.mark.parametrize("bad", ["a b", "a%20b", "ü", "x" * 129, "a/b", ""])
def test_a_name_of_other_characters_is_no_process(caller: Caller, bad: str) -> None:
    """Only letters, digits and ._~- name a process, at most 128 of them."""
    path = quote(f"/{bad}/process/", safe="/%")
    assert caller.get(path).status == 404
    assert caller.jobs() == []


# Row 10: pause, resume, cancel


def begin_process(caller: Caller, label: str, steps: int = 100_000) -> Any:
    """Start a long process; its job, once it runs."""
    job = caller.get(f"/{label}/process/?kind=count&steps={steps}&delay_s=0.01").json
    return caller.server.wait_for(job["id"], "running")


@pytest.mark.parametrize("by", ["name", "id"])
def test_a_process_is_paused_resumed_and_cancelled(caller: Caller, label: str, by: str) -> None:
    """All three commands answer 200 with the job in its new state, by name or by id."""
    job = begin_process(caller, label)
    key = label if by == "name" else job["id"]
    paused = caller.post(f"/{key}/process/pause/")
    assert (paused.status, paused.json["id"]) == (200, job["id"])
    assert paused.json["state"] in ("pausing", "paused")
    done = caller.server.wait_for(job["id"], "paused")["progress"]["done"]
    resumed = caller.post(f"/{key}/process/resume/")
    assert (resumed.status, resumed.json["id"]) == (200, job["id"])
    assert resumed.json["state"] in ("queued", "running")
    kinds = [kind["kind"] for kind in caller.get("/v1/kinds").json["items"] if kind["startable"]]
    assert resumed.json["work_types"] == kinds
    eventually(lambda: caller.server.job(job["id"])["progress"]["done"] > done, "it goes on")
    cancelled = caller.post(f"/{key}/process/cancel")
    assert cancelled.status == 200
    assert cancelled.json["state"] in ("cancelling", "cancelled")
    caller.server.wait_for(job["id"], "cancelled")


def test_each_command_is_idempotent(caller: Caller, label: str) -> None:
    """A command that was already obeyed is answered with 200 again."""
    job = begin_process(caller, label)
    for verb, state in (("resume", "running"), ("pause", "paused"), ("cancel", "cancelled")):
        assert caller.post(f"/{label}/process/{verb}/").status == 200
        caller.server.wait_for(job["id"], state)
        again = caller.post(f"/{label}/process/{verb}/")
        assert (again.status, again.json["state"]) == (200, state)


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel"])
def test_what_the_state_does_not_allow_is_a_400(caller: Caller, label: str, verb: str) -> None:
    """A process that has ended can't be paused, resumed or cancelled; the reason is told."""
    job = caller.get(f"/{label}/process/?kind=count&steps=0").json
    caller.server.wait_for(job["id"], "succeeded")
    problem = refused(caller.post(f"/{label}/process/{verb}/"), 400, "job-finished")
    assert "succeeded" in problem["message"] and problem["job"] == job["id"]


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel"])
def test_an_unknown_process_is_a_404(caller: Caller, label: str, verb: str) -> None:
    """Neither a job nor a process has that name or id: 404."""
    refused(caller.post(f"/{label}/process/{verb}/"), 404, "job-unknown")


def test_a_name_means_its_newest_process(caller: Caller, label: str) -> None:
    """Of several processes of one name the newest is meant."""
    old = caller.get(f"/{label}/process/?kind=count&steps=0").json
    caller.server.wait_for(old["id"], "succeeded")
    new = begin_process(caller, label)
    assert caller.post(f"/{label}/process/cancel/").json["id"] == new["id"]


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
def test_a_process_is_commanded_only_by_post(caller: Caller, label: str, method: str) -> None:
    """A GET pauses nothing."""
    job = begin_process(caller, label)
    answer = caller.server.request(method, f"/{label}/process/pause/")
    refused(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "POST, OPTIONS"
    assert caller.server.job(job["id"])["state"] == "running"
    caller.post(f"/{label}/process/cancel/")


def test_the_last_command_is_signed(caller: Caller, label: str) -> None:
    """The job tells who gave the last command, and by which way."""
    job = begin_process(caller, label)
    caller.post(f"/{label}/process/pause/")
    by = caller.server.job(job["id"])["by"]
    assert (by["actor"], by["via"]) == (caller.client, "simple")
    caller.post(f"/{label}/process/cancel/")
