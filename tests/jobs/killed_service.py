"""A service with children that hide: one plain, one in a session of its own, one without a mark."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from jobs.children import Children

SCRIPT = "setsid sleep 100 & echo $!; setsid env -i sleep 100 & echo $!; exec sleep 100"


async def main() -> None:
    """Start them, tell their numbers, and wait to be killed."""
    children = Children(Path(sys.argv[1]))
    await children.open()
    child = await children.start(["sh", "-c", SCRIPT], cwd=Path("/"), fds={1: 1})
    sys.stdout.write(f"{child.pid}\n")  # in one piece, also where Python does not buffer
    sys.stdout.flush()
    await child.exited


asyncio.run(main())
