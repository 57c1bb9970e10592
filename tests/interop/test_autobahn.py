"""The Autobahn test suite for WebSocket, at full size only.

Its last release runs on Python 2.7 alone. Where there is none, or at the usual size, nothing is
defined here: tests/handlers/test_socket.py has the same cases. The suite is installed once, below
test-output/, as the npm packages are (packages.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import missing
from tests.harness import FULL, ROOT, Server

_FOLDER = ROOT / "test-output" / "autobahn"
_VIRTUALENV = "virtualenv==20.15.1"  # the last that makes environments for Python 2.7
_SUITE = "autobahntestsuite==0.8.2"
_PATIENCE_S = 600
_CASES = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*"]
_FINE = {"OK", "INFORMATIONAL"}


def _python27() -> str | None:
    """A Python 2.7 that really runs: what is on the path may be an empty shim."""
    found = shutil.which("python2.7")
    pyenv = sorted(Path.home().glob(".pyenv/versions/2.7*/bin/python2.7"))
    for program in [*([found] if found else []), *map(str, pyenv)]:
        asked = [program, "-c", "import sys; sys.exit(sys.version_info[:2] != (2, 7))"]
        if subprocess.run(asked, capture_output=True, check=False).returncode == 0:
            return program
    return None


def _installed(python27: str) -> Path:
    """Install the suite, unless it is there; its program."""
    stamp = _FOLDER / "installed"
    wanted = f"{python27} {_VIRTUALENV} {_SUITE}"
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with (_FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            _install(python27)
            stamp.write_text(wanted)
    return _FOLDER / "venv" / "bin" / "wstest"


def _install(python27: str) -> None:
    tools, venv = _FOLDER / "tools", _FOLDER / "venv"
    for folder in (tools, venv):
        shutil.rmtree(folder, ignore_errors=True)
    pip = ["-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "--no-input", "install"]
    for command in (
        [sys.executable, *pip, "--target", str(tools), _VIRTUALENV],
        [
            *(sys.executable, "-m", "virtualenv", "--app-data", str(_FOLDER / "app-data")),
            *("--python", python27, str(venv)),
        ],
        [str(venv / "bin" / "python"), *pip, _SUITE],
    ):
        try:
            done = subprocess.run(
                command,
                env=os.environ | {"PYTHONPATH": str(tools) if "virtualenv" in command else ""},
                capture_output=True,
                text=True,
                timeout=_PATIENCE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            missing(f"an answer of pip within {_PATIENCE_S} s")
            raise
        if done.returncode:
            missing(f"what pip was to install ({(done.stderr.strip() or 'no reason')[-200:]})")


def _run(server: Server, program: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Let the suite loose on the echo; what it says of each case."""
    spec = {
        "outdir": str(folder / "reports"),
        "servers": [{"agent": "sluice", "url": f"ws://127.0.0.1:{server.port}/echo"}],
        "cases": _CASES,
        "exclude-cases": [],
        "exclude-agent-cases": {},
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    done = subprocess.run(
        [str(program), "-m", "fuzzingclient", "-s", str(folder / "spec.json")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    index: dict[str, dict[str, dict[str, str]]]
    index = json.loads((folder / "reports" / "index.json").read_text())
    return index["sluice"]


if FULL and (_PYTHON27 := _python27()):

    @pytest.mark.slow
    def test_autobahn(tmp_path: Path) -> None:
        """The suite finds nothing to object to, not even that a case is met less than strictly."""
        assert _PYTHON27 is not None
        program = _installed(_PYTHON27)
        server = Server(tmp_path / "data")
        server.env = {"ECHO": "1"}
        results = _run(server.start(), program, tmp_path)
        server.close()
        assert len(results) >= 240
        objections = {
            name: (result["behavior"], result["behaviorClose"])
            for name, result in results.items()
            if not {result["behavior"], result["behaviorClose"]} <= _FINE
        }
        assert objections == {}
