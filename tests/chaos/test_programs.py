"""A real program on a big file, on a real service that is paused, killed and stopped under it."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from jobs.warden import processes
from tests.conftest import Serve, need
from tests.harness import FULL, Server, eventually

pytestmark = pytest.mark.chaos

SIZE_BYTES = (256 << 20) if FULL else (24 << 20)
# It does not end before it may: some machines are done with the file before they are interrupted.
PROGRAMS = """
[gzip]
argv = ["sh", "-c", "gzip -6 -c; until [ -e GO ]; do sleep 0.05; done"]
stdin = "file"
stdout = "out.gz"
progress = "read"
params.file = {type = "file"}
"""


def a_server(serve: Serve, folder: Path) -> tuple[Server, bytes]:
    """A service that may run gzip, with a big file stored."""
    need("gzip")
    path = folder / "programs.toml"
    path.write_text(PROGRAMS.replace("GO", str(folder / "go")))
    server = serve("--programs", str(path))
    half = random.Random(1).randbytes(64 << 10)
    data = (half + half.hex().encode())[: 128 << 10] * (SIZE_BYTES >> 17)
    answer = server.post(f"/upload?file_name=big&file_size={len(data)}", data)
    assert answer.status == 200, answer
    return server, data


def start(server: Server) -> str:
    """Start gzip; it has read something, and has not ended, when this returns."""
    answer = server.post("/v1/jobs", {"kind": "exec.gzip", "params": {"file": "big"}})
    assert answer.status == 201, answer
    job_id = str(answer.json["id"])
    eventually(lambda: server.job(job_id)["progress"]["done"] > 0, "progress")
    return job_id


def states(server: Server) -> list[str]:
    """The states of the processes whose standard input is a file that this server has stored."""
    found = []
    for pid, process in processes().items():
        try:
            source = Path(f"/proc/{pid}/fd/0").readlink()
        except OSError:
            continue
        if source.is_relative_to(server.folder) and process.state != "Z":
            found.append(process.state)
    return found


def check(server: Server, job_id: str, data: bytes, attempt: int) -> None:
    """The job ends well when it may, and its file is whole."""
    (server.folder.parent / "go").touch()
    job = server.wait_for(job_id, "succeeded", "failed", "cancelled", within_s=120)
    assert job["state"] == "succeeded", job["error"]
    assert job["attempt"] == attempt
    made = server.get(f"/v1/files/{job['result']['file']}/content").body
    assert gzip.decompress(made) == data
    eventually(lambda: not states(server), "no process")


def test_killed_under_a_program(serve: Serve, tmp_path: Path) -> None:
    """kill -9 of the service ends the program, running or paused; it starts anew, once."""
    server, data = a_server(serve, tmp_path)
    job_id = start(server)
    server.kill()
    eventually(lambda: not states(server), "the end of the program")
    server.start()
    eventually(lambda: states(server), "the program")
    server.post(f"/v1/jobs/{job_id}/pause")
    server.wait_for(job_id, "paused")
    assert set(states(server)) == {"T"}
    server.kill()
    eventually(lambda: not states(server), "the end of the program")
    server.start()
    assert server.job(job_id)["state"] == "paused"
    server.post(f"/v1/jobs/{job_id}/resume")
    check(server, job_id, data, attempt=2)


def test_stopped_under_a_program(serve: Serve, tmp_path: Path) -> None:
    """A stop of the service ends the program with grace; it starts anew with the service."""
    server, data = a_server(serve, tmp_path)
    job_id = start(server)
    server.stop()
    assert not states(server)
    server.start()
    check(server, job_id, data, attempt=1)


def test_cancelled_while_paused(serve: Serve, tmp_path: Path) -> None:
    """A cancel of a paused program leaves no process and no file."""
    server, _ = a_server(serve, tmp_path)
    job_id = start(server)
    server.post(f"/v1/jobs/{job_id}/pause")
    server.wait_for(job_id, "paused")
    server.post(f"/v1/jobs/{job_id}/cancel")
    server.wait_for(job_id, "cancelled")
    assert not states(server)
    assert [file["name"] for file in server.get("/v1/files").json["items"]] == ["big"]
    assert not list((server.folder / "tmp").iterdir())
