"""Programs that download: how they are called to resume, and what they have on the disk."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from tests.conftest import need

PATIENCE_S = 240

ARIA2 = ("aria2c", "-q", "-x8", "-s8", "--min-split-size=1M", "--file-allocation=none", "-o", "out")
RESUME = {
    "curl": ("curl", "-sSf", "-C", "-", "-o", "out"),
    "wget": ("wget", "-nv", "-c", "-O", "out"),
    "aria2c": (*ARIA2, "-c", "--auto-save-interval=1"),
}


class Clients:
    """Programs that download into a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self._running: subprocess.Popen[bytes] | None = None

    def start(self, *command: str) -> None:
        """Start a program; it knows no settings of whoever runs the tests."""
        need(command[0])
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "LC_ALL": "C.UTF-8"}
        self._running = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def end(self) -> int:
        """Wait for its end; the exit status."""
        assert self._running is not None
        self.said = self._running.communicate(timeout=PATIENCE_S)[0].decode()
        return self._running.returncode

    def run(self, *command: str) -> int:
        """Start a program and wait for its end; the exit status."""
        self.start(*command)
        return self.end()

    def kill(self) -> None:
        """kill -9, with what it has started."""
        if self._running is not None and self._running.poll() is None:
            os.killpg(self._running.pid, 9)
            self._running.communicate(timeout=PATIENCE_S)

    def saved(self) -> int:
        """Bytes of ``out`` from which a client can go on."""
        notes = self.folder / "out.aria2"
        if notes.exists():
            return aria2_saved(notes.read_bytes())
        return self.out.stat().st_size if self.out.exists() else 0

    def digest(self) -> str:
        """SHA-256 of ``out``."""
        with self.out.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def names(self) -> set[str]:
        """The files in the folder."""
        return {path.name for path in self.folder.iterdir()}


def aria2_saved(notes: bytes) -> int:
    """What aria2 has noted as stored (the layout is in its manual, "Control File Format")."""

    def number(at: int, n: int = 4) -> int:
        return int.from_bytes(notes[at : at + n], "big")

    def ones(at: int, n: int) -> int:
        return number(at, n).bit_count()

    try:
        at = 10 + number(6)  # version, extensions, an info hash for BitTorrent
        piece_bytes, total, bits = number(at), number(at + 4, 8), number(at + 20)
        saved = ones(at + 24, bits) * piece_bytes
        at += 24 + bits
        count, at = number(at), at + 4
        for _ in range(count):  # pieces that are under way, in blocks of 16 KiB
            bits = number(at + 8)
            saved += ones(at + 12, bits) * (16 << 10)
            at += 12 + bits
    except IndexError:
        return 0
    return min(saved, total)
