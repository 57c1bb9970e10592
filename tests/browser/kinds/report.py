"""A process that shows all that a page can: a log, an artefact, no known end, a failure."""

from __future__ import annotations

import msgspec

from errors import SluiceError
from jobs.kinds import Context

KIND = "report"
TITLE = "Write a report"
UNIT = "rows"


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What it is about."""

    rows: int = 200
    delay_s: float = 0
    total: bool = True
    fails_at: int | None = None


async def run(ctx: Context, params: Params) -> dict[str, object]:
    """Write row after row, and tell each tenth."""
    out = await ctx.artifact("report.csv", "text/csv")
    row = ctx.cursor or 0
    while row < params.rows:
        total = params.rows if params.total else None
        await ctx.checkpoint(row, done=row, total=total, phase="writing")
        if row == params.fails_at:
            raise SluiceError("invalid-data", f"Row {row}: “2026-13-04” is no date.")
        if row % 10 == 0:
            ctx.log(f"row {row} of {params.rows}: mean 4.{row % 97:02}, deviation 0.{row % 89:02}")
        await out.write(b"%d,4.2,0.3\n" % row)
        if params.delay_s:
            await ctx.sleep(params.delay_s)
        row += 1
    return {"rows": row, "mean": 4.21}
