"""The first rows of a stored file, as an export would choose and write them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from time import perf_counter
from typing import NamedTuple

from errors import SluiceError
from jobs.files import Files
from jobs.kinds._records import Records, Row, open_records, source_of
from jobs.kinds._tables import TableRecords
from jobs.kinds._where import Judge, columns_of, compile_test, count_of
from jobs.tables import TABLE, read_filter
from storage import File

_SLICE_S = 0.002
_STEP_TESTS = 2000  # rows x tests between two looks at the clock
_MOST_ROWS = 5000  # looked at
_MOST_BYTES = 1 << 20  # of the file


class Sample(NamedTuple):
    """Names of columns, and rows as texts; ``whole`` if all rows of the file were looked at."""

    columns: list[str]
    rows: list[list[str | None]]
    whole: bool


async def sample(
    files: Files, file: File, columns: Sequence[str], where: str | None, limit: int
) -> Sample:
    """The first rows that pass a filter, among a bounded number; no slice is long.

    Raises invalid-field, also for a name that is no column, and invalid-data for a file that has
    no rows or whose first ones are wrong.
    """
    async with _opened(files, file) as records:
        judge, tests = _filter(records, where)
        _check("columns", columns, records)
        found: list[Row] = []
        names = dict.fromkeys(columns or records.names)
        looked, whole, began = 0, True, perf_counter()
        step = min(limit, _STEP_TESTS // (tests + 1) + 1)
        async with aclosing(records.batches(records.start, 0, step)) as batches:
            async for rows, end in batches:
                looked += len(rows)
                if not columns and not records.names:
                    for row in rows:
                        names |= dict.fromkeys(row)
                found += filter(judge, rows)
                far = end is not None and records.done(end) > _MOST_BYTES
                if len(found) >= limit or looked >= _MOST_ROWS or far:
                    whole = False
                    break
                if perf_counter() - began > _SLICE_S:
                    await asyncio.sleep(0)
                    began = perf_counter()
        texts = [records.text(name) for name in names]
        return Sample(list(names), [[text(row) for text in texts] for row in found[:limit]], whole)


@asynccontextmanager
async def _opened(files: Files, file: File) -> AsyncIterator[Records]:
    source = source_of(file, "auto", None)
    if file.layout == TABLE:
        table = await files.table(file)
        try:
            yield TableRecords(source, table)
        finally:
            await table.close()
    else:
        reader = await files.reader(file)
        try:
            yield await open_records(source, reader)
        finally:
            await reader.close()


def _filter(records: Records, where: str | None) -> tuple[Judge | None, int]:
    """The filter, and how many tests it has."""
    if where is None:
        return None, 0
    test = read_filter(where)
    _check("where", columns_of(test), records)
    return compile_test(test, records), count_of(test)


def _check(field: str, names: Sequence[str], records: Records) -> None:
    """Refuse names that are no columns, where these are known."""
    unknown = [name for name in names if name not in records.names] if records.names else []
    if unknown:
        detail = f"{field}: there is no column named {unknown[0][:80]!r}."
        raise SluiceError("invalid-field", detail, field=field)
