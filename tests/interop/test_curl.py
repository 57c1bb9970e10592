"""tus by hand: what one would type to upload with curl, step by step."""

from __future__ import annotations

import base64
import hashlib
import subprocess
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import urljoin

import pytest

from tests.conftest import need
from tests.harness import Server
from tests.interop.clients import SIZE
from tests.interop.proxy import Proxy
from tests.interop.rig import MARK, Source, make_source, stored_digest

TUS = ("-H", "Tus-Resumable: 1.0.0")
BYTES = ("-H", "Content-Type: application/offset+octet-stream")


class Shown(NamedTuple):
    """What curl shows of an answer: the status and the headers."""

    status: int
    headers: dict[str, str]


@pytest.fixture(autouse=True)
def _curl() -> None:
    need("curl")


def curl(method: str, url: str, *options: str, stdin: IO[bytes] | None = None) -> Shown:
    """Run ``curl -i -X METHOD``; the last of its answers (the first may be a 100)."""
    how = ["--head"] if method == "HEAD" else ["-X", method]
    done = subprocess.run(
        ["curl", "-sSi", *how, *TUS, *options, url], stdin=stdin, capture_output=True, check=True
    )
    heads = [part for part in done.stdout.decode().split("\r\n\r\n") if part.startswith("HTTP/")]
    line, _, headers = heads[-1].partition("\r\n")
    found = Parser().parsestr(headers)
    return Shown(int(line.split()[1]), {name.lower(): value for name, value in found.items()})


def metadata(**values: str) -> tuple[str, str]:
    """The header that names a file."""
    pairs = (f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in values.items())
    return "-H", f"Upload-Metadata: {','.join(pairs)}"


def create(server: Server, length: int, *options: str) -> str:
    """Create an upload; its URL."""
    answer = curl("POST", f"{server.url}/tus/", "-H", f"Upload-Length: {length}", *options)
    assert answer.status == 201, answer
    return urljoin(f"{server.url}/tus/", answer.headers["location"])


def tail(source: Source, offset: int) -> subprocess.Popen[bytes]:
    """The rest of a file from an offset on."""
    command = ["tail", "-c", f"+{offset + 1}", str(source.path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_upload_in_two_pieces(server: Server, tmp_path: Path) -> None:
    """POST creates an upload, each PATCH adds to it, HEAD tells where it stands."""
    source = make_source(tmp_path / "two pieces.bin", 300_000)
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(source.path.read_bytes()[:100_000])
    second.write_bytes(source.path.read_bytes()[100_000:])
    url = create(server, 300_000, *metadata(filename="two pieces.bin"))
    at = ("-H", "Upload-Offset: 0")
    answer = curl("PATCH", url, *BYTES, *at, "--data-binary", f"@{first}")
    assert (answer.status, answer.headers["upload-offset"]) == (204, "100000")
    answer = curl("HEAD", url)
    assert answer.status in (200, 204)
    assert answer.headers["upload-offset"] == "100000"
    assert answer.headers["upload-length"] == "300000"
    assert answer.headers["cache-control"] == "no-store"
    assert ("-H", f"Upload-Metadata: {answer.headers['upload-metadata']}") == metadata(
        filename="two pieces.bin"
    )
    at = ("-H", "Upload-Offset: 100000")
    answer = curl("PATCH", url, *BYTES, *at, "--data-binary", f"@{second}")
    assert (answer.status, answer.headers["upload-offset"]) == (204, "300000")
    assert stored_digest(server, "two pieces.bin") == source.sha256


def test_resumed_with_tail(
    server: Server, relay: Callable[[Server], Proxy], source: Source
) -> None:
    """After a broken connection HEAD says from where ``tail`` has to send the rest."""
    url = create(server, SIZE, *metadata(filename="resumed.bin"))
    proxy = relay(server)
    proxy.cut_at(MARK)
    through_relay = url.replace(server.url, proxy.url)
    with pytest.raises(subprocess.CalledProcessError):
        at = ("-H", "Upload-Offset: 0")
        curl("PATCH", through_relay, *BYTES, *at, "-T", str(source.path))
    offset = int(curl("HEAD", url).headers["upload-offset"])
    assert 0 < offset < SIZE
    with tail(source, offset) as rest:
        at = ("-H", f"Upload-Offset: {offset}")
        answer = curl("PATCH", url, *BYTES, *at, "-T", "-", stdin=rest.stdout)
    assert (answer.status, answer.headers["upload-offset"]) == (204, str(SIZE))
    assert stored_digest(server, "resumed.bin") == source.sha256


def test_checksum_guards_a_piece(server: Server, tmp_path: Path) -> None:
    """A piece whose checksum is wrong is refused with 460 and leaves the offset where it was."""
    path = tmp_path / "piece"
    path.write_bytes(b"the piece")
    url = create(server, 9, *metadata(filename="checked.bin"))
    for algorithm in ("sha1", "sha256", "md5"):
        wrong = base64.b64encode(hashlib.new(algorithm, b"another one").digest()).decode()
        checksum = ("-H", f"Upload-Checksum: {algorithm} {wrong}")
        at = ("-H", "Upload-Offset: 0")
        answer = curl("PATCH", url, *BYTES, *at, *checksum, "--data-binary", f"@{path}")
        assert answer.status == 460
        assert curl("HEAD", url).headers["upload-offset"] == "0"
    right = base64.b64encode(hashlib.sha256(b"the piece").digest()).decode()
    answer = curl(
        *("PATCH", url, *BYTES, "-H", "Upload-Offset: 0"),
        *("-H", f"Upload-Checksum: sha256 {right}", "--data-binary", f"@{path}"),
    )
    assert answer.status == 204


def test_given_up(server: Server) -> None:
    """DELETE ends an upload; afterwards it is not there any more."""
    url = create(server, 1000)
    assert curl("DELETE", url).status == 204
    assert curl("HEAD", url).status in (404, 410)


def test_what_the_server_can(server: Server) -> None:
    """OPTIONS lists the version, the extensions and the checksums."""
    answer = curl("OPTIONS", f"{server.url}/tus/")
    assert answer.status in (200, 204)
    assert answer.headers["tus-version"] == "1.0.0"
    extensions = set(answer.headers["tus-extension"].split(","))
    assert extensions == {
        "checksum",
        "concatenation",
        "concatenation-unfinished",
        "creation",
        "creation-defer-length",
        "creation-with-upload",
        "expiration",
        "termination",
    }
    assert "sha1" in answer.headers["tus-checksum-algorithm"].split(",")
