"""Programs that the administrator allows, each as a kind of its own: ``exec.<name>``.

Strategy. A TOML file names the programs; what it says becomes the kind's parameters, so that they
are checked, documented and shown as a form like any other. An entry of ``argv`` is filled in and
stays one argument: there is no shell, and nothing is ever split. A text that begins with a dash is
refused, since a program would read it as an option. Stored files reach the program as descriptors:
by its standard input, or as ``/dev/fd/3`` and on; their names and places stay unknown to it.

The program is held while the job is paused and ended when it is cancelled (see ctx.program). It
can't go on from a cursor, so after a crash of the service it starts anew.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from errors import SluiceError
from jobs.kinds import Context, FileReader, Kind, NoKind, Problem, Program

log = logging.getLogger("sluice.kinds")

_PIECE_BYTES = 256 << 10
_FILL = re.compile(r"\{([a-z][a-z0-9_]*)(\.name)?\}|\{\{|\}\}")
_NAME = r"^[a-z][a-z0-9_-]{0,39}$"
_PARAM = r"^[a-z][a-z0-9_]{0,39}$"
_TEXT_CHARS = 4096
_FILE_BYTES = 1 << 20  # of the TOML file
_LOG_LINES = 100  # a second; a program that says more is not read more slowly, but logged less
_LAST_CHARS = 300


class _Given(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A parameter, as the file declares it."""

    type: Literal["text", "integer", "number", "boolean", "choice", "file"] = "text"
    title: str = ""
    default: str | int | float | bool | UnsetType = UNSET
    optional: bool = False  # arguments that need it are left out with it
    choices: Annotated[list[str], Meta(max_length=1000)] = []
    min: float | None = None
    max: float | None = None
    pattern: str | None = None
    flag: str = ""  # the argument that a boolean stands for


class _Output(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A file that the program makes, by its path in the job's folder."""

    name: str
    media_type: str = "application/octet-stream"


class _Regex(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A pattern with a group ``done`` or ``percent``, and perhaps ``total`` and ``message``."""

    regex: str


class _Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    cpu_s: Annotated[int, Meta(ge=1)] | None = None
    memory_bytes: Annotated[int, Meta(ge=1 << 20)] | None = None
    file_bytes: Annotated[int, Meta(ge=0)] | None = None
    open_files: Annotated[int, Meta(ge=8)] | None = None
    nice: Annotated[int, Meta(ge=0, le=19)] = 5


class _Entry(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A program, as the file declares it."""

    argv: Annotated[list[str], Meta(min_length=1, max_length=1000)]
    title: Annotated[str, Meta(min_length=1, max_length=200)] = ""
    params: dict[Annotated[str, Meta(pattern=_PARAM)], _Given] = {}
    stdin: str | None = None
    stdout: str | None = None
    media_type: str = "application/octet-stream"
    outputs: dict[Annotated[str, Meta(pattern=_PARAM)], _Output] = {}
    progress: Literal["read", "json"] | _Regex | None = None
    unit: Literal["bytes", "rows", "steps", "files"] = "bytes"
    ok: tuple[int, ...] = (0,)
    env: dict[str, str] = {}
    at_once: Annotated[int, Meta(ge=1)] | None = None
    run_timeout_s: Annotated[float, Meta(gt=0)] | None = None
    stall_timeout_s: Annotated[float, Meta(gt=0)] | None = None
    limits: _Limits = _Limits()


class Marks(NamedTuple):
    """What a line says of the progress; None where it says nothing."""

    done: int | None = None
    total: int | None = None
    phase: str | None = None
    message: str | None = None


def load(path: Path) -> tuple[list[Kind], list[Problem]]:
    """The programs of a file as kinds, and what is wrong with the others.

    Whatever is wrong is one program's, or the file's, and stops nothing else.
    """
    try:
        if path.stat().st_size > _FILE_BYTES:
            raise ValueError("it is longer than 1 MiB")
        entries = msgspec.toml.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        log.error("%s can't be read: %s", path, said)
        return [], [Problem(path.name, f"it can't be read: {said}")]
    kinds, problems = [], []
    for name, entry in entries.items():
        try:
            kinds.append(_kind(name, entry))
        except (NoKind, msgspec.ValidationError, re.error) as error:
            problems.append(Problem(f"{path.name}: {name[:100]}", str(error)))
            log.error("%s is no program: %s", problems[-1].file, error)
    return kinds, problems


def _kind(name: str, declared: Any) -> Kind:
    if not re.fullmatch(_NAME, name):
        raise NoKind("a program's name is lower-case letters, digits, - and _, at most 40")
    entry = msgspec.convert(declared, _Entry)
    _check(entry)
    params = msgspec.defstruct(
        "Params",
        [_field(given_name, given) for given_name, given in entry.params.items()],
        kw_only=True,
        forbid_unknown_fields=True,
        namespace={"__post_init__": _checker(entry)},
    )
    program = _Allowed(name, entry)

    async def run(ctx: Context, params: Any) -> dict[str, Any]:
        return await _Run(ctx, program, params).run()

    return Kind(
        name=f"exec.{name}",
        title=entry.title or f"Run {name}",
        params=params,
        run=run,
        undo={},
        resumable=False,
        exactly_once=False,
        runner="lane",
        cpu_bound=True,
        pause="at once: the program is stopped; after a crash it starts anew",
        unit=entry.unit,
        cursor_version=1,
        source=("file", ""),
        limit=entry.at_once,
        run_timeout_s=entry.run_timeout_s,
        stall_timeout_s=entry.stall_timeout_s,
    )


def _check(entry: _Entry) -> None:
    """What the types do not say."""
    files = {name for name, given in entry.params.items() if given.type == "file"}
    if entry.stdin is not None and entry.stdin not in files:
        raise NoKind(f"stdin is {entry.stdin!r}; it must be a parameter of type file")
    if (regex := _regex(entry)) is not None and not {"done", "percent"} & set(regex.groupindex):
        raise NoKind("the pattern of progress has no group named done or percent")
    if entry.params.keys() & entry.outputs.keys():
        raise NoKind("a parameter and an output have the same name")
    for given_name, given in entry.params.items():
        if (given.type == "choice") != bool(given.choices):
            raise NoKind(f"{given_name}: choices belong to the type choice, and it needs some")
        if given.flag and given.type != "boolean":
            raise NoKind(f"{given_name}: only a boolean has a flag")
        re.compile(given.pattern or "")
    _check_templates(entry, files)


def _check_templates(entry: _Entry, files: set[str]) -> None:
    """Each name in braces is a parameter or an output; ``.name`` goes with a stored file."""
    named = [entry.stdout or "", *(output.name for output in entry.outputs.values())]
    known = entry.params.keys() | entry.outputs.keys()
    for text in (*entry.argv, *named):
        for match in _FILL.finditer(text):
            if match[1] and (match[1] not in known or (match[2] and match[1] not in files)):
                raise NoKind(f"{text!r} names {match[1]!r}, which is no parameter of that type")


def _regex(entry: _Entry) -> re.Pattern[str] | None:
    return re.compile(entry.progress.regex) if isinstance(entry.progress, _Regex) else None


def _field(name: str, given: _Given) -> Any:
    """A parameter as a field of the struct that checks it."""
    title = given.title or ("a file's id or name" if given.type == "file" else "")
    about = Meta(description=title) if title else Meta()
    low, high = given.min, given.max
    whole = Meta(ge=None if low is None else int(low), le=None if high is None else int(high))
    kinds: dict[str, Any] = {
        "text": Annotated[str, Meta(max_length=_TEXT_CHARS, pattern=given.pattern), about],
        "integer": Annotated[int, whole, about],
        "number": Annotated[float, Meta(ge=low, le=high), about],
        "boolean": Annotated[bool, about],
        "choice": Annotated[Literal[tuple(given.choices) or ("",)], about],
        "file": Annotated[str, Meta(min_length=1, extra_json_schema={"format": "file"}), about],
    }
    kind = kinds[given.type]
    if given.type == "boolean" and given.default is UNSET:
        return (name, kind, False)
    if given.default is not UNSET:
        return (name, kind, msgspec.convert(given.default, kind))
    return (name, kind | None, None) if given.optional else (name, kind)


def _checker(entry: _Entry) -> Any:
    texts = [name for name, given in entry.params.items() if given.type == "text"]

    def check(self: Any) -> None:
        for name in texts:
            value = getattr(self, name)
            if value is not None and (value.startswith("-") or "\0" in value):
                raise ValueError(f"The field `{name}` begins with a dash, or has a NUL in it")

    return check


class _Allowed(NamedTuple):
    """A program that may be run."""

    name: str
    entry: _Entry


class _Run:
    """One run of a program."""

    def __init__(self, ctx: Context, allowed: _Allowed, params: Any) -> None:
        self._ctx = ctx
        self._name, self._entry = allowed
        self._params: dict[str, Any] = msgspec.structs.asdict(params)
        self._values: dict[str, str] = {}  # of argv and of names, by parameter and output
        self._names: dict[str, str] = {}  # of stored files
        self._readers: dict[str, FileReader] = {}
        self._spooled: list[int] = []
        self._last = ""
        self._second = 0.0
        self._logged = 0

    async def run(self) -> dict[str, Any]:
        """Run it to its end."""
        try:
            return await self._run()
        finally:
            for reader in self._readers.values():
                await reader.close()
            for fd in self._spooled:
                os.close(fd)

    async def _run(self) -> dict[str, Any]:
        entry, ctx = self._entry, self._ctx
        await self._open_files()
        folder = await ctx.folder()
        by_path = [name for name in self._readers if name != entry.stdin]
        for name, value in self._params.items():
            if name in self._readers:
                number = 0 if name == entry.stdin else 3 + by_path.index(name)
                self._values[name] = f"/dev/fd/{number}"
            elif value is not None:
                self._values[name] = _text(value)
        self._values |= {name: str(folder / name) for name in entry.outputs}
        stdout = None
        if entry.stdout is not None:
            stdout = await ctx.artifact(self._file_name(entry.stdout), entry.media_type)
        fed = [entry.stdin] if entry.stdin in self._readers else list(self._readers)
        total = sum(self._readers[name].size_bytes for name in fed if name is not None)
        reads = entry.progress == "read" and total > 0
        await ctx.checkpoint(done=0, total=total if reads else None, phase="running")
        program = await ctx.program(
            self._argv(),
            stdin=self._readers.get(entry.stdin or ""),
            files=[self._readers[name] for name in by_path],
            stdout=stdout,
            env=entry.env,
            limits=msgspec.to_builtins(entry.limits),
        )
        await self._follow(program, total if reads else 0)
        end = await program.exit()
        if end.code not in entry.ok:
            said = f": {self._last}" if self._last else "."
            raise SluiceError("kind-failed", f"{self._name} ended with {end}{said}")
        for name, output in entry.outputs.items():
            await self._keep(folder / name, output)
        return {"exit": end.code, "cpu_s": round(end.cpu_s, 3), "peak_bytes": end.peak_bytes}

    async def _open_files(self) -> None:
        for name, given in self._entry.params.items():
            if given.type == "file" and self._params[name] is not None:
                info = await self._ctx.files.find(self._params[name])
                self._names[name] = info.name
                reader = await self._ctx.files.reader(info.id)
                self._readers[name] = reader
                if reader.fileno() is None:
                    self._readers[name] = await self._spool(name, reader)

    async def _spool(self, name: str, reader: FileReader) -> FileReader:
        """A copy of a file that is made when it is read: a program needs a descriptor."""
        path = await self._ctx.folder() / f"in-{name}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._spooled.append(fd)
            at = 0
            while data := await reader.read(at, _PIECE_BYTES):
                at += os.write(fd, data)
                await self._ctx.checkpoint(phase="copying")
            os.lseek(fd, 0, os.SEEK_SET)
        finally:
            await reader.close()
        return _Spooled(fd, at)

    def _argv(self) -> list[str]:
        """The arguments; one that needs what is not given is left out."""
        argv = []
        for text in self._entry.argv:
            whole = _FILL.fullmatch(text)
            given = self._entry.params.get(whole[1]) if whole and whole[1] else None
            if given is not None and given.type == "boolean" and whole is not None:
                if self._params[whole[1]]:
                    argv.append(given.flag or "true")
                continue
            if (filled := self._fill(text)) is not None:
                argv.append(filled)
        return argv

    def _fill(self, text: str) -> str | None:
        """A template with its values; None if one of them was not given."""
        missing = False

        def value(match: re.Match[str]) -> str:
            nonlocal missing
            if match[1] is None:
                return match[0][0]
            found = (self._names if match[2] else self._values).get(match[1])
            missing |= found is None
            return found or ""

        filled = _FILL.sub(value, text)
        return None if missing else filled

    def _file_name(self, template: str) -> str:
        return self._fill(template) or self._name

    async def _follow(self, program: Program, total: int) -> None:
        """Tell what the program says, and how far it is, until it has ended."""
        read = 0
        regex, is_json = _regex(self._entry), self._entry.progress == "json"
        async for line in program:
            marks = Marks()
            if line is not None:
                marks = _marks(line.text, is_json, regex) or marks
                if marks == Marks():
                    self._last = line.text.strip()[:_LAST_CHARS]
                    self._log(line.text)
            if total and (done := min(program.read_bytes(), total)) > read:
                read = done
                marks = marks._replace(done=done)
            if line is not None or marks != Marks():  # else it is silent, as a stall timeout means
                await self._ctx.checkpoint(**marks._asdict())

    def _log(self, line: str) -> None:
        """Log a line, and of many in one second the first only."""
        now = monotonic()
        if now - self._second > 1:
            self._second, self._logged = now, 0
        self._logged += 1
        if self._logged <= _LOG_LINES:
            self._ctx.log(line)
        elif self._logged == _LOG_LINES + 1:
            self._ctx.log("(too many lines in one second: the others are dropped)")

    async def _keep(self, path: Path, output: _Output) -> None:
        """Make an artefact of a file that the program has made."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise SluiceError("kind-failed", f"{self._name} has made no {path.name}.") from error
        try:
            file = await self._ctx.artifact(self._file_name(output.name), output.media_type)
            await self._ctx.checkpoint(phase="storing")
            while data := os.pread(fd, _PIECE_BYTES, file.offset):
                await file.write(data)
                await self._ctx.checkpoint()
        finally:
            os.close(fd)


class _Spooled:
    """A copy of a file in the job's folder."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self.size_bytes = size_bytes

    def fileno(self) -> int:
        return self._fd

    async def read(self, start: int, n: int) -> bytes:
        return os.pread(self._fd, n, start)

    async def close(self) -> None:
        """The run closes the descriptor."""


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


class _Json(msgspec.Struct):
    """A line of a program that tells its progress as JSON; other fields are its own."""

    done: Annotated[int, Meta(ge=0)] | None = None
    total: Annotated[int, Meta(ge=0)] | None = None
    phase: Annotated[str, Meta(max_length=100)] | None = None
    message: Annotated[str, Meta(max_length=1000)] | None = None


_decoder = msgspec.json.Decoder(_Json)


def _marks(text: str, is_json: bool, regex: re.Pattern[str] | None) -> Marks | None:
    """The progress that a line tells, or None."""
    if is_json and text.startswith("{"):
        try:
            said = _decoder.decode(text)
        except (msgspec.DecodeError, ValueError):
            return None
        return Marks(said.done, said.total, said.phase, said.message)
    match = regex.search(text) if regex is not None else None
    if match is None:
        return None
    found: Mapping[str, str | None] = match.groupdict()
    message = found.get("message")
    if found.get("percent") is not None:
        percent = _number(found["percent"])
        return None if percent is None else Marks(int(percent), 100, None, message)
    done, total = _number(found.get("done")), _number(found.get("total"))
    if done is None:
        return None
    return Marks(int(done), None if total is None else int(total), None, message)


def _number(text: str | None) -> float | None:
    try:
        value = float((text or "").strip())
    except ValueError:
        return None
    return value if 0 <= value < 1e18 else None
