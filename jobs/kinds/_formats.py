"""What an export writes: rows as CSV or JSONL, plain or as one gzip member.

Strategy for gzip. The member is made of parts (_gzip.py). A part ends by how much went through it,
never by when a pause came, so that the bytes are the same however often it was interrupted. Nothing
of a part is written before its end.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Protocol

import msgspec

from jobs.kinds import ArtifactWriter
from jobs.kinds._gzip import HEAD, PART_BYTES, Member
from jobs.kinds._records import Records, Row, text_of
from jobs.kinds._tables import TableRecords

_PART_SOURCE_BYTES = 16 << 20  # read for it: where a filter lets little through, it ends by this
_LEVEL = 4  # half the time of level 6 and, for rows, nearly its ratio

MEDIA_TYPES = {
    "parquet": "application/vnd.apache.parquet",
    "csv": "text/csv",
    "jsonl": "application/x-ndjson",
    "csv.gz": "application/gzip",
    "jsonl.gz": "application/gzip",
}

Encode = Callable[[Sequence[Row]], bytes]


def encoder(records: Records, columns: list[str], format: str) -> Encode:
    """A function from a source's rows to the bytes of the chosen columns."""
    if format.startswith("jsonl"):
        return _jsonl(records, columns)
    return _csv(records, columns)


def header(columns: list[str], format: str) -> bytes:
    """What stands before the first row."""
    return _csv_bytes([columns]) if format.startswith("csv") and columns else b""


def _csv_bytes(rows: Any) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode()


def _csv(records: Records, columns: list[str]) -> Encode:
    if not columns:
        return lambda rows: b""
    if isinstance(records, TableRecords):
        texts = [records.text(name) for name in columns]
        return lambda rows: _csv_bytes([[text(row) for text in texts] for row in rows])
    if records.source.format == "jsonl":

        def from_json(rows: Sequence[Row]) -> bytes:
            return _csv_bytes([[text_of(row.get(name)) for name in columns] for row in rows])

        return from_json
    if columns == records.names:
        return _csv_bytes
    at = {name: index for index, name in enumerate(records.names)}
    if len(columns) > 1 and all(name in at for name in columns):
        pick = itemgetter(*[at[name] for name in columns])
        return lambda rows: _csv_bytes(map(pick, rows))
    chosen = [at.get(name, -1) for name in columns]
    return lambda rows: _csv_bytes(
        [[row[index] if index >= 0 else "" for index in chosen] for row in rows]
    )


def _jsonl(records: Records, columns: list[str]) -> Encode:
    lines = msgspec.json.Encoder().encode_lines
    if records.source.format == "jsonl":
        return lambda rows: lines(
            [{name: row[name] for name in columns if name in row} for row in rows]
        )
    if isinstance(records, TableRecords):
        values = [(name, records.value(name)) for name in columns if name in records.names]
        return lambda rows: lines([{name: value(row) for name, value in values} for row in rows])
    at = {name: index for index, name in enumerate(records.names)}
    if columns == records.names:
        return lambda rows: lines([dict(zip(columns, row, strict=True)) for row in rows])
    chosen = [(name, at[name]) for name in columns if name in at]
    return lambda rows: lines([{name: row[index] for name, index in chosen} for row in rows])


class Sink(Protocol):
    """Where encoded rows go."""

    async def write(self, data: bytes | memoryview) -> None:
        """Add some text."""
        ...

    async def settle(self, source_bytes: int) -> bool:
        """After a block of ``source_bytes``: whether all so far is in the file."""
        ...

    async def close(self) -> None:
        """Write what the end needs."""
        ...

    @property
    def state(self) -> list[int]:
        """What it takes, beside the file, to go on from where it was last settled."""
        ...


class Plain:
    """Text as it is."""

    state: list[int] = []  # noqa: RUF012 - it has none

    def __init__(self, file: ArtifactWriter) -> None:
        self._file = file

    async def write(self, data: bytes | memoryview) -> None:
        """See Sink."""
        if data:
            await self._file.write(data)

    async def settle(self, source_bytes: int) -> bool:
        """See Sink."""
        return True

    async def close(self) -> None:
        """See Sink."""


class Gzip:
    """One gzip member."""

    def __init__(self, file: ArtifactWriter, state: list[int]) -> None:
        self._file = file
        self._member = Member(_LEVEL, *state)
        self._begin()

    def _begin(self) -> None:
        self._made: list[bytes] = [] if self._file.offset else [HEAD]
        self._in_bytes = 0
        self._source_bytes = 0

    @property
    def state(self) -> list[int]:
        """See Sink."""
        return [self._member.crc32, self._member.size_bytes]

    async def write(self, data: bytes | memoryview) -> None:
        """See Sink."""
        self._in_bytes += len(data)
        self._made.append(self._member.add(data))

    async def settle(self, source_bytes: int) -> bool:
        """See Sink."""
        self._source_bytes += source_bytes
        if self._in_bytes < PART_BYTES and self._source_bytes < _PART_SOURCE_BYTES:
            return False
        await self._end()
        return True

    async def _end(self) -> None:
        self._made.append(self._member.end_part())
        await self._file.write(b"".join(self._made))
        self._begin()

    async def close(self) -> None:
        """See Sink."""
        await self._end()
        await self._file.write(self._member.end())


def sink(file: ArtifactWriter, format: str, state: list[int]) -> Sink:
    """Where the rows of a format go; ``state`` is what ``Sink.state`` was."""
    return Gzip(file, state) if format.endswith(".gz") else Plain(file)
