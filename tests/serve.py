"""The server as tests start it: the real one, under an audit hook that allows no thread.

``CRASH_AT=published:2`` lets it die by SIGKILL right after the second publishing;
the points at which it can die are below. ``KIND_FILE=x.py`` adds the kind in that file.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _no_threads(event: str, args: tuple[Any, ...]) -> None:
    if event in ("_thread.start_new_thread", "_thread.start_joinable_thread"):
        os.write(2, b"a thread was started\n")
        os.abort()


sys.addaudithook(_no_threads)

import server  # noqa: E402 - the hook comes first
from jobs import runners  # noqa: E402
from jobs.kinds import Registry, kind_of  # noqa: E402
from storage.blobs_local import LocalBlobs, LocalWriter  # noqa: E402
from storage.state_sqlite import SqliteState  # noqa: E402


def _succeeds(state: Any, job: Any, *args: Any) -> bool:
    return bool(job.state == "succeeded")


def _always(*args: Any) -> bool:
    return True


Point = tuple[Any, str, str, Callable[..., bool]]
POINTS: dict[str, Point] = {
    "created": (SqliteState, "create", "after", _always),  # not a byte was written
    "write": (LocalWriter, "write", "before", _always),
    "written": (LocalWriter, "write", "after", _always),
    "synced": (LocalWriter, "sync", "after", _always),  # between fdatasync and commit
    "saved": (SqliteState, "save", "after", _always),  # committed, not acknowledged
    "linked": (LocalBlobs, "link", "after", _always),  # a member that no cursor knows
    "published": (LocalBlobs, "publish", "after", _always),  # renamed, not committed
    "ending": (SqliteState, "commit", "before", _succeeds),
    "ended": (SqliteState, "commit", "after", _succeeds),  # committed, not answered
    "flush": (SqliteState, "_flush", "before", _always),
    "checkpoint": (runners.Process, "checkpoint", "before", _always),
    "undo": (runners, "_undo", "after", _always),
    "sendfile": (os, "sendfile", "after", _always),
}


def _crash_at(name: str, n: int) -> None:
    """Die at the n-th call."""
    owner, attribute, when, applies = POINTS[name]
    original = getattr(owner, attribute)
    calls = 0

    def pass_by(at: str, args: tuple[Any, ...]) -> None:
        nonlocal calls
        if at != when or not applies(*args):
            return
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)

    async def asynchronous(*args: Any, **more: Any) -> Any:
        pass_by("before", args)
        result = await original(*args, **more)
        pass_by("after", args)
        return result

    def synchronous(*args: Any, **more: Any) -> Any:
        pass_by("before", args)
        result = original(*args, **more)
        pass_by("after", args)
        return result

    wrapper = asynchronous if inspect.iscoroutinefunction(original) else synchronous
    setattr(owner, attribute, wrapper)


if point := os.environ.get("CRASH_AT"):
    name, _, n = point.partition(":")
    _crash_at(name, int(n or 1))

if kind_file := os.environ.get("KIND_FILE"):
    module = types.ModuleType("kind_file")
    exec(compile(Path(kind_file).read_text(), kind_file, "exec"), module.__dict__)
    known = Registry.load()
    both = Registry(
        [*(kinds for name in known.names() if (kinds := known.get(name))), kind_of(module)]
    )
    Registry.load = classmethod(lambda cls: both)  # type: ignore[method-assign,assignment]

sys.exit(server.main(sys.argv[1:]))
