"""kill -9 of the real server in every phase of a job, and what the next start makes of it.

Half of the moments are exact (``CRASH_AT``, see tests/serve.py): between fdatasync and commit,
between rename and commit, between commit and answer. The others are by chance; ``CHAOS_SEED`` in
the environment repeats them.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Serve
from tests.harness import FULL, Server, eventually, form

pytestmark = pytest.mark.chaos

BLOCK = 1 << 20
ROUNDS = 50 if FULL else 14
STEP_S = 0.01
BEHIND = 2.2 / STEP_S  # steps that a cursor may lack: it is saved each second, which takes a while
FINAL = ("succeeded", "failed", "cancelled")


class Killed(Exception):
    """The server has died, as it was meant to."""


class Chaos:
    """One data folder, on which servers die one after the other."""

    def __init__(self, server: Server, chance: random.Random) -> None:
        self.server = server
        self.chance = chance
        self.round = 0
        self.seen = 0  # the step at which the bystander was seen last
        self.bystander = ""

    # Life and death

    def live(self, point: str = "") -> None:
        """Start a server that dies at ``point``; nothing else may be live on its folder."""
        self.server.env = {"CRASH_AT": point} if point else {}
        if not point:
            self.server.start()
        else:
            with contextlib.suppress(AssertionError):  # it may die before it says where it is
                self.server.start(ready=False)
                eventually(lambda: self.dead or self.server.is_ready(), "up")
        self.seen = 0

    @property
    def dead(self) -> bool:
        """Whether the server has ended."""
        return self.server.process is None or self.server.process.poll() is not None

    def kill(self) -> None:
        """Now, if it has not died by itself."""
        if self.server.process is not None:
            self.server.kill()

    def killed_within(self, seconds: float) -> None:
        """Wait for the death that was ordered; after a while it comes by chance."""
        with contextlib.suppress(AssertionError):
            eventually(lambda: self.dead, "it dies", seconds)
        self.kill()

    @contextlib.contextmanager
    def mortal(self) -> Iterator[None]:
        """Requests in here may find the server dead."""
        with contextlib.suppress(
            ConnectionError, http.client.HTTPException, socket.timeout, json.JSONDecodeError, Killed
        ):
            yield

    def name(self) -> str:
        """A file name of this round."""
        return f"file {self.round}.bin"

    def data(self, n: int) -> bytes:
        """Bytes that are different everywhere."""
        return self.chance.randbytes(n)

    # What the folder holds, looked at without the server

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Read the state of a dead server."""
        con = sqlite3.connect(f"file:{self.server.folder / 'state.db'}?mode=ro", uri=True)
        try:
            return con.execute(query).fetchall()
        finally:
            con.close()

    def look(self) -> None:
        """Remember where the bystander is."""
        with self.mortal():
            self.seen = self.server.job(self.bystander)["progress"]["done"]

    # After the next start

    def check(self) -> None:
        """Everything that must hold after any death."""
        ((cursor,),) = self.rows(f"SELECT cursor FROM jobs WHERE id = '{self.bystander}'")
        at = json.loads(cursor)["cursor"] if json.loads(cursor) else 0
        # Its steps tell the time: they stand still whenever the server does.
        assert at >= self.seen - BEHIND, "the cursor is behind what was saved long ago"
        self.live()
        server = self.server
        eventually(
            lambda: server.job(self.bystander)["progress"]["done"] > at, "the bystander goes on"
        )
        eventually(lambda: self.unsettled() == [], f"all is settled: {self.unsettled()}", 60)
        for job in self.jobs():
            versions, after = [], "0"
            while after:
                page = server.get(f"/v1/jobs/{job['id']}/events?limit=500&after={after}").json
                versions += [event["version"] for event in page["items"]]
                after = page["next"]
            assert versions == list(range(1, len(versions) + 1)), job
            # An upload that ends by itself may do so while this looks.
            assert job["version"] <= len(versions) <= server.job(job["id"])["version"], job
        eventually(lambda: self.strays() == set(), f"tmp/ is clean: {self.strays()}")
        # An upload of which all bytes were there is published by itself, and may be so just now.
        eventually(lambda: self.published() == self.known(), "published is what has a row")
        for file_id in self.known():
            assert len(list((server.folder / "uploads" / file_id).iterdir())) == 1

    def published(self) -> set[str]:
        """The files that are there."""
        return {path.name for path in (self.server.folder / "uploads").iterdir()}

    def known(self) -> set[str]:
        """The files that have a row."""
        return {file_id for (file_id,) in self.rows("SELECT id FROM files")}

    def jobs(self) -> list[Any]:
        """All jobs."""
        return self.server.jobs("?limit=500")

    def unsettled(self) -> list[Any]:
        """Jobs in a state that must not last."""
        return [
            (job["kind"], job["state"], job["reason"])
            for job in self.jobs()
            if job["state"] in ("pausing", "cancelling", "queued")
            or (job["kind"] == "download" and job["state"] not in FINAL)
            or (job["kind"] == "count" and job["state"] == "running" and not job["started_at"])
        ]

    def strays(self) -> set[str]:
        """Files in tmp/ that belong to no live job."""
        wanted = set()
        for (cursor,) in self.rows("SELECT cursor FROM jobs WHERE live = 1"):
            wanted |= {part["id"] for part in (json.loads(cursor) or {}).get("blobs", [])}
        return {path.name for path in (self.server.folder / "tmp").iterdir()} - wanted

    # Phases

    def blocks(self, point: str = "") -> None:
        """An upload by blocks; what was acknowledged is there, and it completes."""
        name, data = self.name(), self.data(5 * BLOCK + 12345)
        at = f"file_name={name.replace(' ', '%20')}"
        self.live(point)
        acknowledged, sent = 0, 0
        random_end = not point and self.chance.randrange(0, 6)
        with self.mortal():
            for number, start in enumerate(range(0, len(data), BLOCK)):
                if not point and number == random_end:
                    self.cut_block(f"/upload?{at}&bytes_read={start}", data[start : start + BLOCK])
                    sent = start + BLOCK
                    break
                sent = min(start + BLOCK, len(data))
                last = f"&file_size={len(data)}" if number == 0 or sent == len(data) else ""
                path = f"/upload?{at}&bytes_read={start}{last}"
                answer = self.server.request("POST", path, data[start:sent])
                assert answer.status == 200, answer
                acknowledged = answer.json["bytes_read"]
        self.killed_within(2)
        self.check()
        answer = self.server.get(f"/upload?{at}")
        if answer.status == 404:
            assert acknowledged == 0
            offset, complete = 0, False
        else:
            offset, complete = answer.json["bytes_read"], answer.json["is_complete"]
            assert acknowledged <= offset <= sent
            if offset < len(data):  # else it ends by itself, and may do so just now
                assert not complete
                (job,) = [job for job in self.jobs() if job["name"] == name]
                assert (job["state"], job["transfer"]["stored_bytes"]) == ("running", offset)
                (stored,) = self.blobs(job["id"])
                assert stored == data[:offset]
        if not complete:
            answer = self.server.request(
                "POST", f"/upload?{at}&bytes_read={offset}&is_complete=true", data[offset:]
            )
            assert answer.status == 200, answer
        self.has(name, data)

    def cut_block(self, path: str, block: bytes) -> None:
        """Send a part of a block, and kill the server in the middle of it."""
        with socket.create_connection(("127.0.0.1", self.server.port), 10) as sock:
            head = (
                f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(block)}\r\n\r\n"
            )
            sock.sendall(head.encode() + block[: self.chance.randrange(len(block))])
            time.sleep(self.chance.random() * 0.3)
            self.kill()
        raise Killed

    def blobs(self, job_id: str) -> list[bytes]:
        """The unfinished bytes of a job."""
        ((cursor,),) = self.rows(f"SELECT cursor FROM jobs WHERE id = '{job_id}'")
        ids = [part["id"] for part in json.loads(cursor)["blobs"]]
        paths = [self.server.folder / "tmp" / blob for blob in ids]
        return [path.read_bytes() if path.exists() else b"" for path in paths]

    def has(self, name: str, data: bytes) -> None:
        """The newest file of that name has these bytes."""
        files = self.server.get(f"/v1/files?name={name.replace(' ', '%20')}").json["items"]
        content = self.server.get(f"/v1/files/{files[0]['id']}/content").body
        assert hashlib.sha256(content).digest() == hashlib.sha256(data).digest()

    def whole_form(self, point: str = "") -> None:
        """A form with two files: all or nothing, and nothing is left of nothing."""
        name, data = self.name(), self.data(2 * BLOCK)
        body, content_type = form(("file", name, data), ("file", f"2 {name}", data[:1000]))
        head = f"POST /upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        self.live(point)
        answered = b""
        with self.mortal(), socket.create_connection(("127.0.0.1", self.server.port), 10) as sock:
            end = len(body) if point else self.chance.randrange(len(body))
            sock.sendall(head.encode() + body[:end])
            if not point:
                time.sleep(self.chance.random() * 0.2)
                self.kill()
            answered = sock.recv(4096)
        self.killed_within(2)
        self.check()
        found = [job for job in self.jobs() if job["name"] == name]
        stored = self.server.get(f"/v1/files?name={name.replace(' ', '%20')}").json["items"]
        if not found:
            assert stored == []
        elif found[0]["state"] == "failed":
            assert not answered.startswith(b"HTTP/1.1 200")
            assert found[0]["error"]["code"] == "interrupted"
            assert stored == []
        else:
            assert found[0]["state"] == "succeeded"
            self.has(name, data)
            self.has(f"2 {name}", data[:1000])

    def process(self, point: str = "") -> None:
        """A process dies between two checkpoints, and goes on by itself to its end."""
        self.live(point)
        job_id = ""
        with self.mortal():
            job_id = self.server.post(
                "/v1/jobs", {"kind": "count", "params": {"steps": 300, "delay_s": STEP_S}}
            ).json["id"]
            end = time.monotonic() + (3.2 if not point else 5.0) + self.chance.random()
            while time.monotonic() < end and not self.dead:
                self.look()
                time.sleep(0.05)
        self.kill()
        self.check()
        if job_id:
            job = self.server.wait_for(job_id, "succeeded")
            assert job["result"]["data"] == {"counted": 300}

    def undo(self, point: str = "") -> None:
        """A cancelled process dies while it takes its steps back; all of them are, in the end."""
        self.live(point)
        params = {"steps": 10**6, "delay_s": STEP_S, "undo_steps": 20}
        job_id = self.server.post("/v1/jobs", {"kind": "count", "params": params}).json["id"]
        eventually(lambda: self.server.job(job_id)["progress"]["done"] > 22, "it has begun")
        with self.mortal():
            assert self.server.post(f"/v1/jobs/{job_id}/cancel").status == 202
            if not point:
                time.sleep(self.chance.random() * 0.25)
                self.kill()
        self.killed_within(5)
        self.check()
        job = self.server.wait_for(job_id, "cancelled")
        assert self.rows(f"SELECT undo FROM jobs WHERE id = '{job_id}'") == [(b"[]",)]
        if job["rollback"] is not None:
            assert job["rollback"]["done"] == job["rollback"]["total"]
            assert job["rollback"]["failed"] == 0

    def commands(self, point: str = "") -> None:
        """Commands that were answered hold; paused stays paused, cancelled ends cancelled."""
        self.live(point)
        answers: dict[str, str] = {}
        params = {"steps": 10**6, "delay_s": STEP_S}
        with self.mortal():
            for verb in ("pause", "cancel", "pause", "cancel"):
                job_id = self.server.post("/v1/jobs", {"kind": "count", "params": params}).json[
                    "id"
                ]
                self.server.wait_for(job_id, "running")
                if self.server.post(f"/v1/jobs/{job_id}/{verb}").status in (200, 202):
                    answers[job_id] = verb
            if not point:
                self.kill()
        self.killed_within(3)
        self.check()
        for job_id, verb in answers.items():
            wanted = {"pause": "paused", "cancel": "cancelled"}[verb]
            assert self.server.wait_for(job_id, wanted)
        for job in self.jobs():
            if job["kind"] == "count" and job["state"] not in FINAL and job["id"] != self.bystander:
                self.server.post(f"/v1/jobs/{job['id']}/cancel")
                self.server.wait_for(job["id"], "cancelled")

    def export(self, point: str = "") -> None:
        """An export dies on its way: the client sees a short body, the job has failed."""
        self.live(point)
        name = "to export.bin"
        if self.server.get("/v1/files?name=to%20export.bin").json["items"] == []:
            body, content_type = form(("file", name, bytes(40 * BLOCK)))
            self.server.request("POST", "/upload", body, {"Content-Type": content_type})
        content = json.dumps({"filename": name}).encode()
        got = 0
        with self.mortal(), socket.create_connection(("127.0.0.1", self.server.port), 10) as sock:
            sock.sendall(
                b"POST /export HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(content) + content
            )
            stop = self.chance.randrange(20 * BLOCK)
            while chunk := sock.recv(1 << 16):
                got += len(chunk)
                if not point and got > stop:
                    self.kill()
        self.killed_within(2)
        assert got < 40 * BLOCK
        self.check()
        ended = [job for job in self.jobs() if job["kind"] == "download"]
        assert (ended[0]["state"], ended[0]["error"]["code"]) == ("failed", "interrupted")


Phase = Callable[[Chaos, str], None]

# Each at least once, the first ones also at small scale.
EXACT: list[tuple[Phase, str, int]] = [
    (Chaos.blocks, "created", 1),
    (Chaos.blocks, "written", 5),
    (Chaos.blocks, "synced", 1),
    (Chaos.blocks, "published", 1),
    (Chaos.blocks, "ended", 1),
    (Chaos.whole_form, "published", 2),
    (Chaos.undo, "undo", 12),
    (Chaos.export, "sendfile", 8),
    (Chaos.blocks, "saved", 8),
    (Chaos.blocks, "ending", 1),
    (Chaos.blocks, "write", 5),
    (Chaos.whole_form, "ended", 1),
    (Chaos.process, "checkpoint", 200),
    (Chaos.commands, "flush", 40),
]
BY_CHANCE: list[Phase] = [
    Chaos.process,
    Chaos.blocks,
    Chaos.whole_form,
    Chaos.commands,
    Chaos.undo,
    Chaos.export,
]


def plan(chance: random.Random) -> Iterator[tuple[Phase, str]]:
    """The rounds: exact moments first, at full scale each at several calls; then by chance."""
    exact = EXACT if FULL else EXACT[:8]
    for phase, point, most in exact:
        yield phase, f"{point}:{chance.randint(1, most)}"
    for number in range(ROUNDS - len(exact)):
        yield BY_CHANCE[number % len(BY_CHANCE)], ""


def test_no_death_loses_what_was_acknowledged(serve: Serve, tmp_path: Path) -> None:
    """However and whenever it dies: acknowledged bytes and transitions stay, work goes on."""
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(2**32))
    print(f"CHAOS_SEED={seed}")
    server = serve("--slots", "4")
    chaos = Chaos(server, random.Random(seed))
    chaos.bystander = server.post(
        "/v1/jobs",
        {"kind": "count", "name": "bystander", "params": {"steps": 10**7, "delay_s": STEP_S}},
    ).json["id"]
    server.wait_for(chaos.bystander, "running")
    for phase, point in plan(chaos.chance):
        chaos.round += 1
        chaos.kill()
        print(f"round {chaos.round}: {phase.__name__} {point or 'by chance'}")
        phase(chaos, point)
    server.check_threads()
    chaos.kill()
