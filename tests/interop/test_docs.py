"""The snippets of docs/tus.md do what the page says, with the clients that they name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from tests.conftest import Serve, need
from tests.harness import ROOT, Server

PAGE = (ROOT / "docs" / "tus.md").read_text()


@pytest.fixture
def server(serve: Serve) -> Server:
    """A server of the test's own."""
    return serve()


def snippets(language: str, server: Server) -> list[str]:
    """The blocks of a language, with the server's address."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert blocks
    return [re.sub(r"(localhost|127\.0\.0\.1):8888", f"127.0.0.1:{server.port}", b) for b in blocks]


def run(*command: str, cwd: Path) -> str:
    """Run a program; what it prints."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stored(server: Server, name: str) -> bytes:
    """The one file of that name."""
    (file,) = server.get(f"/v1/files?name={name}").json["items"]
    return server.get(f"/v1/files/{file['id']}/content").body


@pytest.fixture
def big(tmp_path: Path) -> bytes:
    """The big file of the snippets."""
    data = os.urandom(3_000_000)
    (tmp_path / "big.bin").write_bytes(data)
    return data


def test_by_hand(server: Server, tmp_path: Path) -> None:
    """The curl lines upload a file in two blocks and get it back."""
    need("curl")
    upload_id, shown = "", ""
    for line in snippets("sh", server)[0].splitlines():
        shown = run("sh", "-c", line.replace("{id}", upload_id), cwd=tmp_path)
        created = re.search(r"^Location: (\S+)", shown, re.MULTILINE)
        upload_id = created[1] if created else upload_id
    assert shown == "hello"
    assert stored(server, "a.txt") == b"hello"


def script(packages: Path, text: str) -> str:
    """A script where Node finds the packages."""
    path = packages / f"docs-{uuid4().hex}.mjs"
    path.write_text(text)
    return str(path)


def test_tus_js_client(server: Server, packages: Path, tmp_path: Path, big: bytes) -> None:
    """The snippet uploads the file and says where it is."""
    upload, _ = snippets("js", server)
    path = script(packages, upload)
    try:
        assert "stored: http" in run(need("node"), path, cwd=tmp_path)
    finally:
        os.unlink(path)
    assert stored(server, "big.bin") == big


def test_uppy_takes_the_options(server: Server, packages: Path, tmp_path: Path) -> None:
    """The snippet makes an Uppy that uploads to the endpoint."""
    _, uppy = snippets("js", server)
    path = script(packages, uppy + "console.log(uppy.getPlugin('Tus').opts.endpoint)\n")
    try:
        assert run(need("node"), path, cwd=tmp_path).strip() == f"{server.url}/tus/"
    finally:
        os.unlink(path)


def test_tuspy(server: Server, tmp_path: Path, big: bytes) -> None:
    """The snippet uploads the file and prints its address."""
    (snippet,) = snippets("python", server)
    printed = run(sys.executable, "-c", snippet, cwd=tmp_path)
    assert printed.startswith(f"{server.url}/tus/")
    assert stored(server, "big.bin") == big
