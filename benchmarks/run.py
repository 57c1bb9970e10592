"""Run the benchmarks and write docs/benchmarks.md.

make bench                          # all
make bench ARGS="upload download"   # these; the page is left as it is
"""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import tornado

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import FOLDER, GIB, ROOT, ROUNDS, SIZE, Report

NAMES = (
    *("upload", "tus", "many", "stalled", "download", "readers"),
    *(
        "latency",
        "control",
        "running",
        "memory",
        "csv_import",
        "jobs",
        "queues",
        "checkpoint",
        "channel",
        "connections",
        "dashboard",
    ),
)
_PAGE = ROOT / "docs" / "benchmarks.md"


def machine() -> list[str]:
    """What the figures depend on; names neither the machine nor a path."""
    nginx = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True).stderr
    curl = subprocess.run(["curl", "-V"], capture_output=True, text=True, check=True).stdout
    return [
        f"{datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, shared by server, peer and client",
        f"{platform.system()} {platform.release()}, {_file_system()}, loopback",
        f"Python {platform.python_version()}, Tornado {tornado.version}, "
        f"nginx {nginx.rpartition('/')[2].split()[0]}, curl {curl.split()[1]}",
        f"transfers of {SIZE / GIB:g} GiB, {ROUNDS} rounds",
    ]


def _file_system() -> str:
    done = subprocess.run(
        ["stat", "-f", "-c", "%T", FOLDER], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def page(found: Sequence[tuple[str, Report]]) -> str:
    """The whole page."""
    parts = [
        "<!-- Made by `make bench`; do not edit. -->",
        "# Benchmarks",
        "Each figure is the median of rounds in which we and the peer take turns; only ratios\n"
        "within one table mean something, because the machine's own speed changes. How each one\n"
        "is measured stands below its title and in `benchmarks/`.",
        "\n".join(f"- {fact}" for fact in machine()),
    ]
    for about, report in found:
        parts += [f"## {report.title}", about.strip(), report.text()]
    return "\n\n".join(parts) + "\n"


def main(names: Sequence[str]) -> int:
    """Run the benchmarks that are named, or all; the exit status."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(NAMES)}")
        return 2
    found = []
    for name in names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        report: Report = module.measure()
        found.append((module.__doc__ or "", report))
        print(f"{report.title}\n\n{report.text()}\n", flush=True)
    if not names:
        _PAGE.write_text(page(found), encoding="utf-8")
        print("written: docs/benchmarks.md")
    return 0 if all(report.passed for _, report in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
