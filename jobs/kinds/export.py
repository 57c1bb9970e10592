"""Rows of stored CSV and JSONL files, and of tables, chosen and written anew as one file.

Strategy. A first pass looks at every source: the header of CSV, and, where the columns are not
given, the names in all of JSONL. The second goes through the rows block by block: read, judge,
encode, write, checkpoint. The cursor is where the next block begins, with the counts so far, and
for gzip what its end needs; the sources stand in it by id, so that a newer version of a name is
never mixed in. As blocks and parts of gzip lie where the sources alone put them, the result has the
same bytes however often the job was paused or killed. A Parquet file can't be gone on with, as its
end describes all of it: it is begun again.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal

import msgspec

from errors import SluiceError
from jobs.kinds import ArtifactWriter, Context, FileReader, TableReader
from jobs.kinds._formats import MEDIA_TYPES, Sink, encoder, header, sink
from jobs.kinds._names import check_name, with_suffix
from jobs.kinds._records import Records, Row, Source, open_records, source_of, stem_of
from jobs.kinds._tables import TableRecords
from jobs.kinds._where import Judge, Test, columns_of, compile_test, count_of, parse

KIND = "export"
TITLE = "Chosen rows and columns of tables, and of stored CSV or JSONL files"
UNIT = "bytes"
PAUSE = "within 64 KiB; after 30 s .gz repeats at most 16 MiB of the source, parquet begins again"

_MAX_COLUMNS = 1000
_MAX_NAMES_BYTES = 20 << 10  # of the columns' names as JSON: they stand in the cursor
_BATCH_ROWS = 250
_BATCH_TESTS = 2000  # rows × tests in a batch
_BATCH_BYTES = 32 << 10  # that names and commas may add to a batch
_PIECE_BYTES = 128 << 10  # compressed at once

Format = Literal["csv", "jsonl", "csv.gz", "jsonl.gz", "parquet"]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]


class Dates(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, rename={"from_": "from"}):
    """Rows whose date lies between two; naive dates are UTC."""

    column: str
    from_: Annotated[str | None, msgspec.Meta(description="ISO 8601, included")] = None
    to: Annotated[str | None, msgspec.Meta(description="ISO 8601, not included")] = None

    def __post_init__(self) -> None:
        begin, end = self.bounds()
        if begin is None and end is None:
            raise ValueError("The field `from` or `to` must be given")
        if begin is not None and end is not None and begin >= end:
            raise ValueError("The field `to` is not later than from")

    def bounds(self) -> tuple[datetime | None, datetime | None]:
        """Both as times."""
        return _bound("from", self.from_), _bound("to", self.to)


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which rows and columns of which files, and how they are written."""

    source: Annotated[
        Name | Annotated[list[Name], msgspec.Meta(min_length=1, max_length=1000)],
        msgspec.Meta(description="a file's id or name, or several: one after the other"),
    ]
    source_format: Annotated[
        Literal["auto", "csv", "jsonl"], msgspec.Meta(description="auto: by name or media type")
    ] = "auto"
    delimiter: Annotated[
        Literal[",", ";", "\t", "|"] | None,
        msgspec.Meta(description="of CSV sources; default: tab for .tsv, else comma"),
    ] = None
    columns: Annotated[
        Annotated[list[str], msgspec.Meta(min_length=1, max_length=_MAX_COLUMNS)] | None,
        msgspec.Meta(description="names in the order wanted; default: all"),
    ] = None
    where: Annotated[
        str | None, msgspec.Meta(description="for example: status = 'open' and n >= 10")
    ] = None
    dates: Annotated[
        Dates | list[Dates], msgspec.Meta(description="only rows with these dates")
    ] = msgspec.field(default_factory=list)
    format: Annotated[Format, msgspec.Meta(description="of the result")] = "csv"
    name: Annotated[
        str | None, msgspec.Meta(description="of the result; default: by the source's")
    ] = None
    expires_s: Annotated[
        int, msgspec.Meta(ge=60, le=31_536_000, description="the result is kept so long")
    ] = 86_400

    def __post_init__(self) -> None:
        if self.columns is not None:
            _check_columns(self.columns)
        if self.where is not None:
            try:
                parse(self.where)
            except ValueError as error:
                raise ValueError(f"The field `where` is no filter: {error}") from error
        if self.name is not None:
            check_name(self.name)
        if isinstance(self.dates, list) and len(self.dates) > 10:
            raise ValueError("The field `dates` has more than 10 entries")

    def sources(self) -> list[str]:
        """The files that were named."""
        return [self.source] if isinstance(self.source, str) else self.source

    def ranges(self) -> list[Dates]:
        """The dates that a row must have."""
        return [self.dates] if isinstance(self.dates, Dates) else self.dates


def _time(text: str) -> datetime:
    """An ISO 8601 date or time, in UTC if it doesn't say. Raises ValueError."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _bound(field: str, text: str | None) -> datetime | None:
    try:
        return None if text is None else _time(text)
    except ValueError as error:
        raise ValueError(f"The field `{field}` is no ISO 8601 date or time") from error


def _check_columns(columns: list[str]) -> None:
    if len(set(columns)) < len(columns):
        raise ValueError("The field `columns` names one twice")
    if _too_many(columns):
        raise ValueError("The field `columns` has names of more than 20 KiB")


def _too_many(columns: list[str]) -> bool:
    return len(msgspec.json.encode(columns)) > _MAX_NAMES_BYTES


def runner(params: Params) -> str:
    """Parquet is written by a library that computes long and has threads: in a child."""
    return "child" if params.format == "parquet" else "lane"


class Cursor(msgspec.Struct):
    """Where the export stands; saved with the length of its result."""

    sources: list[str]  # ids
    columns: list[str] | None = None  # found by the first pass, so far
    reading: bool = False  # the first pass is over
    unseen: list[int] = []  # of the columns that are needed, those that no row has had
    source: int = 0
    offset: int = 0  # in it; 0 is before its first row
    row: int = 0  # rows of it that lie before
    read: int = 0
    written: int = 0
    undated: int = 0
    gzip: list[int] = []


async def run(ctx: Context, params: Params) -> dict[str, Any]:
    """Both passes; the result is the job's only artefact."""
    export = _Export(ctx, params)
    await export.find()
    await export.look()
    return await export.write()


class _Export:
    """One run: from the cursor to the end, or to the next pause."""

    def __init__(self, ctx: Context, params: Params) -> None:
        self._ctx = ctx
        self._params = params
        self._test: Test | None = None if params.where is None else parse(params.where)
        tested = [] if self._test is None else columns_of(self._test)
        dated = [dates.column for dates in params.ranges()]
        self._needed = list(dict.fromkeys([*(params.columns or []), *tested, *dated]))
        self._sources: list[Source] = []
        self._all = params.columns is None
        fresh = Cursor(sources=[])
        self._at = msgspec.convert(ctx.cursor, Cursor) if ctx.cursor else fresh

    async def find(self) -> None:
        """The sources as they were at the first start."""
        known = self._at.sources or self._params.sources()
        for name, said in zip(known, self._params.sources(), strict=True):
            try:
                info = await self._ctx.files.find(name)
            except SluiceError as error:
                if not self._at.sources or error.code != "file-unknown":
                    raise
                raise self._gone(said) from error
            if self._at.sources and info.id != name:
                raise SluiceError("file-unknown", f"Another file is now named {name!r}.")
            self._sources.append(
                source_of(info, self._params.source_format, self._params.delimiter)
            )
            await self._ctx.checkpoint()
        self._at.sources = [source.id for source in self._sources]

    def _passes(self, source: Source) -> int:
        """How often a source is read whole."""
        return 2 if self._all and source.format == "jsonl" else 1

    @property
    def _total(self) -> int:
        return sum(source.bytes * self._passes(source) for source in self._sources)

    def _start(self, source: int) -> int:
        """How many bytes were read, as progress counts them, when a source is begun."""
        done = sum(s.bytes for s in self._sources[:source])
        if self._at.reading:
            return done + self._total - sum(s.bytes for s in self._sources)
        return sum(s.bytes for s in self._sources[:source] if self._passes(s) == 2)

    async def _mark(self, phase: str, done: int) -> None:
        await self._ctx.checkpoint(
            msgspec.structs.asdict(self._at),
            done=done,
            total=self._total,
            phase=phase,
            message=self._message(),
            eta=self._at.reading,  # to look is faster than to write
        )

    def _message(self) -> str:
        written = f", {self._at.written:,} written" if self._at.reading else ""
        return f"{self._at.read:,} rows read{written}"

    async def look(self) -> None:
        """The first pass: which columns there are."""
        at = self._at
        if at.reading:
            return
        found = dict.fromkeys(at.columns or [])
        for index in range(at.source if self._all else 0, len(self._sources)):
            source = self._sources[index]
            async with self._opened(index) as records:
                found.update(dict.fromkeys(records.names))
                at.source = index
                if self._passes(source) == 2:
                    await self._look_through(records, found)
            self._keep(found, source)
            at.source, at.offset, at.row = index + 1, 0, 0
            await self._mark("looking for columns", self._start(index + 1))
        unread = not self._all and any(s.format == "jsonl" for s in self._sources)
        missing = [n for n, name in enumerate(self._needed) if name not in found]
        if missing and not unread:
            read = at.read if all(s.format == "jsonl" for s in self._sources) else None
            self._refuse_unknown(missing, read)
        at.unseen = missing
        at.columns = list(found) if self._all else None
        at.source, at.read, at.reading = 0, 0, True
        await self._mark("exporting", self._start(0))

    def _keep(self, found: dict[str, None], source: Source) -> None:
        """Check the columns that were found so far, and put them into the cursor."""
        if not self._all:
            return
        if len(found) > _MAX_COLUMNS or _too_many(list(found)):
            detail = (
                f"Up to {source.name!r} there are {len(found):,} columns; at most 1,000 whose "
                "names take 20 KiB are exported. Name those that are wanted."
            )
            raise SluiceError("invalid-data", detail, source=source.name)
        self._at.columns = list(found)

    async def _look_through(self, records: Records, found: dict[str, None]) -> None:
        """Collect the names in a JSONL file, from the cursor on."""
        at = self._at
        start = self._start(at.source)
        batches = records.batches(at.offset or records.start, at.row, _BATCH_ROWS)
        async with aclosing(batches):
            async for rows, end in batches:
                found.update(dict.fromkeys(chain.from_iterable(rows)))
                at.row += len(rows)
                at.read += len(rows)
                if end is None:
                    await self._ctx.checkpoint()
                    continue
                if len(found) != len(at.columns or ()):
                    self._keep(found, records.source)
                at.offset = end
                await self._mark("looking for columns", start + end)

    def _refuse_unknown(self, missing: list[int], read: int | None = None) -> None:
        """Fail for names that no source has; if there are no rows, that is not known."""
        if read == 0:
            return
        names = ", ".join(repr(self._needed[n][:80]) for n in missing[:5])
        raise SluiceError("invalid-data", f"No source has a column named {names}.")

    async def write(self) -> dict[str, Any]:
        """The second pass: the rows."""
        at, params = self._at, self._params
        columns = params.columns if params.columns is not None else at.columns or []
        file = await self._ctx.artifact(
            self._name(), MEDIA_TYPES[params.format], expires_s=params.expires_s
        )
        out: Any
        if params.format == "parquet":
            out = await self._parquet(file, columns)
        else:
            out = sink(file, params.format, at.gzip)
            if file.offset == 0:
                await out.write(header(columns, params.format))
        for index in range(at.source, len(self._sources)):
            async with self._opened(index) as records:
                at.source = index
                await self._write_rows(records, columns, out)
            at.offset, at.row = 0, 0
            at.source = index + 1
        if at.unseen:
            self._refuse_unknown(at.unseen, at.read)
        await out.close()
        await self._ctx.checkpoint(message=self._message())
        return {
            "rows_read": at.read,
            "rows_written": at.written,
            "undated": at.undated,
            "bytes": file.offset,
            "columns": columns,
            "format": params.format,
        }

    async def _parquet(self, file: ArtifactWriter, columns: list[str]) -> Any:
        """What writes Parquet; its library is only loaded in a child.

        Columns have the types that they have in the tables; where they differ, or if a source is
        no table, they are texts.
        """
        types: dict[str, str] = {}
        for index in range(len(self._sources)):
            async with self._opened(index) as records:
                if not isinstance(records, TableRecords):
                    types = dict.fromkeys(columns, "text")
                    break
                for name, type in records.columns:
                    types[name] = type if types.get(name, type) == type else "text"
            await self._ctx.checkpoint()
        module = importlib.import_module("jobs.kinds._parquet")
        return module.Parquet(file, [(name, types.get(name, "text")) for name in columns])

    async def _write_rows(self, records: Records, columns: list[str], out: Any) -> None:
        """The rows of one source, from the cursor on."""
        at = self._at
        start = self._start(at.source)
        choose = self._chooser(records)
        is_parquet = self._params.format == "parquet"
        write_as = partial(encoder, columns=columns, format=self._params.format)
        encode = out.encoder(records) if is_parquet else write_as(records)
        begin = at.offset or records.start
        batches = records.batches(begin, at.row, self._batch_rows(columns))
        async with aclosing(batches):
            async for rows, end in batches:
                at.row += len(rows)
                at.read += len(rows)
                if at.unseen and records.source.format == "jsonl":
                    seen = set(chain.from_iterable(rows))
                    at.unseen = [n for n in at.unseen if self._needed[n] not in seen]
                chosen = choose(rows)
                at.written += len(chosen)
                if chosen and is_parquet:
                    await out.write(encode(chosen))
                    await self._ctx.checkpoint()
                elif chosen:
                    await self._write_bytes(encode(chosen), out)
                if end is None:
                    continue
                at.offset = end
                done = records.done(end)
                if await out.settle(done - records.done(begin)):
                    at.gzip = out.state
                    await self._mark("exporting", start + done)
                else:
                    await self._ctx.checkpoint(done=start + done, message=self._message())
                begin = end

    async def _write_bytes(self, data: bytes, out: Sink) -> None:
        view = memoryview(data)
        for piece in range(0, len(view), _PIECE_BYTES):
            await out.write(view[piece : piece + _PIECE_BYTES])
            await self._ctx.checkpoint()

    def _batch_rows(self, columns: list[str]) -> int:
        """How many rows are worked on between two checkpoints."""
        tests = len(self._params.ranges()) + (count_of(self._test) if self._test else 0)
        named = self._params.format.startswith("jsonl")
        added = sum(len(name.encode()) + 4 if named else 1 for name in columns)
        return max(1, min(_BATCH_ROWS, _BATCH_TESTS // (tests + 1), _BATCH_BYTES // (added + 1)))

    def _chooser(self, records: Records) -> Callable[[list[Row]], list[Row]]:
        """A function to the rows that are wanted; counts those without a date."""
        judge = None if self._test is None else compile_test(self._test, records)
        dated = [_between(records, dates) for dates in self._params.ranges()]
        if dated:
            return lambda rows: self._dated(rows, judge, dated)
        if judge is None:
            return lambda rows: rows
        return lambda rows: list(filter(judge, rows))

    def _dated(
        self, rows: list[Row], judge: Judge | None, dated: list[Callable[[Row], bool | None]]
    ) -> list[Row]:
        chosen = []
        for row in rows if judge is None else filter(judge, rows):
            verdicts = [verdict(row) for verdict in dated]
            if None in verdicts:
                self._at.undated += 1
            elif all(verdicts):
                chosen.append(row)
        return chosen

    @asynccontextmanager
    async def _opened(self, index: int) -> AsyncIterator[Records]:
        """The rows of a source. Raises file-unknown if it was deleted, invalid-data."""
        source, files = self._sources[index], self._ctx.files
        table: TableReader | None = None
        reader: FileReader | None = None
        try:
            if source.format == "table":
                table = await files.table(source.id)
            else:
                reader = await files.reader(source.id)
        except SluiceError as error:
            if error.code != "file-unknown":
                raise
            raise self._gone(source.name) from error
        try:
            if table is not None:
                yield TableRecords(source, table)
            elif reader is not None:
                yield await open_records(source, reader)
        finally:
            for opened in (table, reader):
                if opened is not None:
                    await opened.close()

    def _gone(self, name: str) -> SluiceError:
        detail = f"The source {name!r} was deleted before all of it was read."
        return SluiceError("file-unknown", detail)

    def _name(self) -> str:
        """The result's name: as told, else by the first source's, but never one of theirs."""
        if self._params.name is not None:
            return self._params.name
        stem, suffix = stem_of(self._sources[0].name), f".{self._params.format}"
        of_table = self._sources[0].format == "table"  # the file it was made of may be named so
        if of_table or any(source.name == stem + suffix for source in self._sources):
            suffix = "-export" + suffix
        return with_suffix(stem, suffix)


def _between(records: Records, dates: Dates) -> Callable[[Row], bool | None]:
    """Of a row: whether its date lies in the range; None if it has none that can be read."""
    text = records.text(dates.column)
    begin, end = dates.bounds()

    def verdict(row: Row) -> bool | None:
        try:
            time = _time(text(row) or "")
        except ValueError:
            return None
        return (begin is None or begin <= time) and (end is None or time < end)

    return verdict
