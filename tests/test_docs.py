"""What the documentation says is true: its commands run, its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Serve, need
from tests.harness import ROOT, Server, eventually

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: str) -> list[str]:
    """The curl lines of a page."""
    need("curl")
    return [
        line.split("   #")[0].strip()
        for line in (ROOT / page).read_text().splitlines()
        if line.startswith("curl ")
    ]


def run(command: str, server: Server, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of the documentation against the server."""
    return subprocess.run(
        command.replace("localhost:8888", f"127.0.0.1:{server.port}"),
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_the_five_lines_of_the_readme_work(server: Server, tmp_path: Path) -> None:
    """Each curl line of the README does what its comment says."""
    data = os.urandom(3_000_000)
    (tmp_path / "big.bin").write_bytes(data)
    upload, terminate, export, start, pause = commands("README.md")
    slow = subprocess.Popen(
        upload.replace("curl", "curl -s --limit-rate 200k").replace(
            "localhost:8888", f"127.0.0.1:{server.port}"
        ),
        shell=True,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )
    eventually(lambda: server.jobs("?state=running"), "the upload runs")
    assert "terminated" in run(terminate, server, tmp_path).stdout
    assert b"aborted" in slow.communicate(timeout=30)[0]
    assert json.loads(run(upload, server, tmp_path).stdout)["bytes"] == len(data)
    (tmp_path / "big.bin").unlink()
    run(export, server, tmp_path)
    assert (tmp_path / "big.bin").read_bytes() == data
    job = json.loads(run(start, server, tmp_path).stdout)
    server.wait_for(job["id"], "running")
    run(pause, server, tmp_path)
    server.wait_for(job["id"], "paused")
    server.post("/demo/process/cancel/")
    server.wait_for(job["id"], "cancelled")


def test_the_lines_of_the_simple_api_page_work(server: Server, tmp_path: Path) -> None:
    """The curl lines of docs/simple-api.md work in the order in which they stand."""
    data = os.urandom(2 << 20)
    (tmp_path / "big.bin").write_bytes(data)
    (tmp_path / "part1").write_bytes(data[: 1 << 20])
    (tmp_path / "part2").write_bytes(data[1 << 20 :])
    answers = [json.loads(run(c, server, tmp_path).stdout) for c in commands("docs/simple-api.md")]
    form, first, where, last, whole = answers
    assert form["bytes"] == len(data)
    assert first["bytes_read"] == where["bytes_read"] == 1 << 20
    assert last["is_complete"] is whole["is_complete"] is True
    assert server.get(f"/v1/files/{last['id']}/content").body == data


def test_the_lines_of_the_rest_page_work(server: Server, tmp_path: Path) -> None:
    """Each curl line of docs/rest.md is obeyed, given a job of the sort that it is about."""
    server.post("/upload?file_name=a.iso&is_complete=true", b"bytes")
    server.post("/upload?file_name=half.iso&bytes_read=0", b"bytes")
    endless = {"kind": "count", "params": {"steps": 10**6, "delay_s": 0.01}}

    def unfinished() -> str:
        return str(server.jobs("?kind=upload&state=running")[0]["id"])

    def running() -> str:
        return str(server.wait_for(server.post("/v1/jobs", endless).json["id"], "running")["id"])

    def at_version_4() -> str:
        job = running()
        for name in ("a", "b"):
            server.request("PATCH", f"/v1/jobs/{job}", {"name": name})
        return job

    def ended() -> str:
        body = {"kind": "count", "params": {"steps": 0}}
        return str(server.post("/v1/jobs", body, Prefer="wait=30").json["id"])

    sorts = {
        "limit_bytes_per_s": unfinished,
        'If-Match: "4"': at_version_4,
        "/pause": running,
        "/delete": ended,
        "/log": ended,
    }
    lines = commands("docs/rest.md")
    assert len(lines) >= 10
    for line in lines:
        job = next((make() for part, make in sorts.items() if part in line), "")
        assert job or "$JOB" not in line, line
        answer = run(f"JOB={job}; {line.replace('curl', 'curl -fsS', 1)}", server, tmp_path)
        if "/log" not in line:
            json.loads(answer.stdout)
    server.post("/v1/jobs/cancel", {"filter": {}})
    eventually(lambda: server.jobs("?state=running&state=cancelling") == [], "all have ended")


def test_the_example_kind_counts_lines_and_can_be_paused(tmp_path: Path) -> None:
    """The process of docs/kinds.md is a kind; paused until it is cold, it still counts right."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "kinds.md").read_text(), re.S)
    assert code is not None
    (tmp_path / "lines_kind.py").write_text(code[1])
    server = Server(tmp_path / "data", "--warm-s", "0.1")
    server.env = {"SLUICE_KINDS": str(tmp_path / "lines_kind.py")}
    server.start()
    try:
        data = b"a line\n" * 3_000_000
        server.post("/upload?file_name=lines.txt&is_complete=true", data)
        start = {"kind": "lines", "params": {"file": "lines.txt"}}
        job = server.post("/v1/jobs", start).json
        server.post(f"/v1/jobs/{job['id']}/pause")
        if server.wait_for(job["id"], "paused", "succeeded")["state"] == "paused":
            server.post(f"/v1/jobs/{job['id']}/resume")
        done = server.wait_for(job["id"], "succeeded", "failed")
        assert done["result"]["data"] == {"lines": 3_000_000}
    finally:
        server.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_pages_that_exist(page: Path) -> None:
    """A relative link of the documentation names a file of this checkout."""
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_routes_that_the_docs_name_exist(serve: Serve) -> None:
    """Every /v1 address in docs/rest.md is answered by the service."""
    server = serve()
    text = (ROOT / "docs" / "rest.md").read_text()
    for path in sorted(set(re.findall(r"`(?:GET )(/[a-z0-9/]+)`", text))):
        if path != "/v1/ws":
            assert server.get(path).status == 200, path
