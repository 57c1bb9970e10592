"""A server with something of everything: jobs in every state, files, versions, logs."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.harness import Server, eventually

KINDS = Path(__file__).parent / "kinds"
SLOTS = 3
LONG = "a very long name of a file that somebody has given without a thought of phones " * 2


class Busy:
    """That server; ``ids`` are those of its jobs by what they show."""

    def __init__(self, folder: Path) -> None:
        self.server = Server(folder, "--slots", str(SLOTS), "--kinds", str(KINDS)).start()
        self.ids: dict[str, str] = {}
        self._sender: socket.socket | None = None
        self._files()
        self._ended()
        self._live()

    def job(self, shows: str, kind: str, name: str, *states: str, **more: Any) -> str:
        """Start a job, and wait until it is in one of the states."""
        params = more.pop("params", {})
        start = {"kind": kind, "name": name, "params": params} | more
        answer = self.server.post("/v1/jobs", start)
        assert answer.status == 201, answer
        job = str(answer.json["id"])
        self.server.wait_for(job, *states)
        self.ids[shows] = job
        return job

    def _files(self) -> None:
        upload = "/upload?is_complete=true&file_name="
        rows = b"".join(b"%d,%d\n" % (i, i * i) for i in range(2000))
        for n in (500, 1000, 2000):
            assert self.server.post(f"{upload}samples.csv", b"n,square\n" + rows[:n]).status == 200
        for name in ("photos%20%26%20%3Cb%3E.zip", LONG.replace(" ", "-") + ".parquet"):
            assert self.server.post(f"{upload}{name}", b"x" * 5000).status == 200

    def _ended(self) -> None:
        done = "succeeded"
        sample = {"file": "samples.csv"}
        self.job("checksum", "checksum", "Checksum of samples.csv", done, params=sample)
        self.job("done", "report", "Report of March", done, params={"rows": 60})
        failing = {"rows": 90, "fails_at": 42}
        self.job("failed", "report", "Report of April", "failed", params=failing)
        missing = {"file": "returns.csv"}
        self.job("missing", "checksum", "Checksum of returns.csv", "failed", params=missing)
        job = self.job("cancelled", "count", LONG, "running", params={"steps": 10**6})
        self.server.post(f"/v1/jobs/{job}/cancel")
        self.server.wait_for(job, "cancelled")

    def _live(self) -> None:
        forever = {"steps": 10**6, "delay_s": 0.05}
        job = self.job("paused", "count", "Count the samples", "running", params=forever)
        self.server.post(f"/v1/jobs/{job}/pause")
        self.server.wait_for(job, "paused")
        self.job("running", "count", "Count the squares", "running", params=forever)
        lines = {"rows": 10**6, "delay_s": 0.05, "total": False}
        self.job("log", "report", "Report of all", "running", params=lines)
        self.job("busy", "count", "Count the cubes", "running", params=forever | {"steps": 900})
        for name in ("Count the rest", "Count it again"):
            self.job("queued", "count", name, "queued", params=forever)
        self.job("after", "count", "Count at last", "scheduled", after=[self.ids["running"]])
        self.job("scheduled", "count", "At night", "scheduled", not_before="2099-01-01T00:00:00Z")
        self.server.post("/upload?file_name=half.bin&file_size=2000000", bytes(1_000_000))
        head = b"POST /upload?file_name=slow.bin&file_size=9000000 HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        self._sender = socket.create_connection(("127.0.0.1", self.server.port))
        self._sender.sendall(head + b"Content-Length: 9000000\r\n\r\n" + bytes(3_000_000))
        eventually(lambda: self.server.jobs("?kind=upload&q=slow.bin"), "the upload has begun")

    def close(self) -> None:
        """End it."""
        if self._sender is not None:
            self._sender.close()
        self.server.post("/v1/jobs/cancel", {"filter": {}})
        self.server.stop()


@contextlib.contextmanager
def busy(folder: Path) -> Iterator[Busy]:
    """Such a server on that folder, while the block runs."""
    made = Busy(folder)
    try:
        yield made
    finally:
        made.close()
