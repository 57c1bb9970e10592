"""Tables: stored files that can also be asked for their rows.

A table is a file of the layout ``table``: what makes, lists, names, downloads, expires and deletes
files does so with tables, too. Its bytes are an SQLite database (storage/tables.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Final, NamedTuple

from errors import SluiceError
from jobs.kinds import Column
from jobs.kinds._tables import TableCells
from jobs.kinds._where import Test, WhereError, columns_of, compile_test, count_of, parse
from storage import Reader
from storage.tables import TableReader

TABLE: Final = "table"  # File.layout
MEDIA_TYPE: Final = "application/vnd.sqlite3"

_SLICE_S = 0.002
_STEP_TESTS = 2000  # rows x tests between two looks at the clock
_MOST_ROWS = 50_000  # looked at for one page
_MOST_BYTES = 4 << 20  # of texts on one page


def read_filter(where: str) -> Test:
    """A filter as a request brings it. Raises invalid-field."""
    try:
        return parse(where)
    except WhereError as error:
        raise SluiceError(
            "invalid-field", f"where is no filter: {error}.", field="where"
        ) from error


class Rows(NamedTuple):
    """A page: columns, rows with their numbers, and the number behind which the next one begins."""

    columns: list[Column]
    rows: list[tuple[int, tuple[Any, ...]]]
    next: int | None


class Table:
    """One table, open for reading (see kinds.TableReader); it stays whole if it is deleted."""

    def __init__(self, reader: Reader) -> None:
        fd = reader.fileno()
        if fd is None:
            raise SluiceError("storage-failed", "The table does not lie on this machine.")
        self._reader = reader  # as long as it is open, nobody cuts the bytes
        self._rows = TableReader(f"/proc/self/fd/{fd}")
        self.columns = [Column(name, type) for name, type in self._rows.columns]

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self._rows.rows

    @property
    def about(self) -> dict[str, Any]:
        """What its maker wanted to be known."""
        return self._rows.about

    async def read(
        self, after: int, most: int, names: Sequence[str] | None = None
    ) -> list[tuple[Any, ...]]:
        """See kinds.TableReader."""
        return self._rows.read(after, most, names)

    async def page(
        self, after: int, limit: int, names: Sequence[str] | None, where: str | None
    ) -> Rows:
        """Rows behind a number that pass a filter (see docs/exports.md); no slice is long.

        One call looks at a bounded number of rows and bytes: a page may then have fewer than
        ``limit``, even none, though ``next`` promises more. Raises invalid-field.
        """
        wanted = self._wanted(names)
        tested, judge, tests = self._filter(where)
        chosen = [name for name in dict.fromkeys([*wanted, *tested])]
        cells = TableCells([self._known[name] for name in chosen])
        passes = judge(cells)
        step = min(500, _STEP_TESTS // (tests + 1)) + 1
        found: list[tuple[int, tuple[Any, ...]]] = []
        at, size, began = after, 0, perf_counter()
        while at < min(self.rows, after + _MOST_ROWS) and len(found) < limit:
            rows = await self.read(at, step if tests else min(step, limit - len(found)), chosen)
            for row in rows:
                at += 1
                if passes(row):
                    found.append((at, row[: len(wanted)]))
                    size += sum(len(cell) for cell in row if isinstance(cell, str))
                    if len(found) == limit or size > _MOST_BYTES:
                        break
            if size > _MOST_BYTES:
                break
            if perf_counter() - began > _SLICE_S:
                await asyncio.sleep(0)
                began = perf_counter()
        more = at < self.rows
        return Rows([self._known[name] for name in wanted], found, at if more else None)

    @property
    def _known(self) -> dict[str, Column]:
        return {column.name: column for column in self.columns}

    def _wanted(self, names: Sequence[str] | None) -> list[str]:
        known = self._known
        if names is None:
            return list(known)
        for name in names:
            if name not in known:
                detail = f"columns: the table has no column named {name[:80]!r}."
                raise SluiceError("invalid-field", detail, field="columns")
        return list(dict.fromkeys(names))

    def _filter(
        self, where: str | None
    ) -> tuple[list[str], Callable[[TableCells], Callable[[Any], bool]], int]:
        """The columns that a filter needs, how it is made, and its tests."""
        if where is None:
            return [], lambda cells: lambda row: True, 0
        test = read_filter(where)
        names = columns_of(test)
        for name in names:
            if name not in self._known:
                detail = f"where: the table has no column named {name[:80]!r}."
                raise SluiceError("invalid-field", detail, field="where")
        return names, lambda cells: compile_test(test, cells), count_of(test)

    async def close(self) -> None:
        """Let go of it; may be called again."""
        self._rows.close()
        await self._reader.close()
