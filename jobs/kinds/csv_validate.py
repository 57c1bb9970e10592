"""Look through a stored CSV file: is each row as the others, each cell of its column's type?

Nothing is made but a report about what is wrong; the cursor is a place between two blocks, with
what was counted so far.
"""

from __future__ import annotations

from typing import Any

import msgspec

from jobs.kinds import Context
from jobs.kinds._csv import CsvParams, ErrorReport, Reading, opened, report_name

KIND = "csv.validate"
TITLE = "Check the rows and types of a stored CSV file"
UNIT = "bytes"
RUNNER = "child"
CPU_BOUND = True
PAUSE = "within 64 KiB; repeats nothing"


class Params(CsvParams, kw_only=True, forbid_unknown_fields=True):
    """How the file is to be read; ``max_errors`` is how many lines the report may have."""


class Cursor(msgspec.Struct):
    """Where it stands."""

    source: str
    at: int = 0
    row: int = 0
    bad: int = 0
    lines: int = 0
    nulls: list[int] = []
    errors: list[int] = []
    fits: dict[str, str] = {}  # of columns with errors


async def run(ctx: Context, params: Params) -> dict[str, Any]:
    """Read it once; the report is the result's file."""
    at = msgspec.convert(ctx.cursor, Cursor) if ctx.cursor else Cursor(params.source)
    async with opened(ctx, at.source, params, first=ctx.cursor is None) as reading:
        at.source = reading.file.info.id
        await ctx.checkpoint(msgspec.structs.asdict(at))
        await reading.find_types(ctx)
        return await _validate(ctx, params, reading, at)


async def _validate(ctx: Context, params: Params, reading: Reading, at: Cursor) -> dict[str, Any]:
    file, converters = reading.file, reading.converters
    for converter, nulls, errors in zip(converters, at.nulls, at.errors, strict=False):
        converter.nulls, converter.errors = nulls, errors
        converter.fits = at.fits.get(converter.column.name, converter.fits)
    report = ErrorReport(ctx, report_name(file.info.name), params.max_errors, at.lines)
    await report.add([])
    async for block in file.blocks(at.at or file.start, at.row):
        _, _, faults = reading.convert(block)
        await ctx.checkpoint()
        if faults:
            at.bad += len({fault.row for fault in faults})
            await report.add(faults)
        at.at, at.row, at.lines = block.end, block.row, report.lines
        at.nulls = [converter.nulls for converter in converters]
        at.errors = [converter.errors for converter in converters]
        at.fits = {c.column.name: c.fits for c in converters if c.errors}
        await ctx.checkpoint(
            msgspec.structs.asdict(at),
            done=block.end,
            total=file.info.bytes,
            phase="checking",
            message=f"{at.row:,} rows, {at.bad:,} of them wrong",
            eta=True,
        )
    return {
        "file": file.info.id,
        "name": file.info.name,
        "delimiter": file.delimiter,
        "rows": at.row,
        "rows_wrong": at.bad,
        "cells_wrong": sum(at.errors),
        "reported": report.lines,
        "columns": [
            {"name": c.column.name, "type": c.column.type, "nulls": c.nulls}
            | ({"errors": c.errors, "fits": c.fits} if c.errors else {})
            for c in converters
        ],
    }
