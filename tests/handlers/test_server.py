"""The program: its command line, one server a folder, stop and start again, adding files."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config import OPTIONS as SETTINGS
from tests.conftest import Serve
from tests.handlers.clients import UUID7, Caller, Raw
from tests.harness import ROOT, Server, Socket, eventually

# Counts to 200. In the middle it waits for a file; if it is deaf, without hearing of anything else.
GATED = """
import asyncio
from pathlib import Path
import msgspec

KIND, TITLE, PAUSE = "gated", "Counts, and waits in the middle", "at once"

class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    until: str
    deaf: bool = False

async def run(ctx, params):
    at = ctx.cursor or 0
    while at < 200:
        while at == 100 and not Path(params.until).exists():
            await (asyncio if params.deaf else ctx).sleep(0.01)
        at += 1
        await ctx.checkpoint(at, done=at, total=200)
    return {"counted": at}
"""


class Gated:
    """A server with a job that waits in its middle until it is let go on."""

    def __init__(self, serve: Serve, folder: Path, **params: Any) -> None:
        kind, self._until = folder / "gated.py", folder / "until"
        kind.write_text(GATED)
        # Long enough that nothing is logged of a deaf one, however late the test is.
        patience = ("--warn-s", "1m", "--grace-s", "1m")
        self.server = serve("--kinds", str(kind), *patience)
        start = {"kind": "gated", "params": {"until": str(self._until), **params}}
        self.id = str(self.server.post("/v1/jobs", start).json["id"])
        eventually(lambda: self.server.job(self.id)["progress"]["done"] == 100, "it waits")

    def go_on(self) -> None:
        """Let it count on."""
        self._until.touch()


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the program as a person does."""
    return subprocess.run(
        [sys.executable, str(ROOT / "server.py"), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if not k.startswith("SLUICE_")},
    )


def one_line(done: subprocess.CompletedProcess[str], status: int) -> str:
    """Check that the program ended with this status and one line, beside its log; the line."""
    assert done.returncode == status, done
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("sluice: ")
    return lines[0]


# The command line


def test_help_tells_every_option() -> None:
    """--help names each setting and ends with 0."""
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for option in SETTINGS.values():
        assert option.flag in done.stdout
    assert "add FILE" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "http"),
        ("--port", "65536"),
        ("--port",),
        ("--colour", "red"),
        ("--max-upload-bytes", "lots"),
        ("--durability", "sometimes"),
        ("--address", "example.org"),
        ("--warn-s", "60s", "--grace-s", "1s"),
        ("extra",),
        ("--config", "/nowhere.toml"),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """A setting that is wrong or unknown ends the program with 2 and one line."""
    one_line(run(*arguments, cwd=tmp_path), 2)
    assert list(tmp_path.iterdir()) == []


# The folder


def test_a_missing_folder_is_made(serve: Serve, tmp_path: Path) -> None:
    """The server makes its data folder, with the two folders for files in it."""
    assert list(tmp_path.iterdir()) == []
    server = serve()
    assert {path.name for path in server.folder.iterdir()} >= {"uploads", "tmp", "state.db"}


def _a_file(folder: Path) -> Path:
    folder.write_text("no folder")
    return folder


def _below_a_file(folder: Path) -> Path:
    folder.write_text("no folder")
    return folder / "data"


def _read_only(folder: Path) -> Path:
    return Path("/proc/sluice")  # read-only even for root


def _tmp_is_a_file(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tmp").write_text("no folder")
    return folder


def _no_database(folder: Path) -> Path:
    folder.mkdir()
    (folder / "state.db").write_bytes(b"this is no database" * 1000)
    return folder


@pytest.mark.parametrize("make", [_a_file, _below_a_file, _read_only, _tmp_is_a_file, _no_database])
def test_a_folder_that_can_not_be_used_is_one_line(tmp_path: Path, make: Any) -> None:
    """A data folder that can't be used ends the program with 1 and one line."""
    folder = make(tmp_path / "data")
    line = one_line(run("--port", "0", "--data", str(folder)), 1)
    assert "Something went wrong" not in line


def test_a_second_server_on_a_folder_is_refused(serve: Serve) -> None:
    """One folder belongs to one server; the second says by whom it is used."""
    server = serve()
    line = one_line(run("--port", "0", "--data", str(server.folder)), 1)
    assert f"in use by process {server.pid} at {server.url}/" in line
    assert server.get("/readyz").status == 200


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    """A port that another program uses ends the program with 1 and one line."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = one_line(run("--port", str(port), "--data", str(tmp_path / "data")), 1)
        assert str(port) in line


# Stop and start again


def channel(server: Server) -> Socket:
    """A channel, to see the beginning of a stop."""
    connection = server.socket("jobs.v1.json")
    connection.say(t="hello", ver=1)
    connection.until(lambda m: m["t"] == "welcome")
    return connection


def stopped(server: Server, status: int = 0) -> None:
    """Wait until the server, which was signalled, has ended with this status."""
    assert server.process is not None
    assert server.process.wait(20) == status
    server.kill()  # only takes note of it


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_in_good_order(serve: Serve, number: signal.Signals) -> None:
    """SIGTERM and Ctrl-C end the server with 0, in a moment if nothing runs."""
    server = serve()
    os.kill(server.pid, number)
    stopped(server)


def test_while_stopping_new_work_is_refused(serve: Serve, tmp_path: Path) -> None:
    """What would change something is a 503 with Retry-After; looking is still possible."""
    busy = Gated(serve, tmp_path, deaf=True)  # for so long it does not end
    server = busy.server
    watcher = channel(server)
    asked = [
        ("POST", "/a/process/", 503),
        ("GET", "/a/process/", 503),
        ("POST", "/upload?file_name=x&bytes_read=0", 503),
        ("GET", "/readyz", 503),
        ("GET", "/v1/jobs", 200),
        ("GET", "/healthz", 200),
    ]
    raws = [Raw(server) for _ in asked]
    for raw, (method, path, _) in zip(raws, asked, strict=True):
        raw.send(f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode())
    os.kill(server.pid, signal.SIGTERM)
    watcher.until(lambda m: m["t"] == "bye")
    for raw in raws:
        raw.send(b"Content-Length: 0\r\n\r\n")
    for raw, (_, _, status) in zip(raws, asked, strict=True):
        answer = raw.answer()
        assert answer.status == status
        if status == 503:
            assert answer.json["code"] == "stopping"
            assert int(answer.headers["Retry-After"]) >= 1
        raw.close()
    busy.go_on()
    watcher.close()
    stopped(server)


def test_a_process_goes_on_from_its_cursor(serve: Serve, tmp_path: Path) -> None:
    """A process that ran at a stop runs on after the next start, not from its beginning."""
    half = Gated(serve, tmp_path)
    server = half.server
    assert server.stop() == 0
    server.start()
    assert server.job(half.id)["progress"]["done"] == 100
    half.go_on()
    ended = server.wait_for(half.id, "succeeded")
    assert ended["result"]["data"] == {"counted": 200}
    events = server.get(f"/v1/jobs/{half.id}/events").json["items"]
    assert [event["cause"] for event in events] == [
        *("created", "claimed", "shutdown", "claimed", "done")
    ]


def test_a_paused_process_stays_paused(serve: Serve, tmp_path: Path) -> None:
    """A pause holds over a stop and a start, and is resumed from its cursor."""
    half = Gated(serve, tmp_path)
    server = half.server
    server.post(f"/{half.id}/process/pause/")
    server.wait_for(half.id, "paused")
    assert server.stop() == 0
    half.go_on()
    server.start()
    paused = server.job(half.id)
    assert (paused["state"], paused["progress"]["done"]) == ("paused", 100)
    server.post(f"/{half.id}/process/resume/")
    assert server.wait_for(half.id, "succeeded")["result"]["data"] == {"counted": 200}


@pytest.mark.parametrize("paused", [False, True])
def test_a_stop_ends_open_uploads_and_keeps_their_bytes(serve: Serve, paused: bool) -> None:
    """An open upload by blocks gets a 503, and goes on after the next start."""
    server = serve()
    caller = Caller(server, "c")
    with Raw(server) as raw:
        path = "/upload?file_name=x&bytes_read=0&file_size=1000000"
        raw.head("POST", path, Content_Length=1_000_000, X_Client_Id="c")
        raw.send(bytes(300_000))
        job = caller.job("upload")
        stored = f"/v1/jobs/{job['id']}"
        eventually(
            lambda: server.get(stored).json["transfer"]["stored_bytes"] == 300_000, "it is stored"
        )
        if paused:
            server.post(f"{stored}/pause")
            server.wait_for(job["id"], "paused")
        os.kill(server.pid, signal.SIGTERM)
        answer = raw.answer()
        assert (answer.status, answer.json["code"]) == (503, "stopping")
        assert answer.headers["Retry-After"]
    stopped(server)
    server.start()
    assert caller.get("/upload?file_name=x").json["bytes_read"] == 300_000
    if paused:
        assert server.job(job["id"])["state"] == "paused"
        server.post(f"{stored}/resume")
    done = caller.block("x", 300_000, bytes(700_000))
    assert done.json["is_complete"] is True


def test_a_stop_ends_forms_and_exports(serve: Serve) -> None:
    """What lives on its connection fails as interrupted; its bytes are gone after the start."""
    server = serve()
    caller = Caller(server, "c")
    data = bytes(16 << 20)
    assert caller.block("big", 0, data, "&is_complete=1").status == 200
    with Raw(server) as form, Raw(server, receive_bytes=64 << 10) as export:
        form.head(
            "POST",
            "/upload",
            Content_Length=1_000_000,
            Content_Type="multipart/form-data; boundary=b",
            X_Client_Id="c",
        )
        form.send(
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
            + bytes(100_000)
        )
        export.head("POST", "/export", Content_Length=19, X_Client_Id="c")
        export.send(b'{"filename": "big"}')
        eventually(lambda: len(server.jobs("?state=running")) == 2, "both run")
        jobs = [job["id"] for job in server.jobs("?state=running")]
        os.kill(server.pid, signal.SIGTERM)
        assert form.answer().status == 503
        assert len(export.rest()) < len(data)
    stopped(server)
    server.start()
    for job_id in jobs:
        job = server.job(job_id)
        assert (job["state"], job["error"]["code"]) == ("failed", "interrupted")
    assert caller.temporary() == set()


def test_a_second_signal_ends_at_once(serve: Serve, tmp_path: Path) -> None:
    """Who is in a hurry signals twice; the next start puts everything right."""
    busy = Gated(serve, tmp_path, deaf=True)
    server = busy.server
    watcher = channel(server)
    os.kill(server.pid, signal.SIGTERM)
    watcher.until(lambda m: m["t"] == "bye")
    os.kill(server.pid, signal.SIGINT)
    stopped(server, 1)
    watcher.close()
    busy.go_on()
    server.start()
    assert server.wait_for(busy.id, "succeeded")["result"]["data"] == {"counted": 200}


# Add


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Files of this machine."""
    found = [tmp_path / "a b&c.bin", tmp_path / "grüße.txt", tmp_path / "empty"]
    found[0].write_bytes(bytes(range(256)) * 10_000)
    found[1].write_text("grüße\n")
    found[2].write_bytes(b"")
    return found


@pytest.mark.parametrize("running", [False, True], ids=["stopped", "running"])
def test_files_of_this_machine_are_added(serve: Serve, files: list[Path], running: bool) -> None:
    """add publishes files by their names, with or without a running server."""
    server = serve()
    if not running:
        assert server.stop() == 0
    done = run("--data", str(server.folder), "add", *map(str, files))
    assert done.returncode == 0, done
    assert len(done.stdout.splitlines()) == 3
    if not running:
        server.start()
    caller = Caller(server, "c")
    for line, file in zip(done.stdout.splitlines(), files, strict=True):
        file_id = line.split()[0]
        assert UUID7.fullmatch(file_id) and file.name in line
        assert caller.content(file_id) == file.read_bytes()
        assert caller.versions(file.name)[0]["id"] == file_id
    again = run("--data", str(server.folder), "add", str(files[1]))
    assert again.returncode == 0
    assert [file["version"] for file in caller.versions(files[1].name)] == [2, 1]


@pytest.mark.parametrize("names", [[], ["nothing-here"], ["."]])
def test_what_can_not_be_added_is_one_line(tmp_path: Path, names: list[str]) -> None:
    """A file that is not there ends add with 1 and one line."""
    one_line(run("--data", str(tmp_path / "data"), "add", *names), 1)


def test_add_tells_why_the_server_refuses(serve: Serve, files: list[Path]) -> None:
    """What the running server refuses ends add with its reason."""
    server = serve("--max-upload-bytes", "1KiB")
    line = one_line(run("--data", str(server.folder), "add", str(files[0])), 1)
    assert "a b&c.bin" in line and "1,024" in line


def test_a_refusal_without_a_body_keeps_the_connection(site: Server) -> None:
    """What is refused before the verb, and has brought nothing, is an answer like any other."""
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=20)
    for _ in range(3):
        connection.request("GET", "/v1/jobs", headers={"Host": "foreign.example"})
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["code"]) == (403, "unknown-host")
        assert connection.sock is not None
        assert answer.headers.get("Connection", "") != "close"
    connection.close()
