"""The program inside a child process: it runs one kind as if it ran on the lane.

Strategy. Descriptor 3 is a socket to the service (see remote.py and wire.py). The first message
says what to run; the context then turns each call into a request, and waits for the answer. Reading
is done here: the service passes the descriptor of a stored file. A checkpoint costs a look at the
clock: it is told at most every 50 ms, without waiting, and every 5 ms the loop may look whether
something is wanted. Only then does the child stand and wait for what it shall do. When the socket
ends, the service is gone, and so is the child, at once.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import traceback
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

if __name__ == "__main__":  # started by path: the package is one folder up
    sys.path[0] = str(Path(__file__).parent.parent)

import msgspec

from errors import SluiceError
from jobs.kinds import Column, JobCancelled, JobPaused, Kind, load_kind
from jobs.tables import TABLE, Table
from jobs.wire import PAYLOAD_BYTES, Message, Wire
from storage.tables import TableFile, check_columns, flat

_TELL_S = 0.05
_LOOK_S = 0.005
_COMMIT_S = 0.1  # nobody waits here, so that fewer commits are better
_LOG_BYTES = 16 << 20


class _Info(msgspec.Struct):
    """What is known of a stored file."""

    id: str
    name: str
    bytes: int
    media_type: str
    layout: str


class _Reader:
    """A stored file; by its descriptor if it came with one."""

    def __init__(self, service: _Service, number: int, size_bytes: int, fd: int | None) -> None:
        self._service = service
        self._number = number
        self._fd = fd
        self.size_bytes = size_bytes

    def fileno(self) -> int | None:
        """The descriptor, or None."""
        return self._fd

    async def read(self, start: int, n: int) -> bytes:
        """See kinds.FileReader."""
        if self._fd is not None:
            return os.pread(self._fd, min(n, PAYLOAD_BYTES), start)
        _, data, _ = await self._service.ask("read", reader=self._number, start=start, size=n)
        return data

    async def close(self) -> None:
        """See kinds.FileReader."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        await self._service.ask("close", reader=self._number)


class _Files:
    """See kinds.FileAccess."""

    def __init__(self, service: _Service) -> None:
        self._service = service

    async def find(self, name: str) -> _Info:
        """See kinds.FileAccess."""
        answer, _, _ = await self._service.ask("find", name=name)
        return msgspec.convert(answer["file"], _Info)

    async def reader(self, file_id: str) -> _Reader:
        """See kinds.FileAccess."""
        answer, _, fd = await self._service.ask("open", file=file_id)
        return _Reader(self._service, answer["reader"], answer["size_bytes"], fd)

    async def table(self, file_id: str) -> Table:
        """See kinds.FileAccess."""
        info = await self.find(file_id)
        if info.layout != TABLE:
            raise SluiceError("table-unknown", f"{info.name} is a file, but no table.")
        reader = await self.reader(info.id)
        try:
            return Table(reader)
        except BaseException:
            await reader.close()
            raise


class _Artifact:
    """See kinds.ArtifactWriter."""

    def __init__(self, context: _Context, service: _Service, number: int, offset: int) -> None:
        self._context = context
        self._service = service
        self.number = number
        self.offset = offset

    async def write(self, data: bytes | memoryview) -> int:
        """See kinds.ArtifactWriter."""
        self._context.flush()
        view = memoryview(data).cast("B")
        for at in range(0, len(view), PAYLOAD_BYTES):
            piece = view[at : at + PAYLOAD_BYTES]
            answer, _, _ = await self._service.ask("write", piece, writer=self.number)
            self.offset = answer["offset"]
        return self.offset


class _Table:
    """See kinds.TableWriter: the database is written here, the service says what belongs to it."""

    def __init__(self, context: _Context, service: _Service, file: TableFile) -> None:
        self._context = context
        self._service = service
        self._file = file
        self._at: tuple[Any, list[tuple[int, int]]] | None = None  # what is not committed so far
        self._calls = 0
        self.columns = [Column(name, type) for name, type in file.columns]

    @property
    def rows(self) -> int:
        """See kinds.TableWriter."""
        return self._file.rows

    async def write(self, rows: Sequence[Sequence[Any]], cursor: Any) -> None:
        """See kinds.TableWriter."""
        await self.write_cells(flat(rows, len(self.columns)), cursor)

    async def write_cells(self, cells: Sequence[Any], cursor: Any) -> None:
        """See kinds.TableWriter."""
        self._file.add(cells)
        self._calls += 1
        self._at = cursor, self._context.offsets()
        if self._file.due:
            await self.commit()

    async def commit(self) -> None:
        """Commit what was written; more may come while the service is asked."""
        while self._at is not None:
            calls, (cursor, offsets) = self._calls, self._at
            self._context.flush()
            answer, _, _ = await self._service.ask("mark", cursor=cursor, offsets=offsets)
            if calls == self._calls:
                self._file.commit(answer["mark"])
                self._at = None
                self._service.tell("committed")

    def close(self) -> None:
        """Let go of the database."""
        self._file.close()


class _Service:
    """The other end: requests with answers, and what is wanted."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._answers: dict[int, asyncio.Future[tuple[Message, bytes, int | None]]] = {}
        self._last = 0
        self.want = "run"
        self._news = asyncio.Event()  # something else than to run is wanted
        self.begin: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(wire.sock, self._hear)

    def _hear(self) -> None:
        if not self._wire.receive():
            os._exit(1)
        for message, payload, fd in self._wire.messages():
            if "want" in message:
                self.want = message["want"]
                self._news.set()
            elif "n" in message:
                self._answers.pop(message["n"]).set_result((message, payload, fd))
            else:
                self.begin.set_result(message)

    def tell(self, verb: str, **what: Any) -> None:
        """Say something that has no answer."""
        self._wire.send({"do": verb} | what)

    async def ask(
        self, verb: str, payload: bytes | memoryview = b"", **what: Any
    ) -> tuple[Message, bytes, int | None]:
        """A request; its answer, with what came along. Raises what it has raised there."""
        self._last += 1
        answer = self._answers[self._last] = asyncio.get_running_loop().create_future()
        self._wire.send({"do": verb, "n": self._last} | what, payload)
        message, data, fd = await answer
        if (error := message.get("error")) is not None:
            raise SluiceError(error["code"], error["detail"], **error["more"])
        return message, data, fd

    async def stand(self, marks: Message) -> None:
        """Stand at a checkpoint until it is said what to do."""
        self._news.clear()
        self.tell("ask", **marks)
        while True:
            await self._news.wait()
            self._news.clear()
            if self.want != "pause":
                return

    async def wanted(self, within_s: float) -> None:
        """Return when something else than to run is wanted, or the time is over."""
        self._news.clear()
        if self.want == "run":
            try:
                async with asyncio.timeout(within_s):
                    await self._news.wait()
            except TimeoutError:
                return


class _Context:
    """See kinds.Context."""

    def __init__(self, service: _Service, kind: Kind, begin: Message) -> None:
        self._service = service
        self._kind = kind
        self._exact = begin["exact"]
        self.job_id: str = begin["job_id"]
        self.owner: str = begin["owner"]
        self.attempt: int = begin["attempt"]
        self.cursor: Any = begin["cursor"]
        self.files = _Files(service)
        self._marks: Message = {}
        self._told_at = 0.0
        self._looked_at = monotonic()
        self._artifacts: dict[str, _Artifact] = {}
        self._table: tuple[str, _Table] | None = None

    async def checkpoint(
        self,
        cursor: Any = None,
        *,
        done: int | None = None,
        total: int | None = None,
        phase: str | None = None,
        message: str | None = None,
        eta: bool | None = None,
    ) -> None:
        marks = self._marks
        if cursor is not None:
            self.cursor = marks["cursor"] = cursor
        if done is not None:
            marks["done"] = done
        if total is not None:
            marks["total"] = total
        if phase is not None:
            marks["phase"] = phase
        if message is not None:
            marks["message"] = message
        if eta is not None:
            marks["eta"] = eta
        now = monotonic()
        if now - self._looked_at > _LOOK_S:
            await asyncio.sleep(0)
            self._looked_at = now
        if self._exact or self._service.want != "run":
            await self._stand()
        elif now - self._told_at > _TELL_S:
            self._told_at = now
            self.flush()

    def flush(self) -> None:
        """Tell what was not told so far; before an effect, so that a cursor never covers it."""
        if self._marks:
            self._service.tell("note", **self._marks)
            self._marks.clear()

    async def _stand(self) -> None:
        marks = self._marks.copy()
        self._marks.clear()
        if self._service.want != "cancel":
            if self._table is not None:
                await self._table[1].commit()
            await self._service.stand(marks)
        if self._service.want == "cancel":
            raise JobCancelled
        self._looked_at = monotonic()

    async def sleep(self, seconds: float) -> None:
        end = monotonic() + seconds
        while (left_s := end - monotonic()) > 0:
            await self._service.wanted(left_s)
            if self._service.want != "run":
                await self._stand()

    async def undo(self, name: str, **args: Any) -> None:
        if name not in self._kind.undo:
            raise TypeError(f"{self._kind.name} has no undo named {name!r}")
        await self._service.ask("undo", name=name, args=args)

    def log(self, line: str) -> None:
        self._service.tell("log", line=line)

    async def artifact(
        self,
        name: str,
        media_type: str = "application/octet-stream",
        *,
        expires_s: float | None = None,
    ) -> _Artifact:
        if name not in self._artifacts:
            answer, _, _ = await self._service.ask(
                "artifact", name=name, media_type=media_type, expires_s=expires_s
            )
            number, offset = answer["writer"], answer["offset"]
            self._artifacts[name] = _Artifact(self, self._service, number, offset)
        return self._artifacts[name]

    async def table(
        self,
        name: str,
        columns: Sequence[Column],
        *,
        about: Mapping[str, Any] | None = None,
        expires_s: float | None = None,
    ) -> _Table:
        if self._table is not None and self._table[0] != name:
            raise TypeError(f"{self._kind.name} makes a second table; a job makes one")
        check_columns(columns)
        if self._table is None:
            self.flush()
            answer, _, _ = await self._service.ask("table", name=name, expires_s=expires_s)
            file = TableFile(Path(answer["path"]), log_bytes=_LOG_BYTES, commit_s=_COMMIT_S)
            if not file.columns:
                file.begin(columns, about or {}, answer["mark"])
            self._table = name, _Table(self, self._service, file)
        table = self._table[1]
        if table.columns != list(columns):
            raise SluiceError("kind-failed", f"The table {name} had other columns before.")
        return table

    def offsets(self) -> list[tuple[int, int]]:
        """How long each artefact is now, by its number."""
        return [(artifact.number, artifact.offset) for artifact in self._artifacts.values()]

    async def close_table(self) -> None:
        """Nothing more is written: the service makes a file of it."""
        if self._table is not None:
            await self._table[1].commit()
            self._table[1].close()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ctx.{name} is not there in a child process")


async def _outcome(context: _Context, work: Coroutine[Any, Any, Any]) -> Message:
    """What came of a run, as it is told."""
    try:
        data = await work
        await context.close_table()
        context.flush()
        return {"how": "done", "data": data}
    except JobCancelled:
        return {"how": "cancelled"}
    except JobPaused:
        return {"how": "paused"}
    except SluiceError as error:
        return {
            "how": "failed",
            "code": error.code,
            "detail": error.detail,
            "more": error.extra,
        }
    except Exception as error:
        for line in traceback.format_exception(error):
            print(line, end="", file=sys.stderr)
        detail = f"The process raised {type(error).__name__}; its log has more."
        return {"how": "failed", "code": "kind-failed", "detail": detail, "more": {}}


async def run(sock: socket.socket) -> None:
    """Run the one kind that the first message names."""
    wire = Wire(sock)
    service = _Service(wire)
    begin = await service.begin
    kind = load_kind(tuple(begin["source"]), begin["kind"])
    params = msgspec.convert(begin["params"], kind.params)
    context = _Context(service, kind, begin)
    service.tell("end", **await _outcome(context, kind.run(context, params)))
    await wire.sent()


def main() -> None:
    """Serve the socket on descriptor 3, then end at once: nothing is left to tidy up."""
    with socket.socket(fileno=3) as sock:
        sock.set_inheritable(False)
        asyncio.run(run(sock))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
