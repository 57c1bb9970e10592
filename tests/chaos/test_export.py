"""A big table is exported while it is paused, resumed, killed and restarted at random.

Each format once alone and once disturbed; the bytes must not differ. ``CHAOS_SEED`` in the
environment repeats the moments, as far as chance of the machine allows.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import random
import time
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.harness import FULL, Server, eventually

pytestmark = pytest.mark.chaos

ROWS = 5_000_000 if FULL else 50_000
DEATHS = 3 if FULL else 2
PAUSES = 6 if FULL else 3
FORMATS = ("csv", "jsonl", "csv.gz", "jsonl.gz")
FINAL = ("succeeded", "failed", "cancelled")


def store(server: Server, folder: Path) -> None:
    """Make the table and upload it, by blocks of some megabytes."""
    chance = random.Random(1)
    words = [chance.randbytes(chance.randrange(1, 12)).hex() for _ in range(1000)]
    words[7] = '"quoted, and\non two lines"'
    path = folder / "table.csv"
    with path.open("w", newline="") as file:
        file.write("id,word,value,day\n")
        for begin in range(0, ROWS, 50_000):
            lines = io.StringIO()
            for n in range(begin, min(begin + 50_000, ROWS)):
                word = words[n * 7919 % 1000]
                lines.write(f"{n},{word},{n * 2654435761 % 4294967296},2024-01-{n % 28 + 1:02d}\n")
            file.write(lines.getvalue())
    size, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            query = f"file_name=table.csv&bytes_read={at}&file_size={size}"
            assert server.request("POST", f"/upload?{query}", block).status == 200
            at += len(block)
    path.unlink()


def start(server: Server, format: str) -> str:
    """Start an export."""
    params = {"source": "table.csv", "format": format}
    answer = server.post("/v1/jobs", {"kind": "export", "params": params})
    assert answer.status == 201, answer
    return str(answer.json["id"])


def digest(server: Server, job_id: str) -> str:
    """The SHA-256 of what an export made."""
    job = server.wait_for(job_id, *FINAL, within_s=120)
    assert job["state"] == "succeeded", job["error"]
    assert job["result"]["data"]["rows_read"] == ROWS
    assert job["result"]["data"]["rows_written"] == ROWS
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", f"/v1/files/{job['result']['file']}/content")
    answer, found = connection.getresponse(), hashlib.sha256()
    while piece := answer.read(1 << 20):
        found.update(piece)
    connection.close()
    return found.hexdigest()


class Trouble:
    """What befalls one export; counts what really did."""

    def __init__(self, server: Server, chance: random.Random, longest_s: float) -> None:
        self.server = server
        self.chance = chance
        self.longest_s = longest_s
        self.paused = 0
        self.killed = 0

    def befall(self, job_id: str, first: str) -> None:
        """One thing at once, whatever the machine's pace; pauses and deaths, each after a while."""
        plan = ["pause"] * PAUSES + ["kill"] * DEATHS
        self.chance.shuffle(plan)
        delays_s = [0.0, *(self.chance.random() * self.longest_s for _ in plan)]
        for what, delay_s in zip([first, *plan], delays_s, strict=True):
            time.sleep(delay_s)
            if self.server.job(job_id)["state"] in FINAL:
                return
            if what == "kill":
                self.server.kill()
                self.server.start()
                self.killed += 1
            else:
                self.pause(job_id)

    def pause(self, job_id: str) -> None:
        """Pause, and resume warm or cold."""
        if self.server.post(f"/v1/jobs/{job_id}/pause").status == 409:
            return
        job = self.server.wait_for(job_id, "paused", *FINAL)
        if job["state"] != "paused":
            return
        done = job["progress"]["done"]
        time.sleep(self.chance.choice([0, 0.4]))  # warm, or cold
        assert self.server.job(job_id)["progress"]["done"] == done, "it stands still"
        assert self.server.post(f"/v1/jobs/{job_id}/resume").status == 202
        self.paused += 1


def test_a_disturbed_export_has_the_same_bytes(serve: Serve, tmp_path: Path) -> None:
    """However often it is paused, resumed and killed, an export is the one left alone."""
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(2**32))
    print(f"CHAOS_SEED={seed}")
    chance = random.Random(seed)
    server = serve("--warm-s", "0.2")
    store(server, tmp_path)
    paused = killed = 0
    for format, first in zip(FORMATS, ("pause", "kill") * 2, strict=True):
        begin = time.monotonic()
        alone = digest(server, start(server, format))
        trouble = Trouble(server, chance, (time.monotonic() - begin) / (PAUSES + DEATHS))
        job_id = start(server, format)
        trouble.befall(job_id, first)
        assert digest(server, job_id) == alone, format
        print(f"{format}: paused {trouble.paused}, killed {trouble.killed}")
        paused, killed = paused + trouble.paused, killed + trouble.killed
        for file in server.get("/v1/files?limit=500").json["items"]:
            if file["name"] != "table.csv":
                assert server.delete(f"/v1/files/{file['id']}").status in (200, 204)
    assert paused >= 2, "the job ended too soon to be paused"
    assert killed >= 2, "the job ended too soon to be killed"
    eventually(lambda: list((server.folder / "tmp").iterdir()) == [], "tmp/ is empty")
