"""Kinds of processes: the contract that their authors write against, and the registry.

A kind is one module in this package:

    KIND = "words"                      # its name on the wire
    TITLE = "Count the words of a file"
    UNIT = "bytes"                      # of done and total: bytes, rows, steps, files
    RESUMABLE = True                    # it goes on from ctx.cursor; else it starts over
    EXACTLY_ONCE = False                # its effects commit with the cursor
    RUNNER = "lane"                     # a coroutine that shares the loop ("child": a process)
    PAUSE = "after the current block"   # when a pause takes effect, for people
    CURSOR_VERSION = 1                  # raise it when the meaning of the cursor changes
    NEEDS = frozenset()                 # {"tables"} to write rows
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
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from errors import SluiceError

UNITS = frozenset({"bytes", "rows", "steps", "files"})
RUNNERS = frozenset({"lane"})


class JobPaused(BaseException):
    """Raised in ``run`` when a pause goes cold: let it through, the cursor is saved."""


class JobCancelled(BaseException):
    """Raised in ``run`` at a checkpoint when the job is cancelled: let it through."""


class FileReader(Protocol):
    """Bytes of a stored file."""

    size_bytes: int

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


class FileAccess(Protocol):
    """The stored files of the job's owner."""

    async def find(self, name: str) -> FileInfo:
        """The newest version of a name, or the file of that id. Raises file-unknown."""
        ...

    async def reader(self, file_id: str) -> FileReader:
        """Open a file; it stays readable even if it is deleted meanwhile."""
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


class TableAccess(Protocol):
    """Rows in ``tables.db``."""

    async def write(self, table: str, rows: Sequence[Mapping[str, object]], cursor: Any) -> None:
        """Append rows and save the cursor in one commit: exactly once, whatever happens.

        The table is made from the first row's fields. On resume this cursor wins.
        """
        ...


class Context(Protocol):
    """What a running process may use."""

    job_id: str
    owner: str
    attempt: int
    cursor: Any
    files: FileAccess
    tables: TableAccess

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
    ) -> ArtifactWriter:
        """Open, or open again after a resume, a file that becomes the job's when it succeeds.

        It is removed ``expires_s`` after that. A job's only artefact is its ``result.file``.
        """
        ...

    async def zip(self, name: str, *, expires_s: float | None = None) -> ZipWriter:
        """Open, or open again after a resume, an artefact that is a zip of stored files."""
        ...


Run = Callable[[Any, Any], Coroutine[Any, Any, dict[str, Any] | None]]


class Kind(NamedTuple):
    """One kind, read from its module."""

    name: str
    title: str
    params: type[msgspec.Struct]
    run: Run
    undo: Mapping[str, Callable[..., Awaitable[None]]]
    resumable: bool
    exactly_once: bool
    runner: str
    pause: str
    unit: str
    cursor_version: int
    needs: frozenset[str]

    def describe(self) -> dict[str, Any]:
        """The kind as ``GET /v1/kinds`` shows it."""
        return {
            "kind": self.name,
            "title": self.title,
            "startable": True,
            "params": msgspec.json.schema(self.params),
            "resumable": self.resumable,
            "exactly_once": self.exactly_once,
            "runner": self.runner,
            "pause": self.pause,
            "unit": self.unit,
        }


def kind_of(module: Any) -> Kind:
    """Read a kind from a module; TypeError says what is missing or wrong."""
    kind = Kind(
        name=module.KIND,
        title=module.TITLE,
        params=module.Params,
        run=module.run,
        undo=dict(getattr(module, "UNDO", {})),
        resumable=getattr(module, "RESUMABLE", True),
        exactly_once=getattr(module, "EXACTLY_ONCE", False),
        runner=getattr(module, "RUNNER", "lane"),
        pause=getattr(module, "PAUSE", "at the next checkpoint"),
        unit=getattr(module, "UNIT", "steps"),
        cursor_version=getattr(module, "CURSOR_VERSION", 1),
        needs=frozenset(getattr(module, "NEEDS", ())),
    )
    if not re.fullmatch(r"[a-z][a-z0-9._-]{0,63}", kind.name):
        raise TypeError(f"KIND {kind.name!r} is no name")
    if kind.unit not in UNITS or kind.runner not in RUNNERS:
        raise TypeError(f"{kind.name}: UNIT or RUNNER is unknown")
    if not inspect.iscoroutinefunction(kind.run):
        raise TypeError(f"{kind.name}: run is not a coroutine function")
    if not kind.params.__struct_config__.forbid_unknown_fields:
        raise TypeError(f"{kind.name}: Params must forbid unknown fields")
    return kind


class Registry:
    """The kinds that this server runs."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._kinds = {kind.name: kind for kind in kinds}

    @classmethod
    def load(cls) -> Registry:
        """The kinds of this package."""
        found = pkgutil.iter_modules(__path__)
        names = [module.name for module in found if not module.name.startswith("_")]
        modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
        return cls([kind_of(module) for module in modules])

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
