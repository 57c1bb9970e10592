"""Kinds of processes: the contract that their authors write against, and the registry.

A kind is one module in this package:

    KIND = "words"                      # its name on the wire
    TITLE = "Count the words of a file"
    UNIT = "bytes"                      # of done and total: bytes, rows, steps, files
    RESUMABLE = True                    # it goes on from ctx.cursor; else it starts over
    EXACTLY_ONCE = False                # its effects commit with the cursor
    RUNNER = "lane"                     # a coroutine that shares the loop; "child": a process of
                                        # its own; or def runner(params) -> str, which says it
    CPU_BOUND = False                   # it computes more than it waits, for people
    PAUSE = "after the current block"   # when a pause takes effect, for people
    CURSOR_VERSION = 1                  # raise it when the meaning of the cursor changes
    LIMIT = None                        # how many run at once; None: as many as there are slots
    RETRY = Retry(times=3)              # again after a failure that may pass; default: never
    RUN_TIMEOUT_S = None                # it may run for so long, pauses and queueing aside
    STALL_TIMEOUT_S = None              # and be without a checkpoint for so long
    UNDO = {"delete": delete}           # what ctx.undo may name: async def delete(**args)

    class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True): ...

    async def run(ctx: Context, params: Params) -> dict[str, object] | None: ...

``run`` is called with the last saved cursor: after a pause that went cold, after a crash, after a
restart. It calls ``await ctx.checkpoint(cursor, done=…)`` at least every few milliseconds of work;
that is where the job pauses, is cancelled and gives the loop to others. What it returns becomes
``result.data``. An exception fails the job; ``JobPaused`` and ``JobCancelled`` are not
``Exception``s, so that ``except Exception`` lets them through.

A kind imports this module, ``errors``, libraries, and modules of this package whose names begin
with an underscore: those are no kinds but what kinds are made of. Nothing else of the project.

Kinds of one's own lie anywhere (``--kinds PATH``), each in a file like those here; the modules of
their folder whose names begin with an underscore are theirs: ``from ._words import split``. One
that can't be imported is a Problem of the registry, and no kind less for the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import logging
import pkgutil
import re
import sys
import traceback
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from errors import SluiceError

log = logging.getLogger("sluice.kinds")

UNITS = frozenset({"bytes", "rows", "steps", "files"})
RUNNERS = frozenset({"lane", "child"})
TRANSFERS = frozenset({"upload", "download"})  # kinds of jobs that no module can be

_NAME = re.compile(r"[a-z][a-z0-9._-]{0,63}")
_TEXT_CHARS = 200
_SHOWN_CHARS = 80


class JobPaused(BaseException):
    """Raised in ``run`` when a pause goes cold: let it through, the cursor is saved."""


class JobCancelled(BaseException):
    """Raised in ``run`` at a checkpoint when the job is cancelled: let it through."""


class FileReader(Protocol):
    """Bytes of a stored file."""

    size_bytes: int

    def fileno(self) -> int | None:
        """A descriptor of it, for a program or a library; None if it is made when it is read."""
        ...

    async def read(self, start: int, n: int) -> bytes:
        """At most ``n`` bytes (1 MiB a call) from ``start``; empty only at the end."""
        ...

    async def close(self) -> None:
        """Let go of the file."""
        ...


class FileInfo(Protocol):
    """What is known of a stored file."""

    @property
    def id(self) -> str:
        """Its id: always the same bytes."""
        ...

    @property
    def name(self) -> str:
        """Its name: the newest version may change."""
        ...

    @property
    def bytes(self) -> int:
        """Its size."""
        ...

    @property
    def media_type(self) -> str:
        """What it was said to be when it was stored."""
        ...

    @property
    def layout(self) -> str:
        """``plain``; ``table`` for one that also has rows; ``zip`` for an archive."""
        ...

    @property
    def h(self) -> int:
        """Its number: a file that was stored later has a higher one."""
        ...

    @property
    def digest(self) -> Mapping[str, str]:
        """The digests that were recorded with it, in hex: sha-256, crc-32 …; there may be none."""
        ...


class Check(NamedTuple):
    """A part of a file whose CRC-32 was recorded: a member of an archive."""

    name: str
    start: int
    bytes: int
    crc32: int


class TableReader(Protocol):
    """Rows of a finished table."""

    @property
    def columns(self) -> Sequence[Column]:
        """What it has, in order."""
        ...

    @property
    def rows(self) -> int:
        """How many rows it has; they are numbered from 1."""
        ...

    async def read(
        self, after: int, most: int, names: Sequence[str] | None = None
    ) -> list[tuple[Any, ...]]:
        """Rows behind the one of a number (0: from the first), which have the next numbers.

        At most ``most``, and no more than some milliseconds can bring; none only at the end.
        ``names`` are the columns wanted (default: all), in their order.
        """
        ...

    async def close(self) -> None:
        """Let go of the table."""
        ...


class FileAccess(Protocol):
    """The stored files of the job's owner."""

    async def find(self, name: str) -> FileInfo:
        """The newest version of a name, the file of that id, or (``job:ID``) what a job has made.

        Raises file-unknown.
        """
        ...

    async def reader(self, file_id: str) -> FileReader:
        """Open a file; it stays readable even if it is deleted meanwhile."""
        ...

    async def list(self, below: int | None, limit: int) -> Sequence[FileInfo]:
        """Files with numbers below that, the newest first."""
        ...

    async def stored(self) -> tuple[int, int]:
        """How many files there are, and how many bytes in all."""
        ...

    async def checks(self, file_id: str, skip: int, limit: int) -> Sequence[Check]:
        """The parts of a file that have a CRC-32 of their own, in order, behind the first few."""
        ...

    async def keep_digests(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """Record digests (hex, by algorithm) with files, by their ids; what they have stays.

        The cursor is saved first, so that no resume comes back to before it. Files that are not
        there any more are fine.
        """
        ...

    async def table(self, file_id: str) -> TableReader:
        """Open a table (a file of the layout ``table``) for its rows; as ``reader``.

        Raises file-unknown, table-unknown.
        """
        ...


class ArtifactWriter(Protocol):
    """A file that the job makes. Its length is saved with the cursor and cut back to it."""

    @property
    def offset(self) -> int:
        """How many bytes it has."""
        ...

    async def write(self, data: bytes | memoryview) -> int:
        """Append; the new offset."""
        ...

    async def reader(self) -> FileReader:
        """Read what was written so far. Not in a child."""
        ...


class ZipMember(Protocol):
    """One file of an archive."""

    @property
    def name(self) -> str:
        """Its name in the zip."""
        ...

    @property
    def bytes(self) -> int:
        """Its size."""
        ...

    @property
    def crc32(self) -> int | None:
        """Its CRC-32, or None as long as that is not known."""
        ...


class ZipWriter(Protocol):
    """A zip of stored files, without a copy: its bytes are made of theirs when it is read.

    Members and their CRC-32s are saved with the cursor, like the length of an artefact. It becomes
    a file when ``run`` returns, if each member's CRC-32 is known then.
    """

    @property
    def members(self) -> Sequence[ZipMember]:
        """What was added so far, also before a resume, in order."""
        ...

    @property
    def size_bytes(self) -> int:
        """The length of the zip of these members."""
        ...

    async def add(self, name: str) -> None:
        """Add the newest version of a name, or the file of that id.

        Its bytes stay as long as the archive does, also when the file is deleted. Its name is made
        safe to unpack, and unique. Raises file-unknown, invalid-field for another archive.
        """
        ...

    async def reader(self, number: int) -> FileReader:
        """Read a member (from 0), also one whose file was deleted meanwhile."""
        ...

    async def set_crc32(self, number: int, crc32: int) -> None:
        """Set a member's CRC-32; it is kept with the file, too, for the next archive."""
        ...


class Line(NamedTuple):
    """A line that a program has written, to its standard output ("out") or error ("err")."""

    source: str
    text: str


class Program(Protocol):
    """A running program of the job; it is stopped while the job is paused, and ends with it.

    ``async for line in program`` takes its lines until it has ended, with a None at least every
    0.25 s, so that there is a moment to tell progress. Nothing is read while nobody asks.
    """

    @property
    def pid(self) -> int:
        """The number of its first process."""
        ...

    def read_bytes(self) -> int:
        """How far it is in its standard input if that is a file, else all that it has read."""
        ...

    def __aiter__(self) -> AsyncIterator[Line | None]: ...

    async def exit(self) -> Any:
        """How it has ended: ``code`` or ``signal``, ``cpu_s``, ``peak_bytes``."""
        ...


class Column(NamedTuple):
    """One column of a table."""

    name: str
    type: str  # text, integer, real, boolean, date, datetime, decimal


class TableWriter(Protocol):
    """A table that the job makes: rows and the cursor behind them are committed together.

    So each row is there exactly once, whatever ends the job in between. On resume the cursor of
    the last rows wins over one that only ``checkpoint`` was given; a job makes at most one table.
    Many calls share a commit: it comes with a later one, at the next pause, or at the end; on the
    lane also within a second. In a child, which nobody waits for, it is a tenth of a second's rows.
    """

    @property
    def columns(self) -> Sequence[Column]:
        """What it has, in order."""
        ...

    @property
    def rows(self) -> int:
        """How many rows it has."""
        ...

    async def write(self, rows: Sequence[Sequence[Any]], cursor: Any) -> None:
        """Append rows, and note the cursor from which ``run`` goes on behind them.

        A cell is None, an int of 64 bits, a float, or a text; booleans are 0 and 1, dates and
        decimals are texts. Takes about 1 ms for 1,000 rows of a few cells. No rows: only the
        cursor is noted. Raises ValueError for a row of another width, disk-full.
        """
        ...

    async def write_cells(self, cells: Sequence[Any], cursor: Any) -> None:
        """``write``, with the cells of all rows one after the other: less work for many rows."""
        ...


class Address(NamedTuple):
    """Where to connect to: a family of socket, and what its ``connect`` takes."""

    family: int
    sockaddr: tuple[Any, ...]


class Context(Protocol):
    """What a running process may use."""

    job_id: str
    owner: str
    attempt: int
    cursor: Any
    files: FileAccess

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
        """Go on, hold, or stop: the only place where a process is paused or cancelled.

        ``cursor`` is JSON of at most 64 KiB from which ``run`` can go on; it is saved about once
        a second and before every pause. ``done`` and ``total`` count in the kind's unit; each
        ``phase`` has a rate of its own. With ``eta=False``, until it is True again, no time left
        is told: for a phase before one of another pace. What is None stays as it was. Costs next
        to nothing while nothing is wanted and the turn's 2 ms are not used up. Raises JobPaused or
        JobCancelled.
        """
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait; a pause or a cancel takes effect at once."""
        ...

    async def attend(self, news: asyncio.Future[None], wait_s: float) -> None:
        """Wait until ``news`` is done, at most so long; a pause or a cancel takes effect at once.

        It returns, with ``news`` done or not, also when the job is resumed. Not in a child.
        """
        ...

    async def resolve(self, host: str, port: int) -> Sequence[Address]:
        """Where to connect to for a name; only addresses to which this service may connect.

        Connect to one of them and to nothing else: the name may mean another one a moment later.
        Raises address-refused, fetch-failed. Not in a child.
        """
        ...

    async def undo(self, name: str, **args: Any) -> None:
        """Write down how to take back what you do next, durably, before you do it.

        When the job is cancelled or fails, the entries run last-in first-out, each at least once,
        also after a crash in the middle. ``name`` is a key of the kind's UNDO.
        """
        ...

    def log(self, line: str) -> None:
        """Add a line to the job's own log."""
        ...

    async def artifact(
        self,
        name: str,
        media_type: str = "application/octet-stream",
        *,
        expires_s: float | None = None,
        fresh: bool = False,
    ) -> ArtifactWriter:
        """Open, or open again after a resume, a file that becomes the job's when it succeeds.

        It is removed ``expires_s`` after that. A job's only artefact, or its table, is its
        ``result.file``. ``fresh`` throws away what it had so far (not in a child).
        """
        ...

    async def zip(self, name: str, *, expires_s: float | None = None) -> ZipWriter:
        """Open, or open again after a resume, an artefact that is a zip of stored files."""
        ...

    async def program(
        self,
        argv: Sequence[str],
        *,
        stdin: FileReader | None = None,
        files: Sequence[FileReader] = (),
        stdout: ArtifactWriter | None = None,
        env: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Program:
        """Start a program without a shell; see Program. Not in a child.

        It works in ``folder``, reads ``stdin``, finds ``files`` at ``/dev/fd/3`` and on, and writes
        to ``stdout``; what it says elsewhere comes as lines. ``limits``: cpu_s, memory_bytes,
        file_bytes, open_files, nice. Raises kind-failed if it can't be started.
        """
        ...

    async def folder(self) -> Path:
        """A folder of the job's own: empty at each start and resume, and removed at the end."""
        ...

    async def table(
        self,
        name: str,
        columns: Sequence[Column],
        *,
        about: Mapping[str, Any] | None = None,
        expires_s: float | None = None,
    ) -> TableWriter:
        """Open, or open again after a resume, an artefact that is a table with these columns.

        It is an SQLite database, and the job's ``result.file`` whatever else the job makes.
        ``about`` is JSON that is kept in it. Raises invalid-field for columns that can't be: more
        than 2,000, names that are the same but for their case, or that take more than 20 KiB.
        """
        ...


class Retry(NamedTuple):
    """How often, and after which waits, a job is tried again that failed by what may pass.

    That is any exception, and a SluiceError whose code says that a retry can help. The n-th wait is
    ``base_s * factor ** (n - 1)``, at most ``max_s``, and shortened by chance by up to the share
    ``jitter``, so that many jobs that failed together do not come back together.
    """

    times: int = 3
    base_s: float = 1.0
    factor: float = 2.0
    max_s: float = 300.0
    jitter: float = 0.2

    def delay_s(self, retries: int, chance: float) -> float | None:
        """How long to wait after ``retries`` retries; None if they are used up.

        ``chance`` is from 0 to 1.
        """
        if retries >= self.times:
            return None
        wait_s = min(self.max_s, self.base_s * self.factor ** min(retries, 60))
        return wait_s * (1 - self.jitter * chance)


Run = Callable[[Any, Any], Coroutine[Any, Any, dict[str, Any] | None]]


# Where a kind is imported from: a module of this package by its name, or a file by its path.
Source = tuple[Literal["package", "file"], str]


class Kind(NamedTuple):
    """One kind, read from its module."""

    name: str
    title: str
    params: type[msgspec.Struct]
    run: Run
    undo: Mapping[str, Callable[..., Awaitable[None]]]
    resumable: bool
    exactly_once: bool
    runner: str | Callable[[Any], str]
    cpu_bound: bool
    pause: str
    unit: str
    cursor_version: int
    source: Source
    limit: int | None = None
    retry: Retry | None = None
    run_timeout_s: float | None = None
    stall_timeout_s: float | None = None

    def runs_in(self, params: Any) -> str:
        """Its runner, with these parameters."""
        return self.runner if isinstance(self.runner, str) else self.runner(params)

    def describe(self) -> dict[str, Any]:
        """The kind as ``GET /v1/kinds`` shows it."""
        return {
            "kind": self.name,
            "title": self.title,
            "startable": True,
            "params": msgspec.json.schema(self.params),
            "resumable": self.resumable,
            "exactly_once": self.exactly_once,
            "runner": self.runner if isinstance(self.runner, str) else "lane or child",
            "cpu_bound": self.cpu_bound,
            "pause": self.pause,
            "unit": self.unit,
        }


class NoKind(TypeError):
    """A module that does not keep to the contract; the text is for everyone."""


_NEEDED: Any = object()


class _Constants:
    """What a module declares; each value is checked as it is taken."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def take(
        self, name: str, ok: Callable[[Any], bool], allowed: str, default: Any = _NEEDED
    ) -> Any:
        """A constant. Raises NoKind, which says what it is and what it must be."""
        value = getattr(self._module, name, default)
        if value is _NEEDED:
            raise NoKind(f"{name} is missing; it must be {allowed}")
        if not ok(value):
            shown = f"{value!r:.{_SHOWN_CHARS}}"
            raise NoKind(f"{name} is {shown}; it must be {allowed}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A constant that is True or False."""
        return bool(self.take(name, lambda v: isinstance(v, bool), "True or False", default))

    def text(self, name: str, default: Any = _NEEDED) -> str:
        """A constant that people read."""
        allowed = f"a text of 1 to {_TEXT_CHARS} characters in one line"
        return str(self.take(name, _is_text, allowed, default))

    def word(self, name: str, words: Iterable[str], default: str) -> str:
        """A constant that is one of some words."""
        known = sorted(words)
        allowed = " or ".join(f'"{word}"' for word in known)
        return str(self.take(name, lambda v: isinstance(v, str) and v in known, allowed, default))


def kind_of(module: Any) -> Kind:
    """Read a kind from a module; NoKind says what is missing or wrong, and what is allowed."""
    given = _Constants(module)
    return Kind(
        name=given.take("KIND", _is_name, "lower-case letters, digits, . _ -, and no transfer"),
        title=given.text("TITLE"),
        params=given.take("Params", _is_params, _PARAMS),
        run=given.take("run", _is_run, "`async def run(ctx, params)`"),
        undo=dict(given.take("UNDO", _is_undo, "a dict of names and `async def`s", {})),
        resumable=given.flag("RESUMABLE", True),
        exactly_once=given.flag("EXACTLY_ONCE", False),
        runner=given.take("runner", _is_runner, "`def runner(params) -> str`", None)
        or given.word("RUNNER", RUNNERS, "lane"),
        cpu_bound=given.flag("CPU_BOUND", False),
        pause=given.text("PAUSE", "at the next checkpoint"),
        unit=given.word("UNIT", UNITS, "steps"),
        cursor_version=given.take("CURSOR_VERSION", _is_version, "a whole number from 0", 1),
        source=_source_of(module),
        limit=given.take("LIMIT", _is_limit, "a whole number from 1, or None", None),
        retry=given.take("RETRY", _is_retry, "Retry(times, base_s, factor, max_s, jitter)", None),
        run_timeout_s=given.take("RUN_TIMEOUT_S", _is_time, "seconds above 0, or None", None),
        stall_timeout_s=given.take("STALL_TIMEOUT_S", _is_time, "seconds above 0, or None", None),
    )


_PARAMS = (
    "`class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True)` with types that JSON "
    "can carry"
)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(_NAME.fullmatch(value)) and value not in TRANSFERS


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= _TEXT_CHARS and value.isprintable()


def _is_version(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_limit(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 1)


def _is_time(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value < float("inf"))


def _is_retry(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, Retry) or type(value.times) is not int or value.times < 0:
        return False
    waits = (value.base_s, value.factor, value.max_s)
    return all(map(_is_time, waits)) and None not in waits and 0 <= value.jitter <= 1


def _is_undo(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and inspect.iscoroutinefunction(undo) for name, undo in value.items()
    )


def _is_run(value: Any) -> bool:
    if not inspect.iscoroutinefunction(value):
        return False
    try:
        inspect.signature(value).bind(None, None)
    except TypeError:
        return False
    return True


def _is_runner(value: Any) -> bool:
    return value is None or (inspect.isfunction(value) and not inspect.iscoroutinefunction(value))


def _is_params(value: Any) -> bool:
    if not (isinstance(value, type) and issubclass(value, msgspec.Struct)):
        return False
    if not value.__struct_config__.forbid_unknown_fields:
        return False
    try:
        msgspec.json.schema(value)
        msgspec.inspect.type_info(value)
    except (TypeError, NameError, ValueError):
        return False
    return True


def _source_of(module: Any) -> Source:
    package, _, name = getattr(module, "__name__", "").rpartition(".")
    if package == __name__:
        return ("package", name)
    return ("file", getattr(module, "__file__", None) or "")


def load_kind(source: Source, name: str) -> Kind:
    """Import one kind by its source, as ``Registry.load`` has found it.

    Raises NoKind if it has another name by now, and whatever the module raises.
    """
    where, at = source
    if where == "package":
        kind = kind_of(importlib.import_module(f"{__name__}.{at}"))
    else:
        kind = kind_in(Path(at))
    if kind.name != name:
        raise NoKind(f"KIND is {kind.name!r}; it must be {name!r}")
    return kind


def kind_in(path: Path) -> Kind:
    """Import the kind in a file. Raises NoKind, and whatever the file raises.

    It runs as a module of its folder, which is a package of a name that nobody else has.
    ``sys.modules`` keeps both, since msgspec looks there for the types of annotations;
    ``sys.path`` stays as it is. A module that fails leaves nothing there.
    """
    folder = path.parent.resolve()
    package = f"kinds_{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    if package not in sys.modules:
        spec = importlib.util.spec_from_loader(package, None, is_package=True)
        assert spec is not None
        spec.submodule_search_locations = [str(folder)]
        sys.modules[package] = importlib.util.module_from_spec(spec)
    name = f"{package}.{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, folder / path.name)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        return kind_of(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise


class Problem(NamedTuple):
    """A file that should be a kind and is none; ``detail`` has nothing of the machine in it."""

    file: str
    detail: str


def _why(path: Path, error: BaseException) -> str:
    """What is wrong with a file, for everyone: neither paths nor what an exception may carry."""
    if isinstance(error, NoKind):
        return str(error)
    if isinstance(error, SyntaxError):
        return f"line {error.lineno or 0}: {type(error).__name__}: {error.msg}"
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == str(path)
    ]
    said = f"line {lines[-1]}: {type(error).__name__}" if lines else type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name:
        said += f": no module is named {error.name!r}"
        if (path.parent / f"{error.name}.py").is_file():
            said += f"; a neighbour is imported by `from . import {error.name}`"
    return said


def _files(path: Path) -> list[Path]:
    """The files of a path that should be kinds."""
    if not path.is_dir():
        return [path.parent.resolve() / path.name]
    return sorted(
        file
        for file in path.resolve().glob("*.py")
        if not file.name.startswith(("_", "test_")) and file.name != "conftest.py"
    )


class Registry:
    """The kinds that this server runs, and the files that should be kinds and are not."""

    def __init__(self, kinds: Iterable[Kind], problems: Sequence[Problem] = ()) -> None:
        self._kinds = {kind.name: kind for kind in kinds}
        self.problems = problems

    @classmethod
    def load(
        cls, paths: Iterable[Path] = (), programs: tuple[list[Kind], list[Problem]] = ([], [])
    ) -> Registry:
        """The kinds of this package, and those of ``paths``: files, and folders of files.

        ``programs`` is what _exec.load has found.

        Of a folder it takes each module but those that begin with _ or test_, and conftest.py.
        What can't be loaded, or has a name that is taken, is logged and becomes a Problem.
        """
        found = pkgutil.iter_modules(__path__)
        names = [module.name for module in found if not module.name.startswith("_")]
        modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
        kinds = {kind.name: kind for kind in map(kind_of, modules)}
        problems = []
        for file in dict.fromkeys(file for path in paths for file in _files(path)):
            try:
                kind = kind_in(file)
                if kind.name in kinds:
                    raise NoKind(f"KIND is {kind.name!r}; that name is taken")
                kinds[kind.name] = kind
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # also SystemExit: whatever it is, it is one file's
                problems.append(Problem(file.name, _why(file, error)))
                log.error("%s is no kind: %s: %s", file, type(error).__name__, error)
        for kind in programs[0]:
            kinds[kind.name] = kind
        problems += programs[1]
        return cls(kinds.values(), problems)

    def names(self) -> list[str]:
        """Their names, sorted."""
        return sorted(self._kinds)

    def get(self, name: str) -> Kind | None:
        """A kind, or None if this server doesn't run it."""
        return self._kinds.get(name)

    def lists(self, name: str) -> set[str]:
        """The parameters of a kind that are lists; a query writes them with commas."""
        kind = self._kinds.get(name)
        if kind is None:
            return set()
        info = msgspec.inspect.type_info(kind.params)
        assert isinstance(info, msgspec.inspect.StructType)
        return {f.name for f in info.fields if _is_list(f.type)}

    def describe(self) -> list[dict[str, Any]]:
        """All kinds as ``GET /v1/kinds`` shows them."""
        return [self._kinds[name].describe() for name in self.names()]

    def parse(self, name: str, params: Mapping[str, Any], *, text: bool = False) -> dict[str, Any]:
        """Check parameters and fill in defaults, as plain JSON.

        ``text`` reads numbers and true/false from strings, as a query string has them. Raises
        unknown-kind, or invalid-field with the field's name.
        """
        kind = self._kinds.get(name)
        if kind is None:
            known = ", ".join(self.names())
            raise SluiceError(
                "unknown-kind",
                f"No kind is named {name!r}; this server runs {known}.",
                field="kind",
            )
        try:
            value = msgspec.convert(params, kind.params, strict=not text)
        except msgspec.ValidationError as error:
            raise invalid(error, "params") from error
        return msgspec.to_builtins(value)  # type: ignore[no-any-return]


def _bare(kind: msgspec.inspect.Type) -> msgspec.inspect.Type:
    """A type without its description."""
    return kind.type if isinstance(kind, msgspec.inspect.Metadata) else kind


def _is_list(kind: msgspec.inspect.Type) -> bool:
    """Whether a parameter is a list, or may be left out; one that may be a text is none."""
    bare = _bare(kind)
    if isinstance(bare, msgspec.inspect.UnionType):
        types = [_bare(one) for one in bare.types]
        texts = [one for one in types if isinstance(one, msgspec.inspect.StrType)]
        return not texts and any(map(_is_list, types))
    return isinstance(bare, msgspec.inspect.ListType)


_AT = re.compile(r" - at `(?:key` in `)?\$\.?([^`]*)`$")
_NAMED = re.compile(r"field `([^`]+)`")


def invalid(error: msgspec.ValidationError, prefix: str = "") -> SluiceError:
    """A validation error as invalid-field, naming the field by its path."""
    text = str(error)
    at = _AT.search(text)
    path = [part for part in (prefix, at[1] if at else "") if part]
    named = _NAMED.search(text)
    if named:
        path.append(named[1])
    field = ".".join(path) or None
    message = _AT.sub("", text)
    return SluiceError("invalid-field", f"{field or 'body'}: {message}.", field=field)
