"""Rows of tables as filters and exports see them: what a cell is as text, and as true or false."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from operator import itemgetter
from typing import Any

from jobs.kinds import Column, TableReader
from jobs.kinds._records import Batch, Source

Row = tuple[Any, ...]

_ROWS = 500  # in a block: it ends behind each such number of rows, however they were read
_WORDS = {1: "true", 0: "false"}


class TableCells:
    """See _where.Cells: rows that have these columns."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        self._at = {column.name: at for at, column in enumerate(columns)}

    def text(self, column: str) -> Callable[[Row], str | None]:
        """Of a row: the cell as it would be in CSV, or None where there is no value."""
        at = self._at.get(column)
        if at is None:
            return lambda row: None
        kind = self.columns[at].type
        if kind == "boolean":
            return lambda row: _WORDS.get(row[at])
        if kind in ("integer", "real"):
            return lambda row: None if row[at] is None else repr(row[at])
        return lambda row: row[at]

    def value(self, column: str) -> Callable[[Row], Any]:
        """Of a row: the cell as it would be in JSON."""
        at = self._at[column]
        if self.columns[at].type == "boolean":
            return lambda row: None if row[at] is None else bool(row[at])
        return itemgetter(at)

    def truth(self, column: str) -> Callable[[Row], bool | None]:
        """Of a row: true, false, or None where the cell is neither."""
        at = self._at.get(column)
        if at is None or self.columns[at].type not in ("boolean", "text"):
            return lambda row: None
        if self.columns[at].type == "text":
            return lambda row: {"true": True, "false": False}.get(row[at])
        return lambda row: None if row[at] is None else bool(row[at])


class TableRecords(TableCells):
    """See _records.Records; an offset is the number of rows before it."""

    start = 0

    def __init__(self, source: Source, table: TableReader) -> None:
        super().__init__(table.columns)
        self.source = source
        self.names = [column.name for column in table.columns]
        self._table = table

    async def batches(self, offset: int, row: int, most: int) -> AsyncGenerator[Batch, None]:
        """See Records. Where blocks end does not depend on how fast they were read."""
        while offset < self._table.rows:
            end = min((offset // _ROWS + 1) * _ROWS, self._table.rows)
            rows = await self._table.read(offset, min(most, end - offset))
            offset += len(rows)
            yield Batch(rows, offset if offset == end else None)

    def done(self, offset: int) -> int:
        """How many bytes of the source that is, for progress."""
        return self.source.bytes * offset // max(1, self._table.rows)
