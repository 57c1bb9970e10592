"""Archives over HTTP: ranges, resumes, other programs, large members, deaths of the server."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import random
import shutil
import sqlite3
import subprocess
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Serve, need
from tests.harness import FULL, Server, eventually

GIB = 1 << 30
MIB = 1 << 20


def stored(server: Server, name: str, data: bytes) -> Any:
    """Upload a file; its row."""
    from_name = server.post(f"/upload?file_name={name}&is_complete=true", data)
    assert from_name.status == 200, from_name
    return server.get(f"/v1/files/{from_name.json['id']}").json


def archived(server: Server, files: list[str], **params: Any) -> Any:
    """Make an archive; its row."""
    job = server.post("/v1/jobs", {"kind": "archive", "params": {"files": files} | params}).json
    done = server.wait_for(job["id"], "succeeded", "failed", within_s=60)
    assert done["state"] == "succeeded", done["error"]
    return server.get(f"/v1/files/{done['result']['file']}").json


def some(dice: random.Random) -> dict[str, bytes]:
    """Files of several sizes, with names of several scripts."""
    return {
        "a.txt": b"abc",
        "empty": b"",
        "%C5%BC%C3%B3%C5%82w%20%F0%9F%90%A2.csv": dice.randbytes(300_000),
        "big.bin": dice.randbytes(2 * MIB + 7),
    }


@pytest.fixture
def archive(server: Server) -> Any:
    """An archive of some files."""
    files = some(random.Random(1))
    for name, data in files.items():
        stored(server, name, data)
    return archived(server, ["a.txt", "empty", "żółw 🐢.csv", "big.bin"])


class Remote(io.RawIOBase):
    """A file of the server, read by ranges."""

    def __init__(self, server: Server, path: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        self._path = path
        self._at = 0
        self._connection.request("HEAD", path)
        answer = self._connection.getresponse()
        answer.read()
        self.size = int(answer.headers["Content-Length"])

    def seekable(self) -> bool:
        """See io."""
        return True

    def readable(self) -> bool:
        """See io."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """See io."""
        self._at = (0, self._at, self.size)[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """See io."""
        end = min(self._at + len(buffer), self.size)
        if end <= self._at:
            return 0
        data = self.range(self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def range(self, start: int, end: int) -> bytes:
        """Bytes ``[start, end)``."""
        self._connection.request("GET", self._path, headers={"Range": f"bytes={start}-{end - 1}"})
        answer = self._connection.getresponse()
        data = answer.read()
        assert answer.status == 206
        assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{self.size}"
        return data

    def close(self) -> None:
        """See io."""
        self._connection.close()
        super().close()


def test_an_archive_is_a_file_like_others(server: Server, archive: Any) -> None:
    """Length, type, name and a strong validator come with it; HEAD says the same."""
    path = f"/v1/files/{archive['id']}/content"
    whole = server.get(path)
    assert whole.status == 200
    assert len(whole.body) == archive["bytes"] == int(whole.headers["Content-Length"])
    assert whole.headers["Content-Type"] == "application/zip"
    assert whole.headers["Etag"] == archive["etag"] == f'"{archive["id"]}"'
    assert whole.headers["Accept-Ranges"] == "bytes"
    assert 'attachment; filename="files.zip"' in whole.headers["Content-Disposition"]
    head = server.request("HEAD", path)
    for name in ("Content-Length", "Etag", "Content-Type", "Last-Modified"):
        assert head.headers[name] == whole.headers[name]
    with zipfile.ZipFile(io.BytesIO(whole.body)) as unpacked:
        assert unpacked.testzip() is None
        contents = [unpacked.read(info) for info in unpacked.infolist()]
        assert contents == list(some(random.Random(1)).values())
        assert unpacked.infolist()[2].filename == "żółw 🐢.csv"
    assert server.get(path, If_None_Match=archive["etag"]).status == 304


def test_any_range_is_a_slice_of_the_whole(server: Server, archive: Any) -> None:
    """Ranges at random, from many connections' worth of requests, are what slicing gives."""
    path = f"/v1/files/{archive['id']}/content"
    whole = server.get(path).body
    remote = Remote(server, path)

    @settings(
        deadline=None,
        database=None,
        max_examples=100,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(st.integers(0, len(whole) - 1), st.integers(1, len(whole)))
    def check(start: int, n: int) -> None:
        end = min(start + n, len(whole))
        assert remote.range(start, end) == whole[start:end]

    check()
    assert server.get(path, Range="bytes=-22").body == whole[-22:]
    assert server.get(path, Range=f"bytes={len(whole)}-").status == 416
    remote.close()


def test_a_cut_download_goes_on(server: Server, archive: Any) -> None:
    """By Range and If-Range, after a cut in the middle of a member, the whole comes together."""
    path = f"/v1/files/{archive['id']}/content"
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", path)
    begun = connection.getresponse().read(1_000_000)
    connection.close()
    rest = server.get(path, Range=f"bytes={len(begun)}-", If_Range=archive["etag"])
    assert rest.status == 206
    assert begun + rest.body == server.get(path).body
    other = server.get(path, Range=f"bytes={len(begun)}-", If_Range='"other"')
    assert other.status == 200
    assert other.body == begun + rest.body


def test_a_download_outlives_what_it_reads(serve: Serve) -> None:
    """Archive and members are deleted in the middle: it comes to its end all the same."""
    server = serve()
    dice = random.Random(2)
    rows = [stored(server, f"{n}.bin", dice.randbytes(20 * MIB)) for n in range(3)]
    archive = archived(server, [row["id"] for row in rows])
    path = f"/v1/files/{archive['id']}/content"
    whole = server.get(path).body
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    begun = answer.read(1_000_000)
    for row in (*rows, archive):
        assert server.delete(f"/v1/files/{row['id']}").status == 204
    assert server.get(path).status == 404
    assert begun + answer.read() == whole
    connection.close()
    eventually(lambda: strays(server) == [], "nothing is left")


@pytest.mark.parametrize("program", ["unzip -tqq", "bsdtar -tf", "7z t -bso0", "zipinfo -1"])
def test_programs_accept_it(server: Server, archive: Any, tmp_path: Path, program: str) -> None:
    """What was downloaded by curl is a whole zip to each of them."""
    path = tmp_path / "files.zip"
    url = f"{server.url}/v1/files/{archive['id']}/content"
    subprocess.run([need("curl"), "-sSf", "-o", path, url], check=True)
    name, *arguments = program.split()
    done = subprocess.run([need(name), *arguments, path], capture_output=True, check=False)
    assert done.returncode == 0, done


def test_a_wrong_archive_is_refused(server: Server) -> None:
    """Bad parameters are a 400 with the field, and no job; a missing file fails the job."""
    for params, field in (
        ({"files": []}, "params.files"),
        ({"files": ["a"], "name": "../x.zip"}, "params.name"),
        ({"files": "a"}, "params.files"),
    ):
        answer = server.post("/v1/jobs", {"kind": "archive", "params": params})
        assert (answer.status, answer.json["code"], answer.json["field"]) == (
            400,
            "invalid-field",
            field,
        )
    assert server.jobs() == []
    job = server.post("/v1/jobs", {"kind": "archive", "params": {"files": ["gone"]}}).json
    failed = server.wait_for(job["id"], "failed")
    assert (failed["error"]["code"], failed["error"]["status"]) == ("file-unknown", 404)
    eventually(lambda: strays(server) == [], "nothing is left")


def test_ten_thousand_members(serve: Serve, tmp_path: Path) -> None:
    """The longest archive: started in one request, downloaded whole, its memory bounded."""
    server = serve()
    rows = [stored(server, f"{n}.txt", b"%d" % n) for n in range(5)]
    before = server.status("VmHWM")
    archive = archived(server, [rows[n % 5]["id"] for n in range(10_000)])
    data = server.get(f"/v1/files/{archive['id']}/content").body
    with zipfile.ZipFile(io.BytesIO(data)) as unpacked:
        names = unpacked.namelist()
        assert len(set(names)) == len(names) == 10_000
        assert names[9_999] == "4 (2000).txt"
        assert unpacked.testzip() is None
    assert server.status("VmHWM") - before < 60_000


def grown(server: Server, row: Any, size: int, crc32: str | None) -> None:
    """Make a stored file of a stopped server a sparse one of that size."""
    os.truncate(server.folder / "uploads" / row["id"] / row["name"], size)
    with contextlib.closing(sqlite3.connect(server.folder / "state.db")) as con, con:
        ((doc,),) = con.execute("SELECT doc FROM files WHERE id = ?", (row["id"],)).fetchall()
        digest = {"crc-32": crc32} if crc32 else {}
        changed = json.dumps(json.loads(doc) | {"bytes": size, "digest": digest})
        con.execute(
            "UPDATE files SET doc = ?, bytes = ? WHERE id = ?", (changed.encode(), size, row["id"])
        )


def test_members_beyond_4_gib(serve: Serve) -> None:
    """Zip64: large members, and one behind them, are listed and read by ranges; memory is flat.

    At full scale their CRC-32s are computed and all is read, too.
    """
    server = serve()
    sizes = {"large.bin": 5 * GIB, "largest.bin": (10 if FULL else 6) * GIB}
    rows = [stored(server, name, b"") for name in sizes]
    tail = b"behind them all" * 1000
    rows.append(stored(server, "tail.txt", tail))
    server.stop()
    for row, size in zip(rows, sizes.values(), strict=False):
        grown(server, row, size, None if FULL else "00000000")
    server.start()
    before = server.status("VmHWM")
    started = {"kind": "archive", "params": {"files": [row["id"] for row in rows]}}
    job = server.post("/v1/jobs", started).json
    done = server.wait_for(job["id"], "succeeded", within_s=600)
    path = f"/v1/files/{done['result']['file']}/content"
    remote = Remote(server, path)
    with zipfile.ZipFile(io.BufferedReader(remote, 1 << 16)) as archive:
        infos = archive.infolist()
        assert [info.file_size for info in infos] == [*sizes.values(), len(tail)]
        assert infos[1].header_offset > 4 * GIB
        assert archive.read("tail.txt") == tail
        with archive.open("largest.bin") as member:
            assert member.read(1000) == bytes(1000)
    at = infos[2].header_offset - 10
    assert remote.range(at, at + 14) == bytes(10) + b"PK\3\4"
    if FULL:
        read_all(server, path, infos)
    assert server.status("VmHWM") - before < 20_000
    remote.close()


def read_all(server: Server, path: str, infos: list[zipfile.ZipInfo]) -> None:
    """Read the whole zip once; the first member's bytes have the CRC-32 that is announced."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    got, crc32, first = 0, 0, 30 + len(infos[0].filename) + 9 + 20
    end = first + infos[0].file_size
    while block := answer.read(MIB):
        crc32 = zlib.crc32(block[max(0, first - got) : max(0, end - got)], crc32)
        got += len(block)
    assert got == int(answer.headers["Content-Length"])
    assert crc32 == infos[0].CRC
    connection.close()


def strays(server: Server) -> list[str]:
    """What lies in the data folder without a row that names it."""
    found = [path.name for path in (server.folder / "tmp").iterdir()]
    known = {row["id"] for row in server.get("/v1/files?limit=500").json["items"]}
    for folder in ("uploads", "members"):
        if (server.folder / folder).is_dir():
            found += [p.name for p in (server.folder / folder).iterdir() if p.name not in known]
    return found


POINTS = [
    "linked:2",
    "checkpoint:2",
    "checkpoint:7",
    "saved:1",
    "published:1",
    "ending:1",
    "ended:1",
]


@pytest.mark.parametrize("cancel", [False, True], ids=["goes on", "is cancelled"])
@pytest.mark.parametrize("point", POINTS)
def test_a_death_changes_nothing(serve: Serve, tmp_path: Path, point: str, cancel: bool) -> None:
    """kill -9 anywhere: the next start makes the same zip, or, cancelled, leaves nothing."""
    server = serve()
    dice = random.Random(3)
    data = {f"{n}.bin": dice.randbytes(n * 400_000) for n in range(5)}
    for name, bytes_ in data.items():
        stored(server, name, bytes_)
    server.stop()
    copy = tmp_path / "copy"
    shutil.copytree(server.folder, copy)
    server.env = {"CRASH_AT": point}
    server.start()
    start = {"kind": "archive", "params": {"files": list(data)}}
    with contextlib.suppress(ConnectionError):  # it may be dead before it has answered
        server.request("POST", "/v1/jobs", start)
    assert server.process is not None
    server.process.wait(20)
    server.kill()
    server.env = {}
    server.start()
    (job_id,) = [job["id"] for job in server.jobs("?kind=archive")]
    if cancel and server.post(f"/v1/jobs/{job_id}/cancel").status in (200, 202):
        job = server.wait_for(job_id, "cancelled", "succeeded")
        if job["state"] == "cancelled":
            eventually(lambda: strays(server) == [], "nothing is left")
            assert len(server.get("/v1/files").json["items"]) == 5
            return
    job = server.wait_for(job_id, "succeeded")
    zipped = server.get(f"/v1/files/{job['result']['file']}/content").body
    eventually(lambda: strays(server) == [], "nothing is left")
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == data
    alone = serve(name="copy")
    row = archived(alone, list(data))
    assert alone.get(f"/v1/files/{row['id']}/content").body == zipped


def test_an_archive_is_never_seen_half_made(serve: Serve) -> None:
    """While it is made there is nothing to read, least of all its manifest; who follows the job
    gets the zip when it is whole."""
    server = serve()
    row = stored(server, "a.bin", b"")
    server.stop()
    grown(server, row, 1 << 40, None)  # which takes many minutes to read
    server.start()
    start = {"kind": "archive", "params": {"files": [row["id"]]}}
    job = server.post("/v1/jobs", start).json["id"]
    eventually(lambda: server.job(job)["progress"]["done"] > 0, "it reads")
    server.post(f"/v1/jobs/{job}/pause")
    server.wait_for(job, "paused")
    assert os.listdir(server.folder / "members") != []
    path = f"/v1/jobs/{job}/content"
    assert server.get(path).json["code"] == "not-yet"
    first = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    first.request("GET", f"{path}?follow=1")
    server.post(f"/v1/jobs/{job}/cancel")
    gone = first.getresponse()
    assert (gone.status, json.loads(gone.read())["code"]) == (410, "content-gone")
    first.close()
    # One that waits until it is followed.
    data = random.Random(4).randbytes(MIB)
    row = stored(server, "b.bin", data)
    gate = server.post("/v1/jobs", {"kind": "count", "params": {"steps": 10**6}}).json["id"]
    start = {"kind": "archive", "params": {"files": [row["id"]]}, "after": [gate], "on": "any"}
    job = server.post("/v1/jobs", start).json["id"]
    second = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    second.request("GET", f"/v1/jobs/{job}/content?follow=1")
    server.post(f"/v1/jobs/{gate}/cancel")
    answer = second.getresponse()
    if answer.status in (303, 307):
        followed = server.get(answer.headers["Location"]).body
    else:
        assert answer.status == 200
        followed = answer.read()
    second.close()
    with zipfile.ZipFile(io.BytesIO(followed)) as archive:
        assert archive.read("b.bin") == data
