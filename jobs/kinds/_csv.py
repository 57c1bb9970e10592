"""Typed rows of a stored CSV file, block by block, with what is wrong about them.

Strategy. As in _records.py a block is 64 KiB from a byte offset, cut behind its last whole row, so
that blocks lie where the file alone puts them; but a wrong row is told and passed over, not fatal.
In the usual block, in which quotes stand around whole cells if at all, a row ends where a line
ends, and one ``split`` makes all cells; the others are the csv module's. Cells stay in one flat
list; a column is a stride of it, which is converted as a whole by one call of C where all its cells
are good. Only where that raises are they looked at one by one.

What is wrong has a row's number, counted from 1 without the header and empty lines. A row that the
csv module can't read, or whose quote is not closed within 1 MiB, counts as its first line, so that
a lone quote costs that line and not those behind it; unless there are many quotes in it, where to
try again at each line could take for ever: then it ends where it failed.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import date, datetime
from functools import cached_property
from itertools import chain, islice
from math import inf
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from errors import SluiceError
from jobs.kinds import ArtifactWriter, Column, Context, FileInfo, FileReader
from jobs.kinds._records import BLOCK_BYTES, BOM, FOREIGN, MAX_ROW_BYTES, UNFINISHED, stem_of
from jobs.kinds._where import number_of

Type = Literal["text", "integer", "real", "boolean", "date", "datetime", "decimal"]
Delimiter = Literal[",", ";", "\t", "|"]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]

MAX_COLUMNS = 2000
_MAX_NAMES_BYTES = 20 << 10
_SAMPLE_BYTES = 1 << 20  # looked at to tell types that were not declared
_SHOWN_CHARS = 200
_FEW_QUOTES = 16
_SKIP_BYTES = 256 << 10
_DELIMITERS = ",;\t|"
_MAX_INT = (1 << 63) - 1
_KNOWN = 10_000  # dates and the like that are remembered
_SAFE_DIGITS = 15  # that a float keeps


class CsvParams(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How a CSV file is read."""

    source: Annotated[Name, msgspec.Meta(description="a file's id or name")]
    delimiter: Annotated[
        Delimiter | None, msgspec.Meta(description="default: what the first row seems to have")
    ] = None
    header: Annotated[
        Literal["names", "skip", "none"],
        msgspec.Meta(description="the first row: names of the columns, passed over, or a row"),
    ] = "names"
    columns: Annotated[
        Annotated[list[Name], msgspec.Meta(min_length=1, max_length=MAX_COLUMNS)] | None,
        msgspec.Meta(
            description="with names: those wanted, in order (default: all); else: names for all"
        ),
    ] = None
    types: Annotated[
        dict[str, Type], msgspec.Meta(description="of columns, by name; of the others see infer")
    ] = {}
    infer: Annotated[
        bool, msgspec.Meta(description="tell the other types by the first MiB; else they are text")
    ] = True
    null: Annotated[
        Annotated[list[str], msgspec.Meta(max_length=20)],
        msgspec.Meta(description="cells that stand for no value"),
    ] = msgspec.field(default_factory=lambda: [""])
    max_errors: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 1000

    def __post_init__(self) -> None:
        if self.columns is not None:
            if wrong := wrong_names(self.columns):
                raise ValueError(f"The field `columns` can't be: {wrong}")
            if unknown := [name for name in self.types if name not in self.columns]:
                raise ValueError(f"The field `types` has {unknown[0][:80]!r}, which is no column")


def wrong_names(names: Sequence[str]) -> str:
    """Why these can't be the names of columns; empty if they can."""
    folded: set[str] = set()
    for name in names:
        key = "".join(c.lower() if c.isascii() else c for c in name)
        if not name or not name.isprintable():
            return f"{name[:80]!r} is no name of a column"
        if key in folded:
            return f"the name {name[:80]!r} stands there twice, if case does not count"
        folded.add(key)
    if len(names) > MAX_COLUMNS:
        return f"there are {len(names):,} columns, but at most {MAX_COLUMNS:,} can be"
    if len(msgspec.json.encode(names)) > _MAX_NAMES_BYTES:
        return "the names take more than 20 KiB"
    return ""


class Fault(NamedTuple):
    """What is wrong about a row, or one of its cells."""

    row: int
    column: str
    value: str
    reason: str


class Block(NamedTuple):
    """Rows of the file's width, their cells one after the other, and what is wrong among them."""

    cells: list[str]
    numbers: Sequence[int]  # of the rows
    faults: list[Fault]
    end: int  # the offset behind it
    row: int  # the number of the last row, good or not


# Bytes → cells


class CsvFile:
    """A CSV file, its first row read."""

    def __init__(self, info: FileInfo, reader: FileReader, delimiter: str) -> None:
        self.info = info
        self._reader = reader
        self.delimiter = delimiter
        self.start = 0  # the offset of the first row
        self.first: list[str] = []
        self.names: list[str] = []  # of all columns, to tell which cell is wrong
        self.width = 0

    def wrong(self, what: str, offset: int = 0) -> SluiceError:
        """The file as a whole can't be read."""
        return SluiceError(
            "invalid-data",
            f"{self.info.name!r} (byte {offset:,}): {what}.",
            source=self.info.name,
            byte=offset,
        )

    async def look(self, has_header: bool) -> None:
        """Read the first row, and pass it over if it is a header. Raises invalid-data."""
        offset = self.start
        while True:
            data, last = await self._read(offset, MAX_ROW_BYTES)
            if not data:
                raise self.wrong("it is empty" if last else "its first row is too long", offset)
            line = data[: data.find(b"\n") + 1] or data
            if line.strip(b"\r\n"):
                break
            offset += len(line)
        records = _Records(data, self.delimiter, only=1)
        rows = records.rows
        if records.opened is not None or not rows or rows[0] is None:
            raise self.wrong("its first row can't be read: a quote is in a wrong place", offset)
        try:
            "".join(rows[0]).encode()
        except UnicodeEncodeError as error:
            raise self.wrong("its first row is no UTF-8; only UTF-8 is read", offset) from error
        self.first = rows[0]
        self.width = len(self.first)
        self.start = offset + (records.length if has_header else 0)

    async def blocks(self, offset: int, row: int) -> AsyncIterator[Block]:
        """All rows behind an offset, where ``row`` rows lie before. A block may have none."""
        n = BLOCK_BYTES
        while offset < self.info.bytes:
            data, last = await self._read(offset, n)
            if not data:
                if n < MAX_ROW_BYTES:
                    n *= 2
                    continue
                async for block in self._skip(offset, row):
                    yield block
                offset, row, n = block.end, block.row, BLOCK_BYTES
                continue
            block = self._block(data, last, offset, row, n)
            if block.end == offset:
                n *= 2
                continue
            offset, row, n = block.end, block.row, BLOCK_BYTES
            yield block

    async def _read(self, offset: int, n: int) -> tuple[bytes, bool]:
        """At most ``n`` bytes cut behind the last line feed, or to the end; whether it is that."""
        data = await self._reader.read(offset, n)
        last = offset + len(data) >= self.info.bytes
        if not data and not last:
            raise SluiceError("storage-failed", "The source has become shorter.")
        return (data if last else data[: data.rfind(b"\n") + 1]), last

    async def _skip(self, offset: int, row: int) -> AsyncIterator[Block]:
        """Pass over a line that is longer than a row may be."""
        begin = (await self._reader.read(offset, _SHOWN_CHARS)).decode(errors="replace")
        fault = Fault(row + 1, "", begin, "the row is longer than 1 MiB")
        at = offset
        while at < self.info.bytes:
            data = await self._reader.read(at, _SKIP_BYTES)
            if not data:
                raise SluiceError("storage-failed", "The source has become shorter.")
            found = data.find(b"\n")
            at += len(data) if found < 0 else found + 1
            if found >= 0:
                break
            yield Block([], [], [], offset, row)
        yield Block([], [], [fault], at, row + 1)

    def _block(self, data: bytes, last: bool, offset: int, row: int, n: int) -> Block:
        """The rows of some lines; if none of them is whole, it ends where it begins."""
        if n == BLOCK_BYTES:
            cells = split_plain(data, self.delimiter, self.width)
            if cells is not None:
                rows = len(cells) // self.width
                end = offset + len(data)
                return Block(cells, range(row + 1, row + 1 + rows), [], end, row + rows)
        records = _Records(data, self.delimiter, only=1 if n > BLOCK_BYTES else None)
        if records.opened == 0:
            if not last and n < MAX_ROW_BYTES:
                return Block([], [], [], offset, row)
            few = data.count(b'"') <= _FEW_QUOTES
            line = (data[: data.find(b"\n") + 1] or data) if few else data
            shown = line[:_SHOWN_CHARS].decode(errors="replace")
            within = "" if last else " within 1 MiB"
            fault = Fault(row + 1, "", shown, f"a quote is not closed{within}")
            return Block([], [], [fault], offset + len(line), row + 1)
        good, numbers, faults = self._sorted(records, row)
        end = offset + (len(data) if records.opened is None else records.opened)
        if n > BLOCK_BYTES:
            end = offset + records.length
        seen = records.counted(self.width)
        return Block(list(chain.from_iterable(good)), numbers, faults, end, row + seen)

    def _sorted(
        self, records: _Records, row: int
    ) -> tuple[list[list[str]], Sequence[int], list[Fault]]:
        """Good rows with their numbers, and what is wrong about the others."""
        width = self.width
        clean = not records.failed and not records.odd
        if clean and set(map(len, records.rows)) == {width}:  # type: ignore[arg-type]
            some: Any = records.rows
            return some, range(row + 1, row + 1 + len(some)), []
        rows = [r for r in records.rows if r != []] if width > 1 else records.rows
        if width == 1:
            rows = [[""] if r == [] else r for r in rows]
        good: list[list[str]] = []
        numbers: list[int] = []
        faults: list[Fault] = []
        reasons = iter(records.failed)
        for number, cells in enumerate(rows, row + 1):
            if cells is None:
                faults.append(Fault(number, "", "", next(reasons)))
            elif len(cells) != width:
                what = f"the row has {len(cells):,} cells, but there are {width:,} columns"
                shown = self.delimiter.join(cells[:20])[:_SHOWN_CHARS]
                faults.append(Fault(number, "", shown, what))
            elif records.odd and (odd := _odd(cells)) is not None:
                at, reason = odd
                name = self.names[at] if self.names else ""
                faults.append(Fault(number, name, cells[at][:_SHOWN_CHARS], reason))
            else:
                good.append(cells)
                numbers.append(number)
        return good, numbers, faults


def split_plain(data: bytes, delimiter: str, width: int) -> list[str] | None:
    """The cells of lines in which quotes mean nothing, if each has that many; else None."""
    if b"\0" in data:
        return None
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
        if b"\r" in data:
            return None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    if not text.endswith("\n"):
        text += "\n"
    if '"' in text:
        bare = _without_quotes(text, delimiter)
        if bare is None:
            return None
        text = bare
    cells = text.replace("\n", f"{delimiter}\n{delimiter}").split(delimiter)
    cells.pop()
    lines, left = divmod(len(cells), width + 1)
    ends = cells[width :: width + 1]
    if left or lines != len(ends) or ends.count("\n") != lines or text.count("\n") != lines:
        return None
    del cells[width :: width + 1]
    return cells


def _without_quotes(text: str, delimiter: str) -> str | None:
    """A text without its quotes, if all stand around whole cells that need none; else None."""
    parts = text.split('"')
    inside = "\0".join(parts[1::2])
    if len(parts) % 2 == 0 or delimiter in inside or "\n" in inside:
        return None
    cells = len(parts) // 2
    outside = "\0".join(parts[::2])  # now a NUL stands for each quoted cell
    begun = outside.count(f"{delimiter}\0") + outside.count("\n\0") + outside.startswith("\0")
    ended = outside.count(f"\0{delimiter}") + outside.count("\0\n")
    return "".join(parts) if begun == ended == cells else None


class _Records:
    """What the csv module makes of some lines: a row, or None for one that it can't read."""

    def __init__(self, data: bytes, delimiter: str, only: int | None) -> None:
        self._data = data
        self._delimiter = delimiter
        self.rows: list[list[str] | None] = []
        self.failed: list[str] = []
        self.opened: int | None = None  # the offset of a row that does not end
        self.odd = b"\0" in data
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = data.decode(errors="surrogateescape")
            self.odd = True
        self._text = text
        self._line = self._take(only)

    @cached_property
    def _lines(self) -> list[str]:
        return io.StringIO(self._text, newline="\n").readlines()

    def _parse(self, line: int) -> Any:
        lines = self._lines[line:] if line else io.StringIO(self._text, newline="\n")
        return csv.reader(lines, delimiter=self._delimiter, strict=True)  # LF alone ends a line

    def _take(self, only: int | None) -> int:
        """Read all records, or the first few; how many lines they have."""
        first, seen = 0, 0  # the reader's first line, and how many it had read at the last fault
        reader = self._parse(0)
        while only is None or len(self.rows) < only:
            good = -len(self.rows)
            try:
                self.rows.extend(reader if only is None else islice(reader, only))
                break
            except csv.Error as error:
                good += len(self.rows)
                begin = first + seen + good
                if reader.line_num - seen != good + 1:  # some of these have several lines
                    begin = first + seen + self._lines_of(first + seen, good)
                if str(error) == UNFINISHED:
                    self.opened = self._bytes_of(begin)
                    return begin
                self.rows.append(None)
                self.failed.append(_said(error))
                failed = self._lines[begin : first + reader.line_num]
                if len(failed) > 1 and _has_few_quotes("".join(failed)):
                    first, seen = begin + 1, 0
                    reader = self._parse(first)
                else:
                    seen = reader.line_num
        return first + int(reader.line_num)

    def _lines_of(self, line: int, records: int) -> int:
        """How many lines the next records have."""
        reader = self._parse(line)
        deque(islice(reader, records), maxlen=0)
        return int(reader.line_num)

    def _bytes_of(self, lines: int) -> int:
        return sum(map(len, islice(io.BytesIO(self._data), lines)))

    @property
    def length(self) -> int:
        """How many bytes the records take that were read."""
        return self._bytes_of(self._line)

    def counted(self, width: int) -> int:
        """How many rows there are, good or not."""
        return len(self.rows) - (self.rows.count([]) if width > 1 else 0)


def _has_few_quotes(text: str) -> bool:
    """Whether trying again at each line of a text would cost little."""
    return text.count('"') <= _FEW_QUOTES


def _said(error: csv.Error) -> str:
    """What the csv module says, in our words."""
    text = str(error)
    if "expected after" in text:
        return "a quote is in the middle of a quoted cell"
    if "new-line character" in text:
        return "there is a carriage return (CR) outside of quotes"
    return text


def _odd(cells: list[str]) -> tuple[int, str] | None:
    """The first cell that no table takes, and why."""
    for at, cell in enumerate(cells):
        if "\0" in cell:
            return at, "it has a NUL character"
        try:
            cell.encode()
        except UnicodeEncodeError:
            return at, "it is no UTF-8"
    return None


async def open_csv(info: FileInfo, reader: FileReader, params: CsvParams) -> CsvFile:
    """Look at a file's beginning: encoding, delimiter, first row. Raises invalid-data."""
    begin = await reader.read(0, BLOCK_BYTES)
    file = CsvFile(info, reader, params.delimiter or ",")
    for magic, what in FOREIGN.items():
        if begin.startswith(magic):
            raise file.wrong(f"it {what}")
    if begin.count(b"\0") > len(begin) // 4:
        raise file.wrong("it has a NUL in every few bytes, as UTF-16 has; only UTF-8 is read")
    if b"\r" in begin and b"\n" not in begin:
        raise file.wrong("its lines end in CR alone; they must end in LF or CRLF")
    file.start = len(BOM) if begin.startswith(BOM) else 0
    if params.delimiter is None:
        file.delimiter = _sniff(begin[file.start :], info.name)
    await file.look(params.header != "none")
    return file


def _sniff(begin: bytes, name: str) -> str:
    """The delimiter that the first row has most of, outside of quotes; a comma if it has none."""
    line = begin.lstrip(b"\r\n").partition(b"\n")[0].decode(errors="replace")
    plain = re.sub(r'"[^"]*"', "", line)
    usual = "\t" if name.lower().endswith(".tsv") else ","
    return max(_DELIMITERS, key=lambda d: (plain.count(d), d == usual))


# Cells → values


# JSON's numbers are read several times as fast as int and float read theirs.
_json_integers = msgspec.json.Decoder(list[int]).decode
_json_reals = msgspec.json.Decoder(list[float]).decode


def _joined(cells: Sequence[str], allowed: bytes) -> bytes:
    """The cells with commas between. Raises ValueError if there is another character in them."""
    text = ",".join(cells).encode("ascii")
    if text.translate(None, allowed):  # int and float, and JSON, take more than digits
        raise ValueError
    return text


def integers(cells: Sequence[str]) -> list[Any]:
    """Whole numbers of 64 bits. Raises ValueError, as all of these do, if one is none."""
    text = _joined(cells, b"0123456789+-,")
    try:
        values = _json_integers(b"[%b]" % text)
    except msgspec.DecodeError:  # JSON has no plus, and no zeros in front
        values = list(map(int, cells))
    if len(values) != len(cells):  # a cell with a comma in it
        raise ValueError
    if values and (max(values) > _MAX_INT or min(values) < -_MAX_INT - 1):
        raise ValueError
    return values


def reals(cells: Sequence[str]) -> list[Any]:
    """Numbers as floats; none is infinite."""
    text = _joined(cells, b"0123456789+-.eE,")
    try:
        values = _json_reals(b"[%b]" % text)
    except msgspec.DecodeError:
        values = list(map(float, cells))
    if len(values) != len(cells):
        raise ValueError
    if values and (max(values) == inf or min(values) == -inf):
        raise ValueError
    return values


_TRUTH = {"true": 1, "false": 0, "t": 1, "f": 0, "yes": 1, "no": 0, "y": 1, "n": 0}
_BOOLEANS = {form: v for k, v in _TRUTH.items() for form in (k, k.upper(), k.title())}
_BITS = _BOOLEANS | {"1": 1, "0": 0}


def booleans(cells: Sequence[str]) -> list[Any]:
    """1 or 0, from words and digits."""
    values = list(map(_BITS.get, cells))
    if None in values:
        raise ValueError
    return values


class _Known:
    """Texts that are checked one by one and stay what they are; the good ones are remembered."""

    def __init__(self, check: Callable[[str], object]) -> None:
        self._check = check
        self._good: set[str] = set()

    def __call__(self, cells: Sequence[str]) -> Sequence[str]:
        fresh = set(cells) - self._good
        for cell in fresh:
            self._check(cell)
        if len(self._good) > _KNOWN:
            self._good.clear()
        self._good |= fresh
        return cells


def _date(cell: str) -> None:
    """A day as 2026-01-31."""
    if _DATE.fullmatch(cell) is None:
        raise ValueError
    date.fromisoformat(cell)


_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


_DATETIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]{1,6})?)?"
    r"(Z|[+-][0-9]{2}:?[0-9]{2})?"
)


def _datetime(cell: str) -> None:
    """A time as 2026-01-31T20:15:00, with or without seconds, fraction and offset."""
    if _DATETIME.fullmatch(cell) is None:
        raise ValueError
    datetime.fromisoformat(cell)


def _decimal(cell: str) -> None:
    """A number of up to 1,000 digits."""
    if number_of(cell) is None:
        raise ValueError


def texts(cells: Sequence[str]) -> Sequence[str]:
    """Anything."""
    return cells


_Convert = Callable[[Sequence[str]], Sequence[Any]]
_MAKE: dict[str, Callable[[], _Convert]] = {
    "text": lambda: texts,
    "integer": lambda: integers,
    "real": lambda: reals,
    "boolean": lambda: booleans,
    "date": lambda: _Known(_date),
    "datetime": lambda: _Known(_datetime),
    "decimal": lambda: _Known(_decimal),
}
_WIDER = {"integer": "real", "real": "decimal"}
_REASONS = {
    "integer": "it is no whole number of 64 bits",
    "real": "it is no number",
    "boolean": "it is neither true nor false",
    "date": "it is no date such as 2026-01-31",
    "datetime": "it is no time such as 2026-01-31T20:15:00",
    "decimal": "it is no number",
}


class Converter:
    """Makes values of one column's cells, and counts."""

    def __init__(self, column: Column, nulls: Iterable[str]) -> None:
        self.column = column
        self._convert = _MAKE[column.type]()
        self._nulls = frozenset(nulls if column.type == "text" else {*nulls, ""})
        self._null = next(iter(self._nulls)) if len(self._nulls) == 1 else None
        self.nulls = 0
        self.errors = 0
        self.fits: str = column.type  # the narrowest type that what was wrong has, too

    @property
    def keeps(self) -> bool:
        """Whether its values are its cells, whatever they are."""
        return self.column.type == "text" and not self._nulls

    def values(self, cells: Sequence[str]) -> tuple[Sequence[Any], list[int]]:
        """The values, and the places of cells that are none of the type."""
        if self._null is not None:
            has_nulls = self._null in cells
        else:
            has_nulls = not self._nulls.isdisjoint(cells)
        try:
            if not has_nulls:
                return self._convert(cells), []
            given = [cell for cell in cells if cell not in self._nulls]
            values = iter(self._convert(given))
            self.nulls += len(cells) - len(given)
            return [None if cell in self._nulls else next(values) for cell in cells], []
        except (ValueError, OverflowError):
            return self._one_by_one(cells)

    def _one_by_one(self, cells: Sequence[str]) -> tuple[Sequence[Any], list[int]]:
        found: list[Any] = []
        wrong: list[int] = []
        for at, cell in enumerate(cells):
            value = None
            if cell not in self._nulls:
                try:
                    (value,) = self._convert([cell])
                except (ValueError, OverflowError):
                    wrong.append(at)
            else:
                self.nulls += 1
            found.append(value)
        self.errors += len(wrong)
        self._widen([cells[at] for at in wrong])
        return found, wrong

    def _widen(self, cells: Sequence[str]) -> None:
        """Look for a type that these have as well."""
        while self.fits != "text":
            try:
                _MAKE[self.fits]()(cells)
                return
            except (ValueError, OverflowError):
                self.fits = _WIDER.get(self.fits, "text")


class Guess:
    """Which type a column has, by what was seen of it."""

    _CHAINS = (
        ("boolean",),
        ("integer", "real", "decimal"),
        ("date",),
        ("datetime",),
    )

    def __init__(self) -> None:
        self._left: list[str] | None = None

    def see(self, cells: Sequence[str]) -> None:
        """Take cells that have a value into account."""
        if not cells or self._left == []:
            return
        if self._left is None:
            chains = [[t for t in chain if _fits(t, cells)] for chain in self._CHAINS]
            self._left = next((chain for chain in chains if chain), [])
        else:
            self._left = [t for t in self._left if _fits(t, cells)]

    @property
    def type(self) -> str:
        """The narrowest type that all of them have."""
        return self._left[0] if self._left else "text"


_CANONICAL = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def _fits(type: str, cells: Sequence[str]) -> bool:
    """Whether cells are of a type and nothing of them would be lost, such as zeros in front."""
    try:
        if type in ("integer", "real", "decimal") and not all(map(_CANONICAL.fullmatch, cells)):
            return False
        if type == "boolean":
            return all(cell in _BOOLEANS for cell in cells)
        _MAKE[type]()(cells)
    except (ValueError, OverflowError):
        return False
    return type != "real" or all(map(_is_safe, cells))


def _is_safe(number: str) -> bool:
    """Whether a float keeps all digits of it."""
    return len(number) <= _SAFE_DIGITS or sum(map(str.isdigit, number)) <= _SAFE_DIGITS


# A file → typed rows


class Reading:
    """A CSV file as its parameters want it read: which columns, of which types."""

    def __init__(self, file: CsvFile, params: CsvParams) -> None:
        self.file = file
        self._params = params
        self.names, self._at = self._chosen()
        self.converters: list[Converter] = []

    def _chosen(self) -> tuple[list[str], list[int]]:
        """The columns that are wanted, and their places in a row."""
        file, params = self.file, self._params
        names = params.columns
        if params.header != "names":
            if names is None:
                names = [f"c{n}" for n in range(1, file.width + 1)]
            if len(names) != file.width:
                raise file.wrong(f"its rows have {file.width:,} cells, not {len(names):,}")
        else:
            if wrong := wrong_names(file.first):
                raise file.wrong(
                    f"its header can't be used: {wrong}; with header 'skip' columns names them",
                    file.start,
                )
            names = names if names is not None else file.first
        known = names if params.header != "names" else file.first
        for name in (*names, *params.types):
            if name not in known:
                raise file.wrong(f"it has no column named {name[:80]!r}", file.start)
        if wrong := wrong_names(names):
            raise file.wrong(wrong)
        file.names = list(known)
        places = {name: at for at, name in enumerate(known)}
        return names, [places[name] for name in names]

    @property
    def columns(self) -> list[Column]:
        """Their names and types."""
        return [converter.column for converter in self.converters]

    def use(self, columns: Sequence[Column]) -> None:
        """Read these types."""
        self.converters = [Converter(column, self._params.null) for column in columns]

    async def find_types(self, ctx: Context) -> None:
        """Declare what was declared, and tell the other types by the file's beginning."""
        types = self._params.types
        guesses = {name: Guess() for name in self.names if name not in types}
        if guesses and self._params.infer:
            nulls = frozenset({*self._params.null, ""})
            start = self.file.start
            async for block in self.file.blocks(start, 0):
                for name, at in zip(self.names, self._at, strict=True):
                    if name in guesses:
                        cells = block.cells[at :: self.file.width]
                        guesses[name].see([cell for cell in cells if cell not in nulls])
                await ctx.checkpoint(phase="looking for types", eta=False)
                if block.end - start >= _SAMPLE_BYTES:
                    break
        self.use([Column(n, types[n] if n in types else guesses[n].type) for n in self.names])

    def convert(self, block: Block) -> tuple[list[Any], int, list[Fault]]:
        """The good rows' values one after the other, how many rows, and all that is wrong."""
        cells, width = block.cells, self.file.width
        wanted = len(self.names)
        rows = len(cells) // width
        whole = self._at == list(range(width))
        values: list[Any] = cells if whole else [None] * (rows * wanted)
        faults = block.faults
        bad: set[int] = set()
        for place, (at, converter) in enumerate(zip(self._at, self.converters, strict=True)):
            if whole and converter.keeps:
                continue
            column = cells[at::width]
            found, wrong = converter.values(column)
            if found is not column or not whole:
                values[place::wanted] = found
            if wrong:
                bad.update(wrong)
                faults = [*faults, *self._faults(converter.column, column, wrong, block)]
        if bad:
            keep = [n for n in range(rows) if n not in bad]
            values = [v for n in keep for v in values[n * wanted : (n + 1) * wanted]]
            rows = len(keep)
        return values, rows, sorted(faults, key=lambda fault: fault.row) if bad else faults

    @staticmethod
    def _faults(
        column: Column, cells: Sequence[str], wrong: Sequence[int], block: Block
    ) -> list[Fault]:
        reason = _REASONS[column.type]
        return [
            Fault(block.numbers[at], column.name, cells[at][:_SHOWN_CHARS], reason) for at in wrong
        ]


class ErrorReport:
    """The artefact that names what is wrong: row, column, value and reason, as CSV."""

    def __init__(self, ctx: Context, name: str, most: int, lines: int) -> None:
        self._ctx = ctx
        self._name = name
        self._most = most
        self.lines = lines
        self._file: ArtifactWriter | None = None

    async def add(self, faults: Sequence[Fault]) -> None:
        """Write them, as long as there are no more lines than there may be."""
        some = faults[: max(0, self._most - self.lines)]
        if some or not faults:
            if self._file is None:
                self._file = await self._ctx.artifact(self._name, "text/csv")
            rows: list[Sequence[Any]] = [] if self._file.offset else [Fault._fields]
            rows += some
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\r\n").writerows(rows)
            if data := text.getvalue().encode(errors="replace"):
                await self._file.write(data)
            self.lines += len(some)


def report_name(source: str) -> str:
    """How the report about a file is called."""
    stem = stem_of(source).encode()[:200].decode(errors="ignore")
    return f"{stem}-errors.csv"


@asynccontextmanager
async def opened(
    ctx: Context, source: str, params: CsvParams, *, first: bool
) -> AsyncIterator[Reading]:
    """The file as its parameters want it read; behind the first start by the id that it had then.

    Raises file-unknown, invalid-data.
    """
    info = await ctx.files.find(source)
    if not first and info.id != source:
        raise SluiceError("file-unknown", f"Another file is now named {source!r}.")
    reader = await ctx.files.reader(info.id)
    try:
        yield Reading(await open_csv(info, reader, params), params)
    finally:
        await reader.close()


def wrong_file_name(name: str) -> str:
    """Why a name would not be stored unchanged; empty if it would."""
    hidden = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)
    plain = unicodedata.normalize("NFC", name).strip() == name and name not in ("", ".", "..")
    if hidden or not plain or "/" in name or "\\" in name or len(name.encode()) > 255:
        return "is no plain file name of at most 255 bytes"
    return ""
