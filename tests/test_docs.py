"""What the documentation says is true: its commands run, its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import kinds
from jobs.harness import check
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


KINDS_PAGE = (ROOT / "docs" / "kinds.md").read_text()


@pytest.fixture
def author(tmp_path: Path) -> Path:
    """A folder with the Python files of docs/kinds.md."""
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", KINDS_PAGE, re.DOTALL)
    assert len(blocks) == KINDS_PAGE.count("```python")
    for name, code in blocks:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    return tmp_path


def lines_of(language: str, start: str) -> list[str]:
    """The lines of docs/kinds.md, in blocks of a language, that begin so."""
    blocks = re.findall(rf"```{language}\n(.*?)```", KINDS_PAGE, re.DOTALL)
    found = [line for block in blocks for line in block.splitlines() if line.startswith(start)]
    assert found
    return found


def test_the_ten_minutes_of_an_author(author: Path) -> None:
    """The kinds of docs/kinds.md are loaded, and the curl lines start one; it counts right."""
    (make,) = lines_of("sh", "make run")
    server = Server(author / "data", *re.findall(r'ARGS="(--kinds) (\S+)"', make)[0])
    here = os.getcwd()
    os.chdir(author)  # the option is relative to the folder of who starts the service
    try:
        server.start()
    finally:
        os.chdir(here)
    try:
        page = server.get("/v1/kinds").json
        assert page["problems"] == []
        assert {"lines", "copy-out", "primes"} <= {kind["kind"] for kind in page["items"]}
        lines = [*lines_of("sh", "seq"), *lines_of("sh", "curl")]
        job = json.loads([run(line, server, author).stdout for line in lines][-1])
        assert job["state"] == "succeeded"
        assert job["result"]["data"] == {"lines": 1_000_000}
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_the_checks_of_an_author(author: Path, number: int) -> None:
    """Each ``check`` of docs/kinds.md finds nothing wrong (here at two points)."""
    checks = lines_of("sh", "python server.py check")
    assert len(checks) == 3
    (author / "numbers.txt").write_text("".join(f"{n}\n" for n in range(200_000)))
    words = shlex.split(checks[number])[3:]
    done = subprocess.run(
        [sys.executable, str(ROOT / "server.py"), "check", *words, "--sample", "2"],
        cwd=author,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as undisturbed" in done.stdout


def test_the_mistake_of_an_author_is_found(author: Path) -> None:
    """What docs/kinds.md replaces in its first kind is found out, in the words that it shows."""
    path = author / "mykinds" / "lines.py"
    right, wrong = "ctx.cursor or (0, 0)  #", "(ctx.cursor or (0, 0))[0], 0  #"
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong))
    text = "".join(f"{n}\n" for n in range(200_000)).encode()
    with pytest.raises(AssertionError, match=r"cold, checkpoint \d+: result.data is {\"lines\": "):
        check(path, {"file": "a"}, {"a": text}, modes=["cold"], sample=1)


@pytest.mark.slow
def test_the_test_of_an_author_passes(author: Path) -> None:
    """The three lines of docs/kinds.md are a test, and it passes."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "mykinds"],
        cwd=author,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_reference_of_kinds_is_complete() -> None:
    """docs/kinds.md names each constant that a kind may declare, and each part of its context."""
    declared = set(re.findall(r"^    ([A-Z_]+) = ", kinds.__doc__ or "", re.MULTILINE))
    assert len(declared) > 10
    parts = {name for name in vars(kinds.Context) if not name.startswith("_")}
    parts |= set(kinds.Context.__annotations__)
    for name in declared:
        assert f"| `{name}` |" in KINDS_PAGE, name
    for name in parts:
        assert f"ctx.{name}" in KINDS_PAGE, name


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
