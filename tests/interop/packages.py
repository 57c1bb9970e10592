"""npm packages of tests and benchmarks, installed once into test-output/.

A package.json with exact versions is all of npm that is kept in the checkout. A copy of it beside
the installed packages is the stamp: while both are equal, nothing is to be done. A lock lets runs
that start together share one install. Scripts that packages bring along are not run. Our own are
copied there, because Node looks for packages from where a script lies.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

_OUTPUT = Path(__file__).parent.parent.parent / "test-output"
_PATIENCE_S = 180


class Unavailable(Exception):
    """The packages cannot be had here; the message says why."""


def installed(manifest: Path, name: str) -> Path:
    """Install what a package.json names, unless it is there; the folder with it.

    The folder also has the scripts (``*.mjs``) that lie beside the package.json. Raises Unavailable
    without npm, and where npm cannot get the packages.
    """
    folder = _OUTPUT / name
    stamp = folder / "installed.json"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = manifest.read_bytes()
        if not stamp.exists() or stamp.read_bytes() != wanted:
            (folder / "package.json").write_bytes(wanted)
            _install(folder)
            stamp.write_bytes(wanted)
        for script in manifest.parent.glob("*.mjs"):
            copy = folder / script.name
            if not copy.exists() or copy.read_bytes() != script.read_bytes():
                copy.write_bytes(script.read_bytes())
    return folder


def _install(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm")
    shutil.rmtree(folder / "node_modules", ignore_errors=True)
    cache = folder / "cache"  # nothing is written outside of the checkout
    try:
        done = subprocess.run(
            [
                *(npm, "install", "--prefix", str(folder), "--cache", str(cache)),
                *("--no-package-lock", "--no-audit", "--no-fund", "--no-update-notifier"),
                *("--ignore-scripts", "--loglevel=error"),
                *("--fetch-retries=2", "--fetch-retry-mintimeout=500", "--fetch-retry-factor=2"),
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"an answer of npm within {_PATIENCE_S} s") from None
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if line.strip()), "no reason")
        raise Unavailable(f"what npm was to install ({first})")
