"""Rows of stored CSV and JSONL files, a block at a time, from any row on.

Strategy. A block is 64 KiB from a byte offset, cut behind its last whole row, so that where blocks
lie depends on the file alone and reading can go on behind any of them. Only a row that does not fit
is read with more, doubling up to 1 MiB; then it is the block's only row. The csv module itself says
where rows end: a second rule for quotes would sooner or later disagree with it. Rows come in small
batches; a caller gives the loop away between two. Whatever is wrong is said with the row's number
and byte offset; nothing is mended, shifted or dropped.

CSV is RFC 4180 with LF or CRLF, in UTF-8, its first row the header; a row is a list of texts. JSONL
is one object a line; a row is a dict of its values as they are written (``msgspec.Raw``).
"""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import AsyncGenerator, Callable
from itertools import islice
from operator import itemgetter
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from errors import SluiceError
from jobs.kinds import FileInfo, FileReader

BLOCK_BYTES = 64 << 10
MAX_ROW_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
FOREIGN = {
    b"\x1f\x8b": "is compressed (gzip)",
    b"PK\x03\x04": "is a zip archive or a spreadsheet",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd)",
    b"BZh": "is compressed (bzip2)",
    b"\xfd7zXZ": "is compressed (xz)",
    b"PAR1": "is Parquet",
    b"\xff\xfe": "is UTF-16; only UTF-8 is read",
    b"\xfe\xff": "is UTF-16; only UTF-8 is read",
}
_SUFFIXES = {
    ".csv": ("csv", ","),
    ".tsv": ("csv", "\t"),
    ".jsonl": ("jsonl", ","),
    ".ndjson": ("jsonl", ","),
}
_MEDIA_TYPES = {
    "text/csv": ("csv", ","),
    "text/tab-separated-values": ("csv", "\t"),
    "application/jsonl": ("jsonl", ","),
    "application/x-jsonlines": ("jsonl", ","),
    "application/x-ndjson": ("jsonl", ","),
    "application/ndjson": ("jsonl", ","),
}
UNFINISHED = "unexpected end of data"  # what the csv module says of an open quote

csv.field_size_limit(MAX_ROW_BYTES)

Row = Any  # list[str] of CSV, dict[str, msgspec.Raw] of JSONL, tuple of a table


class Source(NamedTuple):
    """One file to read, and how."""

    id: str
    name: str
    bytes: int
    format: Literal["csv", "jsonl", "table"]
    delimiter: str


class Batch(NamedTuple):
    """Some rows; ``end`` is the offset behind their block with the last of it, else None."""

    rows: list[Row]
    end: int | None


class Records(Protocol):
    """The rows of one source."""

    source: Source
    names: list[str]  # of CSV: its header; of a table: its columns
    start: int  # the offset of the first row

    def done(self, offset: int) -> int:
        """How many bytes of the source lie before an offset."""
        ...

    def batches(self, offset: int, row: int, most: int) -> AsyncGenerator[Batch, None]:
        """The rows from ``offset`` on, where ``row`` rows lie before; ``most`` in a batch."""
        ...

    def text(self, column: str) -> Callable[[Row], str | None]:
        """See _where.Cells."""
        ...

    def truth(self, column: str) -> Callable[[Row], bool | None]:
        """See _where.Cells."""
        ...


def stem_of(name: str) -> str:
    """A file's name without its folders, and without the suffix that tells its format."""
    name = name.rpartition("/")[2]
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def source_of(info: FileInfo, format: str, delimiter: str | None) -> Source:
    """How a file is read: a table as that, others as told, else by name, else by media type.

    Raises invalid-data.
    """
    if info.layout == "table":
        if format != "auto":
            detail = f"{info.name!r} is a table; source_format must be auto."
            raise SluiceError("invalid-data", detail, source=info.name)
        return Source(info.id, info.name, info.bytes, "table", ",")
    by_name = [how for suffix, how in _SUFFIXES.items() if info.name.lower().endswith(suffix)]
    found = by_name[0] if by_name else _MEDIA_TYPES.get(info.media_type.partition(";")[0].strip())
    if format != "auto":
        found = (format, found[1] if found is not None else ",")
    if found is None:
        raise SluiceError(
            "invalid-data",
            f"{info.name!r} ({info.media_type}) is neither CSV nor JSONL by its name or media "
            "type; source_format says what it is.",
            source=info.name,
        )
    kind: Literal["csv", "jsonl"] = "csv" if found[0] == "csv" else "jsonl"
    return Source(info.id, info.name, info.bytes, kind, delimiter or found[1])


async def open_records(source: Source, reader: FileReader) -> Records:
    """Look at a file's beginning. Raises invalid-data."""
    begin = await reader.read(0, BLOCK_BYTES)
    for magic, what in FOREIGN.items():
        if begin.startswith(magic):
            raise SluiceError("invalid-data", f"{source.name!r} {what}.", source=source.name)
    start = len(BOM) if begin.startswith(BOM) else 0
    if source.format == "jsonl":
        return _Jsonl(source, reader, start)
    records = _Csv(source, reader, start)
    await records.read_header()
    return records


def _invalid(source: Source, row: int, offset: int, what: str) -> SluiceError:
    where = f"row {row:,}" if row else "the header"
    return SluiceError(
        "invalid-data",
        f"{source.name!r}, {where} (byte {offset:,}): {what}.",
        source=source.name,
        row=row,
        byte=offset,
    )


class _Cut(NamedTuple):
    """Whole lines from an offset on."""

    data: bytes
    last: bool  # the file ends here


async def _read(reader: FileReader, size_bytes: int, offset: int, n: int) -> _Cut:
    """At most ``n`` bytes, cut behind the last line feed, or to the file's end; maybe none."""
    data = await reader.read(offset, n)
    last = offset + len(data) >= size_bytes
    if not data and not last:
        raise SluiceError("storage-failed", "The source has become shorter.")
    return _Cut(data if last else data[: data.rfind(b"\n") + 1], last)


def _too_long(source: Source, row: int, offset: int) -> SluiceError:
    return _invalid(source, row, offset, "it is longer than 1 MiB")


class _Csv:
    """Rows of a CSV file."""

    def __init__(self, source: Source, reader: FileReader, start: int) -> None:
        self.source = source
        self._reader = reader
        self.start = start
        self.names: list[str] = []
        self._at: dict[str, int] = {}

    async def read_header(self) -> None:
        """Take the first row as the names of the columns."""
        begin, n = self.start, BLOCK_BYTES
        rows: list[list[str]] = []
        if begin >= self.source.bytes:
            raise _invalid(self.source, 0, begin, "the file is empty, even of a header")
        while not rows:
            cut = await _read(self._reader, self.source.bytes, begin, n)
            block = _CsvBlock(cut, self.source.delimiter, only=1)
            rows, _ = block.take(1)
            if not rows:
                self._check(block, cut, begin, -1)
                n = self._more(n, begin, 0)
            else:
                self.start = begin + block.length(1)
        self.names = rows[0]
        self._at = {name: at for at, name in enumerate(self.names)}
        if len(self._at) < len(self.names) or not self.names:
            twice = next((name for at, name in enumerate(self.names) if self._at[name] != at), "")
            said = f"the name {twice[:80]!r} stands there twice" if self.names else "it is empty"
            raise _invalid(self.source, 0, begin, said)

    async def batches(self, offset: int, row: int, most: int) -> AsyncGenerator[Batch, None]:
        """See Records."""
        n = BLOCK_BYTES
        while offset < self.source.bytes:
            cut = await _read(self._reader, self.source.bytes, offset, n)
            block = _CsvBlock(cut, self.source.delimiter, only=1 if n > BLOCK_BYTES else None)
            first, end, over = row, offset, False
            while not over:
                raw, over = block.take(most)
                rows = self._checked(raw, block, offset, first)
                row += len(rows)
                if over:
                    self._check(block, cut, offset, first)
                    whole = block.open or block.only is not None
                    end = offset + (block.length(block.records) if whole else len(cut.data))
                if rows or end > offset:
                    yield Batch(rows, end if over else None)
            n = BLOCK_BYTES if end > offset else self._more(n, offset, row + 1)
            offset = end

    def _more(self, n: int, offset: int, row: int) -> int:
        """How much to read after ``n`` bytes had no whole row."""
        if n >= MAX_ROW_BYTES:
            raise _too_long(self.source, row, offset)
        return n * 2

    def _checked(
        self, rows: list[list[str]], block: _CsvBlock, offset: int, first: int
    ) -> list[list[str]]:
        """Rows that all have the header's width; an empty line is one only in a single column."""
        width = len(self.names)
        if [] in rows:
            rows = [row or [""] for row in rows] if width == 1 else [row for row in rows if row]
        if rows and set(map(len, rows)) != {width}:
            number, start, cells = block.ragged(width)
            what = f"it has {cells:,} cells, but the header has {width:,}"
            raise _invalid(self.source, first + number + 1, offset + start, what)
        return rows

    def _check(self, block: _CsvBlock, cut: _Cut, offset: int, first: int) -> None:
        """Refuse what the block says is wrong behind its last row."""
        fault, start = block.fault
        if not fault and block.open and cut.last:
            fault = "a quote is not closed"
        if fault:
            number = first + block.rows(self.names) + 1
            raise _invalid(self.source, number, offset + start, fault)

    def done(self, offset: int) -> int:
        """See Records."""
        return offset

    def text(self, column: str) -> Callable[[Row], str | None]:
        """See _where.Cells."""
        at = self._at.get(column)
        return _nothing if at is None else itemgetter(at)

    def truth(self, column: str) -> Callable[[Row], bool | None]:
        """See _where.Cells; in CSV the words true and false."""
        text = self.text(column)
        return lambda row: _TRUTH.get(text(row) or "")


class _CsvBlock:
    """The whole rows at the beginning of some lines of CSV."""

    def __init__(self, cut: _Cut, delimiter: str, only: int | None) -> None:
        self._data = cut.data
        self._delimiter = delimiter
        self.only = only
        self.records = 0  # read so far; empty lines are some, too
        self.open = False  # a row begins behind the last one and does not end
        self._fault = ""
        self._fault_at: int | None = None
        try:
            self._text = cut.data.decode()
        except UnicodeDecodeError as error:  # the rows before it are read, to tell its number
            self._fault, self._fault_at = "it is no UTF-8", error.start
            self._text = cut.data[: cut.data.rfind(b"\n", 0, error.start) + 1].decode()
        self._rows = islice(self._parse(), only)

    def _parse(self) -> Any:
        lines = io.StringIO(self._text, newline="\n")  # LF alone ends a line
        return csv.reader(lines, delimiter=self._delimiter, strict=True)

    def take(self, most: int) -> tuple[list[list[str]], bool]:
        """The next rows, or those before a fault; and whether there are no more."""
        rows: list[list[str]] = []
        over = False
        try:
            rows.extend(islice(self._rows, most))
        except csv.Error as error:
            over = True
            self.open = str(error) == UNFINISHED
            if not self.open and not self._fault:
                self._fault = str(error)
        self.records += len(rows)
        return rows, over or len(rows) < most or self.records == self.only

    @property
    def fault(self) -> tuple[str, int]:
        """What is wrong behind the last row, if anything, and where."""
        if self.records == self.only:
            return "", 0
        at = self._fault_at
        return self._fault, self.length(self.records) if at is None else at

    def length(self, records: int) -> int:
        """How many bytes the first records take."""
        parser = self._parse()
        deque(islice(parser, records), maxlen=0)
        return sum(map(len, islice(io.BytesIO(self._data), parser.line_num)))

    def rows(self, names: list[str]) -> int:
        """How many of the records are rows."""
        rows = islice(self._parse(), self.records)
        return self.records if len(names) == 1 else sum(map(bool, rows))

    def ragged(self, width: int) -> tuple[int, int, int]:
        """Of the first row of another width: the rows before it, its place, its cells."""
        number = 0
        for at, cells in enumerate(self._parse()):
            if cells and len(cells) != width:
                return number, self.length(at), len(cells)
            number += bool(cells)
        raise AssertionError


_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text = msgspec.json.Decoder(str).decode
_TRUTH = {"true": True, "false": False}
_JSON_TRUTH = {b"true": True, b"false": False}
_QUOTE, _NULL, _ARRAY, _OBJECT, _ESCAPE = b'"'[0], b"n"[0], b"["[0], b"{"[0], b"\\"


def _nothing(row: Row) -> None:
    return None


def text_of(value: msgspec.Raw | None) -> str | None:
    """A JSON value as text: a string's characters, else as written but compact; null is None."""
    if value is None:
        return None
    data = bytes(value)
    first = data[0]
    if first == _QUOTE:
        return _decode_text(data) if _ESCAPE in data else data[1:-1].decode()
    if first == _NULL:
        return None
    if first in (_ARRAY, _OBJECT):
        data = msgspec.json.format(data, indent=-1)
    return data.decode()


class _Jsonl:
    """Rows of a JSONL file."""

    def __init__(self, source: Source, reader: FileReader, start: int) -> None:
        self.source = source
        self._reader = reader
        self.start = start
        self.names: list[str] = []

    async def batches(self, offset: int, row: int, most: int) -> AsyncGenerator[Batch, None]:
        """See Records."""
        n = BLOCK_BYTES
        while offset < self.source.bytes:
            cut = await _read(self._reader, self.source.bytes, offset, n)
            if not cut.data:
                if n >= MAX_ROW_BYTES:
                    raise _too_long(self.source, row + 1, offset)
                n *= 2
                continue
            data = cut.data[: cut.data.find(b"\n") + 1] or cut.data if n > BLOCK_BYTES else cut.data
            lines = data.split(b"\n")
            if lines[-1] == b"":
                lines.pop()
            at = offset
            for begin in range(0, len(lines), most):
                some = lines[begin : begin + most]
                rows = self._rows(some, row, at)
                row += len(rows)
                at += sum(map(len, some)) + len(some)
                yield Batch(rows, offset + len(data) if begin + most >= len(lines) else None)
            offset, n = offset + len(data), BLOCK_BYTES

    def _rows(self, lines: list[bytes], row: int, offset: int) -> list[dict[str, msgspec.Raw]]:
        """What stands in the lines; empty ones are no rows."""
        try:
            b"\n".join(lines).decode()
            return [_decode(line) for line in lines if line.strip()]
        except (ValueError, RecursionError):
            for line in lines:
                if line.strip():
                    row += 1
                    self._check(line, row, offset)
                offset += len(line) + 1
            raise

    def _check(self, line: bytes, row: int, offset: int) -> None:
        """Say what is wrong with a line, if anything."""
        try:
            line.decode()
            _decode(line)
        except UnicodeDecodeError as error:
            what, offset = "it is no UTF-8", offset + error.start
        except RecursionError:
            what = "it is nested too deeply"
        except msgspec.ValidationError:
            what = "it is no JSON object"
        except msgspec.DecodeError as error:
            what = str(error)
        else:
            return
        raise _invalid(self.source, row, offset, what)

    def done(self, offset: int) -> int:
        """See Records."""
        return offset

    def text(self, column: str) -> Callable[[Row], str | None]:
        """See _where.Cells."""
        return lambda row: text_of(row.get(column))

    def truth(self, column: str) -> Callable[[Row], bool | None]:
        """See _where.Cells."""

        def truth(row: Row) -> bool | None:
            value = row.get(column)
            return None if value is None else _JSON_TRUTH.get(bytes(value))

        return truth
