"""Writes a line for each step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import msgspec

from errors import SluiceError
from jobs.kinds import Context

KIND = "steps"
TITLE = "Lines in a child"
RUNNER = "child"


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How many at least, how slowly, and how it ends."""

    steps: int
    go: str = ""  # it goes on with steps until this file is there
    pause_s: float = 0.0
    fail: Literal["", "code", "bug"] = ""


async def run(ctx: Context, params: Params) -> dict[str, object]:
    """The cursor is the next step."""
    n = ctx.cursor or 0
    ctx.log(f"began at {n}")
    file = await ctx.artifact("lines.txt", "text/plain")
    try:
        while n < params.steps or (params.go and not Path(params.go).exists()):
            if n == 1:
                print("printed", flush=True)
            await file.write(b"%d\n" % n)
            time.sleep(params.pause_s)
            n += 1
            await ctx.checkpoint(n, done=n, total=max(n, params.steps))
        if params.fail == "code":
            raise SluiceError("invalid-data", "as was asked for")
        if params.fail == "bug":
            raise ZeroDivisionError
    finally:
        ctx.log("ended")
    return {"steps": n, "attempt": ctx.attempt}
