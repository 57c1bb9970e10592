"""The subscribers of docs/channel.md print every transition once, over a server that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import missing, need
from tests.harness import ROOT, Server, eventually
from tests.interop.proxy import Proxy

PAGE = (ROOT / "docs" / "channel.md").read_text()
PATIENCE_S = 90  # a client that has tried in vain waits for a while


class Transition(NamedTuple):
    """A line that a subscriber has printed."""

    name: str
    version: int
    to: str


def transition(line: str) -> Transition:
    """What a line tells: the message itself, or three words."""
    if line.startswith("{"):
        message = json.loads(line)
        return Transition(message["row"]["name"], message["row"]["version"], message["to"])
    name, version, to = line.split()
    return Transition(name, int(version), to)


class Subscriber:
    """A script, and what it has printed."""

    def __init__(self, *command: str, cwd: Path) -> None:
        self.said: list[str] = []
        self._process = subprocess.Popen(
            command,
            cwd=cwd,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # what it has started ends with it
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said.append(line)

    def of(self, name: str) -> list[Transition]:
        """The transitions of the job with that name."""
        assert self._process.poll() is None, "the script has ended"
        told = [transition(line) for line in list(self.said)]
        return [one for one in told if one.name == name]

    def until(self, name: str, to: str) -> None:
        """Wait for a transition of a job."""
        eventually(
            lambda: any(one.to == to for one in self.of(name)),
            f"{name} {to} is printed",
            PATIENCE_S,
        )

    def close(self) -> None:
        """End it."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        self._reader.join(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Lossy(Proxy):
    """A relay on which one event gets lost: what has no known name is ignored."""

    lose = False

    async def _down(self, server: socket.socket, client: socket.socket, go: asyncio.Event) -> None:
        while piece := await self._loop.sock_recv(server, 64 << 10):
            if self.lose and b'"t":"ev"' in piece:
                piece = piece.replace(b'"t":"ev"', b'"t":"??"', 1)
                self.lose = False
            await self._loop.sock_sendall(client, piece)
        client.shutdown(socket.SHUT_WR)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that the test may kill; its log is checked."""
    server = Server(tmp_path / "data")
    yield server.start()
    server.close()


@pytest.fixture
def lossy(server: Server) -> Iterator[Lossy]:
    """A relay before the server."""
    lossy = Lossy(server.port)
    yield lossy
    lossy.close()


Subscribe = Callable[[str, int], Subscriber]


@pytest.fixture
def subscribe(tmp_path: Path) -> Iterator[Subscribe]:
    """Run the script of the page that is in a language, at a port."""
    made: list[Subscriber] = []

    def run(language: str, port: int) -> Subscriber:
        *_, text = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        assert "localhost:8888" in text
        path = tmp_path / f"subscriber.{language}"
        path.write_text(text.replace("localhost:8888", f"127.0.0.1:{port}"))
        command = {
            "python": (sys.executable,),
            "js": ("node", "--experimental-websocket", "--no-warnings"),
            "sh": ("sh",),
        }[language]
        need("curl" if language == "sh" else command[0])
        if language == "js" and subprocess.run([*command, "-e", ""], check=False).returncode != 0:
            missing("node 20")
        made.append(Subscriber(*command, str(path), cwd=tmp_path))
        return made[-1]

    yield run
    for subscriber in made:
        subscriber.close()


def count(server: Server, name: str, steps: int) -> str:
    """Start a count."""
    start = {"kind": "count", "name": name, "params": {"steps": steps, "delay_s": 0.01}}
    return str(server.post("/v1/jobs", start).json["id"])


def meet(server: Server, subscriber: Subscriber) -> None:
    """Return when the script follows what happens."""
    known = len(subscriber.said)

    def hears() -> bool:
        server.wait_for(count(server, "probe", 1), "succeeded")
        return len(subscriber.said) > known

    eventually(hears, "the script hears of a job", PATIENCE_S)


def check(server: Server, subscriber: Subscriber, job: str, name: str) -> None:
    """Check that the script has printed the job's history: all of it, in order, and once."""
    history = server.get(f"/v1/jobs/{job}/events").json["items"]
    assert subscriber.of(name) == [
        Transition(name, event["version"], event["to"]) for event in history
    ]


@pytest.mark.parametrize("language", ["python", "js", "sh"])
def test_nothing_is_missed_when_the_server_is_killed(
    server: Server, subscribe: Subscribe, language: str
) -> None:
    """The script prints each transition once, though the server is killed twice meanwhile."""
    subscriber = subscribe(language, server.port)
    meet(server, subscriber)
    job = count(server, "watched", 100_000)
    subscriber.until("watched", "running")
    server.kill()
    server.start()
    # Some of what follows comes while the script still waits before it tries again.
    server.wait_for(job, "running")
    server.post(f"/v1/jobs/{job}/pause")
    server.wait_for(job, "paused")
    subscriber.until("watched", "paused")
    server.kill()
    server.start()
    server.post(f"/v1/jobs/{job}/cancel")
    subscriber.until("watched", "cancelled")
    check(server, subscriber, job, "watched")


@pytest.mark.parametrize("language", ["python", "js"])
def test_a_lost_message_is_asked_for_again(
    server: Server, lossy: Lossy, subscribe: Subscribe, language: str
) -> None:
    """Behind a snapshot of several pages, the script notices that an event is missing."""
    for job in [count(server, f"old-{i}", 0) for i in range(120)]:
        server.wait_for(job, "succeeded", within_s=60)
    subscriber = subscribe(language, lossy.port)
    for i in range(120):
        subscriber.until(f"old-{i}", "succeeded")
        assert len(subscriber.of(f"old-{i}")) == 1
    meet(server, subscriber)
    lossy.lose = True
    job = count(server, "watched", 100_000)
    subscriber.until("watched", "running")
    assert not lossy.lose
    server.post(f"/v1/jobs/{job}/cancel")
    subscriber.until("watched", "cancelled")
    check(server, subscriber, job, "watched")


@pytest.mark.parametrize("language", ["python", "js", "sh"])
def test_another_log_is_followed_from_its_snapshot(
    server: Server, subscribe: Subscribe, language: str
) -> None:
    """When the log was made anew the script forgets its cursor and goes on."""
    subscriber = subscribe(language, server.port)
    meet(server, subscriber)
    server.kill()
    shutil.rmtree(server.folder)
    server.start()
    meet(server, subscriber)
    job = count(server, "watched", 1)
    subscriber.until("watched", "succeeded")
    check(server, subscriber, job, "watched")
