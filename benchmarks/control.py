"""How soon a command reaches an upload that runs at full speed.

Claims, with nothing else to do for the server: at most 100 ms from sending ``DELETE
/upload/terminate`` until the uploader's own curl has ended with its 409; at most 100 ms from the
answer to a pause until ``stored_bytes`` stands still. There is no peer that could do either; a
plain GET is measured beside them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import GIB, ROUNDS, Report, Sluice, at_most, main, place

_LONG = 8 * GIB  # a sparse file, and no upload comes to its end
_WATCH_S = 0.5


@contextmanager
def upload(ours: Sluice, source: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A curl in full flight, and its job."""
    url = f"{ours.url}/upload?file_name=long&file_size={_LONG}"
    told = ["-s", "-o", "/dev/null", "-w", "%{http_code}"]
    process = subprocess.Popen(
        ["curl", *told, "-H", "Expect:", "-T", str(source), "-X", "POST", url],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 10
        while not (running := _running(ours)) or stored(ours, running) < 64 << 20:
            if time.monotonic() > end:
                raise RuntimeError("the upload does not run")
            time.sleep(0.01)
        yield process, running
    finally:
        process.kill()
        process.communicate()


def _running(ours: Sluice) -> str:
    jobs: list[Any] = ours.call("GET", "/v1/jobs?state=running&kind=upload")[1]["items"]
    return str(jobs[0]["id"]) if jobs else ""


def stored(ours: Sluice, job: str) -> int:
    """Bytes that are stored of an upload."""
    return int(ours.call("GET", f"/v1/jobs/{job}")[1]["transfer"]["stored_bytes"])


def since(begin: float) -> float:
    """Milliseconds."""
    return (time.perf_counter() - begin) * 1e3


def plain(ours: Sluice) -> float:
    """A GET that does nothing."""
    begin = time.perf_counter()
    ours.call("GET", "/healthz")
    return since(begin)


def terminate(ours: Sluice, source: Path) -> float:
    """From sending DELETE until curl has ended."""
    with upload(ours, source) as (process, _):
        connection = ours.connection()
        connection.connect()
        begin = time.perf_counter()
        connection.request("DELETE", "/upload/terminate")
        process.wait()
        taken = since(begin)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        assert process.stdout is not None
        status = process.stdout.read()
        if (answer.status, status) != (200, "409"):
            raise RuntimeError(f"DELETE {answer.status}, upload {status}")
        return taken


def pause(ours: Sluice, source: Path) -> float:
    """From the answer to a pause until the last byte is stored."""
    with upload(ours, source) as (_, job):
        status, _ = ours.call("POST", f"/v1/jobs/{job}/pause")
        begin = time.perf_counter()
        if status not in (200, 202):
            raise RuntimeError(f"pause {status}")
        still_at, last = 0.0, -1
        while since(begin) < _WATCH_S * 1e3:
            asked = since(begin)
            now = stored(ours, job)
            if now != last and last >= 0:
                still_at = asked
            last = now
        ours.call("POST", f"/v1/jobs/{job}/cancel")
        return still_at


def measure() -> Report:
    """Each command in turn, on an upload of its own."""
    ways: dict[str, Callable[[Sluice, Path], float]] = {
        "GET /healthz answers": lambda ours, _: plain(ours),
        "terminate: curl has its 409": terminate,
        "pause: stored_bytes stands still": pause,
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with place() as folder, Sluice(folder) as ours:
        source = folder / "source"
        source.touch()
        with source.open("r+b") as file:
            file.truncate(_LONG)
        for turn in range(ROUNDS + 1):
            for name, way in ways.items():
                value = way(ours, source)
                if turn:
                    taken[name].append(value)
                time.sleep(0.3)
    found = {name: median(values) for name, values in taken.items()}
    return Report(
        "Control of a running upload",
        ("After", "median ms", "worst ms"),
        [[name, f"{median(values):.1f}", f"{max(values):.1f}"] for name, values in taken.items()],
        [
            at_most(name, value, 100.0, "ms")
            for name, value in found.items()
            if not name.startswith("GET")
        ],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
