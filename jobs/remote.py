"""The service's side of a kind that runs in a child process (see child.py for the other).

Strategy. The child is a program of the job like any other (programs.py), which also talks over a
socket: it asks for what its context promises, and each request is carried out here on the real
context, one after the other. It tells its checkpoints at most every 50 ms and goes on; so the
cursor that is known here may be a little old, but fits the artefacts, as all comes in order.

A pause asks the child for its next checkpoint and waits for that at most 0.1 s, then stops its
whole family; a cancel asks it to unwind, so that its ``finally`` runs, before signals do.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from errors import CATALOGUE, SluiceError
from jobs.children import Child
from jobs.kinds import JobCancelled, JobPaused, Kind
from jobs.programs import Program
from jobs.wire import PAYLOAD_BYTES, Message, Wire

if TYPE_CHECKING:
    from jobs.process import Process

_PROGRAM = Path(__file__).with_name("child.py")
_WIRE = 3  # the socket's descriptor in the child
_LINGER_S = 1.0  # for the end of a child that has told its outcome
_HOLD_S = 0.1  # for the checkpoint that a pause would like to have


class Worker(Program):
    """The child, with its socket."""

    def __init__(self, process: Process, child: Child, sock: socket.socket) -> None:
        super().__init__(process, child)
        self._process = process
        self._wire = Wire(sock)
        self._stands = False  # at a checkpoint, until it hears "go"
        self._holding = False
        self._readers: dict[int, Any] = {}
        self._writers: dict[int, Any] = {}
        self._mark: dict[str, Any] = {}  # the newest that the child commits with its rows
        self.outcome: Message | None = None
        self._listen_socket()

    def _listen_socket(self) -> None:
        """Take the socket's messages in turn with the pipes."""

        async def hear(data: bytes) -> None:
            for message, payload, _ in self._wire.take(data):
                await self._do(message, payload)

        self.listen(os.dup(self._wire.sock.fileno()), hear)

    def begin(self, **what: Any) -> None:
        """Tell the child what to run."""
        self._wire.send(what)

    async def _do(self, message: Message, payload: bytes) -> None:
        match message.pop("do"):
            case "note":
                self._process.note(**message)
            case "ask":
                await self._stand(message)
            case "log":
                self._process.log(message["line"])
            case "committed":
                self._process.sure(self._mark, by_table=True)
            case "end":
                self.outcome = message
            case verb:
                await self._answer(message.pop("n"), verb, message, payload)

    async def _stand(self, marks: Message) -> None:
        """The child stands at a checkpoint: hold or stop it there, or let it go on."""
        self._stands = True
        if self._holding:
            self._process.note(**marks)
            return
        await self._process.checkpoint(**marks)
        if self._stands:
            self._let_go()

    def _let_go(self) -> None:
        self._stands = False
        self._wire.send({"want": "run"})

    async def _answer(self, n: int, verb: str, args: Message, payload: bytes) -> None:
        """Carry a request out; what it raises is raised in the child."""
        act: Callable[..., Awaitable[Message]] = getattr(self, f"_on_{verb}")
        try:
            answer = await (act(payload=payload, **args) if payload else act(**args))
        except SluiceError as error:
            answer = {"error": {"code": error.code, "detail": error.detail, "more": error.extra}}
        fd, data = answer.pop("descriptor", None), answer.pop("payload", b"")
        self._wire.send({"n": n} | answer, data, fd)

    async def _on_find(self, name: str) -> Message:
        file = await self._process.files.find(name)
        return {
            "file": {
                "id": file.id,
                "name": file.name,
                "bytes": file.bytes,
                "media_type": file.media_type,
                "layout": file.layout,
            }
        }

    async def _on_open(self, file: str) -> Message:
        reader = await self._process.files.reader(file)
        number = max(self._readers, default=-1) + 1
        self._readers[number] = reader
        fd = reader.fileno()
        answer: Message = {"reader": number, "size_bytes": reader.size_bytes}
        return answer if fd is None else answer | {"descriptor": fd}

    async def _on_read(self, reader: int, start: int, size: int) -> Message:
        data = await self._readers[reader].read(start, min(size, PAYLOAD_BYTES))
        return {"payload": data}

    async def _on_close(self, reader: int) -> Message:
        await self._readers.pop(reader).close()
        return {}

    async def _on_artifact(self, name: str, media_type: str, expires_s: float | None) -> Message:
        writer = await self._process.artifact(name, media_type, expires_s=expires_s)
        number = len(self._writers)
        self._writers[number] = writer
        return {"writer": number, "offset": writer.offset}

    async def _on_write(self, writer: int, payload: bytes = b"") -> Message:
        return {"offset": await self._writers[writer].write(payload)}

    async def _on_table(self, name: str, expires_s: float | None) -> Message:
        path, mark = await self._process.place_table(name, expires_s)
        return {"path": str(path), "mark": mark}

    async def _on_mark(self, cursor: Any, offsets: list[tuple[int, int]]) -> Message:
        """What the child commits with its rows: the cursor, and the artefacts' lengths at it."""
        self._process.wrote(cursor)
        lengths = {self._writers[number].name: offset for number, offset in offsets}
        self._mark = await self._process.make_mark(cursor, lengths)
        return {"mark": self._mark}

    async def _on_undo(self, name: str, args: dict[str, Any]) -> Message:
        await self._process.undo(name, **args)
        return {}

    # For the process

    async def hold(self) -> None:
        """Let it reach a checkpoint if that is near, then stop all of it."""
        if not self._stands:
            self._wire.send({"want": "pause"})
            await self._listen_on(_HOLD_S, lambda: self._stands)
        await super().hold()

    async def _listen_on(self, within_s: float, done: Callable[[], bool]) -> None:
        """Take what still comes, until it is done, or the child has ended."""
        self._holding = True
        end = monotonic() + within_s
        try:
            while (left_s := end - monotonic()) > 0:
                over = done() or self._child.exited.done()
                if await self.pump():  # after that look: so what it said at last is taken
                    continue
                if over:
                    break
                await asyncio.wait([self.news()], timeout=left_s)
        finally:
            self._holding = False

    def go(self) -> None:
        """Let it go on."""
        super().go()
        self._let_go()

    async def end(self, grace_s: float) -> None:
        """Let it unwind, then end it; at once when this is cancelled, for the grace is over."""
        left_s = 0.0
        try:
            if grace_s > 0 and not self._child.exited.done():
                self._wire.send({"want": "cancel"})
                super().go()
                await self._listen_on(grace_s / 2, self._child.exited.done)
                left_s = grace_s / 2
        finally:
            try:
                await super().end(left_s)
            finally:
                for reader in self._readers.values():
                    await reader.close()
                self._readers.clear()
                self._wire.close()


async def run_in_child(process: Process, kind: Kind, params: Any) -> dict[str, Any] | None:
    """Run a kind in a child Python; what it returns, or what it raises."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            worker = await process.spawn(
                [sys.executable, str(_PROGRAM)],
                {_WIRE: theirs.fileno()},
                make=lambda process, child: Worker(process, child, ours),
            )
    except BaseException:  # it was cancelled, or there is no process to be had
        ours.close()
        raise
    assert isinstance(worker, Worker)
    worker.begin(
        source=kind.source,
        kind=kind.name,
        params=msgspec.to_builtins(params),
        cursor=process.cursor,
        job_id=process.job_id,
        owner=process.owner,
        attempt=process.attempt,
        undo=list(kind.undo),
        exact=process.is_exact,
    )
    ends_at = math.inf
    async for line in worker:
        if line is not None:
            process.log(line.text)
        if worker.outcome is not None:
            ends_at = min(ends_at, monotonic() + _LINGER_S)
        if monotonic() > ends_at:
            break
    outcome = worker.outcome
    if outcome is None:
        raise SluiceError("kind-failed", f"The child process ended early ({await worker.exit()}).")
    match outcome["how"]:
        case "done":
            data: dict[str, Any] | None = outcome["data"]
            return data
        case "cancelled":
            raise JobCancelled
        case "paused":
            raise JobPaused
        case _:
            code = outcome["code"] if outcome["code"] in CATALOGUE else "kind-failed"
            raise SluiceError(code, outcome["detail"], **outcome["more"])
