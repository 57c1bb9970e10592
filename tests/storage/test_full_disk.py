"""A disk that is really full: what was acknowledged stays, the rest is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import storage

ROOT = Path(storage.__file__).parent.parent
MOUNT = 'mount -t tmpfs -o size=8m none "$0" && exec "$@"'


@pytest.mark.chaos
@pytest.mark.parametrize("what", ["blobs", "state", "tables"])
def test_a_full_disk(tmp_path: Path, what: str) -> None:
    """On a small disk, mounted for a child alone, each backend refuses, keeps, and goes on."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare(1) to mount a small disk with")
    mounted = [unshare, "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    mounted += ["sh", "-c", MOUNT, str(tmp_path)]
    probe = subprocess.run([*mounted, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"a small disk can't be mounted: {probe.stderr.strip()}")
    program = [sys.executable, "-B", "-m", "tests.storage.full_disk", what, str(tmp_path)]
    done = subprocess.run(
        [*mounted, *program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
