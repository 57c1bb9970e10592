"""Stored files: list, look, read whole or in ranges, delete."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from handlers.send import disposition
from tests.conftest import Serve
from tests.handlers.clients import UUID7, Caller, Raw
from tests.harness import FULL, Answer, Server, eventually

DATA = bytes(range(256)) * 4
BIG_BYTES = (256 if FULL else 16) << 20


@pytest.fixture(scope="module")
def file(site: Server) -> Any:
    """A stored file of 1024 bytes, as the API describes it."""
    file_id = Caller(site, "files").store("data.bin", DATA)
    return site.get(f"/v1/files/{file_id}").json


def content(site: Server, file: Any, method: str = "GET", **headers: str) -> Answer:
    """Ask for the bytes of a file."""
    return site.request(
        method,
        f"/v1/files/{file['id']}/content",
        headers={k.replace("_", "-"): v for k, v in headers.items()},
    )


def test_a_file_is_described(site: Server, file: Any) -> None:
    """A file's row has its name, version, size, type, validator, owner and job."""
    assert UUID7.fullmatch(file["id"])
    assert file | {"id": "", "job": "", "created_at": "", "etag": ""} == {
        "id": "",
        "name": "data.bin",
        "version": 1,
        "bytes": 1024,
        "media_type": "application/octet-stream",
        "digest": {},
        "etag": "",
        "owner": "local",
        "job": "",
        "created_at": "",
        "expires_at": None,
    }
    assert site.job(file["job"])["kind"] == "upload"
    answer = site.get(f"/v1/files/{file['id']}")
    assert answer.headers["Etag"] == file["etag"]
    assert file["etag"].startswith('"')


def test_files_are_listed_newest_first_and_page_by_page(caller: Caller, name: str) -> None:
    """Pages follow each other without a gap; name lists the versions of one file."""
    ids = [caller.store(name, bytes([i])) for i in range(5)]
    found: list[str] = []
    after = ""
    while True:
        page = caller.get(f"/v1/files?name={name}&limit=2{after}").json
        found += [file["id"] for file in page["items"]]
        if page["next"] is None:
            break
        assert len(page["items"]) == 2
        after = f"&after={page['next']}"
    assert found == ids[::-1]
    newest = caller.get("/v1/files?limit=1").json["items"][0]
    assert (newest["id"], newest["version"]) == (ids[-1], 5)
    assert caller.get("/v1/files?name=none").json == {"items": [], "next": None}


def test_the_newest_of_each_name_and_a_search(caller: Caller, name: str) -> None:
    """newest=1 has one file of each name, q those with a part of it; both page as all lists do."""
    ids = [caller.store(f"{name}-{part}", b"x") for part in ("One", "two", "One")]
    listed = caller.get(f"/v1/files?newest=1&q={name}-").json
    assert [file["id"] for file in listed["items"]] == [ids[2], ids[1]]
    first = caller.get(f"/v1/files?newest=1&q={name}-&limit=1").json
    assert [file["id"] for file in first["items"]] == [ids[2]]
    rest = caller.get(f"/v1/files?newest=1&q={name}-&after={first['next']}").json
    assert [file["id"] for file in rest["items"]] == [ids[1]]
    assert len(caller.get(f"/v1/files?newest=0&q={name}-oNE").json["items"]) == 2
    assert caller.get(f"/v1/files?q={ids[0]}").json["items"][0]["id"] == ids[0]


ROWS = b"id,note\r\n" + b"".join(b'%d,"a ""%d"""\r\n' % (n, n % 3) for n in range(6000))


def sample(caller: Caller, file: str, **query: Any) -> Answer:
    """Ask for the first rows."""
    return caller.get(f"/v1/files/{file}/sample?{urlencode(query, doseq=True)}")


def test_a_sample_is_what_an_export_begins_with(caller: Caller) -> None:
    """The first rows of CSV and JSONL, of the columns wanted, that pass the filter."""
    file = caller.store("rows.csv", ROWS)
    assert sample(caller, file, limit=2).json == {
        "columns": ["id", "note"],
        "items": [["0", 'a "0"'], ["1", 'a "1"']],
        "whole": False,
    }
    some = sample(caller, file, columns=["note", "id"], where="id >= 40 and note like '%0%'").json
    assert (some["columns"], some["items"][0]) == (["note", "id"], ['a "0"', "42"])
    far = sample(caller, file, where="id = 5999").json
    assert (far["items"], far["whole"]) == ([], False)  # behind what is looked at
    long = caller.store("long.csv", b"id,text\n" + b"1," + b"x" * 900_000 + b"\n" + b"2,y\n" * 3)
    assert sample(caller, long, where="id = 3").json["whole"] is True
    lines = caller.store("a.jsonl", b'{"a": 1}\n{"b": {"c": "x"}}\n{"a": null}\n')
    assert sample(caller, lines).json == {
        "columns": ["a", "b"],
        "items": [["1", None], [None, '{"c":"x"}'], [None, None]],
        "whole": True,
    }
    assert sample(caller, caller.store("b.csv", b"x\n")).json["columns"] == ["x"]


def test_a_sample_of_a_table(caller: Caller) -> None:
    """Rows of a table come as an export would write them."""
    caller.store("some.csv", b"id,open\r\n1,yes\r\n2,no\r\n")
    started = caller.post(
        "/v1/jobs", {"kind": "csv.import", "params": {"source": "some.csv", "table": "some"}}
    ).json
    file = caller.server.wait_for(started["id"], "succeeded")["result"]["file"]
    found = sample(caller, file, where="open = false").json
    assert found == {"columns": ["id", "open"], "items": [["2", "false"]], "whole": True}


def test_what_has_no_sample_is_refused(caller: Caller) -> None:
    """A wrong filter or column is a 400 that names the field, a file without rows a 422."""
    file = caller.store("rows.csv", ROWS)
    for query, field in (
        ({"where": "id = "}, "where"),
        ({"where": "x = 1"}, "where"),
        ({"columns": "x"}, "columns"),
        ({"limit": 0}, "limit"),
    ):
        answer = sample(caller, file, **query)
        assert (answer.status, answer.json["field"]) == (400, field)
    for name, data in (
        ("a.bin", b"x"),
        ("a.csv", b""),
        ("b.csv", b"a,b\n1\n"),
        ("c.csv", b"PK\3\4"),
    ):
        assert sample(caller, caller.store(name, data)).status == 422
    assert sample(caller, "none").status == 404


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("newest=2", "newest"),
        ("newest=", "newest"),
        (f"q={'x' * 201}", "q"),
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("limit=x", "limit"),
        ("limit=", "limit"),
        ("after=-1", "after"),
        ("after=x", "after"),
        ("colour=red", "colour"),
        ("limit=1&limit=2", "limit"),
    ],
)
def test_a_wrong_list_is_a_400(site: Server, query: str, field: str) -> None:
    """A parameter that is wrong or unknown is a 400 that names it."""
    answer = site.get(f"/v1/files?{query}")
    assert (answer.status, answer.json["field"]) == (400, field)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/files/none"),
        ("DELETE", "/v1/files/none"),
        ("GET", "/v1/files/none/content"),
        ("HEAD", "/v1/files/none/content"),
    ],
)
def test_an_unknown_file_is_a_404(site: Server, method: str, path: str) -> None:
    """What is not there can neither be read nor deleted."""
    assert site.request(method, path).status == 404


def test_the_whole_content(site: Server, file: Any) -> None:
    """Without a range all bytes come, with a validator, and may be kept for ever."""
    answer = content(site, file)
    assert (answer.status, answer.body) == (200, DATA)
    assert answer.headers["Content-Length"] == "1024"
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Etag"] == file["etag"]
    assert "immutable" in answer.headers["Cache-Control"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Last-Modified"].endswith("GMT")
    assert "Content-Range" not in answer.headers


@pytest.mark.parametrize(
    ("asked", "status", "start", "end"),
    [
        ("bytes=0-9", 206, 0, 10),
        ("bytes=0-0", 206, 0, 1),
        ("bytes=1000-", 206, 1000, 1024),
        ("bytes=1023-", 206, 1023, 1024),
        ("bytes=0-", 206, 0, 1024),
        ("bytes=0-99999", 206, 0, 1024),
        ("bytes=-10", 206, 1014, 1024),
        ("bytes=-5000", 206, 0, 1024),
        ("bytes= 5 - 9", 206, 5, 10),
        ("bytes=1024-", 416, 0, 0),
        ("bytes=5000-6000", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
        ("bytes=9-2", 416, 0, 0),
        ("bytes=abc", 416, 0, 0),
        ("bytes=-", 416, 0, 0),
        ("bytes=", 416, 0, 0),
        ("bytes=1-2-3", 416, 0, 0),
        ("bytes=9999999999999999999999-", 416, 0, 0),
        ("items=0-1", 200, 0, 1024),
        ("", 200, 0, 1024),
    ],
)
def test_one_range(site: Server, file: Any, asked: str, status: int, start: int, end: int) -> None:
    """One range gives 206, none that can be met 416; other units are ignored."""
    answer = content(site, file, Range=asked)
    assert answer.status == status
    if status == 416:
        assert answer.headers["Content-Range"] == "bytes */1024"
        assert answer.json["code"] == "range-not-satisfiable"
        return
    assert answer.body == DATA[start:end]
    assert answer.headers["Content-Length"] == str(end - start)
    assert answer.headers["Etag"] == file["etag"]
    assert answer.headers.get("Content-Range") == (
        f"bytes {start}-{end - 1}/1024" if status == 206 else None
    )


def test_a_range_of_an_empty_file_is_ignored(caller: Caller, name: str) -> None:
    """Of an empty file any range is the whole file."""
    file = {"id": caller.store(name, b"")}
    for asked in ("bytes=0-", "bytes=-5", "bytes=0-0"):
        answer = content(caller.server, file, Range=asked)
        assert (answer.status, answer.body, answer.headers["Content-Length"]) == (200, b"", "0")


@pytest.mark.parametrize("asked", [{}, {"Range": "bytes=0-9"}, {"Range": "bytes=5000-"}])
def test_head_is_get_without_a_range_or_body(
    site: Server, file: Any, asked: dict[str, str]
) -> None:
    """HEAD has the headers of the whole file; ranges are for GET only."""
    answer = content(site, file, "HEAD", **asked)
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["Content-Length"] == "1024"
    assert answer.headers["Etag"] == file["etag"]
    assert "Content-Range" not in answer.headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("{}", 304),
        ("W/{}", 304),
        ('"other", {}', 304),
        ("*", 304),
        ('"other"', 200),
        ("", 200),
    ],
)
def test_if_none_match(site: Server, file: Any, method: str, given: str, status: int) -> None:
    """Who has the bytes already is told so, whatever range is asked for."""
    given = given.format(file["etag"])
    for asked in ({}, {"Range": "bytes=0-9"}):
        answer = content(site, file, method, If_None_Match=given, **asked)
        expected = 206 if status == 200 and asked and method == "GET" else status
        assert answer.status == expected
        if status == 304:
            assert answer.body == b""
            assert answer.headers["Etag"] == file["etag"]


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("{}", 206),
        ("W/{}", 200),
        ('"other"', 200),
        ("Sat, 21 Nov 2026 20:00:00 GMT", 200),
        ("", 200),
    ],
)
def test_if_range(site: Server, file: Any, given: str, status: int) -> None:
    """A range is only sent to who means this very version; others get the whole."""
    given = given.format(file["etag"])
    answer = content(site, file, Range="bytes=4-7", If_Range=given)
    assert answer.status == status
    assert answer.body == (DATA[4:8] if status == 206 else DATA)


@pytest.mark.parametrize(
    ("given", "status"),
    [("{}", 200), ("*", 200), ('"other", {}', 200), ('"other"', 412), ("W/{}", 412)],
)
def test_if_match(site: Server, file: Any, given: str, status: int) -> None:
    """Who wants another version than this one gets 412, and no bytes."""
    answer = content(site, file, If_Match=given.format(file["etag"]))
    assert answer.status == status
    if status == 412:
        assert answer.json["code"] == "version-mismatch"


@pytest.mark.parametrize(
    ("name", "expected", "media_type"),
    [
        ("a.txt", 'inline; filename="a.txt"', "text/plain"),
        ("a.png", 'inline; filename="a.png"', "image/png"),
        ("a.html", 'attachment; filename="a.html"', "text/html"),
        ("a.svg", 'attachment; filename="a.svg"', "image/svg+xml"),
        ("a.js", 'attachment; filename="a.js"', "text/javascript"),
        ("a.pdf", 'attachment; filename="a.pdf"', "application/pdf"),
        ("a", 'attachment; filename="a"', "application/octet-stream"),
        ("ü.txt", "inline; filename=\"_.txt\"; filename*=UTF-8''%C3%BC.txt", "text/plain"),
        (
            'x"; filename="evil.txt',
            'inline; filename="x_; filename=_evil.txt"; '
            "filename*=UTF-8''x%22%3B%20filename%3D%22evil.txt",
            "text/plain",
        ),
        ("100%.txt", "inline; filename=\"100_.txt\"; filename*=UTF-8''100%25.txt", "text/plain"),
    ],
)
def test_case_58_a_name_can_not_break_its_header(
    caller: Caller, name: str, expected: str, media_type: str
) -> None:
    """Any name is written safely, twice; what could run scripts is never shown inline."""
    file = caller.block(name, 0, b"data", "&is_complete=1").json
    answer = content(caller.server, file)
    header = answer.headers["Content-Disposition"]
    if "filename*" not in expected:
        expected += f"; filename*=UTF-8''{name}"
    assert header == expected
    assert answer.headers["Content-Type"].split(";")[0] == media_type
    assert answer.body == b"data"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../../etc/passwd", "attachment; filename=\"passwd\"; filename*=UTF-8''passwd"),
        ("C:\\x\\y.bin", "attachment; filename=\"y.bin\"; filename*=UTF-8''y.bin"),
        (
            "a\r\nSet-Cookie: b",
            "attachment; filename=\"aSet-Cookie: b\"; filename*=UTF-8''aSet-Cookie%3A%20b",
        ),
        ("a\x00\x7f\x1b.bin", "attachment; filename=\"a.bin\"; filename*=UTF-8''a.bin"),
        ('"', "attachment; filename=\"_\"; filename*=UTF-8''%22"),
        ("\U0001f600", "attachment; filename=\"_\"; filename*=UTF-8''%F0%9F%98%80"),
        ("\udcff.bin", "attachment; filename=\"_.bin\"; filename*=UTF-8''%3F.bin"),
        ("a/", "attachment; filename=\"download\"; filename*=UTF-8''download"),
    ],
)
def test_case_58_no_name_of_whatever_origin_breaks_the_header(name: str, expected: str) -> None:
    """CR, LF, quotes and folders do not reach the client, wherever the name comes from."""
    assert disposition(name, True) == expected


def test_case_58_the_caller_can_ask_for_an_attachment(caller: Caller) -> None:
    """What would be shown is saved if the address says so; nothing can be made to be shown."""
    file = caller.block("a.txt", 0, b"data", "&is_complete=1").json
    path = f"/v1/files/{file['id']}/content"
    for query, kind in (("", "inline"), ("?disposition=attachment", "attachment")):
        for answer in (caller.get(path + query), caller.server.request("HEAD", path + query)):
            assert answer.headers["Content-Disposition"].startswith(f"{kind};")
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
    refused = caller.get(path + "?disposition=inline")
    assert (refused.status, refused.json["field"]) == (400, "disposition")


def test_digests_of_the_whole_file_come_with_every_part(caller: Caller) -> None:
    """Repr-Digest, and Digest for older clients, are the file's, of whatever part they tell."""
    headers = {"Want-Repr-Digest": "sha-256=1", "Upload-Complete": "?1"}
    made = caller.server.request("POST", "/resumable/", DATA, headers)
    file_id = caller.get("/v1/files?limit=1").json["items"][0]["id"]
    assert made.status == 201
    digest = b64encode(hashlib.sha256(DATA).digest()).decode()
    for method, asked in (
        ("GET", ""),
        ("HEAD", ""),
        ("GET", "bytes=5-9"),
        ("GET", "bytes=0-1,5-9"),
    ):
        answer = caller.server.request(
            method, f"/v1/files/{file_id}/content", headers={"Range": asked} if asked else {}
        )
        assert answer.headers["Repr-Digest"] == f"sha-256=:{digest}:"
        assert answer.headers["Digest"] == f"SHA-256={digest}"


# By name

NAMES = [
    *("plain.bin", "with space.bin", "ü 文件 \U0001f600.bin", "q\"uo'te.bin", "100%.bin"),
    *("a+b&c=d?.x", "content", "by-name", "~;,@:$!*().bin"),
]


@pytest.mark.parametrize("name", NAMES)
def test_by_name_leads_to_the_newest_version(caller: Caller, name: str) -> None:
    """GET and HEAD redirect to the address where that version never changes; caches ask again."""
    assert caller.block(name, 0, b"old", "&is_complete=1").status == 200
    newest = caller.block(name, 0, b"new", "&is_complete=1").json["id"]
    path = f"/v1/files/by-name/{quote(name, safe='')}"
    for answer in (caller.server.request("HEAD", path), caller.get(path)):
        assert answer.status == 307
        assert answer.headers["Location"] == f"/v1/files/{newest}/content"
        assert answer.headers["Cache-Control"] == "no-cache"
        assert answer.body == b""
    assert caller.content(newest) == b"new"


def test_by_name_finds_a_name_however_it_is_composed(caller: Caller) -> None:
    """A name in decomposed Unicode, as macOS writes it, is the same name."""
    file_id = caller.block("é.bin", 0, b"x", "&is_complete=1").json["id"]
    answer = caller.get("/v1/files/by-name/e%CC%81.bin")
    assert (answer.status, answer.headers["Location"]) == (307, f"/v1/files/{file_id}/content")


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("nothing.bin", 404, "file-unknown"),
        ("{id}", 404, "file-unknown"),
        ("a%2Fb", 404, "file-unknown"),
        ("a%2F%2Fb", 400, "invalid-field"),
        ("%2Fb", 400, "invalid-field"),
        ("a%2F", 400, "invalid-field"),
        ("..%2F..%2Fstate.db", 400, "invalid-field"),
        ("a%5Cb", 400, "invalid-field"),
        ("a%00b", 400, "invalid-field"),
        ("a%0Ab", 400, "invalid-field"),
        ("%2E%2E", 400, "invalid-field"),
        ("%20a", 400, "invalid-field"),
        ("x" * 256, 400, "invalid-field"),
        ("%FF", 400, "bad-request"),
        ("", 404, "not-found"),
        ("a/b", 404, "not-found"),
    ],
)
def test_by_name_refuses_what_is_no_name(
    site: Server, file: Any, name: str, status: int, code: str
) -> None:
    """A name that no file can have is a 400, one that none has a 404; an id is no name."""
    answer = site.get(f"/v1/files/by-name/{name.format(id=file['id'])}")
    assert (answer.status, answer.json["code"]) == (status, code)


def test_by_name_keeps_the_query(caller: Caller, name: str) -> None:
    """What is asked of the content is asked at the address it leads to, and checked before."""
    file_id = caller.store(name, DATA)
    query = "?disposition=attachment&track=1"
    answer = caller.get(f"/v1/files/by-name/{name}{query}")
    assert answer.headers["Location"] == f"/v1/files/{file_id}/content{query}"
    assert "Sluice-Job" in caller.get(answer.headers["Location"]).headers
    assert [job["kind"] for job in caller.jobs()].count("download") == 1
    assert caller.get(f"/v1/files/by-name/{name}?colour=red").json["field"] == "colour"


@pytest.mark.parametrize("track", [b"tra%63k", b"tra%63k=%31&disposition=\xe4"])
def test_by_name_passes_only_on_what_it_understands(
    caller: Caller, name: str, track: bytes
) -> None:
    """A query that is odd is refused before it comes into a header."""
    caller.store(name, b"x")
    with Raw(caller.server) as raw:
        raw.send(b"GET /v1/files/by-name/" + name.encode() + b"?" + track + b" HTTP/1.1\r\n")
        raw.send(b"Host: localhost\r\n\r\n")
        assert raw.answer().status == 400


def test_by_name_behind_a_proxy(serve: Serve, name: str) -> None:
    """The address that it leads to has the prefix under which the proxy shows the service."""
    caller = Caller(serve("--trusted-proxies", "127.0.0.1"), "c")
    file_id = caller.store(name, b"x")
    answer = caller.get(f"/v1/files/by-name/{name}?track=0", X_Forwarded_Prefix="/files")
    assert answer.headers["Location"] == f"/files/v1/files/{file_id}/content?track=0"


def test_a_deleted_file_is_gone(caller: Caller, name: str) -> None:
    """After a delete neither row nor bytes are left, and the name means the version before."""
    first, second = caller.store(name, b"1"), caller.store(name, b"2")
    assert caller.delete(f"/v1/files/{second}").status == 204
    for path in (f"/v1/files/{second}", f"/v1/files/{second}/content"):
        assert caller.get(path).json["code"] == "file-unknown"
    assert caller.delete(f"/v1/files/{second}").status == 404
    assert not (caller.server.folder / "uploads" / second).exists()
    assert [file["id"] for file in caller.versions(name)] == [first]
    assert caller.post("/export", {"filename": name}).body == b"1"


def test_a_file_that_is_deleted_while_it_is_read_is_read_to_its_end(
    caller: Caller, name: str
) -> None:
    """A reader that began before the delete gets every byte."""
    data = bytes(range(256)) * (BIG_BYTES >> 8)
    file_id = caller.block(name, 0, data, "&is_complete=1").json["id"]
    with Raw(caller.server, receive_bytes=64 << 10) as raw:
        raw.head("GET", f"/v1/files/{file_id}/content")
        assert raw.file.readline() == b"HTTP/1.1 200 OK\r\n"
        assert caller.delete(f"/v1/files/{file_id}").status == 204
        assert caller.get(f"/v1/files/{file_id}/content").status == 404
        while raw.file.readline() != b"\r\n":
            pass
        assert raw.file.read(len(data)) == data


def test_bytes_on_their_way_out_are_counted_while_they_move(serve: Serve, name: str) -> None:
    """A download that is under way shows in the rate, not only when it has ended."""
    caller = Caller(serve(), "c")
    data = bytes(BIG_BYTES)
    file_id = caller.block(name, 0, data, "&is_complete=1").json["id"]
    assert caller.get("/v1/status").json["out_bytes_per_s"] == 0
    with Raw(caller.server, receive_bytes=64 << 10) as raw:
        raw.head("GET", f"/v1/files/{file_id}/content")
        eventually(lambda: caller.get("/v1/status").json["out_bytes_per_s"] > 0, "bytes move")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_content_is_only_read(site: Server, file: Any, method: str) -> None:
    """Other methods than GET and HEAD are a 405 that tells which there are."""
    answer = site.request(method, f"/v1/files/{file['id']}/content", b"x")
    assert (answer.status, answer.json["code"]) == (405, "method-not-allowed")
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"
    assert content(site, file).body == DATA
