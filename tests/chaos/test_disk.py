"""A disk that is full, and one that is not there: clear answers, nothing lost, and it goes on."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Serve, missing
from tests.harness import Answer, eventually, form

pytestmark = pytest.mark.chaos

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        missing("the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def is_problem(answer: Answer, status: int, code: str, *secrets: Path) -> None:
    """An answer is that problem, for people and programs, and names no path."""
    assert answer.status == status, answer
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json["code"] == code
    assert answer.json["message"]
    for secret in secrets:
        assert str(secret) not in answer.body.decode()
    assert "Traceback" not in answer.body.decode()


def fill(folder: Path, leave: int) -> Path:
    """Take all room of the disk but so much."""
    ballast = folder / "ballast"
    room = os.statvfs(folder)
    ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - leave))
    return ballast


def test_upload_by_blocks_goes_on_after_a_full_disk(serve: Serve, small_disk: Path) -> None:
    """507, the stored bytes stay valid, and with room again the upload is completed."""
    server = serve("--data", str(small_disk / "data"))
    server.expected = ("disk-full",)
    data = os.urandom(32 * MIB)
    first = server.request("POST", "/upload?file_name=a&bytes_read=0", data[: 4 * MIB])
    assert first.json == {"bytes_read": 4 * MIB}
    ballast = fill(small_disk, 22 * MIB)  # 16 are left for the state

    announced = server.request("POST", f"/upload?file_name=a&bytes_read={4 * MIB}", data[4 * MIB :])
    is_problem(announced, 507, "disk-full", small_disk)
    at = server.get("/upload?file_name=a").json["bytes_read"]
    assert at == 4 * MIB

    def pieces() -> Iterator[bytes]:  # chunked: nobody knows how long it is
        for start in range(4 * MIB, len(data), MIB):
            yield data[start : start + MIB]

    cut = server.request("POST", f"/upload?file_name=a&bytes_read={at}", pieces())
    is_problem(cut, 507, "disk-full", small_disk)
    at = server.get("/upload?file_name=a").json["bytes_read"]
    assert 4 * MIB < at < 11 * MIB
    (job,) = server.jobs()
    assert (job["state"], job["transfer"]["stored_bytes"]) == ("running", at)
    (path,) = (small_disk / "data" / "tmp").iterdir()
    assert path.read_bytes() == data[:at]

    assert server.get("/healthz").status == 200
    ballast.unlink()
    path_and_query = f"/upload?file_name=a&bytes_read={at}&is_complete=true"
    done = server.request("POST", path_and_query, data[at:])
    assert done.status == 200, done
    content = server.get(f"/v1/files/{done.json['id']}/content").body
    assert hashlib.sha256(content).digest() == hashlib.sha256(data).digest()
    server.stop()


def test_form_upload_to_a_full_disk_leaves_nothing(serve: Serve, small_disk: Path) -> None:
    """507 before or in the middle of the body; the job has failed, its bytes are free again."""
    server = serve("--data", str(small_disk / "data"))
    server.expected = ("disk-full",)
    ballast = fill(small_disk, 19 * MIB)
    body, content_type = form(("file", "big.bin", os.urandom(20 * MIB)))
    whole = server.request("POST", "/upload", body, {"Content-Type": content_type})
    is_problem(whole, 507, "disk-full", small_disk)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), MIB):
            yield body[start : start + MIB]

    cut = server.request("POST", "/upload", pieces(), {"Content-Type": content_type})
    is_problem(cut, 507, "disk-full", small_disk)
    (job,) = [job for job in server.jobs() if job["name"] == "big.bin"]
    assert (job["state"], job["error"]["code"]) == ("failed", "disk-full")
    data = small_disk / "data"
    left = [*(data / "tmp").iterdir(), *(data / "uploads").iterdir()]
    assert left == []
    ballast.unlink()
    again = server.request("POST", "/upload", body, {"Content-Type": content_type})
    assert again.status == 200, again
    server.stop()


def test_full_to_the_last_byte_the_state_is_refused_too(serve: Serve, small_disk: Path) -> None:
    """No room for a row: commands say 507, a running process survives, and all goes on later."""
    server = serve("--data", str(small_disk / "data"))
    server.expected = ("disk-full", "disk of the state")
    params = {"steps": 10**6, "delay_s": 0.005}
    job_id = server.post("/v1/jobs", {"kind": "count", "params": params}).json["id"]
    server.wait_for(job_id, "running")
    ballast = fill(small_disk, 0)
    answers: list[Answer] = []

    def refused() -> bool:
        answers.append(server.post("/v1/jobs", {"kind": "count", "params": {"steps": 1}}))
        return answers[-1].status == 507

    eventually(refused, "there is no room for a row")
    is_problem(answers[-1], 507, "disk-full", small_disk)
    assert server.job(job_id)["state"] == "running"
    ballast.unlink()
    assert server.post(f"/v1/jobs/{job_id}/pause").status == 202
    server.wait_for(job_id, "paused")
    assert server.post(f"/v1/jobs/{job_id}/resume").status == 202
    before = server.wait_for(job_id, "running")["progress"]["done"]
    eventually(lambda: server.job(job_id)["progress"]["done"] > before, "it goes on")
    assert server.post(f"/v1/jobs/{job_id}/cancel").status == 202
    server.wait_for(job_id, "cancelled")
    server.stop()


def test_data_folder_that_is_gone_is_said_so(serve: Serve, tmp_path: Path) -> None:
    """Renamed away under the server: 503 without a path; back again, everything works."""
    server = serve()
    server.expected = ("storage-missing",)
    body, content_type = form(("file", "kept.txt", b"kept"))
    headers = {"Content-Type": content_type}
    kept = server.request("POST", "/upload", body, headers).json["id"]
    first = server.request("POST", "/upload?file_name=part&bytes_read=0", b"x" * 1000)
    assert first.json == {"bytes_read": 1000}
    away = tmp_path / "elsewhere"
    server.folder.rename(away)
    for answer in (
        server.request("POST", "/upload", body, headers),
        server.request("POST", "/upload?file_name=part&bytes_read=1000", b"y" * 1000),
        server.request("POST", "/upload?file_name=new&bytes_read=0", b"z"),
        server.get(f"/v1/files/{kept}/content"),
        server.post("/export", {"filename": "kept.txt"}),
    ):
        is_problem(answer, 503, "storage-missing", tmp_path)
    assert server.get("/healthz").status == 200
    away.rename(server.folder)
    assert server.get(f"/v1/files/{kept}/content").body == b"kept"
    done = server.request(
        "POST", "/upload?file_name=part&bytes_read=1000&is_complete=true", b"y" * 1000
    )
    assert done.status == 200, done
    content = server.get(f"/v1/files/{done.json['id']}/content").body
    assert content == b"x" * 1000 + b"y" * 1000
    assert [j for j in server.jobs() if j["kind"] == "download" and j["state"] == "running"] == []
