"""The server as tests start it: the real one, under an audit hook that allows no thread.

``CRASH_AT=published:2`` lets it die by SIGKILL right after the second publishing; the points at
which it can die are below. ``TLS=x.pem`` serves over TLS. With ``ECHO=1`` there is a WebSocket at
``/echo`` that sends back what it gets.
``MUTANT=epoch`` takes a rule of the channel away (see ``MUTANTS``), so that a test can show that
it would notice.
"""

from __future__ import annotations

import inspect
import os
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _no_threads(event: str, args: tuple[Any, ...]) -> None:
    if event in ("_thread.start_new_thread", "_thread.start_joinable_thread"):
        os.write(2, b"a thread was started\n")
        os.abort()


sys.addaudithook(_no_threads)

import handlers  # noqa: E402 - the hook comes first
import jobs.events  # noqa: E402
import server  # noqa: E402
from handlers.socket import StrictWebSocketHandler  # noqa: E402
from jobs import process, runners  # noqa: E402
from jobs.channel import Cursor, Select, Why, why_reset  # noqa: E402
from storage import Event  # noqa: E402
from storage.blobs_local import LocalBlobs, LocalWriter  # noqa: E402
from storage.state_sqlite import SqliteState  # noqa: E402


def _succeeds(state: Any, job: Any, *args: Any) -> bool:
    return bool(job.state == "succeeded")


def _succeeding(state: Any, commits: Any) -> int:
    return sum(commit.job.state == "succeeded" for commit in commits)


def _pauses(state: Any, job: Any, *args: Any) -> bool:
    return bool(job.state == "pausing")


def _always(*args: Any) -> bool:
    return True


Point = tuple[Any, str, str, Callable[..., int]]  # how often a call counts
POINTS: dict[str, Point] = {
    "created": (SqliteState, "create", "after", _always),  # not a byte was written
    "started": (SqliteState, "create_all", "after", _always),  # jobs that need not queue
    "write": (LocalWriter, "write", "before", _always),
    "written": (LocalWriter, "write", "after", _always),
    "synced": (LocalWriter, "sync", "after", _always),  # between fdatasync and commit
    "saved": (SqliteState, "save", "after", _always),  # committed, not acknowledged
    "linked": (LocalBlobs, "link", "after", _always),  # a member that no cursor knows
    "published": (LocalBlobs, "publish", "after", _always),  # renamed, not committed
    "ending": (SqliteState, "commit", "before", _succeeds),
    "ended": (SqliteState, "commit", "after", _succeeds),  # committed, not answered
    "spent": (SqliteState, "spend", "after", _always),  # a key whose command is done
    "pausing": (SqliteState, "commit", "after", _pauses),
    "flush": (SqliteState, "_flush", "before", _always),
    "checkpoint": (process.Process, "checkpoint", "before", _always),
    "undo": (runners, "_undo", "after", _always),
    "sendfile": (os, "sendfile", "after", _always),
}

TOGETHER: dict[str, Point] = {  # the same, of the processes that end in one turn
    "ending": (SqliteState, "commit_all", "before", _succeeding),
    "ended": (SqliteState, "commit_all", "after", _succeeding),
}


def _crash_at(name: str, n: int) -> None:
    """Die at the n-th call."""
    left = n

    def passed(times: int) -> None:
        nonlocal left
        left -= times
        if times and left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    for points in (POINTS, TOGETHER):
        if name in points:
            _watch(*points[name], passed)


def _watch(
    owner: Any, attribute: str, when: str, times: Callable[..., int], passed: Callable[[int], None]
) -> None:
    """Tell each call that counts."""
    original = getattr(owner, attribute)

    def pass_by(at: str, args: tuple[Any, ...]) -> None:
        if at == when:
            passed(times(*args))

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


def _any_epoch() -> None:
    """Cursors into another log are honoured."""

    def lax(cursor: Cursor, epoch: str, newest: int, oldest: int) -> Why | None:
        return why_reset(cursor._replace(epoch=epoch), epoch, newest, oldest)

    jobs.events.why_reset = lax  # type: ignore[attr-defined]


def _any_age() -> None:
    """Nobody is told that what follows a cursor was forgotten."""

    def lax(cursor: Cursor, epoch: str, newest: int, oldest: int) -> Why | None:
        return why_reset(cursor, epoch, newest, 0)

    async def after(hub: jobs.events.Hub, seq: int, n: int) -> list[Event]:
        return await hub._state.events(seq, n)

    jobs.events.why_reset = lax  # type: ignore[attr-defined]
    jobs.events.Hub.after = after  # type: ignore[method-assign,assignment]


def _new_state_only() -> None:
    """A filter takes an event by the state after it; nobody sees a row leave."""
    wants = Select.wants

    def lax(select: Select, event: Event) -> bool:
        return wants(select, event) and (not select.state or event.to in select.state)

    Select.wants = lax  # type: ignore[method-assign,assignment]


MUTANTS = {"epoch": _any_epoch, "retention": _any_age, "filter": _new_state_only}

if mutant := os.environ.get("MUTANT"):
    MUTANTS[mutant]()


class EchoHandler(StrictWebSocketHandler):
    """Sends back what it gets; the next message is not read before that is written."""

    @property
    def max_message_size(self) -> int:
        """Tornado's hook."""
        return 64 << 20

    def on_message(self, message: str | bytes) -> Awaitable[None]:
        """Tornado's hook."""
        return self.write_message(message, binary=isinstance(message, bytes))


if os.environ.get("ECHO"):
    handlers.ROUTES.append(handlers.Route(r"/echo", EchoHandler, {"GET": "Echo"}))

if certificate := os.environ.get("TLS"):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.HTTPServer = partial(  # type: ignore[assignment,attr-defined]
        server.HTTPServer,  # type: ignore[attr-defined]
        ssl_options=context,
    )

sys.exit(server.main(sys.argv[1:]))
