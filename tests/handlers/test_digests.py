"""Digests of files that nobody asked for when they were uploaded."""

from __future__ import annotations

import asyncio
import hashlib
import os
import zlib
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.handlers.clients import Caller, Raw
from tests.harness import Server, eventually
from tests.storage.sparse import store_sparse

MIB = 1 << 20
HUGE_BYTES = 64 << 30  # of holes; to hash them takes many seconds on any machine
ARIA2 = {"Want-Digest": "SHA-512;q=1, SHA-256;q=1, SHA;q=0.1"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for these tests."""
    server = Server(tmp_path_factory.mktemp("digests") / "data")
    yield server.start()
    server.close()


def store(server: Server, data: bytes) -> str:
    """Upload a file without a word about digests; its id."""
    return str(Caller(server, "c").block("x.bin", 0, data, "&is_complete=1").json["id"])


def told(server: Server, file_id: str, method: str = "GET", **headers: str) -> str | None:
    """The Repr-Digest of an answer, which agrees with its Digest."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = server.request(method, f"/v1/files/{file_id}/content", headers=named)
    assert answer.status in (200, 206)
    found = answer.headers.get("Repr-Digest")
    digest = answer.headers.get("Digest")
    assert digest == (None if found is None else "SHA-256=" + found[9:-1])
    return found


def digest_of(data: bytes) -> str:
    """A Repr-Digest."""
    return f"sha-256=:{b64encode(hashlib.sha256(data).digest()).decode()}:"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("size", [0, 10, 256 << 10, (256 << 10) + 1, 3 * MIB])
def test_a_small_file_is_hashed_for_its_first_reader(site: Server, size: int, method: str) -> None:
    """The first answer tells the digest, and the file keeps it, also the one that zips need."""
    data = os.urandom(size)
    file_id = store(site, data)
    assert told(site, file_id, method) == digest_of(data)
    kept = site.get(f"/v1/files/{file_id}").json["digest"]
    assert kept == {
        "sha-256": hashlib.sha256(data).hexdigest(),
        "crc-32": f"{zlib.crc32(data):08x}",
    }


@pytest.mark.parametrize(
    "wish", [ARIA2, {"Want-Repr-Digest": "sha-256=1"}], ids=["want-digest", "want-repr-digest"]
)
def test_a_larger_file_is_hashed_for_who_asks(site: Server, wish: dict[str, str]) -> None:
    """Nobody else waits for it; once it is known, everybody is told."""
    data = os.urandom(MIB) * 17
    file_id = store(site, data)
    for no in ("", "SHA-256;q=0", "sha;q=0.0, md5 ; q=0"):
        assert told(site, file_id, "HEAD", Want_Digest=no) is None
    assert told(site, file_id, "HEAD", Want_Repr_Digest="sha-256=0") is None
    assert told(site, file_id, Range="bytes=0-0", **wish) == digest_of(data)
    assert told(site, file_id) == digest_of(data)


def test_many_readers_of_a_new_file_all_have_its_digest(site: Server) -> None:
    """Parts that are asked for at once all wait for the same hash."""
    data = os.urandom(MIB) * 32
    file_id = store(site, data)
    raws = [Raw(site) for _ in range(8)]
    for n, raw in enumerate(raws):
        raw.head("GET", f"/v1/files/{file_id}/content", Range=f"bytes={n}-{n}", **ARIA2)
    for raw in raws:
        with raw:
            assert raw.answer().headers["Repr-Digest"] == digest_of(data)


def test_nobody_waits_for_a_huge_file(serve: Serve, tmp_path: Path) -> None:
    """Beyond 256 MiB the answer comes without a digest, and a later one has it."""
    path = asyncio.run(store_sparse(tmp_path / "data", "huge.bin", 300 * MIB))
    server = serve()
    file_id = path.split("/")[3]
    assert told(server, file_id, "HEAD", **ARIA2) is None
    eventually(lambda: told(server, file_id, "HEAD") is not None, "it was hashed")


def test_only_so_many_files_are_hashed_at_once(serve: Serve, tmp_path: Path) -> None:
    """Who asks while four huge files are read gets the answer without a digest, and later with."""
    paths = [
        asyncio.run(store_sparse(tmp_path / "data", f"huge{n}.bin", HUGE_BYTES)) for n in range(4)
    ]
    server = serve()
    data = os.urandom(MIB)
    file_id = store(server, data)
    for path in paths:
        assert told(server, path.split("/")[3], "HEAD", **ARIA2) is None
    assert told(server, file_id, **ARIA2) is None
    server.stop()
    server.start()
    assert told(server, file_id, **ARIA2) == digest_of(data)


def test_a_stop_does_not_wait_for_a_hash(serve: Serve, tmp_path: Path) -> None:
    """A hash that is under way ends with the server, without a word in its log."""
    path = asyncio.run(store_sparse(tmp_path / "data", "huge.bin", HUGE_BYTES))
    server = serve()
    file_id = path.split("/")[3]
    assert told(server, file_id, "HEAD", **ARIA2) is None
    assert server.stop() == 0
    server.start()
    assert told(server, file_id, "HEAD") is None


def test_a_file_that_is_shorter_than_it_was_gets_no_digest(serve: Serve) -> None:
    """A digest of other bytes than were stored is never kept."""
    server = serve()
    file_id = store(server, b"data")
    os.truncate(server.folder / "uploads" / file_id / "x.bin", 3)
    assert told(server, file_id, "HEAD") is None
    assert server.get(f"/v1/files/{file_id}").json["digest"] == {}


def test_a_file_whose_bytes_are_gone_tells_no_digest(serve: Serve) -> None:
    """What can't be read can't be hashed: the answer is the error of reading it."""
    server = serve()
    file_id = store(server, b"data")
    (server.folder / "uploads" / file_id / "x.bin").unlink()
    answer = server.get(f"/v1/files/{file_id}/content")
    assert (answer.status, answer.json["code"]) == (404, "file-unknown")
