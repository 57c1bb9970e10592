"""The server as tests start it: the real one, under an audit hook that allows no thread."""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _no_threads(event: str, args: tuple[Any, ...]) -> None:
    if event in ("_thread.start_new_thread", "_thread.start_joinable_thread"):
        os.write(2, b"a thread was started\n")
        os.abort()


sys.addaudithook(_no_threads)

import server  # noqa: E402 - the hook comes first

sys.exit(server.main(sys.argv[1:]))
