"""How much memory big transfers take.

Claim: after an upload (raw and as a form) and a download of 1 GiB (4 GiB with FULL=1) the server
has never held more than 80 MB, and has one thread. nginx does the same transfers beside it.
"""

from __future__ import annotations

import os
import sys

from benchmarks.common import (
    GIB,
    SIZE,
    Nginx,
    Report,
    Sluice,
    at_most,
    curl,
    main,
    place,
    source_file,
    status_of,
)

_BOUND_MB = 80.0


def peak_mb(pid: int) -> float:
    """The most that a process has held in memory."""
    return status_of(pid, "VmHWM") * 1024 / 1e6


def measure() -> Report:
    """Transfer, then read what the kernel has counted."""
    size = 4 * GIB if os.environ.get("FULL") == "1" else SIZE
    with place() as folder, Sluice(folder) as ours, Nginx(folder) as nginx:
        source = str(source_file(folder / "source", size))
        start_mb = {pid: peak_mb(pid) for pid in (ours.pid, nginx.pid)}
        uploads = [
            curl("-T", source, f"{ours.url}/upload?file_name=raw&file_size={size}", "-X", "POST")
        ]
        content = f"{ours.url}/v1/files/{ours.newest_file()}/content"
        downloads = [curl(content)]
        ours.remove_newest_file()
        uploads.append(curl("-F", f"file=@{source}", f"{ours.url}/upload"))
        ours.remove_newest_file()
        uploads.append(curl("-T", source, f"{nginx.url}/target"))
        downloads.append(curl(f"{nginx.url}/target"))
        moved = min([*(shot.sent for shot in uploads), *(shot.received for shot in downloads)])
        if moved < size:
            raise RuntimeError(f"only {moved:,} bytes were moved")
        threads = status_of(ours.pid, "Threads")
        rows = [
            [name, f"{start_mb[pid]:.0f}", f"{peak_mb(pid):.0f}", str(status_of(pid, "Threads"))]
            for name, pid in (("nginx", nginx.pid), ("Sluice", ours.pid))
        ]
        own, peer = peak_mb(ours.pid), peak_mb(nginx.pid)
    rows.append(["ratio", "", f"{own / peer:.1f} x", ""])
    return Report(
        f"Memory, transfers of {size / GIB:g} GiB",
        ("Server", "peak MB after the start", "peak MB at the end", "threads"),
        rows,
        [
            at_most("peak of Sluice", own, _BOUND_MB, "MB"),
            at_most("threads of Sluice", threads, 1, "thread"),
        ],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
