"""Import a stored CSV file as a table.

The rows go into an artefact that is a table, so that rows and cursor commit together: each good row
is there exactly once. What is wrong goes into a report, whose length is committed with them, too.
Appending makes a new version that begins with the rows of the newest one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from errors import SluiceError
from jobs.kinds import Column, Context, TableWriter
from jobs.kinds._csv import (
    CsvParams,
    ErrorReport,
    Fault,
    Name,
    Reading,
    opened,
    report_name,
    wrong_file_name,
)
from jobs.kinds._records import stem_of

KIND = "csv.import"
TITLE = "Import a stored CSV file as a table"
UNIT = "bytes"
EXACTLY_ONCE = True
RUNNER = "child"
CPU_BOUND = True
PAUSE = "within 64 KiB; repeats nothing after a pause, a tenth of a second's work after a crash"

_COPY_ROWS = 2000


class Params(CsvParams, kw_only=True, forbid_unknown_fields=True):
    """How the file is to be read, and what becomes of it.

    ``max_errors`` is how many rows may be wrong with ``on_error`` skip.
    """

    table: Annotated[
        Name | None, msgspec.Meta(description="the table's name; default: the source's, no suffix")
    ] = None
    mode: Annotated[
        Literal["replace", "append"],
        msgspec.Meta(description="append: behind the rows of the newest version"),
    ] = "replace"
    on_error: Annotated[
        Literal["fail", "skip"],
        msgspec.Meta(description="a wrong row fails the job, or is reported and left out"),
    ] = "fail"
    expires_s: Annotated[
        Annotated[int, msgspec.Meta(ge=60, le=31_536_000)] | None,
        msgspec.Meta(description="the table is kept so long; default: until it is deleted"),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table is not None and (wrong := wrong_file_name(self.table)):
            raise ValueError(f"The field `table` {wrong}")


class Cursor(msgspec.Struct):
    """Where it stands."""

    source: str
    begun: str = ""  # the table that is appended to
    copied: int = 0  # of its rows
    at: int = 0
    row: int = 0
    bad: int = 0
    lines: int = 0
    first: str = ""  # what was wrong first


async def run(ctx: Context, params: Params) -> dict[str, Any]:
    """Copy the rows of the newest version, if they are wanted, then read the file once."""
    at = msgspec.convert(ctx.cursor, Cursor) if ctx.cursor else Cursor(params.source)
    async with opened(ctx, at.source, params, first=ctx.cursor is None) as reading:
        if not ctx.cursor:
            at.source = reading.file.info.id
            at.begun = await _newest(ctx, params, _name(params, reading))
            await ctx.checkpoint(msgspec.structs.asdict(at))
        return await _import(ctx, params, reading, at)


def _name(params: Params, reading: Reading) -> str:
    return params.table or stem_of(reading.file.info.name)


async def _newest(ctx: Context, params: Params, name: str) -> str:
    """The id of the table to append to; empty if there is none. Raises invalid-field."""
    try:
        info = await ctx.files.find(name)
    except SluiceError as error:
        if error.code != "file-unknown":
            raise
        return ""
    if info.layout != "table":
        raise SluiceError(
            "invalid-field", f"table: {name!r} is a file, but no table.", field="params.table"
        )
    return info.id if params.mode == "append" else ""


async def _import(ctx: Context, params: Params, reading: Reading, at: Cursor) -> dict[str, Any]:
    name = _name(params, reading)
    if at.begun:
        table = await _appended(ctx, params, reading, at, name)
    else:
        await reading.find_types(ctx)
        table = await _table(ctx, params, reading, name, reading.columns)
    await _read_rows(ctx, params, reading, at, table)
    return {
        "table": name,
        "source": at.source,
        "rows": table.rows,
        "rows_wrong": at.bad,
        "columns": [{"name": column.name, "type": column.type} for column in table.columns],
    }


async def _table(
    ctx: Context, params: Params, reading: Reading, name: str, columns: list[Column]
) -> TableWriter:
    file = reading.file
    about = {"source": file.info.name, "delimiter": file.delimiter, "null": params.null}
    return await ctx.table(name, columns, about=about, expires_s=params.expires_s)


async def _appended(
    ctx: Context, params: Params, reading: Reading, at: Cursor, name: str
) -> TableWriter:
    """A table that begins with the rows of another one, whose columns and types it has."""
    old = await ctx.files.table(at.begun)
    try:
        columns = list(old.columns)
        if [column.name for column in columns] != reading.names:
            raise SluiceError(
                "invalid-data", f"The table {name!r} has other columns than the file."
            )
        declared = params.types
        for column in columns:
            if declared.get(column.name, column.type) != column.type:
                detail = f"types: {column.name!r} is {column.type} in the table {name!r}."
                raise SluiceError("invalid-field", detail, field="params.types")
        reading.use(columns)
        table = await _table(ctx, params, reading, name, columns)
        while rows := await old.read(at.copied, _COPY_ROWS):
            at.copied += len(rows)
            await table.write(rows, msgspec.structs.asdict(at))
            await ctx.checkpoint(
                phase="copying", message=f"{at.copied:,} of {old.rows:,} rows", eta=False
            )
    finally:
        await old.close()
    return table


async def _read_rows(
    ctx: Context, params: Params, reading: Reading, at: Cursor, table: TableWriter
) -> None:
    file = reading.file
    report = ErrorReport(ctx, report_name(file.info.name), params.max_errors, at.lines)
    await ctx.checkpoint(phase="importing", done=at.at, total=file.info.bytes, eta=True)
    async for block in file.blocks(at.at or file.start, at.row):
        values, _, faults = reading.convert(block)
        await ctx.checkpoint()
        if faults:
            await _note(params, reading, at, report, faults)
        at.at, at.row = block.end, block.row
        cursor = msgspec.structs.asdict(at)
        await table.write_cells(values, cursor)
        await ctx.checkpoint(
            cursor, done=block.end, message=f"{table.rows:,} rows, {at.bad:,} left out"
        )


async def _note(
    params: Params, reading: Reading, at: Cursor, report: ErrorReport, faults: list[Fault]
) -> None:
    """Report what is wrong, or fail if that is too much."""
    at.first = at.first or _said(faults[0])
    at.bad += len({fault.row for fault in faults})
    if params.on_error == "fail" or at.bad > params.max_errors:
        name = reading.file.info.name
        many = f"more than {params.max_errors:,} rows are wrong, at first "
        said = at.first if params.on_error == "fail" else many + at.first
        raise SluiceError("invalid-data", f"{name!r}: {said}.", source=name, row=faults[0].row)
    await report.add(faults)
    at.lines = report.lines


def _said(fault: Fault) -> str:
    column = f", column {fault.column!r}" if fault.column else ""
    value = f": {fault.value[:80]!r}" if fault.value else ""
    return f"row {fault.row:,}{column}: {fault.reason}{value}"
