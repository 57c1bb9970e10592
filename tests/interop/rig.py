"""What a test of a client holds in its hands: the client, the relay, the server and a file."""

from __future__ import annotations

import hashlib
import http.client
import os
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from tests.harness import Server, eventually
from tests.interop.clients import PATIENCE_S, SIZE, Client, Flavour
from tests.interop.proxy import Proxy

MARK = SIZE * 2 // 5  # where uploads are interrupted
HEADS = 64 << 10  # more than all heads of requests together
FINAL = ("succeeded", "failed", "cancelled")
_MIB = 1 << 20


class Source(NamedTuple):
    """A file to upload."""

    path: Path
    sha256: str


def make_source(path: Path, n: int) -> Source:
    """Write ``n`` random bytes."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, n, _MIB):
            piece = os.urandom(min(_MIB, n - start))
            digest.update(piece)
            file.write(piece)
    return Source(path, digest.hexdigest())


class Rig(NamedTuple):
    """A client whose way to the server leads through the relay."""

    server: Server
    proxy: Proxy
    client: Client
    flavour: Flavour
    earlier: Set[str]  # jobs of other tests

    @property
    def endpoint(self) -> str:
        """Where the client creates its uploads."""
        return self.proxy.url + self.flavour.path

    def start(self, source: Source) -> None:
        """Let the client begin, or begin again."""
        self.client.start(self.endpoint, self.flavour.options, source.path)

    def start_and_hold(self, source: Source) -> int:
        """Let the client begin, and hold its bytes up at the mark; what is stored then."""
        self.proxy.hold_at(MARK)
        self.start(source)
        eventually(self._is_held, "the mark is reached", PATIENCE_S)
        # What came is content, but for the heads of the requests.
        eventually(lambda: self.stored() > 0.9 * MARK, "what came is stored")
        return self.stored()

    def _is_held(self) -> bool:
        self.client.check()
        return self.proxy.is_at_mark

    def jobs(self) -> list[Any]:
        """The uploads of this test, newest first."""
        return [job for job in all_uploads(self.server) if job["id"] not in self.earlier]

    def stored(self) -> int:
        """Bytes that the server has of all uploads together."""
        return sum(job["transfer"]["stored_bytes"] for job in self.jobs())

    def files(self) -> list[Any]:
        """The stored files of this test."""
        ours = {job["id"] for job in self.jobs()}
        stored = self.server.get("/v1/files?limit=500").json["items"]
        return [file for file in stored if file["job"] in ours]

    def clean(self) -> None:
        """Remove everything that the test has left on the server."""
        for job in self.jobs():
            if job["state"] not in FINAL:
                self.server.post(f"/v1/jobs/{job['id']}/cancel")
        for file in self.files():
            self.server.delete(f"/v1/files/{file['id']}")

    def arrived(self, source: Source) -> None:
        """Wait for the client; fail unless the file is stored, under its name, and nothing else."""
        self.client.done()
        [file] = self.files()
        assert file["name"] == source.path.name
        assert digest_of(self.server, file["id"]) == source.sha256


def all_uploads(server: Server) -> list[Any]:
    """The newest uploads that the server knows."""
    return server.jobs("?kind=upload&limit=500")


def stored_digest(server: Server, name: str) -> str:
    """SHA-256 of the one stored file of that name."""
    [file] = server.get(f"/v1/files?name={quote(name)}").json["items"]
    return digest_of(server, file["id"])


def digest_of(server: Server, file_id: str) -> str:
    """SHA-256 of a stored file, as the server gives it back."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    digest = hashlib.sha256()
    try:
        connection.request("GET", f"/v1/files/{file_id}/content")
        answer = connection.getresponse()
        assert answer.status == 200
        while piece := answer.read(_MIB):
            digest.update(piece)
    finally:
        connection.close()
    return digest.hexdigest()
