"""Rows as one Parquet file; imported only in a child, for pyarrow is big and has threads.

Strategy. Rows are collected by column until they are a row group, which then goes out whole. How
many rows that are depends on the rows alone, so that the same rows make the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.kinds import ArtifactWriter
from jobs.kinds._records import Records, Row
from jobs.kinds._tables import TableRecords

_GROUP_ROWS = 65_536
_GROUP_BYTES = 16 << 20  # of texts
_PIECE_BYTES = 128 << 10
_TYPES = {
    "text": pa.string(),
    "integer": pa.int64(),
    "real": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "datetime": pa.timestamp("us", tz="UTC"),
    "decimal": pa.string(),
}

Columns = list[list[Any]]


class _Out(io.RawIOBase):
    """Where the library writes: bytes that are taken from here."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._at = 0

    def writable(self) -> bool:
        """See io."""
        return True

    def tell(self) -> int:
        """See io."""
        return self._at

    def write(self, data: Any) -> int:
        """See io."""
        piece = bytes(data)
        self._pieces.append(piece)
        self._at += len(piece)
        return len(piece)

    def take(self) -> bytes:
        """What was written since the last call."""
        data, self._pieces = b"".join(self._pieces), []
        return data


class Parquet:
    """A Parquet file of columns (name, type); see _formats.Sink."""

    state: list[int] = []  # noqa: RUF012 - it has none

    def __init__(self, file: ArtifactWriter, columns: Sequence[tuple[str, str]]) -> None:
        self._file = file
        self._columns = columns
        self._schema = pa.schema([(name, _TYPES[type]) for name, type in columns])
        self._out = _Out()
        self._writer = pq.ParquetWriter(self._out, self._schema)
        self._begin()

    def _begin(self) -> None:
        self._cells: Columns = [[] for _ in self._columns]
        self._rows = self._bytes = 0

    def encoder(self, records: Records) -> Callable[[Sequence[Row]], Columns]:
        """A function from a source's rows to the chosen columns."""
        values = [self._value(records, name, type) for name, type in self._columns]
        return lambda rows: [[value(row) for row in rows] for value in values]

    @staticmethod
    def _value(records: Records, name: str, type: str) -> Callable[[Row], Any]:
        if type != "text" and isinstance(records, TableRecords) and name in records.names:
            return records.value(name)
        return records.text(name)

    async def write(self, columns: Columns) -> None:
        """Add rows."""
        for cells, more in zip(self._cells, columns, strict=True):
            cells += more
            self._bytes += sum(len(cell) for cell in more if isinstance(cell, str))
        self._rows += len(columns[0]) if columns else 0
        if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        if self._rows:
            arrays = [
                _array(cells, type)
                for cells, (_, type) in zip(self._cells, self._columns, strict=True)
            ]
            table = pa.Table.from_arrays(arrays, schema=self._schema)
            self._writer.write_table(table, row_group_size=self._rows)
            self._begin()
        await self._put()

    async def _put(self) -> None:
        data = self._out.take()
        for at in range(0, len(data), _PIECE_BYTES):
            await self._file.write(data[at : at + _PIECE_BYTES])

    async def settle(self, source_bytes: int) -> bool:
        """See _formats.Sink: there is no place from which to go on."""
        return False

    async def close(self) -> None:
        """Write the last rows, and what the end needs."""
        await self._flush()
        self._writer.close()
        await self._put()


def _array(cells: list[Any], type: str) -> Any:
    if type == "date":
        return pa.array(cells, pa.string()).cast(pa.date32())
    if type == "datetime":
        return pa.array([cell and _utc(cell) for cell in cells], _TYPES[type])
    return pa.array(cells, _TYPES[type])


def _utc(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
